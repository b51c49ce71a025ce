"""Deep networks with an activation between the factors, the paper's outlook (ICML 2024, §5, eq. 13)."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.factorizations.deep_linear import DeepLinear

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda x: x,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "tanh": torch.tanh,
}


class DeepNetwork(nn.Module):
    """f(X) = W_L σ(W_{L−1} ⋯ σ(W_1 X)) with every factor trained; X = I gives the paper's matrix f(Θ) (eq. 13).

    Args:
        weights: the factors, first applied first, as for :class:`DeepLinear`, whose starts serve here too.
        activation: σ, a name of ``ACTIVATIONS`` or a function of a tensor.

    Raises:
        ValueError: factors that do not chain, or an unknown name.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import DeepLinear, DeepNetwork
        >>> net = DeepNetwork(DeepLinear.orthogonal(6, 3, 0.5).weights, "relu")
        >>> net(torch.eye(6)).shape
        torch.Size([6, 6])
    """

    def __init__(self, weights: Iterable[Tensor], activation: str | Activation):
        super().__init__()
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: expected {', '.join(ACTIVATIONS)} or a function")
        self.weights = DeepLinear(weights).weights
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else activation

    def forward(self, X: Float[Tensor, "n N"]) -> Float[Tensor, "m N"]:
        """Samples are columns, as in the paper's formulas."""
        return network_output(list(self.weights), self.activation, X)


def network_output(
    weights: Sequence[Float[Tensor, "_ _"]], activation: Activation, X: Float[Tensor, "n N"]
) -> Float[Tensor, "m N"]:
    """W_L σ(W_{L−1} ⋯ σ(W_1 X)).

    Example:
        >>> import torch
        >>> from rankwise.factorizations.nonlinear import network_output
        >>> network_output([-torch.eye(1), torch.eye(1)], torch.relu, torch.ones(1, 1)).item()
        0.0
    """
    hidden = weights[0] @ X
    for weight in weights[1:]:
        hidden = weight @ activation(hidden)
    return hidden


def network_gradients(
    network: DeepNetwork, target: Float[Tensor, "m N"], inputs: Float[Tensor, "n N"] | None = None
) -> list[Float[Tensor, "_ _"]]:
    """∇_{W_l} ½‖f(X) − Φ‖² for every factor, by autograd.

    Args:
        network: any :class:`DeepNetwork`.
        target: Φ.
        inputs: X; the identity unless given.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import DeepNetwork, network_gradients
        >>> [g.item() for g in network_gradients(DeepNetwork([torch.ones(1, 1)] * 2, "relu"), torch.zeros(1, 1))]
        [1.0, 1.0]
    """
    weights = list(network.weights)
    X = identity_inputs(network) if inputs is None else inputs
    with torch.enable_grad():
        loss = 0.5 * (network(X) - target).square().sum()
        return list(torch.autograd.grad(loss, weights))


def gradient_spectrum(
    network: DeepNetwork, target: Float[Tensor, "m N"], layer: int, inputs: Float[Tensor, "n N"] | None = None
) -> Float[Tensor, " s"]:
    """Singular values of ∇_{W_l}, which at a small start show the target's rank (Fig 9: L = 3, l = 2, ReLU).

    Args:
        network: usually at its start.
        target: Φ.
        layer: l, counted from 1 as in the paper.
        inputs: X; the identity unless given.

    Raises:
        ValueError: no such layer.

    Example:
        >>> import torch
        >>> from rankwise.factorizations import DeepLinear, DeepNetwork, gradient_spectrum
        >>> net = DeepNetwork(DeepLinear.orthogonal(8, 3, 1e-3, generator=torch.Generator().manual_seed(0)).weights, "tanh")
        >>> s = gradient_spectrum(net, torch.diag(torch.tensor([2.0, 1, 0, 0, 0, 0, 0, 0])), layer=2)
        >>> bool(s[1] > 1e3 * s[2])
        True
    """
    if not 1 <= layer <= len(network.weights):
        raise ValueError(f"layer counts from 1 to {len(network.weights)}, got {layer}")
    return torch.linalg.svdvals(network_gradients(network, target, inputs)[layer - 1])


def identity_inputs(network: DeepNetwork) -> Float[Tensor, "n n"]:
    """X = I of the network's input size."""
    first = network.weights[0]
    return torch.eye(first.shape[1], dtype=first.dtype, device=first.device)
