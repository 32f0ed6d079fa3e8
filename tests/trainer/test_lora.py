"""LoRA adapters, merged and not; and the model card."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import merge_lora
import model_card
import param_groups
import pytest
import resume_settings
import torch
import train
from conftest import ROOT, STUDENT
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training import answers, arguments, same, weights, write
from transformers import AutoModelForImageTextToText

from mpa.files.records import InputError
from mpa.models import identity, loading

QUICK = "--lora_enable True --per_device_train_batch_size 2 --learning_rate 1e-2 --save_steps 2".split()


@pytest.mark.parametrize("flags", ["", "--vision_lora True --freeze_vision_tower True --freeze_merger True"])
def test_merged_adapters_answer_as_the_adapters_do_and_the_base_is_untouched(tmp_path, flags):
    write(tmp_path, 8)
    before = hashlib.sha256((STUDENT / "model.safetensors").read_bytes()).hexdigest()
    train.main(arguments(tmp_path, *QUICK, *flags.split()))
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= {
        p.name for p in out.iterdir()
    }
    merge_lora.merge(out, merged)
    loading.check_model_path(str(out))
    adapted = answers(out, tmp_path)
    assert same(adapted, answers(merged, tmp_path)) and not same(adapted, answers(STUDENT, tmp_path))
    assert identity.identity(str(out)) != identity.identity(str(merged))
    assert hashlib.sha256((STUDENT / "model.safetensors").read_bytes()).hexdigest() == before
    base, after = weights(STUDENT), weights(merged)
    moved = {param_groups.part_of(name, "qwen2_vl") for name in base if not torch.equal(after[name], base[name])}
    assert moved == ({"language", "vision"} if flags else {"language", "vision", "merger"})


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A folder with adapters in `out`, the merger trained in full, and their base model in `base`."""
    folder = tmp_path_factory.mktemp("adapted")
    write(folder, 4)
    shutil.copytree(STUDENT, folder / "base")
    train.main(arguments(folder, *QUICK, "--freeze_vision_tower", "True", model=folder / "base"))
    (folder / "out").rename(folder / "adapters")
    return folder


def changed(file: Path, how) -> None:
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file, {"format": "pt"})


def first(tensors: dict, word: str) -> str:
    return next(name for name in sorted(tensors) if word in name)


DAMAGES = {
    "lacks LoRA": (lambda t: t.pop(first(t, "lora_B")), r"1 tensors of its adapters are missing.*lora_B"),
    "lacks half": (lambda t: [t.pop(n) for n in sorted(t)[::2]], r"tensors of its adapters are missing"),
    "lacks a module": (lambda t: t.pop(first(t, "merger")), r"1 tensors of its adapters are missing.*merger"),
    "holds more": (lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}), r"left over.*x\.lora_A"),
    "another rank": (lambda t: t.update({n: t[n][:3].clone() for n in t if "lora_A" in n}), r"another shape.*lora_A"),
    "another width": (lambda t: t.update({first(t, "merger"): torch.ones(3)}), r"1 tensors .*another shape.*merger"),
    "NaN": (
        lambda t: t[first(t, "lora_A")].view(-1)[5:].fill_(torch.nan),
        r"1 of \d+ tensors hold values that are not",
    ),
    "infinite": (lambda t: t[first(t, "merger")].view(-1)[:1].fill_(-torch.inf), r"1 of \d+ tensors hold values"),
}


@pytest.mark.parametrize("listed", [False, True], ids=["", "with manifest"])
@pytest.mark.parametrize("how", DAMAGES)
def test_adapters_that_are_not_whole_are_neither_used_nor_merged(adapted, tmp_path, how, listed):
    folder = shutil.copytree(adapted / "adapters", tmp_path / "adapters")
    damage, said = DAMAGES[how]
    changed(folder / "adapter_model.safetensors", damage)
    if listed:
        said = (
            r"adapter_model\.safetensors was (truncated or )?changed.*if the change is meant, remove its manifest\.json"
        )
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=said):
        loading.load_model(str(folder), "cpu", torch.float32)
    with pytest.raises(InputError, match=said):
        merge_lora.merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


BASES = {
    "one value": (
        lambda t: t[first(t, "layers.1.mlp")].view(-1)[700].mul_(2),
        r"another base model.*safetensors changed",
    ),
    "lacks a tensor": (
        lambda t: t.pop(first(t, "layers.1.mlp")),
        r"1 tensors of the model are missing.*layers\.1\.mlp",
    ),
    "NaN": (
        lambda t: t[first(t, "norm")].fill_(torch.nan),
        r"1 of \d+ tensors hold values that are not finite \(.*norm",
    ),
    "config": (None, r"another base model than .* is now \(config\.json changed\)"),
}


@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("how", BASES)
def test_a_base_that_changed_under_its_adapters_is_named(adapted, tmp_path, how, moved):
    base = shutil.copytree(adapted / "base", tmp_path / "base")
    folder = shutil.copytree(adapted / "adapters", tmp_path / "adapters")
    config = json.loads((folder / "adapter_config.json").read_text())
    if not moved:
        config["base_model_name_or_path"] = str(base)
        (folder / "adapter_config.json").write_text(json.dumps(config))
    damage, said = BASES[how]
    if damage:
        changed(base / "model.safetensors", damage)
    else:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"image_token_id": 3}))
    with pytest.raises(InputError, match=said):
        merge_lora.merge(folder, tmp_path / "merged", base=str(base) if moved else None)
    if not moved:
        with pytest.raises(InputError, match=said):
            loading.load_model(str(folder), "cpu", torch.float32)
    assert not (tmp_path / "merged").exists()


def test_adapters_whose_base_moved_or_of_an_earlier_version_are_merged(adapted, tmp_path):
    base = shutil.copytree(adapted / "base", tmp_path / "base")
    merge_lora.merge(adapted / "adapters", tmp_path / "merged", base=str(base))
    folder = shutil.copytree(adapted / "adapters", tmp_path / "adapters")
    for name in ("base_model.json", "manifest.json"):
        (folder / name).unlink()
    merge_lora.merge(folder, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "merged/model.safetensors").read_bytes()
    (tmp_path / "merged/model.safetensors").write_bytes(bytes(9))
    with pytest.raises(InputError, match=r"merged/model\.safetensors: its weights cannot be read"):
        loading.check_model_path(str(tmp_path / "merged"))


def test_adapters_and_a_base_that_were_saved_again_or_moved_are_used(adapted, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(adapted / "base")
    base.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"transformers_version": "6.0"}))
    folder = shutil.copytree(adapted / "adapters", tmp_path / "adapters")
    PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    loading.load_model(str(folder), "cpu", torch.float32)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3 * config["lora_alpha"]}))
    with pytest.raises(InputError, match=r"adapter_config\.json was truncated or changed"):
        loading.load_model(str(folder), "cpu", torch.float32)


@pytest.mark.parametrize("content", ["[]", '"x"', "{}", '{"base_model_name_or_path": 3}'])
def test_adapters_that_name_no_base_are_not_merged(adapted, tmp_path, content):
    folder = shutil.copytree(adapted / "adapters", tmp_path / "adapters")
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(InputError, match="does not name its base model"):
        merge_lora.merge(folder, tmp_path / "merged")


def test_a_resumed_training_of_adapters_needs_their_base(tmp_path, monkeypatch):
    """Also where the settings' digest, which samples a large file, does not see the change."""
    monkeypatch.setattr(resume_settings, "fingerprint", lambda _: "sampled")
    write(tmp_path, 8)
    shutil.copytree(STUDENT, tmp_path / "base")
    train.main(arguments(tmp_path, *QUICK, model=tmp_path / "base"))
    (tmp_path / "out/train_meta.json").unlink()
    content = bytearray((tmp_path / "base/model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "base/model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"another base model than .*base is now \(model\.safetensors changed\)"):
        train.main(arguments(tmp_path, *QUICK, model=tmp_path / "base"))


def test_the_merging_command_says_it_in_one_line(adapted, tmp_path):
    command = [sys.executable, ROOT / "PL/Qwen2-VL-Finetune/src/merge_lora.py", "--model-path", adapted / "adapters"]
    command += ["--model-base", tmp_path / "nowhere", "--save-model-path", tmp_path / "merged"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path}/nowhere: no such folder"
    )


def test_the_card_tells_the_parity_counts_and_the_bases_licence(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "PI_train.meta.json").write_text(json.dumps({"funnel": {"pictures": 9, "parity": 4, "anchors": 8}}))
    settings = dict.fromkeys(
        "learning_rate vision_lr merger_lr num_train_epochs per_device_train_batch_size gradient_accumulation_steps "
        "image_min_pixels image_max_pixels seed".split(),
        1,
    )
    settings["data_path"] = [str(tmp_path / "PI_train.json")]
    meta = {"settings": settings, "samples": 4, "tokens": 80, "steps": 2, "loss": 0.5, "accuracy": 0.75}
    model_card.write_card(tmp_path, meta, str(tmp_path / "base"), adapter=False)
    card = (tmp_path / "README.md").read_text()
    assert "- 9 images → 4 parity + 8 anchors\n" in card
    assert "license: apache-2.0" in card
    assert "75.0%" in card
    assert "without human labels" in card
    (tmp_path / "PI_train.meta.json").write_text(
        "{}"
    )  # any other data, as a baseline's: nothing is known of its labels
    model_card.write_card(tmp_path, meta, str(tmp_path / "base"), adapter=False)
    assert "Parity Alignment" not in (tmp_path / "README.md").read_text()
