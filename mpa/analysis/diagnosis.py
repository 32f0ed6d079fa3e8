"""What looks wrong in a run: the signatures of the paper's analysis, from result files alone.

`diagnose` gives findings, each with its figure, what it means, and what to try. It prints nothing and loads no model.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from mpa.answers.answer_types import answer_type, question_type
from mpa.answers.intervals import wilson
from mpa.answers.normalise import normalise
from mpa.data import DATASETS
from mpa.method.verdict import BOTH_RIGHT, LVLM_FAILED, NO_ANNOTATION, PARITY, SVLM_FAILED
from mpa.runs import comparable, scoring
from mpa.runs.case import Case, checked_against_labels
from mpa.runs.comparable import NotComparable

# Thresholds, with their reasons.
FEW_SAMPLES = 100  # the paper trains on about 2,000; below this, one epoch is a handful of steps
SMALL_GAP = 0.10  # the paper's S-VLMs err on a quarter or more of the consistent samples
LOW_CONSISTENCY = 0.50  # raters found 68 % of the L-VLM's annotations correct (table 4)
WRONG = 0.10  # raters found 84 % of the parity set correct (table 4), some of the rest arguable
SAME_QUESTION = 0.01  # in the released OK-VQA annotations one question stands 150 times, 1.7 %
YES_NO = 0.30  # above it, trainings of the embedded pair lost accuracy (docs/no-harm.md)
LOST = 0.05  # of the images or replies: losses are then part of the result
MISSING = 0.05  # a type with this share elsewhere and none in the parity set
FEW_STEPS = 10  # a cosine schedule with warm-up has hardly begun
FEW_CHECKED = 20  # fewer labelled questions say nothing about a share

LEVELS = ("problem", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """`level` is one of LEVELS. `figure` holds the numbers, `meaning` and `remedy` a sentence each."""

    name: str
    level: str
    figure: str
    meaning: str
    remedy: str


def share(k: int, n: int) -> str:
    """ "12 of 40 (30 %, 95 % interval 18 to 45)" """
    if not n:
        return "0 of 0"
    low, high = wilson(k / n, n)
    return f"{k:,} of {n:,} ({100 * k / n:.0f} %, 95 % interval {100 * low:.0f} to {100 * high:.0f})"


# --- the parity set --------------------------------------------------------------------------------------


def few_samples(case: Case):
    if case.train_json.exists() and len(case.kept) < FEW_SAMPLES:
        yield Finding(
            "small parity set",
            "warning",
            f"{len(case.kept):,} samples from {len(case.samples):,} annotated images",
            "So few samples teach little, and the gain depends on chance.",
            "Annotate more images"
            + ("." if case.settings.get("temperature") else ", or sample the questions with PA's --temperature 1."),
        )


def small_gap(case: Case):
    asked = [s for s in case.samples if s.reason in (PARITY, BOTH_RIGHT)]
    if case.train_json.exists() and len(asked) >= FEW_CHECKED and len(case.kept) < SMALL_GAP * len(asked):
        yield Finding(
            "no gap",
            "warning",
            f"the S-VLM errs on {share(len(case.kept), len(asked))} of the consistent samples",
            "The S-VLM already answers what the L-VLM asks, so there is little to learn from it.",
            "Ask for harder questions (--task, --prompt-file), or take a stronger L-VLM or a smaller S-VLM.",
        )


def disagreement(annotation: str, answer: str | None) -> str:
    """The kind of difference between an annotation and the L-VLM's own answer."""
    said, wrote = normalise(answer), normalise(annotation)
    if not said:
        return "no answer"
    if {said, wrote} == {"yes", "no"}:
        return "yes and no"
    if re.search(r"\d", said) and re.search(r"\d", wrote):
        return "another number"
    words = [set(re.findall(r"\w+", (text or "").casefold())) for text in (annotation, answer)]
    if words[0] <= words[1] or words[1] <= words[0]:
        return "one contains the other"
    return "some words in common" if words[0] & words[1] else "other words"


def low_consistency(case: Case):
    n = len(case.usable)
    if n >= FEW_CHECKED and len(case.consistent) < LOW_CONSISTENCY * n:
        differing = [s for s in case.usable if not s.consistent]
        kinds = Counter(disagreement(s.annotation, s.lvlm_answer) for s in differing).most_common(3)
        yield Finding(
            "the L-VLM disagrees with itself",
            "warning",
            f"it repeats {share(len(case.consistent), n)} of its answers; most frequent differences: "
            + ", ".join(f"{kind} ({count:,})" for kind, count in kinds),
            "Its questions are too hard or too vague for it, or answers differ only in form.",
            "Look at the samples (scripts/checks.py inspect)."
            + (
                " If answers differ in form: --match anls or tolerant."
                if case.settings.get("match", "exact") == "exact"
                else ""
            ),
        )


def wrong_targets(case: Case):
    checked = checked_against_labels(case, case.kept)
    wrong = sum(not right for _, right in checked)
    if len(checked) >= FEW_CHECKED and wrong > WRONG * len(checked):
        yield Finding(
            "consistent but wrong",
            "problem",
            f"{share(wrong, len(checked))} of the parity samples that a label answers have a wrong target",
            "The L-VLM repeats its errors, so PI keeps them, and the S-VLM learns them.",
            "Take a stronger L-VLM, or leave out the kinds of question that it fails at.",
        )


def duplicates(case: Case):
    samples, what = (case.kept, "parity samples") if case.train_json.exists() else (case.annotated, "annotations")
    n = len(samples)
    if n < FEW_CHECKED:
        return
    questions = Counter(normalise(s.question) for s in samples)
    pairs = Counter((normalise(s.question), normalise(s.annotation)) for s in samples)
    question, most = questions.most_common(1)[0]
    if most > max(2, SAME_QUESTION * n):
        text = next(s.question for s in samples if normalise(s.question) == question)
        same = pairs.most_common(1)[0][1]
        yield Finding(
            "repeated questions",
            "note",
            f"{len(questions):,} distinct questions in {n:,} {what}; {text[:80]!r} stands {share(most, n)} times; "
            f"the most frequent question with the same answer {same:,} times",
            "They cover fewer things than their number suggests.",
            "Ask for variety in --prompt-file."
            if case.settings.get("temperature")
            else "Sample the questions with PA's --temperature 1, or ask for variety in --prompt-file.",
        )


# --- types of questions and answers ----------------------------------------------------------------------


def yes_no(case: Case):
    of_type = [s for s in case.kept if answer_type(s.annotation, case.task) == "yes/no"]
    if len(case.kept) >= FEW_CHECKED and len(of_type) > YES_NO * len(case.kept):
        opposite = sum(normalise(s.svlm_answer) in ("yes", "no") for s in of_type)
        yield Finding(
            "one-sided yes/no questions",
            "warning",
            f"{share(len(of_type), len(case.kept))} of the parity set are yes/no questions; in {opposite:,} of them the target "
            "is the opposite of what the S-VLM says",
            "The S-VLM can learn to contradict itself instead of looking (docs/no-harm.md).",
            "Ask open questions (--prompt-file)"
            + (
                "."
                if case.settings.get("anchors")
                else ", or add samples that it answers right (PI's --anchors; docs/no-harm.md)."
            ),
        )


def missing_types(case: Case):
    """Types that the annotations or the test questions have, and the parity set does not: one finding, as the type of an
    answer often is that of its question, too.
    """
    if len(case.kept) < FEW_SAMPLES:
        return
    after = case.evaluation(case.cell.svlm)
    test = [(r["GT_question"], scoring.answers_of(r)[0]) for r in after.records] if after else []
    elsewhere = {"annotations": [(s.question, s.annotation) for s in case.usable], "test questions": test}
    kinds = {"answers": lambda q, a: answer_type(a, case.task), "questions": lambda q, a: question_type(q)}
    missing = {}
    for what, kind in kinds.items():
        there = {kind(s.question, s.annotation) for s in case.kept}
        for where, pairs in elsewhere.items():
            counts = Counter(kind(q, a) for q, a in pairs if q and a)
            for name, count in counts.items():
                if name not in there and count > MISSING * counts.total():
                    of_type = f"no {what} of the type {name!r} in the parity set"
                    missing.setdefault(of_type, []).append(f"{share(count, counts.total())} of the {where}")
    if missing:
        yield Finding(
            "a missing type",
            "note",
            "; ".join(f"{of_type}: {' and '.join(found)}" for of_type, found in missing.items()),
            "PL teaches nothing about what is missing.",
            "Ask for it in --prompt-file. It may also be missing because the S-VLM answers it well.",
        )


# --- losses on the way -----------------------------------------------------------------------------------


def left_out(case: Case):
    n = len(case.samples)
    reasons = Counter(
        (s.detail or s.reason).split(":")[0][:80]
        for s in case.samples
        if s.reason in (NO_ANNOTATION, LVLM_FAILED, SVLM_FAILED)
    )
    if n and reasons.total() > LOST * n:
        common = ", ".join(f"{why} ({count:,})" for why, count in reasons.most_common(3))
        yield Finding(
            "annotations left out",
            "warning",
            f"{share(reasons.total(), n)} of the images: {common}",
            "Refusals, truncated or unreadable replies and broken images are missing from all that follows.",
            "See left_out and reply in the PA file. Truncated: --max-new-tokens. Refusals: another --prompt-file.",
        )


def truncated(case: Case):
    cut = [s for s in case.usable if s.cut]
    if len(cut) > LOST * max(1, len(case.usable)):
        yield Finding(
            "truncated answers",
            "warning",
            f"{share(len(cut), len(case.usable))} of the L-VLM's answers were cut",
            "A cut answer never counts as agreement, so these samples are lost.",
            "Give PI more --max-new-tokens, or ask for short answers.",
        )


# --- training and evaluation -----------------------------------------------------------------------------


def training(case: Case):
    steps = case.trained().get("steps")
    if isinstance(steps, int) and steps < FEW_STEPS:
        yield Finding(
            "few training steps",
            "warning",
            f"{steps} steps",
            "The learning rate has hardly left its warm-up.",
            "Train on more samples, for more EPOCHS, or with a smaller batch (PL_BATCH_SIZE, ACCUMULATION).",
        )
    losses = case.losses
    if any(not math.isfinite(loss) for loss in losses):
        yield Finding(
            "training loss", "problem", "the loss is not a number at some step", "The training has failed.",
            "Lower LEARNING_RATE.",
        )  # fmt: skip
    elif len(losses) >= 4 and np.mean(losses[-2:]) > np.mean(losses[:2]):
        yield Finding(
            "training loss",
            "problem",
            f"it rose from {np.mean(losses[:2]):.3g} to {np.mean(losses[-2:]):.3g}",
            "The S-VLM did not learn its train set.",
            "Lower LEARNING_RATE, and look at the train samples.",
        )


def no_gain(case: Case):
    """A loss, or nothing that can be told from chance, on the run's dataset and on all others that were evaluated."""
    for dataset in DATASETS:
        before, after = case.evaluation(case.cell.svlm, dataset), case.evaluation(case.model, dataset)
        if not (before and after):
            continue
        try:
            pairs = comparable.compare(before, after)
        except NotComparable as error:
            yield Finding(
                "not compared", "problem", dataset, str(error), "Until then nothing can be said about the gain.",
            )  # fmt: skip
            continue
        found = pairs.summary()
        low, high = (100 * bound for bound in found["ci95"])
        own = dataset == case.cell.dataset
        figure = f"{dataset}: {100 * found['score']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, n = {found['n']:,}"
        if max(len(before.scores), len(after.scores)) > pairs.asked:
            yield Finding(
                "different questions", "problem", f"{dataset}: only {pairs.asked:,} questions are in both evaluations",
                "The scores before and after are not of the same questions.", "Evaluate both with the same flags.",
            )  # fmt: skip
        if high < 0:
            yield Finding(
                "a loss" if own else "forgetting",
                "problem",
                figure,
                "The levelled S-VLM is worse than before.",
                "Keep the S-VLM from before. Then try a lower LEARNING_RATE"
                + (" (docs/no-harm.md)." if case.settings.get("anchors") else ", or PI's --anchors (docs/no-harm.md).")
                if own
                else "Mix in other data with a share: DATA='parity.json:0.9 other.json:0.1'.",
            )
        elif own and low <= 0:
            yield Finding(
                "no clear gain",
                "warning",
                figure,
                "This could be chance.",
                "Evaluate more questions, train on more samples, and look at the findings above.",
            )


def lost_replies(case: Case):
    """Of the evaluations: errors and cut replies."""
    for model in (case.cell.svlm, case.model):
        one = case.evaluation(model)
        if one and (~one.usable).sum() > LOST * len(one.usable):
            yield Finding(
                "test replies without an answer",
                "warning",
                f"{one.path.name}: {one.lost}",
                "They count as wrong in this model's score, and not in the comparison.",
                "See left_out and finish_reason in the file. Cut: --max-new-tokens of evaluate. Errors: evaluate again, with --restart.",
            )


CHECKS = (
    *(few_samples, small_gap, low_consistency, wrong_targets, duplicates, yes_no, missing_types, left_out, truncated),
    *(training, lost_replies, no_gain),
)


def diagnose(case: Case) -> list[Finding]:
    """All findings about one cell of a run folder, the worst first. Raises InputError for a broken file."""
    found = [finding for check in CHECKS for finding in check(case)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def looked_at(case: Case) -> str:
    """The figures of a run in one line, also what is not there yet."""
    cell = case.cell
    parts = [
        f"{len(case.samples):,} images",
        f"L-VLM repeats {len(case.consistent):,} of {len(case.usable):,}",
        f"parity set {len(case.kept):,}",
    ]
    before, after = case.evaluation(cell.svlm), case.evaluation(case.model)
    if before and after:
        try:
            found = comparable.compare(before, after).summary()
            low, high = (100 * bound for bound in found["ci95"])
            parts.append(f"{100 * found['score']:+.1f} points [{low:+.1f}, {high:+.1f}], n = {found['n']:,}")
        except NotComparable:  # a finding says why
            parts.append("gain unknown")
    missing = [path.name for path in case.missing]
    if cell.svlm:
        evaluations = ((cell.svlm, before), (case.model, after))
        missing += [case.files.evaluation(model).name for model, found in evaluations if not found]
    return "; ".join(parts) + (f". Not there: {', '.join(missing)}" if missing else "")
