"""Open every image of a dataset once, and say what is broken and what would be done with it."""

import hashlib
import io
import statistics
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from mpa.datasets.protocol import Sample
from mpa.distributed import signals_held
from mpa.image_files import ImageError, open_image, read_file

EXAMPLES = 10  # broken images named


@dataclass
class Found:
    """What `check` saw of `samples` questions; sizes are (width, height) in pixels."""

    samples: int
    images: int
    sizes: list[tuple[int, int]] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)  # image -> why
    lost: int = 0  # samples whose image is broken
    equal: list[list[str]] = field(default_factory=list)  # groups of images with the same bytes

    def lines(self) -> list[str]:
        lines = [f"  {self.samples:,} questions about {self.images:,} images"]
        if self.sizes:
            wide, high = (sorted(edge) for edge in zip(*self.sizes, strict=True))
            middle = len(wide) // 2
            lines.append(
                f"  width {wide[0]} to {wide[-1]} (median {wide[middle]}), height {high[0]} to {high[-1]} "
                f"(median {high[middle]}) pixels"
            )
            tokens = self.visual_tokens
            lines.append(
                f"  visual tokens of Qwen2-VL {min(tokens)} to {max(tokens)} an image, {statistics.fmean(tokens):.0f} "
                f"on average, {sum(tokens):,} in all"
            )
        if self.equal:
            spare = sum(map(len, self.equal)) - len(self.equal)
            lines.append(
                f"  {spare} images are copies of others, byte for byte, such as {' = '.join(self.equal[0][:3])}"
            )
        if self.broken:
            lines.append(
                f"  {len(self.broken)} images cannot be used. PA and PL would leave out their {self.lost} samples, "
                "evaluate would count them as wrong:"
            )
            causes = Counter(self.broken.values())
            lines += [f"    {n} × {why}" for why, n in causes.most_common(EXAMPLES)]
            lines += [f"    {path}: {why}" for path, why in list(self.broken.items())[:EXAMPLES]]
            if len(self.broken) > EXAMPLES:
                lines.append(f"    … and {len(self.broken) - EXAMPLES} more")
        return lines


def look(path: str) -> tuple[tuple[int, int], str, str | None]:
    """((width, height), digest of the bytes, None or why the image cannot be used)."""
    try:
        content = read_file(path)
        size = open_image(io.BytesIO(content)).size
    except ImageError as error:
        return (0, 0), "", str(error)
    return size, hashlib.blake2b(content, digest_size=16).hexdigest(), None


def check(samples: list[Sample], workers: int, min_pixels: int, max_pixels: int) -> Found:
    """Look at every image once, in `workers` processes. The limits are of the area that it is resized to."""
    paths = list(dict.fromkeys(sample.image_path for sample in samples))
    found, by_content = Found(len(samples), len(paths)), {}
    with ProcessPoolExecutor(workers) as pool:
        with signals_held():  # the workers start here
            seen = pool.map(look, paths, chunksize=max(1, min(32, len(paths) // (4 * workers))))
        seen = list(tqdm(seen, total=len(paths), desc="opening images", unit="image", disable=None))
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # brings torch; after the fork

    for path, (size, digest, why) in zip(paths, seen, strict=True):
        if why is None:
            try:
                high, wide = smart_resize(size[1], size[0], 28, min_pixels, max_pixels)
            except ValueError as error:  # a shape that the processor refuses
                why = f"the processor refuses it ({error})"
        if why is not None:
            found.broken[path] = why
            continue
        found.sizes.append(size)
        found.visual_tokens.append(high * wide // 28**2)
        by_content.setdefault(digest, []).append(path)
    found.equal = [group for group in by_content.values() if len(group) > 1]
    found.lost = sum(sample.image_path in found.broken for sample in samples)
    return found
