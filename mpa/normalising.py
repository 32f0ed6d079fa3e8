"""When two short answers say the same: the form in which they are compared.

The paper compares in lower case without white space and non-word characters. Taken to the letter, as the released code
does, that makes -5 equal to 5 and दिन equal to दान, and keeps café apart from itself in another Unicode form. Here what
carries meaning stays, and what is only another spelling goes.
"""

import json
import re
import unicodedata
from functools import lru_cache

_ALIKE = {ord(c): "-" for c in "‐‑‒–—―−﹣"} | {
    ord("٪"): "%",
    ord("٫"): ".",
    ord("٬"): ",",
    ord("⁄"): "/",
    ord("∕"): "/",
}
_ALIKE |= {ord(c): "'" for c in "‘’‚‛ʼ`´"} | {ord(c): '"' for c in "“”„‟"}
_INVISIBLE = {*range(0xFE00, 0xFE10)}  # variation selectors
_PAIRED = re.compile(r"(\*\*|~~|`)(?=\S)((?:(?!\1).)+)\1")  # Markdown around a part of the text
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{2,3})*,\d{3})(?![\d,])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d,])")
_IN_NUMBERS = set(".,:/-'×·*^")  # separators between two digits


@lru_cache(2**16)
def fold(text: str) -> str:
    """`text` in one Unicode form (NFKC), case-folded, with ASCII digits, dashes and quotes; invisible characters and
    Markdown marks are dropped, and white space is single."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_ALIKE)
        text = "".join(
            str(unicodedata.decimal(c)) if c.isdecimal() else c
            for c in text
            if ord(c) not in _INVISIBLE and (c.isspace() or unicodedata.category(c) not in ("Cf", "Cc", "Cs"))
        )
    text = " ".join(text.casefold().split())
    return _PAIRED.sub(r"\2", text) if "*" in text or "`" in text or "~" in text else text


@lru_cache(2**16)
def normalise(text: str | None) -> str:
    """The form in which `exact` compares two answers; "" for what holds nothing but punctuation.

    Dropped: white space and punctuation, but not the separators, signs and units of numbers (10:30, 3/4, -5, .5, 50%),
    symbols ($, °, =, emoji), and what tells C++, C# and A- from C and A. Separators of thousands go: 1,000 is 1000.

    >>> normalise("**1,500.**"), normalise("10:30 a.m."), normalise("-5"), normalise("t-shirt")
    ('1500', '10:30am', '-5', 'tshirt')
    """
    if text is None:
        return ""
    text = fold(text)
    if text.isascii() and text.isalnum():
        return text
    text = _THOUSANDS.sub(lambda m: m[1] + m[2].replace(",", ""), text)
    text = _SPACED_THOUSANDS.sub(lambda m: m[0].replace(" ", ""), text)
    text = re.sub(r"(?<=\d) ?([-:/×·*^]) ?(?=\d)", r"\1", text)
    text = re.sub(r"(?<=\d)[.,;]? (?=\d)", " ", text)  # "1, 2" is no 12
    kept, before = [], ""  # `before`: the character before this one, white space included
    for at, c in enumerate(text):
        after = text[at + 1] if at + 1 < len(text) else ""
        if _means_something(c, before, after, text, at):
            kept.append(c)
        before = c
    return "".join(kept) or (text if any(unicodedata.category(c)[0] == "S" for c in text) else "")


def _means_something(c: str, before: str, after: str, text: str, at: int) -> bool:
    if c.isalnum():
        return True
    if c == " " or c in _IN_NUMBERS or c == "+":
        if before.isdigit() and after.isdigit():
            return True  # 10:30, 3/4, 1.5, and "2 3", which is not 23
        if c in "+-" and not before.isalnum() and (after.isdigit() or (after and after in "$€£¥.")):
            return True  # a sign
        if c == "." and after.isdigit() and not before.isalnum():
            return True  # .5
        if c in "+-" and before and (before.isalpha() or before == "+"):
            word = re.search(r"[^\W\d_]+\+*$", text[max(0, at - 8) : at])  # C++, A+ and A-
            return c == "+" or (word is not None and len(word[0]) <= 2 and not after.isalnum() and at + 1 == len(text))
        return False
    if c in "%‰#°":
        return c != "#" or before.isalpha()  # C#
    kind = unicodedata.category(c)
    return kind[0] in "MN" or (kind[0] == "S" and c not in "`~|^´¨")


# --- what models put around a short answer --------------------------------------------------------------

ANSWER_WORDS = (
    "answer|ans|antwort|réponse|reponse|respuesta|resposta|risposta|antwoord|svar|odpowiedź|odpověď|ответ|відповідь|cevap|"
    "yanıt|jawaban|đáp án|trả lời|उत्तर|答案|回答|答え|答|정답|답변|답|الجواب|جواب|الإجابة|إجابة|תשובה|پاسخ"
)
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence),? )?(?:"
    rf"(?:(?:the|my|your|its?|die|la|el|il|de|het) )?(?:(?:short|final|correct|right|best|most likely|direct|exact) )*(?:{ANSWER_WORDS})"
    r"(?: to (?:the|this|your) question| here)?\s*(?:[:：=]|(?:is|would be|should be|ist|est|es|è|is:|are)\b:?)"
    r"|(?:it|this|that|he|she|there)(?: is|'s| was)\b|(?:they|these|those|there)(?: are|'re)\b"
    r"|(?:a|response|output|result|prediction)\s*[:：=]"
    r")\s*"
)
_BOXED = re.compile(r"\$*\\(?:boxed|text|mathrm|textbf|mathbf)\s*\{(.*)\}\$*", re.DOTALL)
_TAGGED = re.compile(r"<(answer|ans|final_answer|response|output|b|i|strong|em|code|box)>(.*)</\1>", re.DOTALL)
_OUTER = " \t\r\n\"'`*_“”‘’«»„.。!"


def unwrap(text: str | None) -> str:
    """The short answer in a reply that puts words or marks around it; the text itself where there are none.

    >>> unwrap("The answer is red."), unwrap("\\\\boxed{red}"), unwrap("**Answer:** red"), unwrap("It's a cat")
    ('red', 'red', 'red', 'cat')
    """
    text = (text or "").strip()
    for _ in range(4):  # one wrapper within another
        found = _unwrapped(text)
        if found is None or not normalise(found):
            break
        text = found
    return text


def _unwrapped(text: str) -> str | None:
    inner = text.strip(_OUTER)
    for pattern, group in ((_BOXED, 1), (_TAGGED, 2)):
        if match := pattern.fullmatch(inner.lower() if pattern is _TAGGED else inner):
            start, end = match.span(group)
            return inner[start:end].strip()
    if inner.startswith("{") and inner.endswith("}"):
        try:
            content = json.loads(inner)
        except (ValueError, RecursionError):
            return None
        named = [v for k, v in content.items() if k.lower() in ("answer", "final_answer", "short_answer")]
        return str(named[0]) if len(named) == 1 and isinstance(named[0], str | int | float) else None
    plain = inner.casefold() if len(inner.casefold()) == len(inner) else inner.lower()
    if len(plain) != len(inner):  # folding changed the places
        return None
    plain = plain.translate({ord("*"): " ", ord("_"): " ", ord("’"): "'"})
    lead = _LEAD.match(plain.lstrip())
    if not lead:
        return None
    rest = inner[len(plain) - len(plain.lstrip()) + lead.end() :].strip(_OUTER + ":：")
    return re.sub(r"^(?:an?|the)\s+(?=\S)", "", rest, flags=re.IGNORECASE) or None
