"""The figures of README's "What you need": speed, time and memory on GPUs, estimated from data sheets. None was measured.

    python benchmarks/estimate.py                            # the lines in README.md
    python benchmarks/estimate.py --visual-tokens 1024       # for larger images
    python benchmarks/estimate.py --gpu 48 181 864           # a card: GB, TFLOP/s in bfloat16 (dense), GB/s

A forward pass over a batch takes the longest of three times:

    arithmetic   its operations at MFU of the card's rate. A prompt has 2 operations per weight and position, and 4 per pair of
                 positions and channel in attention; the vision tower has 4 positions for each visual token.
    memory       the weights and the batch's key-values, read at BANDWIDTH of the card's
    launching    LAUNCH for each layer, while Python starts its kernels; vLLM replays recorded ones instead

A batch is one pass over the prompts, then one for each token; PA's follow-up adds the text of the question and its tokens. vLLM
has as many requests under way as its cache holds, 256 at most. A training step has three times the operations of a
forward pass, and twice its launches. Loading, start-up, and images that come too slowly are left out.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shapes
import torch
from transformers import AutoModelForImageTextToText

from mpa.engines.batch_plan import GPU_ROWS
from mpa.engines.memory import MEMORY_SHARE
from mpa.engines.vllm_model import MAX_IN_FLIGHT
from mpa.files.printable import as_size
from mpa.models import memory_estimate
from mpa.models.memory_estimate import Batch, Sharding

# Assumptions, and where they come from. Llama 3's training reached an MFU of 0.38 to 0.43 on H100s (arXiv 2407.21783, table 4);
# in hf and PL it is taken to be less, since norms, rotations and activations are kernels of their own.
MFU = {"hf": 0.3, "vllm": 0.4}
BANDWIDTH = 0.7  # gpt-fast's 7B reads 0.72 of an A100's (pytorch.org/blog/accelerating-generative-ai-2)
# Seconds. transformers' benchmark of gemma-2b, of 18 layers, has 19.7 ms per token without torch.compile
# (huggingface.co/datasets/hf-internal-testing/benchmark_results); gpt-fast's first version has 39 ms with 32 layers.
LAUNCH = 1.1e-3
VISUAL, PROMPT, QUESTION = 512, 100, 30  # tokens of an image, of PA's prompt, and of a question with its prompt
CONSISTENT = 0.7  # of the L-VLM's questions, which the S-VLM is asked
PARITY = 0.1  # of the images become train samples; the paper has some 2,000 of TextVQA's 21,953
MICRO_BATCH = 2  # of PL.sh
GPT4O = (1650 * 2.5 + 35 * 10) / 1e6  # dollars per image: 1,650 tokens in, 35 out


@dataclass(frozen=True)
class Card:
    """A data sheet: GB, TFLOP/s of dense matrix products in the dtype that is used, GB/s, and the bytes of this dtype."""

    memory: float
    tflops: float
    bandwidth: float
    itemsize: int = 2  # bfloat16


CARDS = {
    "T4, float32": Card(16, 8.1, 320, itemsize=4),  # it has no bfloat16, and Qwen2-VL overflows in float16
    "L4": Card(24, 121, 300),
    "RTX 4090": Card(24, 165, 1008),
    "A100": Card(80, 312, 2039),
    "H100": Card(80, 989, 3350),
}
# (images of PA and PI, test questions)
WORK = {"textVQA": (21953, 5000), "stVQA": (16100, 2413), "chartVQA": (18317, 2500), "okVQA": (8998, 5046)}
BATCHES = (8, GPU_ROWS)  # rows of hf, at most


class Model:
    """The sizes of a Qwen2-VL, from its configuration."""

    def __init__(self, shape: shapes.Shape):
        self.shape = shape
        with torch.device("meta"):
            self.meta = AutoModelForImageTextToText.from_config(shapes.configuration(shape), dtype=torch.bfloat16)

        def weights(module) -> int:
            return sum(weight.numel() for weight in module.parameters())

        visual, text = self.meta.model.visual, self.meta.model.language_model
        self.merger, self.layers = weights(visual.merger), weights(text.layers)
        self.vision, self.head = weights(visual) - self.merger, weights(self.meta.get_output_embeddings())

    def row_bytes(self, visual: int, text: int, new: int, itemsize: int = 2) -> dict[str, int]:
        """Bytes by purpose: the weights, and what a row of a batch adds."""
        pixels = 4 * visual * 3 * 2 * 14**2 * 4  # float32, two frames
        row = Batch(1, visual + text, 4 * visual, pixels, new_tokens=new)
        return memory_estimate.generation(self.meta, row, itemsize)

    def prompt_flops(self, visual: int, text: int) -> float:
        """Operations of a forward pass over an image and text."""
        (width, depth, _), tokens, patches = self.shape.vision, visual + text, 4 * visual
        tower = 2 * self.vision * patches + 4 * depth * width * patches**2 + 2 * self.merger * visual
        attention = 4 * self.shape.layers * self.shape.hidden * tokens**2
        return tower + 2 * self.layers * tokens + attention + 2 * self.head

    def token_flops(self) -> float:
        return 2.0 * (self.layers + self.head)

    def trained_bytes(self, visual: int) -> int:
        """Bytes of a full fine-tuning on one GPU, as PL.sh runs it: weights, gradients, optimizer state and activations."""
        states = memory_estimate.states(self.meta, 2, Sharding(2, 1))
        tokens = visual + QUESTION + shapes.ANSWER
        batch = Batch(MICRO_BATCH, MICRO_BATCH * tokens, 4 * visual * MICRO_BATCH, labelled=MICRO_BATCH * shapes.ANSWER)
        return sum(states.values()) + memory_estimate.saved_bytes(self.meta, batch, 2, memory_estimate.ALL)


@cache
def paper_model(who: str) -> Model:
    """ "lvlm": the 7B, "svlm": the 2B."""
    return Model(shapes.QWEN2_VL[who])


def pass_seconds(card: Card, engine: str, flops: float, read: float, layers: int) -> float:
    launching = layers * LAUNCH if engine == "hf" else 0
    return max(flops / (card.tflops * 1e12 * MFU[engine]), read / (card.bandwidth * 1e9 * BANDWIDTH), launching)


@dataclass(frozen=True)
class Asked:
    """A request: tokens of its image, text and reply, and whether its follow-up is asked too."""

    visual: int
    text: int
    new: int
    follow_up: bool = False


def images_per_second(card: Card, model: Model, asked: Asked, engine: str, rows: int) -> float:
    """Of `rows` requests at a time, or as many as the memory holds; 0 if not one fits into it."""
    held = model.row_bytes(asked.visual, asked.text, asked.new, card.itemsize)
    weights, cached, passing = held["weights"], held["key-values"], held["activations"]
    free = MEMORY_SHARE * (card.memory * 1e9 - weights)
    rows = min(rows, int(free / (cached + passing if engine == "hf" else cached)))
    if rows < 1:
        return 0.0
    text, vision = model.shape.layers, model.shape.vision[1]
    read = weights + rows * cached
    seconds = pass_seconds(card, engine, rows * model.prompt_flops(asked.visual, asked.text), weights, text + vision)
    steps = asked.new
    if asked.follow_up:
        seconds += pass_seconds(card, engine, rows * model.prompt_flops(0, QUESTION), read, text)
        steps += shapes.ANSWER
    return rows / (seconds + steps * pass_seconds(card, engine, rows * model.token_flops(), read, text))


def samples_per_second(card: Card, visual: int) -> float:
    """Of PL, which fine-tunes all of the S-VLM on one GPU; 0 if it does not fit."""
    model = paper_model("svlm")
    if model.trained_bytes(visual) > card.memory * 1e9:
        return 0.0
    flops = 3 * MICRO_BATCH * model.prompt_flops(visual, QUESTION + shapes.ANSWER)
    layers = 2 * (model.shape.layers + model.shape.vision[1])
    return MICRO_BATCH / pass_seconds(card, "hf", flops, 0, layers)


def paces(card: Card, visual: int, engine: str, rows: int | None = None) -> dict[str, float]:
    """Images or questions per second, by what is asked; with `rows` at a time, None: as many as the engine takes by itself."""
    rows = rows or {"hf": BATCHES[-1], "vllm": MAX_IN_FLIGHT["gpu"]}[engine]
    annotation = Asked(visual, PROMPT, shapes.ANNOTATION, follow_up=True)
    answer = Asked(visual, QUESTION, shapes.ANSWER)
    return {
        "annotation": images_per_second(card, paper_model("lvlm"), annotation, engine, rows),
        "L-VLM": images_per_second(card, paper_model("lvlm"), answer, engine, rows),
        "S-VLM": images_per_second(card, paper_model("svlm"), answer, engine, rows),
    }


def hours(card: Card, visual: int, dataset: str, engine: str) -> float:
    """Of PA, PI, and evaluate with three models; infinite if a model does not fit."""
    pace, (images, questions) = paces(card, visual, engine), WORK[dataset]
    if not all(pace.values()):
        return math.inf
    seconds = images * (1 / pace["annotation"] + CONSISTENT / pace["S-VLM"])
    return (seconds + questions * (2 / pace["S-VLM"] + 1 / pace["L-VLM"])) / 3600


# --- as text --------------------------------------------------------------------------------------------


def told(value: float) -> str:
    """Two digits; "–" for what does not fit."""
    return "–" if value in (0, math.inf) else f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"


def table(cards: dict[str, Card], visual: int) -> list[str]:
    lines = [
        "| GPU | PA, images/s: hf, batch 8 | hf | vllm | PL, samples/s | textVQA, hours: hf | vllm | all four, hours: hf | vllm |",
        f"|{' --- |' * 9}",
    ]
    for name, card in cards.items():
        figures = [
            *(paces(card, visual, "hf", rows)["annotation"] for rows in BATCHES),
            paces(card, visual, "vllm")["annotation"],
            samples_per_second(card, visual),
            *(hours(card, visual, "textVQA", engine) for engine in MFU),
            *(sum(hours(card, visual, dataset, engine) for dataset in WORK) for engine in MFU),
        ]
        lines.append(f"| {' | '.join([f'{name}, {card.memory:g} GB', *map(told, figures)])} |")
    return lines


def memory(visual: int) -> list[str]:
    needs = []
    for who in shapes.QWEN2_VL:
        held = paper_model(who).row_bytes(visual, PROMPT, shapes.ANNOTATION)
        needs += [as_size(held["weights"]), as_size(held["key-values"] + held["activations"])]
    trained = as_size(paper_model("svlm").trained_bytes(visual))
    text = "- **GPU memory**, est.: the 7B takes {}, and {} for each row of a batch; the 2B {} and {}; PL {}, over all GPUs."
    return [text.format(*needs, trained)]


def price() -> list[str]:
    costs = ", ".join(f"$ {images * GPT4O:.0f} for {dataset}" for dataset, (images, _) in WORK.items())
    return [f"- **GPT-4o** for PA and PI, est.: {costs}; half with `--batch`."]


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--visual-tokens", type=int, default=VISUAL, help="of an image (default: %(default)s)")
    p.add_argument("--gpu", type=float, nargs=3, metavar=("GB", "TFLOPS", "GB/S"), help="another card")
    args = p.parse_args(argv)
    cards = {"this GPU": Card(*args.gpu)} if args.gpu else CARDS
    print(*table(cards, args.visual_tokens), *memory(args.visual_tokens), *price(), sep="\n")


if __name__ == "__main__":
    main()
