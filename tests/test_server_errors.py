"""The openai engine: rate limits, errors of the account, of one request, and of a parameter."""

import time
from collections import Counter

import pytest
from fake_server import annotate_or_answer, text_of
from server_requests import asked, collect

from mpa.engines.responses import retry_after


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
