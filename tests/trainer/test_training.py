"""Complete trainings: repeated, stopped and resumed, on several ranks, with every ZeRO stage."""

import json
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import param_groups
import pytest
import torch
import train
from conftest import STUDENT, at_most, bash, close
from safetensors import safe_open
from trainer import Leveler
from training import MINI, ONE, TWO, arguments, build, conversation, free_port, launch, losses, weights, write, zero

from mpa.files.records import InputError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with an uninterrupted training on one rank, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder, 18)
    train.main(arguments(folder, *ONE))
    return folder


def test_a_training_is_complete_and_repeatable(whole):
    train.main(arguments(whole, *ONE, out="again"))
    assert losses(whole / "again") == losses(whole / "out")
    assert (whole / "again/model.safetensors").read_bytes() == (whole / "out/model.safetensors").read_bytes()
    inside = {path.name for path in (whole / "out/checkpoint-9").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= inside
    assert {"processor_config.json", "tokenizer.json", "generation_config.json", "train_settings.json"} <= inside
    assert not (whole / "out/training_args.bin").exists()
    card = (whole / "out/README.md").read_text()
    assert f"base_model: {STUDENT.name}\n" in card and "18 samples" in card
    meta = json.loads((whole / "out/train_meta.json").read_text())
    assert meta["steps"] == 10 and meta["tokens"] == sum(build(whole).train_dataset.lengths)


def test_on_sigterm_it_saves_and_resumes_exactly(whole, capsys):
    workers = ["--dataloader_num_workers", "1"]  # which get the signal, too
    stopped = launch(whole, *ONE, *workers, out="stopped", stop_at=4, with_signal=signal.SIGTERM)
    assert stopped.returncode == 143, stopped.stdout
    assert "stopped at step" in stopped.stdout
    assert train.main(arguments(whole, *ONE, out="stopped")) == 0
    assert "resumes from" in capsys.readouterr().out
    assert losses(whole / "stopped") == losses(whole / "out")
    assert all(torch.equal(value, weights(whole / "out")[name]) for name, value in weights(whole / "stopped").items())


@pytest.mark.slow
def test_two_ranks_match_one(whole):
    done = launch(whole, *TWO, *zero("zero2"), ranks=2, out="two_ranks")
    assert done.returncode == 0, done.stdout
    assert close(losses(whole / "two_ranks"), losses(whole / "out"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_match_one_and_resume_exactly_after_a_kill(whole, stage):
    flags = [*TWO, *zero(stage)]
    if stage == "zero3":
        flags += ["--batch_tokens", "80", "--activation_checkpointing"]
    killed = launch(whole, *flags, ranks=2, out=stage, stop_at=5)
    assert killed.returncode != 0
    assert [path.name for path in (whole / stage).glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = launch(whole, *flags, ranks=2, out=stage)
    assert "resumes from" in resumed.stdout and resumed.returncode == 0, resumed.stdout
    assert close(losses(whole / stage), losses(whole / "out"), 1e-4)
    uninterrupted = launch(whole, *flags, ranks=2, out=f"{stage}_whole")
    assert uninterrupted.returncode == 0, uninterrupted.stdout
    assert losses(whole / stage) == losses(whole / f"{stage}_whole")


@pytest.mark.slow
def test_two_machines_train_together_with_the_same_command(whole):
    """Both machines are this one. NNODES selects torchrun."""
    port = free_port()
    places = {"MODEL": STUDENT, "DATA": whole / "train.json", "IMAGES": whole, "OUTPUT_DIR": whole / "machines"}
    settings = {"BATCH_SIZE": 2, "ACCUMULATION": 1, "EPOCHS": 2, "ZERO": "zero2", "OMP_NUM_THREADS": 1, "NNODES": 2}
    flags = [*MINI, *"--learning_rate 1e-3 --merger_lr 1e-3 --vision_lr 1e-3 --warmup_steps 0 --weight_decay 0".split()]

    def machine(rank: int):
        where = {"NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return bash("PL/Qwen2-VL-Finetune/scripts/finetune.sh", *flags, **places, **settings, **where)

    with ThreadPoolExecutor(2) as pool:
        done = [*pool.map(machine, range(2))]
    assert [run.returncode for run in done] == [0, 0], done[0].stdout + done[0].stderr
    assert close(losses(whole / "machines"), losses(whole / "out"), 1e-4)


@pytest.mark.parametrize(
    "stage",
    [
        *("zero2", "zero3"),
        *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("zero2_offload", "zero3_offload")),  # compiles
    ],
)
def test_each_part_moves_at_its_own_rate_with_deepspeed(tmp_path, stage):
    """Adam's first update is as large as the learning rate, whatever the gradient."""
    write(tmp_path, 4)
    flags = "--per_device_train_batch_size 4 --learning_rate 1e-3 --merger_lr 3e-4 --vision_lr 1e-4 --max_steps 1"
    flags = [*flags.split(), "--lr_scheduler_type", "constant", "--save_strategy", "no", "--adam_epsilon", "1e-12"]
    flags += ["--save_dtype", "float32"]  # an update of 1e-4 is not to be rounded
    done = launch(tmp_path, *flags, *zero(stage), ranks=1)
    assert done.returncode == 0, done.stdout
    before, after, moved = weights(STUDENT), weights(tmp_path / "out"), {}
    for name, value in after.items():
        part = param_groups.part_of(name, "qwen2_vl")
        moved[part] = max(moved.get(part, 0), (value.float() - before[name].float()).abs().max().item())
    assert moved == pytest.approx({"language": 1e-3, "merger": 3e-4, "vision": 1e-4}, rel=2e-2)


@pytest.mark.slow
def test_batches_without_images_do_not_hang_zero3(tmp_path):
    write(tmp_path, 2)
    records = json.loads((tmp_path / "train.json").read_text())
    records += [{**conversation(None, "is red a color?", "yes"), "id": f"t{i}"} for i in range(5)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    done = launch(tmp_path, *TWO, *zero("zero3"), ranks=2)
    assert done.returncode == 0, done.stdout
    assert len(losses(tmp_path / "out")) == 4


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 18)
    whole = Leveler._save_rng_state

    def full(self, output_dir):
        if self.state.global_step > 3:
            raise OSError(28, "No space left on device")
        whole(self, output_dir)

    monkeypatch.setattr(Leveler, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space left"):
        train.main(arguments(tmp_path, *ONE))
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.undo()
    train.main(arguments(tmp_path, *ONE))
    assert len(losses(tmp_path / "out")) == 10


@pytest.mark.parametrize("parts", [0.1, 1.2], ids=["weights", "optimizer"])
def test_weights_and_optimizers_that_do_not_fit_are_one_line(tmp_path, monkeypatch, capsys, parts):
    """safetensors raises its own error, and torch.save a RuntimeError."""
    write(tmp_path, 6)
    with safe_open(STUDENT / "model.safetensors", "pt") as file:
        in_float32 = sum(4 * math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(tmp_path, *ONE, "--save_steps", "1")])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with at_most(int(parts * in_float32)):
        code = train.run()
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 1 and "Traceback" not in said
    assert (
        str(tmp_path / "out") in line
        and "no space left" in line
        and "resumes from the last complete checkpoint" in line
    )
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert train.run() == 0
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_checkpoint_with_other_settings_is_refused(whole):
    (whole / "other").mkdir()
    os.symlink(whole / "out/checkpoint-9", whole / "other/checkpoint-9")
    with pytest.raises(InputError, match=r"checkpoint-9: was trained with other settings: seed was 42, is now 1"):
        train.main(arguments(whole, *ONE, "--seed", "1", out="other"))


def test_the_best_in_accuracy_is_kept(tmp_path, monkeypatch):
    write(tmp_path, 12)
    (tmp_path / "held_out.json").write_text((tmp_path / "train.json").read_text())
    flags = "--per_device_train_batch_size 4 --num_train_epochs 3 --learning_rate 5e-3 --load_best True --save_dtype float32"
    held_out = ["--eval_data_path", str(tmp_path / "held_out.json"), "--save_strategy", "epoch"]
    measured, whole = [], Leveler.evaluate

    def evaluate(self, **more):
        """Measures the accuracy, and reports the second epoch's as the highest."""
        metrics = whole(self, **more)
        measured.append(metrics["eval_accuracy"])
        return {**metrics, "eval_accuracy": [0.5, 0.9, 0.7][len(measured) - 1]}

    monkeypatch.setattr(Leveler, "evaluate", evaluate)
    train.main(arguments(tmp_path, *flags.split(), *held_out))
    assert measured == sorted(measured) and measured[-1] > 0.3  # of what it was trained on
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} >= {"checkpoint-6"}
    best, last = weights(tmp_path / "out/checkpoint-6"), weights(tmp_path / "out")
    assert all(torch.equal(value, last[name]) for name, value in best.items())
    with pytest.raises(InputError, match="other settings: eval_data_sha256 was"):
        (tmp_path / "held_out.json").write_text(json.dumps(json.loads((tmp_path / "train.json").read_text())[1:]))
        train.main(arguments(tmp_path, *flags.split(), *held_out))


@pytest.mark.slow
def test_adapters_resume_exactly(tmp_path, capsys):
    write(tmp_path, 18)
    flags = [*ONE, *"--lora_enable True --freeze_vision_tower True --lora_dropout 0.1".split()]
    train.main(arguments(tmp_path, *flags))
    killed = launch(tmp_path, *flags, out="killed", stop_at=4)
    assert killed.returncode == -signal.SIGKILL
    assert train.main(arguments(tmp_path, *flags, out="killed")) == 0
    assert "resumes from" in capsys.readouterr().out
    assert losses(tmp_path / "killed") == losses(tmp_path / "out")
