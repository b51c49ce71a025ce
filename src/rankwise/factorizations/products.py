"""Products of a chain of factors, and the gradients of a loss of the whole product by each of them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def prefix_products(factors: Sequence[Float[Tensor, "_ _"]]) -> list[Float[Tensor, "_ _"]]:
    """[W_1, W_2 W_1, …, W_L ⋯ W_1]: L − 1 products, the last entry is the whole.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import prefix_products
        >>> [p.item() for p in prefix_products([torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([[5.0]])])]
        [2.0, 6.0, 30.0]
    """
    prefixes = [factors[0]]
    for factor in factors[1:]:
        prefixes.append(factor @ prefixes[-1])
    return prefixes


def factor_gradients(
    factors: Sequence[Float[Tensor, "_ _"]],
    prefixes: Sequence[Float[Tensor, "_ _"]],
    G: Float[Tensor, "m n"],
    out: Sequence[Float[Tensor, "_ _"] | None] | None = None,
) -> list[Float[Tensor, "_ _"] | None]:
    """∇_{W_l} = (W_L ⋯ W_{l+1})ᵀ G (W_{l−1} ⋯ W_1)ᵀ for all l in one pass from the top (ICML 2024, eq. 14).

    2(L − 1) products beyond the prefixes; nothing is multiplied twice.

    Args:
        factors: W_1, …, W_L, first applied first.
        prefixes: of :func:`prefix_products`.
        G: gradient of the loss by the whole product.
        out: where to write, one tensor of each factor's shape; None for a factor that is not trained.

    Returns:
        The gradients in the order of the factors, ``out`` if it was given.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import factor_gradients, prefix_products
        >>> factors = [torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([[5.0]])]
        >>> [g.item() for g in factor_gradients(factors, prefix_products(factors), torch.ones(1, 1))]
        [15.0, 10.0, 6.0]
    """
    gradients = [torch.empty_like(factor) for factor in factors] if out is None else out
    above = G  # (W_L ⋯ W_{l+1})ᵀ G
    for layer in range(len(factors) - 1, 0, -1):
        gradient = gradients[layer]
        if gradient is not None:
            torch.mm(above, prefixes[layer - 1].mT, out=gradient)
        above = factors[layer].mT @ above
    if gradients[0] is not None:
        gradients[0].copy_(above)
    return list(gradients)
