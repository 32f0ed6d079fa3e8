"""Which answers are equal under `paper`. TABLE is parsed from docs/departures.md."""

import re

import pytest
from linear import LONG, in_time

from mpa.answers.matching import MATCHERS, Match
from mpa.answers.metrics import METRICS, squeeze
from mpa.answers.normalise import normalise

TABLE = """
| what | equal | not equal |
| --- | --- | --- |
| letters | `Straße` = `STRASSE`, `ﬁsh` = `fish`, `Ｒｅｄ` = `red`, `Café` = `CAFÉ` | `café` ≠ `cafe`, `दिन` ≠ `दान`, `ที่` ≠ `ทู่`, `ガ` ≠ `カ` |
| digits | `٣` = `3`, `१२` = `12`, `１２：３０` = `12:30`, `½` = `1/2`, `1½` = `1 1/2` | `1½` ≠ `11/2`, `10²` ≠ `102`, `1 2` ≠ `12` |
| signs | `−5` = `-5`, `–5` = `-5`, `+5` = `5` | `-5` ≠ `5`, `±5` ≠ `5`, `<5` ≠ `5`, `~5` ≠ `5` |
| separators | `1,000` = `1000`, `12 500` = `12500`, `1'000` = `1000`, `10 : 30` = `10:30`, `.5` = `0.5` | `1.5` ≠ `15`, `1,5` ≠ `15`, `1.000` ≠ `1000`, `10:30` ≠ `1030`, `3/4` ≠ `34`, `10-12` ≠ `1012` |
| units | `50 %` = `50%`, `5 €` = `€5`, `5 ℃` = `5°C`, `m²` = `m^2` | `50%` ≠ `50`, `$5` ≠ `5`, `$5` ≠ `€5`, `5°C` ≠ `5°F`, `m/s` ≠ `ms`, `6'` ≠ `6"` |
| symbols | `salt & pepper` = `salt and pepper`, `Coca-Cola®` = `coca cola` | `C++` ≠ `C`, `C#` ≠ `C`, `.NET` ≠ `net`, `A+` ≠ `A`, `A-` ≠ `A`, `👍` ≠ `👎`, `?` ≠ `!` |
| punctuation | `T-shirt` = `t shirt`, `U.S.` = `US`, `“red”.` = `red`, `猫。` = `猫`, `men's` = `mens` | `N/A` ≠ `NA`, `AT&T` ≠ `ATT` |
| Markdown | `**red**` = `red`, `_red_` = `red`, `` `red` `` = `red`, `- red` = `red`, `**-5**` = `-5` | `A*` ≠ `A`, `2*3` ≠ `23` |
""".strip()
CELLS = [line.split(" | ") for line in TABLE.splitlines()[2:]]


def code_spans(cell: str) -> list[tuple[str, str, str]]:
    text = r"(`` `[^`]+` ``|`[^`]+`)"
    return [
        (a.strip("` ") if "``" not in a else a[3:-3], mark, b.strip("`"))
        for a, mark, b in re.findall(rf"{text} ([=≠]) {text}", cell)
    ]


ROWS = [row for cells in CELLS for cell in cells[1:] for row in code_spans(cell)]


def test_the_table_is_read_whole():
    assert len(ROWS) == TABLE.count(" = ") + TABLE.count(" ≠ ") > 50


@pytest.mark.parametrize(("a", "mark", "b"), ROWS)
def test_the_table_of_the_readme(a, mark, b):
    equal = mark == "="
    assert MATCHERS["exact"](a, b) is equal
    assert MATCHERS["exact"](b, a) is equal
    assert METRICS["exact"](a, [b]) == equal
    assert METRICS["tolerant"](a, [b]) >= equal  # what is equal, a person lets pass


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("caf\u00e9", "cafe\u0301"),  # NFC and NFD
        ("soft\u00adhyphen\u200b", "soft hyphen"),
        ("\u2764\ufe0f", "\u2764"),
        ("3\ufe0f\u20e3", "3"),
        ("１２，５００", "12,500"),
        ("12\u202f500", "12,500"),
        ("1,00,000", "100000"),
        ("from 1,000 2 times", "from 1000 2 times"),
        ("1 to 2,000", "1 to 2000"),
        ("٣٫٥", "3.5"),
        ("٥٠٪", "50%"),
        ("− 5", "-5"),
        ("İSTANBUL", "istanbul"),
        ("ΣΑΣ", "σας"),
        ("ﾈｺ", "ネコ"),
        ("می\u200cخواهم", "میخواهم"),
        ("قطـــة", "قطة"),
        ("قطة؟", "قطة"),
        ("***red***", "red"),
        ("*“red”*", "red"),
        ("`-5`", "-5"),
        ("# red", "red"),
        ("> red", "red"),
        ("$-5", "-$5"),
        ("1920×1080", "1920 x 1080"),
        ("5'10\"", "5′10″"),
        ("AT&T", "AT & T"),
        ("Hawaiʻi", "Hawai'i"),
    ],
)
def test_one_answer_written_in_two_ways(a, b):
    assert normalise(a) == normalise(b) != ""


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("👍", ""),
        ("♥", "♠"),
        ("🇩🇪", "🇫🇷"),
        (
            "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
            "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
        ),
        (":)", ":("),
        ("-$5", "$5"),
        ("(-5)", "(5)"),
        ("O−", "O+"),
        ("F#", "F"),
        ("1e-5", "1e5"),
        ("2020 300", "2020300"),
        ("192.168.100.100", "192168100100"),
        ("1, 2", "12"),
        ("12:30 AM", "12:30 PM"),
        ("a@b", "ab"),
        ("5‰", "5%"),
        ("π²", "π³"),
        ("√2", "2"),
    ],
)
def test_two_answers_are_two(a, b):
    assert normalise(a) != normalise(b)


@pytest.mark.parametrize("nothing", [None, "", " ", "...", "…", "-", "—", "**", "''", "\u200b", "。"])
def test_what_says_nothing_matches_nothing_not_even_itself(nothing):
    assert normalise(nothing) == ""
    for name in MATCHERS:
        assert not Match(name)("red", nothing)
        assert not Match(name)(nothing, nothing)


def test_released_compares_to_the_letter():
    assert squeeze("-5") == squeeze("5")
    for a, b in (("C++", "C"), ("दिन", "दान"), ("1.5", "15")):
        assert MATCHERS["exact"](a, b, literal=True)
        assert Match("exact", literal=True)(a, b)
        assert Match("contains", literal=True)(a, b)
    assert Match("contains", literal=True)("anything", "")
    assert not Match("contains")("anything", "")
    assert not Match("exact", literal=True)("The answer is red.", "red")


@pytest.mark.parametrize(
    "text", [*LONG, *(unit * (200_000 // len(unit)) for unit in ("½", "1,", "1 ", "* a", "a-", "é", "1'"))]
)
def test_200_kb_take_time_in_proportion(text):
    for name in set(METRICS) - {"anls"}:
        in_time(METRICS[name], text, [text[:-1] + "z"])
    in_time(MATCHERS["exact"], text, text + "z")
