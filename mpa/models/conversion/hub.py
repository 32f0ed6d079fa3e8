"""Files of a checkpoint on the Hugging Face hub, or in its cache."""

from functools import cache
from pathlib import Path

from mpa.files.records import InputError
from mpa.models.loading_errors import explain

# What a conversion reads; never code, never pickles.
PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "merges.txt"]


@cache  # stages ask for a model's type several times
def config_file(hub_id: str) -> Path:
    """The config.json of a hub id. Raises InputError, which says why it cannot be had."""
    from huggingface_hub import hf_hub_download

    return Path(_fetched(hf_hub_download, hub_id, "config.json"))


def download(hub_id: str) -> Path:
    """The folder of a checkpoint, with the files that a conversion reads. Raises InputError if it cannot be had."""
    from huggingface_hub import snapshot_download

    return Path(_fetched(snapshot_download, hub_id, allow_patterns=PATTERNS))


def _fetched(fetch, hub_id: str, *args, **options) -> str:
    from huggingface_hub.errors import HFValidationError

    try:
        return fetch(hub_id, *args, **options)
    except (OSError, HFValidationError) as error:  # the hub's own errors are OSErrors, too
        raise InputError(explain(hub_id, error)) from None
