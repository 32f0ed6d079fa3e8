"""The openai engine against a real server with the embedded teacher, through a proxy that injects faults."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import MINI, TEACHER, python
from test_engine import QUESTIONS
from test_engine import replies as hf_replies

from mpa.engines import Request, open_engine
from mpa.files.records import InputError, read_json
from mpa.method.prompts import TASK_PROMPTS, answer_prompt

MODEL = str(TEACHER)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    """`transformers serve` with the embedded teacher; its address."""
    port = free_port()
    command = [Path(sys.executable).with_name("transformers"), "serve", MODEL, "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(
        [*map(str, command), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        while True:
            assert process.poll() is None
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


class ProxyServer(ThreadingHTTPServer):
    request_queue_size = 64  # more than the requests that are sent at once: none is refused on a busy machine


class Proxy(BaseHTTPRequestHandler):
    """Forwards requests, except for those that must fail."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        with server.lock:
            fault = next(server.faults, None)
            server.seen[repr(fault)] += 1
            server.keys.add(self.headers["Authorization"])
        if callable(fault):
            fault = fault(json.loads(body))
        if fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(1.5)
        if fault in (None, "slow"):
            connection = http.client.HTTPConnection(server.behind.netloc, timeout=60)
            connection.request("POST", self.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            self.send(answer.status, answer.read())
        elif fault == "garbage":
            self.send(200, b'{"id": "x", "choi')
        elif fault == "html":
            self.send(200, b"<html>busy</html>", "text/html")
        elif fault == "empty":
            self.send(200, b'{"error": "overloaded"}')
        else:
            status, error, headers = fault
            self.send(status, json.dumps({"error": error}).encode(), **headers)

    def send(self, status: int, body: bytes, content_type: str = "application/json", **headers):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def proxy(server, monkeypatch):
    """`proxy(faults)` -> (address, log). One fault per request, in order; None forwards the request."""
    started = []
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")

    def start(faults=()):
        running = ProxyServer(("127.0.0.1", 0), Proxy)
        running.behind, running.faults, running.lock = urlsplit(server), iter(faults), threading.Lock()
        running.seen, running.keys = Counter(), set()
        threading.Thread(target=running.serve_forever, daemon=True).start()
        started.append(running)
        return f"http://127.0.0.1:{running.server_port}/v1", running

    yield start
    for running in started:
        running.shutdown()
        running.server_close()


def requests(images, **more) -> list[Request]:
    paths = sorted(images.rglob("*.png"))[:6]
    asked = [Request(f"q{i}", str(p), answer_prompt(QUESTIONS[i % 3]), **more) for i, p in enumerate(paths)]
    return asked + [Request(f"a{i}", str(p), TASK_PROMPTS["general"], **more) for i, p in enumerate(paths)]


def replies(asked, base_url, **settings) -> dict[str, dict]:
    with open_engine("openai", model_path=MODEL, base_url=base_url, **settings) as engine:
        return {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}


def texts(found: dict[str, dict]) -> dict:
    return {
        key: (reply["text"], reply["tokens"], reply.get("follow_up", {}).get("text")) for key, reply in found.items()
    }


FAULTS = [
    (429, {"message": "slow down"}, {"Retry_After": "0.3"}),
    (429, {"message": "slow down"}, {"Retry_After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    *("cut", None, "garbage", "html", "empty", "slow", None),
    (500, {"message": "oops"}, {}),
    (503, {"message": "busy"}, {}),
    *(None, "cut", "garbage"),
]


def test_replies_are_those_of_the_hf_engine_whatever_fails_on_the_way(images, proxy):
    asked = requests(images, follow_up="paper")
    address, seen = proxy(FAULTS)
    got = replies(asked, address, concurrency=4)
    assert texts(got) == texts(hf_replies(asked, batch_size=4, workers=0))
    assert {repr(fault) for fault in FAULTS} <= set(seen.seen)  # each one happened
    assert seen.keys == {"Bearer sk-very-secret"}


def test_one_refused_request_costs_only_itself(images, proxy, tmp_path):
    (tmp_path / "bad.png").write_text("x")
    asked = [
        *requests(images)[:4],
        Request("bad", str(tmp_path / "bad.png"), "q"),
        Request("no", asked_path(images), "NO"),
    ]

    def refuse(body):
        wanted = body["messages"][0]["content"][1]["text"] == "NO"
        return (400, {"message": "against the policy"}, {}) if wanted else None

    address, _ = proxy([refuse] * 20)
    got = replies(asked, address, concurrency=1)
    assert got["bad"]["error"].startswith("image: cannot be read")
    assert got["no"] == {"key": "no", "error": "server: 400: against the policy", "permanent": True}
    assert all(got[r.key]["text"] for r in asked[:4])


def asked_path(images) -> str:
    return str(next(images.glob("*.png")))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ((401, {"message": "Incorrect API key provided: sk-very-secret"}, {}), "401: Incorrect API key provided: …"),
        ((404, {"message": "no such model"}, {}), "404: no such model"),
        ((429, {"message": "pay first", "code": "insufficient_quota"}, {}), "429: pay first"),
        ((400, {"message": "unknown field"}, {}), "refuses every request: 400: unknown field"),
    ],
)
def test_what_concerns_every_request_ends_the_run_and_keeps_the_key_to_itself(images, proxy, fault, says):
    address, _ = proxy([fault] * 99)
    with pytest.raises(InputError) as error:
        replies(requests(images), address, concurrency=2)
    assert says in str(error.value)
    assert "secret" not in str(error.value)


def test_a_server_that_is_not_there_ends_the_run_after_a_while(images, monkeypatch):
    monkeypatch.setattr("mpa.engines.pacing.MAX_BACKOFF", 0.05)
    with pytest.raises(InputError, match="keeps failing: APIConnectionError"):
        replies(requests(images)[:1], f"http://127.0.0.1:{free_port()}/v1")


def test_a_server_without_log_probabilities_is_asked_without(images, proxy):
    def refuse(body):
        return (400, {"message": "logprobs are not supported"}, {}) if "logprobs" in body else None

    address, _ = proxy([refuse] * 99)
    got = replies(requests(images)[:3], address, concurrency=1)
    assert [reply["logprob"] for reply in got.values()] == [None] * 3


def test_the_account_adds_up_and_no_more_is_spent_than_allowed(images, proxy, tmp_path):
    address, _ = proxy()
    replies(requests(images)[:1], address)  # the server loads its model: a request that fails meanwhile counts as paid
    asked = [replace(r, key=f"{r.key} {i}") for i in range(8) for r in requests(images, max_new_tokens=16)[:6]]
    prices = {"price_in": 10.0, "price_out": 1000.0, "ledger": tmp_path / "whole.json"}
    with open_engine("openai", model_path=MODEL, base_url=address, **prices) as engine:
        got = [reply for batch in engine.generate(asked) for reply in batch]
        whole = engine.facts()
    assert whole["tokens_out"] == sum(reply["tokens"] for reply in got)
    assert whole["cost"] == pytest.approx((10 * whole["tokens_in"] + 1000 * whole["tokens_out"]) / 1e6)
    kept, most = [], whole["cost"] / 2
    poor = prices | {"ledger": tmp_path / "poor.json", "max_cost": most}
    with (
        open_engine("openai", model_path=MODEL, base_url=address, **poor) as engine,
        pytest.raises(InputError, match="is nearly spent"),
    ):
        for batch in engine.generate(asked):
            kept += batch
    assert 1 <= len(kept) < len(asked)
    assert 0 < engine.facts()["cost"] <= most
    done = {reply["key"] for reply in kept}
    rest = replies([r for r in asked if r.key not in done], address)
    assert {r["key"]: r["text"] for r in kept} | {k: r["text"] for k, r in rest.items()} == {
        r["key"]: r["text"] for r in got
    }


def test_what_is_missing_is_said_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        open_engine("openai", model_path="gpt-4o")
    with pytest.raises(InputError, match="--max-cost needs --price-in and --price-out"):
        open_engine("openai", model_path="gpt-4o", base_url="http://x", max_cost=1.0)


def test_pa_by_a_server_is_taken_over_by_pi_and_no_key_is_in_any_file(images, proxy, tmp_path):
    """The L-VLM is behind a server, the S-VLM is local. The budget stops the run, and a higher budget continues it."""
    student = tmp_path / "student"
    shutil.copytree(TEACHER.parent / "student", student)
    address, _ = proxy()
    data = ["--dataset", "images", "--image-root", images, *MINI, "--run", f"{tmp_path}/run", "--tries", "0"]
    server = ["--engine", "openai", "--base-url", address, "--price-in", "10", "--price-out", "10"]
    pa = ["PA.py", *data, *server, "--model-path-lvlm", MODEL]
    poor = python(*pa, "--max-cost", "0.005")
    assert poor.returncode == 1
    assert "raise it and run the same" in poor.stderr
    done = python(*pa)
    assert done.returncode == 0, done.stderr
    assert "tokens in and" in done.stdout
    annotations = read_json(tmp_path / "run/PA_teacher_images.json")
    assert sum(bool(r["predicted_question"]) for r in annotations) >= 11
    flags = ["--engine-lvlm", "openai", "--base-url", address, "--model-path-lvlm", MODEL, "--model-path-svlm", student]
    done = python("PI.py", *[d for d in data if d not in ("--tries", "0")], *flags)
    assert done.returncode == 0, done.stderr
    assert "PA already produced" in done.stdout
    for path in (tmp_path / "run").iterdir():
        assert b"secret" not in path.read_bytes()
