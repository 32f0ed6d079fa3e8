"""A model that cannot be loaded is one sentence that says what to do; most of them before torch is imported."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import originals
import pytest
import torch
import training
from conftest import ROOT, STUDENT
from safetensors.torch import load_file, save_file

from mpa.files.records import InputError
from mpa.models import conversion, loading, model_files


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: its error codes stand in a header."""

    def do_HEAD(self):
        code, name = (403, "GatedRepo") if "gated" in self.path else (404, "RepoNotFound")
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@contextmanager
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def checked(model: str, tmp_path, **environment) -> str:
    """What `python -m mpa.models MODEL` says. Fails if it imported torch or transformers."""
    code = "import runpy, sys; sys.argv = ['models', sys.argv[1]]\n"
    code += "try: runpy.run_module('mpa.models', run_name='__main__')\n"
    code += "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, model],
        env={**clean, "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    *before, line = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: "), done.stderr
    assert all("Retry" in said or "thrown while requesting" in said for said in before)
    return line


def test_hub_ids_that_cannot_be_had_say_why_before_torch_is_imported(tmp_path):
    with hub() as endpoint:
        gated = checked("org/gated-model", tmp_path, HF_ENDPOINT=endpoint)
        assert "accepted its terms, and no token is set" in gated and "https://huggingface.co/org/gated-model" in gated
        said = checked("org/gated-model", tmp_path, HF_ENDPOINT=endpoint, HF_TOKEN="hf_secret")
        assert "the token lacks access" in said and "hf_secret" not in said
        assert "no such model on the hub. Check the spelling" in checked(
            "Qwen/Qwen2-LV-2B", tmp_path, HF_ENDPOINT=endpoint
        )
    offline = checked("Qwen/Qwen2-VL-2B-Instruct", tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline and "`hf download Qwen/Qwen2-VL-2B-Instruct`" in offline


@pytest.mark.slow  # the hub's client tries again for half a minute
def test_without_a_network_the_last_line_says_so(tmp_path):
    assert "cannot be reached. Check the network" in checked("Qwen/Q", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")


def cached(home, name: str, folder) -> None:
    """Put a folder into a cache as the hub's client lays it out."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")


def test_offline_with_the_model_in_the_cache_an_original_is_converted_by_its_id(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MPA_CACHE", str(tmp_path / "mpa"))
    source = originals.tinyllava(tmp_path / "source")
    shutil.move(source / "TinyLLaVA-2.0B-SigLIP", tmp_path / "tower")
    cached(tmp_path, "bczhou/TinyLLaVA-2.0B", source)
    conversion.converted.cache_clear()
    with pytest.raises(
        InputError, match=r"its vision tower, bczhou/TinyLLaVA-2.0B-SigLIP, is needed.*HF_HUB_OFFLINE is set"
    ):
        conversion.converted("bczhou/TinyLLaVA-2.0B")
    cached(tmp_path, "bczhou/TinyLLaVA-2.0B-SigLIP", tmp_path / "tower")
    folder = conversion.converted("bczhou/TinyLLaVA-2.0B")
    assert "bczhou--TinyLLaVA-2.0B-" in folder and conversion.converted_from(folder) == "bczhou/TinyLLaVA-2.0B"
    assert conversion.original_type("bczhou/TinyLLaVA-2.0B") == "tiny_llava_stablelm"
    assert loading.load_model(folder, "cpu", torch.float32).config.model_type == "llava"
    cached(tmp_path, "org/student", STUDENT)
    assert conversion.converted("org/student") == "org/student"
    loading.check_model_path("org/student")


@pytest.fixture
def student(tmp_path):
    return shutil.copytree(STUDENT, tmp_path / "student")


def test_a_checkpoint_that_lacks_tensors_is_not_filled_at_random(student):
    weights = load_file(student / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp" in name)
    lost = weights.pop(name)
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"1 tensors of the model are missing or have another shape \(.*mlp.*download it again"
    ):
        loading.load_model(str(student), "cpu", torch.float32)
    save_file(weights | {name: lost[:3].clone()}, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensors of the model are missing or have another shape"):
        loading.load_model(str(student), "cpu", torch.float32)


@pytest.mark.parametrize("kept", [0, 7, 3000, -10])
def test_damaged_weights_are_named(student, kept):
    content = (student / "model.safetensors").read_bytes()
    (student / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(InputError, match=r"its weights cannot be read.*download it again"):
        loading.load_model(str(student), "cpu", torch.float32)
    assert "model.safetensors: its weights cannot be read" in checked(str(student), student)


def in_shards(folder, where=lambda name: len(name) % 2, listed=None) -> dict[str, str]:
    """Split the weights of a folder into two files and an index, by `where`; the index says `listed`, if given."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    table = {name: names[where(name)] for name in tensors}
    for part in names:
        save_file({name: tensors[name] for name in tensors if table[name] == part}, folder / part, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed or table}))
    return table


def test_an_index_that_contradicts_the_files_is_named_before_torch_is_imported(student, tmp_path):
    whole = shutil.copy(student / "model.safetensors", tmp_path / "whole")
    table = in_shards(student)
    loading.check_model_path(str(student))
    loading.load_model(str(student), "cpu", torch.float32)
    one, two = sorted(set(table.values()))
    moved = next(name for name in table if table[name] == one)
    in_both = load_file(student / two) | {moved: load_file(student / one)[moved] + 1}
    save_file(in_both, student / two, {"format": "pt"})
    said = checked(str(student), tmp_path)
    assert f"1 tensors are in two files ({moved})" in said
    with pytest.raises(InputError, match="1 tensors are in two files"):
        loading.load_model(str(student), "cpu", torch.float32)
    left = load_file(student / one)
    del left[moved]
    save_file(left, student / one, {"format": "pt"})
    assert f"1 tensors are not in the files that model.safetensors.index.json names ({moved})" in checked(
        str(student), tmp_path
    )
    (student / two).unlink()
    assert f"{two} is missing. Download it again" in checked(str(student), tmp_path)
    shutil.copy(whole, student / "model.safetensors")
    assert "has both model.safetensors and model.safetensors.index.json" in checked(str(student), tmp_path)
    (student / "model.safetensors").unlink()
    named = json.dumps(table)
    for content in (
        "{}",
        "[]",
        "{",
        *(f'{{"metadata": {{}}, "weight_map": {what}}}' for what in ('{"a": "../x"}', '{"a": 3}', "[]")),
    ):
        (student / "model.safetensors.index.json").write_text(content)
        assert "index.json: expected a weight_map" in checked(str(student), tmp_path)
    for content in (f'{{"weight_map": {named}}}', f'{{"metadata": null, "weight_map": {named}}}'):
        (student / "model.safetensors.index.json").write_text(content)
        with pytest.raises(InputError, match=r"index\.json: lacks its metadata"):
            loading.load_model(str(student), "cpu", torch.float32)


def overlapping(header: dict) -> None:
    one, other = sorted(header.keys() - {"__metadata__"})[:2]
    header[one] = header[other]


HEADERS = {
    "overlapping": (overlapping, "do not follow each other|other bytes|invalid"),
    "negative": (lambda h: h[min(h)]["data_offsets"].reverse(), "other bytes than its shape says|invalid"),
    "fraction": (lambda h: h[max(h)]["data_offsets"].insert(0, 0.5), "cannot be read"),
    "shape": (lambda h: h[max(h)]["shape"].append(2), "other bytes than its shape says|invalid"),
    "dtype": (lambda h: h[max(h)].update(dtype="F64"), "other bytes than its shape says|invalid"),
    "integers": (lambda h: h[max(h)].update(dtype={2: "I16", 4: "I32"}[width(h[max(h)])]), "no floating-point numbers"),
}


def width(entry: dict) -> int:
    begin, end = entry["data_offsets"]
    return (end - begin) // math.prod(entry["shape"])


@pytest.mark.parametrize("how", HEADERS)
def test_a_damaged_header_is_named_in_a_load_and_in_a_conversion(student, tmp_path, how):
    damage, said = HEADERS[how]
    original = originals.internvl(tmp_path / "original")
    for folder in (student, original):
        content = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__")
        damage(header)
        new = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])
    with pytest.raises(InputError, match=said):
        loading.check_model_path(str(student))
        loading.load_model(str(student), "cpu", torch.float32)
    with pytest.raises(InputError, match=said):
        conversion.convert(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"name": "x", "files": ["a"]}', '{"icons": {"a": {"src": "b"}}}'])
def test_another_programs_manifest_is_none(student, content):
    (student / "manifest.json").write_text(content)
    loading.load_model(str(student), "cpu", torch.float32)
    (student / "manifest.json").write_text('{"model.safetensors": {"bytes": 3}}')
    with pytest.raises(InputError, match=r"model\.safetensors was truncated or changed"):
        loading.check_model_path(str(student))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_is_found_in_every_dtype_and_the_largest_is_none(tmp_path, dtype, value):
    dtype = getattr(torch, dtype)
    most = torch.finfo(dtype).max
    good = {"a": torch.tensor([most, -most, 0.0, -0.0, torch.finfo(dtype).tiny], dtype=dtype)}
    good |= {"empty": torch.zeros(0, dtype=dtype), "long": torch.randn(600_001).to(dtype), "ids": torch.tensor([2**62])}
    bad = good["long"].clone()
    bad[600_000 - 1] = float(value.removeprefix("-"))
    bad = -bad if value.startswith("-") else bad
    save_file(
        good | {"bad": bad, "scalar": torch.tensor(float(value.removeprefix("-")), dtype=dtype)},
        tmp_path / "model.safetensors",
    )
    assert sorted(model_files.not_finite(model_files.tensors(tmp_path))) == ["bad", "scalar"]
    save_file(good, tmp_path / "model.safetensors")
    assert model_files.not_finite(model_files.tensors(tmp_path)) == []


def test_a_configuration_with_fewer_layers_than_are_stored_is_named(student):
    originals.changed(student, text_config__num_hidden_layers=1, text_config__layer_types=["full_attention"])
    with pytest.raises(InputError, match=r"\d+ of its tensors have no place in the model .*layers\.1\."):
        loading.load_model(str(student), "cpu", torch.float32)


def test_every_way_to_load_refuses_weights_that_are_not_finite(student, tmp_path):
    tensors = load_file(student / "model.safetensors")
    name = next(name for name in tensors if "layers.1.mlp" in name)
    tensors[name].view(-1)[77] = torch.nan
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    said = rf"{student}: 1 of \d+ tensors hold values that are not finite \({name}\)"
    for quantization in (None, "4bit"):
        with pytest.raises(InputError, match=said):
            loading.load_model(str(student), "cpu", torch.float32, quantization=quantization)
    with pytest.raises(InputError, match=said):
        loading.check_files(str(student))  # of the engine vllm
    training.write(tmp_path, 4)
    with pytest.raises(InputError, match=said):
        training.build(tmp_path, model=student)


def test_pickles_and_unknown_architectures(student):
    (student / "model.safetensors").rename(student / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no safetensors weights.*"):
        loading.check_model_path(str(student))
    with pytest.raises(InputError, match=r"Weights as pickles.*save_file as model.safetensors"):
        loading.load_model(str(student), "cpu", torch.float32)
    originals.changed(student, model_type="brand_new_vlm")
    with pytest.raises(InputError, match=r"does not know its architecture.*--trust-remote-code"):
        loading.load_model(str(student), "cpu", torch.float32)


def test_a_hostile_configuration_or_template_does_no_more_than_raise_an_error(student, tmp_path):
    mark = tmp_path / "ran"
    (student / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    originals.changed(
        student, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForImageTextToText": "evil.M"}
    )
    with pytest.raises(InputError):
        loading.load_model(str(student), "cpu", torch.float32)
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10) %}{{ cycler.__init__.__globals__ }}{% endfor %}"
    original = originals.internvl(tmp_path / "original")
    (original / "chat_template.jinja").write_text(template)
    (original / "modeling_internvl_chat.py").write_text(f"open({str(mark)!r}, 'w')\n")
    folder = conversion.convert(original, tmp_path / "out")
    assert "__globals__" not in (folder / "chat_template.jinja").read_text()
    assert not mark.exists()
