"""The trainer: samples, batches, loss and gradients of every family, packed or not, flags, LoRA."""

import hashlib
import json
import os
import random
from itertools import combinations_with_replacement, pairwise, product
from pathlib import Path

import activations
import families
import merge_lora
import model_card
import model_loading
import param_groups
import params
import pytest
import torch
import train
from batching import StepBatchSampler, balanced_ends, micro_batches_within
from cache import SampleCache
from conftest import STUDENT
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from trainer import Leveler
from training import arguments, build, conversation, losses, weights, write
from transformers import AutoModelForImageTextToText

import data
from mpa import models
from mpa.engines import Request
from mpa.engines.hf import HFEngine

# --- data -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("n", "size", "micro_batches"), [(50, 8, 2), (33, 8, 1), (9, 8, 2), (17, 8, 2), (3, 1, 1), (50, 8, 3)]
)
def test_a_steps_samples_do_not_depend_on_the_number_of_ranks(n, size, micro_batches):
    lengths = [random.Random(i).randrange(20, 90) for i in range(n)]

    def steps(world: int, micro_batches: int) -> list[set]:
        ranks = []
        for rank in range(world):
            batches = StepBatchSampler(lengths, size, micro_batches, rank, world, 3, True)
            batches.set_epoch(2)
            ranks.append(list(batches))
            assert len(ranks[-1]) == len(batches)
            assert world > 1 or all(ranks[-1])  # one device alone gets no empty batch
        assert len(set(map(len, ranks))) == 1  # or one would wait for ever
        rows = [[i for rank in ranks for i in rank[k]] for k in range(len(ranks[0]))]
        return [{i for row in rows[k : k + micro_batches] for i in row} for k in range(0, len(rows), micro_batches)]

    alone = steps(1, micro_batches)
    assert sorted(i for step in alone for i in step) == list(range(n))
    assert steps(2, micro_batches) == steps(3, micro_batches) == steps(1, min(size, micro_batches + 1)) == alone


def test_a_step_is_split_so_that_its_largest_micro_batch_is_smallest():
    rng = random.Random(5)
    for _ in range(50):
        lengths = sorted(rng.randrange(1, 60) for _ in range(rng.randrange(1, 8)))
        for count in (1, 2, 3):
            ends = balanced_ends(lengths, count)
            assert len(ends) == count and ends[-1] == len(lengths) and ends == sorted(ends)
            every = combinations_with_replacement(range(len(lengths) + 1), count - 1)
            assert largest(lengths, ends) == min(largest(lengths, [*splits, len(lengths)]) for splits in every)


def largest(lengths: list[int], ends: list[int]) -> int:
    """Tokens of the largest micro-batch, padding included."""
    return max((lengths[end - 1] * (end - start) for start, end in pairwise([0, *ends]) if end > start), default=0)


@pytest.mark.parametrize("world", [1, 2])
def test_no_batch_has_more_tokens_than_the_budget_and_one_batch_less_would(world):
    lengths = [random.Random(i).choice((40, 60, 500)) for i in range(100)]
    samplers = [StepBatchSampler(lengths, 16, 1, rank, world, 3, True) for rank in range(world)]
    fewest = micro_batches_within(samplers[0], 1000, epochs=2)

    def most(micro_batches: int) -> int:
        found = []
        for sampler, epoch in product(samplers, range(2)):
            sampler.micro_batches = micro_batches
            sampler.set_epoch(epoch)
            found += [max(lengths[i] for i in batch) * len(batch) for batch in sampler if batch]
        return max(found)

    assert most(fewest) <= 1000 < most(fewest - 1)


# --- a step -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=families.FAMILIES)
def checkpoint(request, tmp_path_factory):
    return families.make(request.param, tmp_path_factory.mktemp(request.param))


def step(trainer: Leveler, batches: list[list[dict]]) -> tuple[float, dict]:
    """The loss and the gradients of one step over these batches."""
    trainer.model.zero_grad()
    made = [trainer.data_collator(batch) for batch in batches]
    count, total = sum((batch["labels"] != data.IGNORE).sum() for batch in made), 0.0
    for batch in made:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_are_the_models_own_and_the_same_packed(checkpoint, tmp_path):
    write(tmp_path, 5)
    records = json.loads((tmp_path / "train.json").read_text())
    records.append(conversation(["0.png", "1.png"], "<image>\nand <image>\n?", "two things"))
    records.append(conversation(None, "what is red?", "a color"))
    (tmp_path / "train.json").write_text(json.dumps(records))
    trainer = build(tmp_path, model=checkpoint)
    trainer.model.eval()
    samples = [trainer.train_dataset[i] for i in range(7)]

    whole = trainer.data_collator(samples)
    del whole["samples"]
    plain = trainer.model(**whole).loss
    plain.backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    for packing in (False, True):
        trainer.data_collator.packing = packing
        for batches in ([samples], [samples[:3], samples[3:]]):
            loss, gradients = step(trainer, batches)
            assert loss == pytest.approx(plain.item(), abs=2e-5)
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                assert torch.allclose(gradient, expected[name], atol=2e-4 * expected[name].abs().max() + 1e-7), name


def test_features_of_a_frozen_vision_tower_serve_as_well_as_the_images(checkpoint, tmp_path):
    write(tmp_path, 4)
    records = json.loads((tmp_path / "train.json").read_text())
    records += [conversation(["0.png", "1.png"], "<image>\nand <image>\n?", "two"), conversation(None, "red?", "yes")]
    (tmp_path / "train.json").write_text(json.dumps(records))
    flags, seen = "--freeze_vision_tower True --freeze_merger True".split(), []
    trainers = [build(tmp_path, *flags, *more, model=checkpoint) for more in ([], ["--cache_features", "True"])]
    for trainer in trainers:
        trainer.model.eval()
        samples = [trainer.train_dataset[i] for i in range(6)]
        seen.append(step(trainer, [samples[:2], samples[2:5], samples[5:]]))
    assert "pixel_values" not in samples[0] and "features" in samples[0]
    (loss, expected), (same, gradients) = seen
    assert same == pytest.approx(loss, abs=1e-5) and gradients.keys() == expected.keys()
    assert all(torch.allclose(gradients[name], expected[name], atol=1e-5) for name in expected)
    trainer.data_collator.packing = True
    assert step(trainer, [samples])[0] == pytest.approx(loss, abs=2e-5)


def test_every_parameter_of_every_family_belongs_to_a_part(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    counts = param_groups.counts(model)
    assert all(total > 0 for total, _ in counts.values())
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in model.parameters())


def test_logits_are_computed_only_for_labelled_tokens(tmp_path):
    write(tmp_path, 4)
    trainer = build(tmp_path)
    seen, (*others, last) = [], trainer.model.get_decoder().layers
    assert others
    for module in (trainer.model.get_output_embeddings(), last.mlp.down_proj, last.self_attn.k_proj):
        module.register_forward_hook(lambda _, __, out: seen.append(out.shape[:-1]))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    labelled = int((batch["labels"] != data.IGNORE).sum())
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=labelled)
    assert seen == [batch["input_ids"].shape, (1, labelled), (1, labelled)]


def test_recomputation_and_smaller_micro_batches_change_no_loss(tmp_path, capsys):
    write(tmp_path, 12)
    flags = "--per_device_train_batch_size 6 --learning_rate 1e-3 --save_strategy no".split()
    train.main(arguments(tmp_path, *flags))
    assert "are free: all activations are saved" in capsys.readouterr().out
    for way in ("products", "True"):
        train.main(arguments(tmp_path, *flags, "--activation_checkpointing", way, out=way))
        assert losses(tmp_path / way) == losses(tmp_path / "out")
    train.main(arguments(tmp_path, *flags, "--batch_tokens", "120", out="micro_batches"))
    assert "2 steps of 6 (micro-batches per device: 2)" in capsys.readouterr().out
    assert losses(tmp_path / "micro_batches") == pytest.approx(losses(tmp_path / "out"), abs=1e-5)


def test_activation_bytes_are_those_that_the_step_allocates(checkpoint, tmp_path):
    """Compared with what PyTorch's allocator holds after a forward pass."""
    write(tmp_path, 12)
    trainer = build(tmp_path, model=checkpoint)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(12)])

    def forward():
        copied = {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}
        return trainer.compute_loss(trainer.model, copied, num_items_in_batch=1)

    trainer.model.train()
    counted, allocated = activations.activation_bytes(forward, trainer.model), {}
    for policy in activations.DESCRIPTIONS:
        activations.apply_policy(trainer.model, policy)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
            loss = forward()
        allocated[policy] = sum(event.self_cpu_memory_usage for event in events.key_averages())
        del loss
    assert counted == pytest.approx(allocated, rel=0.15)
    assert allocated["True"] < allocated["products"] < 0.8 * allocated["False"]


def test_the_policy_that_saves_the_most_of_what_fits_is_chosen():
    kept = {"False": 100, "products": 50}
    assert [activations.choose_policy(kept, 60, free) for free in (200, 199, 138, 137, 0)] == [
        "False",
        "products",
        "products",
        "True",
        "True",
    ]


def test_a_loss_that_explodes_stops_with_the_samples_ids(tmp_path):
    write(tmp_path, 8)
    flags = "--learning_rate 10 --per_device_train_batch_size 2 --save_strategy no --lr_scheduler_type constant"
    with pytest.raises(data.DataError, match=r"step \d: the loss is .* id s\d, s\d\. Check"):
        train.main(arguments(tmp_path, *flags.split()))
    assert not (tmp_path / "out/train_meta.json").exists()


# --- the flags -----------------------------------------------------------------------------------------


def test_older_spellings_are_read_once(tmp_path):
    path = str(write(tmp_path, 1))
    required = ["--model_id", "m", "--data_path", path, "--output_dir", "o", "--use_cpu"]
    for tune, frozen in ((["--tune_merger", "False"], True), (["--tune_merger"], False), (["--tune_merger=no"], True)):
        model, images, args = params.parse([*required, "--min_pixels", "784", "--warmup_ratio", "0.03", *tune])
        assert (model.freeze_merger, images.image_min_pixels, args.warmup_steps) == (frozen, 784, 0.03)
    with pytest.raises(data.DataError, match="--min_pixels and --image_min_pixels are one flag"):
        params.parse([*required, "--min_pixels", "784", "--image_min_pixels", "784"])
    excluded = params.parse([*required, "--lora_enable", "True", "--lora_namespan_exclude", "['lm_head', 'k_proj']"])[0]
    assert excluded.lora_namespan_exclude == ["lm_head", "k_proj"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--vision_lora True", "no effect without --lora_enable"),
        ("--freeze_llm True --freeze_merger True --freeze_vision_tower True", "nothing to train"),
        ("--load_best True", "needs --eval_data_path"),
        ("--use_liger True", "GPUs only"),
        ("--cache_features True --freeze_vision_tower True", "only with --freeze_vision_tower, --freeze_merger"),
        ('--gradient_checkpointing_kwargs {"every_n_layers":2}', "with --activation_checkpointing alone"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path, flags, says):
    write(tmp_path, 1)
    with pytest.raises(data.DataError, match=says):
        params.parse(arguments(tmp_path, *flags.split()))


def test_an_unknown_flag_is_an_error(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(data.DataError, match="--bits"):
        params.parse(arguments(tmp_path, "--bits", "4"))


# --- LoRA ------------------------------------------------------------------------------------------------


def answers(model: Path, folder: Path) -> list[tuple]:
    asked = [Request(str(i), str(folder / f"{i}.png"), "what color is the shape?", 8) for i in range(6)]
    with HFEngine(str(model), min_pixels=3136, max_pixels=3136, dtype="float32") as engine:
        replies = {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}
    return [(replies[r.key]["text"], round(replies[r.key]["logprob"], 3)) for r in asked]


@pytest.mark.parametrize("flags", ["", "--vision_lora True --freeze_vision_tower True --freeze_merger True"])
def test_merged_adapters_answer_as_the_adapters_do_and_the_base_is_untouched(tmp_path, flags):
    write(tmp_path, 8)
    before = hashlib.sha256((STUDENT / "model.safetensors").read_bytes()).hexdigest()
    more = "--lora_enable True --per_device_train_batch_size 2 --learning_rate 1e-2 --save_steps 2".split()
    train.main(arguments(tmp_path, *more, *flags.split()))
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= {
        p.name for p in out.iterdir()
    }
    merge_lora.merge(out, merged)
    models.check_model_path(str(out))
    assert answers(out, tmp_path) == answers(merged, tmp_path)
    assert answers(out, tmp_path) != answers(STUDENT, tmp_path)
    assert models.identity(str(out)) != models.identity(str(merged))
    assert hashlib.sha256((STUDENT / "model.safetensors").read_bytes()).hexdigest() == before
    base, after = weights(STUDENT), weights(merged)
    moved = {param_groups.part_of(name, "qwen2_vl") for name in base if not torch.equal(after[name], base[name])}
    assert moved == ({"language", "vision"} if flags else {"language", "vision", "merger"})


def test_the_card_tells_the_parity_counts_and_the_bases_licence(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "PI_train.meta.json").write_text(json.dumps({"funnel": {"pictures": 9, "parity": 4}}))
    settings = dict.fromkeys(
        "learning_rate vision_lr merger_lr num_train_epochs per_device_train_batch_size gradient_accumulation_steps "
        "image_min_pixels image_max_pixels seed".split(),
        1,
    )
    settings["data_path"] = [str(tmp_path / "PI_train.json")]
    meta = {"settings": settings, "samples": 4, "tokens": 80, "steps": 2, "loss": 0.5, "accuracy": 0.75}
    model_card.write_card(tmp_path, meta, str(tmp_path / "base"), adapter=False)
    card = (tmp_path / "README.md").read_text()
    assert "9 pictures → 4 parity" in card
    assert "license: apache-2.0" in card
    assert "75.0%" in card
    assert "without human labels" in card
    (tmp_path / "PI_train.meta.json").unlink()  # any other data: nothing is known of its labels
    model_card.write_card(tmp_path, meta, str(tmp_path / "base"), adapter=False)
    assert "Parity Alignment" not in (tmp_path / "README.md").read_text()
