"""Fine-tune a VLM on a train JSON: next-token loss on the answers (paper, section 3.3).

    deepspeed src/train.py --deepspeed scripts/zero2.json --model_id MODEL --data_path train.json --output_dir OUT

Writes model, tokenizer and processor to OUT, which is then a model path like any other, and
train_meta.json last: where it is, the training is complete, and a second call with it says so.
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

from data import Collator, DataError, Samples, read_samples

META = "train_meta.json"


def settings(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> dict:
    """What decides the outcome of a training."""
    names = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "weight_decay")
    names += ("gradient_accumulation_steps", "warmup_ratio", "warmup_steps", "seed", "bf16", "fp16", "world_size")
    data = hashlib.sha256(Path(data_args.data_path).read_bytes()).hexdigest()
    return {
        **vars(model_args),
        **vars(data_args),
        "data_sha256": data,
        **{name: getattr(args, name) for name in names if hasattr(args, name)},
    }


def load(model_args: ModelArguments, data_args: DataArguments):
    """Model in float32 (DeepSpeed casts what it computes in), processor with the pixel limits.

    Raises DataError when there is no such model, or it has no processor.
    """
    source = {"pretrained_model_name_or_path": model_args.model_id, "trust_remote_code": model_args.trust_remote_code}
    try:
        processor = AutoProcessor.from_pretrained(**source)
        model = AutoModelForImageTextToText.from_pretrained(**source, dtype="float32", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{model_args.model_id}: cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    images = processor.image_processor
    if hasattr(images, "merge_size"):  # Qwen-style: the two "edges" are areas in pixels
        images.size = {"shortest_edge": data_args.image_min_pixels, "longest_edge": data_args.image_max_pixels}
    freeze(model, model_args)
    return model, processor


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
    samples = read_samples(data_args.data_path, data_args.image_folder)
    asked = settings(model_args, data_args, args)
    if (out / META).exists():
        made = json.loads((out / META).read_text())["settings"]
        if made == asked:
            print(f"PL: {out} is there already, trained with these settings.")
            return
        differ = "; ".join(f"{k} was {made.get(k)!r}, is now {v!r}" for k, v in asked.items() if made.get(k) != v)
        raise DataError(f"{out}: was trained with other settings: {differ}. Choose another --output_dir or remove it.")

    transformers.set_seed(args.seed)
    model, processor = load(model_args, data_args)
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
