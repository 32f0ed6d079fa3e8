"""8 and 4 bits: the L-VLM in the stages, QLoRA in the trainer. What runs bitsandbytes is skipped without it."""

import importlib.util
import json

import merge_lora
import miniatures
import params
import pytest
import torch
import train
import training_memory
from conftest import MINI, STUDENT, TEACHER, python
from training import answers, arguments, build, losses, weights, write
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mpa.engines import Request
from mpa.engines.hf import HFEngine
from mpa.files.records import InputError
from mpa.models import loading, memory_estimate

bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: bash scripts/setup.sh quantization"
)
QLORA = "--lora_enable True --per_device_train_batch_size 2 --learning_rate 1e-2 --save_steps 2".split()


@pytest.fixture(autouse=True)
def no_deepspeed_config():
    """transformers keeps the last training's DeepSpeed settings for the process, and asks them when it loads a model."""
    unset_hf_deepspeed_config()


# --- stages ------------------------------------------------------------------------------------------------


@bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_the_language_model_is_quantised_and_nothing_else(tmp_path, family, bits):
    path = miniatures.make(family, tmp_path)
    model = loading.load_model(path, "cpu", torch.float32, quantization=f"{bits}bit")
    planned = memory_estimate.meta_model(path)
    quantised = {name for name, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    assert quantised == set(memory_estimate.quantisable(planned)) != set()
    full = loading.load_model(path, "cpu", torch.float32)
    for name in quantised:
        expected, layer = full.get_submodule(name), model.get_submodule(name)
        inputs = torch.eye(expected.in_features)
        with torch.no_grad():
            error = (layer(inputs) - expected(inputs)).norm() / expected(inputs).norm()
        # bitsandbytes' CPU code for 4 bits is less exact where a row is no multiple of its blocks of 64 weights.
        assert 0 < error < (0.02 if bits == 8 else 0.4 if expected.in_features % 64 else 0.1)


@bitsandbytes
def test_the_estimate_counts_the_bits_of_a_model_of_ordinary_width(tmp_path):
    model = loading.load_model(str(TEACHER), "cpu", torch.float32, quantization="4bit")
    estimated = memory_estimate.weight_bytes(memory_estimate.meta_model(str(TEACHER)), 4, bits=4)
    assert estimated == pytest.approx(model.get_memory_footprint(), rel=0.05)


@bitsandbytes
def test_greedy_replies_in_four_bits_do_not_depend_on_the_batch(images):
    asked = [Request(str(i), str(p), "What is it?", 8) for i, p in enumerate(sorted(images.rglob("*.png")))]
    replies = []
    for rows in (1, 5):
        with HFEngine(
            str(TEACHER), rows, None, "cpu", "float32", min_pixels=3136, max_pixels=3136, quantization="4bit"
        ) as engine:
            replies.append({r["key"]: r["text"] for batch in engine.generate(asked) for r in batch})
    assert replies[0] == replies[1] and any(replies[0].values())


@bitsandbytes
def test_pi_quantises_the_l_vlm_alone_and_reuses_only_its_own_answers(images, tmp_path):
    common = ("--dataset", "images", "--image-root", images, "--run", f"{tmp_path}/run", "--limit", 6, *MINI)
    lvlm, both = ("--model-path-lvlm", TEACHER), ("--model-path-lvlm", TEACHER, "--model-path-svlm", STUDENT)
    done = python("PA.py", *common, *lvlm, "--quantization", "4bit")
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "run/PA_teacher_images.meta.json").read_text())["settings"]
    assert settings["quantization"] == "4bit"
    assert "quantization was '4bit'" in python("PA.py", *common, *lvlm).stderr
    done = python("PI.py", *common, *both, "--hold-out", 0)
    assert done.returncode == 0 and "PA already produced" not in done.stdout, done.stdout + done.stderr
    done = python("PI.py", *common, *both, "--hold-out", 0, "--quantization", "4bit", "--restart")
    assert "PA already produced" in done.stdout, done.stdout + done.stderr
    recorded = {p.name: json.loads(p.read_text())["settings"] for p in (tmp_path / "run").glob("PI_*_images.meta.json")}
    assert recorded["PI_teacher_teacher_images.meta.json"]["quantization"] == "4bit"
    assert "quantization" not in recorded["PI_teacher_student_images.meta.json"]


def test_a_quantised_run_without_the_package_names_the_command(images, tmp_path, monkeypatch):
    from mpa.files import packages

    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    common = ("--dataset", "images", "--image-root", images, "--run", f"{tmp_path}/run", *MINI)
    done = python("PA.py", *common, "--model-path-lvlm", TEACHER, "--quantization", "8bit")
    assert done.returncode == 1 and "Install with: bash scripts/setup.sh quantization" in done.stderr


@pytest.mark.parametrize("flag", [["--quantization", "4bit"], ["--device-map", "auto"]])
def test_flags_of_hf_are_refused_with_another_engine(images, tmp_path, flag, monkeypatch):
    from mpa.files import packages

    monkeypatch.setattr(packages, "find_spec", lambda name: name)
    common = ("--dataset", "images", "--image-root", images, "--run", f"{tmp_path}/run", *MINI)
    done = python("PA.py", *common, "--model-path-lvlm", TEACHER, "--engine", "vllm", *flag)
    assert done.returncode == 1 and f"{flag[0]}: is for --engine hf" in done.stderr


def test_evaluate_refuses_a_quantisation_that_no_model_would_have(images, tmp_path):
    common = ("--dataset", "easyVQA", "--run", f"{tmp_path}/run", *MINI)
    done = python(
        "evaluate.py", *common, "--model-path", STUDENT, "--model-path-lvlm", TEACHER, "--quantization", "8bit"
    )
    assert done.returncode == 2 and "--quantization is for the L-VLM" in done.stderr


def stored_as(folder, **quantization) -> str:
    """The student, whose config.json says that it is quantised in some way."""
    for path in STUDENT.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((STUDENT / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("stored", "bits"),
    [
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "gptq", "bits": 8}, 8),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "compressed-tensors"}, 4),
    ],
)
def test_a_checkpoint_that_is_stored_quantised_counts_with_its_bits(tmp_path, stored, bits):
    model = memory_estimate.meta_model(stored_as(tmp_path, **stored))
    assert memory_estimate.stored_bits(model) == bits
    assert memory_estimate.weight_bytes(model, 2) < memory_estimate.weight_bytes(
        memory_estimate.meta_model(str(STUDENT)), 2
    )


def test_a_quantised_checkpoint_whose_package_is_missing_is_one_sentence(tmp_path):
    path = stored_as(tmp_path, quant_method="gptq", bits=4)
    with pytest.raises(
        InputError, match=r"--engine hf lacks a package that it needs: .* --engine vllm reads AWQ, GPTQ and FP8"
    ):
        loading.load_model(path, "cpu", torch.float32)
    with pytest.raises(InputError, match=r"is stored quantised\. Leave out --quantization"):
        loading.load_model(path, "cpu", torch.float32, quantization="4bit")


def test_a_device_map_gives_the_same_replies(images):
    asked = [Request(str(i), str(p), "What is it?", 8) for i, p in enumerate(sorted(images.rglob("*.png"))[:4])]
    settings = {"device": "cpu", "dtype": "float32", "min_pixels": 3136, "max_pixels": 3136}
    replies = []
    # A machine without GPUs has two places: its memory, and a file from which accelerate loads layer by layer.
    parts = ("visual", "language_model.embed_tokens", "language_model.norm", "language_model.rotary_emb")
    apart = {"lm_head": "cpu", "model.language_model.layers": "disk", **{f"model.{part}": "cpu" for part in parts}}
    for device_map in (None, "auto", apart):
        with HFEngine(str(TEACHER), **settings, device_map=device_map) as engine:
            replies.append([r for batch in engine.generate(asked) for r in batch])
            assert engine.device == "cpu" and bool(engine.prefix_cache) == (device_map != apart)
    texts = [[r["text"] for r in some] for some in replies]
    assert texts[0] == texts[1] == texts[2] and any(texts[0])


# --- trainer -----------------------------------------------------------------------------------------------


@bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_learns_saves_an_adapter_for_every_stage_and_merges_into_the_full_base(tmp_path, bits):
    write(tmp_path, 8)
    train.main(arguments(tmp_path, *QLORA, "--bits", str(bits), "--num_train_epochs", "4"))
    out, merged = tmp_path / "out", tmp_path / "merged"
    first, *_, last = losses(out)
    assert last < first
    assert not (out / "config.json").exists() and (out / "adapter_config.json").exists()
    merge_lora.merge(out, merged)
    base, after = weights(STUDENT), weights(merged)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert any(not torch.equal(after[name], base[name]) for name in base if "q_proj" in name)
    assert answers(out, tmp_path) == answers(merged, tmp_path)
    model = loading.load_model(str(out), "cpu", torch.float32, quantization=f"{bits}bit")
    assert any("lora_A" in name for name, _ in model.named_parameters())


@bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_the_base_is_quantised_the_rest_is_trained_in_full_and_all_get_gradients(tmp_path, bits):
    write(tmp_path, 4)
    trainer = build(tmp_path, *QLORA, "--bits", str(bits))
    model = trainer.model
    model.eval()  # an evaluation in between: bitsandbytes would pack the weights for its CPU kernel, without gradients
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        trainer.compute_loss(model, dict(batch), num_items_in_batch=1)
    model.train()
    trainer.compute_loss(model, dict(batch), num_items_in_batch=1).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained.values())
    assert any(p.grad.abs().max() > 0 for name, p in trained.items() if "layers.0.self_attn.q_proj.lora_B" in name)
    kinds = {type(m).__name__ for name, m in model.named_modules() if name.endswith("base_layer")}
    assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    plain = build(tmp_path, *QLORA).model
    counted = [train.Leveler.start_lines(trainer)[0].split("; ")[1]]
    assert counted[0].startswith(
        f"{sum(p.numel() for n, p in plain.named_parameters() if '.original_module.' not in n) / 1e6:,.1f} M"
    )


@bitsandbytes
def test_a_resumed_qlora_training_has_the_losses_of_one_that_did_not_stop_and_the_same_bits(tmp_path):
    write(tmp_path, 8)
    train.main(arguments(tmp_path, *QLORA, "--bits", "4"))
    whole = losses(tmp_path / "out")
    (tmp_path / "out/train_meta.json").unlink()
    with pytest.raises(InputError, match="bits was 4, is now None"):
        train.main(arguments(tmp_path, *QLORA))
    train.main(arguments(tmp_path, *QLORA, "--bits", "4"))
    assert losses(tmp_path / "out") == whole


@pytest.mark.parametrize("bits", [4, 8])
def test_the_states_of_qlora_are_smaller(tmp_path, bits):
    write(tmp_path, 4)
    flags = [*QLORA, "--freeze_vision_tower", "True", "--freeze_merger", "True"]
    model_args, data_args, args = params.parse(arguments(tmp_path, *flags))
    samples = train.read(data_args.data_path, data_args, args)
    checked = train.prepare(samples, train.load_processor(model_args, data_args), data_args)
    model = training_memory.planned_model(model_args, args)
    sizes = {}
    for model_args.bits in (16, bits):
        sizes[model_args.bits] = training_memory.estimate(model, model_args, data_args, args, checked)
    assert sizes[bits]["weights"] < sizes[16]["weights"]
    assert sizes[bits]["optimizer state"] == sizes[16]["optimizer state"]


def test_bits_need_the_package(tmp_path, monkeypatch):
    import flags

    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="--bits 4: needs bitsandbytes"):
        params.parse(arguments(tmp_path, *QLORA, "--bits", "4"))


def test_the_trainer_says_of_a_stored_quantised_base_what_it_needs(tmp_path):
    path = stored_as(tmp_path, quant_method="gptq", bits=4)
    write(tmp_path, 2)
    for flags, what in (
        ((), "is stored quantised. Name the original model"),
        (("--lora_enable", "True"), "cannot be loaded"),
    ):
        with pytest.raises(InputError, match=what):
            train.main(arguments(tmp_path, *flags, model=path))


@pytest.mark.parametrize("flag", ["--bits=4", "--optim=paged_adamw_32bit", "--optim=lion_32bit", "--optim=ademamix"])
def test_bitsandbytes_is_there_for_the_flags_that_use_it(flag):
    model = ["--model_id", str(STUDENT)]
    assert "bitsandbytes" in train.unused(model) and "bitsandbytes" not in train.unused([*model, flag])


def test_bitsandbytes_is_there_for_a_base_that_may_be_stored_quantised(tmp_path):
    path = stored_as(tmp_path, quant_method="bitsandbytes", load_in_4bit=True)
    for flags in ["--model_id", path], [f"--model-id={path}"], ["--model_id", "Qwen/Qwen2-VL-2B-Instruct-bnb"]:
        assert "bitsandbytes" not in train.unused(flags)
    assert "deepspeed" in train.unused([]) and "deepspeed" not in train.unused(["--deepspeed=a.json"])
