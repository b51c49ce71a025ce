"""Adapted parameters by name: what files call them, in Deep LoRA's folders and in PEFT's LoRA folders alike.

The parameters of one module are wrapped one around the other, the first innermost, and a saved factor is called after its
wrapper: of ``experts.gate_up_proj`` and ``experts.down_proj`` the first is under ``experts.base_layer``, the second under
``experts``; alone, either would be under ``experts``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from rankwise.adapters.sharded_weights import full_shape

KIND = "parameter"


def parameter_shape(module: nn.Module, parameter_name: str, name: str) -> tuple[int, int]:
    """The two sides of an adapted parameter, of one expert where it holds several.

    Raises:
        TypeError: it cannot be adapted.
    """
    parameter: Tensor = getattr(module, parameter_name)
    shape = full_shape(parameter)
    if len(shape) not in (2, 3) or not parameter.dtype.is_floating_point:
        raise TypeError(
            f"Deep LoRA adapts parameters that are a matrix or a stack of matrices of floating-point numbers; {name} is "
            f"{tuple(shape)} of {parameter.dtype}. Leave it out of target_parameters"
        )
    return int(shape[-2]), int(shape[-1])


def parameter_layout(
    module: nn.Module, parameter_name: str, name: str, layouts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What an export has to know: how many experts, and the parameter's place among the adapted ones of its module."""
    shape = full_shape(getattr(module, parameter_name))
    before = [other for other in layouts if other != name and _module_of(other) == _module_of(name)]
    place = layouts[name]["place"] if name in layouts else sum(layouts[o].get("kind") == KIND for o in before)
    return {"kind": KIND, "experts": int(shape[0]) if len(shape) == 3 else None, "place": place}


def names_in_files(layouts: Mapping[str, Mapping[str, Any]], names: Iterable[str] | None = None) -> dict[str, str]:
    """Parameter → what files call it, for those of ``names`` (by default all) that are adapted parameters."""
    adapted = [name for name in (layouts if names is None else names) if layouts.get(name, {}).get("kind") == KIND]
    modules: dict[str, list[str]] = {}
    for name in sorted(adapted, key=lambda name: int(layouts[name]["place"])):
        modules.setdefault(_module_of(name), []).append(name)
    return {
        name: module + ".base_layer" * (len(inside) - 1 - place)
        for module, inside in modules.items()
        for place, name in enumerate(inside)
    }


def taken_for_experts(model: nn.Module, name: str) -> bool:
    """Whether PEFT would take a LoRA of this linear layer for one of experts, which transformers 5 has fused.

    Its LoRA folders of models from before then name the experts' ``gate_proj``; shared experts and dense layers are called the
    same. As ``target_parameters`` such a layer keeps its LoRA.
    """
    probe = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # one of two that were fused into one
        return True
    return name not in (probe.target_modules or ())


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
