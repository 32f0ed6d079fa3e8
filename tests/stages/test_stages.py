"""What PA, PI and evaluate write, on the embedded pair: records, parity set, images and replies left out."""

import json
import os
import shutil

import PA
import PI
import pytest
from conftest import MINI, ROOT, STUDENT, TEACHER, python
from easy_run import OUTPUTS, STAGES, read

from mpa.data.paths import locate
from mpa.data.protocol import Sample
from mpa.files.journal import Journal
from mpa.method import holdout
from mpa.method.prompts import TASK_PROMPTS
from mpa.models import loading
from mpa.stages import annotate, stage
from mpa.stages.annotations import answers_of_pa
from mpa.stages.stage import AskedModel, Stage, counted


def test_the_records_are_those_of_the_released_code_and_tell_what_made_them(easy_run):
    annotations = read(easy_run / "PA_teacher_easyVQA.json")
    assert len(annotations) == 40
    assert list(annotations[0])[:6] == [
        *("question_id", "image_path", "ground_truth_question", "ground_truth_answer"),
        *("predicted_question", "predicted_answer"),
    ]
    assert all(r["follow_up"]["text"] for r in annotations)
    assert list(read(easy_run / "PI_teacher_student_easyVQA.json")[0])[:5] == [
        *("question_id", "image_path", "PA_question", "PA_answer", "predictions")
    ]
    evaluated = read(easy_run / "Eval_student_easyVQA.json")
    assert list(evaluated[0])[:5] == ["question_id", "image_path", "GT_question", "GT_answer", "predictions"]
    meta = read(easy_run / "Eval_student_easyVQA.meta.json")
    assert meta["model_path"] == str(STUDENT)
    assert (meta["device"], meta["dtype"]) == ("cpu", "float32")
    assert meta["settings"]["model"].startswith("student@")
    assert meta["made_by"]["packages"]["transformers"]
    right = sum(r["predictions"] == r["GT_answer"] for r in evaluated)
    assert meta["scores"]["exact"]["score"] == pytest.approx(right / 48)


def test_the_parity_set_is_what_the_teacher_repeats_and_the_student_does_not(easy_run):
    teacher = {r["question_id"]: r for r in read(easy_run / "PI_teacher_teacher_easyVQA.json")}
    student = {r["question_id"]: r for r in read(easy_run / "PI_teacher_student_easyVQA.json")}
    parity = read(easy_run / "PI_teacher_train_teacher_student_easyVQA.json")
    expected = {
        i
        for i, r in teacher.items()
        if r["predictions"].lower() == r["PA_answer"].lower() != student[i]["predictions"].lower()
    }
    assert {sample["id"] for sample in parity} == expected
    assert 0 < len(parity) < len(teacher)
    for sample in parity:
        assert sample["conversations"][1]["value"] == teacher[sample["id"]]["PA_answer"]
        assert sample["conversations"][0]["value"].startswith("<image>\n" + teacher[sample["id"]]["PA_question"])


def test_the_student_is_asked_only_where_the_teacher_agrees_with_itself(easy_run, tmp_path):
    shutil.copy(easy_run / "PA_teacher_easyVQA.json", tmp_path)
    command = [argument for argument in STAGES["PI"] if argument != "--answer-all"]
    assert python(*command, "--run", f"{tmp_path}/").returncode == 0
    teacher = read(tmp_path / "PI_teacher_teacher_easyVQA.json")
    agreed = [r["question_id"] for r in teacher if r["predictions"].lower() == r["PA_answer"].lower()]
    assert [r["question_id"] for r in read(tmp_path / "PI_teacher_student_easyVQA.json")] == agreed
    train = "PI_teacher_train_teacher_student_easyVQA.json"
    assert (tmp_path / train).read_bytes() == (easy_run / train).read_bytes()


def test_after_pa_the_teachers_answers_are_ready_and_are_those_it_gives_when_asked_anew(easy_run, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(TEACHER, teacher)
    at = [str(teacher) if argument == str(TEACHER) else argument for argument in STAGES["PA"]]
    assert python(*at, "--run", f"{tmp_path}/fused/").returncode == 0
    assert python(*at, "--run", f"{tmp_path}/apart/", "--no-fused").returncode == 0
    pi = [str(teacher) if argument == str(TEACHER) else argument for argument in STAGES["PI"]]
    assert python(*pi, "--run", f"{tmp_path}/apart/").returncode == 0
    done = python(*pi, "--run", f"{tmp_path}/fused/")
    assert done.returncode == 0, done.stderr
    assert "PA already produced 40 of the 40 answers" in done.stdout
    for name in OUTPUTS["PI"][2:]:
        assert (tmp_path / "fused" / f"{name}.json").read_bytes() == (tmp_path / "apart" / f"{name}.json").read_bytes()
    fused, apart = (read(tmp_path / where / "PI_teacher_teacher_easyVQA.json") for where in ("fused", "apart"))
    assert [r["predictions"] for r in fused] == [r["predictions"] for r in apart]
    # With other settings than PA's, no answer is reused. With one edited question, all other answers are reused.
    arguments = PI.arguments([*pi[1:], "--run", f"{tmp_path}/fused/"])
    pa_json = tmp_path / "fused/PA_teacher_easyVQA.json"
    annotations = [r for r in read(pa_json) if r["predicted_answer"]]
    n = len(annotations)
    assert len(answers_of_pa(arguments, pa_json, annotations)[0]) == n
    arguments.max_new_tokens = 7
    assert answers_of_pa(arguments, pa_json, annotations) == ({}, {"PA asked with another max_new_tokens": n})
    arguments.max_new_tokens = 128
    annotations[3]["predicted_question"] = "is it red?"
    ready, why = answers_of_pa(arguments, pa_json, annotations)
    assert len(ready) == n - 1 and why == {"the question was edited": 1}


def test_the_released_codes_own_command_needs_no_data_set_and_overwrites_nothing(tmp_path):
    official = ROOT / "tests/data/official"
    files = [official / f"PI_Qwen2vl7b_Qwen2-VL-{size}-Instruct_textVQA.json" for size in ("7B", "2B")]
    command = ["PI.py", "--lvlm-json", files[0], "--svlm-json", files[1], "--run", f"{tmp_path}/"]
    done = python(*command, "--preset", "released", "--path-map", "/workspace/data=/mnt/data")
    assert done.returncode == 0, done.stderr
    train = "PI_Qwen2-VL-7B-Instruct_train_Qwen2-VL-7B-Instruct_Qwen2-VL-2B-Instruct_textVQA.json"
    (sample,) = read(tmp_path / train)
    assert sample["image"].startswith("/mnt/data/")
    other = python(*command, "--preset", "paper")
    assert other.returncode == 1
    assert "preset was 'released', is now 'paper'" in other.stderr


def test_images_that_have_moved_are_found_below_the_image_root(easy_run, tmp_path, images):
    (moved,) = locate([f"/old/place/{next(images.glob('more/*.png')).relative_to(images)}"], {}, str(images))
    assert os.path.exists(moved)
    assert locate(["/old/place/none.png"], {"/old": "/new"}, str(images)) == ["/new/place/none.png"]


def test_a_hold_out_takes_at_least_one_image_and_says_when_nothing_is_left(images, tmp_path):
    of = {f"{i}.png": f"{i:032x}" for i in range(100)}

    def held_out(share: float, n: int = 100) -> int:
        threshold = holdout.decide(tmp_path / "none.json", dict(list(of.items())[:n]), share)
        return sum(holdout.is_held_out(content, threshold) for content in list(of.values())[:n])

    assert (held_out(0.15), held_out(0.15, n=2), held_out(0.0)) == (15, 1, 0)
    asked = {"predicted_question": "what color is the shape?", "predicted_answer": "red"}
    annotation = {"question_id": 1, "image_path": str(images / "more/00.png"), **asked}
    annotations = [annotation | {"ground_truth_question": None, "ground_truth_answer": None}]
    (tmp_path / "PA_teacher_images.json").write_text(json.dumps(annotations))
    command = [argument.replace("easyVQA", "images") for argument in STAGES["PI"][:-1]]
    done = python(*command, "--run", f"{tmp_path}/")
    assert done.returncode == 1
    assert "on 1 of 1 samples (--match exact); all are held out (--hold-out 0.15), so none is left" in done.stderr


def test_file_names_that_are_no_unicode_go_through(images, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for i, path in enumerate(sorted(images.glob("*.png"))[:4]):
        shutil.copy(path, os.fsencode(folder) + f"/{i}".encode() + b"\xe9.png")
    command = ["--dataset", "images", "--image-root", folder, *MINI, "--run", f"{tmp_path}/run"]
    for _ in range(2):
        done = python("PA.py", *command, "--model-path-lvlm", TEACHER)
        assert done.returncode == 0, done.stderr
    assert len(read(tmp_path / "run/PA_teacher_images.json")) == 4


def test_a_task_prompt_of_ones_own_is_what_the_model_sees(images, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(f"\ufeff{TASK_PROMPTS['general']}\n")  # the only prompt that the teacher understands
    command = ["PA.py", "--dataset", "images", "--image-root", images, *MINI, "--run", f"{tmp_path}/run"]
    done = python(*command, "--model-path-lvlm", TEACHER, "--prompt-file", prompt, "--limit", "2")
    assert done.returncode == 0, done.stderr
    meta = read(tmp_path / "run/PA_teacher_images.meta.json")
    assert meta["prompt"] == TASK_PROMPTS["general"]
    prompt.write_text("Say nothing.\nQuestion: Answer:")
    other = python(*command, "--model-path-lvlm", TEACHER, "--prompt-file", prompt, "--limit", "2")
    assert "content was" in other.stderr
    prompt.write_text("Describe this.")
    refused = python(*command, "--model-path-lvlm", TEACHER, "--prompt-file", prompt)
    assert "must ask for the two lines" in refused.stderr


def test_bad_images_among_good_ones_are_counted_and_explained(images, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(images, folder)
    (folder / "empty.jpg").touch()
    (folder / "note.png").write_text("not an image")
    whole = (folder / "01.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    command = ["--dataset", "images", "--image-root", folder, *MINI, "--run", f"{tmp_path}/run"]
    done = python("PA.py", *command, "--model-path-lvlm", TEACHER)
    assert done.returncode == 0, done.stderr
    assert "3 left out" in done.stdout
    annotations = {r["question_id"]: r for r in read(tmp_path / "run/PA_teacher_images.json")}
    assert len(annotations) == 15
    for name in ("empty.jpg", "note.png", "cut.png"):
        assert annotations[name]["left_out"].startswith("image: ")
        assert annotations[name]["predicted_question"] is None
    assert sum(r["left_out"] is None for r in annotations.values()) >= 11
    assert all(r["ground_truth_answer"] is None for r in annotations.values())


class Scripted:
    """An engine with scripted replies, since the real teacher does not produce every failure."""

    def __init__(self, replies: dict[str, str]):
        self.replies, self.asked = replies, []

    def status(self) -> str:
        return ""

    def generate(self, requests, done):
        self.asked += [request for request in requests if request.key not in done]
        yield [
            {"key": r.key, "text": self.replies[r.key], "logprob": -1.0, "tokens": 9}
            if r.key in self.replies
            else {"key": r.key, "error": "image: no such file"}
            for r in requests
        ]


def test_an_unreadable_reply_is_asked_for_again_by_sampling_and_then_left_out(tmp_path):
    args = PA.arguments(["--dataset", "easyVQA"])
    samples = [Sample(i, f"{i}.png") for i in range(4)]
    good = "Question: what is it?\nAnswer: a cat"
    engine = Scripted(
        {"0#0": good, "1#0": "no idea", "1#1": good, "2#0": "?", "2#1": "Answer: 3", "2#2": "Question: a? b?"}
    )
    stage = Stage(AskedModel(args, str(TEACHER)), tmp_path / "PA.json", "PA", [])
    stage.journal = Journal(stage.out, {})
    result = annotate.annotate_all(samples, 2, engine, stage, frozenset(), {})
    assert [(r["predicted_answer"], r["left_out"], r["tries"]) for r in result] == [
        ("a cat", None, 1),
        ("a cat", None, 2),
        (None, "two questions", 3),
        (None, "image: no such file", 1),
    ]
    assert [(r.key, r.temperature) for r in engine.asked] == [
        *((f"{i}#0", 0.0) for i in range(4)),
        *(("1#1", 1.0), ("2#1", 1.0), ("2#2", 1.0)),
    ]
    assert counted(r["left_out"] for r in result if r["left_out"]) == (
        "2 left out: 1 two questions, 1 image: no such file"
    )


def test_the_lvlms_half_of_PI_alone_is_that_of_the_whole(easy_run, tmp_path):
    for name in ("PA_teacher_easyVQA.json", "PA_teacher_easyVQA.meta.json"):
        shutil.copy(easy_run / name, tmp_path)
    done = python(*STAGES["PI"], "--only-lvlm", "--run", f"{tmp_path}/")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("PI_*.json") if "meta" not in path.name] == [
        "PI_teacher_teacher_easyVQA.json"
    ]
    done = python(*STAGES["PI"], "--run", f"{tmp_path}/")
    assert done.returncode == 0 and "already exists, made with these settings" in done.stdout, done.stderr
    for name in OUTPUTS["PI"]:
        assert (tmp_path / f"{name}.json").read_bytes() == (easy_run / f"{name}.json").read_bytes()
    refused = python(*STAGES["PI"], "--only-lvlm", "--dry-run", "--run", f"{tmp_path}/")
    assert refused.returncode == 2 and "--only-lvlm asks the L-VLM" in refused.stderr


def test_a_mark_of_the_svlms_format_is_not_asked_of_it_and_leaves_the_lvlms_half_as_it_is(
    easy_run, tmp_path, monkeypatch
):
    """So the L-VLM's answers are the same for all S-VLMs."""
    for path in (*easy_run.glob("PA_*"), *easy_run.glob("PI_teacher_teacher_*")):
        shutil.copy(path, tmp_path)
    lvlm = json.loads((tmp_path / "PI_teacher_teacher_easyVQA.json").read_text())
    word = lvlm[0]["PA_answer"]
    marks = loading.format_marks
    monkeypatch.setattr(
        stage, "format_marks", lambda path, trust: marks(path, trust) | ({word} if "student" in str(path) else set())
    )
    done = python(*STAGES["PI"], "--run", f"{tmp_path}/")
    assert done.returncode == 0, done.stderr
    assert "a mark of the S-VLM’s prompt format" in done.stderr
    assert json.loads((tmp_path / "PI_teacher_teacher_easyVQA.json").read_text()) == lvlm
    asked = {r["question_id"] for r in json.loads((tmp_path / "PI_teacher_student_easyVQA.json").read_text())}
    assert asked == {r["question_id"] for r in lvlm if word not in f"{r['PA_question']}\n{r['PA_answer']}"}
