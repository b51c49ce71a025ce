"""The figures of a report, as matplotlib figures: nothing interactive, nothing loaded from outside."""

import io
import re
import warnings
from collections.abc import Sequence
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


def spectrum_figure(runs: Sequence[Run]) -> Figure:
    """Singular values of every ΔW, one panel a run, one line a layer."""
    with matplotlib.rc_context(_STYLE):
        columns = min(len(runs), 3)
        rows = -(-len(runs) // columns)
        figure = Figure(figsize=(7.2, 3.2 * rows))
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for unused in panels[len(runs) :]:
            unused.set_visible(False)
        floor = 1e-9
        for index, (axes, run) in enumerate(zip(panels, runs, strict=False)):
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
            bars = [(exported, "as plain LoRA", 1.0)]
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
