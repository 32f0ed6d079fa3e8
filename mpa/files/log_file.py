"""What a command prints also goes to a log file. Details go only there, unless the user asks for all."""

import os
import re
import sys
import time
from collections import deque
from pathlib import Path

# Lines of torch, DeepSpeed and other libraries that tell the user nothing to act on. They go only to the log.
NOISE = re.compile(
    r"No CUDA runtime is found|^DeepSpeed \S+ built|Failed to load CPU gemm_4bit|Gradient accumulation steps mismatch|^\S+:\d+: (Future|Deprecation|PendingDeprecation)Warning"
)


class _Log:
    """The file, once it is known. Until then it holds the last lines."""

    def __init__(self):
        self.file, self.early, self.verbose = None, deque(maxlen=1000), False

    def add(self, line: str) -> None:
        if self.file is None:
            self.early.append(line)
            return
        try:
            self.file.write(line + "\n")
        except OSError as error:  # a full disk must not end the run here
            self.file = open(os.devnull, "w")  # noqa: SIM115
            print(f"warning: the log ends here ({error.strerror}).", file=sys.stderr)


class _Tee:
    """A stream that also writes its lines to the log; of a progress bar, which redraws its line, the last state."""

    def __init__(self, stream, log: _Log):
        self.stream, self.log, self.line = stream, log, ""

    def write(self, text: str) -> int:
        *lines, rest = (self.line + text).split("\n")
        self.line = _last_state(rest)
        if self.log.verbose or not NOISE.search((lines or [rest])[0]):
            self.stream.write(text)
        for line in lines:
            if shown := _last_state(line).rstrip():
                self.log.add(shown)
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _last_state(line: str) -> str:
    """What a terminal shows of a line with carriage returns."""
    return line.rstrip("\r").rpartition("\r")[2]


def install() -> None:
    """Copy stdout and stderr from now on; `open_log` says where to. For commands, not for calls within a process."""
    if _current() is None:
        log = _Log()
        sys.stdout, sys.stderr = _Tee(sys.stdout, log), _Tee(sys.stderr, log)


def _current() -> _Log | None:
    return sys.stderr.log if isinstance(sys.stderr, _Tee) else None


def open_log(path: Path, verbose: bool = False) -> None:
    """Append to `path` what is printed, and what has been since `install`. `verbose` prints details and noise too.

    A file that cannot be written is a warning.
    """
    log = _current()
    if log is None:
        return
    log.verbose = verbose
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log.file = open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    except OSError as error:
        print(f"warning: {path}: cannot be written ({error.strerror}). This run has no log.", file=sys.stderr)
        return
    if os.environ.get("RANK", "0") == "0":  # not the arguments: an address may hold a password
        log.add(f"\n{time.strftime('%F %T')} {Path(sys.argv[0]).name}")
    while log.early:
        log.add(log.early.popleft())


def detail(*lines: str) -> None:
    """Print lines that most users do not need: only to the log, if there is one and the user did not ask for all."""
    log = _current()
    if log is None or log.file is None or log.verbose:
        print(*lines, sep="\n", flush=True)
    else:
        for line in lines:
            log.add(line)
