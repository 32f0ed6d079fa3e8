"""A full disk, or a limit on the size of files, is one line with the place and what is kept; exit 1, and nothing is torn."""

import contextlib
import os
import shutil
import subprocess
import sys

import merge_lora
import originals
import pytest
import reproduce
import torch
from answered_by_rule import answers_by, flags
from conftest import ROOT, STUDENT, TEACHER, at_most, python, snapshot
from easy_run import EASY
from safetensors.torch import save_file

from mpa.files import atomic, disk_errors, records
from mpa.files.records import read_json


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def one_line(done, place) -> None:
    """The command ended with exit code 1, and one line that names the place."""
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert str(place) in said[0] and "no space left" in said[0], said[0]
    assert "Traceback" not in done.stderr and "never retrieved" not in done.stderr, done.stderr


def test_a_result_on_a_full_disk_leaves_the_old_one(small_disk):
    records.write_result(small_disk / "PA.json", [{"id": 1}], {"seed": 0})
    before = snapshot(small_disk)
    for big in ([{"id": "x" * 70_000}], [{"id": 1}]):
        with pytest.raises(OSError, match="No space left") as raised:
            records.write_result(small_disk / "PA.json", big, {"seed": 1, "more": "x" * 70_000})
        assert raised.value.filename.startswith(str(small_disk))
        assert snapshot(small_disk) == before


@pytest.mark.parametrize("limit", ["disk", "size"])
def test_replies_of_a_server_are_kept_as_far_as_there_is_room(serve, copied_images, tmp_path, limit, request):
    place = request.getfixturevalue("small_disk") if limit == "disk" else tmp_path
    server, run = serve(answers_by(), pause=0.02), place / "run"
    command = ["PA.py", *flags(server, copied_images, run, "--image-root", copied_images, svlm=None)]
    command += [
        "--concurrency",
        "8",
        "--questions-per-image",
        "1",
        "--max-cost",
        "9",
        "--price-in",
        "1",
        "--price-out",
        "1",
    ]
    if limit == "disk":
        (place / "full").write_bytes(b"x" * 44_000)
    with at_most(4000) if limit == "size" else contextlib.nullcontext():
        done = python(*command)
    one_line(done, run)
    kept = (run / "PA_big_images.journal.jsonl").read_text()
    assert kept.endswith("\n") and kept.count("\n") > 3
    before = server.number
    (place / "full").unlink(missing_ok=True)
    assert python(*command).returncode == 0
    assert server.number - before < 60 - kept.count("follow_up")  # a reply and its follow-up for each image
    assert len(read_json(run / "PA_big_images.json")) == 30


@pytest.mark.parametrize(
    ("command", "size"),
    [
        (["tables.py", "RUN", "--out", "OUT"], 100),
        (["checks.py", "coverage", "RUN", "--out", "OUT"], 100),
        (["tables.py", "--dataset", "easyVQA", "--lvlm", TEACHER, "--svlm", STUDENT, "RUN"], 100),
        (["report.py", "RUN", "--out", "OUT"], 100),
        (["report.py", "RUN", "--out", "OUT"], 50_000),
        (["report.py", "RUN", "--single-file", "--out", "OUT"], 50_000),
        *(
            (["export.py", "TRAIN", "--to", to, "--out", "OUT"], 100)
            for to in ("llava", "sharegpt", "ms-swift", "hf", "trl")
        ),
        (["evaluate.py", "--predictions", "EVAL", "--out", "OUT"], 100),
        (["evaluate.py", *EASY, "--limit", 2, "--model-path", STUDENT, "--out", "OUT"], 700),
        (["PA.py", *EASY, "--limit", 2, "--model-path-lvlm", TEACHER, "--out", "OUT"], 1000),
    ],
)
def test_every_command_says_it_in_one_line_and_leaves_what_was_there(easy_run, tmp_path, command, size):
    run = tmp_path / "run"
    shutil.copytree(easy_run, run)
    places = {"RUN": run, "OUT": tmp_path / "out.json", "EVAL": run / "Eval_student_easyVQA.json"}
    places["TRAIN"] = run / "PI_teacher_train_teacher_student_easyVQA.json"
    before = snapshot(run)
    with at_most(size):
        done = python(*(places.get(word, word) for word in command))
    one_line(done, tmp_path)
    assert {k: v for k, v in snapshot(run).items() if not k.startswith(".thumbnails")} == before
    assert not [path for path in tmp_path.rglob(".*") if path.suffix in (".part", ".lock")]


def test_a_conversion_leaves_nothing_half_made(tmp_path):
    source = originals.internvl(tmp_path / "InternVL2-2B")
    with at_most(100_000):
        done = python("convert.py", source, "--out", tmp_path / "native")
    one_line(done, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["InternVL2-2B"]


def test_errors_of_safetensors_and_torch_name_the_file(tmp_path):
    tensors = {"a": torch.zeros(10_000)}
    for name, save in (("a.safetensors", save_file), ("a.pt", torch.save)):
        with at_most(1000), pytest.raises(OSError) as raised, disk_errors.named(tmp_path / name):
            save(tensors, str(tmp_path / name))
        assert raised.value.filename == str(tmp_path / name)
        assert "no space left" in disk_errors.cause(raised.value)
    with pytest.raises(RuntimeError, match="mat1"), disk_errors.named(tmp_path):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_merged_weights_that_do_not_fit_leave_an_empty_place(tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")

    def merge(_adapter, out, *_):
        out.mkdir()
        save_file({"a": torch.zeros(10_000)}, str(out / "model.safetensors"))

    monkeypatch.setattr(merge_lora, "merge", merge)
    arguments = ["--model-path", str(tmp_path / "adapter"), "--save-model-path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", *arguments])
    with at_most(1000), pytest.raises(SystemExit) as ended:
        merge_lora.main()
    assert str(tmp_path / "out") in ended.value.code and "no space left" in ended.value.code
    assert not (tmp_path / "out").exists()


def test_the_runner_says_it(small_disk):
    (small_disk / "full").write_bytes(b"x" * 2**16)
    command = [sys.executable, str(ROOT / "scripts/reproduce.py"), str(small_disk), f"{ROOT}/experiments/mini.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "REPORT": "0"})
    one_line(done, small_disk)


def test_the_runner_says_it_when_snakemake_fails_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "places", lambda *_: (0, []))
    monkeypatch.setattr(reproduce, "snakemake", lambda *_: 1)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(reproduce.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    assert reproduce.main([str(tmp_path), f"{ROOT}/experiments/mini.yaml"]) == 1
    assert f"error: {tmp_path}: no space left on the disk" in capsys.readouterr().err


def test_a_write_within_the_limit_is_not_touched(tmp_path):
    with at_most(10_000):
        with atomic.replacing(tmp_path / "a") as file:
            file.write(b"x" * 10_000)
        with pytest.raises(OSError, match="File too large") as raised, atomic.replacing(tmp_path / "a") as file:
            file.write(b"y" * 10_001)
    assert raised.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"x" * 10_000 and len(list(tmp_path.iterdir())) == 1


def test_a_click_that_does_not_fit_is_refused_whole_and_the_next_one_is_kept(tmp_path):
    fastapi = pytest.importorskip("fastapi.testclient")
    from mpa.analysis.rating_app import application
    from mpa.analysis.ratings import Item, Ratings, latest
    from mpa.runs.layout import Cell

    file = tmp_path / "ratings_L_S_images.jsonl"
    items = [Item("1", "x.png", "q?", "a", "before"), Item("2", "y.png", "q?", "a", "after")]
    ratings = Ratings(file, Cell("images", "L", "S"), items, {"before": items[:1], "after": items[1:]}, 1, 0)
    client = fastapi.TestClient(application(ratings), base_url="http://127.0.0.1:8765")
    click = {"rater": "Ada", "position": 0, "aspect": "correct", "value": True}
    with at_most(60):
        refused = client.post("/ratings", json=click)
    assert (
        refused.status_code == 507
        and "no space left" in refused.json()["detail"]
        and str(file) in refused.json()["detail"]
    )
    assert client.post("/ratings", json=click | {"value": False}).status_code == 200
    assert latest(file) == {("Ada", "1", "before"): {"correct": False}}
    ratings.close()
