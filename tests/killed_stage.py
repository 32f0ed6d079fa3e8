"""A stage that is killed at a given reply: `python tests/killed_stage.py N PA.py …` runs scripts/PA.py."""

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mpa.files.journal import Journal  # noqa: E402 -- from ROOT


def die_at(replies: int) -> None:
    """From now on this process dies, as by kill -9, once its journal holds so many replies."""
    append = Journal.append

    def append_and_die(self, more):
        append(self, more)
        if len(self) >= replies:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.append = append_and_die


if __name__ == "__main__":
    die_at(int(sys.argv[1]))
    del sys.argv[1]
    sys.argv[0] = str(ROOT / "scripts" / sys.argv.pop(1))
    runpy.run_path(sys.argv[0], run_name="__main__")
