"""LoRA-RITE: a second moment for the factors of B·A that does not see how the product was split into factors."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from rankwise.optimizers.base_rules import AdamW, squares_fit
from rankwise.optimizers.factor_pairs import LoraPair, as_matrix, lora_pairs, require_pair, trained_besides
from rankwise.optimizers.projection import add_full
from rankwise.optimizers.rite_moments import FactorBasis, RiteMoments, factor_basis, rite_moments
from rankwise.optimizers.saved_state import require_entries, require_shape, saved_groups
from rankwise.optimizers.setting_checks import require_not_negative
from rankwise.optimizers.sharding import Whole

_ELEMENTWISE = AdamW()


class LoraRite(torch.optim.Optimizer):
    """LoRA-RITE (Yen et al. 2024): steps of a product X·Yᵀ that are the same however it is split into X and Y.

    (R·A, B·R⁻¹) is the same LoRA as (A, B) for every invertible R. Adam takes different steps on the two, and so do
    EquivariantAdam, LoRA+ and Shampoo; here B·A moves alike. With Y = U_Y·R_Y, each factor X is stepped in the coordinates
    of Y's basis, where the gradient does not see Y's size:

        X ← (1−ηλ)X − η·M̂_X·R_Y⁻ᵀ,

    with M̂ from :func:`rankwise.optimizers.rite_moments.rite_moments`, its second moment an r × r matrix that follows the basis as it turns. For LoRA X and Y
    are B and Aᵀ, and the other way round.

    A step moves B·A by at most about η in spectral norm for each factor, whatever the sizes of A, B and the layer, where
    Adam's moves it by what the factors happen to be: the rate is another one, larger than LoRA's (docs/lora-rite.md).

    Three departures from the paper, the first two ours:

    - *One after the other*: B first, then A by the *new* B's R. Stepped at once, B·A moves by η²·M̂_B·(B·A)⁻¹·M̂_A besides,
      which is unbounded where B·A has a small direction, as all of them are after B = 0.
    - Singular values below √eps·σ₁ of a factor are taken as 0, and eigenvalues of V below r·eps·λ₁ as that.
    - V, ρ and M are averages with Adam's bias corrections; the paper's algorithm is written with sums for V and ρ, and its
      authors' code has averages.

    The algebra is in float32, or wider where the factors are, and the state too.

    Args:
        params: ``lora_pairs(model)``; or groups, each with ``"pairs"`` (of :class:`LoraPair`, or tuples (A, B)) or
            ``"params"``, as :func:`lorarite_param_groups` makes them. Parameters outside pairs get AdamW.
        lr: η.
        betas: β₁, β₂.
        eps: added to the root of V's eigenvalues, so in units of the gradient of B·A; a group of ``"params"`` has Adam's.
        weight_decay: λ, decoupled. It shrinks A and B alike, which keeps the invariance and shrinks B·A twice.
        maximize: climb instead of descend.

    Raises:
        ValueError: a setting out of range, no pairs at all, factors that are no pair or stand in two, a layer of several
            experts.
        RuntimeError: at a step, a sparse gradient; nothing is changed then.

    A pair or parameter whose gradient or weights hold NaN or infinite numbers, or numbers too large for their squares, is left
    as it is, with its state, and counted: :meth:`skipped_updates`. The others go on.

    Example:
        >>> import torch
        >>> from rankwise.optimizers.lora_rite import LoraRite
        >>> A, B = torch.nn.Parameter(torch.eye(2, 5)), torch.nn.Parameter(torch.zeros(3, 2))
        >>> optimizer = LoraRite([{"pairs": [(A, B)]}], lr=0.5)
        >>> (B @ A)[0, 0].backward()
        >>> optimizer.step()
        >>> round(torch.linalg.matrix_norm(B @ A, 2).item(), 4)
        0.5
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize, "paired": False,
        }  # fmt: skip
        given = list(params)
        if given and all(isinstance(entry, LoraPair) for entry in given):
            given = [{"pairs": given}]
        super().__init__(given, defaults)
        if not any(group["paired"] and group["params"] for group in self.param_groups):
            raise ValueError(
                "LoraRite would be AdamW: no group has pairs. Give it lora_pairs(model), or groups from "
                "lorarite_param_groups(model, lr=…); for parameters that are no factors take torch.optim.AdamW"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; of a group with ``"pairs"`` the factors become ``"params"``, A before B, and ``"paired"`` is True."""
        group = dict(param_group)
        if "pairs" in group:
            if "params" in group:
                raise ValueError('a group has "pairs" or "params", not both; put the others into a group of their own')
            pairs = group.pop("pairs")
            if not isinstance(pairs, Iterable):
                raise ValueError(f'"pairs" is a list of (A, B), got {type(pairs).__name__}')
            factors = [factor for pair in pairs for factor in _factors_of(pair)]
            if len({id(factor) for factor in factors}) < len(factors):
                raise ValueError(
                    "a factor stands in two pairs, or a pair twice, and would be stepped twice; give it once"
                )
            group |= {"params": factors, "paired": True}
        elif group.get("paired"):
            raise ValueError('a group is paired by its "pairs", a list of (A, B); leave "paired" out')
        _check_settings(self.defaults | group)
        super().add_param_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every pair and parameter that has a gradient; a closure is evaluated first and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        for group in self.param_groups:
            if group["paired"]:
                for A, B in zip(group["params"][::2], group["params"][1::2], strict=True):
                    self._step_pair(A, B, group)
            else:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_elementwise(parameter, parameter.grad, group)
        return loss

    def skipped_updates(self) -> int:
        """How many updates of pairs and of parameters were left out because a number in them was not finite, or too large."""
        return sum(state.get("skipped", 0) for state in self.state.values())

    def _refuse_sparse(self) -> None:
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters):
            raise RuntimeError("LoraRite does not take sparse gradients; set sparse=False in the embedding")

    def _skip(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        state["skipped"] = state.get("skipped", 0) + 1

    def _step_pair(self, A: Tensor, B: Tensor, group: dict[str, Any]) -> None:
        gradients = [factor.grad for factor in (B, A) if factor.grad is not None]
        if not gradients:
            return
        try:
            found = self._stepped_pair(A, B, group) if _all_finite(A, B, *gradients) else []
        except torch.linalg.LinAlgError:  # LAPACK's word for squares that overflow
            found = []
        results = [value for _, X, moments, _ in found for value in (X, *vars(moments).values())]
        if not found or not _all_finite(*results):
            self._skip(A if B.grad is None else B)
            return
        for factor, X, moments, step in found:
            self.state[factor].update(vars(moments), step=step)
            factor.copy_(X)

    def _stepped_pair(
        self, A: Tensor, B: Tensor, group: dict[str, Any]
    ) -> list[tuple[Tensor, Tensor, RiteMoments, int]]:
        """Each factor that has a gradient with its new values, moments and count of steps; nothing is changed here."""
        wide = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
        X, Y = as_matrix(B).to(wide), as_matrix(A).to(wide).mT
        of_X, of_Y = factor_basis(X), factor_basis(Y)
        shrink, lr = 1 - group["lr"] * group["weight_decay"], group["lr"]
        found = []
        now = of_X
        if B.grad is not None:
            moments, direction, step = self._direction(B, as_matrix(B.grad).to(wide), of_Y, group)
            X = shrink * X - lr * direction @ of_Y.R_inverse.mT
            new = X.view(B.shape).to(B.dtype)
            found.append((B, new, moments, step))
            now = factor_basis(as_matrix(new).to(wide))  # of what will really be there, rounded to B's dtype
        if A.grad is not None:
            # in the coordinates of the old B, which the gradient is of
            moments, direction, step = self._direction(A, as_matrix(A.grad).to(wide).mT, of_X, group)
            carried = direction @ (now.U.mT @ of_X.U).mT
            Y = shrink * Y - lr * carried @ now.R_inverse.mT
            found.append((A, Y.mT.reshape(A.shape).to(A.dtype), moments, step))
        return found

    def _direction(
        self, factor: Tensor, gradient: Tensor, other: FactorBasis, group: dict[str, Any]
    ) -> tuple[RiteMoments, Tensor, int]:
        """The new moments of a factor, M̂ in the coordinates of the other's basis, and the count of steps."""
        state = self.state.get(factor, {})
        before = (
            RiteMoments(state["momentum"], state["second_moment"], state["escaped"], state["basis"])
            if state.get("step")
            else None
        )
        step = state["step"] + 1 if before is not None else 1
        moments, direction = rite_moments(
            -gradient if group["maximize"] else gradient, other, before, step, betas=group["betas"], eps=group["eps"]
        )
        return moments, direction, step

    def _step_elementwise(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if not squares_fit(float(Whole().peak(wide)), wide.numel(), wide.dtype):
            self._skip(parameter)
            return
        wide = -wide if group["maximize"] else wide
        state = self.state[parameter]
        if not state.get("step"):
            state.update(_ELEMENTWISE.start(wide, group), step=0)
        state["step"] += 1
        (direction,) = _ELEMENTWISE.directions([state], [wide], [state["step"]], group)
        add_full(parameter, direction, shrink=1 - group["lr"] * group["weight_decay"], step=group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does it, but the state keeps its own dtype, and what cannot be this optimizer's is refused first.

        Raises:
            ValueError: no state_dict, or that of another optimizer, of settings out of range or of factors of other shapes;
                nothing is changed then.
        """
        groups = saved_groups(self, state_dict)
        for (settings, states), group in zip(groups, self.param_groups, strict=True):
            _check_settings(settings)
            if settings["paired"] != group["paired"]:
                raise ValueError("the saved groups have their pairs elsewhere: the state belongs to other groups")
            shapes = _state_shapes(settings["params"], settings["paired"])
            for parameter, saved, wanted in zip(settings["params"], states, shapes, strict=True):
                if saved.get("step") or (saved and "skipped" not in saved):  # what was only ever skipped has no moments
                    require_entries(saved, parameter, "step")
                    for name, shape in wanted.items():
                        require_shape(saved, parameter, name, shape)
        super().load_state_dict(state_dict)
        for settings, states in groups:
            for parameter, saved in zip(settings["params"], states, strict=True):
                for name, value in saved.items():
                    if isinstance(value, Tensor):
                        self.state[parameter][name] = value.to(parameter.device, copy=True)


def _check_settings(group: Mapping[str, Any]) -> None:
    require_not_negative(group, "lr", "weight_decay")
    _ELEMENTWISE.check(group)


def _state_shapes(parameters: Sequence[Tensor], paired: bool) -> list[dict[str, tuple[int, ...]]]:
    """What the tensors of each parameter's state look like once it has been stepped."""
    if not paired:
        return [dict.fromkeys(("momentum", "second_moment"), tuple(parameter.shape)) for parameter in parameters]
    shapes: list[dict[str, tuple[int, ...]]] = []
    for A, B in zip(parameters[::2], parameters[1::2], strict=True):
        (r, n), m = as_matrix(A).shape, len(B)
        shapes += [
            {"momentum": (length, r), "second_moment": (r, r), "escaped": (), "basis": (other, r)}
            for length, other in ((n, m), (m, n))
        ]
    return shapes


def _all_finite(*tensors: Tensor) -> bool:
    """Asked with one wait for the device."""
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(tensors, math.inf))).all())


def lorarite_param_groups(model: nn.Module, *, lr: float, head_lr: float | None = None) -> list[dict[str, Any]]:
    """Groups "pairs", "head" and "vectors" for :class:`LoraRite`, in this order and without the empty ones.

    Args:
        model: a model with LoRA layers.
        lr: η of the pairs.
        head_lr: AdamW's rate for everything else that is trained. ``lr`` would be far too high for it, so a model that trains
            something else needs one. Biases and norms have no weight decay.

    Raises:
        ValueError: no LoRA layers, a rate out of range, or a model that trains something besides without a ``head_lr``.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from rankwise.optimizers.lora_rite import LoraRite, lorarite_param_groups
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), LoraConfig(r=4, target_modules=["0"]))
        >>> optimizer = LoraRite(lorarite_param_groups(model, lr=1e-2))
        >>> [(group["name"], len(group["params"])) for group in optimizer.param_groups]
        [('pairs', 2)]
    """
    rates = {"lr": lr} if head_lr is None else {"lr": lr, "head_lr": head_lr}
    require_not_negative(rates, *rates)
    pairs = lora_pairs(model)
    others = trained_besides(model, pairs)
    if others and head_lr is None:
        raise ValueError(
            f"the model trains {others[0][0]} besides its LoRA layers; say at which rate with head_lr, such as 1e-3: the "
            "rate of the pairs is no rate for AdamW"
        )
    groups: Sequence[dict[str, Any]] = (
        {"name": "pairs", "pairs": pairs, "lr": lr},
        {"name": "head", "params": [p for _, p in others if p.ndim >= 2], "lr": head_lr},
        {"name": "vectors", "params": [p for _, p in others if p.ndim < 2], "lr": head_lr, "weight_decay": 0.0},
    )
    return [group for group in groups if group.get("pairs") or group.get("params")]


def _factors_of(pair: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, LoraPair):
        two = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(factor, Tensor) for factor in pair)
        if not two:
            raise ValueError(f"each of the pairs is a LoraPair or a tuple (A, B) of two tensors, got {_shown(pair)}")
        A, B = pair
        require_pair(A, B)
        _require_floating(A, B)
        return A, B
    experts = getattr(pair.layer, "num_experts", 1)
    if experts > 1:
        raise ValueError(
            f"{pair.name} holds the factors of {experts} experts in one pair, whose product is not its update; give it to "
            "AdamW"
        )
    _require_floating(*pair.factors)
    return pair.factors


def _require_floating(*factors: Tensor) -> None:
    for factor in factors:
        if not factor.is_floating_point():
            raise ValueError(
                f"a factor of shape {tuple(factor.shape)} is {factor.dtype}; only floating-point ones are stepped"
            )


def _shown(pair: Any) -> str:
    kind = type(pair).__name__
    return f"a {kind} of {len(pair)}" if isinstance(pair, tuple | list) else kind
