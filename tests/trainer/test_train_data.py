"""From a train file to what the model sees: formats, images, labels, padding; and what is refused."""

import json
import re

import model_loading
import params
import pytest
import torch
import train
from collator import Collator
from conftest import STUDENT, close
from PIL import Image
from training import arguments, build, conversation, write, write_records
from transformers import AutoModelForImageTextToText

import data
from mpa.engines import Request
from mpa.engines.hf import HFEngine
from mpa.files.records import InputError, train_record
from mpa.method.prompts import answer_prompt

# --- records -------------------------------------------------------------------------------------------------

QUESTION, ANSWER = "what color is it?", "red"


LLAVA = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]


MESSAGES = [{"role": "user", "content": f"<image>{QUESTION}"}, {"role": "assistant", "content": ANSWER}]


PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
]


def read(tmp_path, content, name="train.json") -> list[dict]:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return data.read_samples([str(tmp_path / name)], "/images")


@pytest.mark.parametrize(
    "record",
    [
        {"id": 1, "image": "a.png", "conversations": LLAVA},
        {"id": 1, "image": ["a.png"], "conversations": LLAVA},
        {"id": 1, "image": {"path": "a.png"}, "conversations": LLAVA},
        {"id": 1, "images": ["a.png"], "conversations": LLAVA},
        {"id": 1, "images": [{"path": "a.png"}], "conversations": LLAVA},
        {"id": 1, "images": ["a.png"], "messages": MESSAGES},
        {"id": 1, "images": ["a.png"], "messages": PARTS},
        {"id": 1, "images": ["a.png"], "messages": [MESSAGES[0] | {"content": QUESTION}, MESSAGES[1]]},
        {
            "id": 1,
            "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, QUESTION]}, MESSAGES[1]],
        },
        {"id": 1, "image": "a.png", "conversations": [LLAVA[0] | {"value": f"<image>\r\n{QUESTION}"}, LLAVA[1]]},
        {
            "id": 1,
            "image": "a.png",
            "conversations": [
                {"from": "user", "value": f"<image>\n{QUESTION}"},
                {"from": "assistant", "value": ANSWER},
            ],
        },
        {
            "id": 1,
            "image": "a.png",
            "conversations": [
                {"role": "user", "content": f"<image>\n{QUESTION}"},
                {"role": "assistant", "content": ANSWER},
            ],
        },
    ],
    ids=range(12),
)
@pytest.mark.parametrize("form", ["list", "lines", "data"])
def test_the_common_forms_give_the_same_sample(tmp_path, record, form):
    content = {
        "list": [record],
        "lines": json.dumps(record) + "\n" + json.dumps(record | {"id": 2}),
        "data": {"data": [record]},
    }
    sample = read(tmp_path, content[form], "train.jsonl" if form == "lines" else "train.json")[0]
    assert sample["images"] == ["/images/a.png"]
    assert sample["messages"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ]


GOOD = {"id": 1, "image": "a.png", "conversations": LLAVA}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        *(
            (GOOD | {"image": image}, "neither a path nor a list of paths")
            for image in (3, True, {"bytes": "x"}, [3], {"path": 3})
        ),
        *((GOOD | {"image": image}, "0 images, but 1 <image>") for image in (None, "", [])),
        (GOOD | {"image": "https://x/a.png"}, "Write the image to a file"),
        (GOOD | {"images": ["a.png"]}, "both 'image' and 'images'"),
        (
            {"id": 1, "images": ["a.png"], "conversations": [LLAVA[0] | {"value": "q"}, LLAVA[1]]},
            "1 images, but 0 <image>",
        ),
        (GOOD | {"video": "a.mp4"}, "training on 'video' is not supported"),
        (GOOD | {"videos": ["a.mp4"]}, "training on 'videos' is not supported"),
        ({"id": 1, "messages": [{"role": "tool", "content": "x"}, MESSAGES[1]]}, "a turn of 'tool'"),
        (
            {"id": 1, "messages": [{"role": "user", "content": [{"type": "video"}]}, MESSAGES[1]]},
            "a part of type 'video'",
        ),
        (GOOD | {"conversations": [LLAVA[0], {"from": "gpt", "value": "\ud800"}]}, "half of a surrogate pair"),
        (GOOD | {"id": {"a": 1}}, "'id' should be text or a whole number"),
        (GOOD | {"id": float("inf")}, "'id' is inf, which is no number of JSON"),
        (GOOD | {"id": True}, "'id' should be text or a whole number"),
        ({"id": 1, "image": "a.png"}, "missing 'conversations'"),
        (GOOD | {"conversations": {}}, "conversations should be a list of turns"),
        (GOOD | {"conversations": ["a", "b"]}, "a turn should be an object"),
        ("x", "expected an object"),
        (GOOD | {"conversations": []}, "must alternate"),
        (GOOD | {"conversations": LLAVA[1:]}, "must alternate"),
        (GOOD | {"conversations": [LLAVA[0], {"from": "gpt", "value": " "}]}, "an answer is empty"),
        (GOOD | {"conversations": [LLAVA[0], {"from": "gpt", "value": 2013}]}, "write it as a string"),
        (GOOD | {"conversations": [LLAVA[0], {"from": "gpt", "value": "<image>"}]}, "a turn that is not the user's"),
        (GOOD | {"image": ["a.png", "b.png"]}, "2 images, but 1 <image>"),
    ],
)
def test_the_rest_is_refused_with_its_record(tmp_path, record, says):
    with pytest.raises(InputError) as error:
        read(tmp_path, [GOOD, record])
    assert re.search(r"train\.json, record 1[,:] ", str(error.value)) and says in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"\xff\xfe\x00",
        b'[{"id": ' + b"1" * 5000 + b"}]",
        b"",
        b"null",
        b"3",
        b'{"a": 1}',
        b"[]",
        b"{}\n{",
    ],
    ids=["deep", "no UTF-8", "long number", "empty", "null", "3", "object", "none", "torn"],
)
def test_a_file_that_is_no_train_file_is_named(tmp_path, content):
    with pytest.raises(InputError, match=r"train\.json"):
        read(tmp_path, content)


def test_a_share_that_drops_a_file_is_refused_and_counts_are_said(tmp_path, capsys):
    for name, n in (("a", 10), ("b", 10)):
        (tmp_path / f"{name}.json").write_text(json.dumps([GOOD | {"id": f"{name}{i}"} for i in range(n)]))
    with pytest.raises(InputError, match=r"b\.json:0\.001: of its 10 samples none would be drawn"):
        data.read_samples([f"{tmp_path}/a.json:0.999", f"{tmp_path}/b.json:0.001"])
    data.read_samples([f"{tmp_path}/a.json:0.5", f"{tmp_path}/b.json:0.1"])
    said = capsys.readouterr().out
    assert "a.json: 10 samples read, 10 used, 10 of them with images" in said
    assert "b.json: 10 samples read, 2 used" in said


def test_files_with_shares_are_mixed_in_these_shares_and_one_is_used_whole(tmp_path):
    for name, n in (("a", 90), ("b:0.5", 40)):
        records = [{**conversation(None, "q", "x"), "id": f"{name}{i}"} for i in range(n)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    chosen = data.read_samples([f"{tmp_path}/a.json:0.9", f"{tmp_path}/b:0.5.json:0.1"])
    ids = [sample["id"] for sample in chosen]
    assert (sum(i[0] == "a" for i in ids), len(ids), len(set(ids))) == (90, 100, 100)
    assert len(data.read_samples([f"{tmp_path}/a.json", f"{tmp_path}/b:0.5.json"])) == 130
    with pytest.raises(InputError, match="give each file a share"):
        data.read_samples([f"{tmp_path}/a.json:0.9", f"{tmp_path}/b:0.5.json"])


# --- samples and labels --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor():
    return model_loading.load_processor(
        params.ModelArguments(model_id=str(STUDENT)),
        params.DataArguments(data_path=[], image_min_pixels=3136, image_max_pixels=3136),
    )


def checked(samples: list[dict], processor) -> data.Samples:
    return data.check_all(samples, processor, 1000, "error")


def encoded(folder, processor, record: dict) -> dict:
    """A record's sample, encoded; its images are in the folder."""
    (folder / "one.json").write_text(json.dumps([record]))
    return data.encode(data.read_samples([str(folder / "one.json")], str(folder))[0], processor)


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


def test_images_of_one_or_several_turns_stand_where_their_marks_are(tmp_path, processor):
    write(tmp_path, 4)
    both = encoded(tmp_path, processor, conversation(["0.png", "1.png"], "<image>\n<image>\nsame?", "no"))
    apart = encoded(
        tmp_path, processor, conversation(["0.png", "1.png"], "<image>\nwhat?", "red", "and <image>?", "blue")
    )
    assert both["image_grid_thw"].shape == apart["image_grid_thw"].shape == (2, 3)
    assert torch.equal(both["pixel_values"], apart["pixel_values"])
    text = processor.tokenizer.decode(apart["input_ids"])
    assert text.count("<|vision_start|>") == 2
    assert text.index("red<|im_end|>") < text.rindex("<|vision_start|>") < text.index("blue<|im_end|>")
    assert processor.tokenizer.decode(apart["labels"][apart["labels"] != data.IGNORE]) == "red<|im_end|>blue<|im_end|>"


def test_a_sample_may_have_no_image_and_a_system_text(tmp_path, processor):
    record = conversation(None, "is red a color?", "yes")
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    sample = encoded(tmp_path, processor, record)
    assert set(sample) == {"input_ids", "labels"}
    assert processor.tokenizer.decode(sample["input_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_images_that_have_moved_are_found_by_the_map(tmp_path):
    path = write_records(tmp_path, train_record(1, "/workspace/data/a.png", "q", "x"))
    (sample,) = data.read_samples([path], path_map=["/workspace/data/=" + str(tmp_path)])
    assert sample["images"] == [str(tmp_path / "a.png")]
    with pytest.raises(InputError, match="expected OLD=NEW"):
        data.read_samples([path], path_map=["/workspace/data"])


def test_a_file_none_of_whose_images_can_be_read_is_refused(tmp_path, processor):
    path = write_records(tmp_path, train_record(1, "gone.png", "q", "x"))
    with pytest.raises(InputError, match=r"train\.json, record 0, and all others: none can be used"):
        checked(data.read_samples([path], str(tmp_path)), processor)


def test_a_sample_with_a_bad_image_is_left_out_and_named(tmp_path, processor, capsys):
    path = write_records(tmp_path, train_record(1, "a.png", "q", "x"), train_record(2, "bad.png", "q", "x"))
    (tmp_path / "bad.png").write_bytes(b"x")
    assert [s["id"] for s in checked(data.read_samples([path], str(tmp_path)), processor).samples] == [1]
    assert "id 2" in capsys.readouterr().out
    Image.new("RGB", (2, 900)).save(tmp_path / "bad.png")  # which Qwen's processor refuses
    assert [s["id"] for s in checked(data.read_samples([path], str(tmp_path)), processor).samples] == [1]
    assert "aspect ratio" in capsys.readouterr().out


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


def test_a_sample_that_is_too_long_is_named_before_training_or_dropped(tmp_path, capsys):
    write(tmp_path, 4)
    with pytest.raises(InputError, match=r"train.json, record 3: .* of which \d are visual, .* 36\. Lower"):
        train.main(arguments(tmp_path, "--max_seq_length", "36"))
    trainer = build(tmp_path, "--max_seq_length", "36", "--on_too_long", "drop")
    assert [sample["id"] for sample in trainer.train_dataset.samples] == ["s0", "s1", "s2"]
    assert "1 of 4 samples left out" in capsys.readouterr().out


def test_samples_that_workers_check_are_encoded_on_access(tmp_path, processor):
    samples = data.read_samples([str(write(tmp_path, 2))], str(tmp_path)) * 50
    checked = data.check_all(samples, processor, 1000, "error", workers=1)
    made = data.encode(samples[1], processor) | {"sample": "s1"}
    assert checked[99].keys() == made.keys()
    assert all(name == "sample" or torch.equal(checked[99][name], made[name]) for name in made)
    assert checked.lengths[99] == len(made["input_ids"]) > checked.visual_lengths[99] > 0


@pytest.mark.parametrize(
    ("question", "answer", "token"),
    [("q", "red<|im_end|>blue", "<|im_end|>"), ("is <|image_pad|> there?", "x", "<|image_pad|>")],
)
def test_text_with_a_special_token_is_refused_with_its_record_before_training(tmp_path, question, answer, token):
    write_records(tmp_path, train_record(1, "a.png", "q <b> |", "x"), train_record(2, "a.png", question, answer))
    with pytest.raises(InputError) as error:
        train.main(arguments(tmp_path))
    assert f"train.json, record 1: {token} is a special token" in str(error.value)
    assert not (tmp_path / "out").exists()
