"""Conversion of an original InternVL2 checkpoint of 1 GB, made at random in two shards: seconds and peak memory.

    python benchmarks/conversion.py [--gigabytes 1]

The peak is that of a process that converts, minus that of one that only imports what a conversion imports, and with the
pages of files left out that the kernel may drop at any time. The last line is a JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
HIDDEN, VOCABULARY, LAYER = 1024, 40_000, 15.7e6  # parameters of a layer


def child(source: str, out: str) -> None:
    """Import what a conversion imports; then convert, watching this process's own memory. Prints both peaks in bytes, and the seconds."""
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers.models.internvl import modeling_internvl  # noqa: F401

    from mpa.models import conversion

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    conversion.convert(source, out, 592)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    print(json.dumps({"seconds": round(seconds, 1), "peak_bytes": peak - before}))


def main() -> None:
    import originals

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint (default: %(default)s)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "original"
        layers = max(1, round((args.gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / LAYER))
        originals.random_internvl(source, HIDDEN, 64, layers, VOCABULARY, shards=2, dtype="bfloat16")
        largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        command = [sys.executable, __file__, "child", str(source), f"{folder}/out"]
        measured = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        )
        print(f"{size / 1e9:.2f} GB in 2 shards, the largest of {largest / 1e9:.2f} GB: {measured['seconds']} s,")
        print(
            f"peak memory {measured['peak_bytes'] / 1e9:.2f} GB, {measured['peak_bytes'] / largest:.2f} of the largest shard."
        )
        print(json.dumps(measured | {"bytes": size, "largest_shard_bytes": largest}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        main()
