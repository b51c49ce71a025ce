"""The two factors of every LoRA layer of a model, found by the module that holds them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_EMBEDDING = "lora_embedding"
_KINDS = ("lora", _EMBEDDING)


@dataclass(frozen=True)
class LoraPair:
    """A and B of one layer, whose weight is W + s·B·A.

    Attributes:
        name: of the layer in its model.
        A: (r, d_in), or of a convolution (r, d_in, …).
        B: (d_out, r), or of a convolution (d_out, r, 1, …).
        layer: the module that holds them and knows how to merge them.
        adapter: under which name it holds them.
        embedding: whether the layer is a table of embeddings, of which only the rows that a batch names are seen.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    layer: nn.Module
    adapter: str
    embedding: bool = False

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.A, self.B


def as_matrix(factor: Tensor) -> Tensor:
    """(rows, everything else): a convolution's factors as the matrices whose product is its update."""
    return factor.flatten(1)


def require_pair(A: Tensor, B: Tensor, name: str = "") -> None:
    """Refuse what is no pair.

    Raises:
        ValueError: A is not (r, d_in) beside a B of (d_out, r), or r is 0.
    """
    fit = A.ndim >= 2 and B.ndim >= 2 and A.numel() and B.numel() and len(A) == as_matrix(B).shape[1]
    if not fit:
        where = f" of {name}" if name else ""
        raise ValueError(
            f"a pair is A (r, d_in) and B (d_out, r), in this order; got A {tuple(A.shape)} and B {tuple(B.shape)}{where}"
        )


def lora_pairs(model: nn.Module, adapter: str | None = None) -> list[LoraPair]:
    """A and B of every layer that has them and trains at least one of the two, in the model's order.

    A layer is any module with ``lora_A`` and ``lora_B`` (or ``lora_embedding_A`` and ``lora_embedding_B``), as PEFT's are: a
    parameter, a module with a ``weight``, or either of them by the name of the adapter.

    Going by the order in which a model lists its parameters instead would pair the B of one layer with the A of the next as
    soon as one of them is frozen or something else stands in between.

    Args:
        model: with or without PEFT's wrapper around it.
        adapter: leave out all others.

    Raises:
        ValueError: no such layer, or factors that are no pair: AdaLoRA's three, grouped convolutions.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from rankwise.optimizers import lora_pairs
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), LoraConfig(r=4, target_modules=["0"]))
        >>> [(pair.name, tuple(pair.A.shape), tuple(pair.B.shape)) for pair in lora_pairs(model)]
        [('base_model.model.0', (4, 16), (12, 4))]
    """
    found = [
        pair
        for name, module in model.named_modules()
        for pair in _of_layer(name, module)
        if (adapter is None or pair.adapter == adapter) and any(p.requires_grad for p in pair.factors)
    ]
    if not found:
        of = "" if adapter is None else f" of the adapter {adapter!r}"
        raise ValueError(
            f"the model has no trainable LoRA layers{of}: wrap it with get_peft_model(model, LoraConfig(...)) and make sure "
            "the adapter is active and not loaded for inference (is_trainable=True)"
        )
    return found


def adapters_of(layer: nn.Module) -> set[str]:
    """The names of all adapters that a layer holds, trained or not."""
    sides = (getattr(layer, f"{kind}_A", None) for kind in _KINDS)
    return {name for side in sides if side is not None for name in _by_adapter(side)}


def trained_besides(model: nn.Module, pairs: list[LoraPair]) -> list[tuple[str, nn.Parameter]]:
    """Everything trainable that is in none of the pairs: heads, biases, norms, DoRA's magnitudes."""
    paired = {id(factor) for pair in pairs for factor in pair.factors}
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in paired]


def _of_layer(name: str, layer: nn.Module) -> Iterator[LoraPair]:
    for kind in _KINDS:
        left, right = getattr(layer, f"{kind}_A", None), getattr(layer, f"{kind}_B", None)
        if left is None or right is None:
            continue
        lefts, rights = _by_adapter(left), _by_adapter(right)
        for adapter in (key for key in lefts if key in rights):
            if getattr(layer, "lora_E", None) is not None:
                raise ValueError(
                    f"{name} holds AdaLoRA's three factors, which are no pair; give it an ordinary optimizer, or train LoRA"
                )
            A, B = lefts[adapter], rights[adapter]
            require_pair(A, B, name)
            yield LoraPair(name, A, B, layer, adapter, embedding=kind == _EMBEDDING)


def _by_adapter(factors: Any) -> dict[str, nn.Parameter]:
    if isinstance(factors, nn.Parameter):
        return {"default": factors}
    if isinstance(factors, nn.ModuleDict | nn.ParameterDict | Mapping):
        return {name: _weight(factor) for name, factor in factors.items()}
    return {"default": _weight(factors)}


def _weight(factor: Any) -> nn.Parameter:
    weight: nn.Parameter = factor if isinstance(factor, nn.Parameter) else factor.weight
    return weight
