"""A model type outside the table of families: its first request goes through the `hf` engine and through plain `generate`."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from mpa.engines import Request
from mpa.files.image_files import open_image
from mpa.files.records import InputError
from mpa.models.device_memory import is_out_of_memory

LOOKED_AT = 64  # requests, for one whose image can be read
NEW_TOKENS = 16  # at most
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest logit, between a row alone and in a batch
HALF_TOLERANCE = 0.1


@contextlib.contextmanager
def tried(engine) -> Iterator[None]:
    """Around what was never tried with this model type: an error that is a bug elsewhere is here one line, InputError."""
    try:
        yield
    except (InputError, MemoryError, OSError):
        raise
    except Exception as error:
        if engine.family or is_out_of_memory(error):
            raise
        said = str(error).strip().split("\n", 1)[0]
        raise InputError(f"{_where(engine)} cannot be asked here ({type(error).__name__}: {said}). {REMEDY}") from error


REMEDY = "Use --engine vllm, or a server that has it with --engine openai."


def _where(engine) -> str:
    return (
        f"{engine.model_path}: its model type is not in the table of families (python -m mpa.models --families), and it"
    )


@torch.inference_mode()
def check(engine, requests: Sequence[Request]) -> None:
    """Raise InputError where the engine's reply to the first request is not that of transformers' own calls.

    Also where its logits change in a batch. Without a request whose image can be read, nothing is checked.
    """
    usable = (request for request in requests[:LOOKED_AT] if engine.prepare([request]).requests)
    first = next(usable, None)
    if first is None:
        return
    short = min(first.max_new_tokens, NEW_TOKENS)
    asked = replace(first, max_new_tokens=short, temperature=0.0, stop="", follow_up="")
    inputs = _plain_inputs(engine, asked)
    out = engine.model.generate(
        **inputs,
        **{"max_new_tokens": short, "do_sample": False, "temperature": None, "top_p": None, "top_k": None},
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
    expected = engine.preprocessor.reasoning_tag + engine.decoder(tokens.tolist())
    (reply,) = engine.reply([asked], engine.prepare([asked]).inputs)
    if "error" in reply:
        return
    alone = out.logits[0][0]
    if reply["text"] != expected or not _same_logits(engine, [asked], alone):
        raise InputError(
            f"{_where(engine)} computes something else here than in transformers' own calls: its replies to the first request "
            f"are {reply['text']!r} and {expected!r}. {REMEDY}"
        )
    other = next((r for r in usable if r.prompt != first.prompt or r.image_path != first.image_path), None)
    if other and engine.plan.batch_size > 1 and not _same_logits(engine, [asked, other], alone):
        raise InputError(f"{_where(engine)} replies otherwise in a batch than alone. Use --batch-size 1.")


def _plain_inputs(engine, request: Request) -> dict:
    """The request's inputs as transformers' chat template and processor make them together."""
    image = {"type": "image", "image": open_image(request.image_path)}
    message = {"role": "user", "content": [image, {"type": "text", "text": request.prompt}]}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return _on_device(engine, engine.preprocessor.processor.apply_chat_template([message], **options))


def _on_device(engine, inputs) -> dict:
    inputs = {name: torch.as_tensor(value).to(engine.device) for name, value in inputs.items()}
    return inputs | {name: value.to(engine.dtype) for name, value in inputs.items() if value.is_floating_point()}


def _same_logits(engine, requests: list[Request], expected: torch.Tensor) -> bool:
    """Whether the first of these requests gets the `expected` logits [V] for its first token, in a batch of them all."""
    prepared = engine.prepare(requests)
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = engine.model.generate(**_on_device(engine, prepared.inputs), **options)
    difference = (out.logits[0][0] - expected).abs().max() / expected.abs().max()
    return bool(difference <= TOLERANCE.get(engine.dtype, HALF_TOLERANCE))
