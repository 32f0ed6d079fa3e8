"""Do two answers agree: `MATCHERS[name](prediction, answer) -> bool`, the question that PI asks twice."""

from mpa import metrics
from mpa.normalising import normalise, unwrap


def exact(prediction: str | None, answer: str | None) -> bool:
    """Equal after `normalise` (paper, section 3.2; the departures are in README.md). An empty answer matches nothing."""
    return bool(normalise(answer)) and normalise(prediction) == normalise(answer)


def contains(prediction: str | None, answer: str | None) -> bool:
    """The answer lies in the prediction, after normalising: the released code, to the letter.

    "1" is found in "2013", and an empty answer in everything.
    """
    return metrics.squeeze(answer) in metrics.squeeze(prediction)


def _scored(metric, threshold: float, copies: int = 1):
    def matches(prediction: str | None, answer: str | None) -> bool:
        if not normalise(answer) or prediction is None:
            return False
        return metric(prediction, [answer] * copies) >= threshold

    matches.__doc__ = f"`{metric.__name__}` of the prediction against the answer is at least {threshold}."
    return matches


MATCHERS = {
    "exact": exact,
    "contains": contains,
    "anls": _scored(metrics.anls, 0.5),
    "relaxed": _scored(metrics.relaxed, 1.0),
    "tolerant": _scored(metrics.tolerant, 1.0),
    # As if ten people had given the answer; the EvalAI form, since `vqa` leaves the unanimous as they are.
    "vqa": _scored(metrics.textvqa, 1.0, copies=10),
}


def seen_through(match, prediction: str | None, answer: str | None) -> bool:
    """`match`, also of what is left of the two without the words and marks that models put around a short answer.

    An S-VLM that answers "The answer is red." knows the answer; a parity set with such samples would teach it the format.
    """
    return match(prediction, answer) or match(unwrap(prediction), unwrap(answer))
