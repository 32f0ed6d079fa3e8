"""scripts/reproduce.sh: the real engine on a copy of the repository, with a shell script in place of the four stages."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import pytest
import reproduce as runner
from conftest import ROOT, STUDENT
from fake_gpus import OLD, nvidia_smi, uuid

from experiments import definition
from experiments.variants import STAGES
from mpa.files.records import InputError

pytest.importorskip("snakemake")
EXPERIMENT = """
datasets: [easyVQA, okVQA]
lvlms: [models/big, models/bigger]
svlms: [models/small, models/tiny]
seeds: [0, 1]
variants:
  mpa:
  all_pseudo:
  loose: {train: random_pseudo, match: anls, EPOCHS: 3, LEARNING_RATE: 1e-4}
"""
BASELINES = """
import os, sys
from pathlib import Path
train = Path(sys.argv[sys.argv.index("--train-json") + 1])
for name in ("all_pseudo", "random_pseudo", "human_n", "human", "rejected"):
    out = train.with_name(f"{train.stem}_{name}.json")
    out.with_suffix(".part").write_text(f"{name} of {train.read_text()}")
    os.replace(out.with_suffix(".part"), out)
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    """A copy of the repository in which all stages are fakes, and four model folders."""
    copy = tmp_path / "repository"
    for folder in ("experiments", "mpa", "scripts", "PL/Qwen2-VL-Finetune/scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for stage in STAGES.values():
        shutil.copy(ROOT / "tests/data/fake_stage.sh", copy / stage.relative_to(ROOT))
    (copy / "scripts/baselines.py").write_text(BASELINES)
    (copy / "scripts/setup.sh").write_text("exit 0\n")
    for model in ("big", "bigger", "small", "tiny"):
        (copy / "models" / model).mkdir(parents=True)
    (copy / "experiments/fake.yaml").write_text(EXPERIMENT)
    return copy


def start(repository: Path, *args, cwd=None, **environment) -> subprocess.Popen:
    """Start reproduce.sh as the leader of a process group."""
    places = {"VENV": sys.prefix, "CALLS": repository / "calls.txt", "JOBS": "4", **environment}
    return subprocess.Popen(
        ["bash", str(repository / "scripts/reproduce.sh"), str(repository / "experiments/fake.yaml"), *args],
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in places.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def reproduce(repository: Path, *args, **environment) -> tuple[int, str]:
    process = start(repository, *args, **environment)
    said, _ = process.communicate()
    return process.returncode, said


def calls(repository: Path) -> Counter:
    return Counter((repository / "calls.txt").read_text().splitlines())


def results(repository: Path) -> dict[str, str]:
    folder = repository / "results/fake"
    found = [path for run in sorted(folder.glob("*-*")) for path in run.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def test_each_file_is_made_once_and_what_cells_share_is_shared(repository):
    code, said = reproduce(repository)
    assert code == 0, said
    made = calls(repository)
    assert set(made.values()) == {1}
    by_stage = Counter(name.split()[0] for name in made)
    cells = 2 * 2 * 2 * 2 * 3  # datasets, L-VLMs, S-VLMs, seeds, variants
    assert by_stage["PA"] == 2 * 2 * 2
    assert by_stage["PI"] == 8 + 2 * 16 + 16  # L-VLM's answers; S-VLM's answers and parity set; the other matcher's
    assert by_stage["PL"] == cells
    assert by_stage["evaluate"] == cells + 4 * 2  # each model itself once, for both seeds
    files = results(repository)
    assert len([name for name in files if "/Eval_" in name and "meta" not in name]) == cells + 2 * 4 * 2
    assert files["paper-1/PL_big_tiny_okVQA_loose/train_meta.json"] == "random_pseudo of anls 1 3 1e-4\n"
    assert files["paper-0/PL_big_tiny_okVQA/train_meta.json"] == "big tiny 0 1 1e-5\n"
    assert reproduce(repository)[0] == 0 and calls(repository) == made


MORE = """
data: {folder: somewhere, made_by: make_data.py}
datasets: [textVQA, chartVQA]
lvlms: [models/big]
svlms: [models/small]
seeds: [0, 1]
transfer: true
variants:
  mpa:
  once: {train: mpa, seeds: [1], EPOCHS: 2}
  mixed: {train: mpa, replay: 0.2}
  wrong: {train: mpa, corrupt: {type: yes/no, share: 0.3}}
  anchored: {train: mpa, anchors: 0.5}
"""
CORRUPT = """
import sys
from pathlib import Path
Path(sys.argv[sys.argv.index("--out") + 1]).write_text(" ".join(sys.argv[sys.argv.index("--type") :]))
"""


@pytest.mark.slow
def test_transfer_replay_corruption_some_seeds_and_made_data(repository):
    (repository / "experiments/fake.yaml").write_text(MORE)
    (repository / "scripts/corrupt.py").write_text(CORRUPT)
    (repository / "make_data.py").write_text("import sys; print('made', sys.argv[1:])")
    code, said = reproduce(repository)
    assert code == 0, said
    assert f"made ['--data', '{repository / 'somewhere'}']" in said
    files = results(repository)
    trained = {name.split("/PL_big_small_")[1].split("/")[0] for name in files if "/PL_" in name and name[6] == "0"}
    assert trained == {f"{d}{v}" for d in ("textVQA", "chartVQA") for v in ("", "_mixed", "_wrong", "_anchored")}
    assert files["paper-1/PL_big_small_textVQA_once/train_meta.json"] == "big small 1 2 1e-5\n"
    assert "--type yes/no" in files["paper-0/PL_big_small_textVQA_wrong/train_meta.json"]
    assert files["paper-0/PL_big_small_textVQA_anchored/train_meta.json"] == "exact 0.5 anchors 0 1 1e-5\n"
    tested = [name for name in files if "/Eval_PL_" in name and "meta" not in name]
    assert len(tested) == 2 * 2 * (4 + 5)  # on both datasets, those trained on each: 4 with seed 0 and 5 with seed 1
    assert "paper-0/Eval_PL_big_small_textVQA_mixed_chartVQA.json" in files
    *_, own, other, data = files["paper-0/PL_big_small_textVQA_mixed/train_meta.json"].split()
    run = repository / "results/fake/paper-0"
    assert own == f"{run}/PI_big_train_big_small_textVQA.json:0.8" and data == str(repository / "somewhere")
    assert other == f"{run}/PI_big_train_big_small_chartVQA.json:0.2"


@pytest.mark.slow
def test_models_that_a_script_makes_are_made_once(repository):
    (repository / "make_models.py").write_text(
        "import sys; from pathlib import Path\n"
        f"print('making', sys.argv[1:]); Path('{repository}/made/new').mkdir(parents='--well' in sys.argv)"
    )
    of_new = EXPERIMENT.replace("models/small, models/tiny", "made/new").replace("[0, 1]", "[0]")
    for flag, code in (("--badly", 1), ("--well", 0), ("--well", 0)):
        maker = f"models: {{folder: made, made_by: make_models.py {flag}}}\n"
        (repository / "experiments/fake.yaml").write_text(of_new + maker)
        done, said = reproduce(repository)
        assert done == code, said
    assert "making" not in said and (repository / "made/new").is_dir()
    assert calls(repository)["PA paper-0/PA_big_easyVQA.json"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("more", ["flags:\n  PI: --hold-out 0.15\n", "presets: [anchored]\n"])
def test_held_out_questions_are_asked_before_and_after_each_training(repository, more):
    held_out, run = EXPERIMENT.replace("[0, 1]", "[0]") + more, f"{'anchored' if 'anchored' in more else 'paper'}-0"
    (repository / "experiments/fake.yaml").write_text(held_out)
    code, said = reproduce(repository)
    assert code == 0, said
    found = {name for name in results(repository) if "/Heldout_" in name and "meta" not in name}
    pairs = [
        (lvlm, svlm, data) for lvlm in ("big", "bigger") for svlm in ("small", "tiny") for data in ("easyVQA", "okVQA")
    ]
    assert found == {
        f"{run}/Heldout_{lvlm}_{model}_{data}.json"
        for lvlm, svlm, data in pairs
        for model in (svlm, *(f"PL_{lvlm}_{svlm}_{data}{variant}" for variant in ("", "_all_pseudo", "_loose")))
    }


@pytest.mark.slow
def test_a_variant_with_another_matcher_is_added_to_a_finished_experiment(repository):
    """The S-VLM's stage is called again, with --answer-all; tests/stages/test_answer_all.py shows that it asks only the rest."""
    few = EXPERIMENT.replace("[0, 1]", "[0]").replace("  loose:", "#")
    (repository / "experiments/fake.yaml").write_text(few)
    assert reproduce(repository)[0] == 0
    made = calls(repository)
    for text in (few.replace("#", "  loose:"), few):  # added, and taken away again
        (repository / "experiments/fake.yaml").write_text(text)
        code, said = reproduce(repository)
        assert code == 0, said
        assert set(calls(repository).values()) == {1} and calls(repository) >= made
    added = {name.split()[0] for name in calls(repository) - made}
    assert added == {"PI", "PL", "evaluate"} and all("loose" in n or "anls" in n for n in calls(repository) - made)


def test_a_broken_model_costs_only_what_depends_on_it_and_is_listed(repository):
    code, said = reproduce(repository, BROKEN="bigger")
    assert code == 1
    made = calls(repository)
    assert [name for name in made if "bigger" in name] == []
    assert Counter(name.split()[0] for name in made) == {"PA": 4, "PI": 4 + 2 * 8 + 8, "PL": 24, "evaluate": 24 + 3 * 2}
    assert (
        "6 jobs failed" in said and "error: broken" in said
    )  # PA for two datasets and seeds, evaluate for two datasets
    command = next(line for line in said.splitlines() if line.startswith("    env ") and "PA.sh" in line)
    done = subprocess.run(command, shell=True, env={**os.environ, "CALLS": str(repository / "calls.txt")})
    assert done.returncode == 0 and calls(repository).total() == made.total() + 1
    assert reproduce(repository)[0] == 0
    assert set(calls(repository).values()) == {1}


@pytest.mark.slow
def test_killed_at_any_moment_it_makes_the_same_files_each_once(repository):
    assert reproduce(repository)[0] == 0
    whole, chance, left = results(repository), random.Random(0), 10
    while left:
        shutil.rmtree(repository / "results")
        (repository / "calls.txt").unlink()
        done = False
        while left and not done:
            process = start(repository, PAUSE="0.2")
            try:
                process.communicate(timeout=chance.uniform(1, 12))
                done = True
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                left -= 1
    code, said = reproduce(repository)
    assert code == 0, said
    assert results(repository) == whole
    assert set(calls(repository).values()) == {1}


@pytest.mark.parametrize("results", ["file", "file/below", "new\nline", "link"])
def test_where_no_results_can_be_made_nothing_of_the_callers_folder_is_touched(results, repository, tmp_path):
    home = tmp_path / "home"
    (home / "failed").mkdir(parents=True)
    (home / "failed/mine").write_text("kept")
    (home / "file").write_text("kept")
    (home / "link").symlink_to(home / "none/there")
    (home / "none").write_text("kept")
    before = sorted(home.rglob("*"))
    for place in (results, home / results):
        code, said = reproduce(repository, RESULTS=place, cwd=home)
        assert code == 1 and said.startswith("error: ") and said.count("\n") == 1, said
    assert sorted(home.rglob("*")) == before and not (repository / "calls.txt").exists()


@pytest.mark.slow
def test_only_the_commands_of_failed_jobs_are_removed_and_only_by_a_run(repository, tmp_path):
    (repository / "experiments/fake.yaml").write_text(EXPERIMENT.replace("[0, 1]", "[0]"))
    (tmp_path / "failed/paper-0").mkdir(parents=True)
    for mine in ("notes.txt", "paper-0/notes.json"):
        (tmp_path / "failed" / mine).write_text("kept")
    places = {"RESULTS": ".", "cwd": tmp_path}
    code, said = reproduce(repository, BROKEN="bigger", **places)
    assert code == 1 and "4 jobs failed" in said and "notes" not in said
    left = sorted(path for path in (tmp_path / "failed").rglob("*") if path.is_file())
    assert len(left) == 2 + 4
    assert reproduce(repository, "-np", **places)[0] == 0
    assert sorted(path for path in (tmp_path / "failed").rglob("*") if path.is_file()) == left
    assert reproduce(repository, **places)[0] == 0
    left = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "failed").rglob("*") if path.is_file())
    assert left == ["failed/notes.txt", "failed/paper-0/notes.json"]


@pytest.mark.slow
def test_a_target_is_taken_as_such_whatever_stands_before_it(repository, tmp_path):
    target = "paper-0/PA_big_easyVQA.json"
    for how in ({}, {"CUDA_VISIBLE_DEVICES": "0,1", "TMPDIR": tmp_path}):
        shutil.rmtree(repository / "results", ignore_errors=True)
        code, said = reproduce(repository, target, **how)
        assert code == 0, said
        assert [name for name in results(repository) if "meta" not in name] == [target]
    code, said = reproduce(repository, "--config", "experiment=other.yaml")
    assert code == 1 and "error: --config: reproduce.sh sets this flag itself" in said


@pytest.mark.slow
def test_results_in_a_folder_of_any_name_through_a_link_and_with_CDPATH(repository, tmp_path):
    (repository / "experiments/fake.yaml").write_text(EXPERIMENT.replace("[0, 1]", "[0]"))
    odd, link = tmp_path / "-a {b} 'c' $d", tmp_path / "elsewhere/reproduce"
    for folder in (odd, link.parent, tmp_path / "cdpath/scripts"):
        folder.mkdir(parents=True)
    link.symlink_to(repository / "scripts/reproduce.sh")
    environment = {"CALLS": repository / "calls.txt", "JOBS": "4", "RESULTS": odd.name, "VENV": sys.prefix}
    environment |= {"CDPATH": f"{tmp_path}/cdpath"}
    done = subprocess.run(
        ["bash", link, repository / "experiments/fake.yaml"],
        cwd=tmp_path,
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (odd / "paper-0/PL_big_tiny_okVQA_loose/train_meta.json").exists()
    assert not list((tmp_path / "cdpath/scripts").iterdir()) and len(list(link.parent.iterdir())) == 1


@pytest.mark.parametrize("setting", [{"JOBS": "two"}, {"GPUS": "1+1"}, {"REPORT": "no"}, {"JOBS": "0"}])
def test_a_setting_of_the_runner_that_is_none_is_refused_first(setting, repository):
    code, said = reproduce(repository, **setting)
    ((name, value),) = setting.items()
    assert code == 2 and said.startswith(f"error: {name} is {value}: give ") and said.count("\n") == 1
    assert not (repository / "results").exists()


def test_a_stage_that_writes_nothing_is_an_error(repository):
    (repository / "scripts/PA.sh").write_text("exit 0\n")
    code, said = reproduce(repository)
    assert code == 1 and "paper-0/PA_big_okVQA.json: FAILED (it wrote no such file)" in said


@pytest.mark.parametrize(
    ("folder", "code"),
    [
        (ROOT, "from mpa.files import signals; signals.end_with_launcher()"),
    ],
)
def test_a_rank_whose_launcher_was_killed_at_the_start_ends(folder, code):
    """Otherwise it would wait for the launcher's store, and a new runner would wait for it."""
    for launcher, expected in ((os.getpid(), 0), (os.getppid(), 143)):
        environment = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "LAUNCHER_PID": str(launcher)}
        assert subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment).returncode == expected


def test_two_runners_of_one_experiment_do_not_run_at_once(repository):
    first = start(repository, PAUSE="1")
    lock = repository / "results/fake/.lock"
    while not lock.exists():
        time.sleep(0.1)
    time.sleep(0.5)
    code, said = reproduce(repository)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert code == 1 and "another reproduce.sh is running it" in said


@pytest.fixture
def four_gpus(tmp_path, monkeypatch) -> dict:
    """nvidia-smi lists four GPUs, which torch is taken to be able to use. The variables that say so."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return {"PATH": f"{nvidia_smi(tmp_path / 'bin', 4)}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}


@pytest.mark.parametrize(
    ("environment", "of_a_job", "said"),
    [
        ({"GPUS": "8"}, 1, r"GPUS is 8, and 4 GPUs are visible: 0, 1, 2, 3\."),
        ({"GPUS": "2", "CUDA_VISIBLE_DEVICES": "3"}, 1, r"GPUS is 2, and 1 GPUs are visible: 3\."),
        ({"GPUS": "1", "CUDA_VISIBLE_DEVICES": "-1"}, 1, r"GPUS is 1, and 0 GPUs are visible: none\."),
        ({"CUDA_VISIBLE_DEVICES": "0,4"}, 1, "CUDA_VISIBLE_DEVICES=0,4: there is no GPU 4; nvidia-smi has 0, 1, 2, 3"),
        ({}, 6, "a job of this experiment has 6 GPUs, and 4 are visible: 0, 1, 2, 3"),
        ({"GPUS": "1"}, 2, r"a job of this experiment has 2 GPUs, and GPUS is 1\."),
    ],
)
def test_more_gpus_than_there_are_is_an_error_with_both_numbers(environment, of_a_job, said, four_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setattr(runner.gpus, "usable", lambda: ())
    for name, value in (four_gpus | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        runner.places(types.SimpleNamespace(most_gpus=of_a_job), [])


def test_an_old_driver_ends_it_before_any_job(repository, tmp_path):
    """The real torch finds no driver that it can use."""
    code, said = reproduce(repository, PATH=f"{nvidia_smi(tmp_path / 'bin', 4, OLD)}:{os.environ['PATH']}")
    assert code == 1 and said.startswith("error: torch ") and "(4 x NVIDIA A100, driver 535.104.05)" in said
    assert said.count("\n") == 1 and not (repository / "calls.txt").exists()


def test_the_job_with_the_most_gpus_is_known(repository):
    file = repository / "experiments/more.yaml"
    for models, shares, most in (("data/mini/student", "{PL: 3}", 3), ("{model: data/mini/student, gpus: 2}", "1", 2)):
        text = f"datasets: [easyVQA]\nlvlms: [data/mini/teacher]\nsvlms: [{models}]\ngpus: {shares}\n"
        file.write_text(text)
        assert definition.read(file).most_gpus == most


def test_inside_an_allocation_jobs_do_not_share_a_gpu(repository, four_gpus, tmp_path):
    """As in salloc and sbatch; jobs of another runner of this user hold three of the four GPUs."""
    file = repository / "mpa/models/gpus.py"  # torch can use them
    file.write_text(file.read_text().replace("def usable()", "def usable(): return ()\ndef _usable()"))
    locks = tmp_path / f"mpa-gpus-{os.getuid()}"
    locks.mkdir()
    held = [(locks / uuid(i)).open("a") for i in (0, 1, 3)]
    for file in held:
        fcntl.flock(file, fcntl.LOCK_EX)
    target = "paper-0/PA_big_easyVQA.json"
    code, said = reproduce(repository, target, **four_gpus, SLURM_JOB_ID="1")
    assert code == 0, said
    assert [line.split()[1] for line in (repository / "calls.txt.gpus").read_text().splitlines()] == ["2"]


@pytest.mark.parametrize("flags", [["--executor", "slurm"], ["-e", "slurm"], ["--profile", "PROFILE"]])
def test_only_another_executor_leaves_the_gpus_to_its_scheduler(flags, tmp_path, monkeypatch):
    (tmp_path / "PROFILE").mkdir()
    (tmp_path / "PROFILE/config.yaml").write_text("executor: slurm\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("MPA_GPUS", "of another runner")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")  # put back after the test
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.delenv("GPUS", raising=False)
    one = types.SimpleNamespace(most_gpus=1)
    assert runner.places(one, ["--jobs", "3", *flags]) == (1, []) and "MPA_GPUS" not in os.environ
    assert "CUDA_DEVICE_ORDER" not in os.environ
    assert runner.places(one, ["--executor", "local"]) == (2, ["--resources", "gpu=2", "--cores", "2"])
    assert os.environ["MPA_GPUS"] == "0=0 1=1" and os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("GPUS", "0")
    monkeypatch.setenv("JOBS", "3")
    assert runner.places(one, []) == (0, ["--resources", "gpu=0", "--cores", "3"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # else all jobs would take the first GPU


def cell(folder: Path, gpus: int, **environment) -> subprocess.CompletedProcess:
    """A job that prints the GPUs that it has."""
    command = [
        "bash",
        ROOT / "scripts/cell.sh",
        folder,
        "pace/a",
        str(gpus),
        "sh",
        "-c",
        "echo has $CUDA_VISIBLE_DEVICES",
    ]
    environment = {**os.environ, "TMPDIR": str(folder), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)


OLD_MIG = "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


@pytest.mark.parametrize(
    ("given", "gpus", "has"),
    [
        ("0=GPU-a 1=GPU-b", 2, "0,1"),
        (f"{OLD_MIG}/1/0={OLD_MIG}/1/0 {OLD_MIG}/2/0={OLD_MIG}/2/0", 2, f"{OLD_MIG}/1/0,{OLD_MIG}/2/0"),
        ("3=GPU-a", 0, "none"),  # a job that needs no GPU
        ("", 2, "none"),  # the scheduler's
    ],
)
def test_a_job_takes_its_gpus_by_any_name(given, gpus, has, tmp_path):
    done = cell(tmp_path, gpus, MPA_GPUS=given, CUDA_VISIBLE_DEVICES="none", SLURM_JOB_ID="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "logs/pace/a.log").read_text() == f"has {has}\n"


def test_a_job_that_can_have_no_gpus_says_so_and_waits_for_none(tmp_path):
    done = cell(tmp_path, 8, MPA_GPUS="0=GPU-a 2=GPU-b")
    assert done.returncode == 1 and "error: it needs 8 GPUs, and 2 are visible: 0 2." in done.stdout
    assert (tmp_path / "failed/pace/a").read_text().startswith("env GPUS=8 sh -c ")
    (tmp_path / f"mpa-gpus-{os.getuid()}").write_text("of somebody else")
    done = cell(tmp_path, 1, MPA_GPUS="0=GPU-a")
    assert done.returncode == 1 and "is no folder of yours for the locks of GPUs" in done.stdout


@pytest.mark.slow
def test_each_job_has_gpus_of_its_own(repository):
    """Five GPUs; a training needs two."""
    file = repository / "experiments/fake.yaml"
    file.write_text(file.read_text().replace("seeds: [0, 1]", "gpus: {PL: 2}"))
    code, said = reproduce(repository, CUDA_VISIBLE_DEVICES="3,4,5,6,7", PAUSE="0.3", TMPDIR=repository)
    assert code == 0, said
    used = [line.split() for line in (repository / "calls.txt.gpus").read_text().splitlines()]
    assert {len(gpus.split(",")) for stage, gpus, *_ in used if stage == "PL"} == {2}
    assert {len(gpus.split(",")) for stage, gpus, *_ in used if stage != "PL" and gpus != "3,4,5,6,7"} == {1}
    assert {gpu for _, gpus, *_ in used for gpu in gpus.split(",")} == set("34567")
    spans = [(set(gpus.split(",")), int(start), int(end)) for _, gpus, start, end in used if gpus != "3,4,5,6,7"]
    for i, (gpus, start, end) in enumerate(spans):
        assert [other for other in spans[:i] if other[0] & gpus and other[1] < end and start < other[2]] == []
    most = max(sum(1 for _, s, e in spans if s <= start < e) for _, start, _ in spans)
    assert 2 < most <= 5


@pytest.mark.slow
def test_a_small_matrix_of_real_models(tmp_path):
    """One L-VLM, two S-VLMs, two variants, 24 images; then the same command once more, which does nothing."""
    second = tmp_path / "second"
    shutil.copytree(STUDENT, second)
    text = (ROOT / "experiments/mini.yaml").read_text().replace("--limit 60", "--limit 24")
    text = text.replace("--sample 200", "--sample 40").replace("[data/mini/student]", f"[data/mini/student, {second}]")
    file = tmp_path / "mini.yaml"
    file.write_text(text)
    command = ["bash", ROOT / "scripts/reproduce.sh", file]
    places = {**os.environ, "VENV": sys.prefix, "RESULTS": str(tmp_path / "results")}
    done = subprocess.run(command, capture_output=True, text=True, env=places)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "results/paper-0"
    models = ["teacher", "student", "second"]
    models += [f"PL_teacher_{svlm}_easyVQA{variant}" for svlm in models[1:] for variant in ("", "_all_pseudo")]
    evaluated = {model: json.loads((run / f"Eval_{model}_easyVQA.json").read_text()) for model in models}
    assert {len(found) for found in evaluated.values()} == {40}
    assert evaluated["second"] == evaluated["student"]  # a copy of the same model
    parity = json.loads((run / "PI_teacher_train_teacher_student_easyVQA.json").read_text())
    rejected = json.loads((run / "PI_teacher_train_teacher_student_easyVQA_rejected.json").read_text())
    assert 0 < len(parity) < 24 and len(parity) + len(rejected) == 24
    assert {r["id"] for r in parity} & {r["id"] for r in rejected} == set()
    log = (run / "log.txt").read_text()
    assert log.count("PA: 24 of 24 images annotated") == 1 and log.count("PI: 24 images") == 2
    written = {path: path.stat().st_mtime_ns for path in run.rglob("*.json")}
    again = subprocess.run(command, capture_output=True, text=True, env=places)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.json")} == written
