"""Blind answers: the L-VLM also answers about a grey image. A question that it answers as annotated needs no image, and is left out."""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from mpa.files import atomic, distributed
from mpa.method.rules.rule import Rule

GREY = "grey.png"


class Blind(Rule):
    NAMES = ("blind",)
    reason = "L-VLM needs no image"
    asks = "blind"
    per_question = 1

    def __init__(self, settings: dict):
        super().__init__(settings)
        self.answers: dict[str, str | None] = {}  # by question id

    @staticmethod
    def add_flags(parser) -> None:
        parser.add_argument(
            "--blind",
            action="store_true",
            help="leave out what the L-VLM answers as annotated when it sees a grey image instead; it is asked once more",
        )

    def prepare(self, folder: Path) -> None:
        if distributed.FIRST and not (folder / GREY).exists():
            with atomic.replacing(folder / GREY) as file:
                Image.new("RGB", (448, 448), (128, 128, 128)).save(file, "PNG")
        distributed.wait()

    def questions(self, questions, folder: Path) -> list:
        """Each question about the grey image of the run folder."""
        shown = {"image_path": str(folder / GREY)}
        return [replace(q, request=replace(q.request, **shown), before=q.before | shown) for q in questions]

    def see(self, answers: list[dict]) -> None:
        self.answers = {str(r["question_id"]): r["predictions"] for r in answers}

    def leaves_out(self, lvlm, answer, match) -> str:
        key = str(lvlm["question_id"])
        same = key in self.answers and match(self.answers[key], answer)
        return "it answers the same about a grey image" if same else ""
