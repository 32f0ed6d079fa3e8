"""What the errors of OpenAI, Azure, vLLM, TGI, LiteLLM and other servers mean for a parameter and for the run."""

import json

import pytest

from mpa.engines.responses import Refused, Retryable, Unsupported
from mpa.engines.server_errors import classify_error
from mpa.files.records import InputError

SENT = {"temperature": 1.0, "top_p": 0.95, "seed": 3, "logprobs": True, "max_completion_tokens": 128, "detail": "low"}
OLDER = {name: value for name, value in SENT.items() if name != "max_completion_tokens"} | {"max_tokens": 128}


def classified(body, status=400, sent=SENT):
    text = body if isinstance(body, str) else json.dumps(body)
    return classify_error(status, {}, text, sent, lambda value: value)


def says(message, **more) -> dict:
    return {"error": {"message": message, **more}}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("temperature", says("Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) value is supported.", param="temperature", code="unsupported_value")),
        ("temperature", says("gpt-5 models don't support temperature=0.0. Only temperature=1 is supported. To drop unsupported params set `drop_params = True`")),
        ("temperature", says("`temperature` is deprecated for this model.")),
        ("logprobs", says("UnsupportedParamsError: bedrock does not support parameters: ['logprobs'], for model=x. To drop these, set `drop_params=True`")),
        ("logprobs", says("together_ai does not support parameters: {'logprobs': 1}")),
        ("logprobs", says("logprobs, best_of and echo parameters are not available on gpt-35-turbo model. Please remove the parameter and try again.")),
        ("logprobs", says("Gaudi doesn't support logprobs. Please remove 'logprobs'/'top_logprobs' from your request.")),
        ("logprobs", {"message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "logprobs"], "msg": "Extra inputs are not permitted", "input": True}]}}),
        ("logprobs", says("Logprobs is not enabled for models/gemini-2.0-flash")),
        ("max_completion_tokens", says("create() got an unexpected keyword argument 'max_completion_tokens'")),
        ("seed", says("Unrecognized request argument supplied: seed")),
        ("seed", says('json: unknown field "seed"')),
        ("seed", {"message": "[{'type': 'extra_forbidden', 'loc': ('body', 'seed'), 'msg': 'Extra inputs are not permitted', 'input': 1}]", "code": 400}),
        ("seed", [says('Invalid JSON payload received. Unknown name "seed": Cannot find field.')]),
        ("seed", {"error": "Unsupported param: seed"}),
        ("detail", says("image_url.detail is not supported")),
        ("max_completion_tokens", {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"], "msg": "Extra inputs are not permitted", "input": 128}]}),
        ("max_completion_tokens", says("Unsupported parameter: 'max_completion_tokens' is not supported with this model.")),
    ],
)  # fmt: skip
def test_a_parameter_that_is_not_taken_is_recognised(name, body):
    found = classified(body)
    assert isinstance(found, Unsupported) and (found.name, found.only_value) == (name, False)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("temperature", says("temperature must be in [0,1)")),
        ("temperature", {"error": "Input validation error: `temperature` must be strictly positive", "error_type": "validation"}),
        ("temperature", says("temperature=1.0 is not supported")),
        ("temperature", says("Temperature must be between 0 and 0.9.")),
        ("temperature", {"message": "[{'type': 'less_than_equal', 'loc': ('body', 'temperature'), 'msg': 'Input should be less than or equal to 0.9', 'input': 1.0}]"}),
        ("top_p", says("Input validation error: `top_p` must be > 0.0 and < 1.0")),
        ("top_p", says("`temperature` and `top_p` cannot both be specified for this model. Please use only one.")),
        ("seed", says("Invalid value for 'seed'", param="seed", code="invalid_value")),
    ],
)  # fmt: skip
def test_a_refused_value_is_not_a_refused_parameter(name, body):
    found = classified(body)
    assert isinstance(found, Unsupported) and (found.name, found.only_value) == (name, True)


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large: 128. This model's maximum context length is 4096 tokens and your request has 4000 input tokens.",
        "'max_tokens' or 'max_completion_tokens' is too large: 128. This model's maximum context length is 4096 tokens",
        "max_tokens must be at least 1, got -186.",
        "max_tokens 128 is not supported for a prompt of 4000 tokens",
        "max_tokens is not supported for prompts that exceed the context window",
        "does not support max_tokens above 100",
        "Could not finish the message because max_tokens or model output limit was reached. Please try again with higher max_tokens.",
        "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens and 128 `max_new_tokens`",
        "the request exceeds the available context size. try increasing the context size or enable context shift",
    ],
)  # fmt: skip
@pytest.mark.parametrize("sent", [SENT, OLDER], ids=["newer", "older"])
def test_a_limit_that_is_too_large_refuses_one_request(message, sent):
    if sent is SENT:
        message = message.replace("max_tokens", "max_completion_tokens")
    found = classified(says(message), sent=sent)
    assert isinstance(found, Refused) and found.permanent


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, says("The image of a billing statement was rejected"), Refused),
        (400, says("billing"), Refused),
        (400, says("The text 'what temperature is it' is not allowed: safety"), Refused),
        (404, says("no such route"), Refused),
        (404, "<html>404 not found</html>", Refused),
        (429, says("Rate limit reached. Increase it by adding a payment method at https://x.com/account/billing.", code="rate_limit_exceeded"), Retryable),
        (429, says("You exceeded your current quota, please check your plan and billing details. Retry in 12s"), Retryable),
        (500, says("the billing service is down"), Retryable),
        (429, says("pay", code="insufficient_quota"), InputError),
        (404, says("x", code="model_not_found"), InputError),
        (401, "", InputError),
        (402, "[]", InputError),
        (407, "null", InputError),
        (403, {"error": "Your credit balance is too low"}, InputError),
    ],
)  # fmt: skip
def test_a_word_about_money_is_no_evidence_about_the_account(status, body, kind):
    assert type(classified(body, status)) is kind
