"""What the READMEs say is there, is there."""

import re
import subprocess
from pathlib import Path

import params
import pytest
from conftest import ROOT, script

READMES = ["README.md", "PL/Qwen2-VL-Finetune/FORK.md", "data/README.md", "data/mini/README.md", "results/README.md"]


@pytest.mark.parametrize("readme", READMES)
def test_every_link_leads_somewhere(readme):
    text = (ROOT / readme).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / readme).parent / link).exists()] == []


@pytest.mark.parametrize("readme", READMES)
def test_every_command_names_a_file_that_exists(readme):
    commands = re.findall(r"(?:bash|python) ((?:[\w.-]+/)*[\w.-]+\.(?:sh|py))", (ROOT / readme).read_text())
    assert [command for command in commands if not (ROOT / command).exists()] == []


def test_the_tree_in_the_readme_is_the_tree():
    """Every file it names exists, and every source file is named."""
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"## The tree\n\n```\n(.*?)```", text, re.S).group(1)
    named = set(re.findall(r"[\w.-]+\.(?:py|sh|json|md|txt|toml)", tree))
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    here = {Path(f).name for f in tracked}
    assert named - here == set()
    sources = [f for f in tracked if f.startswith(("scripts/", "mpa/", "PL/", "benchmarks/"))]
    assert {Path(f).name for f in sources} - named == {"__init__.py"}


def test_every_flag_and_variable_in_the_readme_is_known():
    text = (ROOT / "README.md").read_text()
    helps = "".join(script(name, "--help").stdout for name in ("PA.py", "PI.py", "evaluate.py"))
    helps += "".join(f"--{field}" for kind in params.KINDS for field in kind.__dataclass_fields__)
    assert {flag for flag in re.findall(r"`(--[\w-]+)", text) if flag not in helps} - {"--help"} == set()
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
