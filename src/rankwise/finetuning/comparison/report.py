"""The page of a comparison study: one self-contained HTML file, readable at any point of the study."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.diagnostics import page
from rankwise.errors import UserError
from rankwise.files import write_text
from rankwise.finetuning.comparison.rows import (
    UNADAPTED,
    Row,
    method_label,
)
from rankwise.finetuning.comparison.summary import find_comparison, interval_text, main_comparison, short_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLE = "Which adapter wins?"
_DASH = "–"
# what rankwise.spectral.numerical_rank does by default; a study that counts otherwise says so in settings["rank_rule"]
_RANK_RULE = (
    "singular values above ε · max(rows, columns) · the largest one, with ε the rounding unit of the precision they are "
    "computed in"
)


def write_comparison_report(
    folder: Path, settings: dict[str, Any], rows: Iterable[Row], summary: dict[str, Any]
) -> Path:
    """Write ``report.html`` into ``folder``, whole or not at all; an existing one is replaced.

    The page loads nothing from outside, runs no script, and escapes everything that comes from data, names or settings.

    Args:
        folder: of the study; made where missing.
        settings: shown as they are, at the end of the page; ``rank_rule``, where there, says in words how ranks were
            counted.
        rows: the rows that ``summary`` was made of.
        summary: of :func:`rankwise.finetuning.comparison.summary.summarize`.

    Returns:
        The path of the page.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from rankwise.diagnostics import plots  # noqa: F401  # asked for here, where nothing is written yet
    except ImportError as error:
        raise UserError(f"reports need matplotlib ({error}): pip install 'rankwise[report]'") from None
    parts = [
        _gains(summary),
        _against_each(summary),
        _scores(summary),
        _harm(summary),
        _ranks(summary, settings),
        _score_against_rank(summary),
        _learning_rates(summary),
        _resources(summary),
        _rows_so_far(summary, list(rows)),
        _failures(summary),
        _settings(settings),
    ]
    target = Path(folder) / "report.html"
    write_text(target, page.page(_TITLE, summary["headline"], "\n".join(part for part in parts if part)))
    return target


def _drawn(name: str, note: str, figure: "Figure", more: str = "") -> str:
    from rankwise.diagnostics import plots

    return page.section(name, page.figure(name, plots.as_svg(figure, name)) + more, note)


def _series(summary: dict[str, Any], methods: Iterable[str]) -> list[dict[str, Any]]:
    """The target and its baselines in colour, everything else in grey with a marker of its own."""
    coloured = [summary["target"], *summary["baselines"]]
    grey = [method for method in summary["methods"] if method not in coloured and method != UNADAPTED]
    return [
        {
            "method": method,
            "label": method_label(method),
            "emphasis": coloured.index(method) if method in coloured[:5] else None,
            "marker": grey.index(method) if method in grey else 0,
            "reference": method == UNADAPTED,
        }
        for method in methods
    ]


def _ordered(summary: dict[str, Any], present: Iterable[str]) -> list[str]:
    """Target first, then its baselines, then the rest; the unadapted model last."""
    first = [summary["target"], *summary["baselines"]]
    there = dict.fromkeys(present)
    rest = [method for method in [*summary["methods"], *there] if method not in first and method != UNADAPTED]
    rest = list(dict.fromkeys(rest))
    return [method for method in [*first, *rest, UNADAPTED] if method in there]


def _setting(task: str, shots: int) -> str:
    return f"{task}, {shots:,} labels"


# --- who wins --------------------------------------------------------------------------------------------------------


def _gains(summary: dict[str, Any]) -> str:
    from rankwise.diagnostics import plots

    comparison = main_comparison(summary)
    if comparison is None:
        return ""
    strict = find_comparison(summary, "strict-best") if comparison["kind"] == "tuned-best" else None
    others = {(cell["task"], cell["shots"]): cell["mean"] for cell in strict["cells"]} if strict else {}
    rows = [
        {
            "name": _setting(cell["task"], cell["shots"]),
            "mean": cell["mean"],
            "interval": cell["interval"],
            "texts": [f"{cell['mean']:+.4f}", _record(cell), method_label(cell["baseline"])],
            "pooled": False,
            "other": others.get((cell["task"], cell["shots"])),
        }
        for cell in comparison["cells"]
    ]
    overall = comparison["overall"]
    if len(rows) > 1:
        rows.append(_pooled_row("all together", overall["mean"], overall["interval"], overall, strict))
        if overall["new_task_interval"] is not None:
            new = overall["new_task_mean"], overall["new_task_interval"]
            rows.append(_pooled_row("on a new task", *new, None, None))
    target = method_label(summary["target"])
    note = (
        f"Score of {target} minus that of {comparison['label']}, on the same labels and seeds; bars: 95 % bootstrap "
        "intervals of the mean. At the right: mean, pairs won/tied/lost, opponent. "
    )
    if strict:
        note += "Hollow: against whichever turned out best on the result itself, which flatters the baseline. "
    if overall["cells_left_out"]:
        note += f"Settings with one pair that do not count in the mean: {overall['cells_left_out']}. "
    if overall["new_task_interval"] is not None:
        note += (
            "“All together” holds for these tasks (seeds resampled inside each setting); “on a new task” resamples the "
            "tasks as a whole. "
        )
    note += "No interval covers the chance in the finite evaluation split."
    figure = plots.gains_figure(rows, f"gain of {target} in score")
    head = ["task, labels", "against", "pairs", target, "baseline", "gain", "± s.e.", "95 % interval", "won/tied/lost"]
    table = page.table([*head, "Wilcoxon p"], [_gain_cells(cell) for cell in comparison["cells"]])
    return _drawn("Gain in every setting", note, figure, page.folded("The numbers", table))


def _pooled_row(
    name: str,
    mean: float,
    interval: Sequence[float] | None,
    record: dict[str, Any] | None,
    strict: dict[str, Any] | None,
) -> dict[str, Any]:
    texts = [f"{mean:+.4f}", "" if record is None else _record(record)]
    other = strict["overall"]["mean"] if strict else None
    return {"name": name, "mean": mean, "interval": interval, "texts": texts, "pooled": True, "other": other}


def _gain_cells(cell: dict[str, Any]) -> list[str]:
    return [
        _setting(cell["task"], cell["shots"]),
        method_label(cell["baseline"]),
        str(cell["pairs"]),
        f"{cell['method_mean']:.4f}",
        f"{cell['baseline_mean']:.4f}",
        f"{cell['mean']:+.4f}",
        _or_dash(cell["standard_error"], ".4f"),
        *_gain_tail(cell),
    ]


def _gain_tail(gain: dict[str, Any]) -> list[str]:
    return [_interval(gain["interval"]), _record(gain), _or_dash(gain["wilcoxon_p"], ".3g")]


def _record(gain: dict[str, Any]) -> str:
    return f"{gain['wins']}/{gain['ties']}/{gain['losses']}"


def _against_each(summary: dict[str, Any]) -> str:
    there = [comparison for comparison in summary["comparisons"] if comparison["overall"]]
    if not there:
        return ""
    target = method_label(summary["target"])
    rows = [_pooled_cells(short_label(c), c["overall"]) for c in there]
    head = ["against", "pairs", "gain", "95 % interval", "won/tied/lost", "p", "on a new task"]
    parts = [page.table(head, rows)]
    for name, per in (("task", "per_task"), ("number of labels", "per_shots")):
        main = main_comparison(summary) or there[0]
        body = [
            _pooled_cells(gain["task"] if per == "per_task" else f"{gain['shots']:,} labels", gain)
            for gain in main[per]
        ]
        parts.append(page.folded(f"By {name}, against {main['label']}", page.table([name, *head[1:]], body)))
    note = f"Gain of {target}, all settings weighted alike; a positive number is in favour of {target}. "
    if any(c["kind"] == "tuned-best" for c in there):
        note += (
            "The best baseline by tuning is one that a user can choose; the one by result is flattered by the choice. "
        )
    note += "p: Wilcoxon's signed-rank test over all pairs."
    return page.section(f"{target} against each", "".join(parts), note)


def _pooled_cells(name: str, gain: dict[str, Any]) -> list[str]:
    return [
        name,
        str(gain["pairs"]),
        f"{gain['mean']:+.4f}",
        *_gain_tail(gain),
        _interval(gain["new_task_interval"]),
    ]


# --- what the scores are ---------------------------------------------------------------------------------------------


def scores_figure(summary: dict[str, Any]) -> "Figure":
    """Score against the number of labels, a panel a task: the report's figure, for use elsewhere."""
    from rankwise.diagnostics import plots

    return plots.scores_by_labels_figure(*_panels(summary))


def _panels(summary: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Panels and series of the scores."""
    scores = summary["scores"]
    series = _series(summary, _ordered(summary, (score["method"] for score in scores)))
    panels = []
    for task in dict.fromkeys(sorted(score["task"] for score in scores)):
        metric = summary["metrics"].get(task)
        lines = {
            one["label"]: [score for score in scores if (score["task"], score["method"]) == (task, one["method"])]
            for one in series
        }
        panels.append({"title": f"{task} ({metric})" if metric else task, "lines": lines})
    return panels, series


def _scores(summary: dict[str, Any]) -> str:
    scores = summary["scores"]
    if not scores:
        return ""
    methods = _ordered(summary, (score["method"] for score in scores))
    _, series = _panels(summary)
    head = ["task, labels", *(one["label"] for one in series)]
    means = {(score["task"], score["shots"], score["method"]): score for score in scores}
    body = [
        [_setting(task, shots), *(_score_cell(means.get((task, shots, method))) for method in methods)]
        for task, shots in sorted({(score["task"], score["shots"]) for score in scores})
    ]
    return _drawn(
        "Score against number of labels",
        "Means over the seeds, with 95 % intervals of the methods in colour; dashed: the unadapted model. These "
        "intervals are of each method alone: whether one wins is seen in the paired gains above.",
        scores_figure(summary),
        page.folded("The numbers: mean (runs)", page.table(head, body)),
    )


def _score_cell(score: dict[str, Any] | None) -> str:
    return _DASH if score is None else f"{score['mean']:.4f} ({score['runs']})"


def _harm(summary: dict[str, Any]) -> str:
    from rankwise.diagnostics import plots

    found = summary["harm"]
    if not found:
        return ""
    series = _series(summary, _ordered(summary, (h["method"] for h in found)))
    labels = {one["method"]: one["label"] for one in series}
    panels = [
        {
            "title": f"{shots:,} labels",
            "points": {
                labels[h["method"]]: {"mean": h["mean"], "interval": h["interval"], "worst": h["worst_mean"]}
                for h in found
                if h["shots"] == shots
            },
        }
        for shots in sorted({h["shots"] for h in found})
    ]
    body = [
        [
            f"{labels[h['method']]}, {h['shots']:,} labels",
            f"{h['mean']:+.4f}",
            _interval(h["interval"]),
            str(h["tasks"]),
            str(h["pairs"]),
            f"{h['worst_task']} {h['worst_mean']:+.4f}",
        ]
        for h in sorted(found, key=lambda h: (list(labels).index(h["method"]), h["shots"]))
    ]
    head = ["method, labels", "difference", "95 % interval", "tasks", "pairs", "worst task"]
    return _drawn(
        "Does adapting do harm?",
        "Mean over tasks of the score minus that of the unadapted model with the same seed; left of the line, the labels "
        "were better left unused. Bars: 95 % bootstrap intervals.",
        plots.harm_figure(panels, series),
        page.folded("The numbers", page.table(head, body)),
    )


# --- what was found inside -------------------------------------------------------------------------------------------


def _ranks(summary: dict[str, Any], settings: dict[str, Any]) -> str:
    from rankwise.diagnostics import plots

    found = {entry["method"]: {c["rank"]: c["updates"] for c in entry["counts"]} for entry in summary["ranks"]}
    found.pop(UNADAPTED, None)
    if not found:
        return ""
    series = _series(summary, _ordered(summary, found))
    panels = [{**one, "counts": found[one["method"]]} for one in series]
    widest = summary["r"] or max(rank for counts in found.values() for rank in counts)
    return _drawn(
        "Ranks found",
        f"Numerical rank of every layer's update after training, over all confirmation runs. One rule for all methods: "
        f"{settings.get('rank_rule', _RANK_RULE)}.",
        plots.found_ranks_figure(panels, widest),
    )


def _score_against_rank(summary: dict[str, Any]) -> str:
    from rankwise.diagnostics import plots

    points = summary["score_against_rank"]
    if not points:
        return ""
    series = _series(summary, _ordered(summary, (point["method"] for point in points)))
    lines = [{**one, "points": [p for p in points if p["method"] == one["method"]]} for one in series]
    flat = "; ".join(
        f"{line['label']} varies by {max(p['mean'] for p in line['points']) - min(p['mean'] for p in line['points']):.4f}"
        for line in lines
    )
    note = f"Mean over the settings and seeds that were run at every r. {flat}."
    return _drawn("Score against r", note, plots.score_against_rank_figure(lines))


def _learning_rates(summary: dict[str, Any]) -> str:
    entries = [entry for entry in summary["learning_rates"] if entry["grid"] or entry["used"]]
    if not entries:
        return ""
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    chosen = {(entry["method"], entry["task"]): entry for entry in entries}
    methods = _ordered(summary, (entry["method"] for entry in entries))
    overview = [
        [method_label(method), *(_rate_cell(chosen.get((method, task))) for task in tasks)] for method in methods
    ]
    best = summary["best_baseline"]
    if any(best.get(task) for task in tasks):
        overview.append(["best baseline", *(method_label(best[task]) if best.get(task) else _DASH for task in tasks)])
    details = [
        [
            f"{method_label(method)} on {task}",
            _or_dash(entry["lr"], "g"),
            ", ".join(f"{lr:g}" for lr in entry["used"]) or _DASH,
            "; ".join(_remarks(entry)) or _DASH,
            ", ".join(f"{g['lr']:g} → {_or_dash(g['mean'], '.4f')}" for g in entry["grid"]) or _DASH,
        ]
        for method in methods
        for task in tasks
        if (entry := chosen.get((method, task)))
    ]
    head = ["method, task", "chosen", "used", "remark", "mean score on the tuning split (– where a run failed)"]
    note = (
        "Chosen by the mean score on the tuning split; a rate with a failed run is out. (edge): the best rate ends the "
        "grid, a better one may lie beyond; the same command with a larger --budget looks there. (fixed): not tuned."
    )
    grids = page.folded("Every rate tried", page.table(head, details, of_words=True))
    return page.section("Learning rates", page.table(["method", *tasks], overview) + grids, note)


def _rate_cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return _DASH
    if not entry["grid"]:
        return f"{', '.join(f'{lr:g}' for lr in entry['used'])} (fixed)"
    if entry["lr"] is None:
        return "all failed"
    return f"{entry['lr']:g}{' (edge)' if entry['at_edge'] else ''}"


def _remarks(entry: dict[str, Any]) -> list[str]:
    remarks = {
        "fixed, not tuned": not entry["grid"],
        "every rate failed": entry["grid"] and entry["lr"] is None,
        "at the edge of the grid": entry["at_edge"],
        "not every rate on every seed": entry["grid"] and not entry["complete"],
        "confirmed at another rate": entry["lr"] is not None and entry["used"] not in ([], [entry["lr"]]),
    }
    return [remark for remark, holds in remarks.items() if holds]


def _resources(summary: dict[str, Any]) -> str:
    if not summary["resources"]:
        return ""
    entries = {entry["method"]: entry for entry in summary["resources"]}
    rows = [
        [
            method_label(method),
            str(entries[method]["runs"]),
            _or_dash(entries[method]["trainable_parameters"], ",.0f"),
            _or_dash(_scaled(entries[method]["adapter_bytes"], 1e-3), ",.0f", " kB"),
            _or_dash(entries[method]["directions_99"], ",.0f"),
            _or_dash(entries[method]["seconds"], ",.1f", " s"),
            _or_dash(_scaled(entries[method]["seconds_per_step"], 1e3), ",.0f", " ms"),
            _or_dash(_scaled(entries[method]["peak_memory_bytes"], 1e-6), ",.0f", " MB"),
        ]
        for method in _ordered(summary, entries)
    ]
    head = ["method", "runs", "trainable", "adapter", "directions (99 %)", "run", "step", "peak memory"]
    note = (
        "Medians over the confirmation runs. Directions: over all layers, those that hold 99 % of the update's energy. "
        "Seconds of runs that shared the machine are rough."
    )
    return page.section("What it costs", page.table(head, rows), note)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _interval(interval: Sequence[float] | None) -> str:
    return _DASH if interval is None else interval_text(interval)


def _or_dash(value: float | None, spec: str, unit: str = "") -> str:
    return _DASH if value is None else page.number(value, spec) + unit


# --- the record ------------------------------------------------------------------------------------------------------


def _rows_so_far(summary: dict[str, Any], rows: Sequence[Row]) -> str:
    counts = summary["counts"]
    table = page.table(
        [],
        [
            ["runs recorded", f"{counts['rows']:,}"],
            ["to choose learning rates", f"{counts['tune']:,}"],
            ["to confirm", f"{counts['confirm']:,}"],
            ["failed", f"{counts['failed']:,}"],
            ["without a score", f"{counts['undefined']:,}"],
            ["still missing (another method has that task, labels and seed)", f"{counts['missing']:,}"],
            [
                "made more than once, at several learning rates (the one at the chosen rate counts)",
                f"{counts['repeated']:,}",
            ],
            ["compared at r", _DASH if summary["r"] is None else str(summary["r"])],
            ["lines read, repetitions included", f"{len(rows):,}"],
        ],
    )
    return page.section("The runs", table)


def _failures(summary: dict[str, Any]) -> str:
    if not summary["failures"]:
        return ""
    body = [
        [
            f"{method_label(str(f['method']))} on {f['task']}",
            f"{f['phase']}",
            _DASH if f["shots"] is None else f"{f['shots']:,}",
            _DASH if f["seed"] is None else f"{f['seed']}",
            _or_dash(f["lr"], "g"),
            str(f["error"]),
        ]
        for f in summary["failures"]
    ]
    table = page.table(["run", "phase", "labels", "seed", "learning rate", "message"], body, of_words=True)
    return page.section("Runs that failed", table, "They count as missing in every mean.")


def _settings(settings: dict[str, Any]) -> str:
    text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True, default=str)
    return page.section("Settings", page.preformatted(text))
