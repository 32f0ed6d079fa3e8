"""A training that is stopped at a given step: `python tests/stopped_training.py STEP SIGNAL --model_id …`.

Once the first rank has logged the step, all processes of its process group get the signal.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "PL/Qwen2-VL-Finetune/src"))

import train
from trainer import Leveler


def stop_at(step: int, number: int) -> None:
    log = Leveler.log

    def log_and_stop(self, logs, *more):
        log(self, logs, *more)
        if "loss" in logs and self.state.global_step == step and self.args.process_index == 0:
            os.killpg(0, number)

    Leveler.log = log_and_stop


if __name__ == "__main__":
    stop_at(*map(int, sys.argv[1:3]))
    del sys.argv[1:3]
    sys.exit(train.run())
