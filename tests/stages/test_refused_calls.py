"""A call that is refused has written nothing: all checks come before the first write."""

import json
import shutil

import pytest
from answered_by_rule import annotate, answers_by, flags
from conftest import MINI, STUDENT, TEACHER, python, snapshot
from easy_run import EASY

from mpa.files.records import read_json


def sampled_by_rule():
    """As `answers_by`; sampled answers of the L-VLM differ."""
    rule = answers_by()

    def reply(body, number=0):
        if body.get("temperature") and body["model"] == "big" and sum(map(ord, json.dumps(body))) % 2:
            body = body | {"model": "another"}
        return rule(body, number)

    return reply


PI_REFUSED = {
    "another --min-agreement": ["--votes", 3, "--min-agreement", 0.3],
    "no votes": [],
    "other votes": ["--votes", 2],
    "another matcher": ["--votes", 3, "--match", "contains"],
    "another share": ["--votes", 3, "--hold-out", 0.3],
    "a broken file of questions": ["--votes", 3, "--held-out-questions", "broken.json"],
    "questions about no held-out image": ["--votes", 3, "--held-out-questions", "none.json"],
    "a cap on questions": ["--votes", 3, "--max-per-question", 5],
    "anchors": ["--votes", 3, "--anchors", 1],
    "another dtype": ["--votes", 3, "--dtype", "float16"],
    "a train file that another command made": ["--votes", 3, "--out", "PA_big_images.json"],
}


@pytest.fixture(scope="module")
def module_images(tmp_path_factory):
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for i in range(30):
        Image.new("RGB", (32 + i, 32), (i * 8, 99, 200 - i)).save(root / f"{i:02}.png")
    return root


@pytest.mark.parametrize("more", PI_REFUSED.values(), ids=PI_REFUSED)
def test_a_refused_call_of_pi_leaves_the_run_as_it_is(serve, module_images, tmp_path, more):
    server, run = serve(sampled_by_rule()), tmp_path / "run"
    annotate(server, module_images, run)
    done = python("PI.py", *flags(server, module_images, run, "--dtype", "bfloat16", "--votes", 3))
    assert done.returncode == 0 and read_json(run / "PI_big_heldout_images.json"), done.stderr
    (tmp_path / "broken.json").write_text('[{"image": "00.png"}]')
    held_out = {r["image_path"] for r in read_json(run / "PI_big_heldout_images.json")}
    other = next(path for path in module_images.iterdir() if str(path) not in held_out)
    (tmp_path / "none.json").write_text(json.dumps([{"image": str(other), "question": "red?"}]))
    more = [
        tmp_path / m if m in ("broken.json", "none.json") else run / m if str(m).startswith("PA_") else m for m in more
    ]
    before, asked = snapshot(run), server.number
    refused = python("PI.py", *flags(server, module_images, run, "--dtype", "bfloat16"), *map(str, more))
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr
    assert snapshot(run) == before
    assert server.number == asked


def test_pi_of_given_answers_that_is_refused_holds_nothing_out(easy_run, tmp_path):
    for name in ("PI_teacher_teacher_easyVQA", "PI_teacher_student_easyVQA"):
        shutil.copy(easy_run / f"{name}.json", tmp_path)
    command = ["PI.py", "--dataset", "easyVQA", "--run", f"{tmp_path}/", "--model-path-lvlm", "teacher"]
    command += ["--model-path-svlm", "student", "--lvlm-json", tmp_path / "PI_teacher_teacher_easyVQA.json"]
    command += ["--svlm-json", tmp_path / "PI_teacher_student_easyVQA.json"]
    assert python(*command).returncode == 0
    before = snapshot(tmp_path)
    refused = python(*command, "--hold-out", "0.2")
    assert refused.returncode == 1 and "hold_out was 0.0, is now 0.2" in refused.stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        (["PA.py", "--limit", 3, "--seed", 1], "seed was 0, is now 1"),
        (["evaluate.py", "--limit", 3, "--model-path", STUDENT, TEACHER], "limit was 2, is now 3"),
        (["evaluate.py", "--limit", 2, "--model-path", TEACHER, STUDENT, "--log-samples"], "not a results.json"),
    ],
)
def test_a_refused_call_of_other_stages_leaves_the_run_as_it_is(easy_run, tmp_path, stage, says):
    """Of several models also the last one is checked before the first is asked."""
    name, *more = stage
    made = {
        "PA.py": ["--limit", 3, "--model-path-lvlm", TEACHER],
        "evaluate.py": ["--limit", 2, "--model-path", TEACHER],
    }
    common = [*EASY, "--run", f"{tmp_path}/"]
    assert python(name, *common, *made[name]).returncode == 0
    (tmp_path / "lmms-eval/student").mkdir(parents=True)
    (tmp_path / "lmms-eval/student/results.json").write_text("[]")
    before = snapshot(tmp_path)
    refused = python(name, *common, *(["--model-path-lvlm", TEACHER] if name == "PA.py" else []), *more)
    assert refused.returncode == 1 and says in refused.stderr, refused.stderr
    assert snapshot(tmp_path) == before


def test_a_refused_call_makes_no_run_folder(tmp_path):
    refused = python(
        "PI.py", *EASY, "--run", f"{tmp_path}/typo/", "--model-path-lvlm", TEACHER, "--model-path-svlm", STUDENT
    )
    assert refused.returncode == 1 and "no such file. Run PA.sh first" in refused.stderr
    assert not (tmp_path / "typo").exists()


def test_a_model_that_does_not_load_costs_no_old_result_and_leaves_no_journal(images, tmp_path):
    common = ["PA.py", "--dataset", "images", "--image-root", images, "--limit", 2, "--run", f"{tmp_path}/run/", *MINI]
    assert python(*common, "--model-path-lvlm", TEACHER).returncode == 0
    broken = tmp_path / "teacher"
    shutil.copytree(TEACHER, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = snapshot(tmp_path / "run")
    for more in (["--restart"], ["--out", tmp_path / "run/other.json"]):
        refused = python(*common, "--model-path-lvlm", broken, *more)
        assert refused.returncode == 1, refused.stderr
        assert snapshot(tmp_path / "run") == before


def test_a_summary_of_several_runs_writes_none_if_one_is_broken(tmp_path, easy_run):
    shutil.copytree(easy_run, tmp_path / "a")
    (tmp_path / "b").mkdir()
    before = snapshot(tmp_path)
    models = ["--dataset", "easyVQA", "--lvlm", TEACHER, "--svlm", STUDENT]
    refused = python("tables.py", *models, tmp_path / "a", tmp_path / "b")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr, refused.stderr
    assert snapshot(tmp_path) == before
