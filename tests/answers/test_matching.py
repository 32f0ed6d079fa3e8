import pytest
from linear import LONG, in_time

from mpa.answers.matching import MATCHERS, Match, unwrap


@pytest.mark.parametrize("name", sorted(set(MATCHERS) - {"contains"}))
def test_an_empty_answer_matches_nothing(name):
    for prediction in ("", "cat", "...", None):
        assert not MATCHERS[name](prediction, "")
        assert not MATCHERS[name](prediction, None)
        assert not MATCHERS[name](prediction, "?!")


@pytest.mark.parametrize(
    ("name", "prediction", "answer", "agrees"),
    [
        ("exact", "Pony-tail", "ponytail", True),
        ("exact", "2013", "1", False),
        ("exact", "3.0", "3", False),
        ("tolerant", "3.0", "3", True),
        ("exact", "un café", "uncafé", True),
        ("exact", "猫", "猫。", True),
        ("contains", "2013", "1", True),
        ("contains", "", "cat", False),
        ("anls", "ponytails", "ponytail", True),
        ("anls", "horse", "ponytail", False),
        ("relaxed", "104", "100", True),
        ("relaxed", "106", "100", False),
        ("vqa", "two", "2", True),
        ("vqa", "the cat.", "cat", True),
        ("vqa", "dog", "cat", False),
        ("tolerant", "12,500", "12500", True),
        ("tolerant", "Twelve.", "12", True),
        ("tolerant", "twenty-five percent", "25%", True),
        ("tolerant", "25", "25 per cent", True),
        ("tolerant", "104", "100", True),
        ("tolerant", "106", "100", False),
        ("tolerant", "2013", "2014", False),
        ("tolerant", "2014.", "2014", True),
        ("tolerant", "1,2", "12", False),
        ("tolerant", "two cats", "2 cats", True),
        ("tolerant", "cat", "dog", False),
        ("tolerant", "-5", "5", False),
        ("tolerant", "−5", "-5", True),
        ("tolerant", "twenty five", "25", True),
        ("tolerant", "5percent", "5 %", True),
        ("tolerant", "2000.0", "2001", False),
        ("tolerant", "2001", "2000.0", False),
        ("tolerant", "2010", "2050.5", False),
        ("tolerant", "1990%", "2000%", True),
    ],
)
def test_matchers(name, prediction, answer, agrees):
    assert MATCHERS[name](prediction, answer) is agrees


WRAPPED = r"""
The answer is red. | Answer: red | \boxed{red} | $\boxed{\text{red}}$ | **Answer:** red | It's red | It’s red. | It is a red
<answer>red</answer> | "red" | 'red'. | The correct answer is: red | So the answer is red. | Final answer: red | **The answer is red.**
On the left, the car is red. | The car that is parked is red | It is a car that is red | Sure! Here is the answer: red
The color of the phone is red. | The sign says "red". | This is red. | I think it is red. | Sure! The answer is red. | <think>hm</think>red
""".strip()
NOT_WRAPPED = """
The answer is not red. | It isn't red | The car is not red | It could be red | It is red or blue | It is red and blue
If it is red | Is it red? | I don't think it is red | blue | The left is blue, the right is red
The left is blue and the right is red | The left is blue; the right is red | The left has blue, the right is red
The left one blue, the right one is red | The left is blue. The right is red. | The left: blue. The right is red
The left shows blue and the right is red | It is blue, the other is red | The answer is blue, the other is red
""".strip()


def cells(block: str) -> list[str]:
    return [text.strip() for line in block.splitlines() for text in line.split(" | ")]


@pytest.mark.parametrize("said", cells(WRAPPED))
def test_pi_sees_through_what_is_wrapped_around_an_answer_and_counts_it(said):
    match = Match()
    assert match(said, "red")
    assert match("red", said)
    assert match.only_unwrapped(said, "red") is not MATCHERS["exact"](said, "red")
    assert not match.only_unwrapped("red", "Red.")
    assert not Match("exact", literal=True).only_unwrapped(said, "red")


@pytest.mark.parametrize("said", cells(NOT_WRAPPED))
def test_a_sentence_that_says_something_else_is_no_wrapping(said):
    assert not Match()(said, "red")


@pytest.mark.parametrize(
    ("prediction", "answer", "agrees"),
    [
        ("Yes, it is a cat.", "yes", True),
        ("No, there is none.", "no", True),
        ("Yes, two dogs", "Yes, three dogs", False),
        ("No parking", "no", False),
        ("The left one is red", "The right one is red", False),
        ("The answer is -5.", "-5", True),
        ("The answer is 5", "-5", False),
        ("Die Antwort ist rot.", "rot", True),
        ("答案是红色。", "红色", True),
        ("The answer is", "the answer", False),
    ],
)
def test_sentences(prediction, answer, agrees):
    assert Match()(prediction, answer) is agrees


def test_unwrapping_leaves_what_is_no_wrapping():
    for text in ("red", "-5", "U.S.", "No. 5", "answer", ""):
        assert Match()(text, text) is bool(text)
    assert unwrap(None) is None
    assert unwrap("red") == "red"


@pytest.mark.parametrize("text", LONG)
def test_200_kb_take_time_in_proportion(text):
    for name in set(MATCHERS) - {"anls"}:
        in_time(Match(name), text, text[:-1] + "z")
