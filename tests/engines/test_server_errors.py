"""The openai engine: rate limits, errors of the account, of one request, and of a parameter."""

import time
from collections import Counter

import pytest
from fake_server import annotate_or_answer, completion, text_of
from server_requests import asked, collect

from mpa.engines.end_of_run import EndOfRun
from mpa.engines.pacing import Pacer
from mpa.engines.responses import Retryable, retry_after


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
    assert retry_after({"retry-after": value, "retry-after-ms": "soon"}) == seconds
    assert retry_after({"retry-after": value, "retry-after-ms": "250"}) == 0.25


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


def refusing(who: str, status: int, error: dict):
    """Refuses the requests with this prompt."""

    def rule(body, _):
        return (status, {"error": error}) if text_of(body) == who else annotate_or_answer(body)

    return rule


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize(
    ("message", "permanent"),
    [
        ("max_completion_tokens is too large: 128. This model's maximum context length is 4096 tokens", True),
        ("Unsupported parameter: 'max_completion_tokens' is not supported with this image.", None),
        ("the billing address in this image is sensitive", True),
    ],
)
def test_a_refusal_of_one_request_changes_no_other(images, serve, concurrency, message, permanent):
    server = serve(refusing("BAD", 400, {"message": message}))
    bad, others = asked(images, 1, prompt="BAD"), asked(images, 12)[1:]
    found, failure, facts = collect(server, [*others[:4], *bad, *others[4:]], concurrency=concurrency)
    assert failure is None and len(found) == 12 and sum("text" in r for r in found.values()) >= 11
    assert permanent is None or found["q0"].get("permanent") == permanent
    assert all(body.get("max_completion_tokens", body.get("max_tokens")) == 128 for body in server.bodies)
    assert permanent is None or "dropped_parameters" not in facts


def test_a_refused_value_is_left_out_of_the_requests_it_was_refused_of(images, serve, capsys):
    def rule(body, _):
        if body.get("temperature") == 1.0:
            return 400, {"error": {"message": "temperature must be in [0,1)"}}
        return annotate_or_answer(body)

    server, some = serve(rule), asked(images, 6)
    hot = [request.__class__(**vars(request) | {"key": f"h{i}", "temperature": 1.0}) for i, request in enumerate(some)]
    found, failure, facts = collect(server, [*some, *hot, *asked(images, 12)[6:]], concurrency=1)
    assert failure is None and len(found) == 18 and all("text" in reply for reply in found.values())
    assert facts["dropped_values"] == {"temperature=1.0": 6} and "dropped_parameters" not in facts
    assert sum(body.get("temperature") == 0.0 for body in server.bodies) == 12
    assert capsys.readouterr().err.count("refuses temperature=1.0") == 1


@pytest.mark.parametrize("concurrency", [1, 16])
def test_the_last_token_limit_is_never_dropped(images, serve, concurrency):
    def rule(body, _):
        name = next((n for n in ("max_completion_tokens", "max_tokens") if n in body), None)
        error = {"message": f"Unsupported parameter: '{name}' is not supported with this model.", "param": name}
        return (400, {"error": error}) if name else annotate_or_answer(body)

    server = serve(rule)
    found, failure, _ = collect(server, asked(images, 20), concurrency=concurrency)
    assert "takes neither max_completion_tokens nor max_tokens" in str(failure) and not found
    assert server.billed == 0 and all("max_tokens" in b or "max_completion_tokens" in b for b in server.bodies)


def test_a_server_that_passes_over_the_newer_name_of_the_limit_gets_the_older_one(images, serve, capsys):
    def rule(body, _):
        tokens = body.get("max_tokens", 4000)
        return 200, completion("x" * 400, usage={"prompt_tokens": 1000, "completion_tokens": tokens})

    server = serve(rule)
    collect(server, asked(images, 4), concurrency=1)
    assert [body.get("max_tokens") for body in server.bodies] == [None, 128, 128, 128]
    assert "has written 4000 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "message"), [(404, "not found"), (400, "Your credit balance is too low"), (405, "x")]
)
def test_one_doubtful_refusal_costs_itself_and_several_in_a_row_end_the_run(images, serve, status, message):
    bad = asked(images, 1, prompt="BAD")
    found, failure, _ = collect(serve(refusing("BAD", status, {"message": message})), bad + asked(images, 9)[1:])
    assert failure is None and sum("text" in reply for reply in found.values()) == 8
    assert not found["q0"]["permanent"]  # the next call asks again

    def rule(body, number):
        return annotate_or_answer(body) if number <= 3 else (status, {"error": {"message": message}})

    server = serve(rule)
    found, failure, _ = collect(server, asked(images, 40), concurrency=4)
    assert f"{status}: {message}" in str(failure) and server.number < 20
    assert sum("text" in reply for reply in found.values()) == server.billed == 3


@pytest.mark.parametrize("wait", ["0.1", "0.5", None, "0"])
def test_half_of_the_requests_refused_for_a_moment_are_not_slowed_down_for_seconds(images, serve, wait):
    def rule(body, number):
        if number % 2:
            return 429, {"error": {"message": "slow down"}}, {"Retry-After": wait} if wait else {}
        return annotate_or_answer(body)

    collect(serve(annotate_or_answer), asked(images, 1))  # imports the client
    started = time.monotonic()
    found, failure, _ = collect(serve(rule, pause=0.02), asked(images, 24))
    assert failure is None and len(found) == 24 and all("text" in reply for reply in found.values())
    assert time.monotonic() - started < (8 if wait == "0.1" else 20)  # 1 and 4 on a machine that does nothing else


def test_a_retry_after_that_does_not_help_is_waited_for_longer_and_longer():
    pacer, pauses = Pacer(16, "s", EndOfRun()), []
    pacer.last_reply_at = time.monotonic()
    for _ in range(17):
        pacer.slowed_at = pacer.resume_at = 0.0
        alone = pacer.rate_limited(Retryable("x", retry_after=0.1, rate_limit=True), time.monotonic())
        pauses.append(alone or pacer.resume_at - time.monotonic())
    assert max(pauses[:10]) < 0.2 and pauses[-1] > 20 and pacer.limit == 1
