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
from mpa.analysis.table_formats import Table
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


def shown_table(table: Table) -> dict:
    names, lines, footnotes = table.with_notes()
    notes = [*table.notes, *footnotes]
    return {"title": table.title, "names": names, "lines": [list(map(plain, line)) for line in lines], "notes": notes}


def shown_figure(svg: str | None, caption: str, alt: str) -> dict | None:
    if svg is None:
        return None
    return {
        "uri": "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(),
        "caption": caption,
        "alt": alt,
    }


def results_table(content: CellContent) -> dict:
    lines = []
    for row in content.results():
        low, high = (100 * bound for bound in row["ci95"])
        samples = "–" if row["samples"] is None else f"{row['samples']:,}"
        lines.append(
            [row["name"], samples, f"{100 * row['accuracy']:.1f} %", f"{low:.1f} to {high:.1f}", f"{row['n']:,}"]
        )
    notes, gain = [f"{row['name']}: {row['lost']}." for row in content.results() if row["lost"]], content.gain()
    if gain:
        low, high = (100 * bound for bound in gain["ci95"])
        notes.append(
            f"Gain of {content.method}: {100 * gain['score']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, n = {gain['n']:,}."
        )
        notes += gain["notes"]
    names = ["model", "train samples", content.what, "95 % interval", "n"]
    return {"title": f"Results: {content.what}", "names": names, "lines": lines, "notes": notes}


def stages_table(content: CellContent) -> dict | None:
    """Time and cost by stage; None if neither is recorded."""
    lines = [[stage, f"{seconds:,.0f} s", ""] for stage, seconds in content.seconds().items()]
    lines += [[stage, "", f"{cost:,.2f}"] for stage, cost in content.costs().items()]
    if not lines:
        return None
    notes = ["Cost: by --price-in and --price-out, of all datasets and models of this run."] if content.costs() else []
    names = ["stage", "time", "cost"] if content.costs() else ["stage", "time"]
    return {
        "title": "Time and cost by stage",
        "names": names,
        "lines": [line[: len(names)] for line in lines],
        "notes": notes,
    }


def repeats_table(content: CellContent) -> dict:
    lines = [[name, *(f"{n:,}" for n in counts)] for name, counts in content.repeats()]
    names = ["", "samples", "distinct questions", "distinct questions with answer", "distinct images"]
    return {"title": "Duplicates", "names": names, "lines": lines, "notes": []}


def agreement_table(content: CellContent) -> dict:
    lines = [[name, *(f"{n:,}" for n in counts)] for name, counts in content.agreement().items()]
    title = "Agreement of both models with the annotation"
    return {"title": title, "names": ["", "S-VLM right", "S-VLM wrong", "S-VLM not asked"], "lines": lines, "notes": []}


def frequent_tables(content: CellContent) -> list[dict]:
    return [
        {
            "title": f"Most frequent {'questions' if name == 'question' else 'answers'}",
            "names": [name, "times"],
            "lines": [[plain(text), str(n)] for text, n in found],
            "notes": [],
        }
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
        "results": results_table(content),
        "stages": stages_table(content),
        "facts": [(name, plain(value)) for name, value in content.facts()],
        "coverage": [shown_table(table) for table in content.coverage()],
        "agreement": agreement_table(content),
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
        "repeats": repeats_table(content),
        "frequent": frequent_tables(content),
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


def compare_section(contents: list[CellContent]) -> dict | None:
    """Paired differences of trained S-VLMs, and the questions that flipped."""
    pairs = compared(contents)
    if not pairs:
        return None
    lines, flips = [], []
    for pair in pairs:
        low, high = (100 * bound for bound in pair["change"]["ci95"])
        value = f"{100 * pair['change']['score']:+.1f}"
        better = sum(c.kind == "fixed" for c in pair["flips"])
        row = [pair["first"], pair["second"], value, f"{low:+.1f} to {high:+.1f}", str(pair["change"]["n"])]
        lines.append(list(map(plain, [*row, better, len(pair["flips"]) - better])))
        rows = [[c.question, ", ".join(dict.fromkeys(c.answers)), c.before, c.after] for c in pair["flips"][:FLIPS]]
        table = {"title": "Questions that flipped", "names": ["question", "right answer", "first", "second"]}
        table |= {"lines": [list(map(plain, row)) for row in rows], "notes": []}
        if len(pair["flips"]) > FLIPS:
            table["notes"] = [f"The first {FLIPS} of {len(pair['flips'])}."]
        if rows:
            flips.append({"title": plain(f"{pair['first']} → {pair['second']}"), "table": table})
    names = [
        "first",
        "second",
        "second minus first, points",
        "95 % interval",
        "n",
        "only second right",
        "only first right",
    ]
    notes = [plain(note) for pair in pairs for note in pair["notes"]]
    return {"table": {"title": "Paired differences", "names": names, "lines": lines, "notes": notes}, "flips": flips}


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
    thumbs, rows, shown = folder / "thumbnails", [], {}
    if len(contents) == 1:
        shown = write(contents, folder / "index.html", thumbs, broken=broken, **how)
        _remove_others(folder, rows)
        return shown
    for content in tqdm(contents, desc="pages", disable=None):
        name = f"{records.digest(str(content.folder.resolve()), *content.cell)}.html"
        shown |= write([content], folder / name, thumbs, index="index.html", **how)
        rows.append({"page": name, "title": plain(content.title), "cells": _summary(content)})
    names = ["run", "images", "parity set", "before", "after", "gain, points", "95 % interval", "n", "findings"]
    note = "Before, after: the dataset's main metric; for images without labels, agreement with the L-VLM."
    compare = compare_section(contents)
    differing = list(dict.fromkeys(plain(why) for content in contents for why in content.differing))
    if how.get("redact"):
        compare, broken, differing = redacted(compare), redacted(broken), redacted(differing)
    values = {"rows": rows, "names": names, "note": note, "compare": compare, "differing": differing}
    records.write_text(folder / "index.html", render("index.html.j2", False, contents, broken, **values))
    _remove_others(folder, rows)
    return shown


def _remove_others(folder: Path, rows: list[dict]) -> None:
    for path in folder.glob("*.html"):
        if path.name not in {"index.html", *(row["page"] for row in rows)} and re.fullmatch(r"[0-9a-f]+", path.stem):
            path.unlink()


def _summary(content: CellContent) -> list[str]:
    """A row of the index."""
    by_key, gain = {row["key"]: f"{100 * row['accuracy']:.1f}\u00a0%" for row in content.results()}, content.gain()
    paired = ["–", "–", "–"]
    if gain:
        low, high = (100 * bound for bound in gain["ci95"])
        paired = [f"{100 * gain['score']:+.1f}", f"{low:+.1f} to {high:+.1f}", f"{gain['n']:,}"]
    counts = [f"{len(content.case.samples):,}", f"{len(content.case.kept):,}"]
    found = ", ".join(f"{f.level}: {f.name}" for f in content.findings if f.level != "note")
    return [*counts, by_key.get("base", "–"), by_key.get("mpa", "–"), *paired, found or "none"]
