"""A worse L-VLM without another model: replace some of its answers of one type, and select the parity set again.

    python scripts/corrupt.py --dataset textVQA --train-json results/RUN/PI_…_train_….json --lvlm-json PI_…7B….json \\
        --svlm-json PI_…2B….json --type number --share 0.3 --out corrupted.json

Reads  the parity set with its meta file, and the answers of both models. PI must have run with --answer-all, so that the
       S-VLM's answers to all questions are there. Experiments call it: `corrupt` in experiments/README.md.
Writes --out, another parity set, and its meta file: how many corrupted and other samples PI kept.

At the share, annotations of the type get a wrong answer of that type, for one right answer always the same, as a model that
does not know better. With --where both the L-VLM repeats the wrong answer, so PI cannot see it; with --where annotation it
does not. The S-VLM's answers stay: they do not depend on the annotation's answer.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.answers.answer_types import ANSWER_TYPES, answer_type
from mpa.answers.matching import Match
from mpa.answers.normalise import normalise
from mpa.data import DATASETS
from mpa.files import log_file, outputs, records
from mpa.files.argument_types import number
from mpa.files.records import InputError
from mpa.method.rules.rule import Selection
from mpa.method.verdict import PARITY
from mpa.runs.judging import annotation_of, judge_of
from mpa.runs.layout import Cell, RunFiles
from mpa.stages import cli
from mpa.stages.train_set import train_records


def wrong_answers(answers: list[str], rng: random.Random) -> dict[str, str]:
    """{normalised answer: a wrong one}: for each distinct answer the next in a random order."""
    spelling = {}
    for answer in answers:
        spelling.setdefault(normalise(answer), answer)
    order = sorted(spelling)
    rng.shuffle(order)
    following = [spelling[answer] for answer in [*order[1:], *order[:1]]]
    return dict(zip(order, following, strict=True)) if len(order) > 1 else {}


def corrupted(lvlm: list[dict], match: Match, kind: str, share: float, where: str, task: str, seed: int) -> dict:
    """{id: the L-VLM's record with a wrong annotation} for `share` of the annotations of this type, rounded.

    Where the L-VLM disagreed with itself before, it still does.
    """
    of_type = [r for r in lvlm if answer_type(r["PA_answer"], task) == kind]
    wrong = wrong_answers([r["PA_answer"] for r in of_type], random.Random(seed))
    if not wrong:
        raise InputError(f"No two annotations with different answers of the type {kind!r}; choose another --type.")
    chosen = random.Random(seed).sample(of_type, round(share * len(of_type)))
    changed = {}
    for r in chosen:
        answer = wrong[normalise(r["PA_answer"])]
        said = {"predictions": answer} if where == "both" and match(r["predictions"], r["PA_answer"]) else {}
        changed[str(r["question_id"])] = r | {"PA_answer": answer} | said
    return changed


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train-json", type=Path, required=True, metavar="FILE", help="the parity set")
    p.add_argument("--lvlm-json", type=Path, required=True, metavar="FILE", help="the L-VLM's answers")
    p.add_argument("--svlm-json", type=Path, required=True, metavar="FILE", help="the S-VLM's answers to all questions")
    p.add_argument("--dataset", choices=DATASETS, required=True, help="whose answers these are")
    p.add_argument("--type", choices=ANSWER_TYPES, required=True, help="which answers to replace")
    p.add_argument("--share", type=number(0, 1, float), required=True, help="the share of them, from 0 to 1")
    p.add_argument("--where", choices=("both", "annotation"), default="both", help="see above (default: both)")
    p.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the parity set to write")
    return p.parse_args(argv)


def main(argv=None) -> None:
    args = arguments(argv)
    outputs.refuse_others(args.out, "corrupt", outputs.inputs_of(args))
    base = records.read_json(records.meta_path(args.train_json))
    lvlm, svlm = (records.read_records(file, "PI") for file in (args.lvlm_json, args.svlm_json))
    if len(svlm) < len(lvlm):
        raise InputError(
            f"{args.svlm_json}: answers {len(svlm)} of {len(lvlm)} questions. Run PI.sh with --answer-all first."
        )
    names = [records.short_name(base.get(f"model_path_{who}", "")) for who in ("lvlm", "svlm")]
    cell = Cell(args.dataset, *names)
    judge = judge_of(
        base["settings"] | {"anchors": "none"}, RunFiles(args.lvlm_json.parent, cell)
    )  # it writes no anchors
    wrong = corrupted(lvlm, judge.match, args.type, args.share, args.where, DATASETS[args.dataset].task, args.seed)
    lvlm = [wrong.get(str(r["question_id"]), r) for r in lvlm]
    svlm = [
        r | ({"PA_answer": wrong[key]["PA_answer"]} if (key := str(r["question_id"])) in wrong else {}) for r in svlm
    ]
    of_svlm = {str(r["question_id"]): r for r in svlm}
    verdicts = {(key := str(r["question_id"])): judge(annotation_of(r), r, of_svlm.get(key)) for r in lvlm}
    consistent = {key for key, verdict in verdicts.items() if verdict.consistent}
    kept = [of_svlm[key] for key, verdict in verdicts.items() if verdict.reason == PARITY]
    parity = train_records(Selection(kept, []), base["settings"]["preset"])
    kept = {str(r["id"]) for r in parity}
    others = [str(r["question_id"]) for r in lvlm if str(r["question_id"]) not in wrong]
    survived = {
        name: {"n": len(ids), "consistent": len(consistent & set(ids)), "parity": len(kept & set(ids))}
        for name, ids in (("corrupted", list(wrong)), ("others", others))
    }
    settings = {name: getattr(args, name) for name in ("type", "share", "where", "seed")}
    chosen_by = {name: value for name, value in base["settings"].items() if name != "anchors"}  # it writes none
    funnel = {"L-consistent": len(consistent), "parity": len(parity)}
    same = ("model_path_lvlm", "model_path_svlm", "min_pixels", "max_pixels", "max_tiles")
    models = {name: base[name] for name in same if name in base}
    log_file.open_log(args.out.parent / "log.txt")
    records.write_result(
        args.out, parity, chosen_by | {"corrupt": settings}, funnel=funnel, survived=survived, **models
    )
    for name, of in survived.items():
        print(f"{name}: {of['n']} annotations → {of['consistent']} L-consistent → {of['parity']} parity")
    print(f"Wrote {args.out}: {len(parity)} samples.")


if __name__ == "__main__":
    cli.run(main)
