"""One self-contained HTML page about a completed matrix: what was found, how well it predicts, how it got there."""

import base64
import json
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from rankwise.diagnostics import page, plots
from rankwise.diagnostics.page import number
from rankwise.errors import UserError
from rankwise.files import write_text

PICTURES = {"original.png": "as given", "observed.png": "what was observed", "filled.png": "filled"}
_LARGEST_PICTURE = 20_000_000  # bytes; a browser holds three of them
_ROUTES = {
    "svd": "truncated SVD, as everything was observed",
    "weight-decay": "weight decay let go to zero: recovery",
    "evidence": "evidence: rank, shrinkage and noise from the data",
    "gradient-descent": "gradient descent from a small start",
}
# What a stage of the solver measures, in the order of preference; the first that its iterations have is drawn.
_MEASURES = {"residual": "relative residual", "noise": "noise level"}


def write_completion_report(folder: Path) -> Path:
    """Write ``report.html`` into a finished run folder of ``rankwise complete``.

    The page loads nothing from outside, runs no script, and escapes everything that comes from data, names or paths.

    Args:
        folder: holds ``config.json``, ``metrics.jsonl``, ``summary.json`` and, for a picture, ``original.png``,
            ``observed.png`` and ``filled.png``.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder is no finished run, or a file in it is damaged.
    """
    config, summary, metrics = _read(folder)
    target = folder / "report.html"
    try:
        write_text(target, _page(folder, config, summary, metrics))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is damaged or was made by another version of rankwise ({error!r})") from None
    return target


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [entry for entry in map(json.loads, lines) if "stage" in entry]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} is no finished run: it has no {Path(str(error.filename)).name}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder} holds a damaged file ({error}); run it again in a new folder") from None
    return config, summary, metrics


def _page(folder: Path, config: dict[str, Any], summary: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    name = config["inputs"]["data"]["file"]
    sections = [_facts(summary)]
    pictures = _pictures(folder)
    if pictures:
        sections.append(page.section("Before and after", pictures, _picture_note(summary)))
    sections += [
        page.section(
            "Singular values",
            _drawn("Singular values", spectrum_figure(summary["singular_values"])),
            "Of the low-rank part, without the intercepts. As many directions as the entries support.",
        ),
        page.section(
            "Convergence", _drawn("Convergence", convergence_figure(metrics)), _stages(metrics) if metrics else ""
        ),
        page.section("Settings", page.folded("all settings and versions", page.preformatted(_as_text(config)))),
    ]
    return page.page(f"{name}, completed", _verdict(name, summary), "\n".join(sections))


def _verdict(name: str, summary: dict[str, Any]) -> str:
    """The result in a few sentences, and what it is worth."""
    cells = summary["rows"] * summary["columns"]
    text = f"{summary['observed']:,} of {cells:,} entries of {name} were observed ({_percent(summary['density'])}). "
    rank = summary["rank"]
    if rank == 0:
        text += "No direction was found: row and column means predict as well. "
    else:
        text += f"{rank} direction{'s' if rank > 1 else ''} found. "
    picture = summary.get("picture") or {}
    if picture.get("psnr") is not None:
        text += f"On the {picture['hidden_pixels']:,} hidden pixels the filled picture has {picture['psnr']:.2f} dB."
    elif summary["held_out_rmse"] is None:
        text += "How well unseen entries are predicted was not measured."
    else:
        low, high = summary["held_out_interval"]
        ours, plain = summary["held_out_rmse"], summary["baseline_rmse"]
        text += (
            f"On {summary['held_out_entries']:,} entries held out of a second fit, the error (RMSE) is {ours:.4g} "
            f"({100 * summary['interval_level']:.0f}\u00a0% interval {low:.4g} to {high:.4g}), against {plain:.4g} for "
            "row and column means alone."
        )
        if ours >= plain:
            text += " The low-rank part does not help on these data."
    if not summary["converged"]:
        text += " The solver stopped before it had converged."
    return text


def _facts(summary: dict[str, Any]) -> str:
    low_high = summary["held_out_interval"] or (None, None)
    rows = [
        ["rows × columns", f"{summary['rows']:,} × {summary['columns']:,}"],
        ["observed entries", f"{summary['observed']:,} ({_percent(summary['density'])})"],
        ["rank found", f"{summary['rank']}"],
        ["solved by", _ROUTES.get(summary["route"], summary["route"])],
        ["noise around the fit (σ)", number(summary["noise"], ".4g")],
    ]
    if summary["held_out_rmse"] is not None:
        rows += [
            ["held-out error (RMSE)", number(summary["held_out_rmse"], ".4g")],
            [
                f"its {100 * summary['interval_level']:.0f}\u00a0% interval",
                " to ".join(number(bound, ".4g") for bound in low_high),
            ],
            ["error of row and column means alone", number(summary["baseline_rmse"], ".4g")],
            ["entries held out", f"{summary['held_out_entries']:,}"],
        ]
    picture = summary.get("picture")
    if picture:
        rows.append(["hidden pixels", f"{picture['hidden_pixels']:,}"])
        if picture["psnr"] is not None:
            rows.append(["peak signal to noise on hidden pixels", f"{picture['psnr']:.2f} dB"])
    for what, key in (
        ("rows without any observation", "unobserved_rows"),
        ("columns without any observation", "unobserved_columns"),
        ("repeated observations, averaged", "merged_duplicates"),
    ):
        if summary[key]:
            rows.append([what, f"{summary[key]:,}"])
    rows.append(["seconds to fit", number(summary["seconds"], ".3g")])
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in summary["notes"])
    return page.table([], rows) + notes


def spectrum_figure(singular_values: Sequence[float]) -> Figure:
    """Singular values against their number, on a logarithmic scale."""
    with matplotlib.rc_context(plots._STYLE):
        figure = Figure(figsize=(7.2, 2.8))
        axes = figure.add_subplot()
        values = np.array(singular_values, float)
        if not len(values):
            _say(axes, "no direction found")
            return figure
        places = np.arange(1, len(values) + 1)
        axes.plot(places, values, "o-", color=plots.colour(0), markersize=6, linewidth=1)
        _scale(axes, values)
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)  # cut off, values that are nearly equal would look like a steep fall
        axes.set_xlabel("direction")
        axes.set_ylabel("singular value")
        axes.set_xlim(0.5, max(len(values), 5) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def convergence_figure(metrics: Sequence[dict[str, Any]]) -> Figure:
    """A column a stage of the solver: above what it measures, below the rank, both against its iterations."""
    stages = list(dict.fromkeys(entry["stage"] for entry in metrics))
    ranked = any("rank" in entry for entry in metrics)
    with matplotlib.rc_context(plots._STYLE):
        figure = Figure(figsize=(7.2, 4.0 if ranked else 2.8))
        if not stages:
            _say(figure.add_subplot(), "solved in one step: no iterations")
            return figure
        rows = 2 if ranked else 1
        panels = figure.subplots(rows, len(stages), squeeze=False, sharex="col", height_ratios=[2, 1][:rows])
        for place, stage in enumerate(stages):
            entries = [entry for entry in metrics if entry["stage"] == stage]
            # a stage that was gone through several times, as robust fits do, is drawn as one line
            iterations = np.arange(len(entries)) if _repeats(entries) else [entry["iteration"] for entry in entries]
            tone = plots.colour(place)
            _measure(panels[0, place], stage, entries, iterations, tone)
            if ranked:
                axes = panels[1, place]
                axes.step(iterations, [entry.get("rank", np.nan) for entry in entries], where="mid", color=tone)
                axes.set_ylim(0, max([entry.get("rank", 0) for entry in metrics] + [1]) * 1.15)
                axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            panels[-1, place].set_xlabel("iteration")
            panels[-1, place].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if ranked:
            panels[1, 0].set_ylabel("rank")
    return figure


def _measure(axes: Axes, stage: str, entries: list[dict[str, Any]], iterations: Any, tone: str) -> None:
    axes.set_title(plots._short(stage, 30), fontsize=10)
    few = len(entries) < 40
    for key, label in _MEASURES.items():
        values = np.array([np.nan if entry.get(key) is None else entry[key] for entry in entries], float)
        if np.isfinite(values).any():
            axes.plot(iterations, values, "o-" if few else "-", markersize=3, color=tone, linewidth=1.5)
            axes.set_ylabel(label)
            _scale(axes, values)
            break
    held_out = np.array([np.nan if entry.get("held_out") is None else entry["held_out"] for entry in entries], float)
    if np.isfinite(held_out).any():
        beside = axes.twinx()
        beside.plot(iterations, held_out, "--", color="#444444", linewidth=1.2)
        beside.set_ylabel("held-out error (dashed)")
        beside.grid(visible=False)


def _repeats(entries: list[dict[str, Any]]) -> bool:
    iterations = [entry["iteration"] for entry in entries]
    return any(later <= earlier for earlier, later in pairwise(iterations))


def _scale(axes: Axes, values: Any) -> None:
    """Logarithmic where the values span a factor of three and none is zero."""
    finite = values[np.isfinite(values)]
    if finite.min() > 0 and finite.max() > 3 * finite.min():
        plots._log_scale(axes)
        if finite.max() < 30 * finite.min():  # powers of ten alone would leave one tick or two
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center")
    axes.set_axis_off()


def _drawn(name: str, figure: Figure) -> str:
    return page.figure(name, plots.as_svg(figure, name))


def _stages(metrics: list[dict[str, Any]]) -> str:
    """What each stage that was gone through is for."""
    meaning = {
        "path": "path: weight decay falls until the entries are fitted, or more directions are needed than they support",
        "whole path": "whole path: the same until the residual no longer falls, however many directions it takes",
        "careful path": "careful path: the path again in small steps",
        "held-out path": "held-out path: the path without the entries held out, to find where to stop",
        "evidence": "evidence: sweeps from the path's end until noise and directions settle",
        "2nd evidence": "2nd evidence: the same from the spectrum; what explains the entries better is taken",
        "resumed": "resumed: the same from the last fit",
        "descent": "descent: gradient descent on all factors",
        "held-out descent": "held-out descent: descent without the entries held out, to find where to stop",
    }
    stages = dict.fromkeys(entry["stage"] for entry in metrics)
    return "From left to right: " + "; ".join(meaning.get(stage, stage) for stage in stages) + "."


def _pictures(folder: Path) -> str:
    shown = []
    for name, caption in PICTURES.items():
        file = folder / name
        if not file.is_file():
            continue
        if file.stat().st_size > _LARGEST_PICTURE:
            shown.append(f"<p>{escape(caption)}: {name} is too large for this page</p>")
            continue
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        # holes are transparent: a tone that few pictures have shows through
        image = (
            f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}" style="width:100%;background:#d9d9d9">'
        )
        shown.append(f'<figure style="flex:1 1 15rem">{image}<figcaption>{escape(caption)}</figcaption></figure>')
    return f'<div style="display:flex;flex-wrap:wrap;gap:1rem">{"".join(shown)}</div>' if shown else ""


def _picture_note(summary: dict[str, Any]) -> str:
    picture = summary.get("picture") or {}
    if picture.get("psnr") is None:
        return "Observed pixels stay as they are; the others are filled."
    return f"Observed pixels stay as they are. Hidden ones: {picture['psnr']:.2f} dB, peak signal to noise."


def _percent(share: float) -> str:
    return f"{100 * share:.3g}\u00a0%"


def _as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)
