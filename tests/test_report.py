"""scripts/report.py in a real browser: filters, links, keyboard, hostile text, accessibility. scripts/show.py in a terminal."""

import contextlib
import json
import os
import re
import shutil

import answered_runs
import pytest
import synthetic_runs as fake
from answered_runs import sample, word
from conftest import python
from PIL import Image

from mpa.analysis.report import figures, texts, thumbnails
from mpa.analysis.report.content import CellContent, compared
from mpa.analysis.report.page import stages_table
from mpa.runs.layout import Cell

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
in_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed: apt-get install chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync".split()
)
FLAGS.append("--disable-component-update")
HOSTILE = [
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "javascript:window.hacked=1",
    "'; window.hacked=1; //",
    "{{ 7*7 }} {% raw %} ${7*7}",
    "\u202eright to left \u2066 isolate",
    "nul \0 and \ud800 alone",
    "<!-- <script>",
    "long " + "x" * 100_000,
    "&lt;b&gt; &amp;",
    "line\u2028separator",
]


def make_run(folder, images, texts=None, cell=answered_runs.CELL, n=130, evaluated=True) -> None:
    """A whole run with images: kept and rejected samples, evaluations before and after, a training log."""
    images.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(n):
        path = images / f"{i}.png"
        if i != 3 and not path.exists():
            Image.new("RGB", (40, 30), (i % 255, 90, 160)).save(path)
        more = {"svlm": word(i)} if i % 3 == 1 else {"lvlm": "else", "svlm": None} if i % 3 == 2 else {}
        samples.append(sample(i, image=str(path), **more))
    for s, text in zip(samples, texts or [], strict=False):
        s |= {"question": text, "annotation": text, "lvlm": text, "svlm": "other " + text[:50], "id": text}
    (images / "4.png").write_text("not an image")
    answered_runs.write(folder, samples, cell)
    if evaluated:
        before, after = ([int(i % k == 0) for i in range(60)] for k in (2, 3))
        for name, right in ((cell.svlm, before), (f"PL_{cell.lvlm}_{cell.svlm}_{cell.dataset}", after)):
            path = fake.evaluation(folder, name, cell.dataset, right)
            records = json.loads(path.read_text())
            for i, r in enumerate(records):
                r["image_path"] = str(images / f"{i}.png")
                if texts and i < len(texts):
                    r |= {"GT_question": texts[i], "predictions": texts[i]}
            fake.write(path, records)
        model = folder / f"PL_{cell.lvlm}_{cell.svlm}_{cell.dataset}"
        fake.write(model / "train_meta.json", {"settings": {}, "samples": 44, "steps": 12})
        rates = {"lr_language": 1e-5, "lr_vision": 2e-6}
        history = [
            {"step": i, "loss": 1 / (i + 1), "grad_norm": 1.0, "samples_per_second": 9.5} | rates for i in range(12)
        ]
        fake.write(model / "trainer_state.json", {"log_history": history})


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@contextlib.contextmanager
def page_of(browser, path, fragment=""):
    """The page in a fresh window. Fails if the console has an error, or a request leaves the page's folder."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request", lambda r: errors.append(r.url) if not r.url.startswith((path.parent.as_uri(), "data:")) else None
    )
    page.goto(path.as_uri() + fragment)
    page.errors = errors
    yield page
    assert not errors
    context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of one run, as a folder."""
    folder = tmp_path_factory.mktemp("report")
    make_run(folder / "run", folder / "images")
    done = python("report.py", folder / "run", "--image-root", folder / "images")
    assert done.returncode == 0, done.stderr
    return folder / "run/report/index.html"


def shown(page) -> int:
    return int(re.match(r"([\d,]+) of", page.text_content("#count"))[1].replace(",", ""))


@in_browser
def test_filters_give_the_right_counts(browser, report):
    with page_of(browser, report) as page:
        assert page.text_content("#count") == "130 of 130 shown" and page.locator("#cards li").count() == 60
        page.select_option("#verdict", "kept")
        assert shown(page) == 44
        page.select_option("#verdict", "L-VLM disagrees with itself")
        assert shown(page) == 43 and "it answers 'else'" in page.text_content("#cards")
        page.click("#reset")
        page.fill("#search", "thing 12")
        assert shown(page) == 11  # 12, and 120 to 129
        page.click("#reset")
        page.click("#inspect")
        assert shown(page) == 94 and page.get_attribute("#inspect", "aria-pressed") == "true"
        page.select_option("#source", "test")
        assert page.text_content("#count") == "60 of 60 shown" and page.is_disabled("#inspect")
        page.select_option("#verdict", "fixed")
        assert shown(page) == 10  # 3, 9, 15 …: multiples of 3 and not of 2
        page.select_option("#verdict", "broken")
        assert shown(page) == 20


@in_browser
def test_images_are_shown_and_what_is_missing_says_why(browser, report):
    with page_of(browser, report) as page:
        page.locator("#cards img").first.wait_for()
        assert page.evaluate("document.querySelector('#cards img').decode().then(() => true)")
        assert page.evaluate("document.querySelector('#cards img').naturalWidth") == 40
        assert page.locator("#cards .none").first.text_content().startswith("No image: no such file (")
        assert page.locator("#cards .none").count() == 2 and page.locator("figure img").count() == 5
        widths = page.evaluate("[...document.querySelectorAll('figure img')].map(i => i.naturalWidth)")
        assert min(widths) > 100


@in_browser
def test_each_sample_has_a_link_and_the_keyboard_suffices(browser, report):
    with page_of(browser, report, "#s=0/annotated/100") as page:
        assert "what is thing 100?" in page.text_content("#cards li.target")
        assert page.text_content("#place") == "page 2 of 3"
        assert page.evaluate("document.activeElement.closest('li.target') !== null")
    with page_of(browser, report) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        for _ in range(80):  # reach the first filter, then its value, by keys alone
            if page.evaluate("document.activeElement.id") == "verdict":
                break
            page.keyboard.press("Tab")
        page.keyboard.press("ArrowDown")
        assert shown(page) < 130
        for _ in range(200):
            if page.evaluate("document.activeElement.id") == "reset":
                break
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert shown(page) == 130


@in_browser
@pytest.mark.parametrize("single_file", [False, True])
def test_hostile_text_is_shown_as_text(browser, tmp_path, single_file):
    cell = Cell("textVQA", "big<img src=x onerror=window.hacked=1>", 'small"><script>1')
    make_run(tmp_path / "run<b>", tmp_path / "im'ages\"", HOSTILE, cell)
    flags = ["--single-file"] if single_file else []
    done = python("report.py", tmp_path / "run<b>", "--image-root", tmp_path / "im'ages\"", *flags)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "run<b>" / ("report.html" if single_file else "report/index.html")
    with page_of(browser, path) as page:
        for source in ("annotated", "test"):
            page.select_option("#source", source)
            text = page.text_content("#cards")
            for hostile in HOSTILE[:6] + HOSTILE[8:9] + HOSTILE[10:11]:
                assert hostile in text, (source, hostile)
            assert "(100,005 characters)" in text
        page.wait_for_timeout(200)
        assert page.evaluate("window.hacked") is None
        assert page.locator("script").count() == 2 and page.locator("#cards script, #cards b").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.evaluate(
            "const s = document.createElement('script'); s.textContent = 'window.hacked = 2'; document.body.append(s)"
        )
        assert page.evaluate("window.hacked") is None  # the policy forbids scripts that are not the page's own
        assert "Content Security Policy" in page.errors.pop()
    assert single_file == ("data:image/webp" in path.read_text())


@in_browser
@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1440, "dark")])
def test_accessibility_and_width(browser, tmp_path, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    make_run(tmp_path / "run", tmp_path / "images", HOSTILE)
    done = python("report.py", tmp_path / "run", "--image-root", tmp_path / "images")
    assert done.returncode == 0, done.stderr
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto((tmp_path / "run/report/index.html").as_uri())
    found = axe.run(page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()


@in_browser
def test_several_runs_are_compared(browser, tmp_path):
    for name in ("one", "two"):
        make_run(tmp_path / name, tmp_path / "images", n=20)
    for path in (tmp_path / "two").glob("Eval_PL_*VQA.json"):
        path.unlink()
    fake.evaluation(tmp_path / "two", "PL_big_small_textVQA", "textVQA", [1] * 60)
    done = python("report.py", tmp_path, "--image-root", tmp_path / "images")
    assert done.returncode == 0 and "2 pairs of models and datasets" in done.stdout
    with page_of(browser, tmp_path / "report/index.html") as page:
        assert "+66.7" in page.text_content("#compare") and page.locator("#compare details").count() == 1
        page.click("text=two: textVQA")
        assert page.text_content("#count") == "20 of 20 shown"
        page.click("text=all runs")
        assert page.locator("tbody a").count() == 2
    done = python("report.py", tmp_path, "--image-root", tmp_path / "images", "--single-file")
    assert done.returncode == 0, done.stderr
    with page_of(browser, tmp_path / "report.html") as page:
        page.select_option("#cell", "1")
        assert "two: textVQA" in page.text_content("#overview [data-cell='1'] h3")
        assert page.is_hidden("#overview [data-cell='0']")


def test_a_broken_cell_costs_only_itself_and_the_page_of_a_removed_run_goes(tmp_path):
    for name in ("one", "two", "three"):
        make_run(tmp_path / name, tmp_path / "images", n=60)
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
    make_run(tmp_path / "run", tmp_path / "images", n=30)
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
    make_run(tmp_path / "run", tmp_path / "images", n=30)
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
    make_run(tmp_path / "run", tmp_path / "images", n=130)
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
    make_run(tmp_path / "run", tmp_path / "images", n=30)
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
        make_run(tmp_path / name, tmp_path / "images", n=12)
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


@in_browser
def test_the_search_finds_no_folders_and_a_file_by_its_name(browser, tmp_path):
    images = tmp_path / "train/images"
    make_run(tmp_path / "run", images, n=30)
    for file in (tmp_path / "run").glob("P*_*.json"):
        if not file.name.endswith(".meta.json"):
            text = file.read_text()
            for i in range(30):
                text = text.replace(f"{images}/{i}.png", f"{images}/COCO_train_{i}.png")
            file.write_text(text)
    for i in range(30):
        if (images / f"{i}.png").exists():
            (images / f"{i}.png").rename(images / f"COCO_train_{i}.png")
    assert python("report.py", tmp_path / "run", "--image-root", images).returncode == 0
    with page_of(browser, tmp_path / "run/report/index.html") as page:
        found = {}
        for word in ("train", "images", "png", "COCO_train_7.png", "coco_train_7", "thing 7", "7"):
            page.fill("#search", word)
            found[word] = page.locator("#cards li").count()
        assert found == {
            "train": 0,
            "images": 0,
            "png": 0,
            "COCO_train_7.png": 1,
            "coco_train_7": 1,
            "thing 7": 1,
            "7": 3,
        }
        page.fill("#search", "")
        alts = page.evaluate("[...document.querySelectorAll('#cards img')].map(image => image.alt)")
        assert alts and not [alt for alt in alts if "/" in alt]


def test_train_sets_of_one_cell_are_compared_with_mpa(tmp_path):
    make_run(tmp_path, tmp_path / "images", n=12)
    fake.evaluation(tmp_path, "PL_big_small_textVQA_human", "textVQA", [1] * 60)
    (pair,) = compared([CellContent(tmp_path, answered_runs.CELL)])
    assert pair["first"].endswith(", human") and not pair["second"].endswith(", human")
    assert pair["change"]["n"] == 60 and len(pair["flips"]) == 40  # MPA is right on every third
    assert {flip.kind for flip in pair["flips"]} == {"broken"}


def test_losses_duplicates_and_the_trainers_log(tmp_path):
    make_run(tmp_path / "run", tmp_path / "images")
    cell = CellContent(tmp_path / "run", answered_runs.CELL)
    assert cell.funnel()[-1] == ("parity set", 44)
    assert cell.losses() == [("L-VLM disagrees with itself", 43), ("S-VLM right", 43)]
    assert cell.repeats() == [("D_PA", [130, 130, 130, 130]), ("parity set", [44, 44, 44, 44])]
    assert ("lr vision at step 11", "2e-06") in cell.training_facts()
    assert ("samples per second at step 11", "9.5") in cell.training_facts()
    drawn = figures.training(cell.history())
    assert all(f"<!-- {text} -->" in drawn for text in ("language", "vision", "samples per second", "gradient norm"))


def test_repeated_samples_are_counted(tmp_path):
    samples = [sample(0, image="/a.png"), sample(0, image="/a.png"), sample(0, annotation="other", image="/b.png")]
    answered_runs.write(tmp_path, [s | {"id": i} for i, s in enumerate(samples)])
    assert CellContent(tmp_path, answered_runs.CELL).repeats()[1] == ("parity set", [3, 1, 2, 2])


def test_time_and_cost_by_stage(tmp_path):
    make_run(tmp_path, tmp_path / "images", n=3)
    fake.write(tmp_path / "spending.json", {"spent": {"PA big": {"cost": 1.5}, "broken": None}, "reserved": {}})
    table = stages_table(CellContent(tmp_path, answered_runs.CELL))
    assert table["lines"] == [["evaluate", "2 s", ""], ["PA big", "", "1.50"]]


def test_an_unfinished_run_says_what_is_not_there(tmp_path):
    make_run(tmp_path / "run", tmp_path / "images", n=10, evaluated=False)
    done = python("report.py", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run/report/index.html").read_text()
    assert "This run is not finished. Not there yet: PL_big_small_textVQA/, Eval_small_textVQA.json" in text
    assert "No evaluation yet." in text and "Not trained yet." in text


def test_only_images_of_the_run_are_embedded(tmp_path, monkeypatch):
    make_run(tmp_path / "run", tmp_path / "images", n=6)
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


def test_a_real_run_and_the_terminal(easy_run, tmp_path):
    run = tmp_path / "easy"
    shutil.copytree(easy_run, run)
    done = python("report.py", run)
    assert done.returncode == 0, done.stderr
    data = json.loads(re.search(r'id="data">(.*?)</script>', (run / "report/index.html").read_text(), re.DOTALL)[1])
    assert all("src" in image for image in data["images"]) and len(data["cells"][0]["samples"]) == 40 + 48
    shown = python("show.py", run, "-n", "2", "--rejected")
    assert shown.returncode == 0 and shown.stdout.count("verdict") == 2
    missing = python("show.py", run, "--fixed")
    assert missing.returncode == 1 and "Run evaluate.sh first" in missing.stderr


def test_the_terminal_shows_no_control_characters(tmp_path):
    texts = ["\x1b[31mred\x1b]0;title\x07", "[bold]markup[/bold]", "nul \0"]
    make_run(tmp_path / "run", tmp_path / "images", texts, n=3)
    done = python("show.py", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "[bold]markup[/bold]" in done.stdout
    broken = python("show.py", tmp_path / "run", "--broken", "-n", "1")
    assert broken.returncode == 0 and "change" in broken.stdout
