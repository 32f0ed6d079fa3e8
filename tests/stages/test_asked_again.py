"""What a second call asks again: errors that may pass, edited questions, changed images; and nothing else."""

import json
from pathlib import Path

import PI
from answered_by_rule import annotate, answers_by, flags
from conftest import TEACHER, python
from PIL import Image

from mpa.files import image_files
from mpa.files.records import read_json


def test_what_may_pass_is_asked_again_and_what_cannot_is_kept(serve, copied_images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mpa.engines.pacing.MAX_BACKOFF", 0.001)
    (copied_images / "05.png").write_text("no image")
    down = [True]
    good = answers_by()

    def rule(body, number):
        failing = down[0] and sum(map(ord, body["messages"][0]["content"][0]["image_url"]["url"])) % 3 == 0
        return (500, {"error": {"message": "down"}}) if failing else good(body)

    server, run = serve(rule), tmp_path / "run"
    out = annotate(server, copied_images, run, "--no-fused")
    first = read_json(out)
    failed = [r for r in first if (r["left_out"] or "").startswith("server: ")]
    assert 3 < len(failed) < 25 and "failed with a temporary error" in capsys.readouterr().out
    assert next(r["left_out"] for r in first if r["image_path"].endswith("05.png")).startswith("image: ")
    down[0], before = False, server.number
    second = read_json(annotate(server, copied_images, run, "--no-fused"))
    assert server.number - before == len(failed)  # these alone
    assert sum(bool(r["predicted_question"]) for r in second) == 29
    assert not list(run.glob("*.journal*"))
    annotate(server, copied_images, run, "--no-fused")
    assert "already exists" in capsys.readouterr().out


def test_a_result_with_nothing_in_it_is_never_there_already(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / f"images/{i}.png").write_text("no image")
    command = ["PA.py", "--dataset", "images", "--image-root", tmp_path / "images", "--run", f"{tmp_path}/run/"]
    command += ["--model-path-lvlm", TEACHER]
    assert [python(*command).returncode for _ in range(2)] == [1, 1]


def test_answers_that_are_paid_for_are_not_asked_for_again_because_of_one_that_changed(serve, copied_images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    pa_json = annotate(server, copied_images, run)
    annotations = read_json(pa_json)
    annotations[3]["predicted_question"] = "is it red?"
    pa_json.write_text(json.dumps(annotations))
    before = [b["model"] for b in server.bodies].count("big")
    PI.main(flags(server, copied_images, run, "--dtype", "bfloat16", "--hold-out", "0"))
    assert [b["model"] for b in server.bodies].count("big") == before + 1


def test_an_image_that_was_replaced_is_noticed(serve, copied_images, tmp_path, capsys):
    server, run = serve(answers_by()), tmp_path / "run"
    record = read_json(annotate(server, copied_images, run))[0]
    assert record["image_hash"] == image_files.content_hash(record["image_path"])
    assert record["image_bytes"] == Path(record["image_path"]).stat().st_size
    Image.new("RGB", (50, 50), "green").save(record["image_path"])
    PI.main(flags(server, copied_images, run, "--hold-out", "0"))
    assert "1 left out: 1 the image has changed since PA" in capsys.readouterr().err
    before = server.billed
    annotate(server, copied_images, run)
    assert "PA: 1 image added, 1 gone" in capsys.readouterr().out
    assert server.billed - before == 2  # its annotation and the L-VLM's answer
