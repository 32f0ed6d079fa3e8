"""Files of a checkpoint on the Hugging Face hub."""

from pathlib import Path

from mpa.records import InputError

# What a conversion reads; never code, never pickles.
PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "merges.txt"]


def config_file(hub_id: str) -> Path | None:
    """The downloaded config.json of a hub id, or None if it cannot be had; loading the model then says why."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def download(hub_id: str) -> Path:
    """The folder of a checkpoint from the hub, or from its cache. Raises InputError if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{hub_id}: cannot be downloaded: {str(error).strip().splitlines()[0]}") from None
