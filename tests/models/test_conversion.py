"""Converted checkpoints compute what the original code computed, from weights of which none is left over."""

import json
import shutil

import originals
import pytest
import torch
from conftest import close
from originals import ORIGINALS
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mpa.files.records import InputError
from mpa.models import conversion
from mpa.models.conversion import tinyllava, writing

# Of the largest value, some 8: two orders of evaluation differ by up to 4e-5, a mistake by 1e-3 (tests/data/originals/README.md).
SAME = 2e-5
NAMES = ["internvl2_2b_like", "internvl2_4b_like", "internvl2_8b_like", "tinyllava_2_0b_like"]


def inputs(reference: dict, case: str) -> dict:
    """The input of the native model: an unused id stands where the image's features go."""
    prefix = "expanded_" if f"{case}.expanded_input_ids" in reference else ""
    found = {name: reference[f"{case}.{prefix}{name}"] for name in ("input_ids", "attention_mask")}
    pixels = reference.get("batch.pixel_values" if case == "batch_left" else f"{case}.pixel_values")
    return found | ({} if pixels is None else {"pixel_values": pixels})


def check(model, reference: dict, head_bias=0.0) -> None:
    cases = sorted({name.split(".")[0] for name in reference})
    assert len(cases) >= 3
    for case in cases:
        given, expected = inputs(reference, case), lambda name, case=case: reference.get(f"{case}.{name}")
        with torch.inference_mode():
            logits = model(**given).logits
            if (features := expected("image_features")) is not None:
                got = torch.stack(list(model.get_image_features(pixel_values=given["pixel_values"]).pooler_output))
                assert close(got, features, SAME), case
            if expected("logits") is not None:
                seen = given["attention_mask"].bool()
                assert close((logits + head_bias)[seen], expected("logits")[seen], SAME), case
            if expected("logits_tail") is not None:
                assert close(logits[:, -32:], expected("logits_tail"), SAME), case
            if expected("generated") is not None and isinstance(head_bias, float):
                new = model.generate(**given, max_new_tokens=12, do_sample=False, eos_token_id=10**6, pad_token_id=0)
                assert torch.equal(new[:, given["input_ids"].shape[1] :], expected("generated")), case


def load(folder, attention="eager"):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="float32", attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_features_logits_and_greedy_tokens_are_the_originals(name, attention, tmp_path):
    out = conversion.convert(ORIGINALS / name, tmp_path / "out", originals.image_token_id(name))
    check(load(out, attention), load_file(ORIGINALS / name / "reference.safetensors"))


def test_the_factory_layout_but_for_the_bias_of_its_head(tmp_path):
    """Phi-2's head has a bias that the native class has no place for; without it, all else is the original's."""
    name, source = "tinyllava_factory_phi2_like", tmp_path / "source"
    with pytest.raises(InputError, match=r"1 not in the model: language_model\.lm_head\.bias.*head has a bias"):
        conversion.convert(ORIGINALS / name, tmp_path / "out", 310)
    shutil.copytree(ORIGINALS / name, source)
    weights = load_file(source / "model.safetensors")
    bias = weights.pop("language_model.lm_head.bias")
    save_file(weights, source / "model.safetensors")
    out = conversion.convert(source, tmp_path / "out", originals.image_token_id(name))
    check(load(out), load_file(ORIGINALS / name / "reference.safetensors"), bias)


def test_shards_are_read_and_written_one_by_one(tmp_path, monkeypatch):
    """Three shards in, several of at most 400 kB out: the same model, under the names that save_pretrained writes."""
    name, source = "internvl2_8b_like", tmp_path / "source"
    shutil.copytree(ORIGINALS / name, source)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    table = {}
    for part in range(3):
        shard = {key: weights[key] for key in sorted(weights)[part::3]}
        save_file(shard, source / f"m-{part}.safetensors")
        table |= dict.fromkeys(shard, f"m-{part}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    monkeypatch.setattr(writing, "SHARD_BYTES", 400_000)
    out = conversion.convert(source, tmp_path / "out", 512)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert all((out / file).stat().st_size < 420_000 for file in files)
    model = load(out)
    check(model, load_file(ORIGINALS / name / "reference.safetensors"))
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert sorted(again) == sorted(index["weight_map"])


def test_a_head_that_is_not_tied_stays_apart(tmp_path):
    out = conversion.convert(ORIGINALS / "internvl2_2b_like", tmp_path / "out", 592)
    model = load(out)
    assert not model.config.tie_word_embeddings and not model.config.text_config.tie_word_embeddings
    stored = load_file(ORIGINALS / "internvl2_2b_like" / "model.safetensors")
    assert torch.equal(model.get_output_embeddings().weight, stored["language_model.output.weight"])
    assert torch.equal(model.get_input_embeddings().weight, stored["language_model.model.tok_embeddings.weight"])


def refused(source, tmp_path, match, **options):
    with pytest.raises(InputError, match=match):
        conversion.convert(source, tmp_path / "out", 592, **options)
    assert not list(tmp_path.glob("out*"))  # nothing half-made


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ps_version": "v1"}, "ps_version is 'v1'; the native class shuffles pixels as v2"),
        ({"select_layer": -4}, "select_layer is -4; the native class takes the last"),
        ({"use_llm_lora": 128}, "use_llm_lora is 128; merge the adapter"),
        ({"use_backbone_lora": 16}, "use_backbone_lora is 16; merge the adapter"),
        ({"template": "vicuna"}, "template is 'vicuna'; known are internlm2-chat"),
        ({"use_thumbnail": False}, "use_thumbnail is False"),
        ({"vision_config__qk_normalization": True}, "qk_normalization is True"),
        ({"llm_config__model_type": "mamba"}, "llm_config.model_type is 'mamba'"),
        ({"llm_config__num_hidden_layers": 10**9}, "says 1000000000 layers, the weights hold 2"),
        ({"llm_config__hidden_size": "wide"}, "no model can be made of it"),
        ({"llm_config__vocab_size": 601}, r"2 of another shape: .*\[600, 64\] instead of \[601, 64\]"),
        ({"llm_config": None}, "config.json: a field has no usable value"),
        ({"downsample_ratio": {}}, "config.json: a field has no usable value"),
        ({"model_type": "llama"}, "model_type 'llama' is not one that is converted"),
        ({"max_dynamic_patch": 0}, r"max_dynamic_patch is \[1, 0\]; expected numbers"),
        ({"max_dynamic_patch": "12"}, "max_dynamic_patch is .*expected numbers"),
        ({"min_dynamic_patch": 13}, r"is \[13, 12\]; expected numbers"),
        (
            {"llm_config__use_sliding_window": True},
            "llm_config.use_sliding_window is True; sliding windows are not known",
        ),
        ({"llm_config__architectures": ["LlamaForCausalLM"]}, "architectures is .*model_type internlm2 is InternLM2"),
        ({"llm_config__rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is .*known are linear, dynamic"),
        ({"llm_config__rope_pos_id_version": "v2pe_fix"}, "rope_pos_id_version is 'v2pe_fix'"),
        ({"vision_config__norm_type": "rms_norm"}, "norm_type is 'rms_norm'"),
        # left out: the original class's defaults
        ({"ps_version": ...}, "ps_version is 'v1'"),
        ({"use_thumbnail": ...}, "use_thumbnail is False"),
        ({"template": ...}, "template is None"),
        ({"vision_config__qk_normalization": ...}, "qk_normalization is True"),
        ({"vision_config__norm_type": ...}, "norm_type is 'rms_norm'"),
        (
            {"vision_config__qkv_bias": ...},
            r"9 not in the model: vision_model.*qkv\.bias|not in the model: vision_model",
        ),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(change, match, tmp_path):
    source = shutil.copytree(ORIGINALS / "internvl2_2b_like", tmp_path / "source")
    refused(originals.changed(source, **change), tmp_path, match)


def test_a_field_that_is_left_out_has_the_original_classs_default(tmp_path):
    """Image processors of the original configuration class: no tiles, no thumbnail, and six tiles where they are cut."""
    source = originals.internvl(tmp_path / "source")
    originals.changed(source, max_dynamic_patch=...)
    images = AutoProcessor.from_pretrained(conversion.convert(source, tmp_path / "six")).image_processor
    assert (images.crop_to_patches, images.min_patches, images.max_patches) == (True, 1, 6)
    originals.changed(source, dynamic_image_size=..., use_thumbnail=..., min_dynamic_patch=...)
    images = AutoProcessor.from_pretrained(conversion.convert(source, tmp_path / "one")).image_processor
    assert not images.crop_to_patches
    assert images(Image.new("RGB", (300, 100)), return_tensors="pt")["pixel_values"].shape[0] == 1


@pytest.mark.parametrize("text", ["stablelm", "phi", "qwen2", "llama"])
def test_a_text_models_fields_are_those_of_the_original_class(text):
    """Of TinyLLaVA_Factory, whose configuration leaves out what is the class's default."""
    config = json.loads((ORIGINALS / "tinyllava_factory_phi2_like/config.json").read_text())
    config["text_config"] = {"model_type": text, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config["text_config"]["use_parallel_residual"] = True

    class Stored:
        folder, config = ORIGINALS, None

        def count(self, pattern):
            return 3 if "vision" in pattern else 2

    Stored.config = config
    native = tinyllava.factory_layout(Stored(), 310, None).config["text_config"]
    assert native["rope_parameters"].get("partial_rotary_factor") == {"phi": 0.5, "stablelm": 0.25}.get(text)
    assert native["use_parallel_residual"]
    for field, value, said in (
        ("use_sliding_window", True, "text_config.use_sliding_window is True"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}, "text_config.rope_scaling is"),
    ):
        config["text_config"] |= {field: value}
        with pytest.raises(InputError, match=said):
            tinyllava.factory_layout(Stored(), 310, None)
        del config["text_config"][field]


@pytest.mark.parametrize("name", ["internvl2_2b_like", "tinyllava_2_0b_like"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.index_fill(0, torch.tensor([3]), torch.nan), "1 of its tensors hold values that are not finite"),
        (lambda t: t.index_fill(0, torch.tensor([3]), -torch.inf), "1 of its tensors hold values that are not finite"),
        (lambda t: (t * 100).to(torch.int8), "no floating-point numbers of F64, F32, F16, BF16 .*I8"),
        (lambda t: (t * 100).to(torch.int32), "no floating-point numbers of .*I32"),
        (lambda t: t.to(torch.float8_e4m3fn), "no floating-point numbers of .*F8_E4M3"),
        (lambda t: t > 0, "no floating-point numbers of .*BOOL"),
    ],
    ids=["NaN", "infinite", "int8", "int32", "float8", "bool"],
)
def test_weights_that_are_no_finite_numbers_are_refused(tmp_path, name, change, said):
    source = shutil.copytree(ORIGINALS / name, tmp_path / "source")
    for folder in (source, source / "TinyLLaVA-2.0B-SigLIP"):
        if not folder.is_dir():
            continue
        kept = (folder / "model.safetensors").read_bytes()
        weights = load_file(folder / "model.safetensors")
        one = next(
            n for n in weights if n in ("mlp1.1.weight", "model.mm_projector.0.weight") or "patch_embedding.weight" in n
        )
        weights[one] = change(weights[one])
        save_file(weights, folder / "model.safetensors")
        refused(source, tmp_path, f"{folder}: .*{said}" if "finite" not in said else f"{said} \\({one}\\)")
        (folder / "model.safetensors").write_bytes(kept)


def test_shards_that_contradict_the_index_are_refused(tmp_path):
    source = originals.random_internvl(tmp_path / "source", 64, 16, 2, 600, shards=3)
    conversion.convert(source, tmp_path / "good", 592)
    one, two, three = sorted(source.glob("*.safetensors"))
    name = sorted(load_file(one))[0]
    kept = load_file(two)
    save_file(kept | {name: load_file(one)[name] + 1}, two)
    refused(source, tmp_path, f"1 tensors are in two files \\({name}\\)")
    save_file({n: value for n, value in kept.items() if n != sorted(kept)[1]}, two)
    refused(source, tmp_path, "1 tensors are not in the files that model.safetensors.index.json names")
    save_file(kept, two)
    shutil.copy(three, source / "model.safetensors")
    refused(source, tmp_path, "has both model.safetensors and model.safetensors.index.json")


def test_the_vision_towers_last_layer_is_dropped_though_it_is_stored(tmp_path):
    """As the original class does; the tower of the release comes without it."""
    name = "tinyllava_2_0b_like"
    source = shutil.copytree(ORIGINALS / name, tmp_path / "source")
    tower = source / "TinyLLaVA-2.0B-SigLIP"
    weights, last = load_file(tower / "model.safetensors"), "vision_model.encoder.layers.{}."
    said = json.loads((tower / "config.json").read_text())["num_hidden_layers"] - 1
    copied = {n.replace(last.format(0), last.format(said)): v + 1 for n, v in weights.items() if last.format(0) in n}
    save_file(weights | copied, tower / "model.safetensors")
    check(
        load(conversion.convert(source, tmp_path / "out", 310)), load_file(ORIGINALS / name / "reference.safetensors")
    )


def test_a_vision_tower_is_refused_where_the_checkpoint_holds_its_own(tmp_path):
    refused(ORIGINALS / "internvl2_2b_like", tmp_path, "--vision-tower: InternVL's", vision_tower="some/tower")


def test_every_tensor_is_accounted_for(tmp_path):
    source = shutil.copytree(ORIGINALS / "internvl2_2b_like", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    norm = weights.pop("language_model.model.norm.weight")
    save_file(weights | {"mlp2.0.weight": norm}, source / "model.safetensors")
    refused(
        source, tmp_path, r"1 not in the model: mlp2.0.weight; 1 missing: model.language_model.norm.weight. Nothing"
    )
    weights["language_model.model.norm.weight"] = norm
    weights["language_model.model.layers.0.attention.wqkv.weight"] = torch.zeros(126, 64)
    save_file(weights, source / "model.safetensors")
    refused(source, tmp_path, r"wqkv.weight has the shape \[126, 64\]")


def test_damaged_partial_and_pickled_weights(tmp_path):
    source = shutil.copytree(ORIGINALS / "internvl2_2b_like", tmp_path / "source")
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-100])
    refused(source, tmp_path, "damaged, or not yet downloaded whole")
    (source / "model.safetensors").unlink()
    refused(source, tmp_path, "model.safetensors is missing. Download")
    (source / "pytorch_model.bin").write_bytes(b"")
    refused(source, tmp_path, "only there as pickles.*safetensors.torch.save_file")


def test_the_vision_tower_is_found_beside_or_named(tmp_path):
    name, tower = "tinyllava_2_0b_like", "TinyLLaVA-2.0B-SigLIP"
    source = shutil.copytree(ORIGINALS / name, tmp_path / "source")
    (source / tower).rename(tmp_path / tower)  # beside
    beside = conversion.convert(source, tmp_path / "beside", 310)
    (tmp_path / tower).rename(tmp_path / "tower")
    with pytest.raises(InputError, match=f"its vision tower, bczhou/{tower}, is needed.*--vision-tower"):
        conversion.convert(source, tmp_path / "out", 310)
    named = conversion.convert(source, tmp_path / "named", 310, vision_tower=str(tmp_path / "tower"))
    assert (beside / "model.safetensors").read_bytes() == (named / "model.safetensors").read_bytes()


def test_the_towers_own_weights_are_taken_and_a_differing_copy_is_said(tmp_path, capsys):
    source = shutil.copytree(ORIGINALS / "tinyllava_2_0b_like", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    copied = "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.bias"
    weights[copied] = weights[copied] + 1
    save_file(weights, source / "model.safetensors")
    out = conversion.convert(source, tmp_path / "out", 310)
    assert "1 of 37 tensors of the vision tower differ" in capsys.readouterr().out
    check(load(out), load_file(ORIGINALS / "tinyllava_2_0b_like" / "reference.safetensors"))
