"""Write the report: HTML pages of cells, an index of several, and thumbnails."""

import base64
import hashlib
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from tqdm import tqdm

from mpa.analysis.check_tables import calibration_table
from mpa.analysis.report import figures, thumbnails
from mpa.analysis.report.content import CellContent, compared
from mpa.analysis.report.texts import as_json, plain, redacted, without_folders
from mpa.analysis.table_formats import Estimate, Figure, Interval, Table
from mpa.files import records
from mpa.runs.case import inspected

HERE = Path(__file__).parent
INSPECTED = 50  # kept, and rejected, samples of the inspection view
FLIPS = 20  # shown of each pair
MADE_BY = "Made by scripts/report.py"  # in the footer: a page with it may be overwritten


def policy(script: str, style: str, single_file: bool) -> str:
    """Nothing but this page's own script and style, and images."""
    hashes = [
        "'sha256-" + base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() + "'" for t in (script, style)
    ]
    images = "data:" if single_file else "'self' data: file:"
    return f"default-src 'none'; script-src {hashes[0]}; style-src {hashes[1]}; img-src {images}; base-uri 'none'; form-action 'none'"


def shown_table(table: Table, links: list[str] | None = None) -> dict:
    """A table for the template. `links` are the pages that its rows lead to."""
    names, lines, footnotes = table.with_notes()
    numbers = [table.columns.get(name, str) is not str for name in names]
    lines = [[number(c) if n else c for c, n in zip(map(plain, line), numbers, strict=True)] for line in lines]
    notes = list(map(plain, [*table.notes, *footnotes]))
    shown = {"title": plain(table.title), "names": names, "lines": lines, "numbers": numbers}
    return shown | {"notes": notes, "links": links or [""] * len(lines)}


def number(cell: str) -> str:
    """A number as it stands in a table; its interval is never broken into two lines."""
    return cell.replace(" to ", "\u00a0to\u00a0") or "–"


def percent(found: dict, sign: bool = False) -> Estimate:
    """A score and its interval, in percent or points."""
    return Estimate(100 * found["score"], *(100 * bound for bound in found["ci95"]), sign=sign)


def shown_figure(svg: str | None, caption: str, alt: str) -> dict | None:
    if svg is None:
        return None
    return {
        "uri": "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(),
        "caption": caption,
        "alt": alt,
    }


def results_table(content: CellContent) -> Table:
    columns = {"model": str, "train samples": float, f"{content.what}, %": Estimate, "n": float}
    table, rows, gain = Table("results", f"Results: {content.what}", columns), content.results(), content.gain()
    for row in rows:
        cells = (row["name"], row["samples"], percent(row), row["n"])
        table.rows.append(dict(zip(columns, cells, strict=True)))
    table.notes = [f"{row['name']}: {row['lost']}." for row in rows if row["lost"]]
    if gain:
        found = percent(gain, sign=True)
        told = f"{Figure(found.value, sign=True)} points, 95 % interval {Interval(found.low, found.high, sign=True)}"
        table.notes += [f"Gain of {content.method}: {told}, n = {gain['n']:,}.", *gain["notes"]]
    return table


def stages_table(content: CellContent) -> Table | None:
    """Time and cost by stage; None if neither is recorded."""
    rows = [{"stage": stage, "seconds": Figure(n, digits=0)} for stage, n in content.seconds().items()]
    costs = [{"stage": stage, "cost": Figure(cost, digits=2)} for stage, cost in content.costs().items()]
    columns = {"stage": str, "seconds": Figure} | ({"cost": Figure} if costs else {})
    note = "Cost: by --price-in and --price-out, of all datasets and models of this run."
    table = Table("stages", "Time and cost by stage", columns, rows + costs, [note] if costs else [])
    return table if table.rows else None


def repeats_table(content: CellContent) -> Table:
    columns = ("samples", "distinct questions", "distinct questions with answer", "distinct images")
    rows = [{"set": name} | dict(zip(columns, counts, strict=True)) for name, counts in content.repeats()]
    return Table("repeats", "Duplicates", {"set": str} | dict.fromkeys(columns, float), rows)


def frequent_tables(content: CellContent) -> list[Table]:
    titles = {"question": "Most frequent questions", "annotation": "Most frequent answers"}
    return [
        Table(name, titles[name], {name: str, "times": float}, [{name: text, "times": n} for text, n in found])
        for name, found in content.most_frequent().items()
    ]


def shown_cell(content: CellContent) -> dict:
    steps, rows = content.funnel(), content.results()
    lengths, logprobs = content.distributions()
    losses = content.losses()
    told = ", ".join(f"{name} {n:,}" for name, n in steps + [(f"not kept, {cause}", n) for cause, n in losses])
    plot = figures.results(rows, content.what) if rows else None
    shown = {
        "title": plain(content.title),
        "missing": list(map(plain, content.missing)),
        "funnel": shown_figure(
            figures.funnel(steps, losses),
            "From images to the parity set (blue), and what is not in it.",
            f"Funnel: {told}",
        ),
        "reasons": (reasons := content.reasons()) and shown_table(reasons),
        "plot": shown_figure(
            plot, f"{content.what.capitalize()} with 95 % intervals.", "The numbers of the next table."
        ),
        "results": shown_table(results_table(content)),
        "stages": (stages := stages_table(content)) and shown_table(stages),
        "facts": [(name, plain(value)) for name, value in content.facts()],
        "coverage": [shown_table(table) for table in content.coverage()],
        "distributions": shown_figure(
            figures.distributions(lengths, logprobs),
            "Kept (solid) and rejected (dashed) samples.",
            "Histograms of words per question and answer, and of log-probabilities, of kept and rejected samples.",
        ),
        "calibration": shown_figure(
            figures.calibration(content.calibration),
            "Answers by their probability: how many are right, with 95 % intervals. On the dotted line both are equal.",
            "Reliability diagrams: the numbers of the table beside them by ten bins.",
        ),
        "calibration_table": shown_table(calibration_table(content.cell, content.calibration)),
        "repeats": shown_table(repeats_table(content)),
        "frequent": [shown_table(table) for table in frequent_tables(content)],
        "training": shown_figure(
            figures.training(content.history()),
            "The trainer's own log.",
            "Loss, learning rate by group, gradient norm and samples per second by step.",
        ),
        "training_facts": content.training_facts(),
        "findings": content.findings,
    }
    # What the parts above could not read or compare.
    return shown | {"broken": list(map(plain, content.broken)), "differing": list(map(plain, content.differing))}


def compare_section(contents: list[CellContent]) -> list[dict]:
    """Paired differences of trained S-VLMs, and the questions that flipped: a table for all that have one thing in common."""
    columns = {"first": str, "second": str, "second minus first, points": Estimate}
    columns |= dict.fromkeys(("n", "only second right", "only first right"), float)
    tables, flips = {}, {}
    for pair in compared(contents):
        table = tables.setdefault(pair["of"], Table("differences", f"Paired differences: {pair['of']}", columns))
        better, n = sum(c.kind == "fixed" for c in pair["flips"]), len(pair["flips"])
        cells = (pair["first"], pair["second"], percent(pair["change"], sign=True), pair["change"]["n"])
        table.rows.append(dict(zip(columns, (*cells, better, n - better), strict=True)))
        table.notes += pair["notes"]
        if n:
            title = plain(f"{pair['first']} → {pair['second']}")
            flips.setdefault(pair["of"], []).append({"title": title, "table": shown_table(flips_table(pair))})
    return [{"table": shown_table(table), "flips": flips.get(of, [])} for of, table in tables.items()]


def flips_table(pair: dict) -> Table:
    columns, found = dict.fromkeys(("question", "right answer", "first", "second"), str), pair["flips"]
    table = Table("flips", "Questions that flipped", columns)
    for c in found[:FLIPS]:
        cells = (c.question, ", ".join(dict.fromkeys(c.answers)), c.before, c.after)
        table.rows.append(dict(zip(columns, cells, strict=True)))
    table.notes = [f"The first {FLIPS} of {len(found):,}."] if len(found) > FLIPS else []
    return table


def inspection(content: CellContent) -> list[int]:
    """The places of the samples of the inspection view."""
    samples = content.case.samples
    places = {s.question_id: i for i, s in enumerate(samples)}
    return [places[s.question_id] for s in inspected(samples, INSPECTED, seed=0)]


def gallery(
    contents: list[CellContent], thumbs: Path, single_file: bool, image_root: str | None = None, redact: bool = False
) -> tuple[dict, dict[str, bool]]:
    """The page's data: {"cells": [{"samples", "inspected"}], "images": [{"src", or "why" and "path", "name"}]}.

    `name` is a file's name, which the gallery's search finds; of the folders only the note on a missing image tells.
    Also {image: whether it is shown}.
    """
    of_cells = [content.records() for content in contents]
    wanted = {}
    for content, found in zip(contents, of_cells, strict=True):
        roots = thumbnails.roots_of(content.cell.dataset, image_root)
        for sample in found:
            wanted.setdefault(sample["image"], []).extend(roots)
    made = thumbnails.make(wanted, thumbs)
    images, places = [], {}
    for path, (name, why) in made.items():
        places[path] = len(images)
        entry = {"name": Path(path or "").name[-300:]}
        if name is None:
            entry |= (
                {"why": without_folders(why), "path": entry["name"]}
                if redact
                else {"why": why, "path": str(path)[-300:]}
            )
        else:
            entry["src"] = thumbnails.data_uri(thumbs / name) if single_file else f"{thumbs.name}/{name}"
        images.append(entry)
    cells = []
    for content, found in zip(contents, of_cells, strict=True):
        for sample in found:
            sample["image"] = places[sample["image"]]
        cells.append({"samples": found, "inspected": inspection(content)})
    return {"cells": cells, "images": images}, {path: name is not None for path, (name, _) in made.items()}


def ours(file: Path) -> bool:
    """Whether a file is a page of this module."""
    return MADE_BY.encode() in file.read_bytes()


def render(template: str, single_file: bool, contents: list[CellContent], broken: list[str], **values) -> str:
    """A page with its policy, style, title and footer. `broken`: why other cells are not in it."""
    script, style = ((HERE / name).read_text() for name in ("page.js", "page.css"))
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    title = plain(", ".join(dict.fromkeys(content.folder.name for content in contents)))
    fixed = {"style": Markup(style), "script": Markup(script), "policy": policy(script, style, single_file)}
    footer = f"{MADE_BY}, commit {records.made_by()['commit']}."
    return environment.get_template(template).render(
        title=title, footer=footer, broken=list(map(plain, broken)), **fixed, **values
    )


def write(
    contents: list[CellContent],
    out: Path,
    thumbs: Path,
    index: str = "",
    single_file: bool = False,
    broken: list[str] | tuple = (),
    **how,
) -> dict[str, bool]:
    """Write one page of these cells to `out`; without `single_file`, its thumbnails lie in `thumbs`, beside it.

    `index` links to the page of all runs. `how`: image_root, and redact. Returns {image: whether it is shown}.
    """
    data, shown = gallery(contents, thumbs, single_file=single_file, **how)
    compare = compare_section(contents)  # first, as a cell tells what could not be compared
    cells = [shown_cell(content) for content in contents]
    if how.get("redact"):
        images, cells, compare = data["images"], redacted(cells), redacted(compare)
        data, broken = {"cells": redacted(data["cells"]), "images": images}, redacted(list(broken))
    values = {"data": Markup(as_json(data)), "cells": cells, "compare": compare, "index": index}
    records.write_text(out, render("page.html.j2", single_file, contents, broken, **values))
    return shown


def write_folder(contents: list[CellContent], folder: Path, broken: list[str], **how) -> dict[str, bool]:
    """A page for each cell, and index.html; of one cell index.html alone. The thumbnails are shared.

    Pages of cells that are no longer there are removed. Returns {image: whether it is shown}.
    """
    thumbs, pages, shown = folder / "thumbnails", [], {}
    if len(contents) == 1:
        shown = write(contents, folder / "index.html", thumbs, broken=broken, **how)
        _remove_others(folder, pages)
        return shown
    for content in tqdm(contents, desc="pages", disable=None):
        name = f"{records.digest(str(content.folder.resolve()), *content.cell)}.html"
        shown |= write([content], folder / name, thumbs, index="index.html", **how)
        pages.append(name)
    compare = compare_section(contents)
    differing = list(dict.fromkeys(plain(why) for content in contents for why in content.differing))
    if how.get("redact"):
        compare, broken, differing = redacted(compare), redacted(broken), redacted(differing)
    values = {"runs": shown_table(runs_table(contents), pages), "compare": compare, "differing": differing}
    records.write_text(folder / "index.html", render("index.html.j2", False, contents, broken, **values))
    _remove_others(folder, pages)
    return shown


def _remove_others(folder: Path, pages: list[str]) -> None:
    for path in folder.glob("*.html"):
        if path.name not in {"index.html", *pages} and re.fullmatch(r"[0-9a-f]+", path.stem):
            path.unlink()


def runs_table(contents: list[CellContent]) -> Table:
    """The index: a row for each cell."""
    columns = {"run": str, "before, %": Figure, "after, %": Figure, "gain, points": Estimate, "n": float}
    columns |= {"parity set": float, "images": float, "findings": str}
    table = Table("runs", "Results", columns)
    for content in contents:
        scores, gain = {row["key"]: Figure(100 * row["score"]) for row in content.results()}, content.gain()
        found = ", ".join(f"{f.level}: {f.name}" for f in content.findings if f.level != "note") or "none"
        paired = (percent(gain, sign=True), gain["n"]) if gain else (None, None)
        counts = (len(content.case.kept), len(content.case.samples))
        cells = (content.title, scores.get("base"), scores.get("mpa"), *paired, *counts, found)
        table.rows.append(dict(zip(columns, cells, strict=True)))
    table.notes = ["Before, after: the dataset's main metric; for images without labels, agreement with the L-VLM."]
    return table
