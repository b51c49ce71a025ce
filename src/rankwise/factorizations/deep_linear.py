"""The full-width deep factorization W_L ⋯ W_1."""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.spectral import haar_frame


class DeepLinear(nn.Module):
    """f(Θ) = W_L ⋯ W_1 with every factor trainable (ICML 2024, eq. 1).

    Args:
        weights: the factors, **first applied first**: W_1 of shape (d_1, d_0), …, W_L of shape (d_L, d_{L−1}).

    Raises:
        ValueError: no factors, or sizes that do not chain.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import DeepLinear
        >>> deep = DeepLinear.orthogonal(6, depth=3, init_scale=0.1, generator=torch.Generator().manual_seed(0))
        >>> round(torch.linalg.matrix_norm(deep.product(), 2).item(), 6)
        0.001
    """

    def __init__(self, weights: Sequence[Float[Tensor, "a b"]]):
        super().__init__()
        if not weights:
            raise ValueError("a deep factorization needs at least one factor")
        for depth, (lower, upper) in enumerate(pairwise(weights), start=1):
            if lower.shape[0] != upper.shape[1]:
                raise ValueError(
                    f"factor {depth} ends in {lower.shape[0]} rows but factor {depth + 1} has {upper.shape[1]} columns"
                )
        self.weights = nn.ParameterList([nn.Parameter(weight.detach().clone()) for weight in weights])

    @classmethod
    def orthogonal(
        cls,
        width: int,
        depth: int,
        init_scale: float | Sequence[float],
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "DeepLinear":
        """Square factors W_l(0) = ε_l Q_l with Q_l Haar orthogonal (eq. 3).

        Args:
            width: d, rows and columns of every factor.
            depth: L, number of factors.
            init_scale: ε for all factors, or one ε_l each (first applied first).
        """
        scales = [init_scale] * depth if isinstance(init_scale, int | float) else list(init_scale)
        if len(scales) != depth:
            raise ValueError(f"expected one init_scale or {depth} of them, got {len(scales)}")
        return cls([haar_frame(width, width, scale=s, generator=generator, dtype=dtype) for s in scales])

    @property
    def depth(self) -> int:
        return len(self.weights)

    def product(self) -> Float[Tensor, "m n"]:
        """W_L ⋯ W_1 as a dense matrix."""
        return reduce(lambda below, weight: weight @ below, self.weights[1:], self.weights[0])

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """W_L ⋯ W_1 x, one factor after the other."""
        for weight in self.weights:
            x = nn.functional.linear(x, weight)
        return x
