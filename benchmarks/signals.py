"""Send SIGTERM and Ctrl-C to `scripts/mpa.sh` at random moments; check that nothing is orphaned, lost or paid twice.

    python benchmarks/signals.py               # 30 of each
    python benchmarks/signals.py --signals 5

The four stages are the real ones. The L-VLM is a local server that replies by rule and counts what it would bill; the
S-VLM is the embedded one. Each call of the script may get a signal, which is sent to the script only. After each call
no process may remain. A finished run must be byte-identical to an undisturbed one, and must have paid for each reply once.
The last line is a JSON object.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
IMAGES = 60
REPLY_SECONDS = 0.2


class Server(BaseHTTPRequestHandler):
    """Chat completions by rule: an annotation or an answer. `billed` counts each request by its content."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = json.loads(body)
        digest = hashlib.sha256(json.dumps(asked["messages"]).encode()).hexdigest()
        prompt, number = asked["messages"][0]["content"][1]["text"], int(digest[:8], 16)
        time.sleep(REPLY_SECONDS)
        text = (
            f"Question: what is shape {number % 5}?\nAnswer: red"
            if "Question:" in prompt
            else ("red", "blue")[number % 3 == 0]
        )
        with self.server.lock:
            self.server.billed[digest] += 1
        reply = {"id": "r", "object": "chat.completion", "created": 0, "model": asked["model"]}
        reply["choices"] = [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, "logprobs": None}
        ]
        reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def start(folder: Path, port: int) -> subprocess.Popen:
    settings = {
        **{"LVLM": "big", "LVLM_ENGINE": "openai", "SVLM": str(ROOT / "data/mini/student"), "DATASET": "easyVQA"},
        **{"RUN": f"{folder}/", "LIMIT": str(IMAGES), "DTYPE": "float32", "BATCH_SIZE": "8"},
        **{"MIN_PIXELS": "3136", "MAX_PIXELS": "3136", "PL_BATCH_SIZE": "2", "ACCUMULATION": "1"},
        "EVALUATE_FLAGS": f"--sample {IMAGES}",
        "SERVER_FLAGS": f"--base-url http://127.0.0.1:{port}/v1 --concurrency 4 --price-in 1 --price-out 1 --max-cost 1",
    }
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts/mpa.sh")],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_running(folder: Path) -> list[str]:
    return subprocess.run(["pgrep", "-fa", f"{folder}/"], capture_output=True, text=True).stdout.splitlines()


def results(folder: Path) -> dict[str, str]:
    """Digests of a run's results, the stages' files and the levelled model, without timings."""
    files = [p for p in folder.glob("P*.json") if not p.name.endswith(".meta.json")]
    files += [p for p in folder.glob("Eval*.json") if not p.name.endswith(".meta.json")]
    files += folder.glob("PL_*/model.safetensors")
    content = {}
    for path in files:
        text = path.read_bytes().replace(str(folder).encode(), b"RUN")
        content[str(path.relative_to(folder))] = hashlib.sha256(text).hexdigest()
    return content


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--signals", type=int, default=30, help="number of each signal (default: 30)")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # background jobs of a shell, and their children, ignore SIGINT
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.billed, server.lock = Counter(), threading.Lock()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port, chance = server.server_address[1], random.Random(args.seed)
    to_send = [number for number in CODES for _ in range(args.signals)]
    chance.shuffle(to_send)
    found = Counter(signals=len(to_send), runs=0, orphans=0, differing=0, wrong_codes=0, paid_twice=0, tracebacks=0)
    with tempfile.TemporaryDirectory() as place:
        whole, started = Path(place) / "whole", time.perf_counter()
        process = start(whole, port)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        took, expected, asked = time.perf_counter() - started, results(whole), len(server.billed)
        print(f"undisturbed: {took:.0f} s, {len(expected)} files, {asked} replies of the server", flush=True)
        while to_send:
            folder = Path(place) / f"run{found['runs']}"
            server.billed.clear()
            while True:
                process = start(folder, port)
                try:
                    said, _ = process.communicate(timeout=chance.uniform(0.02, 0.5) * took if to_send else None)
                except subprocess.TimeoutExpired:
                    number = to_send.pop()
                    process.send_signal(number)
                    said, _ = process.communicate()
                    if process.returncode == 0:  # the run had already ended
                        to_send.append(number)
                    elif process.returncode != CODES[number]:
                        found["wrong_codes"] += 1
                        print(f"exit code {process.returncode} after {number.name}:\n{said[-2000:]}", flush=True)
                found["tracebacks"] += "Traceback" in said
                if "Traceback" in said:
                    print(said[-3000:], flush=True)
                if orphans := left_running(folder):
                    found["orphans"] += 1
                    print("left running:", *orphans, sep="\n  ", flush=True)
                if process.returncode == 0:
                    break
                if process.returncode not in CODES.values():
                    sys.exit(f"the run failed with exit code {process.returncode}:\n{said}")
            differ = [name for name, digest in expected.items() if results(folder).get(name) != digest]
            found["differing"] += bool(differ)
            found["paid_twice"] += sum(server.billed.values()) - asked
            found["runs"] += 1
            if differ:
                print(f"differ: {', '.join(differ)}", flush=True)
            shutil.rmtree(folder)
            print(f"{len(to_send)} signals to go; {dict(found)}", flush=True)
    print(json.dumps(found))
    sys.exit(any(found[name] for name in ("orphans", "differing", "wrong_codes", "paid_twice", "tracebacks")))


if __name__ == "__main__":
    main()
