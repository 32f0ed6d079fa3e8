"""Fine-tune a VLM on a train JSON: next-token loss on the answers (paper, section 3.3).

    deepspeed src/train.py --deepspeed scripts/zero2.json --model_id MODEL --data_path train.json --output_dir OUT

Writes model, tokenizer and processor to OUT, which is then a model path like any other, and
train_meta.json last: where it is, the training is complete, and a second call with it says so.
A training that was killed does not resume: the same call starts it again from MODEL.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import transformers
from params import DataArguments, ModelArguments, TrainingArguments
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, Trainer

from data import Collator, DataError, Samples, read_samples, readable, refuse_special_tokens

META = "train_meta.json"

# transformers' arguments, or how their names start, that cannot change what is learnt: what is reported and
# saved on the way, evaluation (this trainer does none), and how batches are fetched.
WITHOUT_EFFECT = ("output_dir", "log_", "logging_", "disable_tqdm", "report_to", "run_name", "project", "trackio_")
WITHOUT_EFFECT += ("save_", "enable_jit_checkpoint", "push_to_hub", "hub_", "local_rank")
WITHOUT_EFFECT += ("resume_from_checkpoint", "restore_callback_states", "ignore_data_skip")
WITHOUT_EFFECT += ("eval_", "per_device_eval", "batch_eval", "prediction_loss", "include_", "bf16_full", "fp16_full")
WITHOUT_EFFECT += ("load_best_model", "metric_for_best", "greater_is_better", "do_train", "do_eval", "do_predict")
WITHOUT_EFFECT += ("dataloader_num", "dataloader_pin", "dataloader_persistent", "dataloader_prefetch")
WITHOUT_EFFECT += ("dataloader_multiprocessing", "ddp_timeout", "debug", "skip_memory_metrics", "torch_empty_cache")


def settings(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> dict:
    """What decides the outcome of a training, as JSON gives it back. Files count by content, a hub id by name."""
    decides = {name: value for name, value in args.to_dict().items() if not name.startswith(WITHOUT_EFFECT)}
    if isinstance(args.deepspeed, str) and Path(args.deepspeed).is_file():
        del decides["deepspeed"]
        decides["deepspeed_sha256"] = sha256(Path(args.deepspeed))
    decides |= {**vars(model_args), **vars(data_args), "world_size": args.world_size}
    decides["data_sha256"] = sha256(Path(data_args.data_path))
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


def load_model(model_args: ModelArguments):
    """Model in float32 (DeepSpeed casts what it computes in), frozen where asked."""
    model = load(AutoModelForImageTextToText, model_args, dtype="float32", use_safetensors=True)
    freeze(model, model_args)
    return model


def freeze(model, model_args: ModelArguments) -> None:
    """Freeze the parts named; the merger's parameters are told from the tower's by their name."""
    for name, parameter in model.named_parameters():
        if "visual" in name or "vision" in name or "projector" in name or "connector" in name:
            merger = "merger" in name or "projector" in name or "connector" in name
            frozen = model_args.freeze_merger if merger else model_args.freeze_vision_tower
        else:
            frozen = model_args.freeze_llm
        parameter.requires_grad = not frozen


def main(argv=None) -> None:
    model_args, data_args, args = HfArgumentParser(
        (ModelArguments, DataArguments, TrainingArguments)
    ).parse_args_into_dataclasses(argv)
    started, out = time.time(), Path(args.output_dir)
    if not sys.stderr.isatty():
        args.disable_tqdm = True
        transformers.utils.logging.disable_progress_bar()
    samples = read_samples(data_args.data_path, data_args.image_folder, data_args.path_map)
    asked = settings(model_args, data_args, args)
    if (out / META).exists():
        made = json.loads((out / META).read_text())["settings"]
        differ = [name for name in made | asked if made.get(name) != asked.get(name)]
        if not differ:
            print(f"PL: {out} is there already, trained with these settings.")
            return
        says = "; ".join(f"{name} was {made.get(name)!r}, is now {asked.get(name)!r}" for name in differ)
        raise DataError(f"{out}: was trained with other settings: {says}. Choose another --output_dir or remove it.")

    processor = load_processor(model_args, data_args)
    refuse_special_tokens(samples, processor.tokenizer, data_args.data_path)
    samples = readable(samples, data_args.data_path)
    transformers.set_seed(args.seed)
    model = load_model(model_args)
    collator = Collator(processor.tokenizer.pad_token_id)
    trainer = Trainer(model=model, args=args, train_dataset=Samples(samples, processor), data_collator=collator)
    result = trainer.train()
    trainer.save_model(args.output_dir)  # gathers the shards under ZeRO-3
    trainer.save_state()
    if trainer.is_world_process_zero():
        (out / "training_args.bin").unlink(missing_ok=True)  # a pickle, and train_meta.json says the same
        processor.save_pretrained(args.output_dir)
        meta = {"settings": asked, "samples": len(samples), "steps": result.global_step}
        meta |= {"loss": result.training_loss, "seconds": round(time.time() - started, 1)}
        (out / META).write_text(json.dumps(meta, indent=1) + "\n")
        print(f"PL: {len(samples)} samples, {result.global_step} steps, mean loss {result.training_loss:.3f}.")
        print(f"Wrote {out}. Next: evaluate.sh with MODEL={out}.")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
