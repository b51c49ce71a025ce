"""½‖f − Φ‖², ½‖Ω⊙(f − Φ)‖² and ½‖fX − Y‖² with G = ∂loss/∂f in closed form.

The first and the last can be rewritten for the core C of f = U C Vᵀ (:meth:`Loss.project`) and then cost O(w³) an
evaluation, whatever the size of f.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rankwise.factorizations.loss import Loss, Scalar, all_orthonormal
from rankwise.spectral import truncated_svd


class SquaredLoss(Loss):
    """½‖f − Φ‖² (ICML 2024, eq. 2), with G = f − Φ.

    Args:
        target: Φ, (m, n).
        offset: a constant to add: what frames fixed beforehand leave out.

    Raises:
        ValueError: a target that is not a matrix of finite floats.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import SquaredLoss
        >>> value, G = SquaredLoss(torch.tensor([[3.0]])).value_and_gradient(torch.tensor([[1.0]]))
        >>> value.item(), G.item()
        (2.0, -2.0)
    """

    def __init__(self, target: Float[Tensor, "m n"], offset: float = 0.0):
        norm = _finite_norm("target", target)
        self.target, self.offset = target.detach(), offset
        self.at_zero = 0.5 * norm**2 + offset

    def value_and_gradient(self, f: Float[Tensor, "m n"]) -> tuple[Scalar, Float[Tensor, "m n"]]:
        G = f - self.target
        return _half_square(G) + self.offset, G

    def spectrum(self) -> tuple[float, float]:
        return leading_singular_value(self.target), 1.0

    def project(self, left: Float[Tensor, "m w"] | None, right: Float[Tensor, "n v"] | None) -> Loss:
        """½‖C − UᵀΦV‖² and the constant ½(‖Φ‖² − ‖UᵀΦV‖²), for orthonormal frames."""
        if not all_orthonormal(left, right):
            return super().project(left, right)
        inside, outside = _split(self.target, left, right)
        return SquaredLoss(inside, self.offset + 0.5 * outside)


class MaskedSquaredLoss(Loss):
    """½‖Ω⊙(f − Φ)‖² (eq. 10), with G = Ω⊙(f − Φ).

    Args:
        target: Φ, (m, n); what lies outside the mask is not looked at and may be nan.
        mask: Ω, (m, n), True where Φ is observed.

    Raises:
        ValueError: shapes that differ, nothing observed, or an observed entry that is not finite.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import MaskedSquaredLoss
        >>> loss = MaskedSquaredLoss(torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]]))
        >>> loss.value_and_gradient(torch.zeros(1, 2))[1].tolist()
        [[-1.0, 0.0]]
    """

    def __init__(self, target: Float[Tensor, "m n"], mask: Bool[Tensor, "m n"]):
        if target.shape != mask.shape:
            raise ValueError(
                f"the mask must have the target's shape {tuple(target.shape)}, got {tuple(mask.shape)}; "
                "it is True where an entry is observed"
            )
        if not mask.any():
            raise ValueError("the mask observes no entry, so there is nothing to fit")
        self.mask, self.target = mask, target.detach().masked_fill(~mask, 0)
        self.at_zero = 0.5 * _finite_norm("observed part of the target", self.target) ** 2

    def value_and_gradient(self, f: Float[Tensor, "m n"]) -> tuple[Scalar, Float[Tensor, "m n"]]:
        G = (f - self.target).masked_fill_(~self.mask, 0)
        return _half_square(G), G

    def spectrum(self) -> tuple[float, float]:
        """σ₁(Ω⊙Φ)/p for the unknown σ₁(Φ), and the fullest row's or column's observed share for the curvature.

        A direction u₁xᵀ with u₁ spread evenly meets Σ_j x_j²·(share of column j), never more than the fullest column.
        """
        shares = self.mask.double()
        return leading_singular_value(self.target) / float(shares.mean()), float(
            max(shares.mean(0).max(), shares.mean(1).max())
        )


class RegressionLoss(Loss):
    """½‖f X − Y‖², with G = (f X − Y)Xᵀ.

    The compression of Theorem 2.1 is exact only for XXᵀ = I (:func:`whitened`), where this is ½‖f − YXᵀ‖² and a
    constant. More samples than inputs are first reduced to as many as inputs by a QR of Xᵀ, which changes nothing.

    Args:
        inputs: X, (n, N), one sample a column.
        outputs: Y, (m, N).
        offset: a constant to add.

    Raises:
        ValueError: different numbers of samples, or values that are not finite.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import RegressionLoss
        >>> value, G = RegressionLoss(torch.tensor([[2.0]]), torch.tensor([[6.0]])).value_and_gradient(torch.ones(1, 1))
        >>> value.item(), G.item()
        (8.0, -8.0)
    """

    def __init__(self, inputs: Float[Tensor, "n N"], outputs: Float[Tensor, "m N"], offset: float = 0.0):
        if inputs.shape[1] != outputs.shape[1]:
            raise ValueError(
                f"inputs have {inputs.shape[1]} samples and outputs {outputs.shape[1]}; both hold one sample a column"
            )
        _finite_norm("matrix of inputs", inputs)
        self.at_zero = 0.5 * _finite_norm("matrix of outputs", outputs) ** 2 + offset
        X, Y = inputs.detach(), outputs.detach()
        if X.shape[1] > X.shape[0]:
            Q, R = torch.linalg.qr(X.mT)
            X = R.mT
            Y, left_out = _split(Y, None, Q)
            offset += 0.5 * left_out
        self.inputs, self.outputs, self.offset = X, Y, offset

    def value_and_gradient(self, f: Float[Tensor, "m n"]) -> tuple[Scalar, Float[Tensor, "m n"]]:
        residual = f @ self.inputs - self.outputs
        return _half_square(residual) + self.offset, residual @ self.inputs.mT

    def spectrum(self) -> tuple[float, float]:
        """σ₁(Y X⁺), the least-norm solution's, and σ₁(X)²."""
        solution = self.outputs @ torch.linalg.pinv(self.inputs)
        return leading_singular_value(solution), leading_singular_value(self.inputs) ** 2

    def project(self, left: Float[Tensor, "m w"] | None, right: Float[Tensor, "n v"] | None) -> Loss:
        """½‖C VᵀX − UᵀY‖² and the constant ½(‖Y‖² − ‖UᵀY‖²); V need not be orthonormal."""
        if not all_orthonormal(left):
            return super().project(left, right)
        inside, outside = _split(self.outputs, left, None)
        X = self.inputs if right is None else right.mT @ self.inputs
        return RegressionLoss(X, inside, self.offset + 0.5 * outside)


def whitened(X: Float[Tensor, "n N"]) -> Float[Tensor, "n N"]:
    """(XXᵀ)^{-1/2} X, the inputs turned and scaled so that XXᵀ = I.

    Raises:
        ValueError: inputs of deficient rank, which nothing makes white.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import whitened
        >>> X = whitened(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 5.0]]))
        >>> bool(torch.allclose(X @ X.T, torch.eye(2), atol=1e-6))
        True
    """
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    if X.shape[0] > X.shape[1] or not S[-1] > S[0] * max(X.shape) * torch.finfo(X.dtype).eps:
        raise ValueError(
            f"{X.shape[0]} inputs over {X.shape[1]} samples do not have full row rank, so XXᵀ = I cannot be reached; "
            "drop dependent inputs or take more samples"
        )
    return U @ Vh


def _half_square(residual: Tensor) -> Tensor:
    flat = residual.reshape(-1)
    return 0.5 * torch.dot(flat, flat)


def leading_singular_value(matrix: Float[Tensor, "m n"]) -> float:
    """σ₁, by a sketch with a seed of its own where the matrix is large."""
    generator = torch.Generator(matrix.device).manual_seed(0)
    return float(truncated_svd(matrix.detach(), 1, generator=generator, estimate_error=False).S[0])


def _split(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, float]:
    """UᵀMV for orthonormal frames, and ‖M‖² − ‖UᵀMV‖² as ‖M − U(UᵀMV)Vᵀ‖²: a difference would leave rounding of ‖M‖²."""
    if right is None:
        if left is None:
            return matrix, 0.0
        inside = left.mT @ matrix
        tall, wide = left, inside
    elif left is None:
        inside = matrix @ right
        tall, wide = inside, right.mT
    else:
        inside = left.mT @ (matrix @ right)
        tall, wide = left, inside @ right.mT
    outside = 0.0
    for rows, factor in zip(matrix.split(64), tall.split(64), strict=True):  # a block fits the cache
        rest = torch.addmm(rows, factor, wide, alpha=-1)
        outside += float(torch.linalg.vector_norm(rest, dtype=torch.float64)) ** 2
    return inside, outside


def _finite_norm(name: str, matrix: Tensor) -> float:
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(f"the {name} must be a matrix of floats, got {matrix.dtype} of shape {tuple(matrix.shape)}")
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    if norm != norm or norm == float("inf"):
        bad = ~torch.isfinite(matrix)
        place = bad.nonzero()[0].tolist() if bad.any() else "none, but its norm overflows"
        raise ValueError(
            f"the {name} has {int(bad.sum())} entries that are not finite (first at {place}); "
            "replace them, or leave them out with MaskedSquaredLoss"
        )
    return norm
