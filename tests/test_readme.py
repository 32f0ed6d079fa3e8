"""The files, flags and links that the READMEs mention exist."""

import re
import subprocess

import params
import pytest
from conftest import ROOT, python

READMES = subprocess.run(
    ["git", "-C", ROOT, "ls-files", "*.md"], capture_output=True, text=True, check=True
).stdout.split()


@pytest.mark.parametrize("readme", READMES)
def test_every_link_leads_somewhere(readme):
    text = (ROOT / readme).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not leads_somewhere(ROOT / readme, *link.partition("#")[::2])] == []


def leads_somewhere(readme, link: str, heading: str) -> bool:
    """Does the file exist, and have this heading, as GitHub names it?"""
    file = readme.parent / link if link else readme
    if not heading or not file.exists():
        return file.exists()
    titles = re.findall(r"^#+ (.+)", file.read_text(), re.M)
    return heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("readme", READMES)
def test_every_command_names_a_file_that_exists(readme):
    commands = re.findall(r"(?:bash|python) ((?:[\w.-]+/)*[\w.-]+\.(?:sh|py))", (ROOT / readme).read_text())
    assert [command for command in commands if not (ROOT / command).exists()] == []


@pytest.mark.parametrize("readme", READMES)
def test_every_path_exists(readme):
    """Files of the repository, such as `mpa/method/presets.py`; not files of a run or a download."""
    text = re.sub(r"```diff.*?```", "", (ROOT / readme).read_text(), flags=re.S)
    found = re.findall(r"`((?:mpa|scripts|data|PL|tests|benchmarks|docs)/[\w./-]+\.(?:py|sh|md|json))`", text)
    folders = (ROOT, (ROOT / readme).parent)
    assert [path for path in found if not any((folder / path).exists() for folder in folders)] == []


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert [cell for line in lines if line.startswith("|") for cell in line.split("|") if len(cell) > 120] == []


def test_every_flag_and_variable_in_the_readme_is_known():
    text = (ROOT / "README.md").read_text()
    helps = "".join(python(name, "--help-all").stdout for name in ("PA.py", "PI.py", "evaluate.py"))
    helps += "".join(f"--{field}" for kind in params.KINDS for field in kind.__dataclass_fields__)
    assert {flag for flag in re.findall(r"`(--[\w-]+)", text) if flag not in helps} - {"--help", "--help-all"} == set()
    scripts = "".join(
        p.read_text() for p in [*ROOT.glob("scripts/*.sh"), *ROOT.glob("PL/*/scripts/*.sh"), *ROOT.glob("mpa/**/*.py")]
    )
    ours = set(re.findall(r"\b([A-Z_]{2,})=", text)) - {"RAY_AUTH_MODE"}  # Ray's own
    assert {name for name in ours if name not in scripts} == set()


def test_the_working_tree_stays_small_and_the_pair_smaller():
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    sizes = {f: (ROOT / f).stat().st_size for f in tracked if (ROOT / f).exists()}
    assert sum(sizes.values()) < 50e6
    assert sum(size for f, size in sizes.items() if f.startswith("data/mini/") and f.endswith(".safetensors")) < 20e6
