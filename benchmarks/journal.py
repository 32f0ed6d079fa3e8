"""The cost of the journal with 100,000 requests: memory, time and resuming. The engine replies at once.

    python benchmarks/journal.py

Memory is the peak of a process, compared with a process that has 1,000 requests. Time is that of `ask` with the journal
minus that without, per reply, compared with the time per image of a real PA of the embedded teacher in the same run.
The last line is a JSON object.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import instant  # noqa: F401 -- first: it finds mpa
from instant import InstantEngine, Requests

from mpa.engines import ask
from mpa.files.journal import Journal

ROOT = Path(__file__).resolve().parents[1]
MANY, FEW, REAL = 100_000, 1_000, 400
MINI = ["--min-pixels", "3136", "--max-pixels", "3136", "--dtype", "float32", "--batch-size", "50"]


def child(result: str, n: int) -> None:
    """Ask for n replies; print the seconds and this process's peak memory."""
    started = time.perf_counter()
    journal = Journal(Path(result), {"n": n})
    opened = time.perf_counter()
    ask(InstantEngine("big"), Requests(range(n)), journal, "instant")
    done = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"open": opened - started, "ask": done - opened, "MiB": memory}))


def run(result: Path, n: int) -> dict:
    command = [sys.executable, __file__, "child", str(result), str(n)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def without_journal(n: int) -> float:
    started = time.perf_counter()
    for _ in InstantEngine("big").generate(Requests(range(n)), ()):
        pass
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        few, many = run(Path(folder) / "few.json", FEW), run(Path(folder) / "many.json", MANY)
        size = (Path(folder) / "many.journal.jsonl").stat().st_size / 2**20
        again = run(Path(folder) / "many.json", MANY)
        overhead = (many["ask"] - without_journal(MANY)) / MANY
        command = [sys.executable, ROOT / "scripts/PA.py", "--dataset", "easyVQA", "--limit", str(REAL), *MINI]
        command += ["--model-path-lvlm", ROOT / "data/mini/teacher", "--run", f"{folder}/run"]
        subprocess.run([*map(str, command)], check=True, capture_output=True)
        meta = json.loads((Path(folder) / "run/PA_teacher_easyVQA.meta.json").read_text())
    real = meta["seconds"] / REAL
    figures = {
        "memory_ratio": many["MiB"] / few["MiB"],
        "MiB_1000": few["MiB"],
        "MiB_100000": many["MiB"],
        "journal_MiB": size,
        "overhead_us_a_reply": 1e6 * overhead,
        "overhead_of_real_run": overhead / real,
        "resume_seconds": again["open"] + again["ask"],
    }
    print(
        f"peak memory {few['MiB']:.0f} MiB with {FEW:,} requests, {many['MiB']:.0f} with {MANY:,}: {figures['memory_ratio']:.2f} times"
    )
    print(
        f"journal: {1e6 * overhead:.0f} µs a reply, {100 * overhead / real:.2f} % of a real run's {1e3 * real:.1f} ms an image"
    )
    print(f"resuming a finished journal of {size:.0f} MiB: {figures['resume_seconds']:.2f} s")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], int(sys.argv[3]))
    else:
        main()
