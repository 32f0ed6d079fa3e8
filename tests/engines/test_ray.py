"""The `ray` engine on a real cluster of two cores: replies, deaths, errors."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MINI, ROOT, TEACHER, python

from mpa.engines import Request, open_engine
from mpa.files.records import InputError
from mpa.method.prompts import TASK_PROMPTS, answer_prompt

ray = pytest.importorskip("ray")

from mpa.engines import ray as ray_engine  # noqa: E402

SETTINGS = {"min_pixels": 3136, "max_pixels": 3136, "dtype": "float32", "device": "cpu"}
PA = ["PA.py", "--dataset", "easyVQA", *MINI, "--limit", "40", "--model-path-lvlm", TEACHER, "--temperature", "1"]
RAY = ["--engine", "ray", "--actors", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def cluster():
    """A cluster with two cores, on any machine."""
    with contextlib.chdir(ROOT):
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def asked(images, tmp_path_factory) -> list[Request]:
    """Greedy and sampled annotations with follow-ups, questions, an invalid Unicode file name, and a missing image."""
    odd = os.fsdecode(os.fsencode(tmp_path_factory.mktemp("odd")) + b"/\xe9.png")
    paths = [*map(str, sorted(images.rglob("*.png"))), odd, "/none.png"]
    shutil.copy(paths[0], odd)
    task, question = TASK_PROMPTS["general"], answer_prompt("what color is the shape?")
    greedy = [Request(f"{p}#0", p, task, stop="annotation", follow_up="paper") for p in paths]
    sampled = [Request(f"{p}#1", p, task, temperature=1.0, top_p=0.95, follow_up="paper") for p in paths]
    return [*greedy, *sampled, *(Request(p, p, question, stop="answer") for p in paths)]


@pytest.fixture(scope="module")
def of_hf(asked) -> dict[str, dict]:
    with open_engine("hf", model_path=str(TEACHER), workers=0, **SETTINGS) as engine:
        return texts(reply for batch in engine.generate(asked) for reply in batch)


def texts(replies) -> dict[str, dict]:
    """By key, without the log-probabilities, whose last digits depend on the batch."""
    return {r["key"]: {**r, "logprob": None, "follow_up": r.get("follow_up", {}).get("text")} for r in replies}


def test_two_actors_give_the_replies_of_hf(cluster, asked, of_hf):
    with open_engine("ray", model_path=str(TEACHER), actors=2, batch_size=4, **SETTINGS) as engine:
        batches = list(engine.generate(asked, done={asked[0].key}))
        facts = engine.facts()
        assert engine.actor_resources == {"num_cpus": 1}
        assert "tokens/s, 2 actors" in engine.status()
    replies = [reply for batch in batches for reply in batch]
    assert {r["key"] for r in replies} == {r.key for r in asked[1:]}
    assert texts(replies) == {key: reply for key, reply in of_hf.items() if key != asked[0].key}
    assert len(replies) == len(asked) - 1
    assert max(map(len, batches)) == 4
    assert (facts["engine"], facts["actors"], facts["device"]) == ("hf", 2, "cpu")
    assert facts["tokens"] >= sum(reply.get("tokens", 0) for reply in replies)
    assert 0 < facts["waited"] < 1


def test_a_killed_actors_batches_are_done_again_and_nothing_is_lost_or_doubled(cluster, asked, of_hf):
    replies = []
    with open_engine("ray", model_path=str(TEACHER), actors=2, batch_size=2, **SETTINGS) as engine:
        for batch in engine.generate(asked):
            if not replies:
                (victim,) = engine.actor_facts
                os.kill(int(victim.split(":")[1]), signal.SIGKILL)
            replies += batch
        assert len(engine.actor_facts) == 3  # two, and the one that took the victim's place
    assert sorted(reply["key"] for reply in replies) == sorted(of_hf)
    assert texts(replies) == of_hf


class Deadly:
    def generate(self, requests):
        os.kill(os.getpid(), signal.SIGKILL)

    def facts(self):
        return {}


class Dying(ray_engine.Actor):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.engine = Deadly()


def test_a_batch_that_always_kills_its_actor_ends_the_run(cluster, asked, monkeypatch):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors cannot import this file
    monkeypatch.setattr(ray_engine, "Actor", Dying)
    with (
        open_engine("ray", model_path=str(TEACHER), actors=1, **SETTINGS) as engine,
        pytest.raises(InputError, match="died 4 times, probably because the memory was full"),
    ):
        list(engine.generate(asked[:3]))


@pytest.mark.parametrize(
    ("nodes", "settings", "actors", "share"),
    [
        ([(2, 0)], {}, 1, {"num_cpus": 2}),
        ([(8, 0), (5, 0)], {}, 6, {"num_cpus": 2}),
        ([(1, 0), (1, 0)], {}, 2, {"num_cpus": 1}),
        ([(8, 0), (5, 0)], {"actors": 3}, 3, {"num_cpus": 4}),
        ([(4, 0), (32, 8), (32, 8)], {}, 16, {"num_cpus": 1, "num_gpus": 1}),
        ([(4, 0), (32, 8)], {"ray_engine": "vllm", "tensor_parallel_size": 4}, 2, {"num_cpus": 1, "num_gpus": 4}),
        ([(4, 0), (4, 8)], {"device": "cpu"}, 4, {"num_cpus": 2}),
        ([(4, 0), (4, 8)], {"ray_engine": "openai"}, 2, {"num_cpus": 1}),
    ],
)
def test_how_a_cluster_is_divided(nodes, settings, actors, share):
    engine = open_engine("ray", model_path=str(TEACHER), **settings)
    engine._divide_cluster(*map(list, zip(*nodes, strict=True)))
    assert (engine.actors, engine.actor_resources) == (actors, share)


@pytest.mark.parametrize(
    ("share", "batch_size", "sizes"),
    [
        ({"num_gpus": 1}, None, [150, 150, 150, 150]),
        ({"num_gpus": 1}, 64, [64] * 9 + [24]),
        ({"num_cpus": 2}, None, [8] * 75),
    ],
)
def test_an_actor_with_a_gpu_forms_its_own_batches(monkeypatch, share, batch_size, sizes):
    engine, sent = open_engine("ray", model_path=str(TEACHER), actors=2, batch_size=batch_size), []
    engine.actor_resources = share
    monkeypatch.setattr(ray_engine, "_attempt_counter", lambda: None)
    monkeypatch.setattr(engine, "_results", lambda rows, *_: sent.extend(rows) or [])
    assert not list(engine.generate([Request(str(i), "x.png", "what?") for i in range(600)]))
    assert [len(pickle.loads(row["packed"])) for row in sent] == sizes


def test_more_actors_than_fit_are_refused():
    with pytest.raises(InputError, match=r"--actors 9: the cluster has room for 8: .* each takes 1 gpus and 1 cpus"):
        open_engine("ray", model_path=str(TEACHER), actors=9)._divide_cluster([64], [8])


def start(folder: Path, *more) -> subprocess.Popen:
    command = [sys.executable, ROOT / "scripts" / PA[0], *PA[1:], *RAY, "--run", f"{folder}/", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd="/", start_new_session=True, **pipes)  # called from anywhere


def until(condition, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def family(pid: int) -> set[int]:
    """A process and all its descendants."""
    children = [int(p) for f in Path(f"/proc/{pid}/task").glob("*/children") for p in f.read_text().split()]
    return {pid}.union(*map(family, children))


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_pa_killed_and_called_again_writes_the_bytes_that_hf_writes(tmp_path):
    whole = python(*PA, "--run", f"{tmp_path}/hf/")
    assert whole.returncode == 0, whole.stderr
    process = start(tmp_path / "ray")
    journal = tmp_path / "ray/PA_teacher_easyVQA.journal.jsonl"
    until(lambda: process.poll() is not None or (journal.exists() and journal.read_bytes().count(b"\n") > 4))
    actors = [pid for pid in family(process.pid) if "MapWorker" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(actors) == 2
    process.kill()
    assert process.wait() == -signal.SIGKILL
    until(lambda: not any(map(alive, actors)), 30)  # they die with the one they worked for
    assert 4 < journal.read_bytes().count(b"\n") < 41
    again = start(tmp_path / "ray")
    said, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "40 of 40 images annotated" in said
    assert not errors
    name = "PA_teacher_easyVQA.json"
    ours, theirs = (json.loads((tmp_path / engine / name).read_text()) for engine in ("ray", "hf"))
    assert ours == theirs
    assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_ctrl_c_ends_at_once(tmp_path):
    process = start(tmp_path, "--limit", "4000")
    journal = tmp_path / "PA_teacher_easyVQA.journal.jsonl"
    until(lambda: process.poll() is not None or (journal.exists() and journal.read_bytes().count(b"\n") > 4))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, said = process.communicate(timeout=120)  # 4,000 images take longer by far
    assert process.returncode == 130
    assert said.strip().splitlines() == ["stopped. Run the same command again to go on."]


def test_a_model_that_cannot_be_loaded_ends_the_run_in_one_line(tmp_path):
    model = tmp_path / "model"  # passes the check of its files: only who loads it sees that it has a tokenizer alone
    model.mkdir()
    for file in TEACHER.iterdir():
        if file.name not in ("processor_config.json", "config.json"):
            (model / file.name).symlink_to(file)
    (model / "preprocessor_config.json").write_text("{}")
    (model / "config.json").write_text('{"model_type": "qwen2"}')
    process = start(tmp_path / "run", "--model-path-lvlm", model)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    warning, line = said.strip().splitlines()
    assert warning.startswith("warning: model type qwen2 is not in the table")
    assert line.startswith("error: ")
    assert f"{model}: " in line


def test_the_driver_imports_no_torch_and_says_how_to_install_ray(tmp_path):
    code = "import sys; from mpa.engines import open_engine; open_engine('ray', model_path='x'); print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "False\n"
    hidden = f"import importlib.machinery as m; m.PathFinder.find_spec = lambda *_, real=m.PathFinder.find_spec: None if _[0] == 'ray' else real(*_); {code}"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, env=env)
    assert "--engine ray needs ray. Install with: bash scripts/setup.sh ray" in done.stderr
