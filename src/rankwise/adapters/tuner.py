"""The PEFT tuner that puts Deep LoRA layers into a model."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.combination import carry_saved_modules, check_combination, combined_config, combined_update
from rankwise.adapters.config import DeepLoraConfig
from rankwise.adapters.layers import DeepLoraLayer, ParamWrapper, adapted_layer, layout, matrix_shape
from rankwise.adapters.parameter_names import parameter_layout, parameter_shape, taken_for_experts
from rankwise.adapters.registration import PREFIX
from rankwise.adapters.sharded_weights import gathered, whole_entries
from rankwise.spectral.precision import require_finite

logger = logging.getLogger(__name__)

_ALL_LINEAR = "all-linear"


class DeepLoraModel(BaseTuner):
    """Puts Deep LoRA beside every targeted layer; made by ``get_peft_model(model, DeepLoraConfig(...))``."""

    prefix = PREFIX
    tuner_layer_cls = DeepLoraLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's attribute; None means all-linear here

    def _prepare_adapter_config(self, peft_config: DeepLoraConfig, model_config: dict[str, Any]) -> DeepLoraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = _ALL_LINEAR
        return peft_config

    def _check_new_adapter_config(self, config: DeepLoraConfig) -> None:
        """Every adapter with ``target_parameters`` has the same: their wrappers stand one around the other."""
        super()._check_new_adapter_config(config)
        for name, other in self.peft_config.items():
            ours, theirs = (set(each.target_parameters or ()) for each in (config, other))
            if ours and theirs and ours != theirs:
                raise ValueError(
                    f"adapter {name!r} has target_parameters {sorted(theirs)}; every adapter of this model that has any must have "
                    f"the same, got {sorted(ours)}"
                )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """What PEFT saves, whole where the model is sharded; its modules to save too, which PEFT takes from ``state_dict``."""
        name_inside = f".{adapter_name}."
        biased = getattr(config, "bias", "none") != "none"
        of_adapter = [key for key in state_dict if name_inside in key or (biased and key.endswith("bias"))]
        state_dict.update(whole_entries(model, state_dict, of_adapter))
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """As PEFT, which loads what fits and drops the rest in silence; here the adapter has to be this model's, and whole.

        Raises:
            ValueError: factors are missing, or of layers that the model does not have, or not finite.
        """
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        endings = tuple(f".{kind}.{adapter_name}.weight" for kind in DeepLoraLayer.adapter_layer_names)
        expected = {key for key in model.state_dict() if key.endswith(endings)}  # not by modules: wrappers rename those
        factors = {key for key in found if any(f".{kind}." in key for kind in DeepLoraLayer.adapter_layer_names)}
        missing, foreign = sorted(expected - factors), sorted(factors - expected)
        if missing or foreign:
            parts = [
                f"{len(keys)} factors {what} ({keys[0]})"
                for keys, what in ((missing, "are missing"), (foreign, "belong to layers that it does not adapt here"))
                if keys
            ]
            raise ValueError(
                f"the saved adapter does not fit this model: {' and '.join(parts)}; load it into the model that it was trained on"
            )
        for key in sorted(factors):
            require_finite(found[key], key)
        return found

    def _prepare_model(self, peft_config: DeepLoraConfig, model: nn.Module) -> None:
        """Take out of "all-linear" what cannot or should not be adapted, before PEFT spells the targets out."""
        targets = peft_config.target_modules
        if not (isinstance(targets, str) and targets.lower() == _ALL_LINEAR):
            return
        left_out = set()
        for name, module in model.named_modules():
            layer = module.get_base_layer() if isinstance(module, DeepLoraLayer) else module
            if not isinstance(layer, nn.Linear | Conv1D):
                continue
            small = min(matrix_shape(layer))
            if isinstance(layer, NonDynamicallyQuantizableLinear):
                left_out.add(name)
            elif small <= _width(peft_config, name):
                logger.info("left out of all-linear: %s, whose smaller side %d is not above r", name, small)
                left_out.add(name)
        if not left_out:
            return
        # A regex of whole names: PEFT matches a list by the ends of names, and "head" would take "decoder.head" along.
        patterns = [re.escape(name) for name in sorted(left_out)]
        excluded = peft_config.exclude_modules
        if isinstance(excluded, str):
            patterns.append(f"(?:{excluded})")
        else:
            patterns += [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(excluded or ())]
        peft_config.exclude_modules = "|".join(patterns)

    def _check_merge_allowed(self) -> None:
        """Give adapted layers that share their weight with another, as a tied ``lm_head`` does, one of their own.

        Merging into a shared weight would change the other layer too. The model is untied from then on, and its config
        says so.
        """
        uses = Counter(id(parameter) for _, parameter in self.model.named_parameters(remove_duplicate=False))
        shared = [
            (name, module.get_base_layer())
            for name, module in self.model.named_modules()
            if isinstance(module, DeepLoraLayer) and uses[id(module.base_parameter())] > 1
        ]
        for _, layer in shared:
            weight: torch.nn.Parameter = layer.weight  # type: ignore[assignment]
            with gathered([weight]):
                layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        config = getattr(self.model, "config", None)
        if shared and config is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            names = ", ".join(name for name, _ in shared)
            logger.warning("%s: untied, so that merging changes no other layer; the config says so too", names)

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter whose update is Σ wᵢΔWᵢ of others; PEFT's LoRA has a method of this name.

        Args:
            adapters: names of adapters of this model.
            weights: one for each; negative ones subtract.
            adapter_name: of the new adapter. It is not active yet: ``set_adapter`` makes it so.
            combination_type: "cat" is exact, up to rounding, and takes the rank that the sum has; "svd" the best
                approximation of rank ``svd_rank``.
            svd_rank: of "svd".

        Raises:
            ValueError: an unknown or taken name, another combination type, merged adapters, trained biases or tokens, or
                modules to save that several adapters have. What only one of them has goes along.
        """
        check_combination(self.model, self.peft_config, adapters, weights, adapter_name, combination_type, svd_rank)
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, DeepLoraLayer) and any(adapter in module.r for adapter in adapters)
        }
        updates = {name: combined_update(layer, adapters, weights, svd_rank) for name, layer in layers.items()}
        configs = [self.peft_config[name] for name in adapters]
        layouts = {name: found for name, layer in layers.items() if (found := layout(layer.get_base_layer()))}
        widths = {name: len(values) for name, (_, values, _) in updates.items()}
        self.peft_config[adapter_name] = combined_config(configs, widths, layouts)
        self.inject_adapter(self.model, adapter_name)
        for name, layer in layers.items():
            layer.set_update(adapter_name, *updates[name])
        carry_saved_modules(self.model, adapters, adapter_name)
        self.set_requires_grad(adapter_name, requires_grad=False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names``, one a row of the batch, to every layer below: a mixed batch."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        handles = []
        try:
            for module, its_names in self._names_by_module(list(names), kwargs.get("num_beams")):
                hook = partial(_with_adapter_names, names=its_names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _names_by_module(self, names: list[str], num_beams: Any) -> Iterator[tuple[nn.Module, list[str]]]:
        """Every layer that takes names, and the names it gets: beam search repeats the rows, but not in an encoder."""
        if self.training:
            raise ValueError("adapter_names mixes adapters at inference only; call model.eval() first")
        layers = [m for m in self.modules() if isinstance(m, DeepLoraLayer | AuxiliaryTrainingWrapper)]
        known = {name for layer in layers if isinstance(layer, DeepLoraLayer) for name in layer.r}
        unknown = sorted({*names} - known - {"__base__"})
        if unknown:
            raise ValueError(
                f"no adapter named {', '.join(map(repr, unknown))}; this model has {', '.join(sorted(known))}, and "
                "'__base__' for none"
            )
        if any(layer.merged for layer in layers if isinstance(layer, DeepLoraLayer)):
            raise ValueError(
                "an adapter is merged into the base weights; call unmerge_adapter() before mixing adapters"
            )
        beams = num_beams if isinstance(num_beams, int) else 1
        repeated = [name for name in names for _ in range(beams)]
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        encoding = set() if encoder in (None, self.model) else set(encoder.modules())
        for layer in layers:
            yield layer, names if layer in encoding else repeated

    def _create_and_replace(  # type: ignore[override]  # every PEFT tuner narrows the config
        self,
        peft_config: DeepLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **more: Any,
    ) -> None:
        settings: dict[str, Any] = {
            "inner_depth": peft_config.inner_depth,
            "init_scale": peft_config.init_scale,
            "zero_left": peft_config.zero_left,
            "dropout": peft_config.dropout,
            "direction_dropout": peft_config.direction_dropout,
            "init_weights": peft_config.init_weights,
            "inference_mode": peft_config.inference_mode,
        }
        layer = target.get_base_layer() if isinstance(target, DeepLoraLayer) else target
        parameter_name = more.get("parameter_name")
        if parameter_name is not None:
            width = _clamped(peft_config, current_key, parameter_shape(layer, parameter_name, current_key))
            found = parameter_layout(layer, parameter_name, current_key, peft_config.layouts)
            peft_config.layouts[current_key] = found
            if isinstance(target, ParamWrapper) and target.parameter_name == parameter_name:
                target.update_layer(adapter_name, width, **settings)
                return
            wrapper = ParamWrapper(target, adapter_name, width, parameter_name=parameter_name, **settings)
            self._put(parent, target_name, wrapper, target, adapter_name)
            return
        layer_class = adapted_layer(layer, current_key)
        width = _clamped(peft_config, current_key, matrix_shape(layer))
        if peft_config.fan_in_fan_out and not isinstance(layer, Conv1D):
            logger.warning(
                "fan_in_fan_out=True does not fit %s, which stores (out, in) weights; the layer decides", current_key
            )
        # what an export wants to know
        peft_config.fan_in_fan_out = isinstance(layer, Conv1D)
        if found := layout(layer):
            peft_config.layouts[current_key] = found
        elif taken_for_experts(self.model, current_key):
            peft_config.layouts[current_key] = {"lora_target": "parameter"}
        if isinstance(target, DeepLoraLayer):
            target.update_layer(adapter_name, width, **settings)
            return
        new_module = layer_class(
            layer, adapter_name, width, get_apply_tensor_subclass=more.get("get_apply_tensor_subclass"), **settings
        )
        self._put(parent, target_name, new_module, target, adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As PEFT, which expects of every layer a ``weight``.

        A module of fused experts has none, nor has a head of several layers that comes back when adapters are unloaded; what
        comes back has its own weights anyway.
        """
        if not isinstance(new_module, DeepLoraLayer) or isinstance(new_module, ParamWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie  # changes settings only, those of any method

    def _add_targets_to_tie(self, peft_config: DeepLoraConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            f"ensure_weight_tying keeps modules_to_save shared; the adapters of the embedding and of {', '.join(tied_weight_keys)} "
            "are two, each with factors of its own, and merging unties the weights. Leave ensure_weight_tying out, or put the "
            "embedding into modules_to_save"
        )

    def _put(self, parent: nn.Module, name: str, layer: DeepLoraLayer, target: nn.Module, adapter_name: str) -> None:
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, name, layer, target)


def _width(peft_config: DeepLoraConfig, name: str) -> int:
    return peft_config.rank_pattern.get(get_pattern_key(list(peft_config.rank_pattern), name), peft_config.r)


def _clamped(peft_config: DeepLoraConfig, name: str, shape: tuple[int, int]) -> int:
    width, smaller = _width(peft_config, name), min(shape)
    if width > smaller:
        logger.warning("%s: width %d clamped to %d, the layer's smaller side", name, width, smaller)
    return min(width, smaller)


def _with_adapter_names(
    _module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], *, names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return inputs, {**kwargs, "adapter_names": names}
