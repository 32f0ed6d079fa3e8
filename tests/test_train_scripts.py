"""What the trainer's bash scripts launch."""

from pathlib import Path

import params
import pytest
from conftest import bash


def launch_command(folder, bf16: bool, name: str = "PL.sh", *flags, **environment) -> list[str]:
    """What a script would launch on a GPU with native or emulated bfloat16; torch is mocked."""
    (folder / "torch.py").write_text(
        "import sys\n"
        "if sys.argv[0].endswith(('deepspeed', 'launch.py')):\n"
        "    sys.exit(print(*sys.argv, sep='\\n'))\n"
        "class cuda:\n"
        "    device_count = lambda: 1\n"
        f"    is_bf16_supported = lambda including_emulation=True: including_emulation or {bf16}\n"
    )
    done = bash(f"PL/Qwen2-VL-Finetune/scripts/{name}", *flags, PYTHONPATH=folder, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def flag_value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_script_trains_in_bfloat16_only_where_the_gpu_has_it(tmp_path):
    new, old = launch_command(tmp_path, True), launch_command(tmp_path, False)
    assert ("--bf16" in new, "--fp16" in new) == (True, False)
    assert ("--bf16" in old, "--fp16" in old) == (False, True)
    assert flag_value(old, "--fp16") == "True"


def test_two_trainings_on_one_machine_do_not_share_a_port(tmp_path):
    assert "--standalone" in launch_command(tmp_path, True)  # torchrun takes one that is free
    machines = launch_command(tmp_path, True, NNODES=2, MASTER_ADDR="there", MASTER_PORT=4321)
    assert "--standalone" not in machines and flag_value(machines, "--master_port") == "4321"


def test_machines_of_a_hostfile_are_deepspeeds_to_reach_by_flag_or_environment(tmp_path):
    by_flag = launch_command(tmp_path, True, "PL.sh", "--hostfile", "/a b/hosts", "--seed", "3")
    by_name = launch_command(tmp_path, True, "PL.sh", "--seed", "3", HOSTFILE="/a b/hosts")
    for words in (by_flag, by_name):
        assert words.index("--hostfile") < words.index("--deepspeed")
        assert (flag_value(words, "--hostfile"), words[-2:]) == ("/a b/hosts", ["--seed", "3"])
    assert len(by_flag) == len(by_name)


def test_the_script_takes_its_paths_from_the_environment(tmp_path):
    words = launch_command(tmp_path, True, TRAIN_JSON="/a b/train.json", OUTPUT_DIR="/a b/out")
    assert flag_value(words, "--data_path") == "/a b/train.json"
    assert flag_value(words, "--output_dir") == "/a b/out"


@pytest.mark.parametrize("name", ["PL.sh", "finetune.sh", "finetune_lora.sh", "finetune_lora_vision.sh"])
def test_every_script_gives_flags_that_the_trainer_takes(tmp_path, name):
    words = launch_command(tmp_path, True, name, DATA="a.json:0.9 b.json:0.1", MODEL="m", OUTPUT_DIR="out")
    flags = words[words.index(next(word for word in words if word.endswith("train.py"))) + 1 :]
    assert flags[0] == "--deepspeed" and Path(flags[1]).is_file()
    model, images, _ = params.parse(["--use_cpu" if flag == "--bf16" else flag for flag in flags[2:]])
    assert (model.lora_enable, model.vision_lora) == ("lora" in name, "vision" in name)
    assert name == "PL.sh" or images.data_path == ["a.json:0.9", "b.json:0.1"]
