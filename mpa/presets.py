"""The two ways to run the method: as the paper says, and as its released code does. All their differences are here.

`docs/departures.md` gives the reasons. Everything else in the repository is the same under both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What `--preset` decides."""

    match: str  # PI's matcher where --match is not given, a key of matching.MATCHERS
    literal: bool  # compare as the released code does: `metrics.squeeze`, nothing unwrapped, "" is in every answer
    separator: str  # between a question and prompts.ANSWER_SUFFIX
    train_suffix: bool  # the train prompt ends with that suffix, as the prompt of the evaluation does
    whole_reply: bool  # the model writes to its end token, and all of that is the answer; else its first line is
    checked: bool  # an annotation that is cut off, refused, doubled or holds a mark is not used; else regex alone
    tries: int | None  # most further tries for an unreadable annotation; None: as --tries says
    headline: str | None  # the metric that evaluation puts first; None: the dataset's


PRESETS = {
    "paper": Preset(
        match="exact",
        literal=False,
        separator=" ",
        train_suffix=True,
        whole_reply=False,
        checked=True,
        tries=None,
        headline=None,
    ),
    "released": Preset(
        match="contains",
        literal=True,
        separator="",
        train_suffix=False,
        whole_reply=True,
        checked=False,
        tries=0,
        headline="contains",
    ),
}
