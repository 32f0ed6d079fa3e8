"""What the trainer tells: the line at the start, the device's pace, the model card."""

import contextlib
import json
import os
import time
from pathlib import Path

import torch


def write_json(path: Path, content) -> None:
    """Whole or not at all: beside `path`, then renamed."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os.replace(aside, path)


@contextlib.contextmanager
def with_cache(config):
    """The configuration as it is to be written: with the cache that training switches off."""
    parts = [config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None)]
    off = [part for part in parts if getattr(part, "use_cache", None) is False]
    for part in off:
        part.use_cache = True
    try:
        yield
    finally:
        for part in off:
            part.use_cache = False


TRACES = ("local_files_only", "_name_or_path")


def without_traces(folder: Path, dtype: torch.dtype | None) -> None:
    """Take out of the saved JSON files what says where and how they were made, and say in what dtype the weights are."""
    for path in folder.glob("*config.json"):
        content = json.loads(path.read_text())
        kept = json.loads(path.read_text(), object_hook=lambda part: {k: v for k, v in part.items() if k not in TRACES})
        for part in (kept, *(value for value in kept.values() if isinstance(value, dict))):
            if dtype is not None and "dtype" in part and path.name == "config.json":
                part["dtype"] = str(dtype).removeprefix("torch.")
        if kept != content:
            write_json(path, kept)


def size_of(folder: Path) -> int:
    """Bytes of the weights in a model's folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product here: the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    matrix, best = torch.ones(size, size, device=device, dtype=dtype), 0.0  # no random numbers: they are training's
    for _ in range(6):
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


class Operations:
    """Floating-point operations of a step's matrix products with weights, counted as its forward pass runs.

    Two for each weight and position, as many again for the gradient of the input, and of the weight where it is
    trained. Attention itself is left out, and what activation checkpointing does twice counts once.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.total, self.seen = model, 0, set()

    def __enter__(self):
        kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
        modules = (module for module in self.model.modules() if isinstance(module, kinds))
        self.hooks = [module.register_forward_hook(self._count) for module in modules]
        return self

    def _count(self, module, inputs, out) -> None:
        if module not in self.seen:
            self.seen.add(module)
            # Of a linear layer the input, since what is done at few positions may be spread over all afterwards.
            values, channels = (inputs[0], -1) if isinstance(module, torch.nn.Linear) else (out, 1)
            positions = values.numel() // values.shape[channels]
            self.total += 2 * module.weight.numel() * positions * (2 + module.weight.requires_grad)

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def start_lines(samples, counts: dict, groups: list[dict], steps: str, args) -> list[str]:
    """Samples, `steps` in words, tokens, parameters by part with their learning rates, and the memory of weights and optimizer."""
    tokens, visual = sum(samples.lengths), sum(samples.visual)
    trained = sum(of for _, of in counts.values())
    total = sum(whole for whole, _ in counts.values())
    half = 2 if args.bf16 or args.fp16 else 4
    # Weights as computed with, gradients, and for what is trained a float32 copy and Adam's two averages.
    state = total * half + trained * (half + 8 + (4 if half == 2 else 0))
    rates = {group["part"]: group["lr"] for group in groups}
    lines = [
        f"PL: {len(samples):,} samples, {tokens:,} tokens ({visual:,} visual), {steps} on {args.world_size} "
        f"device{'s' * (args.world_size > 1)} ({args.device.type}); {total / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained; "
        f"{state / 2**30:.1f} GiB for weights, gradients and optimizer before any sharding."
    ]
    for part, (whole, of) in counts.items():
        rate = f"learning rate {rates[part]:g}" if part in rates else "frozen"
        lines.append(f"  {part}: {whole / 1e6:,.2f} M parameters, {of / 1e6:,.2f} M trained, {rate}")
    return lines


def labelled_line(encoded: dict, tokenizer, ignore: int) -> str:
    """The first sample as it is learnt, decoded: the prompt's end, and in >> << what is labelled."""
    ids, at = encoded["input_ids"], encoded["labels"] != ignore
    start = int(at.int().argmax())
    before, answer = tokenizer.decode(ids[max(0, start - 40) : start]), tokenizer.decode(ids[at])
    return f"  first sample, labelled between >> and <<: …{before!r}>>{answer!r}<<"


# Said of a model only where the Parity Identifier made its data.
MPA = (
    " by Model Parity Alignment ([arXiv 2509.16633](https://arxiv.org/abs/2509.16633)): on questions and answers that a "
    "larger model wrote and answers consistently, and that this one got wrong, without human labels"
)


def write_card(out: Path, meta: dict, base: str, adapter: bool) -> None:
    """README.md of the model's folder: what it is, from what data, how to use it."""
    funnel, licence = _funnel(meta["settings"]["data_path"]), _licence(base)
    name = _name(base)
    front = ["---", f"base_model: {name}", f"license: {licence or 'other'}"]
    front += ["pipeline_tag: image-text-to-text", f"library_name: {'peft' if adapter else 'transformers'}", "---"]
    accuracy = [f"- accuracy on held-out samples: {meta['accuracy']:.1%}"] if "accuracy" in meta else []
    settings = ("learning_rate", "vision_lr", "merger_lr", "num_train_epochs", "per_device_train_batch_size")
    settings += ("gradient_accumulation_steps", "image_min_pixels", "image_max_pixels", "seed")
    lines = [
        *front,
        f"\n# {out.name}\n",
        f"{'LoRA adapters for' if adapter else 'Fine-tuned from'} `{name}`{MPA if funnel else ''}.\n",
        "## Data\n",
        *(f"- `{Path(path).name}`" for path in meta["settings"]["data_path"]),
        f"- {meta['samples']} samples, {meta['tokens']} tokens an epoch",
        *funnel,
        "\n## Training\n",
        *(f"- {name}: {meta['settings'][name]}" for name in settings),
        f"- {meta['steps']} steps, mean loss {meta['loss']:.4f}",
        *accuracy,
        "\n## Licence\n",
        f"That of the base model{f' ({licence})' if licence else ''}; the images have licences of their own.",
        "\n## Use\n",
        f"`MODEL={out.name} bash evaluate.sh`, or any program that loads such checkpoints.\n",
    ]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _funnel(data_paths: list[str]) -> list[str]:
    """The parity counts from the meta file that the Parity Identifier writes beside its train JSON, if there is one."""
    lines = []
    for path in data_paths:
        meta = Path(path).with_suffix(".meta.json")
        if meta.exists():
            counts = json.loads(meta.read_text()).get("funnel", {})
            lines.append("- " + " → ".join(f"{count} {name}" for name, count in counts.items()))
    return lines


def _name(base: str) -> str:
    """A hub id as it is; of a folder, the base that its own card names, or its name: paths of this machine are nobody's business."""
    return base if not Path(base).is_dir() else Path(base).resolve().name


def _licence(base: str) -> str:
    """What the base model's own card says, where its folder has one."""
    card = Path(base) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return next((line.split(":", 1)[1].strip() for line in text.splitlines()[:40] if line.startswith("license:")), "")
