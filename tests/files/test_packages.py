"""Packages that only some commands need: the error names the command that installs them."""

from pathlib import Path

import pytest
import rate
from conftest import ROOT

from mpa.engines import ENGINES, open_engine
from mpa.files import packages
from mpa.files.records import InputError
from mpa.runs import exports


@pytest.mark.parametrize("name", ["openai", "ray"])
def test_an_engine_whose_package_is_missing_names_the_command(monkeypatch, name):
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=f"--engine {name} needs {name}. Install with: bash scripts/setup.sh {name}"):
        open_engine(name, model_path="m")


def test_an_export_whose_package_is_missing_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "datasets" else name)
    with pytest.raises(
        InputError, match=r"--to hf and trl needs datasets\. Install with: bash scripts/setup.sh export"
    ):
        exports.write_folder(tmp_path, [], exports.trl, str)


def test_the_rating_page_whose_package_is_missing_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs fastapi, uvicorn\. Install with: bash scripts/setup.sh rating"):
        rate.main([str(tmp_path)])


def test_each_group_has_a_file_that_lists_what_is_asked_for():
    groups = [
        ("export", "datasets", "pyarrow"),
        ("rating", "fastapi", "uvicorn"),
        *(engine.packages for engine in ENGINES.values() if engine.packages),
    ]
    for group, *names in groups:
        listed = Path(ROOT, f"requirements/{group}.txt").read_text()
        assert [name for name in names if f"\n{name}" not in listed] == []
