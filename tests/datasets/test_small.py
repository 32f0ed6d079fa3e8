"""The small suite: its drawings can be trusted, its layouts are the official ones, and its models are as its README says."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, bash, python

pytest.importorskip("font_roboto")
SMALL = ROOT / "data/small"
sys.path.insert(0, str(SMALL))

import draw  # noqa: E402
import scenes  # noqa: E402
from facts import COLORS, OBJECTS  # noqa: E402

MODELS = ("qwen-large", "internvl-large", "qwen-small", "internvl-small")


@pytest.mark.parametrize("name", scenes.DRAW)
def test_every_question_has_one_answer_that_the_drawing_has(name):
    for seed in range(150):
        scene = scenes.DRAW[name](random.Random(seed))
        assert scene.image.size == (96, 96) and scene.image.mode == "RGB"
        assert all(value in scenes.FACTS[fact] for fact, value in scene.facts.items())
        assert len({q.text: q.answer for q in scene.questions}) == len({(q.text, q.answer) for q in scene.questions})
        for q in scene.questions:
            values = set(scene.facts.values())
            if q.kind in ("read", "color", "price", "product", "look-up", "value", "trend", "count"):
                assert q.answer in values, q
            elif q.kind == "extreme":
                assert q.answer in COLORS and any(q.answer in fact for fact in scene.facts)
            elif name == "picture":
                assert q.answer == OBJECTS[scene.facts["object"]][1][q.kind]
            else:
                assert q.answer in ("yes", "no")


def test_the_suite_asks_no_look_up_between_two_labels():
    kinds = {q.kind for seed in range(60) for q in scenes.SUITE["labels"](random.Random(seed)).questions}
    assert kinds == {"price", "product", "read"}
    assert "look-up" in {q.kind for seed in range(60) for q in scenes.DRAW["labels"](random.Random(seed)).questions}


def test_charts_say_what_is_drawn():
    """The highest bar has the largest value; its colour's area is there in the pixels."""
    import numpy as np

    seen = 0
    for seed in range(60):
        scene = scenes.bars(random.Random(seed))
        pixels = np.asarray(scene.image).astype(int)
        values = {fact[4:]: int(value) for fact, value in scene.facts.items() if fact.startswith("bar ")}
        areas = {c: (np.abs(pixels - COLORS[c]).sum(-1) < 40).sum() for c in values}
        assert max(areas, key=areas.get) == max(values, key=values.get), seed
        assert next(q.answer for q in scene.questions if "highest" in q.text) == max(values, key=values.get)
        seen += 1
    assert seen == 60


def test_the_same_seed_draws_the_same_pixels_and_training_has_other_seeds():
    from training_images import SEED

    for name, draw_one in scenes.DRAW.items():
        one, two, other = (draw_one(random.Random(seed)).image.tobytes() for seed in (5, 5, SEED + 5))
        assert one == two != other, name
    assert all(seed + draw.STVQA < SEED for seed in draw.SEEDS.values())


def test_prepare_reads_the_four_layouts_as_official_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "TRAIN", 12)
    monkeypatch.setattr(draw, "TEST", 8)
    monkeypatch.setattr(draw, "STVQA", 40)
    draw.main(["--data", str(tmp_path)])
    from mpa.data.loading import load_samples

    monkeypatch.setenv("MPA_DATA", str(tmp_path))
    for dataset, test in (("textVQA", 8), ("stVQA", 6), ("chartVQA", 8), ("okVQA", 8)):
        parts = {part: load_samples(dataset, part) for part in ("train", "test")}
        assert len(parts["test"]) == test and len(parts["train"]) == (34 if dataset == "stVQA" else 12)
        images = [{hashlib.sha256(Path(s.image_path).read_bytes()).digest() for s in found} for found in parts.values()]
        assert not images[0] & images[1]
        assert all(len(s.answers) == {"textVQA": 10, "okVQA": 10}.get(dataset, 1) for s in parts["test"])
    assert {s.more["type"] for s in load_samples("chartVQA", "test")} <= {"human", "augmented"}
    done = draw.main(["--data", str(tmp_path)])  # a second time there is nothing to do
    assert done is None


def test_the_weights_are_small_and_their_figures_are_on_record():
    weights = [ROOT / f"data/small/{model}/model.safetensors" for model in MODELS]
    weights += [ROOT / f"data/mini/{model}/model.safetensors" for model in ("teacher", "student")]
    assert sum(path.stat().st_size for path in weights) < 20e6
    logs = {model: json.loads((SMALL / model / "train_log.json").read_text())["new drawings"] for model in MODELS}
    for name in scenes.DRAW:
        found = {model: log[name]["accuracy"] for model, log in logs.items()}
        assert min(found["qwen-large"], found["internvl-large"]) >= 0.85
        assert (
            max(found["qwen-small"], found["internvl-small"]) <= min(found["qwen-large"], found["internvl-large"]) - 0.1
        )


@pytest.mark.parametrize("model", ["qwen-large", "internvl-large"])
def test_an_lvlm_answers_the_suites_questions_through_the_stages(model, tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "TRAIN", 4)
    monkeypatch.setattr(draw, "TEST", 60)
    draw.chart_qa(tmp_path / "download")
    prepare = [
        sys.executable,
        ROOT / "data/prepare.py",
        "chartVQA",
        "--source",
        tmp_path / "download",
        "--data",
        tmp_path,
    ]
    subprocess.run(list(map(str, prepare)), check=True, capture_output=True)
    monkeypatch.setenv("MPA_DATA", str(tmp_path))
    pixels = ["--min-pixels", "9216", "--max-pixels", "9216", "--dtype", "float32", "--batch-size", "30"]
    done = python(
        "evaluate.py", "--dataset", "chartVQA", "--model-path", SMALL / model, *pixels, "--run", f"{tmp_path}/run"
    )
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / f"run/Eval_{model}_chartVQA.meta.json").read_text())
    assert meta["n"] == 60 and meta["scores"]["relaxed"]["score"] > 0.7


@pytest.mark.slow
def test_a_small_matrix_end_to_end(tmp_path):
    """1 L-VLM × 2 S-VLMs × 2 datasets, few samples: all jobs, the tables and the checks."""
    text = (ROOT / "experiments/small.yaml").read_text()
    changes = {"[textVQA, stVQA, chartVQA, okVQA]": "[chartVQA, okVQA]", ", data/small/internvl-large]": "]"}
    changes |= {
        "seeds: [0, 1, 2]": "seeds: [0]",
        "--limit 600 --temperature 1": "--limit 48 --temperature 1\n  evaluate: --sample 40",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    text = "\n".join(line for line in text.splitlines() if "seeds: [0]}" not in line) + "\n"
    (tmp_path / "tiny.yaml").write_text(text)
    done = bash("scripts/reproduce.sh", tmp_path / "tiny.yaml", RESULTS=tmp_path / "results", JOBS=2)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        line for line in done.stdout.splitlines() if line.startswith(("| chartVQA", "| okVQA")) and "-small" in line
    ]
    assert len([row for row in rows if "qwen-large" in row]) >= 4
    checked = python("checks.py", "sweep", tmp_path / "results")
    assert checked.returncode == 0 and checked.stdout.count("| mpa |") == 4
    assert "from qwen-large" in python("diagnose.py", tmp_path / "results", "--short").stdout
