"""How much a row of each class counts in the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rankwise.errors import UserError

BALANCED = "balanced"
ClassWeights = str | Mapping[str, float]


def require_class_weights(wanted: ClassWeights, classes: Sequence[str]) -> None:
    """Refuse weights of unknown classes and weights that are no finite numbers of at least 0.

    Raises:
        UserError: says which.
    """
    if isinstance(wanted, str):
        if wanted != BALANCED:
            raise UserError(f"class weights must be {BALANCED!r} or a weight for each class, got {wanted!r}")
        return
    for name, weight in wanted.items():
        if name not in classes:
            raise UserError(f"class weights name the class {name!r}; the classes are {', '.join(classes)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < np.inf:
            raise UserError(f"the weight of class {name!r} must be a finite number of at least 0, got {weight!r}")


def class_weights(wanted: ClassWeights, classes: Sequence[str], targets: Any) -> "np.ndarray[Any, Any]":
    """Weights (k,) of the classes, whose mean over the rows ``targets`` is 1.

    ``balanced`` gives a class of n_c of the n rows n/(k·n_c), where k counts the classes that have a row: scikit-learn's
    rule, whose mean over rows is 1 already. Weights by name count by their ratios alone, a class not named counts 1: they
    are divided by their mean over the rows, so that learning rates and the head's penalty mean what they did.

    Args:
        targets: class numbers of the training rows.

    Raises:
        UserError: every training row has the weight 0.

    Example:
        >>> from rankwise.finetuning.class_weights import class_weights
        >>> class_weights("balanced", ["no", "yes"], [0, 0, 0, 1]).round(3).tolist()
        [0.667, 2.0]
    """
    counts = np.bincount(np.asarray(targets, dtype=np.int64), minlength=len(classes)).astype(np.float64)
    if isinstance(wanted, str):
        # a class without a row has no weight of its own, and nothing to count it on
        return np.divide(counts.sum() / np.count_nonzero(counts), counts, out=np.ones_like(counts), where=counts > 0)
    weights = np.array([float(wanted.get(name, 1.0)) for name in classes])
    mean = float(counts @ weights / counts.sum())
    if mean == 0:
        raise UserError("the class weights leave every training row out: at least one class with rows needs a weight")
    return weights / mean
