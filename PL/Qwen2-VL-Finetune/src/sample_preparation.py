"""The samples, encoded and checked before the first step."""

import os
import shutil
from pathlib import Path

import process_group
from cache import Cache
from params import DataArguments, TrainingArguments

from data import Samples, measure, read_samples, refuse_special_tokens

MOST_ON_DISK = 20 * 2**30  # bytes of samples, by default
IN_MEMORY = 2**30  # bytes of samples that one device alone keeps there, before it takes to the disk


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
