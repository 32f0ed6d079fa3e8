"""What PI asks the L-VLM beyond its answers, each in a file of its own: for the rules in use (`mpa.method.rules`), and given questions."""

from mpa.files.records import InputError
from mpa.method.rules import Rule
from mpa.stages.answering import Answers, Question
from mpa.stages.stage import AskedModel, run_files


def answers(args, how: str, questions: list[Question], **sampling) -> Answers:
    """The L-VLM's answers to `questions`, in the run's file for `how`."""
    file = run_files(args).further(how)
    return Answers(AskedModel(args, args.model_path_lvlm), file, f"PI L-VLM, {how}", "PI", questions, **sampling)


def _stage(args, rule: Rule, questions: list[Question]) -> Answers:
    asked = rule.questions(questions, run_files(args).folder)
    sampling = {"temperature": asked[0].request.temperature} if asked and asked[0].request.temperature else {}
    return answers(args, rule.asks, asked, **sampling)


def check(args, chosen: tuple[Rule, ...], questions: list[Question]) -> None:
    """Raise InputError for answers that are there with other settings. Nothing is asked."""
    for rule in chosen:
        if rule.asks and any(run_files(args).folder.glob(f"{run_files(args).further(rule.asks).stem}.*")):
            _stage(args, rule, questions).check()


def ask(args, chosen: tuple[Rule, ...], questions: list[Question], lvlm_answers: list[dict]) -> None:
    """Tell the rules what they need: all questions are asked, so that these answers are the same for all S-VLMs and matchers."""
    for rule in chosen:
        answers = _stage(args, rule, questions).ask() if rule.asks else lvlm_answers
        try:
            rule.see(answers)
        except InputError as error:
            raise InputError(f"{run_files(args).lvlm_answers}: {error}") from None


def dry_run(args, chosen: tuple[Rule, ...], questions: list[Question]) -> None:
    for rule in chosen:
        if rule.asks:
            requests = [q.request for q in _stage(args, rule, questions).questions]
            AskedModel(args, args.model_path_lvlm).dry_run(requests, f"PI L-VLM, {rule.asks}")
