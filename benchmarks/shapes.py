"""PA + PI with models of a given shape and random weights: the plain loop against the hf engine, with fixed lengths.

Random models write no meaningful replies. So every annotation has `ANNOTATION` tokens and every answer `ANSWER`, and
the L-VLM counts as consistent on the first `consistent` share of the images; PI asks the S-VLM only about these. The plain
loop asks it about all. Used by pipeline.py (a compute-bound shape) and gpu.py (Qwen2-VL-7B's and 2B's shapes).
"""

import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

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
QWEN2_VL = {
    "lvlm": Shape(3584, 18944, 28, 28, 4, (1280, 32, 16), 152064, False),
    "svlm": Shape(1536, 8960, 28, 12, 2, (1280, 32, 16), 151936, True),
}


def build(shape: Shape, folder: Path, device: str, dtype) -> int:
    """Write a random model of this shape, and a processor, to `folder`. Returns the number of parameters."""
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
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
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


class PlainLoop:
    """Like the released code: batches of 8 and 4 in file order, images read between them, both models in memory."""

    def __init__(self, folders: dict[str, Path], device: str, dtype, pixels: int):
        self.device, self.dtype = device, dtype
        self.models = {who: loading.load_model(str(folder), device, dtype) for who, folder in folders.items()}
        self.processor = loading.load_processor(str(folders["lvlm"]), pixels, pixels)

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


def ours(
    folders: dict[str, Path], device: str, dtype: str, pixels: int, paths: list[str], share: float, **engine
) -> dict:
    """PA with its follow-up, then the S-VLM on a share of the images. Returns texts, seconds and the waiting share."""
    result, waited, started = {}, {}, time.perf_counter()
    settings = {"device": device, "dtype": dtype, "min_pixels": pixels, "max_pixels": pixels, **engine}
    asked = [Request(str(i), path, TASK, follow_up="paper") for i, path in enumerate(paths)]
    engines.follow_up_prompt = lambda text, preset, marks: QUESTION  # before the workers are forked
    engines.cut_off = lambda reply: None  # random weights never finish a line
    with Forced(str(folders["lvlm"]), **settings) as engine:
        replies = {r["key"]: r for batch in engine.generate(asked) for r in batch}
        waited["lvlm"] = engine.facts()["waited"]
    result["annotations"] = [replies[str(i)]["text"] for i in range(len(paths))]
    result["lvlm"] = [replies[str(i)]["follow_up"]["text"] for i in range(len(paths))]
    again = [Request(str(i), path, QUESTION) for i, path in enumerate(paths[: round(share * len(paths))])]
    with Forced(str(folders["svlm"]), **settings) as engine:
        replies = {r["key"]: r for batch in engine.generate(again) for r in batch}
        waited["svlm"] = engine.facts()["waited"]
    result["svlm"] = [replies[r.key]["text"] for r in again]
    return {"texts": result, "seconds": time.perf_counter() - started, "waited": waited}


def plain(folders: dict[str, Path], device: str, dtype, pixels: int, paths: list[str], few: list[str]):
    """The plain loop's texts, its seconds with loading, and its operations per image, counted on a few images."""
    started = time.perf_counter()
    loop = PlainLoop(folders, device, dtype, pixels)
    rows = loop.run(paths)
    seconds = time.perf_counter() - started
    decode = loop.processor.tokenizer.batch_decode
    texts = {name: decode(written, skip_special_tokens=True) for name, written in rows.items()}
    return texts, seconds, flops(lambda: loop.run(few)) / len(few)


def flops(work) -> float:
    """Floating-point operations of the matrix products and attention in `work()`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def compare(
    shape: dict[str, Shape], work: Path, device: str, dtype: str, n: int, edge: int, share: float, **engine
) -> dict:
    """Compare both on n images of `edge` pixels, with loading: seconds, operations, equal outputs, waiting share."""
    torch_dtype, pixels, folders, parameters = getattr(torch, dtype), edge * edge, {}, {}
    for who, sizes in shape.items():
        folders[who] = work / who
        parameters[who] = build(sizes, folders[who], device, torch_dtype)
    paths = draw(work, n, edge)
    few = paths[:2]
    plain_texts, plain_seconds, plain_flops = plain(folders, device, torch_dtype, pixels, paths, few)

    mine = ours(folders, device, dtype, pixels, paths, share, **engine)
    inside = {**engine, "workers": 0}  # operations are counted in this process
    our_flops = flops(lambda: ours(folders, device, dtype, pixels, few, share, **inside)) / len(few)
    same = {
        name: sum(a == b for a, b in zip(plain_texts[name], texts, strict=False)) / len(texts)
        for name, texts in mine["texts"].items()
    }
    return {
        "parameters": parameters,
        "images": n,
        "plain_images_per_second": n / plain_seconds,
        "our_images_per_second": n / mine["seconds"],
        "share_of_time": mine["seconds"] / plain_seconds,
        "share_of_flops": our_flops / plain_flops,
        "pace_ratio": (our_flops / mine["seconds"])
        / (plain_flops / plain_seconds),  # operations per second, ours to plain
        "gflops_per_image": {"plain": plain_flops / 1e9, "ours": our_flops / 1e9},
        "waited": mine["waited"],
        "equal": same,
    }
