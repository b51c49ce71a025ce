"""The engine of every projected optimizer: matricize, project, base rule, lift; what differs between them is a policy on top."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Number
from typing import Any, ClassVar, NamedTuple, TypedDict, cast, overload

import torch
from torch import Tensor

from rankwise.optimizers.base_rules import BaseRule, squares_fit
from rankwise.optimizers.matricize import Geometry, geometry_of
from rankwise.optimizers.moment_storage import check_form, opened, stored
from rankwise.optimizers.projection import add_full, add_lifted, aligned, project, rotation
from rankwise.optimizers.refresh import Subspace, sketch
from rankwise.optimizers.saved_state import ELSEWHERE, require_entries, require_shape, saved_groups
from rankwise.optimizers.setting_checks import is_count, require_not_negative, require_seed
from rankwise.optimizers.sharding import Whole, is_distributed, local, pieces_of, refuse_flattened
from rankwise.spectral.precision import compute_dtype

MOMENTS_AT_REFRESH = ("keep", "rotate", "reset")


class ProjectionSettings(TypedDict, total=False):
    """What every projected optimizer takes besides its base rule's settings; each may differ between groups.

    Attributes:
        rank: r; None, the default, steps the group's parameters at full size.
        scale: s, a factor on the learning rate of what is projected (the paper's α).
        side: "smaller", "larger", "left" or "right", see :func:`rankwise.optimizers.matricize.geometry_of`.
        moments: what becomes of the moments at a refresh: "keep", "rotate" or "reset".
        oversample: random directions tried besides the old ones at a refresh.
        iterations: of subspace iteration at a refresh.
        seed: of the random directions.
        moments_in: the form of moments between steps: "wide" (float32, or float64 for float64 parameters), "parameter" (the
            parameter's dtype, the basis too: half the memory under bfloat16, whose 8 bits lose a second moment's small
            increments) or "8-bit" (needs bitsandbytes).
        maximize: climb instead of descend.
        foreach: step all of a group's parameters together; None does so on a GPU, where it saves kernels. It costs the memory
            of their projected gradients at once, and the numbers are the same.
    """

    rank: int | None
    scale: float
    side: str
    moments: str
    oversample: int
    iterations: int
    seed: int
    moments_in: str
    maximize: bool
    foreach: bool | None


PROJECTION_DEFAULTS: ProjectionSettings = {
    "rank": None, "scale": 1.0, "side": "smaller", "moments": "keep", "oversample": 8, "iterations": 2, "seed": 0,
    "moments_in": "wide", "maximize": False, "foreach": None,
}  # fmt: skip


class Plan(NamedTuple):
    """What is decided when a parameter joins: how it is read as a matrix (None: not), and how it lies over processes."""

    geometry: Geometry | None
    pieces: Whole


class ProjectedOptimizer(torch.optim.Optimizer):
    """A base rule in subspaces of the gradients; the common part of GaLore and AdaRankGrad, for optimizers of your own too.

    For a parameter W (m × n, c the projected side, o the other) with gradient G, oriented as A (c × o), a step is

        R = PᵀA,   N = rule(R),   W ← (1 − ηλ)·W − η·s·(P·N), turned back.

    A subclass names its ``rule`` and says how a subspace is found (:meth:`new_subspace`), when the next gradient is to give a
    new one (:meth:`wants_refresh`), and nothing else. Decay is decoupled and acts on all of W.

    State of a parameter: ``step`` (updates made), ``skipped`` (see :meth:`skipped_updates`), ``age`` (updates in the moments),
    the rule's moments and, where it is projected, ``basis`` P (c × r), ``due`` (the next gradient gives a new one),
    ``since_refresh``, ``refreshes`` and, between a refresh and its update, ``overlap`` P_newᵀP_old.
    Tensors and plain numbers only.

    Raises:
        ValueError: a setting out of range, a rank that a matrix has not, a parameter that is not floating-point, no group
            with a rank at all, a layout over processes that cannot be projected.
        RuntimeError: at a step, a sparse gradient.
    """

    rule: ClassVar[BaseRule]

    def __init__(self, params: Any, defaults: dict[str, Any], projection: ProjectionSettings):
        unknown = set(projection) - set(defaults) - set(PROJECTION_DEFAULTS)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(sorted(unknown))}")
        self._plans: dict[Tensor, Plan] = {}
        super().__init__(params, {**PROJECTION_DEFAULTS, **defaults, **projection})
        if not any(plan.geometry for plan in self._plans.values()):
            raise ValueError(
                f"{type(self).__name__} would project nothing: no group has both a rank and a matrix. Give rank=…, or groups "
                "from model_param_groups(model, rank=…); to project nothing take the torch optimizer"
            )

    # -- what a subclass says ------------------------------------------------------------------------------------

    def new_subspace(
        self, A: Tensor, previous: Tensor | None, plan: Plan, number: int, group: Mapping[str, Any]
    ) -> Subspace | None:
        """The subspace for the oriented gradient A; None where it is zero or not finite.

        Args:
            A: (c, o) in the algebra's dtype, this process's piece.
            previous: (c, r) the basis so far, or None.
            number: how many refreshes there were.
        """
        raise NotImplementedError

    def observe(
        self, state: dict[str, Any], A: Tensor, R: Tensor, plan: Plan, group: Mapping[str, Any], fresh: bool
    ) -> None:
        """Look at a gradient A and its projection R before the update; ``fresh``: A gave the subspace itself."""

    def wants_refresh(self, state: dict[str, Any], R: Tensor, plan: Plan, group: Mapping[str, Any]) -> bool:
        """Asked after each update: whether the next gradient is to give a new subspace."""
        raise NotImplementedError

    def check_settings(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for a setting out of range; subclasses add theirs."""
        require_not_negative(group, "lr", "weight_decay", "scale")
        if group["moments"] not in MOMENTS_AT_REFRESH:
            raise ValueError(f"moments must be one of {', '.join(MOMENTS_AT_REFRESH)}, got {group['moments']!r}")
        for name, least in (("oversample", 0), ("iterations", 1)):
            if not is_count(group[name], least):
                raise ValueError(f"{name} must be a whole number and at least {least}, got {group[name]!r}")
        require_seed(group["seed"])
        check_form(group["moments_in"])
        self.rule.check(group)

    # -- groups and plans ----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch does it; the group's rank and side are read now and hold from then on."""
        super().add_param_group(param_group)
        try:
            self._join(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _join(self, group: dict[str, Any]) -> None:
        for other, ours in (("update_proj_gap", "refresh_every"), ("proj_type", "side")):
            if other in group:
                raise ValueError(f"the group has {other!r}, as galore_torch calls it; here it is {ours!r}")
        self._plans.update(self._plans_of(group))
        # plain numbers, which torch.load(weights_only=True) reads, in place of numpy's
        group.update({name: value.item() for name, value in group.items() if _is_numpy_number(value)})

    def _plans_of(self, group: Mapping[str, Any]) -> dict[Tensor, Plan]:
        self.check_settings(group)
        return {parameter: self._plan(parameter, group) for parameter in group["params"]}

    def _plan(self, parameter: Tensor, group: Mapping[str, Any]) -> Plan:
        shape = tuple(parameter.shape)
        if not parameter.is_floating_point():
            raise ValueError(
                f"a parameter of shape {shape} is {parameter.dtype}; only floating-point ones can be stepped. Leave quantized "
                "and integer parameters out, and give complex ones as torch.view_as_real"
            )
        if group["rank"] is not None:
            refuse_flattened(parameter)
        geometry = geometry_of(shape, group["rank"], group["side"])
        if is_distributed(parameter) and not (self.rule.elementwise and group["moments_in"] != "8-bit"):
            raise ValueError(
                f"{type(self).__name__} with moments_in={group['moments_in']!r} does not step sharded parameters: means and "
                "blocks would run over the pieces. Take GaLoreAdamW or GaLoreSGD with wide moments under fully_shard"
            )
        return Plan(geometry, pieces_of(parameter, geometry))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        for group in self.param_groups:
            self._join(group)

    # -- a step --------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; a closure is evaluated first and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            for batch in self._batches(with_gradient, group["foreach"]):
                self.apply_projected(
                    [(p, self.project_gradient(p, cast("Tensor", p.grad), group)) for p in batch], group
                )
        return loss

    def _batches(self, parameters: list[Tensor], foreach: bool | None) -> Iterator[list[Tensor]]:
        if foreach is None:
            foreach = bool(parameters) and parameters[0].is_cuda
        if foreach:
            yield parameters
        else:
            yield from ([parameter] for parameter in parameters)

    def skipped_updates(self) -> int:
        """How many updates of single parameters were left out: the gradient had a NaN or an infinity, or its squares overflow.

        Such a gradient leaves the parameter and its moments as they are, one with a NaN or an infinity the subspace too; other
        parameters are updated.
        """
        return sum(state.get("skipped", 0) for state in self.state.values())

    @torch.no_grad()
    def project_gradient(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """R of a gradient, refreshing the subspace where that is due; a parameter that is not projected gets its G.

        In the algebra's dtype, and this process's piece; not finite where the gradient is not.
        """
        if gradient.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} does not take sparse gradients; set sparse=False in the embedding, or give it to "
                "torch.optim.SparseAdam"
            )
        geometry, _ = plan = self._plans[parameter]
        dtype = compute_dtype(parameter.dtype)
        state = self.state[parameter]
        if not state:
            state.update(step=0, age=0, skipped=0)
        G = local(gradient)
        if geometry is None:
            return G.to(dtype)
        A = geometry.oriented(G).to(dtype)
        fresh = self.refresh_is_due(parameter)
        R = self._refresh(parameter, A, plan, group) if fresh else self.in_subspace(parameter, A)
        self.observe(state, A, R, plan, group, fresh=fresh and not state["due"])
        return R

    def refresh_is_due(self, parameter: Tensor) -> bool:
        """Whether the next gradient of a projected parameter is to give a new subspace: known before it is there."""
        return bool(self.state[parameter].get("due", True)) if self._plans[parameter].geometry else False

    def is_projected(self, parameter: Tensor) -> bool:
        """Whether a parameter is stepped in a subspace."""
        return self._plans[parameter].geometry is not None

    def in_subspace(self, parameter: Tensor, A: Tensor) -> Tensor:
        """PᵀA in the subspace as it is."""
        basis = local(self.state[parameter]["basis"]).to(A.dtype)
        return self._plans[parameter].pieces.over_compressed(project(A, basis))

    def _refresh(self, parameter: Tensor, A: Tensor, plan: Plan, group: Mapping[str, Any]) -> Tensor:
        geometry, pieces = cast("tuple[Geometry, Whole]", plan)
        state = self.state[parameter]
        if "basis" not in state:
            state.update(refreshes=0, since_refresh=0)
        if state["refreshes"]:
            previous = local(state["basis"]).to(A.dtype)
        else:
            previous = None
            _warn_of_embeddings(parameter, A, geometry)
        found = self.new_subspace(A, previous, plan, state["refreshes"], group)
        state["due"] = found is None
        if found is None:
            # Of a zero gradient (behind a head that starts at zero) no subspace can be told: ask the next one again.
            if "basis" not in state:
                some = sketch(geometry.compressed, geometry.rank, A, group["seed"], number=0)
                state["basis"] = pieces.hold_basis(
                    self._rounded(parameter, pieces.orthonormal(pieces.mine(some)), group)
                )
            return self.in_subspace(parameter, A)
        basis, R, _ = found
        if previous is not None and state["age"] and self.rule.names(group):
            basis, R = self._change_subspace(parameter, previous, basis, R, group)
        state["basis"] = pieces.hold_basis(self._rounded(parameter, basis, group))
        state["refreshes"] += 1
        state["since_refresh"] = 0
        return R

    def _rounded(self, parameter: Tensor, basis: Tensor, group: Mapping[str, Any]) -> Tensor:
        return basis.to(parameter.dtype) if group["moments_in"] == "parameter" else basis

    def _change_subspace(
        self, parameter: Tensor, old: Tensor, new: Tensor, R: Tensor, group: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Say what becomes of the moments; returns the new basis, perhaps turned within its span, and R in that basis."""
        state = self.state[parameter]
        if group["moments"] == "reset":
            state["age"] = 0
            self._store(parameter, self.rule.start(R, group), group)
            return new, R
        C = self._plans[parameter].pieces.over_compressed(rotation(new, old))
        if group["moments"] == "keep":
            # Kept moments belong to the old basis vectors, so the new ones are turned to lie as near to them as they can.
            O = aligned(new, C)  # noqa: E741
            return new @ O, O.mT @ R
        # They are carried over at the update, which may see R clipped, or not come at all.
        state["overlap"] = C @ state["overlap"] if "overlap" in state else C
        return new, R

    @torch.no_grad()
    def apply_projected(self, arrived: Iterable[tuple[Tensor, Tensor]], group: Mapping[str, Any]) -> None:
        """Update parameters of one group from what :meth:`project_gradient` made of their gradients."""
        finite = self._finite(list(arrived))
        if not finite:
            return
        gradients = [-R if group["maximize"] else R for _, R in finite]
        moments, ages = [], []
        for parameter, R in finite:
            state = self.state[parameter]
            current = self._moments(parameter, R, group)
            if "overlap" in state:
                current = self.rule.carry(current, state.pop("overlap"), R, state["age"], group)
            moments.append(current)
            state["age"] += 1
            ages.append(state["age"])
        directions = self.rule.directions(moments, gradients, ages, group)
        lr, shrink = float(group["lr"]), 1 - float(group["lr"]) * group["weight_decay"]
        for (parameter, R), N, changed in zip(finite, directions, moments, strict=True):
            state = self.state[parameter]
            self._store(parameter, changed, group)
            state["step"] += 1
            plan = self._plans[parameter]
            if plan.geometry is None:
                add_full(local(parameter), N, shrink=shrink, step=lr)
                continue
            basis = local(state["basis"]).to(N.dtype)
            add_lifted(local(parameter), N, basis, plan.geometry, shrink=shrink, step=lr * group["scale"])
            state["since_refresh"] += 1
            state["due"] = state["due"] or self.wants_refresh(state, R, plan, group)

    def _finite(self, arrived: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Those whose gradient and its squares are finite; the others are counted. One wait for the device for all of them."""
        if not arrived:
            return []
        peaks = torch.stack([self._plans[parameter].pieces.peak(R) for parameter, R in arrived]).tolist()
        good = [
            # the whole parameter's numbers, which all processes agree on
            squares_fit(peak, parameter.numel(), R.dtype)
            for peak, (parameter, R) in zip(peaks, arrived, strict=True)
        ]
        for (parameter, _), is_finite in zip(arrived, good, strict=True):
            self.state[parameter]["skipped"] += not is_finite
        return [pair for pair, is_finite in zip(arrived, good, strict=True) if is_finite]

    # -- moments -------------------------------------------------------------------------------------------------

    def _moments(self, parameter: Tensor, R: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """In R's dtype; new ones before the first step, and of a moment that a setting has asked for since."""
        state = self.state[parameter]
        if not state["age"]:
            return self.rule.start(R, group)
        here = {name: local(value) for name, value in state.items() if isinstance(value, Tensor) and name != "basis"}
        wanted = self.rule.names(group)
        started = {} if all(name in here for name in wanted) else self.rule.start(R, group)
        return started | {name: opened(name, here, R.dtype) for name in wanted if name in here}

    def _store(self, parameter: Tensor, moments: dict[str, Tensor], group: Mapping[str, Any]) -> None:
        state, pieces = self.state[parameter], self._plans[parameter].pieces
        for moment, values in moments.items():
            for name, kept in stored(moment, values, group["moments_in"], parameter.dtype).items():
                if name not in state or local(state[name]) is not kept:
                    state[name] = pieces.hold_projected(kept)

    # -- loading -------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does it, but the state keeps its own dtype, and what cannot be this optimizer's is refused first.

        Raises:
            ValueError: no state_dict, or that of another optimizer, of settings out of range or of parameters of other shapes;
                nothing is changed then.
        """
        groups = saved_groups(self, state_dict)
        for settings, states in groups:
            self._plans_of(settings)
            for parameter, saved in zip(settings["params"], states, strict=True):
                self._check_saved_state(saved, parameter, settings)
        super().load_state_dict(state_dict)
        for settings, states in groups:
            for parameter, saved in zip(settings["params"], states, strict=True):
                for name, value in saved.items():
                    if isinstance(value, Tensor):
                        self.state[parameter][name] = value.to(parameter.device)

    def _check_saved_state(self, saved: Mapping[str, Any], parameter: Tensor, group: Mapping[str, Any]) -> None:
        if not saved:
            return
        shape = tuple(parameter.shape)
        geometry = geometry_of(shape, group["rank"], group["side"])
        wanted = shape
        require_entries(saved, parameter, "step", "skipped", "age")
        if geometry is not None:
            require_entries(saved, parameter, "basis", "due", "refreshes", "since_refresh")
            basis = tuple(getattr(saved["basis"], "shape", ()))
            if len(basis) != 2 or basis[0] != geometry.compressed or not 1 <= basis[1] <= geometry.rank:
                raise ValueError(
                    f"the saved basis of shape {basis} is not one for the parameter of shape {shape} at rank {geometry.rank}"
                    f"{ELSEWHERE}"
                )
            rank = saved["overlap"].shape[1] if "overlap" in saved else basis[1]  # moments still of the old rank
            wanted = (rank, geometry.other)
        if not saved["age"]:
            return
        moments = self.rule.start(torch.empty(wanted, device="meta"), group)
        for name, expected in moments.items():
            require_shape(saved, parameter, name, tuple(expected.shape))


def _is_numpy_number(value: Any) -> bool:
    return isinstance(value, Number) and hasattr(value, "item")


def _warn_of_embeddings(parameter: Tensor, A: Tensor, geometry: Geometry) -> None:
    """Of a gradient most of whose rows are zero, a table's, a low-rank basis holds the tokens of one batch and no others."""
    rows = A if geometry.side == "left" else A.mT
    if geometry.rows <= geometry.columns or not rows.numel():
        return
    empty = float((rows == 0).all(dim=1).float().mean())
    if 0.5 < empty < 1:
        warnings.warn(
            f"{empty:.0%} of the rows of the gradient of a parameter of shape {tuple(parameter.shape)} are zero, as an "
            "embedding's are: its subspace would be that of one batch's tokens. Put it into a group with rank=None, as "
            "model_param_groups does",
            stacklevel=5,
        )
