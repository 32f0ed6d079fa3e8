"""Matchers: do two answers agree? `Match(name)(prediction, answer) -> bool`. PI applies one to each model."""

import re

from mpa.answers import metrics
from mpa.answers.normalise import normalise
from mpa.answers.replies import ANSWER_WORDS, LABEL, OPENING, bare, strip_reasoning


def _form(literal: bool):
    return metrics.squeeze if literal else normalise


def exact(prediction: str | None, answer: str | None, literal: bool = False) -> bool:
    """Equal after normalisation (paper, section 3.2), as text: 3.0 is not 3. An empty answer matches nothing."""
    form = _form(literal)
    return bool(form(answer)) and form(prediction) == form(answer)


def contains(prediction: str | None, answer: str | None, literal: bool = False) -> bool:
    """The answer is a substring of the prediction, after normalisation: "1" is found in "2013".

    With `literal`, as in the released code, an empty answer is found in everything.
    """
    form = _form(literal)
    return (literal or bool(form(answer))) and form(answer) in form(prediction)


def _scored(metric, threshold: float, copies: int = 1, form=normalise):
    def matches(prediction: str | None, answer: str | None, literal: bool = False) -> bool:
        if prediction is None or answer is None or not (normalise(answer) and form(answer)):
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
    # As if ten annotators had given the answer. The EvalAI form: `vqa` does not normalise unanimous answers.
    "vqa": _scored(metrics.textvqa, 1.0, copies=10, form=metrics.evalai),
}

# --- text around an answer -------------------------------------------------------------------------

_YES_NO = re.compile(r"(yes|no)(?:,|;| -| –|—|\.(?= [^\W\d_]{2}))", re.IGNORECASE)
# Phrases without content of their own: the answer is, it's, that would be, there are …
_IS = "(?:is|are|was|were|would be|must be|says?|reads?|ist|es|est|è|é|это|是|は|:|=)"
_FRAME = re.compile(
    rf"(?:(?:i (?:think|believe|see|would say|guess)|based on the image|in the image|according to the chart)(?: that)?,? *)?"
    rf"(?:(?:(?:the|my|a|an|die|der|das|la|le|el|o|correct|right|final|short|best|most likely|正确|最终) ?){{0,4}}"
    rf"(?:{ANSWER_WORDS}) *{_IS}+(?![a-z'’])|(?:it|this|that|there|they|these|those|he|she)(?:'s|’s|'re|’re| {_IS})(?![a-z'’]))"
    rf" *[:：]? *(?:(?:a|an|the) +(?=\w))?",
    re.IGNORECASE,
)
# Up to the last "is" of a sentence: the rest is its answer. `_DOUBTS` excludes negations, questions and doubts.
_STATES = re.compile(
    r"(.*[^\W\d_]) (?:is|are|was|were|reads|says|equals)(?: +(?:called|named|titled))? +(?:(?:a|an|the) +)?(?=\S)",
    re.IGNORECASE,
)
_DOUBTS = re.compile(
    r"\b(?:not|no|never|neither|nor|none|without|if|whether|or|either|maybe|perhaps|possibly|probably|unless|except"
    r"|may|might|could|because|what|which|who|why)\b|n['’]t\b|\?",
    re.IGNORECASE,
)
# Before the last "is": another statement, as in "The left is red, the right is blue"; not in "On the left, the car is red",
# "The car that is parked is red", "It is a car that is red".
_ANOTHER = re.compile(
    r"(?<!that )\b(?:is|are|was|were|reads|says|equals|shows|has|have|had|contains|displays|looks|appears|seems|means)\b"
    r"|[,:](?!\d)|;| [-–—/] |—",
    re.IGNORECASE,
)
_WHERE = re.compile(
    r"\A(?:in|on|at|by|from|to|for|with|under|of|during|as|near|behind|inside|according to|based on)\b[^,;:]*,",
    re.IGNORECASE,
)
_MAX_CHARS = 400  # a short answer is shorter, even with text around it


def unwrap(text: str | None) -> str | None:
    r"""A short answer without labels, Markdown, \boxed{}, tags, "The answer is …" or "It's …" around it.

    >>> unwrap("**Answer:** red"), unwrap(r"The answer is \boxed{red}."), unwrap("It's a cat.")
    ('red', 'red', 'cat')
    """
    if text is None or len(text) > _MAX_CHARS:
        return text
    text = found = (strip_reasoning(text) or "").strip() or text
    for _ in range(6):
        text = bare(text.strip().rstrip(".,;!。 ") if len(text.strip()) > 1 else text)
        for pattern in (OPENING, LABEL, _FRAME):
            start = pattern.match(text)
            if start and (pattern is not LABEL or start["answer"] or start["a"]) and text[start.end() :].strip(" .!*"):
                text = text[start.end() :]
        if text == found:
            break
        found = text
    return text


def stated(text: str | None) -> str | None:
    """The answer that a sentence states: "The car is red." -> "red", "No, it is blue." -> "No"; None for other text, also
    where it states two things: "The left is red, the right is blue".
    """
    if text is None or len(text) > _MAX_CHARS:
        return None
    text = bare(text)
    if answer := _YES_NO.match(text):
        return answer[1]
    sentence = None if _DOUBTS.search(text) else _STATES.match(text)
    if not sentence:
        return None
    before = _WHERE.sub("", sentence[1])
    if ("," in before or ";" in before) if before.endswith(" that") else _ANOTHER.search(before):
        return None
    return bare(text[sentence.end() :].rstrip(".,;!。 "))


class Match:
    """A matcher as PI uses it. It also compares the unwrapped answers; `literal`, as in the released code, it does not."""

    def __init__(self, name: str = "exact", literal: bool = False):
        self.matcher, self.literal = MATCHERS[name], literal

    def __call__(self, prediction: str | None, answer: str | None) -> bool:
        return self.matcher(prediction, answer, self.literal) or self.only_unwrapped(prediction, answer)

    def only_unwrapped(self, prediction: str | None, answer: str | None) -> bool:
        """Do the answers agree only after unwrapping? PI reports how often."""
        if self.literal or prediction is None or answer is None:
            return False
        if self.matcher(prediction, answer, self.literal):
            return False
        ours, theirs = unwrap(prediction), unwrap(answer)
        # Never compare two sentences: they may be about different things.
        pairs = ((ours, theirs), (stated(prediction), theirs), (ours, stated(answer)))
        return any(a is not None and b is not None and self.matcher(a, b, self.literal) for a, b in pairs)
