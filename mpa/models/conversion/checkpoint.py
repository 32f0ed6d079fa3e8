"""A checkpoint as it lies in a folder: its configuration, and its tensors, which are read one at a time."""

import re
from itertools import groupby
from pathlib import Path

from mpa.files.records import InputError, read_json
from mpa.models import model_files
from mpa.models.model_files import BrokenModel

DTYPES = ("F64", "F32", "F16", "BF16")
# Buffers that older versions stored and that today's classes compute.
BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$")


class Checkpoint:
    """The configuration and the stored tensors of a folder.

    `shapes` holds the shape of each tensor by its name, in the order of the files. Raises InputError where a file is
    missing, damaged or not complete, and where the weights are only there as pickles.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        weight_files(self.folder)
        try:
            stored = model_files.tensors(self.folder)
        except BrokenModel as error:
            raise InputError(str(error)) from None
        self._stored = {name: entry for name, entry in stored.items() if not BUFFERS.search(name)}
        self.shapes = {name: entry["shape"] for name, entry in self._stored.items()}
        if other := {name: entry["dtype"] for name, entry in self._stored.items() if entry["dtype"] not in DTYPES}:
            name = min(other)
            raise InputError(
                f"{self.folder}: {len(other)} of its tensors are no floating-point numbers of {', '.join(DTYPES)} ({name}: "
                f"{other[name]}). A quantised checkpoint cannot be converted: name the original one."
            )

    def refuse_not_finite(self, names: list[str]) -> None:
        """Raise InputError if one of these tensors has a NaN or an infinite value."""
        if wrong := model_files.not_finite({name: self._stored[name] for name in names}):
            raise InputError(
                f"{self.folder}: {len(wrong)} of its tensors hold values that are not finite ({model_files.some(wrong)}). Download the "
                "checkpoint again."
            )

    def read(self, names: list[str]):
        """Yield (name, tensor) for these names. Only the tensor at hand is in memory."""
        from safetensors import safe_open

        for path, group in groupby(names, lambda name: self._stored[name]["file"]):
            with safe_open(path, framework="pt") as file:
                for name in group:
                    yield name, file.get_tensor(name)

    def count(self, pattern: str) -> int:
        """Number of different values of the first group of `pattern` in the tensors' names: of layers, for example."""
        found = (re.match(pattern, name) for name in self.shapes)
        return len({match.group(1) for match in found if match})


def read_config(folder: Path, name: str = "config.json") -> dict:
    """The content of a configuration file. Raises InputError if it is no JSON object."""
    config = read_json(folder / name)
    if not isinstance(config, dict):
        raise InputError(f"{folder / name}: expected a JSON object.")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model. Raises InputError if one is missing."""
    try:
        files = model_files.weight_files(folder)
    except BrokenModel as error:
        raise InputError(str(error)) from None
    missing = [path.name for path in files if not path.is_file()]
    if not missing:
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise InputError(
            f"{folder}: its weights are only there as pickles, which can run code and are not read. Convert them to "
            "safetensors, on a machine that you can lose: load the state dict with torch.load(…, weights_only=True) and "
            "write it with safetensors.torch.save_file as model.safetensors."
        )
    raise InputError(f"{folder}: {', '.join(missing[:3])} is missing. Download the checkpoint again.")
