"""Which requests share a batch of the `hf` engine."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from mpa.engines import Request
from mpa.files.image_files import image_size
from mpa.models.visual_tokens import total

WINDOW = 64  # batches within which requests are sorted by length
ROWS = 8  # of a batch, at most, where --batch-size is not given
# The same on a GPU, where the tokens that fit are measured. Of twice as many the images, as the processor makes them, would
# take 1.2 GB a batch (at 512 * 28 * 28 pixels, in float32), and a few batches are ready ahead of the model.
GPU_ROWS = 64


def rows_of(device: str) -> int:
    """The most rows of a batch on this device, where the user names no number."""
    return GPU_ROWS if device.startswith("cuda") else ROWS


class BatchPlan:
    """Groups requests of similar length, so that a batch holds little padding.

    A batch has at most `batch_size` rows and `batch_tokens` tokens, padding and replies included (None: no limit).
    `row_tokens` are counted besides for each row: as many tokens take the memory of what it needs whatever its length.
    `pixels` are the processor's limits (min, max). Where they are not obeyed, `visual_tokens` counts an image's tokens.
    """

    def __init__(self, batch_size: int, batch_tokens: int | None, pixels: tuple[int, int]):
        self.batch_size, self.batch_tokens, self.pixels = batch_size, batch_tokens, pixels
        self.row_tokens = 0
        self.visual_tokens: Callable[[int, int], int | None] | None = None  # by width and height

    def batches(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """All requests, in batches sorted by length within a window of WINDOW batches."""
        requests = iter(requests)
        while window := list(islice(requests, WINDOW * self.batch_size)):
            batch, lengths = [], [self.estimated_length(request) for request in window]
            for index in sorted(range(len(window)), key=lengths.__getitem__):
                request = window[index]
                # Sorted: this request is the longest so far, and the others are padded to its length.
                tokens = self.tokens(len(batch) + 1, lengths[index], request.max_new_tokens)
                if batch and (len(batch) == self.batch_size or tokens > (self.batch_tokens or math.inf)):
                    yield batch
                    batch = []
                batch.append(request)
            yield batch

    def estimated_length(self, request: Request) -> float:
        """Tokens of the prompt, estimated from the image's size and the number of characters."""
        if self.visual_tokens:
            return total([request.image_path], self.visual_tokens) + len(request.prompt) / 4
        least, most = self.pixels
        width, height = (0, 0) if least == most else image_size(request.image_path)
        return min(max(width * height, least), most) / 28**2 + len(request.prompt) / 4

    def tokens(self, rows: int, length: float, new_tokens: int) -> float:
        """What a batch of so many rows counts for, with prompts of this length and replies of at most `new_tokens`."""
        return rows * (length + new_tokens + self.row_tokens)

    def does_not_fit(self, tokens: float) -> None:
        """A batch that counts for so many `tokens` did not fit into memory: halve it from now on, where tokens are limited."""
        if self.batch_tokens:
            self.batch_tokens = min(self.batch_tokens, max(1, int(tokens / 2)))
