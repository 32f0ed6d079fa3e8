"""What prepare makes of each official download in miniature, and the four stages on that."""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, STUDENT, TEACHER, bash
from downloads import (
    LAYOUTS,
    NAMES,
    N,
    chartqa,
    drawings,
    listing,
    parquet,
    prepare,
    prepared_from,
    stvqa,
    textvqa,
    write,
    zipped,
)
from PIL import Image

from mpa.datasets import DATASETS, okvqa
from mpa.datasets.loading import load_samples
from mpa.records import InputError, read_json, read_records

REFERENCE = ROOT.parent / "shared/reference/annotations"
FILES = {
    "textVQA": [
        "TextVQA_0.5.1_unique_train.json",
        "TextVQA_0.5.1_val.json",
        "qwenTrainFormat_eval.json",
        "qwenTrainFormat_train.json",
    ],
    "stVQA": [
        *("QwenTrainFormat_train_task_1_onePerImage_eval.json", "QwenTrainFormat_train_task_1_onePerImage_train.json"),
        *("train_task_1_onePerImage_train.json", "train_task_1_onePerImage_val.json"),
    ],
    "chartVQA": [
        *("test_combined.json", "train_onePerImage.json"),
        *("train_onePerImage_QwenFormat_eval.json", "train_onePerImage_QwenFormat_train.json"),
    ],
    "okVQA": [
        "okvqa_QwenFormat_eval.json",
        "okvqa_QwenFormat_train.json",
        "okvqa_train_unique_combine.json",
        "okvqa_val_combine.json",
    ],
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """{dataset: data folder}, each prepared from its download in miniature."""
    folders = {}
    for name, layout in LAYOUTS.items():
        source = tmp_path_factory.mktemp(f"{name}-download")
        layout(source)
        folders[name] = tmp_path_factory.mktemp(f"{name}-data")
        prepare.main([name, "--source", str(source), "--data", str(folders[name])])
    return folders


def folder_of(prepared, name) -> Path:
    return prepared[name] / DATASETS[name].preparation.folder


def samples_of(prepared, name, split):
    where = getattr(DATASETS[name], split)
    return load_samples(name, split, prepared[name] / where.annotations, prepared[name] / where.images)


@pytest.mark.parametrize("name", NAMES)
def test_the_released_file_names_come_out_and_read_back_with_their_images(prepared, name):
    assert sorted(p.name for p in folder_of(prepared, name).glob("*.json")) == FILES[name]
    train, test = samples_of(prepared, name, "train"), samples_of(prepared, name, "test")
    assert len({s.image_path for s in train}) in (N, int(0.85 * (N + N // 3)))
    assert all(Image.open(s.image_path).size == (64, 64) for s in [*train, *test])
    assert not {s.image_path for s in train} & {s.image_path for s in test}
    if name != "okVQA":
        assert len({s.image_path for s in train}) == len(train)
    for file in (f for f in FILES[name] if "ormat" in f):
        records = read_records(folder_of(prepared, name) / file, "train")
        assert all(Path(r["image"]).exists() for r in records)
        assert all(r["conversations"][0]["value"].endswith("single word or phrase.") for r in records)


@pytest.mark.parametrize("name", ["textVQA", "stVQA", "okVQA"])
def test_the_split_is_by_image_and_85_to_15(prepared, name):
    train, val = (
        read_json(folder_of(prepared, name) / file)
        for part in ("train", "eval")
        for file in FILES[name]
        if "ormat" in file and file.endswith(f"{part}.json")
    )
    images = [{r["image"] for r in part} for part in (train, val)]
    assert not images[0] & images[1]
    assert len(images[0]) == int(0.85 * len(images[0] | images[1]))


def test_okvqa_keeps_the_stemmed_answers_and_the_raw_ones_beside(prepared):
    (sample, *_) = samples_of(prepared, "okVQA", "test")
    assert sample.answers == [a[:5] for a in sample.more["raw_answers"]]
    train = read_json(folder_of(prepared, "okVQA") / "okvqa_train_unique_combine.json")
    assert [len(r["qas"]) for r in train] == [2] + [1] * (N - 1)


def test_chartqa_says_who_asked_and_keeps_the_parts_images_apart(prepared):
    test = samples_of(prepared, "chartVQA", "test")
    assert {s.more["type"] for s in test} == {"human", "augmented"}
    train = samples_of(prepared, "chartVQA", "train")
    assert Path(train[0].image_path).name == Path(test[0].image_path).name
    assert Path(train[0].image_path).read_bytes() != Path(test[0].image_path).read_bytes()


def test_a_second_call_changes_nothing_and_a_file_that_differs_is_not_overwritten(tmp_path, capsys):
    textvqa(tmp_path)
    arguments = ["textVQA", "--source", str(tmp_path), "--data", str(tmp_path / "data")]
    prepare.main(arguments)
    (tmp_path / "data/TextVQA/qwenTrainFormat_eval.json").unlink()  # as if it had been killed
    next((tmp_path / "data/TextVQA/train_images").iterdir()).unlink()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*") if p.is_file()}
    prepare.main(arguments)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert len(list((tmp_path / "data/TextVQA").glob("*.json"))) == 4
    assert len(list((tmp_path / "data/TextVQA/train_images").iterdir())) == N + N // 3
    with pytest.raises(InputError, match="is there already and differs"):
        prepare.main([*arguments, "--seed", "1"])
    assert {p: p.stat().st_mtime_ns for p in times} == times


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_download_says_what_was_expected(tmp_path, name):
    with pytest.raises(InputError, match=f"nothing of {name} in it. Expected .*train"):
        prepare.main([name, "--source", str(tmp_path), "--data", str(tmp_path / "data")])
    with pytest.raises(InputError, match="no such folder"):
        prepare.main([name, "--source", str(tmp_path / "none")])
    (tmp_path / "x.zip").write_bytes(b"PK but cut off")
    with pytest.raises(InputError, match=r"Not opened: .*x\.zip"):
        prepare.main([name, "--source", str(tmp_path), "--data", str(tmp_path / "data")])


def test_copies_of_hugging_face_data_sets_give_the_same_files(tmp_path, prepared):
    """As lmms-lab and HuggingFaceM4 publish them: shards by split, the images inside, columns of their own."""
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


def test_check_names_what_is_broken_and_fails_when_samples_would_be_lost(tmp_path, capsys):
    chartqa(tmp_path)
    arguments = ["--data", str(tmp_path / "data")]
    prepare.main(["chartVQA", "--source", str(tmp_path), *arguments])
    prepare.main(["check", "chartVQA", *arguments])
    said = capsys.readouterr().out
    assert f"{N} questions about {N} images" in said
    assert "visual tokens of Qwen2-VL 144 to 144 an image" in said
    assert "All is well." in said
    images = tmp_path / "ChartQA Dataset/test/png"
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"")
    Image.new("RGB", (2, 900)).save(images / "3.png")
    shutil.copy(images / "4.png", images / "5.png")
    with pytest.raises(SystemExit) as ended:
        prepare.main(["check", "chartVQA", *arguments])
    said = capsys.readouterr().out
    assert "6 samples would be lost and 0 files are missing" in str(ended.value)
    for words in (
        "1.png: no such file",
        "2.png: cannot be read (not an image",
        "3.png: the processor refuses it",
        "copies of others",
    ):
        assert words in said


def test_a_folder_of_ones_own_images_is_checked(images, capsys):
    prepare.main(["check", "images", "--image-root", str(images)])
    assert "12 questions about 12 images" in capsys.readouterr().out


def test_one_question_per_image_and_splits_by_image_have_the_released_counts():
    """On the released annotation files themselves. Which images fall on which side is theirs alone: no seed is published."""
    if not REFERENCE.is_dir():
        pytest.skip("the released annotation files are not here")
    records = [
        {"image_id": r["image_id"], **qa}
        for r in read_json(REFERENCE / "okvqa_train_unique_combine.json")
        for qa in r["qas"]
    ]
    files = okvqa.files({"train": records, "test": read_json(REFERENCE / "okvqa_val_combine.json")}, 0)
    train, val = (files[f"okvqa_QwenFormat_{part}.json"] for part in ("train", "eval"))
    assert {len({r["image_id"] for r in part}) for part in (train, val)} == {7648, 1350}
    assert files["okvqa_train_unique_combine.json"] == read_json(REFERENCE / "okvqa_train_unique_combine.json")
    theirs = [read_json(REFERENCE / f"okvqa_QwenFormat_{part}.json") for part in ("train", "eval")]
    assert [len(part) for part in theirs] == [7659, 1350]
    assert {r["id"] for part in theirs for r in part} == {r["question_id"] for r in records}
    for name, split in (("okVQA", "train"), ("okVQA", "test"), ("chartVQA", "train"), ("chartVQA", "test")):
        file = Path(getattr(DATASETS[name], split).annotations).name
        expected = DATASETS[name].preparation.expected[file]
        reference = REFERENCE / (file if name == "okVQA" else f"chartqa_{file}")
        samples = load_samples(name, split, reference, "/", images=False)
        assert prepare.count(samples) == expected


def test_easy_vqa_needs_no_download_and_keeps_the_ids_that_pa_has(tmp_path, capsys):
    prepare.main(["easyVQA", "--data", str(tmp_path)])
    assert "differs" not in capsys.readouterr().out
    ids = {s.question_id: s.image_path for s in load_samples("easyVQA", "train")}
    files = [read_json(tmp_path / f"EasyVQA/easyvqa_QwenFormat_{part}.json") for part in ("train", "eval")]
    assert {r["id"]: r["image"] for part in files for r in part} == ids


@pytest.mark.slow
def test_from_the_download_to_the_levelled_model_on_each_of_the_four(prepared, tmp_path):
    def run(name: str):
        settings = {"MIN_PIXELS": 3136, "MAX_PIXELS": 3136, "DTYPE": "float32", "BATCH_SIZE": 16, "ACCUMULATION": 1}
        settings |= {"LVLM": TEACHER, "SVLM": STUDENT, "DATASET": name, "RUN": f"{tmp_path}/{name}"}
        flags = {"PA_FLAGS": "--temperature 1 --task general", "EVALUATE_FLAGS": "--log-samples"}
        return bash("scripts/mpa.sh", MPA_DATA=prepared[name], **settings, **flags)

    for name in NAMES:
        prepare.main(["check", name, "--data", str(prepared[name])])
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(NAMES, pool.map(run, NAMES), strict=True))
    for name, done in results.items():
        assert done.returncode == 0, done.stderr[-3000:]
        folder = tmp_path / name
        summary = read_json(folder / "summary.json")
        assert set(summary["rows"]) == {"base", "mpa", "lvlm"}
        assert summary["funnel"]["parity"] > 0
        files = [file for file in folder.glob("*_*.json") if not file.name.endswith(".meta.json")]
        read_back = {}
        for file in files:
            kind = "train" if "_train_" in file.name else file.name.split("_")[0]
            read_back.setdefault(kind, []).append(read_records(file, kind))
        assert {kind: len(found) for kind, found in read_back.items()} == {"PA": 1, "PI": 2, "train": 1, "Eval": 3}
        assert {len(found) for found in read_back["Eval"]} == {len(samples_of(prepared, name, "test"))}
        assert len(list(folder.glob("lmms-eval/*/samples_*.jsonl"))) == 3


def test_images_in_several_places_come_together_and_the_download_stays_as_it_was(tmp_path):
    """One folder plain, one in an archive, one elsewhere behind a link."""
    source = tmp_path / "süß and odd"
    stvqa(source)
    zipped(source / "train/vizwiz", source / "vizwiz.ZIP")
    (source / "elsewhere").mkdir()
    shutil.move(source / "train/iiit_text", tmp_path / "disk")
    (source / "elsewhere/iiit_text").symlink_to(tmp_path / "disk")
    before = listing(source)
    for _ in range(2):
        folder = prepared_from(source, "stVQA", tmp_path)
        assert listing(source) == before
        assert len(listing(folder / "train/data")) == N + N // 3
    prepare.main(["check", "stVQA", "--data", str(tmp_path / "data")])


def test_a_download_that_has_moved_or_lies_in_the_data_folder_itself_is_taken(tmp_path):
    chartqa(tmp_path / "a")
    prepared_from(tmp_path / "a", "chartVQA", tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    prepared_from(tmp_path / "b", "chartVQA", tmp_path)
    prepare.main(["check", "chartVQA", "--data", str(tmp_path / "data")])

    place = tmp_path / "data/TextVQA"
    place.mkdir()
    textvqa(place)
    official = (place / "TextVQA_0.5.1_val.json").read_bytes()
    prepared_from(place, "textVQA", tmp_path)
    assert (place / "TextVQA_0.5.1_val.json").read_bytes() == official
    prepare.main(["check", "textVQA", "--data", str(tmp_path / "data")])


def test_per_image_that_was_cut_off_is_unpacked_again(tmp_path):
    textvqa(tmp_path / "a")
    folder = prepared_from(tmp_path / "a", "textVQA", tmp_path)
    cut = next((folder / "train_images").iterdir())
    cut.write_bytes(b"")
    prepared_from(tmp_path / "a", "textVQA", tmp_path)
    assert cut.stat().st_size > 100


@pytest.mark.parametrize("path", ["../../../secret.jpg", "/etc/secret.jpg", "a/../../../b.jpg"])
def test_per_image_outside_the_image_root_is_refused_before_anything_is_written(tmp_path, path):
    stvqa(tmp_path / "a")
    document = read_json(tmp_path / "a/train_task_1.json")
    document["data"][5]["file_path"] = path
    write(tmp_path / "a/train_task_1.json", document)
    with pytest.raises(InputError, match=r"record 5: image .* lies outside the image root"):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)
    assert not (tmp_path / "data").exists()


def edited(content: dict, change) -> dict:
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["data"][3].pop("answers"), "record 3: .*no field 'answers'"),
        (lambda d: d["data"][3].update(answers=[{"answer": "x"}]), "record 3: .*should be a list of text"),
        (lambda d: d["data"][3].update(question=None), "record 3: .*'question' should be text"),
        (lambda d: d["data"][3].update(question_id=2), "records 2 and 3 have the same id"),
        (lambda d: d.pop("data"), "no field 'data' in it; is it the official file"),
        (lambda d: d.update(data=[1]), "expected a list of records"),
    ],
)
def test_a_bad_official_file_is_named_with_its_record(tmp_path, change, says):
    stvqa(tmp_path / "a")
    write(tmp_path / "a/train_task_1.json", edited(read_json(tmp_path / "a/train_task_1.json"), change))
    with pytest.raises(InputError, match=says):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)


def test_a_part_of_which_half_is_missing_is_named(tmp_path):
    chartqa(tmp_path / "a")
    (tmp_path / "a/ChartQA Dataset/train/train_human.json").unlink()
    with pytest.raises(InputError, match=r"train/train_human.json is not in it, but train/train_augmented.json is"):
        prepared_from(tmp_path / "a", "chartVQA", tmp_path)


def test_missing_images_end_in_an_error_with_the_files_written_and_archives_named(tmp_path):
    stvqa(tmp_path / "a")
    shutil.rmtree(tmp_path / "a/train")
    (tmp_path / "a/images.tar.gz").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"32 images are not below .* not opened: .*images.tar.gz"):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)
    assert len(list((tmp_path / "data/STVQA").glob("*.json"))) == 4


def test_check_looks_at_every_file_that_was_written(tmp_path, capsys):
    chartqa(tmp_path / "a")
    folder = prepared_from(tmp_path / "a", "chartVQA", tmp_path)
    next((tmp_path / "a/ChartQA Dataset/val/png").iterdir()).write_bytes(b"x")
    with pytest.raises(SystemExit, match="1 samples would be lost"):
        prepare.main(["check", "chartVQA", "--data", str(tmp_path / "data")])
    (folder / "train_onePerImage_QwenFormat_eval.json").write_text("{broken")
    with pytest.raises(InputError, match="not JSON"):
        prepare.main(["check", "chartVQA", "--data", str(tmp_path / "data")])
    (folder / "test_combined.json").unlink()
    (folder / "train_onePerImage_QwenFormat_eval.json").unlink()
    with pytest.raises(SystemExit, match="0 samples would be lost and 1 files are missing"):
        prepare.main(["check", "chartVQA", "--data", str(tmp_path / "data")])
    root = tmp_path / "a/ChartQA Dataset/train/png"
    prepare.main(["check", "chartVQA", "--data", str(tmp_path / "data"), "--split", "train", "--image-root", str(root)])


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
    with pytest.raises(InputError, match="nothing of okVQA"):
        prepare.main([*arguments, str(tmp_path / "b")])
    assert "1 questions of the test part have no answers" in capsys.readouterr().out
    parquet(tmp_path / "c/data/val-0.parquet", [{**row, "answers": ["x"], "image": None}])
    with pytest.raises(InputError, match="row 0: no image in it"):
        prepare.main([*arguments, str(tmp_path / "c")])
    parquet(tmp_path / "d/data/0.parquet", [{**row, "answers": ["x"]}])
    with pytest.raises(InputError, match="named after a split"):
        prepare.main([*arguments, str(tmp_path / "d")])
