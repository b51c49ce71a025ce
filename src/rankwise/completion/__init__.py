"""Matrices with holes, filled: a scikit-learn estimator and its solvers.

Needs ``pip install "rankwise[completion]"``.
"""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"rankwise.completion needs scikit-learn ({error}); install it with: pip install 'rankwise[completion]'"
    ) from error

from rankwise.completion.estimator import DeepMatrixCompletion, IntervalPrediction
from rankwise.completion.gradient_descent import GradientDescentResult, gradient_descent
from rankwise.completion.intervals import Calibration
from rankwise.completion.observations import Observations, as_observations
from rankwise.completion.recovery import default_rank
from rankwise.completion.sharding import shard_rows

__all__ = [
    "Calibration",
    "DeepMatrixCompletion",
    "GradientDescentResult",
    "IntervalPrediction",
    "Observations",
    "as_observations",
    "default_rank",
    "gradient_descent",
    "shard_rows",
]
