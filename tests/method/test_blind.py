"""Blind answers: a question that needs no image is left out."""

import base64
import io
from collections import Counter

import PI
from answered_by_rule import annotate, flags
from fake_server import completion, text_of
from PIL import Image

from mpa.files.records import read_json
from mpa.runs.case import Case
from mpa.runs.folders import RunFolder
from mpa.runs.layout import Cell


def test_questions_that_need_no_image_are_left_out(serve, copied_images, tmp_path, capsys):
    """The L-VLM says yes to "is it red?" whatever it sees, and tells a grey image's colour."""

    def rule(body, _=0):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            grey = image.size == (448, 448)
        if "Question:" in text_of(body):
            asked = (
                "Question: is it red?\nAnswer: yes" if sum(map(ord, url)) % 3 else "Question: what color?\nAnswer: red"
            )
            return 200, completion(asked)
        if body["model"] != "big":
            return 200, completion("blue")
        return 200, completion("yes" if "is it red" in text_of(body) else "grey" if grey else "red")

    server, run = serve(rule), tmp_path / "run"
    annotate(server, copied_images, run)
    plain = PI.main(flags(server, copied_images, run, "--hold-out", "0", "--out", tmp_path / "plain.json"))
    given = flags(server, copied_images, run, "--hold-out", "0", "--blind", "--restart")
    train = PI.main(given)
    asked = [r["conversations"][0]["value"] for r in read_json(plain)]
    kept = [r for r in read_json(plain) if "what color" in r["conversations"][0]["value"]]
    assert read_json(train) == kept and 0 < len(kept) < len(asked)
    cell = Cell("images", "big", "small")
    reasons = Counter(s.reason for s in Case(run, cell).samples)
    assert reasons["parity"] == len(kept) and reasons["L-VLM needs no image"] == len(asked) - len(kept)
    n = server.number
    answers = ["--lvlm-json", run / "PI_big_big_images.json", "--svlm-json", run / "PI_big_small_images.json"]
    again = PI.main([*given[:-1], *map(str, [*answers, "--out", tmp_path / "again.json"])])
    assert again.read_bytes() == train.read_bytes() and server.number == n
    assert RunFolder(run).cells == [cell]
