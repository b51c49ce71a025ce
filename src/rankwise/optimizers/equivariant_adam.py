"""Adam with one second moment a matrix, so that turning a matrix turns its steps and changes nothing else."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from rankwise.optimizers.saved_state import require_entries, require_shape, saved_groups
from rankwise.optimizers.setting_checks import require_betas, require_not_negative


def equivariant_adam_step(
    parameter: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    stacked: bool,
) -> None:
    """One update in place, the maths of :class:`EquivariantAdam`.

    Args:
        parameter: W.
        gradient: G, of W's shape.
        momentum: M, of W's shape.
        second_moment: v, as :func:`empty_second_moment` makes it.
        step: t, counted from 1.
        lr, betas, eps, weight_decay, stacked: as there.
    """
    beta1, beta2 = betas
    squares = gradient.to(second_moment.dtype).square()
    energy = squares.sum(dim=(-2, -1), keepdim=True) if _is_stack(parameter, stacked) else squares.sum()
    momentum.lerp_(gradient.to(momentum.dtype), 1 - beta1)
    second_moment.lerp_(energy, 1 - beta2)
    denominator = (second_moment / (1 - beta2**step)).sqrt().add_(eps)
    parameter.mul_(1 - lr * weight_decay)
    parameter.sub_(((momentum / (1 - beta1**step)) / denominator).to(parameter.dtype), alpha=lr)


def empty_second_moment(parameter: Tensor, stacked: bool) -> Tensor:
    """v = 0: one number, or one for each matrix of a stack, (L, 1, 1).

    At least float32: of a smaller dtype, adding a thousandth would change nothing.
    """
    shape = (*parameter.shape[:-2], 1, 1) if _is_stack(parameter, stacked) else ()
    return parameter.new_zeros(shape, dtype=torch.promote_types(parameter.dtype, torch.float32))


class EquivariantAdam(torch.optim.Optimizer):
    """Adam whose second moment is one number a matrix, the squared Frobenius norm of its gradient.

        M ← β₁M + (1−β₁)G,   v ← β₂v + (1−β₂)‖G‖_F²,   W ← (1 − ηλ)W − η·M̂/(√v̂ + eps),

    with M̂ and v̂ corrected for their start at zero. Turning W and G by orthogonal matrices turns the step alike, so on a
    deep factorization the invariant subspaces of gradient descent stay, and the compressed factorization follows the
    full-width one to the order of Proposition 2.2's bound until the loss reaches its floor. Two details decide: the *sum* of
    squares (the mean would divide by d² at full width and by (2r)² compressed) and *decoupled* decay (decay inside G would
    weigh the d − 2r directions that only one of the two has). Elementwise Adam does not keep the subspaces at all.

    A step has Frobenius norm of about η, whatever the size of the matrix. Adam's has about η·√(m·n): multiply its learning
    rate by that to start from.

    Args:
        params: parameters or groups of them, as for any torch optimizer.
        lr: η.
        betas: β₁, β₂.
        eps: added to √v̂, so in units of ‖G‖_F.
        weight_decay: λ.
        maximize: climb instead of descend.
        stacked: a 3-d parameter is a stack of matrices with a second moment each, like the inner factors of
            ``CompressedDeepLinear`` and of Deep LoRA. Set it False in the group of a 1-d convolution's kernel. Parameters of
            any other number of dimensions have one second moment in all.

    Raises:
        ValueError: a setting out of range.
        RuntimeError: a sparse gradient.

    Example:
        >>> import torch
        >>> from rankwise.optimizers import EquivariantAdam
        >>> W = torch.nn.Parameter(torch.zeros(3, 4))
        >>> optimizer = EquivariantAdam([W], lr=0.5)
        >>> W.sum().backward()
        >>> optimizer.step()
        >>> round(W.norm().item(), 6)
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
        stacked: bool = True,
    ):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
            "stacked": stacked,
        }  # fmt: skip
        require_not_negative(defaults, "lr", "eps", "weight_decay")
        require_betas(betas)
        super().__init__(params, defaults)

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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)
        return loss

    def _step_one(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse:
            raise RuntimeError("EquivariantAdam does not take sparse gradients; set sparse=False in the embedding")
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["momentum"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["second_moment"] = empty_second_moment(parameter, group["stacked"])
        state["step"] += 1
        equivariant_adam_step(
            parameter,
            -gradient if group["maximize"] else gradient,
            state["momentum"],
            state["second_moment"],
            state["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            stacked=group["stacked"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does it, but the second moments keep their own dtype, and a state of something else is refused first.

        Raises:
            ValueError: no state_dict, or that of another optimizer or of parameters of other shapes; nothing is changed then.
        """
        groups = saved_groups(self, state_dict)
        for settings, states in groups:
            for parameter, saved in zip(settings["params"], states, strict=True):
                if saved:
                    require_entries(saved, parameter, "step")
                    require_shape(saved, parameter, "momentum", tuple(parameter.shape))
                    empty = empty_second_moment(parameter, settings["stacked"])
                    require_shape(saved, parameter, "second_moment", tuple(empty.shape))
        super().load_state_dict(state_dict)
        for settings, states in groups:
            for parameter, saved in zip(settings["params"], states, strict=True):
                if saved:
                    self.state[parameter]["second_moment"] = saved["second_moment"].to(parameter.device)


def _is_stack(parameter: Tensor, stacked: bool) -> bool:
    return stacked and parameter.ndim == 3
