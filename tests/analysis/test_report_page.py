"""The report's page in a real browser: filters, links, keyboard, narrow and dark screens, no JavaScript, hostile text, accessibility."""

import contextlib
import io
import re
import shutil

import answered_runs
import pytest
import synthetic_runs as fake
from conftest import python
from PIL import Image

from mpa.runs.layout import Cell

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed: apt-get install chromium")
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


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@contextlib.contextmanager
def page_of(browser, path, fragment="", width=1440, **settings):
    """The page in a fresh window. Fails if the console has an error, or a request leaves the page's folder."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
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
    answered_runs.whole(folder / "run", folder / "images")
    done = python("report.py", folder / "run", "--image-root", folder / "images")
    assert done.returncode == 0, done.stderr
    return folder / "run/report/index.html"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A folder with the pages of two runs that have long names, a baseline each and 1,200 test questions."""
    folder = tmp_path_factory.mktemp("paper")
    for name, k in (("a_long_name_of_one_run_seed0", 3), ("a_long_name_of_one_run_seed1", 1)):
        answered_runs.whole(folder / name, folder / "images", n=20, questions=1200)
        fake.evaluation(folder / name, "PL_big_small_textVQA", "textVQA", [int(i % k == 0) for i in range(1200)])
        fake.evaluation(folder / name, "PL_big_small_textVQA_human", "textVQA", [1] * 1200)
    for flags in ([], ["--single-file"]):
        done = python("report.py", folder, "--image-root", folder / "images", *flags)
        assert done.returncode == 0 and "2 pairs of models and datasets" in done.stdout, done.stderr
    return folder


def shown(page) -> int:
    return int(re.match(r"([\d,]+) of", page.text_content("#count"))[1].replace(",", ""))


def test_filters_give_the_right_counts(browser, report):
    with page_of(browser, report) as page:
        assert page.text_content("#count") == "130 of 130 shown" and page.locator("#cards li").count() == 60
        page.select_option("#verdict", "parity")
        assert shown(page) == 44
        page.select_option("#verdict", "L-VLM disagrees")
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


def test_images_are_shown_and_what_is_missing_says_why(browser, report):
    with page_of(browser, report) as page:
        page.locator("#cards img").first.wait_for()
        assert page.evaluate("document.querySelector('#cards img').decode().then(() => true)")
        assert page.evaluate("document.querySelector('#cards img').naturalWidth") == 40
        assert page.locator("#cards .none").first.text_content().startswith("No image: no such file (")
        assert page.locator("#cards .none").count() == 2 and page.locator("figure img").count() == 5
        widths = page.evaluate("[...document.querySelectorAll('figure img')].map(i => i.naturalWidth)")
        assert min(widths) > 100


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


@pytest.mark.parametrize("single_file", [False, True])
def test_hostile_text_is_shown_as_text(browser, tmp_path, single_file):
    cell = Cell("textVQA", "big<img src=x onerror=window.hacked=1>", 'small"><script>1')
    answered_runs.whole(tmp_path / "run<b>", tmp_path / "im'ages\"", HOSTILE, cell)
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


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1440, "dark")])
def test_accessibility_and_width(browser, experiment, tmp_path, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    answered_runs.whole(tmp_path / "run", tmp_path / "images", HOSTILE)
    done = python("report.py", tmp_path / "run", "--image-root", tmp_path / "images")
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "run/report/index.html", experiment / "report/index.html"):
        with page_of(browser, path, width=width, color_scheme=scheme, bypass_csp=True) as page:
            found = axe.run(page).response["violations"]
            assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_several_runs_are_compared(browser, experiment):
    with page_of(browser, experiment / "report/index.html") as page:
        assert "+66.7" in page.text_content("#compare") and page.locator("#compare details").count() == 2
        page.click("tbody a >> nth=1")
        assert page.text_content("#count") == "20 of 20 shown"
        page.click("text=all runs")
        assert page.locator("tbody a").count() == 2
    with page_of(browser, experiment / "report.html") as page:
        assert page.is_hidden("#overview [data-cell='1']")
        page.select_option("#cell", "1")
        assert "seed1: textVQA" in page.text_content("#overview [data-cell='1'] h3")
        assert page.is_hidden("#overview [data-cell='0']")


def test_a_telephone_shows_who_is_compared_and_the_interval(browser, experiment):
    with page_of(browser, experiment / "report/index.html", width=375) as page:
        rows = page.locator("#compare > .wide tbody tr").all()
        pairs = [row.locator("th, td").all_inner_texts()[:2] for row in rows]
        assert ["human labels, all", "MPA"] in pairs and not [pair for pair in pairs if pair[0] == pair[1]]
        assert max(len(name) for pair in pairs for name in pair) < 40  # only what differs
        for row in (*rows, *page.locator("[aria-label=Results] tbody tr").all()):
            interval = row.locator("td bdi", has_text="to").bounding_box()
            assert interval["x"] + interval["width"] <= 375 and interval["height"] < 60  # two lines
    with page_of(browser, experiment / "report.html", width=375) as page:
        box = page.locator("#overview [data-cell='0'] [aria-label='Results: accuracy'] table").bounding_box()
        assert box["x"] + box["width"] <= 375  # the whole table


def test_numbers_have_one_format_and_stand_on_the_right(browser, experiment):
    align = "cells => cells.filter(c => /^[+-]?[0-9]/.test(c.innerText)).map(c => getComputedStyle(c).textAlign)"
    with page_of(browser, experiment / "report.html") as page:
        page.select_option("#source", "test")
        texts = page.locator("#overview td, #parity td, #training dd, #compare td, #filters option, #diagnosis p")
        texts = " ".join(texts.all_text_contents())
        assert "still wrong (400)" in texts and "what (1,200)" in texts and not re.findall(r"\d{4,}", texts)
        assert set(page.locator("td").evaluate_all(align)) == {"right"}
        assert "`" not in page.inner_text("main")


@pytest.mark.parametrize(("scheme", "expected"), [("light", (255, 255, 255)), ("dark", (22, 22, 22))])
def test_the_charts_have_the_colour_of_the_page(browser, report, scheme, expected):
    with page_of(browser, report, color_scheme=scheme) as page:
        for chart in page.locator("figure img").all():
            corner = Image.open(io.BytesIO(chart.screenshot())).convert("RGB").getpixel((8, 8))
            assert max(abs(a - b) for a, b in zip(corner, expected, strict=True)) <= 2


def test_without_javascript_nothing_is_hidden_and_no_control_is_dead(browser, experiment):
    with page_of(browser, experiment / "report.html", java_script_enabled=False) as page:
        controls = page.locator("button, select, input, label")
        assert controls.count() > 10 and not [one for one in controls.all() if one.is_visible()]
        assert page.is_visible("noscript p")
        for cell in ("0", "1"):
            for part in page.locator(f"[data-cell='{cell}']").all():
                assert part.is_visible()


def test_the_search_finds_no_folders_and_a_file_by_its_name(browser, tmp_path):
    images = tmp_path / "train/images"
    answered_runs.whole(tmp_path / "run", images, n=30, name="COCO_train_{}.png")
    assert python("report.py", tmp_path / "run", "--image-root", images).returncode == 0
    expected = {"train": 0, "images": 0, "png": 0, "COCO_train_7.png": 1, "coco_train_7": 1, "thing 7": 1, "7": 3}
    with page_of(browser, tmp_path / "run/report/index.html") as page:
        for word, count in expected.items():
            page.fill("#search", word)
            assert page.locator("#cards li").count() == count, word
        page.fill("#search", "")
        alts = page.evaluate("[...document.querySelectorAll('#cards img')].map(image => image.alt)")
        assert alts and not [alt for alt in alts if "/" in alt]
