"""Which model a folder holds: its base model where it holds adapters, and a digest of its files."""

import hashlib
from pathlib import Path

from mpa.files.records import InputError, read_json
from mpa.models import model_files
from mpa.models.model_files import ADAPTER


def adapted(path: str) -> str | None:
    """The base model of the LoRA adapters in this folder; None if the folder holds a full model.

    Raises InputError if the adapters name no base model, or one that is adapters itself.
    """
    config = Path(path) / ADAPTER
    if not config.is_file():
        return None
    content = read_json(config)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(f"{config}: does not name its base model. Add the field base_model_name_or_path.")
    if Path(base).is_dir() and (Path(base) / ADAPTER).is_file():
        own = Path(base).samefile(path)
        raise InputError(
            f"{config}: its base model, {base}, is {'this folder itself' if own else 'also a folder of adapters'}. Name a "
            "full model; PL/Qwen2-VL-Finetune/scripts/merge_lora.sh makes one."
        )
    return base


def identity(path: str) -> str:
    """A model's identity: the hub id itself, or a folder's name with a digest of its files.

    The digest covers files up to 1 MB in full; of larger files it covers the size, both ends and 64 samples between
    them. So a model that was retrained in the same folder has a new identity, without reading 16 GB.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    base = adapted(path)
    content = hashlib.sha256(identity(base).encode() if base else b"")
    for file in model_files.files_of(folder):
        size = file.stat().st_size
        content.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as data:
            if size <= 2**20:
                content.update(data.read())
                continue
            for place in range(66):
                data.seek((size - 4096) * place // 65)
                content.update(data.read(4096))
    return f"{folder.resolve().name}@{content.hexdigest()[:16]}"
