"""A study in one dictionary (``summary.json``), in one sentence, and in the lines a terminal shows."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rankwise.finetuning.comparison.rows import (
    UNADAPTED,
    Row,
    at_chosen_rate,
    at_rank,
    chosen_learning_rate,
    latest,
    main_rank,
    method_label,
    score_of,
    successful,
)
from rankwise.finetuning.comparison.statistics import (
    best_baseline,
    compare,
    harm,
    mean_scores,
    rank_histogram,
    resources,
    score_against_rank,
    strict_baselines,
    tuned_baselines,
)

FORMAT_VERSION = 1
DEFAULT_BASELINES = ("lora", "lora-plus", "lora-rite", "rslora")
DEFAULT_TARGET = "deep-lora"


def summarize(
    rows: Iterable[Row],
    methods: Sequence[str],
    baselines: Sequence[str] = DEFAULT_BASELINES,
    target: str = DEFAULT_TARGET,
    *,
    r: int | None = None,
) -> dict[str, Any]:
    """Everything that a study says, as one JSON-able dict.

    Args:
        rows: the rows so far; missing, failed and repeated ones are fine (of several with one key the last counts, of
            trials at several learning rates the one at the rate chosen).
        methods: the methods of the study, in the order to show them.
        baselines: those of them that ``target`` has to beat; ones that are no method of the study are left out.
        target: the method in question.
        r: the rank at which methods are compared; the most frequent one by default.

    Returns:
        ``comparisons`` holds ``target`` against the best baseline chosen on the tuning split (kind ``tuned-best``),
        against the best on the evaluation rows (``strict-best``), both where there are several baselines, and against every
        other method (``single``), each with
        ``cells``, ``overall``, ``per_task`` and ``per_shots``. Besides: ``scores``, ``harm``, ``resources``, ``ranks``,
        ``score_against_rank``, ``learning_rates``, ``best_baseline``, ``counts``, ``failures``, and ``headline``, the
        outcome in words.
    """
    made = latest(rows)
    everything = at_chosen_rate(made)
    methods = list(dict.fromkeys(methods))
    r = main_rank(everything) if r is None else r
    kept = at_rank(everything, r)
    candidates = [method for method in baselines if method in methods and method != target]
    tasks = sorted({row["task"] for row in everything})
    comparisons = []
    if len(candidates) > 1:
        names = _listed([method_label(method) for method in candidates], "and")
        tuned, strict = tuned_baselines(kept, candidates), strict_baselines(kept, candidates)
        comparisons = [
            compare(kept, target, tuned, kind="tuned-best", label=f"the best of {names}, chosen on the tuning split"),
            compare(
                kept, target, strict, kind="strict-best", label=f"the best of {names}, chosen on the result itself"
            ),
        ]
    others = [*candidates, *(method for method in methods if method not in (target, UNADAPTED, *candidates))]
    comparisons += [compare(kept, target, method) for method in others]
    summary: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "target": target,
        "baselines": candidates,
        "methods": methods,
        "r": r,
        "tasks": tasks,
        "shots": sorted({row["shots"] for row in kept if row.get("phase") == "confirm"}),
        "metrics": {task: _metric(everything, task) for task in tasks},
        "counts": _counts(made, at_rank(made, r), methods),
        "failures": [_failure(row) for row in everything if score_of(row) is None],
        "learning_rates": [_learning_rate(kept, task, method) for task in tasks for method in methods],
        "best_baseline": {task: best_baseline(kept, task, candidates) for task in tasks},
        "comparisons": [comparison.to_dict() for comparison in comparisons],
        "scores": [score.to_dict() for method in methods for score in mean_scores(kept, method)],
        "harm": [h.to_dict() for method in methods if method != UNADAPTED for h in harm(kept, method)],
        "resources": [resources(kept, method).to_dict() for method in methods if successful(kept, method)],
        "ranks": [
            {"method": method, "counts": [{"rank": rank, "updates": n} for rank, n in histogram.items()]}
            for method in methods
            if (histogram := rank_histogram(kept, method))
        ],
        "score_against_rank": [point.to_dict() for point in score_against_rank(everything, methods)],
    }
    summary["headline"] = headline(summary)
    return summary


def _metric(rows: Sequence[Row], task: str) -> str | None:
    return next((row["metric"] for row in rows if row["task"] == task and row.get("metric")), None)


def _counts(rows: Sequence[Row], kept: Sequence[Row], methods: Sequence[str]) -> dict[str, int]:
    """``missing``: confirmation runs of a method that others have made on the same task, labels and seed."""
    trials = {(row["task"], row["shots"], row["seed"]) for row in kept if row.get("phase") == "confirm"}
    there = Counter(
        (row["task"], row["shots"], row["seed"], row["method"]) for row in kept if row.get("phase") == "confirm"
    )
    return {
        "rows": len(rows),
        "tune": sum(row.get("phase") == "tune" for row in rows),
        "confirm": sum(row.get("phase") == "confirm" for row in rows),
        "failed": sum(row.get("status") != "ok" for row in rows),
        "undefined": sum(row.get("status") == "ok" and score_of(row) is None for row in rows),
        "missing": sum((*trial, method) not in there for trial in trials for method in methods),
        "repeated": sum(n > 1 for n in there.values()),
    }


def _failure(row: Row) -> dict[str, Any]:
    names = ("phase", "task", "method", "shots", "seed", "lr", "r", "status")
    error = row.get("error") or ("the score is undefined" if row.get("status") == "ok" else "no message")
    return {**{name: row.get(name) for name in names}, "error": error}


def _learning_rate(rows: Sequence[Row], task: str, method: str) -> dict[str, Any]:
    used = {
        row["lr"]
        for row in rows
        if row.get("phase") == "confirm"
        and row["task"] == task
        and row["method"] == method
        and row.get("lr") is not None
    }
    return {**chosen_learning_rate(rows, task, method).to_dict(), "used": sorted(used)}


def _listed(names: Sequence[str], word: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def short_label(comparison: dict[str, Any]) -> str:
    """The opponent in a few words, for a table."""
    names = {"tuned-best": "best baseline, by tuning", "strict-best": "best baseline, by result"}
    return names.get(comparison["kind"], comparison["label"])


def main_comparison(summary: dict[str, Any]) -> dict[str, Any] | None:
    """What the study is about: the best baseline chosen on the tuning split, else on the result, else the first one."""
    kinds = ("tuned-best", "strict-best", "single")
    return next((found for kind in kinds if (found := find_comparison(summary, kind))), None)


def find_comparison(summary: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The first comparison of a kind that has pairs."""
    return next((c for c in summary["comparisons"] if c["kind"] == kind and c["overall"]), None)


def headline(summary: dict[str, Any]) -> str:
    """Who wins by how much, in plain words, and what that does not say."""
    name = method_label(summary["target"])
    comparison = main_comparison(summary)
    if comparison is None:
        return (
            f"Nothing to compare yet: no run of {name} shares its task, number of labels and seed with a run of another "
            "method."
        )
    overall = comparison["overall"]
    mean, interval = overall["mean"], overall["interval"]
    where = f"{_counted(overall['tasks'], 'task')}, {_counted(overall['pairs'], 'pair')} of runs"
    record = f"{overall['wins']} won, {overall['ties']} tied, {overall['losses']} lost"
    if interval is None:
        text = (
            f"Too few runs to say who wins: {name} is {_by(mean)} {comparison['label']} ({where}; {record}), and no "
            "setting has two seeds. "
        )
        return text.rstrip()
    between = f"95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}"
    facts = f"({between}; {where}; {record})"
    if interval[0] > 0:
        text = f"{name} wins: it scores {mean:.4f} higher than {comparison['label']} {facts}."
    elif interval[1] < 0:
        text = f"{name} loses: it scores {-mean:.4f} lower than {comparison['label']} {facts}."
    else:
        text = f"No winner: {name} is {_by(mean)} {comparison['label']}, and the interval holds 0 {facts}."
    return " ".join([text, *_qualifications(summary, comparison)])


def _qualifications(summary: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    overall, sentences = comparison["overall"], []
    strict = find_comparison(summary, "strict-best") if comparison["kind"] == "tuned-best" else None
    if strict is not None and strict["overall"]["interval"] is not None:
        low, high = strict["overall"]["interval"]
        sentences.append(
            "Against whichever baseline turned out best in each setting, which flatters the baseline: "
            f"{strict['overall']['mean']:+.4f} ({low:+.4f} to {high:+.4f})."
        )
    if overall["new_task_interval"] is not None:
        low, high = overall["new_task_interval"]
        holds = "" if low > 0 or high < 0 else ", so these tasks do not settle it"
        sentences.append(f"On a new task like these: {low:+.4f} to {high:+.4f}{holds}.")
    behind = [gain["task"] for gain in comparison["per_task"] if gain["interval"] and gain["interval"][1] < 0]
    if behind and overall["interval"][1] >= 0:
        sentences.append(f"It is behind on {_listed(behind, 'and')}.")
    harmed = [h for h in summary["harm"] if h["method"] == summary["target"] and h["mean"] < 0]
    if harmed:
        counts = _listed([f"{h['shots']} ({h['mean']:+.4f})" for h in harmed], "and")
        sentences.append(f"On average it scores below the unadapted model with this many labels: {counts}.")
    return sentences


def _by(mean: float) -> str:
    return f"{abs(mean):.4f} {'ahead of' if mean >= 0 else 'behind'}"


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The outcome for a terminal: the headline, one line a comparison, one line a method, what is missing.

    Plain text, each table line below 100 characters for methods of ordinary names.
    """
    lines = [summary["headline"], ""]
    pooled = [
        [
            short_label(c),
            f"{c['overall']['mean']:+.4f}",
            interval_text(c["overall"]["interval"]),
            f"{c['overall']['wins']}/{c['overall']['ties']}/{c['overall']['losses']}",
            "-" if c["overall"]["wilcoxon_p"] is None else f"{c['overall']['wilcoxon_p']:.3g}",
        ]
        for c in summary["comparisons"]
        if c["overall"]
    ]
    if pooled:
        lines += _aligned(
            [[f"{method_label(summary['target'])} against", "gain", "95 % interval", "won/tied/lost", "p"], *pooled]
        )
        lines.append("")
    measured = [
        [
            method_label(entry["method"]),
            str(entry["runs"]),
            *(_harm_cell(summary, entry["method"], shots) for shots in summary["shots"]),
            "-" if entry["directions_99"] is None else f"{entry['directions_99']:.0f}",
            "-" if entry["adapter_bytes"] is None else f"{entry['adapter_bytes'] / 1e3:,.0f} kB",
            "-" if entry["seconds"] is None else f"{entry['seconds']:.1f} s",
        ]
        for entry in summary["resources"]
    ]
    if measured:
        head = [
            "change from unadapted, labels:",
            "runs",
            *(f"{n:,}" for n in summary["shots"]),
            "directions",
            "adapter",
            "time",
        ]
        lines += _aligned([head, *measured])
        lines.append("")
    counts = summary["counts"]
    lines.append(
        f"{_counted(counts['rows'], 'run')}: {counts['tune']} to tune, {counts['confirm']} to confirm; "
        f"{counts['failed']} failed, {counts['undefined']} without a score, {counts['missing']} still missing."
    )
    edges: dict[str, list[str]] = {}
    for entry in summary["learning_rates"]:
        if entry["at_edge"]:
            edges.setdefault(method_label(entry["method"]), []).append(entry["task"])
    if edges:
        named = "; ".join(f"{method} on {_listed(tasks, 'and')}" for method, tasks in edges.items())
        lines.append(f"Learning rate at the edge of its grid: {named}.")
        lines.append("The same command with a larger --budget tries rates beyond.")
    return lines


def interval_text(interval: Sequence[float] | None) -> str:
    """``[-0.0100, +0.0200]``, or a dash."""
    return "-" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


def _harm_cell(summary: dict[str, Any], method: str, shots: int) -> str:
    return next((f"{h['mean']:+.4f}" for h in summary["harm"] if (h["method"], h["shots"]) == (method, shots)), "-")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
