"""What the `openai` engine sends: the image as a data URL, the messages, and the parameters that the model takes."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

from mpa.engines import Request
from mpa.engines.responses import RENAMED
from mpa.image_files import open_image


class EncodedImage(NamedTuple):
    url: str
    pixels: int


def encode_image(path: str, max_pixels: int) -> EncodedImage:
    """The image as a data URL, lossless, made smaller where it has more than `max_pixels`. Raises ImageError."""
    image = open_image(path)
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale < 1:
        size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, "PNG")
    url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    return EncodedImage(url, image.width * image.height)


class Parameters:
    """A request's parameters, without those that the model has refused."""

    def __init__(self, model: str, image_detail: str, note: Callable[[str], None]):
        self.model, self.image_detail, self.note = model, image_detail, note
        self.dropped: dict[str, str] = {}  # refused parameters: the names that replace them, or ""

    def chat_completion(self, request: Request, image_url: str) -> tuple[dict, dict]:
        """(arguments of `chat.completions.create`, the parameters among them, for `classify_error`)."""
        options = self._options(request)
        image = {"url": image_url} | ({"detail": options.pop("detail")} if "detail" in options else {})
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": request.prompt}]
        messages = [{"role": "user", "content": json.loads(json.dumps(content).encode("utf-8", "replace"))}]
        sent = {**options, "image_url": {name: "" for name in image}}
        return {"model": self.model, "messages": messages, **options}, sent

    def _options(self, request: Request) -> dict:
        options = {
            "temperature": request.temperature,
            "max_completion_tokens": request.max_new_tokens,
            "logprobs": True,
        }
        if request.temperature:
            seed = hashlib.sha256(f"{request.seed}:{request.key}".encode("utf-8", "surrogatepass")).digest()
            options |= {"top_p": request.top_p, "seed": int.from_bytes(seed[:4]) // 2}
        if self.image_detail != "auto":
            options["detail"] = self.image_detail
        for name, replacement in self.dropped.items():
            value = options.pop(name, None)
            if replacement and value is not None:
                options[replacement] = value
        return options

    def drop(self, name: str) -> None:
        """From now on send a parameter under its other name, or not at all."""
        if name in self.dropped:  # another request was first
            return
        replacement = RENAMED.get(name, "")
        self.dropped[name] = "" if replacement in self.dropped else replacement
        what = f"is sent as {self.dropped[name]}" if self.dropped[name] else "is not sent"
        sampling = name in ("temperature", "top_p", "seed")
        effect = " Replies are sampled with the server's default." if sampling else ""
        self.note(f"{self.model} does not take {name}: it {what}.{effect}")
