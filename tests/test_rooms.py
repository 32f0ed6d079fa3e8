"""The rooms of `mpa/`: imports point down the list only, and there is no circle."""

import ast
from functools import cache
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

ROOMS = ["files", "answers", "models", "data", "method", "engines", "runs", "stages", "analysis"]
OF_TRAINER = {"files", "models", "answers"}


def imported(path) -> set[str]:
    """The modules of `mpa` that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mpa":
            for name in (alias.name for alias in node.names):
                module = f"{node.module}.{name}"
                place = ROOT / module.replace(".", "/")
                found.add(module if place.is_dir() or place.with_suffix(".py").exists() else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "mpa"}
    return found


@cache
def modules() -> dict[str, set[str]]:
    files = (ROOT / "mpa").rglob("*.py")
    name_of = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    return {name: imported(path) - {name} for path, name in name_of.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_is_in_a_room():
    assert {room(name) for name in modules() if "." in name} == set(ROOMS)
    assert sorted(path.name for path in (ROOT / "mpa").glob("*.py")) == ["__init__.py"]


@pytest.mark.parametrize("name", [name for name in sorted(modules()) if "." in name])
def test_imports_point_down(name):
    assert [to for to in modules()[name] if ROOMS.index(room(to)) > ROOMS.index(room(name))] == []


def test_no_circle():
    TopologicalSorter(modules()).prepare()


def test_a_room_says_what_belongs_in_it():
    for name in ROOMS:
        assert ast.get_docstring(ast.parse((ROOT / "mpa" / name / "__init__.py").read_text(encoding="utf-8")))


def test_the_trainer_imports_only_what_knows_models_files_and_answers():
    for path in (ROOT / "PL/Qwen2-VL-Finetune/src").glob("*.py"):
        assert {room(module) for module in imported(path)} <= OF_TRAINER, path.name


def test_the_experiments_use_no_analysis():
    for path in (ROOT / "experiments").glob("*.py"):
        assert "analysis" not in {room(module) for module in imported(path)}, path.name
