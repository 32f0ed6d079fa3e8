"""Votes: the L-VLM answers each question several times more, sampled, and these answers decide whether it agrees with itself."""

from collections import defaultdict
from dataclasses import replace

from mpa.files.argument_types import number
from mpa.method.rules.rule import Rule


class Votes(Rule):
    NAMES = ("votes", "min_agreement")
    asks = "votes"

    def __init__(self, settings: dict):
        super().__init__(settings)
        self.per_question = settings["votes"]
        self.votes: dict[str, list[str | None]] = defaultdict(list)  # by question id

    @staticmethod
    def add_flags(parser) -> None:
        parser.add_argument(
            "--votes",
            type=number(1),
            default=0,
            metavar="K",
            help="ask the L-VLM each question K times more, sampled; then these answers decide whether it agrees with itself, not "
            "the greedy one (default: 0, as in the paper)",
        )
        parser.add_argument(
            "--min-agreement",
            type=number(0, 1, float),
            default=0.5,
            metavar="SHARE",
            help="with --votes: the least share of them that match the annotation (default: 0.5)",
        )

    @classmethod
    def settings_of(cls, args) -> dict:
        return {"votes": args.votes, "min_agreement": args.min_agreement} if args.votes else {}

    def questions(self, questions, folder) -> list:
        """Each question as often as there are votes, with ids such as "17#3"."""
        found = []
        for q in questions:
            for vote in range(1, self.per_question + 1):
                key = f"{q.request.key}#{vote}"
                request = replace(q.request, key=key, temperature=1.0, seed=self.settings["seed"])
                found.append(replace(q, request=request, before=q.before | {"question_id": key}))
        return found

    def see(self, answers: list[dict]) -> None:
        for r in answers:
            self.votes[str(r["question_id"]).rpartition("#")[0]].append(r["predictions"])

    def agrees(self, lvlm, answer, match) -> tuple[bool, str]:
        votes = self.votes.get(str(lvlm["question_id"]), [])
        share = sum(match(vote, answer) for vote in votes) / max(1, len(votes))
        return share >= self.settings["min_agreement"], f", and the same as annotated in {share:.0%} of the votes"
