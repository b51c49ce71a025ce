"""The layers that a factorized model holds: two thin maps in a row where one wide map was."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.compression.factors import balanced_factors, output_directions


class LowRankLinear(nn.Module):
    """y = (x·rightᵀ)·leftᵀ + bias: ``nn.Linear`` with the weight left·right, k(m + n) numbers instead of mn.

    Args:
        in_features: n, size of each input.
        out_features: m, size of each output.
        rank: k, 1 ≤ k ≤ min(m, n).
        bias: whether a bias (m,) is added.

    Attributes:
        right: (k, n).
        left: (m, k).
        bias: (m,), or None.

    Raises:
        ValueError: a rank outside 1…min(m, n).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from rankwise.compression import LowRankLinear
        >>> linear = nn.Linear(6, 4)
        >>> low_rank = LowRankLinear.from_linear(linear, rank=4)
        >>> x = torch.ones(2, 6)
        >>> torch.allclose(low_rank(x), linear(x), atol=1e-5), sum(p.numel() for p in low_rank.parameters())
        (True, 44)
    """

    left: nn.Parameter
    right: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        require_rank(rank, out_features, in_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.left = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A random start: entries of ``left·right`` vary as those of ``nn.Linear`` do, by 1/(3n)."""
        for factor, variance in ((self.right, 1 / self.in_features), (self.left, 1 / (3 * self.rank))):
            nn.init.normal_(factor, std=math.sqrt(variance))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """The nearest layer of this rank (Eckart & Young): a truncated SVD, √σ on either side; the bias is kept.

        Args:
            linear: any ``nn.Linear``; it is left as it is.
            rank: k.

        Raises:
            ValueError: a rank outside 1…min(m, n), or a weight with NaN or infinite entries.
        """
        m, n = linear.weight.shape
        require_rank(rank, m, n)
        U, _ = output_directions(linear.weight.detach())
        return cls.from_factors(*balanced_factors(linear.weight.detach(), U[:, :rank]), linear.bias)

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor | None) -> "LowRankLinear":
        """The layer with these factors, (m, k) and (k, n), and a copy of this bias."""
        (m, k), n = left.shape, right.shape[1]
        layer = cls(n, m, k, bias is not None, device="meta", dtype=left.dtype)
        layer.left, layer.right = nn.Parameter(left), nn.Parameter(right)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    @property
    def weight(self) -> Tensor:
        """left·right, (m, n), multiplied out at every access: for code that looks at a linear layer's weight."""
        return self.left @ self.right

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left, self.bias)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={bias}"


class LowRankConv2d(nn.Module):
    """A k × k convolution to ``rank`` channels and a 1 × 1 convolution from there: ``nn.Conv2d`` of that rank.

    The rank is that of the kernel as a matrix, out × in·k·k, so that the pair costs rank·(out + in·k·k) numbers.

    Args:
        right: the first convolution, without a bias; it carries stride, padding, dilation and padding mode.
        left: the second, 1 × 1, with the bias of the original.
    """

    def __init__(self, right: nn.Conv2d, left: nn.Conv2d):
        super().__init__()
        self.right, self.left = right, left

    @classmethod
    def like(cls, convolution: nn.Conv2d, rank: int) -> "LowRankConv2d":
        """A pair of this rank in the place of an ungrouped convolution, on its device, at a random start.

        Raises:
            ValueError: a grouped convolution, or a rank outside 1…min(out, in·k·k).
        """
        c: Any = convolution
        if c.groups != 1:
            raise ValueError(f"a convolution of {c.groups} groups is as many small matrices, which no one rank fits")
        require_rank(rank, c.out_channels, c.in_channels * math.prod(c.kernel_size))
        where = {"device": c.weight.device, "dtype": c.weight.dtype}
        kernel = (c.kernel_size, c.stride, c.padding, c.dilation)
        right = nn.Conv2d(c.in_channels, rank, *kernel, bias=False, padding_mode=c.padding_mode, **where)
        return cls(right, nn.Conv2d(rank, c.out_channels, 1, bias=c.bias is not None, **where))

    @property
    def rank(self) -> int:
        """k."""
        return self.right.out_channels

    @property
    def weight(self) -> Tensor:
        """The kernel (out, in, k, k), multiplied out at every access."""
        return torch.einsum("ok,kcij->ocij", self.left.weight[:, :, 0, 0], self.right.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))


def require_rank(rank: int, m: int, n: int) -> None:
    """Refuse what is no rank of an m × n matrix."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(m, n):
        raise ValueError(f"the rank of a {m} × {n} matrix must be a whole number from 1 to {min(m, n)}, got {rank!r}")
