"""The rows of a comparison study: which of them count, and which learning rate they speak for.

A row is one run, as ``rows.jsonl`` holds it. Its phase is ``tune`` or ``confirm``: learning rates are chosen by the first,
scores are read off the second, which are a study's trials.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

Row = Mapping[str, Any]
Cell = tuple[str, int]

UNADAPTED = "none"

_LABELS = {
    "none": "unadapted model",
    "lora": "LoRA",
    "lora-plus": "LoRA+",
    "lora-rite": "LoRA-RITE",
    "relora": "ReLoRA",
    "rslora": "rsLoRA",
    "pissa": "PiSSA",
    "adalora": "AdaLoRA",
    "dora": "DoRA",
    "vera": "VeRA",
    "lora-riemannian": "Riemannian LoRA",
    "deep-lora": "Deep LoRA",
    "full": "full fine-tuning",
    "galore": "GaLore",
    "adarankgrad": "AdaRankGrad",
}


def method_label(method: str) -> str:
    """The name that people use: ``deep-lora:paper`` → ``Deep LoRA (paper)``; an unknown one stays as it is."""
    name, _, variant = method.partition(":")
    return _LABELS.get(name, name) + (f" ({variant})" if variant else "")


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows without repetition: of several with one key (and one ``r``) the last counts."""
    kept: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        kept[_identity(row)] = row
    return list(kept.values())


def _identity(row: Row) -> tuple[Any, ...]:
    names = ("phase", "task", "method", "shots", "seed", "lr")
    # r besides the key: rows of a sweep over r, put together from several studies, differ in nothing else
    return row.get("key") or tuple(row.get(name) for name in names), row.get("r")


def score_of(row: Row) -> float | None:
    """The headline score of a run that succeeded and has one; None otherwise."""
    score = row.get("score")
    if row.get("status") != "ok" or score is None or not math.isfinite(score):
        return None
    return float(score)


def main_rank(rows: Iterable[Row]) -> int | None:
    """The ``r`` of most confirmation rows (the smaller one in a tie): the one that methods are compared at."""
    return _most_common(row.get("r") for row in rows if row.get("phase") == "confirm")


def _most_common(values: Iterable[int | None]) -> int | None:
    counts = Counter(value for value in values if value is not None)
    return min(counts, key=lambda value: (-counts[value], value), default=None)


def at_rank(rows: Iterable[Row], r: int | None = None) -> list[Row]:
    """The rows that compare methods at one rank.

    Of a method that was run at ``r`` its rows there; of one that never was (VeRA wants a larger one, full fine-tuning
    has none) those at the rank it has most often. ``r`` defaults to :func:`main_rank`.
    """
    rows = latest(rows)
    r = main_rank(rows) if r is None else r
    kept: dict[tuple[Any, ...], int | None] = {}
    for group in {(row.get("phase"), row.get("method")) for row in rows}:
        ranks = [row.get("r") for row in rows if (row.get("phase"), row.get("method")) == group]
        kept[group] = r if r in ranks else _most_common(ranks)
    return [row for row in rows if row.get("r") in (None, kept[row.get("phase"), row.get("method")])]


def confirmed_scores(rows: Iterable[Row], method: str) -> dict[Cell, dict[int, float]]:
    """Scores of the confirmation runs of ``method``: cell → seed → score, both sorted."""
    found: dict[Cell, dict[int, float]] = {}
    for row in latest(rows):
        score = score_of(row)
        if row.get("phase") == "confirm" and row.get("method") == method and score is not None:
            found.setdefault((row["task"], row["shots"]), {})[row["seed"]] = score
    return {cell: dict(sorted(found[cell].items())) for cell in sorted(found)}


def successful(rows: Iterable[Row], method: str) -> list[Row]:
    """Confirmation runs of a method that have a score."""
    return [
        row
        for row in latest(rows)
        if row.get("phase") == "confirm" and row.get("method") == method and row.get("status") == "ok"
    ]


# --- learning rates --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TriedLearningRate:
    """One learning rate on the tuning split: mean score (None where a run failed), runs made, runs without a score."""

    lr: float
    mean: float | None
    runs: int
    failed: int


@dataclass(frozen=True)
class ChosenLearningRate:
    """The learning rate of a method on a task, and the grid it was chosen from.

    ``lr`` is None where nothing was tried or everything failed. ``at_edge``: the grid ends there, and a better one may
    lie beyond. ``complete``: every rate was tried on the same seeds.
    """

    task: str
    method: str
    lr: float | None
    score: float | None
    at_edge: bool
    complete: bool
    grid: tuple[TriedLearningRate, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def chosen_learning_rate(
    rows: Iterable[Row], task: str, method: str, *, shots: int | None = None
) -> ChosenLearningRate:
    """The learning rate with the best mean score over the tuning seeds; the smaller one in a tie.

    A run that failed or has no score counts as worse than any: its learning rate is out, and where that leaves none,
    ``lr`` is None. Confirmation rows are not looked at.

    Args:
        rows: rows of a study.
        task, method: whose rate.
        shots: only tuning runs with so many labels; all by default.

    Example:
        >>> def tune(lr, score):
        ...     return {"phase": "tune", "task": "t", "method": "lora", "shots": 64, "seed": 0, "lr": lr,
        ...             "status": "ok", "score": score}
        >>> chosen = chosen_learning_rate([tune(1e-3, 0.8), tune(3e-3, 0.9)], "t", "lora")
        >>> chosen.lr, chosen.at_edge
        (0.003, True)
    """
    by_rate: dict[float, dict[tuple[int, int], float | None]] = {}
    for row in latest(rows):
        wanted = row.get("phase") == "tune" and row.get("task") == task and row.get("method") == method
        if wanted and row.get("lr") is not None and shots in (None, row["shots"]):
            by_rate.setdefault(row["lr"], {})[row["shots"], row["seed"]] = score_of(row)
    grid = tuple(_tried(lr, list(by_rate[lr].values())) for lr in sorted(by_rate))
    best = max(
        (entry for entry in grid if entry.mean is not None),
        key=lambda entry: (level(entry.mean), -entry.lr),
        default=None,
    )
    seeds = {frozenset(scores) for scores in by_rate.values()}
    return ChosenLearningRate(
        task=task,
        method=method,
        lr=None if best is None else best.lr,
        score=None if best is None else best.mean,
        at_edge=best is not None and len(grid) > 1 and best in (grid[0], grid[-1]),
        complete=len(seeds) == 1,
        grid=grid,
    )


def level(mean: float | None) -> float:
    """What to order mean scores by, equal for those that differ by rounding: .5 and .7 average to less than .8 and .4."""
    return -math.inf if mean is None else round(mean, 12)


def _tried(lr: float, scores: list[float | None]) -> TriedLearningRate:
    defined = [score for score in scores if score is not None]
    failed = len(scores) - len(defined)
    return TriedLearningRate(lr, None if failed else math.fsum(defined) / len(defined), len(scores), failed)


def at_chosen_rate(rows: Iterable[Row]) -> list[Row]:
    """The rows with one confirmation run for each method, setting, seed and ``r``.

    A study whose grid has grown may have some at a rate that was the best of fewer. The one at the rate that is chosen
    now counts, else the last one made.
    """
    rows = latest(rows)
    rates = {
        (task, method, r): chosen_learning_rate((row for row in rows if row.get("r") == r), task, method).lr
        for task, method, r in {(row["task"], row["method"], row.get("r")) for row in rows}
    }
    trials = [row for row in rows if row.get("phase") == "confirm"]
    trials.sort(key=lambda row: row.get("lr") == rates[row["task"], row["method"], row.get("r")])  # those come last
    names = ("task", "method", "shots", "seed", "r")
    counting = {id(row) for row in {tuple(map(row.get, names)): row for row in trials}.values()}
    return [row for row in rows if row.get("phase") != "confirm" or id(row) in counting]
