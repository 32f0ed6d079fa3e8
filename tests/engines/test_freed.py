"""What a model leaves in memory when its engine is closed: nothing, so that the next one has the room."""

import gc
import weakref

import pytest
import torch
from conftest import TEACHER
from test_engine import MINI, requests

from mpa.engines.hf import HFEngine


@pytest.fixture(autouse=True)
def without_collector():
    """Nothing is freed because the collector happens to run."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def whole(engine, asked):
    list(engine.generate(asked))


def half(engine, asked):
    engine.batches = engine.generate(asked)  # held by the caller
    next(engine.batches)


def fail(*_, **__):
    raise RuntimeError("a kernel failed")


def failing(engine, asked):
    engine.model.get_decoder().layers[-1].forward = fail
    whole(engine, asked)


def out_of_memory(engine, asked):
    reply = engine.reply

    def small(requests, inputs):
        replies = reply(requests, inputs)
        if len(requests) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return replies

    engine.reply = small
    whole(engine, asked)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ask", [whole, half, failing, out_of_memory])
def test_a_closed_engine_frees_its_model_and_its_caches(images, ask, workers):
    asked, held, engine = requests(images, follow_up="paper")[9:15], [], None
    try:
        with HFEngine(str(TEACHER), batch_size=3, workers=workers, **MINI) as engine:
            engine.load(asked)
            held += map(
                weakref.ref, (engine.model, engine.prefix_cache, engine.last_column, *engine.model.parameters())
            )
            ask(engine, asked)
    except RuntimeError as error:
        assert ask is failing and "a kernel failed" in str(error)
        assert not any(part() is not None for part in held)  # while the error is told, with its frames
    assert len(held) > 50 and not any(part() is not None for part in held)
