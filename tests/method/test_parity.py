"""The verdict on a sample: equations 1 and 2 of the paper (section 3.2), and each reason, by hand."""

from dataclasses import replace

import pytest

from mpa.answers.matching import MATCHERS
from mpa.method import rules
from mpa.method.prompts import Annotation
from mpa.method.rules.rule import Rule
from mpa.method.verdict import CONSISTENT, REASONS, Judge, Verdict

PAPER = Judge.of({"match": "exact", "preset": "paper"})
RELEASED = Judge.of({"match": "contains", "preset": "released"})
RED = Annotation("what color is it?", "red")


def said(answer: str | None, **more) -> dict:
    return {"question_id": 7, "PA_question": RED.question, "PA_answer": RED.answer, "predictions": answer} | more


@pytest.mark.parametrize(
    ("lvlm", "svlm", "reason"),
    [
        ("red", "blue", "parity"),  # Ã = A and Â ≠ A
        ("red", "red", "both right"),  # Ã = A and Â = A
        ("blue", "red", "L-VLM disagrees"),  # Ã ≠ A and Â = A
        ("blue", "blue", "L-VLM disagrees"),  # Ã ≠ A and Â ≠ A, whether or not Ã = Â
        ("blue", "green", "L-VLM disagrees"),
    ],
)
def test_equations_1_and_2(lvlm, svlm, reason):
    assert PAPER(RED, said(lvlm), said(svlm)).reason == reason


@pytest.mark.parametrize(
    ("answer", "is_red"),
    [
        ("Red.", True),
        ("**red**", True),
        ("The answer is red.", True),
        ("dark red", False),
        ("reddish", False),
        ("", False),
        (None, False),
        ("It is not red.", False),
    ],
)
def test_the_same_matcher_decides_for_both_models(answer, is_red):
    assert (PAPER(RED, said(answer), said("blue")).reason == "parity") is is_red
    assert (PAPER(RED, said("red"), said(answer)).reason == "both right") is is_red


@pytest.mark.parametrize("match", MATCHERS)
def test_an_empty_answer_agrees_with_nothing_by_any_matcher(match):
    judge = Judge.of({"match": match, "preset": "paper"})
    for nothing in ("", None, "?!"):
        assert judge(RED, said(nothing), said("blue")).reason == "L-VLM disagrees"
        assert judge(RED, said("red"), said(nothing)).reason == "parity"
    for nothing in ("", None):
        assert judge(replace(RED, answer=nothing), said(nothing), said("x")).reason == "L-VLM disagrees"


def test_the_released_code_compares_to_the_letter():
    assert RELEASED(RED, said("dark red"), said("green")).reason == "parity"  # contained
    assert RELEASED(replace(RED, answer=""), said("anything"), said("other")).reason == "both right"
    assert RELEASED(RED, said("red", finish_reason="length"), said("green")).reason == "parity"


@pytest.mark.parametrize(
    ("annotation", "lvlm", "svlm", "held_out", "verdict"),
    [
        (RED, said("red"), said("blue"), False, ("parity", "")),
        (Annotation(None, None, "refusal"), None, None, False, ("no usable annotation", "refusal")),
        (replace(RED, left_out="two questions"), None, None, False, ("no usable annotation", "two questions")),
        (Annotation("what?", ""), None, None, False, ("no usable annotation", "no question or answer")),
        (RED, None, None, False, ("no answer of the L-VLM", "")),
        (RED, None, said("blue"), False, ("no answer of the L-VLM", "")),
        (RED, said(None, left_out="timeout"), said("blue"), False, ("no answer of the L-VLM", "timeout")),
        # A failed reply agrees with nothing, also where the record has a text.
        (
            RED,
            said("red", left_out="only reasoning"),
            said("blue"),
            False,
            ("no answer of the L-VLM", "only reasoning"),
        ),
        (RED, said("blue"), said("green"), False, ("L-VLM disagrees", "it answers 'blue'")),
        (
            RED,
            said("red", finish_reason="length"),
            said("blue"),
            False,
            ("L-VLM's reply cut", "cut off at the token limit"),
        ),
        (RED, said("red", finish_reason="safety"), None, False, ("L-VLM's reply cut", "stopped by the content filter")),
        (RED, said("red"), None, True, ("held out", "")),
        (RED, said("red"), said("blue"), True, ("held out", "")),  # held out is held out, whoever answered
        (RED, said("blue"), None, True, ("L-VLM disagrees", "it answers 'blue'")),  # of no use in the held-out set
        (RED, said("red"), None, False, ("S-VLM not asked", "")),
        (RED, said("red"), said(None, left_out="broken image"), False, ("no answer of the S-VLM", "broken image")),
        (RED, said("red"), said("blue", left_out="a mark"), False, ("no answer of the S-VLM", "a mark")),
        (RED, said("red"), said("red"), False, ("both right", "")),
    ],
)
def test_every_reason(annotation, lvlm, svlm, held_out, verdict):
    assert PAPER(annotation, lvlm, svlm, held_out) == Verdict(*verdict)


def test_the_reasons_of_consistent_samples_are_those_where_the_l_vlm_repeats_itself():
    of = {reason: Verdict(reason).consistent for reason in REASONS}
    assert {reason for reason, consistent in of.items() if consistent is None} == {
        "no usable annotation",
        "no answer of the L-VLM",
    }
    assert {reason for reason, consistent in of.items() if consistent} == CONSISTENT
    disagreeing = {"L-VLM disagrees", "L-VLM's reply cut", *rules.reasons(selects=False)}
    assert {reason for reason, consistent in of.items() if consistent is False} == disagreeing
    assert len(set(REASONS)) == len(REASONS)


class Doubts(Rule):
    """A rule of this test: it leaves out what the L-VLM answers with a lower-case word."""

    NAMES = ("doubts",)
    reason = "doubted"

    def leaves_out(self, lvlm, answer, match) -> str:
        return "lower case" if lvlm["predictions"].islower() else ""


class Decides(Rule):
    """A rule of this test: it says what agreement is."""

    NAMES = ("decides",)

    def agrees(self, lvlm, answer, match):
        return self.settings["decides"], ", decided"


def test_a_rule_leaves_out_only_what_is_consistent_and_before_it_is_held_out():
    judge = Judge.of({"match": "exact", "preset": "paper"}, (Doubts({}),))
    assert judge(RED, said("red"), said("blue")) == ("doubted", "lower case")
    assert judge(RED, said("red"), None, held_out=True).reason == "doubted"
    assert judge(RED, said("Red"), said("blue")).reason == "parity"
    assert judge(RED, said("blue"), None).reason == "L-VLM disagrees"


@pytest.mark.parametrize("agrees", [True, False])
def test_a_rule_can_decide_what_agreement_is_but_not_for_a_failed_reply(agrees):
    judge = Judge.of({"match": "exact", "preset": "paper"}, (Decides({"decides": agrees}),))
    verdict = judge(RED, said("blue"), said("green"))
    assert verdict.reason == ("parity" if agrees else "L-VLM disagrees")
    assert agrees or verdict.detail == "it answers 'blue', decided"
    assert judge(RED, said("red", left_out="timeout"), said("green")).reason == "no answer of the L-VLM"


def test_a_parity_sample_that_is_not_in_the_parity_set_was_left_out_by_the_rule_that_selects():
    judge = replace(PAPER, rules=rules.of({"blind": True, "max_per_answer": 1, "seed": 0}))
    assert judge.not_selected == Verdict("over the limit")
    assert PAPER.not_selected == Verdict("no answer of the S-VLM", "not in the parity set")


def test_no_rule_is_in_use_under_the_papers_preset():
    assert rules.of({"match": "exact", "preset": "paper", "hold_out": 0.15, "seed": 1}) == ()


def test_every_rule_holds_the_settings_that_select_it():
    chosen = {"votes": 3, "min_agreement": 0.5, "min_probability": 0.9, "blind": True, "max_per_answer": 1}
    settings = {"preset": "paper", **chosen, "anchors": "1 by answer", "seed": 0}
    found = rules.of(settings)
    assert tuple(map(type, found)) == rules.RULES and all(rule.settings == settings for rule in found)
