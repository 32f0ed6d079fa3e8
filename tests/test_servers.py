"""The openai engine against servers that misbehave in every way: money, lost replies, rate limits, parameters, bodies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, python
from fake_server import ANNOTATION, USAGE, annotate_or_answer, completion, text_of

from mpa.engines import Request, open_engine
from mpa.engines.budget import Budget
from mpa.engines.servers import retry_after
from mpa.prompts import TASK_PROMPTS
from mpa.records import InputError, read_json


def asked(images, n=40, prompt=TASK_PROMPTS["general"], **more) -> list[Request]:
    paths = sorted(images.rglob("*.png"))
    return [Request(f"q{i}", str(paths[i % len(paths)]), prompt, max_new_tokens=128, **more) for i in range(n)]


def collect(server, requests, **settings) -> tuple[dict, InputError | None, dict]:
    found, failure = {}, None
    with open_engine("openai", model_path="m", base_url=server.url, **settings) as engine:
        try:
            for replies in engine.generate(requests):
                found |= {reply["key"]: reply for reply in replies}
        except InputError as error:
            failure = error
        return found, failure, engine.facts()


# --- money -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("usage", [USAGE, None, {}], ids=["usage", "none", "empty"])
def test_the_budget_of_a_run_is_never_exceeded(images, serve, tmp_path, concurrency, usage):
    def rule(body, _):
        return 200, completion(ANNOTATION if "Question:" in text_of(body) else "red", usage=usage)

    server, most = serve(rule, pause=0.01), 0.05
    prices = {"price_in": 1.0, "price_out": 10.0, "max_cost": most, "ledger": tmp_path / "spending.json"}
    found, failure, _ = collect(server, asked(images, follow_up="paper"), concurrency=concurrency, **prices)
    assert "--max-cost 0.05 is all but spent" in str(failure)
    assert server.billed >= 10 and len(found) >= 5
    assert server.billed * (1000 * 1 + 100 * 10) / 1e6 <= most  # each reply costs 0.002
    before = server.billed
    collect(
        server, asked(images, follow_up="paper"), concurrency=concurrency, **prices
    )  # another call, the same budget
    assert server.billed == before
    assert all(reply["text"] == ANNOTATION for reply in found.values())


def test_what_a_killed_process_had_reserved_counts_as_spent(tmp_path):
    book = {"spent": {}, "reserved": {f"{os.uname().nodename}:999999999": 0.75, "elsewhere:1": 0.1}}
    (tmp_path / "spending.json").write_text(json.dumps(book))
    budget = Budget(tmp_path / "spending.json", "PA m", most=1.0)
    assert budget.spent() == pytest.approx(0.75)
    assert not budget.reserve(0.2) and budget.reserve(0.1)
    budget.settle(0.1, requests=1, cost=0.05)
    assert budget.account()["cost"] == pytest.approx(0.05)


@pytest.mark.parametrize("content", ["", "[]", '{"spent": 1}', '{"spent": {"a": {"cost": "x"}}, "reserved": {}}'])
def test_a_damaged_account_is_named(tmp_path, content):
    (tmp_path / "spending.json").write_text(content)
    with pytest.raises(InputError, match=r"spending\.json"):
        Budget(tmp_path / "spending.json", "PA m")


# --- paid replies ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_under_way_at_a_signal_is_awaited_and_kept(images, serve, tmp_path, number):
    server = serve(annotate_or_answer, pause=0.5)
    run = tmp_path / "run"
    command = [
        sys.executable,
        ROOT / "scripts/PA.py",
        "--dataset",
        "images",
        "--image-root",
        images,
        "--run",
        f"{run}/",
    ]
    command += [
        "--engine",
        "openai",
        "--base-url",
        server.url,
        "--model-path-lvlm",
        "m",
        "--concurrency",
        "4",
        "--no-fused",
    ]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    while server.billed < 4:
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in said, said
    journal = (run / "PA_m_images.journal.jsonl").read_text().splitlines()
    assert len(journal) - 1 == server.billed < 12
    assert python(*[str(c) for c in command[1:]][0:0], "PA.py", *map(str, command[2:])).returncode == 0
    assert server.billed == 12  # each image once
    meta = read_json(run / "PA_m_images.meta.json")
    assert (meta["requests"], meta["tokens_in"]) == (12, 12_000)  # of both calls


def test_a_follow_up_that_a_signal_came_before_is_asked_by_the_next_call(images, serve, tmp_path):
    server = serve(annotate_or_answer, pause=0.3)

    def command(run: Path) -> list[str]:
        flags = ["--dataset", "images", "--image-root", images, "--engine", "openai", "--base-url", server.url]
        return [*map(str, flags), "--model-path-lvlm", "m", "--concurrency", "4", "--run", f"{run}/"]

    def annotations() -> int:
        return sum("Question:" in text_of(body) for body in server.bodies)

    assert python("PA.py", *command(tmp_path / "whole")).returncode == 0
    asked = server.billed
    for _ in range(2):
        before = annotations()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts/PA.py"), *command(tmp_path / "run")], start_new_session=True
        )
        while annotations() < before + 2:  # they are under way
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert "stopped before it was asked" in (tmp_path / "run/PA_m_images.journal.jsonl").read_text()
    assert python("PA.py", *command(tmp_path / "run")).returncode == 0
    assert (tmp_path / "run/PA_m_images.json").read_bytes() == (tmp_path / "whole/PA_m_images.json").read_bytes()
    assert server.billed == 2 * asked  # nothing was paid for twice


# --- rate limits -----------------------------------------------------------------------------------


def test_no_request_is_lost_to_a_rate_limit(images, serve):
    """36 replies in each window of 3 seconds."""
    windows = Counter()

    def rule(body, _):
        window = int(time.monotonic() / 3)
        windows[window] += 1
        if windows[window] > 36:
            return (
                429,
                {"error": {"message": "rate limit reached", "code": "rate_limit_exceeded"}},
                {"Retry-After": "1"},
            )
        return annotate_or_answer(body)

    found, failure, _ = collect(serve(rule), asked(images, 80), concurrency=16)
    assert failure is None and sum("text" in reply for reply in found.values()) == 80


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", None),
        ("nan", None),
        ("-5", None),
        ("inf", None),
        ("x", None),
        (None, None),
        ("2.5", 2.5),
        ("1e9", 3600.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None),
    ],
)
def test_a_retry_after_never_switches_the_pause_off(value, seconds):
    assert retry_after({"retry-after": value}) == seconds


# --- what ends a run, and what does not ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (402, {"message": "Payment Required"}),
        (429, {"message": "x", "code": "billing_hard_limit_reached"}),
        (400, {"message": "x", "code": "billing_not_active"}),
        (403, {"message": "Your credit balance is too low"}),
        (401, {"message": "Incorrect API key provided: sk-very-secret"}),
        (404, {"message": "The model `m` does not exist or you do not have access to it", "code": "model_not_found"}),
        (403, {"message": "Your account has been deactivated", "code": "account_deactivated"}),
    ],
)
def test_a_failure_of_the_account_ends_the_run_with_everything_kept(images, serve, status, error):
    def rule(body, number):
        return annotate_or_answer(body) if number <= 5 else (status, {"error": error})

    server = serve(rule)
    found, failure, _ = collect(server, asked(images, 20), concurrency=4)
    assert str(status) in str(failure) and "secret" not in str(failure)
    assert len(found) == server.billed == 5 and all("text" in reply for reply in found.values())


def test_one_flagged_image_costs_itself_alone(images, serve):
    def rule(body, number):
        flagged = text_of(body) == "BAD"
        return (
            (403, {"error": {"message": "Your request was flagged", "code": "content_policy_violation"}})
            if flagged
            else annotate_or_answer(body)
        )

    requests = [*asked(images, 1, prompt="BAD"), *[r for r in asked(images, 8)][1:]]
    found, failure, _ = collect(serve(rule), requests, concurrency=1)
    assert failure is None and len(found) == 8
    assert found["q0"]["permanent"] and "flagged" in found["q0"]["error"]


# --- parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 403, 422])
@pytest.mark.parametrize("name", ["temperature", "top_p", "seed", "logprobs", "max_completion_tokens"])
@pytest.mark.parametrize("concurrency", [1, 16])
def test_a_parameter_that_the_model_does_not_take_is_left_out_or_renamed_once(
    images, serve, status, name, concurrency, capsys
):
    def rule(body, _):
        if name in body:
            return status, {
                "error": {
                    "message": f"Unsupported parameter: '{name}' is not supported with this model.",
                    "param": name,
                }
            }
        return annotate_or_answer(body)

    server = serve(rule)
    found, failure, facts = collect(server, asked(images, 20, temperature=0.7, top_p=0.9), concurrency=concurrency)
    assert failure is None and len(found) == 20 and all("text" in reply for reply in found.values())
    assert facts["dropped_parameters"] == {name: "max_tokens" if name == "max_completion_tokens" else ""}
    assert capsys.readouterr().err.count(f"does not take {name}") == 1
    assert name != "max_completion_tokens" or server.bodies[-1]["max_tokens"] == 128


# --- bodies -----------------------------------------------------------------------------------------


def with_message(**message) -> dict:
    return completion() | {
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}}]
    }


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (with_message(content=[{"type": "text", "text": "re"}, {"type": "text", "text": "d"}]), "red"),
        (completion(usage=None), "red"),
        (completion(usage={"prompt_tokens": "many"}), "red"),
        (completion(usage={"prompt_tokens": -1, "completion_tokens": None}), "red"),
        (
            completion() | {"choices": [completion()["choices"][0] | {"logprobs": {"content": [{"logprob": None}]}}]},
            "red",
        ),
        (completion() | {"choices": [completion()["choices"][0] | {"logprobs": 3}]}, "red"),
        (json.dumps(completion("RED")).replace("RED", "red\\ud800").encode(), "red\ufffd"),
        (completion() | {"choices": [completion()["choices"][0] | {"finish_reason": None}]}, "red"),
    ],
)
def test_a_reply_of_an_odd_shape_is_read(images, serve, document, text):
    found, failure, _ = collect(serve(lambda *_: (200, document)), asked(images, 1, prompt="q"))
    assert failure is None and found["q0"]["text"] == text and found["q0"]["finish_reason"] == "stop"
    json.dumps(found).encode()


@pytest.mark.parametrize(
    "document",
    [
        *(with_message(content=content) for content in (None, 3, [], {"a": 1}, [{"type": "image"}])),
        *(completion() | {"choices": choices} for choices in (None, [], [None], [{"message": None}], "x")),
        *(b"null", b"[]", b"3", b"", b"{", b"[" * 10_000, b"\xff\xfe"),
    ],
    ids=str,
)
def test_what_is_no_reply_is_asked_again(images, serve, document, monkeypatch):
    monkeypatch.setattr("mpa.engines.openai.LONGEST_WAIT", 0.01)

    def rule(body, number):
        return (200, document) if number <= 2 else annotate_or_answer(body)

    found, failure, _ = collect(serve(rule), asked(images, 1, prompt="q"))
    assert failure is None and found["q0"]["text"] == "red"


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_why_a_reply_ended_is_told(images, serve, reason):
    document = completion() | {"choices": [completion("Grand Central Sta")["choices"][0] | {"finish_reason": reason}]}
    found, _, _ = collect(serve(lambda *_: (200, document)), asked(images, 1))
    assert found["q0"]["finish_reason"] == reason


def test_a_reply_that_was_cut_is_no_annotation(images, serve, tmp_path):
    cut = completion() | {
        "choices": [
            completion("Question: where?\nAnswer: Grand Central Sta")["choices"][0] | {"finish_reason": "length"}
        ]
    }
    server = serve(lambda body, number: (200, cut) if number % 2 else annotate_or_answer(body))
    flags = [
        "--dataset",
        "images",
        "--image-root",
        images,
        "--limit",
        "4",
        "--engine",
        "openai",
        "--base-url",
        server.url,
    ]
    flags += ["--model-path-lvlm", "m", "--concurrency", "1", "--no-fused", "--run", f"{tmp_path}/"]
    done = python("PA.py", *flags, "--tries", "0")
    assert done.returncode == 0 and "2 cut off at the token limit" in done.stdout, done.stderr
    records = read_json(tmp_path / "PA_m_images.json")
    assert [r["predicted_answer"] for r in records] == [None, "red", None, "red"]


# --- secrets ----------------------------------------------------------------------------------------


def test_no_password_of_an_address_is_written(images, serve, tmp_path, monkeypatch):
    server = serve(annotate_or_answer)
    address = server.url.replace("http://", "http://me:hunter2@") + "?api-key=hunter2"
    flags = [
        "--dataset",
        "images",
        "--image-root",
        images,
        "--limit",
        "2",
        "--engine",
        "openai",
        "--model-path-lvlm",
        "m",
    ]
    done = python("PA.py", *flags, "--run", f"{tmp_path}/a/", "--base-url", address.split("?")[0])
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("OPENAI_BASE_URL", address.split("?")[0])
    done = python("PA.py", *flags, "--run", f"{tmp_path}/b/")
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "b/PA_m_images.meta.json")["device"] == server.url
    for path in tmp_path.rglob("*.json*"):
        assert b"hunter2" not in path.read_bytes() and b"very-secret" not in path.read_bytes()
