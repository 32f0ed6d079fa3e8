"""The trainer's flags: what is checked before a model is loaded, and which of them a second call must share with the first."""

import shutil
from dataclasses import fields

import flags
import param_groups
import params
import pytest
import resume_settings
import train
import transformers
from conftest import STUDENT
from training import MINI, write, write_records
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mpa.files.records import InputError, train_record
from mpa.method.prompts import answer_prompt


def test_every_argument_of_transformers_is_decided_on():
    """If a new release of transformers adds an argument, put it into HONOURED or REFUSED."""
    names = {field.name for field in fields(transformers.TrainingArguments)}
    assert names == flags.HONOURED | set(flags.REFUSED) and not flags.HONOURED & set(flags.REFUSED)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--load_best True --eval_data_path x --save_strategy no", "--save_strategy no leaves no checkpoint"),
        ("--fp16 True", "--fp16: needs a GPU"),
        ("--dataloader_drop_last True", "Every sample is trained on"),
        ("--train_sampling_strategy group_by_length", "give random or sequential"),
        ("--remove_unused_columns True", "must be False"),
        *((f"--{name} -1", f"--{name} -1") for name in ("batch_tokens", "learning_rate", "max_grad_norm", "seed")),
        *(
            (f"--{name} 0", f"--{name} 0")
            for name in ("max_steps", "num_train_epochs", "gradient_accumulation_steps", "save_steps")
        ),
        *(
            (f"--{name} 0", f"--{name} 0")
            for name in ("save_total_limit", "max_seq_length", "per_device_train_batch_size")
        ),
        *((f"--learning_rate {value}", "--learning_rate") for value in ("nan", "inf", "abc")),
        ("--warmup_ratio 1.5", "--warmup_ratio 1.5: a share of all steps"),
        ("--warmup_steps -3", "warmup_steps"),
        ("--nonsense 1", "--nonsense: no such flag"),
        ("--learnin_rate 1", "did you mean --learning_rate?"),
        ("--bits 4", "--bits 4: needs --lora_enable True"),
        ("--bits 3 --lora_enable True", "invalid choice: 3"),
        ("--double_quant True", "--bits 4 is nf4 with double quantisation"),
        ("--report_to wandb", "pip install wandb"),
        ("--report_to nowhere", "known are none, tensorboard"),
        ("--optim adamax_torch", "invalid choice: 'adamax_torch'"),
        ("--lr_scheduler_type steep", "steep"),
        ("--lora_enable True --lora_rank 0", "--lora_rank 0"),
        ("--lora_enable True --lora_dropout 1.5", "--lora_dropout 1.5"),
        ("--lora_enable True --num_lora_modules 0", "--num_lora_modules 0"),
        ("--image_min_pixels 9000 --image_max_pixels 5000", "is more than"),
        ("--eval_strategy steps", "needs --eval_data_path"),
        ("--push_to_hub True", "Nothing is uploaded"),
        ("--torch_compile True", "is not supported"),
        ("--fsdp full_shard", "Use --deepspeed"),
        ("--deepspeed nowhere.json", "nowhere.json"),
        ("--auto_find_batch_size True", "--batch_tokens"),
        ("--load_best_model_at_end True", "load_best_model_at_end"),
        ("--save_dtype int8", "invalid choice: 'int8'"),
        ("--vision_lora True", "no effect without --lora_enable"),
        ("--freeze_llm True --freeze_merger True --freeze_vision_tower True", "nothing to train"),
        ("--load_best True", "needs --eval_data_path"),
        ("--use_liger True", "GPUs only"),
        ('--gradient_checkpointing_kwargs {"every_n_layers":2}', "with --activation_checkpointing alone"),
    ],
)
def test_a_flag_without_sense_is_one_line_with_the_remedy(tmp_path, given, says):
    paths = ["--model_id", str(STUDENT), "--data_path", "x.json", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError) as error:
        params.parse([*paths, *MINI[:2], *given.split()])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_output_is_never_the_model_that_is_trained_nor_a_file(tmp_path):
    (tmp_path / "link").symlink_to(STUDENT)
    (tmp_path / "file").write_text("")
    for out in (STUDENT, f"{STUDENT}/../student", tmp_path / "link", tmp_path / "file"):
        with pytest.raises(
            InputError, match=r"is the model that is trained, and would be overwritten|is a file; name a folder"
        ):
            params.parse(["--model_id", str(STUDENT), "--data_path", "x.json", "--output_dir", str(out), *MINI[:2]])


def test_older_spellings_are_read_once(tmp_path):
    path = str(write(tmp_path, 1))
    required = ["--model_id", "m", "--data_path", path, "--output_dir", "o", "--use_cpu"]
    for tune, frozen in ((["--tune_merger", "False"], True), (["--tune_merger"], False), (["--tune_merger=no"], True)):
        model, images, args = params.parse([*required, "--min_pixels", "784", "--warmup_ratio", "0.03", *tune])
        assert (model.freeze_merger, images.image_min_pixels, args.warmup_steps) == (frozen, 784, 0.03)
    with pytest.raises(InputError, match="--min_pixels and --image_min_pixels are one flag"):
        params.parse([*required, "--min_pixels", "784", "--image_min_pixels", "784"])
    excluded = params.parse([*required, "--lora_enable", "True", "--lora_namespan_exclude", "['lm_head', 'k_proj']"])[0]
    assert excluded.lora_namespan_exclude == ["lm_head", "k_proj"]


def test_an_unknown_family_is_trained_as_one_part_unless_a_flag_names_a_part():
    training = params.TrainingArguments(output_dir="", use_cpu=True, learning_rate=1e-5, vision_lr=1e-5)
    model = params.ModelArguments(model_id="x")
    assert "unheard_of is not in the table of families" in param_groups.check_parts("unheard_of", model, training)
    assert param_groups.part_of("model.vision_tower.weight", "unheard_of") == "language"
    assert param_groups.check_parts("smolvlm", model, training) == ""
    model.freeze_vision_tower = True
    with pytest.raises(InputError, match="--freeze_vision_tower: the parts of model type unheard_of are not known"):
        param_groups.check_parts("unheard_of", model, training)
    model.freeze_vision_tower, training.merger_lr = False, 2e-6
    with pytest.raises(InputError, match="--merger_lr: the parts"):
        param_groups.check_parts("unheard_of", model, training)


# --- a second call ------------------------------------------------------------------------------------------


def train_in(folder, *flags) -> None:
    """Train on the folder's train.json from its copy of the student, without DeepSpeed."""
    if not (folder / "student").exists():
        shutil.copytree(STUDENT, folder / "student")
    paths = ["--model_id", "student", "--data_path", "train.json", "--image_folder", "", "--output_dir", "out"]
    paths = [str(folder / word) if not word.startswith("--") else word for word in paths]
    train.main([*paths, "--use_cpu", "True", "--image_min_pixels", "3136", "--image_max_pixels", "3136", *flags])


@pytest.fixture(autouse=True)
def no_deepspeed():
    """transformers keeps the DeepSpeed configuration of arguments that are not yet collected, for all trainings of the process."""
    yield
    unset_hf_deepspeed_config()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with all files that a finished training read and wrote."""
    folder = tmp_path_factory.mktemp("trained")
    write_records(folder, train_record(1, "a.png", answer_prompt("what is it?"), "red"))
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
    with pytest.raises(InputError, match=f"other settings: {name} was .*, is now '?{value}") as error:
        train_in(trained, *flag.split())
    same = ("vision_lr", "merger_lr") if name == "learning_rate" else ()
    assert error.value.args[0].count("is now") == 1 + len(same)


def test_a_learning_rate_that_was_not_given_is_that_of_the_language_model(tmp_path):
    """Earlier checkpoints have null for it."""
    write_records(tmp_path, train_record(1, "a.png", answer_prompt("what is it?"), "red"))
    paths = ["--model_id", str(STUDENT), "--data_path", str(tmp_path / "train.json"), "--output_dir", str(tmp_path)]
    now = resume_settings.settings(*params.parse([*paths, "--use_cpu", "True", "--vision_lr", "0"]))
    assert (now["learning_rate"], now["merger_lr"], now["vision_lr"]) == (1e-5, 1e-5, 0.0)
    resume_settings.refuse_other_settings(now | {"merger_lr": None}, now, tmp_path)
    with pytest.raises(InputError, match=r"vision_lr was 1e-05, is now 0\.0"):
        resume_settings.refuse_other_settings(now | {"vision_lr": None}, now, tmp_path)


def test_a_base_model_that_changed_at_its_path_is_another_setting(copy, capsys):
    train_in(copy)
    assert "already exists" in capsys.readouterr().out
    weights = copy / "student/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="other settings: model_sha256 was"):
        train_in(copy)


def test_the_fingerprint_of_a_large_file_notices_a_change_in_its_middle(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(2**24))
    before = resume_settings.fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(2**23) + b"x" * 2**19 + bytes(2**23 - 2**19))
    assert resume_settings.fingerprint(tmp_path) != before


def test_the_deepspeed_configuration_counts_by_its_content(tmp_path):
    write_records(tmp_path)
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
    write_records(tmp_path)
    model, arguments = params.ModelArguments(model_id="hub/name"), params.TrainingArguments(output_dir="", use_cpu=True)
    images = params.DataArguments(data_path=[str(tmp_path / "train.json")])
    computed = {"save_dtype", "world_size", "data_sha256", "cache_features"}
    assert resume_settings.settings(model, images, arguments).keys() == resume_settings.DECISIVE | computed
    model.bits = 4  # recorded where it is given, so that earlier checkpoints stay valid
    assert resume_settings.settings(model, images, arguments)["bits"] == 4


def test_that_all_is_done_is_said_without_opening_per_image(copy, capsys):
    (copy / "a.png").unlink()
    train_in(copy)
    assert "already exists" in capsys.readouterr().out
    (copy / "train.json").unlink()
    with pytest.raises(InputError, match=r"train.json: no such file. Run PI.sh first"):
        train_in(copy)
