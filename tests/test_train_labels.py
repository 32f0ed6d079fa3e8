"""What the trainer learns from a record: labels, the evaluated prompt, padding; and records that are refused."""

import json

import model_loading
import param_groups
import params
import pytest
import torch
from collator import Collator
from conftest import STUDENT, close
from PIL import Image
from training import write_records
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
from mpa.engines import Request
from mpa.engines.hf import HFEngine
from mpa.files.records import InputError, train_record
from mpa.method.prompts import answer_prompt


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(STUDENT)


def checked(samples: list[dict], processor) -> data.Samples:
    return data.check_all(samples, processor, 1000, "error")


def labelled(encoded, processor) -> str:
    return processor.tokenizer.decode(encoded["labels"][encoded["labels"] != data.IGNORE])


@pytest.mark.parametrize("answer", ["red", "Yes", "two words", "1,234.5 %", "die Straße", "猫", "a: b\nc", "?"])
def test_labelled_are_exactly_the_answer_and_its_end_token(tmp_path, processor, answer):
    path = write_records(tmp_path, train_record(1, "a.png", answer_prompt("what is it?"), answer))
    (sample,) = data.read_samples([path], str(tmp_path))
    encoded = data.encode(sample, processor)
    assert labelled(encoded, processor) == answer + "<|im_end|>"
    at = encoded["labels"] != data.IGNORE
    assert torch.equal(encoded["labels"][at], encoded["input_ids"][at])
    assert at.nonzero()[0] == len(at) - at.sum()  # and nothing after them


def test_the_prompt_is_token_for_token_what_the_model_is_evaluated_with(tmp_path, processor):
    prompt = answer_prompt("is there a red shape?")
    path = write_records(tmp_path, train_record(1, "a.png", prompt, "yes"))
    encoded = data.encode(data.read_samples([path], str(tmp_path))[0], processor)
    engine = HFEngine(str(STUDENT), min_pixels=3136, max_pixels=3136, dtype="float32")
    engine.load()
    asked = engine.prepare([Request("1", str(tmp_path / "a.png"), prompt)]).inputs
    length = asked["input_ids"].shape[1]
    assert encoded["input_ids"][:length].tolist() == asked["input_ids"][0].tolist()
    assert (encoded["labels"][:length] == data.IGNORE).all()
    assert torch.equal(encoded["pixel_values"], torch.from_numpy(asked["pixel_values"]))


def test_each_answer_of_a_longer_conversation_is_labelled(tmp_path, processor):
    sample = train_record(1, "a.png", "what is it?", "a circle")
    sample["conversations"] += [{"from": "human", "value": "its color?"}, {"from": "gpt", "value": "red"}]
    encoded = data.encode(data.read_samples([write_records(tmp_path, sample)], str(tmp_path))[0], processor)
    assert labelled(encoded, processor) == "a circle<|im_end|>red<|im_end|>"
    assert processor.tokenizer.decode(encoded["input_ids"]).count("<|im_start|>") == 5


def collated(encoded: list[dict], processor, **settings) -> dict:
    return Collator(processor, **settings)([{**sample, "sample": i} for i, sample in enumerate(encoded)])


def test_a_batch_is_padded_on_the_right_and_padding_changes_nothing(tmp_path, processor):
    records = [
        train_record(i, "a.png", answer_prompt(q), a)
        for i, (q, a) in enumerate([("what?", "red"), ("is there not a teal shape?", "no")])
    ]
    samples = [data.encode(s, processor) for s in data.read_samples([write_records(tmp_path, *records)], str(tmp_path))]
    batch = collated(samples, processor)
    short, length = len(samples[0]["input_ids"]), len(samples[1]["input_ids"])
    assert batch["input_ids"].shape == (2, length)
    assert batch["attention_mask"].sum(1).tolist() == [short, length]
    assert (batch["labels"][0, short:] == data.IGNORE).all()
    assert batch["image_grid_thw"].shape == (2, 3)
    model = AutoModelForImageTextToText.from_pretrained(STUDENT, dtype="float32").eval()
    with torch.no_grad():
        together = model(**{k: v for k, v in batch.items() if k not in ("labels", "samples")}).logits[0, :short]
        alone = collated(samples[:1], processor)
        inputs = {name: value for name, value in alone.items() if name not in ("labels", "samples")}
        assert close(together, model(**inputs).logits[0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "the file is empty"),
        ("[]", "contains no samples"),
        ('{"a": 1}', "contains no samples"),
        ('[{"id": 1, "image": "a.png"}]', "record 0: missing 'conversations'"),
        ('[{"id": 1, "image": "a.png", "conversations": []}]', "must alternate"),
        ('[{"id": 1, "image": "a.png", "conversations": [{"from": "gpt", "value": "x"}]}]', "must alternate"),
        (json.dumps([train_record(1, "a.png", "q", " ")]), "an answer is empty"),
        (json.dumps([train_record(1, "gone.png", "q", "x")]), "record 0, and all others: none can be used"),
        (json.dumps([train_record(1, "a.png", "q", "x"), train_record(2, "a.png", "q", 2013)]), "record 1: .* string"),
        (json.dumps([train_record(1, "a.png", "q <image>", "x")]), "record 0: 1 images, but 2 <image>"),
        (json.dumps([{**train_record(1, "a.png", "q", "x"), "image": ["a.png", "b.png"]}]), "2 images, but 1 <image>"),
        (json.dumps([{**train_record(1, "a.png", "q", "x"), "image": [3]}]), "neither a path nor a list"),
        (
            json.dumps([train_record(1, "a.png", "q", "<image>")]),
            "record 0: <image> is in a turn that is not the user's",
        ),
    ],
)
def test_a_bad_train_file_is_refused_with_record_and_remedy(tmp_path, processor, content, says):
    write_records(tmp_path)
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(InputError, match=says) as error:
        checked(data.read_samples([str(tmp_path / "train.json")], str(tmp_path)), processor)
    assert "train.json" in str(error.value)


def test_images_that_have_moved_are_found_by_the_map(tmp_path):
    path = write_records(tmp_path, train_record(1, "/workspace/data/a.png", "q", "x"))
    (sample,) = data.read_samples([path], path_map=["/workspace/data/=" + str(tmp_path)])
    assert sample["images"] == [str(tmp_path / "a.png")]
    with pytest.raises(InputError, match="expected OLD=NEW"):
        data.read_samples([path], path_map=["/workspace/data"])


def test_a_sample_with_a_bad_image_is_left_out_and_named(tmp_path, processor, capsys):
    path = write_records(tmp_path, train_record(1, "a.png", "q", "x"), train_record(2, "bad.png", "q", "x"))
    (tmp_path / "bad.png").write_bytes(b"x")
    assert [s["id"] for s in checked(data.read_samples([path], str(tmp_path)), processor).samples] == [1]
    assert "id 2" in capsys.readouterr().out
    Image.new("RGB", (2, 900)).save(tmp_path / "bad.png")  # which Qwen's processor refuses
    assert [s["id"] for s in checked(data.read_samples([path], str(tmp_path)), processor).samples] == [1]
    assert "aspect ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "frozen"),
    [("freeze_vision_tower", "visual.blocks"), ("freeze_merger", "merger"), ("freeze_llm", "language_model")],
)
def test_a_freeze_flag_freezes_its_part_and_no_other(flag, frozen):
    model = AutoModelForImageTextToText.from_pretrained(STUDENT, dtype="float32")
    param_groups.freeze(model, params.ModelArguments(model_id="", **{flag: True}))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("visual.blocks", "merger", "language_model")):
            assert parameter.requires_grad is (frozen not in name), name


def test_a_model_that_cannot_be_loaded_is_named():
    arguments = params.ModelArguments(model_id="/no/such/model")
    data_arguments = params.DataArguments(data_path=[])
    with pytest.raises(InputError, match="/no/such/model: no such folder, and no valid hub id"):
        model_loading.load_processor(arguments, data_arguments)
    with pytest.raises(InputError, match="/no/such/model: no such folder, and no valid hub id"):
        model_loading.load_model(arguments, params.TrainingArguments(output_dir="", use_cpu=True))
    arguments.model_id = str(STUDENT)
    processor = model_loading.load_processor(arguments, data_arguments)
    assert processor.image_processor.size["shortest_edge"] == 128 * 28 * 28
