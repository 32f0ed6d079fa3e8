"""Caps: at most so many samples of one question and of one answer.

In 9,009 released annotations of OK-VQA one question stands 150 times.
"""

import random
from collections import Counter
from dataclasses import replace

from mpa.answers.normalise import normalise
from mpa.files.argument_types import number
from mpa.method.rules.rule import Rule, Selection


class Caps(Rule):
    NAMES = ("max_per_question", "max_per_answer")
    reason = "over the limit"
    selects = True

    @staticmethod
    def add_flags(parser) -> None:
        for what in ("question", "answer"):
            parser.add_argument(
                f"--max-per-{what}",
                type=number(1),
                default=0,
                metavar="N",
                help=f"at most N parity samples of one {what}, chosen at random by --seed (default: any number)",
            )

    @classmethod
    def in_use(cls, settings: dict) -> bool:
        return any(settings.get(name) for name in cls.NAMES)

    def select(self, chosen: Selection) -> Selection:
        parity, right = self.capped(chosen.parity), self.capped(chosen.right)
        if left := len(chosen.parity) - len(parity):
            print(f"PI: {left} parity samples are over --max-per-question or --max-per-answer.")
        return replace(chosen, parity=parity, right=right)

    def capped(self, samples: list[dict]) -> list[dict]:
        """At most so many PI records of one question and of one answer, normalised, chosen at random, in their order."""
        per_question, per_answer = (self.settings.get(name, 0) for name in self.NAMES)
        counts, kept = Counter(), []
        for place in random.Random(self.settings["seed"]).sample(range(len(samples)), len(samples)):
            r = samples[place]
            limited = {
                "question": (normalise(r["PA_question"] or ""), per_question),
                "answer": (normalise(r["PA_answer"]), per_answer),
            }
            if all(not most or counts[what, text] < most for what, (text, most) in limited.items()):
                counts.update((what, text) for what, (text, _) in limited.items())
                kept.append(place)
        return [samples[place] for place in sorted(kept)]
