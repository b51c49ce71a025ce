"""Ways to train, by name: what of a model each of them trains, and what its optimizer keeps for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rankwise.optimizers import base_rules
from rankwise.optimizers.state_sizes import (
    Settings,
    StateRule,
    adafactor,
    adamw,
    adamw_8bit,
    equivariant_adam,
    lora_rite,
    projected,
    sgd,
)

AdapterShapes = Callable[[int, int, int, Settings], list[tuple[int, ...]]]


@dataclass(frozen=True)
class Method:
    """A way to train, as :func:`rankwise.optimizers.memory.optimizer_memory` knows it by name.

    Attributes:
        does: one line for people.
        rule: the state of each trained tensor.
        settings: all that the rule and the adapter read, as it is unless told otherwise.
        adapter: shapes of what is trained beside a layer of m outputs and n inputs at a rank; None trains the weights.
        projects: the rule gets the rank, for the matrices that :func:`model_param_groups` gives one.
        one_gradient_at_a_time: each is freed before the next is computed.
    """

    does: str
    rule: StateRule
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: AdapterShapes | None = None
    projects: bool = False
    one_gradient_at_a_time: bool = False


def _lora(rows: int, columns: int, rank: int, settings: Settings) -> list[tuple[int, ...]]:
    return [(rank, columns), (rows, rank)]


def _deep_lora(rows: int, columns: int, rank: int, settings: Settings) -> list[tuple[int, ...]]:
    """U, the inner factors and Vᵀ; "all-linear" leaves out layers that are no wider than the factors."""
    if rank >= min(rows, columns):
        return []
    return [(rows, rank), (settings["inner_depth"], rank, rank), (rank, columns)]


_GALORE = projected(base_rules.AdamW())
_WIDE = {"side": "smaller", "moments_in": "wide"}
_ADAM = {"amsgrad": False}

METHODS: dict[str, Method] = {
    "adamw": Method("every weight, two moments each", adamw, _ADAM),
    "adamw-8bit": Method("every weight, moments in 8 bits (bitsandbytes)", adamw_8bit),
    "adafactor": Method("every weight, one second moment a row and a column", adafactor),
    "sgd": Method("every weight, no state", sgd, {"momentum": 0.0}),
    "sgd-momentum": Method("every weight, one buffer", sgd, {"momentum": 0.9}),
    "equivariant-adam": Method("every weight, one moment and a number a matrix", equivariant_adam, {"stacked": True}),
    "galore": Method("every weight, moments in a subspace, float32", _GALORE, _WIDE, projects=True),
    "galore-narrow": Method(
        "GaLore, its state in the weights' dtype", _GALORE, {**_WIDE, "moments_in": "parameter"}, projects=True
    ),
    "galore-8bit": Method(
        "GaLore, its moments in 8 bits (bitsandbytes)", _GALORE, {**_WIDE, "moments_in": "8-bit"}, projects=True
    ),
    "galore-per-layer": Method(
        "GaLore, each gradient freed when it is used", _GALORE, _WIDE, projects=True, one_gradient_at_a_time=True
    ),
    "galore-adafactor": Method(
        "GaLore, Adafactor's moments", projected(base_rules.Adafactor()), {**_WIDE, "beta1": 0.0}, projects=True
    ),
    "adarankgrad": Method("GaLore with a rank that falls; this is the most it takes", _GALORE, _WIDE, projects=True),
    "lora": Method("two factors a layer, AdamW", adamw, _ADAM, adapter=_lora),
    "lora-plus": Method("LoRA, B faster than A", adamw, _ADAM, adapter=_lora),
    "relora": Method("LoRA, merged and begun again every so often", adamw, _ADAM, adapter=_lora),
    "lora-rite": Method("LoRA, r×r second moments, float32", lora_rite, adapter=_lora),
    "deep-lora": Method("U, r×r factors and V a layer, AdamW", adamw, {**_ADAM, "inner_depth": 3}, adapter=_deep_lora),
}


def method_called(name: str) -> Method:
    """One of METHODS.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]


def settings_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings with those given in their place.

    Raises:
        ValueError: it has no setting of this name.
    """
    known = method_called(name).settings
    for setting in given:
        if setting not in known:
            has = f"its settings are {', '.join(known)}" if known else "it has none that matter"
            raise ValueError(f"what {name} holds does not depend on {setting!r}; {has}")
    return {**known, **given}
