"""The table of families: one for stages and trainer, and what it says is so."""

import subprocess
import sys

import miniatures
import pytest
from conftest import ROOT

from mpa.models import families


def test_every_family_of_the_table_has_a_miniature_and_so_its_tests():
    assert set(miniatures.MODEL_TYPES) == set(families.FAMILIES)


def test_the_table_is_printed_without_torch():
    watch = (
        "import runpy, sys; sys.argv[1:] = ['--families']\n"
        "try: runpy.run_module('mpa.models', run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", watch], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Families tested with transformers 5.")
    assert {line.split()[0] for line in lines[2:-1]} == set(families.FAMILIES)
    assert len({line.index("pixels") for line in lines if line.startswith("qwen")}) == 1


@pytest.mark.parametrize(
    ("kind", "limits", "says"),
    [
        ("qwen2_vl", (1, 2, None), ""),
        ("qwen2_vl", (1, 2, 6), "--max-tiles has no effect for qwen2_vl: the area of its images is limited."),
        ("smolvlm", (families.MIN_PIXELS, families.MAX_PIXELS, 4), ""),
        ("smolvlm", (families.MIN_PIXELS, 9, 4), "--max-pixels has no effect for smolvlm"),
        ("llava", (1, 9, 4), "--min-pixels and --max-pixels and --max-tiles have no effect for llava: each image has"),
        ("unheard_of", (1, 2, 3), ""),
    ],
)
def test_a_limit_without_effect_is_said(kind, limits, says):
    said = families.said_of_limits(kind, *limits)
    assert said.startswith(says) and bool(said) == bool(says)
