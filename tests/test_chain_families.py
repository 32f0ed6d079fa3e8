"""The four stages with models of other families than the embedded pair's."""

from functools import partial

import miniatures
import originals
import pytest
from conftest import TEACHER, bash
from easy_run import read

MINI = {"MIN_PIXELS": 3136, "MAX_PIXELS": 3136, "DTYPE": "float32", "BATCH_SIZE": 16}


@pytest.mark.slow
@pytest.mark.parametrize("make", [originals.internvl, originals.tinyllava, partial(miniatures.make, "smolvlm")])
def test_other_families_go_through_all_stages(make, tmp_path):
    """The weights are random: nothing is learnt, everything runs. Two of the three are original checkpoints."""
    small = make(tmp_path / "small")
    settings = {"DATASET": "easyVQA", "LVLM": TEACHER, "SVLM": small, "RUN": f"{tmp_path}/run", "LIMIT": 24}
    settings |= {"MPA_CACHE": tmp_path / "cache", "ACCUMULATION": 1, "EVALUATE_FLAGS": "--limit 12"}
    done = bash("scripts/mpa.sh", **settings, **MINI)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    assert len(read(run / "PI_teacher_train_teacher_small_easyVQA.json")) > 5
    assert len(read(run / "Eval_PL_teacher_small_easyVQA_easyVQA.json")) == 12
    levelled = run / "PL_teacher_small_easyVQA"
    assert "Fine-tuned from `small`" in (levelled / "README.md").read_text()
    converted = read(levelled / "train_meta.json").get("converted_from")
    assert converted == (None if "smolvlm" in str(make) else str(small))
