"""PA's --questions-per-image: several different questions about an image, by id, resumable, and through PI."""

import re
import time
from collections import Counter

import PI
import pytest
from answered_by_rule import annotate, flags
from fake_server import completion, text_of

from mpa.engines.chat_request import encode_image
from mpa.files.records import read_json
from mpa.models.families import MAX_PIXELS
from mpa.runs.case import Case
from mpa.runs.layout import Cell
from mpa.stages.annotate import repeated

QUESTIONS = ("What color is it?", "What shape is it?", "How large is it?")


def asks_in_turn(body, _=0):
    """The L-VLM asks the first of its questions that the prompt does not forbid; after the last, that one again."""
    text = text_of(body)
    if "Question:" in text:
        left = [q for q in QUESTIONS if q not in text]
        return 200, completion(f"Question: {left[0] if left else 'How large is  it ?'}\nAnswer: red")
    return 200, completion("red" if body["model"] == "big" else "blue")


def test_each_question_differs_from_those_before(serve, copied_images, tmp_path):
    server, run = serve(asks_in_turn), tmp_path / "run"
    pa = read_json(annotate(server, copied_images, run, "--questions-per-image", "4"))
    first = pa[0]["question_id"]
    assert [r["question_id"] for r in pa[:4]] == [first, f"{first}/2", f"{first}/3", f"{first}/4"]
    by_image = Counter(r["image_path"] for r in pa)
    assert set(by_image.values()) == {4} and len(by_image) == 30
    asked = Counter(r["predicted_question"] for r in pa)
    assert asked == dict.fromkeys(QUESTIONS, 30) | {None: 30}
    assert Counter(r["left_out"] for r in pa) == {None: 90, "asked before about this image": 30}
    assert {r["tries"] for r in pa if r["left_out"]} == {3}  # it is asked again, sampled
    prompts = [text_of(body) for body in server.bodies]
    third = next(p for p in prompts if "Question:" in p and QUESTIONS[1] in p and QUESTIONS[2] not in p)
    assert re.search(r"The question must differ from these:\nWhat color is it\?\nWhat shape is it\?$", third)
    train = read_json(PI.main(flags(server, copied_images, run, "--hold-out", "0")))
    assert len(train) == 90 and len({r["id"] for r in train}) == 90
    samples = Case(run, Cell("images", "big", "small")).samples
    assert Counter(s.reason for s in samples) == {"parity": 90, "no usable annotation": 30}
    meta = read_json(run / "PI_big_train_big_small_images.meta.json")
    assert meta["funnel"]["pictures"] == 30 and meta["funnel"]["parsed"] == 90


def test_an_image_without_a_first_question_is_not_asked_for_another(serve, copied_images, tmp_path):
    """Under `released` a reply that cannot be parsed is written with null, and is not left out."""
    server = serve(lambda body, _: (200, completion("A drawing.")))
    more = ("--questions-per-image", "2", "--preset", "released")
    pa = read_json(annotate(server, copied_images, tmp_path / "run", *more))
    assert len(pa) == 30 and {r["predicted_question"] for r in pa} == {None}


def test_what_failed_for_a_time_goes_on_with_the_same_questions(serve, copied_images, tmp_path, monkeypatch):
    monkeypatch.setattr("mpa.engines.pacing.MAX_BACKOFF", 0.001)
    more = ("--questions-per-image", "3")
    whole = annotate(serve(asks_in_turn), copied_images, tmp_path / "whole", *more).read_bytes()
    # The first seven images, of which there are no copies: others go through while these fail, else the server counts as down and the run ends.
    down = {encode_image(str(path), MAX_PIXELS).url for path in sorted(copied_images.iterdir())[:7]}

    def rule(body, number):
        failing = body["messages"][0]["content"][0]["image_url"]["url"] in down
        # A first question is written and asked, a second is not written.
        if failing and all(part in text_of(body) for part in ("Question:", QUESTIONS[0])):
            time.sleep(0.02)  # in which others go through, on a busy machine too
            return 500, {"error": {"message": "down"}}
        return asks_in_turn(body)

    server, run = serve(rule), tmp_path / "run"
    first = read_json(annotate(server, copied_images, run, *more))
    assert len([r for r in first if r["left_out"]]) == 7  # their second questions; no third is asked before
    down.clear()
    assert annotate(server, copied_images, run, *more).read_bytes() == whole


@pytest.mark.parametrize(
    ("question", "again"),
    [("What  COLOR is it?", True), ("what color is it", True), ("What colour is it?", True), ("Is it red?", False)],
)
def test_nearly_the_same_question_is_a_repetition(question, again):
    assert repeated(question, ["What shape is it?", "What color is it?"]) == again
