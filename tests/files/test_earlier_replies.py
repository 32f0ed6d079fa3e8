"""Images that are added, removed or moved: no reply is paid for twice, and the files are those of a run from nothing."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import killed, python
from fake_server import completion, text_of
from PIL import Image

from mpa.engines import Request, pacing
from mpa.files.earlier_replies import Asked
from mpa.files.journal import Journal
from mpa.files.records import InputError, read_json


def rule(body, _):
    """A question that depends on the image; the S-VLM, "s", answers otherwise than the L-VLM."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    if "Question:" in text_of(body):
        return 200, completion(f"Question: what is {hashlib.sha256(url.encode()).hexdigest()[:6]}?\nAnswer: red")
    return 200, completion("red" if body["model"] == "l" else "blue")


def stage(name: str, server, run: Path, root: Path, *more) -> str:
    """Run a stage to its end -> what it said."""
    flags = ["--dataset", "images", "--engine", "openai", "--base-url", server.url, "--model-path-lvlm", "l", *more]
    own = {"PA": ["--image-root", root], "PI": ["--model-path-svlm", "s"], "evaluate": ["--model-path", "s"]}[name]
    done = python(f"{name}.py", *flags, *own, "--run", f"{run}/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def all_stages(server, run: Path, root: Path, *more) -> str:
    return "".join(stage(name, server, run, root, *more) for name in ("PA", "PI", "evaluate"))


def results(run: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in run.glob("*.json") if "meta" not in path.name and path.name[0] in "PEH"
    }


@pytest.fixture
def root(images, tmp_path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "images"))


def test_of_an_image_added_and_one_gone_only_the_new_one_is_asked_for(serve, root, tmp_path):
    server, run = serve(rule), tmp_path / "run"
    all_stages(server, run, root)
    before = server.billed
    Image.new("RGB", (70, 70), "green").save(root / "new.png")
    Path(read_json(run / "PI_l_train_l_s_images.json")[0]["image"]).unlink()
    said = all_stages(server, run, root)
    assert "PA: 1 image added, 1 gone; replies to the same requests are taken over" in said
    assert "PA: 11 replies were taken over" in said
    assert server.billed - before == 3  # its annotation, the L-VLM's answer, and the S-VLM's
    assert all_stages(server, run, root).count("already exists") >= 3
    assert server.billed - before == 3
    all_stages(server, tmp_path / "fresh", root)
    ours, fresh = results(run), results(tmp_path / "fresh")
    assert set(ours) == set(fresh)
    for name in ("PA_l_images.json", "PI_l_l_images.json"):
        assert ours[name] == fresh[name]


@pytest.mark.parametrize("more", [(), ("--temperature", "1", "--no-fused")], ids=["greedy", "sampled"])
def test_a_folder_that_was_moved_costs_nothing(serve, root, tmp_path, more):
    server, run = serve(rule), tmp_path / "run"
    stages = (("PA", *more), ("PI",), ("evaluate",))
    for name, *flags in stages:
        stage(name, server, run, root, *flags)
    before = server.billed
    root = root.rename(tmp_path / "moved")
    for name, *flags in stages:
        assert "the same images; their paths" in stage(name, server, run, root, *flags)
    assert server.billed == before
    for name, *flags in stages:
        stage(name, server, tmp_path / "fresh", root, *flags)
    assert results(run) == results(tmp_path / "fresh")


def test_a_renamed_file_keeps_its_greedy_reply_and_is_asked_for_a_sampled_one(serve, root, tmp_path):
    server = serve(rule)
    for run, more, asked in (("greedy", (), 0), ("sampled", ("--temperature", "1"), 2)):
        stage("PA", server, tmp_path / run, root, *more)
        before = server.billed
        names = sorted(root.glob("*.png"))
        names[0].rename(root / f"{run}.png")
        stage("PA", server, tmp_path / run, root, *more)
        assert server.billed - before == asked
        assert any(r["question_id"] == f"{run}.png" for r in read_json(tmp_path / run / "PA_l_images.json"))


def test_an_unfinished_run_goes_on_with_other_images(serve, root, tmp_path):
    server, run = serve(rule), tmp_path / "run"
    flags = ["--dataset", "images", "--engine", "openai", "--base-url", server.url, "--concurrency", "1"]
    killed("PA.py", *flags, "--model-path-lvlm", "l", "--image-root", root, "--run", f"{run}/", replies=5)
    kept = (run / "PA_l_images.journal.jsonl").read_text().count("\n") - 1
    assert 5 <= kept < 12
    Image.new("RGB", (70, 70), "green").save(root / "new.png")
    before = server.billed
    assert f"PA: {kept} replies were taken over" in stage("PA", server, run, root)
    assert server.billed - before == 2 * (13 - kept)
    assert not list(run.glob("*.journal*"))


def out_of_order_for(*which: str):
    """`rule`, with temporary errors for some images: which of them, by the model that is asked and the image's place."""
    known = {}

    def broken(body, number):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        place = known.setdefault(url, len(known))
        wrong = "Question:" not in text_of(body) and f"{body['model']}{place}" in which
        return (500, {"error": {"message": "out of order"}}) if wrong else rule(body, number)

    return broken


def test_after_temporary_errors_a_call_with_other_images_or_questions_goes_on(serve, root, tmp_path, monkeypatch):
    """The L-VLM fails on one image, so the S-VLM is asked fewer questions; it fails on another."""
    monkeypatch.setattr(pacing, "MAX_BACKOFF", 0.01)
    server, run, flags = serve(rule), tmp_path / "run", ("--hold-out", "0")
    stage("PA", server, run, root, "--no-fused")
    server.rule = out_of_order_for("l3", "s5")
    assert stage("PI", server, run, root, *flags).count("1 replies failed with a temporary error") == 2
    server.rule, before = rule, server.billed
    stage("PI", server, run, root, *flags)
    assert server.billed - before == 3  # the L-VLM's, and the S-VLM's to this question and to the one that failed
    server.rule = out_of_order_for("l12")
    Image.new("RGB", (70, 70), "green").save(root / "new.png")
    stage("PA", server, run, root, "--no-fused")
    stage("PI", server, run, root, *flags)
    server.rule = rule
    (root / "03.png").rename(root / "z.png")
    stage("PA", server, run, root, "--no-fused")
    stage("PI", server, run, root, *flags)
    stage("PA", server, tmp_path / "fresh", root, "--no-fused")
    stage("PI", server, tmp_path / "fresh", root, *flags)
    assert results(run) == results(tmp_path / "fresh") and not list(run.glob("*.journal*"))


def test_a_result_and_journal_of_temporary_errors_alone_are_in_nobodys_way(serve, root, tmp_path):
    server, run = serve(rule), tmp_path / "run"
    stage("PA", server, run, root)
    result, meta = run / "PA_l_images.json", read_json(run / "PA_l_images.meta.json")
    failed = {"key": "01.png#0", "asked": "1", "error": "server: out of order", "permanent": False}
    lines = [{"settings": meta["settings"]}, failed]
    result.with_suffix(".journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result.with_suffix(".meta.json").write_text(json.dumps(meta | {"unfinished": 12}))
    result.with_suffix(".replies.jsonl").unlink()
    for path in root.glob("*.png"):
        path.unlink()
    before = server.billed
    stage("PA", server, run, root)
    assert server.billed - before == 2 * len(read_json(result)) == 6


@pytest.mark.parametrize("more", [(), ("--answer-all",)])
def test_images_are_added_after_a_call_with_answer_all_was_killed(serve, root, tmp_path, more):
    disagreeing = {}

    def half(body, number):
        """The L-VLM agrees with itself on every other image."""
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        agrees = (
            "Question:" in text_of(body) or body["model"] == "s" or disagreeing.setdefault(url, len(disagreeing) % 2)
        )
        return rule(body, number) if agrees else (200, completion("green"))

    server, run, flags = serve(half), tmp_path / "run", ("--hold-out", "0")
    stage("PA", server, run, root)
    stage("PI", server, run, root, *flags)
    asked = ["--dataset", "images", "--engine", "openai", "--base-url", server.url, "--model-path-lvlm", "l"]
    killed("PI.py", *asked, "--model-path-svlm", "s", "--run", f"{run}/", *flags, "--answer-all", replies=9)
    server.rule = rule
    Image.new("RGB", (70, 70), "green").save(root / "new.png")
    stage("PA", server, run, root)
    before = server.billed
    stage("PI", server, run, root, *flags, *more)
    assert 1 <= server.billed - before <= (1 + 12 - 9 if more else 1)
    assert not list(run.glob("*.journal*"))


def test_what_was_gone_and_comes_back_is_not_paid_for_again(serve, root, tmp_path):
    server, run = serve(rule), tmp_path / "run"
    stage("PA", server, run, root)
    first, before = (run / "PA_l_images.json").read_bytes(), server.billed
    away = (root / "03.png").rename(tmp_path / "03.png")
    stage("PA", server, run, root)
    away.rename(root / "03.png")
    stage("PA", server, run, root)
    assert server.billed == before and (run / "PA_l_images.json").read_bytes() == first
    stage("PA", server, run, root, "--restart")
    assert server.billed == 2 * before


def test_other_settings_are_refused_and_their_replies_are_never_taken(serve, root, tmp_path):
    server, run = serve(rule), tmp_path / "run"
    stage("PA", server, run, root)
    (root / "03.png").unlink()
    flags = ["--dataset", "images", "--engine", "openai", "--base-url", server.url, "--image-root", root]
    for more, says in ((("--seed", "5"), "seed was 0, is now 5"), (("--task", "text"), "content was")):
        done = python("PA.py", *flags, "--model-path-lvlm", "l", "--run", f"{run}/", *more)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    for name in ("PA_l_images.json", "PA_l_images.meta.json"):
        (run / name).unlink()  # the kept replies stay
    before = server.billed
    stage("PA", server, run, root, "--max-new-tokens", "64")
    assert server.billed - before == 22


def test_copies_of_an_image_keep_their_own_replies_and_an_error_is_asked_again(tmp_path):
    settings = {"model": "a", "content": "1"}
    images = {path: (1, "h") for path in ("a.png", "b.png", "c.png")}
    requests = [Request(path, path, "q") for path in images]
    journal = Journal(tmp_path / "PA.json", settings, asked=Asked(images, requests))
    journal.take_over(requests)
    replies = [
        {"key": "a.png", "text": "A"},
        {"key": "b.png", "text": "B"},
        {"key": "c.png", "error": "e", "permanent": False},
    ]
    journal.append(replies)
    journal.close()
    again = Journal(tmp_path / "PA.json", settings | {"content": "2"}, asked=Asked(images, requests))
    again.take_over(requests[:2])
    assert [again[key] for key in ("a.png", "b.png")] == replies[:2] and again.taken_over == 2
    again.close()
    with pytest.raises(InputError, match="model was 'a', is now 'b'"):
        Journal(tmp_path / "PA.json", {"model": "b", "content": "2"}, asked=Asked(images, requests))
    with pytest.raises(InputError, match="content was '2', is now '3'"):
        other = [Request("a.png", "a.png", "another prompt")]
        Journal(tmp_path / "PA.json", settings | {"content": "3"}, asked=Asked(images, other))


def test_a_journal_of_an_older_version_goes_on(serve, root, tmp_path):
    server, run = serve(rule), tmp_path / "run"
    stage("PA", server, run, root)
    meta = read_json(run / "PA_l_images.meta.json")
    lines = [json.loads(line) for line in (run / "PA_l_images.replies.jsonl").read_text().splitlines()[1:6]]
    old = [{"settings": meta["settings"]}, *({k: v for k, v in line.items() if k != "asked"} for line in lines)]
    older = tmp_path / "older"
    older.mkdir()
    (older / "PA_l_images.journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    before = server.billed
    stage("PA", server, older, root)
    assert server.billed - before == 14
    assert (older / "PA_l_images.json").read_bytes() == (run / "PA_l_images.json").read_bytes()
