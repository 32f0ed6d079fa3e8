"""How large a batch of the hf engine is: on a CPU 8 rows, on a GPU what its memory holds. The GPU's answers are computed here."""

import os
from types import SimpleNamespace

import pytest
import torch
from conftest import STUDENT, TEACHER
from test_engine import MINI, requests

from mpa.engines import Request, memory, open_engine
from mpa.engines.batch_plan import GPU_ROWS, ROWS, WINDOW, BatchPlan
from mpa.engines.decoding import TokenSampler
from mpa.engines.hf import HFEngine
from mpa.models import device_memory

GB = 10**9


class FakeGPU:
    """The memory of a model: weights, and bytes of a token's activations, of its key-values, of a row's step of decoding."""

    def __init__(self, weights, activations, cached, vocabulary, total):
        self.weights, self.activations, self.cached = weights, activations, cached
        self.step, self.vocabulary, self.total, self.peak = memory.STEP_BYTES * vocabulary, vocabulary, total, 0

    def needed(self, rows: int, length: float, new_tokens: int) -> float:
        """The peak of a batch: its prompts' pass, its last step, or the last step of a follow-up as long as the reply."""
        prompts = rows * length * (self.activations + self.cached)
        return self.weights + max(prompts, rows * ((length + new_tokens) * self.cached + self.step))

    def engine(self, length: int):
        def reply(asked, inputs):
            self.peak = self.needed(len(asked), inputs["input_ids"].shape[1], asked[0].max_new_tokens)

        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=self.vocabulary))
        model = SimpleNamespace(parameters=lambda: [SimpleNamespace(device="cuda:0", is_cuda=True)], config=config)
        process = lambda images, prompts: {"input_ids": torch.zeros(len(images), length)}  # noqa: E731
        return SimpleNamespace(pixels=(1, 1), reply=reply, model=model, preprocessor=SimpleNamespace(process=process))


# By the sizes in their config.json, in bfloat16: 2 bytes x (3 inner + 3 * hidden widths), 2 x layers x key-value heads x width.
MODELS = {
    "Qwen2-VL-7B": (16.6 * GB, 135_000, 57_344, 152_064),
    "Qwen2-VL-2B": (4.4 * GB, 63_000, 28_672, 151_936),
    "SmolVLM-500M": (1.0 * GB, 21_000, 40_960, 49_280),
    "Gemma 3 4B": (8.6 * GB, 77_000, 139_264, 262_208),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("total", [24 * GB, 80 * GB])
@pytest.mark.parametrize("new_tokens", [8, 128, 1024])
def test_every_batch_fits_into_the_memory_that_the_probe_found(monkeypatch, name, total, new_tokens):
    gpu = FakeGPU(*MODELS[name], total)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: gpu.peak)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gpu.total - gpu.weights, gpu.total))
    plan = BatchPlan(10_000, None, (1, 1))
    plan.batch_tokens, plan.row_tokens = memory.tokens_that_fit(gpu.engine(600))
    plan.estimated_length = lambda request: len(request.prompt)
    for length in (40, 160, 600):
        asked = [Request(str(i), "", "x" * length, max_new_tokens=new_tokens) for i in range(3000)]
        most = max(map(len, plan.batches(asked)))
        assert gpu.needed(most, length, new_tokens) <= gpu.total
        if length == 600 and new_tokens == 128:  # and the memory is used
            assert gpu.needed(most, length, new_tokens) > 0.5 * gpu.total


def test_the_step_that_samples_takes_no_more_than_is_counted_for_it():
    """Measured by torch's profiler, on the CPU: of all that is in memory at one time beside the logits."""
    rows, vocabulary = 3, 20_000
    sampler = TokenSampler([Request(str(i), "", "", temperature=1.0, top_p=0.9) for i in range(rows)], "cpu")
    scores = torch.randn(rows, vocabulary)
    with torch.profiler.profile(profile_memory=True) as profile:
        sampler(scores)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    logits = rows * vocabulary * (2 + 4)
    assert 0.4 * memory.STEP_BYTES < (most + logits) / (rows * vocabulary) <= memory.STEP_BYTES


def test_without_a_number_a_batch_has_8_rows_on_a_cpu_and_up_to_64_on_a_gpu(images, monkeypatch):
    with open_engine("hf", model_path=str(STUDENT), workers=0, **MINI) as engine:
        engine.load()
        assert (engine.plan.batch_size, engine.plan.batch_tokens, engine.plan.row_tokens) == (8, None, 0)
        assert engine.at_once == ROWS == 8

    def loaded(engine):
        engine.plan.batch_tokens = 2000

    monkeypatch.setattr("mpa.models.loading.pick_device", lambda _: "cuda:0")
    monkeypatch.setattr("mpa.engines.memory.check", lambda *_: None)
    monkeypatch.setattr(HFEngine, "_load_model", loaded)
    with open_engine("hf", model_path=str(STUDENT), workers=0, **MINI) as engine:
        engine.load()
        assert engine.plan.batch_size == engine.at_once == GPU_ROWS
    with open_engine("hf", model_path=str(STUDENT), workers=0, batch_size=200, **MINI) as engine:
        engine.load()
        assert engine.plan.batch_size == 200


def test_other_memory_at_a_resume_makes_other_batches_of_which_one_is_asked_in_part_again():
    asked = [Request(str(i), "", "x" * (4 * (i % 97))) for i in range(GPU_ROWS * WINDOW)]

    def batches(tokens):
        plan = BatchPlan(GPU_ROWS, tokens, (1, 1))
        return list(plan.batches(asked))

    before, after = batches(6000), batches(5000)
    assert before != after
    done = {request.key for batch in before[: len(before) // 2] for request in batch}
    again = [batch for batch in after if not {r.key for r in batch} <= done]
    assert {r.key for batch in again for r in batch} | done == {r.key for r in asked}
    assert sum(r.key in done for batch in again for r in batch) < max(map(len, after))


def test_a_batch_that_does_not_fit_is_halved_and_the_next_of_its_size_are_not_halved_again():
    plan = BatchPlan(64, 300_000, (1, 1))
    failed = plan.tokens(64, 600, 128)
    for _ in range(5):  # those that were ready ahead of the model
        plan.does_not_fit(failed)
    asked = [Request(str(i), "", "x" * 2396, max_new_tokens=128) for i in range(100)]
    assert max(map(len, plan.batches(asked))) == 32
    without = BatchPlan(8, None, (1, 1))
    without.does_not_fit(failed)
    assert without.batch_tokens is None


def test_a_follow_up_does_not_hold_the_key_values_twice(images, monkeypatch):
    asked, caches = requests(images, follow_up="paper")[12:15], []
    with HFEngine(str(TEACHER), batch_size=3, workers=0, **MINI) as engine:
        engine.load()
        reuse = engine.prefix_cache.reuse_images

        def seen(inputs, cache, *more):
            found = reuse(inputs, cache, *more)
            caches.append((found, [layer.keys for layer in cache.layers]))
            return found

        monkeypatch.setattr(engine.prefix_cache, "reuse_images", seen)
        list(engine.generate(asked))
    assert caches
    for found, left in caches:
        assert found and not any(keys is not None for keys in left)


@pytest.mark.parametrize("set_by_user", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_torch_extends_its_segments_unless_the_user_has_set_its_allocator(monkeypatch, set_by_user):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ, **({set_by_user: "x:1"} if set_by_user else {})})
    device_memory.extend_segments()
    found = {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}
    assert found == ({set_by_user: "x:1"} if set_by_user else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
