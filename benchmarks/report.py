"""The report of 10,000 samples: time to build, size, first paint and filter in a browser.

    python benchmarks/report.py                    # needs Chromium and requirements/dev.txt

Draws 10,000 different images with noise, writes the result files of a run, and builds its report as a folder and as one file.
Prints, as its last line, a JSON object of the figures. First paint: the browser's own entry. Filter: from the input event to
the next frame, the median over 20 searches and choices.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/analysis")]

import answered_runs  # noqa: E402
from answered_runs import sample, word  # noqa: E402
from test_report_page import BROWSER, FLAGS  # noqa: E402

N = 10_000
FILTER = """([id, value]) => new Promise((done) => {
  const field = document.getElementById(id), started = performance.now();
  field.value = value;
  field.dispatchEvent(new Event(id === "search" ? "input" : "change"));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - started)));
})"""
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def make_run(folder: Path, images: Path) -> None:
    images.mkdir()
    noise, samples = np.random.default_rng(0), []
    for i in tqdm(range(N), desc="images", disable=None):
        path = images / f"{i}.jpg"
        coarse = noise.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(path, quality=85)
        more = ({}, {"svlm": word(i)}, {"lvlm": "else", "svlm": None})[i % 3]
        samples.append(sample(i, image=str(path), **more))
    answered_runs.write(folder, samples)


def build(folder: Path, images: Path, *flags) -> float:
    started = time.time()
    command = [sys.executable, ROOT / "scripts/report.py", folder, "--image-root", images, *flags]
    subprocess.run(list(map(str, command)), check=True)
    return round(time.time() - started, 1)


def browse(path: Path) -> dict:
    from playwright.sync_api import sync_playwright

    rng = random.Random(0)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        started = time.time()
        page.goto(path.as_uri())
        loaded = 1000 * (time.time() - started)
        page.wait_for_function(f"{PAINT} !== undefined")
        paint = page.evaluate(PAINT)
        tries = [["search", f"thing {rng.randrange(100)}"] for _ in range(10)]
        tries += [["verdict", rng.choice(["parity", "both right", ""])] for _ in range(10)]
        times = sorted(page.evaluate(FILTER, one) for one in tries)
        browser.close()
    return {
        "first paint, ms": round(paint),
        "loaded, ms": round(loaded),
        "filter, ms": round(times[10]),
        "worst": round(times[-1]),
    }


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        make_run(folder / "run", folder / "images")
        figures = {"samples": N, "folder with thumbnails, s": build(folder / "run", folder / "images")}
        figures["folder, thumbnails there, s"] = build(folder / "run", folder / "images")
        shutil.copytree(folder / "run/report/thumbnails", folder / "run/.thumbnails")
        figures["single file, s"] = build(folder / "run", folder / "images", "--single-file")
        pages = {"folder": folder / "run/report/index.html", "single file": folder / "run/report.html"}
        for name, path in pages.items():
            figures[name] = {"MB": round(path.stat().st_size / 1e6, 1)} | (browse(path) if BROWSER else {})
    finally:
        shutil.rmtree(folder)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
