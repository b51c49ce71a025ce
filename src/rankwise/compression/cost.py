"""What a model computes and moves, layer by layer, forward and backward: before and after its matrices are factorized."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rankwise.model_structure import conv1d_types

LINEAR, PAIR, CONVOLUTION, EMBEDDING = "linear", "low-rank pair", "convolution", "embedding"
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class Product(NamedTuple):
    """One matrix product of a layer, for each row of its input: ``inputs`` numbers meet each of ``outputs``."""

    weight: Tensor
    inputs: int
    outputs: int


@dataclass(frozen=True)
class LayerCost:
    """Of one layer. FLOPs count a multiplication and an addition as two; bytes are what has to move at least.

    Attributes:
        name: of the module.
        kind: "linear", "low-rank pair", "convolution" or "embedding".
        rows: n, how many inputs it sees: tokens, or output positions of a convolution.
        forward: FLOPs of Y = WX, 2·n·in·out.
        backward_weights: FLOPs of ∇W = ∇Y·Xᵀ, as many; 0 where the weight is frozen.
        backward_inputs: FLOPs of ∇X = Wᵀ·∇Y, as many; 0 where nothing before this layer is trained.
        weight_bytes: of its weights; those that an earlier layer shares are counted there.
        stored_bytes: of its inputs, where they are kept for ∇W.
        forward_bytes: W and X read, Y written.
        backward_bytes: ∇Y and X read and ∇W written, ∇Y and W read and ∇X written, as far as they are computed.
    """

    name: str
    kind: str
    rows: int
    forward: int
    backward_weights: int
    backward_inputs: int
    weight_bytes: int
    stored_bytes: int
    forward_bytes: int
    backward_bytes: int

    @property
    def backward(self) -> int:
        """FLOPs of the backward pass."""
        return self.backward_weights + self.backward_inputs


@dataclass(frozen=True)
class CostEstimate:
    """Of a whole model: see :func:`estimate_cost`.

    Attributes:
        layers: in the model's order.
        attention_forward: FLOPs of QKᵀ and of its product with V, in all layers together; None without a sequence length.
        attention_backward: of their four gradients, as if all four were wanted.
        uncounted: parameters of two or more dimensions in modules of other kinds, whose products are not in here.
    """

    layers: tuple[LayerCost, ...]
    attention_forward: int | None
    attention_backward: int | None
    uncounted: tuple[str, ...]

    @property
    def forward(self) -> int:
        """FLOPs of all layers, without attention."""
        return sum(layer.forward for layer in self.layers)

    @property
    def backward(self) -> int:
        """FLOPs of all layers, without attention."""
        return sum(layer.backward for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def stored_bytes(self) -> int:
        """Inputs kept for the backward pass, one that several layers share for each of them; activations and norms keep more."""
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def forward_bytes(self) -> int:
        return sum(layer.forward_bytes for layer in self.layers)

    @property
    def backward_bytes(self) -> int:
        return sum(layer.backward_bytes for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        totals = ("forward", "backward", "weight_bytes", "stored_bytes", "forward_bytes", "backward_bytes")
        attention = {"attention_forward": self.attention_forward, "attention_backward": self.attention_backward}
        return {
            **{name: getattr(self, name) for name in totals},
            **attention,
            "layers": [{**vars(layer), "backward": layer.backward} for layer in self.layers],
            "uncounted": list(self.uncounted),
        }


def estimate_cost(
    model: nn.Module,
    tokens: int | Tensor | Sequence[Tensor] | Mapping[str, Any],
    *,
    sequence_length: int | None = None,
) -> CostEstimate:
    """FLOPs and bytes of a training step, layer by layer, without computing anything.

    A linear layer costs 2·n·in·out FLOPs forward and twice that backward, the 3·Θ(nd²) of the overview's App. B; a pair of
    factors of rank r costs 2·n·r·(in + out) and twice that, so it is cheaper where r(in + out) < in·out. Counted are nn.Linear,
    transformers' Conv1D, convolutions, embeddings (which compute nothing) and every module that computes left·(right·x) from
    parameters of these names, such as LowRankLinear. Biases, norms and activations are not.

    Args:
        model: any module, on the meta device too.
        tokens: n, as if every layer saw n rows; a convolution's are its output positions. Exact where every layer sees every
            token; an encoder's pooler and classifier see one a sequence, and count too much. Or a batch, a tensor or what the
            model is called with (a dict, or a sequence of positional arguments): its forward pass is then gone through on the
            meta device, where tensors have shapes and no values, and every layer counts the rows that reach it.
        sequence_length: s, tokens a sequence, for the FLOPs of attention: 4·n·s·heads·head_dim a layer forward and twice that
            backward, of whole s × s score matrices without regard to masks. From the batch's ``input_ids`` unless given.

    Returns:
        One :class:`LayerCost` a layer. The gradient of a layer's input counts where something before it is trained: before in
        the order of registration for a number, in the forward pass for a batch.

    Raises:
        ValueError: not a positive number; a batch that the model cannot be called with; a forward pass that looks at values;
            a sequence length for a model whose configuration does not say how many heads it has.

    Example:
        >>> from torch import nn
        >>> from rankwise.compression import estimate_cost
        >>> cost = estimate_cost(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), tokens=100)
        >>> [(layer.forward, layer.backward) for layer in cost.layers]
        [(409600, 409600), (64000, 128000)]
    """
    layers = {name: module for name, module in model.named_modules() if _kind(module) is not None}
    is_batch = isinstance(tokens, Tensor | Sequence | Mapping) and not isinstance(tokens, str)
    if not is_batch and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise ValueError(f"tokens must be a number of at least 1, or a batch, got {tokens!r}")
    if isinstance(tokens, int):
        calls = _calls_of_every_token(model, layers, tokens)
        total = tokens
    else:
        calls = _calls_of_a_batch(model, layers, tokens)
        ids = tokens.get("input_ids") if isinstance(tokens, Mapping) else None
        if sequence_length is None and isinstance(ids, Tensor) and ids.ndim == 2 and _has_heads(model):
            sequence_length = int(ids.shape[1])
        total = ids.numel() if isinstance(ids, Tensor) else 0
        if sequence_length is not None and not total:
            raise ValueError(
                "attention's cost follows from input_ids, which the batch has not; leave sequence_length out"
            )
    seen: set[int] = set()
    costs = tuple(_cost(name, module, calls.get(name, []), seen) for name, module in layers.items())
    attention = None if sequence_length is None else _attention(model, total, sequence_length)
    return CostEstimate(
        costs, attention, None if attention is None else 2 * attention, _in_other_modules(model, layers.values())
    )


class _Call(NamedTuple):
    """One call of a layer: rows that meet its weight, numbers in its input and output, whether the input wants a gradient."""

    rows: int
    input_size: int
    output_size: int
    input_needs_gradient: bool


def _calls_of_every_token(model: nn.Module, layers: Mapping[str, nn.Module], tokens: int) -> dict[str, list[_Call]]:
    calls = {}
    trained_before = False
    for name, module in model.named_modules():
        if name in layers:
            inputs, outputs = _widths(module)
            calls[name] = [_Call(tokens, tokens * inputs, tokens * outputs, trained_before)]
        trained_before |= any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return calls


def _widths(layer: Any) -> tuple[int, int]:
    """Numbers in the input and in the output of a layer for each row."""
    if isinstance(layer, nn.Embedding):
        return 1, layer.embedding_dim
    if isinstance(layer, _ConvNd):  # a kernel covers more pixels than there are for each position: they overlap
        steps = math.prod(layer.stride)
        transposed = isinstance(layer, _ConvTransposeNd)
        inputs, outputs = (1, steps) if transposed else (steps, 1)
        return inputs * layer.in_channels, outputs * layer.out_channels
    products = _products(layer)
    first = products[0]
    return first.weight.shape[1] if first.weight.ndim > 2 else first.inputs, products[-1].outputs


def _calls_of_a_batch(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Tensor | Sequence[Tensor] | Mapping[str, Any]
) -> dict[str, list[_Call]]:
    calls: dict[str, list[_Call]] = {name: [] for name in layers}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            given = inputs[0]
            calls[name].append(_Call(_rows(module, given, output), given.numel(), output.numel(), given.requires_grad))

        return record

    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        # a mask changes no shape, and transformers looks into it for a way around masking
        named = {name: _on_meta(value) for name, value in batch.items() if name != "attention_mask"}
    else:
        arguments = (_on_meta(batch),) if isinstance(batch, Tensor) else tuple(_on_meta(value) for value in batch)
    twins = {name: _on_meta(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    hooks = [module.register_forward_hook(recorder(name)) for name, module in layers.items()]
    try:
        with torch.enable_grad():
            functional_call(model, twins, arguments, named)
    except TypeError as error:
        raise ValueError(f"the model cannot be called with this batch: {error}") from None
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the model cannot be gone through by shapes alone ({first}); leave what it looks into out of the batch, or "
            "give a number of tokens"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _on_meta(value: Any) -> Any:
    return value.detach().to("meta").requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _rows(layer: nn.Module, given: Tensor, output: Tensor) -> int:
    if isinstance(layer, _ConvTransposeNd):  # which spreads every input position over several output positions
        return given.numel() // layer.in_channels
    return output.numel() // _widths(layer)[1]


def _cost(name: str, layer: Any, calls: Sequence[_Call], seen: set[int]) -> LayerCost:
    own = [parameter for parameter in layer.parameters(recurse=False) if id(parameter) not in seen]
    seen |= {id(parameter) for parameter in own}
    size = next(layer.parameters(recurse=False)).element_size()
    forward = weights = inputs = stored = read = back = 0
    for call in calls:
        if isinstance(layer, nn.Embedding):  # rows looked up, and their gradients added to the table's
            read += 2 * size * call.output_size
            back += 2 * size * call.output_size * layer.weight.requires_grad
            continue
        wanted, width = call.input_needs_gradient, call.input_size
        products = _products(layer)
        for product in products:
            outputs = call.output_size if product is products[-1] else call.rows * product.outputs
            trained, flops = product.weight.requires_grad, 2 * call.rows * product.inputs * product.outputs
            moved = size * (product.weight.numel() + width + outputs)
            forward, weights, inputs = forward + flops, weights + flops * trained, inputs + flops * wanted
            stored += size * width * trained
            read, back = read + moved, back + moved * (trained + wanted)
            wanted, width = wanted or trained, outputs
    return LayerCost(
        name=name,
        kind=_kind(layer) or "",
        rows=sum(call.rows for call in calls),
        forward=forward,
        backward_weights=weights,
        backward_inputs=inputs,
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in own),
        stored_bytes=stored,
        forward_bytes=read,
        backward_bytes=back,
    )


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention reads its weight without calling it
        return None
    if isinstance(module, (nn.Linear, *conv1d_types())):
        return LINEAR
    if isinstance(module, _ConvNd):
        return CONVOLUTION
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    factors = dict(module.named_parameters(recurse=False))
    return PAIR if {"left", "right"} <= set(factors) and factors["left"].ndim >= 2 else None


def _products(layer: Any) -> list[Product]:
    """The matrix products of a layer but an embedding, in the order in which an input meets them."""
    if isinstance(layer, _ConvTransposeNd):
        inputs, outputs, *kernel = layer.weight.shape
        return [Product(layer.weight, inputs // layer.groups, layer.groups * outputs * math.prod(kernel))]
    if isinstance(layer, nn.Linear | _ConvNd):
        return [_product(layer.weight)]
    if _kind(layer) == PAIR:
        return [_product(layer.right), _product(layer.left)]
    inputs, outputs = layer.weight.shape  # Conv1D's
    return [Product(layer.weight, inputs, outputs)]


def _product(weight: Tensor) -> Product:
    outputs, *inputs = weight.shape
    return Product(weight, math.prod(inputs), int(outputs))


def _has_heads(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    wanted = ("num_hidden_layers", "num_attention_heads")
    return all(isinstance(getattr(config, name, None), int) for name in wanted) and not getattr(
        config, "is_encoder_decoder", False
    )


def _attention(model: Any, tokens: int, sequence_length: int) -> int:
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")
    if not _has_heads(model):
        raise ValueError(
            "attention's cost needs a decoder or encoder whose config has num_hidden_layers and num_attention_heads; leave "
            "sequence_length out"
        )
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * tokens * sequence_length * config.num_attention_heads * head * config.num_hidden_layers


def _in_other_modules(model: nn.Module, layers: Iterable[nn.Module]) -> tuple[str, ...]:
    counted = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    norms = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in counted | norms
    )
