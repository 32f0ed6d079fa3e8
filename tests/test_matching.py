import pytest

from mpa.matching import MATCHERS


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
