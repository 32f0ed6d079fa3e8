"""A table of results as Markdown, LaTeX (package booktabs) or CSV."""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from mpa.files.printable import printable
from mpa.runs.layout import Cell


@dataclass(frozen=True)
class Figure:
    """A number, with its standard deviation over seeds where there are several."""

    value: float
    sd: float | None = None
    digits: int = 1
    sign: bool = False

    def __str__(self) -> str:
        spread = "" if self.sd is None else f" ± {self.sd:,.{self.digits}f}"
        return f"{self.value:{'+' if self.sign else ''},.{self.digits}f}{spread}"


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float
    sign: bool = False
    digits: int = 1

    def __str__(self) -> str:
        low, high = (f"{bound:{'+' if self.sign else ''}.{self.digits}f}" for bound in (self.low, self.high))
        return f"{low} to {high}"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float
    digits: int = 1
    sign: bool = False

    def __str__(self) -> str:
        return f"{Figure(self.value, None, self.digits, self.sign)} ({Interval(self.low, self.high, self.sign, self.digits)})"


NAMES = {"dataset": str, "L-VLM": str, "S-VLM": str}  # the first columns of many tables


def names(cell: Cell) -> dict[str, str]:
    return dict(zip(NAMES, cell, strict=True))


CSV_NAMES = {Figure: ("", " sd"), Interval: (" low", " high"), Estimate: ("", " low", " high")}


@dataclass
class Table:
    """`columns` is {name: type of its cells}: str; float, a Figure without deviation; Figure; Interval; or Estimate. Any cell
    may also be a text. A row is {column: cell}; what is not there is empty.

    `notes` are about the whole table. A row's own notes are its item "notes", a list of texts.
    """

    name: str
    title: str
    columns: dict[str, type]
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def with_notes(self) -> tuple[list[str], list[list[str]], list[str]]:
        """(columns, cells as text, footnotes): the rows' notes are numbered, and equal ones have one number."""
        footnotes = list(dict.fromkeys(note for row in self.rows for note in row.get("notes", ())))
        names = [*self.columns, *(["note"] if footnotes else [])]
        lines = []
        for row in self.rows:
            cells = [
                f"{c:,}" if isinstance(c, int) else "" if c is None else str(c) for c in map(row.get, self.columns)
            ]
            numbers = [str(footnotes.index(note) + 1) for note in row.get("notes", ())]
            lines.append(cells + ([", ".join(numbers)] if footnotes else []))
        return names, lines, [f"{i}: {note}" for i, note in enumerate(footnotes, 1)]


def markdown(table: Table) -> str:
    def line(cells) -> str:
        return (
            "| "
            + " | ".join(
                printable(re.sub(r"\s+", " ", cell)).replace("|", "\\|").replace("<", "&lt;") for cell in cells
            )
            + " |"
        )

    names, lines, footnotes = table.with_notes()
    rule = ["---:" if table.columns.get(name, str) is not str else "---" for name in names]
    parts = [f"**{table.title}**", "", line(names), line(rule), *map(line, lines)]
    return "\n".join([*parts, "", *(f"- {note}" for note in table.notes + footnotes)]).rstrip() + "\n"


_LATEX = {c: rf"\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_LATEX |= {
    "±": r"$\pm$",
    "×": r"$\times$",
    "→": r"$\rightarrow$",
    "κ": r"$\kappa$",
    "–": "--",
    "−": "$-$",
    "≥": r"$\geq$",
}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "\n": " ", "\r": " "}


def latex(table: Table) -> str:
    def text(cell: str) -> str:
        return re.sub(r"(?<![\w.])([+-])(?=\d)", r"$\1$", "".join(_LATEX.get(c, c) for c in cell))

    def line(cells) -> str:
        return "    " + " & ".join(map(text, cells)) + r" \\"

    names, lines, footnotes = table.with_notes()
    form = "".join("r" if table.columns.get(name, str) is not str else "l" for name in names)
    parts = [r"\begin{table}", r"  \centering", rf"  \caption{{{text(table.title)}}}", rf"  \label{{tab:{table.name}}}"]
    parts += [rf"  \begin{{tabular}}{{{form}}}", r"    \toprule", line(names), r"    \midrule", *map(line, lines)]
    parts += [r"    \bottomrule", r"  \end{tabular}"]
    parts += [rf"  \par\footnotesize {text(note)}" for note in table.notes + footnotes]
    return "\n".join([*parts, r"\end{table}"]) + "\n"


def comma_separated(table: Table) -> str:
    """One header line and one line for each row. A Figure has two columns, its value and its standard deviation; an
    Interval its two bounds; an Estimate all three. The last column has the row's notes; the table's are lines that begin
    with #.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header = [name + end for name, kind in table.columns.items() for end in CSV_NAMES.get(kind, ("",))]
    writer.writerow([*header, "notes"])
    for row in table.rows:
        cells = []
        for name, kind in table.columns.items():
            cells += _csv_cells(row.get(name), kind)
        writer.writerow([*cells, " ".join(row.get("notes", ()))])
    about = [f"# {line}" for line in (table.title, *table.notes)]
    return "\n".join(about) + "\n" + file.getvalue()


def _csv_cells(cell, kind: type) -> list:
    """The cells of one column, as many as its names in CSV."""
    if isinstance(cell, Figure):
        numbers = [cell.value, *([cell.sd] if kind is Figure else [])]
    elif isinstance(cell, Interval | Estimate):
        numbers = [*([cell.value] if kind is Estimate else []), cell.low, cell.high]
    else:
        return ["" if cell is None else cell, *[""] * (len(CSV_NAMES.get(kind, ("",))) - 1)]
    return ["" if number is None else f"{round(number, 4):.12g}" for number in numbers]


FORMATS: dict[str, Callable[[Table], str]] = {"md": markdown, "latex": latex, "csv": comma_separated}
