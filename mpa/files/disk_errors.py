"""A disk that is full, or cannot be written for another reason that the user can correct, is an OSError with a file's name."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, and `ulimit -f`
OTHER = (
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
# torch.save's errors have no number: the size of what was written differs from what was to be written.
_TORCH = re.compile(
    r"PytorchStreamWriter failed|inline_container\.cc.*(unexpected pos|file write)|iostream error", re.DOTALL
)


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """An error of the disk within this block is an OSError that names `path`, where it names no file itself.

    safetensors raises a SafetensorError with the number in its text, torch a RuntimeError.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if number := _number(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _number(error: Exception) -> int | None:
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", text)):
        return int(found[1])
    return errno.ENOSPC if isinstance(error, RuntimeError) and _TORCH.search(text) else None


def cause(error: OSError) -> str:
    """In words, what is wrong with the disk; "" for an error that is not the disk's."""
    if error.errno == errno.EFBIG:
        return "no space left: the file would be larger than this session may write (ulimit -f)"
    if error.errno in FULL:
        return f"no space left on the disk ({os.strerror(error.errno)})"
    return f"cannot be written ({error.strerror})" if error.errno in OTHER else ""
