"""The gradient of every adapted layer's weight, one layer at a time, without weight gradients.

For y = Wx the gradient is Σ (∂loss/∂y) xᵀ. A forward hook slips an identity function behind the layer's output; its
backward pass sees ∂loss/∂y and the saved x. Works for frozen, quantized and shared layers alike, and the layer's
gradient is handed over and dropped as soon as the last of its calls has been differentiated.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.layers import DeepLoraLayer, ParamWrapper
from rankwise.spectral import MatrixOperator, OuterProduct
from rankwise.spectral.operators import as_operator


class LayerGradient:
    """Σ δᵢxᵢᵀ of one layer: as pairs while they are smaller than the matrix, as one accumulated matrix after that."""

    def __init__(self, out_features: int, in_features: int):
        self.out_features, self.in_features = out_features, in_features
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.dense: Tensor | None = None

    def add(self, delta: Tensor, x: Tensor) -> None:
        """Add Σ δᵢxᵢᵀ over all leading dimensions of δ (…, m) and x (…, n)."""
        self.pairs.append((delta.reshape(-1, self.out_features), x.reshape(-1, self.in_features)))
        rows = sum(pair[0].shape[0] for pair in self.pairs)
        if (
            self.dense is not None
            or rows * (self.out_features + self.in_features) > self.out_features * self.in_features
        ):
            self._multiply_out()

    def add_matrix(self, matrix: Tensor) -> None:
        """Add a part that is a whole (m, n) matrix already."""
        wide = matrix if matrix.dtype == torch.float64 else matrix.float()
        self.dense = wide if self.dense is None else self.dense + wide

    def _multiply_out(self) -> None:
        for delta, x in self.pairs:
            wide = torch.float64 if torch.float64 in (delta.dtype, x.dtype) else torch.float32
            delta, x = delta.to(wide), x.to(wide)
            if self.dense is None:
                self.dense = delta.mT @ x
            else:
                self.dense.addmm_(delta.mT, x)
        self.pairs.clear()

    def operator(self) -> MatrixOperator | None:
        """The gradient so far, or None if the layer was never reached."""
        if self.dense is not None:
            return as_operator(self.dense)
        if not self.pairs:
            return None
        deltas, xs = zip(*self.pairs, strict=True)
        return OuterProduct(torch.cat(deltas), torch.cat(xs))


class _Watch(torch.autograd.Function):
    """Identity on the output; on the way back it reports (∂loss/∂output, input)."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, report: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.report = report
        ctx.save_for_backward(x)  # as a saved tensor, so that gradient checkpointing recomputes instead of keeping it
        return output.clone()  # no view: what follows may work in place, as nn.ReLU(inplace=True) does

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:
        ctx.report(delta, ctx.saved_tensors[0])
        return delta, None, None


class GradientCapture:
    """Runs a loss on the *unadapted* model and hands each layer's weight gradient to ``consume``.

    Args:
        layers: name → Deep LoRA layer.
        consume: called once per layer and batch that reaches it, as ``consume(name, LayerGradient)``, during the
            backward pass; for a stack of experts once an expert, under the layer's ``matrix_names``.
    """

    def __init__(self, layers: dict[str, DeepLoraLayer], consume: Callable[[str, LayerGradient], None]):
        self.layers, self.consume = layers, consume
        self.with_rows: set[str] = set()  # layers that any row of any batch went through
        self.open: dict[str, LayerGradient] = {}
        self.calls_left: dict[str, int] = {}
        self.differentiating = False

    def run(self, loss_of_batch: Callable[[], Tensor]) -> float:
        """One forward and backward pass; returns the loss."""
        self.open.clear()
        self.calls_left.clear()
        self.differentiating = False
        handles = []
        for name, layer in self.layers.items():
            if isinstance(layer, ParamWrapper):
                layer.probe = self._probe(name, layer)
            else:
                handles.append(layer.register_forward_hook(self._hook(name)))
        try:
            with torch.enable_grad():
                loss = loss_of_batch()
                _require_scalar(loss)
                self.differentiating = True
                if loss.requires_grad:
                    loss.backward()
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.layers.values():
                if isinstance(layer, ParamWrapper):
                    layer.probe = None
        for name in list(self.open):  # layers with calls that the loss does not depend on
            self._finish(name)
        return float(loss.detach())

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            self._count(name)
            if output.numel():
                self.with_rows.add(name)
            if not torch.is_grad_enabled():
                return None
            # Everything below the first adapted layer is frozen: its output starts the graph.
            output = output if output.requires_grad else output.detach().requires_grad_()
            return _Watch.apply(output, inputs[0].detach(), lambda delta, x: self._add(name, delta, x))

        return hook

    def _add(self, name: str, delta: Tensor, x: Tensor) -> None:
        layer = self.layers[name]
        gradient = self.open.setdefault(name, LayerGradient(layer.out_features, layer.in_features))
        layer.add_gradient(gradient, delta, x)
        self.calls_left[name] -= 1
        if self.calls_left[name] == 0:
            self._finish(name)

    def _count(self, name: str) -> None:
        if not self.differentiating:  # a recomputation under gradient checkpointing is no new call
            self.calls_left[name] = self.calls_left.get(name, 0) + 1

    def _probe(self, name: str, layer: ParamWrapper) -> Callable[[Tensor], Tensor]:
        """Puts a leaf in the weight's place, whose gradient is the weight's: a parameter has no output to watch."""

        def report(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            self.calls_left[name] -= 1
            for slot, matrix in zip(layer.matrix_names(name), layer.matrices(gradient), strict=True):  # type: ignore[arg-type]
                self.open.setdefault(slot, LayerGradient(*matrix.shape)).add_matrix(matrix)
                if self.calls_left[name] == 0:
                    self._finish(slot)

        def probe(weight: Tensor) -> Tensor:
            self._count(name)
            self.with_rows.update(layer.matrix_names(name))
            if not torch.is_grad_enabled():
                return weight
            leaf = weight.detach().requires_grad_()
            leaf.register_post_accumulate_grad_hook(report)
            return leaf

        return probe

    def _finish(self, name: str) -> None:
        self.consume(name, self.open.pop(name))


def _require_scalar(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be a single number as a tensor, got {got}; reduce it with .mean()")
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"the loss is {loss.item()}, so its gradient points nowhere; look at this batch and its labels"
        )


@contextmanager
def unadapted(model: nn.Module, layers: dict[str, DeepLoraLayer]) -> Iterator[None]:
    """The model in eval mode, everything frozen, these layers switched off; every flag restored afterwards."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    disabled = [(layer, layer._disable_adapters) for layer in layers.values()]
    try:
        model.eval()
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        for layer in layers.values():
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in disabled:
            layer._disable_adapters = was
        for parameter, was in trainable:
            parameter.requires_grad_(was)
        for module, was in training:
            module.training = was
