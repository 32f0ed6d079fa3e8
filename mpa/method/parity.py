"""The parity rule (paper, section 3.2): keep what the L-VLM answers consistently and the S-VLM gets wrong."""

import math
import random
from collections import Counter
from pathlib import Path

from mpa.answers.finish_reasons import why_cut
from mpa.answers.matching import Match
from mpa.answers.normalise import normalise
from mpa.files import records
from mpa.files.records import InputError
from mpa.method.presets import PRESETS
from mpa.method.prompts import train_prompt


def probability(logprob) -> float | None:
    """None where the value, which may come from a server or an edited file, is no logarithm of a probability."""
    number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
    return math.exp(max(logprob, -1e4)) if number and -math.inf < logprob <= 1e-3 else None  # above 0 by rounding alone


class ParityRule:
    """The rule for one matcher (a key of matching.MATCHERS) and one preset. Records are those of PI files.

    Not in the paper: with `min_probability` the L-VLM's answer must also have that probability; `see_blind` and `see_votes` take
    further answers of the L-VLM into account, `see_probabilities` what the S-VLM gives the annotated answers. With
    `max_svlm_probability` the S-VLM is wrong where that is at most so much, whatever it answers; `weights`: train records have
    a `weight`.
    """

    # Arguments, and settings of a parity set's meta file where they are in use.
    OPTIONAL = ("min_probability", "max_svlm_probability", "weights")

    def __init__(
        self,
        match: str,
        preset: str,
        min_probability: float = 0.0,
        max_svlm_probability: float = 0.0,
        weights: bool = False,
    ):
        self.match, self.preset, self.min_probability = Match(match, PRESETS[preset].literal), preset, min_probability
        self.max_svlm_probability, self.weights = max_svlm_probability, weights
        self.probabilities: dict[str, float] = {}  # that the S-VLM gives the annotated answer, by id
        self.blind: set[str] = set()  # ids of questions that the L-VLM answers as annotated without seeing the image
        self.votes: dict[str, list[str]] = {}  # the L-VLM's sampled answers, by id
        self.min_agreement = 0.0

    @classmethod
    def of(cls, settings: dict, folder: Path, lvlm: str, svlm: str, dataset: str) -> "ParityRule":
        """The rule of a parity set, from its meta file's settings and its run folder."""
        optional = {name: settings[name] for name in cls.OPTIONAL if settings.get(name)}
        rule = cls(settings["match"], settings["preset"], **optional)
        if settings.get("blind"):
            rule.see_blind(_asked_again(folder, lvlm, "blind", dataset))
        if settings.get("votes"):
            rule.see_votes(_asked_again(folder, lvlm, "votes", dataset), settings["min_agreement"])
        if rule.needs_probabilities:
            rule.see_probabilities(_asked_again(folder, lvlm, f"scored-{svlm}", dataset))
        return rule

    @property
    def needs_probabilities(self) -> bool:
        return bool(self.max_svlm_probability or self.weights)

    def see_probabilities(self, scored: list[dict]) -> None:
        """Take the log-probabilities that the S-VLM gives the annotated answers. Those it could not tell are left out."""
        known = {str(r["question_id"]): probability(r["logprob"]) for r in scored}
        self.probabilities = {key: value for key, value in known.items() if value is not None}

    def see_blind(self, answers: list[dict]) -> None:
        """Take the L-VLM's answers without the image."""
        self.blind = {str(r["question_id"]) for r in answers if self.agrees(r)}

    def see_votes(self, answers: list[dict], min_agreement: float) -> None:
        """Take the L-VLM's sampled answers, with ids such as "17#3". They decide instead of its one greedy answer."""
        self.votes, self.min_agreement = {}, min_agreement
        for r in answers:
            self.votes.setdefault(str(r["question_id"]).rpartition("#")[0], []).append(r["predictions"])

    def agreement(self, record: dict) -> float:
        """The share of the sampled answers that match the annotation's answer; 0 without any."""
        votes = self.votes.get(str(record.get("question_id")), [])
        return sum(self.match(vote, record["PA_answer"]) for vote in votes) / max(1, len(votes))

    def repeats(self, record: dict) -> bool:
        """Does the L-VLM's greedy answer, or with votes a large enough share of these, match the annotation's answer?"""
        return self.agreement(record) >= self.min_agreement if self.votes else self.agrees(record)

    def agrees(self, record: dict) -> bool:
        """Does the model's answer match the annotation's answer?"""
        return self.match(record["predictions"], record["PA_answer"])

    def right(self, record: dict) -> bool:
        """Is the S-VLM right, by this record of it?"""
        if self.max_svlm_probability:
            return self.probabilities[str(record["question_id"])] > self.max_svlm_probability
        return self.agrees(record)

    def weight(self, record: dict) -> float:
        """How much a consistent sample can teach: the share of votes for the annotated answer, if there are votes, times the
        probability that the S-VLM does not give it. The cut of the paper's filter is 1 or 0 for both factors."""
        return (self.agreement(record) if self.votes else 1.0) * (1 - self.probabilities[str(record["question_id"])])

    def consistent(self, record: dict) -> bool:
        """Does the L-VLM agree with itself? Under `paper`, a truncated or filtered reply never counts as agreement."""
        cut = PRESETS[self.preset].checked and why_cut(record.get("finish_reason"))
        seen = str(record.get("question_id")) not in self.blind
        return self.repeats(record) and not cut and self.sure(record) and seen

    def sure(self, record: dict) -> bool:
        """Has the answer the least probability? Without a log-probability it has not."""
        known = probability(record.get("logprob"))
        return not self.min_probability or (known is not None and known >= self.min_probability)

    def only_unwrapped(self, answers: list[dict]) -> int:
        """How many answers match only after the words or Markdown around them are removed."""
        return sum(self.match.only_unwrapped(r["predictions"], r["PA_answer"]) for r in answers)

    def answered(self, lvlm: list[dict], svlm: list[dict]) -> tuple[list[dict], list[dict]]:
        """(wrong, right): the S-VLM's records of the samples that the L-VLM answers consistently, in their order.

        A sample that only one model answered, or whose probability is needed and missing, is in neither. The annotation is read
        from the S-VLM's record, as in the released code.
        """
        lvlm_by_id, found = {str(r["question_id"]): r for r in lvlm}, ([], [])
        for s in svlm:
            l = lvlm_by_id.get(str(s["question_id"]))  # noqa: E741
            if l is None or s.get("left_out"):
                continue
            if self.needs_probabilities and str(s["question_id"]) not in self.probabilities:
                continue
            if self.consistent(l | {"PA_answer": s["PA_answer"]}):
                found[self.right(s)].append(s)
        return found

    def train_record(self, r: dict) -> dict:
        """The train record of a PI record."""
        prompt = train_prompt(r["PA_question"], self.preset)
        record = records.train_record(r["question_id"], r["image_path"], prompt, r["PA_answer"])
        return record | ({"weight": round(self.weight(r), 4)} if self.weights else {})

    def parity_set(self, lvlm: list[dict], svlm: list[dict]) -> list[dict]:
        """D_PI = {(I, Q, A): the L-VLM's answer matches A, the S-VLM's does not}, as train records (equations 1 and 2)."""
        return [self.train_record(r) for r in self.answered(lvlm, svlm)[0]]


def asked_again_file(folder: Path, lvlm: str, how: str, dataset: str) -> Path:
    """Further answers to the L-VLM's questions: its own "blind", about a grey image (PI's --blind), or "votes", sampled (--votes);
    its answers to "given" questions (--held-out-questions); or "scored-SVLM", the annotated answers with the log-probabilities that the S-VLM gives them (--score)."""
    return folder / f"PI_{lvlm}_{how}_{dataset}.json"


def _asked_again(folder: Path, lvlm: str, how: str, dataset: str) -> list[dict]:
    file = asked_again_file(folder, lvlm, how, dataset)
    if not file.exists():
        flag = "score" if how.startswith("scored-") else how
        raise InputError(
            f"{file}: no such file. Run PI.sh with --{flag} first, with these LVLM and SVLM and without --lvlm-json."
        )
    return records.read_records(file, "PI")


def capped(samples: list[dict], per_question: int, per_answer: int, seed: int) -> list[dict]:
    """At most so many PI records of one question and of one answer, normalised, chosen at random, in their order. 0: no limit.

    In 9,009 released annotations of OK-VQA one question stands 150 times. The paper has no such limit.
    """
    counts, kept = Counter(), []
    for place in random.Random(seed).sample(range(len(samples)), len(samples)):
        r = samples[place]
        limited = {
            "question": (normalise(r["PA_question"] or ""), per_question),
            "answer": (normalise(r["PA_answer"]), per_answer),
        }
        if all(not most or counts[what, text] < most for what, (text, most) in limited.items()):
            counts.update((what, text) for what, (text, _) in limited.items())
            kept.append(place)
    return [samples[place] for place in sorted(kept)]
