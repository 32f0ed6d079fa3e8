"""Anchors: which are chosen, and that all readers tell them from parity samples."""

import json
from collections import Counter
from pathlib import Path

import baselines
import export
import PI
from anchored import PARITY, RIGHT
from answered_by_rule import annotate, answers_by, flags
from conftest import MINI, STUDENT, TEACHER
from record_formats import read_record

from mpa.files import image_files
from mpa.files.records import read_json, read_parity
from mpa.method.rules import anchors
from mpa.runs.case import Case
from mpa.runs.layout import Cell
from mpa.runs.trainings import Runs, Training

CELL = Cell("easyVQA", "teacher", "student")


def distance(parity: list[dict], chosen: list[dict]) -> float:
    """Half the sum of absolute differences of the answers' shares: from all consistent samples, and in the train file."""
    of_all, of_train = (Counter(r["PA_answer"] for r in found) for found in ([*PARITY, *RIGHT], [*parity, *chosen]))
    return sum(abs(of_all[a] / of_all.total() - of_train[a] / of_train.total()) for a in of_all) / 2


def test_anchors_make_the_answers_distributed_as_in_all_consistent_samples():
    chosen = {by: anchors.choose(PARITY, RIGHT, 2, by, seed=3) for by in anchors.ANCHOR_BY}
    assert {len(found) for found in chosen.values()} == {120}
    far = {by: distance(PARITY, found) for by, found in chosen.items()}
    assert far["answer"] < 0.06 < min(far["kind"], far["random"]) < distance(PARITY, [])
    train = Counter(r["PA_answer"] for r in [*PARITY, *chosen["answer"]])
    assert (train["no"], train["yes"], train["circle"]) == (50, 44, 66)  # "no" is 5 over its share already
    kinds = Counter(r["PA_question"].split()[0] for r in [*PARITY, *chosen["kind"]])
    assert kinds == {"is": 90, "what": 90}


def test_the_choice_depends_on_the_seed_alone_and_ends_with_the_samples():
    first, again, other = (anchors.choose(PARITY, RIGHT, 0.5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 30
    assert first == [r for r in RIGHT if r in first]  # in their order
    assert anchors.choose(PARITY, RIGHT, 100) == RIGHT and anchors.choose(PARITY, [], 1) == []
    assert anchors.choose([], RIGHT, 1) == []


def test_the_train_file_says_what_each_record_is(select, easy_run, tmp_path, capsys):
    name = "PI_teacher_train_teacher_student_easyVQA.json"
    plain = select("--out", tmp_path / "plain.json")
    assert plain.read_bytes() == (Path(easy_run) / name).read_bytes()
    out = select("--out", tmp_path / "anchored.json", "--anchors", "1")
    parity, train = json.loads(plain.read_text()), json.loads(out.read_text())
    found = [r for r in train if r["kind"] == "anchor"]
    assert [{k: v for k, v in r.items() if k != "kind"} for r in train if r["kind"] == "parity"] == parity
    assert len(found) == len(parity) > 0 and len({r["id"] for r in train}) == len(train)
    asked = {r["question_id"]: r for r in read_json(tmp_path / "PI_teacher_student_easyVQA.json")}
    assert all(asked[r["id"]]["predictions"] == r["conversations"][1]["value"] for r in found)
    meta = read_json(out.with_suffix(".meta.json"))
    assert meta["settings"]["anchors"] == "1 by answer" and meta["funnel"]["anchors"] == len(found)
    assert f"{len(parity)} parity + {len(found)} anchors" in capsys.readouterr().out
    assert [r["id"] for r in read_parity(out)] == [r["id"] for r in parity]
    again = select("--out", tmp_path / "again.json", "--anchors", "1")
    assert again.read_bytes() == out.read_bytes()


def test_too_few_anchors_are_said(select, tmp_path, capsys):
    out = select("--out", tmp_path / "anchored.json", "--anchors", "50")
    assert "PI: only " in capsys.readouterr().err
    assert len(json.loads(out.read_text())) > len(read_parity(out))


def test_the_preset_anchored_is_the_paper_with_all_anchors_and_a_held_out_set(easy_run, tmp_path, capsys):
    models = ["--model-path-lvlm", str(TEACHER), "--model-path-svlm", str(STUDENT)]
    trains = []
    for name, chosen in (("preset", ["--preset", "anchored"]), ("flags", ["--anchors", "100", "--hold-out", "0.15"])):
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(easy_run).glob("PA_*"):
            (folder / file.name).write_bytes(file.read_bytes())  # the L-VLM's part is that of a run of the paper
        given = ["--dataset", "easyVQA", "--batch-size", "8", *MINI, "--run", f"{folder}/", *models, *chosen]
        trains.append(PI.main(given))
    assert trains[0].read_bytes() == trains[1].read_bytes() and "only" not in capsys.readouterr().err
    settings = [read_json(train.with_suffix(".meta.json"))["settings"] for train in trains]
    assert settings[0] == settings[1] and settings[0]["preset"] == "paper" and settings[0]["hold_out"] == 0.15
    assert PI.arguments(["--dataset", "easyVQA", "--preset", "anchored", "--anchors", "0"]).anchors == 0
    assert PI.arguments(["--dataset", "easyVQA"]).hold_out == 0


def test_the_trainer_and_the_export_take_an_anchored_file(select, tmp_path, capsys):
    out = select("--out", tmp_path / "anchored.json", "--anchors", "1")
    train = json.loads(out.read_text())
    assert [read_record(r, "", i)["id"] for i, r in enumerate(train)] == [r["id"] for r in train]
    export.main([str(out), "--to", "ms-swift", "--out", str(tmp_path / "swift.jsonl")])
    assert len((tmp_path / "swift.jsonl").read_text().splitlines()) == len(train)


def test_no_reader_takes_an_anchor_for_a_parity_sample(select, tmp_path):
    for file in tmp_path.glob("*_train_*"):
        file.unlink()
    train = select("--anchors", "1")
    parity, found = read_parity(train), read_json(train)
    run = Case(tmp_path, CELL)
    of_reason = Counter(s.reason for s in run.samples)
    assert of_reason["parity"] == len(parity)
    details = [s.reason for s in run.samples if s.detail.startswith("an anchor")]
    assert details == ["both right"] * (len(found) - len(parity))
    baselines.main(["--pa-json", str(tmp_path / "PA_teacher_easyVQA.json"), "--train-json", str(train)])
    assert len(read_json(train.with_name(f"{train.stem}_random_pseudo.json"))) == len(parity)
    (of_folder,) = Runs([tmp_path]).parity
    training = Training(CELL, "mpa", None, None, {"samples": len(found)}, of_folder.meta, {})
    assert training.parity_samples == len(parity)


def test_held_out_images_are_no_anchors_either(serve, copied_images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, copied_images, run)
    train = PI.main(flags(server, copied_images, run, "--hold-out", "0.3", "--anchors", "1"))
    tested = {r["image_hash"] for r in read_json(run / "PI_big_heldout_images.json")}
    found = read_json(train)
    assert {r["kind"] for r in found} == {"parity", "anchor"}
    assert not tested & {image_files.content_hash(r["image"]) for r in found}


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
