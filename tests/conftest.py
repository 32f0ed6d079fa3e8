import os
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_server import Handler
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
TEACHER, STUDENT = ROOT / "data/mini/teacher", ROOT / "data/mini/student"
MINI = ["--min-pixels", "3136", "--max-pixels", "3136", "--dtype", "float32"]

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "PL/Qwen2-VL-Finetune/src"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def script(name: str, *args, **environment) -> subprocess.CompletedProcess:
    """Run scripts/<name> (or any .sh) to completion, as a user does."""
    command = ["bash", ROOT / name] if name.endswith(".sh") else [sys.executable, ROOT / "scripts" / name]
    return subprocess.run(
        [*map(str, command), *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
        timeout=600,
    )


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder of 12 drawings of different sizes, some in a subfolder."""
    root = tmp_path_factory.mktemp("images")
    (root / "more").mkdir()
    colors = ["red", "blue", "teal", "black", "yellow", "gray"]
    for i in range(12):
        size = 64 + 16 * (i % 3)
        image = Image.new("RGB", (size, size), (240, 245, 250))
        box = (10, 12, 30 + i, 34 + i)
        pen = ImageDraw.Draw(image)
        (pen.ellipse if i % 2 else pen.rectangle)(box, fill=colors[i % 6])
        image.save(root / (f"more/{i:02}.png" if i % 4 == 0 else f"{i:02}.png"))
    return root


@pytest.fixture
def serve(monkeypatch):
    """`serve(rule, pause)` -> the running server; its `url`."""
    started = []
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def start(rule, pause=0.0):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.rule, server.pause, server.lock = rule, pause, threading.Lock()
        server.number, server.billed, server.bodies = 0, 0, []
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()
