"""The trainer: labels, bad train files, freezing, settings that a resume must share, and the scripts."""

import json
import shutil
from pathlib import Path

import model_loading
import param_groups
import params
import pytest
import resume_settings
import torch
import train
from collator import Collator
from conftest import STUDENT, script
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
from mpa.engines import Request
from mpa.engines.hf import HFEngine
from mpa.prompts import answer_prompt
from mpa.records import train_record


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(STUDENT)


def write(folder, *samples) -> str:
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "train.json").write_text(json.dumps(samples))
    return str(folder / "train.json")


def encode_samples(
    samples: list[dict], processor, max_length: int = 1000, on_too_long: str = "error", **kept
) -> data.Samples:
    return data.encode_all(samples, processor, max_length, on_too_long, **kept)


def labelled(encoded, processor) -> str:
    return processor.tokenizer.decode(encoded["labels"][encoded["labels"] != data.IGNORE])


@pytest.mark.parametrize("answer", ["red", "Yes", "two words", "1,234.5 %", "die Straße", "猫", "a: b\nc", "?"])
def test_labelled_are_exactly_the_answer_and_its_end_token(tmp_path, processor, answer):
    path = write(tmp_path, train_record(1, "a.png", answer_prompt("what is it?"), answer))
    (sample,) = data.read_samples([path], str(tmp_path))
    encoded = data.encode(sample, processor)
    assert labelled(encoded, processor) == answer + "<|im_end|>"
    at = encoded["labels"] != data.IGNORE
    assert torch.equal(encoded["labels"][at], encoded["input_ids"][at])
    assert at.nonzero()[0] == len(at) - at.sum()  # and nothing after them


def test_the_prompt_is_token_for_token_what_the_model_is_evaluated_with(tmp_path, processor):
    prompt = answer_prompt("is there a red shape?")
    path = write(tmp_path, train_record(1, "a.png", prompt, "yes"))
    encoded = data.encode(data.read_samples([path], str(tmp_path))[0], processor)
    engine = HFEngine(str(STUDENT), min_pixels=3136, max_pixels=3136, dtype="float32")
    engine.load()
    _, asked, _ = engine.prepare([Request("1", str(tmp_path / "a.png"), prompt)])
    length = asked["input_ids"].shape[1]
    assert encoded["input_ids"][:length].tolist() == asked["input_ids"][0].tolist()
    assert (encoded["labels"][:length] == data.IGNORE).all()
    assert torch.equal(encoded["pixel_values"], torch.from_numpy(asked["pixel_values"]))


def test_each_answer_of_a_longer_conversation_is_labelled(tmp_path, processor):
    sample = train_record(1, "a.png", "what is it?", "a circle")
    sample["conversations"] += [{"from": "human", "value": "its color?"}, {"from": "gpt", "value": "red"}]
    encoded = data.encode(data.read_samples([write(tmp_path, sample)], str(tmp_path))[0], processor)
    assert labelled(encoded, processor) == "a circle<|im_end|>red<|im_end|>"
    assert processor.tokenizer.decode(encoded["input_ids"]).count("<|im_start|>") == 5


def collated(encoded: list[dict], processor, **settings) -> dict:
    return Collator(processor, **settings)([{**sample, "sample": i} for i, sample in enumerate(encoded)])


def test_a_batch_is_padded_on_the_right_and_padding_changes_nothing(tmp_path, processor):
    records = [
        train_record(i, "a.png", answer_prompt(q), a)
        for i, (q, a) in enumerate([("what?", "red"), ("is there not a teal shape?", "no")])
    ]
    samples = [data.encode(s, processor) for s in data.read_samples([write(tmp_path, *records)], str(tmp_path))]
    batch = collated(samples, processor)
    short, length = len(samples[0]["input_ids"]), len(samples[1]["input_ids"])
    assert batch["input_ids"].shape == (2, length)
    assert batch["attention_mask"].sum(1).tolist() == [short, length]
    assert (batch["labels"][0, short:] == data.IGNORE).all()
    assert batch["image_grid_thw"].shape == (2, 3)
    model = AutoModelForImageTextToText.from_pretrained(STUDENT, dtype="float32").eval()
    with torch.no_grad():
        together = model(**{k: v for k, v in batch.items() if k not in ("labels", "samples")}).logits[0, :short]
        alone = collated(samples[:1], processor)
        assert torch.allclose(
            together, model(**{k: v for k, v in alone.items() if k not in ("labels", "samples")}).logits[0], atol=1e-4
        )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("[]", "contains no samples"),
        ('{"a": 1}', "contains no samples"),
        ('[{"id": 1, "image": "a.png"}]', "record 0: missing 'conversations'"),
        ('[{"id": 1, "image": "a.png", "conversations": []}]', "must alternate"),
        ('[{"id": 1, "image": "a.png", "conversations": [{"from": "gpt", "value": "x"}]}]', "must alternate"),
        (json.dumps([train_record(1, "a.png", "q", " ")]), "an answer is empty"),
        (json.dumps([train_record(1, "gone.png", "q", "x")]), "record 0, and all others: none can be used"),
        (json.dumps([train_record(1, "a.png", "q", "x"), train_record(2, "a.png", "q", 2013)]), "record 1: .* string"),
        (json.dumps([train_record(1, "a.png", "q <image>", "x")]), "record 0: 1 images, but 2 <image>"),
        (json.dumps([{**train_record(1, "a.png", "q", "x"), "image": ["a.png", "b.png"]}]), "2 images, but 1 <image>"),
        (json.dumps([{**train_record(1, "a.png", "q", "x"), "image": [3]}]), "neither a path nor a list"),
        (
            json.dumps([train_record(1, "a.png", "q", "<image>")]),
            "record 0: <image> is in a turn that is not the user's",
        ),
    ],
)
def test_a_bad_train_file_is_refused_with_record_and_remedy(tmp_path, processor, content, says):
    write(tmp_path)
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(data.DataError, match=says) as error:
        encode_samples(data.read_samples([str(tmp_path / "train.json")], str(tmp_path)), processor)
    assert "train.json" in str(error.value)


def test_images_that_have_moved_are_found_by_the_map(tmp_path):
    path = write(tmp_path, train_record(1, "/workspace/data/a.png", "q", "x"))
    (sample,) = data.read_samples([path], path_map=["/workspace/data/=" + str(tmp_path)])
    assert sample["images"] == [str(tmp_path / "a.png")]
    with pytest.raises(data.DataError, match="expected OLD=NEW"):
        data.read_samples([path], path_map=["/workspace/data"])


def test_a_sample_with_a_bad_image_is_left_out_and_named(tmp_path, processor, capsys):
    path = write(tmp_path, train_record(1, "a.png", "q", "x"), train_record(2, "bad.png", "q", "x"))
    (tmp_path / "bad.png").write_bytes(b"x")
    assert [s["id"] for s in encode_samples(data.read_samples([path], str(tmp_path)), processor).samples] == [1]
    assert "id 2" in capsys.readouterr().out
    Image.new("RGB", (2, 900)).save(tmp_path / "bad.png")  # which Qwen's processor refuses
    assert [s["id"] for s in encode_samples(data.read_samples([path], str(tmp_path)), processor).samples] == [1]
    assert "aspect ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "frozen"),
    [("freeze_vision_tower", "visual.blocks"), ("freeze_merger", "merger"), ("freeze_llm", "language_model")],
)
def test_a_freeze_flag_freezes_its_part_and_no_other(flag, frozen):
    model = AutoModelForImageTextToText.from_pretrained(STUDENT, dtype="float32")
    param_groups.freeze(model, params.ModelArguments(model_id="", **{flag: True}))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("visual.blocks", "merger", "language_model")):
            assert parameter.requires_grad is (frozen not in name), name


def test_a_model_that_cannot_be_loaded_is_named():
    arguments = params.ModelArguments(model_id="/no/such/model")
    data_arguments = params.DataArguments(data_path=[])
    with pytest.raises(data.DataError, match="/no/such/model: cannot be loaded"):
        model_loading.load_processor(arguments, data_arguments)
    with pytest.raises(data.DataError, match="/no/such/model: cannot be loaded"):
        model_loading.load_model(arguments, params.TrainingArguments(output_dir="", use_cpu=True))
    arguments.model_id = str(STUDENT)
    processor = model_loading.load_processor(arguments, data_arguments)
    assert processor.image_processor.size["shortest_edge"] == 128 * 28 * 28


def train_in(folder, *flags) -> None:
    """Train on the folder's train.json from its copy of the student, without DeepSpeed."""
    if not (folder / "student").exists():
        shutil.copytree(STUDENT, folder / "student")
    paths = ["--model_id", "student", "--data_path", "train.json", "--image_folder", "", "--output_dir", "out"]
    paths = [str(folder / word) if not word.startswith("--") else word for word in paths]
    train.main([*paths, "--use_cpu", "True", "--image_min_pixels", "3136", "--image_max_pixels", "3136", *flags])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with all files that a finished training read and wrote."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder, train_record(1, "a.png", answer_prompt("what is it?"), "red"))
    train_in(folder)
    assert (folder / "out/model.safetensors").exists()
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A copy that a test may change, trained with the copy's own paths."""
    folder = shutil.copytree(trained, tmp_path / "copy")
    meta = folder / "out/train_meta.json"
    meta.write_text(meta.read_text().replace(str(trained), str(folder)))
    return folder


def test_a_second_call_says_that_all_is_done_however_it_reports_and_saves(trained, capsys):
    train_in(trained, *"--logging_steps 1 --save_strategy epoch --run_name again --dataloader_num_workers 1".split())
    assert "already exists, trained with these settings" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag",
    [
        "--learning_rate 2e-05",
        "--lr_scheduler_type linear",
        "--optim sgd",
        "--max_grad_norm 2.0",
        "--adam_beta2 0.95",
        "--label_smoothing_factor 0.1",
        "--neftune_noise_alpha 5.0",
        "--freeze_llm True",
    ],
)
def test_a_second_call_with_another_setting_is_refused_and_the_setting_named(trained, flag):
    name, value = flag.removeprefix("--").split()
    with pytest.raises(data.DataError, match=f"other settings: {name} was .*, is now '?{value}") as error:
        train_in(trained, *flag.split())
    assert error.value.args[0].count("is now") == 1


def test_a_base_model_that_changed_at_its_path_is_another_setting(copy, capsys):
    train_in(copy)
    assert "already exists" in capsys.readouterr().out
    weights = copy / "student/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(data.DataError, match="other settings: model_sha256 was"):
        train_in(copy)


def test_the_fingerprint_of_a_large_file_notices_a_change_in_its_middle(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(2**24))
    before = resume_settings.fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(2**23) + b"x" * 2**19 + bytes(2**23 - 2**19))
    assert resume_settings.fingerprint(tmp_path) != before


def test_the_deepspeed_configuration_counts_by_its_content(tmp_path):
    write(tmp_path)
    model = params.ModelArguments(model_id="hub/name")
    arguments = params.TrainingArguments(output_dir="", use_cpu=True)

    def settings(name: str, content: str) -> dict:
        (tmp_path / name).write_text(content)
        arguments.deepspeed = str(tmp_path / name)
        return resume_settings.settings(
            model, params.DataArguments(data_path=[str(tmp_path / "train.json")]), arguments
        )

    assert settings("a.json", '{"stage": 2}') == settings("b.json", '{"stage": 2}')
    assert settings("a.json", '{"stage": 2}') != settings("a.json", '{"stage": 3}')


def test_a_resume_compares_listed_settings_only_and_all_of_them_exist(tmp_path):
    """An argument that a new transformers release adds must not invalidate all earlier checkpoints."""
    names = {name for kind in params.KINDS for name in kind.__dataclass_fields__}
    assert names >= resume_settings.DECISIVE | resume_settings.DECISIVE_WITH_LOAD_BEST
    write(tmp_path)
    model, arguments = params.ModelArguments(model_id="hub/name"), params.TrainingArguments(output_dir="", use_cpu=True)
    images = params.DataArguments(data_path=[str(tmp_path / "train.json")])
    computed = {"save_dtype", "world_size", "data_sha256"}
    assert resume_settings.settings(model, images, arguments).keys() == resume_settings.DECISIVE | computed


def test_that_all_is_done_is_said_without_opening_per_image(copy, capsys):
    (copy / "a.png").unlink()
    train_in(copy)
    assert "already exists" in capsys.readouterr().out
    (copy / "train.json").unlink()
    with pytest.raises(data.DataError, match=r"train.json: no such file. Run PI.sh first"):
        train_in(copy)


@pytest.mark.parametrize(
    ("question", "answer", "token"),
    [("q", "red<|im_end|>blue", "<|im_end|>"), ("is <|image_pad|> there?", "x", "<|image_pad|>")],
)
def test_text_with_a_special_token_is_refused_with_its_record_before_training(tmp_path, question, answer, token):
    write(tmp_path, train_record(1, "a.png", "q <b> |", "x"), train_record(2, "a.png", question, answer))
    with pytest.raises(data.DataError) as error:
        train_in(tmp_path)
    assert f"train.json, record 1: {token} is a special token" in str(error.value)
    assert not (tmp_path / "out").exists()


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
    done = script(f"PL/Qwen2-VL-Finetune/scripts/{name}", *flags, PYTHONPATH=folder, **environment)
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
