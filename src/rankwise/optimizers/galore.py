"""GaLore: a base rule in a low-rank subspace of the gradients, which is looked for again every so often."""

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

from rankwise.optimizers.base_rules import SGD, Adafactor, AdamW
from rankwise.optimizers.projected import Plan, ProjectedOptimizer, ProjectionSettings
from rankwise.optimizers.refresh import Subspace, subspace_by_iteration, subspace_by_svd
from rankwise.optimizers.setting_checks import is_count, is_finite_number
from rankwise.optimizers.sharding import Whole


class GaLoreSettings(ProjectionSettings, total=False):
    """:class:`~rankwise.optimizers.projected.ProjectionSettings`, and when and how GaLore looks for a new subspace.

    Attributes:
        refresh_every: T, updates between two subspaces; None leaves it to ``refresh_below``.
        refresh_below: also refresh once ‖PᵀG‖²/‖G‖² has fallen below this share of what it was at the last refresh.
        basis: "iteration" (subspace iteration from the old basis) or "svd" (the exact leading singular vectors).
    """

    refresh_every: int | None
    refresh_below: float | None
    basis: str


class GaLore(ProjectedOptimizer):
    """The policy; :class:`GaLoreAdamW`, :class:`GaLoreSGD` and :class:`GaLoreAdafactor` give it a rule.

    A subspace is the leading left singular vectors of the oriented gradient, nearly: found by subspace iteration from the old
    basis instead of an SVD. It serves for ``refresh_every`` updates, fewer where it captures too little.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], settings: GaLoreSettings):
        policy = {"refresh_every": 200, "refresh_below": None, "basis": "iteration"}
        super().__init__(params, {**policy, **defaults}, settings)

    def check_settings(self, group: Mapping[str, Any]) -> None:
        super().check_settings(group)
        every, below = group["refresh_every"], group["refresh_below"]
        if every is None and below is None:
            raise ValueError("one of refresh_every and refresh_below must say when to look for a new subspace")
        if every is not None and not is_count(every, 1):
            raise ValueError(f"refresh_every counts updates from 1, got {every!r}")
        if below is not None and not (is_finite_number(below) and 0 < below < 1):
            raise ValueError(f"refresh_below is a share and must lie in (0, 1), got {below!r}")
        if group["basis"] not in ("iteration", "svd"):
            raise ValueError(f'basis must be "iteration" or "svd", got {group["basis"]!r}')

    def _plan(self, parameter: Tensor, group: Mapping[str, Any]) -> Plan:
        plan = super()._plan(parameter, group)
        if plan.geometry and group["basis"] == "svd" and type(plan.pieces) is not Whole:
            raise ValueError('basis="svd" would gather whole gradients of sharded parameters; take basis="iteration"')
        return plan

    def new_subspace(
        self, A: Tensor, previous: Tensor | None, plan: Plan, number: int, group: Mapping[str, Any]
    ) -> Subspace | None:
        geometry, pieces = plan
        assert geometry is not None  # noqa: S101 - only what is projected has subspaces
        if group["basis"] == "svd":
            return subspace_by_svd(A, geometry.rank)
        return subspace_by_iteration(
            A,
            geometry.rank,
            previous,
            oversample=group["oversample"],
            iterations=group["iterations"],
            seed=group["seed"],
            number=number,
            pieces=pieces,
            whole_shape=(geometry.compressed, geometry.other),
        )

    def observe(
        self, state: dict[str, Any], A: Tensor, R: Tensor, plan: Plan, group: Mapping[str, Any], fresh: bool
    ) -> None:
        if group["refresh_below"] is None:
            return
        norm = plan.pieces.norm(A)
        captured = (plan.pieces.projected_norm(R) / norm) ** 2 if norm else 0.0
        if fresh:
            state["captured"] = captured
        elif captured < group["refresh_below"] * state.get("captured", 0.0):
            state["due"] = True

    def wants_refresh(self, state: dict[str, Any], R: Tensor, plan: Plan, group: Mapping[str, Any]) -> bool:
        return group["refresh_every"] is not None and state["since_refresh"] >= group["refresh_every"]


class GaLoreAdamW(GaLore):
    """AdamW with moments in a low-rank subspace of the gradient (GaLore: Zhao et al. 2024; overview eq. 19, Algorithm 1).

    For W of m × n with m ≤ n, every T updates P ← the r leading left singular vectors of G, and at each update

        R = PᵀG,   M ← β₁M + (1−β₁)R,   V ← β₂V + (1−β₂)R²,   W ← (1 − ηλ)W − η·s·P·M̂/(√V̂ + eps),

    on the other side for m > n. It keeps mr + 2nr numbers instead of AdamW's 2mn. What is not a matrix, and groups without a
    rank, are stepped by AdamW at full size.

    *Departures from the paper*: P is found by warm-started subspace iteration, not by an SVD; the moments follow the
    subspace (``moments``), where the paper leaves them to the vectors that take the old ones' place; decay is decoupled and
    comes before the step, as in torch.

    Args:
        params: parameters or groups of them, as for any torch optimizer; ``model_param_groups(model, rank=…)`` makes sensible
            ones. Every setting below may stand in a group.
        lr: η.
        betas: β₁, β₂.
        eps: added to √V̂, in units of the gradient.
        weight_decay: λ, decoupled, on the whole parameter.
        **settings: see :class:`GaLoreSettings`; ``rank`` among them.

    Raises:
        ValueError, RuntimeError: as :class:`~rankwise.optimizers.projected.ProjectedOptimizer`.

    Example:
        >>> import torch
        >>> from rankwise.optimizers import GaLoreAdamW
        >>> layer = torch.nn.Linear(40, 30)
        >>> optimizer = GaLoreAdamW(layer.parameters(), lr=1e-3, rank=4, refresh_every=200)
        >>> layer(torch.ones(8, 40)).square().mean().backward()
        >>> optimizer.step()
        >>> state = optimizer.state[layer.weight]
        >>> [tuple(state[name].shape) for name in ("basis", "momentum", "second_moment")]
        [(30, 4), (4, 40), (4, 40)]
    """

    rule = AdamW()

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **settings: Unpack[GaLoreSettings],
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, settings)


class GaLoreSGD(GaLore):
    """Gradient descent with momentum in a low-rank subspace: R = PᵀG, B ← μB + R, W ← (1 − ηλ)W − η·s·P·B.

    Without momentum there is no state but the basis. With ``basis="svd"`` and no momentum it is the overview's GD-GaLore
    (Theorem 4), s = 1. Decay is decoupled, unlike ``torch.optim.SGD``'s; without momentum the two are the same.

    Args:
        params: as for :class:`GaLoreAdamW`.
        lr: η.
        momentum: μ.
        weight_decay: λ, on the whole parameter.
        nesterov: step by R + μB.
        **settings: see :class:`GaLoreSettings`.

    Raises:
        ValueError, RuntimeError: as :class:`~rankwise.optimizers.projected.ProjectedOptimizer`.

    Example:
        >>> import torch
        >>> from rankwise.optimizers import GaLoreSGD
        >>> W = torch.nn.Parameter(torch.zeros(3, 3))
        >>> W.grad = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> GaLoreSGD([W], lr=1.0, rank=2).step()
        >>> [round(value, 4) + 0.0 for value in W.diagonal().tolist()]
        [-3.0, -2.0, 0.0]
    """

    rule = SGD()

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        **settings: Unpack[GaLoreSettings],
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults, settings)


class GaLoreAdafactor(GaLore):
    """Adafactor in a low-rank subspace: a second moment of r + n numbers, mr + r + n in all (with ``beta1`` nr more).

    See :class:`~rankwise.optimizers.base_rules.Adafactor` for the rule. Its learning rate is an ordinary one: steps have a root
    mean square of at most η·clip_threshold in the subspace.

    Args:
        params: as for :class:`GaLoreAdamW`.
        lr: η.
        beta1: of a momentum of the directions; 0 keeps none.
        beta2_decay: the second moment's β₂ₜ = 1 − t^beta2_decay.
        eps: added to the squared gradients.
        clip_threshold: bound on the direction's root mean square.
        weight_decay: λ, decoupled, on the whole parameter.
        **settings: see :class:`GaLoreSettings`.

    Raises:
        ValueError, RuntimeError: as :class:`~rankwise.optimizers.projected.ProjectedOptimizer`; sharded parameters.

    Example:
        >>> import torch
        >>> from rankwise.optimizers import GaLoreAdafactor
        >>> layer = torch.nn.Linear(40, 30)
        >>> optimizer = GaLoreAdafactor(layer.parameters(), rank=4)
        >>> layer(torch.ones(8, 40)).square().mean().backward()
        >>> optimizer.step()
        >>> sum(value.numel() for value in optimizer.state[layer.weight].values() if torch.is_tensor(value))
        164
    """

    rule = Adafactor()

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta1: float = 0.0,
        beta2_decay: float = -0.8,
        eps: float = 1e-30,
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        **settings: Unpack[GaLoreSettings],
    ):
        defaults = {
            "lr": lr, "beta1": beta1, "beta2_decay": beta2_decay, "eps": eps, "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, settings)
