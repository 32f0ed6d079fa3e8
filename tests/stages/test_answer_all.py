"""--answer-all after a call without it, as when an experiment gets a variant with another matcher: only the rest is asked."""

import json
from pathlib import Path

import PI
import pytest
from answered_by_rule import annotate, flags
from fake_server import completion, text_of

from mpa.files.records import InputError, meta_path, read_json

LVLM, SVLM, TRAIN = "PI_big_big_images", "PI_big_small_images", "PI_big_train_big_small_images"


def rule(body, _=0):
    """The L-VLM repeats itself on some images; on some the S-VLM fails."""
    image = sum(map(ord, body["messages"][0]["content"][0]["image_url"]["url"]))
    if "Question:" in text_of(body):
        return 200, completion(f"Question: what color is thing {image}?\nAnswer: red")
    if body["model"] == "big":
        return 200, completion("red" if image % 3 else "the red one")
    return 200, completion("red" if image % 2 else "Answer: blue car.")


@pytest.fixture
def run(images, serve, tmp_path):
    server, folder = serve(rule), tmp_path / "run"
    annotate(server, images, folder)

    def ask(*more, rule=rule):
        """PI with these flags -> (path of the parity set, images that the S-VLM was asked about)."""
        server.rule, before = rule, len(server.bodies)
        out = PI.main(flags(server, images, folder, "--image-root", images, "--hold-out", "0", *more))
        return out, [b["messages"][0]["content"][0] for b in server.bodies[before:] if b["model"] == "small"]

    return ask


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / f"{name}.json").read_bytes() for name in (LVLM, SVLM, TRAIN)}


def test_only_the_rest_is_asked_and_all_is_as_if_asked_at_once(run, tmp_path, capsys):
    out, first = run()
    fewer, meta = files(out.parent), meta_path(out).read_bytes()
    assert 0 < len(first) < 12
    assert (
        run("--answer-all")[1] != [] and f"{len(first)} of the 12 answers are there already" in capsys.readouterr().out
    )
    _, again = run("--answer-all")
    assert again == []
    more = files(out.parent)
    assert more[TRAIN] == fewer[TRAIN] and meta_path(out).read_bytes() == meta and len(json.loads(more[SVLM])) == 12
    assert run()[1] == []  # the variant is gone again
    assert files(out.parent) == more
    for name in (SVLM, TRAIN):
        for file in out.parent.glob(f"{name}.*"):
            file.unlink()
    _, at_once = run("--answer-all")
    assert len(at_once) == 12 and files(out.parent) == more
    assert not list(out.parent.glob("*.journal*"))


def test_each_question_is_paid_for_once(run):
    _, first = run()
    _, rest = run("--answer-all")
    images = [part["image_url"]["url"] for part in [*first, *rest]]
    assert len(images) == len(set(images)) == 12


def test_a_selection_made_before_stays_as_it_is(run):
    out, _ = run()
    select = ["--lvlm-json", out.parent / f"{LVLM}.json", "--svlm-json", out.parent / f"{SVLM}.json", "--anchors", "1"]
    anchored, _ = run(*select, "--out", out.with_name("anchored.json"))
    before = anchored.read_bytes(), meta_path(anchored).read_bytes()
    run("--answer-all")
    assert run(*select, "--out", anchored)[1] == []
    assert (anchored.read_bytes(), meta_path(anchored).read_bytes()) == before
    loose, asked = run(*select, "--match", "contains", "--out", out.with_name("loose.json"))
    assert asked == [] and len(read_json(loose)) >= len(read_json(anchored))


@pytest.mark.parametrize("written", [False, True], ids=["killed", "temporary errors"])
def test_what_was_begun_without_it_is_taken_over(run, written):
    """All replies but one are in the journal; a result that was written is to be completed."""
    out, first = run()
    answers = out.with_name(f"{SVLM}.json")
    meta, kept = read_json(meta_path(answers)), answers.with_suffix(".replies.jsonl")
    lines = kept.read_text().splitlines(keepends=True)
    kept.unlink()  # written at the end of a stage
    answers.with_suffix(".journal.jsonl").write_text("".join(lines[:-1]))
    if written:
        meta_path(answers).write_text(json.dumps(meta | {"unfinished": 1}))
    else:
        answers.unlink()
    _, asked = run("--answer-all")
    assert len(asked) == 12 - (len(first) - 1)  # the missing one, and the rest
    assert len(read_json(answers)) == 12 and not read_json(meta_path(answers))["unfinished"]
    assert not list(out.parent.glob("*.journal*"))


@pytest.mark.parametrize("more", [["--max-new-tokens", "16"], ["--seed", "1"]])
def test_answers_with_other_settings_are_not_taken_over(run, more):
    run()
    with pytest.raises(InputError, match="was made with other settings"):
        run("--answer-all", *more)


def test_a_result_of_an_edited_question_is_not_taken_over(run):
    out, _ = run()
    answers = out.with_name(f"{SVLM}.json")
    records = read_json(answers)
    records[0]["question_id"] = "another"
    answers.write_text(json.dumps(records))
    answers.with_suffix(".replies.jsonl").unlink()
    with pytest.raises(InputError, match="was made with other settings: answer_all was False, is now True; content"):
        run("--answer-all")
