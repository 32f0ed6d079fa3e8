"""Bad arguments of a stage, and --dry-run."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TEACHER, python
from easy_run import OUTPUTS, STAGES, read


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dataset", "nonsense"], "textVQA"),
        (["--dataset", "easyVQA", "--preset", "nonsense"], "released"),
        (["--dataset", "easyVQA", "--limit", "0"], "must be at least 1"),
        (["--dataset", "easyVQA", "--workers", "-1"], "must be at least 0"),
        (["--dataset", "easyVQA", "--top-p", "0"], "must be more than 0 and at most 1"),
        (["--dataset", "easyVQA", "--min-pixels", "9", "--max-pixels", "4"], "is more than --max-pixels"),
        (["--dataset", "easyVQA", "--out", "/tmp"], "is a folder"),
        (["--dataset", "easyVQA", "--path-map", "x"], "expected OLD=NEW"),
        (["--dataset", "easyVQA", "--device", "cuda:99", "--model-path-lvlm", TEACHER], "no such device"),
        (["--dataset", "easyVQA", "--device", "gpu", "--model-path-lvlm", TEACHER], "--device gpu"),
        (["--dataset", "easyVQA", "--model-path-lvlm", "/no/such/model"], "/no/such/model: no such model folder"),
        (["--dataset", "images", "--image-root", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--dataset", "textVQA", "--annotations", "/no/such.json"], "/no/such.json: no such file"),
        (["--dataset", "easyVQA", "--run", "/dev/null/x", "--model-path-lvlm", TEACHER], "cannot be written"),
    ],
)
def test_bad_arguments_end_in_one_line_and_not_in_a_traceback(arguments, says):
    done = python("PA.py", *arguments)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("value", "code"), [("0", 0), ("1", 0), ("", 0), ("yes", 2), ("False", 2)])
@pytest.mark.parametrize("name", ["VERBOSE", "MEMORY_CHECK"])
def test_a_switch_of_the_environment_is_0_or_1(name, value, code, easy_run, monkeypatch):
    monkeypatch.setenv(name, value)
    done = python("evaluate.py", "--predictions", easy_run / "Eval_student_easyVQA.json")
    assert done.returncode == code
    assert (f"the variable {name} is {value!r}; give 0 or 1" in done.stderr) == bool(code)


def test_an_unknown_matcher_lists_the_known_ones():
    done = python("PI.py", "--dataset", "easyVQA", "--match", "nonsense")
    assert done.returncode != 0
    assert "anls" in done.stderr
    missing = python("PI.py", "--dataset", "textVQA", "--run", "/tmp/none/")
    assert "Run PA.sh first, or name the file with --pa-json" in missing.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_says_how_much_there_is_to_do_and_writes_nothing(easy_run, tmp_path, stage):
    for name in OUTPUTS["PA"] if stage == "PI" else ():
        shutil.copy(easy_run / f"{name}.json", tmp_path)
    before = sorted(tmp_path.iterdir())
    done = python(*STAGES[stage], "--dry-run", "--run", f"{tmp_path}/")
    assert done.returncode == 0, done.stderr
    n = len(read(easy_run / f"{OUTPUTS[stage][0]}.json"))
    assert f"{n} requests about" in done.stdout
    assert f"visual tokens of Qwen2-VL: {n * 4}" in done.stdout
    assert "time, by the pace of" in done.stdout
    data = python(*STAGES[stage], "--dry-run", "json", "--run", f"{tmp_path}/")
    told = json.loads(data.stdout.splitlines()[-1])
    assert told["requests"] == n and 0 < told["seconds"] < 60
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("script", ["scripts/PA.py", "scripts/PI.py", "scripts/evaluate.py", "scripts/convert.py"])
def test_help_imports_no_torch(script):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / script, "--help"], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "mpa.stages.cli" in imported and not imported & {"torch", "transformers", "bitsandbytes"}
