"""The openai engine and models that think, fields of the user's own in a request, and the words for why a reply ended."""

import json

import pytest
from conftest import python
from fake_server import ANNOTATION, USAGE, annotate_or_answer, completion, text_of
from server_requests import asked, collect, stage_flags

from mpa.answers import finish_reasons
from mpa.engines import cut_off
from mpa.files.argument_types import request_json
from mpa.files.records import read_json
from mpa.method.verdict import Judge
from mpa.runs.judging import annotation_of


def reply(content, reason="stop", usage=USAGE, **message) -> tuple[int, dict]:
    message = {"role": "assistant", "content": content, **message}
    return 200, completion(usage=usage) | {"choices": [{"index": 0, "finish_reason": reason, "message": message}]}


def stage(name, server, run, images, *more):
    flags = stage_flags(server, images, 6)
    return python(name, *flags, "--model-path-lvlm", "m", "--run", f"{run}/", *more)


@pytest.mark.parametrize("content", [None, "", "<think>It may be"], ids=str)
@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking", None])
def test_a_model_that_thinks_up_to_the_limit_is_paid_once_and_the_remedy_told(images, serve, capsys, content, field):
    usage = USAGE | {"completion_tokens_details": {"reasoning_tokens": 100}}
    server = serve(lambda *_: reply(content, "length", usage, **({field: "It may be"} if field else {})))
    found, failure, facts = collect(server, asked(images, 6))
    assert failure is None and server.billed == len(found) == facts["thinking_replies"] == 6
    assert all(
        r["finish_reason"] == "length" and cut_off(r).endswith("limit before it answered") for r in found.values()
    )
    said = capsys.readouterr().err
    assert said.count("m thinks") == 1 and "--max-new-tokens" in said and "--request-json" in said and "none" in said


def test_pa_of_a_thinking_model_says_what_to_do(images, serve, tmp_path):
    server = serve(lambda *_: reply(None, "length", reasoning="Hm"))
    done = stage("PA.py", server, tmp_path, images, "--tries", "1")
    assert done.returncode == 1 and server.billed == 12 and "Traceback" not in done.stderr
    assert "6 cut off at the token limit before it answered" in done.stdout and "raise --max-new-tokens" in done.stdout


@pytest.mark.parametrize("text", ["red", "red<|im_end|>", " red\n", "Question: a?\nAnswer: b", "<answer>red</answer>"])
def test_a_reply_without_thoughts_is_not_taken_for_one(images, serve, capsys, text):
    found, _, facts = collect(
        serve(lambda *_: reply(text, reasoning_content="\n", reasoning=None, thinking=[])), asked(images, 1)
    )
    assert "text" in found["q0"] and "thinking_replies" not in facts and "thinks" not in capsys.readouterr().err


def test_a_thought_without_an_answer_is_a_reply(images, serve):
    server = serve(lambda *_: reply(None, "stop", reasoning_content="It is red"))
    found, failure, _ = collect(server, asked(images, 3))
    assert failure is None and server.billed == 3 and all(r["text"] == "" for r in found.values())


def test_a_reply_that_is_billed_and_holds_nothing_is_paid_three_times_at_most(images, serve, monkeypatch):
    monkeypatch.setattr("mpa.engines.pacing.MAX_BACKOFF", 0.01)
    server = serve(lambda body, _: reply(None) if text_of(body) == "BAD" else annotate_or_answer(body))
    found, failure, _ = collect(server, [*asked(images, 1, prompt="BAD"), *asked(images, 4)[1:]])
    assert failure is None and server.billed == 3 + 3 and "paid 3 times" in found["q0"]["error"]


def test_a_call_of_a_tool_is_refused_and_paid_once(images, serve):
    server = serve(lambda *_: reply(None, "tool_calls", tool_calls=[{"id": "x"}]))
    found, _, _ = collect(server, asked(images, 1))
    assert server.billed == 1 and "calls a tool" in found["q0"]["error"] and found["q0"]["permanent"]


# --- --request-json --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "[]", "3", "null", '"a"', '{"a": NaN}', "{'a': 1}", "[" * 5000),
        *(json.dumps({name: 1}) for name in ("max_tokens", "max_completion_tokens", "n", "MAX_TOKENS", "maxTokens", "best_of")),
        *(json.dumps({name: 1}) for name in ("stream", "model", "messages", "logprobs", "temperature", "seed", "models")),
        '{"options": {"num_predict": -1}}',
        '{"extra_body": {"max_tokens": null}}',
        '{"extra_body": {"model": "other"}}',
        '{"a": [{"n_predict": 9}]}',
        '{"api_key": "x"}',
        '{"extra_headers": {"Authorization": "x"}}',
    ],
)  # fmt: skip
def test_request_json_that_unsets_a_limit_or_is_no_object_is_refused(text):
    done = python("PA.py", "--dataset", "easyVQA", "--request-json", text)
    assert done.returncode == 2 and "argument --request-json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"extra_body": {"thinking": {"type": "disabled"}}, "top_k": 1},
        {},
    ],
)
def test_request_json_is_sent_with_each_request(images, serve, fields):
    server = serve(annotate_or_answer)
    collect(server, asked(images, 2, follow_up="paper"), request_json=request_json(json.dumps(fields)))
    assert len(server.bodies) == 4
    assert all(fields.items() <= body.items() and body["max_completion_tokens"] == 128 for body in server.bodies)


def test_request_json_is_one_of_the_settings_and_pi_takes_only_equal_answers(images, serve, tmp_path):
    server, fields = serve(annotate_or_answer), ["--request-json", '{"reasoning_effort": "none"}']
    assert stage("PA.py", server, tmp_path, images, *fields).returncode == 0
    assert read_json(tmp_path / "PA_m_images.meta.json")["settings"]["request_json"] == {"reasoning_effort": "none"}
    other = stage("PA.py", server, tmp_path, images, "--request-json", '{"reasoning_effort": "low"}')
    assert other.returncode == 1 and "request_json was {'reasoning_effort': 'none'}" in other.stderr
    before = server.billed
    assert stage("PI.py", server, tmp_path, images, "--only-lvlm", *fields).returncode == 0
    assert server.billed == before
    assert stage("PI.py", server, tmp_path, images, "--only-lvlm", "--restart").returncode == 0
    assert server.billed == before + 6  # PA's answers are those of other requests
    assert "request_json" not in read_json(tmp_path / "PI_m_m_images.meta.json")["settings"]


# --- why a reply ended -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        *((w, "stop") for w in ("stop", "eos_token", "eos", "STOP", "end_turn", "stop_sequence", "FinishReason.STOP", None, "null", "", "endTurn", "REASON_STOP", {"type": "stop"})),
        *((w, "length") for w in ("length", "max_tokens", "MAX_TOKENS", "model_length", "FINISH_REASON_MAX_TOKENS", "max-tokens", "REASON_MAX_LEN", {"type": "length"})),
        *((w, "content_filter") for w in ("content_filter", "SAFETY", "RECITATION", "refusal")),
        *((w, "tool_calls") for w in ("tool_calls", "function_call", "tool_use")),
        *((w, str(w)) for w in ("tired", 3, True)),
    ],
)  # fmt: skip
def test_every_word_for_an_end_has_one_meaning_in_both_stages(word, kind):
    assert finish_reasons.canonical(word) == kind
    given = {"text": "Question: a?\nAnswer: b", "finish_reason": word}
    answered = {"predictions": "red", "PA_question": "what?", "PA_answer": "red", "finish_reason": word}
    verdict = Judge.of({"match": "exact", "preset": "paper"})(annotation_of(answered), answered)
    assert (cut_off(given) is None) == verdict.consistent == (kind == "stop")
    assert finish_reasons.is_known(word) or kind in cut_off(given)


@pytest.mark.parametrize("word", ["eos_token", "STOP", None])
def test_a_reply_that_is_complete_in_other_words_is_used(images, serve, tmp_path, word):
    server = serve(lambda body, _: reply(ANNOTATION if "Question:" in text_of(body) else "red", word))
    assert stage("PA.py", server, tmp_path, images).returncode == 0
    done = stage("PI.py", server, tmp_path, images, "--only-lvlm")
    assert done.returncode == 0, done.stderr
    assert all("finish_reason" not in r for r in read_json(tmp_path / "PI_m_m_images.json"))


@pytest.mark.parametrize(
    ("word", "says"), [("MAX_TOKENS", "cut off at the token limit"), ("tired", "not known, 'tired'")]
)
def test_a_reply_that_is_not_complete_or_of_an_unknown_end_is_counted_and_explained(
    images, serve, tmp_path, word, says
):
    def rule(body, _):
        annotating = "Question:" in text_of(body)
        return reply(ANNOTATION if annotating else "red", "stop" if annotating else word)

    server = serve(rule)
    assert stage("PA.py", server, tmp_path, images).returncode == 0
    done = stage("PI.py", server, tmp_path, images, "--model-path-svlm", "s")
    assert done.returncode == 1 and f"6 answers {'ended' if word == 'tired' else ''}" in done.stderr
    assert says in done.stderr and "Annotate more" not in done.stderr
    cut = serve(lambda *_: reply(ANNOTATION, word))
    done = stage("PA.py", cut, tmp_path / "cut", images, "--tries", "0")
    assert done.returncode == 1 and says in done.stdout and cut.billed == 6


@pytest.mark.parametrize("word", ["error", "abort", "insufficient_system_resource"])
def test_a_reply_that_the_server_broke_off_is_asked_again(images, serve, monkeypatch, word):
    monkeypatch.setattr("mpa.engines.pacing.MAX_BACKOFF", 0.01)
    server = serve(lambda body, number: reply("re", word) if number == 1 else annotate_or_answer(body))
    found, _, _ = collect(server, asked(images, 1, prompt="q"))
    assert found["q0"]["text"] == "red" and server.billed == 2
