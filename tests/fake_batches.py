"""A local server with OpenAI's files and batches, besides its chat completions, in their wire format. Faults are injected."""

import contextlib
import email
import json
import re
import socket
import threading
import time
from collections import Counter
from http.server import ThreadingHTTPServer

from fake_server import Handler

from mpa.engines.costs import BATCH_PRICE

ENDS = ("completed", "failed", "expired", "cancelled")


class BatchServer(ThreadingHTTPServer):
    """`rule(body, number)` -> (status, document) for each request, also of a batch.

    `takes` are the seconds of a batch. `fault(what, number)`, for what = "upload", "create", "look", "list", "content" or
    "delete", returns None, (status, error, headers), "lost" (the request has no effect and no answer), "cut" (an effect, no answer) or
    "short" (half of an upload, or of a content). `end(number)` is the status of a batch, or (failed) its error. `mangle(output, errors)`
    changes the lines of its files, `served` of all results is what the server has billed.
    """

    request_queue_size = 64
    daemon_threads = True

    def __init__(self, rule, takes: float = 0.0):
        super().__init__(("127.0.0.1", 0), BatchHandler)
        self.rule, self.takes, self.pause, self.lock = rule, takes, 0.0, threading.RLock()
        self.number, self.billed, self.bodies = 0, 0, []
        self.fault, self.end, self.mangle = (lambda *_: None), (lambda _: "completed"), (lambda *lines: lines)
        self.calls: Counter[str] = Counter()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.served: Counter[str] = Counter()  # custom ids
        self.tokens = [0, 0]  # of the replies in batches
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):  # a client that was killed, a connection that was cut on purpose
        pass

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def bill(self, price_in: float, price_out: float) -> float:
        """What the replies in batches cost, at prices of single requests for a million tokens."""
        return BATCH_PRICE * (self.tokens[0] * price_in + self.tokens[1] * price_out) / 1e6

    def lines(self) -> Counter[str]:
        """How often each custom id was submitted."""
        return Counter(line["custom_id"] for batch in self.batches.values() for line in batch["lines"])

    def store(self, content: bytes) -> str:
        self.calls["store"] += 1
        name = f"file-{self.calls['store']}"
        self.files[name] = content
        return name

    def create(self, wanted: dict) -> dict:
        number = len(self.batches)
        content = self.files[wanted["input_file_id"]]
        batch = {
            **{
                "id": f"batch_{number}",
                "object": "batch",
                "endpoint": wanted["endpoint"],
                "errors": None,
                "metadata": wanted["metadata"],
            },
            **{"input_file_id": wanted["input_file_id"], "completion_window": "24h", "created_at": int(time.time())},
            **{"status": "validating", "output_file_id": None, "error_file_id": None},
        }
        lines = [json.loads(line) for line in content.splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines)
        counts = {"total": len(lines), "completed": 0, "failed": 0}
        self.batches[batch["id"]] = batch | {
            "request_counts": counts,
            "lines": lines,
            "until": time.monotonic() + self.takes,
        }
        return self.batches[batch["id"]]

    def look(self, batch: dict) -> None:
        """Bring a batch up to date: its requests are served when its time is over."""
        if batch["status"] in ENDS:
            return
        batch["status"] = "in_progress"
        if time.monotonic() < batch["until"]:
            return
        number = int(batch["id"].rpartition("_")[2])
        end = "cancelled" if batch.get("cancelling") else self.end(number)
        if isinstance(end, dict):
            batch |= {"status": "failed", "errors": {"object": "list", "data": [end]}}
            return
        lines, output, errors = batch["lines"], [], []
        served = len(lines) if end == "completed" else len(lines) // 2
        for line in lines[:served]:
            self.number += 1
            self.bodies.append(line["body"])
            status, document, *_ = self.rule(line["body"], self.number)
            result = {"id": f"batch_req_{self.number}", "custom_id": line["custom_id"], "error": None}
            result["response"] = {"status_code": status, "request_id": "x", "body": document}
            (output if status == 200 else errors).append(result)
            batch["request_counts"]["completed" if status == 200 else "failed"] += 1
            if status == 200:
                self.served[line["custom_id"]] += 1
                for place, name in enumerate(("prompt_tokens", "completion_tokens")):
                    self.tokens[place] += (document.get("usage") or {}).get(name, 0)
        for line in lines[served:]:
            error = {"code": f"batch_{end}", "message": "not executed"}
            errors.append({"id": "x", "custom_id": line["custom_id"], "response": None, "error": error})
        files = self.mangle(*([json.dumps(entry).encode() for entry in entries] for entries in (output, errors)))
        for name, entries in zip(("output_file_id", "error_file_id"), files, strict=True):
            batch[name] = self.store(b"\n".join(entries)) if entries else None
        batch["status"] = end


def public(document: dict) -> dict:
    """A batch as the server shows it."""
    return {name: value for name, value in document.items() if name not in ("lines", "until", "cancelling")}


class BatchHandler(Handler):
    def do_POST(self):
        if self.path == "/v1/files":
            self._answer("upload", self._upload)
        elif self.path == "/v1/batches":
            wanted = json.loads(self._body())
            self._answer("create", lambda: self.server.create(wanted))
        elif found := re.fullmatch(r"/v1/batches/(\w+)/cancel", self.path):
            self._body()
            self._answer(
                "cancel", lambda: self.server.batches[found[1]].update(cancelling=True) or self.server.batches[found[1]]
            )
        else:
            super().do_POST()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path == "/v1/batches":
            self._answer("list", lambda: self._page(dict(part.split("=") for part in query.split("&") if part)))
        elif found := re.fullmatch(r"/v1/batches/(\w+)", path):
            self._answer("look", lambda: self._look(found[1]))
        elif found := re.fullmatch(r"/v1/files/([\w-]+)/content", path):
            self._answer("content", lambda: self.server.files[found[1]])

    def do_DELETE(self):
        self._answer(
            "delete",
            lambda: {"id": self.path, "deleted": bool(self.server.files.pop(self.path.rpartition("/")[2]) or 1)},
        )

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _upload(self) -> dict:
        parts = email.message_from_bytes(
            b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + self.upload
        )
        found = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in parts.get_payload()
        }
        assert found["purpose"] == b"batch"
        content = found["file"][: len(found["file"]) // 2] if self.shortened else found["file"]
        return {"id": self.server.store(content), "object": "file", "purpose": "batch", "bytes": len(content)}

    def _look(self, name: str) -> dict:
        self.server.look(self.server.batches[name])
        return self.server.batches[name]

    def _page(self, query: dict) -> dict:
        newest = [b for _, b in sorted(self.server.batches.items(), key=lambda item: -int(item[0].rpartition("_")[2]))]
        ids = [b["id"] for b in newest]
        start = ids.index(query["after"]) + 1 if "after" in query else 0
        page = newest[start : start + min(3, int(query["limit"]))]  # short pages, so that there are several
        return {"object": "list", "data": list(map(public, page)), "has_more": start + len(page) < len(newest)}

    def _answer(self, what: str, act) -> None:
        server = self.server
        if what == "upload":
            self.upload = self._body()
        with server.lock:
            server.calls[what] += 1
            fault = server.fault(what, server.calls[what])
            self.shortened = fault == "short"
            status, content, headers = 200, None, {}
            if isinstance(fault, tuple):
                status, content, headers = fault[0], {"error": fault[1]}, fault[2] if len(fault) > 2 else {}
            elif fault != "lost":
                try:
                    content = act()
                except KeyError as error:
                    status, content = 404, {"error": {"message": f"no such object: {error}"}}
        if fault in ("lost", "cut"):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        if isinstance(content, dict):
            content = json.dumps(public(content)).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.shortened and what == "content" else content)
        self.close_connection |= self.shortened
