"""What a request of the `openai` engine costs: an upper estimate before it is sent, and the account after its reply."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from mpa.engines import Request
from mpa.engines.budget import Budget

# An upper estimate of an image's tokens, until replies say how many they are: constant, and one per so many pixels.
IMAGE_TOKENS, PIXELS_PER_TOKEN = 1000, 300
# A prompt of an image and a text has at least so many tokens: constant, one per so many pixels, and one per so many bytes.
LEAST_TOKENS, MOST_PIXELS_PER_TOKEN, MOST_BYTES_PER_TOKEN = 8, 50_000, 12
# The batch interface's price, as a share of the price of single requests (help.openai.com, "Batch API FAQ": 50 % discount).
BATCH_PRICE = 0.5


@dataclass(frozen=True)
class Reservation:
    """Money set aside for a request, and the estimate of its prompt's tokens that it is based on; fewer than `least` are no count."""

    amount: float
    prompt_tokens: float
    least: float


class Costs:
    """Estimates and costs of one model's requests. `prices` (in, out) are for a million tokens.

    The estimates follow the largest figures that the run has seen, which the budget's file keeps over calls.
    """

    def __init__(
        self,
        budget: Budget,
        model: str,
        prices: tuple[float, float],
        note: Callable[[str], None],
        request_json: dict | None = None,
    ):
        self.prices, self.note = prices, note
        self.more_bytes = len(json.dumps(request_json)) if request_json else 0
        # Tokens of a prompt as a share of its estimate; most tokens of a prompt, and of a reply.
        self.peaks = {
            name: budget.peak(name) for name in (f"{model}: {what}" for what in ("factor", "prompt", "reply"))
        }
        self.tokens_out = 0

    def prompt_tokens(self, request: Request, pixels: int) -> tuple[float, float]:
        """(an upper estimate: a byte of text is at most one token; fewer tokens than any model needs for the prompt)."""
        text = len(request.prompt.encode("utf-8", "surrogatepass"))
        least = LEAST_TOKENS + pixels / MOST_PIXELS_PER_TOKEN + text / MOST_BYTES_PER_TOKEN
        return IMAGE_TOKENS + pixels / PIXELS_PER_TOKEN + text + self.more_bytes, least

    def upper_bound(self, request: Request, prompt_tokens: float) -> float:
        """The most that the request may cost."""
        _, _, max_reply = self.peaks.values()
        return self._price(self.tokens_in(prompt_tokens), max(request.max_new_tokens, max_reply))

    def tokens_in(self, prompt_tokens: float) -> float:
        """The most tokens that a prompt may have, by its estimate and by the replies so far."""
        factor, max_prompt, _ = self.peaks.values()
        return max(1.25 * factor * prompt_tokens, max_prompt) if factor else prompt_tokens

    @property
    def known(self) -> bool:
        """Whether a reply has shown how many tokens the model counts for a prompt."""
        return any(self.peaks.values())

    def charge(self, usage: tuple[int, int] | None, reservation: Reservation) -> dict:
        """What a billed request adds to the account: arguments of `Budget.charge`.

        Without a `usage` (tokens in, tokens out), or with one that cannot be, it counts as much as was reserved.
        """
        if usage is None or usage[0] < reservation.least:
            if any(self.prices):
                what = "does not report token usage" if usage is None else f"reports a prompt of {usage[0]} tokens"
                self.note(f"the server {what}: such a reply counts at its upper estimate.")
            return {"requests": 1, "cost": reservation.amount}
        tokens_in, tokens_out = usage
        self.tokens_out += tokens_out
        seen = dict(zip(self.peaks, (tokens_in / reservation.prompt_tokens, tokens_in, tokens_out), strict=True))
        self.peaks = {name: max(self.peaks[name], value) for name, value in seen.items()}
        cost = self._price(tokens_in, tokens_out)
        return {"requests": 1, "tokens_in": tokens_in, "tokens_out": tokens_out, "cost": cost, "peaks": self.peaks}

    def _price(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6
