"""One process on a CPU trains without DeepSpeed, as it would with it; several compile nothing."""

import os
import signal
from pathlib import Path

import pytest
import train
from conftest import STUDENT, bash
from training import MINI, TRAINER, arguments, launch, losses, weights, write, zero

from mpa.files.records import InputError

# Clipped gradients, two micro-batches per step, weight decay, warm-up, and a rate for each part.
FLAGS = (
    "--per_device_train_batch_size 3 --gradient_accumulation_steps 2 --num_train_epochs 2 --learning_rate 1e-3 --merger_lr 5e-4 "
    "--vision_lr 3e-4 --warmup_steps 0.3 --weight_decay 0.1 --max_grad_norm 0.5 --adam_beta1 0.9 --adam_beta2 0.98 "
    "--adam_epsilon 1e-7 --save_dtype float32 --save_steps 2"
).split()


@pytest.fixture(scope="module")
def with_deepspeed(tmp_path_factory):
    """A folder with a training by one rank with DeepSpeed's ZeRO-2, in `out`; one that was stopped in `stopped`."""
    folder = tmp_path_factory.mktemp("with_deepspeed")
    write(folder, 18)
    done = launch(folder, *FLAGS, *zero("zero2"), ranks=1)
    assert done.returncode == 0, done.stdout
    stopped = launch(folder, *FLAGS, *zero("zero2"), ranks=1, out="stopped", stop_at=3, with_signal=signal.SIGTERM)
    assert "stopped at step 4 and saved" in stopped.stdout
    return folder


def test_losses_and_weights_are_those_of_deepspeed(with_deepspeed):
    train.main(arguments(with_deepspeed, *FLAGS, out="plain"))
    assert losses(with_deepspeed / "plain") == pytest.approx(losses(with_deepspeed / "out"), rel=1e-4)
    before, plain, sharded = weights(STUDENT), weights(with_deepspeed / "plain"), weights(with_deepspeed / "out")
    for name, value in plain.items():
        moved = (value - before[name]).abs().max()
        assert (value - sharded[name]).abs().max() <= 1e-2 * moved, name


def test_a_finished_training_with_deepspeed_counts_as_finished(with_deepspeed, capsys):
    assert train.main(arguments(with_deepspeed, *FLAGS)) == 0
    assert "already exists, trained with these settings" in capsys.readouterr().out


def test_a_checkpoint_of_deepspeed_is_refused_with_the_flag_that_resumes_it(with_deepspeed):
    with pytest.raises(InputError) as refused:
        train.main(arguments(with_deepspeed, *FLAGS, out="stopped"))
    flags = zero("zero2")
    assert f"was written with DeepSpeed, and this run has none. {' '.join(flags)} resumes it" in str(refused.value)
    resumed = launch(with_deepspeed, *FLAGS, *flags, ranks=1, out="stopped")
    assert resumed.returncode == 0 and "resumes from" in resumed.stdout, resumed.stdout
    assert losses(with_deepspeed / "stopped") == losses(with_deepspeed / "out")


@pytest.mark.parametrize(
    ("processes", "stage"),
    [(1, "zero2"), *(pytest.param(2, stage, marks=pytest.mark.slow) for stage in ("zero2", "zero3_offload"))],
)
def test_no_compiler_is_needed_and_one_process_does_not_import_deepspeed(tmp_path, processes, stage):
    """With nothing in the PATH but bash, coreutils and the environment's Python."""
    write(tmp_path, 8)
    tools, extensions = tmp_path / "tools", tmp_path / "extensions"
    tools.mkdir()
    for name in ("bash", "basename", "date", "dirname", "nproc", "realpath"):
        os.symlink(
            next(Path(folder, name) for folder in os.get_exec_path() if Path(folder, name).exists()), tools / name
        )
    environment = {"PATH": tools, "TORCH_EXTENSIONS_DIR": extensions, "CPU_PROCESSES": processes}
    if processes == 1:
        (tmp_path / "packages/deepspeed").mkdir(parents=True)
        (tmp_path / "packages/deepspeed/__init__.py").write_text("raise AssertionError")
        environment["PYTHONPATH"] = tmp_path / "packages"
    places = {"MODEL": STUDENT, "DATA": tmp_path / "train.json", "IMAGES": tmp_path, "OUTPUT_DIR": tmp_path / "out"}
    script = TRAINER.relative_to(TRAINER.parents[1]) / "scripts/finetune.sh"
    done = bash(str(script), *MINI[2:], **places, **environment, ZERO=stage, BATCH_SIZE=2)
    assert done.returncode == 0, done.stderr
    assert not extensions.exists() and (tmp_path / "out/train_meta.json").exists()
