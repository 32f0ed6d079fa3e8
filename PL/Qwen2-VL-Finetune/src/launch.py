"""Starts a training, or the processes of a stage.

    python src/launch.py train --standalone -- --model_id …                    src/train.py, for scripts/launch.sh
    python src/launch.py --standalone --nproc-per-node 2 -- scripts/PA.py …    torchrun

A training runs on all GPUs or, where there is none, in one process on the CPU: this one. Else each rank is a process
of torchrun, or of DeepSpeed with --hostfile; $ZERO is DeepSpeed's configuration. The exit code is that of the rank that ended
first, which says why (`ranks`), without torchrun's error report. SIGTERM and Ctrl-C reach every rank once. --shutdown-timeout is
the time that the ranks have to save a checkpoint, as long as none fails.
"""

import gc
import logging
import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[3]))  # the repository, for mpa

from mpa.files.records import InputError
from mpa.models import gpus
from mpa.models.loading import resolved_dtype

TRAINER = str(Path(__file__).resolve().with_name("train.py"))


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds
    try:
        if sys.argv[1:2] == ["train"]:
            rest = sys.argv[2:]
            return train(rest[: rest.index("--")], rest[rest.index("--") + 1 :])
        gpus.refuse_more(int(sys.argv[sys.argv.index("--nproc-per-node") + 1]))
        return run_ranks()
    except InputError as error:
        return _refuse(str(error))


def train(machines: list[str], flags: list[str]) -> int:
    """Train with these flags of the trainer. `machines` are torchrun's flags, or DeepSpeed's."""
    gc.disable()  # until `light_imports`
    import torch

    environment, found = os.environ, gpus.usable()
    configuration, processes = environment["ZERO"], environment.get("CPU_PROCESSES") or "1"
    if not Path(configuration).is_file():
        return _refuse(f"{configuration}: no such configuration of DeepSpeed; ZERO names one of those in scripts/.")
    if found:
        dtype = resolved_dtype("auto", "cuda", flags[flags.index("--model_id") + 1] if "--model_id" in flags else None)
        precision = {"bfloat16": ["--bf16", "True"], "float16": ["--fp16", "True"], "float32": []}[dtype]
        if any(flag.partition("=")[0] in ("--bf16", "--fp16") for flag in flags):
            precision = []  # the user's
        processes = "gpu"
    else:
        precision, environment["DS_ACCELERATOR"] = ["--use_cpu", "True"], "cpu"
    processes, flags = environment.get("NPROC_PER_NODE") or processes, [*precision, *flags]
    if processes.isdigit():
        gpus.refuse_more(int(processes))
    if not environment.get("OMP_NUM_THREADS"):  # torchrun gives each rank one thread, also for an optimizer on the CPU
        ranks = int(processes) if processes.isdigit() else len(found) or 1
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment["OMP_NUM_THREADS"] = str(threads)  # of the ranks
        torch.set_num_threads(threads)  # of this process
    with_deepspeed = found or processes != "1" or any(flag.partition("=")[0] == "--deepspeed" for flag in flags)
    if machines[0] == "--standalone" and not with_deepspeed:
        sys.argv = [TRAINER, *flags]
        runpy.run_path(TRAINER, run_name="__main__")  # it ends with sys.exit
    command = [TRAINER, "--deepspeed", configuration, *flags]
    if machines[0] == "--hostfile":
        os.execvp("deepspeed", ["deepspeed", *machines, *command])
    wait = environment.get("SHUTDOWN_TIMEOUT") or "3600"
    sys.argv[1:] = [*machines, "--nproc_per_node", processes, "--shutdown-timeout", wait, *command]
    return run_ranks()


def _refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


def run_ranks() -> int:
    """torchrun with the flags in sys.argv. Returns the exit code of the rank that failed first."""
    os.environ["LAUNCHER_PID"] = str(os.getpid())  # by which a rank sees that this process has been killed
    from ranks import Ranks
    from torch.distributed.elastic import multiprocessing
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    multiprocessing.SubprocessContext = Ranks
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.disable(logging.ERROR)  # each rank reports its own error
    try:
        torchrun()
    except SignalException as stopped:
        return 128 + stopped.sigval
    except KeyboardInterrupt:  # torchrun was still waiting for the other ranks
        print("stopped before the first step. The same command starts again.", file=sys.stderr)
        return 130
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
