"""What prepare makes of copies in Hugging Face's form."""

import hashlib
from pathlib import Path

import pytest
from downloads import (
    drawings,
    parquet,
    prepare,
    samples_of,
)

from mpa.files.records import InputError, read_json


def test_copies_of_hugging_face_data_sets_give_the_same_files(tmp_path, prepared):
    """As lmms-lab and HuggingFaceM4 publish them: shards by split, embedded images, different column names."""
    source = tmp_path / "hf"
    rows = {"train": [], "validation": []}
    for part, name in (("train", "train"), ("test", "validation")):
        for (image, asked), _ in zip(drawings(part), range(6), strict=False):
            for question, answer in asked[:2]:
                ids = {"question_id": len(rows[name]), "image_id": hashlib.md5(image).hexdigest()[:16]}
                rows[name].append(ids | {"question": question, "answers": [answer] * 10, "image": image})
        parquet(source / f"textvqa/data/{name}-00000-of-00001.parquet", rows[name])
    prepare.main(
        ["textVQA", "--source", str(source / "textvqa"), "--source-format", "hf", "--data", str(tmp_path / "t")]
    )
    ours, theirs = (samples_of(folders, "textVQA", "train") for folders in ({"textVQA": tmp_path / "t"}, prepared))
    assert [Path(s.image_path).read_bytes() for s in ours] == [Path(s.image_path).read_bytes() for s in theirs[:6]]
    assert [(s.question, s.answers) for s in ours] == [(s.question, s.answers) for s in theirs[:6]]

    charts = [
        {"query": r["question"], "label": r["answers"][:1], "human_or_machine": i % 2, "image": r["image"]}
        for i, r in enumerate(rows["validation"])
    ]
    parquet(source / "chartqa/data/test-00000-of-00001.parquet", charts)
    prepare.main(
        ["chartVQA", "--source", str(source / "chartqa"), "--source-format", "hf", "--data", str(tmp_path / "c")]
    )
    test = samples_of({"chartVQA": tmp_path / "c"}, "chartVQA", "test")
    assert [s.more["type"] for s in test[:2]] == ["human", "augmented"]
    assert len({s.image_path for s in test}) == 6

    knowledge = [
        {
            "question_id": str(10 * (i // 2) + 5 + i % 2),
            "question": r["question"],
            "answers": r["answers"],
            "image": r["image"],
        }
        for i, r in enumerate(rows["validation"])
    ]
    parquet(source / "okvqa/data/val2014-00000-of-00001.parquet", knowledge)
    prepare.main(["okVQA", "--source", str(source / "okvqa"), "--source-format", "hf", "--data", str(tmp_path / "o")])
    test = samples_of({"okVQA": tmp_path / "o"}, "okVQA", "test")
    assert test[2].image_path.endswith("COCO_val2014_000000000001.jpg")
    assert test[2].question_id == 15

    parquet(source / "stvqa/data/train-00000-of-00001.parquet", [{**r, "path": "a/../../x.jpg"} for r in rows["train"]])
    with pytest.raises(InputError, match="outside the image root"):
        prepare.main(
            ["stVQA", "--source", str(source / "stvqa"), "--source-format", "hf", "--data", str(tmp_path / "s")]
        )


def test_rows_of_other_shapes_are_read_or_named(tmp_path, capsys):
    image, asked = next(drawings("train"))
    row = {"question_id": 15, "question": asked[0][0], "image": image}
    answers = [{"answer": "race", "raw_answer": "racing", "answer_id": i} for i in range(10)]
    parquet(tmp_path / "a/default/val2014/0000.parquet", [{**row, "answers": answers}])
    arguments = ["okVQA", "--source-format", "hf", "--data", str(tmp_path / "data"), "--source"]
    prepare.main([*arguments, str(tmp_path / "a")])
    (record,) = read_json(tmp_path / "data/OKVQA/okvqa_val_combine.json")
    assert (record["answers"][0], record["raw_answers"][0]) == ("race", "racing")

    parquet(tmp_path / "b/data/val-0.parquet", [{**row, "answers": []}])
    with pytest.raises(InputError, match="no files of okVQA"):
        prepare.main([*arguments, str(tmp_path / "b")])
    assert "1 questions of the test part have no answers" in capsys.readouterr().out
    parquet(tmp_path / "c/data/val-0.parquet", [{**row, "answers": ["x"], "image": None}])
    with pytest.raises(InputError, match="row 0: has no image"):
        prepare.main([*arguments, str(tmp_path / "c")])
    parquet(tmp_path / "d/data/0.parquet", [{**row, "answers": ["x"]}])
    with pytest.raises(InputError, match="has the name of a split"):
        prepare.main([*arguments, str(tmp_path / "d")])
