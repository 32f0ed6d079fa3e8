"""The reasons that PI stores beside a train file."""

import json

import PI
import pytest
from answered_by_rule import annotate, answers_by, flags

from mpa.files.records import InputError, read_json, read_parity
from mpa.runs.case import Case
from mpa.runs.layout import Cell

CELL = Cell("easyVQA", "teacher", "student")


def test_pi_stores_the_reason_of_each_sample_and_readers_take_it(select, tmp_path):
    for file in tmp_path.glob("*_train_*"):
        file.unlink()
    train = select("--max-per-answer", "1", "--anchors", "1")
    stored = {str(r["question_id"]): r for r in read_json(train.with_name(f"{train.stem}.reasons.json"))}
    run = Case(tmp_path, CELL)
    assert {s.question_id: (s.reason, s.detail) for s in run.samples if s.question_id in stored} == {
        key: (r["reason"], r["detail"]) for key, r in stored.items()
    }
    assert {r["reason"] for r in stored.values()} >= {"parity", "both right", "over the limit", "L-VLM disagrees"}
    told = {key for key, r in stored.items() if r["detail"].startswith("an anchor")}
    assert told == {str(r["id"]) for r in read_json(train) if r["kind"] == "anchor"}
    # A file of reasons that is not of this train file is not believed.
    train.write_text(json.dumps(read_json(train)[1:]))
    assert sum(s.kept for s in Case(tmp_path, CELL).samples) == len(read_parity(train))


def test_stored_reasons_are_those_of_the_answers_that_are_there(serve, copied_images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, copied_images, run)
    given = flags(server, copied_images, run, "--hold-out", "0", "--max-per-answer", "3")
    train = PI.main(given)
    file = train.with_name(f"{train.stem}.reasons.json")
    made, kept = file.read_bytes(), train.read_bytes()
    for other in (json.dumps([r | {"detail": "edited"} for r in read_json(file)]), ""):
        file.write_text(other)
        PI.main(given)
        assert file.read_bytes() == made and train.read_bytes() == kept
    file.write_text('[{"reason": 5}]')
    with pytest.raises(InputError, match=r"reasons.json: exists, and no meta file says that this command made it"):
        PI.main(given)
    assert file.read_text() == '[{"reason": 5}]'


def test_samples_keep_the_order_of_the_s_vlms_answers_and_the_type_of_their_ids(select, tmp_path):
    plain = read_json(select("--out", tmp_path / "plain.json"))
    answers = tmp_path / "PI_teacher_student_easyVQA.json"
    turned = read_json(answers)[::-1]
    answers.unlink()
    answers.write_text(json.dumps(turned))
    assert read_json(select("--out", tmp_path / "turned.json")) == plain[::-1] != plain
    ids = {r["question_id"] for r in read_json(tmp_path / "PI_teacher_teacher_easyVQA.json")}
    assert {r["question_id"] for r in read_json(tmp_path / "turned.reasons.json")} == ids
