"""The rules beyond the paper. Each is one file and one row of RULES; neither the stages nor the paper's preset know them.

A rule is in use where its flag is given: PI then stores its settings in the train file's meta file, from which all readers make
it again.
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
    """The rules that these settings of a train file select; they have not been told yet what the models answered."""
    return tuple(rule(settings) for rule in RULES if rule.in_use(settings))


def deciding_consistency(settings: dict) -> dict:
    """Those of the settings that decide which questions the S-VLM is asked."""
    names = (name for rule in RULES if not rule.of_consistent for name in rule.NAMES)
    return {name: settings[name] for name in names if name in settings}


def reasons(of_consistent: bool) -> tuple[str, ...]:
    """The reasons of samples that a rule leaves out, on which the L-VLM agrees with itself, or does not."""
    return tuple(rule.reason for rule in RULES if rule.reason and rule.of_consistent == of_consistent)
