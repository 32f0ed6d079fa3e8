"""The shapes of Qwen2-VL-7B and 2B, with random weights, on one GPU: PA + PI with the plain loop and with `hf`.

    python benchmarks/gpu.py                       # 256 images of 512 visual tokens each
    python benchmarks/gpu.py --images 64 --batch-size 32
    python benchmarks/gpu.py --only train          # the trainer: the 2B's shape, packed and not

Annotations have 25 tokens and answers 4; see shapes.py. It needs no network. Prints for both the images per second, the
share of time in which the model waits for images, and the MFU: the share of this GPU's bfloat16 matrix product rate,
measured in the same run. Then prints the trainer's samples per second and MFU, with short answers, padded and packed.
The last line is a JSON object.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import shapes
import torch
import train as trainer


def peak_flops(device: str) -> float:
    """Operations per second of a large bfloat16 matrix product."""
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - started)


def generate(args, peak: float) -> dict:
    """PA + PI with the plain loop and with hf, with the share of `peak` that each achieves."""
    edge = 28 * 23  # 529 visual tokens
    with tempfile.TemporaryDirectory() as work:
        figures = shapes.compare(
            *(shapes.QWEN2_VL, Path(work), "cuda:0", "bfloat16", args.images, edge, args.consistent),
            **{"batch_size": args.batch_size, "workers": args.workers},
        )
    for way in ("plain", "our"):
        per_second = (
            figures[f"{way}_images_per_second"]
            * figures["gflops_per_image"]["plain" if way == "plain" else "ours"]
            * 1e9
        )
        figures[f"{way}_share_of_peak"] = per_second / peak
    return figures


def train(n: int, batch: int) -> dict:
    """Samples per second and MFU of the trainer at the 2B's shape, padded and packed, each in its own process."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        trainer.alone(shapes.build, shapes.QWEN2_VL["svlm"], work / "model", "cpu", torch.bfloat16)
        paths = [path for edge in (336, 448, 560) for path in shapes.draw(work / str(edge), n // 3, edge)]
        rows = [(path, "what is in the image?", trainer.ANSWERS[i % 6]) for i, path in enumerate(paths)]
        data = trainer.write_records(work / "train.json", rows)
        job = trainer.Work(str(work / "model"), data, 128 * 28**2, batch, 1e-5, 512 * 28**2)
        for name, flags in (("padded", []), ("packed", ["--packing", "True"])):
            ran = trainer.ours(job, *flags)
            figures[name] = {key: ran[key] for key in ("samples_per_second", "mfu", "peak_bytes")}
    return figures


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=64, help="maximum batch size")
    p.add_argument("--workers", type=int, default=8, help="processes that prepare images")
    p.add_argument(
        "--consistent", type=float, default=0.68, help="share of questions on which the L-VLM agrees with itself"
    )
    p.add_argument("--only", choices=("generate", "train"), help="run only this half")
    p.add_argument("--train-samples", type=int, default=192)
    p.add_argument("--train-batch", type=int, default=8)
    args = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here; pipeline.py --compute-bound is the same for a CPU.")
    peak, figures = peak_flops("cuda:0"), {}
    if args.only != "train":
        figures = generate(args, peak)
    if args.only != "generate":
        figures["trainer"] = train(args.train_samples, args.train_batch)
    figures |= {"device": torch.cuda.get_device_name(0), "bf16_peak_tflops": peak / 1e12, "torch": torch.__version__}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
