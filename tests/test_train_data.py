"""Train files in the common formats, what is refused, and the checks of the flags."""

import json
from dataclasses import fields

import flags
import params
import pytest
import transformers
from conftest import STUDENT
from record_formats import DataError
from training import MINI

import data

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
        (GOOD | {"id": float("inf")}, "'id' should be text or a whole number"),
        (GOOD | {"id": True}, "'id' should be text or a whole number"),
        ({"id": 1, "image": "a.png"}, "missing 'conversations'"),
        (GOOD | {"conversations": {}}, "conversations should be a list of turns"),
        (GOOD | {"conversations": ["a", "b"]}, "a turn should be an object"),
        ("x", "expected an object"),
    ],
)
def test_the_rest_is_refused_with_its_record(tmp_path, record, says):
    with pytest.raises(DataError) as error:
        read(tmp_path, [GOOD, record])
    assert "train.json, record 1: " in str(error.value) and says in str(error.value)


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
    with pytest.raises(DataError, match=r"train\.json"):
        read(tmp_path, content)


def test_a_share_that_drops_a_file_is_refused_and_counts_are_said(tmp_path, capsys):
    for name, n in (("a", 10), ("b", 10)):
        (tmp_path / f"{name}.json").write_text(json.dumps([GOOD | {"id": f"{name}{i}"} for i in range(n)]))
    with pytest.raises(DataError, match=r"b\.json:0\.001: of its 10 samples none would be drawn"):
        data.read_samples([f"{tmp_path}/a.json:0.999", f"{tmp_path}/b.json:0.001"])
    data.read_samples([f"{tmp_path}/a.json:0.5", f"{tmp_path}/b.json:0.1"])
    said = capsys.readouterr().out
    assert "a.json: 10 samples read, 10 used, 10 of them with images" in said
    assert "b.json: 10 samples read, 2 used" in said


# --- flags --------------------------------------------------------------------------------------------------


def test_every_argument_of_transformers_is_decided_on():
    """If a new release of transformers adds an argument, put it into HONOURED or REFUSED."""
    names = {field.name for field in fields(transformers.TrainingArguments)}
    assert names == flags.HONOURED | set(flags.REFUSED) and not flags.HONOURED & set(flags.REFUSED)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--load_best True --eval_data_path x --save_strategy no", "--save_strategy no leaves no checkpoint"),
        ("--fp16 True", "--fp16: needs a GPU"),
        ("--dataloader_drop_last True", "Every sample is trained on"),
        ("--train_sampling_strategy group_by_length", "give random or sequential"),
        ("--remove_unused_columns True", "must be False"),
        *(
            (f"--{name} -1", f"--{name} -1")
            for name in ("batch_tokens", "cache_gb", "learning_rate", "max_grad_norm", "seed")
        ),
        *(
            (f"--{name} 0", f"--{name} 0")
            for name in ("max_steps", "num_train_epochs", "gradient_accumulation_steps", "save_steps")
        ),
        *(
            (f"--{name} 0", f"--{name} 0")
            for name in ("save_total_limit", "max_seq_length", "per_device_train_batch_size")
        ),
        *((f"--learning_rate {value}", "--learning_rate") for value in ("nan", "inf", "abc")),
        ("--warmup_ratio 1.5", "--warmup_ratio 1.5: a share of all steps"),
        ("--warmup_steps -3", "warmup_steps"),
        ("--nonsense 1", "--nonsense: no such flag"),
        ("--learnin_rate 1", "did you mean --learning_rate?"),
        ("--bits 4", "--bits: Quantised training is not supported"),
        ("--report_to wandb", "pip install wandb"),
        ("--report_to nowhere", "known are none, tensorboard"),
        ("--optim adamax_torch", "invalid choice: 'adamax_torch'"),
        ("--lr_scheduler_type steep", "steep"),
        ("--lora_enable True --lora_rank 0", "--lora_rank 0"),
        ("--lora_enable True --lora_dropout 1.5", "--lora_dropout 1.5"),
        ("--lora_enable True --num_lora_modules 0", "--num_lora_modules 0"),
        ("--image_min_pixels 9000 --image_max_pixels 5000", "is more than"),
        ("--eval_strategy steps", "needs --eval_data_path"),
        ("--push_to_hub True", "Nothing is uploaded"),
        ("--torch_compile True", "is not supported"),
        ("--fsdp full_shard", "Use --deepspeed"),
        ("--deepspeed nowhere.json", "nowhere.json"),
        ("--auto_find_batch_size True", "--batch_tokens"),
        ("--load_best_model_at_end True", "load_best_model_at_end"),
        ("--save_dtype int8", "invalid choice: 'int8'"),
    ],
)
def test_a_flag_without_sense_is_one_line_with_the_remedy(tmp_path, given, says):
    paths = ["--model_id", str(STUDENT), "--data_path", "x.json", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(DataError) as error:
        params.parse([*paths, *MINI[:2], *given.split()])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="is a file; name a folder"):
        params.parse(
            [
                "--model_id",
                str(STUDENT),
                "--data_path",
                "x.json",
                "--output_dir",
                str(tmp_path / "out"),
                "--use_cpu",
                "True",
            ]
        )
