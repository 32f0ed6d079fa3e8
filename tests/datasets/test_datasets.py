import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import DATA
from PIL import Image

from mpa.answers.matching import MATCHERS
from mpa.answers.metrics import METRICS
from mpa.data import DATASETS
from mpa.data.loading import load_samples
from mpa.data.paths import moved
from mpa.files.records import InputError
from mpa.method.prompts import TASK_PROMPTS
from mpa.stages.cli import selected


@pytest.fixture
def root(tmp_path):
    """An image root in which every image that the tests' annotations name exists."""
    folder = tmp_path / "images"
    folder.mkdir()
    image = folder / "a.jpg"
    Image.new("RGB", (32, 32), "red").save(image)
    for name in ("multi_col_803.png", "10095.png", "COCO_train2014_000000051606.jpg", "COCO_val2014_000000297147.jpg"):
        shutil.copy(image, folder / name)
    return folder


def test_every_row_names_a_task_metrics_and_no_one_else():
    for row in DATASETS.values():
        assert row.task in TASK_PROMPTS
        assert set(row.metrics) <= set(METRICS)
    assert {"exact", "contains", "anls", "relaxed", "vqa", "tolerant"} == set(MATCHERS)


@pytest.mark.parametrize(
    ("name", "split", "file", "first"),
    [
        ("chartVQA", "test", "chartqa_test_combined", (0, "multi_col_803.png", ["47"])),
        ("chartVQA", "train", "chartqa_train_onePerImage", (0, "10095.png", ["6"])),
        ("okVQA", "train", "okvqa_train_unique_combine", (516065, "COCO_train2014_000000051606.jpg", None)),
        ("okVQA", "test", "okvqa_val_combine", (2971475, "COCO_val2014_000000297147.jpg", None)),
    ],
)
def test_released_annotations_read(root, name, split, file, first):
    samples = load_samples(name, split, DATA / "annotations" / f"{file}.json", root)
    assert len(samples) == 20
    assert (samples[0].question_id, samples[0].image_path) == (first[0], str(root / first[1]))
    assert samples[0].answers == first[2] or len(samples[0].answers) == 10


@pytest.mark.parametrize(
    ("name", "record", "image"),
    [
        ("textVQA", {"question_id": 5, "image_id": "a", "question": "q?", "answers": ["x"] * 10}, "a.jpg"),
        ("stVQA", {"question_id": 5, "file_path": "a.jpg", "question": "q?", "answers": ["x"]}, "a.jpg"),
    ],
)
def test_the_other_two_formats_read(root, tmp_path, name, record, image):
    (tmp_path / "a.json").write_text(json.dumps({"data": [record]}))
    (sample,) = load_samples(name, "test", tmp_path / "a.json", root)
    assert (sample.question_id, sample.image_path, sample.question) == (5, str(root / image), "q?")


def test_easy_vqa_has_one_question_an_image_to_train_and_all_to_test():
    train, test = load_samples("easyVQA", "train"), load_samples("easyVQA", "test")
    assert len(train) == len({s.image_path for s in train}) == 4000
    assert len(test) == 9673
    assert train == load_samples("easyVQA", "train")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "the file is empty"),
        ("{", "not JSON"),
        ('{"data": []}', "no records"),
        ("[]", r'should be \{"data"'),
        ('{"data": [{"question_id": 1, "question": "q", "answers": []}]}', "no field 'image_id'"),
        ('{"data": [{"question_id": 1, "image_id": "a", "question": 3, "answers": []}]}', "should be text"),
        (
            '{"data": [{"question_id": 1, "image_id": "../a", "question": "q", "answers": []}]}',
            "outside the image root",
        ),
        ('{"data": [{"question_id": 1, "image_id": "/a", "question": "q", "answers": []}]}', "outside the image root"),
        ('{"data": [7]}', "not in the format of textVQA"),
    ],
)
def test_a_bad_annotation_file_is_named_with_record_and_remedy(root, tmp_path, content, says):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=says) as error:
        load_samples("textVQA", "train", tmp_path / "a.json", root)
    assert "a.json" in str(error.value)


def test_another_data_sets_file_is_recognised(root):
    with pytest.raises(InputError, match="did you mean --dataset okVQA"):
        load_samples("chartVQA", "train", DATA / "annotations" / "okvqa_train_unique_combine.json", root)


def test_duplicate_ids_are_refused(root, tmp_path):
    record = {"question_id": 1, "image_id": "a", "question": "q", "answers": []}
    (tmp_path / "a.json").write_text(json.dumps({"data": [record, record]}))
    with pytest.raises(InputError, match="records 0 and 1 have the same id '1'"):
        load_samples("textVQA", "train", tmp_path / "a.json", root)


def test_a_link_out_of_the_image_root_is_refused(root, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    record = {"question_id": 1, "image_id": "link", "question": "q", "answers": []}
    (tmp_path / "a.json").write_text(json.dumps({"data": [record]}))
    with pytest.raises(InputError, match=r"record 0: image 'link\.jpg' lies outside the image root"):
        load_samples("textVQA", "train", tmp_path / "a.json", root)


def test_a_folder_is_read_in_order_with_relative_paths_as_ids(images):
    ids = [s.question_id for s in load_samples("images", "train", image_root=images)]
    assert ids == sorted(ids, key=lambda i: ("/" in i, i))
    assert len(ids) == 12
    assert "more/00.png" in ids


def test_folders_with_nothing_to_read(tmp_path):
    with pytest.raises(InputError, match="no images in it"):
        load_samples("images", "train", image_root=tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_samples("images", "train", image_root=tmp_path / "none")


def test_where_no_image_exists_the_image_root_is_wrong(tmp_path):
    with pytest.raises(InputError, match="--image-root"):
        load_samples("okVQA", "test", DATA / "annotations" / "okvqa_val_combine.json", tmp_path)


def test_a_limit_takes_the_first_and_a_sample_draws_with_the_seed():
    def args(**given):
        return SimpleNamespace(**{"limit": None, "sample": None, "seed": 0, **given})

    items = list(range(100))
    assert selected(items, args()) == items
    assert selected(items, args(limit=3)) == [0, 1, 2]
    drawn = selected(items, args(sample=10))
    assert drawn == sorted(set(drawn)) == selected(items, args(sample=10)) != selected(items, args(sample=10, seed=1))
    assert len(drawn) == 10
    assert selected(items, args(sample=1000)) == items


def test_json_lines_byte_order_marks_and_foreign_line_ends_read_as_json_does(root, tmp_path, capsys):
    shutil.copy(root / "a.jpg", root / "é.jpg")
    records = [{"question_id": i, "image_id": "aé"[i % 2], "question": "où?", "answers": ["x"]} for i in range(4)]
    text = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    whole = {"data": records}
    for name, content in (
        ("a.json", json.dumps(whole, indent=1).replace("\n", "\r\n")),
        ("b.json", "\ufeff" + json.dumps(whole)),
        ("c.jsonl", text),
        ("d.json", "\ufeff" + text + "\n"),
        ("e.jsonl", text + '\r\n{"question_id": 4, "image_'),
    ):
        (tmp_path / name).write_bytes(content.encode())
        assert [s.question_id for s in load_samples("textVQA", "train", tmp_path / name, root)] == [0, 1, 2, 3], name
    assert "its last line, 5, is cut off and was left out" in capsys.readouterr().err


def test_ids_stay_what_they_were_and_per_image_may_have_many_questions(root, tmp_path):
    records = [{"question_id": i, "image_id": "a", "question": "q", "answers": ["x"]} for i in (3, "n/4", "05")]
    (tmp_path / "a.json").write_text(json.dumps({"data": records}))
    samples = load_samples("textVQA", "test", tmp_path / "a.json", root)
    assert [s.question_id for s in samples] == [3, "n/4", "05"]
    assert len({s.image_path for s in samples}) == 1


def test_missing_images_are_counted_before_a_model_is_loaded(root, tmp_path, capsys):
    records = [{"question_id": i, "image_id": image, "question": "q", "answers": []} for i, image in enumerate("ab")]
    (tmp_path / "a.json").write_text(json.dumps({"data": records}))
    assert len(load_samples("textVQA", "train", tmp_path / "a.json", root)) == 2
    assert "1 of 2 images do not exist, e.g." in capsys.readouterr().err


def test_the_longest_folder_that_fits_says_where_per_image_has_moved():
    moves = {"/workspace": "/a", "/workspace/data/": "/b/"}
    assert moved("/workspace/data/x.jpg", moves) == "/b/x.jpg"
    assert moved("/workspace/x.jpg", moves) == "/a/x.jpg"
    assert moved("/workspaces/x.jpg", moves) == "/workspaces/x.jpg"


def test_things_that_are_no_answers_are_refused_and_test_questions_need_some(root, tmp_path):
    def load(answers, split="train"):
        record = {"question_id": 1, "image_id": "a", "question": "q", "answers": answers}
        (tmp_path / "a.json").write_text(json.dumps({"data": [record]}))
        return load_samples("textVQA", split, tmp_path / "a.json", root)

    assert load([1, 2.5, "x"])[0].answers == ["1", "2.5", "x"]
    for bad in ([{"answer": "x"}], [None], "abc", {"a": 1}):
        with pytest.raises(InputError, match=r"record 0: .*should be a list of text"):
            load(bad)
    assert load([])[0].answers == []
    with pytest.raises(InputError, match="record 0: no answers to score against"):
        load([], "test")


def test_held_out_images_that_have_moved_are_found_below_the_image_root(images, tmp_path):
    record = {"question_id": "x", "image_path": "/gone/more/00.png", "question": "q", "answers": ["red"]}
    (tmp_path / "heldout.json").write_text(json.dumps([record]))
    (sample,) = load_samples("images", "test", tmp_path / "heldout.json", images)
    assert sample.image_path == str(images / "more/00.png")


def test_files_of_a_folder_that_are_no_images_are_counted(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "a")
    (tmp_path / "a/x.HEIC").touch()
    (tmp_path / "a/notes").touch()
    assert len(load_samples("images", "train", image_root=tmp_path / "a")) == 12
    assert "skipped 2 other files" in capsys.readouterr().err
