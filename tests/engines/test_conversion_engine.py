"""With a converted original, the hf engine's replies are those of a plain loop: batches, follow-ups, shared caches."""

import originals
import pytest
from test_families import PIXELS, PROMPTS, plain

from mpa.engines import Request, open_engine
from mpa.models import conversion


@pytest.mark.parametrize("name", ["internvl2_2b_like", "internvl2_4b_like", "internvl2_8b_like", "tinyllava_2_0b_like"])
def test_greedy_replies_are_those_of_the_plain_loop(name, images, tmp_path):
    make = originals.tinyllava if name.startswith("tiny") else lambda folder: originals.internvl(folder, name)
    folder = str(conversion.convert(make(tmp_path / "original"), tmp_path / "out"))
    paths = sorted(map(str, images.rglob("*.png")))
    asked = [Request(str(i), path, PROMPTS[i % 3], max_new_tokens=8) for i, path in enumerate(paths)]
    with open_engine("hf", model_path=folder, batch_size=5, workers=0, **PIXELS) as engine:
        got = {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}
        assert engine.prefix_cache
    expected = plain(folder, [(r.image_path, r.prompt) for r in asked], 8)
    assert [got[r.key]["text"] for r in asked] == expected
    assert len(set(expected)) > 4  # the images make a difference
