"""Kill PA and PI with kill -9 at random moments, many times, and check that no record is lost, duplicated or changed.

    python benchmarks/faults.py                # 200 kills
    python benchmarks/faults.py --kills 20

The stages are the real ones, with their files and journals. The engine replies by rule (`instant.py`), at random speed.
PA of 300 easy-VQA images and PI of its annotations are called until they finish; each call may be killed at a random
moment. The files of a finished pair must be byte-identical to those of an undisturbed pair; then the next pair starts.
The last line is a JSON object.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("PA", "PI")
COMMON = ["--dataset", "easyVQA", "--limit", "300", "--engine", "instant", "--batch-size", "4"]
COMMON += ["--model-path-lvlm", "big", "--model-path-svlm", "small"]


def child(stage: str, folder: str, pause: float) -> None:
    import instant

    instant.PAUSE = sys.modules["instant"].PAUSE = pause
    import PA
    import PI

    from mpa.stages import cli

    arguments = [*COMMON, "--run", folder]
    if stage == "PA":
        arguments = [a for a in arguments if a not in ("--model-path-svlm", "small")] + ["--no-fused"]
    cli.run(lambda: {"PA": PA, "PI": PI}[stage].main(arguments))


def start(stage: str, folder: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, __file__, "child", stage, f"{folder}/", str(pause)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def results(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.json")) if not p.name.endswith(".meta.json")}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    chance, kills, pairs, differing, failed = random.Random(args.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        took = {}
        for stage in STAGES:
            started = time.perf_counter()
            process = start(stage, whole, 0.004)
            _, said = process.communicate()
            assert process.returncode == 0, said
            took[stage] = time.perf_counter() - started
        expected = results(whole)
        while kills < args.kills:
            folder = Path(place) / f"pair{pairs}"
            for stage in STAGES:
                while True:
                    process = start(stage, folder, 0.004)
                    try:  # kill near the end as well as during start-up
                        _, said = process.communicate(timeout=chance.uniform(0.3, 1.1) * took[stage])
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.communicate()
                        kills += 1
                        continue
                    failed += process.returncode != 0
                    if process.returncode:
                        print(said, file=sys.stderr)
                    break
            found = results(folder)
            left = list(folder.glob("*.journal*")) + list(folder.glob(".*"))
            if found != expected or left:
                differing += 1
                print(f"pair {pairs}: {[n for n in expected if found.get(n) != expected[n]]} differ, {left} left over")
            pairs += 1
            shutil.rmtree(folder)
            print(f"{kills} kills, {pairs} finished pairs, {differing} differing", flush=True)
    print(
        json.dumps(
            {"kills": kills, "pairs": pairs, "differing": differing, "failed_calls": failed, "files": len(expected)}
        )
    )
    sys.exit(differing or failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        main()
