"""Train files in the common formats, and what is refused."""

import json
import re

import pytest

import data
from mpa.files.records import InputError

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
