"""The figures of a report, as matplotlib figures: nothing interactive, nothing loaded from outside."""

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

# Okabe & Ito's palette: told apart by colour-blind readers and in print
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "svg.fonttype": "none",  # text stays text: selectable, searchable, small
    "text.parse_math": False,  # a dollar sign in somebody's folder name is a dollar sign
    "figure.constrained_layout.use": True,
}

Run = dict[str, Any]


def colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _short(label: str, limit: int = 36) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _log_scale(axes: Axes) -> None:
    """Logarithmic, with plain tick labels: matplotlib's own are mathematics, which is switched off here."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def scores_figure(runs: Sequence[Run]) -> Figure:
    """Held-out score before (hollow) and after (filled) training, one row a run."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.5 * len(runs)))
        axes = figure.add_subplot()
        for row, run in enumerate(runs):
            before, after = run["before"], run["after"]
            if before is None or after is None:
                axes.text(0.5, row, "undefined", transform=axes.get_yaxis_transform())
                continue
            axes.plot([before, after], [row, row], color=colour(row), linewidth=2, alpha=0.5)
            axes.plot(before, row, "o", markersize=9, markerfacecolor="white", markeredgecolor=colour(row))
            axes.plot(after, row, "o", markersize=9, color=colour(row))
            axes.annotate(f"{after:.4f}", (after, row), (0, 9), textcoords="offset points", ha="center", fontsize=9)
        axes.set_yticks(range(len(runs)), [_short(run["label"]) for run in runs])
        axes.set_ylim(len(runs) - 0.4, -0.7)
        axes.margins(x=0.15)
        axes.set_xlabel(f"held-out {runs[0]['metric']} (hollow: before training)")
        axes.grid(axis="y", visible=False)
    return figure


def loss_figure(runs: Sequence[Run]) -> Figure:
    """Training loss by step: every batch faintly, a running median on top."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.2))
        axes = figure.add_subplot()
        for index, run in enumerate(runs):
            steps, losses = np.array(run["steps"]), np.array(run["losses"])
            if len(steps) == 0:
                continue
            window = max(1, len(steps) // 20)
            smooth = [float(np.median(losses[max(0, i - window) : i + window + 1])) for i in range(len(losses))]
            axes.plot(steps, np.maximum(losses, 1e-12), color=colour(index), alpha=0.2, linewidth=0.8)
            axes.plot(steps, np.maximum(smooth, 1e-12), color=colour(index), linewidth=2, label=_short(run["label"]))
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        if axes.lines:
            _log_scale(axes)
            axes.legend(frameon=False)
        else:
            axes.text(0.5, 0.5, "no steps recorded", transform=axes.transAxes, ha="center")
    return figure


def validation_figure(runs: Sequence[Run]) -> Figure:
    """The score that early stopping looked at, by step, and the step that it went back to."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.2))
        axes = figure.add_subplot()
        for index, run in enumerate(runs):
            if not run["validation_steps"]:
                continue
            axes.plot(
                run["validation_steps"], run["validation_scores"],
                color=colour(index), marker="o", markersize=4, linewidth=2, label=_short(run["label"]),
            )  # fmt: skip
            axes.axvline(run["early_stopping"]["best_step"], color=colour(index), linestyle="--", linewidth=1)
        axes.set_xlabel("step")
        axes.set_ylabel(runs[0]["metric"])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    return figure


def spectrum_figure(runs: Sequence[Run]) -> Figure:
    """Singular values of every ΔW, one panel a run whose updates are products, one line a layer."""
    factored = [(index, run) for index, run in enumerate(runs) if run["layers"]]
    with matplotlib.rc_context(_STYLE):
        columns = min(len(factored), 3)
        rows = -(-len(factored) // columns)
        figure = Figure(figsize=(7.2, 3.2 * rows))
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for unused in panels[len(factored) :]:
            unused.set_visible(False)
        floor = 1e-9
        for axes, (index, run) in zip(panels, factored, strict=False):
            for layer in run["layers"]:
                values = np.maximum(layer["singular_values"], floor)
                axes.plot(range(1, len(values) + 1), values, color=colour(index), alpha=0.35, linewidth=1)
            _log_scale(axes)
            axes.set_title(_short(run["label"], 60 // columns), fontsize=10)
            axes.set_xlabel("singular value")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in panels[::columns]:
            axes.set_ylabel("size, one line a layer")
    return figure


def ranks_figure(runs: Sequence[Run]) -> Figure:
    """Directions that hold 99 % of ΔW's energy, layer by layer; the dashed line is the width allowed."""
    with matplotlib.rc_context(_STYLE):
        names = list(dict.fromkeys(layer["name"] for run in runs for layer in run["layers"]))
        place = {name: position for position, name in enumerate(names)}
        figure = Figure(figsize=(7.2, 3.0))
        axes = figure.add_subplot()
        bar = 0.8 / len(runs)
        for index, run in enumerate(runs):
            if not run["layers"]:
                continue
            x = [place[layer["name"]] + (index - (len(runs) - 1) / 2) * bar for layer in run["layers"]]
            axes.bar(
                x, [layer["rank_99"] for layer in run["layers"]], bar, color=colour(index), label=_short(run["label"])
            )
        widest = max(layer["width"] for run in runs for layer in run["layers"])
        axes.axhline(widest, color="#888888", linestyle="--", linewidth=1)
        axes.set_xlabel("adapted layer, input side first")
        axes.set_ylabel("directions for 99 %")
        axes.set_ylim(0, widest * 1.2)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, ncols=len(runs), loc="upper right")
        axes.grid(axis="x", visible=False)
    return figure


def sizes_figure(runs: Sequence[Run]) -> Figure:
    """Bytes of the adapter as saved and as exported to a plain LoRA."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.6 * len(runs)))
        axes = figure.add_subplot()
        for row, run in enumerate(runs):
            saved, exported = run["adapter_bytes"] / 1e6, run["exported_bytes"] / 1e6
            bars = [(exported, "as plain LoRA" if saved != exported else "", 1.0)]
            if saved != exported:
                bars.insert(0, (saved, "as trained", 0.35))
            for place, (size, what, opacity) in enumerate(bars):
                y = row + 0.38 * (place - (len(bars) - 1) / 2)
                axes.barh(y, size, 0.34, color=colour(row), alpha=opacity)
                axes.text(size, y, f" {size:.2f} MB {what}", va="center", fontsize=9)
        axes.set_yticks(range(len(runs)), [_short(run["label"]) for run in runs])
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.set_xlabel("adapter file, MB")
        axes.grid(axis="y", visible=False)
    return figure


# --- several methods on several tasks: the figures of a comparison ---------------------------------------------------

# A series: "label", and "emphasis": the number of its colour, or None for one that only stands by, in grey.
Series = dict[str, Any]
_GREY = "#8a8a8a"
_MARKERS = ("s", "^", "v", "D", "P", "X", "<", ">")


def gains_figure(rows: Sequence[dict[str, Any]], label: str) -> Figure:
    """Forest plot: mean difference and its interval, one row a setting, with the numbers beside it.

    Args:
        rows: ``name``, ``mean``, ``interval`` (pair or None), ``texts`` (up to three, set at the right), ``pooled`` (drawn as a
            diamond below a line) and ``other`` (mean against another opponent, drawn hollow; or None).
        label: what the horizontal axis says.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 1.0 + 0.27 * len(rows)))
        axes = figure.add_subplot()
        axes.axvline(0, color="#444444", linewidth=1)
        for place, row in enumerate(rows):
            tone = colour(1) if row["pooled"] else colour(0)
            if row["interval"] is not None:
                axes.plot(row["interval"], [place, place], color=tone, linewidth=2, alpha=0.6, solid_capstyle="butt")
            if row["other"] is not None:
                axes.plot(row["other"], place, "o", markersize=5, markerfacecolor="white", markeredgecolor=_GREY)
            axes.plot(row["mean"], place, "D" if row["pooled"] else "o", markersize=6, color=tone)
            for x, text in zip((6, 52, 96), row["texts"], strict=False):
                where: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
                axes.annotate(text, (1, place), (x, 0), va="center", fontsize=8.5, **where)
        pooled = sum(row["pooled"] for row in rows)
        if 0 < pooled < len(rows):
            axes.axhline(len(rows) - pooled - 0.5, color="#bbbbbb", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [_short(row["name"], 30) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_signed))
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    return figure


def scores_by_labels_figure(panels: Sequence[dict[str, Any]], series: Sequence[Series]) -> Figure:
    """Score against the number of labels: a small panel a task, a line a method, its interval as a bar.

    Args:
        panels: ``title`` and ``lines``: series' label → list of ``{"shots", "mean", "interval"}``.
        series: in the order of the legend; one with ``reference`` true is drawn dashed and without bars.
    """
    with matplotlib.rc_context(_STYLE):
        columns = 2 if len(panels) == 4 else min(3, len(panels))  # no panel alone in a row
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(7.2, 0.7 + 2.5 * rows))
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for unused in grid[len(panels) :]:
            unused.set_visible(False)
        for axes, panel in zip(grid, panels, strict=False):
            for index, one in enumerate(series):
                _curve(axes, panel["lines"].get(one["label"], []), one, "shots", _spread(index, series))
            _counts_axis(axes, [point["shots"] for points in panel["lines"].values() for point in points])
            axes.set_title(_short(panel["title"], 60 // columns), fontsize=10)
        for place, axes in enumerate(grid[: len(panels)]):
            if place + columns >= len(panels):
                axes.set_xlabel("labels")
        _legend_below(figure, grid[: len(panels)])
    return figure


def harm_figure(panels: Sequence[dict[str, Any]], series: Sequence[Series]) -> Figure:
    """Difference from the unadapted model: a panel a number of labels, a row a method, a cross for its worst task.

    Args:
        panels: ``title`` and ``points``: series' label → ``{"mean", "interval", "worst"}``.
        series: in the order of the rows.
    """
    with matplotlib.rc_context(_STYLE):
        columns = min(4, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(7.2, rows * (0.9 + 0.26 * len(series))))
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for unused in grid[len(panels) :]:
            unused.set_visible(False)
        for axes, panel in zip(grid, panels, strict=False):
            axes.axvline(0, color="#444444", linewidth=1)
            for place, one in enumerate(series):
                point = panel["points"].get(one["label"])
                if point is None:
                    continue
                tone = _tone(one)
                axes.plot(point["worst"], place, "x", color=tone, markersize=5)
                if point["interval"] is not None:
                    axes.plot(point["interval"], [place, place], color=tone, linewidth=2, alpha=0.6)
                axes.plot(point["mean"], place, "o", color=tone, markersize=6)
            axes.set_title(_short(panel["title"], 60 // columns), fontsize=10)
            axes.xaxis.set_major_locator(MaxNLocator(3 if columns > 2 else 5))
            axes.xaxis.set_major_formatter(FuncFormatter(_signed))
            axes.tick_params(axis="x", labelsize=8)
            axes.grid(axis="y", visible=False)
        for axes in grid[::columns]:
            axes.set_yticks(range(len(series)), [_short(one["label"], 24) for one in series])
            axes.set_ylim(len(series) - 0.4, -0.6)
        figure.supxlabel("score minus that of the unadapted model (cross: worst task)", fontsize=10)
    return figure


def found_ranks_figure(panels: Sequence[dict[str, Any]], widest: int) -> Figure:
    """Share of the updates that have each numerical rank, a panel a method; ranks above ``widest`` share one bar.

    Args:
        panels: a series with ``counts``: rank → number of updates.
        widest: the last rank with a bar of its own.
    """
    with matplotlib.rc_context(_STYLE):
        columns = min(4, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(7.2, 0.5 + 1.7 * rows))
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for unused in grid[len(panels) :]:
            unused.set_visible(False)
        step = max(1, -(-widest // 4))
        ticks = list(range(0, widest + 1, step))
        names = [str(tick) for tick in ticks]
        overflow = widest + max(2, step)  # a gap says that the axis is broken there
        beyond = any(rank > widest for panel in panels for rank in panel["counts"])
        if beyond:
            ticks, names = [*ticks, overflow], [*names, f">{widest}"]
        for place, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
            total = sum(panel["counts"].values())
            shares = np.zeros(overflow + 1)
            for rank, count in panel["counts"].items():
                shares[rank if rank <= widest else overflow] += 100 * count / total
            axes.bar(range(len(shares)), shares, 0.85, color=_tone(panel))
            axes.set_title(_short(panel["label"], 80 // columns), fontsize=10)
            axes.set_xticks(ticks, names)
            axes.set_xlim(-0.7, (overflow if beyond else widest) + 0.7)
            axes.tick_params(axis="x", labelsize=8.5, labelbottom=place + columns >= len(panels))
            axes.grid(axis="x", visible=False)
        for axes in grid[: len(panels) : columns]:
            axes.set_ylabel("% of updates")
        figure.supxlabel("numerical rank of the update of a layer", fontsize=10)
    return figure


def score_against_rank_figure(lines: Sequence[Series]) -> Figure:
    """Mean score against ``r``, a line a method: flat where the rank need not be chosen.

    Args:
        lines: series with ``points``: a list of ``{"r", "mean", "interval"}``.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.2))
        axes = figure.add_subplot()
        for index, line in enumerate(lines):
            _curve(axes, line["points"], line, "r", _spread(index, lines))
        _counts_axis(axes, [point["r"] for line in lines for point in line["points"]])
        axes.set_xlabel("r, the rank allowed")
        axes.set_ylabel("mean score")
        axes.legend(frameon=False)
    return figure


def _tone(series: Series) -> str:
    return _GREY if series["emphasis"] is None else colour(series["emphasis"])


def _spread(index: int, series: Sequence[Series]) -> float:
    """Factor that sets coloured series with the same abscissa beside each other on a logarithmic axis."""
    coloured = [place for place, one in enumerate(series) if one["emphasis"] is not None]
    return float(1.06 ** (coloured.index(index) - (len(coloured) - 1) / 2)) if index in coloured else 1.0


def _curve(axes: Axes, points: Sequence[dict[str, Any]], series: Series, abscissa: str, spread: float) -> None:
    if not points:
        return
    tone, standing_by = _tone(series), series["emphasis"] is None
    y = [point["mean"] for point in points]
    if series.get("reference"):
        dashed: dict[str, Any] = {
            "color": "#222222",
            "linestyle": "--",
            "linewidth": 1.2,
            "label": _short(series["label"]),
        }
        if len(points) == 1:  # a line through one point is seen nowhere
            axes.axhline(y[0], **dashed)
        else:
            axes.plot([point[abscissa] for point in points], y, **dashed)
        return
    x = [point[abscissa] * spread for point in points]
    marker = _MARKERS[series["marker"] % len(_MARKERS)] if standing_by else "o"
    width = 0.9 if standing_by else 1.8
    order = 2 if standing_by else 3  # the methods in question lie on top
    axes.plot(
        x, y, color=tone, linewidth=width, marker=marker, markersize=4, label=_short(series["label"]), zorder=order
    )
    for place, point in zip(x, points, strict=True):
        if point["interval"] is not None and not standing_by:
            axes.plot([place, place], point["interval"], color=tone, linewidth=1.2, alpha=0.7, zorder=order)


def _counts_axis(axes: Axes, values: Sequence[int]) -> None:
    """Logarithmic to base 2, with a tick at every value that occurs (at every second one where they crowd)."""
    axes.set_xscale("log", base=2)
    ticks = sorted(set(values))
    axes.set_xticks(ticks[:: 1 + len(ticks) // 7], [f"{tick:,}" for tick in ticks[:: 1 + len(ticks) // 7]])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    if ticks:
        margin = 1.5 if len(ticks) > 1 else 4
        axes.set_xlim(ticks[0] / margin, ticks[-1] * margin)


def _legend_below(figure: Figure, panels: Iterable[Axes]) -> None:
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=min(4, len(handles)), frameon=False
        )


def _signed(value: float, _: int) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:+.3g}"


def as_svg(figure: Figure, title: str) -> str:
    """The figure as an inline <svg> element with an accessible name; scales with the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        # text goes out as text and the browser brings the fonts: what matplotlib's own font lacks does not matter
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")  # a crowded figure is still drawn
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # width and height in points would fix the size; the viewBox alone lets CSS decide
    return re.sub(r'<svg ([^>]*?)width="[^"]*" ([^>]*?)>', r'<svg role="img" \1\2>', svg, count=1).replace(
        ' height="', ' data-height="', 1
    )
