"""Make docs/report.webp, the README's picture of the report, from the demo's run.

bash scripts/demo.sh && python docs/screenshot.py results/demo     # needs Chromium and requirements/dev.txt
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
VIEWS = ("#overview", "#gallery")  # beside each other


def main(run: Path) -> None:
    shots = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 1100}, color_scheme="light")
        page.goto((run / "report/index.html").resolve().as_uri())
        for view in VIEWS:
            page.evaluate("view => document.querySelector(view).scrollIntoView()", view)
            page.wait_for_timeout(1000)  # images load when they come into view
            shots.append(Image.open(io.BytesIO(page.screenshot())))
        browser.close()
    width, height = shots[0].size
    whole = Image.new("RGB", (width * len(shots) + 20 * (len(shots) - 1), height), "#cccccc")
    for i, shot in enumerate(shots):
        whole.paste(shot, (i * (width + 20), 0))
    whole.thumbnail((1400, 1400), Image.Resampling.LANCZOS)
    whole.save(HERE / "report.webp", quality=70, method=6)
    print(f"Wrote {HERE / 'report.webp'} ({(HERE / 'report.webp').stat().st_size / 1000:.0f} kB).")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
