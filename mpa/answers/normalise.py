"""Normalisation of answers before comparison, for the `paper` preset: `normalise(text)`.

The paper normalises to lower case and removes white space and non-word characters. Implemented literally, as in the
released code (`metrics.squeeze`), this makes -5 equal to 5, C++ to C, and दिन to दान. This version does the same but
keeps every sign that carries meaning. tests/answers/test_normalise.py has a table of equal and unequal pairs.
"""

import re
import unicodedata
from functools import lru_cache


class _Table(dict):
    """A table for str.translate, filled as characters occur: `rule(character) -> str`."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = self.rule(chr(code))
        return self[code]


def _class(category: str) -> str:
    """The characters of a Unicode category, for a [...] set in a regular expression.

    Only the basic multilingual plane, for speed: this is enough to find word boundaries.
    """
    return "".join(re.escape(c) for c in map(chr, range(0x10000)) if unicodedata.category(c).startswith(category))


_CURRENCY = _class("Sc")
_WORD = rf"\w{_class('M')}"  # `\w` excludes combining marks, such as vowel signs in Hindi and Thai
_LETTER = rf"(?:(?![\d_])[{_WORD}])"

# --- canonical characters --------------------------------------------------------------------------

# Applied before NFKC, which would turn 10² into 102 and 1½ into 11/2.
_RAISED = re.compile(r"(?<=\d)[⁺⁻⁰¹²³⁴-⁹]+")
_FRACTION = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞↉])")
_MINUS = re.compile(r"−\s+(?=\d)")  # U+2212 is a minus sign even with a space after it
_DEGREE = re.compile(r"(?<=\d)(\s?)[º˚]")  # often typed for °

# Default ignorable characters (soft hyphen, joiners, direction marks, variation selectors), kashida, keycap.
_INVISIBLE = (0xAD, 0x34F, 0x61C, 0x640, 0x20E3, 0x3164, 0xFEFF, 0xFFA0)
_INVISIBLE += (*range(0x115F, 0x1161), *range(0x17B4, 0x17B6), *range(0x180B, 0x1810), *range(0x200B, 0x2010))
_INVISIBLE += (*range(0x202A, 0x202F), *range(0x2060, 0x2070), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))
_BEFORE = dict.fromkeys((*_INVISIBLE, *map(ord, "®™℠©")), "")
_BEFORE |= dict.fromkeys(map(ord, "’‘‛ʼʻʹ′´＇"), "'") | dict.fromkeys(map(ord, "″“”„‟«»＂"), '"')
_SPELT = dict(zip("−⁄∕×∶♯٫٬٪", "-//x:#.,%", strict=True)) | {"œ": "oe", "&": "and"}


def _spelling(c: str) -> str:
    if c.isdecimal():
        return str(unicodedata.decimal(c))
    return "-" if unicodedata.category(c) == "Pd" else _SPELT.get(c, c)


_AFTER = _Table(_spelling)

# Matches 12,500, 12 500, 12'500 and 12,50,000; not the two numbers in 2020 300, nor the list 1,2,3.
_THOUSANDS = re.compile(
    r"(?<![\d.,'])(?:\d{1,3}(?:([,'])\d{3}(?:\1\d{3})*|(?:,\d\d)+,\d{3})|(?<!\d )\d{1,3}(?: \d{3})+(?! \d))(?!\d|[,']\d)"
)


@lru_cache(2**16)
def canonical(text: str) -> str:
    """`text` in a canonical form: NFKC, case-folded, one kind of dash, quote and space, ASCII digits, no thousands
    separators, no invisible characters.

    >>> canonical("Ｃａｆé  –１２，５００ ٣٪")
    'café -12500 3%'
    """
    text = _RAISED.sub(lambda raised: "^" + raised.group(), text)
    text = _MINUS.sub("-", _FRACTION.sub(" ", _DEGREE.sub(r"\1°", text))).translate(_BEFORE)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(text.replace("i̇", "i").translate(_AFTER).split())
    return _THOUSANDS.sub(lambda number: re.sub("[, ']", "", number.group()), text)


# --- signs that carry meaning ----------------------------------------------------------------------

# Signs to keep are mapped to the private use area while the others are removed, and then mapped back.
_HIDE = {ord(c): 0xE000 + ord(c) for c in " !\"#'*,-./:;@^_~%"}
_SHOW = {hidden: mark for mark, hidden in _HIDE.items()}


def _keep(found: re.Match) -> str:
    return found.group().replace(" ", "").translate(_HIDE)


def _separator(found: re.Match) -> str:
    """The text between two digits: the signs in it, or one space if there are none."""
    return (re.sub(r"""[\s!"&()<=>?\[\\\]`{|}]""", "", found.group()) or " ").translate(_HIDE)


_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`{1,3}|~~)(?=\S)((?:(?!\1).)+)(?<=\S)\1(?!\w)")
_BULLET = re.compile(r"^(?:[>•▪●◦‣·○■□➤→*+-]|#{1,6}) (?=\D)")
_INCHES = re.compile(r"(\d'\d\d?)\"")  # 5'10" is 5'10
_BETWEEN_DIGITS = re.compile(rf"(?<=\d)([^{_WORD}]++)(?=\d)")
# Each pattern starts with a literal sign, which is fast to search; a look-behind then checks what precedes it.
_AROUND_NUMBERS = [
    (re.compile(rf"([{_CURRENCY}]) ?-(?=\.?\d)"), r"-\1"),  # $-5 -> -$5
    (re.compile(rf"(?<![\d.,])(\d++(?:[.,]\d++)*+) ?([{_CURRENCY}])(?! ?[\d.])"), r"\2\1"),  # 5 € -> €5
    (re.compile(rf"\+(?<![{_WORD}+]\+) ?(?=[{_CURRENCY}]?\.?\d)"), ""),  # +5 -> 5; but C++ 11
    (re.compile(rf"\.(?<![{_WORD}.]\.)(?=\d)"), "0."),  # .5 -> 0.5
    (re.compile(rf"-(?<![{_WORD}]-)(?=[{_CURRENCY}]?\d)"), "−"),  # a sign, not the hyphen of F-16
]
_SHORT = "|".join(rf"(?<={start}{_LETTER * n}-)" for start in ("^", rf"[^{_WORD}]") for n in (1, 2))  # A-, AB-
_KEPT_MARKS = [
    re.compile(r"\.(?<=\d\.)(?=\d)"),  # the decimal point
    re.compile(r"-(?<=\de-)(?=\d)"),  # 1e-5
    re.compile(rf"-(?:{_SHORT}|(?<=\d-))(?![{_WORD}-])"),  # the grades and charges A-, O-, 2-
    re.compile(rf"#(?<=[{_WORD}]#)(?![{_WORD}])"),  # C#
    re.compile(rf"\.(?<![{_WORD}.]\.)(?={_LETTER})"),  # .NET
    re.compile(rf"/(?<=[{_WORD}%°]/)(?=[{_WORD}])"),  # m/s
    re.compile(rf"[@^](?<=[{_WORD}].)(?={_LETTER})"),  # a@b, e^x; but m^2 is m²
    re.compile(r"~(?= ?\d)"),
]
# Kept if the sign occurs once: in pairs these are Markdown or quotes.
_KEPT_ALONE = {
    "*": re.compile(rf"(?<![{_WORD}]){_LETTER}\*(?![{_WORD}])"),  # the grade A*
    "'": re.compile(rf"'(?<=\d')(?![{_WORD}])"),  # feet
    '"': re.compile(rf"\"(?<=\d\")(?![{_WORD}])"),  # inches
}
_SLASH = re.compile(" ?/ ?")


def _kept(c: str) -> str:
    """Letters, digits, symbols and hidden signs are kept, with a few exceptions; all else is removed."""
    if c in "%‰§" or "\U000e0020" <= c <= "\U000e007f":  # tag characters distinguish regional flags
        return c
    category = unicodedata.category(c)
    return c if category[0] in "LMN" or (category in ("Sm", "Sc", "So", "Co", "Cs") and c not in "~|") else ""


_KEPT = _Table(lambda c: c if "\U0001f3fb" <= c <= "\U0001f3ff" else _kept(c))  # skin tones
_NO_CONTENT = re.compile(r"""[\s.…·・。*_'"`|-]*""")


@lru_cache(2**16)
def normalise(text: str | None) -> str:
    """`text` as compared under `paper`: `canonical`, without white space, and without punctuation that has no meaning.

    Kept: signs, separators within numbers, %, currency and other symbols. "" if there is no content.

    >>> normalise("**T-shirt.**"), normalise("–5,000 %"), normalise("10 : 30"), normalise("C#"), normalise("...")
    ('tshirt', '−5000%', '10:30', 'c#', '')
    """
    if text is None:
        return ""
    original = text = canonical(str(text))
    for _ in range(3):  # nested emphasis, e.g. bold within italics
        text = _EMPHASIS.sub(r"\2", text)
    text = _INCHES.sub(r"\1", _BULLET.sub("", text))
    text = _BETWEEN_DIGITS.sub(_separator, text)
    for pattern, replacement in _AROUND_NUMBERS:
        text = pattern.sub(replacement, text)
    for mark, pattern in _KEPT_ALONE.items():
        if text.count(mark) == 1:
            text = pattern.sub(_keep, text)
    text = _SLASH.sub("/", text)
    for pattern in _KEPT_MARKS:
        text = pattern.sub(_keep, text)
    text = unicodedata.normalize("NFC", text.translate(_KEPT).translate(_SHOW))
    if not text and not _NO_CONTENT.fullmatch(original):
        return original.replace(" ", "")  # an answer that is only punctuation: ? or :)
    return text
