"""The files of a model, and the one way to load it: whole, finite, and as its training wrote it.

A training writes a manifest of its checkpoints and of its final model, and beside adapters the digests of their base model."""

import errno
import hashlib
import json
import math
import operator
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mpa.files import records

ADAPTER = "adapter_config.json"  # marks a folder of LoRA adapters, and names their base model
WEIGHTS, INDEX, ADAPTER_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
MANIFEST = (
    "manifest.json"  # of a folder: bytes and sha256 of each file, by its name, and of a configuration its `content`
)
BASE = "base_model.json"  # of adapters: the sha256 of the files of their base model, by name
# The files that determine a model's replies: weights, configuration, tokenizer, processor, chat template.
MODEL_SUFFIXES = {".safetensors", ".json", ".txt", ".jinja", ".model", ".py"}
NOT_THE_MODEL = {"train_meta.json", "train_log.json", "trainer_state.json", MANIFEST}
PICKLES = {".pt", ".pth", ".bin", ".pkl"}
LOCAL_KEYS = {"_name_or_path", "local_files_only"}  # of configuration files: where the model was loaded from
# What else saving a model again, with another version or in another place, changes in them. Weights have their own dtype.
SAVED_AGAIN = {*LOCAL_KEYS, "base_model_name_or_path", "inference_mode", "use_cache", "dtype", "torch_dtype"}
SAVED_AGAIN |= {"transformers_version", "peft_version"}

# By safetensors' name of a dtype: an unsigned integer of its size, all bits but the sign, and the least that is not finite.
NOT_FINITE = {
    "F64": ("u8", 2**63 - 1, 0x7FF << 52),
    "F32": ("u4", 2**31 - 1, 0xFF << 23),
    "F16": ("u2", 2**15 - 1, 0x1F << 10),
    "BF16": ("u2", 2**15 - 1, 0xFF << 7),
    "F8_E5M2": ("u1", 127, 0x7C),
    "F8_E4M3": ("u1", 127, 0x7F),
}
BLOCK = 2**20  # numbers that are read at a time


class BrokenModel(ValueError):
    """A model that is damaged, incomplete or not the one that was trained; the message names the folder and the remedy."""


def files_of(folder: Path) -> list[Path]:
    """The files directly in a folder that determine the model's replies, by name."""
    return sorted(filter(_is_model, folder.iterdir()))


def _is_model(file: Path) -> bool:
    return file.suffix in MODEL_SUFFIXES and file.name not in NOT_THE_MODEL


# --- loading -----------------------------------------------------------------------------------------------


def load(path: str, adapters: str | None = None, model_class=None, record: dict | None = None, **options):
    """The model of a folder or hub id, by `from_pretrained` with `options`; with `adapters`, a folder, PEFT's model of both.

    The files are checked while they are loaded, which reads them anyway: `check`, and of adapters `check_base`. `record` gets the
    `base_digests`. Raises BrokenModel for tensors that are missing, left over, of another shape, not finite or not those that
    were written, and what transformers, PEFT and safetensors raise.
    """
    from transformers import AutoModelForImageTextToText

    def check_files(folder: Path) -> None:
        check(folder)
        if adapters:
            check(Path(adapters))
            if (Path(adapters) / BASE).is_file():
                check_base(Path(adapters), path, base_digests(folder))
        if record is not None:
            record.update(base_digests(folder))

    if Path(path).is_dir():
        _check_index(Path(path))
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_files, Path(path)) if Path(path).is_dir() else None
        model, info = (model_class or AutoModelForImageTextToText).from_pretrained(
            path,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_refuse_incomplete` names them
            **options,
        )
        _refuse_incomplete(path, model, info)
    checked.result() if checked else check_files(_cached(path))
    return _with_adapters(model, adapters) if adapters else model


def _cached(hub_id: str) -> Path:
    from transformers.utils import cached_file

    return Path(cached_file(hub_id, "config.json")).parent


def _refuse_incomplete(path: str, model, info: dict) -> None:
    """Raise BrokenModel for tensors that transformers fills at random, and for layers that it leaves out."""
    wrong = {*info["missing_keys"], *(str(entry[0]) for entry in info["mismatched_keys"])}
    if wrong:
        raise BrokenModel(
            f"{path}: {len(wrong)} tensors of the model are missing or have another shape ({some(wrong)}). It is damaged, or not yet "
            "downloaded whole; download it again."
        )
    if info["error_msgs"]:
        raise BrokenModel(f"{path}: its weights do not fit the model: {' '.join(info['error_msgs'][0].split())[:200]}")
    known = set(map(_in_layer, model.state_dict())) - {""}
    if more := [name for name in info["unexpected_keys"] if _in_layer(name) in known or "lora_" in name]:
        raise BrokenModel(
            f"{path}: {len(more)} of its tensors have no place in the model that its config.json describes ({some(more)}). Download it "
            "again."
        )


def _in_layer(name: str) -> str:
    """A tensor's name from its layer's list on, without numbers; what stands before differs between a file and a model."""
    found = re.search(r"[a-z_]+\.\d+\..*", name)
    return re.sub(r"\d+", "0", found[0]) if found else ""


def _with_adapters(model, folder: str):
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(folder)
    config.inference_mode, config.base_model_name_or_path = True, model.name_or_path
    wrapped = get_peft_model(model, config)
    load_adapters(wrapped, folder)
    return wrapped.eval()


def load_adapters(model, folder: str, **options) -> None:
    """Load the adapters of a folder into PEFT's model. Raises BrokenModel if they are not just those that the model has."""
    try:
        found = model.load_adapter(folder, model.active_adapters[0], **options)
        wrong = [*found.missing_keys, *found.unexpected_keys]
    except KeyError as error:  # of a module that is trained in full
        wrong = [str(error.args[0])]
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        wrong = re.findall(r"size mismatch for (\S+):", str(error))
    if wrong:
        raise BrokenModel(
            f"{folder}: {len(wrong)} tensors of its adapters are missing, left over or of another shape ({some(wrong)}). Copy or train "
            "them again."
        )


# --- the weights -------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that loading this folder reads: adapters, one file, or the index's shards. They may be missing."""
    if (folder / ADAPTER).is_file():
        return [folder / ADAPTER_WEIGHTS]
    if not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS).is_file():
        raise BrokenModel(f"{folder}: has both {WEIGHTS} and {INDEX}. Remove the one that is left over.")
    return [folder / name for name in dict.fromkeys(_weight_map(folder).values())]


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the index."""
    try:
        table = json.loads((folder / INDEX).read_text())["weight_map"]
        if table and all(isinstance(name, str) and Path(name).name == name for name in table.values()):
            return table
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise BrokenModel(f"{folder / INDEX}: expected a weight_map with the names of files. Download the file again.")


def _check_index(folder: Path) -> None:
    """Raise BrokenModel for an index without the metadata that transformers asks for; a conversion needs none."""
    if weight_files(folder)[0].name in (WEIGHTS, ADAPTER_WEIGHTS):
        return
    if not isinstance(json.loads((folder / INDEX).read_text()).get("metadata"), dict):
        raise BrokenModel(
            f"{folder / INDEX}: lacks its metadata. Download the file again, or add an empty object of this name."
        )


def tensors(folder: Path) -> dict[str, dict]:
    """Of each stored tensor its `dtype`, `shape`, `file` and the `bytes` [start, end) within it, from the files' headers.

    Raises BrokenModel where a file is missing, cut off or contradicts the index, and for a tensor that is in two files.
    """
    files, found, twice = weight_files(folder), {}, []
    for file in files:
        header = _header(file)
        twice += header.keys() & found.keys()
        found |= header
    if twice:
        raise BrokenModel(
            f"{folder}: {len(twice)} tensors are in two files ({some(twice)}): one of them is not this model's. Download it again."
        )
    if files[0].name not in (WEIGHTS, ADAPTER_WEIGHTS):
        listed = _weight_map(folder)
        if lost := [name for name in listed if name not in found or found[name]["file"].name != listed[name]]:
            raise BrokenModel(
                f"{folder}: {len(lost)} tensors are not in the files that {INDEX} names ({some(lost)}). Download it again."
            )
    return found


def _header(file: Path) -> dict[str, dict]:
    try:
        with file.open("rb") as data:
            start = 8 + int.from_bytes(data.read(8), "little")
            if not 8 < start <= (size := file.stat().st_size):
                raise ValueError("it is cut off or no safetensors file")
            header = json.loads(data.read(start - 8))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            begin, end = map(operator.index, entry["data_offsets"])
            found[name] = {"dtype": entry["dtype"], "shape": tuple(entry["shape"]), "file": file}
            found[name]["bytes"] = (start + begin, start + end)
            if (kind := NOT_FINITE.get(entry["dtype"])) and math.prod(entry["shape"]) * int(kind[0][1]) != end - begin:
                raise ValueError(f"{name} has other bytes than its shape says")
        ranges = sorted(entry["bytes"] for entry in found.values())
        if [begin for begin, _ in ranges] + [size] != [start] + [end for _, end in ranges]:
            raise ValueError("it is cut off, or its tensors do not follow each other")
        return found
    except FileNotFoundError:
        raise BrokenModel(f"{file.parent}: {file.name} is missing. Download it again.") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BrokenModel(
            f"{file}: its weights cannot be read ({error}); damaged, or not yet downloaded whole. Download it again."
        ) from None


def not_finite(found: dict[str, dict]) -> list[str]:
    """Names of those of these tensors (see `tensors`) with a NaN or an infinite value. Reads them, 4 MiB at a time."""
    import numpy

    wrong = []
    for file in {entry["file"]: None for entry in found.values()}:
        with file.open("rb") as data:
            for name, entry in found.items():
                if entry["file"] == file and entry["dtype"] in NOT_FINITE:
                    kind, all_but_sign, infinite = NOT_FINITE[entry["dtype"]]
                    begin, end = entry["bytes"]
                    data.seek(begin)
                    left = (end - begin) // numpy.dtype(kind).itemsize
                    while left:
                        values = numpy.fromfile(data, f"<{kind}", min(left, BLOCK))
                        left -= len(values) or left
                        if (values & values.dtype.type(all_but_sign)).max(initial=0) >= infinite:
                            wrong.append(name)
                            break
    return wrong


def some(names) -> str:
    """The first three names."""
    names = sorted(names)
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


# --- what was written ----------------------------------------------------------------------------------------


def check(folder: Path, content: bool = True) -> None:
    """Raise BrokenModel if the weights are not whole and finite, or the model's files not those of the manifest, if there is one.

    Without `content` only headers and sizes are read.
    """
    _check_index(folder)
    found = tensors(folder)
    integers = [n for n, t in found.items() if n.endswith((".weight", ".bias")) and t["dtype"] not in NOT_FINITE]
    if integers and not _is_quantised(folder):
        raise BrokenModel(
            f"{folder}: {len(integers)} of its weights are no floating-point numbers ({some(integers)}), and its config.json names no "
            "quantization. Download it again."
        )
    if _has_manifest(folder) and (why := changed(folder, content, _is_model)):
        raise BrokenModel(f"{folder}: {why}. Copy or train it again; if the change is meant, remove its {MANIFEST}.")
    if content and (wrong := not_finite(found)):
        raise BrokenModel(
            f"{folder}: {len(wrong)} of {len(found)} tensors hold values that are not finite ({some(wrong)}). Download or train it again."
        )


def _is_quantised(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and bool(re.search(r'"(quantization|compression)_config"', config.read_text()))


def _has_manifest(folder: Path) -> bool:
    """Whether the folder has a manifest, be it damaged; other programs' files of this name list no bytes."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(listed, dict) and any(isinstance(entry, dict) and "bytes" in entry for entry in listed.values())


def check_base(adapters: Path, base: str, now: dict[str, str]) -> None:
    """Raise BrokenModel if adapters were not trained on `base`, whose `base_digests` are `now`. Without a record they may be."""
    try:
        recorded = dict(json.loads((adapters / BASE).read_text()))
    except FileNotFoundError:  # of an earlier version, or of another program
        return
    except (OSError, ValueError, TypeError, RecursionError):
        raise BrokenModel(f"{adapters / BASE}: cannot be read. Copy the adapters again.") from None
    if differ := [name for name in recorded | now if recorded.get(name) != now.get(name)]:
        raise BrokenModel(
            f"{adapters}: holds adapters for another base model than {base} is now ({some(differ)} changed). Give the base that they "
            f"were trained on, or train again; if the change is meant, remove {BASE}."
        )


def base_digests(folder: Path) -> dict[str, str]:
    """The sha256 of a base model's configuration (`_content`) and weights, by the files' names."""
    files = weight_files(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = dict(zip((file.name for file in files), pool.map(sha256, files), strict=True))
    return {"config.json": _content(folder / "config.json"), **hashes}


def sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _content(file: Path) -> str:
    """The sha256 of what a configuration file says, without `SAVED_AGAIN`; "" if it cannot be read."""
    try:
        said = json.loads(
            file.read_text(), object_hook=lambda part: {k: v for k, v in part.items() if k not in SAVED_AGAIN}
        )
    except (OSError, ValueError, RecursionError):
        return ""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _says_the_same(file: Path, entry: dict) -> bool:
    return bool(entry.get("content")) and _content(file) == entry["content"]


def changed(folder: Path, content: bool = True, chosen: Callable[[Path], bool] = lambda _: True) -> str:
    """What of the `chosen` files is not as the folder's manifest says; "" if nothing. Without `content` sizes alone are compared."""
    try:
        listed = {folder / name: dict(entry) for name, entry in json.loads((folder / MANIFEST).read_text()).items()}
        unlisted = [file.name for file in weight_files(folder) if file.is_file() and file not in listed]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} cannot be read"
    if unlisted:
        return f"{unlisted[0]} was not written with the other files"
    listed = {file: entry for file, entry in listed.items() if chosen(file)}
    for file, entry in listed.items():
        if not file.is_file():
            return f"{file.relative_to(folder)} is missing"
        if (size := file.stat().st_size) != entry.get("bytes") and not _says_the_same(file, entry):
            return f"{file.relative_to(folder)} was truncated or changed: {size} bytes, not {entry.get('bytes')}"
    # Manifests of earlier versions have digests of pickles only.
    hashed = [file for file, entry in listed.items() if content and ("sha256" in entry or file.suffix in PICKLES)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file, digest in zip(hashed, pool.map(sha256, hashed), strict=True):
            if digest != listed[file].get("sha256") and not _says_the_same(file, listed[file]):
                return f"{file.relative_to(folder)} was changed since it was written"
    return ""


def write_manifest(folder: Path, files: list[Path]) -> None:
    """Write the manifest of these files, which are complete, once they are on the disk.

    Of a configuration it also has the digest of its `_content`, with which it may be saved again.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(lambda file: sync(file) or sha256(file), files))
    entries = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, hashes, strict=True)
    }
    for file in files:
        if file.name.endswith("config.json"):
            entries[str(file.relative_to(folder))]["content"] = _content(file)
    write_json(folder / MANIFEST, entries)
    for place in {folder, *(file.parent for file in files)}:
        sync(place)


def write_json(path: Path, content) -> None:
    """`records.write_text` of JSON as these files have it. Raises InputError, and writes nothing, for NaN and infinity."""
    records.write_text(path, records.dumps(content, path, indent=1, default=str) + "\n")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a file system that cannot
            raise
    finally:
        os.close(handle)
