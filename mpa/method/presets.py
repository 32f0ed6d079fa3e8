"""The presets: `paper` follows the paper, `released` its released code. All their differences are here.

`docs/departures.md` gives the reasons. A third, `anchored`, is `paper` with other defaults of PI (docs/no-harm.md).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What `--preset` decides."""

    match: str  # PI's default matcher, a key of matching.MATCHERS; --match overrides it
    literal: bool  # compare as the released code does: `metrics.squeeze`, no unwrapping, "" matches every answer
    separator: str  # between a question and prompts.ANSWER_SUFFIX
    train_suffix: bool  # the train prompt ends with ANSWER_SUFFIX, as the evaluation prompt does
    whole_reply: bool  # True: the answer is the reply up to the end token. False: the answer is its first line
    checked: bool  # reject annotations that are truncated, refuse, ask twice, or hold a prompt token; else regex only
    tries: int | None  # maximum number of retries for an unreadable annotation; None: --tries decides
    headline: str | None  # the main metric of the evaluation; None: the dataset's


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

# The preset `anchored`: all stages ask and compare as in `paper`, so that their results can be shared, and these are PI's defaults.
ANCHORED = "anchored"
HOLD_OUT = 0.15  # the share of the images, where some are held out
ANCHORED_DEFAULTS = {"anchors": 100.0, "hold_out": HOLD_OUT}


def method_name(anchors: str | None) -> str:
    """What tables call the training on PI's train set: MPA is the paper's; `anchors`, as PI's meta file has it ("100 by answer"), says
    what was added.
    """
    if anchors in (None, "none"):
        return "MPA"
    ratio = anchors.split()[0]
    return ANCHORED if ratio == f"{ANCHORED_DEFAULTS['anchors']:g}" else f"MPA with {ratio} anchors per sample"
