"""What went wrong without a word: test images trained on, passing errors kept for good, images and files that have changed."""

import json
import os
import shutil
from pathlib import Path

import baselines
import evaluate
import PA
import PI
import pytest
from conftest import STUDENT, TEACHER, python
from fake_server import completion, text_of
from PIL import Image

from mpa import holdout, image_files, models
from mpa.datasets.loading import load_samples
from mpa.datasets.paths import locate
from mpa.journal import Journal
from mpa.records import InputError, read_json, read_records, run_folder


def answers_by():
    """The L-VLM "big" agrees with itself; of the S-VLMs each gets other questions wrong."""

    def rule(body, _=0):
        if "Question:" in text_of(body):
            return 200, completion("Question: what color is it?\nAnswer: red")
        image = body["messages"][0]["content"][0]["image_url"]["url"]
        wrong = body["model"] != "big" and sum(map(ord, image + body["model"])) % 4 != 0
        return 200, completion("blue" if wrong else "red")

    return rule


@pytest.fixture
def images(tmp_path) -> Path:
    """30 drawings; the last six are copies of one under other names."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(24):
        Image.new("RGB", (32 + i, 32), (i * 9, 99, 200 - i)).save(root / f"{i:02}.png")
    for i in range(24, 30):
        shutil.copy(root / "07.png", root / f"copy{i}.png")
    return root


def flags(server, images, run, *more, svlm="small") -> list[str]:
    given = ["--dataset", "images", "--run", f"{run}/", "--engine", "openai", "--base-url", server.url]
    return [
        *map(str, given),
        "--model-path-lvlm",
        "big",
        *(["--model-path-svlm", svlm] if svlm else []),
        *map(str, more),
    ]


def annotate(server, images, run, *more) -> Path:
    return PA.main(flags(server, images, run, "--image-root", images, *more, svlm=None))


# --- train and test ---------------------------------------------------------------------------------


def test_what_is_held_out_is_decided_once_by_content_for_every_s_vlm(serve, images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, images, run)
    trains = [PI.main(flags(server, images, run, "--hold-out", "0.4", svlm=svlm)) for svlm in ("small", "tiny")]
    held_out = read_json(run / "PI_big_heldout_images.json")
    tested = {image_files.content_hash(r["image_path"]) for r in held_out}
    assert 0.25 < len(tested) / 24 < 0.55
    for train in trains:
        parity = read_json(train)
        assert parity and not tested & {image_files.content_hash(r["image"]) for r in parity}
    copies = [r for r in held_out if Path(r["image_path"]).name.startswith("copy")]
    assert len(copies) in (0, 6)  # copies are on one side
    before = (run / "PI_big_heldout_images.json").read_bytes()
    PI.main(flags(server, images, run, "--hold-out", "0.4", svlm="third"))
    assert (run / "PI_big_heldout_images.json").read_bytes() == before
    with pytest.raises(InputError, match=r"this run holds out 0\.4 of the images, not 0\.1"):
        PI.main(flags(server, images, run, "--hold-out", "0.1", svlm="fourth"))


def test_baselines_leave_out_what_is_held_out_wherever_the_images_lie_now(serve, images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, images, run)
    moved = tmp_path / "moved"
    images.rename(moved)
    mapped = ["--path-map", f"{images}={moved}"]
    train = PI.main(flags(server, images, run, "--hold-out", "0.4", *mapped))
    held_out = {image_files.content_hash(r["image_path"]) for r in read_json(run / "PI_big_heldout_images.json")}
    baselines.main(["--pa-json", str(run / "PA_big_images.json"), "--train-json", str(train), *mapped])
    everything = read_json(train.with_name(f"{train.stem}_all_pseudo.json"))
    assert len(everything) > len(read_json(train))
    assert not held_out & {image_files.content_hash(r["image"]) for r in everything}


def test_evaluation_refuses_a_test_set_that_was_trained_on(serve, images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, images, run)
    train = PI.main(flags(server, images, run, "--hold-out", "0.4"))
    parity, held_out = read_json(train), read_json(run / "PI_big_heldout_images.json")
    train.write_text(json.dumps([*parity, parity[0] | {"id": "x", "image": held_out[0]["image_path"]}]))
    with pytest.raises(InputError, match="1 of its samples are in the held-out set"):
        evaluate.main(flags(server, images, run, "--model-path", "small", svlm=None))


def test_more_images_do_not_move_those_that_were_there(tmp_path):
    of = {f"{i}.png": f"{i * 37 % 100:032x}" for i in range(100)}
    first = dict(list(of.items())[:60])
    file = tmp_path / "PI_a_heldout_images.json"
    threshold = holdout.decide(file, first, 0.2)
    holdout.write(file, [], 0.2, threshold)
    assert holdout.decide(file, of, 0.2) == threshold


# --- errors that may pass ----------------------------------------------------------------------------


def test_what_may_pass_is_asked_again_and_what_cannot_is_kept(serve, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mpa.engines.openai.LONGEST_WAIT", 0.001)
    (images / "05.png").write_text("no image")
    down = [True]
    good = answers_by()

    def rule(body, number):
        failing = down[0] and sum(map(ord, body["messages"][0]["content"][0]["image_url"]["url"])) % 3 == 0
        return (500, {"error": {"message": "down"}}) if failing else good(body)

    server, run = serve(rule), tmp_path / "run"
    out = annotate(server, images, run, "--no-fused")
    first = read_json(out)
    failed = [r for r in first if (r["left_out"] or "").startswith("server: ")]
    assert 3 < len(failed) < 25 and "failed for reasons that may pass" in capsys.readouterr().out
    assert next(r["left_out"] for r in first if r["image_path"].endswith("05.png")).startswith("image: ")
    down[0], before = False, server.number
    second = read_json(annotate(server, images, run, "--no-fused"))
    assert server.number - before == len(failed)  # these alone
    assert sum(bool(r["predicted_question"]) for r in second) == 29
    assert not list(run.glob("*.journal*"))
    annotate(server, images, run, "--no-fused")
    assert "is there already" in capsys.readouterr().out


def test_a_result_with_nothing_in_it_is_never_there_already(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / f"images/{i}.png").write_text("no image")
    command = ["PA.py", "--dataset", "images", "--image-root", tmp_path / "images", "--run", f"{tmp_path}/run/"]
    command += ["--model-path-lvlm", TEACHER]
    assert [python(*command).returncode for _ in range(2)] == [1, 1]


def test_answers_that_are_paid_for_are_not_asked_for_again_because_of_one_that_changed(serve, images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    pa_json = annotate(server, images, run)
    annotations = read_json(pa_json)
    annotations[3]["predicted_question"] = "is it red?"
    pa_json.write_text(json.dumps(annotations))
    before = [b["model"] for b in server.bodies].count("big")
    PI.main(flags(server, images, run, "--dtype", "bfloat16", "--hold-out", "0"))
    assert [b["model"] for b in server.bodies].count("big") == before + 1


def test_an_image_that_was_replaced_is_noticed(serve, images, tmp_path, capsys):
    server, run = serve(answers_by()), tmp_path / "run"
    record = read_json(annotate(server, images, run))[0]
    assert record["image_hash"] == image_files.content_hash(record["image_path"])
    assert record["image_bytes"] == Path(record["image_path"]).stat().st_size
    Image.new("RGB", (50, 50), "green").save(record["image_path"])
    PI.main(flags(server, images, run, "--hold-out", "0"))
    assert "1 left out: 1 the image has changed since PA" in capsys.readouterr().err
    with pytest.raises(InputError, match="content was"):
        annotate(server, images, run)


# --- where images lie ----------------------------------------------------------------------------------


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_images_are_found_by_the_longest_end_of_their_path(tmp_path):
    root = make(tmp_path / "new", "a/1.png", "1.png", "b/2.png")
    assert locate(["/old/x/a/1.png", "/old/x/b/2.png"], {}, str(root)) == [f"{root}/a/1.png", f"{root}/b/2.png"]
    assert locate(["/old/none.png"], {}, str(root)) == ["/old/none.png"]


@pytest.mark.parametrize(
    ("recorded", "files", "root", "says"),
    [
        (["/d/train/png/1.png"], ["test/png/1.png"], "test", "an image of train, and this is a folder of test"),
        (
            ["/d/val2014/1.png"],
            ["train2014/1.png"],
            "train2014",
            "an image of validation, and this is a folder of train",
        ),
        (["/d/human/1.png", "/d/augmented/1.png"], ["all/1.png"], "all", "would both be looked for in it"),
    ],
)
def test_images_of_one_name_are_not_taken_for_each_other(tmp_path, recorded, files, root, says):
    make(tmp_path, *files)
    with pytest.raises(InputError) as error:
        locate(recorded, {}, str(tmp_path / root))
    assert says in str(error.value)


def test_folders_that_cannot_be_entered_are_named(tmp_path):
    make(tmp_path, "a.png")
    at = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(500):  # 5,500 characters: no path leads there
            os.mkdir("a" * 10)
            os.chdir("a" * 10)
        Path("deep.png").write_bytes(b"x")
    finally:
        os.chdir(at)
    with pytest.raises(InputError, match=r"cannot be entered|nested too deeply"):
        load_samples("images", "train", None, str(tmp_path))
    shutil.rmtree(tmp_path / ("a" * 10), ignore_errors=True)


# --- files that were tampered with ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        ['{"settings": {}}', '{"key": "a", "te', '{"key": "b", "text": "x"}'],
        ['{"settings": {}}', '{"other": 1}'],
        ['{"settings": {}}', "\0\0\0"],
        ['{"settings": {}}', '{"key": 3, "text": "x"}'],
        ['{"settings": {}}', '{"key": "a", "text": 3}'],
        ['{"key": "a", "text": "x"}'],
        ["[" * 100_000],
        ["3"],
    ],
    ids=["torn", "foreign", "NUL", "key", "text", "no header", "deep", "number"],
)
def test_a_damaged_journal_is_named_with_its_line(tmp_path, lines):
    (tmp_path / "PA_a_b.journal.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"journal\.jsonl, line \d+: no line of a journal"):
        Journal(tmp_path / "PA_a_b.json", {})


def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    journal = Journal(tmp_path / "PA_a_b.json", {})
    journal.append([{"key": "a", "text": "x"}])
    assert "cannot be locked on this file system" in capsys.readouterr().err


PA_RECORD = {
    "question_id": 1,
    "image_path": "a.png",
    "ground_truth_question": None,
    "ground_truth_answer": None,
    "predicted_question": "q?",
    "predicted_answer": "a",
}


@pytest.mark.parametrize(
    "change",
    [
        {"follow_up": "text"},
        {"follow_up": {"text": 3}},
        {"reply": 3},
        {"question_id": None},
        {"question_id": float("inf")},
        {"question_id": True},
        {"predicted_question": 3},
        {"image_hash": 3},
    ],
    ids=str,
)
def test_a_record_of_another_shape_is_named(tmp_path, change):
    (tmp_path / "PA.json").write_text(json.dumps([PA_RECORD, PA_RECORD | {"question_id": 2} | change]))
    with pytest.raises(InputError, match=r"PA\.json, record 1: "):
        read_records(tmp_path / "PA.json", "PA")


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "1" * 5000, "\0", "{", ""], ids=["deep", "long", "NUL", "cut", "empty"]
)
def test_json_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("run", ["..", ".", "", "-x", "a" * 300, "a\nb", "x/" + "b" * 300, " "])
def test_a_run_is_given_a_name_that_will_do(run):
    with pytest.raises(InputError, match="give a short name"):
        run_folder(run)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "{", '{"base_model_name_or_path": 3}', '{"base_model_name_or_path": "SELF"}']
)
def test_adapters_that_name_no_model_are_named(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content.replace("SELF", str(tmp_path)))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        models.check_model_path(str(tmp_path))


def test_a_models_own_marks_are_read_from_its_files():
    marks = models.format_marks(str(STUDENT))
    assert {"<|im_end|>", "<|image_pad|>", "<|vision_start|>"} <= marks
    assert marks <= models.processor_marks(models.load_processor(str(STUDENT), 3136, 3136)) | marks
