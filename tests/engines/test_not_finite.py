"""Numbers that are none: logits that are NaN or infinite, memory that runs out while it is measured, NaN in JSON."""

import json
import shutil
from types import SimpleNamespace

import activations
import checkpoints
import pytest
import record_formats
import torch
import train
from conftest import MINI, STUDENT, python
from safetensors.torch import load_file, save_file
from test_engine import replies, requests
from training import arguments, build, write

import data
from mpa.engines import Request, finite, memory, not_finite
from mpa.engines.hf import HFEngine
from mpa.engines.prefetch import PendingRequest
from mpa.engines.vllm import VLLMEngine
from mpa.files.journal import Journal
from mpa.files.records import InputError, read_json, train_record, write_json
from mpa.models import model_files

# --- logits ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """The student with a last norm so large that its logits overflow in float16, and nowhere else."""
    folder = tmp_path_factory.mktemp("overflowing") / "student"
    shutil.copytree(STUDENT, folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("model.norm.weight"))
    weights[name] = weights[name].float().sign() * 6e4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_logits_that_overflow_are_errors_which_name_another_dtype(images, overflowing, workers):
    wrong = replies(requests(images)[:3], overflowing, dtype="float16", workers=workers)
    for reply in wrong.values():
        assert reply["error"] == "the model's logits are NaN or infinite in float16: use --dtype bfloat16 or float32"
        assert reply["permanent"] and "text" not in reply
    assert all("text" in reply for reply in replies(requests(images)[:3], overflowing, dtype="float32").values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_bad_logit_costs_only_its_own_row(images, value, temperature):
    asked = requests(images, temperature=temperature)[:4]
    with HFEngine(str(STUDENT), batch_size=4, workers=0, min_pixels=3136, max_pixels=3136, dtype="float32") as engine:
        good = {r["key"]: r for batch in engine.generate(asked) for r in batch}

        def spoil(_, __, out):
            out.logits[1, -1, 7] = value

        hook = engine.model.register_forward_hook(spoil)
        got = [reply for batch in engine.generate(asked) for reply in batch]
        hook.remove()
    assert ["error" in reply for reply in got] == [False, True, False, False]
    assert all(reply == good[reply["key"]] for reply in got if "error" not in reply)


@pytest.mark.parametrize("logprob", [float("nan"), float("-inf"), None])
def test_vllms_log_probability_that_is_no_number_is_an_error(logprob):
    """With what vLLM gives, which these tests do not need installed."""
    parts = {"preprocessor": SimpleNamespace(reasoning_tag=""), "decoder": lambda _: "!!!!", "tokens": 0}
    model = SimpleNamespace(dtype="bfloat16", length=99)
    engine = SimpleNamespace(**parts, model=model, prompt_tokens=0, cached_tokens=0)
    generated = SimpleNamespace(text="!!!!", token_ids=[0] * 4, finish_reason="stop", cumulative_logprob=logprob)
    output = SimpleNamespace(outputs=[generated], finished=True, prompt_token_ids=[1], num_cached_tokens=0)
    reply = VLLMEngine._reply(engine, PendingRequest(Request("a", "a.png", "what?")), output)
    assert reply["key"] == "a" and "in bfloat16: use --dtype float32" in reply["error"]


def test_a_stage_whose_first_replies_are_all_not_finite_ends_at_once(images, overflowing, tmp_path):
    command = ["PA.py", "--dataset", "images", "--image-root", images, *MINI[:4], "--run", f"{tmp_path}/run"]
    done = python(*command, "--dtype", "float16", "--model-path-lvlm", overflowing)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "NaN or infinite in float16: use --dtype bfloat16 or float32" in error
    assert "Traceback" not in done.stderr and not [*tmp_path.glob("run/PA_*dataset.json")]


def test_replies_that_are_sometimes_not_finite_do_not_end_a_run():
    bad = [[not_finite(str(i), float("nan"), "bfloat16")] for i in range(20)]
    assert not_finite("0", -0.5, "bfloat16") is None and not_finite("0", None, "bfloat16")
    assert len(list(finite([*bad[:7], [{"key": "x", "text": "red"}], *bad[7:]]))) == 21
    assert list(finite([])) == [] and list(finite([[{"key": "x", "error": "image: gone"}]] * 9))
    for batches in (bad, bad[:2]):
        with pytest.raises(InputError, match="use --dtype float32"):
            list(finite(batches))


def test_an_evaluation_with_logits_that_are_not_finite_ends_the_training(tmp_path):
    write(tmp_path, 4)
    trainer = build(tmp_path, "--eval_data_path", str(tmp_path / "train.json"))

    def spoil(_, __, out):
        out.logits[0] = torch.nan

    trainer.model.register_forward_hook(spoil)
    with pytest.raises(InputError, match=r"NaN or infinite for 1 of 4 samples, such as id s0.*in float32"):
        trainer.evaluate()


def test_a_gradient_norm_that_is_not_finite_is_no_step(tmp_path):
    write(tmp_path, 4)
    trainer = build(tmp_path)
    with pytest.raises(InputError, match="norm of the gradients is not finite"):
        trainer.log({"loss": 1.0, "grad_norm": float("inf")})


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_a_probe_of_the_memory_that_does_not_fit_leaves_one_row(images, monkeypatch, rows):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 0)
    with HFEngine(str(STUDENT), workers=0, min_pixels=3136, max_pixels=3136, dtype="float32") as engine:
        engine.load()

        def reply(requests, _):
            if len(requests) >= rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(engine, "reply", reply)
        engine.plan.batch_tokens, engine.plan.row_tokens = memory.tokens_that_fit(engine)
        monkeypatch.undo()
        assert all(len(batch) == 1 for batch in engine.plan.batches(requests(images)))
        assert all("text" in reply for batch in engine.generate(requests(images)[:2]) for reply in batch)


def test_a_fault_in_the_probe_that_is_no_lack_of_memory_is_not_hidden(monkeypatch):
    engine = SimpleNamespace(pixels=(3136, 3136), model=torch.nn.Linear(1, 1), preprocessor=SimpleNamespace())
    engine.preprocessor.process = lambda *_: {}

    def reply(*_):
        raise RuntimeError("a bug")

    engine.reply = reply
    with pytest.raises(RuntimeError, match="a bug"):
        memory.tokens_that_fit(engine)


@pytest.mark.parametrize("place", [(activations, "activation_bytes"), (data.Samples, "__getitem__")])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_micro_batch_that_does_not_fit_while_it_is_measured_is_one_line(tmp_path, monkeypatch, error, place):
    def out_of_memory(*_):
        raise error

    write(tmp_path, 4)
    monkeypatch.setattr(*place, out_of_memory)
    with pytest.raises(InputError, match=r"micro-batch, of 4 samples, does not fit into memory\. Smaller"):
        train.main(arguments(tmp_path, *"--activation_checkpointing auto --max_steps 1 --save_strategy no".split()))


# --- JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_is_never_written_with_a_number_that_is_none(tmp_path, value):
    records = [{"id": 1, "logprob": -1.5}, {"id": 2, "follow_up": {"logprob": value}}]
    with pytest.raises(InputError, match=r"a\.json, record 1: 'follow_up': 'logprob' is -?(nan|inf), which"):
        write_json(tmp_path / "a.json", records)
    with pytest.raises(InputError, match=r"a\.json: 'loss' is -?(nan|inf), which is no number of JSON"):
        model_files.write_json(tmp_path / "a.json", {"loss": value})
    assert not [*tmp_path.iterdir()]
    journal = Journal(tmp_path / "r.json", {})
    with pytest.raises(InputError, match=r"r\.journal\.jsonl: 'logprob' is"):
        journal.append([{"key": "a", "text": "b", "logprob": value}])
    journal.close()
    assert len((tmp_path / "r.journal.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_with_a_number_that_is_none_is_refused_by_name(tmp_path, number):
    path = tmp_path / "a.json"
    path.write_text(f'[{{"id": 1, "x": 1e3}}, {{"id": 2, "x": {number}}}]')
    with pytest.raises(InputError, match=r"a\.json, record 1: 'x' is -?(nan|inf), which is no number of JSON"):
        read_json(path)
    samples = json.dumps([train_record(i, "a.png", "what?", "red") for i in range(3)])
    (tmp_path / "train.json").write_text(samples.replace('"id": 1', f'"id": 1, "logprob": {number}'))
    with pytest.raises(
        InputError, match=r"train\.json, record 1: 'logprob' is -?(nan|inf), which is no number of JSON"
    ):
        record_formats.read_records(str(tmp_path / "train.json"))
    assert read_json(path, finite=False)[0] == {"id": 1, "x": 1000.0}
    for last in ("", '\n{"id": 3}'):
        path.write_text(f'{{"id": 1}}\n{{"id": 2, "x": {number}}}{last}\n')
        with pytest.raises(InputError, match=rf"a\.json, line 2: {number} is no number of JSON"):
            read_json(path)
        with pytest.raises(InputError, match=rf"a\.json, line 2: {number} is no number of JSON"):
            record_formats.read_records(str(path))
    path.write_text(f'{{"settings": {{}}, "loss": {number}}}')
    with pytest.raises(InputError, match=rf"a\.json: cannot be read \({number}"):
        checkpoints.read_json(path)
    journal = tmp_path / "r.journal.jsonl"
    journal.write_text(json.dumps({"settings": {}}) + f'\n{{"key": "a", "text": "b", "logprob": {number}}}\n')
    with pytest.raises(InputError, match=r"r\.journal\.jsonl, line 2: not a line of a journal"):
        Journal(tmp_path / "r.json", {})
