"""A model that cannot be loaded is one sentence that says what to do; most of them before torch is imported."""

import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import model_card
import originals
import pytest
import torch
from conftest import ROOT, STUDENT
from safetensors.torch import load_file, save_file

from mpa import conversion, models
from mpa.records import InputError


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
    conversion.native.cache_clear()
    with pytest.raises(
        InputError, match=r"its vision tower, bczhou/TinyLLaVA-2.0B-SigLIP, is needed.*HF_HUB_OFFLINE is set"
    ):
        conversion.native("bczhou/TinyLLaVA-2.0B")
    cached(tmp_path, "bczhou/TinyLLaVA-2.0B-SigLIP", tmp_path / "tower")
    folder = conversion.native("bczhou/TinyLLaVA-2.0B")
    assert "bczhou--TinyLLaVA-2.0B-" in folder and model_card.converted_from(folder) == "bczhou/TinyLLaVA-2.0B"
    assert conversion.original_type("bczhou/TinyLLaVA-2.0B") == "tiny_llava_stablelm"
    assert models.load_model(folder, "cpu", torch.float32).config.model_type == "llava"
    cached(tmp_path, "org/student", STUDENT)
    assert conversion.native("org/student") == "org/student"
    models.check_model_path("org/student")


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
        models.load_model(str(student), "cpu", torch.float32)
    save_file(weights | {name: lost[:3].clone()}, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensors of the model are missing or have another shape"):
        models.load_model(str(student), "cpu", torch.float32)


@pytest.mark.parametrize("kept", [0, 7, 3000, -10])
def test_damaged_weights_are_named(student, kept):
    content = (student / "model.safetensors").read_bytes()
    (student / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(InputError, match=r"its weights cannot be read.*download it again"):
        models.load_model(str(student), "cpu", torch.float32)


def test_pickles_and_unknown_architectures(student):
    (student / "model.safetensors").rename(student / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no safetensors weights.*"):
        models.check_model_path(str(student))
    with pytest.raises(InputError, match=r"Weights as pickles.*save_file as model.safetensors"):
        models.load_model(str(student), "cpu", torch.float32)
    originals.changed(student, model_type="brand_new_vlm")
    with pytest.raises(InputError, match=r"does not know its architecture.*--trust-remote-code"):
        models.load_model(str(student), "cpu", torch.float32)


def test_a_hostile_configuration_or_template_does_no_more_than_raise_an_error(student, tmp_path):
    mark = tmp_path / "ran"
    (student / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    originals.changed(
        student, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForImageTextToText": "evil.M"}
    )
    with pytest.raises(InputError):
        models.load_model(str(student), "cpu", torch.float32)
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10) %}{{ cycler.__init__.__globals__ }}{% endfor %}"
    original = originals.internvl(tmp_path / "original")
    (original / "chat_template.jinja").write_text(template)
    (original / "modeling_internvl_chat.py").write_text(f"open({str(mark)!r}, 'w')\n")
    folder = conversion.convert(original, tmp_path / "out")
    assert "__globals__" not in (folder / "chat_template.jinja").read_text()
    assert not mark.exists()
