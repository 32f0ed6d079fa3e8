"""A checkpoint as it lies in a folder: its configuration, and its tensors, which are read one at a time."""

import re
from itertools import groupby
from pathlib import Path

from mpa.records import InputError, read_json

INDEX = "model.safetensors.index.json"
# Buffers that older versions stored and that today's classes compute.
BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$")


class Checkpoint:
    """The configuration and the stored tensors of a folder.

    `shapes` holds the shape of each tensor by its name, in the order of the files. Raises InputError where a file is
    missing, damaged or not complete, and where the weights are only there as pickles.
    """

    def __init__(self, folder: str | Path):
        from safetensors import SafetensorError, safe_open

        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self._files, self.shapes = {}, {}
        for path in weight_files(self.folder):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 -- the file is no dict
                        if not BUFFERS.search(name):
                            self._files[name] = path
                            self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: damaged, or not yet downloaded whole ({error}). Download the checkpoint again."
                ) from None

    def read(self, names: list[str]):
        """Yield (name, tensor) for these names. Only the tensor at hand is in memory."""
        from safetensors import safe_open

        for path, group in groupby(names, self._files.get):
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
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        table = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise InputError(f"{folder / INDEX}: expected a weight_map. Download the file again.")
        files = [folder / Path(name).name for name in dict.fromkeys(table.values())]
    else:
        files = [folder / "model.safetensors"]
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
