"""torchrun with the training's exit code, and without torchrun's error report if a rank exits normally.

    python src/launch.py --standalone --nproc_per_node 2 src/train.py …

SIGTERM and Ctrl-C reach every rank once. --shutdown-timeout is the time that the ranks have to save a checkpoint.
"""

import logging
import os
import signal
import sys


def main() -> int:
    os.environ["LAUNCHER_PID"] = str(os.getpid())  # by which a rank sees that this process has been killed
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until torchrun handles it: its import takes seconds
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each rank reports its own error
    try:
        torchrun()
    except SignalException as stopped:
        return 128 + stopped.sigval
    except KeyboardInterrupt:  # torchrun was still waiting for the other ranks
        print("stopped before the first step. The same command starts again.", file=sys.stderr)
        return 130
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        print(
            f"error: rank {rank} was ended by signal {-first.exitcode}"
            f"{', most likely because memory ran out' if first.exitcode == -signal.SIGKILL else ''}. "
            "The same command resumes from the last checkpoint.",
            file=sys.stderr,
        )
        return 128 - first.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
