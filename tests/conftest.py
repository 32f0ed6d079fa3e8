import contextlib
import io
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_server import Handler
from killed_stage import die_at
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
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each process of the tests; read when torch is imported


def close(got, expected, rel: float = 1e-4, least: float = 0.0) -> bool:
    """Whether two ways to compute numbers, lists or tensors agree to `rel` of the largest expected value, or of `least`.

    An absolute tolerance in float32 holds on one CPU and fails on another, whose sums have another order.
    """
    import torch

    got, expected = (torch.as_tensor(value).detach().double() for value in (got, expected))
    assert got.shape == expected.shape
    return bool((got - expected).abs().max() <= rel * max(expected.abs().max().item(), least))


def bash(name: str, *args, **environment) -> subprocess.CompletedProcess:
    """Run a bash script to its end, as a user does."""
    return subprocess.run(
        ["bash", ROOT / name, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
        timeout=600,
    )


def python(name: str, *args) -> subprocess.CompletedProcess:
    """Run scripts/<name> as `python scripts/<name>` does, but in this process, which has torch loaded."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    argv, sys.argv = sys.argv, [name, *map(str, args)]
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # left by a training in this process: a launcher's mark
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
        if isinstance(code, str):
            print(code, file=err)
            code = 1
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = [(stream.flush(), stream.buffer.getvalue().decode())[1] for stream in (out, err)]
    return subprocess.CompletedProcess([name, *args], code, *said)


def killed(name: str, *args, replies: int) -> None:
    """Run scripts/<name> in a fork of this process that is killed once its journal holds so many replies.

    Returns when its workers have died of it, too: each holds the end of a pipe.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        die_at(replies)
        try:
            python(name, *args)
        finally:
            os._exit(0)
    os.close(write_end)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def snapshot(folder) -> dict:
    """All files and folders, with their content; without the log, in which refused calls are told too."""
    paths = (path for path in sorted(folder.rglob("*")) if path.name != "log.txt")
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in paths}


@contextlib.contextmanager
def at_most(size: int):
    """Within this block no file may grow beyond `size` bytes, as with `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


@pytest.fixture(scope="session")
def easy_run(tmp_path_factory) -> Path:
    """The folder of a run of `easy_run.STAGES` that nothing interrupted: not to be changed."""
    from easy_run import STAGES

    folder = tmp_path_factory.mktemp("easy_run")
    for name, command in STAGES.items():
        done = python(*command, "--run", f"{folder}/")
        assert done.returncode == 0, f"{name}: {done.stderr}"
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> dict[str, Path]:
    """{dataset: data folder}, each prepared from its miniature download."""
    from downloads import LAYOUTS, prepare

    folders = {}
    for name, layout in LAYOUTS.items():
        source = tmp_path_factory.mktemp(f"{name}-download")
        layout(source)
        folders[name] = tmp_path_factory.mktemp(f"{name}-data")
        prepare.main([name, "--source", str(source), "--data", str(folders[name])])
    return folders


@pytest.fixture
def copied_images(tmp_path) -> Path:
    """30 drawings; the last six are copies of one image under other names."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(24):
        Image.new("RGB", (32 + i, 32), (i * 9, 99, 200 - i)).save(root / f"{i:02}.png")
    for i in range(24, 30):
        shutil.copy(root / "07.png", root / f"copy{i}.png")
    return root


@pytest.fixture
def serve(monkeypatch):
    """`serve(rule, pause)` -> the running server; its `url`."""
    started = []
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def start(rule, pause=0.0):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # a client that was killed
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


@pytest.fixture
def select(easy_run, tmp_path):
    """PI from the existing answers of `easy_run`, in a run folder of its own with links to its files."""
    for file in Path(easy_run).glob("P*"):
        (tmp_path / file.name).symlink_to(file)

    def select(*more) -> Path:
        answers = ["--lvlm-json", tmp_path / "PI_teacher_teacher_easyVQA.json"]
        answers += ["--svlm-json", tmp_path / "PI_teacher_student_easyVQA.json"]
        models = ["--model-path-lvlm", TEACHER, "--model-path-svlm", STUDENT]
        import PI

        return PI.main([*map(str, [*answers, *models, *MINI, "--run", f"{tmp_path}/", *more])])

    return select
