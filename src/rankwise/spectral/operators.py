"""Matrices given by their products: what a truncated SVD needs of a matrix too large to write out."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rankwise.spectral.precision import compute_dtype


@runtime_checkable
class MatrixOperator(Protocol):
    """A matrix A known by its products. ``dtype`` is the dtype the products come in (float32 or float64)."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def matmul(self, X: Tensor) -> Tensor:
        """A @ X."""
        ...

    def rmatmul(self, X: Tensor) -> Tensor:
        """Aᵀ @ X."""
        ...

    def squared_norm(self) -> float:
        """‖A‖_F², computed exactly."""
        ...


class DenseMatrix:
    """A stored (dense or sparse) torch matrix behind the operator protocol."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix.to(compute_dtype(matrix.dtype))
        # Sparse layouts have no cheap transposed product through .mT on every backend; keep the transpose once.
        self._transpose = self.matrix.mT if matrix.layout == torch.strided else self.matrix.t().coalesce()

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def matmul(self, X: Tensor) -> Tensor:
        return self.matrix @ X

    def rmatmul(self, X: Tensor) -> Tensor:
        return self._transpose @ X

    def squared_norm(self) -> float:
        return squared_norm_of(self.matrix if self.matrix.layout == torch.strided else self.matrix.values())


class OuterProduct:
    """Σ_i left_i right_iᵀ kept as its N pairs: a linear layer's weight gradient before anybody multiplies it out.

    Args:
        left: (N, m), for a gradient the derivative of the loss by the layer's outputs.
        right: (N, n), for a gradient the layer's inputs.
    """

    def __init__(self, left: Float[Tensor, "N m"], right: Float[Tensor, "N n"]):
        if left.ndim != 2 or right.ndim != 2 or left.shape[0] != right.shape[0]:
            raise ValueError(
                "expected two matrices with the same number of rows, "
                f"got shapes {tuple(left.shape)} and {tuple(right.shape)}"
            )
        dtype = compute_dtype(torch.promote_types(left.dtype, right.dtype))
        self.left, self.right = left.to(dtype), right.to(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[1], self.right.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    def matmul(self, X: Tensor) -> Tensor:
        return self.left.mT @ (self.right @ X)

    def rmatmul(self, X: Tensor) -> Tensor:
        return self.right.mT @ (self.left @ X)

    def squared_norm(self) -> float:
        # ‖Σδxᵀ‖² = <δδᵀ, xxᵀ>: N×N instead of m×n, and N is small where this class is used. In float64 throughout:
        # pairs may cancel, and float32 would leave rounding, even a negative number.
        left, right = self.left.double(), self.right.double()
        return max(float(((left @ left.mT) * (right @ right.mT)).sum()), 0.0)


class SparseRows:
    """A matrix with few non-zero rows: the gradient of an embedding table.

    Args:
        rows: (N,) distinct row numbers.
        values: (N, n), their content.
        num_rows: number of rows of the whole matrix.
    """

    def __init__(self, rows: Int[Tensor, " N"], values: Float[Tensor, "N n"], num_rows: int):
        if rows.ndim != 1 or values.ndim != 2 or rows.shape[0] != values.shape[0]:
            raise ValueError(
                f"expected N rows and N×n values, got shapes {tuple(rows.shape)} and {tuple(values.shape)}"
            )
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= num_rows):
            raise ValueError(f"row numbers must lie in [0, {num_rows}), got {int(rows.min())} to {int(rows.max())}")
        if rows.unique().numel() != rows.numel():
            raise ValueError("row numbers must be distinct; add up the values of repeated rows first")
        self.rows, self.values, self.num_rows = rows, values.to(compute_dtype(values.dtype)), num_rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def matmul(self, X: Tensor) -> Tensor:
        out = X.new_zeros(self.num_rows, X.shape[1])
        return out.index_copy_(0, self.rows, self.values @ X)

    def rmatmul(self, X: Tensor) -> Tensor:
        return self.values.mT @ X[self.rows]

    def squared_norm(self) -> float:
        return squared_norm_of(self.values)


def squared_norm_of(values: Tensor) -> float:
    """Σx² in float64 from the first square on: float32 squares under- and overflow at 1e-23 and 1e19."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def as_operator(matrix: "Tensor | MatrixOperator") -> MatrixOperator:
    """A tensor as an operator; an operator as itself."""
    if isinstance(matrix, Tensor):
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise ValueError(f"expected a non-empty 2-D matrix, got shape {tuple(matrix.shape)}")
        return DenseMatrix(matrix if matrix.layout == torch.strided else matrix.to_sparse_coo().coalesce())
    if not isinstance(matrix, MatrixOperator):
        raise TypeError(
            "expected a 2-D tensor or an operator with shape, dtype, device, matmul, rmatmul and squared_norm, "
            f"got {type(matrix).__name__}"
        )
    return matrix
