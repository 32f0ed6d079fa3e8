"""What PI asks the L-VLM beyond its answers, each in a file of its own: for the rules in use (`mpa.method.rules`), and given questions."""

import os
from pathlib import Path

from mpa.files.records import InputError
from mpa.method.rules import Rule
from mpa.stages.answering import Answers, Question
from mpa.stages.stage import AskedModel, run_files


def answers(args, how: str, questions: list[Question], **sampling) -> Answers:
    """The L-VLM's answers to `questions`, in the run's file for `how`."""
    file = run_files(args).further(how)
    return Answers(AskedModel(args, args.model_path_lvlm), file, f"PI L-VLM, {how}", "PI", questions, **sampling)


def _questions(args, rule: Rule, questions: list[Question]) -> tuple[list[Question], bool]:
    """(what the rule asks further, whether all images that it is about are there yet)."""
    asked = rule.questions(questions, run_files(args).folder)
    return asked, all(map(os.path.exists, {q.request.image_path for q in asked}))


def _stage(args, rule: Rule, asked: list[Question]) -> Answers:
    sampling = {"temperature": asked[0].request.temperature} if asked and asked[0].request.temperature else {}
    return answers(args, rule.asks, asked, **sampling)


def check(args, chosen: tuple[Rule, ...], questions: list[Question]) -> None:
    """Raise InputError for answers that are there with other settings. Nothing is asked, and nothing written."""
    for rule in chosen:
        if rule.asks:
            asked, images_there = _questions(args, rule, questions)
            _stage(args, rule, asked).check(content=images_there)


def ask(args, chosen: tuple[Rule, ...], questions: list[Question], lvlm_answers: list[dict]) -> None:
    """Tell the rules what they need: all questions are asked, so that these answers are the same for all S-VLMs and matchers.

    Those that ask nothing come first: what they refuse is not paid for.
    """
    tell(chosen, lvlm_answers, run_files(args).lvlm_answers)
    for rule in chosen:
        if rule.asks:
            rule.prepare(run_files(args).folder)
            rule.see(_stage(args, rule, _questions(args, rule, questions)[0]).ask())


def tell(chosen: tuple[Rule, ...], lvlm_answers: list[dict], file: Path) -> None:
    """Tell the rules that ask nothing the L-VLM's answers, which are in `file`. Raises InputError if they lack what a rule needs."""
    try:
        for rule in chosen:
            if not rule.asks:
                rule.see(lvlm_answers)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def dry_run(args, chosen: tuple[Rule, ...], questions: list[Question]) -> None:
    """As `AskedModel.dry_run`; where a rule's images are still to be made, with those of the questions."""
    for rule in chosen:
        if rule.asks:
            asked, images_there = _questions(args, rule, questions)
            requests = [q.request for q in (asked if images_there else questions)]
            AskedModel(args, args.model_path_lvlm).dry_run(requests, f"PI L-VLM, {rule.asks}")
