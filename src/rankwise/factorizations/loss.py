"""What a loss of the end-to-end matrix is to descent, with any differentiable function as one of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Scalar = Float[Tensor, ""]


class Loss(ABC):
    """A loss of the end-to-end matrix f.

    Attributes:
        at_zero: its value at f = 0, in units of which ``tol`` counts; None where f = 0 means nothing.
    """

    at_zero: float | None = None

    @abstractmethod
    def value_and_gradient(self, f: Float[Tensor, "m n"]) -> tuple[Scalar, Float[Tensor, "m n"]]:
        """The loss and G = ∂loss/∂f."""

    def spectrum(self) -> tuple[float, float] | None:
        """σ₁ of the f that the loss asks for, and its largest curvature in f; None where they are not known."""
        return None

    def project(self, left: Float[Tensor, "m w"] | None, right: Float[Tensor, "n v"] | None) -> "Loss":
        """The same loss as a function of C where f = U C Vᵀ; a side that is None stays as it is."""
        return self if left is None and right is None else FramedLoss(self, left, right)


class AutogradLoss(Loss):
    """Any differentiable function of f; G by autograd. The step size has to be given, and ``tol`` counts absolutely.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import AutogradLoss
        >>> AutogradLoss(lambda f: f.exp().sum()).value_and_gradient(torch.zeros(1, 2))[1].tolist()
        [[1.0, 1.0]]
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def value_and_gradient(self, f: Float[Tensor, "m n"]) -> tuple[Scalar, Float[Tensor, "m n"]]:
        with torch.enable_grad():
            variable = f.detach().requires_grad_()
            value = self.function(variable)
            (G,) = torch.autograd.grad(value, variable)
        return value.detach(), G


class FramedLoss(Loss):
    """C ↦ loss(U C Vᵀ) through the whole matrix: for losses and frames without a shorter way. O(m·n·w) an evaluation."""

    def __init__(self, loss: Loss, left: Float[Tensor, "m w"] | None, right: Float[Tensor, "n v"] | None):
        self.loss, self.left, self.right, self.at_zero = loss, left, right, loss.at_zero

    def value_and_gradient(self, f: Float[Tensor, "w v"]) -> tuple[Scalar, Float[Tensor, "w v"]]:
        outer = f if self.left is None else self.left @ f
        value, G = self.loss.value_and_gradient(outer if self.right is None else outer @ self.right.mT)
        G = G if self.left is None else self.left.mT @ G
        return value, G if self.right is None else G @ self.right

    def spectrum(self) -> tuple[float, float] | None:
        """The loss's own, which orthonormal frames do not exceed; None for other frames."""
        return self.loss.spectrum() if all_orthonormal(self.left, self.right) else None


def all_orthonormal(*frames: Tensor | None) -> bool:
    """Whether the frames that are given have orthonormal columns, to a thousand roundings."""
    for frame in frames:
        if frame is not None:
            eye = torch.eye(frame.shape[1]).to(frame)
            if not torch.allclose(frame.mT @ frame, eye, rtol=0, atol=1e3 * torch.finfo(frame.dtype).eps):
                return False
    return True
