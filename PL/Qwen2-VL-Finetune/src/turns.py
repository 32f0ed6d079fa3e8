"""A conversation as the text of its prompts and of its answers, in the form in which the model is asked."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from mpa.files.records import InputError
from mpa.models import families


class Turn(NamedTuple):
    """`prompt` is the text since the previous answer's end; `answer` includes the end token."""

    prompt: str
    answer: str
    images: int


def special_tokens(tokenizer) -> re.Pattern:
    """Matches any special token of the tokenizer."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted({*tokenizer.all_special_tokens, *added}))))


def turns(messages: list[dict], processor) -> Iterator[Turn]:
    """The turns of chat-template messages. Raises ValueError if the template does not append to a conversation."""
    if families.writes_prefix(processor):
        yield _prefix_turn(messages, processor)
        return
    rendered = ""
    for i in (i for i, message in enumerate(messages) if message["role"] == "user"):
        prompt = families.chat_text(processor, messages[: i + 1])
        answered = families.chat_text(processor, messages[: i + 2], add_generation_prompt=False)
        block = _after_prompt(prompt, answered, messages[: i + 2], processor)
        answer, rest = _cut(block, _text(messages[i + 1]), processor.tokenizer)
        if not prompt.startswith(rendered):
            raise ValueError("the chat template does not keep the conversation in order.")
        yield Turn(prompt[len(rendered) :], answer, _images(messages[i]))
        rendered = answered[: len(answered) - len(rest)]


def refuse_dropped_turns(samples: list[dict], processor) -> None:
    """Raises InputError, with the record and the turn, where the chat template drops a turn's text, as a system prompt."""
    forms = {}
    for sample in samples:
        forms.setdefault(families.form(sample["messages"]), sample)
    for sample in forms.values():
        try:
            families.check_template(processor, sample["messages"])
        except ValueError as error:
            raise InputError(f"{sample['where']}: {error}.") from None


def _after_prompt(prompt: str, answered: str, messages: list[dict], processor) -> str:
    """What the template writes of the answer after the prompt that generation starts from.

    LLaVA-OneVision's template opens an answered turn otherwise than it prompts for one: the answer alone counts then.
    """
    if answered.startswith(prompt):
        return answered[len(prompt) :]
    asked, text = families.chat_text(processor, messages[:-1], add_generation_prompt=False), _text(messages[-1])
    block = answered.removeprefix(asked)
    if not answered.startswith(asked) or text not in block:
        raise ValueError("the chat template does not keep the conversation in order.")
    return block[block.index(text) :]


def _cut(block: str, text: str, tokenizer) -> tuple[str, str]:
    """(the answer with its end token, what the template writes after it).

    The end token is the tokenizer's, or the special token that the template writes there (Gemma's <end_of_turn>). A
    template that closes no turn (LLaVA-1.5's, which writes a space) gets the tokenizer's in place of what it writes.
    """
    answer, end, rest = block.partition(tokenizer.eos_token)
    if not end and (found := special_tokens(tokenizer).search(block)):
        answer, end, rest = block[: found.start()], found[0], block[found.end() :]
    if not end and text in block:
        answer, end, rest = block[: block.index(text) + len(text)], tokenizer.eos_token, ""
        if block[len(answer) :].strip():
            raise ValueError("the chat template closes an answer with text that is no special token.")
    if not (answer and end):
        raise ValueError("the chat template does not keep the conversation in order.")
    return answer + end, rest


def _prefix_turn(messages: list[dict], processor) -> Turn:
    """PaliGemma's: images, question, line break, answer. Its processor writes the line break where there is an image."""
    if len(messages) != 2:
        raise ValueError("this model takes one question and its answer; it has no form for more turns.")
    prompt, images = families.chat_text(processor, messages[:1]), _images(messages[0])
    if not images:
        prompt = f"{processor.tokenizer.bos_token}{prompt}\n"
    return Turn(prompt, _text(messages[1]) + processor.tokenizer.eos_token, images)


def _text(message: dict) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def _images(message: dict) -> int:
    return sum(part["type"] == "image" for part in message["content"])
