"""The openai engine with --batch against a server with files and batches: nothing is lost, submitted twice or paid for twice."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT, python, snapshot
from fake_batches import BatchServer
from fake_server import ANNOTATION, annotate_or_answer, completion
from server_requests import asked, stage_flags

from mpa.engines import open_engine, openai_batch, pacing, submitted
from mpa.files.records import InputError, read_json

PRICES = {"price_in": 1.0, "price_out": 10.0}
ONE = 0.5 * (1000 * 1 + 100 * 10) / 1e6  # a reply of the fake server at the batch price


@pytest.fixture
def batches(monkeypatch):
    """`batches(rule, takes)` -> a running BatchServer. All pauses are short."""
    started = []
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name, value in (("FIRST_PAUSE", 0.02), ("LONGEST_PAUSE", 0.02), ("LISTED_AFTER", 0.0), ("QUEUE_PAUSE", 0.05)):
        monkeypatch.setattr(openai_batch, name, value)
    monkeypatch.setattr(pacing, "MAX_BACKOFF", 0.02)

    def start(rule=annotate_or_answer, takes=0.0) -> BatchServer:
        started.append(BatchServer(rule, takes))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def collect(server, requests, ledger, done=(), **settings) -> tuple[dict, InputError | None, dict]:
    """(the replies, what ended the run, the engine's facts); a temporary error is no reply."""
    found, failure = {}, None
    more = PRICES | {"ledger": ledger} | settings
    with open_engine("openai", model_path="m", base_url=server.url, batch=True, **more) as engine:
        try:
            for replies in engine.generate(requests, done):
                found |= {reply["key"]: reply for reply in replies}
        except InputError as error:
            failure = error
        return found, failure, engine.facts()


def check_account(server, ledger, facts) -> None:
    """What was charged is what was served, nothing is set aside, and no batch is left."""
    book = read_json(ledger)
    cost = sum(account["cost"] for account in book["spent"].values())
    assert cost == pytest.approx(server.bill(**PRICES)) and not book["reserved"]
    assert facts["cost"] == pytest.approx(cost)
    assert not submitted.folder(ledger).exists()


def test_a_batch_holds_what_single_requests_would_send(images, batches, serve, tmp_path):
    single, server = serve(annotate_or_answer), batches()
    requests = asked(images, 12, temperature=0.7)
    with open_engine(
        "openai", model_path="m", base_url=single.url, request_json={"reasoning_effort": "none"}
    ) as engine:
        expected = {reply["key"]: reply for replies in engine.generate(requests) for reply in replies}
    ledger = tmp_path / "spending.json"
    found, _, facts = collect(server, requests, ledger, request_json={"reasoning_effort": "none"})
    assert found == expected
    sent = [sorted(json.dumps(body, sort_keys=True) for body in of.bodies) for of in (server, single)]
    assert sent[0] == sent[1]
    assert len(server.batches) == 1 and facts["requests"] == 12
    check_account(server, ledger, facts)


FAULTS = [
    *[("upload", fault) for fault in ("lost", "cut", "short", (429, {"message": "slow"}), (500, {"message": "oops"}))],
    *[("create", fault) for fault in ("lost", "cut", (429, {"message": "slow"}), (503, {"message": "oops"}))],
    ("create", (400, {"message": "Cannot find file file-0"})),
    *[(what, (404, {"message": "not known yet"})) for what in ("look", "content")],
    *[
        ("look", fault)
        for fault in ("lost", (429, {"message": "slow"}, {"Retry-After": "0.1"}), (502, {"message": "oops"}))
    ],
    *[("content", fault) for fault in ("lost", "short", (500, {"message": "oops"}))],
    *[("list", fault) for fault in ((429, {"message": "slow"}), (500, {"message": "oops"}))],
    *[("delete", fault) for fault in ("lost", (500, {"message": "oops"}))],
]


@pytest.mark.parametrize(("what", "fault"), FAULTS, ids=[f"{what} {str(fault)[:8]}" for what, fault in FAULTS])
def test_a_call_that_fails_loses_nothing_and_submits_nothing_twice(images, batches, tmp_path, what, fault):
    server, ledger = batches(), tmp_path / "spending.json"
    server.fault = lambda happened, number: fault if (happened, number) == (what, 1) else None
    found, failure, facts = collect(server, asked(images, 6), ledger)
    assert failure is None and [found[f"q{i}"]["text"] for i in range(6)] == [ANNOTATION] * 6
    assert set(server.served.values()) == {1} and set(server.lines().values()) == {1}
    check_account(server, ledger, facts)


def shuffled(output, errors):
    return output[::-1], errors


def doubled(output, errors):
    return [line for line in output for _ in range(2)], errors


def with_strangers(output, errors):
    stranger = json.loads(output[0]) | {"custom_id": "unknown"}
    return [json.dumps(stranger).encode(), b"", *output], errors


@pytest.mark.parametrize("mangle", [shuffled, doubled, with_strangers])
def test_the_order_and_number_of_lines_do_not_matter(images, batches, tmp_path, mangle):
    server, ledger = batches(), tmp_path / "spending.json"
    server.mangle = mangle
    found, _, facts = collect(server, asked(images, 6), ledger)
    assert len(found) == 6 and all(reply["text"] == ANNOTATION for reply in found.values())
    check_account(server, ledger, facts)


@pytest.mark.parametrize(
    "rest", [[], [b'{"custom_id": "x", "resp'], [b"[]", b"null"]], ids=["missing", "cut", "no line"]
)
def test_a_line_that_is_lost_is_asked_again_and_counts_at_its_estimate(images, batches, tmp_path, rest):
    server, ledger, rounds = batches(), tmp_path / "spending.json", []

    def lose_first(output, errors):
        rounds.append(len(output))
        return (output[1:] + rest if len(rounds) == 1 else output), errors

    server.mangle = lose_first
    found, _, facts = collect(server, asked(images, 6), ledger)
    assert len(found) == 6 and rounds == [6, 1]
    assert server.bill(**PRICES) == pytest.approx(7 * ONE) and facts["requests"] == 7
    assert 7 * ONE < facts["cost"] < 9 * ONE


def test_what_is_never_in_the_results_is_an_error_after_three_rounds(images, batches, tmp_path):
    server = batches()
    server.mangle = lambda output, errors: ([], errors)
    found, _, _ = collect(server, asked(images, 2), tmp_path / "spending.json")
    assert len(server.batches) == 3
    assert all("no result in a completed batch" in r["error"] and not r["permanent"] for r in found.values())


@pytest.mark.parametrize("gone", [False, True])
def test_an_expired_batch_gives_what_it_has_and_the_rest_is_asked_again(images, batches, tmp_path, gone):
    server, ledger = batches(), tmp_path / "spending.json"
    server.end = lambda number: "expired" if number == 0 else "completed"
    if gone:
        server.fault = lambda what, number: (
            (404, {"message": "no such file"}) if what == "content" and number <= 4 else None
        )
    found, _, facts = collect(server, asked(images, 6), ledger)
    assert len(found) == 6 and all(reply["text"] == ANNOTATION for reply in found.values())
    assert len(server.batches) == 2 and facts["requests"] == server.served.total() == (9 if gone else 6)
    if not gone:
        check_account(server, ledger, facts)


@pytest.mark.parametrize("said", ["Enqueued token limit reached for m. Limit: 8,000 enqueued tokens.", "too many"])
def test_where_the_queue_is_full_the_batches_are_smaller_and_wait(images, batches, tmp_path, said):
    server, ledger = batches(), tmp_path / "spending.json"

    def end(number):
        full = len(server.batches[f"batch_{number}"]["lines"]) > 8
        return {"code": "token_limit_exceeded", "message": said, "line": None} if full else "completed"

    server.end = end
    found, _, facts = collect(server, asked(images, 30), ledger)
    assert len(found) == 30 and set(server.served.values()) == {1}
    check_account(server, ledger, facts)


def test_a_batch_that_is_refused_as_a_whole_ends_the_run_and_costs_nothing(images, batches, tmp_path):
    server, ledger = batches(), tmp_path / "spending.json"
    server.end = lambda _: {"code": "invalid_json_line", "message": "bad line, sk-very-secret", "line": 2}
    found, failure, facts = collect(server, asked(images, 6), ledger)
    assert not found and "batch batch_0 failed, line 2: bad line, …" in str(failure)
    check_account(server, ledger, facts)


def test_files_keep_to_the_limits(images, batches, tmp_path, monkeypatch):
    server, ledger = batches(), tmp_path / "spending.json"
    monkeypatch.setattr(openai_batch, "MAX_REQUESTS", 4)
    monkeypatch.setattr(openai_batch, "MAX_BYTES", 4000)
    found, _, facts = collect(server, asked(images, 30), ledger)
    assert len(found) == 30
    sizes = [len(batch["lines"]) for batch in server.batches.values()]
    assert max(sizes) <= 4 and len(sizes) < 30
    check_account(server, ledger, facts)


def test_what_the_model_does_not_take_is_left_out_and_remembered(images, batches, tmp_path):
    def rule(body, number):
        if "logprobs" in body:
            return 400, {"error": {"message": "Unsupported parameter: 'logprobs'", "param": "logprobs"}}
        return annotate_or_answer(body)

    server, ledger = batches(rule), tmp_path / "spending.json"
    found, _, facts = collect(server, asked(images, 6), ledger)
    assert len(found) == 6 and len(server.batches) == 2 and facts["dropped_parameters"] == {"logprobs": ""}
    collect(server, asked(images, 7), ledger, done=found)
    assert len(server.batches) == 3  # no round is lost to find it again


def test_errors_of_lines(images, batches, tmp_path):
    answers = Counter()

    def rule(body, _):
        name = body["messages"][0]["content"][0]["image_url"]["url"]
        answers[name] += 1
        place = list(answers).index(name)
        if place == 1:
            return 400, {"error": {"message": "flagged by moderation, sk-very-secret"}}
        if place == 2 or (place == 3 and answers[name] == 1):
            return (
                (500, {"error": {"message": "out of order"}})
                if place == 2
                else (429, {"error": {"message": "slow down"}})
            )
        return annotate_or_answer(body)

    server, ledger = batches(rule), tmp_path / "spending.json"
    bad = asked(images, 1)[0]
    (tmp_path / "bad.png").write_text("x")
    requests = [*asked(images, 6), type(bad)("bad", str(tmp_path / "bad.png"), "q")]
    found, _, facts = collect(server, requests, ledger)
    errors = {key: (reply["error"], reply["permanent"]) for key, reply in found.items() if "error" in reply}
    assert errors.pop("bad")[0].startswith("image: cannot be read")
    assert errors == {
        "q1": ("server: 400: flagged by moderation, …", True),
        "q2": ("server: failed in 3 batches: 500: out of order", False),
    }
    assert len(found) == 7
    check_account(server, ledger, facts)


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (429, {"code": "insufficient_quota", "message": "pay"}, "429: pay"),
        (400, {"message": "no"}, "refuses every request"),
    ],
)
def test_what_concerns_every_line_ends_the_run(images, batches, tmp_path, status, error, says):
    server, ledger = batches(lambda *_: (status, {"error": error})), tmp_path / "spending.json"
    _, failure, facts = collect(server, asked(images, 12), ledger)
    assert says in str(failure)
    check_account(server, ledger, facts)


# --- money ---


def test_the_cap_is_kept_to_and_what_fits_into_it_is_submitted(images, batches, tmp_path):
    server, ledger, most = batches(), tmp_path / "spending.json", 20.5 * ONE
    found, failure, facts = collect(server, asked(images, 40), ledger, max_cost=most)
    assert "is nearly spent" in str(failure) and 18 <= len(found) <= 20
    assert len(next(iter(server.batches.values()))["lines"]) == 1  # until it is known what a reply costs
    assert server.bill(**PRICES) <= most
    check_account(server, ledger, facts)
    found2, failure, facts = collect(server, asked(images, 40), ledger, done=found, max_cost=41 * ONE)
    assert len(found) + len(found2) + 2 >= 40
    assert server.bill(**PRICES) <= 41 * ONE


def test_replies_without_usage_count_as_much_as_was_set_aside(images, batches, tmp_path):
    server, ledger = batches(lambda body, _: (200, completion(usage=None))), tmp_path / "spending.json"
    found, failure, facts = collect(server, asked(images, 12), ledger, max_cost=0.01)
    assert "is nearly spent" in str(failure) and found and 0 < facts["cost"] <= 0.01
    assert not read_json(ledger)["reserved"]


# --- kills ---


def killed(server, requests, ledger, what: str, after: bool) -> None:
    """A process that is killed by kill -9 when the server has got its first call of `what`, before or after it acts."""
    victim = []

    def fault(happened, number):
        if (happened, number) == (what, 1):
            while not victim:
                time.sleep(0.001)
            os.kill(victim[0], signal.SIGKILL)
            os.waitpid(victim[0], 0)
            return "cut" if after else "lost"
        return None

    server.fault = fault
    victim_or_zero = os.fork()
    if victim_or_zero == 0:
        try:
            collect(server, requests, ledger)
        finally:
            os._exit(0)
    victim.append(victim_or_zero)
    while server.calls[what] == 0:
        time.sleep(0.01)
    with server.lock:  # until it is dead
        server.fault = lambda *_: None


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("what", ["upload", "create", "look", "content", "delete"])
def test_a_killed_call_is_taken_up_by_the_next(images, batches, tmp_path, what, after):
    server, ledger = batches(), tmp_path / "spending.json"
    killed(server, asked(images, 6), ledger, what, after)
    found, failure, facts = collect(server, asked(images, 6), ledger)
    assert failure is None and len(found) == 6
    assert set(server.served.values()) == {1} and facts["requests"] == 6
    check_account(server, ledger, facts)


def test_a_batch_is_found_on_a_later_page_of_the_list(images, batches, tmp_path, monkeypatch):
    server = batches()
    killed(server, asked(images, 6), tmp_path / "a/spending.json", "create", after=True)
    monkeypatch.setattr(openai_batch, "MAX_REQUESTS", 2)
    collect(server, asked(images, 8), tmp_path / "b/spending.json")
    collect(server, asked(images, 6), tmp_path / "a/spending.json")
    assert len(server.batches) == 5 and server.calls["list"] >= 5


def test_the_batches_of_another_folder_model_or_request_are_left_alone(images, batches, tmp_path):
    server = batches()
    killed(server, asked(images, 6), tmp_path / "a/spending.json", "look", after=True)
    _, _, facts = collect(server, asked(images, 6), tmp_path / "b/spending.json")
    assert facts["requests"] == 6 and len(server.batches) == 2
    others = asked(images, 6, prompt="another")
    found, _, facts = collect(server, others, tmp_path / "a/spending.json")
    assert len(found) == 6 and len(server.batches) == 3
    assert facts["requests"] == 12  # those of the first batch are charged, and wait for who wants them
    found, _, facts = collect(server, asked(images, 6), tmp_path / "a/spending.json")
    assert len(found) == 6 and len(server.batches) == 3
    assert set(server.served.values()) == {2, 1}  # the requests of both folders, and the others


def test_a_call_without_batch_does_not_pay_for_what_is_submitted(images, batches, tmp_path):
    server, ledger = batches(), tmp_path / "spending.json"
    killed(server, asked(images, 6), ledger, "look", after=True)
    with (
        open_engine("openai", model_path="m", base_url=server.url, ledger=ledger) as engine,
        pytest.raises(InputError, match=r"6 of these requests are in a batch .*batch_0.*Go on with --batch"),
    ):
        list(engine.generate(asked(images, 6)))
    assert server.billed == 0


def test_a_batch_whose_requests_are_done_is_charged_and_gone(images, batches, tmp_path):
    server, ledger = batches(), tmp_path / "spending.json"
    killed(server, asked(images, 6), ledger, "look", after=True)
    requests = asked(images, 7)
    found, _, facts = collect(server, requests, ledger, done={f"q{i}" for i in range(6)})
    assert list(found) == ["q6"] and facts["requests"] == 7
    check_account(server, ledger, facts)


def test_a_cancelled_batch_ends_the_run_and_the_next_call_asks_the_rest(images, batches, tmp_path):
    server, ledger = batches(takes=0.1), tmp_path / "spending.json"
    server.fault = lambda what, number: (
        server.batches["batch_0"].update(cancelling=True) if (what, number) == ("look", 1) else None
    )
    found, failure, _ = collect(server, asked(images, 6), ledger)
    assert len(found) == 3 and "batch batch_0 was cancelled" in str(failure)
    rest, failure, facts = collect(server, asked(images, 6), ledger, done=found)
    assert failure is None and len(rest) == 3
    check_account(server, ledger, facts)


def test_a_batch_that_the_server_does_not_know_is_named(images, batches, tmp_path):
    server, ledger = batches(), tmp_path / "spending.json"
    killed(server, asked(images, 6), ledger, "look", after=True)
    server.batches.clear()
    _, failure, _ = collect(server, asked(images, 6), ledger)
    assert "does not know batch batch_0" in str(failure) and "batches/" in str(failure)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_shows_how_far_the_batches_are(images, batches, tmp_path, monkeypatch, terminal):
    server, shown = batches(takes=0.3), io.StringIO()
    shown.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", shown)
    collect(server, asked(images, 6), tmp_path / "spending.json")
    assert ("batches: 0 of 6 requests finished, 1 open, 0:00:00 since submission" in shown.getvalue()) == terminal


@pytest.mark.slow
def test_whenever_pa_and_pi_are_killed_nothing_is_lost_or_paid_for_twice():
    """A short version of benchmarks/batch.py, which has 200 kills."""
    command = [sys.executable, ROOT / "benchmarks/batch.py", "--kills", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- stages ---


def flags(server, images, run, *more) -> list[str]:
    given = [*stage_flags(server, images), "--run", f"{run}/", "--price-in", "1", "--price-out", "10", *more]
    return list(map(str, given))


def test_pa_and_pi_give_the_same_files_with_and_without(images, batches, tmp_path):
    def rule(body, _):
        text, image = (body["messages"][0]["content"][i] for i in (1, 0))
        chance = sum(map(ord, image["image_url"]["url"][-60:]))
        if "Question:" in text["text"]:
            parsed = chance % 3 or body.get("seed", 0) % 2
            return 200, completion(f"Question: is it {chance % 7}?\nAnswer: yes" if parsed else "nothing")
        return 200, completion("yes" if body["model"] == "big" or chance % 2 else "no")

    server, files = batches(rule), {}
    for name, more in (("single", ["--no-fused"]), ("batch", ["--batch", "--max-cost", "1"])):
        run, pa_more = tmp_path / name, more[:1] + more[1:]
        done = python("PA.py", *flags(server, images, run, "--model-path-lvlm", "big", *pa_more))
        assert done.returncode == 0, done.stderr
        more = [flag for flag in more if flag != "--no-fused"]
        done = python(
            "PI.py", *flags(server, images, run, "--model-path-lvlm", "big", "--model-path-svlm", "small", *more)
        )
        assert done.returncode == 0, done.stderr
        found = snapshot(run)
        assert not any("journal" in path or "batches" in path for path in found)
        assert not any(content and b"secret" in content for content in found.values())
        files[name] = {
            path: content for path, content in found.items() if path.endswith(".json") and "meta" not in path
        }
    costs = [json.loads(files[name].pop("spending.json"))["spent"] for name in files]
    assert files["single"] == files["batch"] and len(files["batch"]) >= 4
    for stage in ("PA big", "PI big", "PI small"):
        assert costs[1][stage]["cost"] == pytest.approx(costs[0][stage]["cost"] / 2)
    facts = [read_json(tmp_path / name / "PA_big_images.meta.json") for name in files]
    assert facts[0].keys() == facts[1].keys()


def test_what_cannot_be_is_said_before_anything_is_written(images, batches, serve, tmp_path):
    run = tmp_path / "run"
    without = batches()
    without.fault = lambda *_: (404, {"message": "not found"})
    for server, more, says in (
        (without, ["--batch"], "has no batch interface (404: not found). Leave --batch out"),
        (serve(annotate_or_answer), ["--batch"], "has no batch interface (501: "),
        (batches(), ["--batch", "--engine", "hf"], "--batch is for --engine openai"),
        (batches(), ["--batch", "--engine", "ray"], "--batch is for --engine openai"),
    ):
        done = python("PA.py", *flags(server, images, run, "--model-path-lvlm", "m", *more))
        assert done.returncode in (1, 2) and says in done.stderr, done.stderr
        assert not any(path.name.startswith("PA") for path in (run.iterdir() if run.exists() else ()))


def test_a_dry_run_shows_both_prices_and_submits_nothing(images, batches, tmp_path):
    server = batches()
    for more in ([], ["--batch"]):
        done = python("PA.py", *flags(server, images, tmp_path / "run", "--model-path-lvlm", "m", "--dry-run", *more))
        assert "0.05; with --batch 0.02 (this trial" in done.stdout, done.stdout + done.stderr
    assert not server.batches


def test_a_signal_leaves_the_batches_and_says_how_to_cancel_them(images, batches, tmp_path):
    server = batches(takes=60)
    command = ["PA.py", *flags(server, images, tmp_path / "run", "--model-path-lvlm", "m", "--batch")]
    server.fault = lambda what, number: os.kill(os.getpid(), signal.SIGINT) if (what, number) == ("look", 2) else None
    done = python(*command)
    assert done.returncode == 130
    assert "1 batch goes on with 12 requests at" in done.stderr and "may cost up to 0.0" in done.stderr
    assert "The same command picks them up" in done.stderr and "/batches/ID/cancel" in done.stderr
    server.fault, server.batches["batch_0"]["until"] = lambda *_: None, 0.0
    done = python(*command)
    assert done.returncode == 0, done.stderr
    assert len(server.batches) == 1 and len(server.served) == 12
