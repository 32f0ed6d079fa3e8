"""The report's figures, as SVG text. Colours are told apart without colour vision, and each figure has a text beside it."""

import io

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mpa.analysis.calibration import Reliability

BLUE, ORANGE, GRAY = "#0b5cad", "#c05000", "#6b6b6b"
WIDTH = 5.6  # inches; wider figures have illegible texts on a telephone
LINES = [("-", BLUE), ("--", ORANGE), (":", GRAY), ("-.", BLUE)]


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.set_layout_engine("tight")
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _axes(width: float, height: float, panels: int = 1):
    """A figure with panels of this height, two in a row."""
    rows = (panels + 1) // 2
    figure = Figure(figsize=(width, height * rows), facecolor="white")
    axes = [figure.add_subplot(rows, min(panels, 2), place + 1) for place in range(panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _whole(axis) -> None:
    """Whole numbers on this axis, written as on the rest of the page."""
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axis.set_major_formatter("{x:,.0f}")


def funnel(steps: list[tuple[str, int]], losses: list[tuple[str, int]]) -> str:
    """Bars from the images to the parity set, and hatched ones of what is not in it, by cause."""
    names, counts = zip(*steps, *((f"not kept: {cause}", n) for cause, n in losses), strict=True)
    figure, (axes,) = _axes(WIDTH, 0.5 + 0.36 * len(names))
    looks = [(BLUE, "")] * len(steps) + [("#bdbdbd", "///")] * len(losses)
    bars = axes.barh(names, counts, color=[color for color, _ in looks], hatch=[h for _, h in looks], edgecolor="white")
    axes.bar_label(bars, [f"{n:,}" for n in counts], padding=4)
    axes.set_xlim(0, 1.15 * max([1, *counts]))
    axes.invert_yaxis()
    axes.set_xlabel("images")
    _whole(axes.xaxis)
    return _svg(figure)


def results(rows: list[dict], what: str) -> str:
    """Accuracy with 95 % intervals, one line per model."""
    figure, (axes,) = _axes(WIDTH, 0.7 + 0.38 * len(rows))
    for place, row in enumerate(rows):
        value, (low, high) = 100 * row["score"], (100 * bound for bound in row["ci95"])
        color = ORANGE if row["key"] == "mpa" else BLUE
        axes.errorbar(
            value, place, xerr=[[max(0, value - low)], [max(0, high - value)]], fmt="o", color=color, capsize=4
        )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{what}, % (95 % interval)")
    axes.grid(axis="x", color="#dddddd")
    return _svg(figure)


def distributions(lengths: dict[str, list[int]], logprobs: dict[str, list[float]]) -> str | None:
    """Histograms of words per question and answer, and of log-probabilities, of kept and rejected samples. Of a figure that is
    the same for all samples its value.
    """
    panels = [("words in the question", "question"), ("words in the answer", "answer")]
    found = [(title, {name: values[key] for name, values in lengths.items()}) for title, key in panels]
    found += [("log-probability of the annotation", logprobs)]
    found = [(title, groups) for title, groups in found if any(groups.values())]
    if not found:
        return None
    figure, axes = _axes(WIDTH, 2.3, len(found))
    for panel, (title, groups) in zip(axes, found, strict=True):
        values = [v for group in groups.values() for v in group]
        whole = all(isinstance(v, int) for v in values)
        low, high = min(values), max(values)
        panel.set_xlabel(title)
        panel.set_yticks([])
        if low == high:
            panel.set_xticks([])
            panel.text(0.5, 0.5, f"{low:.4g} in all samples", ha="center", transform=panel.transAxes)
            continue
        bins = [low - 0.5 + i for i in range(int(high - low) + 2)] if whole and high - low < 40 else 24
        for group, line, color in zip(groups.values(), ("-", "--"), (ORANGE, GRAY), strict=True):
            style = {"histtype": "step", "linewidth": 1.8, "linestyle": line, "color": color}
            if group:
                panel.hist(group, bins=bins, range=(low - 0.5, high + 0.5), density=True, **style)
        if whole:
            _whole(panel.xaxis)
    return _svg(figure)


def calibration(found: list[Reliability]) -> str | None:
    """The share of right answers with 95 % intervals by their probability, a panel per model; on the diagonal both are equal."""
    if not found:
        return None
    figure, axes = _axes(WIDTH, 2.6, len(found))
    for panel, one in zip(axes, found, strict=True):
        panel.plot([0, 1], [0, 1], ":", color=GRAY)
        for b in one.bins:
            errors = [[max(0, b.right - b.ci95[0])], [max(0, b.ci95[1] - b.right)]]
            panel.errorbar(b.probability, b.right, yerr=errors, fmt="o", color=BLUE, capsize=3, markersize=4)
        panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="probability", ylabel="right")
        panel.set_title(f"{one.model[:28]}\n{one.what}", fontsize=8)
    return _svg(figure)


def training(history: list[dict]) -> str | None:
    """Loss, learning rate by group, gradient norm and throughput over the steps, as far as the trainer logged them."""
    steps = [entry for entry in history if isinstance(entry.get("loss"), int | float)]
    rates = sorted({key for entry in steps for key in entry if key == "learning_rate" or key.startswith("lr_")})
    panels = [("loss", ["loss"]), ("learning rate", rates), ("gradient norm", ["grad_norm"])]
    panels += [("samples per second", ["samples_per_second"])]
    panels = [(title, [k for k in keys if any(k in entry for entry in steps)]) for title, keys in panels]
    panels = [(title, keys) for title, keys in panels if keys]
    if len(steps) < 2 or not panels:
        return None
    figure, axes = _axes(WIDTH, 2.3, len(panels))
    for panel, (title, keys) in zip(axes, panels, strict=True):
        for key, (line, color) in zip(keys, LINES, strict=False):
            pairs = [(entry["step"], entry[key]) for entry in steps if isinstance(entry.get(key), int | float)]
            panel.plot(*zip(*pairs, strict=True), line, color=color, label=key.removeprefix("lr_"))
        panel.set_xlabel("step")
        _whole(panel.xaxis)
        panel.set_title(title, fontsize=10)
        if len(keys) > 1:
            panel.legend(frameon=False, fontsize=7)
    return _svg(figure)
