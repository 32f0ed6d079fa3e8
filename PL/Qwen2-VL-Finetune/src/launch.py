"""torchrun, with the exit code of the training and without a report of its own when that ends in order.

    python src/launch.py --standalone --nproc_per_node 2 src/train.py …

SIGTERM and Ctrl-C reach every rank once, and are given the time that saving a checkpoint takes (--shutdown-timeout).
"""

import logging
import signal
import sys


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until torchrun listens: importing it takes seconds
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each rank says itself why it ends
    try:
        torchrun()
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        print(
            f"error: rank {rank} was ended by signal {-first.exitcode}"
            f"{', most likely for want of memory' if first.exitcode == -9 else ''}. "
            "The same call goes on from the last checkpoint.",
            file=sys.stderr,
        )
        return 128 - first.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
