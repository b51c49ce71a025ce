"""What small norms, small steps and dropped units do to the rank: the regularizers behind training, in closed form."""

from rankwise.regularization.dropout import (
    DropoutMinimum,
    dropout_minimizer,
    dropout_penalty,
    dropout_rate_for_rank,
)
from rankwise.regularization.kkt import KKTResidual, kkt_residual
from rankwise.regularization.margin import margins
from rankwise.regularization.max_margin import MaxMarginError, MaxMarginFit, fit_max_margin
from rankwise.regularization.minimum_norm import minimum_norm_solution
from rankwise.regularization.nonnegative_least_squares import nonnegative_least_squares
from rankwise.regularization.nuclear import (
    schatten_prox,
    schatten_prox_threshold,
    shrink_singular_values,
    singular_value_threshold,
    squared_nuclear_prox,
)
from rankwise.regularization.schatten import balanced_factors, factored_norm, schatten_power

__all__ = [
    "DropoutMinimum",
    "KKTResidual",
    "MaxMarginError",
    "MaxMarginFit",
    "balanced_factors",
    "dropout_minimizer",
    "dropout_penalty",
    "dropout_rate_for_rank",
    "factored_norm",
    "fit_max_margin",
    "kkt_residual",
    "margins",
    "minimum_norm_solution",
    "nonnegative_least_squares",
    "schatten_power",
    "schatten_prox",
    "schatten_prox_threshold",
    "shrink_singular_values",
    "singular_value_threshold",
    "squared_nuclear_prox",
]
