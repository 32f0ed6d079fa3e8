"""Every family is trained: the loss falls, the model is saved and loads again, and LoRA adapters answer as merged."""

import json

import merge_lora
import miniatures
import param_groups
import pytest
import torch
import train
from training import answers, arguments, conversation, losses, same, write
from transformers import AutoModelForImageTextToText

from mpa.files.records import InputError
from mpa.models import loading

STEPS = "--per_device_train_batch_size 4 --num_train_epochs 4 --save_strategy no --lr_scheduler_type constant".split()


FAST = (
    "qwen2_vl",
    "internvl",
    "llava",
    "smolvlm",
)  # those of the paper's models; the others are trained in the slow tests
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in miniatures.FAMILIES if name not in FAST]


@pytest.fixture(scope="module", params=[*FAST, *OTHERS])
def checkpoint(request, tmp_path_factory):
    return miniatures.make(request.param, tmp_path_factory.mktemp(request.param))


def test_training_lowers_the_loss_and_what_is_saved_loads_again(checkpoint, tmp_path):
    write(tmp_path, 8)
    train.main(arguments(tmp_path, *STEPS, "--learning_rate", "3e-3", model=checkpoint))
    out = tmp_path / "out"
    seen = losses(out)
    assert seen[-1] < 0.8 * seen[0]
    loading.check_model_path(str(out))
    model, loaded = AutoModelForImageTextToText.from_pretrained(out, dtype="float32", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32").state_dict()
    kind = model.config.model_type
    moved = {
        param_groups.part_of(name, kind) for name, w in model.state_dict().items() if not torch.equal(w, base[name])
    }
    assert moved == {"vision", "merger", "language"}
    assert not same(answers(out, tmp_path), answers(checkpoint, tmp_path))


def test_merged_adapters_answer_as_the_adapters_do(checkpoint, tmp_path):
    write(tmp_path, 8)
    lora = "--lora_enable True --learning_rate 1e-2 --vision_lora True --freeze_vision_tower True --freeze_merger True"
    train.main(arguments(tmp_path, *STEPS, *lora.split(), model=checkpoint))
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert losses(out)[-1] < losses(out)[0]
    merge_lora.merge(out, merged)
    adapted = answers(out, tmp_path)
    assert same(adapted, answers(merged, tmp_path)) and not same(adapted, answers(checkpoint, tmp_path))
    kind, base = loading.model_type(checkpoint), AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(merged).state_dict()
    moved = {param_groups.part_of(name, kind) for name in base if not torch.equal(after[name], base[name])}
    assert moved == {"vision", "language"}


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3", "lfm2_vl", "paligemma"])
def test_packing_is_refused_where_samples_would_see_each_other(tmp_path, family):
    path = miniatures.make(family, tmp_path / family)
    write(tmp_path, 2)
    with pytest.raises(InputError, match=f"--packing: samples of model type {family} would see each other"):
        train.main(arguments(tmp_path, "--packing", "True", model=path))


def test_several_turns_are_left_out_by_name_where_a_family_has_no_form_for_them(tmp_path, capsys):
    write(tmp_path, 2)
    records = json.loads((tmp_path / "train.json").read_text())
    records.append(conversation(["0.png"], "<image>\nwhat?", "red", "sure?", "yes"))
    (tmp_path / "train.json").write_text(json.dumps(records))
    path = miniatures.make("paligemma", tmp_path / "model")
    train.main(arguments(tmp_path, "--save_strategy", "no", model=path))
    assert "id 7: this model takes one question and its answer" in capsys.readouterr().out
