"""The options of the loss beyond the paper: sample weights, and the KL divergence from the model before the training."""

import json

import pytest
import torch
import train
from conftest import close
from training import arguments, build, launch, losses, weights, write, zero
from transformers import AutoModelForImageTextToText

from data import IGNORE, DataError

LORA = "--lora_enable True --lora_rank 4 --lora_dropout 0.1".split()
KL = ["--anchor_kl", "0.7"]


def marked(folder, n=6, **fields) -> None:
    """A train JSON of n records; `fields` are functions from a record's place to its value, left out where that is None."""
    write(folder, n)
    records = json.loads((folder / "train.json").read_text())
    for i, record in enumerate(records):
        record |= {name: of(i) for name, of in fields.items() if of(i) is not None}
    (folder / "train.json").write_text(json.dumps(records))


def every_second(i: int) -> str:
    return "anchor" if i % 2 else "parity"


def loss_of(trainer, samples: list[dict], labelled: int = 1) -> torch.Tensor:
    return trainer.compute_loss(trainer.model, trainer.data_collator(samples), num_items_in_batch=labelled)


def logits(model, trainer, sample: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """A plain forward pass over one sample: (logits [N, V] before its N labelled tokens, these tokens [N])."""
    packing, trainer.data_collator.packing = trainer.data_collator.packing, False
    batch = trainer.data_collator([sample])
    trainer.data_collator.packing = packing
    labels = batch.pop("labels")[0]
    for name in ("samples", "weight", "anchor"):
        batch.pop(name, None)
    trainer.answer_logits.select(None)
    places = (labels != IGNORE).nonzero()[:, 0]
    return model(**batch).logits[0, places - 1].float(), labels[places]


@pytest.mark.parametrize("packing", [False, True])
def test_each_sample_counts_by_its_weight_scaled_to_a_mean_of_one(packing, tmp_path):
    given = [0, 0.5, 1, 2, 0.25, 3.75]
    marked(tmp_path, weight=given.__getitem__)
    trainer = build(tmp_path, "--sample_weights", "True", "--packing", str(packing))
    samples = [trainer.train_dataset[i] for i in range(6)]
    mean = sum(given) / 6
    alone = [
        torch.nn.functional.cross_entropy(*logits(trainer.model, trainer, sample), reduction="sum")
        for sample in samples
    ]
    expected = sum(loss * weight / mean for loss, weight in zip(alone, given, strict=True))
    assert loss_of(trainer, samples).item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss_of(trainer, samples[:1]) == 0


@pytest.mark.parametrize(
    "flags", [["--sample_weights", "True"], ["--sample_weights", "True", "--anchor_kl", "1000"]], ids=str
)
def test_a_rare_heavy_sample_is_no_divergence_and_a_divergence_of_any_weight_is_one(flags, tmp_path):
    """Judged by the loss of a token, whatever the sample weighs; the loss itself is the weighted one."""
    given = [1000.0, *[1.0] * 118, 1e-3]
    marked(tmp_path, 120, weight=given.__getitem__, kind=lambda i: "anchor" if i == 1 else "parity")
    trainer = build(tmp_path, *flags)
    samples = [trainer.train_dataset[i] for i in range(120)]
    heavy = loss_of(trainer, samples[:1])
    assert heavy.item() > 2 * trainer.max_loss  # as a sum: the answer has few tokens
    assert loss_of(trainer, samples[:4]) > heavy
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight *= 300
    for some in (samples[:1], samples[2:4], samples[-1:]):
        with pytest.raises(DataError, match=r"the loss is [\d.]+ for the samples with id s"):
            loss_of(trainer, some)


@pytest.mark.parametrize("flags", [[], LORA])
def test_before_the_first_step_an_anchor_costs_nothing_and_a_parity_sample_what_it_always_did(flags, tmp_path):
    marked(tmp_path, kind=every_second)
    trainer = build(tmp_path, *KL, *flags)
    trainer.model.eval()
    samples = [trainer.train_dataset[i] for i in range(6)]
    parity = loss_of(trainer, samples[::2]).item()
    assert close(loss_of(trainer, samples[1::2]).item(), 0, 1e-5, least=parity)
    assert close(loss_of(trainer, samples).item(), parity, 1e-5)


@pytest.mark.parametrize("flags", [[], ["--packing", "True"], LORA])
def test_an_anchor_costs_its_divergence_from_the_model_before(flags, tmp_path):
    marked(tmp_path, kind=every_second)
    trainer = build(tmp_path, *KL, *flags)
    trainer.model.eval()
    original = AutoModelForImageTextToText.from_pretrained(trainer.model.config._name_or_path, dtype="float32").eval()
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight += 0.02 * torch.randn_like(weight)
    samples, expected = [trainer.train_dataset[i] for i in range(6)], 0.0
    for sample in samples:
        now, targets = logits(trainer.model, trainer, sample)
        if sample["anchor"]:
            before = torch.distributions.Categorical(logits=logits(original, trainer, sample)[0])
            now = torch.distributions.Categorical(logits=now)
            expected += 0.7 * torch.distributions.kl_divergence(before, now).sum().item()
        else:
            expected += torch.nn.functional.cross_entropy(now, targets, reduction="sum").item()
    loss = loss_of(trainer, samples)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    reference = trainer.reference.model
    assert reference is None or not any(weight.requires_grad for weight in reference.parameters())


def test_a_training_with_both_resumes_exactly_and_forgets_less(tmp_path):
    marked(tmp_path, 20, kind=every_second, weight=lambda i: 1 + i % 3)
    flags = [
        *KL,
        "--sample_weights",
        "True",
        *"--per_device_train_batch_size 4 --save_steps 2 --learning_rate 1e-3".split(),
    ]
    train.main(arguments(tmp_path, *flags))
    launch(tmp_path, *flags, out="stopped", stop_at=3)
    assert not (tmp_path / "stopped/train_meta.json").exists()
    train.main(arguments(tmp_path, *flags, out="stopped"))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "out")
    settings = json.loads((tmp_path / "out/train_meta.json").read_text())["settings"]
    assert settings["anchor_kl"] == 0.7 and settings["sample_weights"] is True
    with pytest.raises(DataError, match=r"anchor_kl was 0\.7, is now None"):
        train.main(arguments(tmp_path, *flags[2:]))

    train.main(arguments(tmp_path, *flags[2:], out="without"))
    before = AutoModelForImageTextToText.from_pretrained(arguments(tmp_path)[1], dtype="float32").state_dict()
    moved = [
        sum(float((value - before[name]).square().sum()) for name, value in weights(tmp_path / out).items())
        for out in ("out", "without")
    ]
    assert 0 < moved[0] < moved[1]


@pytest.mark.slow
@pytest.mark.parametrize("more", [zero("zero2"), [*zero("zero2"), *LORA]])
def test_two_ranks_match_one(more, tmp_path):
    marked(tmp_path, 16, kind=every_second, weight=lambda i: 1 + i % 3)
    flags = [*KL, "--sample_weights", "True", "--save_strategy", "no", "--learning_rate", "1e-3", "--lora_dropout", "0"]
    flags = flags if LORA[0] in more else flags[:-2]
    more = [word for word in more if word not in ("--lora_dropout", "0.1")]
    assert launch(tmp_path, *flags, *more[2:], "--per_device_train_batch_size", "4", out="one").returncode == 0
    done = launch(tmp_path, *flags, *more, "--per_device_train_batch_size", "2", ranks=2, out="two")
    assert done.returncode == 0, done.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)


@pytest.mark.parametrize(
    "fields, flags, said",
    [
        ({}, KL, "no record of the train files is an anchor"),
        ({"kind": lambda i: "parity"}, KL, "Run PI.sh with --anchors"),
        ({"kind": every_second}, ["--anchor_kl", "-1"], "at least 0"),
        (
            {"weight": lambda i: [1, 2, None][i % 3]},
            ["--sample_weights", "True"],
            "record 2: 'weight' should be a number",
        ),
        ({"weight": lambda i: True}, ["--sample_weights", "True"], "record 0: 'weight'"),
        (
            {"weight": lambda i: 1 - i},
            ["--sample_weights", "True"],
            "record 2: 'weight' should be a number from 0 on: -1",
        ),
        ({"weight": lambda i: 0}, ["--sample_weights", "True"], "all weights are 0"),
    ],
)
def test_what_the_options_need(fields, flags, said, tmp_path):
    marked(tmp_path, **fields)
    with pytest.raises(DataError, match=said):
        train.main(arguments(tmp_path, *flags))
    assert not (tmp_path / "out/train_meta.json").exists()


def test_weights_that_are_not_used_are_named(tmp_path, capsys):
    marked(tmp_path, weight=lambda i: "heavy" if i < 2 else None)
    build(tmp_path)
    assert "2 samples have a weight, which is not used. See --sample_weights." in capsys.readouterr().out


def test_zero3_cannot_have_a_reference(tmp_path):
    marked(tmp_path, kind=every_second)
    done = launch(tmp_path, *KL, *zero("zero3"), ranks=1)
    assert done.returncode == 1 and "not with ZeRO-3" in done.stdout
