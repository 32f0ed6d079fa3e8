"""scripts/check_gpu.sh: with an interpreter that only answers, and, slowly, all of it on the CPU."""

import pytest
import torch
from conftest import ROOT, bash

FAKE = """#!/usr/bin/env bash
case "$*" in
*"import pytest"*) ;;
*"-k training"*) echo "loss 7"; echo "Traceback in $HOME/secret" >&2; exit 3 ;;
*-m\\ pytest*) echo "24 of 24 replies in $PWD" ;;
*gpu.py*) echo "hf: images_per_second 5"; kill -9 $$ ;;
*) echo "2.14 CUDA 13.0" ;;
esac
"""


@pytest.fixture
def fake(tmp_path) -> dict:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(FAKE)
    (tmp_path / "bin/python").chmod(0o755)
    return {"VENV": tmp_path, "VLLM_VENV": tmp_path / "none", "HOME": "/home/very-private"}


def test_a_part_that_fails_does_not_end_the_others_and_the_report_has_no_folders(fake):
    done = bash("scripts/check_gpu.sh", DEVICE="cpu", **fake)
    assert done.returncode == 1, done.stderr
    report = done.stdout.partition("== The text for a report")[2]
    parts = [line.partition(",")[0] for line in report.splitlines() if line.startswith("###")]
    assert parts == [
        "### torch: ok",
        "### replies and memory: ok",
        "### training: FAILED (exit code 3)",
        "### speed: FAILED (exit code 137)",
        "### vllm: not installed (bash scripts/setup.sh vllm)",
    ]
    assert "loss 7\nTraceback in …/secret" in report and "24 of 24 replies in …" in report
    assert str(ROOT) not in report and "very-private" not in report


def test_vllm_is_tried_where_it_is_installed(fake, tmp_path):
    fake["VLLM_VENV"] = tmp_path
    assert "### vllm: ok" in bash("scripts/check_gpu.sh", DEVICE="cpu", **fake).stdout


def test_another_device_is_refused():
    done = bash("scripts/check_gpu.sh", DEVICE="cuda:1")
    assert done.returncode == 2 and "DEVICE is cuda:1" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once():
    done = bash("scripts/check_gpu.sh")
    assert done.returncode == 1 and done.stdout == ""
    assert "error: --device cuda:0: no such device" in done.stderr and "DEVICE=cpu" in done.stderr


@pytest.mark.slow
def test_all_parts_run_on_the_cpu():
    done = bash("scripts/check_gpu.sh", DEVICE="cpu", VLLM_VENV="/none")
    assert done.returncode == 0, done.stdout
    report = done.stdout.partition("== The text for a report")[2]
    assert "teacher, float32: 48 of 48 replies are those of the CPU" in report
    assert "hf: images_per_second" in report and "trainer, packed: samples_per_second" in report
    assert "FAILED" not in report and str(ROOT) not in report
