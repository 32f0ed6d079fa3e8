"""The guard's questions given by the user: about held-out images alone, answered by the L-VLM, asked before and after PL."""

import json
import shutil

import evaluate
import guard as guard_script
import PI
import pytest
from answered_by_rule import annotate, answers_by, flags
from PIL import Image

from mpa.analysis.guard import Guard
from mpa.files import image_files
from mpa.files.records import InputError, read_json
from mpa.runs.folders import RunFolder
from mpa.runs.layout import Cell
from mpa.stages import given_questions

CELL = Cell("images", "big", "small")
GIVEN = "PI_big_heldout-given_images.json"


@pytest.fixture
def run(serve, copied_images, tmp_path):
    """A run of the fake server's models, and questions about all of its images: `run.pi(FLAGS)`."""

    class Run:
        server, folder, questions = serve(answers_by()), tmp_path / "run", tmp_path / "asked.json"

        def pi(self, *more, svlm="small"):
            given = ["--hold-out", "0.4", "--held-out-questions", self.questions, "--image-root", copied_images]
            return PI.main(flags(self.server, copied_images, self.folder, *given, *more, svlm=svlm))

        def evaluate(self, model):
            evaluate.main(flags(self.server, copied_images, self.folder, "--model-path", model, svlm=None))

    annotate(Run.server, copied_images, Run.folder)
    paths = sorted(str(path.relative_to(copied_images)) for path in copied_images.rglob("*.png"))
    asked = [{"image": path, "question": f"What is shown, {i}?"} for path in paths for i in range(2)]
    Run.questions.write_text(json.dumps(asked))
    return Run()


def test_they_are_about_held_out_images_and_asked_instead_of_the_l_vlms_own(run, capsys):
    train = read_json(run.pi())
    given, own = read_json(run.folder / GIVEN), read_json(run.folder / "PI_big_heldout_images.json")
    hashes = {r["image_hash"] for r in given}
    assert hashes and {r["image_hash"] for r in own} <= hashes
    assert not hashes & {image_files.content_hash(r["image"]) for r in train}
    assert all(r["question"].startswith("What is shown") and r["answers"] == ["red"] for r in given)
    assert (
        f"the guard will ask {len(given)} of {len(read_json(run.questions))} given questions" in capsys.readouterr().out
    )
    n = run.server.number
    run.pi(svlm="tiny")
    bodies = run.server.bodies[n:]
    assert not [b for b in bodies if b["model"] == "big"]  # another S-VLM shares the L-VLM's answers

    for model in ("small", "PL_big_small_images"):
        run.evaluate(model)
        found = read_json(run.folder / f"Eval_{model}_images.json")
        assert [r["question_id"] for r in found] == [r["question_id"] for r in given]
    assert Guard(run.folder, CELL).compare("mpa").n == len(given)
    guard_script.main([str(run.folder), "--svlm", "small"])
    assert "on given questions about held-out images" in capsys.readouterr().out
    assert {cell.svlm for cell in RunFolder(run.folder).cells} == {"small", "tiny"}


def test_the_l_vlms_half_asks_them_for_all_s_vlms(run):
    run.pi("--only-lvlm")
    assert (run.folder / GIVEN).exists()
    n = run.server.number
    whole = run.pi()
    assert not [b for b in run.server.bodies[n:] if b["model"] == "big"]
    answers = [
        f"--{who}-json={run.folder}/PI_big_{model}_images.json" for who, model in (("lvlm", "big"), ("svlm", "small"))
    ]
    n, before = run.server.number, (run.folder / GIVEN).read_bytes()
    assert run.pi(*answers, "--out", run.folder / "again.json").read_bytes() == whole.read_bytes()
    assert run.server.number == n and (run.folder / GIVEN).read_bytes() == before


def test_more_than_enough_are_drawn_by_seed(monkeypatch):
    monkeypatch.setattr(given_questions.holdout, "hashes", lambda paths: {path: path for path in paths})
    asked = [{"question_id": f"given-{i}", "image_path": f"{i:02}", "question": "?"} for i in range(20)]
    chosen = [given_questions.about_held_out_images(asked, "09", seed, 5) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and {len(c) for c in chosen} == {5}
    assert all(r["image_path"] <= "09" for r in chosen[0])
    several = [r | {"question_id": f"{r['question_id']}-{i}"} for r in asked[:4] for i in range(20)]
    spread = given_questions.about_held_out_images(several, "09", 0, 5)
    assert len(spread) == 5 and len({r["image_path"] for r in spread}) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "contains no questions"),
        ("[]", "contains no questions"),
        ("[3]", "record 0: expected {image, question}"),
        ('[{"image": "a.png", "question": " "}]', "record 0: expected"),
        ('[{"image": "a.png", "question": "q"}, {"image": "../../x.png", "question": "q"}]', "record 1: image"),
        ('[{"image": "a.png"', "JSON"),
    ],
)
def test_what_is_no_question_is_named(content, said, tmp_path):
    (tmp_path / "asked.json").write_text(content)
    with pytest.raises(InputError, match=said) as error:
        given_questions.read(str(tmp_path / "asked.json"), "images", None, {})
    assert "asked.json" in str(error.value)


def test_what_cannot_be_asked_is_an_error(run, copied_images, tmp_path):
    Image.new("RGB", (30, 30), "white").save(copied_images / "other.png")
    for i in range(40):  # one of them is held out
        Image.new("RGB", (30, 30), (i, 3 * i, 0)).save(tmp_path / f"{i}.png")
    run.pi()
    threshold = read_json(run.folder / "PI_big_heldout_images.meta.json")["settings"]["threshold"]
    free = next(p for p in tmp_path.glob("*.png") if image_files.content_hash(str(p)) > threshold)
    shutil.rmtree(run.folder)
    annotate(run.server, copied_images, run.folder)
    run.questions.write_text(json.dumps([{"image": str(free), "question": "q?"}]))
    with pytest.raises(InputError, match="none of its 1 questions is about a held-out image"):
        run.pi()
    with pytest.raises(SystemExit):
        PI.arguments(["--dataset", "okVQA", "--held-out-questions", "train"])
    with pytest.raises(InputError, match="no train questions here"):
        given_questions.read("train", "images", None, {})
    with pytest.raises(InputError, match="Give a JSON list"):
        given_questions.read(str(tmp_path / "none.json"), "images", None, {})


def test_the_train_split_gives_its_questions_without_answers():
    asked = given_questions.read("train", "easyVQA", None, {})
    assert len(asked) > 1000 and set(asked[0]) == {"question_id", "image_path", "question"}
