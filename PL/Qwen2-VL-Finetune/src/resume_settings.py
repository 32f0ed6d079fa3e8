"""The settings that determine a training's result, and the check of them before a run resumes from a checkpoint.

A checkpoint records them. A run with other values is refused, and the message names the differences.
"""

import hashlib
import json
from pathlib import Path

import checkpoints
from checkpointing import SETTINGS
from model_loading import model_type
from params import DataArguments, ModelArguments, TrainingArguments

from data import split_share
from mpa.files.journal import differences
from mpa.files.records import InputError
from mpa.models import families, model_files
from mpa.models.model_files import sha256

# Arguments that change the result. An argument that is not listed (logging, saving, data loading, activation
# checkpointing, or one that a later transformers release adds) may change between a run and its resumption.
DECISIVE = set(
    # schedule and optimizer
    "per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate vision_lr merger_lr "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm "
    # loss, precision, seeds and order of the samples
    "average_tokens_across_devices label_smoothing_factor neftune_noise_alpha bf16 fp16 tf32 use_cpu use_liger_kernel "
    "liger_kernel_config full_determinism seed data_seed train_sampling_strategy dataloader_in_order remove_unused_columns "
    # distributed training
    "deepspeed ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend "
    # choice of the final weights
    "load_best load_best_model_at_end metric_for_best_model greater_is_better "
    # model
    "model_id freeze_vision_tower freeze_llm freeze_merger lora_enable vision_lora lora_rank lora_alpha lora_dropout "
    "lora_namespan_exclude num_lora_modules disable_flash_attn2 trust_remote_code "
    # data
    "data_path image_folder path_map image_min_pixels image_max_pixels max_seq_length on_too_long packing "
    # `flags` allows only the default of these; they are recorded because earlier checkpoints have them
    "optim_target_modules torch_compile torch_compile_backend torch_compile_mode use_cache auto_find_batch_size "
    "accelerator_config parallelism_config dataloader_drop_last label_names length_column_name fsdp fsdp_config".split()
)
CONFIGURATIONS = Path(__file__).resolve().parents[1] / "scripts"  # of DeepSpeed
DECISIVE_WITH_LOAD_BEST = {"eval_strategy", "eval_steps", "save_strategy", "save_steps"}


def settings(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> dict:
    """The decisive settings, as JSON reads them back.

    Files count by content (sha256), so that they may move; a hub id counts by its name.
    """
    training = args.to_dict()
    values = {name: value for name, value in training.items() if name in DECISIVE}
    if isinstance(args.deepspeed, str) and Path(args.deepspeed).is_file():
        del values["deepspeed"]
        values["deepspeed_sha256"] = sha256(Path(args.deepspeed))
    values |= {name: value for name, value in (vars(model_args) | vars(data_args)).items() if name in DECISIVE}
    if limit := _tile_limit(model_args, data_args):  # only then, so that earlier checkpoints keep their settings
        values["max_tiles"] = limit
    if model_args.bits != 16:  # earlier checkpoints do not have it
        values["bits"] = model_args.bits
    values["cache_features"] = False  # a flag of earlier versions, which their checkpoints record
    values["save_dtype"], values["world_size"] = model_args.save_dtype, args.world_size
    values["data_sha256"] = [sha256(Path(split_share(path)[0])) for path in data_args.data_path]
    if args.load_best:  # then the final weights depend on the evaluation's data and schedule
        values |= {name: value for name, value in training.items() if name in DECISIVE_WITH_LOAD_BEST}
        values["eval_data_sha256"] = sha256(Path(data_args.eval_data_path))
    if Path(model_args.model_id).is_dir():
        values["model_sha256"] = fingerprint(Path(model_args.model_id))
    return json.loads(json.dumps(values, default=str))


def _tile_limit(model_args: ModelArguments, data_args: DataArguments) -> int | None:
    try:
        return families.tile_limit(model_type(model_args), data_args.max_tiles)
    except InputError:  # the loading of the model says so
        return data_args.max_tiles


def fingerprint(folder: Path) -> str:
    """sha256 over name, size and content of each file directly in a model's folder, without its manifest.

    Of a file above 1 MiB it reads the first and the last MiB, and 64 evenly spaced blocks of 4 KiB.
    """
    digest, mib = hashlib.sha256(), 2**20
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.name != model_files.MANIFEST):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        blocks = [(0, mib)]
        if size > mib:
            blocks += [(size * i // 64, 4096) for i in range(64)] + [(size - mib, mib)]
        with path.open("rb") as file:
            for start, length in blocks:
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def checkpoint_to_resume(out: Path, current: dict, args: TrainingArguments) -> str | None:
    """The checkpoint that --resume_from_checkpoint asks for; with "auto", the last complete one in `out`, if any.

    Raises InputError if checkpoints exist but none is complete, or if the checkpoint's settings are not `current`.
    """
    path = args.resume_from_checkpoint
    if path in ("no", "False", "false", None):
        return None
    if path == "auto":
        complete, refused = checkpoints.last_complete(out)
        if refused and not complete:
            raise InputError(
                f"{'; '.join(refused)}. No checkpoint is left to resume from; --resume_from_checkpoint no starts again."
            )
        if refused and args.process_index == 0:
            print(f"PL: skipped {'; '.join(refused)}.", flush=True)
        if complete is None:
            return None
        path = str(complete)
    elif why := checkpoints.fault(Path(path)):
        raise InputError(f"{path}: {why}; --resume_from_checkpoint no starts again.")
    recorded = checkpoints.read_json(Path(path, SETTINGS))
    _refuse_deepspeeds(recorded, current, path)
    refuse_other_settings(recorded, current, path)
    return path


def _refuse_deepspeeds(recorded: dict, current: dict, path: str) -> None:
    """Raises InputError for a checkpoint of DeepSpeed, whose optimizer state only DeepSpeed can read, in a run without it."""
    if "deepspeed_sha256" not in recorded or "deepspeed_sha256" in current:
        return
    known = sorted(CONFIGURATIONS.glob("zero*.json"))
    file = next((file for file in known if sha256(file) == recorded["deepspeed_sha256"]), "with its configuration")
    raise InputError(
        f"{path}: was written with DeepSpeed, and this run has none. --deepspeed {file} resumes it; "
        "--resume_from_checkpoint no starts again."
    )


def of_result(recorded: dict) -> dict:
    """The recorded settings of a finished training: in one process on a CPU, the result is the same with DeepSpeed and without."""
    alone = recorded.get("use_cpu") and recorded.get("world_size") == 1
    return {name: value for name, value in recorded.items() if not (alone and name == "deepspeed_sha256")}


def refuse_other_settings(recorded: dict, current: dict, where) -> None:
    """Raises InputError, with each difference, if the training at `where` had other settings."""
    rates = {name: recorded.get("learning_rate") for name in ("vision_lr", "merger_lr") if recorded.get(name) is None}
    if changes := differences(recorded | rates, current):  # earlier checkpoints have null where it was --learning_rate
        raise InputError(
            f"{where}: was trained with other settings: {changes}. Choose another --output_dir or remove it."
        )
