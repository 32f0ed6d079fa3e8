"""The openai engine: replies of odd shapes, replies cut short; and no secret in a file."""

import json
from collections import Counter

import pytest
from conftest import python
from fake_server import USAGE, annotate_or_answer, completion
from server_requests import asked, collect, stage_flags

from mpa.files.records import read_json
from mpa.method.prompts import A_MARK


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
        (completion(created="x", id=3, model=[], service_tier={}, system_fingerprint=[1]), "red"),
        (completion(usage=[1]), "red"),
        (completion(usage={"prompt_tokens": 10**400, "completion_tokens": 1.5}), "red"),
        (completion(usage=USAGE | {"completion_tokens_details": [3], "prompt_tokens_details": "x"}), "red"),
        (with_message(content="red", reasoning=3, tool_calls="x", refusal=[], role=None), "red"),
        (
            completion() | {"choices": [completion()["choices"][0] | {"index": "x", "logprobs": {"content": "red"}}]},
            "red",
        ),
        (json.dumps(completion("RED")).replace("RED", "red\\ud800").encode(), "red\ufffd"),
        (completion() | {"choices": [completion()["choices"][0] | {"finish_reason": None}]}, "red"),
    ],
)
def test_a_reply_of_an_odd_shape_is_read(images, serve, document, text):
    found, failure, _ = collect(serve(lambda *_: (200, document)), asked(images, 1, prompt="q"))
    assert failure is None and found["q0"]["text"] == text and found["q0"]["finish_reason"] == "stop"
    json.dumps(found).encode()


@pytest.mark.parametrize(
    "value", [True, False, 3.0, 1e308, -1e300, "high", [1], {}, None, 10**400, float("nan"), float("-inf")]
)
def test_an_absurd_log_probability_is_none(images, serve, value):
    logprobs = {"content": [{"token": "red", "logprob": -0.5}, {"token": "!", "logprob": value}]}
    document = completion() | {"choices": [completion()["choices"][0] | {"logprobs": logprobs}]}
    found, failure, _ = collect(serve(lambda *_: (200, document)), asked(images, 1, prompt="q"))
    assert failure is None and found["q0"]["text"] == "red" and found["q0"]["logprob"] is None


@pytest.mark.parametrize(
    ("values", "total"), [([-0.5, -0.25], -0.75), ([0, -1], -1.0), ([1e-7], 0.0), ([-9999.0], -9999.0)]
)
def test_a_log_probability_is_the_sum_over_the_tokens(images, serve, values, total):
    logprobs = {"content": [{"logprob": value} for value in values]}
    document = completion() | {"choices": [completion()["choices"][0] | {"logprobs": logprobs}]}
    found, _, _ = collect(serve(lambda *_: (200, document)), asked(images, 1, prompt="q"))
    assert found["q0"]["logprob"] == total


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
    monkeypatch.setattr("mpa.engines.pacing.MAX_BACKOFF", 0.01)

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
    flags = stage_flags(server, images, 4)
    flags += ["--model-path-lvlm", "m", "--concurrency", "1", "--no-fused", "--run", f"{tmp_path}/"]
    done = python("PA.py", *flags, "--tries", "0")
    assert done.returncode == 0 and "2 cut off at the token limit" in done.stdout, done.stderr
    records = read_json(tmp_path / "PA_m_images.json")
    assert [r["predicted_answer"] for r in records] == [None, "red", None, "red"]


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


@pytest.mark.parametrize("token", ["</s>", "<turn|>", "<|im_end|>\n", " <eos></s>", "<end_of_utterance>"])
def test_no_end_token_reaches_the_parity_set_and_none_costs_an_image(images, serve, tmp_path, token):
    within = f"re{token.strip()}d"  # a server that generates beyond the end of the answer

    def rule(body, number):
        status, document = annotate_or_answer(body)
        message = document["choices"][0]["message"]
        if body["model"] == "s":
            message["content"] = ("red", "blue", within)[number % 3]
        message["content"] += token
        return status, document

    server, run = serve(rule), f"{tmp_path}/run/"
    flags = [
        "--dataset",
        "images",
        "--engine",
        "openai",
        "--base-url",
        server.url,
        "--model-path-lvlm",
        "l",
        "--run",
        run,
    ]
    assert python("PA.py", *flags, "--image-root", images).returncode == 0
    assert server.billed == 24  # one annotation and one answer for each of 12 images
    done = python("PI.py", *flags, "--model-path-svlm", "s", "--hold-out", "0")
    assert done.returncode == 0, done.stderr
    assert server.billed == 36
    svlm, train = (read_json(f"{run}/PI_l_{name}_images.json") for name in ("s", "train_l_s"))
    assert Counter((r["predictions"], r["left_out"]) for r in svlm) == {
        ("red", None): 4,
        ("blue", None): 4,
        (within, A_MARK): 4,
    }
    assert [r["conversations"][1]["value"] for r in train] == ["red"] * 4
