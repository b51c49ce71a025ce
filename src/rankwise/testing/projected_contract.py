"""What every projected optimizer must do besides being torch's citizen: a pytest mixin over :class:`OptimizerContract`."""

import copy
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankwise.optimizers.matricize import geometry_of
from rankwise.optimizers.projected import ProjectedOptimizer
from rankwise.testing.optimizer_contract import OptimizerContract

# a mixin's method is run by each class that has it, which is meant here
_by_every_member = settings(
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow], deadline=None
)


class ProjectedContract(OptimizerContract):
    """Subclass it as ``TestSomething``; ``make_optimizer`` has to project at rank 2 and refresh every third step.

    ``make_sgd`` is the same policy over plain gradient descent, for what has an oracle then.
    """

    rank = 2
    kernel = (2, 3, 3, 3)

    def make_optimizer(self, params: Any, **changes: Any) -> ProjectedOptimizer:
        raise NotImplementedError

    def make_sgd(self, params: Any, **changes: Any) -> ProjectedOptimizer:
        raise NotImplementedError

    # -- how the tests build things ------------------------------------------------------------------------------

    def gradients(self, parameters: Sequence[nn.Parameter], steps: int, seed: int = 0) -> Iterator[list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in parameters]

    def descend(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], gradients: Iterator[list[Tensor]]
    ) -> None:
        for given_now in gradients:
            for parameter, gradient in zip(parameters, given_now, strict=True):
                parameter.grad = gradient
            optimizer.step()

    @staticmethod
    def assert_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b), f"shape {tuple(a.shape)}: off by {float((a - b).abs().max())}"

    def outside_share(self, optimizer: ProjectedOptimizer, parameter: nn.Parameter, change: Tensor) -> float:
        """‖(I − PPᵀ)·ΔW‖ / ‖ΔW‖ on the projected side."""
        basis = optimizer.state[parameter]["basis"].double()
        matrix = change.double().reshape(change.shape[0], -1)
        A = matrix if basis.shape[0] == matrix.shape[0] and self._left(parameter) else matrix.mT
        return float((A - basis @ (basis.mT @ A)).norm() / A.norm())

    def _left(self, parameter: nn.Parameter) -> bool:
        return parameter.shape[0] < math.prod(parameter.shape[1:])

    # -- subspaces -----------------------------------------------------------------------------------------------

    @_by_every_member
    @given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), rank=st.integers(1, 9), seed=st.integers(0, 99))
    def test_a_step_lies_in_the_subspace(self, shape: tuple[int, int], rank: int, seed: int) -> None:
        rank = min(rank, *shape)
        parameter = self.parameters(seed=seed)[0].new_zeros(shape)
        W = nn.Parameter(parameter)
        optimizer = self.make_optimizer([W], rank=rank, weight_decay=0.0)
        for gradients in self.gradients([W], 5, seed):
            before = W.detach().clone()
            self.descend(optimizer, [W], iter([gradients]))
            change = W.detach() - before
            basis = optimizer.state[W]["basis"]
            assert torch.allclose(basis.mT @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), atol=1e-12)
            assert self.outside_share(optimizer, W, change) < 1e-12
            assert torch.linalg.matrix_rank(change) <= rank

    @_by_every_member
    @given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 99))
    def test_descent_at_full_rank_is_gradient_descent(self, shape: tuple[int, int], seed: int) -> None:
        start = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        projected = self.make_sgd([ours], rank=min(shape), lr=0.1)
        plain = torch.optim.SGD([theirs], lr=0.1)
        self.descend(projected, [ours], self.gradients([ours], 7, seed))
        self.descend(plain, [theirs], self.gradients([theirs], 7, seed))
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)

    def test_descent_below_full_rank_is_the_projected_gradient(self) -> None:
        for shape in ((6, 4), (4, 6), self.kernel):
            W = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
            optimizer = self.make_sgd([W], rank=1, lr=1.0, scale=0.5)
            (gradients,) = self.gradients([W], 1)
            self.descend(optimizer, [W], iter([gradients]))
            G = gradients[0].reshape(shape[0], -1)
            P = optimizer.state[W]["basis"]
            expected = P @ P.mT @ G if self._left(W) else G @ P @ P.mT
            assert torch.allclose(W.detach().reshape(G.shape), -0.5 * expected, rtol=0, atol=1e-14)

    def test_state_is_as_small_as_the_rank(self) -> None:
        W = nn.Parameter(torch.zeros(30, 50))
        optimizer = self.make_optimizer([W])
        self.descend(optimizer, [W], self.gradients([W], 4))
        tensors = {name: value for name, value in optimizer.state[W].items() if isinstance(value, Tensor)}
        r = tensors.pop("basis").shape[1]
        assert r <= self.rank
        assert tensors
        assert sum(value.numel() for value in tensors.values()) <= 2 * 50 * r

    # -- torch's habits ------------------------------------------------------------------------------------------

    def test_the_order_of_parameters_decides_nothing(self) -> None:
        order = [3, 1, 4, 0, 2]
        straight, turned = self.parameters(), self.parameters()
        first = self.make_optimizer(straight)
        second = self.make_optimizer([turned[k] for k in order])
        self.descend(first, straight, self.gradients(straight, 7))
        self.descend(second, turned, self.gradients(turned, 7))
        self.assert_equal(straight, turned)

    def test_stepping_together_or_one_by_one_is_the_same(self) -> None:
        together, apart = self.parameters(), self.parameters()
        self.descend(self.make_optimizer(together, foreach=True), together, self.gradients(together, 7))
        self.descend(self.make_optimizer(apart, foreach=False), apart, self.gradients(apart, 7))
        self.assert_equal(together, apart)

    def test_gradients_accumulate_and_are_clipped_before_the_step(self) -> None:
        """From autograd, as a training loop has it, against the clipped sum by hand."""
        looped, by_hand = self.parameters(), self.parameters()
        first, second = self.make_optimizer(looped), self.make_optimizer(by_hand)
        for micro_batches in zip(*[self.gradients(looped, 5, seed) for seed in (1, 2)], strict=True):
            first.zero_grad(set_to_none=True)
            for gradients in micro_batches:
                torch.stack([(p * g).sum() for p, g in zip(looped, gradients, strict=True)]).sum().backward()
            torch.nn.utils.clip_grad_norm_(looped, 0.5)
            first.step()
            sums = [a + b for a, b in zip(*micro_batches, strict=True)]
            total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in sums]))
            for parameter, gradient in zip(by_hand, sums, strict=True):
                parameter.grad = gradient * torch.clamp(0.5 / (total + 1e-6), max=1.0)
            second.step()
        self.assert_equal(looped, by_hand)

    def test_zeroed_gradients_neither_move_nor_break_anything(self) -> None:
        """Before the first real gradient, as behind a head that starts at zero: the subspace waits for one."""
        parameters, fresh = self.parameters(), self.parameters()
        optimizer, other = self.make_sgd(parameters), self.make_sgd(fresh)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        self.assert_equal(parameters, self.parameters())
        self.descend(optimizer, parameters, self.gradients(parameters, 2))
        self.descend(other, fresh, self.gradients(fresh, 2))
        self.assert_equal(parameters, fresh)

    def test_a_gradient_scaler_changes_nothing_but_skips_overflow(self) -> None:
        scaled, plain = self.parameters(torch.float32), self.parameters(torch.float32)
        optimizer, other = self.make_optimizer(scaled), self.make_optimizer(plain)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for number, gradients in enumerate(self.gradients(scaled, 6)):
            optimizer.zero_grad()
            overflow = math.inf if number == 3 else 1.0
            loss = torch.stack([(p * g).sum() for p, g in zip(scaled, gradients, strict=True)]).sum() * overflow
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if number != 3:
                self.descend(other, plain, iter([gradients]))
        self.assert_equal(scaled, plain)
        assert optimizer.skipped_updates() == 0, "the scaler skips the step itself"

    def test_dtypes_are_kept(self) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            parameters = self.parameters(dtype)
            optimizer = self.make_optimizer(parameters)
            self.descend(optimizer, parameters, self.gradients(parameters, 4))
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            resumed = self.make_optimizer(parameters)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for made in (optimizer, resumed):
                for parameter in parameters:
                    assert parameter.dtype == dtype
                    assert torch.isfinite(parameter).all()
                    tensors = [value for value in made.state[parameter].values() if isinstance(value, Tensor)]
                    assert {value.dtype for value in tensors} == {wide}

    def test_narrow_parameters_are_stepped_in_wide_algebra_and_rounded_once(self) -> None:
        narrow = self.parameters(torch.bfloat16)
        wide = [nn.Parameter(parameter.detach().float()) for parameter in narrow]
        first, second = self.make_optimizer(narrow), self.make_optimizer(wide)
        (gradients,) = self.gradients(narrow, 1)
        self.descend(first, narrow, iter([gradients]))
        self.descend(second, wide, iter([[gradient.float() for gradient in gradients]]))
        self.assert_equal(narrow, [parameter.detach().bfloat16() for parameter in wide])

    def test_channels_last_kernels_are_the_same_kernels(self) -> None:
        plain = nn.Parameter(torch.randn(self.kernel, dtype=torch.float64))
        last = nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
        first, second = self.make_optimizer([plain]), self.make_optimizer([last])
        for (gradient,) in self.gradients([plain], 5):
            self.descend(first, [plain], iter([[gradient]]))
            self.descend(second, [last], iter([[gradient.to(memory_format=torch.channels_last)]]))
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(plain, last, rtol=0, atol=1e-14)

    # -- what goes wrong -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("at", [0, 1, 3])
    def test_a_gradient_that_is_not_finite_is_as_if_it_had_not_been(self, poison: float, at: int) -> None:
        """At the first step, within a window, at a refresh; bit for bit, and the other parameters go on."""
        hit, spared = self.parameters(), self.parameters()
        optimizer, other = self.make_optimizer(hit), self.make_optimizer(spared)
        for number, gradients in enumerate(self.gradients(hit, 6)):
            if number == at:
                poisoned = [gradient.clone() for gradient in gradients]
                poisoned[0][2, 1] = poison
                poisoned[1][3] = poison
                self.descend(optimizer, hit, iter([poisoned]))
                self.descend(other, spared[2:], iter([gradients[2:]]))
            else:
                self.descend(optimizer, hit, iter([gradients]))
                for parameter in spared:
                    parameter.grad = None
                self.descend(other, spared, iter([gradients]))
            for parameter in spared:
                parameter.grad = None
        self.assert_equal(hit, spared)
        assert optimizer.skipped_updates() == 2
        assert [optimizer.state[p]["skipped"] for p in hit] == [1, 1, 0, 0, 0]
        assert all(torch.isfinite(p).all() for p in hit)

    @pytest.mark.parametrize("size", [2e19, 1e30])
    @pytest.mark.parametrize("at", [0, 1, 3])
    def test_a_gradient_whose_squares_overflow_is_left_out_and_counted(self, size: float, at: int) -> None:
        """An infinite second moment would stay."""
        parameters = self.parameters(torch.float32)
        optimizer = self.make_optimizer(parameters)
        for number, gradients in enumerate(self.gradients(parameters, 5)):
            before = [parameter.detach().clone() for parameter in parameters]
            huge = [torch.full_like(gradient, size) for gradient in gradients]
            self.descend(optimizer, parameters, iter([huge if number == at else gradients]))
            stayed = [torch.equal(parameter, start) for parameter, start in zip(parameters, before, strict=True)]
            assert stayed == [number == at] * len(parameters)
            assert all(torch.isfinite(parameter).all() for parameter in parameters)
        assert optimizer.skipped_updates() == len(parameters)

    def test_sparse_gradients_are_refused(self) -> None:
        table = nn.Embedding(5, 3, sparse=True)
        optimizer = self.make_optimizer(table.parameters())
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(RuntimeError, match="sparse=False in the embedding"):
            optimizer.step()

    def test_projecting_an_embedding_is_warned_of(self) -> None:
        table = nn.Embedding(50, 3)
        optimizer = self.make_optimizer(table.parameters())
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.warns(UserWarning, match="96% of the rows .* rank=None"):
            optimizer.step()

    @pytest.mark.parametrize(
        ("rank", "message"),
        [(0, "whole number from 1"), (-1, "whole number from 1"), (2.0, "whole number"), (5, r"\(6, 4\) .* at most 4")],
    )
    def test_ranks_that_cannot_be_are_refused(self, rank: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.make_optimizer([nn.Parameter(torch.zeros(6, 4))], rank=rank)

    def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(self) -> None:
        optimizer = self.make_optimizer(self.parameters())
        with pytest.raises(ValueError, match="rank"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(6, 4))], "rank": 7})
        assert len(optimizer.param_groups) == 1
        with pytest.raises(ValueError, match="refresh_every"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(6, 4))], "update_proj_gap": 7})

    @pytest.mark.parametrize("value", [math.nan, math.inf, "1", None])
    @pytest.mark.parametrize("name", ["lr", "weight_decay", "scale"])
    def test_settings_that_are_no_finite_numbers_are_refused(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"{name} cannot be negative and must be a finite number"):
            self.make_optimizer(self.parameters(), **{name: value})

    @pytest.mark.parametrize("value", [1.5, math.nan, None])
    @pytest.mark.parametrize("name", ["oversample", "iterations", "seed"])
    def test_counts_are_whole_numbers(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            self.make_optimizer(self.parameters(), **{name: value})

    def test_numpys_numbers_are_numbers(self) -> None:
        parameters, plain = self.parameters(), self.parameters()
        optimizer = self.make_optimizer(parameters, rank=np.int64(2), lr=np.float64(0.05))
        self.descend(optimizer, parameters, self.gradients(parameters, 4))
        self.descend(self.make_optimizer(plain, rank=2, lr=0.05), plain, self.gradients(plain, 4))
        self.assert_equal(parameters, plain)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        self.make_optimizer(self.parameters()).load_state_dict(torch.load(file, weights_only=True))

    def test_nothing_to_project_is_an_error(self) -> None:
        for groups in ([nn.Parameter(torch.zeros(6))], [{"params": [nn.Parameter(torch.zeros(6, 4))], "rank": None}]):
            with pytest.raises(ValueError, match="would project nothing"):
                self.make_optimizer(groups)

    def test_empty_groups_and_frozen_parameters_are_let_be(self) -> None:
        frozen = nn.Parameter(torch.ones(6, 4), requires_grad=False)
        parameters = self.parameters()
        optimizer = self.make_optimizer([{"params": [*parameters, frozen]}, {"params": []}])
        self.descend(optimizer, parameters, self.gradients(parameters, 2))
        assert torch.equal(frozen, torch.ones(6, 4))
        with pytest.raises(ValueError, match="empty parameter list"):
            self.make_optimizer([])

    @pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
    def test_parameters_that_are_not_floating_point_are_refused(self, dtype: torch.dtype) -> None:
        number = nn.Parameter(torch.zeros(6, 4, dtype=dtype), requires_grad=False)
        with pytest.raises(ValueError, match="only floating-point"):
            self.make_optimizer([nn.Parameter(torch.zeros(6, 4)), number])

    def test_a_state_of_something_else_is_refused_and_changes_nothing(self) -> None:
        parameters = self.parameters()
        optimizer = self.make_optimizer(parameters)
        self.descend(optimizer, parameters, self.gradients(parameters, 2))
        before = copy.deepcopy(optimizer.state_dict())
        adam = torch.optim.AdamW(parameters)
        self.descend(adam, parameters, self.gradients(parameters, 1))
        with pytest.raises(ValueError, match="another optimizer"):
            optimizer.load_state_dict(adam.state_dict())
        for others in ([nn.Parameter(torch.zeros(6, 5)), *self.parameters()[1:]], self.parameters()[::-1]):
            other = self.make_optimizer(others)
            self.descend(other, others, self.gradients(others, 2))
            with pytest.raises(ValueError, match="another model"):
                optimizer.load_state_dict(other.state_dict())
        half = copy.deepcopy(before)
        moment = next(name for name, value in half["state"][1].items() if isinstance(value, Tensor))
        del half["state"][1][moment]
        with pytest.raises(ValueError, match=f"saved {moment} .* missing"):
            optimizer.load_state_dict(half)
        file, after = io.BytesIO(), io.BytesIO()
        torch.save(before, file)
        torch.save(optimizer.state_dict(), after)
        assert file.getvalue() == after.getvalue()

    @pytest.mark.parametrize(
        ("setting", "message"),
        [({"lr": -1.0}, "lr"), ({"moments": "forget"}, "moments"), ({"rank": 5}, "has no rank 5")],
    )
    def test_a_state_with_settings_out_of_range_is_refused_and_changes_nothing(
        self, setting: dict[str, Any], message: str
    ) -> None:
        parameters, plain = self.parameters(), self.parameters()
        optimizer, other = self.make_optimizer(parameters), self.make_optimizer(plain)
        saved = optimizer.state_dict()
        saved["param_groups"][0].update(setting)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        self.descend(optimizer, parameters, self.gradients(parameters, 2))
        self.descend(other, plain, self.gradients(plain, 2))
        self.assert_equal(parameters, plain)

    @pytest.mark.parametrize("name", ["step", "age", "skipped", "basis", "refreshes"])
    def test_a_state_that_lacks_an_entry_is_refused(self, name: str) -> None:
        parameters = self.parameters()
        optimizer = self.make_optimizer(parameters)
        self.descend(optimizer, parameters, self.gradients(parameters, 2))
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["state"][0][name]
        with pytest.raises(ValueError, match=f"the saved {name} of a parameter of shape .* is missing"):
            optimizer.load_state_dict(saved)

    def test_geometry_is_decided_by_the_whole_shape(self) -> None:
        """The projected gradient of a 30 × 50 matrix at rank 40 would be read as a tall one."""
        geometry = geometry_of((45, 50), 40)
        assert geometry is not None
        assert (geometry.side, geometry.compressed, geometry.other) == ("left", 45, 50)
        for shape in ((45, 50), (50, 45), (45, 45)):
            W = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
            optimizer = self.make_optimizer([W], rank=40, weight_decay=0.0)
            (gradients,) = self.gradients([W], 1)
            self.descend(optimizer, [W], iter([gradients]))
            assert optimizer.state[W]["basis"].shape[0] == 45
            assert self.outside_share(optimizer, W, W.detach()) < 1e-12
