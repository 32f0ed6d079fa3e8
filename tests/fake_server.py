"""A local server with OpenAI's API, whose replies are set by the test."""

import json
import time
from http.server import BaseHTTPRequestHandler

ANNOTATION = "Question: what color is it?\nAnswer: red"
USAGE = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}


def completion(text="red", **more) -> dict:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": USAGE,
        **more,
    }


class Handler(BaseHTTPRequestHandler):
    """Replies with `server.rule(body, number)`: (status, document[, headers]). `billed` counts the replies."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits for the client to acknowledge the headers, 40 ms

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.number += 1
            number = server.number
            server.bodies.append(body)
        status, document, *headers = server.rule(body, number)
        time.sleep(server.pause)
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        with server.lock:
            server.billed += status == 200
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers[0] if headers else {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def annotate_or_answer(body, _=0):
    return 200, completion(ANNOTATION if "Question:" in text_of(body) else "red")


def text_of(body) -> str:
    return body["messages"][0]["content"][1]["text"]
