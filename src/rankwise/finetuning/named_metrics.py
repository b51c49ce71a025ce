"""Metrics that a user can ask for by name, or bring along as a function."""

import importlib
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics
from sklearn.exceptions import UndefinedMetricWarning

from rankwise.errors import UserError
from rankwise.finetuning.batching import Array


@dataclass(frozen=True)
class Metric:
    """One number that says how good predictions are.

    Attributes:
        name: what it is called in ``result.json``.
        function: of (predictions, targets): numbers, class numbers in the order of the class names, texts, or one tag a word.
        greater_is_better: False for an error.

    Example:
        >>> from rankwise.finetuning.named_metrics import Metric
        >>> Metric("share_of_a", lambda predictions, targets: float((predictions == "a").mean())).name
        'share_of_a'
    """

    name: str
    function: Callable[[Array, Array], float | None]
    greater_is_better: bool = True

    def __call__(self, predictions: Array, targets: Array) -> float | None:
        """The metric, None where it is undefined.

        Raises:
            UserError: the function failed, or gave no number.
        """
        try:
            value = self.function(predictions, targets)
        except Exception as error:  # it may be the user's: anything may happen in it
            raise UserError(
                f"metric {self.name!r} failed ({type(error).__name__}: {error}); it is called as f(predictions, targets)"
            ) from error
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(f"metric {self.name!r} must give one number, it gave {value!r}") from None
        return number if math.isfinite(number) else None


WantedMetric = str | Metric | Callable[[Array, Array], float | None]


def _of_classes(function: Callable[..., float], **options: Any) -> Callable[[Array, Array], float | None]:
    def call(predictions: Array, targets: Array) -> float | None:
        with warnings.catch_warnings():
            # of a class that only one side has: the number is defined all the same
            warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")
            warnings.filterwarnings("ignore", category=UndefinedMetricWarning)
            return function(np.asarray(targets), np.asarray(predictions), **options)

    return call


def _of_numbers(function: Callable[..., float]) -> Callable[[Array, Array], float | None]:
    def call(predictions: Array, targets: Array) -> float | None:
        if not len(targets) or not np.isfinite(np.asarray(predictions, dtype=np.float64)).all():
            return None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UndefinedMetricWarning)
            return function(np.asarray(targets, dtype=np.float64), np.asarray(predictions, dtype=np.float64))

    return call


def _kendall(targets: Array, predictions: Array) -> float:
    return float(stats.kendalltau(predictions, targets).statistic) if len(targets) > 1 else math.nan


def _exact_match(predictions: Array, targets: Array) -> float | None:
    found = [
        str(text).strip() in {known.strip() for known in several}
        for text, several in zip(predictions, targets, strict=True)
    ]
    return float(np.mean(found)) if found else None


def _named(*several: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in several}


CLASS_METRICS: Mapping[str, Metric] = _named(
    Metric("balanced_accuracy", _of_classes(metrics.balanced_accuracy_score)),
    Metric("cohen_kappa", _of_classes(metrics.cohen_kappa_score)),
    *(
        Metric(f"{name}_{average}", _of_classes(function, average=average, zero_division=0))
        for name, function in (
            ("f1", metrics.f1_score),
            ("precision", metrics.precision_score),
            ("recall", metrics.recall_score),
            ("jaccard", metrics.jaccard_score),
        )
        for average in ("macro", "weighted")
    ),
)
NUMBER_METRICS: Mapping[str, Metric] = _named(
    Metric("mean_absolute_error", _of_numbers(metrics.mean_absolute_error), greater_is_better=False),
    Metric("median_absolute_error", _of_numbers(metrics.median_absolute_error), greater_is_better=False),
    Metric("mean_squared_error", _of_numbers(metrics.mean_squared_error), greater_is_better=False),
    Metric("max_error", _of_numbers(metrics.max_error), greater_is_better=False),
    Metric("r2", _of_numbers(metrics.r2_score)),
    Metric("explained_variance", _of_numbers(metrics.explained_variance_score)),
    Metric("kendall", _of_numbers(_kendall)),
)
TEXT_METRICS: Mapping[str, Metric] = _named(Metric("exact_match", _exact_match))


def imported_metric(path: str) -> Metric:
    """The function behind ``module:function``; looked for in the working folder too, as Python itself would.

    An error is better lower: the function then has an attribute ``greater_is_better = False``.

    Raises:
        UserError: no such module or function, or importing it failed.

    Example:
        >>> from rankwise.finetuning.named_metrics import imported_metric
        >>> imported_metric("statistics:correlation").name
        'correlation'
    """
    module, _, name = path.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is the user's: anything may happen in it
        raise UserError(f"--metric {path}: cannot import {name!r} from {module!r} ({error})") from None
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise UserError(f"--metric {path} must be a function (predictions, targets) -> number, got {function!r}")
    return Metric(name, function, bool(getattr(function, "greater_is_better", True)))


def chosen_metrics(
    wanted: Sequence[WantedMetric], known: Mapping[str, Metric], reported: Sequence[str], task: str
) -> tuple[Metric, ...]:
    """The metrics asked for beside those that the task reports anyway.

    Args:
        wanted: names out of ``known`` or ``reported``, ``module:function``, functions with a name, or :class:`Metric`.

    Raises:
        UserError: an unknown name, a function without one, or a name given twice.
    """
    found: dict[str, Metric] = {}
    for item in wanted:
        if isinstance(item, str) and ":" in item:
            item = imported_metric(item)
        if isinstance(item, str):
            if item in reported:
                continue
            if item not in known:
                raise UserError(
                    f"{task} has no metric {item!r}; it reports {', '.join(reported)} and knows {', '.join(known)}"
                )
            metric = known[item]
        elif isinstance(item, Metric):
            metric = item
        else:
            name = getattr(item, "__name__", "")
            if not name.isidentifier():
                raise UserError(
                    'a metric without a name: pass Metric("name", function) from rankwise.finetuning.named_metrics'
                )
            metric = Metric(name, item)
        if metric.name in found or (metric.name in reported and not isinstance(item, str)):
            raise UserError(f"there is a metric {metric.name!r} already; give yours another name")
        found[metric.name] = metric
    return tuple(found.values())
