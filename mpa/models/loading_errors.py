"""Why a model cannot be loaded, in one sentence that says what to do."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mpa.files.records import InputError
from mpa.models.model_files import BrokenModel

AGAIN = "It is damaged, or not yet downloaded whole; download it again."


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Raises InputError, in one sentence, for what loading this folder or hub id raises."""
    from safetensors import SafetensorError

    try:
        yield
    except BrokenModel as error:
        raise InputError(str(error)) from None
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # a package for quantised weights may lack
        raise InputError(explain(path, error)) from None


def explain(path: str, error: BaseException) -> str:
    """The sentence for an error that transformers, huggingface_hub or safetensors raised for this folder or hub id."""
    from huggingface_hub import errors, get_token

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and len(causes) < 20:
        causes.append(cause)

    def is_a(*kinds) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    text = " ".join(str(error).split())
    if is_a(errors.GatedRepoError):
        login = "the token lacks access" if get_token() else "no token is set"
        return (
            f"{path}: its files are only given to those who accepted its terms, and {login}. Accept them on "
            f"https://huggingface.co/{path} and run `hf auth login`, or set HF_TOKEN."
        )
    if is_a(errors.RepositoryNotFoundError):
        return f"{path}: no such model on the hub. Check the spelling; for a private model run `hf auth login` first."
    if is_a(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) and not Path(path).is_dir():
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
            return (
                f"{path}: not in the cache of the hub, and HF_HUB_OFFLINE is set. Download it where there is a network "
                f"(`hf download {path}`) into the same $HF_HOME, or give a folder."
            )
        return (
            f"{path}: not in the cache of the hub, which cannot be reached. Check the network (and HTTPS_PROXY or "
            "HF_ENDPOINT), or give a folder."
        )
    if is_a(errors.HFValidationError):
        return (
            f"{path}: no such folder, and no valid hub id. Give a folder, or an id such as Qwen/Qwen2-VL-2B-Instruct."
        )
    if any(type(cause).__name__ == "SafetensorError" for cause in causes):
        return f"{path}: its weights cannot be read ({text[:200]}). {AGAIN}"
    if "model.safetensors" in text or "no file named" in text:
        return f"{path}: no safetensors weights in it. {PICKLES}"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return (
            f"{path}: this version of transformers does not know its architecture. Only if you trust its authors: "
            "--trust-remote-code runs the code that comes with it."
        )
    return f"{path}: cannot be loaded: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"


PICKLES = (
    "Weights as pickles (.bin, .pt) can run code and are not read: load them with torch.load(…, weights_only=True), on a "
    "machine that you can lose, and write them with safetensors.torch.save_file as model.safetensors."
)
