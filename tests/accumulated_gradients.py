"""The gradients of a training's first step: `python tests/accumulated_gradients.py FILE --model_id …` writes them to FILE."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "PL/Qwen2-VL-Finetune/src"))

import torch
import train
from trainer import Leveler


def record(file: str) -> None:
    check = Leveler._check_gradients

    def record_and_check(self, optimizer, *more):
        check(self, optimizer, *more)
        torch.save([w.grad.cpu() for group in optimizer.param_groups for w in group["params"]], file)

    Leveler._check_gradients = record_and_check


if __name__ == "__main__":
    record(sys.argv.pop(1))
    sys.exit(train.run())
