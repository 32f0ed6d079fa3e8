"""Kill PA and PI with --batch by kill -9 at random moments, many times, and check that nothing is lost or paid for twice.

    python benchmarks/batch.py                # 200 kills
    python benchmarks/batch.py --kills 20

Stages, engine and client are the real ones; the server (`tests/fake_batches.py`) has OpenAI's files and batches, replies by rule
and keeps the true bill. Both models are behind it. PA of 300 easy-VQA images and PI are called until they finish. Each call may be
killed: at a random moment, or when the server gets one of its calls, before or after that has an effect. --max-cost is 2 % above
what an undisturbed pair costs. At the end of a pair, its result files must be those that single requests give; each request was
submitted and served once; the account is the bill. Last, requests and rounds are counted of PA that asks its own questions at once.
The last line is a JSON object.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import PA
import PI
from fake_batches import BatchServer
from fake_server import completion, text_of
from faults import results

from mpa.engines import openai_batch, pacing
from mpa.files.records import read_json
from mpa.stages import cli

PRICES = {"price_in": 1.0, "price_out": 10.0}
STAGES = {"PA": PA, "PI": PI}
HANGS = 60.0  # seconds


def rule(body: dict, _: int = 0) -> tuple[int, dict]:
    """A reply that depends on the request alone: sometimes no annotation, and the S-VLM is often wrong."""
    asked = json.dumps([body["model"], body["messages"], body.get("seed")])
    chance = int(hashlib.sha256(asked.encode()).hexdigest()[:8], 16)
    usage = {"prompt_tokens": 600 + chance % 100, "completion_tokens": 1 + chance % 60}
    if "Question:" in text_of(body):
        text = "nothing to say" if chance % 7 == 0 else f"Question: is it number {chance % 9}?\nAnswer: yes"
    else:
        text = "yes" if chance % 3 or body["model"] == "big" else "no"
    return 200, completion(text, usage=usage)


def arguments(server: BatchServer, stage: str, folder: Path, *more: str) -> list[str]:
    prices = [word for name, value in PRICES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    flags = ["--dataset", "easyVQA", "--limit", "300", "--engine", "openai", "--base-url", server.url, *prices]
    models = ["--model-path-lvlm", "big", *(["--model-path-svlm", "small"] if stage == "PI" else [])]
    return [*flags, *models, "--run", f"{folder}/", *more]


def start(server: BatchServer, stage: str, folder: Path, *more: str) -> int:
    """The process id of a call. It is a fork, so that a call takes a second, and most kills come while it works."""
    given = arguments(server, stage, folder, *more)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(folder.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        sys.argv = [f"{stage}.py"]
        cli.run(lambda: STAGES[stage].main(given))
        code = 0
    finally:
        os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a process (negative: a signal); None where it still runs after so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def whole(server: BatchServer, folder: Path, *more: str) -> tuple[dict[str, bytes], float]:
    """(the files of an undisturbed pair, the seconds of its stages)."""
    started = time.monotonic()
    for stage in STAGES:
        own = [flag for flag in more if stage == "PA" or not flag.endswith("fused")]
        code = ended(start(server, stage, folder, *own), HANGS)
        assert code == 0, (folder.parent / "said.txt").read_text()
    return results(folder), (time.monotonic() - started) / len(STAGES)


def account(folder: Path) -> tuple[float, float]:
    """(what the run's account says was spent, what is still set aside)."""
    book = read_json(folder / "spending.json")
    return sum(stage["cost"] for stage in book["spent"].values()), sum(book["reserved"].values())


class Deadly:
    """The server's `fault`: kills the call `pid` when the server gets its call number `at`, before or after that has an effect."""

    def __init__(self, chance: random.Random):
        self.chance, self.pid, self.at, self.calls = chance, 0, 0, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls != self.at:
            return None
        while not self.pid:
            time.sleep(0.001)
        os.kill(self.pid, signal.SIGKILL)
        return self.chance.choice(["lost", "cut", None])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    os.environ["OPENAI_API_KEY"] = "none"
    openai_batch.FIRST_PAUSE = openai_batch.LONGEST_PAUSE = 0.02
    openai_batch.LISTED_AFTER, pacing.MAX_BACKOFF, openai_batch.MAX_REQUESTS = 0.0, 0.05, 100
    chance, kills, pairs, started = random.Random(args.seed), 0, 0, time.monotonic()
    wrong = dict.fromkeys(
        ("differing", "submitted_twice", "served_twice", "above_the_cap", "bill_differs", "failed_calls"), 0
    )
    with tempfile.TemporaryDirectory() as place:
        server = BatchServer(rule)
        expected, _ = whole(server, Path(place) / "single", "--no-fused")
        expected.pop("spending.json")
        requests = {"single, two stages": server.number}
        whole(server, Path(place) / "fused")
        requests["single, follow-ups in PA"] = server.number - requests["single, two stages"]
        server.stop()
        server = BatchServer(rule, takes=0.1)
        batch, took = whole(server, Path(place) / "batch", "--batch", "--no-fused")
        batch.pop("spending.json")
        assert batch == expected
        requests["batch"] = server.number
        rounds, cost = len(server.batches), server.bill(**PRICES)
        server.stop()
        cap = 1.02 * cost
        while kills < args.kills:
            folder, server, deadly = Path(place) / f"pair{pairs}", BatchServer(rule, takes=0.1), Deadly(chance)
            server.fault = deadly
            for stage in STAGES:
                code = None
                while code != 0:
                    deadly.calls, deadly.pid, deadly.at = 0, 0, chance.choice([0, chance.randint(2, 40)])
                    deadly.pid = start(server, stage, folder, "--batch", "--max-cost", str(cap))
                    code = ended(deadly.pid, chance.uniform(0.05, 1.1) * took if not deadly.at else HANGS)
                    if code is None:
                        os.kill(deadly.pid, signal.SIGKILL)
                        os.waitpid(deadly.pid, 0)
                    kills += code in (None, -signal.SIGKILL)
                    if code not in (0, None, -signal.SIGKILL):
                        wrong["failed_calls"] += 1
                        print((folder.parent / "said.txt").read_text(), file=sys.stderr)
                        break
            found, (spent, reserved) = results(folder), account(folder)
            found.pop("spending.json")
            bill, left = server.bill(**PRICES), [*folder.glob("*.journal*"), *folder.glob("batches/*")]
            wrong["differing"] += found != expected or bool(left)
            wrong["submitted_twice"] += max(server.lines().values()) > 1
            wrong["served_twice"] += max(server.served.values()) > 1
            wrong["above_the_cap"] += max(bill, spent) > cap
            wrong["bill_differs"] += abs(bill - spent) > 1e-9 or reserved > 0
            server.stop()
            shutil.rmtree(folder)
            pairs += 1
            print(f"{kills} kills, {pairs} finished pairs, {wrong}", flush=True)
    facts = {"kills": kills, "pairs": pairs, **wrong, "requests": requests, "batches": rounds, "cost": round(cost, 6)}
    print(json.dumps(facts | {"cap": round(cap, 6), "seconds": round(time.monotonic() - started)}))
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
