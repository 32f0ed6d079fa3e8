"""Ask a server that fails in every way it can, sixteen requests at a time, and check that no more is billed than allowed.

    python benchmarks/budget.py               # 20 seeds
    python benchmarks/budget.py --seeds 3

The `openai` engine is the real one. The server replies by chance: prompts too long for its context, values and parameters that
it does not take, thoughts that use up the limit, replies without text, without JSON or cut off, token counts that are missing or
cannot be, rate limits, outages. It keeps the true bill: also of replies that were lost, and of 4,000 tokens for a request without
a token limit. Each run gets about half of the money that it needs, in two calls with one account. The last line is a JSON object.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from mpa.engines import Request, open_engine, pacing
from mpa.files.records import InputError
from mpa.method.prompts import TASK_PROMPTS

PRICES = {"price_in": 1.0, "price_out": 10.0}  # of a million tokens
CONCURRENCY, IMAGES, LIMIT, WITHOUT_LIMIT = 16, 60, 128, 4000
MOST = 0.1  # money of a run, which needs about twice as much
TOO_LONG = "max_completion_tokens is too large: 128. This model's maximum context length is 4096 tokens"
# (share of the requests, status, error)
ERRORS = [
    (0.06, 400, {"message": TOO_LONG}),
    (0.04, 400, {"message": "max_tokens must be at least 1, got -186."}),
    (0.04, 400, {"message": "temperature must be in [0,1)"}),
    (0.02, 400, {"message": "Unsupported parameter: 'max_completion_tokens' is not supported with this prompt."}),
    (0.02, 400, {"message": "the billing statement in this image is sensitive"}),
    (0.02, 404, {"message": "not found"}),
    (0.02, 403, {"message": "no"}),
    (0.10, 429, {"message": "too many requests"}),
    (0.05, 500, {"message": "out of order"}),
]
SHAPES = [
    "thoughts",
    "no text",
    "no JSON",
    "lost",
    "no usage",
    "no prompt tokens",
    "half a usage",
    "tool",
    "unknown end",
]


class Server(BaseHTTPRequestHandler):
    """Chat completions by chance. `bill` is what they cost; `unlimited` counts requests without a token limit."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            chance = random.Random(server.chance.random())
            server.requests += 1
        time.sleep(chance.uniform(0, 0.02))
        unsupported = next((name for name in server.unsupported if name in body), None)
        if unsupported:
            message = f"Unsupported parameter: '{unsupported}' is not supported with this model."
            return self.send(400, {"error": {"message": message, "param": unsupported}})
        drawn = chance.random()
        for share, status, error in ERRORS:
            if drawn < share:
                return self.send(status, {"error": error}, {"Retry-After": "0.02"} if status == 429 else {})
            drawn -= share
        return self.reply(body, chance)

    def reply(self, body: dict, chance: random.Random) -> None:
        shape = chance.choice([*SHAPES, *["whole"] * len(SHAPES)])
        most = body.get("max_completion_tokens") or body.get("max_tokens")
        tokens_out = most if shape == "thoughts" else chance.randint(1, most or WITHOUT_LIMIT)
        tokens_in = chance.randint(600, 700)
        with self.server.lock:
            self.server.bill += (tokens_in * PRICES["price_in"] + tokens_out * PRICES["price_out"]) / 1e6
            self.server.unlimited += most is None
        annotating = "Question:" in body["messages"][0]["content"][1]["text"]
        text = "Question: what color is it?\nAnswer: red" if annotating else "red"
        message, reason = {"role": "assistant", "content": text}, "stop"
        usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
        if shape in ("thoughts", "no text", "tool"):
            message["content"] = None
            reason = {"thoughts": "length", "no text": "stop", "tool": "tool_calls"}[shape]
        usage = {"no usage": None, "no prompt tokens": usage | {"prompt_tokens": 0}}.get(shape, usage)
        if shape == "half a usage":
            usage = {"prompt_tokens": tokens_in, "completion_tokens": None}
        reason = "tired" if shape == "unknown end" else reason
        if shape == "lost":
            self.close_connection = True
            return self.connection.close()
        document = {"choices": [{"index": 0, "finish_reason": reason, "message": message}], "usage": usage}
        return self.send(200, b"<html>busy</html>" if shape == "no JSON" else document)

    def send(self, status: int, document, headers=()) -> None:
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Running(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

    def handle_error(self, *_):  # connections that were closed on purpose
        pass


def run(seed: int, folder: Path) -> dict:
    """What a run costs: {"bill", "account", "unlimited", "requests", "replies", "spent"}."""
    server, chance = Running(("127.0.0.1", 0), Server), random.Random(seed)
    server.chance, server.lock = chance, threading.Lock()
    server.bill = server.unlimited = server.requests = 0
    server.unsupported = chance.sample(["logprobs", "max_completion_tokens", "seed"], chance.randint(0, 2))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    images = sorted(folder.glob("*.png"))
    requests = [
        Request(f"{i}", str(image), TASK_PROMPTS["general"], LIMIT, float(i % 2), seed=seed, follow_up="paper")
        for i, image in enumerate(images)
    ]
    settings = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "concurrency": CONCURRENCY, **PRICES}
    ledger, replies, spent = folder / f"spending-{seed}.json", {}, False
    for _ in range(2):  # the second call asks for what the first could not
        with open_engine("openai", model_path="m", max_cost=MOST, ledger=ledger, **settings) as engine:
            try:
                for found in engine.generate(requests, replies):
                    replies |= {reply["key"]: reply for reply in found if "text" in reply or reply["permanent"]}
            except InputError as error:
                spent = "is nearly spent" in str(error)
                if not spent:
                    print(f"seed {seed}: {error}", flush=True)
            account = engine.budget.spent()
    server.shutdown()
    server.server_close()
    facts = {"unlimited": server.unlimited, "requests": server.requests, "replies": len(replies), "spent": spent}
    return {"bill": server.bill, "account": account, **facts}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=20)
    args = p.parse_args()
    pacing.MAX_BACKOFF = 0.05
    with tempfile.TemporaryDirectory() as place:
        for i in range(IMAGES):
            Image.new("RGB", (64, 64), (i, 99, 200 - i)).save(Path(place) / f"{i:03}.png")
        started, runs = time.monotonic(), []
        for seed in range(args.seeds):
            runs.append(run(seed, Path(place)))
            print(f"seed {seed}: {runs[-1]}", flush=True)
    found = {
        "seeds": len(runs),
        "concurrency": CONCURRENCY,
        "requests": sum(r["requests"] for r in runs),
        "cap": MOST,
        "exceeded": sum(max(r["bill"], r["account"]) > MOST for r in runs),
        "largest_bill": round(max(r["bill"] for r in runs), 6),
        "largest_account": round(max(r["account"] for r in runs), 6),
        "below_bill": sum(r["account"] < r["bill"] - 1e-9 for r in runs),  # accounts that hold less than was billed
        "stopped_by_the_budget": sum(r["spent"] for r in runs),
        "without_a_limit": sum(r["unlimited"] for r in runs),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(found))
    sys.exit(bool(found["exceeded"] or found["without_a_limit"] or found["below_bill"]))


if __name__ == "__main__":
    main()
