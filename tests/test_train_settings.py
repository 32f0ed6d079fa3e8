"""Settings that a second call of the trainer must share with the first."""

import shutil

import params
import pytest
import resume_settings
import train
from conftest import STUDENT
from training import write_records

import data
from mpa.files.records import train_record
from mpa.method.prompts import answer_prompt


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
    with pytest.raises(data.DataError, match=f"other settings: {name} was .*, is now '?{value}") as error:
        train_in(trained, *flag.split())
    same = ("vision_lr", "merger_lr") if name == "learning_rate" else ()
    assert error.value.args[0].count("is now") == 1 + len(same)


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
    computed = {"save_dtype", "world_size", "data_sha256"}
    assert resume_settings.settings(model, images, arguments).keys() == resume_settings.DECISIVE | computed
    model.bits = 4  # recorded where it is given, so that earlier checkpoints stay valid
    assert resume_settings.settings(model, images, arguments)["bits"] == 4


def test_a_learning_rate_that_was_not_given_is_that_of_the_language_model(tmp_path):
    """Earlier checkpoints have null for it."""
    write_records(tmp_path, train_record(1, "a.png", answer_prompt("what is it?"), "red"))
    paths = ["--model_id", str(STUDENT), "--data_path", str(tmp_path / "train.json"), "--output_dir", str(tmp_path)]
    now = resume_settings.settings(*params.parse([*paths, "--use_cpu", "True", "--vision_lr", "0"]))
    assert (now["learning_rate"], now["merger_lr"], now["vision_lr"]) == (1e-5, 1e-5, 0.0)
    resume_settings.refuse_other_settings(now | {"merger_lr": None}, now, tmp_path)
    with pytest.raises(Exception, match=r"vision_lr was 1e-05, is now 0\.0"):
        resume_settings.refuse_other_settings(now | {"vision_lr": None}, now, tmp_path)


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
    write_records(tmp_path, train_record(1, "a.png", "q <b> |", "x"), train_record(2, "a.png", question, answer))
    with pytest.raises(data.DataError) as error:
        train_in(tmp_path)
    assert f"train.json, record 1: {token} is a special token" in str(error.value)
    assert not (tmp_path / "out").exists()
