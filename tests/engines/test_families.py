"""For a miniature of every model family, with random weights, the engine's replies equal those of a plain loop."""

from dataclasses import replace

import miniatures
import pytest
import torch

from mpa.engines import Request, hf, open_engine
from mpa.files.image_files import open_image
from mpa.models import families, loading

PIXELS = {"min_pixels": 56 * 56, "max_pixels": 4 * 56 * 56, "dtype": "float32"}
PROMPTS = ["What color is the shape?", "Is there a circle in the image? Answer in one word.", "Where?"]


@pytest.fixture(scope="module", params=miniatures.FAMILIES)
def checkpoint(request, tmp_path_factory):
    return miniatures.make(request.param, tmp_path_factory.mktemp(request.param))


def asked_by_transformers(processor, image, prompt: str) -> dict:
    """One prompt as transformers' own call makes it; PaliGemma has no chat template, and its processor takes the question."""
    if not processor.chat_template:
        inputs = processor(text=[f"<image>{prompt}"], images=[[image]], return_tensors="pt")
        return {name: value for name, value in inputs.items() if name != "labels"}
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template([message], **options)


def plain(checkpoint, asked: list[tuple[str, str]], new_tokens: int) -> list[str]:
    """One generate call per request, with the model's own processor."""
    processor = loading.load_processor(checkpoint, PIXELS["min_pixels"], PIXELS["max_pixels"])
    model = loading.load_model(checkpoint, "cpu", torch.float32)
    replies = []
    for path, prompt in asked:
        inputs = asked_by_transformers(processor, open_image(path), prompt)
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        replies.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return replies


def follow(request: Request, text: str) -> Request:
    """Random weights write no annotation, so the follow-up prompt is derived from the reply."""
    return replace(request, prompt=f"Is it {len(text)}?", max_new_tokens=5, follow_up="")


def test_greedy_replies_and_follow_ups_are_those_of_the_plain_loop(checkpoint, images, monkeypatch):
    def follow_up_request(request, reply, _marks):
        return follow(request, reply["text"]) if request.follow_up else None

    monkeypatch.setattr(hf, "follow_up_request", follow_up_request)
    if families.FAMILIES[loading.model_type(checkpoint)].shortcuts:
        monkeypatch.setattr(hf.HFEngine, "answer", None)  # which asks anew: the image's key-values are to serve both
    paths = sorted(map(str, images.rglob("*.png")))
    asked = [
        Request(str(i), path, PROMPTS[i % 3], max_new_tokens=8, follow_up="" if i % 4 == 0 else "paper")
        for i, path in enumerate(paths)
    ]
    with open_engine("hf", model_path=checkpoint, batch_size=5, workers=0, **PIXELS) as engine:
        got = {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}
        assert bool(engine.prefix_cache) == families.FAMILIES[engine.model.config.model_type].shortcuts
    expected = plain(checkpoint, [(r.image_path, r.prompt) for r in asked], 8)
    assert [got[r.key]["text"] for r in asked] == expected
    assert len(set(expected)) > 6  # the images make a difference

    followed = [(r, text) for r, text in zip(asked, expected, strict=True) if r.follow_up]
    expected = plain(checkpoint, [(r.image_path, follow(r, text).prompt) for r, text in followed], 5)
    assert [got[r.key]["follow_up"]["text"] for r, _ in followed] == expected
    assert not any("follow_up" in got[r.key] for r in asked if not r.follow_up)


def test_a_static_cache_gives_the_same_replies_or_says_why_there_is_none(checkpoint, images, capsys):
    paths = sorted(map(str, images.rglob("*.png")))
    asked = [Request(str(i), path, PROMPTS[i % 3], max_new_tokens=8) for i, path in enumerate(paths)]
    texts = []
    for static in (False, True):
        with open_engine("hf", model_path=checkpoint, batch_size=5, static_cache=static, **PIXELS) as engine:
            texts.append({reply["key"]: reply["text"] for batch in engine.generate(asked) for reply in batch})
            facts = engine.facts()
    assert texts[0] == texts[1]
    has_one = families.FAMILIES[loading.model_type(checkpoint)].shortcuts
    assert facts["static_cache"] == ("no graph" if has_one else "left out")
    assert ("no CUDA graph: the device is cpu" if has_one else "is left out: not every") in capsys.readouterr().err
