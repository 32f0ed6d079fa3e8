"""Scores of a result file: every metric side by side, the dataset's headline first, each with n and an interval."""

from collections import Counter, defaultdict

from mpa.answers.finish_reasons import why_cut
from mpa.answers.metrics import METRICS, bootstrap_interval, few_answers
from mpa.data import DATASETS
from mpa.method.presets import PRESETS


def metric_names(dataset: str, preset: str = "paper") -> list[str]:
    """All metrics in the order of the table: the headline, the others of this dataset's field, the rest."""
    first = filter(None, (PRESETS[preset].headline,))
    names = dict.fromkeys((*first, *DATASETS[dataset].metrics, *METRICS))
    if "vqa" not in DATASETS[dataset].metrics:  # its questions have fewer answers than FULL_MARKS
        del names["vqa"], names["textvqa"]
    return list(names)


def answers_of(record: dict) -> list[str]:
    """A test question's answers. Files of the released code hold only the most common one: as if all ten had given it."""
    return record.get("answers") or [record["GT_answer"]] * 10


def few_answers_of(records: list[dict], dataset: str) -> str:
    """`metrics.few_answers` of an Eval file's records, for a dataset that is scored by `vqa` or `textvqa`; else ""."""
    return few_answers(list(map(answers_of, records))) if "vqa" in DATASETS[dataset].metrics else ""


def values(records: list[dict], metric: str, field: str = "answers") -> list[float]:
    """Each record's score, 0 to 1. A question without a prediction counts as wrong."""
    of = METRICS[metric]
    found = []
    for r in records:
        answers = answers_of(r) if field == "answers" else r[field]
        found.append(0.0 if r["predictions"] is None else of(r["predictions"], answers))
    return found


def unusable(record: dict) -> str:
    """Why an Eval record holds no usable reply: "error" (no reply, or a left-out one) or "cut" (by the token limit or a filter); ""
    if it does.

    Such a question says nothing about what the model knows: no comparison counts it. In the accuracy of one model it stays.
    """
    if record["predictions"] is None or record.get("left_out"):
        return "error"
    return "cut" if why_cut(record.get("finish_reason")) else ""


def lost(records: list[dict]) -> str:
    """ "errors, counted as wrong: 3 of 40 replies; cut off or filtered: 1", or "" if all replies are usable."""
    found = Counter(map(unusable, records))
    parts = {"errors, counted as wrong": found["error"], "cut off or filtered": found["cut"]}
    return "; ".join(f"{what}: {n} of {len(records)} replies" for what, n in parts.items() if n)


def summary(scores: list[float]) -> dict:
    """{"score", "ci95", "n"}: mean, its 95 % bootstrap interval and the number of questions."""
    mean = sum(scores) / len(scores) if scores else float("nan")
    return {"score": mean, "ci95": bootstrap_interval(scores), "n": len(scores)}


def score(records: list[dict], dataset: str, preset: str = "paper") -> dict:
    """{row: summary}, the headline first; `records` are an Eval file's.

    Rows are the metrics; after the headline come its parts, where questions have a `type` (ChartQA:
    human, augmented), and the same metric on `raw_answers` (OK-VQA, whose `answers` are stemmed).
    """
    names = metric_names(dataset, preset)
    headline = values(records, names[0])
    rows = {names[0]: summary(headline)}
    by_type = defaultdict(list)
    for record, value in zip(records, headline, strict=True):
        by_type[record.get("type")].append(value)
    if len(by_type) > 1:
        rows |= {f"{names[0]}, {kind}": summary(found) for kind, found in sorted(by_type.items(), key=str)}
    if all(r.get("raw_answers") for r in records):
        rows[f"{names[0]}, raw answers"] = summary(values(records, names[0], "raw_answers"))
    return rows | {name: summary(values(records, name)) for name in names[1:]}


def changed(pairs: list[tuple[dict, dict]], args, n: int = 5) -> list[str]:
    """Of the records (before, after) of each question: the first n that are answered better, and worse, by the headline, as text;
    with --verbose all.
    """
    metric, lines = metric_names(args.dataset, args.preset)[0], []
    scored = [(pair, *(values([r], metric)[0] for r in pair)) for pair in pairs]
    for word, found in (
        ("better", [pair for pair, was, now in scored if now > was]),
        ("worse", [pair for pair, was, now in scored if now < was]),
    ):
        for old, new in found if args.verbose else found[:n]:
            answers = ", ".join(dict.fromkeys(answers_of(new)))
            replies = f"{old['predictions']} → {new['predictions']}"
            lines.append(f"    {word}: {new['question_id']}: {new['GT_question']} ({answers}) {replies}")
        if len(found) > n and not args.verbose:
            lines.append(f"    {len(found) - n} more are {word}; -v lists all.")
    return lines


def shown(tables: list[dict], dataset: str) -> list[str]:
    """The rows to show of one or several tables: the headline, its parts, and the dataset's other metrics that differ from it."""
    headline, *others = tables[0]

    def differs(name: str) -> bool:
        return any(rows[name] != rows[headline] for rows in tables)

    own = [name for name in others if name.startswith(f"{headline},") or name in DATASETS[dataset].metrics]
    return [headline, *filter(differs, own)]


def _bounds(row: dict, sign: str = "") -> str:
    low, high = (f"{100 * bound:{sign}.1f}" for bound in row["ci95"])
    return f"95 % interval {low} to {high}"


def _score_line(name: str, row: dict) -> str:
    return f"  {name:<24}{100 * row['score']:6.1f} %   {_bounds(row)}   n = {row['n']}"


def _gain_line(name: str, row: dict) -> str:
    counts = f"better on {row['better']}, worse on {row['worse']} of {row['n']}"
    counts += f" questions about {row['images']} images" if row["images"] < row["n"] else ""
    return f"  {name:<24}{100 * row['score']:+6.1f} points   {_bounds(row, '+')}   {counts}"


def _lines(rows: dict, dataset: str, line) -> list[str]:
    """A line for each row of `shown`, and one for all others."""
    headline, *names = shown([rows], dataset)
    lines = [f"{line(headline, rows[headline])}  ← headline", *(line(name, rows[name]) for name in names)]
    others = [name for name in rows if name not in (headline, *names)]
    equal = [name for name in others if rows[name] == rows[headline]]
    sign = "+" if "better" in rows[headline] else ""
    different = [f"{name} {100 * rows[name]['score']:{sign}.1f}" for name in others if name not in equal]
    notes = [f"equal to the headline: {', '.join(equal)}"] if equal else []
    notes += [f"other metrics: {', '.join(different)}"] if different else []
    return lines + ([f"  ({'; '.join(notes)})"] if notes else [])


def table(rows: dict, dataset: str) -> list[str]:
    """The rows of `score` as text, in percent; see `shown`."""
    return _lines(rows, dataset, _score_line)


def comparison(rows: dict, dataset: str) -> list[str]:
    """The rows of `comparable.Pairs.by_metric` as text, in points; see `shown`."""
    return _lines(rows, dataset, _gain_line)


def side_by_side(scores: dict[str, dict], dataset: str) -> list[str]:
    """{model: rows of `score`} as one table, in percent: a line per model, the columns of `shown`."""
    names = shown(list(scores.values()), dataset)
    width = max(map(len, scores))
    lines = [f"  {'':<{width}}" + "".join(f"  {name}" for name in names)]
    for model, rows in scores.items():
        cells = (f"  {100 * rows[name]['score']:>{len(name)}.1f}" for name in names)
        lines.append(f"  {model:<{width}}" + "".join(cells))
    return lines
