"""The openai engine: its budget is kept to, and no reply that was paid for is lost or asked for twice."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, python
from fake_server import ANNOTATION, USAGE, annotate_or_answer, completion, text_of
from server_requests import asked, collect, stage_flags

from mpa.engines.budget import Budget
from mpa.files.records import InputError, read_json


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("usage", [USAGE, None, {}], ids=["usage", "none", "empty"])
def test_the_budget_of_a_run_is_never_exceeded(images, serve, tmp_path, concurrency, usage):
    def rule(body, _):
        return 200, completion(ANNOTATION if "Question:" in text_of(body) else "red", usage=usage)

    server, most = serve(rule, pause=0.01), 0.05
    prices = {"price_in": 1.0, "price_out": 10.0, "max_cost": most, "ledger": tmp_path / "spending.json"}
    found, failure, _ = collect(server, asked(images, follow_up="paper"), concurrency=concurrency, **prices)
    assert "--max-cost 0.05 is nearly spent" in str(failure)
    assert server.billed >= 10 and len(found) >= 5
    assert server.billed * (1000 * 1 + 100 * 10) / 1e6 <= most  # each reply costs 0.002
    before = server.billed
    collect(
        server, asked(images, follow_up="paper"), concurrency=concurrency, **prices
    )  # another call, the same budget
    assert server.billed == before
    assert all(reply["text"] == ANNOTATION for reply in found.values())


@pytest.mark.parametrize(
    "counts", [(0, 100), (-5, 100), (1, 100), (3.5, 100), ("1000", 100), (True, 100), (10**12, 100), (1000, 0)]
)
def test_counts_of_tokens_that_cannot_be_cost_as_much_as_was_reserved(images, serve, capsys, counts):
    usage = dict(zip(("prompt_tokens", "completion_tokens"), counts, strict=True))
    server = serve(lambda *_: (200, completion("a " * 100, usage=usage)), pause=0.01)
    _, failure, facts = collect(server, asked(images), price_in=1.0, price_out=10.0, max_cost=0.05)
    assert "is nearly spent" in str(failure) and 0 < facts["cost"] <= 0.05 and facts["tokens_in"] == 0
    assert server.billed * (1000 * 1 + 128 * 10) / 1e6 <= 0.05
    said = capsys.readouterr().err.splitlines()  # a connection that broke may be told beside it
    assert any("counts at its upper estimate" in line for line in said) and len(said) == len(set(said))


def test_what_a_killed_process_had_reserved_counts_as_spent(tmp_path):
    book = {"spent": {}, "reserved": {f"{os.uname().nodename}:999999999": 0.75, "elsewhere:1": 0.1}}
    (tmp_path / "spending.json").write_text(json.dumps(book))
    budget = Budget(tmp_path / "spending.json", "PA m", max_cost=1.0)
    assert budget.spent() == pytest.approx(0.75)
    assert not budget.reserve(0.2) and budget.reserve(0.1)
    budget.charge(0.1, requests=1, cost=0.05)
    assert budget.account()["cost"] == pytest.approx(0.05)


@pytest.mark.parametrize("content", ["", "[]", '{"spent": 1}', '{"spent": {"a": {"cost": "x"}}, "reserved": {}}'])
def test_a_damaged_account_is_named(tmp_path, content):
    (tmp_path / "spending.json").write_text(content)
    with pytest.raises(InputError, match=r"spending\.json"):
        Budget(tmp_path / "spending.json", "PA m")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"message": "flagged by moderation"}),
        (403, {"message": "no"}),
        (429, {"code": "insufficient_quota", "message": "pay"}),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 16])
def test_a_follow_up_that_fails_leaves_the_annotation(images, serve, status, error, concurrency):
    def rule(body, _):
        return annotate_or_answer(body) if "Question:" in text_of(body) else (status, {"error": error})

    server = serve(rule)
    found, failure, _ = collect(server, asked(images, 12, follow_up="paper"), concurrency=concurrency)
    assert len(found) == server.billed  # nothing that was paid is lost
    assert all(reply["text"] == ANNOTATION for reply in found.values())
    assert (failure is not None) == (status == 429) and (failure or len(found) == 12)


def stopped(command: list[str], ready: threading.Semaphore, blocked: int, gate: threading.Event, number: int) -> str:
    """Stop the command with `blocked` requests under way, which are replied to when it has heard -> what it said."""
    command = [sys.executable, str(ROOT / "scripts" / command[0]), *command[1:]]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(blocked):
        assert ready.acquire(timeout=120)
    process.send_signal(number)
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("stopping: "):
            gate.set()
    assert process.wait() == 128 + number and "Traceback" not in said, said
    return said


def pa(images, server, run: Path, *more) -> list[str]:
    flags = stage_flags(server, images)
    return ["PA.py", *map(str, flags), "--model-path-lvlm", "m", "--concurrency", "4", "--run", f"{run}/", *more]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_under_way_at_a_signal_is_awaited_and_kept(images, serve, tmp_path, number):
    """Four replies have come, four are under way, four are not sent yet."""
    ready, gate = threading.Semaphore(0), threading.Event()

    def rule(body, nth):
        if nth > 4:
            ready.release()
            gate.wait()
        return annotate_or_answer(body)

    server, run = serve(rule), tmp_path / "run"
    stopped(pa(images, server, run, "--no-fused"), ready, 4, gate, number)
    journal = (run / "PA_m_images.journal.jsonl").read_text().splitlines()
    assert len(journal) - 1 == server.billed == 8
    assert python(*pa(images, server, run, "--no-fused")).returncode == 0
    assert server.billed == 12  # each image once
    meta = read_json(run / "PA_m_images.meta.json")
    assert (meta["requests"], meta["tokens_in"]) == (12, 12_000)  # of both calls


def test_a_follow_up_that_a_signal_came_before_is_asked_by_the_next_call(images, serve, tmp_path):
    ready, gate = threading.Semaphore(0), threading.Event()
    gate.set()

    def rule(body, _):
        if "Question:" in text_of(body) and not gate.is_set():
            ready.release()
            gate.wait()
        return annotate_or_answer(body)

    server = serve(rule)
    assert python(*pa(images, server, tmp_path / "whole")).returncode == 0
    asked = server.billed
    for _ in range(2):
        gate.clear()
        stopped(pa(images, server, tmp_path / "run"), ready, 4, gate, signal.SIGTERM)
    assert "stopped before it was asked" in (tmp_path / "run/PA_m_images.journal.jsonl").read_text()
    assert python(*pa(images, server, tmp_path / "run")).returncode == 0
    assert (tmp_path / "run/PA_m_images.json").read_bytes() == (tmp_path / "whole/PA_m_images.json").read_bytes()
    assert server.billed == 2 * asked  # nothing was paid for twice


def test_no_failure_of_a_server_makes_a_run_cost_more_than_allowed():
    """A short version of benchmarks/budget.py, which has 20 seeds."""
    command = [sys.executable, ROOT / "benchmarks/budget.py", "--seeds", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["requests"] > 50 and 0 < found["largest_bill"] <= found["largest_account"] <= found["cap"]
    assert (found["exceeded"], found["without_a_limit"], found["below_bill"]) == (0, 0, 0)
