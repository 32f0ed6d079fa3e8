"""Exports of the parity set for other trainers, and what they refuse."""

import json
import os
import shutil

import datasets
import export
import PI
import pytest
from answered_by_rule import annotate, answers_by, flags
from conftest import STUDENT
from PIL import Image
from transformers import AutoProcessor

from mpa.files.records import InputError, read_json, train_record
from mpa.method.prompts import train_prompt
from mpa.runs import exports


@pytest.fixture
def parity_set(tmp_path):
    """Two samples, and their meta file as PI writes it."""
    for name, color in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (32, 32), color).save(tmp_path / name)
    samples = [
        train_record(7, str(tmp_path / "a.png"), "what color is it? Answer", "red"),
        train_record("x/8", str(tmp_path / "b.jpg"), "welche Farbe? Antworte", "blau"),
    ]
    path = tmp_path / "PI_big_train_big_small_images.json"
    path.write_text(json.dumps(samples))
    meta = {"settings": {"preset": "paper"}, "funnel": {"pictures": 9, "parity": 2}, "model_path_lvlm": "big"}
    (tmp_path / "PI_big_train_big_small_images.meta.json").write_text(json.dumps(meta))
    return path


def exported(parity_set, to: str):
    out = parity_set.parent / f"out-{to}"
    export.main([str(parity_set), "--to", to, "--out", str(out)])
    return out


def test_llava_and_sharegpt(parity_set):
    assert read_json(exported(parity_set, "llava")) == read_json(parity_set)
    out = exported(parity_set, "sharegpt")
    first = read_json(out)[0]
    assert first["images"] == [str(parity_set.parent / "a.png")]
    assert first["conversations"][0]["value"] == "<image>what color is it? Answer"
    info = read_json(parity_set.parent / "dataset_info.json")["out-sharegpt"]
    assert info["columns"] == {"messages": "conversations", "images": "images"}


def test_ms_swift(parity_set):
    lines = [json.loads(line) for line in exported(parity_set, "ms-swift").read_text().splitlines()]
    assert lines[0] == {
        "messages": [
            {"role": "user", "content": "<image>what color is it? Answer"},
            {"role": "assistant", "content": "red"},
        ],
        "images": [str(parity_set.parent / "a.png")],
    }


def test_the_folder_for_trl_loads_with_its_images(parity_set, tmp_path):
    loaded = datasets.load_dataset(str(exported(parity_set, "trl")), split="train", cache_dir=tmp_path / "cache")
    row = loaded[0]
    (user,) = row["prompt"]
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert user["content"][1]["text"] == "what color is it? Answer"
    assert row["completion"] == [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    assert [image.getpixel((0, 0)) for image in row["images"]] == [(255, 0, 0)]


def test_the_hugging_face_folder_loads_and_its_card_says_what_it_is(parity_set, tmp_path):
    folder = exported(parity_set, "hf")
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=tmp_path / "cache")
    assert (loaded["id"][:], loaded["answer"][:]) == (["7", "x/8"], ["red", "blau"])
    assert loaded[1]["image"].getpixel((0, 0))[2] > 250
    card = (folder / "README.md").read_text()
    assert "9 images → 2 parity" in card
    assert "visual-question-answering" in card


def test_per_image_that_is_not_there_is_named_before_a_folder_is_written(parity_set):
    (parity_set.parent / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png: no such image"):
        exported(parity_set, "hf")
    assert not (parity_set.parent / "out-hf").exists()
    (parity_set.parent / "b.jpg").unlink()
    with pytest.raises(InputError, match="no such image, and none of the others"):
        exported(parity_set, "ms-swift")


def of_pi(serve, images, run, *flags_of_pi):
    """A parity set that PI wrote."""
    server = serve(answers_by())
    annotate(server, images, run)
    return PI.main(flags(server, images, run, "--dtype", "bfloat16", *flags_of_pi))


def test_each_trainer_is_told_what_shows_it_the_evaluated_prompt(serve, copied_images, tmp_path, capsys):
    """TRL 1.16, ms-swift 4.6 and LLaMA-Factory 0.9.5 were compared token by token; this test checks their input."""
    parity_set = of_pi(serve, copied_images, tmp_path / "run", "--min-pixels", 3136, "--max-pixels", 6272)
    answers = [tmp_path / f"run/PI_big_{who}_images.json" for who in ("big", "small")]
    again = ["--lvlm-json", answers[0], "--svlm-json", answers[1], "--out", tmp_path / "run/again.json"]
    models = [
        "--dataset",
        "images",
        "--model-path-lvlm",
        "big",
        "--model-path-svlm",
        "small",
        "--run",
        f"{tmp_path}/run/",
    ]
    from_answers = PI.main([*map(str, [*models, *again])])  # other limits are its default, and say nothing
    for file in (parity_set, from_answers):
        capsys.readouterr()
        exported(file, "ms-swift")
        said = capsys.readouterr().out
        assert "MIN_PIXELS=3136 MAX_PIXELS=6272 swift sft --template qwen2_vl --model_type qwen2_vl" in said
        exported(file, "sharegpt")
        said = capsys.readouterr().out
        assert f"--dataset_dir {file.parent} --dataset out-sharegpt --template qwen2_vl" in said
        assert "shortest_edge 3136 and longest_edge 6272" in said
        exported(file, "trl")
        assert "min_pixels=3136, max_pixels=6272" in capsys.readouterr().out
        shutil.rmtree(file.parent / "out-trl")
        for name in ("out-ms-swift", "out-sharegpt"):
            (file.parent / name).unlink()
            (file.parent / f"{name}.meta.json").unlink()


def test_limits_that_no_meta_file_says_are_not_guessed(parity_set, capsys):
    for to in ("ms-swift", "sharegpt", "trl"):
        exported(parity_set, to)
        said = capsys.readouterr().out
        assert "does not say them" in said and "401408" not in said and "100352" not in said
    exported(parity_set, "hf")
    assert "does not say them" not in capsys.readouterr().out


@pytest.mark.parametrize("to", exports.FORMS)
def test_kinds_are_kept(parity_set, to, tmp_path, capsys):
    first, second = read_json(parity_set)
    parity_set.write_text(json.dumps([first | {"kind": "parity", "note": "x"}, second | {"kind": "anchor"}]))
    out = exported(parity_set, to)
    if to in export.FOLDERS:
        rows = list(datasets.load_dataset(str(out), split="train", cache_dir=tmp_path / "cache"))
    else:
        rows = read_json(out)
    assert [row.get("kind") for row in rows] == ["parity", "anchor"]
    said = capsys.readouterr().out
    assert "2 samples have a `kind`" in said
    assert ("does not keep: note (1 samples)" in said) == (to != "llava")
    parity_set.write_text(json.dumps([first | {"kind": 7}, second]))
    with pytest.raises(InputError, match="record 0: 'kind' should be text: 7"):
        exported(parity_set, to)


def test_trls_rows_give_the_evaluated_prompt_in_the_students_own_template(tmp_path):
    processor = AutoProcessor.from_pretrained(STUDENT)
    for question in ("what color?", " Where?\nSay so.", "a <b> c"):
        prompt = train_prompt(question)
        row = exports.trl(train_record(0, "a.png", prompt, "red"))
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        as_evaluated, as_trained = (
            processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            for messages in ([{"role": "user", "content": parts}], row["prompt"])
        )
        assert as_trained == as_evaluated


def parity_set_with(tmp_path, run: str, answer: str):
    """A run's parity set with one sample. All runs use the same file name."""
    folder = tmp_path / run
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    path = folder / "PI_big_train_big_small_images.json"
    path.write_text(json.dumps([train_record(0, str(folder / "a.png"), "q", answer)]))
    return path


@pytest.mark.parametrize("to", ["hf", "trl"])
def test_two_runs_in_folders_of_one_name_each_load_as_what_they_are(tmp_path, to, capsys):
    """`datasets` caches by folder name and card: with a fixed file name, the second load would return the first set."""

    def loaded(folder):
        row = datasets.load_dataset(str(folder), split="train", cache_dir=tmp_path / "cache")[0]
        return row["answer"] if to == "hf" else row["completion"][0]["content"][0]["text"]

    for answer in ("red", "blue"):
        out = tmp_path / f"of-{answer}/parity-set"
        export.main([str(parity_set_with(tmp_path, answer, answer)), "--to", to, "--out", str(out)])
        assert loaded(out) == answer
    export.main([str(parity_set_with(tmp_path, "red", "green")), "--to", to, "--out", str(out)])  # over the one before
    assert loaded(out) == "green"
    assert len(list((out / "data").iterdir())) == 1
    assert loaded(tmp_path / "of-red/parity-set") == "red"

    capsys.readouterr()
    export.main([str(parity_set_with(tmp_path, "run-a", "red")), "--to", to])
    (default,) = (path for path in (tmp_path / "run-a").iterdir() if path.is_dir())
    assert "run-a" in default.name
    assert f"Wrote 1 samples to {default}" in capsys.readouterr().out


def test_a_folder_that_holds_something_else_is_left_alone(parity_set):
    out = parity_set.parent / "out-hf"
    (out / "data").mkdir(parents=True)
    (out / "README.md").write_text("mine")
    with pytest.raises(InputError, match="exists and is not an export"):
        exported(parity_set, "hf")
    assert (out / "README.md").read_text() == "mine"
    (out / "README.md").write_text(exports.MADE_BY)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"it holds notes\.txt"):
        exported(parity_set, "hf")
    (out / "notes.txt").unlink()
    exported(parity_set, "hf")
    (out / "README.md").unlink()  # as if it had been killed before the end
    exported(parity_set, "hf")
    (out / "README.md").unlink()
    (out / "data/train-00000-of-00001.parquet").touch()  # another's
    with pytest.raises(InputError, match="exists and is not an export"):
        exported(parity_set, "hf")


def test_llama_factorys_registry_keeps_what_it_has(parity_set):
    registry = parity_set.parent / "dataset_info.json"
    mine = {"alpaca": {"file_name": "alpaca.json"}, "é": {"hf_hub_url": "x/y"}}
    registry.write_text(json.dumps(mine))
    for _ in range(2):
        exported(parity_set, "sharegpt")
        assert {**mine, "out-sharegpt": read_json(registry)["out-sharegpt"]} == read_json(registry)
    for broken, says in (
        ("{", "not JSON"),
        ("[]", "should map dataset names"),
        ("", "the file is empty"),
        ('{"out-sharegpt": {"file_name": "another.json"}}', "another dataset named 'out-sharegpt'"),
        ('{"out-sharegpt": null}', "another dataset named 'out-sharegpt'"),
    ):
        registry.write_text(broken)
        (parity_set.parent / "out-sharegpt").unlink(missing_ok=True)
        with pytest.raises(InputError, match=rf"dataset_info\.json: .*{says}"):
            exported(parity_set, "sharegpt")
        assert registry.read_text() == broken
        assert not (parity_set.parent / "out-sharegpt").exists()
    for name in ("dataset_info.json", "."):
        with pytest.raises(InputError, match="cannot be the output file"):
            export.main([str(parity_set), "--to", "sharegpt", "--out", str(parity_set.parent / name)])


def with_image(parity_set, image: str):
    first, second = read_json(parity_set)
    parity_set.write_text(json.dumps([first, {**second, "image": image}]))


@pytest.mark.parametrize("to", ["hf", "trl"])
def test_only_images_go_into_a_folder_that_is_published(parity_set, to, tmp_path):
    (tmp_path / "key.png").write_text("secret")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for image in ("/etc/passwd", *(str(tmp_path / f"{name}.png") for name in ("key", "empty", "folder", "cut"))):
        with_image(parity_set, image)
        with pytest.raises(InputError, match=f"{image}: cannot be read .* 0 other images cannot be used"):
            exported(parity_set, to)
        assert not (tmp_path / f"out-{to}").exists()


def test_only_images_below_the_image_root_go_into_a_folder(parity_set, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "a.png").rename(root / "a.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "private.png")
    (root / "link.png").symlink_to(tmp_path / "private.png")
    (root / "up").symlink_to(tmp_path)
    arguments = [str(parity_set), "--to", "hf", "--image-root", str(root), "--out", str(tmp_path / "out")]
    for image in (tmp_path / "private.png", root / "link.png", root / "up/private.png"):
        with_image(parity_set, str(image))
        with pytest.raises(InputError, match=r"outside --image-root .*, as are 0 others"):
            export.main(arguments)
    for image in ("../private.png", f"{root}/../private.png"):
        with_image(parity_set, image)
        with pytest.raises(InputError, match=r"record 1: its image path .* contains"):
            export.main(arguments)
    assert not (tmp_path / "out").exists()
    (tmp_path / "moved").symlink_to(root)  # a root that is a link itself, as prepare.py makes them
    parity_set.write_text(json.dumps([{**read_json(parity_set)[0], "image": "/elsewhere/a.png"}]))
    export.main([*arguments[:3], "--image-root", str(tmp_path / "moved"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("to", ["hf", "trl", "sharegpt", "ms-swift"])
def test_names_that_are_no_unicode_are_written_and_text_that_is_none_is_left_out(parity_set, to, tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "a.png").rename(tmp_path / name)
    first, second = read_json(parity_set)
    first |= {"id": name, "image": str(tmp_path / name)}
    torn = train_record(9, first["image"], "what \ud83d?", "x")
    parity_set.write_text(json.dumps([first, second, torn]))
    out = exported(parity_set, to)
    assert "1 samples left out: invalid Unicode in their text" in capsys.readouterr().err
    if to in export.FOLDERS:
        loaded = datasets.load_dataset(str(out), split="train", cache_dir=tmp_path / "cache")
        assert len(loaded) == 2
        image = loaded[0]["image"] if to == "hf" else loaded[0]["images"][0]
        assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image": None}, "'image' should be the path"),
        ({"conversations": "hello"}, "'conversations' should be a list of turns"),
        ({"conversations": []}, "'conversations' should be a list of turns"),
        ({"conversations": [{"from": "human", "value": "<image>q"}] * 2}, "from 'human' and 'gpt' in turn"),
        ({"conversations": [{"from": "human", "value": "<image>q"}] * 3}, "from 'human' and 'gpt' in turn"),
        ({"conversations": [{"from": "system", "value": "q"}] * 2}, "a turn should be from 'human' or 'gpt'"),
        ({"conversations": [{"from": ["human"], "value": "q"}] * 2}, "'conversations' should be a list of turns"),
        ({"conversations": [{"from": "human", "value": 5}] * 2}, "'conversations' should be a list of turns"),
        ({"conversations": ["q", "a"]}, "'conversations' should be a list of turns"),
        (train_record(0, "x", "<image> q", "a"), "2 <image> marks in its text; expected one"),
        (train_record(0, "x", "q", "<image>"), "2 <image> marks in its text; expected one"),
    ],
)
@pytest.mark.parametrize("to", ["hf", "sharegpt"])
def test_a_record_of_another_shape_is_named(parity_set, change, says, to):
    first, second = read_json(parity_set)
    parity_set.write_text(json.dumps([first, {**second, **change, "id": 5}]))
    with pytest.raises(InputError, match=f"record 1: .*{says}"):
        exported(parity_set, to)


def test_several_turns_go_where_there_is_room_for_them(parity_set):
    first, second = read_json(parity_set)
    more = [{"from": "human", "value": "and now?"}, {"from": "gpt", "value": "blue"}]
    parity_set.write_text(json.dumps([{**first, "conversations": first["conversations"] + more}, second]))
    with pytest.raises(InputError, match="record 0: has 2 questions"):
        exported(parity_set, "hf")
    lines = exported(parity_set, "ms-swift").read_text().splitlines()
    assert [m["content"] for m in json.loads(lines[0])["messages"]][2:] == ["and now?", "blue"]


@pytest.mark.parametrize(
    ("n", "category"),
    [
        *((1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10_000, "10K<n<100K"), (99_999, "10K<n<100K")),
        *((100_000, "100K<n<1M"), (10**6, "1M<n<10M"), (10**8, "100M<n<1B"), (10**12, "n>1T")),
    ],
)
def test_the_size_category_is_the_hubs(n, category):
    assert exports.size_category(n) == category
