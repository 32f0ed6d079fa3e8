"""The files of the batch interface: a line of JSON for each request that goes up, and for each result that comes down."""

import json
from collections.abc import Callable, Iterable
from typing import NamedTuple

from mpa.engines.responses import decoded

URL = "/v1/chat/completions"  # of each line, and of the batch
_ENDED_BEFORE = ("batch_expired", "batch_cancelled")


class Result(NamedTuple):
    """What came back for a request: an HTTP status and a body. `status` 0: an error without a response; `unserved`: since the
    batch ended before the request's turn."""

    status: int
    body: str
    unserved: bool = False


def input_line(custom_id: str, arguments: dict) -> bytes:
    """The line of a request. `arguments` are those of the client's `chat.completions.create`."""
    body = {name: value for name, value in arguments.items() if name != "extra_body"}
    body |= arguments.get("extra_body", {})
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": body}).encode() + b"\n"


def read_results(lines: Iterable[bytes], redact: Callable) -> tuple[dict[str, Result], int]:
    """({custom id: result}, the number of damaged lines), whatever the order. Of several results for one id, the served one."""
    found, damaged = {}, 0
    for line in lines:
        if not line.strip():
            continue
        try:
            entry = decoded(line.decode("utf-8", "replace"), redact)
            custom_id, result = entry["custom_id"], _result(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged += 1
            continue
        if custom_id not in found or (found[custom_id].status != 200 and result.status == 200):
            found[custom_id] = result
    return found, damaged


def _result(entry: dict) -> Result:
    response, error = entry.get("response"), entry.get("error")
    if response:
        return Result(int(response["status_code"]), json.dumps(response.get("body")))
    unserved = isinstance(error, dict) and error.get("code") in _ENDED_BEFORE
    return Result(0, json.dumps({"error": error}), unserved)
