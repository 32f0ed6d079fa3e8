"""The shapes of Qwen2-VL-7B and 2B, with random weights, on one GPU: PA + PI with the plain loop and with `hf`, and PL.

    python benchmarks/gpu.py                          # 256 images of 529 visual tokens each
    python benchmarks/gpu.py --shape small            # some minutes, for a GPU of 8 GB and more
    python benchmarks/gpu.py --only train             # PL of the 2B's shape, padded and packed

Annotations have 25 tokens and answers 4; see shapes.py. It needs no network. Each part runs in its own process on the first
visible GPU, and its figures are printed as soon as they are known: images per second, without loading; the share of time
in which the model waits for images; PL's samples per second, as PL.sh trains, with short answers; and the MFU, the share of
this GPU's rate in matrix products of the same dtype. The last line is a JSON object. Where a part fails, its "failed" has
the reason, the other parts run all the same, and the exit code is 1.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import shapes
import torch
import train as trainer
from throughput import peak_matmul_flops

from mpa.files.printable import printable
from mpa.files.records import InputError
from mpa.models import loading

# (the pair, the edge of an image in units of one visual token)
SHAPES = {
    "paper": (shapes.QWEN2_VL, 23),
    "small": ({"lvlm": shapes.QWEN2_VL["svlm"], "svlm": shapes.COMPUTE_BOUND["lvlm"]}, 23),
    "tiny": (shapes.TINY, 4),
}


class Figures(dict):
    """{part: its figures}. Each is printed when it is measured; why a part failed is in "failed"."""

    def attempt(self, part: str, function: Callable, *args):
        """`function(*args)` in its own process; None if it fails: whatever ends one part must not end the others."""
        try:
            return trainer.alone(function, *args)
        except Exception as error:
            self.setdefault("failed", {})[part] = f"{type(error).__name__}: {error}"
            print(f"{part}: FAILED: {printable(self['failed'][part])}", flush=True)
            return None

    def measure(self, part: str, function: Callable[..., dict], *args) -> dict | None:
        """`attempt`, whose figures, without texts, are added."""
        found = self.attempt(part, function, *args)
        if found:
            self.add(part, {name: value for name, value in found.items() if name != "texts"})
        return found

    def add(self, part: str, figures: dict) -> None:
        self.setdefault(part, {}).update(figures)
        told = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        )
        print(f"{part}: {', '.join(told)}", flush=True)


def device_facts(device: str) -> dict:
    """The device's name, the dtype that is used on it, and its operations per second in a large matrix product."""
    dtype = loading.resolved_dtype("auto", device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    peak = peak_matmul_flops(torch.device(device), getattr(torch, dtype))
    return {"name": name, "dtype": dtype, "torch": torch.__version__, "matmul_flops": peak}


def generate(figures: Figures, job: shapes.Job, peak: float) -> None:
    """PA + PI with the plain loop and with hf: images per second, and the share of `peak`."""
    counted = figures.measure("operations per image", shapes.operations, job)
    ran = {}
    for way, key, function in (("plain loop", "plain", shapes.plain), ("hf", "ours", shapes.ours)):
        if found := figures.measure(way, function, job):
            ran[key] = found
            pace = {"images_per_second": len(job.paths) / found["seconds"]}
            if counted:
                pace["mfu"] = pace["images_per_second"] * counted[key] / peak
            figures.add(way, pace)
    if counted and len(ran) == 2:
        figures.add("hf, relative to the plain loop", shapes.ratios(counted, ran["plain"], ran["ours"]))


def train(figures: Figures, model: str, work: Path, edge: int, samples: int, batch: int) -> None:
    """The trainer's samples per second and MFU, padded and packed. Images have a quarter to three quarters of edge²."""
    edges = [28 * round(edge * share) for share in (0.5, 0.7, 0.87)]
    paths = [path for size in edges for path in shapes.draw(work / str(size), samples // 3, size)]
    rows = [(path, "what is in the image?", trainer.ANSWERS[i % 6]) for i, path in enumerate(paths)]
    job = trainer.Work(model, trainer.write_records(work / "train.json", rows), 3136, batch, 1e-5, (28 * edge) ** 2)
    for name, flags in (("padded", []), ("packed", ["--packing", "True"])):
        figures.measure(f"trainer, {name}", trained, job, flags)


def trained(job: trainer.Work, flags: list[str]) -> dict:
    ran = trainer.ours(job, *flags, launched=True)
    return {key: ran[key] for key in ("samples_per_second", "mfu", "peak_bytes")}


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--shape", choices=SHAPES, default="paper", help="the pair's (default: 7B and 2B); small: 2B and 140 M"
    )
    p.add_argument("--images", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=64, help="maximum batch size")
    p.add_argument("--workers", type=int, default=8, help="processes that prepare images")
    p.add_argument(
        "--consistent", type=float, default=0.68, help="share of questions on which the L-VLM agrees with itself"
    )
    p.add_argument("--only", choices=("generate", "train"), help="run only this half")
    p.add_argument("--train-samples", type=int, default=192)
    p.add_argument("--train-batch", type=int, default=8)
    p.add_argument("--device", choices=("cuda:0", "cpu"), default="cuda:0", help="cpu: only to try this command")
    args = p.parse_args(argv)
    try:
        device = loading.pick_device(args.device)
    except InputError as error:
        sys.exit(f"error: {error} pipeline.py --compute-bound is the same for a CPU.")
    figures, (pair, edge) = Figures(), SHAPES[args.shape]
    if args.only == "train":
        pair = {"svlm": pair["svlm"]}
    with tempfile.TemporaryDirectory() as place:
        work, limits = Path(place), (args.consistent, args.batch_size, args.workers)
        if facts := figures.measure("device", device_facts, device):
            made = pair, work, device, facts["dtype"], args.images, 28 * edge, *limits
            if job := figures.attempt("models", shapes.prepare, *made):
                if args.only != "train":
                    generate(figures, job, facts["matmul_flops"])
                if args.only != "generate":
                    train(figures, job.folders["svlm"], work, edge, args.train_samples, args.train_batch)
    print(json.dumps(figures))
    return int("failed" in figures)


if __name__ == "__main__":
    sys.exit(main())
