"""vLLM's processes: on a GPU its engine runs in a child, which has ended before the next model is loaded. With a vLLM that
has no more than these parts; that it gives replies is tested where it is installed."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import STUDENT

from mpa.engines import vllm_model
from mpa.files.records import InputError
from mpa.models import gpus


def stubborn(ready):
    """What vLLM's engine may be: deaf to SIGTERM while it frees its memory."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(600)


class LLM:
    """Starts a process as vLLM's client does, and like it gives it no time to end."""

    fails = False

    def __init__(self, **settings):
        type(self).settings, type(self).environment = settings, dict(os.environ)
        context = multiprocessing.get_context("fork")
        ready = context.Event()
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            type(self).child = context.Process(target=stubborn, args=(ready,), daemon=True)
            self.child.start()
            ready.wait()
        if self.fails:
            raise RuntimeError("Engine core initialization failed")
        part = SimpleNamespace(shutdown=lambda: None)
        self.llm_engine = SimpleNamespace(renderer=part, engine_core=part)


@pytest.fixture
def vllm(monkeypatch):
    """`import vllm` gives these parts; the platform is a GPU."""
    cleaned = []
    platform = SimpleNamespace(is_cpu=lambda: False, device_type="cuda")
    parts = {
        "vllm": {"LLM": LLM},
        "vllm.platforms": {"current_platform": platform},
        "vllm.distributed": {"cleanup_dist_env_and_memory": lambda: cleaned.append(1)},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(vllm_model, "PATIENCE", 0.2)
    monkeypatch.setattr(gpus, "usable", lambda: (gpus.Gpu("A card", "GPU-1", (8, 0)),))
    monkeypatch.setattr(LLM, "fails", False)
    return SimpleNamespace(platform=platform, cleaned=cleaned)


def model(tensor_parallel: int = 1) -> vllm_model.VLLMModel:
    return vllm_model.VLLMModel(str(STUDENT), "auto", False, tensor_parallel, 1, 0.9)


def test_a_gpus_model_is_in_a_child_that_has_ended_when_the_model_is_unloaded(vllm):
    one = model()
    one.load(512, None)
    assert LLM.child.is_alive() and LLM.environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert LLM.settings["dtype"] == "bfloat16"
    one.unload()
    assert not LLM.child.is_alive() and one.llm is None and not one.children


def test_no_child_stays_behind_a_model_that_cannot_be_loaded(vllm, monkeypatch):
    monkeypatch.setattr(LLM, "fails", True)
    with pytest.raises(InputError, match="vLLM cannot load it: Engine core initialization failed"):
        model().load(512, None)
    assert not LLM.child.is_alive()


def test_a_cpus_model_stays_in_this_process(vllm):
    vllm.platform.is_cpu, vllm.platform.device_type = lambda: True, "cpu"
    one = model()
    one.load(512, None)
    assert LLM.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and LLM.settings["dtype"] == "float32"
    one.unload()
    assert vllm.cleaned


def test_a_user_who_wants_one_process_gets_it(vllm):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    one = model()
    one.load(512, None)
    one.unload()
    assert vllm.cleaned


def test_a_child_ends_with_a_stage_that_is_killed(vllm):
    def stage(pipe):
        one = model()
        one.load(512, None)
        pipe.send(LLM.child.pid)
        time.sleep(600)

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=stage, args=(there,))
    process.start()
    child = here.recv()
    os.kill(child, 0)  # it is there
    process.kill()
    process.join()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child has outlived the stage")
