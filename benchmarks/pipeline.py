"""PA + PI against the plain loop on the same images: the speed-up, and whether the outputs are equal.

    python benchmarks/pipeline.py                       # 2,000 easy-VQA images, the embedded pair
    python benchmarks/pipeline.py --compute-bound       # 12 images, 150 M and 40 M random parameters
    python benchmarks/pipeline.py --start-up ../before  # PA, PI, PL and evaluate with 40 images, here and in another checkout
    python benchmarks/pipeline.py --lvlm Qwen/Qwen2-VL-7B-Instruct --svlm Qwen/Qwen2-VL-2B-Instruct \\
        --dataset textVQA --min-pixels 100352 --max-pixels 401408 --batch-size 32

The plain loop works like the released code, but over all batches: batches of 8 (PA) and 4 (PI) in file order, images
read between the batches, both models in memory, the S-VLM asked all questions, up to 128 tokens. Ours are the real
stages with journal and files. Both are greedy and alternate in this process, after a warm-up; model loading counts for
both. --compute-bound uses models so large that arithmetic dominates, and reports time and operations relative to
the plain loop, without loading. --start-up runs the four bash scripts, whose time is mostly start-up, and compares the results of two
checkouts. The last line is a JSON object.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import PA
import PI
import shapes
import torch
from qwen_vl_utils import process_vision_info

from mpa.answers.matching import Match
from mpa.data import DATASETS
from mpa.data.loading import load_samples
from mpa.files import records
from mpa.method.prompts import TASK_PROMPTS, answer_prompt, first_line, parse_annotation
from mpa.models import loading
from mpa.runs.layout import Cell, RunFiles

ROOT = records.REPOSITORY


class PlainModel:
    """A model, its processor, and `replies`: one generate call per batch, in the given order."""

    def __init__(self, path: str, args):
        device = loading.pick_device(args.device)
        self.processor = loading.load_processor(path, args.min_pixels, args.max_pixels)
        self.model = loading.load_model(path, device, getattr(torch, loading.resolved_dtype(args.dtype, device)))

    @torch.inference_mode()
    def replies(self, asked: list[tuple[str, str]], batch_size: int) -> list[str]:
        written = []
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            messages = [
                [{"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": prompt}]}]
                for path, prompt in batch
            ]
            texts = [self.processor.apply_chat_template(m, add_generation_prompt=True) for m in messages]
            images, _ = process_vision_info(messages)
            inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt").to(
                self.model.device, self.model.dtype
            )
            out = self.model.generate(
                **inputs, max_new_tokens=128, do_sample=False, temperature=None, top_p=None, top_k=None
            )
            written += self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return written


def plain_loop(args) -> dict:
    """PA and PI like the released code, but with the paper preset's prompts, parser and matcher."""
    samples = load_samples(args.dataset, "train")[: args.images]
    lvlm, svlm = PlainModel(args.lvlm, args), PlainModel(args.svlm, args)
    task = TASK_PROMPTS[DATASETS[args.dataset].task]
    parsed = [parse_annotation(text) for text in lvlm.replies([(s.image_path, task) for s in samples], 8)]
    usable = [(s, p) for s, p in zip(samples, parsed, strict=True) if not p.reason]
    asked, agree = [(s.image_path, answer_prompt(p.question)) for s, p in usable], Match()
    first = [first_line(text) for text in lvlm.replies(asked, 4)]
    second = [first_line(text) for text in svlm.replies(asked, 4)]
    return {
        "annotations": {s.key: (p.question, p.answer) for s, p in usable},
        "lvlm": {s.key: text for (s, _), text in zip(usable, first, strict=True)},
        "parity": [
            s.key
            for (s, p), a, b in zip(usable, first, second, strict=True)
            if agree(a, p.answer) and not agree(b, p.answer)
        ],
    }


def stages(args, batch_size: int) -> dict:
    """The same with our PA and PI. Without retries, which are sampled and which the plain loop does not have."""
    common = ["--dataset", args.dataset, "--limit", str(args.images), "--batch-size", str(batch_size)]
    common += ["--min-pixels", str(args.min_pixels), "--max-pixels", str(args.max_pixels)]
    common += ["--device", args.device, "--dtype", args.dtype, "--model-path-lvlm", args.lvlm]
    with tempfile.TemporaryDirectory() as run, contextlib.redirect_stdout(sys.stderr):
        pa = PA.main([*common, "--run", f"{run}/", "--tries", "0"])
        train = PI.main([*common, "--run", f"{run}/", "--model-path-svlm", args.svlm])
        lvlm = RunFiles(run, Cell(args.dataset, records.short_name(args.lvlm))).lvlm_answers
        annotations = [r for r in records.read_records(pa, "PA") if not r["left_out"]]
        return {
            "annotations": {
                str(r["question_id"]): (r["predicted_question"], r["predicted_answer"]) for r in annotations
            },
            "lvlm": {str(r["question_id"]): r["predictions"] for r in records.read_records(lvlm, "PI")},
            "parity": [str(r["id"]) for r in records.read_records(train, "train")],
        }


def differences(one: dict | list, other: dict | list) -> int:
    """The number of keys on which two outputs differ."""
    if isinstance(one, list):
        return len(set(one) ^ set(other))
    return sum(one.get(key) != other.get(key) for key in one.keys() | other.keys())


STAGES = {
    "PA": "scripts/PA.sh --limit 40 --temperature 1",
    "PI": "scripts/PI.sh",
    "PL": "PL/Qwen2-VL-Finetune/scripts/PL.sh",
    "evaluate": "evaluate.sh --limit 40 --model-path {student} {levelled}",
}


def four_stages(checkout: Path) -> tuple[dict, dict]:
    """{stage: (seconds, CPU seconds)} of the demo's stages with 40 images in a checkout, and their results."""
    mini, took = checkout / "data/mini", {}
    settings = {"LVLM": mini / "teacher", "SVLM": mini / "student", "DATASET": "easyVQA", "DTYPE": "float32"}
    settings |= {"BATCH_SIZE": 64, "PL_BATCH_SIZE": 16, "ACCUMULATION": 1, "LEARNING_RATE": 1.5e-4, "VISION_LR": 1.5e-4}
    settings |= {"MIN_PIXELS": 3136, "MAX_PIXELS": 3136, "HF_HUB_OFFLINE": 1}
    with tempfile.TemporaryDirectory() as run:
        files = RunFiles(run, Cell("easyVQA", "teacher", "student"))
        environment = os.environ | {name: str(value) for name, value in {**settings, "RUN": f"{run}/"}.items()}
        for stage, command in STAGES.items():
            words = command.format(student=mini / "student", levelled=files.levelled()).split()
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            done = subprocess.run(["bash", *words], cwd=checkout, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
            took[stage] = seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        answers = files.evaluation(files.levelled().name)
        results = {
            "parity": [str(r["id"]) for r in json.loads(files.train.read_text())],
            "answers": [r["predictions"] for r in json.loads(answers.read_text())],
        }
    return took, results


def start_up(other: Path | None, rounds: int) -> dict:
    """The medians over the rounds; with another checkout, the ratio of each stage's CPU seconds to its, and whether results are equal."""
    places, found = {"here": ROOT, **({"other": other.resolve()} if other else {})}, {}
    for _ in range(rounds):
        for place, checkout in places.items():
            found.setdefault(place, []).append(four_stages(checkout))
    figures = {"rounds": rounds}
    for place, runs in found.items():
        for i, unit in enumerate(("seconds", "cpu_seconds")):
            of_stages = {stage: round(statistics.median(took[stage][i] for took, _ in runs), 1) for stage in STAGES}
            total = statistics.median(sum(values[i] for values in took.values()) for took, _ in runs)
            figures[f"{unit} {place}"] = {**of_stages, "all": round(total, 1)}
    if other:
        ours, theirs = figures["cpu_seconds here"], figures["cpu_seconds other"]
        figures["ratio"] = {stage: round(ours[stage] / theirs[stage], 2) for stage in ours}
        figures["results_equal"] = all(ours[1] == theirs[1] for ours, theirs in zip(*found.values(), strict=True))
    return figures


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="easyVQA", choices=DATASETS)
    p.add_argument("--lvlm", default=str(ROOT / "data/mini/teacher"))
    p.add_argument("--svlm", default=str(ROOT / "data/mini/student"))
    p.add_argument("--images", type=int, default=2000)
    p.add_argument("--batch-size", type=int, default=100, help="batch size of our stages; 8 is also measured")
    p.add_argument("--rounds", type=int, default=3, help="passes of each; the median is reported")
    p.add_argument("--min-pixels", type=int, default=3136)
    p.add_argument("--max-pixels", type=int, default=3136)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="float32", help="in bfloat16 the outputs may differ")
    p.add_argument("--compute-bound", action="store_true", help="larger models with random weights; see shapes.py")
    p.add_argument(
        "--start-up",
        type=Path,
        nargs="?",
        const=False,
        metavar="CHECKOUT",
        help="the four stages with 40 images; and another checkout's",
    )
    args = p.parse_args(argv)
    if args.start_up is not None:
        print(json.dumps(start_up(args.start_up or None, args.rounds)))
        return
    if args.compute_bound:
        with tempfile.TemporaryDirectory() as work:
            device = loading.pick_device(args.device)
            where = shapes.COMPUTE_BOUND, Path(work), device, args.dtype
            job = shapes.prepare(*where, 12, 448, 0.68, 6, None)  # 256 visual tokens, batches of 6
            print(json.dumps(shapes.compare(job)))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if Path(args.lvlm).is_dir() else "0")

    ways = {
        "plain": lambda: plain_loop(args),
        "ours": lambda: stages(args, args.batch_size),
        "ours at 8": lambda: stages(args, 8),
    }
    images, args.images = args.images, 16
    for way in ways.values():
        way()
    args.images = images
    seconds, outputs = {name: [] for name in ways}, {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            outputs[name] = way()
            seconds[name].append(time.perf_counter() - started)
            print(f"{name}: {images / seconds[name][-1]:.1f} images/s", file=sys.stderr)

    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"], strict=True)]
    differing = {part: differences(outputs["plain"][part], outputs["ours"][part]) for part in outputs["plain"]}
    figures = {
        "images": images,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "images_per_second": {name: round(images / s, 1) for name, s in median.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratio_of_rounds": [round(r, 2) for r in ratios],
        "ratio_at_batch_8": round(median["plain"] / median["ours at 8"], 2),
        "differing": differing,
        "outputs_equal": not any(differing.values()) and outputs["ours"] == outputs["ours at 8"],
        "parity_samples": len(outputs["ours"]["parity"]),
        "rounds": args.rounds,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
