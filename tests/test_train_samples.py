"""The samples that the trainer makes of records: images and turns, files with shares, and the cache."""

import json
import os

import model_loading
import params
import pytest
import torch
import train
from cache import SampleCache
from conftest import STUDENT
from PIL import Image
from training import arguments, build, conversation, write

import data


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
    with pytest.raises(data.DataError, match="give each file a share"):
        data.read_samples([f"{tmp_path}/a.json:0.9", f"{tmp_path}/b:0.5.json"])


def test_a_sample_that_is_too_long_is_named_before_training_or_dropped(tmp_path, capsys):
    write(tmp_path, 4)
    with pytest.raises(data.DataError, match=r"train.json, record 3: .* of which \d are visual, .* 36\. Lower"):
        train.main(arguments(tmp_path, "--max_seq_length", "36"))
    trainer = build(tmp_path, "--max_seq_length", "36", "--on_too_long", "drop")
    assert [sample["id"] for sample in trainer.train_dataset.samples] == ["s0", "s1", "s2"]
    assert "1 of 4 samples left out" in capsys.readouterr().out


def encode_samples(samples: list[dict], processor, **kept) -> data.Samples:
    return data.encode_all(samples, processor, 1000, "error", **kept)


def equal_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[name] is b[name] or bool((a[name] == b[name]).all()) for name in a.keys() - {"sample"}
    )


def test_a_sample_is_made_once_by_all_runs_that_share_a_folder(tmp_path, processor, monkeypatch):
    samples, folder = data.read_samples([str(write(tmp_path, 6))], str(tmp_path)), tmp_path / "cache"

    def check(processor=processor) -> data.Samples:
        return encode_samples(samples, processor, cache=SampleCache(folder, 2**20, processor))

    made = [{**data.encode(sample, processor), "sample": sample["id"]} for sample in samples]
    check()
    assert len([*folder.iterdir()]) == 6
    monkeypatch.setattr(data, "encode", None)
    again = check()
    assert all(equal_tensors(again[i], made[i]) for i in range(6))
    monkeypatch.undo()

    Image.new("RGB", (64, 64), "teal").save(samples[0]["images"][0])  # another image at the same place
    assert not torch.equal(check()[0]["pixel_values"], made[0]["pixel_values"])
    limits = params.DataArguments(data_path=[], image_min_pixels=3136, image_max_pixels=3136)
    other = model_loading.load_processor(params.ModelArguments(model_id=str(STUDENT)), limits)
    assert check(other).visual_lengths != again.visual_lengths
    for path in folder.iterdir():
        path.write_bytes(b"torn")
    assert all(equal_tensors(check()[i], made[i]) for i in range(1, 6))


def test_the_cache_stays_within_its_bound_and_what_nobody_used_for_a_day_goes_first(tmp_path, processor):
    samples, folder = data.read_samples([str(write(tmp_path, 9))], str(tmp_path)), tmp_path / "cache"
    earlier = SampleCache(folder, 2**30, processor)
    encode_samples(samples[:4], processor, cache=earlier)
    bound = sum(path.stat().st_size for path in folder.iterdir())
    for age, sample in enumerate(samples[:3]):  # the fourth is of today
        os.utime(folder / f"{earlier.key(sample)}.safetensors", (1e9 - age, 1e9 - age))
    cache = SampleCache(folder, bound, processor)
    kept = encode_samples(samples[2:], processor, cache=cache)  # two that are there, five more
    assert sum(path.stat().st_size for path in folder.iterdir()) <= bound
    assert [bool(cache.get(earlier.key(sample))) for sample in samples[:4]] == [False, False, True, True]
    assert any(info.cache_key is None for info in kept.infos) and any(info.cache_key for info in kept.infos[2:])
    plain = encode_samples(samples[2:], processor)
    assert all(equal_tensors(kept[i], plain[i]) for i in range(7))


def test_a_disk_that_takes_no_more_costs_the_cache_and_not_the_run(tmp_path, processor):
    samples = data.read_samples([str(write(tmp_path, 3))], str(tmp_path))
    cache = SampleCache(tmp_path / "cache", 2**30, processor)
    (tmp_path / "cache").rmdir()
    kept = encode_samples(samples, processor, cache=cache)
    assert (cache.bytes_left, [info.cache_key for info in kept.infos]) == (0, [None] * 3)
    assert equal_tensors(kept[2], {**data.encode(samples[2], processor), "sample": "s2"})


def test_what_is_kept_in_memory_holds_no_files_open(tmp_path, processor):
    """Ubuntu allows 1,024 open files per process; each tensor that a worker sends takes one."""
    samples = data.read_samples([str(write(tmp_path, 2))], str(tmp_path)) * 50
    before = len(os.listdir("/proc/self/fd"))
    kept = encode_samples(samples, processor, memory=2**30, workers=1)
    assert len(os.listdir("/proc/self/fd")) < before + 50
    assert all(info.encoded for info in kept.infos) and equal_tensors(kept[98], kept[0])
