"""Which dtype `auto` is: by device and family."""

import json

import pytest
import torch
from conftest import STUDENT

from mpa.models import families, gpus, loading


@pytest.fixture
def gpu(monkeypatch, request):
    """A GPU that has bfloat16, or one that only emulates it."""
    monkeypatch.setattr(gpus, "usable", lambda: (gpus.Gpu("A card", "GPU-1", (8, 0) if request.param else (7, 5)),) * 2)
    loading._say_once.cache_clear()


def of_type(folder, model_type: str) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


@pytest.mark.parametrize("gpu", [False], indirect=True)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_gpu_without_bfloat16_computes_in_float32_what_overflows_in_float16(gpu, tmp_path, capsys, family):
    path = of_type(tmp_path, family)
    overflows = family in ("qwen2_vl", "qwen2_5_vl", "gemma3", "paligemma")
    assert loading.resolved_dtype("auto", "cuda", path) == ("float32" if overflows else "float16")
    loading.resolved_dtype("auto", "cuda", path)
    assert capsys.readouterr().err.count("overflows in float16") == overflows  # said once
    assert loading.resolved_dtype("float16", "cuda", path) == "float16"
    assert loading.resolved_dtype("auto", "cpu", path) == "float32"


@pytest.mark.parametrize("gpu", [False], indirect=True)
def test_an_unknown_family_is_tried_in_float16(gpu, tmp_path):
    assert loading.resolved_dtype("auto", "cuda", of_type(tmp_path, "new_vl")) == "float16"
    assert loading.resolved_dtype("auto", "cuda") == "float16"


@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_a_gpu_with_bfloat16_computes_in_it(gpu, capsys):
    assert loading.resolved_dtype("auto", "cuda:1", str(STUDENT)) == "bfloat16"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_the_gpu_of_a_model_is_the_current_one(gpu, monkeypatch):
    chosen = []

    class Stopped(Exception):
        pass

    def set_device(device):
        chosen.append(device)
        raise Stopped

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(loading.distributed, "LOCAL_RANK", 1)
    monkeypatch.setattr(loading, "extend_segments", lambda: None)
    with pytest.raises(Stopped):
        loading.load_model(str(STUDENT), loading.pick_device("cuda"), torch.bfloat16)
    assert chosen == ["cuda:1"]
