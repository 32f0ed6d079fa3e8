"""One training with TRL's SFTTrainer or transformers' own Trainer, which train.py compares with ours.

    python benchmarks/train_peers.py --way plain --model FOLDER --data train.json --pixels 3136 --batch 16
    path/to/trl/bin/python benchmarks/train_peers.py --way trl --model FOLDER --data train.json --pixels 3136 --batch 16

This file imports nothing from this repository, so it runs in TRL's environment. Both trainers get each record as
rendered text in two pieces: the prompt, and the answer with its end token. The pieces are tokenised separately and the
second is labelled, which gives exactly our trainer's labels. (With messages, TRL would also label the line break that
the template puts after the end token.) Both divide the loss by the step's labelled tokens.

"trl" uses TRL's fused output layer, which stores no logits. On a GPU it computes only labelled positions, like ours;
on a CPU, TRL 1.16 computes all positions, tile by tile, and again for the gradient. TRL's default gradient checkpointing is
off. "plain" gets labels and computes all logits. The last line is a JSON object.
"""

import argparse
import json
import os
import resource
import sys
import time

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

IGNORE = -100


def read(data: str, processor) -> list[dict]:
    """Records with one image and one answer as {"images": [path], "prompt": text, "completion": text}."""
    rows, end = [], processor.tokenizer.eos_token
    with open(data) as file:
        records = json.load(file)
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        content = [{"type": "image"}, {"type": "text", "text": question.removeprefix("<image>\n")}]
        asked = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        rows.append({"images": [record["image"]], "prompt": prompt, "completion": answer + end})
    return rows


class Collator:
    """Rows -> a batch padded on the right [B, T]. Opens the images and tokenises the text, in each step."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict:
        images = [[Image.open(path).convert("RGB") for path in row["images"]] for row in rows]
        inputs = self.processor(text=[row["prompt"] for row in rows], images=images)
        answers = self.processor.tokenizer([row["completion"] for row in rows], add_special_tokens=False)["input_ids"]
        ids, labels, mask, types = [], [], [], []
        for asked, kinds, answer in zip(inputs["input_ids"], inputs["mm_token_type_ids"], answers, strict=True):
            ids.append(torch.tensor([*asked, *answer]))
            labels.append(torch.tensor([IGNORE] * len(asked) + answer))
            mask.append(torch.ones_like(ids[-1]))
            types.append(torch.tensor([*kinds, *[0] * len(answer)]))
        pads = {"input_ids": (ids, self.processor.tokenizer.pad_token_id), "labels": (labels, IGNORE)}
        pads |= {"attention_mask": (mask, 0), "mm_token_type_ids": (types, 0)}
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=pad)
            for name, (values, pad) in pads.items()
        }
        return batch | {name: torch.as_tensor(inputs[name]) for name in ("pixel_values", "image_grid_thw")}


class Clock(TrainerCallback):
    """Each step's loss, and when it was logged. Logging waits for the device."""

    def __init__(self):
        self.at, self.losses = [], []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            self.at.append(time.perf_counter())
            self.losses.append(float(logs["loss"]))


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--way", choices=("plain", "trl"), required=True)
    p.add_argument("--model", required=True, help="folder of the model to start from")
    p.add_argument("--data", required=True, help="train JSON with complete image paths, trained on in its order")
    p.add_argument("--output", default="train_peers_out", help="output folder of the trainer; nothing is saved")
    p.add_argument("--pixels", type=int, required=True, help="area that every image is resized to, in pixels")
    p.add_argument("--batch", type=int, required=True, help="samples per step")
    p.add_argument("--lr", type=float, default=1e-5)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)

    processor = AutoProcessor.from_pretrained(args.model)
    processor.image_processor.size = {"shortest_edge": args.pixels, "longest_edge": args.pixels}
    rows = read(args.data, processor)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
    gpu = torch.cuda.is_available()
    settings = {"output_dir": args.output, "num_train_epochs": 1, "per_device_train_batch_size": args.batch}
    settings |= {"learning_rate": args.lr, "lr_scheduler_type": "constant", "seed": args.seed, "bf16": gpu}
    settings |= {"use_cpu": not gpu, "train_sampling_strategy": "sequential", "gradient_checkpointing": False}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    clock = Clock()
    if args.way == "trl":
        from datasets import Dataset, Features, List, Value
        from datasets import Image as Image
        from trl import SFTConfig, SFTTrainer

        features = Features({"images": List(Image()), "prompt": Value("string"), "completion": Value("string")})
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings, max_length=None, completion_only_loss=True),
            train_dataset=Dataset.from_list(rows, features=features),
            processing_class=processor,
            callbacks=[clock],
        )
    else:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**settings, remove_unused_columns=False),
            train_dataset=rows,
            data_collator=Collator(processor),
            callbacks=[clock],
        )
    trainer.train()
    figures = {"samples_per_second": (len(clock.at) - 1) * args.batch / (clock.at[-1] - clock.at[0])}
    figures |= {"losses": clock.losses, "peak_bytes": peak_bytes()}
    print("\n" + json.dumps(figures | {"parameters": sum(parameter.numel() for parameter in model.parameters())}))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
