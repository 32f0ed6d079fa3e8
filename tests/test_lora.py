"""LoRA adapters, merged and not; and the model card."""

import hashlib
import json
from pathlib import Path

import merge_lora
import model_card
import param_groups
import pytest
import torch
import train
from conftest import STUDENT, close
from training import arguments, weights, write

from mpa import models
from mpa.engines import Request
from mpa.engines.hf import HFEngine


def answers(model: Path, folder: Path) -> tuple[list[str], list[float]]:
    """Texts and log-probabilities."""
    asked = [Request(str(i), str(folder / f"{i}.png"), "what color is the shape?", 8) for i in range(6)]
    with HFEngine(str(model), min_pixels=3136, max_pixels=3136, dtype="float32") as engine:
        replies = {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}
    return [replies[r.key]["text"] for r in asked], [replies[r.key]["logprob"] for r in asked]


def same(one: tuple, other: tuple) -> bool:
    return one[0] == other[0] and close(one[1], other[1], 1e-3, least=1)  # nat


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
    adapted = answers(out, tmp_path)
    assert same(adapted, answers(merged, tmp_path)) and not same(adapted, answers(STUDENT, tmp_path))
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
    assert "9 images → 4 parity" in card
    assert "license: apache-2.0" in card
    assert "75.0%" in card
    assert "without human labels" in card
    (tmp_path / "PI_train.meta.json").unlink()  # any other data: nothing is known of its labels
    model_card.write_card(tmp_path, meta, str(tmp_path / "base"), adapter=False)
    assert "Parity Alignment" not in (tmp_path / "README.md").read_text()
