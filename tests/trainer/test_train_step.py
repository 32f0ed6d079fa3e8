"""A training step of every model family: loss, gradients and memory, packed or not."""

import json

import activations
import miniatures
import param_groups
import params
import pytest
import torch
import train
from conftest import STUDENT, close
from torch.profiler import ProfilerActivity, profile
from trainer import Leveler
from training import arguments, build, conversation, losses, write
from transformers import AutoModelForImageTextToText

import data
from mpa.files.records import InputError
from mpa.models.families import FAMILIES


@pytest.fixture(scope="module", params=miniatures.FAMILIES)
def checkpoint(request, tmp_path_factory):
    return miniatures.make(request.param, tmp_path_factory.mktemp(request.param))


def step(trainer: Leveler, batches: list[list[dict]]) -> tuple[float, dict]:
    """The loss and the gradients of one step over these batches."""
    trainer.model.zero_grad()
    made = [trainer.data_collator(batch) for batch in batches]
    count, total = sum((batch["labels"] != data.IGNORE).sum() for batch in made), 0.0
    for batch in made:
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=count)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def packs(trainer: Leveler) -> bool:
    return FAMILIES[trainer.model.config.model_type].packing


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

    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for packing in (False, True) if packs(trainer) else (False,):
        trainer.data_collator.packing = packing
        for batches in ([samples], [samples[:3], samples[3:]]):
            loss, gradients = step(trainer, batches)
            assert close(loss, plain.item(), 1e-5)
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():  # that of a key's bias is zero but for rounding
                assert close(gradient, expected[name], 2e-4, least=1e-3 * largest), name


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


def test_the_positions_of_a_packed_row_are_known_before_it_goes_to_the_device(tmp_path, monkeypatch):
    write(tmp_path, 4)
    trainer, seen = build(tmp_path, "--packing", "True"), []
    monkeypatch.setattr(trainer, "_prepare_input", lambda data: seen.append(data) or data)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=1)
    assert seen[0]["position_ids"].shape == (4, 1, batch["input_ids"].shape[1])


def test_recomputation_changes_neither_loss_nor_gradients(tmp_path):
    write(tmp_path, 6)
    trainer = build(tmp_path)
    samples = [trainer.train_dataset[i] for i in range(6)]
    trainer.model.train()
    loss, gradients = step(trainer, [samples])
    for policy in (activations.PRODUCTS, activations.INPUTS):
        activations.apply_policy(trainer.model, policy)
        again, same = step(trainer, [samples])
        assert again == loss and all(torch.equal(same[name], gradients[name]) for name in gradients)


def test_smaller_micro_batches_with_recomputation_change_no_loss(tmp_path, capsys):
    write(tmp_path, 12)
    flags = "--per_device_train_batch_size 6 --learning_rate 1e-3 --save_strategy no".split()
    train.main(arguments(tmp_path, *flags))
    assert "are free: all activations are saved" in capsys.readouterr().out
    more = ["--batch_tokens", "120", "--activation_checkpointing", "True"]
    train.main(arguments(tmp_path, *flags, *more, out="micro_batches"))
    assert "2 steps of 6 (micro-batches per device: 2)" in capsys.readouterr().out
    assert close(losses(tmp_path / "micro_batches"), losses(tmp_path / "out"), 1e-5)


@pytest.mark.parametrize("checkpoint", ["qwen2_vl", "qwen3_5", "internvl", "gemma3", "lfm2_vl"], indirect=True)
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
    with pytest.raises(InputError, match=r"step \d: the loss is .* id s\d, s\d\. Check"):
        train.main(arguments(tmp_path, *flags.split()))
    assert not (tmp_path / "out/train_meta.json").exists()


@pytest.mark.parametrize(
    ("flag", "frozen"),
    [("freeze_vision_tower", "visual.blocks"), ("freeze_merger", "merger"), ("freeze_llm", "language_model")],
)
def test_a_freeze_flag_freezes_its_part_and_no_other(flag, frozen):
    model = AutoModelForImageTextToText.from_pretrained(STUDENT, dtype="float32")
    param_groups.freeze(model, params.ModelArguments(model_id="", **{flag: True}))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("visual.blocks", "merger", "language_model")):
            assert parameter.requires_grad is (frozen not in name), name


@pytest.mark.parametrize(
    ("lora", "vision", "merger"),  # frozen: vision, merger
    [(False, False, False), (False, True, False), (True, False, True), (True, True, False)],
)
def test_each_part_moves_at_its_rate_or_not_at_all(tmp_path, vision, merger, lora):
    """Adam's first update is as large as the learning rate, whatever the gradient."""
    write(tmp_path, 4)
    flags = (
        "--per_device_train_batch_size 4 --learning_rate 1e-3 --merger_lr 3e-4 --vision_lr 1e-4 --max_steps 1".split()
    )
    flags += "--lr_scheduler_type constant --save_strategy no --adam_epsilon 1e-12 --weight_decay 0".split()
    flags += ["--freeze_vision_tower", str(vision), "--freeze_merger", str(merger), "--lora_enable", str(lora)]
    trainer = build(tmp_path, *flags)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    counts = param_groups.counts(trainer.model)
    trainer.train()
    moved = {"vision": 0.0, "merger": 0.0, "language": 0.0}
    for name, value in trainer.model.named_parameters():
        part = param_groups.part_of(name, "qwen2_vl")
        moved[part] = max(moved[part], (value - before[name]).abs().max().item())
    expected = {"vision": 0.0 if vision else 1e-4, "merger": 0.0 if merger else 3e-4, "language": 1e-3}
    assert moved == pytest.approx(expected, rel=2e-2)
    whole = param_groups.counts(build(tmp_path).model)
    for part, trained in (("vision", not vision), ("merger", not merger)):
        assert counts[part] == (whole[part][0], whole[part][0] if trained else 0)  # without PEFT's copies
