"""What a server's response means to the `openai` engine: the kinds of failure, and the content of a reply.

Nothing is believed for having the right shape: counts of tokens are checked by `costs.py`, log-probabilities and the reason
why a reply ended here. All text passes `redact` (see `endpoint.py`) first.
"""

import json
import math
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime

from mpa.answers.finish_reasons import canonical
from mpa.answers.replies import has_reasoning

MAX_RETRY_AFTER = 3600.0  # seconds
# Where servers put what a model has thought.
THOUGHTS = ("reasoning", "reasoning_content", "reasoning_details", "thinking", "thinking_blocks", "thought", "thoughts")
MOST_TOKENS = 10**8  # of a reply; more is no count
MOST_BYTES_PER_TOKEN = 64  # of a reply, whose tokens may be long rows of one character
LEAST_LOGPROB = -1e5  # of one token; OpenAI gives -9999 for those that are very unlikely


class Retryable(Exception):
    """A temporary failure. `retry_after`: seconds that the server asks for, or None. `rate_limit`: too many requests.
    `billed`: the request was sent and may have to be paid. `usage`: its tokens (in, out), where they are known."""

    def __init__(self, what: str, retry_after: float | None = None, rate_limit: bool = False, billed=False, usage=None):
        super().__init__(what)
        self.retry_after, self.rate_limit, self.billed, self.usage = retry_after, rate_limit, billed, usage


class Refused(Exception):
    """The server refuses this one request; `permanent` where it would refuse it again. `usage` and `billed` as above.
    `doubtful`: it may be the account or the address that is refused, which several of them in a row show."""

    def __init__(self, what: str, permanent: bool = True, usage=None, billed: bool = False, doubtful: bool = False):
        super().__init__(what)
        self.permanent, self.usage, self.billed, self.doubtful = permanent, usage, billed, doubtful


class Unsupported(Exception):
    """The model does not take the parameter `name`; with `only_value`, not this value of it."""

    def __init__(self, what: str, name: str, only_value: bool):
        super().__init__(what)
        self.name, self.only_value = name, only_value


def retry_after(headers) -> float | None:
    """Seconds that the server asks to wait, above 0 and at most an hour; None where it names no such time."""
    try:
        seconds = float(headers["retry-after-ms"]) / 1000
    except (KeyError, ValueError):
        seconds = _seconds(headers.get("retry-after"))
    return min(seconds, MAX_RETRY_AFTER) if math.isfinite(seconds) and seconds > 0 else None


def _seconds(value: str | None) -> float:
    """A number of seconds, or those until a date; 0 for neither."""
    try:
        return float(value)
    except (TypeError, ValueError):
        try:
            return parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0


def decoded(body: str, redact: Callable):
    """The JSON document in `body`. Raises ValueError where it is none."""
    try:
        return redact(json.loads(body))
    except (ValueError, RecursionError):
        raise ValueError(f"no JSON, but {redact(body)[:80]!r}") from None


def read_reply(body: str, limit: int, redact: Callable) -> dict:
    """{"text", "logprob", "finish_reason", "usage": (in, out) or None, "thinks"} of a chat completion.

    `limit` is the most tokens that were asked for. Raises Refused where the model declines, Retryable where there is no reply.
    """
    try:
        document = decoded(body, redact)
    except ValueError as error:
        raise Retryable(str(error), billed=True) from None
    choices = document.get("choices") if isinstance(document, dict) else None
    usage = _usage(document.get("usage")) if isinstance(document, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Retryable(f"no reply, but {str(document)[:80]!r}", billed=True, usage=usage)
    text, reason = _text(message.get("content")), canonical(choice.get("finish_reason"))
    if text and usage and usage[1] * MOST_BYTES_PER_TOKEN < len(text.encode()):
        usage = None  # it cannot be
    if choice.get("finish_reason") is None and usage and usage[1] >= limit:
        reason = "length"
    thinks = _thinks(message, document.get("usage"), text or "")
    if reason == "error":
        raise Retryable(f"the server broke the reply off ({choice['finish_reason']})", billed=True, usage=usage)
    if not text:
        if isinstance(message.get("refusal"), str) and message["refusal"]:
            raise Refused(f"the model declines: {_clean(message['refusal'])[:200]}", usage=usage, billed=True)
        if reason == "content_filter":
            raise Refused("stopped by the content filter", usage=usage, billed=True)
        if reason == "tool_calls":
            raise Refused("the model calls a tool instead of answering", usage=usage, billed=True)
        if text is None and reason != "length" and not thinks:
            raise Retryable(f"no text in the reply ({reason})", billed=True, usage=usage)
    logprob = _logprob(choice.get("logprobs"))
    return {"text": text or "", "logprob": logprob, "finish_reason": reason, "usage": usage, "thinks": thinks}


def _text(content) -> str | None:
    if isinstance(content, list):
        parts = [
            p.get("text") for p in content if isinstance(p, dict) and p.get("type", "text") in ("text", "output_text")
        ]
        content = "".join(part for part in parts if isinstance(part, str)) if parts else None
    return _clean(content) if isinstance(content, str) else None


def _clean(text: str) -> str:
    """Halves of surrogate pairs, which cannot be written to a file, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _thinks(message: dict, usage, text: str) -> bool:
    """Did the model write thoughts, apart from its reply or in it?"""
    content = message.get("content")
    parts = [p for p in content if isinstance(p, dict)] if isinstance(content, list) else []
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("completion_tokens_details")
    counts = [place.get("reasoning_tokens") for place in (usage, details) if isinstance(place, dict)]
    return (
        any(
            said.strip() if isinstance(said := message.get(n), str) else isinstance(said, list | dict) and said
            for n in THOUGHTS
        )
        or any(p.get("type") in THOUGHTS for p in parts)
        or any(_is_number(n) and n > 0 for n in counts)
        or has_reasoning(text)
    )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _usage(found) -> tuple[int, int] | None:
    if not isinstance(found, dict):
        return None
    counts = [found.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST_TOKENS for n in counts):
        return None
    return counts[0], counts[1]


def _logprob(found) -> float | None:
    """The sum over the tokens; None where one of them is no logarithm of a probability."""
    tokens = found.get("content") if isinstance(found, dict) else None
    if not isinstance(tokens, list) or not tokens:
        return None
    values = [token.get("logprob") if isinstance(token, dict) else None for token in tokens]
    good = all(_is_number(v) and LEAST_LOGPROB <= v <= 1e-3 for v in values)  # above 0 by rounding alone
    return round(min(sum(values), 0.0), 4) if good else None
