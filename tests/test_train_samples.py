"""The samples that the trainer makes of records: images and turns, files with shares."""

import json

import model_loading
import params
import pytest
import torch
import train
from conftest import STUDENT
from training import arguments, build, conversation, write

import data
from mpa.files.records import InputError


@pytest.fixture(scope="module")
def processor():
    return model_loading.load_processor(
        params.ModelArguments(model_id=str(STUDENT)),
        params.DataArguments(data_path=[], image_min_pixels=3136, image_max_pixels=12544),
    )


def encoded(tmp_path, processor, record) -> dict:
    (tmp_path / "one.json").write_text(json.dumps([record]))
    return data.encode(data.read_samples([str(tmp_path / "one.json")], str(tmp_path))[0], processor)


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
