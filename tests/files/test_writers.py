"""Several writers of one file, and writers that were killed: nothing is torn, nothing is left over."""

import json
import os
import subprocess
import sys
import threading

import pytest
from answered_by_rule import annotate, answers_by, flags
from conftest import ROOT, python
from PIL import Image

from mpa.analysis.report import thumbnails
from mpa.files import atomic, records
from mpa.files.records import InputError, read_json, train_record
from mpa.method.holdout import write
from mpa.runs import exports

WRITER = """
import sys
sys.path.insert(0, {root!r})
from mpa.files import records
for i in range(150):
    found = [dict(who={who!r}, i=i, text="x" * 1000)] * 20
    records.write_{what}({file!r}, *([found, dict(who={who!r}, i=i)] if {what!r} == "result" else [found]))
"""


@pytest.mark.parametrize("what", ["result", "json"])
def test_of_two_writers_of_a_file_none_fails_and_the_file_is_always_whole(tmp_path, what):
    file = tmp_path / "PA.json"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER.format(root=str(ROOT), who=who, what=what, file=str(file))],
            stderr=subprocess.PIPE,
            text=True,
        )
        for who in "ab"
    ]
    while any(writer.poll() is None for writer in writers):
        if file.exists():
            try:
                found = read_json(file)
            except InputError as error:  # a result is not there for a moment, while its meta file is replaced
                assert "no such file" in str(error)
                continue
            assert len({(r["who"], r["i"]) for r in found}) == 1 and len(found) == 20
    assert [(writer.wait(), writer.stderr.read()) for writer in writers] == [(0, "")] * 2
    if what == "result":
        (last,) = {(r["who"], r["i"]) for r in read_json(file)}
        assert tuple(read_json(records.meta_path(file))["settings"].values()) == last
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    left = [tmp_path / ".PA.json.part", tmp_path / ".PA.json.0123abcd.part"]  # of an older version, and of this one
    for path in (*left, tmp_path / ".PA.json.more.part.json", tmp_path / "PA.json.part"):
        path.write_text("half")
    with atomic.replacing(tmp_path / "PA.json") as living:
        records.write_json(tmp_path / "PA.json", "by another")
        living.write(b'"last"\n')
    assert not any(path.exists() for path in left)
    assert read_json(tmp_path / "PA.json") == "last"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".PA.json.more.part.json", "PA.json", "PA.json.part"]


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    records.write_result(tmp_path / "PA.json", [{"id": 1}], {"seed": 0})
    with pytest.raises(TypeError):
        records.write_result(tmp_path / "PA.json", [{"id": object()}], {"seed": 1})
    assert read_json(tmp_path / "PA.json") == [{"id": 1}]
    assert read_json(tmp_path / "PA.meta.json")["settings"] == {"seed": 0}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def hold():
    """`hold(path)` -> a process that makes `path`, until it is killed."""
    holders = []

    def start(path) -> subprocess.Popen:
        script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom mpa.files import records\n"
        script += f"with records.locked({str(path)!r}):\n    print('held', flush=True); sys.stdin.read()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        holders.append(subprocess.Popen([sys.executable, "-c", script], **pipes))
        assert holders[-1].stdout.readline() == b"held\n"
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_one_process_makes_a_result_and_another_is_refused_or_waits(tmp_path, hold):
    file = tmp_path / "PA.json"
    holder = hold(file)
    with pytest.raises(InputError, match=r"PA\.json: another process is writing it"), records.locked(file):
        pass
    waiting = threading.Thread(target=records.write_result, args=(file, [], {}))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive() and not file.exists()
    holder.kill()  # the kernel releases the lock; its file is left
    waiting.join(10)
    assert read_json(file) == []
    assert not list(tmp_path.glob(".*"))


def test_pi_that_asks_nobody_takes_a_lock_too(serve, copied_images, tmp_path, hold):
    """PA has the L-VLM's answers: their file is written without a journal."""
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, copied_images, run)
    command = ["PI.py", *flags(server, copied_images, run, "--dtype", "bfloat16")]
    holder, before = hold(run / "PI_big_small_images.json"), server.number
    refused = python(*command)
    assert refused.returncode == 1 and "PI_big_small_images.json: another process is writing it" in refused.stderr
    assert server.number == before and not (run / "PI_big_small_images.json").exists()
    holder.kill()
    holder.communicate()
    assert python(*command).returncode == 0
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == [".spending.json.lock"]


def test_two_calls_that_hold_out_at_once_add_to_one_set(tmp_path):
    file = tmp_path / "PI_a_heldout_images.json"

    def questions(call, n=40):
        return [{"question_id": f"{call}-{i}", "image_path": f"{i}.png", "image_hash": f"{i}"} for i in range(n)]

    calls = [threading.Thread(target=write, args=(file, questions(call), 0.2, "aa")) for call in range(8)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(read_json(file)) == 320
    with pytest.raises(InputError, match="another process has just made it of other images"):
        write(file, questions("new", 1), 0.2, "bb")


def test_two_exports_and_two_reports_into_one_folder_are_whole(tmp_path):
    for i in range(20):
        Image.new("RGB", (300, 300), (i, 0, 0)).save(tmp_path / f"{i}.png")
    samples = [train_record(i, str(tmp_path / f"{i}.png"), "q?", "a") for i in range(20)]

    def both(target, *arguments):
        calls = [threading.Thread(target=target, args=of) for of in arguments]
        for call in calls:
            call.start()
        for call in calls:
            call.join()

    out, form = tmp_path / "out", exports.question_and_answer
    both(exports.write_folder, *((out, samples[: 5 + n], form, str) for n in range(4)))
    (part,) = (out / "data").iterdir()
    assert (out / "README.md").read_text() == f"data/{part.name}"
    wanted = {sample["image"]: [str(tmp_path)] for sample in samples}
    (tmp_path / "thumbs").mkdir()
    (tmp_path / "thumbs/.00.webp.part").write_text("left")
    both(thumbnails.make, *[(wanted, tmp_path / "thumbs")] * 3)
    assert len(list((tmp_path / "thumbs").iterdir())) == 20
    assert all(Image.open(path).size == (160, 160) for path in (tmp_path / "thumbs").iterdir())
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_two_evaluations_add_to_one_results_json(tmp_path):
    from mpa.runs.interchange import write_lmms_eval

    result = [
        {
            "question_id": i,
            "image_path": "x",
            "GT_question": "q",
            "GT_answer": "a",
            "predictions": "a",
            "answers": ["a"],
        }
        for i in range(30)
    ]
    calls = [
        threading.Thread(target=write_lmms_eval, args=(tmp_path, result, dataset, "paper", "m"))
        for dataset in ("textVQA", "okVQA", "chartVQA", "stVQA")
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 4
