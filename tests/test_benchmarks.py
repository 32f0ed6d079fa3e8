"""The benchmarks for a GPU, as far as a CPU can tell, and README's estimates."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import estimate
import shapes

from mpa.engines import Request


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    work = tmp_path_factory.mktemp("shapes")
    return shapes.prepare(shapes.TINY, work, "cpu", "float32", 3, 56, 1.0, 2, 0)


def test_operations_are_those_of_the_images_and_not_of_the_memory_probe(job, monkeypatch):
    alone, load = shapes.operations(job), shapes.Forced._load_model

    def with_probe(engine):
        load(engine)
        image = shapes.Image.new("RGB", (56, 56))
        for rows in (1, 3):
            inputs = engine.preprocessor.process([image] * rows, ["What is it?"] * rows)
            engine.reply([Request("", "", "What is it?", max_new_tokens=8)] * rows, inputs)

    monkeypatch.setattr(shapes.Forced, "_load_model", with_probe)
    assert shapes.operations(job) == alone
    assert 0 < alone["ours"] < alone["plain"]


def test_the_svlm_counts_for_its_share_of_the_images(job):
    whole, half = (shapes.operations(shapes.replace(job, consistent=share)) for share in (1.0, 0.5))
    none = shapes.operations(shapes.replace(job, consistent=0.0))
    assert half["plain"] == whole["plain"]
    assert half["ours"] - none["ours"] == pytest.approx((whole["ours"] - none["ours"]) / 2)


def test_both_write_the_same_and_loading_is_not_in_the_time(job, monkeypatch):
    load = shapes.loading.load_model
    monkeypatch.setattr(shapes.loading, "load_model", lambda *args: (shapes.time.sleep(1), load(*args))[1])
    theirs, mine = shapes.plain(job), shapes.ours(job)
    assert mine["texts"] == theirs["texts"]
    assert min(theirs["loading"], mine["loading"]) > 2 > max(theirs["seconds"], mine["seconds"])


IN_GPU_PY = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu, shapes

def fails(job): raise RuntimeError("out of order")

def visible():
    return gpu.trainer.run([sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"])[0].strip()

told = {{"none here": None, "of two": visible()}}
del os.environ["CUDA_VISIBLE_DEVICES"]
told["of all"] = visible()
if not gpu.torch.cuda.is_available():
    try:
        gpu.main([])
    except SystemExit as ended:
        told["none here"] = ended.code
print(json.dumps(told))
gpu.trainer.alone = lambda function, *args: function(*args)
shapes.plain = fails
sys.exit(gpu.main("--device cpu --shape tiny --images 2 --workers 0 --only generate".split()))
"""


@pytest.fixture(scope="module")
def in_gpu_py():
    """(What `told` holds, the lines of the benchmark, its exit code), in a process of its own: its module `train` is not the trainer's."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "2,3"}
    done = subprocess.run([sys.executable, "-c", IN_GPU_PY], capture_output=True, text=True, env=environment)
    told, *lines = done.stdout.splitlines()
    return json.loads(told), [line for line in lines if not line.startswith("[")], done.returncode  # [: DeepSpeed's


def test_a_part_that_fails_does_not_end_the_others(in_gpu_py):
    _, (*lines, last), code = in_gpu_py
    figures = json.loads(last)
    assert code == 1 and figures["failed"] == {"plain loop": "RuntimeError: out of order"}
    assert figures["hf"]["images_per_second"] > 0 and figures["hf"]["mfu"] > 0
    assert [line.partition(":")[0] for line in lines] == ["device", "operations per image", "plain loop", "hf", "hf"]


def test_a_training_sees_one_gpu_of_several(in_gpu_py):
    assert (in_gpu_py[0]["of two"], in_gpu_py[0]["of all"]) == ("2", "0")


@pytest.mark.skipif(shapes.torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_names_the_benchmark_for_a_cpu(in_gpu_py):
    assert in_gpu_py[0]["none here"].startswith("error: --device cuda:0") and "pipeline.py" in in_gpu_py[0]["none here"]


def test_the_readme_has_the_tables_of_the_estimate(capsys):
    estimate.main([])
    readme = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in capsys.readouterr().out.splitlines() if line not in readme] == []


def test_a_prompt_has_the_operations_that_are_counted(tmp_path):
    """The plain loop's annotations and answers; on a CPU the counter does not see fused attention, so eager is used."""
    shape = shapes.replace(shapes.COMPUTE_BOUND["svlm"], layers=3, vision=(256, 3, 4))
    shapes.build(shape, tmp_path, "cpu", shapes.torch.float32)
    model = shapes.AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager").eval()
    processor = shapes.loading.load_processor(str(tmp_path), 224**2, 224**2)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[shapes.Image.new("RGB", (224, 224))], return_tensors="pt")
    with shapes.torch.no_grad():
        counted = shapes.flops(lambda: model(**inputs, logits_to_keep=1))
    words = inputs["input_ids"].shape[1] - 64
    assert estimate.Model(shape).prompt_flops(64, words) == pytest.approx(counted, rel=0.02)


def test_the_estimates_grow_with_batches_and_say_what_does_not_fit(capsys):
    h100 = estimate.CARDS["H100"]
    eight, many = (estimate.paces(h100, estimate.VISUAL, "hf", rows)["annotation"] for rows in estimate.BATCHES)
    assert eight < many < estimate.paces(h100, estimate.VISUAL, "vllm")["annotation"]
    estimate.main(["--gpu", "20", "50", "300"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| this GPU, 20 GB"))
    annotates, trains, hours = row.split("|")[2:5], row.split("|")[5], row.split("|")[6:10]
    assert trains.strip() == "–" and "–" not in "".join(annotates + hours)
