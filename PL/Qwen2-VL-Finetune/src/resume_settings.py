"""The settings that decide whether a training can be resumed."""

import hashlib
import json
from pathlib import Path

import checkpoints
from checkpointing import SETTINGS
from params import DataArguments, ModelArguments, TrainingArguments

from data import DataError, split_share

# Arguments, or how their names start, that cannot change what is learnt: what is reported, saved and evaluated on
# the way, and how batches are fetched.
WITHOUT_EFFECT = ("output_dir", "log_", "logging_", "disable_tqdm", "report_to", "run_name", "project", "trackio_")
WITHOUT_EFFECT += ("save_", "enable_jit_checkpoint", "push_to_hub", "hub_", "local_rank")
WITHOUT_EFFECT += ("resume_from_checkpoint", "restore_callback_states", "ignore_data_skip")
WITHOUT_EFFECT += (
    "lazy_preprocess",
    "cache_gb",
    "samples_dir",
    "eval_",
    "per_device_eval",
    "batch_eval",
    "prediction_loss",
    "include_",
    "bf16_full",
    "fp16_full",
)
WITHOUT_EFFECT += ("activation_checkpointing", "gradient_checkpointing", "batch_tokens")
WITHOUT_EFFECT += ("do_train", "do_eval", "do_predict")
WITHOUT_EFFECT += ("dataloader_num", "dataloader_pin", "dataloader_persistent", "dataloader_prefetch")
WITHOUT_EFFECT += ("dataloader_multiprocessing", "ddp_timeout", "debug", "skip_memory_metrics", "torch_empty_cache")


def settings(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> dict:
    """What decides the outcome of a training, as JSON gives it back. Files count by content, a hub id by name."""
    decides = {name: value for name, value in args.to_dict().items() if not name.startswith(WITHOUT_EFFECT)}
    if isinstance(args.deepspeed, str) and Path(args.deepspeed).is_file():
        del decides["deepspeed"]
        decides["deepspeed_sha256"] = sha256(Path(args.deepspeed))
    ours = {**vars(model_args), **vars(data_args)}
    decides |= {name: value for name, value in ours.items() if not name.startswith(WITHOUT_EFFECT)}
    decides["save_dtype"], decides["world_size"] = model_args.save_dtype, args.world_size
    decides["data_sha256"] = [sha256(Path(split_share(path)[0])) for path in data_args.data_path]
    if args.load_best:  # then it matters when is looked, and at what
        names = ("eval_strategy", "eval_steps", "save_strategy", "save_steps")
        decides |= {name: value for name, value in args.to_dict().items() if name in names}
        decides["eval_data_sha256"] = sha256(Path(data_args.eval_data_path))
    if Path(model_args.model_id).is_dir():
        decides["model_sha256"] = fingerprint(Path(model_args.model_id))
    return json.loads(json.dumps(decides, default=str))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint(folder: Path) -> str:
    """sha256 over names, sizes and content of the files in a model's folder, not of those in folders below.

    Of a file above 1 MiB the content is its first and last MiB, and 64 pieces of 4 KiB evenly spaced.
    """
    digest, mib = hashlib.sha256(), 2**20
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        pieces = [(0, mib)]
        if size > mib:
            pieces += [(size * i // 64, 4096) for i in range(64)] + [(size - mib, mib)]
        with path.open("rb") as file:
            for start, length in pieces:
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def checkpoint_in(out: Path, asked: dict, args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the last whole one. Raises DataError where none is whole, or it is of a training with
    other settings."""
    found = args.resume_from_checkpoint
    if found in ("no", "False", "false", None):
        return None
    if found == "auto":
        whole, refused = checkpoints.last_whole(out)
        if refused and not whole:
            raise DataError(
                f"{'; '.join(refused)}. There is none to go on from; --resume_from_checkpoint no starts again."
            )
        if refused and args.process_index == 0:
            print(f"PL: passed over {'; '.join(refused)}.", flush=True)
        if whole is None:
            return None
        found = str(whole)
    elif why := checkpoints.fault(Path(found)):
        raise DataError(f"{found}: {why}; --resume_from_checkpoint no starts again.")
    refuse_other_settings(checkpoints.read_json(Path(found, SETTINGS)), asked, found)
    return found


def refuse_other_settings(made: dict, asked: dict, where) -> None:
    differ = [name for name in made | asked if made.get(name) != asked.get(name)]
    if differ:
        says = "; ".join(f"{name} was {made.get(name)!r}, is now {asked.get(name)!r}" for name in differ)
        raise DataError(f"{where}: was trained with other settings: {says}. Choose another --output_dir or remove it.")
