"""Shared by the tests of the trainer: records to train on, and trainings in this process or in others."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import params
import train
from conftest import ROOT, STUDENT, close
from PIL import Image
from trainer import Leveler
from transformers import AutoModelForImageTextToText

from mpa.engines import Request
from mpa.engines.hf import HFEngine
from mpa.files.records import train_record

MINI = "--use_cpu True --image_min_pixels 3136 --image_max_pixels 3136 --report_to none --logging_steps 1".split()
TRAINER = ROOT / "PL/Qwen2-VL-Finetune"


def write(folder: Path, n: int = 20) -> Path:
    """A train JSON of n samples about n images, with questions and answers of different lengths."""
    rng = random.Random(1)
    for i in range(n):
        size = (64 + 8 * (i % 3), 64 + 8 * (i % 2))
        Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3))).save(folder / f"{i}.png")
    samples = [
        train_record(
            f"s{i}", f"{i}.png", "what color is " + "the shape " * (i % 4) + "?", ["red", "a teal one", "no"][i % 3]
        )
        for i in range(n)
    ]
    (folder / "train.json").write_text(json.dumps(samples))
    return folder / "train.json"


def write_records(folder: Path, *records: dict) -> str:
    """A train JSON of these records about one image, a.png."""
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "train.json").write_text(json.dumps(records))
    return str(folder / "train.json")


def arguments(folder: Path, *flags, model=STUDENT, out="out") -> list[str]:
    paths = ["--model_id", model, "--data_path", folder / "train.json", "--image_folder", folder]
    return [*map(str, paths), "--output_dir", str(folder / out), *MINI, *flags]


def losses(out: Path) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(out: Path) -> dict:
    """The weights by the model's own names, which may differ from the file's."""
    return AutoModelForImageTextToText.from_pretrained(out, dtype="float32").state_dict()


def conversation(images, *turns) -> dict:
    said = [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(turns)]
    return {"id": 7, "image": images, "conversations": said}


def build(folder: Path, *flags, model=STUDENT) -> Leveler:
    model_args, data_args, args = params.parse(arguments(folder, *flags, model=model))
    return train.build(train.read(data_args.data_path, data_args, args), model_args, data_args, args, {})


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


RANKS = 'for ((r = 0; r < WORLD_SIZE; r++)); do RANK=$r LOCAL_RANK=$r "$@" & P+=($!); done; for p in "${P[@]}"; do wait $p || E=$?; done; exit $E'


def launch(
    folder: Path, *flags, ranks: int = 0, out="out", stop_at: int = 0, with_signal=signal.SIGKILL
) -> subprocess.CompletedProcess:
    """Train in a separate process, or in `ranks` distributed processes.

    At step `stop_at` all get `with_signal`. The ranks start as with DeepSpeed's launcher, but in one process group, so
    that a signal reaches all at once.
    """
    file = [ROOT / "tests/stopped_training.py", stop_at, int(with_signal)] if stop_at else [TRAINER / "src/train.py"]
    command, environment = [sys.executable, "-u", *map(str, file)], {**os.environ, "DS_ACCELERATOR": "cpu"}
    if ranks:
        port = free_port()
        environment |= {"WORLD_SIZE": str(ranks), "E": "0", "LOCAL_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = ["bash", "-c", RANKS, "bash", *command]
    done = subprocess.run(
        [*command, *arguments(folder, *flags, out=out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
        timeout=600,
    )
    assert not ranks or not [*Path("/dev/shm").glob(f"deepspeed_*_{port}_*")]
    return done


ONE = "--per_device_train_batch_size 4 --save_steps 3 --num_train_epochs 2 --learning_rate 1e-3".split()
TWO = "--per_device_train_batch_size 2 --save_steps 3 --num_train_epochs 2 --learning_rate 1e-3".split()


def zero(name: str) -> list[str]:
    return ["--deepspeed", str(TRAINER / f"scripts/{name}.json")]


def answers(model: Path, folder: Path) -> tuple[list[str], list[float]]:
    """Texts and log-probabilities."""
    asked = [Request(str(i), str(folder / f"{i}.png"), "what color is the shape?", 8) for i in range(6)]
    with HFEngine(str(model), min_pixels=3136, max_pixels=3136, dtype="float32") as engine:
        replies = {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}
    return [replies[r.key]["text"] for r in asked], [replies[r.key]["logprob"] for r in asked]


def same(one: tuple, other: tuple) -> bool:
    return one[0] == other[0] and close(one[1], other[1], 1e-3, least=1)  # nat
