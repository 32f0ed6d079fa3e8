"""PI beyond the paper, by rules: what is chosen, and that all readers see it so."""

import base64
import io
import json
import math
from collections import Counter
from pathlib import Path

import baselines
import export
import PI
import pytest
from answered_by_rule import annotate, answers_by, flags
from conftest import MINI, STUDENT, TEACHER
from fake_server import completion, text_of
from PIL import Image
from record_formats import read_record

from mpa.analysis import run_summary
from mpa.files import image_files
from mpa.files.records import InputError, read_json, read_parity
from mpa.method.rules import anchors
from mpa.method.rules.caps import Caps
from mpa.method.rules.sure import Sure, probability
from mpa.method.rules.votes import Votes
from mpa.runs.case import Case
from mpa.runs.folders import RunFolder
from mpa.runs.layout import Cell
from mpa.runs.trainings import Runs, Training

CELL = Cell("easyVQA", "teacher", "student")


def asked(n: int, question: str, answer: str, first: int) -> list[dict]:
    return [{"question_id": first + i, "PA_question": question, "PA_answer": answer} for i in range(n)]


# Of 400 consistent samples 200 are yes/no questions, half of them "yes"; the S-VLM errs on 60, nearly all of them "no".
PARITY = [*asked(50, "is there no circle?", "no", 0), *asked(10, "is it red?", "yes", 100)]
RIGHT = [*asked(50, "is it red?", "no", 200), *asked(90, "is it red?", "yes", 300)]
RIGHT += [*asked(150, "what shape is it?", "circle", 400), *asked(40, "what shape is it?", "square", 600)]
RIGHT += [r | {"PA_answer": f"shape {i}"} for i, r in enumerate(asked(10, "what shape is it?", "", 700))]


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


@pytest.fixture
def select(easy_run, tmp_path):
    """PI from the existing answers of `easy_run`, in a run folder of its own with links to its files."""
    for file in Path(easy_run).glob("P*"):
        (tmp_path / file.name).symlink_to(file)

    def select(*more) -> Path:
        answers = ["--lvlm-json", tmp_path / "PI_teacher_teacher_easyVQA.json"]
        answers += ["--svlm-json", tmp_path / "PI_teacher_student_easyVQA.json"]
        models = ["--model-path-lvlm", TEACHER, "--model-path-svlm", STUDENT]
        return PI.main([*map(str, [*answers, *models, *MINI, "--run", f"{tmp_path}/", *more])])

    return select


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


def capped(samples: list[dict], per_question: int, per_answer: int, seed: int) -> list[dict]:
    return Caps({"max_per_question": per_question, "max_per_answer": per_answer, "seed": seed}).capped(samples)


def test_caps_leave_so_many_of_one_question_and_of_one_answer():
    samples = [*PARITY, *asked(3, "What colour?", "red", 900), *asked(3, "what  colour", "red.", 910)]
    once = capped(samples, 1, 0, seed=0)
    assert len(once) == 3 and once == [r for r in samples if r in once]  # the two spellings are one question
    both = capped(samples, 20, 4, seed=0)
    assert Counter(r["PA_answer"].strip(".") for r in both) == {"no": 4, "yes": 4, "red": 4}
    assert capped(samples, 0, 0, seed=0) == samples
    assert capped(samples, 20, 0, 1) == capped(samples, 20, 0, 1) != capped(samples, 20, 0, 2)


def test_what_a_cap_leaves_out_is_explained(select, tmp_path, capsys):
    for file in tmp_path.glob("*_train_*"):
        file.unlink()
    train = select("--max-per-answer", "1")
    kept, meta = read_json(train), read_json(train.with_suffix(".meta.json"))
    answers = [r["conversations"][1]["value"] for r in kept]
    assert len(set(answers)) == len(answers) == meta["funnel"]["parity"]
    assert meta["settings"]["max_per_answer"] == 1 and meta["settings"]["seed"] == 0
    reasons = Counter(s.reason for s in Case(tmp_path, CELL).samples)
    assert reasons["parity"] == len(kept) and reasons["over the limit"] > 0
    assert f"{reasons['over the limit']} parity samples are over" in capsys.readouterr().out
    shown = "".join(run_summary.examples(Case(tmp_path, CELL), 100))
    assert shown.count("→ parity sample") == len(kept) and shown.count("→ over the limit") == reasons["over the limit"]


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


def test_votes_are_a_share_of_what_was_asked():
    rule = Votes({"votes": 4, "min_agreement": 0.75, "seed": 0})
    rule.see([{"question_id": f"a#7#{i}", "predictions": "red" if i else "blue"} for i in range(4)])
    rule.see([{"question_id": f"8#{i}", "predictions": None if i else "red"} for i in range(4)])
    same = str.__eq__
    assert rule.agrees({"question_id": "a#7"}, "red", same)[0]
    assert not rule.agrees({"question_id": 8}, "red", lambda vote, answer: vote == answer)[0]
    assert not rule.agrees({"question_id": 9}, "red", same)[0]  # it was not asked


def test_a_server_without_log_probabilities_cannot_be_asked_for_one(serve, copied_images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, copied_images, run)
    with pytest.raises(InputError, match="no answer has a log-probability, so --min-probability cannot be used"):
        PI.main(flags(server, copied_images, run, "--min-probability", "0.5"))


def test_questions_that_need_no_image_are_left_out(serve, copied_images, tmp_path, capsys):
    """The L-VLM says yes to "is it red?" whatever it sees, and tells a grey image's colour."""

    def rule(body, _=0):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            grey = image.size == (448, 448)
        if "Question:" in text_of(body):
            asked = (
                "Question: is it red?\nAnswer: yes" if sum(map(ord, url)) % 3 else "Question: what color?\nAnswer: red"
            )
            return 200, completion(asked)
        if body["model"] != "big":
            return 200, completion("blue")
        return 200, completion("yes" if "is it red" in text_of(body) else "grey" if grey else "red")

    server, run = serve(rule), tmp_path / "run"
    annotate(server, copied_images, run)
    plain = PI.main(flags(server, copied_images, run, "--hold-out", "0", "--out", tmp_path / "plain.json"))
    given = flags(server, copied_images, run, "--hold-out", "0", "--blind", "--restart")
    train = PI.main(given)
    asked = [r["conversations"][0]["value"] for r in read_json(plain)]
    kept = [r for r in read_json(plain) if "what color" in r["conversations"][0]["value"]]
    assert read_json(train) == kept and 0 < len(kept) < len(asked)
    cell = Cell("images", "big", "small")
    reasons = Counter(s.reason for s in Case(run, cell).samples)
    assert reasons["parity"] == len(kept) and reasons["L-VLM needs no image"] == len(asked) - len(kept)
    n = server.number
    answers = ["--lvlm-json", run / "PI_big_big_images.json", "--svlm-json", run / "PI_big_small_images.json"]
    again = PI.main([*given[:-1], *map(str, [*answers, "--out", tmp_path / "again.json"])])
    assert again.read_bytes() == train.read_bytes() and server.number == n
    assert RunFolder(run).cells == [cell]


def test_votes_decide_instead_of_the_greedy_answer(serve, copied_images, tmp_path):
    """Greedily the L-VLM always repeats itself. Its sampled answers do so for two of three images only."""

    def rule(body, number=0):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        if "Question:" in text_of(body):
            return 200, completion("Question: what color?\nAnswer: red")
        if body["model"] != "big":
            return 200, completion("blue")
        return 200, completion("green" if body["temperature"] and sum(map(ord, url)) % 3 == 0 else "red")

    server, run = serve(rule), tmp_path / "run"
    annotate(server, copied_images, run)
    given = flags(server, copied_images, run, "--hold-out", "0", "--votes", "4", "--min-agreement", "0.75")
    PI.main([*given, "--only-lvlm"])
    votes = read_json(run / "PI_big_votes_images.json")
    train = PI.main(given)
    shares = Counter(r["question_id"].rpartition("#")[0] for r in votes if r["predictions"] == "red")
    assert len(votes) == 4 * 30 and set(shares.values()) == {4} and 0 < len(shares) < 30
    assert {str(r["id"]) for r in read_json(train)} == set(shares)
    samples = Case(run, Cell("images", "big", "small")).samples
    assert {s.reason for s in samples if s.question_id not in shares} == {"L-VLM disagrees"}
    assert "in 0% of the votes" in next(s.detail for s in samples if not s.kept)
    n, answers = server.number, ["--lvlm-json", run / "PI_big_big_images.json"]
    answers += ["--svlm-json", run / "PI_big_small_images.json", "--out", tmp_path / "again.json"]
    assert PI.main([*given, *map(str, answers)]).read_bytes() == train.read_bytes() and server.number == n
    (run / "PI_big_votes_images.json").unlink()
    with pytest.raises(InputError, match=r"PI_big_votes_images.json: no such file. Run PI.sh with --votes first"):
        PI.main([*given, *map(str, answers), "--restart"])


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
