"""What every optimizer of the library must do as a citizen of torch.optim, whatever its maths: a pytest mixin."""

import copy
import io
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class OptimizerContract:
    """Subclass it as ``TestSomething`` and say how the optimizer is made; sizes and dtypes can be changed too.

    Example:
        >>> import torch
        >>> from rankwise.testing.optimizer_contract import OptimizerContract
        >>> class TestAdam(OptimizerContract):
        ...     def make_optimizer(self, params, **changes):
        ...         return torch.optim.Adam(params, **{"lr": 0.05, "weight_decay": 0.01, **changes})
    """

    shapes: tuple[tuple[int, ...], ...] = ((6, 4), (4,), (3, 5, 5), (2, 3, 3, 3), ())
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16)

    def make_optimizer(self, params: Any, **changes: Any) -> torch.optim.Optimizer:
        """The optimizer over ``params``, with every feature that has state switched on, and ``changes`` on top."""
        raise NotImplementedError

    # -- how the tests build things ------------------------------------------------------------------------------

    def parameters(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        return [nn.Parameter(values.to(dtype)) for values in drawn]

    def steps(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], numbers: Iterable[int]
    ) -> None:
        """One step for each number, with gradients that depend on the number and on the parameters."""
        for number in numbers:
            for place, parameter in enumerate(parameters):
                generator = torch.Generator().manual_seed(1000 * number + place)
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = (parameter.detach().double() + noise).to(parameter.dtype)
            optimizer.step()

    # -- what is asked -------------------------------------------------------------------------------------------

    def test_state_is_tensors_and_plain_numbers(self) -> None:
        parameters = self.parameters()
        optimizer = self.make_optimizer(parameters)
        self.steps(optimizer, parameters, range(2))
        state = optimizer.state_dict()["state"]
        assert len(state) == len(parameters)
        for entries in state.values():
            for name, value in entries.items():
                assert isinstance(value, Tensor | int | float | bool), f"{name} is a {type(value).__name__}"

    def test_resuming_is_never_having_stopped(self) -> None:
        """Bit for bit, through a file read with weights_only=True, in every dtype."""
        for dtype in self.dtypes:
            through, stopped = self.parameters(dtype), self.parameters(dtype)
            uninterrupted, first = self.make_optimizer(through), self.make_optimizer(stopped)
            self.steps(uninterrupted, through, range(8))
            self.steps(first, stopped, range(5))
            file = io.BytesIO()
            torch.save({"parameters": [p.detach() for p in stopped], "optimizer": first.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            resumed = [nn.Parameter(values) for values in saved["parameters"]]
            second = self.make_optimizer(resumed, lr=123.0)
            second.load_state_dict(saved["optimizer"])
            self.steps(second, resumed, range(5, 8))
            for got, want in zip(resumed, through, strict=True):
                assert torch.equal(got, want), f"{dtype}, shape {tuple(got.shape)}"

    def test_gradients_are_read_and_never_written(self) -> None:
        parameters = self.parameters()
        optimizer = self.make_optimizer(parameters)
        for maximize in (False, True):
            for group in optimizer.param_groups:
                group["maximize"] = maximize
            grads = [torch.ones_like(parameter) for parameter in parameters]
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            optimizer.step()
            for parameter, grad in zip(parameters, grads, strict=True):
                assert parameter.grad is grad
                assert torch.equal(grad, torch.ones_like(grad))

    def test_parameters_without_a_gradient_stay(self) -> None:
        parameters = self.parameters()
        optimizer = self.make_optimizer(parameters)
        start = parameters[0].detach().clone()
        self.steps(optimizer, parameters[1:], range(2))
        assert torch.equal(parameters[0], start)
        assert parameters[0] not in optimizer.state

    def test_maximizing_is_minimizing_the_negative(self) -> None:
        up, down = self.parameters(), self.parameters()
        climbing, descending = self.make_optimizer(up, maximize=True), self.make_optimizer(down)
        for number in range(3):
            for place, (a, b) in enumerate(zip(up, down, strict=True)):
                generator = torch.Generator().manual_seed(10 * number + place)
                a.grad = torch.randn(a.shape, generator=generator, dtype=a.dtype)
                b.grad = -a.grad
            climbing.step()
            descending.step()
        for a, b in zip(up, down, strict=True):
            assert torch.equal(a, b)

    def test_a_closure_is_evaluated_once_with_gradients_on_and_its_value_returned(self) -> None:
        parameters, plain = self.parameters(), self.parameters()
        optimizer, other = self.make_optimizer(parameters), self.make_optimizer(plain)
        calls = 0

        def closure() -> float:
            nonlocal calls
            assert torch.is_grad_enabled()
            calls += 1
            optimizer.zero_grad()
            loss = torch.stack([p.square().sum() for p in parameters]).sum()
            loss.backward()
            return loss.item()

        with torch.no_grad():
            value = optimizer.step(closure)
        assert calls == 1
        assert value == pytest.approx(sum(float(p.detach().square().sum()) for p in plain))
        for parameter in plain:
            parameter.grad = 2 * parameter.detach()
        assert other.step() is None
        for a, b in zip(parameters, plain, strict=True):
            assert torch.equal(a, b)

    def test_groups_have_settings_of_their_own_and_may_join_later(self) -> None:
        parameters, alone = self.parameters(), self.parameters()
        optimizer = self.make_optimizer(parameters[:1])
        optimizer.add_param_group({"params": parameters[1:], "lr": 0.0, "weight_decay": 0.0})
        single = self.make_optimizer(alone[:1])
        frozen = [p.detach().clone() for p in parameters[1:]]
        self.steps(optimizer, parameters, range(3))
        self.steps(single, alone[:1], range(3))
        assert torch.equal(parameters[0], alone[0])
        assert not torch.equal(parameters[0], self.parameters()[0])
        for parameter, start in zip(parameters[1:], frozen, strict=True):
            assert torch.equal(parameter, start)
        optimizer.param_groups[1]["lr"] = 0.1
        self.steps(optimizer, parameters, range(3, 4))
        assert all(not torch.equal(p, start) for p, start in zip(parameters[1:], frozen, strict=True))

    @pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf])
    def test_rates_that_are_no_finite_numbers_are_refused(self, lr: float) -> None:
        parameters = self.parameters()
        with pytest.raises(ValueError, match="lr"):
            self.make_optimizer(parameters, lr=lr)

    @pytest.mark.parametrize(
        "given",
        [{}, None, "state", {"state": {}}, {"state": {}, "param_groups": []}, {"state": None, "param_groups": 5}],
    )
    def test_what_is_no_state_of_its_parameters_is_refused(self, given: Any) -> None:
        with pytest.raises(ValueError, match="state"):
            self.make_optimizer(self.parameters()).load_state_dict(given)

    def test_schedulers_and_copies_work(self) -> None:
        parameters = self.parameters()
        optimizer = self.make_optimizer(parameters)
        lr = optimizer.param_groups[0]["lr"]
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        self.steps(optimizer, parameters, range(1))
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * lr)
        assert len(copy.deepcopy(optimizer).state) == len(parameters)

    def test_it_descends(self) -> None:
        """A convex problem, far enough: no oracle, but an optimizer that climbs is caught."""
        parameters = self.parameters()
        optimizer = self.make_optimizer(parameters)
        start = sum(float(p.detach().square().sum()) for p in parameters)
        for _ in range(300):
            for parameter in parameters:
                parameter.grad = parameter.detach().clone()
            optimizer.step()
        assert sum(float(p.detach().square().sum()) for p in parameters) < 0.5 * start
