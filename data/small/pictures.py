"""Make data/small/pictures/: the small suite's objects in three art styles, from icon sets on npm.

    pip install resvg-py==0.5.0
    python data/small/pictures.py

Noto Emoji (Google, Apache 2.0), Twemoji (Twitter, CC BY 4.0) and Fluent Emoji (Microsoft, MIT), as SVG in Iconify's packages.
The archives' digests are those of the npm registry. The PNG files are in the repository, so that the suite needs no network.
"""

import base64
import hashlib
import io
import json
import sys
import tarfile
import urllib.request
from pathlib import Path

import resvg_py
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from facts import OBJECTS  # noqa: E402

SIZE = 80  # pixels
STYLES = {
    "noto": ("1.2.9", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
    "twemoji": ("1.2.5", "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
    "fluent-emoji-flat": (
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
}


def icons(style: str) -> dict:
    """The icon set of a style. Raises SystemExit if the archive has another digest."""
    version, digest = STYLES[style]
    url = f"https://registry.npmjs.org/@iconify-json/{style}/-/{style}-{version}.tgz"
    with urllib.request.urlopen(url) as reply:
        archive = reply.read()
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != digest:
        sys.exit(f"{url}: its SHA-512 is {found}, not {digest}.")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        return json.load(files.extractfile("package/icons.json"))


def main() -> None:
    folder = HERE / "pictures"
    folder.mkdir(exist_ok=True)
    for style in STYLES:
        found = icons(style)
        width, height = found.get("width", 16), found.get("height", 16)
        for name, (icon, _) in OBJECTS.items():
            body = found["icons"][icon]["body"]
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
            image = Image.open(io.BytesIO(png)).convert("RGBA").quantize(64, method=Image.Quantize.FASTOCTREE)
            image.save(folder / f"{name}-{style}.png", optimize=True)
    print(f"Wrote {len(OBJECTS) * len(STYLES)} pictures to {folder}.")


if __name__ == "__main__":
    main()
