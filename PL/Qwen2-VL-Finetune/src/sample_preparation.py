"""Prepares the samples before the first step: reads, encodes, checks and caches them, in memory or on disk."""

import os
import shutil
from pathlib import Path

import process_group
from cache import SampleCache
from params import DataArguments, TrainingArguments
from turns import refuse_dropped_turns

from data import Samples, encode_all, read_samples, refuse_special_tokens

DISK_BYTES = 20 * 2**30  # default limit of the cache on disk
MEMORY_BYTES = 2**30  # of encoded samples in memory, with one rank


def read(paths: list[str], data_args: DataArguments, args: TrainingArguments) -> list[dict]:
    """`data.read_samples` with the flags' values."""
    return read_samples(paths, data_args.image_folder, data_args.path_map, args.seed)


def prepare(
    samples: list[dict], processor, data_args: DataArguments, args: TrainingArguments, on_disk: bool = True
) -> Samples:
    """`data.encode_all` with the flags' values; without `on_disk`, nothing is cached on disk. Collective."""
    refuse_special_tokens(samples, processor.tokenizer)
    refuse_dropped_turns(samples, processor)
    workers = max(1, len(os.sched_getaffinity(0)) // process_group.local_world_size())
    limit = cache_limit(data_args, args, len(samples))
    if args.world_size > 1 or data_args.cache_gb == 0:  # each rank would keep a copy of what any rank has encoded
        memory = 0
    else:
        memory = MEMORY_BYTES if data_args.lazy_preprocess else limit
    cache = open_cache(processor, data_args, args, len(samples), workers) if limit and on_disk else None
    return encode_all(samples, processor, data_args.max_seq_length, data_args.on_too_long, memory, cache, workers)


def open_cache(processor, data_args: DataArguments, args: TrainingArguments, n: int, workers: int = 1) -> SampleCache:
    """The cache for `n` samples, written by `workers` processes of each of this machine's ranks."""
    writers = process_group.local_world_size() * workers
    return SampleCache(cache_folder(data_args, args), cache_limit(data_args, args, n), processor, writers)


def cache_limit(data_args: DataArguments, args: TrainingArguments, n: int) -> float:
    """The cache's limit on disk for `n` samples, in bytes.

    The default is 0 if each sample is used once: encoding it again takes less time than storing and loading it.
    """
    if not data_args.lazy_preprocess:
        return float("inf")
    if data_args.cache_gb is not None:
        return data_args.cache_gb * 2**30
    step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs = args.max_steps * step_size / n if args.max_steps > 0 else args.num_train_epochs
    if epochs <= 1 and not data_args.samples_dir and not data_args.cache_features:
        return 0
    folder = cache_folder(data_args, args)
    while not folder.exists():
        folder = folder.parent
    return min(DISK_BYTES, shutil.disk_usage(folder).free / 10)


def cache_folder(data_args: DataArguments, args: TrainingArguments) -> Path:
    return Path(data_args.samples_dir or Path(args.output_dir, ".samples"))
