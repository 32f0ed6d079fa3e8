"""The stages as a user runs them, on the embedded pair: killed, called again, given bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import PA
import PI
import pytest
from accelerate import PartialState
from conftest import MINI, ROOT, STUDENT, TEACHER, killed, python
from easy_run import OUTPUTS, STAGES, read
from training import free_port

from mpa import distributed, holdout
from mpa.datasets.paths import locate
from mpa.datasets.protocol import Sample
from mpa.journal import Journal
from mpa.prompts import TASK_PROMPTS
from mpa.stage import Model, Stage, counted


def interrupted(stage: str, easy_run, folder):
    """The stage killed at three places and then left alone; what its files hold."""
    for before in OUTPUTS["PA"]:
        if stage == "PI":
            shutil.copy(easy_run / f"{before}.json", folder)
    for replies in (1, 17, 33):
        killed(*STAGES[stage], "--run", f"{folder}/", replies=replies)
        assert list(folder.glob("*.journal.jsonl"))
    done = python(*STAGES[stage], "--run", f"{folder}/")
    assert done.returncode == 0, done.stderr
    return {name: (folder / f"{name}.json").read_bytes() for name in OUTPUTS[stage]}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_three_places_and_called_again_the_bytes_are_the_same(easy_run, tmp_path, stage):
    for name, content in interrupted(stage, easy_run, tmp_path).items():
        assert content == (easy_run / f"{name}.json").read_bytes(), name
    assert not list(tmp_path.glob("*.journal.jsonl"))
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_ends_at_once_with_a_word_on_how_to_go_on(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts/PA.py"),
        *STAGES["PA"][1:],
        "--limit",
        "4000",
        "--run",
        f"{tmp_path}/",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # what runs the tests may ignore it
    )
    while process.poll() is None and sum(p.read_bytes().count(b"\n") for p in tmp_path.glob("*.jsonl")) < 9:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "stopped. Run the same command again to go on."
    assert "Traceback" not in said


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
    assert "40 of its 40 answers were made along with the annotations" in done.stdout
    for name in OUTPUTS["PI"][2:]:
        assert (tmp_path / "fused" / f"{name}.json").read_bytes() == (tmp_path / "apart" / f"{name}.json").read_bytes()
    fused, apart = (read(tmp_path / where / "PI_teacher_teacher_easyVQA.json") for where in ("fused", "apart"))
    assert [r["predictions"] for r in fused] == [r["predictions"] for r in apart]
    # With other settings than PA's, the answers are not taken over; where a question was edited, the others are.
    arguments = PI.arguments([*pi[1:], "--run", f"{tmp_path}/fused/"])
    pa_json = tmp_path / "fused/PA_teacher_easyVQA.json"
    annotations = [r for r in read(pa_json) if r["predicted_answer"]]
    n = len(annotations)
    assert len(PI.answers_of_pa(arguments, pa_json, annotations)[0]) == n
    arguments.max_new_tokens = 7
    assert PI.answers_of_pa(arguments, pa_json, annotations) == ({}, {"PA asked with another max_new_tokens": n})
    arguments.max_new_tokens = 128
    annotations[3]["predicted_question"] = "is it red?"
    ready, why = PI.answers_of_pa(arguments, pa_json, annotations)
    assert len(ready) == n - 1 and why == {"their question was edited": 1}


def test_a_model_trained_anew_in_the_same_folder_is_another_model(easy_run, tmp_path):
    model = tmp_path / "student"
    shutil.copytree(STUDENT, model)
    command = [str(model) if argument == str(STUDENT) else argument for argument in STAGES["evaluate"]]
    assert python(*command, "--run", f"{tmp_path}/").returncode == 0
    (model / "train_log.json").write_text("{}")  # says nothing about the model
    assert "is there already" in python(*command, "--run", f"{tmp_path}/").stdout
    shutil.copy(TEACHER / "model.safetensors", model)
    other = python(*command, "--run", f"{tmp_path}/")
    assert other.returncode == 1
    assert "model was 'student@" in other.stderr


def test_a_restart_that_is_killed_does_not_bring_the_old_result_back(easy_run, tmp_path):
    shutil.copytree(easy_run, tmp_path, dirs_exist_ok=True)
    command = [*STAGES["evaluate"], "--preset", "released", "--restart"]
    killed(*command, "--run", f"{tmp_path}/", replies=10)
    assert not (tmp_path / "Eval_student_easyVQA.json").exists()
    assert not (tmp_path / "Eval_student_easyVQA.meta.json").exists()
    assert python(*command[:-1], "--run", f"{tmp_path}/").returncode == 0
    assert read(tmp_path / "Eval_student_easyVQA.meta.json")["settings"]["preset"] == "released"


def test_answers_that_were_edited_are_not_taken_for_those_that_were_asked_about(easy_run, tmp_path):
    shutil.copytree(easy_run, tmp_path, dirs_exist_ok=True)
    annotations = read(tmp_path / "PA_teacher_easyVQA.json")
    next(r for r in annotations if r["predicted_answer"])["predicted_answer"] = "nothing"
    (tmp_path / "PA_teacher_easyVQA.json").write_text(json.dumps(annotations))
    done = python(*STAGES["PI"], "--run", f"{tmp_path}/")
    assert done.returncode == 1
    assert "content was" in done.stderr


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
    assert "on 1 of 1 samples (--match exact), all held out (--hold-out 0.15): nothing is left" in done.stderr


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
    prompt.write_text(f"\ufeff{TASK_PROMPTS['general']}\n")  # the teacher understands no other
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
    assert "should ask for the two lines" in refused.stderr


def test_a_second_call_says_that_all_is_done_and_other_settings_are_refused(easy_run):
    before = (easy_run / "PA_teacher_easyVQA.json").stat()
    again = python(*STAGES["PA"], "--run", f"{easy_run}/")
    assert again.returncode == 0
    assert "is there already" in again.stdout
    assert (easy_run / "PA_teacher_easyVQA.json").stat().st_mtime_ns == before.st_mtime_ns
    other = python(*STAGES["PA"], "--run", f"{easy_run}/", "--seed", "5")
    assert other.returncode == 1
    assert "seed was 0, is now 5" in other.stderr
    assert "Traceback" not in other.stderr


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dataset", "nonsense"], "textVQA"),
        (["--dataset", "easyVQA", "--preset", "nonsense"], "released"),
        ([], "--dataset is required: one of textVQA"),
        (["--dataset", "easyVQA", "--limit", "0"], "must be at least 1"),
        (["--dataset", "easyVQA", "--workers", "-1"], "must be at least 0"),
        (["--dataset", "easyVQA", "--top-p", "0"], "must be more than 0 and at most 1"),
        (["--dataset", "easyVQA", "--min-pixels", "9", "--max-pixels", "4"], "is more than --max-pixels"),
        (["--dataset", "easyVQA", "--out", "/tmp"], "is a folder"),
        (["--dataset", "easyVQA", "--path-map", "x"], "expected OLD=NEW"),
        (["--dataset", "easyVQA", "--device", "cuda:99", "--model-path-lvlm", TEACHER], "no such device here"),
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


def test_an_unknown_matcher_lists_the_known_ones():
    done = python("PI.py", "--dataset", "easyVQA", "--match", "nonsense")
    assert done.returncode != 0
    assert "anls" in done.stderr
    missing = python("PI.py", "--dataset", "textVQA", "--run", "/tmp/none/")
    assert "Run PA.sh first, or name the file with --pa-json" in missing.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_in_a_message_and_nothing_finished_is_lost(easy_run, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        full = python(*STAGES["PA"], "--run", f"{small}/")
        assert full.returncode == 1
        assert "no space left" in full.stderr
        assert "Traceback" not in full.stderr
        kept = (small / "PA_teacher_easyVQA.journal.jsonl").read_text().splitlines()
        assert len(kept) > 1
        assert [json.loads(line) for line in kept]
        subprocess.run(["mount", "-o", "remount,size=1m", small], check=True)
        assert python(*STAGES["PA"], "--run", f"{small}/").returncode == 0
        assert (small / "PA_teacher_easyVQA.json").read_bytes() == (easy_run / "PA_teacher_easyVQA.json").read_bytes()
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


class Scripted:
    """An engine whose replies are written here: a real teacher is too good to show every failure."""

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
    stage = Stage(Model(args, str(TEACHER)), tmp_path / "PA.json", "PA", [])
    stage.journal = Journal(stage.out, {})
    result = PA.annotate(samples, 2, engine, stage, frozenset(), {})
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


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_says_how_much_there_is_to_do_and_writes_nothing(easy_run, tmp_path, stage):
    for name in OUTPUTS["PA"] if stage == "PI" else ():
        shutil.copy(easy_run / f"{name}.json", tmp_path)
    before = sorted(tmp_path.iterdir())
    done = python(*STAGES[stage], "--dry-run", "--run", f"{tmp_path}/")
    assert done.returncode == 0, done.stderr
    n = len(read(easy_run / f"{OUTPUTS[stage][0]}.json"))
    assert f"{n} requests about" in done.stdout
    assert f"visual tokens of Qwen2-VL, some: {n * 4}" in done.stdout
    assert "time, by the pace of" in done.stdout
    assert sorted(tmp_path.iterdir()) == before


def launch(folder, *command) -> subprocess.CompletedProcess:
    """`accelerate launch` with two processes, in a process group of their own."""
    flags = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), *command, "--run", f"{folder}/"]
    return subprocess.run(command, capture_output=True, text=True, start_new_session=True)


@pytest.mark.slow
def test_two_processes_share_a_stage_and_write_what_one_would(easy_run, tmp_path):
    """Killed on the way, and then anew."""
    name, *arguments = STAGES["PA"]
    stopped = launch(tmp_path, ROOT / "tests/killed_stage.py", "4", name, *arguments)
    assert stopped.returncode != 0 and list(tmp_path.glob("*.journal*.jsonl")), stopped.stderr
    whole = launch(tmp_path, ROOT / "scripts" / name, *arguments)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("images annotated") == 1
    (output,) = OUTPUTS["PA"]
    assert (tmp_path / f"{output}.json").read_bytes() == (easy_run / f"{output}.json").read_bytes()
    assert not list(tmp_path.glob("*.journal*.jsonl"))
    name, *arguments = STAGES["PI"]
    parity = launch(tmp_path, ROOT / "scripts" / name, *arguments)  # the L-VLM's answers are there, the S-VLM's are shared
    assert parity.returncode == 0, parity.stderr
    for output in OUTPUTS["PI"]:
        assert (tmp_path / f"{output}.json").read_bytes() == (easy_run / f"{output}.json").read_bytes()


def share(stage: str, folder, rank: int) -> int:
    """A fork of this process as one of two that share a stage -> its id. It ends with the stage's exit code."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        PartialState._reset_state()
        distributed.RANK, distributed.WORLD, distributed.FIRST = rank, 2, rank == 0
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        done = python(*STAGES[stage], "--run", f"{folder}/")
        (folder / f"said.{rank}").write_text(done.stdout + done.stderr)
        code = done.returncode
    finally:
        os._exit(code)


def test_two_forked_processes_share_the_stages_and_write_what_one_would(easy_run, tmp_path, monkeypatch):
    places = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for stage in STAGES:
        for name, value in {**places, "MASTER_PORT": free_port()}.items():
            monkeypatch.setenv(name, value)
        processes = [share(stage, tmp_path, rank) for rank in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        assert codes == [0, 0], [path.read_text() for path in tmp_path.glob("said.*")]
        for name in OUTPUTS[stage]:
            assert (tmp_path / f"{name}.json").read_bytes() == (easy_run / f"{name}.json").read_bytes()
        assert not list(tmp_path.glob("*.journal*.jsonl"))


def test_a_run_that_several_began_one_finishes_alone(easy_run, tmp_path):
    settings = read(easy_run / "Eval_student_easyVQA.meta.json")["settings"]
    answers = {str(r["question_id"]): r for r in read(easy_run / "Eval_student_easyVQA.json")}
    for rank, keys in (("", list(answers)[:3]), ("-1", list(answers)[3:5]), ("-7", list(answers)[5:6])):
        replies = [
            {"key": k, "text": answers[k]["predictions"], "logprob": answers[k]["logprob"], "tokens": 2} for k in keys
        ]
        lines = [json.dumps(line) + "\n" for line in ({"settings": settings}, *replies)]
        (tmp_path / f"Eval_student_easyVQA.journal{rank}.jsonl").write_text("".join(lines) + '{"torn')
    done = python(*STAGES["evaluate"], "--run", f"{tmp_path}/")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "Eval_student_easyVQA.json").read_bytes() == (easy_run / "Eval_student_easyVQA.json").read_bytes()
    assert not list(tmp_path.glob("*.journal*.jsonl"))
