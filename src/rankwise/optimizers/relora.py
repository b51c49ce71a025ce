"""ReLoRA: low-rank adapters that are merged and started anew, again and again, so that their sum has a high rank."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.optimizers.factor_pairs import LoraPair, adapters_of, as_matrix, lora_pairs
from rankwise.optimizers.setting_checks import is_count, require_seed
from rankwise.optimizers.state_pruning import ResetState, StatePruning

Start = Callable[[LoraPair, torch.Generator], tuple[Tensor, Tensor]]

_FORMAT_VERSION = 1
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kaiming_start(pair: LoraPair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A uniform on ±1/√d_in and B = 0, as PEFT starts a LoRA; of embeddings A = 0 and B normal, as there.

    Drawn on the CPU in float32: alike on every device and in every process of a run.
    """
    A, B = torch.zeros(pair.A.shape), torch.zeros(pair.B.shape)
    if pair.embedding:
        return A, B.normal_(generator=generator)
    bound = 1 / math.sqrt(as_matrix(A).shape[1])
    return A.uniform_(-bound, bound, generator=generator), B


@dataclass(frozen=True)
class Restart:
    """What a restart did.

    Attributes:
        number: how many there have been, this one included.
        update_norm: √Σ‖s·B·A‖_F² over the layers, of what was merged; NaN where a layer has no ``get_delta_weight``.
        lost: √Σ‖what arrived in W − s·B·A‖_F² over that: the share that the base's dtype rounded away. About 1e-7 in float32;
            in bfloat16 all of it where updates are below 1/512 of the weights.
    """

    number: int
    update_norm: float
    lost: float


class ReLora:
    """Merges every LoRA layer into its weight and starts the factors anew; the model's outputs stay what they are.

    For every layer W ← W + s·B·A by the layer's own ``merge()``, then A and B from ``start`` (A as LoRA draws it, B = 0) and
    ``unmerge()``, which takes the new product, here 0, out again: whatever the start, W + s·B·A is what it was. The moments
    that an optimizer holds for A and B belong to factors that are gone, and are pruned. After K restarts the sum of the
    updates has up to (K + 1)·r directions (Lialin et al. 2023, §3; overview eq. 18).

    A and B are never both zero: no gradient would reach either, then or ever. (In the published code both start at zero, so
    that until the first restart only what is trained in full learns.)

    The base weights change. An adapter folder alone is no result and no checkpoint: save :meth:`state_dict` with every
    checkpoint, and ``model.merge_and_unload()`` at the end.

    Call it after ``optimizer.step()`` and ``zero_grad()``, never between the passes of an accumulated step: gradients of the
    old factors would move the new ones.

    Args:
        model: with LoRA layers as :func:`rankwise.optimizers.lora_pairs` finds them, whose modules have ``merge()``,
            ``unmerge()`` and ``get_base_layer()``, or ``weight`` for a base: PEFT's, or your own.
        optimizer: over the factors.
        pruning: of the optimizer's state: ``ResetState()``, ``PruneRandomly(share)``, ``PruneByMagnitude(share)``.
        start: (pair, generator) → A, B; may be your own, such as singular vectors of the gradient.
        seed: of the draws. They follow from it and from the number of restarts alone: a resumed run draws the same.

    Raises:
        ValueError: no LoRA layers; a layer with several adapters, or merged already, or whose weight is quantized or shared;
            a variant whose merge is no sum (DoRA); A and B both zero; factors that the optimizer does not have.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from rankwise.optimizers.relora import ReLora
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), LoraConfig(r=4, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        >>> relora = ReLora(model, optimizer)
        >>> x = torch.ones(2, 16)
        >>> for _ in range(3):
        ...     model(x).square().sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> before = model(x)
        >>> relora.merge_and_restart().number
        1
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        pruning: StatePruning | None = None,
        start: Start = kaiming_start,
        seed: int = 0,
    ):
        pruning = ResetState() if pruning is None else pruning
        for name, function in (("pruning", pruning), ("start", start)):
            if not callable(function):
                raise ValueError(f"{name} must be something to call, as ReLora's documentation says, got {function!r}")
        require_seed(seed)
        self.pairs = lora_pairs(model)
        self.optimizer = optimizer
        self.pruning = pruning
        self.start, self.seed, self.restarts = start, seed, 0
        owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        for pair in self.pairs:
            _require_one_adapter(pair)
            _require_mergeable(pair, owners)
            _require_alive(pair.A, pair.B, pair.name)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        strangers = [
            pair.name for pair in self.pairs if any(f.requires_grad and id(f) not in known for f in pair.factors)
        ]
        if strangers:
            raise ValueError(
                f"the optimizer does not have the factors of {strangers[0]}; make it from the model's trainable parameters "
                "after the adapters are in place"
            )

    @torch.no_grad()
    def merge_and_restart(self) -> Restart:
        """Merge, draw anew, prune.

        Raises:
            ValueError: an update that is not finite; a start of other shapes, not finite or with A and B both zero; a state that
                cannot be pruned. Nothing has been changed then.
        """
        # all of it before the first layer is merged: half a restart could not be taken back
        for pair in self.pairs:
            _require_finite(pair)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.restarts) % 2**63)
        drawn = [self._drawn(pair, generator) for pair in self.pairs]
        update, lost = 0.0, 0.0
        for pair, (start, states) in zip(self.pairs, drawn, strict=True):
            added, missing = self._restart_one(pair, *start)
            update, lost = update + added, lost + missing
            for parameter, pruned in states.items():
                state = self.optimizer.state[parameter]
                state.clear()
                state.update(pruned)
        self.restarts += 1
        return Restart(self.restarts, math.sqrt(update), math.sqrt(lost / update) if update else 0.0)

    def _drawn(
        self, pair: LoraPair, generator: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor], dict[nn.Parameter, dict[str, Any]]]:
        """A pair's new factors and pruned copies of its states. In this order: both may draw from the generator."""
        start = _require_start(self.start(pair, generator), pair)
        states = {p: copy.deepcopy(self.optimizer.state[p]) for p in _started(pair) if p in self.optimizer.state}
        for parameter, state in states.items():
            self.pruning(state, parameter, generator)
        return start, states

    def _restart_one(self, pair: LoraPair, A: Tensor, B: Tensor) -> tuple[float, float]:
        """‖s·B·A‖² that was merged, and the square of what of it did not arrive."""
        layer: Any = pair.layer
        weight = base_layer(pair).weight
        with _wide(pair):
            update = layer.get_delta_weight(pair.adapter) if hasattr(layer, "get_delta_weight") else None
            before = None if update is None else weight.detach().clone()
            layer.merge()
        if update is None or before is None:
            squares = math.nan, math.nan
        else:
            wide = torch.promote_types(weight.dtype, update.dtype)
            missing = weight.detach().to(wide) - before.to(wide) - update
            squares = float(update.square().sum()), float(missing.square().sum())
        pair.A.copy_(A)
        pair.B.copy_(B)
        bias = _bias_of_update(pair)
        if bias is not None:
            bias.zero_()
        layer.unmerge()
        return squares

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides the adapter's and the optimizer's: the base weights, and how many restarts.

        The weights are those of the adapted layers, not copies. ``torch.load(weights_only=True)`` reads what ``torch.save``
        makes of it.
        """
        return {
            "format_version": _FORMAT_VERSION,
            "restarts": self.restarts,
            "seed": self.seed,
            "base_weights": {name: tensor.detach() for name, tensor in self._base_tensors().items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put saved base weights back into a freshly loaded model. The adapter and the optimizer load their own.

        Raises:
            ValueError: of another model or version, incomplete, or with NaN or infinite weights; nothing is changed then.
        """
        version = state.get("format_version") if isinstance(state, Mapping) else None
        if version != _FORMAT_VERSION:
            raise ValueError(
                f"ReLora's state has format_version {version!r}, expected {_FORMAT_VERSION}; it is not what state_dict() "
                "returned, or was saved by another version of rankwise"
            )
        missing = {"restarts", "seed", "base_weights"} - set(state)
        if missing:
            raise ValueError(f"ReLora's state has no {', '.join(sorted(missing))}; give what its state_dict() returned")
        if not is_count(state["restarts"], 0):
            raise ValueError(f"the saved restarts must be a whole number from 0, got {state['restarts']!r}")
        require_seed(state["seed"])
        mine, saved = self._base_tensors(), state["base_weights"]
        if not isinstance(saved, Mapping) or not all(isinstance(tensor, Tensor) for tensor in saved.values()):
            raise ValueError("the saved base weights must be tensors by name; give what ReLora's state_dict() returned")
        different = set(mine) ^ set(saved) or {name for name in mine if mine[name].shape != saved[name].shape}
        if different:
            raise ValueError(
                f"the saved base weights are not this model's ({min(different)} is in one of them only, or of another shape); "
                "adapt the same layers of the same model"
            )
        broken = [name for name, tensor in saved.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise ValueError(
                f"the saved base weight {broken[0]} holds NaN or infinite numbers; go on from an earlier checkpoint"
            )
        for name, tensor in mine.items():
            tensor.copy_(saved[name])
        self.restarts, self.seed = int(state["restarts"]), int(state["seed"])

    def _base_tensors(self) -> dict[str, Tensor]:
        """Everything that a merge changes, by name."""
        found: dict[str, Tensor] = {}
        for pair in self.pairs:
            base = base_layer(pair)
            found[f"{pair.name}.weight"] = base.weight
            if _bias_of_update(pair) is not None:
                found[f"{pair.name}.bias"] = base.bias
        return found


def base_layer(pair: LoraPair) -> Any:
    """The module that has the weight W beside the pair."""
    layer: Any = pair.layer
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


@contextmanager
def _wide(pair: LoraPair) -> Iterator[None]:
    """Factors in at least float32 while they are multiplied and added to W, so that the sum is rounded once."""
    narrow = [(factor, factor.data) for factor in pair.factors if factor.dtype in (torch.bfloat16, torch.float16)]
    for factor, values in narrow:
        factor.data = values.float()
    try:
        yield
    finally:
        for factor, values in narrow:
            factor.data = values


def _bias_of_update(pair: LoraPair) -> nn.Parameter | None:
    """PEFT's ``lora_bias``: a bias on B, which a merge adds to the layer's."""
    side: Any = getattr(pair.layer, "lora_B", None)
    if isinstance(side, nn.ModuleDict) and pair.adapter in side:
        bias: nn.Parameter | None = getattr(side[pair.adapter], "bias", None)
        return bias
    return None


def _started(pair: LoraPair) -> tuple[nn.Parameter, ...]:
    """What a restart starts anew."""
    bias = _bias_of_update(pair)
    return pair.factors if bias is None else (*pair.factors, bias)


def _require_finite(pair: LoraPair) -> None:
    """Refuse an update that is not finite."""
    for parameter in _started(pair):
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"the factors of {pair.name} hold NaN or infinite numbers, and nothing has been merged; lower the "
                "learning rate and go on from the last checkpoint"
            )


def _require_start(drawn: Any, pair: LoraPair) -> tuple[Tensor, Tensor]:
    """A and B as the pair's own are.

    Raises:
        ValueError: they are not, and could not be trained.
    """
    wanted = [tuple(factor.shape) for factor in pair.factors]
    two = isinstance(drawn, tuple | list) and all(isinstance(factor, Tensor) for factor in drawn)
    came: Any = [tuple(factor.shape) for factor in drawn] if two else type(drawn).__name__
    if came != wanted:
        raise ValueError(
            f"start must return A and B of shapes {wanted[0]} and {wanted[1]} for {pair.name}, got {came}; nothing has been "
            "merged"
        )
    A, B = drawn
    if not all(bool(torch.isfinite(factor).all()) for factor in drawn):
        raise ValueError(f"start gave {pair.name} NaN or infinite numbers; nothing has been merged")
    _require_alive(A, B, pair.name)
    return A, B


def _require_one_adapter(pair: LoraPair) -> None:
    held = adapters_of(pair.layer)
    if len(held) > 1:
        raise ValueError(
            f"{pair.name} has {len(held)} adapters ({', '.join(sorted(held))}), and merging one changes the weight under the "
            "others; delete_adapter() all but the one to train"
        )


def _require_mergeable(pair: LoraPair, owners: Counter[int]) -> None:
    layer: Any = pair.layer
    missing = [name for name in ("merge", "unmerge") if not callable(getattr(layer, name, None))]
    if missing:
        raise ValueError(f"{pair.name} ({type(layer).__name__}) has no {missing[0]}(), which ReLoRA restarts by")
    weight = getattr(base_layer(pair), "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in _PLAIN or hasattr(weight, "quant_state"):
        kind = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else "no plain weight"
        raise ValueError(
            f"the base of {pair.name} is quantized or packed ({type(base_layer(pair)).__name__}, {kind}): every merge would "
            "round the updates away; load the model in bfloat16 or float32"
        )
    if owners[id(weight)] > 1:
        raise ValueError(
            f"{pair.name} shares its weight with another layer (tied embeddings?), which a merge would change too; leave it "
            "out of target_modules"
        )
    if weight.is_meta or not weight.numel():
        raise ValueError(f"{pair.name} has no base weight in this process (meta device, or sharded); gather it first")
    if getattr(layer, "merged", False):
        raise ValueError(f"{pair.name} is merged already; call unmerge_adapter() first")
    if pair.adapter in (getattr(layer, "lora_variant", None) or {}):
        variant = type(layer.lora_variant[pair.adapter]).__name__
        raise ValueError(
            f"{pair.name} is no plain LoRA ({variant}): merging it adds no product B·A, and cannot be repeated"
        )


def _require_alive(A: Tensor, B: Tensor, name: str) -> None:
    if not bool(A.any()) and not bool(B.any()):
        raise ValueError(
            f"A and B of {name} are both zero: no gradient would ever reach them; draw one of them at random"
        )
