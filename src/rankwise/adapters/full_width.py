"""The full-width factors that Deep LoRA compresses, beside a linear layer: for studies, not for shipping.

The published Deep LoRA tables come from these, not from the compressed method (docs/errata.md). Three d × d factors a layer
hold hundreds of times the numbers of an adapter, so this is no PEFT method: nothing is saved, merged or exported.
"""

from collections.abc import Iterable
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.factorizations import DeepLinear


class FullWidthLinear(nn.Module):
    """y = W₀x + W_L⋯W_1·x with W_l(0) = ε·Q_l, every factor trained (ICML 2024, eq. 12 before compression).

    For a rectangular layer the inner size is max(d_out, d_in), as in the published code; the end factor that is not
    square starts semi-orthogonal. The product is not shifted to zero: at ε = 1e-3 and L = 3 it starts at norm 1e-9.

    Args:
        base_layer: W₀, frozen by whoever adds this.
        depth: L, at least 1.
        init_scale: ε.

    Example:
        >>> from torch import nn
        >>> from rankwise.adapters.full_width import FullWidthLinear
        >>> [tuple(w.shape) for w in FullWidthLinear(nn.Linear(8, 5)).deep.weights]
        [(8, 8), (8, 8), (5, 8)]
    """

    def __init__(self, base_layer: nn.Linear, depth: int = 3, init_scale: float = 1e-3):
        super().__init__()
        rows, columns = base_layer.out_features, base_layer.in_features
        width = max(rows, columns)
        sizes = [columns, *[width] * (depth - 1), rows]
        self.base_layer = base_layer
        self.deep = DeepLinear.orthogonal(sizes, init_scale=init_scale).to(base_layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.deep(x)

    def factor_pair(self) -> tuple[Float[Tensor, "m d"], Float[Tensor, "d n"]]:
        """ΔW as W_L⋯W_2 and W_1 (I and W_1 for a single factor)."""
        first, *others = self.deep.weights
        start = torch.eye(first.shape[0]).to(first)
        return reduce(lambda below, weight: weight @ below, others, start), first


def add_full_width(model: nn.Module, names: Iterable[str], depth: int, init_scale: float) -> None:
    """Replace the named ``nn.Linear`` layers by :class:`FullWidthLinear`; random numbers come from the global state."""
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is a {type(layer).__name__}; full-width factors stand beside nn.Linear layers")
        setattr(model.get_submodule(parent), child, FullWidthLinear(layer, depth, init_scale))
