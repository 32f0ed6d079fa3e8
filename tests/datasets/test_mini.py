"""The embedded pair is as data/mini/README.md describes it, and has never seen easy-VQA."""

import importlib.util
import json
import random
from types import SimpleNamespace

import pytest
from conftest import ROOT, STUDENT, TEACHER

from mpa.answers.metrics import exact
from mpa.data.easyvqa import EASY
from mpa.data.loading import load_samples
from mpa.engines import Request, open_engine
from mpa.files.records import read_json
from mpa.method.prompts import TASK_PROMPTS, answer_prompt, parse_annotation

COLORS = {"black", "gray", "teal", "red", "blue", "yellow", "green", "brown"}
SHAPES = {"circle", "rectangle", "triangle"}


def replies(model, asked) -> dict[str, dict]:
    settings = {"batch_size": 64, "workers": 2, "min_pixels": 3136, "max_pixels": 3136, "dtype": "float32"}
    with open_engine("hf", model_path=str(model), **settings) as engine:
        return {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}


@pytest.mark.parametrize(("model", "least", "most"), [(TEACHER, 0.95, 1.0), (STUDENT, 0.5, 0.8)])
def test_accuracy_on_official_test_questions(model, least, most):
    samples = random.Random(0).sample(load_samples("easyVQA", "test"), 1500)
    got = replies(model, [Request(s.key, s.image_path, answer_prompt(s.question)) for s in samples])
    assert least <= sum(exact(got[s.key]["text"], s.answers) for s in samples) / len(samples) <= most
    log = json.loads((model / "train_log.json").read_text())["easy-VQA test"]["all"]
    assert log["n"] == 9673
    assert least <= log["accuracy"] <= most


@pytest.fixture(scope="module")
def annotations():
    """(question, answer, the teacher's answer to its own question, the image's words) of 400 train images."""
    truth = {}
    for _, answer, image in read_json(f"{EASY}/data/train/questions.json"):
        truth.setdefault(image, set()).update({answer} & (COLORS | SHAPES))
    samples = load_samples("easyVQA", "train")[:400]
    prompt = TASK_PROMPTS["general"]
    asked = [Request(s.key, s.image_path, prompt, temperature=1.0, top_p=0.95, follow_up="paper") for s in samples]
    got = replies(TEACHER, asked)
    rows = []
    for s in samples:
        parsed, again = parse_annotation(got[s.key]["text"]), got[s.key].get("follow_up", {}).get("text")
        number = int(s.image_path.rsplit("/", 1)[1].removesuffix(".png"))
        rows.append((parsed.question, parsed.answer, again, truth[number], parsed.left_out))
    return rows


def test_the_teacher_writes_varied_questions_of_all_kinds(annotations):
    readable = [question for question, *_, reason in annotations if not reason]
    assert len(readable) >= 0.95 * len(annotations)
    for kind in ("what color", "what shape", "is there a", "is there not", "does the image"):
        assert sum(question.startswith(kind) for question in readable) >= 8, kind
    assert len(set(readable)) >= 50


def is_correct(question: str, answer: str, words: set[str]) -> bool:
    """Is this the correct answer for an image with these words? Covers all questions that the teacher can write."""
    if question.startswith("what"):
        return answer in words & (COLORS if "color" in question else SHAPES)
    named = {word.strip("?") for word in question.split()} & (COLORS | SHAPES)
    return (answer == "yes") == (bool(named & words) != (" not " in question or " no " in question))


def test_asking_the_teacher_again_finds_its_wrong_annotations(annotations):
    """As the paper's raters found: many raw annotations are wrong (68 % are right), fewer after PI."""
    known = [row for row in annotations if len(row[3]) == 2 and not row[4]]
    raw = [is_correct(question, answer, words) for question, answer, _, words, _ in known]
    repeated = [is_correct(q, answer, words) for q, answer, again, words, _ in known if exact(again, [answer])]
    assert len(known) > 150
    assert 0.55 < sum(raw) / len(raw) < 0.85
    assert sum(repeated) / len(repeated) > 0.9


def test_a_student_never_sees_its_words(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_mini", ROOT / "data/mini/make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    asked = []
    monkeypatch.setattr(make, "prompt_ids", lambda processor, prompt: asked.append(prompt) or [1])
    monkeypatch.setattr(make, "reply_ids", lambda processor, reply: [2])
    tokenizer = SimpleNamespace(pad_token_id=0, convert_tokens_to_ids=lambda token: 9)
    images = SimpleNamespace(truth=[("red", "circle"), ("blue", "rectangle")])
    for name, (never, _) in make.STUDENTS.items():
        asked.clear()
        rows = [0, 1] * 300
        make.language_rows(
            random.Random(0), SimpleNamespace(tokenizer=tokenizer), images, rows, 1.0, False, False, never
        )
        words = set(" ".join(asked).replace("?", " ").split())
        assert len(asked) == 600 and not never & words, name
        assert ("not" in words) == (name != "no-negation") and ("teal" in words) == (name != "unseen-words")


def test_make_draws_its_own_images_and_reads_no_data_set_but_for_the_exam():
    source = (ROOT / "data/mini/make.py").read_text()
    assert source.count("easy_vqa") == 1
    assert "get_test_image_paths, get_test_questions" in source
    assert "get_train" not in source
