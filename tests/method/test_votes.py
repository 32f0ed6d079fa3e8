"""Votes: sampled answers decide whether the L-VLM agrees with itself."""

from collections import Counter

import PI
import pytest
from answered_by_rule import annotate, flags
from fake_server import completion, text_of

from mpa.files.records import InputError, read_json
from mpa.method.rules.votes import Votes
from mpa.runs.case import Case
from mpa.runs.layout import Cell


def test_votes_are_a_share_of_what_was_asked():
    rule = Votes({"votes": 4, "min_agreement": 0.75, "seed": 0})
    rule.see([{"question_id": f"a#7#{i}", "predictions": "red" if i else "blue"} for i in range(4)])
    rule.see([{"question_id": f"8#{i}", "predictions": None if i else "red"} for i in range(4)])
    same = str.__eq__
    assert rule.agrees({"question_id": "a#7"}, "red", same)[0]
    assert not rule.agrees({"question_id": 8}, "red", lambda vote, answer: vote == answer)[0]
    assert not rule.agrees({"question_id": 9}, "red", same)[0]  # it was not asked


def test_votes_decide_instead_of_the_greedy_answer(serve, copied_images, tmp_path):
    """Greedily the L-VLM always repeats itself. Its sampled answers do so for two of three images only."""

    def rule(body, number=0):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        if "Question:" in text_of(body):
            return 200, completion("Question: what color?\nAnswer: red")
        if body["model"] != "big":
            return 200, completion("blue")
        return 200, completion("green" if body["temperature"] and sum(map(ord, url)) % 3 == 0 else "red")

    server, run = serve(rule), tmp_path / "run"
    annotate(server, copied_images, run)
    given = flags(server, copied_images, run, "--hold-out", "0", "--votes", "4", "--min-agreement", "0.75")
    PI.main([*given, "--only-lvlm"])
    votes = read_json(run / "PI_big_votes_images.json")
    train = PI.main(given)
    shares = Counter(r["question_id"].rpartition("#")[0] for r in votes if r["predictions"] == "red")
    assert len(votes) == 4 * 30 and set(shares.values()) == {4} and 0 < len(shares) < 30
    assert {str(r["id"]) for r in read_json(train)} == set(shares)
    samples = Case(run, Cell("images", "big", "small")).samples
    assert {s.reason for s in samples if s.question_id not in shares} == {"L-VLM disagrees"}
    assert "in 0% of the votes" in next(s.detail for s in samples if not s.kept)
    n, answers = server.number, ["--lvlm-json", run / "PI_big_big_images.json"]
    answers += ["--svlm-json", run / "PI_big_small_images.json", "--out", tmp_path / "again.json"]
    assert PI.main([*given, *map(str, answers)]).read_bytes() == train.read_bytes() and server.number == n
    (run / "PI_big_votes_images.json").unlink()
    with pytest.raises(InputError, match=r"PI_big_votes_images.json: no such file. Run PI.sh with --votes first"):
        PI.main([*given, *map(str, answers), "--restart"])
