"""The metrics that several tasks report."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn import metrics

from rankwise.finetuning.batching import Array

CORRELATIONS = ("spearman", "pearson")
CLASS_SCORES = ("accuracy", "f1_macro", "matthews")
TWO_CLASS_SCORES = ("f1", "accuracy_f1")


def correlations(predictions: Array, targets: Array) -> dict[str, float | None]:
    if len(targets) < 2 or np.ptp(predictions) == 0 or np.ptp(targets) == 0:
        return dict.fromkeys(CORRELATIONS)
    found = {
        "spearman": float(stats.spearmanr(predictions, targets).statistic),
        "pearson": float(stats.pearsonr(predictions, targets).statistic),
    }
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def class_scores(predictions: Array, targets: Array, classes: Sequence[str]) -> dict[str, float | None]:
    """Of class numbers. Of two classes the last is the positive one of ``f1``.

    ``accuracy_f1`` is the mean of accuracy and ``f1``, GLUE's official figure for MRPC and QQP.
    """
    found: dict[str, float | None] = {
        "accuracy": (accuracy := float(metrics.accuracy_score(targets, predictions))),
        "f1_macro": float(metrics.f1_score(targets, predictions, average="macro", zero_division=0)),
        "matthews": float(metrics.matthews_corrcoef(targets, predictions)),
    }
    if len(classes) == 2:
        f1 = float(metrics.f1_score(np.asarray(targets) == 1, np.asarray(predictions) == 1, zero_division=0))
        found |= {"f1": f1, "accuracy_f1": (accuracy + f1) / 2}
    return found
