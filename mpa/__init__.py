"""Label-free Model Parity Alignment (arXiv 2509.16633): the code that the four stages share."""

import signal
import sys
from pathlib import Path


def _is_command() -> bool:
    """Whether one of this repository's commands imports it, not another program or a test."""
    root, main = Path(__file__).resolve().parents[1], getattr(sys.modules["__main__"], "__file__", None)
    folders = [root / name for name in ("scripts", "data", "experiments", "benchmarks")]
    return sys.argv[:1] == ["-m"] or (main is not None and Path(main).resolve().parent in folders)


# Ctrl-C ends a command that is still importing without a traceback; `mpa.stages.cli.run` has its own handler.
if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
