"""PA with an L-VLM behind a fake server that replies by rule."""

from pathlib import Path

import PA
from fake_server import completion, text_of


def answers_by():
    """The L-VLM "big" agrees with itself. Each S-VLM answers different questions wrongly."""

    def rule(body, _=0):
        if "Question:" in text_of(body):
            return 200, completion("Question: what color is it?\nAnswer: red")
        image = body["messages"][0]["content"][0]["image_url"]["url"]
        wrong = body["model"] != "big" and sum(map(ord, image + body["model"])) % 4 != 0
        return 200, completion("blue" if wrong else "red")

    return rule


def flags(server, images, run, *more, svlm="small") -> list[str]:
    given = ["--dataset", "images", "--run", f"{run}/", "--engine", "openai", "--base-url", server.url]
    return [
        *map(str, given),
        "--model-path-lvlm",
        "big",
        *(["--model-path-svlm", svlm] if svlm else []),
        *map(str, more),
    ]


def annotate(server, images, run, *more) -> Path:
    return PA.main(flags(server, images, run, "--image-root", images, *more, svlm=None))
