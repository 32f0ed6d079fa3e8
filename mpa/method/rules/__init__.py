"""The rules beyond the paper. Each is one file and one row of RULES; no stage knows one by its name.

A rule is in use where its flag is given. PI stores its settings in the train file's meta file, from which readers make the rule again.
"""

from mpa.method.rules.anchors import Anchors
from mpa.method.rules.blind import Blind
from mpa.method.rules.caps import Caps
from mpa.method.rules.rule import Rule
from mpa.method.rules.sure import Sure
from mpa.method.rules.votes import Votes

RULES: tuple[type[Rule], ...] = (Votes, Sure, Blind, Caps, Anchors)  # they apply in this order


def add_flags(parser) -> None:
    for rule in RULES:
        rule.add_flags(parser)


def settings_of(args) -> dict:
    """The settings of the rules that the flags select, with the seed that they share; {} if there are none."""
    chosen = {}
    for rule in RULES:
        chosen |= rule.settings_of(args)
    return chosen | ({"seed": args.seed} if chosen else {})


def of(settings: dict) -> tuple[Rule, ...]:
    """The rules that these settings of a train file select; `see` must still tell them the answers that they need."""
    return tuple(rule(settings) for rule in RULES if rule.in_use(settings))


def deciding_consistency(settings: dict) -> dict:
    """Those of the settings that decide which questions the S-VLM is asked."""
    names = (name for rule in RULES if not rule.selects for name in rule.NAMES)
    return {name: settings[name] for name in names if name in settings}


def reasons(selects: bool) -> tuple[str, ...]:
    """The reasons of the rules that select, or of the others."""
    return tuple(rule.reason for rule in RULES if rule.reason and rule.selects == selects)


def names() -> list[str]:
    """The settings of all rules."""
    return [name for rule in RULES for name in rule.NAMES]
