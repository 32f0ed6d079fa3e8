"""Fine-tune a VLM on a train JSON: next-token loss on the answers (paper, section 3.3).

    python src/train.py --model_id MODEL --data_path train.json --output_dir OUT      # on several GPUs: scripts/launch.sh

Writes model (with LoRA: adapter), tokenizer, processor and model card to OUT, a regular model folder. It writes
train_meta.json last; if that file exists, the training is complete, and the same command reports that and exits.
A stopped training resumes from its last checkpoint (--resume_from_checkpoint auto), with the same samples, optimizer
state, schedule and random numbers as without the stop.
"""

import signal
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[3]))  # the repository, for mpa

from unused_packages import unused

from mpa.files import log_file

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    log_file.install()  # before the libraries print
    sys.modules |= dict.fromkeys(unused(sys.argv[1:]))  # None: they count as missing

from mpa.files import light_imports  # noqa: F401  isort: skip

import contextlib
import os
import time
from pathlib import Path

import checkpoints
import first_sample
import param_groups
import process_group
import progress
import torch
import training_memory
import transformers
from collator import Collator
from model_card import write_card
from model_loading import converted, load_model, load_processor, model_type, said_of_limits, save_dtype
from params import DataArguments, ModelArguments, TrainingArguments, parse
from PIL import Image
from resume_settings import checkpoint_to_resume, of_result, refuse_other_settings, settings
from trainer import Leveler
from turns import refuse_dropped_turns

from data import Samples, check_all, encode, read_samples, refuse_special_tokens
from mpa.files import disk_errors, distributed, signals
from mpa.files.log_file import detail
from mpa.files.records import InputError
from mpa.models import conversion, model_files
from mpa.models.device_memory import extend_segments
from mpa.models.families import match_config

META = "train_meta.json"
# Joins, without labels, each batch that has no image, so that every rank runs every module.
BLANK = {
    "id": None,
    "images": [Image.new("RGB", (64, 64))],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "."}]},
    ],
}


def main(argv=None) -> int:
    """Train with these flags. Returns 0, or 128 + the signal that stopped it. Raises InputError for user errors."""
    process_group.use_launcher_environment()
    extend_segments()
    model_args, data_args, args = parse(argv)
    if args.log_file:
        log_file.open_log(Path(args.log_file), args.verbose)
    if args.deepspeed:
        process_group.init_deepspeed()
    out = Path(args.output_dir)
    if not sys.stderr.isatty():
        args.disable_tqdm = True
        transformers.utils.logging.disable_progress_bar()
    samples = read(data_args.data_path, data_args, args)  # first, so that errors in it show before a model is loaded
    model_args.model_id = converted(model_args.model_id)
    current = settings(model_args, data_args, args)
    if (out / META).exists():
        recorded = checkpoints.read_json(out / META).get("settings") or {}
        refuse_other_settings(of_result(recorded), of_result(current), out)
        print(f"PL: {out} already exists, trained with these settings.")
        return 0
    with checkpoints.locked(out) if args.process_index == 0 else contextlib.nullcontext(), disk_errors.named(out):
        return train(samples, model_args, data_args, args, current)


def read(paths: list[str], data_args: DataArguments, args: TrainingArguments) -> list[dict]:
    """`data.read_samples` with the flags' values."""
    return read_samples(paths, data_args.image_folder, data_args.path_map, args.seed)


def train(
    samples: list[dict], model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, current: dict
) -> int:
    """Train on `samples`, from the last checkpoint if there is one, and save. Returns like `main`.

    `current` are the settings.
    """
    started, is_first = time.time(), args.process_index == 0
    checkpoint = checkpoint_to_resume(Path(args.output_dir), current, args)
    with first_sample.tried(model_args.model_id, model_type(model_args)):
        trainer = build(samples, model_args, data_args, args, current)
    if is_first:
        sample_line = progress.first_sample_line(trainer.train_dataset[0], trainer.processing_class.tokenizer)
        first, *parts = trainer.start_lines()
        print(first, flush=True)
        detail(*parts, sample_line)
        if checkpoint:
            print(f"PL: resumes from {checkpoint}.", flush=True)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.interrupted:
        if is_first:
            print(f"PL: stopped at step {result.global_step} and saved. The same command resumes there.", flush=True)
        return 128 + trainer.stop.signal
    trainer.save_model(args.output_dir)  # collective: ZeRO-3 gathers the shards
    trainer.save_state()
    process_group.barrier()
    if is_first:
        finish(trainer, result, model_args, current, started)
    return 0


def build(
    samples: list[dict], model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, current: dict
) -> Leveler:
    """The trainer, with checked samples and the model. Its checkpoints record `current`, the settings. Collective."""
    planned = training_memory.planned_model(model_args, args)
    processor = load_processor(model_args, data_args)
    if args.process_index == 0 and (line := said_of_limits(model_args, data_args)):
        print(line, flush=True)
    kind = model_type(model_args)
    first_sample.refuse_untested(kind, data_args, args)
    param_groups.check_parts(kind, model_args, args)
    train_samples = prepare(samples, processor, data_args)
    if planned is not None and args.process_index == 0:
        print(training_memory.line(planned, model_args, data_args, args, train_samples), flush=True)
    eval_samples = held_out_samples(processor, data_args, args)
    blank = encode(BLANK, processor) if args.world_size > 1 else None
    transformers.set_seed(args.seed)
    model = load_model(model_args, args)
    match_config(model.config, processor)
    return Leveler(
        model=model,
        args=args,
        samples=train_samples,
        eval_samples=eval_samples,
        collator=Collator(processor, data_args.packing, blank),
        batch_tokens=data_args.batch_tokens,
        processing_class=processor,
        settings=current,
        save_dtype=save_dtype(model_args),
    )


def prepare(samples: list[dict], processor, data_args: DataArguments) -> Samples:
    """`data.check_all` with the flags' values, after checks that need no image. Collective."""
    refuse_special_tokens(samples, processor.tokenizer)
    refuse_dropped_turns(samples, processor)
    workers = max(1, len(os.sched_getaffinity(0)) // process_group.local_world_size())
    return check_all(samples, processor, data_args.max_seq_length, data_args.on_too_long, workers)


def held_out_samples(processor, data_args: DataArguments, args: TrainingArguments) -> Samples | None:
    """The samples of --eval_data_path. Raises InputError for a sample with several questions."""
    if not data_args.eval_data_path:
        return None
    samples = prepare(read([data_args.eval_data_path], data_args, args), processor, data_args)
    if any(sum(message["role"] == "user" for message in sample["messages"]) > 1 for sample in samples.samples):
        raise InputError(f"{data_args.eval_data_path}: only samples with one question can be evaluated.")
    return samples


def finish(trainer: Leveler, result, model_args: ModelArguments, current: dict, started: float) -> None:
    """Write the model card and train_meta.json to the model's folder, and report. `started` is a `time.time()`."""
    args, samples, out = trainer.args, trainer.train_dataset, Path(trainer.args.output_dir)
    meta = {"settings": current, "samples": len(samples), "tokens": sum(samples.lengths), "steps": result.global_step}
    meta |= {"loss": result.training_loss, "seconds": round(time.time() - started, 1)}
    meta |= trainer.pace() | {"peak_bytes": progress.peak_bytes(args.device)}
    if original := conversion.converted_from(model_args.model_id):
        meta["converted_from"] = original
    if trainer.eval_dataset:
        scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
        meta["accuracy"] = max(scores) if args.load_best else scores[-1]
    write_card(out, meta, model_args.model_id, model_args.lora_enable)
    model_files.write_manifest(out, model_files.files_of(out))
    model_files.write_json(out / META, meta)
    size = sum(file.stat().st_size for file in model_files.weight_files(out)) / 1e9
    if trainer.skipped_steps:
        print(
            f"PL: {trainer.skipped_steps} of {result.global_step} steps were skipped, as their gradients overflowed float16, and their "
            "samples not learned. --bf16 True or float32 does not overflow."
        )
    dtype = str(trainer.save_dtype or torch.float32).removeprefix("torch.")
    print(f"PL: {len(samples)} samples, {result.global_step} steps, mean loss {result.training_loss:.3f}.")
    print(f"Wrote {out} ({size:.3g} GB, {dtype}). Next: evaluate.sh with MODEL={out}.")


def run() -> int:
    """`main`, with one line on stderr for an error that the user can correct. Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # until `StopOnSignal` saves a checkpoint on them
        signal.signal(number, signals.Heard.handle)
    try:
        code = main()
        process_group.destroy()
        return code
    except InputError as error:
        return _ended(f"error: {error}", 1)
    except KeyboardInterrupt:
        code = 128 + (signals.Heard.signal or signal.SIGINT)
        return _ended("stopped before the first step. The same command starts again.", code)
    except OSError as error:
        if not (what := disk_errors.cause(error)):
            distributed.leave()
            raise
        return _ended(
            f"error: {error.filename or 'the output folder'}: {what}. Free disk space or choose another "
            "--output_dir; the same command resumes from the last complete checkpoint.",
            1,
        )
    except Exception:
        distributed.leave()
        raise


def _ended(text: str, code: int) -> int:
    """Say why the training ends. Returns the exit code; one of several ranks ends here."""
    distributed.leave(text, code)
    print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run())
