"""PA + PI with models of a given shape and random weights: the plain loop against the hf engine, with fixed lengths.

Random models write no meaningful replies. So every annotation has `ANNOTATION` tokens and every answer `ANSWER`, and
the L-VLM counts as consistent on the first `consistent` share of the images; PI asks the S-VLM only about these. The plain
loop asks it about all. Loading, and with it the probe of a GPU's memory, is neither timed nor counted. Used by pipeline.py
(a compute-bound shape), gpu.py and estimate.py (Qwen2-VL-7B's and 2B's shapes).
"""

import contextlib
import gc
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from mpa import engines
from mpa.engines import Request, hf
from mpa.method.prompts import TASK_PROMPTS, answer_prompt
from mpa.models import loading

TEACHER = Path(__file__).resolve().parents[1] / "data/mini/teacher"
ANNOTATION, ANSWER = 25, 4  # tokens
TASK, QUESTION = TASK_PROMPTS["general"], answer_prompt("what is the shape in the middle of the image?")
NEVER = 10**9  # not a token id: generation never ends early


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2-VL; `vision` is (width, depth, heads)."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vision: tuple[int, int, int]
    vocabulary: int
    tied: bool
    mlp_ratio: int = 4


COMPUTE_BOUND = {  # some 150 M and 40 M parameters
    "lvlm": Shape(896, 3072, 12, 14, 2, (384, 8, 6), 560, True),
    "svlm": Shape(512, 1792, 9, 8, 2, (256, 6, 4), 560, True),
}
TINY = {  # for tests
    "lvlm": Shape(64, 128, 2, 4, 2, (32, 2, 2), 560, True),
    "svlm": Shape(32, 64, 2, 2, 2, (32, 2, 2), 560, True),
}
QWEN2_VL = {
    "lvlm": Shape(3584, 18944, 28, 28, 4, (1280, 32, 16), 152064, False),
    "svlm": Shape(1536, 8960, 28, 12, 2, (1280, 32, 16), 151936, True),
}


def configuration(shape: Shape):
    """A Qwen2-VL's configuration of this shape."""
    config = AutoConfig.from_pretrained(TEACHER)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = shape.hidden, shape.inner, shape.layers
    text.num_attention_heads, text.num_key_value_heads = shape.heads, shape.kv_heads
    text.layer_types, text.max_window_layers = ["full_attention"] * shape.layers, shape.layers
    text.vocab_size, text.tie_word_embeddings, config.tie_word_embeddings = shape.vocabulary, shape.tied, shape.tied
    half = shape.hidden // shape.heads // 2
    text.rope_parameters["mrope_section"] = [half // 4, (half - half // 4) // 2, (half - half // 4) // 2]
    vision.embed_dim, vision.depth, vision.num_heads = shape.vision
    vision.hidden_size, vision.mlp_ratio = shape.hidden, shape.mlp_ratio
    return config


def build(shape: Shape, folder: Path, device: str, dtype) -> int:
    """Write a random model of this shape, and a processor, to `folder`. Returns the number of parameters."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(configuration(shape), dtype=dtype)
    with torch.no_grad():  # only tokens of the small tokenizer can be the likeliest
        model.get_output_embeddings().weight[560:] = 0
    model.save_pretrained(folder)
    for file in TEACHER.iterdir():
        if file.name not in ("model.safetensors", "config.json", "train_log.json"):
            shutil.copy(file, folder)
    return sum(p.numel() for p in model.parameters())


def draw(folder: Path, n: int, edge: int) -> list[str]:
    """n images of noise, `edge` x `edge` pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{i:04}.jpg") for i in range(n)]
    for path in paths:
        Image.effect_noise((edge, edge), 60).convert("RGB").save(path)
    return paths


@dataclass(frozen=True)
class Job:
    """What both are asked: folders of "lvlm" and "svlm", images of `pixels`, the consistent share, and hf's limits."""

    folders: dict[str, str]
    device: str
    dtype: str
    pixels: int
    paths: list[str]
    consistent: float
    batch_size: int
    workers: int | None


def prepare(shape: dict[str, Shape], work: Path, device: str, dtype: str, images: int, edge: int, *limits) -> Job:
    """Build the models and draw the images, `edge` x `edge` pixels, in the folder `work`. `limits` are Job's last three."""
    for who, sizes in shape.items():
        build(sizes, work / who, device, getattr(torch, dtype))
    folders = {who: str(work / who) for who in shape}
    return Job(folders, device, dtype, edge * edge, draw(work, images, edge), *limits)


class PlainLoop:
    """Like the released code: batches of 8 and 4 in file order, images read between them, both models in memory."""

    def __init__(self, job: Job):
        self.device, self.dtype = job.device, getattr(torch, job.dtype)
        self.models = {who: loading.load_model(path, self.device, self.dtype) for who, path in job.folders.items()}
        self.processor = loading.load_processor(job.folders["lvlm"], job.pixels, job.pixels)

    @torch.inference_mode()
    def replies(self, who: str, paths: list[str], prompt: str, tokens: int, batch_size: int) -> list[list[int]]:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        written = []
        for start in range(0, len(paths), batch_size):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + batch_size]]
            inputs = self.processor(text=[text] * len(images), images=images, padding=True, return_tensors="pt")
            inputs = inputs.to(self.device, self.dtype)
            out = self.models[who].generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=NEVER)
            written += out[:, inputs["input_ids"].shape[1] :].tolist()
        return written

    def run(self, paths: list[str]) -> dict[str, list]:
        """The tokens of each reply, by part."""
        return {
            "annotations": self.replies("lvlm", paths, TASK, ANNOTATION, 8),
            "lvlm": self.replies("lvlm", paths, QUESTION, ANSWER, 4),
            "svlm": self.replies("svlm", paths, QUESTION, ANSWER, 4),
        }


class Forced(hf.HFEngine):
    """The hf engine, with fixed reply lengths."""

    def _load_model(self):
        super()._load_model()
        self.model.generation_config.eos_token_id = NEVER

    def _generate(self, requests, *more):
        tokens = ANSWER if requests[0].prompt == QUESTION else ANNOTATION
        return super()._generate([replace(r, max_new_tokens=tokens, stop="") for r in requests], *more)


@contextlib.contextmanager
def loaded(job: Job, who: str, asked: list[Request], workers: int | None):
    """The engine of one model, which has answered one request. Annotations are followed by QUESTION, whatever they say."""
    gc.collect()
    torch.cuda.empty_cache()  # of an earlier model
    # Random weights never finish a line. Patched before the workers are forked.
    always = mock.patch.multiple(engines, follow_up_prompt=lambda *_: QUESTION, cut_off=lambda reply: None)
    limits = {"min_pixels": job.pixels, "max_pixels": job.pixels, "batch_size": job.batch_size}
    with always, Forced(job.folders[who], device=job.device, dtype=job.dtype, workers=workers, **limits) as engine:
        list(engine.generate(asked[:1]))
        engine.wait_seconds = engine.model_seconds = 0.0
        yield engine


def requests(job: Job) -> dict[str, list[Request]]:
    """PA's of the L-VLM, each with its follow-up; PI's of the S-VLM, about the images that count as consistent."""
    few = job.paths[: round(job.consistent * len(job.paths))]
    return {
        "lvlm": [Request(str(i), path, TASK, follow_up="paper") for i, path in enumerate(job.paths)],
        "svlm": [Request(str(i), path, QUESTION) for i, path in enumerate(few)],
    }


def ours(job: Job) -> dict:
    """PA with its follow-up, then the S-VLM: {"texts", "seconds", "loading" with a warm-up, "waited"}."""
    texts, waited, seconds, loading_seconds = {}, {}, 0.0, 0.0
    for who, asked in requests(job).items():
        started = time.perf_counter()
        with loaded(job, who, asked, job.workers) as engine:
            ready = time.perf_counter()
            found = {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}
            seconds += time.perf_counter() - ready
            waited[who] = engine.facts()["waited"]
        loading_seconds += ready - started
        replies = [found[request.key] for request in asked]
        if failed := [reply["error"] for reply in replies if "error" in reply]:
            raise RuntimeError(f"{who}: {len(failed)} of {len(replies)} replies failed, the first: {failed[0]}")
        texts["annotations" if who == "lvlm" else who] = [reply["text"] for reply in replies]
        if who == "lvlm":
            texts[who] = [reply["follow_up"]["text"] for reply in replies]
    return {"texts": texts, "seconds": seconds, "loading": loading_seconds, "waited": waited}


def plain(job: Job) -> dict:
    """The plain loop: {"texts", "seconds", "loading"}; loading includes a warm-up."""
    started = time.perf_counter()
    loop = PlainLoop(job)
    loop.run(job.paths[:1])
    ready = time.perf_counter()
    rows = loop.run(job.paths)
    done, decode = time.perf_counter(), loop.processor.tokenizer.batch_decode
    texts = {name: decode(written, skip_special_tokens=True) for name, written in rows.items()}
    return {"texts": texts, "seconds": done - ready, "loading": ready - started}


def flops(work) -> float:
    """Floating-point operations of the matrix products and attention in `work()`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def operations(job: Job) -> dict[str, float]:
    """Operations per image of both, {"plain", "ours"}, counted on two images, in this process."""
    few = replace(job, paths=job.paths[:2], consistent=1.0)
    counted = {"plain": flops(partial(PlainLoop(few).run, few.paths)) / 2, "ours": 0.0}
    for who, asked in requests(few).items():
        with loaded(few, who, asked, workers=0) as engine:
            share = 1.0 if who == "lvlm" else job.consistent
            counted["ours"] += share * flops(partial(list, engine.generate(asked))) / 2
    return counted


def ratios(counted: dict, theirs: dict, mine: dict) -> dict:
    """Ours relative to the plain loop's: time, operations, operations per second; and the shares of equal texts."""
    time_share, flops_share = mine["seconds"] / theirs["seconds"], counted["ours"] / counted["plain"]
    equal = {
        name: sum(a == b for a, b in zip(theirs["texts"][name], texts, strict=False)) / len(texts)
        for name, texts in mine["texts"].items()
    }
    pace = {"share_of_time": time_share, "share_of_flops": flops_share, "pace_ratio": flops_share / time_share}
    return pace | {"equal": equal}


def compare(job: Job) -> dict:
    """Both on the same images, one after the other."""
    counted, theirs, mine = operations(job), plain(job), ours(job)
    return {
        "images": len(job.paths),
        "plain_images_per_second": len(job.paths) / theirs["seconds"],
        "our_images_per_second": len(job.paths) / mine["seconds"],
        "gflops_per_image": {way: each / 1e9 for way, each in counted.items()},
        "waited": mine["waited"],
        **ratios(counted, theirs, mine),
    }
