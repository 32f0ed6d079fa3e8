"""What the models are asked, and how their replies are read.

The prompts are constants with a snapshot test, so that they cannot drift in silence:
a changed word changes every number measured with it.
"""

import re
from dataclasses import dataclass

# Paper, section 3.1: a task prompt T_pr for each kind of VQA. The wording is ours; what each
# asks for is the paper's. "general" serves pictures of no particular kind.
_TWO_LINES = "Reply with two lines only:\nQuestion: <question>\nAnswer: <answer>"
TASK_PROMPTS = {
    "text": (
        "Write one question about this image that needs the text in the image to be read or "
        "reasoned about, and its correct answer. The answer is a word, a phrase, or yes or no. " + _TWO_LINES
    ),
    "chart": (
        "Write one question about the data plotted in this chart, and its correct answer: look up "
        "a value, compare values, describe a trend, or infer something from them. "
        "The answer is a word, a number, a phrase, or yes or no. " + _TWO_LINES
    ),
    "knowledge": (
        "Write one question that is grounded in this image but needs knowledge from outside it "
        "(common sense, culture, history, science, everyday life), and its correct answer. "
        "The answer is one word. " + _TWO_LINES
    ),
    "general": (
        "Write one question about this image that can be answered by looking at it, "
        "and its correct answer. The answer is a word, a phrase, or yes or no. " + _TWO_LINES
    ),
}

# Published with the paper's code; the model sees it after the question.
ANSWER_SUFFIX = "Answer the following question in a single word or phrase."


def answer_prompt(question: str, preset: str = "paper") -> str:
    """The text a model sees beside the image when it answers `question`.

    `paper` puts a space between question and suffix; `released` does not, as the released code.
    """
    return f"{question}{'' if preset == 'released' else ' '}{ANSWER_SUFFIX}"


def train_prompt(question: str, preset: str = "paper") -> str:
    """What PL trains on: the prompt that the S-VLM is evaluated with, or under `released` the bare question."""
    return question if preset == "released" else answer_prompt(question)


@dataclass(frozen=True)
class Annotation:
    """A parsed PA reply. `reason` is None, or says why the reply cannot be used."""

    question: str | None
    answer: str | None
    reason: str | None = None


# A label at the start of a line, as models decorate it: "- **Question:** …", "1. Question: …"; an answer's
# also behind the question on one line: "Question: …? Answer: …".
_LABEL = re.compile(
    r"(?:^[ \t\-*#>\d.)]*|(?<=[?？؟])[ \t*]+(?=answer))(question|answer)[ \t*]*[:：][ \t*]*",
    re.IGNORECASE | re.MULTILINE,
)
# A question mark that ends a sentence; not the one in: What does the sign "WHY?" say?
_QUESTION_MARK = re.compile(r"[?؟]+(?=\s|$)|？+")
# What a chat template or a train record would take for its own mark, if a question or answer held it.
_MARK = re.compile(r"<image>|<video>|<\|[^|\n]*\|>")
_RELEASED_QUESTION = re.compile(r"question:\s*([^\n]*?)\?", re.IGNORECASE)
_RELEASED_ANSWER = re.compile(r"answer:\s*([^\n]*)", re.IGNORECASE)


def parse_annotation(reply: str, preset: str = "paper") -> Annotation:
    """Read question and answer from a PA reply.

    `paper`: the text after the first "Question:" (it keeps its question mark) and after the first
    "Answer:" that follows, on the label's line or the next. A question that holds two questions, an
    empty one, an empty answer, or a mark such as <image>, cannot be used.
    `released`: the text before the first "?" after "Question:", and the line after "Answer:",
    each null when it is not there; nothing is refused.

    >>> parse_annotation("Question: What is it?\\nAnswer: a cat")
    Annotation(question='What is it?', answer='a cat', reason=None)
    """
    if preset == "released":
        question, answer = _RELEASED_QUESTION.search(reply), _RELEASED_ANSWER.search(reply)
        return Annotation(question and question.group(1).strip(), answer and answer.group(1).strip())

    question = answer = None
    parts = _LABEL.split(reply)  # what stands before, then label, text, label, text …
    for label, text in zip(parts[1::2], parts[2::2], strict=True):
        text = first_line(text).strip("* ")
        if label.lower() == "question" and question is None:
            question = text
        elif label.lower() == "answer" and question is not None:
            answer = text
            break
    if not question:
        return Annotation(None, answer, "no question")
    if len(_QUESTION_MARK.findall(question)) > 1:
        return Annotation(question, answer, "two questions")
    if not answer:
        return Annotation(question, None, "no answer")
    if _MARK.search(question + answer):
        return Annotation(question, answer, "a mark of the prompt's format in it")
    return Annotation(question, answer)


def with_question_mark(question: str) -> str:
    """A question of the released code's PA files with the "?" that it cut off."""
    return question if question.rstrip()[-1:] in "?？؟" else f"{question}?"


def follow_up_prompt(reply: str, preset: str) -> str | None:
    """What PI asks the L-VLM about its own annotation; None where the annotation cannot be used."""
    parsed = parse_annotation(reply, preset)
    usable = parsed.question and parsed.answer and not parsed.reason
    return answer_prompt(parsed.question, preset) if usable else None


def annotation_is_complete(reply: str) -> bool:
    """True once the line that ends the answer is written: generation can stop.

    Everything `parse_annotation` reads under the `paper` preset lies before this point.
    """
    parsed = parse_annotation(reply)
    last_line = reply.rsplit("\n", 1)[-1]
    return bool(parsed.question and parsed.answer) and not last_line.strip()


def first_line(reply: str) -> str:
    """The first line of a reply that is not blank: the short answer that was asked for."""
    return next((line.strip() for line in reply.splitlines() if line.strip()), "")


def answer_is_complete(reply: str) -> bool:
    """True once `first_line(reply)` cannot change any more."""
    return bool(first_line(reply)) and "\n" in reply.lstrip()


# What a reply may end with, by name: see `Request.stop`.
STOPS = {"annotation": annotation_is_complete, "answer": answer_is_complete}
