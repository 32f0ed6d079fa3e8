"""Original checkpoints of InternVL2, InternVL2.5 and TinyLLaVA → checkpoints of transformers' own classes.

The originals need code that comes with them and that transformers 5 breaks. They are converted from their config.json,
safetensors and tokenizer files alone; no code of a checkpoint runs. The result is an ordinary model folder.

    convert(source, out)   write the native checkpoint of an original
    converted(path)        the folder to load for any model: an original's conversion, made once and kept, or `path` itself
"""

import contextlib
import functools
import glob
import json
import os
import shutil
from pathlib import Path

from mpa.files.printable import as_size
from mpa.files.records import InputError, locked
from mpa.models import model_files
from mpa.models.conversion import hub, internvl, tinyllava, tokenizer, writing
from mpa.models.conversion.checkpoint import Checkpoint, read_config, weight_files
from mpa.models.conversion.layout import Layout
from mpa.models.identity import identity

# By the `model_type` in config.json: that of the conversion, and what reads the layout.
LAYOUTS = {
    "internvl_chat": ("internvl", internvl.layout),
    "tiny_llava_stablelm": ("llava", tinyllava.bench_layout),
    "tinyllava": ("llava", tinyllava.factory_layout),
}
# Of a conversion: its source. A conversion of another version of this package is made anew.
RECORD = "conversion.json"
VERSION = 1


def original_type(path: str | Path) -> str | None:
    """The `model_type` of an original that can be converted; None for any other folder or hub id.

    Raises InputError for a hub id that cannot be reached, and says why.
    """
    folder = Path(path) if Path(path).is_dir() else hub.config_file(str(path)).parent
    if not (folder / "config.json").is_file():
        return None
    kind = read_config(folder).get("model_type")
    return kind if isinstance(kind, str) and kind in LAYOUTS else None


def convert(
    source: str | Path, out: str | Path, image_token_id: int | None = None, vision_tower: str | None = None
) -> Path:
    """Write the native checkpoint of an original, a folder or a hub id, to the new folder `out`.

    A checkpoint without tokenizer files gives weights and configuration only, and needs `image_token_id`. `out`
    appears only when it is whole. Raises InputError for what cannot be converted, and if another process converts into
    `out`; nothing is then written.
    """
    with _alone(Path(out), wait=False):
        return _convert(source, Path(out), image_token_id, vision_tower)


@contextlib.contextmanager
def _alone(out: Path, wait: bool):
    """Let one process at a time convert into `out`, and remove what a killed one has left."""
    with locked(out, wait):
        for remains in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
            shutil.rmtree(remains, ignore_errors=True)
        yield


def _convert(source, out: Path, image_token_id=None, vision_tower=None, replace: bool = False) -> Path:
    if out.exists() and not replace:
        raise InputError(f"{out}: already exists. Name a new folder with --out, or remove it.")
    folder = Path(source) if Path(source).is_dir() else hub.download(str(source))
    kind = original_type(folder)
    if kind is None:
        raise InputError(
            f"{source}: model_type {read_config(folder).get('model_type')!r} is not one that is converted: {', '.join(LAYOUTS)}."
        )
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    layout = _layout(kind, folder, image_token_id, vision_tower)
    for note in layout.notes:
        print(f"{source}: {note}")
    try:
        _write(layout, folder, partial)
        (partial / RECORD).write_text(json.dumps({"source": str(source), "version": VERSION}, indent=2) + "\n")
        model_files.write_manifest(partial, model_files.files_of(partial))
        if replace:
            shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
        model_files.sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _layout(kind: str, folder: Path, image_token_id: int | None, vision_tower: str | None) -> Layout:
    checkpoint = Checkpoint(folder)
    try:
        return LAYOUTS[kind][1](checkpoint, image_token_id, vision_tower)
    except KeyError as error:
        raise InputError(f"{folder / 'config.json'}: the field {error} is missing.") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{folder / 'config.json'}: a field has no usable value ({error}).") from None


def _write(layout: Layout, folder: Path, out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    words = tokenizer.load(folder) if tokenizer.has_tokenizer(folder) else None
    image_token_id, end_id = layout.image_token_id, layout.end_token_id
    if words:
        words = _with_tokens(words, layout, folder)
        end_id = words.eos_token_id
        image_token_id = words.convert_tokens_to_ids(layout.image_token)
    elif image_token_id is None:
        raise InputError(
            f"{folder}: has no tokenizer files. Give the id of {layout.image_token} with --image-token-id."
        )
    fields = dict(layout.config)
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields, image_token_id=image_token_id)
        config.text_config.eos_token_id = config.eos_token_id = end_id
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # transformers' own checks, of many kinds
        raise InputError(f"{folder / 'config.json'}: no model can be made of it: {str(error).strip()[:300]}") from None
    out.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.dtype = writing.write_weights(layout.sources, model, out)
    config.save_pretrained(out)
    pad = words.pad_token_id if words else None
    GenerationConfig(eos_token_id=end_id, pad_token_id=end_id if pad is None else pad).save_pretrained(out)
    if words:
        layout.processor(words, layout.chat_template(words.eos_token)).save_pretrained(out)


def _with_tokens(words, layout: Layout, folder: Path):
    """The tokenizer with the tokens that the processor asks it for, all of them within the embedding."""
    from transformers import PreTrainedTokenizerFast

    size, named = layout.config["text_config"]["vocab_size"], dict(layout.named_tokens)
    end = layout.end_of_turn or words.eos_token
    if not end or words.get_vocab().get(end, size) >= size:
        raise InputError(f"{folder}: its tokenizer has no end token {end or ''} within the vocabulary of {size}.")
    if layout.image_token not in words.get_vocab() and not named and len(words) < size:
        words.add_special_tokens({"extra_special_tokens": [layout.image_token]}, replace_extra_special_tokens=False)
    wanted = {layout.image_token, *named.values()}
    if missing := sorted(token for token in wanted if token not in words.get_vocab()):
        raise InputError(f"{folder}: its tokenizer lacks {', '.join(missing)}, and no id below {size} is free.")
    if layout.video_token:
        named["video_token"] = _video_token(words, layout, size)
    special = {name: token for name in ("bos_token", "unk_token") if (token := getattr(words, name))}
    words = PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        **special,
        eos_token=end,
        pad_token=words.pad_token or end,
        extra_special_tokens=named or [layout.image_token],
        clean_up_tokenization_spaces=False,
    )
    if outside := [token for token, number in words.get_vocab().items() if number >= size]:
        raise InputError(
            f"{folder}: {', '.join(outside[:4])} of its tokenizer lie outside the embedding of {size} rows."
        )
    return words


def _video_token(words, layout: Layout, size: int) -> str:
    """A token for the video that the processor asks for and no prompt here has: a new one where an id is free."""
    if layout.video_token in words.get_vocab() or len(words) < size:
        return layout.video_token
    used = {layout.end_of_turn, *layout.named_tokens.values(), words.bos_token, words.pad_token, words.unk_token}
    template = layout.chat_template(words.eos_token)
    free = [str(token) for _, token in sorted(words.added_tokens_decoder.items(), reverse=True)]
    return next(token for token in free if token not in used and token not in template)


def cache_folder() -> Path:
    """Where conversions are kept: $MPA_CACHE, by default `mpa` beside the Hugging Face cache."""
    if given := os.environ.get("MPA_CACHE"):
        return Path(given).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).expanduser().parent / "mpa"


def check_original(folder: Path) -> None:
    """Raise InputError if an original's folder lacks files, from their names alone."""
    weight_files(folder)
    if not tokenizer.has_tokenizer(folder):
        raise InputError(f"{folder}: no tokenizer in it ({', '.join(tokenizer.FILES)} or *.tiktoken).")


def converted_from(path: str | Path) -> str | None:
    """The original that a folder is the conversion of; None for any other model."""
    record = Path(path) / RECORD
    return json.loads(record.read_text())["source"] if record.is_file() else None


@functools.cache
def converted(path: str) -> str:
    """The folder to load for a model. An original is converted into the cache, once, which is said in one line.

    Several processes may ask at once: one converts, the others wait.
    """
    if original_type(path) is None:
        return path
    folder = Path(path) if Path(path).is_dir() else hub.download(path)
    name = Path(path).name if Path(path).is_dir() else path.replace("/", "--")
    digest = identity(str(folder)).rpartition("@")[2]
    out = cache_folder() / f"{name}-{digest}-v{VERSION}"
    with _alone(out, wait=True):
        if not all(
            (out / name).is_file() for name in (RECORD, model_files.MANIFEST)
        ):  # new, of an earlier version, or torn
            _convert(path, out, replace=True)
            size = sum(file.stat().st_size for file in out.iterdir())
            print(f"Converted {path} into {out} ({as_size(size)}), once; $MPA_CACHE is where conversions are kept.")
    return str(out)
