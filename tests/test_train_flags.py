"""The trainer's flags: what is checked before a model is loaded."""

from dataclasses import fields

import flags
import param_groups
import params
import pytest
import transformers
from conftest import STUDENT
from training import MINI, arguments, write

from mpa.files.records import InputError


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
    ],
)
def test_a_flag_without_sense_is_one_line_with_the_remedy(tmp_path, given, says):
    paths = ["--model_id", str(STUDENT), "--data_path", "x.json", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError) as error:
        params.parse([*paths, *MINI[:2], *given.split()])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_model_that_is_trained_is_never_the_output(tmp_path):
    (tmp_path / "link").symlink_to(STUDENT)
    for out in (str(STUDENT), f"{STUDENT}/../student", str(tmp_path / "link")):
        with pytest.raises(InputError, match="is the model that is trained, and would be overwritten"):
            params.parse(["--model_id", str(STUDENT), "--data_path", "x.json", "--output_dir", out, *MINI[:2]])


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file; name a folder"):
        params.parse(
            [
                "--model_id",
                str(STUDENT),
                "--data_path",
                "x.json",
                "--output_dir",
                str(tmp_path / "out"),
                "--use_cpu",
                "True",
            ]
        )


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


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--vision_lora True", "no effect without --lora_enable"),
        ("--freeze_llm True --freeze_merger True --freeze_vision_tower True", "nothing to train"),
        ("--load_best True", "needs --eval_data_path"),
        ("--use_liger True", "GPUs only"),
        ('--gradient_checkpointing_kwargs {"every_n_layers":2}', "with --activation_checkpointing alone"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path, flags, says):
    write(tmp_path, 1)
    with pytest.raises(InputError, match=says):
        params.parse(arguments(tmp_path, *flags.split()))


def test_an_unknown_flag_is_an_error(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(InputError, match="--bits"):
        params.parse(arguments(tmp_path, "--bits", "4"))


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
