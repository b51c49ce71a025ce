"""Updates inside the backward pass, one parameter at a time: only one layer's gradient is in memory at once."""

from typing import Any

import torch
from torch import Tensor

from rankwise.optimizers.projected import ProjectedOptimizer
from rankwise.optimizers.setting_checks import is_count, is_finite_number

_TAKEN = "_step_supports_amp_scaling"
Waiting = dict[Tensor, tuple[Tensor, float]]  # projected gradients that are to be clipped, with the norms that count


class PerLayerUpdates:
    """Let a projected optimizer update each parameter as soon as its gradient is there, and free that gradient.

    The training loop stays as it is: ``loss.backward()`` updates, ``optimizer.step()`` finishes what could not be done there
    (and has to be called), ``zero_grad`` finds nothing. The numbers are those of the ordinary mode: projecting is linear, so
    over several micro-batches the projected gradients add up to the projection of the sum. A parameter whose subspace is to
    be refreshed, and one that is not projected, keeps its whole gradient until the last micro-batch.

    Args:
        optimizer: with all its groups; parameters that join or thaw later are updated by ``step`` as ever.
        accumulate: micro-batches (backward passes) to an update. Divide the loss by it as usual. A parameter that gets a
            gradient in fewer of them is updated by ``step``.
        max_norm: clip to this norm; None does not clip. ``torch.nn.utils.clip_grad_norm_`` finds no gradients here.
        norm: "parameter" clips each parameter by its own norm, in the backward pass. "global" clips by that of all together,
            as ``clip_grad_norm_`` does: then updates wait for ``step``, projected ones as r × o numbers, and the gradients of
            what is not projected whole.
        norm_of: "gradient" measures the gradients themselves and needs ``accumulate=1``, since of a sum of micro-batches only
            the projection is kept; "projected" measures what is applied, PᵀG.

    A gradient with NaN or infinity is left out of the global norm, and its parameter's update is skipped and counted.

    Raises:
        ValueError: several processes (DDP and FSDP reduce gradients after the hooks have run), a setting out of range,
            ``norm_of="gradient"`` or ``refresh_below`` with micro-batches to accumulate.
        RuntimeError: at ``step``, under a GradScaler, which would have to unscale before the update (bfloat16 needs none);
            at ``state_dict``, in the middle of an accumulation.

    Example:
        >>> import torch
        >>> from rankwise.optimizers import GaLoreAdamW, PerLayerUpdates
        >>> model = torch.nn.Linear(6, 4)
        >>> optimizer = GaLoreAdamW(model.parameters(), lr=0.1, rank=2)
        >>> updates = PerLayerUpdates(optimizer)
        >>> model(torch.ones(3, 6)).sum().backward()
        >>> model.weight.grad is None, optimizer.state[model.weight]["step"]
        (True, 1)
        >>> optimizer.step()
    """

    def __init__(
        self,
        optimizer: ProjectedOptimizer,
        *,
        accumulate: int = 1,
        max_norm: float | None = None,
        norm: str = "parameter",
        norm_of: str = "gradient",
    ):
        if not isinstance(optimizer, ProjectedOptimizer):
            raise ValueError(
                f"per-layer updates are for projected optimizers, GaLore's and AdaRankGrad, got {type(optimizer).__name__}; "
                "call its step() as usual"
            )
        if hasattr(optimizer, _TAKEN):
            raise ValueError("this optimizer has per-layer updates already; remove() them before giving it others")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            size = torch.distributed.get_world_size()
            if size > 1:
                raise ValueError(
                    f"per-layer updates run in one process, not in {size}: DDP and FSDP reduce gradients after the hooks have "
                    "run. Call optimizer.step() as usual; FSDP2 shards the gradients, which saves the same memory"
                )
        if not is_count(accumulate, 1):
            raise ValueError(f"accumulate counts backward passes from 1, got {accumulate!r}")
        if max_norm is not None and not (is_finite_number(max_norm) and max_norm > 0):
            raise ValueError(f"max_norm must be positive and finite, or None not to clip, got {max_norm!r}")
        if norm not in ("parameter", "global") or norm_of not in ("gradient", "projected"):
            raise ValueError(
                'norm must be "parameter" or "global" and norm_of "gradient" or "projected", '
                f"got {norm!r} and {norm_of!r}"
            )
        if accumulate > 1 and max_norm is not None and norm_of == "gradient":
            raise ValueError(
                "of gradients that accumulate only the projections are kept, whose norm is another one: choose "
                'norm_of="projected", or accumulate=1'
            )
        if accumulate > 1 and any(group.get("refresh_below") is not None for group in optimizer.param_groups):
            raise ValueError(
                "refresh_below compares with the whole gradient, which does not accumulate; use refresh_every"
            )
        self.optimizer, self.accumulate = optimizer, accumulate
        self.max_norm, self.norm, self.norm_of = max_norm, norm, norm_of
        self._seen: dict[Tensor, int] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self._waiting: Waiting = {}
        self._group_of = {p: group for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        # a GradScaler hands its scale to an optimizer that says so, and would else complain of missing gradients
        setattr(optimizer, _TAKEN, True)
        self._handles: list[Any] = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._group_of]
        self._handles.append(optimizer.register_step_pre_hook(self._finish))
        self._handles.append(optimizer.register_step_post_hook(self._finish))  # for what a closure's backward pass left
        self._handles.append(optimizer.register_state_dict_pre_hook(self._refuse_half_an_update))

    def remove(self) -> None:
        """Back to the ordinary mode; what has accumulated is dropped. A second time there is nothing to do."""
        if not self._handles:
            return
        self.discard()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        delattr(self.optimizer, _TAKEN)

    def discard(self) -> None:
        """Drop what has accumulated since the last update, as ``zero_grad`` would in the ordinary mode."""
        for parameter in self._seen:
            parameter.grad = None
        self._seen.clear()
        self._sums.clear()
        self._waiting.clear()

    # -- hooks ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        """One backward pass has accumulated into the parameter's gradient."""
        self._seen[parameter] = self._seen.get(parameter, 0) + 1
        last = self._seen[parameter] == self.accumulate
        optimizer = self.optimizer
        if not last and optimizer.is_projected(parameter) and not optimizer.refresh_is_due(parameter):
            self._add_projected(parameter)
        elif last:
            self._update(parameter)

    def _add_projected(self, parameter: Tensor) -> Tensor:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None  # noqa: S101 - the hook runs after it was accumulated
        R = self.optimizer.project_gradient(parameter, gradient, self._group_of[parameter])
        before = self._sums.pop(parameter, None)
        total = R if before is None else before.add_(R)
        self._sums[parameter] = total
        return total

    def _update(self, parameter: Tensor) -> None:
        """All of an update's gradients are there."""
        del self._seen[parameter]
        measured = self._measured(parameter)
        R = self._sums.pop(parameter) if parameter.grad is None else self._add_projected(parameter)
        self._sums.pop(parameter, None)
        norm = float(torch.linalg.vector_norm(R)) if measured is None else measured
        if self.max_norm is not None and self.norm == "global":
            self._waiting[parameter] = (R, norm)
            return
        if self.max_norm is not None:
            R = R * _shrinking(self.max_norm, norm)
        self.optimizer.apply_projected([(parameter, R)], self._group_of[parameter])

    def _measured(self, parameter: Tensor) -> float | None:
        """The norm of the whole gradient, where that is the one that counts."""
        if self.max_norm is None or self.norm_of == "projected" or parameter.grad is None:
            return None
        return float(torch.linalg.vector_norm(parameter.grad))

    @torch.no_grad()
    def _finish(self, optimizer: torch.optim.Optimizer, *step_arguments: Any) -> None:
        """Before ``step``: parameters that some micro-batches did not reach, then those that wait for the global norm."""
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "per-layer updates happen before a GradScaler can unscale; train in bfloat16, which needs no scaling, or "
                "without PerLayerUpdates"
            )
        for parameter in list(self._seen):
            self._update(parameter)
        if not self._waiting:
            return
        norms = torch.tensor([norm for _, norm in self._waiting.values()], dtype=torch.float64)
        total = float(norms[norms.isfinite()].norm())
        shrinking = _shrinking(self.max_norm or total, total)
        for parameter, (R, _) in self._waiting.items():
            self.optimizer.apply_projected([(parameter, R * shrinking)], self._group_of[parameter])
        self._waiting.clear()

    def _refuse_half_an_update(self, optimizer: torch.optim.Optimizer) -> None:
        if self._seen or self._waiting:
            raise RuntimeError(
                "in the middle of an accumulation the state is not whole: save after optimizer.step(), or call discard() first"
            )


def _shrinking(max_norm: float, norm: float) -> float:
    """As ``clip_grad_norm_`` has it; a norm that is not finite shrinks nothing, its update is skipped."""
    return min(max_norm / (norm + 1e-6), 1.0)
