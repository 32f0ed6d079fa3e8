"""What the `openai` engine sends: the image as a data URL, the messages, and the parameters that the model takes."""

import base64
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

from mpa.engines import Request
from mpa.engines.responses import Refused, Unsupported
from mpa.engines.server_errors import LIMITS
from mpa.files.image_files import open_image
from mpa.files.records import InputError


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
    """A request's parameters, without those that the model has refused, and with the user's own, `request_json`."""

    def __init__(self, model: str, image_detail: str, request_json: dict | None, note: Callable[[str], None]):
        self.model, self.image_detail, self.request_json, self.note = model, image_detail, request_json, note
        self.dropped: dict[str, str] = {}  # refused by the model: the names that replace them, or ""
        self.dropped_values: Counter[str] = Counter()  # refused for one request: "temperature=1.0"
        self.accepted: set[str] = set()  # those that a reply has come with

    def chat_completion(self, request: Request, image_url: str, left_out: set[str]) -> tuple[dict, dict]:
        """(arguments of `chat.completions.create`, the parameters among them), without those that this request leaves out."""
        options = sent = {name: value for name, value in self._options(request).items() if name not in left_out}
        image = {"url": image_url}
        if "detail" in options:
            options, image = {n: v for n, v in options.items() if n != "detail"}, image | {"detail": options["detail"]}
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": request.prompt}]
        messages = [{"role": "user", "content": json.loads(json.dumps(content).encode("utf-8", "replace"))}]
        own = {"extra_body": self.request_json} if self.request_json else {}
        return {"model": self.model, "messages": messages, **options, **own}, sent

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

    def drop(self, failure: Unsupported, sent: dict, left_out: set[str]) -> None:
        """Leave a parameter out, or send it under its other name: in this request only where its value is refused, or where
        others have been accepted with it; else from now on. Raises Refused and InputError rather than lose the token limit."""
        name = failure.name
        if failure.only_value or name in self.accepted:
            if name in LIMITS:
                raise Refused(str(failure))
            left_out.add(name)
            self.dropped_values[f"{name}={sent[name]}"] += 1
            self.note(f"{self.model} refuses {name}={sent[name]} of some requests: they are sent without. {failure}")
        elif name not in self.dropped:  # else another request was first
            replacement = LIMITS.get(name, "")
            if replacement in self.dropped:
                raise InputError(
                    f"{self.model} takes neither {replacement} nor {name}: {failure}. Replies need a limit."
                )
            self._rename(name, replacement, f"does not take {name}")

    def _rename(self, name: str, replacement: str, why: str) -> None:
        """From now on send a parameter under another name, or with "" not at all."""
        self.dropped[name] = replacement
        what = f"is sent as {replacement}" if replacement else "is not sent"
        sampling = name in ("temperature", "top_p", "seed")
        effect = " Replies are sampled with the server's default." if sampling else ""
        self.note(f"{self.model} {why}: it {what}.{effect}")

    def replied(self, sent: dict, tokens: int | None) -> None:
        """Take note of a reply with so many tokens. A server that does not know the newer name of the token limit passes over it:
        then it is sent under the older one."""
        self.accepted |= sent.keys()
        name, limit = "max_completion_tokens", sent.get("max_completion_tokens")
        if limit and tokens and tokens > 1.1 * limit + 8 and name not in self.dropped:
            self._rename(name, LIMITS[name], f"has written {tokens} tokens and does not keep to {name} {limit}")
