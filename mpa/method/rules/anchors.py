"""Anchors: samples that both models answer right, beside the parity set, so that what PL trains on is not one-sided.

The parity set holds the S-VLM's errors only. For a yes/no question its target is the opposite of what the S-VLM says, and the
S-VLM can learn to contradict itself (docs/no-harm.md). Not in the paper: without `--anchors` there are none.
"""

import heapq
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace

from mpa.answers.answer_types import question_type
from mpa.answers.normalise import normalise
from mpa.files.argument_types import number
from mpa.method.rules.rule import Rule, Selection

ANCHOR_BY = ("answer", "kind", "random")
ALL = 100  # per parity sample: in practice all that there are
RARE = 5  # rarer answers to one kind of question are one group: a few samples say nothing about a distribution


class Anchors(Rule):
    NAMES = ("anchors",)  # "1 by answer"
    of_consistent = True

    @staticmethod
    def add_flags(parser) -> None:
        parser.add_argument(
            "--anchors",
            type=number(0, ALL, float),
            metavar="R",
            help="also train on R samples per parity sample that both models answer right (default: 0, as in the paper; 100, which is "
            "all, with --preset anchored)",
        )
        parser.add_argument(
            "--anchor-by",
            choices=ANCHOR_BY,
            default="answer",
            help="answer: chosen so that the train set has the same mix of kinds of question and answers as all consistent samples; "
            "kind: of kinds of question only; random: any (default: answer)",
        )

    @classmethod
    def settings_of(cls, args) -> dict:
        return {"anchors": f"{args.anchors:g} by {args.anchor_by}"} if args.anchors else {}

    @classmethod
    def in_use(cls, settings: dict) -> bool:
        return settings.get("anchors", "none") != "none"

    def select(self, chosen: Selection) -> Selection:
        ratio, _, by = self.settings["anchors"].partition(" by ")
        anchors = choose(chosen.parity, chosen.right, float(ratio), by, self.settings["seed"])
        if len(anchors) < round(float(ratio) * len(chosen.parity)) and float(ratio) < ALL:
            print(f"PI: only {len(anchors)} anchors: both models answer no other samples right.", file=sys.stderr)
        return replace(chosen, anchors=anchors)


def _groups(samples: list[dict], by: str) -> Callable[[dict], tuple]:
    """The function that gives a sample's group."""
    if by == "random":
        return lambda r: ()
    if by == "kind":
        return lambda r: (question_type(r["PA_question"] or ""),)

    def exact(r: dict) -> tuple:
        return question_type(r["PA_question"] or ""), normalise(r["PA_answer"])

    counts = Counter(map(exact, samples))
    return lambda r: exact(r) if counts[exact(r)] >= RARE else (exact(r)[0],)


def choose(parity: list[dict], right: list[dict], ratio: float, by: str = "answer", seed: int = 0) -> list[dict]:
    """`ratio` anchors per parity sample from `right`, in their order; fewer if there are not so many.

    Both lists hold PI records of consistent samples: those that the S-VLM answers wrong, and right. Each anchor is taken from
    the group that parity set and anchors together lack most, compared with its share of all consistent samples; within a
    group at random. So the groups' shares come as near to those of the consistent samples as so many anchors allow.
    """
    wanted, rng = min(round(ratio * len(parity)), len(right)), random.Random(seed)
    consistent = [*parity, *right]
    group = _groups(consistent, by)
    pool = defaultdict(list)
    for place in rng.sample(range(len(right)), len(right)):
        pool[group(right[place])].append(place)
    there, shares = Counter(map(group, parity)), Counter(map(group, consistent))
    scale = (len(parity) + wanted) / max(1, len(consistent))
    lacking = [(there[name] - scale * shares[name], rng.random(), name) for name in pool]
    heapq.heapify(lacking)
    chosen = []
    for _ in range(wanted):
        surplus, tie, name = heapq.heappop(lacking)
        chosen.append(pool[name].pop())
        if pool[name]:
            heapq.heappush(lacking, (surplus + 1, tie, name))
    return [right[place] for place in sorted(chosen)]
