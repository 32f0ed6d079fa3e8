"""Fine-tune a VLM on a train JSON: next-token loss on the answers (paper, section 3.3).

    deepspeed src/train.py --deepspeed scripts/zero2.json --model_id MODEL --data_path train.json --output_dir OUT

Writes model (with LoRA: adapter), tokenizer, processor and a card to OUT, which is then a model path like any
other, and train_meta.json last: where it is, the training is complete, and a second call with it says so.
A training that was stopped goes on from its last checkpoint (--resume_from_checkpoint auto) as if it had
not been: same batches, optimizer, schedule and random numbers.
"""

import contextlib
import errno
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import checkpoints
import model_card
import process_group
import report
import torch
import transformers
from collator import Collator
from features import Features, keep
from model_loading import load_model, load_processor, save_dtype
from params import DataArguments, ModelArguments, TrainingArguments, parse
from PIL import Image
from resume_settings import checkpoint_in, refuse_other_settings, settings
from sample_preparation import open_cache, prepared, read, samples_folder
from trainer import Leveler, compute_dtype

from data import (
    IGNORE,
    DataError,
    encode,
)

META = "train_meta.json"
# What joins a batch without images, unlabelled, so that every rank runs every module.
BLANK = {
    "id": None,
    "images": [Image.new("RGB", (64, 64))],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "."}]},
    ],
}


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
        model_card.write_card(out, meta, model_args.model_id, model_args.lora_enable)
        checkpoints.write_json(out / META, meta)
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
