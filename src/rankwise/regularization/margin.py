"""Margins of a deep linear classifier, the losses that pull them up, and their gradients by the weights in closed form.

    q_ic(Θ) = f_{y_i}(x_i) − f_c(x_i),   c ≠ y_i,   f = W_L ⋯ W_1,

which is what eq. 27–29 of the overview write as W_L ⋯ W_1 x_i · y_i for two classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rankwise.spectral.precision import require_finite, require_matrix


def margins(
    weights: Sequence[Float[Tensor, "_ _"]], X: Float[Tensor, "d n"], y: Int[Tensor, " n"]
) -> Float[Tensor, "k n"]:
    """q_ic = f_{y_i}(x_i) − f_c(x_i) for every class c and sample i, +∞ at c = y_i.

    Args:
        weights: W_1, …, W_L, first applied first; W_L has a row for every class.
        X: (d, n), one sample a column.
        y: (n,), labels from 0 to k − 1.

    Raises:
        ValueError: sizes that do not chain, labels out of range, empty or non-finite input.

    Example:
        >>> import torch
        >>> from rankwise.regularization import margins
        >>> margins([torch.eye(2)], torch.tensor([[3.0, 1.0], [1.0, 5.0]]), torch.tensor([0, 1])).tolist()
        [[inf, 4.0], [2.0, inf]]
    """
    require_classifier(weights, X, y)
    return output_margins(activations(weights, X)[-1], y.long())


# The kernels below run thousands of times a fit, so their shapes stand in words: checking them would take most of a step.


def output_margins(outputs: Tensor, y: Tensor) -> Tensor:
    """:func:`margins` (k, n) from f(X) (k, n)."""
    own = outputs.gather(0, y.unsqueeze(0))
    return (own - outputs).scatter(0, y.unsqueeze(0), torch.inf)


def pull_on_outputs(A: Tensor, y: Tensor) -> Tensor:
    """∂(Σ_ic a_ic q_ic)/∂f(X), both (k, n): a_ic leaves class c and goes to class y_i. A is 0 at c = y_i."""
    return (-A).scatter(0, y.unsqueeze(0), A.sum(0, keepdim=True))


# --- Losses, in the log domain -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MarginLoss:
    """A loss F of margins that falls like e^{−q}.

    Attributes:
        log_value_and_pull: Q ↦ log F and −∂log F/∂Q for Q of (k, n), exact where F itself is below every float.
        of_no_margin: ℓ(0). F below it leaves every margin positive.
    """

    log_value_and_pull: Callable[[Tensor], tuple[Tensor, Tensor]]
    of_no_margin: float


def _exponential(Q: Tensor) -> tuple[Tensor, Tensor]:
    """F = Σ_i Σ_c exp(−q_ic) (overview, eq. 27)."""
    log_loss = torch.logsumexp(-Q.reshape(-1), 0)
    return log_loss, torch.exp(-Q - log_loss)


def _logistic(Q: Tensor) -> tuple[Tensor, Tensor]:
    """F = Σ_i log(1 + Σ_c exp(−q_ic)), the cross-entropy."""
    z = torch.logsumexp(-Q, 0)
    # log log(1 + e^z) = z − e^z/2 + …: below −37 the correction is less than a rounding, and e^z soon underflows.
    # logaddexp, not softplus, which says z from 20 on and is off by 2e-9 there.
    log_terms = torch.where(z < -37, z, torch.logaddexp(z, torch.zeros_like(z)).log())
    log_loss = torch.logsumexp(log_terms, 0)
    # ∂log(1 + e^z)/∂q_ic = −sigmoid(z)·e^{−q_ic − z}
    return log_loss, torch.exp(torch.nn.functional.logsigmoid(z) - log_loss + (-Q - z))


LOSSES = {"exponential": MarginLoss(_exponential, 1.0), "logistic": MarginLoss(_logistic, math.log(2.0))}


# --- Products ------------------------------------------------------------------------------------------------------


def activations(weights: Sequence[Tensor], X: Tensor) -> list[Tensor]:
    """[X, W_1X, …, W_L⋯W_1X], one sample a column."""
    H = [X]
    for weight in weights:
        H.append(weight @ H[-1])
    return H


def layer_gradients(weights: Sequence[Tensor], H: Sequence[Tensor], B: Tensor) -> list[Tensor]:
    """∂⟨B, f(X)⟩/∂W_l = (W_L⋯W_{l+1})ᵀ B (W_{l−1}⋯W_1X)ᵀ for all l, in one pass from the top."""
    gradients, above = [], B
    for weight, inputs in zip(reversed(weights), reversed(H[:-1]), strict=True):
        gradients.append(above @ inputs.mT)
        above = weight.mT @ above
    return gradients[::-1]


def squared_norm(tensors: Sequence[Tensor]) -> float:
    """‖Θ‖² over all layers."""
    return sum(float(torch.linalg.vector_norm(tensor)) ** 2 for tensor in tensors)


# --- What is refused -----------------------------------------------------------------------------------------------


def require_classifier(weights: Sequence[Tensor], X: Tensor, y: Tensor) -> None:
    """Refuse weights that do not chain from X's rows to the classes of y."""
    require_labelled(X, y)
    if not weights:
        raise ValueError("expected at least one weight matrix, got none")
    size = X.shape[0]
    for layer, weight in enumerate(weights, start=1):
        require_matrix(weight, f"W_{layer}")
        require_finite(weight, f"W_{layer}")
        if weight.shape[1] != size:
            raise ValueError(f"W_{layer} has {weight.shape[1]} columns, but what it is applied to has {size} rows")
        size = weight.shape[0]
    if int(y.max()) >= size:
        raise ValueError(f"labels must lie in [0, {size}), the rows of W_{len(weights)}, got {int(y.max())}")
    if size < 2:
        raise ValueError("a margin needs at least two classes, so two rows of the last weight; got one")


def require_labelled(X: Tensor, y: Tensor) -> None:
    """Refuse samples and labels that do not go together."""
    require_matrix(X, "X")
    require_finite(X, "X")
    if y.ndim != 1 or y.shape[0] != X.shape[1]:
        raise ValueError(
            f"y must be ({X.shape[1]},), a label for every column of X (one sample a column), got shape {tuple(y.shape)}"
        )
    if y.is_floating_point() or y.dtype == torch.bool or int(y.min()) < 0:
        raise ValueError(
            f"labels must be integers from 0 on, got {y.dtype} from {y.min().item()} to {y.max().item()}; "
            "number the classes 0, 1, …, k − 1"
        )
