"""The least probability of the L-VLM’s answer."""

import math

import PI
import pytest
from answered_by_rule import annotate, answers_by, flags

from mpa.files.records import InputError, read_json
from mpa.method.rules.sure import Sure, probability
from mpa.runs.case import Case
from mpa.runs.layout import Cell

CELL = Cell("easyVQA", "teacher", "student")


def test_an_unsure_lvlm_does_not_agree_with_itself(select, tmp_path):
    for file in tmp_path.glob("*_train_*"):
        file.unlink()
    lvlm = {r["question_id"]: r["logprob"] for r in read_json(tmp_path / "PI_teacher_teacher_easyVQA.json")}
    train = select("--min-probability", "0.99")
    kept = [r["id"] for r in read_json(train)]
    assert kept and all(lvlm[key] >= math.log(0.99) for key in kept)
    samples = Case(tmp_path, CELL).samples
    assert [s.question_id for s in samples if s.kept] == list(map(str, kept))
    unsure = [s for s in samples if s.reason == "L-VLM unsure"]
    assert unsure and all(s.lvlm_logprob < math.log(0.99) and not s.consistent for s in unsure)


@pytest.mark.parametrize("logprob", [None, True, 3.0, 1e9, 10**400, "-1", [], float("nan"), float("-inf")])
def test_what_is_no_log_probability_makes_no_answer_sure(logprob):
    rule = Sure({"min_probability": 0.5})
    assert probability(logprob) is None and rule.leaves_out({"logprob": logprob}, "a", None)
    assert not rule.leaves_out({"logprob": -0.1}, "a", None) and not rule.leaves_out({"logprob": 0}, "a", None)


def test_a_server_without_log_probabilities_cannot_be_asked_for_one(serve, copied_images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, copied_images, run)
    with pytest.raises(InputError, match="no answer has a log-probability, so --min-probability cannot be used"):
        PI.main(flags(server, copied_images, run, "--min-probability", "0.5"))
