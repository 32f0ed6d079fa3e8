"""The recipes of docs/extending.md: each patch applies and works."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

USES = """
import json, sys
sys.path[:0] = [".", "PL/Qwen2-VL-Finetune/src"]
from mpa.runs import scoring
from mpa.data.loading import load_samples
from mpa.answers.matching import Match
from mpa.method.prompts import TASK_PROMPTS
import param_groups
samples = load_samples("docVQA", "test", "val.json", "data", images=False)
records = [{"question_id": 337, "predictions": "Red ink", "answers": ["red pen"]}]
print(json.dumps({
    "read": [samples[0].question_id, samples[0].answers],
    "scores": [scoring.score(records, "docVQA")["first_word"]["score"], scoring.metric_names("docVQA")[0]],
    "matches": [Match("first_word")("Red ink", "red pen"), Match("exact")("Red ink", "red pen")],
    "prompt": "how many" in TASK_PROMPTS["count"],
    "part": param_groups.part_of("model.vision_tower.encoder.weight", "vipllava"),
}))
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the code with all patches applied."""
    copy = tmp_path_factory.mktemp("extended")
    for folder in ("mpa", "scripts", "PL"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    patches = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
    assert len(patches) == 7
    for patch in patches:
        done = subprocess.run(["git", "apply", "-C0"], input=patch, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{patch}"
    return copy


def run(folder, *command) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def test_each_recipe_adds_what_it_says(extended):
    record = {"questionId": 337, "image": "a.png", "question": "what?", "answers": ["1/8/93"]}
    (extended / "val.json").write_text(json.dumps({"data": [record]}))
    done = run(extended, "-c", USES)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "read": [337, ["1/8/93"]],
        "scores": [1.0, "anls"],
        "matches": [True, False],
        "prompt": True,
        "part": "vision",
    }


def test_a_stage_runs_with_the_new_engine(extended, tmp_path):
    flags = ["--engine", "constant", "--model-path", "yes", "--dataset", "easyVQA", "--limit", "20"]
    done = run(extended, "scripts/evaluate.py", *flags, "--run", f"{tmp_path}/")
    assert done.returncode == 0, done.stderr
    assert "first_word" in done.stdout
    assert {r["predictions"] for r in json.loads((tmp_path / "Eval_yes_easyVQA.json").read_text())} == {"yes"}


def test_pi_runs_with_the_new_rule(extended, tmp_path):
    name, out = "tests/data/official/PI_Qwen2vl7b", tmp_path / "train.json"
    answers = ["--lvlm-json", ROOT / f"{name}_Qwen2-VL-7B-Instruct_chartVQA.json"]
    answers += ["--svlm-json", ROOT / f"{name}_Qwen2-VL-2B-Instruct_chartVQA.json"]
    done = run(
        extended, "scripts/PI.py", "--dataset", "chartVQA", *map(str, answers), "--max-words", "1", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads(out.read_text())
    assert kept and all(len(r["conversations"][1]["value"].split()) == 1 for r in kept)
    reasons = [
        r for r in json.loads(out.with_name("train.reasons.json").read_text()) if r["reason"] == "answer too long"
    ]
    assert reasons and all(len(r["PA_answer"].split()) > 1 and r["detail"].endswith("words") for r in reasons)
    assert json.loads(out.with_name("train.meta.json").read_text())["settings"]["max_words"] == 1
