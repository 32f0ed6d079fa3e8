"""A decode step waits for the device once, for its tokens; and the steps of --static-cache are those of the model."""

import contextlib

import pytest
import torch
from conftest import TEACHER, close
from test_engine import MINI, replies, requests
from torch.utils._python_dispatch import TorchDispatchMode

from mpa.engines import static_cache
from mpa.engines.decoding import Replies
from mpa.engines.hf import HFEngine
from mpa.engines.static_cache import StaticSteps

# What waits for a GPU: sizes and values that the host must know, and what was made on the host (lift_fresh) or goes there.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "lift_fresh", "isin"}
INDEXING = {"index", "index_put_", "_index_put_impl_"}  # by a mask


class Waits(TorchDispatchMode):
    """Counts the operations that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += by_mask or name in WAITS
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("rows", [4, 12])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("more", [{}, {"temperature": 0.7, "top_p": 0.9}, {"stop": "annotation"}])
def test_a_further_step_waits_for_its_tokens_alone_whatever_the_batch(images, monkeypatch, more, static, rows):
    added, add = [], Replies.add
    monkeypatch.setattr(Replies, "add", lambda self, tokens: added.append(type(tokens)) or add(self, tokens))
    with HFEngine(str(TEACHER), static_cache=static, **MINI) as engine:
        engine.load()

        def waits(tokens: int) -> int:
            asked = requests(images, max_new_tokens=tokens, **more)[12 - rows // 2 :][:rows]  # prompts of two lengths
            added.clear()
            with Waits() as counter:
                engine.reply(*engine.prepare(asked)[:2])
            assert added == [list] * tokens  # one copy to the host for each step
            return counter.count

        waits(2)  # computes the system text's key-values
        assert waits(9) == waits(3) > 0


# --- static cache ----------------------------------------------------------------------------------------


class FakeGraph:
    """Computes the step again where a CUDA graph would replay its kernels."""

    def replay(self):
        fake = type(self)
        fake.replayed += 1
        fake.steps.logits.copy_(fake.steps._logits(**fake.steps.inputs))

    @classmethod
    @contextlib.contextmanager
    def capture(cls, _):
        """On a GPU, nothing within is computed; here it is, and is undone."""
        if cls.error:
            raise cls.error
        lengths = [layer.cumulative_length.clone() for layer in cls.steps.cache.layers]
        yield
        for layer, length in zip(cls.steps.cache.layers, lengths, strict=True):
            layer.cumulative_length.copy_(length)
        cls.captured.append(cls.steps.shape)


@pytest.fixture
def graphs(monkeypatch):
    FakeGraph.captured, FakeGraph.replayed, FakeGraph.error, FakeGraph.steps = [], 0, None, None

    def init(self, model, made=StaticSteps.__init__):
        made(self, model)
        self.graph_error = ""
        FakeGraph.steps = self

    monkeypatch.setattr(StaticSteps, "__init__", init)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeGraph.capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    return FakeGraph


def same(got: dict, expected: dict) -> bool:
    """Texts, lengths, and log-probabilities to their digits."""
    texts = [{key: (reply["text"], reply["tokens"]) for key, reply in some.items()} for some in (got, expected)]
    return texts[0] == texts[1] and all(close(got[k]["logprob"], expected[k]["logprob"], 1e-3, least=1) for k in got)


def test_batches_of_one_shape_share_a_graph_and_replies_are_the_same(images, graphs):
    asked = requests(images, max_new_tokens=20, follow_up="paper")
    expected = replies(asked, batch_size=5)
    got = replies(asked, batch_size=5, static_cache=True)
    assert same(got, expected)
    assert {k: r.get("follow_up", {}).get("text") for k, r in got.items()} == {
        k: r.get("follow_up", {}).get("text") for k, r in expected.items()
    }
    assert len(graphs.captured) == len(set(graphs.captured)) < 5 < graphs.replayed


def test_where_no_graph_can_be_had_the_reason_is_said_and_replies_are_the_same(images, graphs, capsys):
    graphs.error = RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors")
    asked = requests(images, max_new_tokens=20)
    with HFEngine(str(TEACHER), batch_size=5, static_cache=True, **MINI) as engine:
        got = {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}
        assert engine.facts()["static_cache"] == "no graph"
    assert same(got, replies(asked, batch_size=5))
    said = "--static-cache: no CUDA graph: CUDA error: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == said


def test_a_capture_that_runs_out_of_memory_halves_the_batch(images, graphs, monkeypatch):
    capture = graphs.capture

    def small(graph):
        if graphs.steps.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return capture(graph)

    monkeypatch.setattr(torch.cuda, "graph", small)
    asked = requests(images, max_new_tokens=20)
    assert same(replies(asked, batch_size=4, static_cache=True), replies(asked, batch_size=2))
    assert graphs.captured and {rows for rows, _ in graphs.captured} <= {1, 2}


def test_a_model_that_has_none_is_named_with_the_reason(images, capsys):
    def said(**changed) -> str:
        with HFEngine(str(TEACHER), **MINI) as engine:
            engine.load()
            for name, value in changed.items():
                setattr(engine.model if name == "hf_quantizer" else engine, name, value)
            assert static_cache.steps(engine) is None
        return capsys.readouterr().err

    assert "--static-cache is left out: the model is not on one device" in said(prefix_cache=None)
    assert "--static-cache is left out: it is not tested with quantised weights" in said(hf_quantizer=object())
