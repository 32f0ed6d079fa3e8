import random

import pytest
import torch
from conftest import STUDENT, TEACHER, close
from PIL import Image

from mpa.engines import Request, open_engine
from mpa.engines.batch_plan import BatchPlan
from mpa.engines.hf import HFEngine
from mpa.files.image_files import open_image
from mpa.files.records import InputError
from mpa.method.prompts import TASK_PROMPTS, answer_prompt, follow_up_prompt
from mpa.models import families, loading

MINI = {"min_pixels": 3136, "max_pixels": 3136, "dtype": "float32"}
QUESTIONS = ["what color is the shape?", "is there not a teal shape in the image?", "is no circle present?"]


def requests(images, **more) -> list[Request]:
    """Two prompts of different length about each image."""
    paths = sorted(images.rglob("*.png"))
    asked = [(path, answer_prompt(QUESTIONS[i % 3])) for i, path in enumerate(paths)]
    asked += [(path, TASK_PROMPTS["general"]) for path in paths]
    return [Request(str(i), str(path), prompt, **more) for i, (path, prompt) in enumerate(asked)]


def replies(asked, model=TEACHER, **settings) -> dict[str, dict]:
    with open_engine("hf", model_path=str(model), **{**MINI, **settings}) as engine:
        return {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}


@pytest.fixture(scope="module")
def one_by_one(images):
    return replies(requests(images), batch_size=1, workers=0)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_greedy_replies_do_not_depend_on_batch_and_order(images, one_by_one, batch_size):
    shuffled = requests(images)
    random.Random(batch_size).shuffle(shuffled)
    got = replies(shuffled, batch_size=batch_size, workers=1)
    assert {k: (r["text"], r["tokens"]) for k, r in got.items()} == {
        k: (r["text"], r["tokens"]) for k, r in one_by_one.items()
    }
    for key, reply in got.items():
        assert close(reply["logprob"], one_by_one[key]["logprob"], 1e-3, least=1)  # nat


def test_replies_are_those_of_a_plain_generate_call_and_so_are_their_log_probabilities(images, one_by_one):
    processor = loading.load_processor(str(TEACHER), 3136, 3136)
    model = loading.load_model(str(TEACHER), "cpu", torch.float32)
    for request in requests(images)[::5]:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request.prompt}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        inputs = processor(text=[text], images=[open_image(request.image_path)], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        out = model.generate(**inputs, max_new_tokens=128, do_sample=False)
        ours = one_by_one[request.key]
        assert processor.decode(out[0, length:], skip_special_tokens=True) == ours["text"]
        assert out.shape[1] - length == ours["tokens"]
        extended = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, ours["tokens"]))
        forward = {**inputs, "input_ids": out, "attention_mask": torch.ones_like(out), "mm_token_type_ids": extended}
        with torch.no_grad():
            scores = model(**forward).logits.log_softmax(-1)[0, length - 1 : -1]
        expected = scores.gather(1, out[0, length:, None]).sum().item()
        assert close(ours["logprob"], expected, 1e-3, least=1)


def test_a_sampled_reply_depends_on_seed_and_key_alone(images):
    asked = requests(images, temperature=1.0, top_p=0.95)
    alone = replies(asked[-1:], batch_size=8, workers=0)
    together = replies(asked, batch_size=8, workers=0)
    assert alone[asked[-1].key]["text"] == together[asked[-1].key]["text"]
    assert {k: r["text"] for k, r in replies(asked[::-1], batch_size=3, workers=0).items()} == {
        k: r["text"] for k, r in together.items()
    }
    reseeded = replies(requests(images, temperature=1.0, top_p=0.95, seed=1), batch_size=8, workers=0)
    assert [reseeded[k]["text"] for k in together] != [r["text"] for r in together.values()]


def test_a_row_may_stop_at_the_line_that_ends_its_answer(images, one_by_one):
    annotations = requests(images)[12:]
    stopped = replies([Request(r.key, r.image_path, r.prompt, stop="answer") for r in annotations], workers=0)
    for key, reply in stopped.items():
        assert reply["text"] == one_by_one[key]["text"].split("\n")[0] + "\n"
        assert reply["tokens"] < one_by_one[key]["tokens"]
        assert reply["logprob"] > one_by_one[key]["logprob"]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_cost_only_themselves(images, tmp_path, one_by_one, workers):
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (1, 300)).save(tmp_path / "thin.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    bad = {
        name: Request(name, str(tmp_path / f"{name}.png"), QUESTIONS[0]) for name in ("gone", "empty", "thin", "dot")
    }
    asked = requests(images)[:4]
    got = replies([*asked[:2], *bad.values(), *asked[2:]], batch_size=8, workers=workers)
    assert [got[r.key]["text"] for r in asked] == [one_by_one[r.key]["text"] for r in asked]
    assert got["gone"] == {"key": "gone", "error": "image: no such file", "permanent": True}
    assert "cannot be read" in got["empty"]["error"]
    assert "the processor refuses it" in got["thin"]["error"]
    assert got["dot"]["text"]


def test_a_processor_that_fails_on_every_image_is_an_error_and_not_the_images_fault(images, tmp_path):
    for file in STUDENT.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ no_such_function() }}")
    with pytest.raises(InputError, match="its processor fails on a plain image"):
        replies(requests(images)[:3], model=tmp_path, workers=0)


def test_finished_batches_are_passed_over_and_the_others_are_formed_as_before(images):
    asked = requests(images)
    with HFEngine(str(STUDENT), batch_size=4, workers=0, **MINI) as engine:
        whole = list(engine.generate(asked))
        done = {reply["key"] for batch in whole[:2] for reply in batch} | {whole[2][0]["key"]}
        assert list(engine.generate(asked, done)) == whole[2:]


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("everything", "no such model folder"),
        ("config.json", "no config.json"),
        ("model.safetensors", "no safetensors weights"),
        ("processor_config.json", "no processor"),
    ],
)
def test_a_model_folder_is_checked_before_anything_is_loaded(tmp_path, missing, says):
    folder = tmp_path / "model"
    if missing != "everything":
        folder.mkdir()
        for file in STUDENT.iterdir():
            if file.name != missing:
                (folder / file.name).symlink_to(file)
    with pytest.raises(InputError, match=says):
        loading.check_model_path(str(folder))


def test_a_tokenizer_alone_is_no_processor(tmp_path):
    for file in STUDENT.iterdir():
        if file.name not in ("processor_config.json", "config.json"):
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="processor"):
        loading.load_processor(str(tmp_path), 3136, 3136)


def test_the_dtype_is_measured_and_the_processors_limits_are_set():
    assert loading.resolved_dtype("float16", "cpu") == "float16"
    assert loading.resolved_dtype("auto", "cpu") == "float32"
    processor = loading.load_processor(str(STUDENT), families.MIN_PIXELS, families.MAX_PIXELS)
    image = Image.new("RGB", (64, 64))
    thw = processor.image_processor([image], return_tensors="pt")["image_grid_thw"][0]
    assert families.MIN_PIXELS <= thw[1] * thw[2] * 14 * 14 <= families.MAX_PIXELS


def test_a_float32_model_has_float32_convolutions(monkeypatch):
    """On a GPU, cuDNN's would be in TF32, with three decimal digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    loading.load_model(str(STUDENT), "cpu", torch.bfloat16)
    assert torch.backends.cudnn.allow_tf32
    loading.load_model(str(STUDENT), "cpu", torch.float32)
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_follow_up_on_the_kept_image_is_what_asking_anew_replies(images, batch_size):
    """Half of the 24 requests are not annotations and have no follow-up. Sizes and prompts differ within a batch."""
    asked = requests(images, follow_up="paper")
    first = replies(asked, batch_size=batch_size, max_pixels=20_000)
    anew = [
        Request(r.key, r.image_path, follow_up_prompt(first[r.key]["text"], "paper"), stop="answer")
        for r in asked
        if "follow_up" in first[r.key]
    ]
    assert len(anew) == 12
    alone = replies(anew, batch_size=1, max_pixels=20_000)
    for key, reply in alone.items():
        followed = first[key]["follow_up"]
        assert (followed["text"], followed["tokens"]) == (reply["text"], reply["tokens"])
        assert close(followed["logprob"], reply["logprob"], 1e-3, least=1)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_batch_that_does_not_fit_is_halved_and_no_reply_is_lost(images, one_by_one, monkeypatch, rows):
    asked = requests(images)[:7]
    reply = HFEngine.reply

    def small_memory(self, requests, inputs):
        if len(requests) > rows - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return reply(self, requests, inputs)

    monkeypatch.setattr(HFEngine, "reply", small_memory)
    got = replies(asked, batch_size=7, workers=0)
    assert set(got) == {r.key for r in asked}
    if rows == 1:  # nothing fits, not even one
        assert all("out of memory" in reply["error"] for reply in got.values())
    else:
        assert [got[r.key]["text"] for r in asked] == [one_by_one[r.key]["text"] for r in asked]


def test_batches_keep_to_the_budget_of_tokens(images):
    plan = BatchPlan(batch_size=8, batch_tokens=600, pixels=(3136, 12544))
    batches = list(plan.batches(iter(requests(images, max_new_tokens=100))))
    assert sorted(r.key for batch in batches for r in batch) == sorted(r.key for r in requests(images))
    assert max(map(len, batches)) < 6
    assert all(len(b) == 1 or len(b) * (plan.estimated_length(b[-1]) + 100) <= 600 for b in batches)


def test_the_engine_tells_what_it_wrote_and_how_long_it_waited(images):
    with HFEngine(str(STUDENT), batch_size=4, workers=1, **MINI) as engine:
        written = sum(reply["tokens"] for batch in engine.generate(requests(images)) for reply in batch)
        facts = engine.facts()
        assert facts["tokens"] == written
        assert (facts["device"], facts["dtype"]) == ("cpu", "float32")
        assert 0 < facts["waited"] < 1
        assert "tokens/s, waited" in engine.status()


def test_a_family_without_shortcuts_asks_anew(images, monkeypatch):
    asked = requests(images, follow_up="paper")[10:14]
    shared = replies(asked)
    monkeypatch.setattr(families, "FAMILIES", {})
    assert {k: r.get("follow_up", {}).get("text") for k, r in replies(asked).items()} == {
        k: r.get("follow_up", {}).get("text") for k, r in shared.items()
    }
