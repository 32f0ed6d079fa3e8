"""A stage given an original converts it once, into the cache, and says so; nothing half-made stays."""

import json
import subprocess
import sys
from pathlib import Path

import model_loading
import originals
import pytest
import resume_settings
import torch
from conftest import MINI, ROOT, STUDENT, TEACHER, python
from easy_run import read

from mpa.files.records import InputError
from mpa.models import conversion, loading


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MPA_CACHE", str(tmp_path / "cache"))
    conversion.converted.cache_clear()
    return tmp_path / "cache"


def folders(cache) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith("."))


def test_an_original_is_converted_once_and_another_content_anew(tmp_path, cache, capsys):
    source = originals.internvl(tmp_path / "InternVL2-2B")
    out = conversion.converted(str(source))
    said = capsys.readouterr().out
    assert said.startswith(f"Converted {source} into {out} (") and said.count("\n") == 1
    assert conversion.converted_from(out) == str(source)
    conversion.converted.cache_clear()
    assert conversion.converted(str(source)) == out and capsys.readouterr().out == ""
    originals.changed(source, max_dynamic_patch=6)
    conversion.converted.cache_clear()
    assert conversion.converted(str(source)) != out
    assert len(folders(cache)) == 2 and all(name.startswith("InternVL2-2B-") for name in folders(cache))
    assert conversion.converted(str(STUDENT)) == str(STUDENT)


def test_two_processes_convert_once(tmp_path, cache):
    source = originals.internvl(tmp_path / "InternVL2-2B")
    command = [sys.executable, ROOT / "scripts/convert.py", "--cached", source]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed, said = zip(*(process.communicate(timeout=120) for process in both), strict=True)
    assert printed[0] == printed[1] == f"{cache / folders(cache)[0]}\n"
    assert sum("Converted" in text for text in said) == 1 and len(folders(cache)) == 1


def test_a_conversion_that_was_killed_leaves_nothing_that_counts(tmp_path, cache):
    source = originals.internvl(tmp_path / "InternVL2-2B")
    code = "import os; from mpa.models.conversion import converted, writing\n"
    code += "writing._names_on_disk = lambda _: os.kill(os.getpid(), 9)\n"
    done = subprocess.run([sys.executable, "-c", f"{code}converted({str(source)!r})"], cwd=ROOT)
    assert done.returncode == -9
    assert [".partial-" in name for name in folders(cache)] == [True]
    conversion.converted(str(source))
    assert [".partial-" in name for name in folders(cache)] == [False]


def test_two_processes_with_one_out_make_one_whole_folder(tmp_path):
    source, out = originals.internvl(tmp_path / "InternVL2-2B"), tmp_path / "made"
    other = originals.internvl(tmp_path / "other")
    originals.changed(other, max_dynamic_patch=3)
    commands = [
        [sys.executable, ROOT / "scripts/convert.py", folder, "--out", out] for folder in (source, other, source)
    ]
    every = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate(timeout=120)[1] for process in every]
    codes = [process.returncode for process in every]
    assert sorted(codes) == [0, 1, 1], said
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or "another process is writing it" in text or "already exists" in text
    loading.check_files(str(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["InternVL2-2B", "made", "other"]


def test_what_a_killed_conversion_left_is_not_mixed_with_the_next(tmp_path):
    source, out = originals.internvl(tmp_path / "source"), tmp_path / "[made]"
    code = "import os, sys; from mpa.models.conversion import convert, writing\n"
    code += "writing._names_on_disk = lambda _: os.kill(os.getpid(), 9)\n"
    done = subprocess.run([sys.executable, "-c", f"{code}convert({str(source)!r}, {str(out)!r})"], cwd=ROOT)
    assert done.returncode == -9
    (left,) = tmp_path.glob("*.partial-*")
    (left / "model-00007-of-00007.safetensors").write_text("old")
    conversion.convert(source, out)
    assert not [*tmp_path.glob("*.partial-*")] and not (out / "model-00007-of-00007.safetensors").exists()
    loading.check_files(str(out))
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text() + " ")
    with pytest.raises(InputError, match=r"\[made\]: tokenizer\.json was truncated or changed"):
        loading.load_model(str(out), "cpu", torch.float32)


@pytest.mark.parametrize("lost", [["conversion.json", "config.json"], ["manifest.json"]], ids=["torn", "earlier"])
def test_a_conversion_in_the_cache_that_is_torn_or_of_an_earlier_version_is_made_anew(tmp_path, cache, lost):
    source = originals.internvl(tmp_path / "InternVL2-2B")
    out = Path(conversion.converted(str(source)))
    before = resume_settings.fingerprint(out)
    for name in lost:
        (out / name).unlink()
    conversion.converted.cache_clear()
    assert conversion.converted(str(source)) == str(out) and (out / "config.json").is_file()
    loading.check_files(str(out))
    assert resume_settings.fingerprint(out) == before  # so that a training on it goes on


def test_a_stage_names_the_original_in_what_it_writes(tmp_path, cache):
    source = originals.internvl(tmp_path / "InternVL2-2B")
    args = [
        *("--dataset", "easyVQA", "--limit", 4, "--run", tmp_path / "run", "--max-new-tokens", 8, "--workers", 0),
        *MINI,
    ]
    done = python("evaluate.py", "--model-path", source, *args)
    assert done.returncode == 0, done.stderr
    assert "Converted" in done.stdout
    meta = read(tmp_path / "run" / "Eval_InternVL2-2B_easyVQA.meta.json")
    assert meta["model_path"] == str(source) and meta["settings"]["model"].startswith("InternVL2-2B@")
    assert len(read(tmp_path / "run" / "Eval_InternVL2-2B_easyVQA.json")) == 4
    assert "already" in python("evaluate.py", "--model-path", source, *args).stdout


def test_an_originals_folder_is_checked_before_anything_is_loaded(tmp_path):
    source = originals.internvl(tmp_path / "InternVL2-2B")
    loading.check_model_path(str(source))
    (source / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="no tokenizer in it"):
        loading.check_model_path(str(source))
    (source / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        loading.check_model_path(str(source))


def test_the_script_converts_and_names_the_folder_to_load(tmp_path, cache):
    source = originals.tinyllava(tmp_path / "TinyLLaVA-2.0B")
    done = python("convert.py", source, "--out", tmp_path / "out")
    assert done.returncode == 0 and f"Wrote {tmp_path}/out (" in done.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "LlavaForConditionalGeneration"
    ]
    again = python("convert.py", source, "--out", tmp_path / "out")
    assert again.returncode == 1 and "already exists" in again.stderr
    cached = python("convert.py", "--cached", source)
    assert cached.stdout == f"{conversion.converted(str(source))}\n" and "Converted" in cached.stderr
    assert python("convert.py", "--cached", TEACHER).stdout == f"{TEACHER}\n"
    assert "not in the cache of the hub" in python("convert.py", "no/such-model", "--out", tmp_path / "x").stderr


def test_pixels_are_the_originals_in_stages_too(tmp_path, cache):
    """The image processor on PIL, which transformers selects only when asked to."""
    folder = conversion.converted(str(originals.internvl(tmp_path / "InternVL2-2B")))
    processor = loading.load_processor(folder, 1, 10**9)
    assert type(processor.image_processor).__name__ == "GotOcr2ImageProcessorPil"
    processor.save_pretrained(tmp_path / "saved")  # as a training does
    assert type(loading.load_processor(str(tmp_path / "saved"), 1, 10**9).image_processor).__name__.endswith("Pil")


def test_the_trainer_converts_by_the_script(tmp_path, cache, monkeypatch, capsys):
    source = str(originals.internvl(tmp_path / "InternVL2-2B"))
    for name in model_loading.OF_RANKS:  # as rank 1 of torchrun
        monkeypatch.setenv(name, "1")
    folder = model_loading.converted(source)
    assert folder == conversion.converted(source) and f"Converted {source}" in capsys.readouterr().out
    assert model_loading.converted(str(STUDENT)) == str(STUDENT)
    with pytest.raises(InputError, match="no/model: not in the cache of the hub"):
        model_loading.converted("no/model")
    originals.changed(tmp_path / "InternVL2-2B", ps_version="v1")
    with pytest.raises(InputError, match="ps_version is 'v1'"):
        model_loading.converted(source)
