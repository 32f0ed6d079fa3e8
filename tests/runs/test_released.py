"""From the authors' input files, the preset `released` produces the authors' output files."""

import json
import lzma
from types import SimpleNamespace

import pytest
from conftest import DATA, python
from linear import in_time

from mpa.files.records import read_records
from mpa.stages.annotations import usable_annotations

OFFICIAL = DATA / "official"
LVLM, SVLM = "Qwen2-VL-7B-Instruct", "Qwen2-VL-2B-Instruct"


@pytest.mark.parametrize("dataset", ["textVQA", "chartVQA"])
def test_the_released_parity_set_comes_out_to_the_record(tmp_path, dataset):
    out = tmp_path / "train.json"
    done = python(
        *("PI.py", "--preset", "released", "--dataset", dataset, "--out", out),
        *("--lvlm-json", OFFICIAL / f"PI_Qwen2vl7b_{LVLM}_{dataset}.json"),
        *("--svlm-json", OFFICIAL / f"PI_Qwen2vl7b_{SVLM}_{dataset}.json"),
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads((OFFICIAL / f"PI_Qwen2vl7b_train_{LVLM}_{SVLM}_{dataset}.json").read_text())
    assert json.loads(out.read_text()) == expected


def test_the_paper_preset_trains_on_the_prompt_that_is_evaluated(tmp_path):
    out = tmp_path / "train.json"
    python(
        *("PI.py", "--dataset", "textVQA", "--out", out),
        *("--lvlm-json", OFFICIAL / f"PI_Qwen2vl7b_{LVLM}_textVQA.json"),
        *("--svlm-json", OFFICIAL / f"PI_Qwen2vl7b_{SVLM}_textVQA.json"),
    )
    (sample,) = json.loads(out.read_text())
    assert sample["conversations"][0]["value"] == (
        "<image>\nWhat airline does the plane belong to Answer the following question in a single word or phrase."
    )


@pytest.mark.parametrize(
    ("preset", "dataset", "says"),
    [("released", "chartVQA", "contains 75.0 %"), ("paper", "chartVQA", "relaxed 87.5 %")],
)
def test_a_released_result_file_is_scored_without_a_model(preset, dataset, says):
    file = OFFICIAL / f"Eval_{SVLM}_{dataset}.json"
    done = python("evaluate.py", "--dataset", dataset, "--preset", preset, "--predictions", file)
    assert done.returncode == 0, done.stderr
    headline = next(line for line in done.stdout.splitlines() if "headline" in line)
    assert says in " ".join(headline.split())
    assert "n = 8" in headline


def test_nine_thousand_released_annotations_get_their_question_marks_back(tmp_path):
    (tmp_path / "PA_okvqa.json").write_bytes(lzma.decompress((OFFICIAL / "PA_okvqa.json.xz").read_bytes()))
    annotations = in_time(read_records, tmp_path / "PA_okvqa.json", "PA")
    args = SimpleNamespace(preset="paper", path_map={"/workspace/data/okvqa": "/mnt/okvqa"}, image_root=None)
    usable, _ = in_time(usable_annotations, annotations, args)
    assert len(usable) == 9009
    assert all(r["predicted_question"].count("?") == 1 and r["predicted_question"].endswith("?") for r in usable)
    assert all(r["image_path"].startswith("/mnt/okvqa/images/train2014/") for r in usable)
    args.preset = "released"
    assert not any("?" in r["predicted_question"] for r in usable_annotations(annotations, args)[0])
