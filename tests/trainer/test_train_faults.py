"""Faults in a training: non-finite numbers, damaged checkpoints, two trainings in one folder; and what is saved."""

import fcntl
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
import train
from conftest import ROOT, STUDENT
from safetensors.torch import load_file, save_file
from training import (
    ONE,
    TWO,
    arguments,
    build,
    conversation,
    free_port,
    launch,
    losses,
    weights,
    write,
    write_records,
    zero,
)
from transformers import AutoModelForImageTextToText, AutoProcessor

from mpa.files.records import InputError
from mpa.models import identity, loading

QUICK = "--per_device_train_batch_size 4 --max_steps 2 --learning_rate 1e-4 --save_steps 1 --save_total_limit 3".split()
KEPT = [*ONE, "--save_total_limit", "3"]


# --- non-finite numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--max_grad_norm", "0"], ["--lora_enable", "True"]], ids=str)
def test_a_non_finite_gradient_stops_before_the_step_and_names_the_samples(tmp_path, more):
    write(tmp_path, 12)
    with pytest.raises(InputError) as error:
        flags = "--per_device_train_batch_size 4 --max_steps 3 --learning_rate 1e3 --save_strategy no".split()
        train.main(arguments(tmp_path, *flags, *more))
    said = str(error.value)
    assert (
        ("step 2" in said or "step 3" in said) and "samples with id s" in said and "There is no checkpoint yet" in said
    )
    assert not [*tmp_path.glob("out/*.safetensors")]
    assert not (tmp_path / "out").exists()  # nothing was written, nothing is left


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_non_finite_gradient_stops_two_ranks(tmp_path, stage):
    write(tmp_path, 16)
    flags = "--per_device_train_batch_size 2 --max_steps 4 --learning_rate 1e3 --save_steps 1".split()
    done = launch(tmp_path, *flags, *zero(stage), ranks=2)
    assert done.returncode != 0
    assert "error: step 2" in done.stdout and "The last checkpoint, checkpoint-1, is good" in done.stdout, done.stdout
    assert not [*tmp_path.glob("out/*.safetensors")]
    saved = weights(tmp_path / "out/checkpoint-1")
    assert all(value.isfinite().all() for value in saved.values())


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    write(tmp_path, 4)
    trainer = build(tmp_path)
    with torch.no_grad():
        next(trainer.model.parameters())[0] = torch.inf
    with pytest.raises(InputError, match="weights are not finite"):
        trainer.save_model(str(tmp_path / "out"))
    assert not [*tmp_path.glob("out/*")]


# --- checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory):
    """A folder with a training of ten steps and three checkpoints, as if it had been killed before the end."""
    folder = tmp_path_factory.mktemp("ten_steps")
    write(folder, 18)
    train.main(arguments(folder, *KEPT))
    for name in ("train_meta.json", "model.safetensors"):
        (folder / "out" / name).unlink()
    (folder / "out").rename(folder / "kept")
    return folder


@pytest.fixture
def stopped(ten_steps):
    """The same folder, with all that a test before has changed put back."""
    shutil.rmtree(ten_steps / "out", ignore_errors=True)
    shutil.copytree(ten_steps / "kept", ten_steps / "out")
    return ten_steps


def damage(folder, how: str) -> None:
    if how == "truncated weights":
        os.truncate(folder / "model.safetensors", 1000)
    elif how.startswith("zeros in "):
        file = folder / how.removeprefix("zeros in ")
        size = file.stat().st_size
        with file.open("r+b") as content:
            content.seek(size // 3)
            content.write(bytes(min(40_000, size // 2)))
    elif how == "other weights":
        shutil.copy(STUDENT / "model.safetensors", folder / "model.safetensors.index.json")
    elif how == "a changed pickle":
        content = bytearray((folder / "optimizer.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "optimizer.pt").write_bytes(content)
    elif how == "a new pickle":
        (folder / "other.pt").write_bytes(pickle.dumps(1))
    elif how == "a cut manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / how.removeprefix("no ")).unlink()


@pytest.mark.parametrize(
    "how",
    [
        *("no optimizer.pt", "no scheduler.pt", "no trainer_state.json", "no manifest.json", "no train_settings.json"),
        *("truncated weights", "a changed pickle", "a new pickle", "a cut manifest", "other weights"),
        *(f"zeros in {name}" for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "config.json")),
        *("zeros in manifest.json", "zeros in rng_state.pth"),
    ],
)
def test_an_incomplete_checkpoint_is_passed_over(stopped, how):
    steps = sorted(int(path.name.split("-")[1]) for path in stopped.glob("out/checkpoint-*"))
    assert len(steps) == 3
    damage(stopped / f"out/checkpoint-{steps[-1]}", how)
    found, (refused,) = checkpoints.last_complete(stopped / "out")
    assert found == stopped / f"out/checkpoint-{steps[-2]}"
    assert refused.startswith(f"{stopped}/out/checkpoint-{steps[-1]}: ")


def test_a_training_resumes_from_the_last_complete_checkpoint_and_names_the_other(stopped, capsys):
    *_, good, bad = sorted(stopped.glob("out/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    damage(bad, "truncated weights")
    train.main(arguments(stopped, *KEPT))
    said = capsys.readouterr().out
    assert f"skipped {bad}: model.safetensors was truncated" in said and f"resumes from {good}" in said
    assert len(losses(stopped / "out")) == 10


def test_one_damaged_checkpoint_alone_is_refused_by_name(tmp_path):
    write(tmp_path, 8)
    flags = [*ONE[:2], "--max_steps", "4", "--save_steps", "2", "--save_total_limit", "1", "--learning_rate", "1e-3"]
    train.main(arguments(tmp_path, *flags))
    (tmp_path / "out/train_meta.json").unlink()
    (checkpoint,) = tmp_path.glob("out/checkpoint-*")
    damage(checkpoint, "zeros in model.safetensors")
    with pytest.raises(InputError, match=rf"{checkpoint}: model.safetensors was changed since it was written.*start"):
        train.main(arguments(tmp_path, *flags, "--resume_from_checkpoint", str(checkpoint)))
    with pytest.raises(InputError, match=r"model.safetensors was changed.*No checkpoint is left to resume from"):
        train.main(arguments(tmp_path, *flags))
    trainer = build(tmp_path)
    trainer.state.best_model_checkpoint = str(checkpoint)
    with pytest.raises(InputError, match=rf"{checkpoint}: model.safetensors was changed.*had the best accuracy"):
        trainer._load_best_model()


def test_a_checkpoint_of_an_earlier_version_is_resumed_if_its_weights_are_whole(stopped, capsys):
    """Its manifest holds no digests of the weights."""
    last = max(stopped.glob("out/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    manifest = json.loads((last / "manifest.json").read_text())
    for name, entry in manifest.items():
        if not name.endswith((".pt", ".pth")):
            del entry["sha256"]
    (last / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(last, last.with_name("kept"))
    train.main(arguments(stopped, *KEPT))
    assert f"resumes from {last}" in capsys.readouterr().out
    for change, said in (("pop", "1 tensors of the model are missing"), ("nan", "not finite")):
        shutil.rmtree(stopped / "out")
        shutil.copytree(stopped / "kept", stopped / "out")
        state = load_file(last / "model.safetensors")
        name = next(name for name in state if "layers.1.mlp" in name)
        state = {n: v for n, v in state.items() if n != name} | (
            {name: state[name] * torch.nan} if change == "nan" else {}
        )
        save_file(state, last / "model.safetensors", {"format": "pt"})
        manifest["model.safetensors"]["bytes"] = (last / "model.safetensors").stat().st_size
        (last / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=f"{last}.*{said}"):
            train.main(arguments(stopped, *KEPT))


def test_everything_is_on_the_disk_before_a_checkpoint_gets_its_name(tmp_path, monkeypatch):
    write(tmp_path, 4)
    synced, renamed, whole = set(), {}, os.rename

    def fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.add(re.sub(r"/\.([^/]+)\.\w+\.part$", r"/\1", str(path)))

    def rename(source, target):
        renamed[Path(target).name] = {str(path) for path in [source, *Path(source).rglob("*")]} - synced
        whole(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    train.main(arguments(tmp_path, *QUICK))
    out = tmp_path / "out"
    assert {name: missing for name, missing in renamed.items() if name.startswith("checkpoint-")} == {
        "checkpoint-1": set()
    }
    assert {str(out), str(out / "model.safetensors"), str(out / "train_meta.json")} <= synced


def test_a_damaged_final_model_is_refused_by_name_in_a_stage(tmp_path):
    write(tmp_path, 4)
    train.main(arguments(tmp_path, *QUICK))
    out, kept = tmp_path / "out", tmp_path / "kept"
    manifest = json.loads((out / "manifest.json").read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json"} <= set(manifest)
    assert not {"train_meta.json", "README.md", "trainer_state.json"} & set(manifest)
    loading.load_model(str(out), "cpu", torch.float32)
    before = identity.identity(str(out))
    (out / "README.md").write_text("my own card")
    assert identity.identity(str(out)) == before and loading.load_model(str(out), "cpu", torch.float32)
    AutoModelForImageTextToText.from_pretrained(out).save_pretrained(out)
    AutoProcessor.from_pretrained(out).save_pretrained(out)
    assert loading.load_model(str(out), "cpu", torch.float32)
    out.rename(kept)
    for how in ("zeros in model.safetensors", "zeros in config.json", "zeros in tokenizer.json", "no tokenizer.json"):
        shutil.copytree(kept, out, dirs_exist_ok=True)
        damage(out, how)
        name = how.split()[-1]
        with pytest.raises(InputError, match=rf"{out}: {name} (was changed since it was written|is missing)|cannot be"):
            loading.load_model(str(out), "cpu", torch.float32)
    shutil.copytree(kept, out, dirs_exist_ok=True)
    os.truncate(out / "tokenizer.json", 1000)
    with pytest.raises(InputError, match=r"tokenizer\.json was truncated or changed: 1000 bytes"):
        loading.check_model_path(str(out))
    kept = json.loads((kept / "manifest.json").read_text())
    assert kept == manifest


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path):
    write(tmp_path, 18)
    train.main(arguments(tmp_path, *ONE, "--save_only_model", "True"))
    (tmp_path / "out/train_meta.json").unlink()
    with pytest.raises(InputError, match=r"holds the model only.*--resume_from_checkpoint no starts again"):
        train.main(arguments(tmp_path, *ONE, "--save_only_model", "True"))


def test_a_meta_file_that_was_cut_off_is_named(tmp_path):
    write(tmp_path, 4)
    train.main(arguments(tmp_path, *QUICK))
    (tmp_path / "out/train_meta.json").write_text('{"settings": {')
    with pytest.raises(InputError, match=r"train_meta\.json: cannot be read"):
        train.main(arguments(tmp_path, *QUICK))


def test_two_trainings_do_not_share_a_folder(tmp_path):
    write(tmp_path, 4)
    lock = tmp_path / ".out.lock"
    with open(lock, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="out: another process is writing it; wait for it or stop it"):
            train.main(arguments(tmp_path, *QUICK))
    train.main(arguments(tmp_path, *QUICK))  # the lock of a finished training does not block
    assert not lock.exists()


def test_adapters_are_no_base_to_train_on(tmp_path):
    write(tmp_path, 4)
    train.main(arguments(tmp_path, *QUICK, "--lora_enable", "True"))
    with pytest.raises(InputError, match=r"holds LoRA adapters.*merge_lora\.sh"):
        train.main(arguments(tmp_path, *QUICK, model=tmp_path / "out", out="second"))


# --- what is saved ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_final_weights_are_in_the_bases_dtype_and_checkpoints_in_float32(tmp_path, dtype, capsys):
    write(tmp_path, 8)
    train.main(arguments(tmp_path, *QUICK, "--save_dtype", dtype))
    expected = {"auto": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}[
        dtype
    ]  # the student's is float16
    assert {value.dtype for value in load_file(tmp_path / "out/model.safetensors").values()} == {expected}
    (checkpoint,) = tmp_path.glob("out/checkpoint-*")
    assert {value.dtype for value in load_file(checkpoint / "model.safetensors").values()} == {torch.float32}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*config.json"))
    assert '"use_cache": false' not in text and "local_files_only" not in text and str(STUDENT) not in text
    assert f" GB, {config['dtype']})" in capsys.readouterr().out
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: student\n" in card and "license: " in card and str(STUDENT) not in card


@pytest.mark.slow
def test_one_rank_of_two_that_fails_does_not_leave_the_other_waiting(tmp_path):
    write(tmp_path, 8)
    shutil.copytree(STUDENT, tmp_path / "bad")
    state = load_file(tmp_path / "bad/model.safetensors")
    huge = {name: value.float() * (1e18 if "norm" in name else 1) for name, value in state.items()}
    save_file(huge, tmp_path / "bad/model.safetensors", {"format": "pt"})
    done = launch(tmp_path, *TWO, *zero("zero2"), "--model_id", tmp_path / "bad", ranks=2)
    assert done.returncode != 0 and "error: step 1" in done.stdout, done.stdout
    save_file(state | {n: v * torch.nan for n, v in state.items() if "norm" in n}, tmp_path / "bad/model.safetensors")
    done = launch(tmp_path, *TWO, *zero("zero2"), "--model_id", tmp_path / "bad", ranks=2)
    assert done.returncode != 0 and "tensors hold values that are not finite" in done.stdout, done.stdout


def test_a_manifest_names_every_file(tmp_path):
    write(tmp_path, 8)
    train.main(arguments(tmp_path, *QUICK))
    (checkpoint,) = tmp_path.glob("out/checkpoint-*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
    assert checkpoints.fault(checkpoint) == ""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3", "zero2_offload"])
def test_in_bfloat16_eight_micro_batches_add_up_to_the_exact_gradient(tmp_path, stage):
    """Eight times the same sample, of which each is an eighth of the loss, have exactly the gradient of one."""
    gradients = []
    for n in (1, 8):
        folder = tmp_path / str(n)
        folder.mkdir()
        same = conversation("a.png", "<image>\nwhat color is the shape?", "a red one")
        write_records(folder, *[same | {"id": i} for i in range(n)])
        flags = (
            f"--per_device_train_batch_size 1 --gradient_accumulation_steps {n} --max_grad_norm 0 --bf16 True".split()
        )
        places = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, ROOT / "tests/accumulated_gradients.py", folder / "gradients.pt"]
        done = subprocess.run(
            [*command, *arguments(folder, *flags, *zero(stage))],
            env={**os.environ, **places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        gradients.append(torch.cat([part.flatten() for part in torch.load(folder / "gradients.pt")]))
    assert gradients[0].any() and torch.equal(*gradients)


def test_steps_that_float16_skipped_are_counted(tmp_path):
    write(tmp_path, 4)
    trainer = build(tmp_path)
    trainer.state.global_step, trainer.first_step, trainer.updates = 9, 4, 3  # resumed at step 4
    assert trainer.skipped_steps == 0
    trainer.args.fp16 = True
    assert trainer.skipped_steps == 2


def test_the_loaders_flags_reach_it_and_the_labels_stay_on_the_host(tmp_path):
    write(tmp_path, 4)
    flags = "--dataloader_num_workers 1 --dataloader_multiprocessing_context forkserver --dataloader_in_order False"
    trainer = build(tmp_path, *flags.split())
    loader = trainer.get_train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "forkserver" and not loader.in_order
    trainer.args.__dict__["_setup_devices"] = torch.device("meta")  # `args.device`
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    assert {name for name, value in batch.items() if torch.is_tensor(value) and value.device.type == "cpu"} == {
        "labels"
    }
