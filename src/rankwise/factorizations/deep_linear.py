"""The full-width deep factorization W_L ⋯ W_1."""

from collections.abc import Callable, Iterable, Sequence
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

    def __init__(self, weights: Iterable[Float[Tensor, "_ _"]]):
        super().__init__()
        weights = list(weights)
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
        width: int | Sequence[int],
        depth: int | None = None,
        init_scale: float | Sequence[float] = 1e-3,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "DeepLinear":
        """Factors W_l(0) = ε_l Q_l with Q_l Haar orthogonal, semi-orthogonal where a factor is not square (eq. 3).

        Args:
            width: d, rows and columns of every factor; or the sizes d_0, …, d_L, input first.
            depth: L, number of factors; not needed with sizes.
            init_scale: ε for all factors, or one ε_l each (first applied first).
            generator: source of the random frames.
            dtype: of the factors.

        Raises:
            ValueError: sizes, depth and scales that do not go together, or a size below 1.

        Example:
            >>> from rankwise.factorizations import DeepLinear
            >>> [tuple(weight.shape) for weight in DeepLinear.orthogonal([5, 8, 3], init_scale=0.1).weights]
            [(8, 5), (3, 8)]
        """

        def frame(rows: int, columns: int, scale: float) -> Tensor:
            if rows < columns:
                return haar_frame(columns, rows, scale=scale, generator=generator, dtype=dtype).mT
            return haar_frame(rows, columns, scale=scale, generator=generator, dtype=dtype)

        return cls(_drawn(frame, width, depth, init_scale))

    @classmethod
    def gaussian(
        cls,
        width: int | Sequence[int],
        depth: int | None = None,
        init_scale: float | Sequence[float] = 1e-3,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "DeepLinear":
        """Entries N(0, ε_l²/max(m, n)): ‖W_l‖_F² is on average what :meth:`orthogonal` gives, σ₁ about 2ε_l if square.

        Arguments and errors as there.
        """

        def entries(rows: int, columns: int, scale: float) -> Tensor:
            deviation = scale / max(rows, columns) ** 0.5
            return deviation * torch.randn(rows, columns, generator=generator, dtype=dtype)

        return cls(_drawn(entries, width, depth, init_scale))

    @classmethod
    def uniform(
        cls,
        width: int | Sequence[int],
        depth: int | None = None,
        init_scale: float | Sequence[float] = 1e-3,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "DeepLinear":
        """Entries uniform on [−a, a] with a = ε_l·√(3/max(m, n)): the variance of :meth:`gaussian`.

        Arguments and errors as in :meth:`orthogonal`.
        """

        def entries(rows: int, columns: int, scale: float) -> Tensor:
            half_width = scale * (3 / max(rows, columns)) ** 0.5
            return half_width * (2 * torch.rand(rows, columns, generator=generator, dtype=dtype) - 1)

        return cls(_drawn(entries, width, depth, init_scale))

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


def _drawn(
    draw: Callable[[int, int, float], Tensor],
    width: int | Sequence[int],
    depth: int | None,
    init_scale: float | Sequence[float],
) -> list[Tensor]:
    """One factor for every pair of neighbouring sizes, drawn in the order in which they apply."""
    if isinstance(width, int):
        if depth is None:
            raise ValueError("one width for all factors does not say how many there are; give depth too")
        sizes = [width] * (depth + 1)
    else:
        sizes = list(width)
        if depth is not None and depth != len(sizes) - 1:
            raise ValueError(f"{len(sizes)} sizes make {len(sizes) - 1} factors, but depth is {depth}; leave depth out")
    if min(sizes, default=1) < 1:
        raise ValueError(f"every width must be at least 1, got {sizes}")
    scales = [init_scale] * (len(sizes) - 1) if isinstance(init_scale, int | float) else list(init_scale)
    if len(scales) != len(sizes) - 1:
        raise ValueError(f"expected one init_scale or {len(sizes) - 1} of them, got {len(scales)}")
    return [draw(m, n, scale) for (n, m), scale in zip(pairwise(sizes), scales, strict=True)]
