"""AdaRankGrad: GaLore whose rank is found anew at each refresh, and whose refreshes come when a subspace is used up."""

from collections.abc import Mapping
from typing import Any, Unpack, cast

from torch import Tensor

from rankwise.optimizers.base_rules import AdamW
from rankwise.optimizers.matricize import Geometry
from rankwise.optimizers.projected import Plan, ProjectedOptimizer, ProjectionSettings
from rankwise.optimizers.refresh import Subspace, subspace_by_energy
from rankwise.optimizers.setting_checks import is_count, is_finite_number

_SMOOTHING = 0.9  # of ‖R‖, which is a mini-batch's and noisy


class AdaRankGradSettings(ProjectionSettings, total=False):
    """:class:`~rankwise.optimizers.projected.ProjectionSettings`, and AdaRankGrad's own.

    Attributes:
        energy: share of ‖G‖² that a new subspace has to hold; the paper's threshold is 1 − energy.
        converged: a subspace is used up when the smoothed ‖R‖ has fallen to this share of what it began with.
        refresh_every: updates after which it is left in any case.
    """

    energy: float
    converged: float
    refresh_every: int


class AdaRankGrad(ProjectedOptimizer):
    """AdamW in subspaces as large as the gradient needs, left when the gradient in them has converged.

    At a refresh the rank is the smallest r found with ‖G − PPᵀG‖² ≤ (1 − energy)·‖G‖², up to the group's ``rank``; the moments
    are carried over by C = P_newᵀP_old, M' = CM and V' as :func:`~rankwise.optimizers.base_rules.carried_second_moment` says.
    The next gradient gives a new subspace once

        n_t ≤ converged·n_0   or   refresh_every updates have been made,   n_t = 0.9·n_{t−1} + 0.1·‖R_t‖,  n_0 = ‖R_0‖.

    *Departures from the paper* (Refael et al. 2024): its criterion compares ‖R‖ with an absolute number, whose unit is the
    gradient's and which no default can know; ours is relative, and bounded in time since the noise of mini-batches keeps ‖R‖ up.
    Its rotated second moment can be negative; ours cannot.

    Args:
        params: parameters or groups of them; in a group, ``rank`` is the most its matrices may have, None steps it at full size.
        lr: η.
        betas: β₁, β₂.
        eps: added to √V̂.
        weight_decay: λ, decoupled, on the whole parameter.
        **settings: see :class:`AdaRankGradSettings`; ``rank`` among them.

    Raises:
        ValueError, RuntimeError: as :class:`~rankwise.optimizers.projected.ProjectedOptimizer`.

    Example:
        >>> import torch
        >>> from rankwise.optimizers import AdaRankGrad
        >>> W = torch.nn.Parameter(torch.zeros(30, 20))
        >>> optimizer = AdaRankGrad([W], lr=0.1, rank=10, energy=0.99)
        >>> W.grad = torch.outer(torch.arange(30.0), torch.ones(20))
        >>> optimizer.step()
        >>> optimizer.ranks()
        [1]
    """

    rule = AdamW()

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **settings: Unpack[AdaRankGradSettings],
    ):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "moments": "rotate", "energy": 0.9,
            "converged": 0.5, "refresh_every": 200,
        }  # fmt: skip
        super().__init__(params, defaults, settings)

    def ranks(self) -> list[int]:
        """The rank of each projected parameter that has had a gradient, in the order of the groups."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        states = [self.state[parameter] for parameter in parameters if parameter in self.state]
        return [state["basis"].shape[1] for state in states if "basis" in state]

    def check_settings(self, group: Mapping[str, Any]) -> None:
        super().check_settings(group)
        for name in ("energy", "converged"):
            if not is_finite_number(group[name]) or not 0 < group[name] < 1:
                raise ValueError(f"{name} is a share and must lie in (0, 1), got {group[name]!r}")
        if not is_count(group["refresh_every"], 1):
            raise ValueError(f"refresh_every counts updates from 1, got {group['refresh_every']!r}")
        if group["moments"] == "keep":
            raise ValueError('moments="keep" has no meaning where the rank changes; choose "rotate" or "reset"')

    def new_subspace(
        self, A: Tensor, previous: Tensor | None, plan: Plan, number: int, group: Mapping[str, Any]
    ) -> Subspace | None:
        geometry, pieces = cast("tuple[Geometry, Any]", plan)
        return subspace_by_energy(
            A,
            group["energy"],
            geometry.rank,
            previous,
            oversample=group["oversample"],
            iterations=group["iterations"],
            seed=group["seed"],
            number=number,
            pieces=pieces,
            whole_shape=(geometry.compressed, geometry.other),
        )

    def wants_refresh(self, state: dict[str, Any], R: Tensor, plan: Plan, group: Mapping[str, Any]) -> bool:
        norm = plan.pieces.projected_norm(R)
        if state["since_refresh"] == 1:
            state["norm_at_refresh"] = state["smoothed_norm"] = norm
        else:
            state["smoothed_norm"] = _SMOOTHING * state["smoothed_norm"] + (1 - _SMOOTHING) * norm
        used_up = state["smoothed_norm"] <= group["converged"] * state["norm_at_refresh"]
        return used_up or state["since_refresh"] >= group["refresh_every"]
