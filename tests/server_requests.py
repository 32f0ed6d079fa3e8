"""Requests to a fake server through the openai engine."""

from mpa.engines import Request, open_engine
from mpa.files.records import InputError
from mpa.method.prompts import TASK_PROMPTS


def asked(images, n=40, prompt=TASK_PROMPTS["general"], **more) -> list[Request]:
    paths = sorted(images.rglob("*.png"))
    return [Request(f"q{i}", str(paths[i % len(paths)]), prompt, max_new_tokens=128, **more) for i in range(n)]


def collect(server, requests, **settings) -> tuple[dict, InputError | None, dict]:
    found, failure = {}, None
    with open_engine("openai", model_path="m", base_url=server.url, **settings) as engine:
        try:
            for replies in engine.generate(requests):
                found |= {reply["key"]: reply for reply in replies}
        except InputError as error:
            failure = error
        return found, failure, engine.facts()


def stage_flags(server, images, limit: int | None = None) -> list:
    """Flags of a stage that asks the server about a folder of images."""
    flags = ["--dataset", "images", "--image-root", images, "--engine", "openai", "--base-url", server.url]
    return flags + (["--limit", limit] if limit else [])
