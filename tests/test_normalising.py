"""What counts as the same answer, and what is left of one without the words around it."""

import re
import time

import pytest
from conftest import ROOT

from mpa.matching import MATCHERS, seen_through
from mpa.metrics import METRICS
from mpa.normalising import normalise, unwrap

DIFFERENT = [
    *[
        ("-5", "5"),
        ("−5", "5"),
        ("10:30", "1030"),
        ("3/4", "34"),
        ("50%", "50"),
        ("1.5", "15"),
        (".5", "5"),
        ("1,5", "15"),
    ],
    *[("C++", "C"), ("C#", "C"), ("A+", "A"), ("A-", "A"), ("O-", "O+"), ("दिन", "दान"), ("ที่", "ทู่"), ("2 3", "23")],
    *[
        ("1, 2", "12"),
        ("$5", "5"),
        ("$5", "€5"),
        ("👍", "👎"),
        ("<5", "5"),
        ("2^3", "23"),
        ("-$5", "$5"),
        ("2010-12", "201012"),
    ],
    *[("+", "-"), ("20°", "20"), ("café", "cafe"), ("1:2", "1/2")],
]
SAME = [
    *[
        ("café", "cafe\u0301"),
        ("１２：３０", "12:30"),
        ("ﬁsh", "fish"),
        ("ß", "SS"),
        ("٣", "3"),
        ("५", "5"),
        ("−5", "-5"),
    ],
    *[("**red**", "red"), ("`red`", "red"), ("*Red*.", "red"), ("_red_", "red"), ("~~red~~", "red"), ("“red”", "red")],
    *[
        ("pony-tail", "ponytail"),
        ("T shirt", "t-shirt"),
        ("1,000", "1000"),
        ("1 000", "1000"),
        ("12,34,567", "1234567"),
    ],
    *[
        ("½", "1/2"),
        ("50 %", "50%"),
        ("10 : 30", "10:30"),
        ("a.m.", "am"),
        ("2010–2012", "2010-2012"),
        ("- red", "red"),
    ],
    *[("猫。", "猫"), ("r\u200bed", "red"), ("re\u00add", "red"), ("May 5, 2010", "may 5 2010"), ("don’t", "don't")],
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_means_something_else_is_not_equal(one, other):
    assert not MATCHERS["exact"](one, other) and not MATCHERS["exact"](other, one)
    assert METRICS["exact"](one, [other]) == 0.0


@pytest.mark.parametrize(("one", "other"), SAME)
def test_another_spelling_of_the_same_is_equal(one, other):
    assert MATCHERS["exact"](one, other) and MATCHERS["tolerant"](one, other) and METRICS["exact"](other, [one]) == 1.0


@pytest.mark.parametrize(("one", "other"), [p for p in DIFFERENT if p != ("50%", "50")])
def test_tolerant_lets_a_percent_sign_go_and_nothing_else_of_these(one, other):
    assert not MATCHERS["tolerant"](one, other)


def test_the_table_of_examples_in_the_readme_is_true():
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| (equal|not equal) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 12
    assert [(a, b) for a, b, says in rows if MATCHERS["exact"](a, b) != (says == "equal")] == []


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        *[("The answer is red.", "red"), ("Answer: red", "red"), ("\\boxed{red}", "red"), ("$\\boxed{red}$", "red")],
        *[("**Answer:** red", "red"), ("**Answer: red**", "red"), ("It's red", "red"), ("It is a cat.", "cat")],
        *[("<answer>red</answer>", "red"), ('{"answer": "red"}', "red"), ("The correct answer is: **red**", "red")],
        *[("Therefore, the answer is -5.", "-5"), ("答案：红色", "红色"), ("Antwort: rot", "rot"), ("A: red", "red")],
        *[("La respuesta es rojo", "rojo"), ("**The answer is:** `red`", "red")],
        *[
            ("red", "red"),
            ("The answer is", "The answer is"),
            ("Italy", "Italy"),
            ("this", "this"),
            ("a red car", "a red car"),
        ],
    ],
)
def test_words_and_marks_around_an_answer_are_seen_through(reply, answer):
    assert unwrap(reply) == answer
    assert seen_through(MATCHERS["exact"], reply, answer)


def test_a_wrapper_does_not_make_another_answer_right():
    assert not seen_through(MATCHERS["exact"], "The answer is blue.", "red")
    assert not seen_through(MATCHERS["exact"], "The answer is", "")


LONG = [
    "1" * 200_000,
    "1," * 100_000,
    "1,000" * 40_000,
    "1 " * 100_000,
    " ** " * 50_000,
    "`a" * 100_000,
    "-5" * 100_000,
]
LONG += [
    "answer is " * 20_000,
    "<answer>" * 25_000,
    "\\boxed{" * 30_000,
    "{" * 200_000,
    "é" * 200_000,
    "twenty " * 30_000,
]


@pytest.mark.parametrize("text", LONG, ids=[text[:9] for text in LONG])
def test_the_time_is_linear_in_the_length(text):
    started = time.perf_counter()
    normalise(text), unwrap(text), METRICS["tolerant"](text, ["5"]), MATCHERS["tolerant"](text + "1", text)
    assert time.perf_counter() - started < 5  # a quadratic pattern takes minutes at 200 kB
