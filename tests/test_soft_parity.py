"""PI with the S-VLM's probability of the annotated answer: what is scored, what it selects, and the weights."""

import json
import math
from collections import Counter

import corrupt
import PI
import pytest
from answered_by_rule import annotate, answers_by, flags
from conftest import MINI, STUDENT, TEACHER, close

from mpa.files.records import InputError, read_json
from mpa.method.parity import ParityRule
from mpa.runs.case import Case
from mpa.runs.folders import RunFolder
from mpa.runs.layout import Cell

CELL = Cell("easyVQA", "teacher", "student")
SCORED = "PI_teacher_scored-student_easyVQA.json"


@pytest.fixture
def run(easy_run, tmp_path):
    """A copy of a run whose S-VLM has answered; `run(FLAGS)` selects its train file anew."""
    for file in [*easy_run.glob("PA_*"), *easy_run.glob("PI_*")]:
        if "_train_" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())

    def select(*more):
        for file in tmp_path.glob("*_train_*"):
            file.unlink()
        given = ["--dataset", "easyVQA", "--batch-size", "8", *MINI, "--answer-all", "--run", f"{tmp_path}/"]
        models = ["--model-path-lvlm", str(TEACHER), "--model-path-svlm", str(STUDENT)]
        return PI.main([*given, *models, *map(str, more)])

    return select


def probabilities(folder) -> dict[str, float]:
    return {str(r["question_id"]): math.exp(r["logprob"]) for r in read_json(folder / SCORED)}


def test_the_probability_of_the_annotated_answer_is_stored_and_agrees_with_what_the_s_vlm_says(run, tmp_path):
    plain = run().read_bytes()
    assert run("--score").read_bytes() == plain  # it decides nothing by itself
    scored, answers = read_json(tmp_path / SCORED), read_json(tmp_path / "PI_teacher_student_easyVQA.json")
    assert [r["predictions"] for r in scored] == [r["PA_answer"] for r in answers]
    same = [
        (s["logprob"], a["logprob"]) for s, a in zip(scored, answers, strict=True) if a["predictions"] == a["PA_answer"]
    ]
    assert len(same) > 10 and close(*zip(*same, strict=True), 1e-3, least=1)  # nat
    assert all(
        s["logprob"] < math.log(0.6) for s, a in zip(scored, answers, strict=True) if a["predictions"] != a["PA_answer"]
    )
    assert RunFolder(tmp_path).cells == [CELL]  # no third model


def test_a_threshold_on_it_decides_instead_of_the_answer(run, tmp_path):
    everything = {str(r["id"]) for r in read_json(run("--max-svlm-probability", "1"))}
    surely = {str(r["id"]) for r in read_json(run("--max-svlm-probability", "0.2"))}
    p = probabilities(tmp_path)
    assert surely == {key for key in everything if p[key] <= 0.2} and 0 < len(surely) < len(everything)
    samples = Case(tmp_path, CELL).samples
    reasons = Counter(s.reason for s in samples)
    assert reasons["kept"] == len(surely) and reasons["S-VLM right"] == len(everything) - len(surely)
    settings = read_json(next(tmp_path.glob("*_train_*.meta.json")))["settings"]
    assert settings["max_svlm_probability"] == 0.2
    from_answers = ["--lvlm-json", tmp_path / "PI_teacher_teacher_easyVQA.json"]
    from_answers += ["--svlm-json", tmp_path / "PI_teacher_student_easyVQA.json", "--max-svlm-probability", "0.2"]
    assert {str(r["id"]) for r in read_json(run(*from_answers))} == surely
    (tmp_path / SCORED).unlink()
    with pytest.raises(InputError, match=f"{SCORED}: no such file. Run PI.sh with --score first"):
        run(*from_answers)


def test_soft_parity_gives_each_consistent_sample_the_weight_that_it_can_teach(run, tmp_path):
    train = read_json(run("--anchors", "100", "--weights"))
    p, parity = probabilities(tmp_path), read_json(run())
    assert all(r["weight"] == round(1 - p[str(r["id"])], 4) for r in train)
    of_kind = {kind: [r["weight"] for r in train if r["kind"] == kind] for kind in ("parity", "anchor")}
    assert len(of_kind["parity"]) == len(parity) < len(train)
    assert sum(of_kind["anchor"]) / len(of_kind["anchor"]) < 0.3 < sum(of_kind["parity"]) / len(parity)


def test_votes_count_for_the_weight():
    rule = ParityRule("exact", "paper", weights=True)
    rule.see_votes([{"question_id": f"7#{i}", "predictions": "red" if i else "blue"} for i in range(4)], 0.0)
    rule.see_probabilities([{"question_id": 7, "logprob": math.log(0.2)}, {"question_id": 8, "logprob": None}])
    record = {
        "question_id": 7,
        "PA_answer": "red",
        "PA_question": "what color?",
        "image_path": "a.png",
        "predictions": "teal",
    }
    assert rule.weight(record) == pytest.approx(0.75 * 0.8)
    assert rule.train_record(record)["weight"] == 0.6
    unknown = record | {"question_id": 8}
    assert rule.answered([record, unknown], [record, unknown]) == ([record], [])  # what has no probability is left out


def test_wrong_annotations_have_no_probabilities(run, tmp_path):
    train = run("--weights")
    answers = [tmp_path / f"PI_teacher_{model}_easyVQA.json" for model in ("teacher", "student")]
    given = ["--dataset", "easyVQA", "--train-json", train, "--lvlm-json", answers[0], "--svlm-json", answers[1]]
    with pytest.raises(InputError, match="made with the S-VLM's probabilities"):
        corrupt.main([*map(str, given), "--type", "yes/no", "--share", "0.5", "--out", str(tmp_path / "wrong.json")])


def test_a_server_gives_no_such_probability(serve, copied_images, tmp_path, capsys):
    server, folder = serve(answers_by()), tmp_path / "run"
    annotate(server, copied_images, folder)
    with pytest.raises(SystemExit):
        PI.main(flags(server, copied_images, folder, "--weights"))
    assert "need --engine hf for the S-VLM" in capsys.readouterr().err


def test_a_scoring_that_was_stopped_goes_on(run, tmp_path, monkeypatch):
    run("--score")
    whole = (tmp_path / SCORED).read_bytes()
    for file in tmp_path.glob(f"{SCORED[:-5]}*"):
        file.unlink()
    asked, write = [], PI.Answers.write
    monkeypatch.setattr(PI.Answers, "write", lambda self, *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("--score")
    monkeypatch.setattr(PI.Answers, "write", write)
    monkeypatch.setattr("mpa.engines.hf.HFEngine.answer_prepared", lambda *_: asked.append(1) or [])
    run("--score")
    assert not asked and json.loads((tmp_path / SCORED).read_text()) == json.loads(whole)


@pytest.mark.parametrize("logprob", [None, True, 3.0, 1e9, 10**400, "-1", [], float("nan"), float("-inf")])
def test_what_is_no_log_probability_makes_no_answer_sure(logprob):
    rule = ParityRule("exact", "paper", min_probability=0.5)
    assert not rule.sure({"logprob": logprob}) and rule.sure({"logprob": -0.1}) and rule.sure({"logprob": 0})
    rule.see_probabilities([{"question_id": 1, "logprob": logprob}])
    assert not rule.probabilities
