"""What the models are asked, and how their replies are read.

The prompts are constants with a snapshot test, so that they cannot drift in silence:
a changed word changes every number measured with it.
"""

import contextlib
import re
from dataclasses import dataclass
from json import JSONDecoder

from mpa.presets import PRESETS
from mpa.refusals import is_refusal
from mpa.replies import (
    ANSWER_WORDS,
    INLINE,
    INLINE_LETTER,
    LABEL,
    QUESTION_WORDS,
    bare,
    first_line,
    in_reasoning,
    is_frame,
    strip_reasoning,
)

# Paper, section 3.1: a task prompt T_pr for each kind of VQA. The wording is ours; what each
# asks for is the paper's. "general" serves images of no particular kind.
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
    return f"{question}{PRESETS[preset].separator}{ANSWER_SUFFIX}"


def train_prompt(question: str, preset: str = "paper") -> str:
    """What PL trains on: the prompt that the S-VLM is evaluated with, or under `released` the bare question."""
    return answer_prompt(question, preset) if PRESETS[preset].train_suffix else question


@dataclass(frozen=True)
class Annotation:
    """A parsed PA reply. `reason` is None, or says why the reply cannot be used."""

    question: str | None
    answer: str | None
    reason: str | None = None


# A question mark that ends a sentence.
_QUESTION_MARK = re.compile(r"(?<![?؟？!])[?؟！!]*[?؟](?=[\s\"'”’)*\]]|$|[A-ZÀ-ÞА-Я])|？+")
# What it says in quotes or brackets are not its own questions: Who asked "Why? When?"?
_QUOTED = re.compile(
    r"\"[^\"]*\"|“[^“”]*”|„[^„“”]*[“”]|«[^«»]*»|「[^「」]*」|『[^『』]*』|‘[^‘’]*’|(?<!\w)'[^']*'(?!\w)|\([^()]*\)|（[^（）]*）"
)
_ENDED = re.compile(r"[?؟？.!。！…;][\"'”’»」』)*_`\]]*\Z")
_OPTION = re.compile(r"(?:[-*•] )?\(?[A-Fa-f1-6][).:] |(?:options|choices)\b", re.IGNORECASE)
# What a chat template or a train record would take for its own mark, if a question or answer held it.
_MARK = re.compile(r"<image>|<video>|<\|[^|\n]{1,99}\|>")
# The prompt's own <question>, or what models put in its place.
_BLANK = re.compile(
    rf"[<\[{{(](?=[^<>]{{0,80}}(?:{QUESTION_WORDS}|{ANSWER_WORDS}|your|here|insert|\.\.\.))[^<>]{{1,80}}[>\]}})]"
    rf"|(?:(?:your|the|my) )?(?:{QUESTION_WORDS}|{ANSWER_WORDS})(?: here)?[.?:]?|[\s.…_–—|\"'`{{}}\[\]-]+",
    re.IGNORECASE,
)
_TAG = re.compile(rf"<(/?)(?:(?P<question>{QUESTION_WORDS}|q)|(?:{ANSWER_WORDS}|a))>", re.IGNORECASE)
_KEY = re.compile(
    rf"""(["'])(?:(?:predicted|generated|correct|short|final|vqa|the)[_ ])?"""
    rf"""(?:(?P<question>{QUESTION_WORDS}|q)|(?:{ANSWER_WORDS}|a))(?:_text|\d{{1,2}})?\1\s*[:：]\s*""",
    re.IGNORECASE,
)
_SINGLE_QUOTED = re.compile(r"'((?:[^'\\\n]|\\.|'(?=\w))*)'")
_SCALAR = re.compile(r"-?\d[\d.,]*%?(?<![.,])|true\b|false\b|yes\b|no\b", re.IGNORECASE)
_RELEASED_QUESTION = re.compile(r"question:\s*+", re.IGNORECASE)
_RELEASED_ANSWER = re.compile(r"answer:\s*([^\n]*)", re.IGNORECASE)


def parse_annotation(
    reply: str, preset: str = "paper", keep_refusals: bool = False, marks: frozenset[str] = frozenset()
) -> Annotation:
    """Read question and answer from a PA reply.

    `paper`: the first question with the answer that follows it, behind labels ("Question:", "**Q1:**", "### Answer",
    "Frage:" …), as keys of JSON, or in tags; reasoning before them is passed over. A question may run over
    lines; an answer is one line. `reason` says why they cannot be used: reasoning alone, no question, two, no
    answer, a mark of the prompt format such as <image> or one of `marks` in them, or, unless `keep_refusals`, an
    answer that declines.
    `released`: the text before the first "?" after "Question:", and the line after "Answer:",
    each null when it is not there; nothing is refused.

    >>> parse_annotation("Question: What is it?\\nAnswer: a cat")
    Annotation(question='What is it?', answer='a cat', reason=None)
    """
    if not PRESETS[preset].checked:
        answer = _RELEASED_ANSWER.search(reply)
        return Annotation(_released_question(reply), answer and answer.group(1).strip())

    text = strip_reasoning(reply)
    if text is None:
        return Annotation(None, None, "only reasoning, no answer")
    key = _KEY.search(text)
    as_json = key and not any(kind == "question" for kind, _ in _parts(text[: key.start()]))
    question, answer, reason = _first_pair(_json_parts(text) if as_json else _parts(text))
    if not question:
        declined = not (answer or reason or keep_refusals) and is_refusal(first_line(text))
        return Annotation(None, answer, "a refusal" if declined else reason or "no question")
    if reason or len(_QUESTION_MARK.findall(_QUOTED.sub(" ", question))) > 1:
        return Annotation(question, answer, reason or "two questions")
    if not answer:
        return Annotation(question, None, "no answer")
    if holds_mark(f"{question}\n{answer}", marks):
        return Annotation(question, answer, "a mark of the prompt format")
    if not keep_refusals and is_refusal(answer):
        return Annotation(question, answer, "a refusal")
    return Annotation(question, answer)


def holds_mark(text: str, marks: frozenset[str] = frozenset()) -> bool:
    """Does a text hold what a chat template or a train record takes for its own: <image>, <|…|>, or one of a model's `marks`?"""
    return bool(_MARK.search(text)) or any(mark.strip() and mark in text for mark in marks)


def _released_question(reply: str) -> str | None:
    r"""What `question:\s*([^\n]*?)\?` finds, without trying every length of the white space, nor a line twice."""
    mark = line_break = -1
    for label in _RELEASED_QUESTION.finditer(reply):
        start = label.end()
        if mark < start:
            mark = reply.find("?", start)
        if line_break < start:
            line_break = reply.find("\n", start) % (len(reply) + 1)  # the end where there is none
        if mark < 0:
            return None
        if mark < line_break:
            return reply[start:mark].strip()
    return None


def _json_parts(text: str) -> list[tuple[str, list[str]]]:
    """("question" or "answer", lines) of each such key of JSON or of a Python dictionary, in their order."""
    parts, decoder = [], JSONDecoder(strict=False)
    for key in _KEY.finditer(text):
        start, value = key.end(), ""
        if text[start : start + 1] == '"':
            with contextlib.suppress(ValueError):  # cut off
                value = decoder.raw_decode(text, start)[0]
        elif plain := (_SINGLE_QUOTED.match(text, start) or _SCALAR.match(text, start)):
            value = plain[plain.lastindex or 0].replace("\\'", "'")
            value = {"true": "yes", "false": "no"}.get(value.lower(), value)
        parts.append(("question" if key["question"] else "answer", value.splitlines()))
    return parts


def _parts(text: str) -> list[tuple[str, list[str]]]:
    """("question" or "answer", lines) of each label, in their order."""
    if "</" in text:
        text = _TAG.sub(lambda tag: "\n" if tag[1] else "\nQuestion:\n" if tag["question"] else "\nAnswer:\n", text)
    parts, single = [], False
    for line in INLINE.sub("\n", text).splitlines():
        label = LABEL.match(line)
        if label and (label["question"] or label["q"]):
            single = bool(label["q"])
            asked, *answered = INLINE_LETTER.split(line[label.end() :], maxsplit=1) if single else [line[label.end() :]]
            parts.append(("question", [asked]))
            parts += [("answer", [a[LABEL.match(a).end() :]]) for a in answered]
        elif label and (label["answer"] or single):
            parts.append(("answer", [line[label.end() :]]))
        elif parts:
            parts[-1][1].append(line)
    return parts


def _first_pair(parts: list[tuple[str, list[str]]]) -> tuple[str | None, str | None, str | None]:
    """(question, answer, why they do not go together) of the first pair that is not the prompt's own template."""
    question = answer = reason = None
    for kind, lines in parts:
        if kind == "question":
            text = _question(lines)
            if text and _BLANK.fullmatch(text):
                reason = "the prompt's template, not filled in"
            elif text and question:
                return question, None, "two questions" if answer is None else "no answer"
            elif not answer:  # one before its question is no answer to it
                question = text
        elif question is not None:
            answer = next((bare(line).strip("* ") for line in lines if not is_frame(line)), "")
            if _BLANK.fullmatch(answer):
                answer = ""
            elif question and answer:
                return question, answer, None
    return question, answer, None if question else reason


def _question(lines: list[str]) -> str:
    """The question that these lines hold: to where it ends, with options and what else is asked, without remarks."""
    found = []
    for line in (line.strip() for line in lines if not is_frame(line)):
        if not found or not _ENDED.search(found[-1]) or _OPTION.match(line) or _QUESTION_MARK.search(line):
            found.append(line)
    return bare(" ".join(found)).strip("* ")


def with_question_mark(question: str) -> str:
    """A question of the released code's PA files with the "?" that it cut off."""
    return question if question.rstrip()[-1:] in "?？؟" else f"{question}?"


def follow_up_prompt(reply: str, preset: str, marks: frozenset[str] = frozenset()) -> str | None:
    """What PI asks the L-VLM about its own annotation; None where the annotation cannot be used."""
    parsed = parse_annotation(reply, preset, marks=marks)
    usable = parsed.question and parsed.answer and not parsed.reason
    return answer_prompt(parsed.question, preset) if usable else None


def annotation_is_complete(reply: str) -> bool:
    """True once the line that ends the answer is written: generation can stop. Never within reasoning.

    Everything `parse_annotation` reads under the `paper` preset lies before this point.
    """
    ended = reply.rpartition("\n")
    if ended[2].strip() or in_reasoning(reply):
        return False
    parsed = parse_annotation(ended[0], keep_refusals=True)
    return bool(parsed.question and parsed.answer)


def answer_is_complete(reply: str) -> bool:
    """True once `first_line(reply)` cannot change any more. Never within reasoning."""
    return not in_reasoning(reply) and bool(first_line(reply.rpartition("\n")[0]))


# What a reply may end with, by name: see `Request.stop`. Where the prompt has opened the reasoning, its tag stands in front.
STOPS = {"annotation": annotation_is_complete, "answer": answer_is_complete}
