"""scripts/report.py: what it reads, counts, leaves out and names; broken and unfinished runs."""

import json
import os
import re
import shutil

import answered_runs
import pytest
import synthetic_runs as fake
from answered_runs import sample
from conftest import python
from PIL import Image

from mpa.analysis.report import figures, texts, thumbnails
from mpa.analysis.report.content import CellContent, compared
from mpa.analysis.report.page import stages_table


def test_a_broken_cell_costs_only_itself_and_the_page_of_a_removed_run_goes(tmp_path):
    for name in ("one", "two", "three"):
        answered_runs.whole(tmp_path / name, tmp_path / "images", n=60)
    report = ["report.py", tmp_path, "--image-root", tmp_path / "images"]
    done = python(*report)
    assert done.returncode == 0 and "3 pairs" in done.stdout, done.stderr
    assert "60 images, 2 of them not shown" in done.stdout  # 3.png is missing, 4.png is broken
    assert len(list((tmp_path / "report").glob("*.html"))) == 4
    shutil.rmtree(tmp_path / "three")
    (tmp_path / "report/notes.html").write_text("mine")
    (tmp_path / "one/PA_big_textVQA.json").write_text('[{"question": ')
    (tmp_path / "two/Eval_small_textVQA.meta.json").write_text("[")
    done = python(*report)
    assert done.returncode == 1 and "error: " in done.stderr and "two/Eval_small_textVQA.meta.json" in done.stderr
    (tmp_path / "two/Eval_small_textVQA.meta.json").unlink()
    done = python(*report)
    assert done.returncode == 1 and "1 pair of" in done.stdout and "one/PA_big_textVQA.json" in done.stderr
    text = (tmp_path / "report/index.html").read_text()
    assert "Not in this report: <bdi>" in text and "one/PA_big_textVQA.json" in text
    assert {path.name for path in (tmp_path / "report").glob("*.html")} == {"index.html", "notes.html"}


@pytest.mark.parametrize("kind", ["another question", "null"])
def test_evaluations_that_differ_in_one_question_cost_only_their_comparison(tmp_path, kind):
    answered_runs.whole(tmp_path / "run", tmp_path / "images", n=30)
    file = tmp_path / "run/Eval_small_textVQA.json"
    evaluated = json.loads(file.read_text())
    evaluated[7]["GT_question"] = None if kind == "null" else "what is something else?"
    fake.write(file, evaluated)
    meta = json.loads(file.with_suffix(".meta.json").read_text())
    meta["settings"]["content"] = "of other requests"
    fake.write(file.with_suffix(".meta.json"), meta)
    done = python("report.py", tmp_path / "run", "--image-root", tmp_path / "images")
    assert done.returncode == 0 and done.stderr.count("\n") == done.stderr.count("question 7 is") == 1, done.stderr
    assert "not compared: " in done.stderr
    page = (tmp_path / "run/report/index.html").read_text()
    assert page.count("Not compared: <bdi>") == 1 and "before PL only" in page and "Gain of MPA" not in page
    done = python("diagnose.py", tmp_path / "run")
    assert (
        done.returncode == 0 and "problem: not compared: textVQA.\n" in done.stdout and "question 7 is" in done.stdout
    )
    assert ".." not in done.stdout
    assert python("diagnose.py", tmp_path / "run", "--short").returncode == 0
    done = python("tables.py", "--dataset", "textVQA", "--lvlm", "big", "--svlm", "small", tmp_path / "run")
    assert done.returncode == 0 and "No gain: " in done.stdout and "question 7 is" in done.stdout
    done = python("show.py", tmp_path / "run", "--broken", "--no-images")
    assert done.returncode == 1 and done.stderr.count("question 7 is") == done.stderr.count("\n") == 1


@pytest.mark.parametrize("model", ["small", "PL_big_small_textVQA"])
def test_a_broken_evaluation_costs_only_itself(tmp_path, model):
    answered_runs.whole(tmp_path / "run", tmp_path / "images", n=30)
    file = tmp_path / f"run/Eval_{model}_textVQA.json"
    fake.write(file, {"not": "a list"})
    done = python("report.py", tmp_path / "run", "--image-root", tmp_path / "images")
    assert done.returncode == 1 and done.stderr.count("\n") == done.stderr.count(str(file)) == 1, done.stderr
    page = (tmp_path / "run/report/index.html").read_text()
    assert page.count("Not in this report: <bdi>") == 1 and "not compared" not in page and "what is thing 0?" in page
    cell = CellContent(tmp_path / "run", answered_runs.CELL)
    assert cell.missing == []  # it is there
    file.with_suffix(".meta.json").unlink()
    assert cell.missing == [f"Eval_{model}_textVQA.meta.json"]


@pytest.mark.parametrize("name", ["predicted_question", "predicted_answer"])
def test_an_annotation_that_became_null_costs_nothing(tmp_path, name):
    answered_runs.whole(tmp_path / "run", tmp_path / "images", n=130)
    file = tmp_path / "run/PA_big_textVQA.json"
    annotations = json.loads(file.read_text())
    for place in (0, 1, 2):  # kept, answered right by the S-VLM, and inconsistent
        annotations[place][name] = None
    fake.write(file, annotations)
    for command in (["report.py"], ["diagnose.py"], ["show.py", "--no-images"], ["checks.py", "inspect"]):
        done = python(command[0], *command[1:], tmp_path / "run")
        assert done.returncode == 0, done.stderr
    cell = CellContent(tmp_path / "run", answered_runs.CELL)
    assert cell.funnel()[-1] == ("parity set", 44) and cell.case.kept[0].question == "what is thing 0?"


def test_broken_parts_of_a_cell_are_named_and_the_rest_is_shown(tmp_path):
    answered_runs.whole(tmp_path / "run", tmp_path / "images", n=30)
    for name, content in (("Eval_small_textVQA.meta.json", "["), ("PL_big_small_textVQA/trainer_state.json", "{")):
        (tmp_path / "run" / name).write_text(content)
    meta = tmp_path / "run/PL_big_small_textVQA/train_meta.json"
    fake.write(meta, {"settings": {}, "samples": "many"})
    done = python("report.py", tmp_path / "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    page = (tmp_path / "run/report/index.html").read_text()
    for name in ("Eval_small_textVQA.meta.json", "trainer_state.json", "train_meta.json"):
        assert name in page and name in done.stderr
    assert "problem: not diagnosed" in page and "Nothing unusual" not in page and "Results: accuracy" in page


def test_what_is_no_run_is_skipped_by_its_content_and_a_run_may_have_any_name(tmp_path):
    for name in ("PL_trial", "failed", "report", "logs/pace"):
        answered_runs.whole(tmp_path / name, tmp_path / "images", n=12)
    command = "env DATASET=textVQA bash scripts/PA.sh\n"
    for name in (
        "other/PA_big_textVQA.json",
        "other/paper-0/PI_big_train_big_small_textVQA.json",
        "failed/PA_x_okVQA.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(command)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/PA_big_textVQA.json").write_text("My notes on PA.")
    for script in ("report.py", "diagnose.py", "show.py"):
        done = python(script, tmp_path, *(["--no-images"] if script == "show.py" else []))
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "report").glob("*.html"))) == 5
    done = python("tables.py", tmp_path, "--table", "main", "--format", "csv")
    assert done.returncode == 0, done.stderr
    (tmp_path / "failed/PA_big_textVQA.json").write_text("")  # damaged, not something else
    assert python("diagnose.py", tmp_path).returncode == 1


def test_train_sets_of_one_cell_are_compared_with_mpa(tmp_path):
    answered_runs.whole(tmp_path / "run", tmp_path / "images", n=12)
    fake.evaluation(tmp_path / "run", "PL_big_small_textVQA_human", "textVQA", [1] * 60)
    (pair,) = compared([CellContent(tmp_path / "run", answered_runs.CELL)])
    assert (pair["first"], pair["second"]) == ("human labels, all", "MPA")
    assert pair["of"] == f"{tmp_path.name}/run, textVQA, small from big"
    assert pair["change"]["n"] == 60 and len(pair["flips"]) == 40  # MPA is right on every third
    assert {flip.kind for flip in pair["flips"]} == {"broken"}


def test_losses_and_the_trainers_log(tmp_path):
    answered_runs.whole(tmp_path / "run", tmp_path / "images")
    cell = CellContent(tmp_path / "run", answered_runs.CELL)
    assert cell.funnel()[-1] == ("parity set", 44)
    assert cell.losses() == [("L-VLM disagrees", 43), ("both right", 43)]
    assert ("lr vision at step 11", "2e-06") in cell.training_facts()
    assert ("samples per second at step 11", "9.5") in cell.training_facts()
    drawn = figures.training(cell.history())
    assert all(f"<!-- {text} -->" in drawn for text in ("language", "vision", "samples per second", "gradient norm"))


def test_repeated_samples_are_counted(tmp_path):
    samples = [sample(0, image="/a.png"), sample(0, image="/a.png"), sample(0, annotation="other", image="/b.png")]
    answered_runs.write(tmp_path, [s | {"id": i} for i, s in enumerate(samples)])
    assert CellContent(tmp_path, answered_runs.CELL).repeats()[1] == ("parity set", [3, 1, 2, 2])


def test_what_is_the_same_for_all_samples_is_a_number_and_no_histogram():
    lengths = {
        "kept": {"question": [4, 5, 5], "answer": [1, 1, 1]},
        "rejected": {"question": [4, 6], "answer": [1, 1]},
    }
    drawn = figures.distributions(lengths, {"kept": [], "rejected": []})
    assert drawn.count(" in all samples -->") == drawn.count("<!-- 1 in all samples -->") == 1
    assert "<!-- 5 -->" in drawn and "<!-- 4.5 -->" not in drawn  # words are whole


def test_time_and_cost_by_stage(tmp_path):
    answered_runs.whole(tmp_path, tmp_path / "images", n=3)
    fake.write(tmp_path / "spending.json", {"spent": {"PA big": {"cost": 1.5}, "broken": None}, "reserved": {}})
    _, lines, _ = stages_table(CellContent(tmp_path, answered_runs.CELL)).with_notes()
    assert lines == [["evaluate", "2", ""], ["PA big", "", "1.50"]]


def test_an_unfinished_run_says_what_is_not_there(tmp_path):
    answered_runs.whole(tmp_path / "run", tmp_path / "images", n=10, evaluated=False)
    done = python("report.py", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run/report/index.html").read_text()
    assert "This run is not finished. Not there yet: PL_big_small_textVQA/, Eval_small_textVQA.json" in text
    assert "No evaluation yet." in text and "Not trained yet." in text


def test_only_images_of_the_run_are_embedded(tmp_path, monkeypatch):
    answered_runs.whole(tmp_path / "run", tmp_path / "images", n=6)
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    pa = tmp_path / "run/PA_big_textVQA.json"
    for path in (tmp_path / "run").glob("P*_big_*textVQA.json"):
        path.write_text(
            path.read_text().replace(str(tmp_path / "images/0.png"), str(tmp_path / "images/../secret.png"))
        )
    assert "secret" in pa.read_text()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-pages")
    done = python("report.py", tmp_path / "run", "--image-root", tmp_path / "images", "--single-file", "--redact-paths")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run/report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    (bad,) = [image for image in data["images"] if image["name"] == "secret.png"]
    assert "src" not in bad and bad["why"].startswith("outside the image folders")
    assert str(tmp_path) not in text and "sk-not-for-pages" not in text and os.environ["PATH"] not in text


def test_thumbnails_are_made_once(tmp_path):
    image = tmp_path / "images/a.png"
    image.parent.mkdir()
    Image.new("RGB", (400, 200)).save(image)
    wanted = {str(image): [str(image.parent)]}
    first = thumbnails.make(wanted, tmp_path / "thumbs")
    (file,) = (tmp_path / "thumbs").iterdir()
    when = file.stat().st_mtime_ns
    assert thumbnails.make(wanted, tmp_path / "thumbs") == first and file.stat().st_mtime_ns == when
    assert Image.open(file).size == (160, 80)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python /home/me/mpa/PA.py --out=/data/x y", "python PA.py --out=x y"),
        ("data/mini/teacher and 1/2", "data/mini/teacher and 1/2"),
        ("https://example.org/v1", "https://example.org/v1"),
        ("broken: no such file '/home/alice/private/x.png'", "broken: no such file 'x.png'"),
        ("a:/home/alice/b file:///home/alice/x", "a:b x"),
    ],
)
def test_redacted_paths(text, expected):
    assert texts.without_folders(text) == expected


def test_a_real_run(easy_run, tmp_path):
    shutil.copytree(easy_run, tmp_path / "easy")
    done = python("report.py", tmp_path / "easy")
    assert done.returncode == 0 and re.search(r"index\.html \(\d{2,3} kB\)", done.stdout), done.stderr
    text = (tmp_path / "easy/report/index.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert all("src" in image for image in data["images"]) and len(data["cells"][0]["samples"]) == 40 + 48
