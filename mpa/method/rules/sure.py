"""The L-VLM must be sure: the probability of its answer, the product over its tokens, has a minimum."""

import math

from mpa.files.argument_types import number
from mpa.files.records import InputError
from mpa.method.rules.rule import Rule


def probability(logprob) -> float | None:
    """None where the value, which may come from a server or an edited file, is no logarithm of a probability."""
    is_number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
    return (
        math.exp(max(logprob, -1e4)) if is_number and -math.inf < logprob <= 1e-3 else None
    )  # above 0 by rounding alone


class Sure(Rule):
    NAMES = ("min_probability",)
    reason = "L-VLM unsure"

    @staticmethod
    def add_flags(parser) -> None:
        parser.add_argument(
            "--min-probability",
            type=number(0, 1, float),
            default=0.0,
            metavar="P",
            help="the L-VLM agrees with itself only if its answer has this probability (default: 0, as in the paper)",
        )

    def see(self, answers: list[dict]) -> None:
        if all(r.get("logprob") is None for r in answers):
            raise InputError(
                "no answer has a log-probability, so --min-probability cannot be used. This server or engine does not give it."
            )

    def leaves_out(self, lvlm, answer, match) -> str:
        known = probability(lvlm.get("logprob"))
        sure = known is not None and known >= self.settings["min_probability"]
        return "" if sure else f"log-probability {lvlm.get('logprob')}"
