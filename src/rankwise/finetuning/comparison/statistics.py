"""Who wins, by how much, and how sure that is: statistics over the rows of a comparison study.

Two methods are compared on *pairs*: runs on the same task, the same number of labels and the same seed, so on the same
training rows. A *cell* is one (task, labels); the mean over cells weighs every cell alike, however many seeds it has.
Scores are of the kind where higher is better. What differs between two draws of the same study, training rows and seeds,
is in every interval; what does not, the finite evaluation split, is not.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.finetuning.comparison.rows import (
    UNADAPTED,
    Cell,
    Row,
    chosen_learning_rate,
    confirmed_scores,
    latest,
    level,
    method_label,
    score_of,
    successful,
)

Interval = tuple[float, float]

RESAMPLES = 10_000
# With four pairs even four wins give p = 1/8: such a test can only say "not significant".
FEWEST_PAIRS_FOR_WILCOXON = 5
# Scores are fractions of counts or correlations of float64: a smaller difference is rounding.
_TIE = 1e-12
_NORMAL_975 = 1.959963984540054

# --- intervals and tests ---------------------------------------------------------------------------------------------


def mean_interval(strata: Sequence[Sequence[float]], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval | None:
    """95 % bootstrap interval of the mean of the strata's means, resampling inside each stratum.

    The percentile bootstrap is too narrow for few values, for two reasons (Hesterberg 2015, *What Teachers Should Know
    About the Bootstrap*, "narrowness bias"): its variance is (n − 1)/n of the unbiased one, and it has no t correction.
    So the deviations of every stratum are stretched by √(n/(n − 1)) (Rao & Wu 1988), and the ends by t/z with the
    degrees of freedom of Welch and Satterthwaite. Measured on 2,000 samples each, one stratum of n = 2, 3, 5, 10 normal
    values holds the mean in 91, 95, 95, 95 % of the cases (exponential: 87, 87, 88, 91 %); plain percentiles in 48, 73,
    84, 91 %.

    Args:
        strata: values, a sequence a stratum, each of at least two; one stratum gives the interval of a plain mean.
        resamples: number of bootstrap samples.
        seed: of the resampling; equal inputs give equal intervals.

    Returns:
        (low, high), or None where a stratum has fewer than two values or there is no stratum.

    Example:
        >>> low, high = mean_interval([[0.1, 0.3, 0.2, 0.4, 0.0]])
        >>> low < 0.2 < high
        True
        >>> mean_interval([[0.1]]) is None
        True
    """
    if not strata or min(len(values) for values in strata) < 2:
        return None
    from scipy.special import stdtrit

    generator = np.random.default_rng(seed)
    deviation: NDArray[np.float64] = np.zeros(resamples)
    total = variance = spent = 0.0
    for values in strata:
        x = np.asarray(values, dtype=np.float64)
        n = len(x)
        drawn = x[generator.integers(n, size=(resamples, n))].mean(axis=1)
        deviation += (drawn - x.mean()) * math.sqrt(n / (n - 1))
        total += float(x.mean())
        share = float(x.var(ddof=1)) / n
        variance += share
        spent += share**2 / (n - 1)
    freedom = variance**2 / spent if spent > 0 else math.inf
    stretch = (float(stdtrit(freedom, 0.975)) if math.isfinite(freedom) else _NORMAL_975) / _NORMAL_975
    low, high = np.quantile(deviation, [0.025, 0.975]) / len(strata) * stretch
    mean = total / len(strata)
    return mean + float(low), mean + float(high)


def wilcoxon_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test; None where it could not tell anything.

    Zeros are dropped, as Wilcoxon did. None where fewer than five differences are left.
    """
    # rounded, so that equal differences of accuracies share a rank whatever their last bit is
    left = [round(value, 12) for value in differences if abs(value) > _TIE]
    if len(left) < FEWEST_PAIRS_FOR_WILCOXON:
        return None
    from scipy.stats import wilcoxon

    return float(wilcoxon(left).pvalue)


# --- baselines ---------------------------------------------------------------------------------------------------------


def best_baseline(rows: Iterable[Row], task: str, candidates: Sequence[str]) -> str | None:
    """The candidate that scored best on the tuning split of ``task``, at its own best learning rate.

    This is the choice a user can make: the evaluation rows are not looked at. In a tie the first candidate; None where
    no candidate has a tuning score.
    """
    rows = latest(rows)
    tuned = {method: chosen_learning_rate(rows, task, method).score for method in candidates}
    scores = {method: score for method, score in tuned.items() if score is not None}
    return max(scores, key=lambda method: level(scores[method]), default=None)


def tuned_baselines(rows: Iterable[Row], candidates: Sequence[str]) -> dict[Cell, str]:
    """:func:`best_baseline` of every cell with confirmation rows; cells whose task was not tuned are left out."""
    rows = latest(rows)
    cells = _cells(rows)
    chosen = {task: best_baseline(rows, task, candidates) for task in {task for task, _ in cells}}
    return {cell: method for cell in cells if (method := chosen[cell[0]]) is not None}


def strict_baselines(rows: Iterable[Row], candidates: Sequence[str]) -> dict[Cell, str]:
    """For every cell the candidate with the highest mean *on the evaluation rows*.

    It flatters the baseline: nobody can choose like that before the labels are known, and the best of several noisy
    means is too high on average. What wins against it wins safely. Means are over the seeds that all candidates with a
    score there share (over each one's own where they share none); in a tie the first candidate.
    """
    scores = {method: confirmed_scores(rows, method) for method in candidates}
    best: dict[Cell, str] = {}
    for cell in sorted({cell for found in scores.values() for cell in found}):
        present = [method for method in candidates if cell in scores[method]]
        shared = set.intersection(*(set(scores[method][cell]) for method in present))
        means = {
            method: _mean([score for seed, score in scores[method][cell].items() if not shared or seed in shared])
            for method in present
        }
        best[cell] = max(present, key=lambda method: level(means[method]))
    return best


def _cells(rows: Iterable[Row]) -> list[Cell]:
    return sorted({(row["task"], row["shots"]) for row in rows if row.get("phase") == "confirm"})


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# --- paired differences ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedCell:
    """Scores of two methods on one task with one number of labels, seed by seed."""

    task: str
    shots: int
    method: str
    baseline: str
    seeds: tuple[int, ...]
    method_scores: tuple[float, ...]
    baseline_scores: tuple[float, ...]

    @property
    def differences(self) -> tuple[float, ...]:
        """Method minus baseline."""
        return tuple(a - b for a, b in zip(self.method_scores, self.baseline_scores, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "differences": self.differences}


def paired_differences(rows: Iterable[Row], method: str, baseline: str | Mapping[Cell, str]) -> list[PairedCell]:
    """The confirmation runs of ``method`` beside those of ``baseline`` with the same task, labels and seed.

    Rows should share one ``r`` (:func:`at_rank`); with several, the last row of a seed counts.

    Args:
        rows: rows of a study.
        method: whose gain is asked for.
        baseline: against whom; a mapping names another one for each (task, labels), and cells it lacks are left out.

    Returns:
        One entry a cell with at least one pair, ordered by task and number of labels.
    """
    rows = latest(rows)
    ours = confirmed_scores(rows, method)
    opponents = dict.fromkeys(ours, baseline) if isinstance(baseline, str) else baseline
    theirs = {name: confirmed_scores(rows, name) for name in set(opponents.values())}
    cells = []
    for cell in ours:
        if cell not in opponents:
            continue
        other = theirs[opponents[cell]].get(cell, {})
        seeds = tuple(seed for seed in ours[cell] if seed in other)
        if seeds:
            a, b = tuple(ours[cell][seed] for seed in seeds), tuple(other[seed] for seed in seeds)
            cells.append(PairedCell(*cell, method, opponents[cell], seeds, a, b))
    return cells


@dataclass(frozen=True)
class CellGain:
    """What the pairs of one cell say. ``standard_error`` and ``interval`` (95 %) are None with fewer than two pairs."""

    task: str
    shots: int
    method: str
    baseline: str
    pairs: int
    mean: float
    standard_error: float | None
    interval: Interval | None
    wins: int
    ties: int
    losses: int
    wilcoxon_p: float | None
    method_mean: float
    baseline_mean: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PooledGain:
    """What several cells say together: the mean of the cells' mean differences.

    ``interval`` (95 %) is for *these tasks*: the seeds of every cell are resampled inside it, and the same seed in two
    cells counts as two independent draws. ``new_task_interval`` is for *a new task*: tasks are resampled as a whole, so
    it asks how the gain would fall on another task like these; around ``new_task_mean``, the mean of the tasks' means.
    None with fewer than two pairs in every cell, and with fewer than two tasks.

    Cells with a single pair are left out of all of this, unless there are no others; ``cells_left_out`` counts them.
    """

    cells: int
    cells_left_out: int
    tasks: int
    pairs: int
    mean: float
    interval: Interval | None
    new_task_mean: float
    new_task_interval: Interval | None
    wins: int
    ties: int
    losses: int
    wilcoxon_p: float | None
    method_mean: float
    baseline_mean: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cell_gain(cell: PairedCell) -> CellGain:
    """Mean paired difference of a cell, its uncertainty, and who won how often."""
    differences = cell.differences
    n = len(differences)
    wins, ties, losses = _won(differences)
    return CellGain(
        task=cell.task,
        shots=cell.shots,
        method=cell.method,
        baseline=cell.baseline,
        pairs=n,
        mean=_mean(differences),
        standard_error=float(np.std(differences, ddof=1)) / math.sqrt(n) if n > 1 else None,
        interval=mean_interval([differences]),
        wins=wins,
        ties=ties,
        losses=losses,
        wilcoxon_p=wilcoxon_p(differences),
        method_mean=_mean(cell.method_scores),
        baseline_mean=_mean(cell.baseline_scores),
    )


def pooled_gain(cells: Sequence[PairedCell]) -> PooledGain | None:
    """Cells taken together, each with the same weight; None without cells."""
    used = [cell for cell in cells if len(cell.seeds) > 1] or list(cells)
    if not used:
        return None
    used = sorted(used, key=lambda cell: (cell.task, cell.shots))
    means = {
        task: _mean([_mean(cell.differences) for cell in group])
        for task, group in groupby(used, lambda cell: cell.task)
    }
    everything = [value for cell in used for value in cell.differences]
    wins, ties, losses = _won(everything)
    return PooledGain(
        cells=len(used),
        cells_left_out=len(cells) - len(used),
        tasks=len(means),
        pairs=len(everything),
        mean=_mean([_mean(cell.differences) for cell in used]),
        interval=mean_interval([cell.differences for cell in used]),
        new_task_mean=_mean(list(means.values())),
        new_task_interval=mean_interval([list(means.values())]),
        wins=wins,
        ties=ties,
        losses=losses,
        wilcoxon_p=wilcoxon_p(everything),
        method_mean=_mean([_mean(cell.method_scores) for cell in used]),
        baseline_mean=_mean([_mean(cell.baseline_scores) for cell in used]),
    )


def _won(differences: Sequence[float]) -> tuple[int, int, int]:
    wins = sum(value > _TIE for value in differences)
    losses = sum(value < -_TIE for value in differences)
    return wins, len(differences) - wins - losses, losses


@dataclass(frozen=True)
class Comparison:
    """One method against one baseline, or against the best of several: cell by cell and pooled."""

    kind: str
    label: str
    method: str
    cells: tuple[CellGain, ...]
    overall: PooledGain | None
    per_task: dict[str, PooledGain]
    per_shots: dict[int, PooledGain]

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "label": self.label,
            "method": self.method,
            "cells": [cell.to_dict() for cell in self.cells],
            "overall": None if self.overall is None else self.overall.to_dict(),
            "per_task": [{"task": task, **gain.to_dict()} for task, gain in self.per_task.items()],
            "per_shots": [{"shots": shots, **gain.to_dict()} for shots, gain in self.per_shots.items()],
        }


def compare(
    rows: Iterable[Row], method: str, baseline: str | Mapping[Cell, str], *, kind: str = "single", label: str = ""
) -> Comparison:
    """:func:`paired_differences` with all their statistics.

    Args:
        rows, method, baseline: as for :func:`paired_differences`.
        kind: ``single``, ``tuned-best`` or ``strict-best``; kept with the result, nothing depends on it.
        label: the baseline in words; its own name by default.
    """
    cells = paired_differences(rows, method, baseline)
    per_task = {task: pooled_gain([c for c in cells if c.task == task]) for task in sorted({c.task for c in cells})}
    per_shots = {n: pooled_gain([c for c in cells if c.shots == n]) for n in sorted({c.shots for c in cells})}
    return Comparison(
        kind=kind,
        label=label or (method_label(baseline) if isinstance(baseline, str) else "the best baseline"),
        method=method,
        cells=tuple(cell_gain(cell) for cell in cells),
        overall=pooled_gain(cells),
        per_task={task: gain for task, gain in per_task.items() if gain is not None},
        per_shots={shots: gain for shots, gain in per_shots.items() if gain is not None},
    )


@dataclass(frozen=True)
class Harm:
    """Score minus that of the unadapted model, for one number of labels: the mean over tasks, and the worst task."""

    method: str
    shots: int
    gain: PooledGain
    worst_task: str
    worst_mean: float

    def to_dict(self) -> dict[str, Any]:
        worst = {"worst_task": self.worst_task, "worst_mean": self.worst_mean}
        return {"method": self.method, "shots": self.shots, **worst, **self.gain.to_dict()}


def harm(rows: Iterable[Row], method: str) -> list[Harm]:
    """Difference from the unadapted model (method ``none``) for every number of labels, paired by seed.

    A mean below zero is harm: those labels were better left unused.
    """
    cells = paired_differences(rows, method, UNADAPTED)
    found = []
    for shots in sorted({cell.shots for cell in cells}):
        here = [cell for cell in cells if cell.shots == shots]
        gain = pooled_gain(here)
        worst = min(here, key=lambda cell: (_mean(cell.differences), cell.task))
        if gain is not None:
            found.append(Harm(method, shots, gain, worst.task, _mean(worst.differences)))
    return found


# --- description of single methods -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanScore:
    """Mean score of a method in one cell, with the 95 % interval over its seeds, and the median seconds of a run."""

    task: str
    shots: int
    method: str
    runs: int
    mean: float
    interval: Interval | None
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_scores(rows: Iterable[Row], method: str) -> list[MeanScore]:
    """Mean confirmation score of ``method``, cell by cell."""
    seconds: dict[Cell, list[float]] = {}
    for row in successful(rows := list(rows), method):
        if row.get("seconds") is not None:
            seconds.setdefault((row["task"], row["shots"]), []).append(row["seconds"])
    found = []
    for cell, by_seed in confirmed_scores(rows, method).items():
        scores, times = list(by_seed.values()), seconds.get(cell)
        median = float(np.median(times)) if times else None
        found.append(MeanScore(*cell, method, len(scores), _mean(scores), mean_interval([scores]), median))
    return found


@dataclass(frozen=True)
class Resources:
    """Medians over the successful confirmation runs of a method; None where no run recorded the quantity."""

    method: str
    runs: int
    seconds: float | None
    seconds_per_step: float | None
    trainable_parameters: float | None
    adapter_bytes: float | None
    peak_memory_bytes: float | None
    directions_99: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resources(rows: Iterable[Row], method: str) -> Resources:
    """What a run of ``method`` costs, in medians: seconds, bytes, parameters, directions with 99 % of the energy."""
    runs = successful(rows, method)

    def median(name: str) -> float | None:
        values = [row[name] for row in runs if row.get(name) is not None]
        return float(np.median(values)) if values else None

    return Resources(
        method,
        len(runs),
        median("seconds"),
        median("seconds_per_step"),
        median("trainable_parameters"),
        median("adapter_bytes"),
        median("peak_memory_bytes"),
        median("directions_99"),
    )


def rank_histogram(rows: Iterable[Row], method: str) -> dict[int, int]:
    """Numerical rank of an update → number of updates (one a layer and run) with it, over all confirmation runs."""
    counts = Counter(rank for row in successful(rows, method) for rank in row.get("ranks") or ())
    return dict(sorted(counts.items()))


@dataclass(frozen=True)
class ScoreAtRank:
    """Mean score of a method at one ``r``, over the runs that exist at every ``r``."""

    method: str
    r: int
    runs: int
    mean: float
    interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rank_family(method: str) -> str:
    """The method without its choice of r: ``deep-lora:spectral+r=16`` → ``deep-lora:spectral``, ``lora:r=4`` → ``lora``."""
    name, _, options = method.partition(":")
    kept = [option for option in options.split("+") if option and not option.startswith("r=")]
    return name + (":" + "+".join(kept) if kept else "")


def score_against_rank(rows: Iterable[Row], methods: Sequence[str]) -> list[ScoreAtRank]:
    """Mean score at every ``r``, for the methods that were run at several; variants that differ in r alone are one.

    Only (task, labels, seed) with a score at every ``r`` of every such method count; where methods share none, each is
    taken over its own. A mean of cell means; the interval resamples seeds inside cells.
    """
    scores: dict[str, dict[int, dict[tuple[Cell, int], float]]] = {}
    for row in latest(rows):
        score = score_of(row)
        if row.get("phase") == "confirm" and row.get("method") in methods and row.get("r") and score is not None:
            at = scores.setdefault(rank_family(row["method"]), {}).setdefault(row["r"], {})
            at[(row["task"], row["shots"]), row["seed"]] = score
    families = dict.fromkeys(map(rank_family, methods))
    swept = [family for family in families if len(scores.get(family, {})) > 1]
    own = {method: set.intersection(*(set(at) for at in scores[method].values())) for method in swept}
    shared = set.intersection(*own.values()) if own else set()
    points = []
    for method in swept:
        runs = shared or own[method]
        if not runs:
            continue
        for r, at in sorted(scores[method].items()):
            by_cell: dict[Cell, list[float]] = {}
            for cell, seed in sorted(runs):
                by_cell.setdefault(cell, []).append(at[cell, seed])
            strata = [values for values in by_cell.values() if len(values) > 1] or list(by_cell.values())
            mean = _mean([_mean(values) for values in strata])
            points.append(ScoreAtRank(method, r, sum(map(len, strata)), mean, mean_interval(strata)))
    return points
