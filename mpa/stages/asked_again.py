"""What PI asks beyond the paper: votes, answers without the image, the annotated answer’s probability; and given questions.

Each has its own result file in the run (`parity.asked_again_file`), and `parity.ParityRule` decides with it (docs/no-harm.md).
"""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from mpa.files import atomic, distributed, records
from mpa.files.argument_types import number
from mpa.method.parity import asked_again_file
from mpa.stages.answer_all import AllAnswers
from mpa.stages.answering import Answers, Question
from mpa.stages.stage import Model


def add_flags(p) -> None:
    p.add_argument(
        "--min-probability",
        type=number(0, 1, float),
        default=0.0,
        metavar="P",
        help="the L-VLM agrees with itself only if its answer has this probability (default: 0, as in the paper)",
    )
    p.add_argument(
        "--blind",
        action="store_true",
        help="leave out what the L-VLM answers as annotated when it sees a grey image instead; it is asked once more",
    )
    p.add_argument(
        "--votes",
        type=number(1),
        default=0,
        metavar="K",
        help="ask the L-VLM each question K times more, sampled; then these answers decide whether it agrees with itself, not "
        "the greedy one (default: 0, as in the paper)",
    )
    p.add_argument(
        "--min-agreement",
        type=number(0, 1, float),
        default=0.5,
        metavar="SHARE",
        help="with --votes: the least share of them that match the annotation (default: 0.5)",
    )
    p.add_argument(
        "--score",
        action="store_true",
        help="also store the probability that the S-VLM gives the annotated answer, scored in one pass; needs --engine hf",
    )
    p.add_argument(
        "--max-svlm-probability",
        type=number(0, 1, float),
        default=0.0,
        metavar="P",
        help="the S-VLM is wrong where it gives the annotated answer at most this probability, whatever it answers; implies "
        "--score (default: where it answers otherwise, as in the paper)",
    )
    p.add_argument(
        "--weights",
        action="store_true",
        help="soft parity: each train record has a `weight`, the share of --votes for its answer times the probability that "
        "the S-VLM does not give it; implies --score. With --anchors 100 and PL's --sample_weights there is no cut",
    )


def of_lvlm(args, how: str, questions: list[Question], **sampling) -> Answers:
    """The L-VLM's answers, in a file of their own: "votes", "blind" or "given"."""
    model = Model(args, args.model_path_lvlm)
    return Answers(model, _file(args, how), f"PI L-VLM, {how}", "PI", questions, **sampling)


def _votes(args, questions: list[Question]) -> Answers:
    return of_lvlm(args, "votes", sampled(args, questions), temperature=1.0)


def votes(args, questions: list[Question]) -> list[dict]:
    return _votes(args, questions).records({})


def stages(args, questions: list[Question]) -> list[Answers]:
    """Those whose questions are known before the L-VLM has answered, for a look at what is there."""
    found = [_votes(args, questions)] if args.votes else []
    return found + ([_blind(args, questions)] if args.blind and _grey(args).exists() else [])


def blind(args, questions: list[Question]) -> list[dict]:
    """The L-VLM's answers to the questions about a grey image."""
    grey = _grey(args)
    if distributed.FIRST and not grey.exists():
        with atomic.replacing(grey) as file:
            Image.new("RGB", (448, 448), (128, 128, 128)).save(file, "PNG")
    distributed.wait()
    return _blind(args, questions).records({})


def _blind(args, questions: list[Question]) -> Answers:
    shown = {"image_path": str(_grey(args))}
    about_grey = [replace(q, request=replace(q.request, **shown), before=q.before | shown) for q in questions]
    return of_lvlm(args, "blind", about_grey)


def _grey(args) -> Path:
    return records.run_folder(args.run) / "grey.png"


def scored(args, questions: list[Question]) -> Answers:
    """The annotated answers with the log-probabilities that the S-VLM gives them: one pass for each, without generation."""
    svlm = args.model_path_svlm
    model, file = Model(args, svlm), _file(args, f"scored-{records.short_name(svlm)}")
    return AllAnswers(model, file, "PI S-VLM, annotated answers", "PI", with_answers(questions), scored=True)


def scores(args, questions: list[Question]) -> list[dict]:
    return scored(args, questions).records({})


def with_answers(questions: list[Question]) -> list[Question]:
    return [replace(q, request=replace(q.request, answer=q.before["PA_answer"])) for q in questions]


def sampled(args, questions: list[Question]) -> list[Question]:
    """Each question as often as there are votes, with ids such as "17#3"."""
    found = []
    for q in questions:
        for vote in range(1, args.votes + 1):
            key = f"{q.request.key}#{vote}"
            request = replace(q.request, key=key, temperature=1.0, seed=args.seed)
            found.append(replace(q, request=request, before=q.before | {"question_id": key}))
    return found


def _file(args, how: str) -> Path:
    name = records.short_name(args.model_path_lvlm)
    return asked_again_file(records.run_folder(args.run), name, how, args.dataset)
