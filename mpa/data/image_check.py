"""Open every image of a dataset once, and report which are broken and what the stages would do with them."""

import hashlib
import io
import statistics
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from mpa.data.protocol import Sample
from mpa.files.image_files import ImageError, open_image, read_file
from mpa.files.signals import signals_held
from mpa.models.visual_tokens import Counter as TokenCounter

EXAMPLES = 10  # broken images listed by name


@dataclass
class Found:
    """The result of `check` for `samples` questions. Sizes are (width, height) in pixels."""

    samples: int
    images: int
    sizes: list[tuple[int, int]] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)
    whose: str = "Qwen2-VL"  # tokens these are
    broken: dict[str, str] = field(default_factory=dict)  # image -> reason
    lost: int = 0  # samples whose image is broken
    duplicates: list[list[str]] = field(default_factory=list)  # groups of images with the same bytes

    def lines(self) -> list[str]:
        lines = [f"  {self.samples:,} questions about {self.images:,} images"]
        if self.sizes:
            widths, heights = (sorted(edge) for edge in zip(*self.sizes, strict=True))
            middle = len(widths) // 2
            lines.append(
                f"  width {widths[0]} to {widths[-1]} (median {widths[middle]}), height {heights[0]} to {heights[-1]} "
                f"(median {heights[middle]}) pixels"
            )
            tokens = self.visual_tokens
            lines.append(
                f"  visual tokens of {self.whose} {min(tokens)} to {max(tokens)} per image, "
                f"mean {statistics.fmean(tokens):.0f}, total {sum(tokens):,}"
            )
        if self.duplicates:
            copies = sum(map(len, self.duplicates)) - len(self.duplicates)
            lines.append(f"  {copies} images are byte-identical copies, e.g. {' = '.join(self.duplicates[0][:3])}")
        if self.broken:
            lines.append(
                f"  {len(self.broken)} images cannot be used. PA and PL would leave out their {self.lost} samples; "
                "evaluate would count them as wrong:"
            )
            causes = Counter(self.broken.values())
            lines += [f"    {n} × {why}" for why, n in causes.most_common(EXAMPLES)]
            lines += [f"    {path}: {why}" for path, why in list(self.broken.items())[:EXAMPLES]]
            if len(self.broken) > EXAMPLES:
                lines.append(f"    … and {len(self.broken) - EXAMPLES} more")
        return lines


def inspect(path: str) -> tuple[tuple[int, int], str, str | None]:
    """((width, height), digest of the bytes, None or the reason why the image cannot be used)."""
    try:
        content = read_file(path)
        size = open_image(io.BytesIO(content)).size
    except ImageError as error:
        return (0, 0), "", str(error)
    return size, hashlib.blake2b(content, digest_size=16).hexdigest(), None


def check(
    samples: list[Sample],
    workers: int,
    min_pixels: int,
    max_pixels: int,
    max_tiles: int | None = None,
    model_path: str | None = None,
) -> Found:
    """Open every image once, in `workers` processes, and count the visual tokens of the model; None: of a Qwen2-VL.

    `min_pixels` and `max_pixels` limit the area after resizing, `max_tiles` the tiles; see `families.image_settings`.
    """
    paths = list(dict.fromkeys(sample.image_path for sample in samples))
    found, by_content = Found(len(samples), len(paths)), {}
    with ProcessPoolExecutor(workers) as pool:
        with signals_held():  # the workers start here
            inspected = pool.map(inspect, paths, chunksize=max(1, min(32, len(paths) // (4 * workers))))
        inspected = list(tqdm(inspected, total=len(paths), desc="opening images", unit="image", disable=None))
    count = TokenCounter(model_path, min_pixels, max_pixels, max_tiles)  # imports torch; after the fork
    found.whose = count.whose.removesuffix(", some")
    for path, (size, digest, why) in zip(paths, inspected, strict=True):
        if why is None:
            try:
                tokens = count(*size) or 0
            except ValueError as error:  # e.g. an extreme aspect ratio
                why = f"the processor refuses it ({error})"
        if why is not None:
            found.broken[path] = why
            continue
        found.sizes.append(size)
        found.visual_tokens.append(tokens)
        by_content.setdefault(digest, []).append(path)
    found.duplicates = [group for group in by_content.values() if len(group) > 1]
    found.lost = sum(sample.image_path in found.broken for sample in samples)
    return found
