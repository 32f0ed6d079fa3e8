"""The prompts, and the parsing of the L-VLM's annotations.

The prompts are constants with a snapshot test, since a changed word changes every result.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecoder

from mpa.answers.refusals import is_refusal
from mpa.answers.replies import (
    ANSWER_WORDS,
    END_TOKENS,
    INLINE,
    INLINE_LETTER,
    LABEL,
    QUESTION_WORDS,
    bare,
    first_line,
    in_reasoning,
    introduces,
    is_frame,
    strip_reasoning,
    undecorated,
    without_announcement,
    without_end_tokens,
)
from mpa.method.presets import PRESETS

# Paper, section 3.1: a task prompt T_pr for each kind of VQA. The content follows the paper; the wording is ours.
# "general" is for images of any kind.
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

# From the released code; it follows the question.
ANSWER_SUFFIX = "Answer the following question in a single word or phrase."


def answer_prompt(question: str, preset: str = "paper") -> str:
    """The text of the prompt, next to the image, when a model answers `question`.

    `paper` puts a space between question and suffix; `released` does not, as in the released code.
    """
    return f"{question}{PRESETS[preset].separator}{ANSWER_SUFFIX}"


def train_prompt(question: str, preset: str = "paper") -> str:
    """The prompt that PL trains on: the S-VLM's evaluation prompt; under `released`, the question alone."""
    return answer_prompt(question, preset) if PRESETS[preset].train_suffix else question


@dataclass(frozen=True)
class Annotation:
    """What the L-VLM wrote about an image. `left_out` says why it cannot be used; None if it can."""

    question: str | None
    answer: str | None
    left_out: str | None = None


# A question mark that ends a sentence.
_QUESTION_MARK = re.compile(r"(?<![?؟？!])[?؟！!]*[?؟](?=[\s\"'”’)*\]]|$|[A-ZÀ-ÞА-Я])|？+")
# Quoted or bracketed text; question marks in it do not count as questions: Who asked "Why? When?"?
_QUOTED = re.compile(
    r"\"[^\"]*\"|“[^“”]*”|„[^„“”]*[“”]|«[^«»]*»|「[^「」]*」|『[^『』]*』|‘[^‘’]*’|(?<!\w)'[^']*'(?!\w)|\([^()]*\)|（[^（）]*）"
)
_ENDED = re.compile(r"[?؟？.!。！…;][\"'”’»」』)*_`\]]*\Z")
_OPTION = re.compile(r"(?:[-*•] )?\(?[A-Fa-f1-6][).:] |(?:options|choices)\b", re.IGNORECASE)
A_MARK = "a mark of the prompt format"  # why a text is left out, see `holds_mark`
# Text that a chat template or a train record would interpret as a special token.
_MARK = re.compile(r"<image>|<video>|<\|[^|\n]{1,99}\|>")
# A placeholder that the model did not fill in: the prompt's <question>, or a variant of it.
_BLANK = re.compile(
    rf"[<\[{{(](?=[^<>]{{0,80}}(?:\.\.\.|(?<![a-zà-ÿа-яё])(?:{QUESTION_WORDS}|{ANSWER_WORDS}|your|here|insert)(?![a-zà-ÿа-яё])))"
    rf"[^<>]{{1,80}}[>\]}})]"
    rf"|(?:(?:your|the|my) )?(?:{QUESTION_WORDS}|{ANSWER_WORDS})(?: here)?[.?:]?|[\s.…_–—|\"'`{{}}\[\]-]+",
    re.IGNORECASE,
)
_TAG = re.compile(rf"<(/?)(?:(?P<question>{QUESTION_WORDS}|q)|(?:{ANSWER_WORDS}|a))>", re.IGNORECASE)
_KEY = re.compile(
    rf"""(["'])(?:(?:predicted|generated|correct|short|final|vqa|the)[_ ])?"""
    rf"""(?:(?P<question>{QUESTION_WORDS}|q)|(?:{ANSWER_WORDS}|a))(?:_text|\d{{1,2}})?\1\s*[:：]\s*""",
    re.IGNORECASE,
)
_TABLE_RULE = re.compile(r":?-+:?")
_SINGLE_QUOTED = re.compile(r"'((?:[^'\\\n]|\\.|'(?=\w))*)'")
_SCALAR = re.compile(r"-?\d[\d.,]*%?(?<![.,])|true\b|false\b|yes\b|no\b", re.IGNORECASE)
_RELEASED_QUESTION = re.compile(r"question:\s*+", re.IGNORECASE)
_RELEASED_ANSWER = re.compile(r"answer:\s*([^\n]*)", re.IGNORECASE)


def parse_annotation(
    reply: str, preset: str = "paper", keep_refusals: bool = False, marks: frozenset[str] = frozenset()
) -> Annotation:
    """Parse question and answer from a PA reply. End tokens after the answer are removed.

    `paper`: the first question and the answer that follows it, marked by labels ("Question:", "**Q1:**", "### Answer",
    "Frage:" …), JSON keys or tags, after any reasoning. A question may span several lines; an answer is one line.
    `left_out` is set for: only reasoning, no question, two questions, no answer, a prompt token such as <image> or one of
    `marks`, or, unless `keep_refusals`, a refusal.
    `released`: the text before the first "?" after "Question:", and the line after "Answer:". Each is None if missing;
    `left_out` is never set.

    >>> parse_annotation("Question: What is it?\\nAnswer: a cat")
    Annotation(question='What is it?', answer='a cat', left_out=None)
    """
    if not PRESETS[preset].checked:
        answer = _RELEASED_ANSWER.search(reply)
        return Annotation(_released_question(reply), answer and without_end_tokens(answer.group(1)).strip())

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
        return Annotation(question, answer, A_MARK)
    if not keep_refusals and is_refusal(answer):
        return Annotation(question, answer, "a refusal")
    return Annotation(question, answer)


def holds_mark(text: str, marks: frozenset[str] = frozenset()) -> bool:
    """Does a text contain a special token of the prompt format: <image>, <|…|>, an end token, or one of a model's `marks`?"""
    return bool(_MARK.search(text)) or any(mark.strip() and mark in text for mark in (*END_TOKENS, *marks))


def _released_question(reply: str) -> str | None:
    r"""The match of `question:\s*([^\n]*?)\?`, computed in linear time: the regular expression would backtrack."""
    mark = line_break = -1
    for label in _RELEASED_QUESTION.finditer(reply):
        start = label.end()
        if mark < start:
            mark = reply.find("?", start)
        if line_break < start:
            line_break = reply.find("\n", start) % (len(reply) + 1)  # the end of the reply if there is none
        if mark < 0:
            return None
        if mark < line_break:
            return reply[start:mark].strip()
    return None


def _json_parts(text: str) -> list[tuple[str, list[str]]]:
    """("question" or "answer", lines) for each such key of a JSON object or a Python dictionary, in order."""
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
    """("question" or "answer", lines) for each label, in order."""
    if "</" in text:
        text = _TAG.sub(lambda tag: "\n" if tag[1] else "\nQuestion:\n" if tag["question"] else "\nAnswer:\n", text)
    parts, single = [], False
    text = "\n".join(_without_table(text.splitlines())) if "|" in text else text
    for line in INLINE.sub("\n", text).splitlines():
        label = LABEL.match(line)
        if label and (label["question"] or label["q"]):
            single = bool(label["q"])
            rest = line[label.end() :]
            question, *answers = INLINE_LETTER.split(rest, maxsplit=1) if single else [rest]
            parts.append(("question", [question]))
            parts += [("answer", [a[LABEL.match(a).end() :]]) for a in answers]
        elif label and (label["answer"] or single):
            parts.append(("answer", [line[label.end() :]]))
        elif parts:
            parts[-1][1].append(line)
    return parts


def _without_table(lines: list[str]) -> Iterator[str]:
    """The lines, with a Markdown table's rows as labelled lines, "Question: …", or a line for each cell."""
    header: list[str] = []
    for line in lines:
        row = line.strip()
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        framed = len(row) > 1 and row[0] == row[-1] == "|"
        labels = [bool(LABEL.fullmatch(cell)) for cell in cells]
        if "|" not in row:
            header = []
            yield line
        elif (framed or header) and all(map(_TABLE_RULE.fullmatch, cells)):
            continue
        elif sum(labels) > 1:
            header = cells
        elif header and len(cells) == len(header):
            named = zip(header, cells, strict=True)
            yield from (f"{name.strip('*_: ')}: {cell}" for name, cell in named if LABEL.fullmatch(name))
        elif framed and labels[0]:
            yield f"{cells[0].strip('*_: ')}: {' '.join(cells[1:])}"
        else:
            yield from cells if framed else [line]


def _first_pair(parts: list[tuple[str, list[str]]]) -> tuple[str | None, str | None, str | None]:
    """(question, answer, reason why they do not form a pair) of the first pair that is not the prompt's template."""
    question = answer = reason = None
    for kind, lines in parts:
        if kind == "question":
            text = _question(lines)
            if text and _BLANK.fullmatch(text):
                reason = "the prompt's template, not filled in"
            elif text and question:
                return question, None, "two questions" if answer is None else "no answer"
            elif not answer:  # an answer before the question does not count
                question = text
        elif question is not None:
            answer = _answer(lines)
            if question and answer:
                return question, answer, None
    return question, answer, None if question else reason


def _answer(lines: list[str]) -> str:
    """The first of an answer's lines that says something; the first stands beside its label. "" for a placeholder."""
    for place, line in enumerate(map(without_end_tokens, lines)):
        if not is_frame(line) and not introduces(line):
            blank = _BLANK.fullmatch(line.strip()) or _BLANK.fullmatch(bare(line))
            answer = "" if blank else _content(line, "answer", own_line=place > 0)
            return "" if _BLANK.fullmatch(answer) else answer
    return ""


def _question(lines: list[str]) -> str:
    """The question in these lines, with its options and further questions, but without remarks after it."""
    found = []
    for line in (line.strip() for line in lines if not is_frame(line) and without_announcement(line.strip())):
        if not found or not _ENDED.search(found[-1]) or _OPTION.match(line) or _QUESTION_MARK.search(line):
            found.append(line)
    question = " ".join(found)
    return (
        bare(question)
        if _BLANK.fullmatch(bare(question))
        else _content(question, "question", own_line=True).strip("* ")
    )


def _content(text: str, kind: str, own_line: bool) -> str:
    """An answer or question (`kind`) without decoration, announcement, and a second label: "Question: Question: …"."""
    text = undecorated(text, own_line)
    for _ in range(6):
        label = LABEL.match(text)
        second = label and (label[kind] or (kind == "question" and label["q"])) and text[label.end() :].strip()
        inner = undecorated(without_announcement(text[label.end() :] if second else text)) or text
        if inner == text:
            break
        text = inner
    return text


def with_question_mark(question: str) -> str:
    """Restore the "?" that the released code's PA files lack."""
    return question if question.rstrip()[-1:] in "?？؟" else f"{question}?"


def follow_up_prompt(reply: str, preset: str, marks: frozenset[str] = frozenset()) -> str | None:
    """The prompt with which PI asks the L-VLM its own question; None if the annotation cannot be used."""
    parsed = parse_annotation(reply, preset, marks=marks)
    usable = parsed.question and parsed.answer and not parsed.left_out
    return answer_prompt(parsed.question, preset) if usable else None


def annotation_is_complete(reply: str) -> bool:
    """True once the answer's line is complete, so generation can stop. Never inside reasoning.

    Under `paper`, `parse_annotation` reads nothing after this point.
    """
    ended = reply.rpartition("\n")
    if ended[2].strip() or in_reasoning(reply):
        return False
    parsed = parse_annotation(ended[0], keep_refusals=True)
    return bool(parsed.question and parsed.answer)


def answer_is_complete(reply: str) -> bool:
    """True once `first_line(reply)` can no longer change. Never inside reasoning."""
    return not in_reasoning(reply) and bool(first_line(reply.rpartition("\n")[0]))


# Stop conditions by name, see `Request.stop`. If the prompt opened a reasoning block, the reply starts with its tag.
STOPS = {"annotation": annotation_is_complete, "answer": answer_is_complete}
