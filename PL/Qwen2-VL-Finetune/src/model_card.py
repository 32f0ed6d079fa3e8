"""The model card (README.md) of a trained model's folder."""

from pathlib import Path

from data import split_share
from mpa.files import records
from mpa.models.conversion import converted_from

SETTINGS_SHOWN = (
    *("learning_rate", "vision_lr", "merger_lr", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "image_min_pixels", "image_max_pixels", "seed"),
)
# Stated only if the Parity Identifier made the data.
MPA = (
    " by Model Parity Alignment ([arXiv 2509.16633](https://arxiv.org/abs/2509.16633)), without human labels: on "
    "questions that a larger model wrote and answers consistently, and that this model answered wrongly"
)


def write_card(out: Path, meta: dict, base: str, adapter: bool) -> None:
    """Write the card: base model, data, training settings, licence and use.

    `meta` is the content of train_meta.json, `base` the base model's folder or hub id, `adapter` whether `out` holds
    LoRA adapters.
    """
    funnel, licence = _funnel(meta["settings"]["data_path"]), _licence(base)
    base_name = _base_name(converted_from(base) or base)
    accuracy = [f"- accuracy on held-out samples: {meta['accuracy']:.1%}"] if "accuracy" in meta else []
    lines = [
        "---",
        f"base_model: {base_name}",
        f"license: {licence or 'other'}",
        "pipeline_tag: image-text-to-text",
        f"library_name: {'peft' if adapter else 'transformers'}",
        "---",
        f"\n# {out.name}\n",
        f"{'LoRA adapters for' if adapter else 'Fine-tuned from'} `{base_name}`{MPA if funnel else ''}.\n",
        "## Data\n",
        *(f"- `{Path(path).name}`" for path in meta["settings"]["data_path"]),
        f"- {meta['samples']} samples, {meta['tokens']} tokens per epoch",
        *funnel,
        "\n## Training\n",
        *(f"- {name}: {meta['settings'][name]}" for name in SETTINGS_SHOWN),
        f"- {meta['steps']} steps, mean loss {meta['loss']:.4f}",
        *accuracy,
        "\n## Licence\n",
        f"The base model's licence{f' ({licence})' if licence else ''}; the images have their own licences.",
        "\n## Use\n",
        f"`MODEL={out.name} bash evaluate.sh`, or any program that loads such models.\n",
    ]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _funnel(data_paths: list[str]) -> list[str]:
    """The parity counts, from the meta file that the Parity Identifier writes next to its train JSON."""
    metas = [records.meta_path(split_share(path)[0]) for path in data_paths]
    counts = [records.read_json(meta).get("funnel") for meta in metas if meta.exists()]
    return [f"- {records.funnel_line(funnel)}" for funnel in counts if funnel]


def _base_name(base: str) -> str:
    """A hub id unchanged; only the name of a folder, since the card must not publish local paths."""
    return base if not Path(base).is_dir() else Path(base).resolve().name


def _licence(base: str) -> str:
    """The licence that the card in the base model's folder states; "" if there is none."""
    card = Path(base) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return next((line.split(":", 1)[1].strip() for line in text.splitlines()[:40] if line.startswith("license:")), "")
