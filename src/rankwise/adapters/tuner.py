"""The PEFT tuner that puts Deep LoRA layers into a model."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rankwise.adapters.config import DeepLoraConfig
from rankwise.adapters.layer import MIXED_BATCHES, DeepLoraLayer, DeepLoraLinear
from rankwise.adapters.registration import PREFIX

logger = logging.getLogger(__name__)

_ALL_LINEAR = "all-linear"


class DeepLoraModel(BaseTuner):
    """Injects Deep LoRA into every targeted ``nn.Linear``; made by ``get_peft_model(model, DeepLoraConfig(...))``."""

    prefix = PREFIX
    tuner_layer_cls = DeepLoraLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's attribute; None means all-linear here

    def _prepare_adapter_config(self, peft_config: DeepLoraConfig, model_config: dict[str, Any]) -> DeepLoraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = _ALL_LINEAR
        return peft_config

    def _prepare_model(self, peft_config: DeepLoraConfig, model: nn.Module) -> None:
        """Take out of "all-linear" what cannot or should not be adapted, before PEFT spells the targets out."""
        targets = peft_config.target_modules
        if not (isinstance(targets, str) and targets.lower() == _ALL_LINEAR):
            return
        left_out = set()
        for name, module in model.named_modules():
            layer = module.get_base_layer() if isinstance(module, DeepLoraLayer) else module
            if not isinstance(layer, nn.Linear):
                continue
            small = min(layer.in_features, layer.out_features)
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

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT strips ``adapter_names`` from the call before any layer sees it: refuse it here."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(MIXED_BATCHES)
        yield

    def _create_and_replace(  # type: ignore[override]  # every PEFT tuner narrows the config
        self,
        peft_config: DeepLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target.get_base_layer() if isinstance(target, DeepLoraLayer) else target
        layer = _require_linear(layer, current_key)
        width = _width(peft_config, current_key)
        smaller = min(layer.in_features, layer.out_features)
        if width > smaller:
            logger.warning("%s: width %d clamped to %d, the layer's smaller side", current_key, width, smaller)
            width = smaller
        if peft_config.fan_in_fan_out:
            logger.warning("fan_in_fan_out=True does not fit nn.Linear, which stores (out, in) weights; using False")
            peft_config.fan_in_fan_out = False
        settings: dict[str, Any] = {
            "inner_depth": peft_config.inner_depth,
            "init_scale": peft_config.init_scale,
            "zero_left": peft_config.zero_left,
            "dropout": peft_config.dropout,
            "direction_dropout": peft_config.direction_dropout,
            "init_weights": peft_config.init_weights,
            "inference_mode": peft_config.inference_mode,
        }
        if isinstance(target, DeepLoraLinear):
            target.update_layer(adapter_name, width, **settings)
            return
        new_module = DeepLoraLinear(layer, adapter_name, width, fan_in_fan_out=peft_config.fan_in_fan_out, **settings)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)


def _width(peft_config: DeepLoraConfig, name: str) -> int:
    return peft_config.rank_pattern.get(get_pattern_key(list(peft_config.rank_pattern), name), peft_config.r)


def _require_linear(layer: nn.Module, name: str) -> nn.Linear:
    kind = type(layer).__name__
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{name} is the output projection of nn.MultiheadAttention, which reads its weight without calling it: "
            "an adapter there would never run. Leave it out with exclude_modules."
        )
    if not isinstance(layer, nn.Linear):
        hint = "GPT-2's Conv1D is on the roadmap; " if kind == "Conv1D" else ""
        raise TypeError(
            f"Deep LoRA adapts nn.Linear layers; {name} is a {kind}. {hint}"
            "name other layers in target_modules, or leave this one out with exclude_modules"
        )
    if not layer.weight.dtype.is_floating_point:
        raise TypeError(
            f"{name} holds quantized weights ({layer.weight.dtype}), which Deep LoRA does not adapt yet; "
            "load the model in float32 or bfloat16"
        )
    return layer
