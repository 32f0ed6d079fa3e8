"""What a server's response means to the `openai` engine: the class of a failure, or the reply.

A failure is classified by code and message, not by status alone: a 403 may be one flagged image or an account without
credit.
"""

import json
import math
import re
import time
from email.utils import parsedate_to_datetime

import openai

from mpa.records import InputError, without_secrets

MAX_RETRY_AFTER = 3600.0  # seconds
# No request of this account will succeed.
_ACCOUNT_FAILURE = re.compile(
    r"insufficient[_ ]quota|exceeded your current quota|billing|payment required|(?:insufficient|not enough|out of|no) "
    r"(?:credits?|funds|balance)|credit balance|spend(?:ing)? limit|hard[_ ]limit"
    r"|account.{0,30}(?:deactivated|disabled|suspended|terminated)"
    r"|access[_ ]terminated|invalid[_ ]api[_ ]key|incorrect api key|model[_ ]not[_ ]found"
    r"|does not exist or you do not have access",
    re.IGNORECASE,
)
# This one request is refused, and will be refused again.
_FLAGGED = re.compile(
    r"content[_ ](?:policy|filter|management)|moderation|safety|flagged|responsible ?ai|inappropriate|disallowed|"
    r"policy[_ ]violation|invalid[_ ]image|image[_ ](?:parse|content|too)|unsupported[_ ]image",
    re.IGNORECASE,
)
# Parameters that a model may not take, and those that have another name.
PARAMETERS = ("temperature", "top_p", "seed", "logprobs", "detail", "max_completion_tokens", "max_tokens")
RENAMED = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}


class Retryable(Exception):
    """A temporary failure. `retry_after`: seconds that the server asks for, or None. `rate_limit`: too many requests.
    `billed`: the request was sent and may have to be paid. `usage`: its tokens (in, out), where they are known."""

    def __init__(self, what: str, retry_after: float | None = None, rate_limit: bool = False, billed=False, usage=None):
        super().__init__(what)
        self.retry_after, self.rate_limit, self.billed, self.usage = retry_after, rate_limit, billed, usage


class Refused(Exception):
    """The server refuses this one request; `permanent` where it would refuse it again. `usage` as above."""

    billed = False  # where `usage` is not known

    def __init__(self, what: str, permanent: bool = True, usage: tuple[int, int] | None = None):
        super().__init__(what)
        self.permanent, self.usage = permanent, usage


class Unsupported(Exception):
    """The model does not take this parameter."""


def classify_error(error: openai.APIStatusError, options: dict, key: str) -> Exception:
    """Unsupported, InputError (ends the run), Refused or Retryable. `options` are the parameters that were sent."""
    body = error.body if isinstance(error.body, dict) else {}
    body = body["error"] if isinstance(body.get("error"), dict) else body
    message = str(body.get("message") or body.get("detail") or error)
    code = " ".join(str(body.get(name) or "") for name in ("code", "type"))
    says = f"{error.status_code}: {message}"
    says = without_secrets(says.replace(key, "…") if key else says)[:500]
    status, code_and_message = error.status_code, f"{code} {message}"
    if status in (400, 403, 422) and (name := _refused_parameter(str(body.get("param") or ""), message, options)):
        return Unsupported(name)
    if status == 402 or _ACCOUNT_FAILURE.search(code_and_message) or status in (401, 404):
        return InputError(says)
    if _FLAGGED.search(code_and_message) and status < 500:
        return Refused(says)
    if status == 403:
        return Refused(says, permanent=False)
    if status in (408, 409, 425, 429) or status >= 500:
        return Retryable(says, retry_after(error.response.headers), rate_limit=status == 429)
    return Refused(says)


def _refused_parameter(param: str, message: str, options: dict) -> str | None:
    """The parameter that the error names, of those that were sent."""
    for name in PARAMETERS:
        sent = name in options or (name == "detail" and "detail" in json.dumps(options.get("image_url", "")))
        if sent and (re.search(rf"\b{name}\b", param) or re.search(rf"(?<![\w-]){name}(?![\w-])", message)):
            return name
    return None


def retry_after(headers) -> float | None:
    """Seconds that the server asks to wait, above 0 and at most an hour; None where it names no such time."""
    value = headers.get("retry-after")
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return min(seconds, MAX_RETRY_AFTER) if math.isfinite(seconds) and seconds > 0 else None


def read_reply(body: str) -> dict:
    """{"text", "logprob", "finish_reason", "usage": (in, out) or None} of a chat completion.

    Raises Refused where the model declines, Retryable where the body holds no reply.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Retryable(f"no JSON, but {body[:80]!r}", billed=True) from None
    choices = document.get("choices") if isinstance(document, dict) else None
    usage = _usage(document.get("usage")) if isinstance(document, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Retryable(f"no reply, but {str(document)[:80]!r}", billed=True, usage=usage)
    text, reason = _text(message.get("content")), choice.get("finish_reason")
    reason = reason if isinstance(reason, str) else "stop"
    if not text:
        if isinstance(message.get("refusal"), str) and message["refusal"]:
            raise Refused(f"the model declines: {_clean(message['refusal'])[:200]}", usage=usage)
        if reason == "content_filter":
            raise Refused("stopped by the content filter", usage=usage)
        if text is None:
            raise Retryable(f"no text in the reply ({reason})", billed=True, usage=usage)
    return {"text": text, "logprob": _logprob(choice.get("logprobs")), "finish_reason": reason, "usage": usage}


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


def _usage(found) -> tuple[int, int] | None:
    if not isinstance(found, dict):
        return None
    counts = [found.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts) or not any(counts):
        return None
    return counts[0], counts[1]


def _logprob(found) -> float | None:
    tokens = found.get("content") if isinstance(found, dict) else None
    values = (
        [token.get("logprob") if isinstance(token, dict) else None for token in tokens or ()]
        if isinstance(tokens, list)
        else []
    )
    good = values and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    return round(sum(values), 4) if good else None
