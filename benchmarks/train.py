"""The trainer (PL) against TRL's SFTTrainer and transformers' plain Trainer: speed, memory, and equality of losses.

    uv venv ../trl-env && uv pip install --python ../trl-env/bin/python trl==1.16.0 transformers==5.23.0 \\
        torch==2.14.1 torchvision pillow datasets accelerate
    python benchmarks/train.py --trl-python ../trl-env/bin/python              # both shapes; about 15 minutes on a CPU
    python benchmarks/train.py --shape mini --rounds 5                         # without TRL: ours and plain
    python benchmarks/train.py --shape mini --ablate     # ours only, images of several sizes, one change at a time

All use the same model, records, order, batch size, steps, constant learning rate, AdamW and labels. Weights are float32;
a CPU computes in float32, a GPU in bfloat16. Each training runs in its own process, to measure its peak memory.

`samples_per_second` covers all steps except the first, including data loading. All encode the samples in the
step; ours has also encoded each of them before step 0, to check it. `process_seconds` includes imports, loading,
this check, and only for ours saving. `beyond_state_bytes` is the peak minus 16 bytes per parameter (weights, gradients,
AdamW's two averages): activations, logits, and on a CPU the libraries, about 0.8 GB. `mfu` is the rate of our
operations relative to the best rate of a large matrix product in this run.

Run nothing else on the machine: PyTorch's threads wait for each other, so another process on one of two cores makes a
mini training ten times slower. `others_cores` ("others" in the table) is the maximum number of cores that other
processes used. Discard a round if it is not near 0.

Shapes: "mini" is the embedded S-VLM with easy-VQA images; its time is mostly overhead. "wide" has the width and
vocabulary of Qwen2-VL-2B, but only 4 layers and 4 vision blocks, random weights, and 256 visual tokens per image. This
favours a trainer that skips logits and parts of the last layer. Therefore `counted` has a step's operations and the
bytes that its forward pass saves, for this depth and for the full depth (28 layers, 32 blocks), extrapolated from one
layer and one block, and relative to plain.

Prints a table, then one JSON object.
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
sys.path.append(str(Path(__file__).resolve().parents[1] / "PL/Qwen2-VL-Finetune/src"))  # last: it has a train.py, too

import activations
import psutil
import shapes
import torch
import train_peers
from answer_logits import AnswerLogits
from throughput import peak_matmul_flops
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText, AutoProcessor

from mpa.data.loading import load_samples
from mpa.method.prompts import answer_prompt

ROOT = Path(__file__).resolve().parents[1]
PL = ROOT / "PL/Qwen2-VL-Finetune"
FULL = shapes.QWEN2_VL["svlm"]
WIDE = replace(FULL, layers=4, vision=(1280, 4, 16))
DEPTHS = {"here": WIDE, "full_depth": FULL}
ANSWERS = ("yes", "red", "a circle", "three", "no", "a red triangle")
GPU = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if GPU else "cpu"), torch.bfloat16 if GPU else torch.float32
ABLATIONS = [  # (name, additional flags of ours)
    ("as it is", []),
    ("samples made by 2 workers", ["--dataloader_num_workers", "2"]),
    ("grouped, 512 tokens a batch", ["--batch_tokens", "512"]),
    ("packing", ["--packing", "True"]),
    ("packing, 512 tokens a batch", ["--packing", "True", "--batch_tokens", "512"]),
    ("only products kept", ["--activation_checkpointing", "products"]),
    ("only layers' inputs kept", ["--activation_checkpointing", "True"]),
    ("vision frozen", ["--freeze_vision_tower", "True", "--freeze_merger", "True"]),
]


@dataclass(frozen=True)
class Work:
    """A training: the model's folder, the train JSON, and the settings that all trainers share."""

    model: str
    data: str
    pixels: int
    batch: int
    lr: float
    max_pixels: int = 0  # if set, images keep sizes from `pixels` to this; otherwise all have `pixels`


def alone(function, *args):
    """`function(*args)` in a separate process: on Linux a child's peak memory starts at its parent's."""
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


def mixed(folder: Path) -> Work:
    """512 records with images of 4 to 64 visual tokens for the embedded S-VLM, 32 steps."""
    edges = [56 + 28 * (i * 5 % 7) for i in range(512)]
    paths = [shapes.draw(folder / str(edge), edges.count(edge), edge) for edge in sorted(set(edges))]
    drawn = dict(zip(sorted(set(edges)), map(iter, paths), strict=True))
    rows = [(next(drawn[edge]), "what is in the image?", ANSWERS[i % len(ANSWERS)]) for i, edge in enumerate(edges)]
    return Work(str(ROOT / "data/mini/student"), write_records(folder / "train.json", rows), 3136, 16, 1e-4, 50176)


def wide(folder: Path) -> Work:
    """8 records with images of noise, 4 steps; about 535 M parameters."""
    paths = shapes.draw(folder, 8, 448)
    rows = [(path, "what is in the image?", ANSWERS[i % len(ANSWERS)]) for i, path in enumerate(paths)]
    data = write_records(folder / "train.json", rows)
    alone(shapes.build, WIDE, folder / "model", "cpu", torch.float32)
    return Work(str(folder / "model"), data, 448 * 448, 2, 1e-5)


def busy() -> tuple[float, float]:
    """CPU seconds of the whole machine, and of this process's ended children."""
    cores, mine = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return cores.user + cores.nice + cores.system, mine.ru_utime + mine.ru_stime


def run(command: list, **more) -> tuple[str, dict]:
    """A command's output, its seconds, and the number of cores that other processes used meanwhile.

    It sees one GPU, the first: a trainer would spread its batches over all. `more` is added to its environment.
    Raises RuntimeError, with the end of the output, if the command fails.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    more |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": first}
    environment = {**os.environ, **more}
    started, (all_before, mine_before) = time.perf_counter(), busy()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{command[1]} ended with {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    seconds, (all_after, mine_after) = time.perf_counter() - started, busy()
    others = max(0.0, (all_after - all_before) - (mine_after - mine_before)) / seconds
    return done.stdout, {"process_seconds": seconds, "others_cores": others}


def ours(work: Work, *flags: str, launched: bool = False) -> dict:
    """Our trainer alone or, `launched`, as PL.sh starts it: on a GPU with DeepSpeed, and in the dtype that the GPU has."""
    command = [sys.executable, PL / "src/train.py", "--bf16" if GPU else "--use_cpu", "True"]
    if launched:
        command = [sys.executable, PL / "src/launch.py", "train", "--standalone", "--local-addr", "127.0.0.1", "--"]
    with tempfile.TemporaryDirectory() as out:
        command += ["--model_id", work.model, "--data_path", work.data]
        command += ["--output_dir", out, "--per_device_train_batch_size", work.batch, "--learning_rate", work.lr]
        command += ["--seed", 0]
        command += ["--image_min_pixels", work.pixels, "--image_max_pixels", work.max_pixels or work.pixels]
        command += ["--lr_scheduler_type", "constant", "--train_sampling_strategy", "sequential", "--report_to", "none"]
        command += ["--logging_steps", 1, "--save_strategy", "no", *flags]
        _, took = run(command, ZERO=str(PL / "scripts/zero2.json"))
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


def step_of(model, batch: dict, answer_logits: AnswerLogits | None):
    """Loss and logits of a forward pass."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=train_peers.IGNORE)
    if answer_logits:
        answer_logits.select(following != train_peers.IGNORE)
        following = following[following != train_peers.IGNORE]
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, following.flatten(), ignore_index=train_peers.IGNORE), logits


def operations(*step) -> float:
    """Floating-point operations of matrix products and attention, forward and backward."""
    return shapes.flops(lambda: step_of(*step)[0].backward())


def kept_bytes(*step) -> int:
    """Bytes that a forward pass leaves allocated for the backward pass, logits included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        left = step_of(*step)
    del left
    return sum(event.self_cpu_memory_usage for event in events.key_averages())


def count(work: Work) -> dict:
    """A step's operations and saved bytes, at the depth that is trained here and at the full depth.

    Operations are counted with eager attention, masked scores included, since the counter does not see fused attention
    on a CPU. Bytes are counted with fused attention, in float32. Both are measured with two layers and two blocks and
    with one fewer of each, then extrapolated: all layers but the last cost the same, and so do all blocks.
    """
    processor = AutoProcessor.from_pretrained(work.model)
    processor.image_processor.size = {"shortest_edge": work.pixels, "longest_edge": work.pixels}
    batch = train_peers.Collator(processor)(train_peers.read(work.data, processor)[: work.batch])
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        shapes.build(replace(WIDE, layers=2, vision=(1280, 2, 16)), Path(folder), "cpu", torch.float32)

        def counted(counter, attention: str, way: str) -> dict:
            model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention).train()
            answer_logits, core = AnswerLogits(model) if way != "plain" else None, model.model
            activations.apply_policy(model, activations.PRODUCTS if way == "ours, products" else activations.ALL)
            whole = counter(model, batch, answer_logits)
            layers, core.language_model.layers = core.language_model.layers, core.language_model.layers[1:]
            layer = whole - counter(model, batch, answer_logits)
            core.language_model.layers, core.visual.blocks = layers, core.visual.blocks[:1]
            block = whole - counter(model, batch, answer_logits)
            more = {name: (shape.layers - 2) * layer + (shape.vision[1] - 2) * block for name, shape in DEPTHS.items()}
            return {"layer": layer, "block": block, **{name: whole + size for name, size in more.items()}}

        for what, counter, attention in (("operations", operations, "eager"), ("kept_bytes", kept_bytes, "sdpa")):
            ways = ("plain", "ours", "ours, products")[: 2 if what == "operations" else 3]
            result[what] = {way: counted(counter, attention, way) for way in ways}
            for way in ways:
                result[what][way]["shares"] = {
                    name: round(result[what][way][name] / result[what]["plain"][name], 3) for name in DEPTHS
                }
    return result


def compare(shape: str, args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        if args.ablate:
            work = mixed(Path(folder))
            ways = {name: lambda flags=flags: ours(work, *flags) for name, flags in ABLATIONS}
        else:
            work = {"mini": mini, "wide": wide}[shape](Path(folder))
            ways = {"ours": lambda: ours(work)}
            if shape == "wide":
                ways["ours, products"] = lambda: ours(work, "--activation_checkpointing", "products")
            if args.trl_python:
                ways["trl"] = lambda: peer(work, "trl", args.trl_python)
            ways["plain"] = lambda: peer(work, "plain", sys.executable)
        results, peak = {name: [] for name in ways}, 0.0
        for _ in range(args.rounds):
            peak = max(peak, peak_matmul_flops(DEVICE, DTYPE))
            for name, way in ways.items():
                results[name].append(way())
                print(f"{shape}, {name}: {results[name][-1]['samples_per_second']:.2f} samples/s", file=sys.stderr)
        counted = alone(count, work) if shape == "wide" else None
    return summary(results, work.batch, peak, counted)


def summary(results: dict[str, list[dict]], batch: int, peak: float, counted: dict | None) -> dict:
    """Medians over the rounds, ratios to the first way, and the largest difference of a step's loss from plain's (or the first way's)."""
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
        other = results["plain" if "plain" in results else names[0]][0]["losses"]
        way["loss_difference"] = max(abs(a - b) for a, b in zip(way["losses"], other, strict=True))
        figures["ways"][name] = way
    if counted:
        pace = figures["ways"][names[0]]["samples_per_second"] * counted["operations"]["ours"]["here"] / batch
        figures |= {"counted": counted, "mfu": pace / peak}
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
    p.add_argument("--rounds", type=int, default=3, help="rounds over all trainers; the median is reported")
    p.add_argument("--trl-python", default="", help="Python interpreter with TRL; without it TRL is left out")
    p.add_argument(
        "--ablate", action="store_true", help="ours only, images of several sizes, one flag changed at a time"
    )
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
