"""Do the tests notice a line that is gone? Random one-line deletions, each in a copy of the repository.

    python benchmarks/mutants.py                                       # 40 lines of mpa/method, mpa/answers and mpa/runs
    python benchmarks/mutants.py --n 10 --seed 3 mpa/method/verdict.py

A line is a statement of one line that is no import, docstring or definition. The default tests run until one fails: first those
of files that import the module or have its name, then those that import what imports it, then all others. What fails is run again
without the deletion: a test that fails there too ends the run, for it notices nothing.
"""

import argparse
import ast
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ROOMS = ("mpa/method", "mpa/answers", "mpa/runs")
KEPT_OUT = (".venv*", "results", "__pycache__", ".pytest_cache", ".ruff_cache")


def lines_of(file: Path) -> list[int]:
    """The numbers of the lines that can be deleted."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    left = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Pass)
    texts = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not isinstance(node, left)]
    return [node.lineno for node in statements if node.lineno == node.end_lineno and id(node) not in texts]


def without(file: Path, number: int) -> str:
    """The file's text with `pass` instead of this line."""
    lines = file.read_text(encoding="utf-8").split("\n")
    text = lines[number - 1]
    lines[number - 1] = text[: len(text) - len(text.lstrip())] + "pass"
    return "\n".join(lines)


def imported(file: Path) -> set[str]:
    """The modules that a file imports, with their packages' names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def module_name(file: Path) -> str:
    """As it is imported: `mpa.method.rules` for mpa/method/rules/__init__.py."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def waves(module: str) -> list[list[str]]:
    """The test files in the order in which they run: by how near they are to the module."""
    scripts = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}
    modules = {module_name(path): path for path in (ROOT / "mpa").rglob("*.py")}
    helpers = {p.stem: p for p in (ROOT / "tests").rglob("*.py") if not p.stem.startswith("test_")}
    imports = {name: imported(path) for name, path in (modules | scripts | helpers).items()}
    tests = {path: imported(path) for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    near, found, left, own = {module}, [], dict(tests), f"test_{module.rpartition('.')[2]}"
    for _ in range(3):
        wave = [path for path, of in left.items() if of & near or path.stem == own]
        found.append([str(path.relative_to(ROOT)) for path in wave])
        left = {path: of for path, of in left.items() if path not in wave}
        near |= {name for name, of in imports.items() if of & near}
    return [*found, [str(path.relative_to(ROOT)) for path in left]]


def fails(copy: Path, tests: list[str], seconds: float, *flags: str) -> str:
    """How these default tests fail in a copy; "" if they pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", *flags, *tests]
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"no end in {seconds:.0f} s"
    return "" if done.returncode in (0, 5) else done.stdout[-2000:]  # 5: none of these is a default test


def noticed(copy: Path, name: Path, number: int, seconds: float) -> str:
    """The wave whose tests fail without the line, as text; "" if all pass. Raises SystemExit if they fail with it, too."""
    for place, wave in enumerate(waves(module_name(ROOT / name)), 1):
        (copy / name).write_text(without(ROOT / name, number), encoding="utf-8")
        failing = wave and fails(copy, wave, seconds, "--cache-clear")
        shutil.copyfile(ROOT / name, copy / name)
        if failing:
            if said := fails(copy, wave, seconds, "--last-failed"):
                sys.exit(f"The tests fail without a deletion, too; mend them first, or raise --timeout:\n{said}")
            return f"wave {place}"
    return ""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "places", nargs="*", default=ROOMS, help="files and folders to delete lines of (default: the three rooms)"
    )
    p.add_argument("--n", type=int, default=40, help="lines (default: 40)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--timeout", type=float, default=900, help="seconds for the tests of one wave (default: 900)")
    args = p.parse_args()
    files = [
        f
        for place in args.places
        for f in ([ROOT / place] if (ROOT / place).is_file() else sorted((ROOT / place).rglob("*.py")))
    ]
    candidates = [(file, number) for file in files for number in lines_of(file)]
    missed, started = [], time.perf_counter()
    chosen = random.Random(args.seed).sample(candidates, min(args.n, len(candidates)))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*KEPT_OUT), symlinks=True)
        (copy / ".venv").symlink_to((ROOT / ".venv").resolve())
        for place, (file, number) in enumerate(chosen, 1):
            name = file.relative_to(ROOT)
            wave = noticed(copy, name, number, args.timeout)
            line = file.read_text(encoding="utf-8").split("\n")[number - 1].strip()
            missed += [] if wave else [f"{name}:{number}: {line}"]
            print(f"{place}/{len(chosen)} {name}:{number}: {wave or 'NOT NOTICED'}: {line[:100]}", flush=True)
    seconds = round(time.perf_counter() - started)
    print(
        json.dumps({"lines": len(chosen), "noticed": len(chosen) - len(missed), "missed": missed, "seconds": seconds})
    )


if __name__ == "__main__":
    main()
