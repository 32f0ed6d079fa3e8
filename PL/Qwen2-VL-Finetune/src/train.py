"""Fine-tune a VLM on a train JSON: next-token loss on the answers (paper, section 3.3).

    deepspeed src/train.py --deepspeed scripts/zero2.json --model_id MODEL --data_path train.json --output_dir OUT

Writes model (with LoRA: adapter), tokenizer, processor and a card to OUT, which is then a model path like any
other, and train_meta.json last: where it is, the training is complete, and a second call with it says so.
A training that was stopped goes on from its last checkpoint (--resume_from_checkpoint auto) as if it had
not been: same batches, optimizer, schedule and random numbers.
"""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import checkpoints
import param_groups
import process_group
import report
import torch
import transformers
from cache import Cache
from collator import Collator
from features import Features, keep
from params import DataArguments, ModelArguments, TrainingArguments, parse
from PIL import Image
from trainer import SETTINGS, Leveler, compute_dtype
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from data import (
    IGNORE,
    DataError,
    Samples,
    encode,
    measure,
    read_samples,
    refuse_special_tokens,
    split_share,
)

META = "train_meta.json"
MOST_ON_DISK = 20 * 2**30  # bytes of samples, by default
IN_MEMORY = 2**30  # bytes of samples that one device alone keeps there, before it takes to the disk
# What joins a batch without images, unlabelled, so that every rank runs every module.
BLANK = {
    "id": None,
    "images": [Image.new("RGB", (64, 64))],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "."}]},
    ],
}

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


def load(kind, model_args: ModelArguments, **options):
    """The model's processor or weights, as `kind` loads them. Raises DataError when it has none."""
    source, options["trust_remote_code"] = model_args.model_id, model_args.trust_remote_code
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be loaded: {str(error).strip().splitlines()[0]}") from None


def load_processor(model_args: ModelArguments, data_args: DataArguments):
    """Processor with the pixel limits."""
    processor = load(AutoProcessor, model_args)
    images = processor.image_processor
    if hasattr(images, "merge_size"):  # Qwen-style: the two "edges" are areas in pixels
        images.size = {"shortest_edge": data_args.image_min_pixels, "longest_edge": data_args.image_max_pixels}
    return processor


def load_model(model_args: ModelArguments, args: TrainingArguments):
    """Model in float32 (what it computes in is cast from that), frozen where asked, or with LoRA."""
    flash = not model_args.disable_flash_attn2 and is_flash_attn_2_available() and (args.bf16 or args.fp16)
    attention = {"attn_implementation": "flash_attention_2" if flash else "sdpa"}
    model = load(AutoModelForImageTextToText, model_args, dtype="float32", use_safetensors=True, **attention)
    if is_deepspeed_zero3_enabled():
        # transformers 5.23 keeps all renamings that its loader knows, used or not, and would save wrong names by them.
        model._weight_conversions = []
    if model_args.lora_enable:
        return param_groups.add_lora(model, model_args)
    param_groups.freeze(model, model_args)
    return model


def read(paths: list[str], data_args: DataArguments, args: TrainingArguments) -> list[dict]:
    return read_samples(paths, data_args.image_folder, data_args.path_map, args.seed)


def prepared(
    samples: list[dict], processor, data_args: DataArguments, args: TrainingArguments, on_disk: bool = True
) -> Samples:
    """The samples, each made and found to fit."""
    refuse_special_tokens(samples, processor.tokenizer)
    workers, most = (
        max(1, len(os.sched_getaffinity(0)) // process_group.local_world_size()),
        most_kept(data_args, args, len(samples)),
    )
    # With other ranks all that one makes is for all.
    memory = 0 if args.world_size > 1 or data_args.cache_gb == 0 else IN_MEMORY if data_args.lazy_preprocess else most
    cache = open_cache(processor, data_args, args, len(samples), workers) if most and on_disk else None
    return measure(samples, processor, data_args.max_seq_length, data_args.on_too_long, memory, cache, workers)


def open_cache(processor, data_args: DataArguments, args: TrainingArguments, n: int, writers: int = 1) -> Cache:
    """The cache, in which so many processes of this rank write."""
    return Cache(
        samples_folder(data_args, args),
        most_kept(data_args, args, n),
        processor,
        shares=process_group.local_world_size() * writers,
    )


def most_kept(data_args: DataArguments, args: TrainingArguments, n: int) -> float:
    """Bytes of samples on disk, of `n`. By default none where each is used once: to make one again takes less than to keep it."""
    if not data_args.lazy_preprocess:
        return float("inf")
    if data_args.cache_gb is not None:
        return data_args.cache_gb * 2**30
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    used = args.max_steps * a_step / n if args.max_steps > 0 else args.num_train_epochs
    if used <= 1 and not data_args.samples_dir and not data_args.cache_features:
        return 0
    folder = samples_folder(data_args, args)
    while not folder.exists():
        folder = folder.parent
    return min(MOST_ON_DISK, shutil.disk_usage(folder).free / 10)


def samples_folder(data_args: DataArguments, args: TrainingArguments) -> Path:
    return Path(data_args.samples_dir or Path(args.output_dir, ".samples"))


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


def peak_bytes(args: TrainingArguments) -> int:
    """The most memory that this process has held: the GPU's, or on a CPU its own."""
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated(args.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def build(
    samples: list[dict], model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, asked: dict
) -> Leveler:
    """The trainer, with these samples checked, and the model. `asked` are the settings its checkpoints are to carry."""
    processor, held_out = load_processor(model_args, data_args), None
    samples = prepared(samples, processor, data_args, args, on_disk=not data_args.cache_features)
    if data_args.eval_data_path:
        held_out = prepared(read([data_args.eval_data_path], data_args, args), processor, data_args, args)
        if any(sum(m["role"] == "user" for m in sample["messages"]) > 1 for sample in held_out.samples):
            raise DataError(f"{data_args.eval_data_path}: only samples with one question can be evaluated.")
    blank = encode(BLANK, processor) if args.world_size > 1 else None
    transformers.set_seed(args.seed)
    model, features = load_model(model_args, args), None
    if data_args.cache_features:
        some = encode(BLANK, processor)
        features = Features(model, args.device, compute_dtype(args), some)
        keep(samples, features, open_cache(processor, data_args, args, len(samples)))
        blank = blank and features.of(some)
    return Leveler(
        model=model,
        args=args,
        samples=samples,
        eval_samples=held_out,
        collator=Collator(processor, data_args.packing, blank),
        features=features,
        batch_tokens=data_args.batch_tokens,
        processing_class=processor,
        settings=asked,
        save_dtype=save_dtype(model_args),
    )


def save_dtype(model_args: ModelArguments) -> torch.dtype:
    """What the weights are written in at the end: as --save_dtype says, by default as the base's are."""
    if model_args.save_dtype != "auto":
        return getattr(torch, model_args.save_dtype)
    config = load(AutoConfig, model_args)
    of_base = config.dtype or getattr(config.get_text_config(), "dtype", None)
    return of_base if isinstance(of_base, torch.dtype) else torch.float32


def main(argv=None) -> int:
    """Train as the flags say; 0, or 143 or 130 where it was asked to stop. Raises DataError for what the user can mend."""
    process_group.use_launcher_environment()
    model_args, data_args, args = parse(argv)
    if args.deepspeed:
        process_group.init_deepspeed()
    out, first = Path(args.output_dir), args.process_index == 0
    if not sys.stderr.isatty():
        args.disable_tqdm = True
        transformers.utils.logging.disable_progress_bar()
    samples = read(data_args.data_path, data_args, args)  # before all that is slow
    asked = settings(model_args, data_args, args)
    if (out / META).exists():
        refuse_other_settings(checkpoints.read_json(out / META).get("settings") or {}, asked, out)
        print(f"PL: {out} is there already, trained with these settings.")
        return 0
    with checkpoints.locked(out) if first else contextlib.nullcontext():
        try:
            return train(samples, model_args, data_args, args, asked)
        finally:  # what was kept of the samples, of a training that failed too
            if args.local_process_index == 0 and not data_args.samples_dir:
                shutil.rmtree(samples_folder(data_args, args), ignore_errors=True)


def train(
    samples: list[dict], model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, asked: dict
) -> int:
    """Train on these samples from the last checkpoint on, and write the model, its card and the meta file."""
    started, out, first = time.time(), Path(args.output_dir), args.process_index == 0
    checkpoint = checkpoint_in(out, asked, args)
    trainer = build(samples, model_args, data_args, args, asked)
    samples = trainer.train_dataset
    if first:
        print(
            *trainer.start_lines(),
            report.labelled_line(samples[0], trainer.processing_class.tokenizer, IGNORE),
            sep="\n",
            flush=True,
        )
        if checkpoint:
            print(f"PL: goes on from {checkpoint}.", flush=True)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.interrupted:
        if first:
            print(f"PL: stopped at step {result.global_step} and saved. The same call goes on from there.", flush=True)
        return 128 + trainer.stop.heard
    trainer.save_model(args.output_dir)  # gathers the shards under ZeRO-3
    trainer.save_state()
    process_group.barrier()
    if first:
        meta = {"settings": asked, "samples": len(samples), "tokens": sum(samples.lengths), "steps": result.global_step}
        meta |= {"loss": result.training_loss, "seconds": round(time.time() - started, 1)}
        meta |= trainer.pace() | {"peak_bytes": peak_bytes(args)}
        if trainer.eval_dataset:
            scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
            meta["accuracy"] = max(scores) if args.load_best else scores[-1]
        report.write_card(out, meta, model_args.model_id, model_args.lora_enable)
        report.write_json(out / META, meta)
        size, dtype = report.size_of(out) / 1e9, str(trainer.save_dtype or torch.float32).removeprefix("torch.")
        print(f"PL: {len(samples)} samples, {result.global_step} steps, mean loss {result.training_loss:.3f}.")
        print(f"Wrote {out} ({size:.3g} GB, {dtype}). Next: evaluate.sh with MODEL={out}.")
    return 0


def run() -> int:
    """`main`; what a user can mend ends in one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the trainer saves when it hears it
    try:
        code = main()
        process_group.destroy()
        return code
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped before the first step. The same call begins again.", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise
        print(
            f"error: {error.filename or 'the output folder'}: {error.strerror}. Make room, or choose another --output_dir; the "
            "same call goes on from the last whole checkpoint.",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run())
