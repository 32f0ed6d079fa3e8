"""What an experiment would run: `bash scripts/reproduce.sh FILE --plan`. Loads no model.

Requests come from the annotation files; before `data/prepare.py` has made these, from the numbers that it expects. Hours come
from the seconds of results in the same folder, else from `--dry-run` figures (`… FILE pace`), else they are left open. Memory
is estimated from config.json for 16-bit weights, without activations; that of a hub model must be in the Hugging Face cache
(`hf download MODEL config.json`), unless HF_HUB_OFFLINE=0.
"""

import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experiments.definition import Experiment, Model, read
from experiments.flags import stage_arguments
from mpa.data import DATASETS
from mpa.data.loading import load_samples
from mpa.files import records
from mpa.files.printable import as_size
from mpa.files.records import REPOSITORY, InputError
from mpa.method import rules
from mpa.runs.layout import Cell, RunFiles, may_be_train, train_meta
from mpa.stages import cli

NOT_KNOWN = "–"


@dataclass(frozen=True)
class Work:
    """What one job asks of a model: requests, or train samples of PL, as often as it runs (`times`). None: not known."""

    stage: str
    model: str
    dataset: str
    requests: int | None
    times: int


@cache
def samples(dataset: str, split: str, flags: tuple[str, ...], stage: str, official: bool) -> int | None:
    """The number of samples that a stage takes; None if neither the file nor, for `official` data, an expected number is there."""
    args = stage_arguments(stage, ("--dataset", dataset, *flags))
    try:
        n = len(load_samples(dataset, split, args.annotations, args.image_root, images=False))
    except InputError:
        preparation = DATASETS[dataset].preparation if official else None
        expected = preparation.expected if preparation else {}
        n = expected.get(Path(getattr(DATASETS[dataset], split).annotations).name, (None,))[0]
    limit = args.limit or args.sample
    return n if n is None or not limit else min(n, limit)


def sizes(e: Experiment, dataset: str) -> tuple[int | None, int | None]:
    """Train images of PA, and test questions."""
    official = e.data is None  # an experiment's own data have other numbers than the official ones
    images = samples(dataset, "train", e.flags.PA, "PA", official)
    return images, samples(dataset, "test", e.flags.evaluate, "evaluate", official)


def beyond_paper(args, images: int | None) -> tuple[int | None, int | None]:
    """(PI's further requests to the L-VLM, the guard's questions to an S-VLM) of a run with PI's `args`, at most. None: not known."""
    again = sum(rule.per_question for rule in rules.of(rules.settings_of(args)))
    given = args.max_held_out_questions if args.held_out_questions else 0
    if images is None:
        return (None if again else given), (given or None if args.hold_out else 0)
    return again * images + given, given or round(args.hold_out * images)


def works_beyond_paper(e: Experiment, dataset: str, images: int | None, shared: bool) -> list[Work]:
    """What PI's rules ask, and the guard's questions before and after PL; in runs or, not `shared`, in cells."""
    found = []
    lvlms = e.lvlms if shared else [lvlm for lvlm, _ in e.pairs]
    for preset in e.presets:
        args = stage_arguments("PI", ("--dataset", dataset, "--preset", preset, *e.flags.PI))
        again, held_out = beyond_paper(args, images)
        cells = [seed for of, seed, _ in e.trainings if of == preset]
        runs = len(e.seeds) if shared else len(cells)
        found += [Work("PI", lvlm, dataset, again, runs) for lvlm in lvlms]
        for _, svlm in e.pairs:
            found.append(Work("evaluate", svlm, dataset, held_out, runs + len(cells)))
    return [work for work in found if work.times and work.requests != 0]


def works(e: Experiment) -> list[Work]:
    """All jobs that ask a model, with what is shared counted once."""
    found, runs, trained = [], len(e.presets) * len(e.seeds), len(e.trainings)
    for dataset in e.datasets:
        images, questions = sizes(e, dataset)
        found += [Work("PA", lvlm, dataset, images, runs) for lvlm in e.lvlms]
        found += [Work("evaluate", model, dataset, questions, len(e.presets)) for model in e.lvlms | e.svlms]
        for _, svlm in e.pairs:
            found.append(Work("PI", svlm, dataset, images, runs))
            found.append(Work("PL", svlm, dataset, images, trained))
            of = len(e.datasets) if e.transfer else 1  # those trained on each dataset
            found.append(Work("evaluate", svlm, dataset, questions, trained * of))
        found += works_beyond_paper(e, dataset, images, shared=True)
    return found


def alone(e: Experiment) -> list[Work]:
    """The jobs of all cells if each ran alone: PA, PI, PL, and three models evaluated."""
    found, n = [], len(e.trainings)
    for dataset in e.datasets:
        images, questions = sizes(e, dataset)
        for lvlm, svlm in e.pairs:
            found += [Work("PA", lvlm, dataset, images, n), Work("PI", svlm, dataset, images, n)]
            found += [Work("PL", svlm, dataset, images, n), Work("evaluate", lvlm, dataset, questions, n)]
            found.append(Work("evaluate", svlm, dataset, questions, 2 * n))
        found += works_beyond_paper(e, dataset, images, shared=False)
    return found


def requests(of: list[Work]) -> int:
    """All requests to models. Unknown numbers count as 0."""
    return sum((work.requests or 0) * work.times for work in of if work.stage != "PL")


def hours(results: Path, of: list[Work]) -> float | None:
    """The models' hours, by the pace of results or of --dry-run; None if a number or a pace is not known."""
    paces = {work: seconds_each(results, work) for work in of if work.requests is not None}
    if not paces or len(paces) < len(set(of)) or None in paces.values():
        return None
    return sum(paces[work] * work.requests * work.times for work in of) / 3600


# --- time and memory -------------------------------------------------------------------------------------


def seconds_each(results: Path, work: Work) -> float | None:
    """Seconds of a request or train sample, from results of this model and dataset, else from a --dry-run."""
    seconds = n = 0
    of_lvlm = RunFiles(Path("*"), Cell(work.dataset, work.model))
    of_svlm = RunFiles(Path("*"), Cell(work.dataset, "*", work.model))
    metas = {
        "PA": records.meta_path(of_lvlm.pa),
        "PI": records.meta_path(of_svlm.svlm_answers),
        "evaluate": records.meta_path(of_lvlm.evaluation(work.model)),
        "PL": train_meta(Path(f"{of_svlm.levelled()}*")),
    }
    for path in results.glob(str(metas[work.stage])):
        if work.stage == "PL" or not may_be_train(path.name.replace(".meta", "")):
            meta = json.loads(path.read_text())
            seconds, n = seconds + meta["seconds"], n + (meta.get("n") or meta.get("samples") or 0)
    if n:
        return seconds / n
    asked = "PA" if work.stage == "PA" else "evaluate"  # PI's questions are like those of evaluate
    tried = results / f"pace/{asked}_{work.model}_{work.dataset}.txt"
    lines = tried.read_text().splitlines() if work.stage != "PL" and tried.exists() else []
    told = [json.loads(line) for line in lines if line.startswith("{")]
    return told[-1]["seconds"] / told[-1]["requests"] if told else None


@cache
def memory(model: Model, stage: str, zero: str, gpus: int) -> str:
    """ "weights 15.2 GB" or, for PL, "states 35.4 GB"; NOT_KNOWN without a config.json that transformers can build."""
    if not model.local:
        return "on a server"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from mpa.models.memory_estimate import Sharding, meta_model, states, weight_bytes

    built = meta_model(model.path)
    if built is None:
        return NOT_KNOWN
    if stage != "PL":
        return as_size(weight_bytes(built, 2))
    offload = "offload" in zero
    held = states(built, 2, Sharding(int(zero[4]), gpus, offload, offload and zero[4] == "3"))
    return f"{as_size(sum(n for name, n in held.items() if name != 'offloaded'))} on each of {gpus}"


# --- the text --------------------------------------------------------------------------------------------


def number(n: int | None) -> str:
    return NOT_KNOWN if n is None else f"{n:,}"


def row(e: Experiment, results: Path, stage: str, model: Model, of_model: list[Work]) -> str:
    """A line of the table: requests, hours and memory of one model in one stage."""
    known = [work for work in of_model if work.requests is not None]
    n, time = sum(work.requests * work.times for work in known), hours(results, of_model)
    most = "≤ " if stage in ("PI", "PL") else ""
    held = memory(model, stage, e.settings.ZERO or "zero2", e.gpus_of(stage, model))
    count = (most + number(n)) if known else NOT_KNOWN
    jobs, told = sum(w.times for w in of_model), NOT_KNOWN if time is None else f"{time:.2f}"
    return f"  {stage:<10}{model.name:<32}{jobs:>6}{count:>14}{told:>9}   {held}"


def plan(e: Experiment, results: Path) -> list[str]:
    cells = len(e.datasets) * len(e.pairs) * len(e.trainings)
    some = ", some variants with fewer" if any(v.seeds for v in e.variants.values()) else ""
    lines = [
        f"{cells} cells = {len(e.datasets)} datasets × {len(e.pairs)} pairs of L-VLM and S-VLM × "
        f"{len(e.variants)} variants × {len(e.presets)} presets × {len(e.seeds)} seeds{some}",
        f"  variants: {', '.join(e.variants)}",
    ]
    found, unknown = works(e), set()
    for dataset in e.datasets:
        images, questions = sizes(e, dataset)
        lines.append(f"  {dataset}: {number(images)} train images, {number(questions)} test questions")
        unknown |= {dataset} if None in (images, questions) else set()
    lines += ["", f"  {'stage':<10}{'model':<32}{'jobs':>6}{'requests':>14}{'hours':>9}   GPU memory"]
    by_job = defaultdict(list)
    for work in found:
        by_job[work.stage, work.model].append(work)
    models = e.lvlms | e.svlms
    for (stage, name), of_model in sorted(by_job.items(), key=lambda job: "PA PI PL evaluate".split().index(job[0][0])):
        lines.append(row(e, results, stage, models[name], of_model))
    asked, of_cells = requests(found), alone(e)
    lines += [
        "  PI asks the L-VLM nothing if PA has its answers, but for rules and --held-out-questions. PI's requests and PL's",
        "  samples are upper bounds. With held-out images, evaluate includes the guard's questions before and after PL.",
        "  GPU memory: 16-bit weights; in PL also gradients and optimizer state. Activations come on top.",
        "",
    ]
    if asked:
        each = requests(of_cells)
        lines.append(
            f"Sharing: {asked:,} requests instead of {each:,}, if each cell ran alone: {each / asked:.1f} times fewer."
        )
    here, there = hours(results, found), hours(results, of_cells)
    if here and there:
        lines.append(f"Sharing: {here:.2f} hours of the models instead of {there:.2f}: {there / here:.1f} times fewer.")
    if unknown:
        maker = e.data and e.data.made_by
        first = os.path.relpath(maker[0], REPOSITORY) if maker else "data/prepare.py"
        lines.append(f"Not counted, as the numbers are not known before {first}: {', '.join(sorted(unknown))}.")
    return lines


def main() -> None:
    experiment = read(sys.argv[1])
    if experiment.data:
        os.environ["MPA_DATA"] = str(experiment.data.folder)
    results = Path(sys.argv[2]).absolute()
    os.chdir(REPOSITORY)  # torch does not load in a folder that is gone
    print(f"{Path(sys.argv[1]).stem}: " + "\n".join(plan(experiment, results)))


if __name__ == "__main__":
    cli.run(main)
