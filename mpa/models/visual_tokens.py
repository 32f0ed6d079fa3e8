"""How many tokens a model makes of images, from their sizes alone."""

import contextlib
from collections.abc import Callable, Iterable
from types import SimpleNamespace

from mpa.files.image_files import image_size
from mpa.models import families, loading


class Counter:
    """`counter(width, height)` -> the image tokens of the model at `path`; None: of a Qwen2-VL. `whose` names it.

    Loads the model's processor. `counter` raises ValueError for a shape that the processor refuses.
    """

    def __init__(
        self,
        path: str | None,
        min_pixels: int,
        max_pixels: int,
        max_tiles: int | None = None,
        trust_remote_code: bool = False,
    ):
        if path is None:
            from transformers import Qwen2VLImageProcessor

            self.processor, self.whose = SimpleNamespace(image_processor=Qwen2VLImageProcessor()), "Qwen2-VL, some"
            families.apply_limits(self.processor, "qwen2_vl", min_pixels, max_pixels)
        else:
            self.processor = loading.load_processor(path, min_pixels, max_pixels, trust_remote_code, max_tiles)
            kind = loading.model_type(path)
            self.whose = families.FAMILIES[kind].name if kind in families.FAMILIES else str(kind)

    def __call__(self, width: int, height: int) -> int | None:
        return families.visual_tokens(self.processor, width, height)


def total(paths: Iterable[str], count: Callable[[int, int], int | None]) -> int:
    """The tokens of all images, from their headers; one that cannot be read, or that is refused, counts for none."""
    known: dict[str, int] = {}
    for path in paths:
        if path not in known:
            known[path] = 0
            with contextlib.suppress(ValueError, ZeroDivisionError):
                known[path] = count(*image_size(path)) or 0
    return sum(known[path] for path in paths)
