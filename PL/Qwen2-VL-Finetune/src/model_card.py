"""The model card."""

import json
from pathlib import Path

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
