"""What the models are asked, and how their replies are read.

The prompts are constants with a snapshot test, so that they cannot drift in silence:
a changed word changes every number measured with it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mpa.normalising import ANSWER_WORDS, unwrap

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


# --- reasoning ------------------------------------------------------------------------------------------

_TAGS = "think|thinking|thought|thoughts|reasoning|reason|analysis|reflection|scratchpad|seed:think"
_REASONING = re.compile(
    rf"(?P<close></(?:{_TAGS})>|\[/think\]|◁/think▷|<\|end_of_thought\|>|<\|/think\|>)"
    rf"|<(?:{_TAGS})>|\[think\]|◁think▷|<\|begin_of_thought\|>|<\|think\|>",
    re.IGNORECASE,
)


def strip_reasoning(text: str) -> str:
    """`text` without its reasoning blocks, as <think>…</think>; "" where nothing else has arrived.

    A closing tag alone belongs to a block that the chat template has opened. A block that is not closed goes to the end.
    """
    kept, depth, at = [], 0, 0
    for tag in _REASONING.finditer(text):
        if tag["close"]:
            kept = kept if depth else []
            depth = max(0, depth - 1)
        else:
            kept += [] if depth else [text[at : tag.start()]]
            depth += 1
        at = tag.end()
    text = "".join([*kept, text[at:]]) if not depth else "".join(kept)
    return text if text.strip() else ""


def opened_reasoning(prompt: str) -> str:
    """The tag with which a rendered prompt opens the reply's reasoning, or ""."""
    tags = list(_REASONING.finditer(prompt[-100:]))
    open_at_end = tags and not tags[-1]["close"] and not prompt[-100:][tags[-1].end() :].strip()
    return tags[-1][0] if open_at_end else ""


# --- annotations ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotation:
    """A parsed PA reply. `reason` is None, or says why the reply cannot be used."""

    question: str | None
    answer: str | None
    reason: str | None = None


_QUESTION_WORDS = (
    "question|q|frage|pregunta|pergunta|domanda|vraag|fråga|spørgsmål|kysymys|pytanie|otázka|вопрос|питання|soru|"
    "pertanyaan|soalan|câu hỏi|प्रश्न|सवाल|问题|問題|问|問|質問|질문|السؤال|سؤال|שאלה|پرسش|سوال|คำถาม"
)
_LABELS = {w: "question" for w in _QUESTION_WORDS.split("|")} | {w: "answer" for w in f"{ANSWER_WORDS}|a".split("|")}
# A label at the start of a line, as models decorate it: "- **Question 1:** …", "1. Q: …", "### Question", "Correct Answer:".
# Behind the question on one line, an answer's only as a word: "Question: …? Answer: …".
_WORDS = "|".join(sorted(map(re.escape, _LABELS), key=len, reverse=True))
_LABEL = re.compile(
    r"(?:^[ \t\-*#>_\d.)(\[]{0,20}|(?<=[?？؟])[ \t*_]{1,20}(?=\w{3,}))"
    r"(?:(?:the|die|la|visual|correct|final|short|expected|right|suggested|generated) ){0,2}"
    rf"(?P<word>{_WORDS})(?:[ \t]*[#(]?\d{{1,3}}\)?|[ \t]*\([^)\n]{{1,30}}\))?(?P<end>[ \t]*[\])]?[ \t*_]{{0,9}}[:：][ \t*_]{{0,9}}|[ \t*_#:]*$)",
    re.IGNORECASE | re.MULTILINE,
)
# A question mark that ends a sentence; not the one in: What does the sign "WHY?" say?
_QUESTION_MARK = re.compile(r"[?؟](?=\s|$)|(?<!？)？")
_QUOTED = re.compile(r'"[^"]*"|“[^”]*”|«[^»]*»|„[^“”]*[“”]|「[^」]*」|『[^』]*』|(?<!\w)\'[^\'\n]*\'(?!\w)|‘[^’]*’')
# What a chat template or a train record would take for its own mark, if a question or answer held it.
_MARK = re.compile(r"<image>|<video>|<\|[^|\n]{1,99}\|>")
_PLACEHOLDER = re.compile(
    r"[<\[{(](?:(?:your|the|a|insert|short|write) ){0,3}(?:question|answer)[^>\]})]{0,40}[>\]})][.?]?|\W+", re.I
)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[\w-]*[ \t]*$", re.MULTILINE)
_RELEASED_ANSWER = re.compile(r"answer:\s*([^\n]*)", re.IGNORECASE)

# What a model says instead of an answer. Whole answers, and how sentences begin.
_NO_ANSWER = re.compile(
    r"(?:n[./]?\s?a\.?|not (?:applicable|available|visible|shown|specified|provided|given|mentioned|stated|present|clear|"
    r"legible|readable|known|sure|determinable|discernible|identifiable|answerable|possible to \w+|enough info\w*)|"
    r"unanswerable|un(?:known|clear|certain|determined|identifiable|readable|specified)|indeterminate|indeterminable|"
    r"illegible|insufficient (?:information|data|context)|no (?:answer|information|idea|data available)|can ?not (?:be )?\w+|"
    r"can't (?:be )?\w+|none (?:given|visible|provided)|nicht (?:erkennbar|sichtbar|bekannt|lesbar|bestimmbar|beantwortbar)|"
    r"unbekannt|inconnue?|indéterminée?|non visible|no visible|no se ve|desconocid[oa]|desconhecid[oa]|não visível|sconosciut[oa]|"
    r"неизвестно|не видно|невозможно определить|未知|不明|不知道|不清楚|看不清|无法(?:确定|判断|回答|识别|看清)|無法(?:確定|判斷|回答)|"
    r"わかりません|分かりません|判断できません|不可能|알 수 없음|모름|판단 불가|غير (?:معروف|واضح|مرئي)|لا يمكن تحديد\w*|bilinmiyor|tidak diketahui)"
    r"(?: (?:in|from|on|based on|with) (?:the|this) .{1,60})?[\s.。!*`\"']*",
    re.IGNORECASE,
)
_REFUSES = re.compile(
    r"(?:(?:i'?m |i am )?(?:very |so )?sorry\b|i apologi[sz]e|unfortunately\b|as an ai\b|i (?:can ?not|can't|could not|couldn't|"
    r"am unable|am not able|do not|don't|won't|will not|must decline|have no|am not sure)|i'm (?:unable|not able|not sure|afraid)|"
    r"(?:it|this|that|the \w+|there) (?:can ?not|can't|could not|is not possible|is impossible|is unclear|is not (?:visible|clear|"
    r"specified|provided|shown|given|legible|mentioned)|isn't (?:visible|clear|specified|enough)|is unknown|is no(?:t enough)? "
    r"(?:information|way))|(?:unable|impossible|not possible) to \w+|ich kann (?:nicht|das|leider|keine)|leider\b|je ne (?:peux|sais)|"
    r"(?:the|this) (?:image|picture|photo|chart|graph|text|document) (?:does not|doesn't|do not|don't|(?:shows|provides|contains|has) no )|"
    r"désolée?|impossible (?:de|à)|lo siento|no (?:puedo|se puede)|desculpe|não (?:posso|é possível)|mi dispiace|non (?:posso|è possibile)|"
    r"извините|я не могу|к сожалению|抱歉|对不起|對不起|很抱歉|我(?:无法|不能|不知道)|申し訳|すみません|죄송|آسف|عذر|لا (?:أستطيع|يمكنني))",
    re.IGNORECASE,
)


def is_refusal(answer: str) -> bool:
    """Whether a text is no answer but says that there is none ("cannot be determined", "N/A", "I'm sorry, …")."""
    text = unwrap(answer).replace("’", "'").strip(" *`\"'()[]<>")[:400]
    return bool(_NO_ANSWER.fullmatch(text) or _REFUSES.match(text))


def parse_annotation(
    reply: str, preset: str = "paper", keep_refusals: bool = False, marks: frozenset[str] = frozenset()
) -> Annotation:
    """Read question and answer from a PA reply.

    `paper`: after any reasoning, a JSON object with the two, or the text after the first question's label (it keeps its
    question mark and may go over several lines) and after the answer's label that follows. A question that holds two
    questions, an empty one, an empty answer, the prompt's own placeholders, a refusal (unless `keep_refusals`), or a mark
    of a prompt format, such as <image> or one of `marks`, cannot be used.
    `released`: the text before the first "?" after "Question:", and the line after "Answer:",
    each null when it is not there; nothing is refused.

    >>> parse_annotation("Question: What is it?\\nAnswer: a cat")
    Annotation(question='What is it?', answer='a cat', reason=None)
    """
    if preset == "released":
        answer = _RELEASED_ANSWER.search(reply)
        return Annotation(_released_question(reply), answer and answer.group(1).strip())

    text = strip_reasoning(reply)
    if not text and reply.strip():
        return Annotation(None, None, "only reasoning, no annotation")
    question, answer, several = _from_json(text) or _from_tags(text) or _from_labels(text)
    if answer and answer[0] in "\\\\$<":
        answer = unwrap(answer)  # \\boxed{…}
    if not question:
        return Annotation(
            None, answer, "a refusal" if answer is None and _REFUSES.match(text.strip()) else "no question"
        )
    if several or len(_QUESTION_MARK.findall(_QUOTED.sub("", question))) > 1:
        return Annotation(question, answer, "two questions")
    if not answer:
        return Annotation(question, None, "no answer")
    if _PLACEHOLDER.fullmatch(question) or _PLACEHOLDER.fullmatch(answer):
        return Annotation(question, answer, "the prompt's own template")
    if holds_mark(question + "\n" + answer, marks):
        return Annotation(question, answer, "a mark of the prompt's format in it")
    if not keep_refusals and (is_refusal(answer) or _REFUSES.match(question)):
        return Annotation(question, answer, "a refusal")
    return Annotation(question, answer)


def holds_mark(text: str, marks: frozenset[str] = frozenset()) -> bool:
    """Whether a text holds what a chat template or train record takes for its own: <image>, <|…|>, or one of a model's `marks`."""
    return bool(_MARK.search(text)) or any(mark in text for mark in marks)


def _released_question(reply: str) -> str | None:
    """What `question:\\s*([^\\n]*?)\\?` finds first, in linear time."""
    mark = line_end = -1
    for label in re.finditer(r"question:\s*+", reply, re.IGNORECASE):
        if mark < label.end():
            mark = reply.find("?", label.end())
        if mark < 0:
            return None
        if line_end < label.end():
            line_end = reply.find("\n", label.end()) % (len(reply) + 1)
        if mark < line_end:
            return reply[label.end() : mark].strip()
    return None


def _from_json(text: str) -> tuple[str | None, str | None, bool] | None:
    """(question, answer, whether there are several) of a JSON object in the text; None where there is none."""
    start = min((at for at in (text.find("{"), text.find("[")) if at >= 0), default=-1)
    if start < 0 or _LABEL.match(text.lstrip()):
        return None
    try:
        content, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    several = isinstance(content, list) and len(content) > 1
    content = content[0] if isinstance(content, list) and content else content
    if not isinstance(content, dict):
        return None
    found = {}
    for name, value in content.items():
        kind = _LABELS.get(name.strip().lower().removeprefix("short_").removeprefix("correct_"))
        if kind and isinstance(value, str | int | float) and not isinstance(value, bool):
            found.setdefault(kind, " ".join(str(value).split()))
    return (found.get("question"), found.get("answer"), several) if "question" in found else None


_PAIR = re.compile(r"<question>([^<]*)</question>\s*<answer>([^<]*)</answer>", re.IGNORECASE)


def _from_tags(text: str) -> tuple[str | None, str | None, bool] | None:
    pairs = _PAIR.findall(text)
    return (pairs[0][0].strip(), pairs[0][1].strip(), False) if pairs else None


def _from_labels(text: str) -> tuple[str | None, str | None, bool]:
    question = answer = None
    several, asked, text = False, False, _FENCE.sub("", text)
    labels = list(_labels(text))
    ends = [*(start for _, start, _ in labels[1:]), len(text)]
    for (kind, _, start), end in zip(labels, ends, strict=False):
        if kind == "question":
            several, asked = several or bool(question), True  # "Question 1: … Question 2: … Answer: …"
            question = question or _question_in(text[start:end])
        elif asked:
            answer = _undecorated(first_line(text[start:end]))
            break
    return question, answer, several


def _labels(text: str) -> Iterator[tuple[str, int, int]]:
    """(question or answer, where its label starts, where what it labels starts)."""
    for label in _LABEL.finditer(text):
        word, bare = label["word"].lower(), not label["end"].strip(" \t*_#")
        if (":" in label["end"] or "：" in label["end"] or not bare) or (bare and ("#" in label[0] or "*" in label[0])):
            yield _LABELS[word], label.start(), label.end()


def _question_in(text: str) -> str | None:
    """A question, over several lines where its first ones do not end it."""
    lines = []
    for line in text.splitlines():
        if line.strip():
            lines.append(line.strip())
        if lines and (not line.strip() or _QUESTION_MARK.search(line.strip().rstrip("*_`\"'”)") + " ")):
            break
    return _undecorated(" ".join(lines)) or None


def _undecorated(text: str) -> str:
    """Without the Markdown around it."""
    text = text.strip(" \t*`")
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "_" else text


def with_question_mark(question: str) -> str:
    """A question of the released code's PA files with the "?" that it cut off."""
    return question if question.rstrip()[-1:] in "?？؟" else f"{question}?"


def follow_up_prompt(reply: str, preset: str, marks: frozenset[str] = frozenset()) -> str | None:
    """What PI asks the L-VLM about its own annotation; None where the annotation cannot be used."""
    parsed = parse_annotation(reply, preset, marks=marks)
    usable = parsed.question and parsed.answer and not parsed.reason
    return answer_prompt(parsed.question, preset) if usable else None


def annotation_is_complete(reply: str) -> bool:
    """True once the line that ends the answer is written: generation can stop.

    Everything `parse_annotation` reads under the `paper` preset lies before this point; it is never within reasoning or JSON.
    """
    last_line = reply.rsplit("\n", 1)[-1]
    if last_line.strip() or "\n" not in reply:
        return False
    text = strip_reasoning(reply)
    if text.lstrip()[:1] in ("{", "[") or _FENCE.match(text.lstrip()):
        return False
    parsed = parse_annotation(reply)
    return bool(parsed.question and parsed.answer)


# --- answers --------------------------------------------------------------------------------------------


def first_line(text: str) -> str:
    """The first line of a text that is not blank nor a code fence."""
    return next((line.strip() for line in text.splitlines() if line.strip() and not _FENCE.match(line)), "")


_OPENS = re.compile(
    rf"(?:[{{\[]|[*_ ]*(?:the )?(?:(?:final|short|correct) )?(?:{ANSWER_WORDS})(?: is)?[ *_]*[:：][ *_]*$)",
    re.IGNORECASE,
)


def read_answer(reply: str) -> str:
    """The short answer in a reply: its first line, after any reasoning. A line that only announces it ("Answer:") is
    passed over, and of a JSON object the answer is taken."""
    text = strip_reasoning(reply)
    line = first_line(text)
    if not _OPENS.match(line):
        return line
    if line[0] in "{[":
        found = unwrap(_FENCE.sub("", text))
        return first_line(found) if not found.startswith(("{", "[")) else line
    return first_line(text.split(line, 1)[1]) or line


def answer_is_complete(reply: str) -> bool:
    """True once `read_answer(reply)` cannot change any more."""
    if "\n" not in reply or _REASONING.search(reply):  # after reasoning it is short, and ends by itself
        return False
    line = first_line(reply)
    done = bool(line) and not _OPENS.match(line)
    return done and "\n" in reply[reply.index(line) + len(line) :]


# What a reply may end with, by name: see `Request.stop`.
STOPS = {"annotation": annotation_is_complete, "answer": answer_is_complete}
