"""The peak memory of a training or of a batch of replies in this process, beside its estimate. Run by test_memory_estimate.py.

    python tests/memory_peak.py train FOLDER MODEL FLAGS…     two steps on FOLDER/train.json
    python tests/memory_peak.py reply FOLDER MODEL ROWS       replies about ROWS images of FOLDER

Prints {"measured": bytes, "estimated": {purpose: bytes}} as its last line. Measured is the growth of the resident memory
after a run with one row, which has imported all.
"""

import gc
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import conftest  # noqa: F401 -- paths and environment


def resident(name: str) -> int:
    """VmRSS, now, or VmHWM, the peak, in bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def growth(work, warm_up) -> int:
    """Bytes by which the peak during `work()` is above the memory before it; `warm_up()` has imported all by then."""
    warm_up()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def train(folder: Path, model: str, *flags: str) -> tuple[int, dict]:
    import params
    import train as trainer
    import training_memory
    from training import arguments

    def run(*more: str) -> None:
        arguments_of = params.parse(arguments(folder, "--save_strategy", "no", *flags, *more, model=model))
        samples = trainer.read(arguments_of[1].data_path, *arguments_of[1:])
        trainer.build(samples, *arguments_of, {}).train()

    model_args, data_args, args = params.parse(arguments(folder, *flags, model=model))
    samples = trainer.read(data_args.data_path, data_args, args)
    checked = trainer.prepare(samples, trainer.load_processor(model_args, data_args), data_args)
    sizes = training_memory.estimate(
        training_memory.planned_model(model_args, args), model_args, data_args, args, checked
    )
    one = "--max_steps 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 1".split()
    return growth(lambda: run("--max_steps", "2"), lambda: run(*one)), sizes


def reply(folder: Path, model: str, rows: str) -> tuple[int, dict]:
    from mpa.engines import Request
    from mpa.engines.hf import HFEngine
    from mpa.engines.memory import estimate
    from mpa.models.memory_estimate import meta_model

    paths = sorted(map(str, folder.glob("*.png")))
    asked = [Request(str(i), paths[i % len(paths)], "What is it?", 16) for i in range(int(rows))]
    settings = {"device": "cpu", "dtype": "float32", "min_pixels": 3136, "max_pixels": 448 * 448}
    sizes = {}

    def run(requests: list) -> None:
        with HFEngine(model, len(asked), **settings) as engine:
            list(engine.generate(requests))
            sizes.update(estimate(engine, requests, meta_model(engine.model_path)))

    return growth(lambda: run(asked), lambda: run(asked[:1])), sizes


if __name__ == "__main__":
    kind, folder, *rest = sys.argv[1:]
    measured, estimated = {"train": train, "reply": reply}[kind](Path(folder), *rest)
    print(json.dumps({"measured": measured, "estimated": estimated}))
