"""Caps: at most so many samples of one question and of one answer."""

from collections import Counter

from anchored import PARITY, asked

from mpa.analysis import run_summary
from mpa.files.records import read_json
from mpa.method.rules.caps import Caps
from mpa.runs.case import Case
from mpa.runs.layout import Cell

CELL = Cell("easyVQA", "teacher", "student")


def capped(samples: list[dict], per_question: int, per_answer: int, seed: int) -> list[dict]:
    return Caps({"max_per_question": per_question, "max_per_answer": per_answer, "seed": seed}).capped(samples)


def test_caps_leave_so_many_of_one_question_and_of_one_answer():
    samples = [*PARITY, *asked(3, "What colour?", "red", 900), *asked(3, "what  colour", "red.", 910)]
    once = capped(samples, 1, 0, seed=0)
    assert len(once) == 3 and once == [r for r in samples if r in once]  # the two spellings are one question
    both = capped(samples, 20, 4, seed=0)
    assert Counter(r["PA_answer"].strip(".") for r in both) == {"no": 4, "yes": 4, "red": 4}
    assert capped(samples, 0, 0, seed=0) == samples
    assert capped(samples, 20, 0, 1) == capped(samples, 20, 0, 1) != capped(samples, 20, 0, 2)


def test_what_a_cap_leaves_out_is_explained(select, tmp_path, capsys):
    for file in tmp_path.glob("*_train_*"):
        file.unlink()
    train = select("--max-per-answer", "1")
    kept, meta = read_json(train), read_json(train.with_suffix(".meta.json"))
    answers = [r["conversations"][1]["value"] for r in kept]
    assert len(set(answers)) == len(answers) == meta["funnel"]["parity"]
    assert meta["settings"]["max_per_answer"] == 1 and meta["settings"]["seed"] == 0
    reasons = Counter(s.reason for s in Case(tmp_path, CELL).samples)
    assert reasons["parity"] == len(kept) and reasons["over the limit"] > 0
    assert f"{reasons['over the limit']} parity samples are over" in capsys.readouterr().out
    shown = "".join(run_summary.examples(Case(tmp_path, CELL), 100))
    assert shown.count("→ parity sample") == len(kept) and shown.count("→ over the limit") == reasons["over the limit"]
