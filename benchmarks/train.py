"""The trainer (PL) against TRL's SFTTrainer and transformers' plain Trainer: samples per second, memory, equal losses?

    uv venv ../trl-env && uv pip install --python ../trl-env/bin/python trl==1.16.0 transformers==5.23.0 \\
        torch==2.14.1 torchvision pillow datasets accelerate
    python benchmarks/train.py --trl-python ../trl-env/bin/python              # both shapes, a CPU: some 15 minutes
    python benchmarks/train.py --shape mini --rounds 5                         # without TRL: ours and plain
    python benchmarks/train.py --shape mini --ablate                           # ours, one thing changed at a time

Same model, records, order, batch, steps, learning rate (constant), AdamW and labels; float32 on a CPU, float32 weights
computing in bfloat16 on a GPU. Each training is a process of its own, so that its peak memory is its own. Samples per
second are those of the steps after the first, with fetching. Ours makes samples before step 0 and keeps them, where the
others make them in the step: "ours, unkept" makes them in the step too, and `process_seconds` has imports, loading,
making the samples, and for ours alone the saving. `beyond_state_bytes` is the peak less 16 bytes a parameter (weights,
gradients, AdamW's two averages): activations, logits, and on a CPU the libraries, some 0.8 GB.

Leave the machine alone meanwhile. Torch's threads wait for each other, so that one other process on one of two cores
makes a mini training ten times as slow. `others_cores`, "others" in the table, is how many cores' time other processes
took, at worst; near 0 or the round counts for nothing.

"mini" is the embedded S-VLM with easy-VQA pictures, where what is around the model counts; "wide" is as wide as
Qwen2-VL-2B, vocabulary too, but 4 layers and 4 vision blocks deep, with random weights and 256 visual tokens a picture.
That flatters whoever saves logits and the last layer: `counted` has the shares of a step's operations, and of the bytes that its forward
pass keeps, that ours needs of plain's at this depth, and at the full one (28 and 32), from one layer and one block. `mfu` is ours' operations a
second as a share of a large matrix product's pace here, the best in this run. Prints a table, then one JSON object.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "PL/Qwen2-VL-Finetune/src"))

import psutil
import shapes
import torch
import train_peers
from labelled import Labelled
from report import matmul_peak
from transformers import AutoModelForImageTextToText, AutoProcessor

from mpa.datasets import load_samples
from mpa.prompts import answer_prompt

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "PL/Qwen2-VL-Finetune/src/train.py"
FULL = shapes.QWEN2_VL["svlm"]
WIDE = replace(FULL, layers=4, vision=(1280, 4, 16))
ANSWERS = ("yes", "red", "a circle", "three", "no", "a red triangle")
GPU = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if GPU else "cpu"), torch.bfloat16 if GPU else torch.float32
UNKEPT = ["--cache_gb", "0"]
ABLATIONS = [  # (name, flags that are added to ours)
    ("as it is", []),
    ("samples made in the step", UNKEPT),
    ("the same, by 2 workers", [*UNKEPT, "--dataloader_num_workers", "2"]),
    ("all samples kept", ["--lazy_preprocess", "False"]),
    ("packing", ["--packing", "True"]),
]


@dataclass(frozen=True)
class Work:
    """What is trained: a model's folder, the train JSON, and the settings that all ways share."""

    model: str
    data: str
    pixels: int
    batch: int
    lr: float


def alone(function, *args):
    """`function(*args)` in a process of its own: on Linux a child's peak memory starts from its parent's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def write_records(path: Path, rows: list[tuple[str, str, str]]) -> str:
    records = [
        {
            "id": i,
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{answer_prompt(question)}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for i, (image, question, answer) in enumerate(rows)
    ]
    path.write_text(json.dumps(records))
    return str(path)


def mini(folder: Path) -> Work:
    """512 easy-VQA records, 32 steps."""
    rows = [(s.image_path, s.question, s.answers[0]) for s in load_samples("easyVQA", "train")[:512]]
    return Work(str(ROOT / "data/mini/student"), write_records(folder / "train.json", rows), 3136, 16, 1e-4)


def wide(folder: Path) -> Work:
    """8 records with pictures of noise, 4 steps; some 535 M parameters."""
    paths = shapes.draw(folder, 8, 448)
    rows = [(path, "what is in the picture?", ANSWERS[i % len(ANSWERS)]) for i, path in enumerate(paths)]
    data = write_records(folder / "train.json", rows)
    alone(shapes.build, WIDE, folder / "model", "cpu", torch.float32)
    return Work(str(folder / "model"), data, 448 * 448, 2, 1e-5)


def busy() -> tuple[float, float]:
    """Seconds that this machine's cores have worked, and those of them that this process's ended children have."""
    cores, mine = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return cores.user + cores.nice + cores.system, mine.ru_utime + mine.ru_stime


def run(command: list) -> tuple[str, dict]:
    """What a command prints, its seconds, and how many cores others kept busy meanwhile.

    Raises RuntimeError, with the end of what it said, where it fails.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started, (all_before, mine_before) = time.perf_counter(), busy()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{command[1]} ended with {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    seconds, (all_after, mine_after) = time.perf_counter() - started, busy()
    others = max(0.0, (all_after - all_before) - (mine_after - mine_before)) / seconds
    return done.stdout, {"process_seconds": seconds, "others_cores": others}


def ours(work: Work, *flags: str) -> dict:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, TRAINER, "--model_id", work.model, "--data_path", work.data]
        command += ["--output_dir", out, "--per_device_train_batch_size", work.batch, "--learning_rate", work.lr]
        command += ["--seed", 0]
        if work.pixels:
            command += ["--image_min_pixels", work.pixels, "--image_max_pixels", work.pixels]
        command += ["--lr_scheduler_type", "constant", "--train_sampling_strategy", "sequential", "--report_to", "none"]
        command += ["--logging_steps", 1, "--save_strategy", "no", "--bf16" if GPU else "--use_cpu", "True", *flags]
        _, took = run(command)
        meta = json.loads(Path(out, "train_meta.json").read_text())
        log = json.loads(Path(out, "trainer_state.json").read_text())["log_history"]
    return {
        "samples_per_second": meta["timed"]["samples"] / meta["train_seconds"],
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "peak_bytes": meta["peak_bytes"],
        "mfu": meta["mfu"],
        **took,
    }


def peer(work: Work, way: str, python: str) -> dict:
    with tempfile.TemporaryDirectory() as out:
        command = [python, ROOT / "benchmarks/train_peers.py", "--way", way, "--model", work.model, "--data", work.data]
        command += ["--output", out, "--pixels", work.pixels, "--batch", work.batch, "--lr", work.lr, "--seed", 0]
        printed, took = run(command)
    return {**json.loads(printed.splitlines()[-1]), **took}


def count_step(model, batch: dict, labelled: Labelled | None) -> tuple[float, int]:
    """A step's operations of matrix products and attention, forward and backward; bytes that forward keeps for backward."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    weights, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=train_peers.IGNORE)
            if labelled:
                labelled.choose(following != train_peers.IGNORE)
                following = following[following != train_peers.IGNORE]
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, following.flatten(), ignore_index=train_peers.IGNORE)
            keep(logits)  # cross_entropy keeps its softmax; the logits are alive beside it
        loss.backward()

    return shapes.flops(step), sum(kept.values())


def count(work: Work) -> dict:
    """A step's operations and activations, ours-way and plain, at the depth that is trained here and at the full one.

    Operations with eager attention, since the counter does not see torch's fused one on a CPU; masked scores count as
    work. Bytes with the fused one, in float32. Counted with two layers and two blocks, with one less of each in turn:
    all layers but the last cost the same, all blocks too. "unlabelled" is what ours leaves out.
    """
    processor = AutoProcessor.from_pretrained(work.model)
    processor.image_processor.size = {"shortest_edge": work.pixels, "longest_edge": work.pixels}
    batch = train_peers.Collator(processor)(train_peers.read(work.data, processor)[: work.batch])
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        shapes.build(replace(WIDE, layers=2, vision=(1280, 2, 16)), Path(folder), "cpu", torch.float32)
        for i, (what, attention) in enumerate((("operations", "eager"), ("activation_bytes", "sdpa"))):
            model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention)
            plain = count_step(model, batch, None)[i]
            core, labelled = model.model, Labelled(model)
            both = {"plain": plain, "ours": count_step(model, batch, labelled)[i]}
            layers, core.language_model.layers = core.language_model.layers, core.language_model.layers[1:]
            layer = both["ours"] - count_step(model, batch, labelled)[i]
            core.language_model.layers, core.visual.blocks = layers, core.visual.blocks[:1]
            block = both["ours"] - count_step(model, batch, labelled)[i]
            result[what] = {"layer": layer, "block": block, "unlabelled": both["plain"] - both["ours"]}
            for name, shape in (("here", WIDE), ("full_depth", FULL)):
                more = (shape.layers - 2) * layer + (shape.vision[1] - 2) * block
                at = {way: counted + more for way, counted in both.items()}
                result[what][name] = {**at, "share": at["ours"] / at["plain"]}
    return result


def compare(shape: str, args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        work = {"mini": mini, "wide": wide}[shape](Path(folder))
        if args.ablate:
            known, _ = run([sys.executable, TRAINER, "--help"])
            ways = {
                name: lambda flags=flags: ours(work, *flags)
                for name, flags in ABLATIONS
                if all(word in known for word in flags if word.startswith("--"))
            }
        else:
            ways = {"ours": lambda: ours(work)}
            if shape == "mini":
                ways["ours, unkept"] = lambda: ours(work, *UNKEPT)
            if args.trl_python:
                ways["trl"] = lambda: peer(work, "trl", args.trl_python)
            ways["plain"] = lambda: peer(work, "plain", sys.executable)
        results, peak = {name: [] for name in ways}, 0.0
        for _ in range(args.rounds):
            peak = max(peak, matmul_peak(DEVICE, DTYPE))
            for name, way in ways.items():
                results[name].append(way())
                print(f"{shape}, {name}: {results[name][-1]['samples_per_second']:.2f} samples/s", file=sys.stderr)
        operations = alone(count, work) if shape == "wide" else None
    return summary(results, work.batch, peak, operations)


def summary(results: dict[str, list[dict]], batch: int, peak: float, operations: dict | None) -> dict:
    """Medians of the rounds, ratios to the first way, and the largest difference of a step's loss to the last way's."""
    parameters = next((r["parameters"] for rounds in results.values() for r in rounds if "parameters" in r), None)
    names, figures = list(results), {"matmul_gflops": peak / 1e9, "parameters": parameters, "ways": {}}
    for name, rounds in results.items():
        measured = ("samples_per_second", "process_seconds", "peak_bytes")
        way = {key: statistics.median(r[key] for r in rounds) for key in measured}
        way["others_cores"] = max(r["others_cores"] for r in rounds)
        way["rounds"] = [round(r["samples_per_second"], 3) for r in rounds]
        ratios = [
            a["samples_per_second"] / b["samples_per_second"] for a, b in zip(results[names[0]], rounds, strict=True)
        ]
        way["first_is_faster_by"] = statistics.median(ratios)
        way["beyond_state_bytes"] = way["peak_bytes"] - 16 * parameters if parameters else None
        way["losses"] = rounds[0]["losses"]
        other = results[names[-1]][0]["losses"]
        way["loss_difference"] = max(abs(a - b) for a, b in zip(way["losses"], other, strict=True))
        figures["ways"][name] = way
    if operations:
        pace = figures["ways"][names[0]]["samples_per_second"] * operations["operations"]["here"]["ours"] / batch
        figures |= {"counted": operations, "mfu": pace / peak}
    return figures


def table(shape: str, figures: dict) -> str:
    heads = (
        f"{'samples/s':>10}{'first is':>10}{'process s':>11}{'peak MB':>9}{'beyond':>9}{'loss diff':>11}{'others':>8}"
    )
    lines = [f"{shape:26}{heads}"]
    for name, way in figures["ways"].items():
        beyond = "" if way["beyond_state_bytes"] is None else f"{way['beyond_state_bytes'] / 1e6:.0f}"
        lines.append(
            f"{name:26}{way['samples_per_second']:10.2f}{way['first_is_faster_by']:9.2f}x{way['process_seconds']:11.1f}"
            f"{way['peak_bytes'] / 1e6:9.0f}{beyond:>9}{way['loss_difference']:11.1e}"
            f"{way['others_cores']:8.2f}"
        )
    return "\n".join(lines)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=("mini", "wide", "both"), default="both")
    p.add_argument("--rounds", type=int, default=3, help="each way in turn so often; the median counts")
    p.add_argument("--trl-python", default="", help="interpreter that has TRL; without it TRL is left out")
    p.add_argument("--ablate", action="store_true", help="ours alone, with one flag changed at a time")
    args = p.parse_args(argv)
    device = torch.cuda.get_device_name(0) if GPU else f"CPU, {os.cpu_count()} cores"
    figures = {
        "device": device,
        "dtype": str(DTYPE),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
    }
    for shape in ("mini", "wide") if args.shape == "both" else (args.shape,):
        figures[shape] = compare(shape, args)
        print(table(shape, figures[shape]))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
