"""A model's parameters as the chain of matrices that descent multiplies, and as the tensors that it moves."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.factorizations.compressed import CompressedDeepLinear
from rankwise.factorizations.deep_linear import DeepLinear
from rankwise.factorizations.loss import Loss


@dataclass(frozen=True)
class TrainedChain:
    """What descent works on.

    Attributes:
        gradients: a buffer for each parameter that trains, in the model's order.
        rates: γ of each, its learning rate over η.
        factors: W_1 … W_L, first applied first: views of the parameters.
        factor_gradients: views of the gradients; None for a factor that does not train.
        factor_rates: γ of each factor; 0 where it does not train.
        loss: of the product of the factors.
    """

    gradients: dict[nn.Parameter, Tensor]
    rates: list[float]
    factors: list[Tensor]
    factor_gradients: list[Tensor | None]
    factor_rates: list[float]
    loss: Loss


def trained_chain(model: DeepLinear | CompressedDeepLinear, loss: Loss, outer_lr_ratio: float) -> TrainedChain:
    """Frames that do not train go into the loss, so that what is left is small; frames that do are factors of the chain.

    Raises:
        ValueError: nothing to train.
    """
    gradients = {p: torch.zeros_like(p, requires_grad=False) for p in model.parameters() if p.requires_grad}
    if not gradients:
        raise ValueError("no parameter of the model has requires_grad, so there is nothing to train")
    if isinstance(model, DeepLinear):
        factors = [weight.detach() for weight in model.weights]
        views = [gradients.get(weight) for weight in model.weights]
        factor_rates = [float(view is not None) for view in views]
        return TrainedChain(gradients, [1.0] * len(gradients), factors, views, factor_rates, loss)

    U, V, inner = model.left, model.right, model.inner
    depth = len(inner)
    factors = list(inner.detach().unbind(0))
    views = list(gradients[inner].unbind(0)) if inner in gradients else [None] * depth
    factor_rates = [float(inner in gradients)] * depth
    if V in gradients:
        factors, views = [V.detach().mT, *factors], [gradients[V].mT, *views]
        factor_rates = [outer_lr_ratio, *factor_rates]
    if U in gradients:
        factors, views = [*factors, U.detach()], [*views, gradients[U]]
        factor_rates = [*factor_rates, outer_lr_ratio]
    loss = loss.project(*(None if frame in gradients else frame.detach() for frame in (U, V)))
    rates = [1.0 if parameter is inner else outer_lr_ratio for parameter in gradients]
    return TrainedChain(gradients, rates, factors, views, factor_rates, loss)
