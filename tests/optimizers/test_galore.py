"""GaLore over its base rules: the contract, then what is GaLore's own against torch's optimizers and dense algebra."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from rankwise.optimizers import GaLoreAdafactor, GaLoreAdamW, GaLoreSGD, moment_storage
from rankwise.optimizers.projected import ProjectedOptimizer
from rankwise.testing.projected_contract import ProjectedContract
from tests.spectral.planted import frame, planted, projector

F64 = torch.float64
FAST = {"lr": 0.05, "weight_decay": 0.01, "rank": 2, "refresh_every": 3}


class GaLoreContract(ProjectedContract):
    settings: ClassVar[dict[str, Any]] = {}
    optimizer: ClassVar[Any] = GaLoreAdamW

    def make_optimizer(self, params: Any, **changes: Any) -> ProjectedOptimizer:
        return self.optimizer(params, **{**FAST, **self.settings, **changes})

    def make_sgd(self, params: Any, **changes: Any) -> GaLoreSGD:
        policy = {key: value for key, value in self.settings.items() if key not in ("momentum", "nesterov", "beta1")}
        return GaLoreSGD(params, **{"rank": 2, "refresh_every": 3, **policy, **changes})


class TestKeepingMoments(GaLoreContract):
    settings: ClassVar = {"moments": "keep"}


class TestRotatingMoments(GaLoreContract):
    settings: ClassVar = {"moments": "rotate"}


class TestResettingMoments(GaLoreContract):
    settings: ClassVar = {"moments": "reset"}


class TestExactSubspaces(GaLoreContract):
    settings: ClassVar = {"basis": "svd"}


class TestRefreshingByEnergy(GaLoreContract):
    settings: ClassVar = {"refresh_every": None, "refresh_below": 0.9}


class TestMomentum(GaLoreContract):
    optimizer = GaLoreSGD
    settings: ClassVar = {"momentum": 0.9, "nesterov": True}


class TestAdafactor(GaLoreContract):
    optimizer = GaLoreAdafactor
    settings: ClassVar = {"beta1": 0.9}


class TestTheLargerSide(GaLoreContract):
    """The other side than the paper's."""

    optimizer = GaLoreSGD
    settings: ClassVar = {"momentum": 0.9, "side": "larger"}

    def _left(self, parameter: nn.Parameter) -> bool:
        return not super()._left(parameter)

    def make_sgd(self, params: Any, **changes: Any) -> GaLoreSGD:
        """A subspace of min(m, n) directions is not the whole larger side, but it holds the gradient that gave it."""
        return super().make_sgd(params, **{"refresh_every": 1, **changes})

    def test_state_is_as_small_as_the_rank(self) -> None:
        bytes_of = {}
        for side in ("smaller", "larger"):
            W = nn.Parameter(torch.zeros(30, 50))
            optimizer = GaLoreAdamW([W], rank=4, side=side)
            W.grad = torch.randn(30, 50)
            optimizer.step()
            bytes_of[side] = numbers_in(optimizer, W)
        assert bytes_of == {"smaller": (30 + 2 * 50) * 4, "larger": (50 + 2 * 30) * 4}

    def test_geometry_is_decided_by_the_whole_shape(self) -> None:
        for shape in ((45, 50), (50, 45)):
            W = nn.Parameter(torch.zeros(shape))
            optimizer = GaLoreAdamW([W], rank=40, side="larger")
            W.grad = torch.randn(shape)
            optimizer.step()
            assert optimizer.state[W]["basis"].shape == (50, 40)


def numbers_in(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    return sum(value.numel() for value in optimizer.state[parameter].values() if isinstance(value, Tensor))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def zeros(*shape: int, dtype: torch.dtype = F64) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def step(optimizer: torch.optim.Optimizer, W: nn.Parameter, G: Tensor) -> Tensor:
    """The change that a gradient makes."""
    before = W.detach().clone()
    W.grad = G
    optimizer.step()
    return W.detach() - before


# -- subspaces and when they change ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_with_the_svd_the_step_is_that_of_the_paper(shape: tuple[int, int], side: str) -> None:
    """Adam in U_r (or V_r) of the first gradient, moments and all, written out; Algorithm 1 of the overview's Appendix D."""
    W = nn.Parameter(normal(*shape, seed=9))
    expected = W.detach().clone()
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "scale": 0.25}
    optimizer = GaLoreAdamW([W], rank=3, side=side, basis="svd", refresh_every=100, **settings)
    U, _, Vh = torch.linalg.svd(normal(*shape, seed=1))
    P = U[:, :3] if side == "left" else Vh[:3].mT
    M = V = torch.zeros(())
    for t in range(1, 5):
        G = normal(*shape, seed=t)
        step(optimizer, W, G)
        R = P.mT @ G if side == "left" else G @ P
        M, V = 0.8 * M + 0.2 * R, 0.9 * V + 0.1 * R**2
        N = (M / (1 - 0.8**t)) / ((V / (1 - 0.9**t)).sqrt() + 1e-3)
        expected = (1 - 0.1 * 0.1) * expected - 0.1 * 0.25 * (P @ N if side == "left" else N @ P.mT)
    assert torch.allclose(W, expected, rtol=0, atol=1e-12)


def test_descent_with_the_exact_subspace_has_the_singular_vectors_themselves_as_basis() -> None:
    """What the equivalence with ReLoRA (Theorem 4) is stated for: over refreshes, in the SVD's order."""
    W = zeros(12, 20)
    optimizer = GaLoreSGD([W], lr=0.5, rank=3, basis="svd", refresh_every=2)
    for number in range(5):
        G = planted(12, 20, [4.0, 3.0, 2.0, 1.0], seed=number).matrix
        if number % 2 == 0:
            U = torch.linalg.svd(G).U[:, :3]
        change = step(optimizer, W, G)
        assert torch.allclose(change, -0.5 * U @ U.mT @ G, rtol=0, atol=1e-13)
        assert torch.allclose(optimizer.state[W]["basis"].mT @ U, torch.eye(3, dtype=F64), atol=1e-12)


def test_subspaces_change_every_so_many_updates() -> None:
    W = zeros(12, 20)
    optimizer = GaLoreAdamW([W], rank=3, refresh_every=4)
    bases = []
    for number in range(9):
        step(optimizer, W, normal(12, 20, seed=number))
        bases.append(optimizer.state[W]["basis"].clone())
    changed = [number for number in range(1, 9) if not torch.equal(bases[number], bases[number - 1])]
    assert changed == [4, 8]
    assert optimizer.state[W]["refreshes"] == 3


def test_a_subspace_that_captures_less_than_it_did_is_left() -> None:
    """Captured energy is 1 for gradients inside; 0.5 of it for the turned one, which the next gradient answers."""
    made = planted(12, 20, [1.0, 1.0])
    turned = made.matrix + planted(12, 20, [1.0, 1.0], seed=4).matrix
    W = zeros(12, 20)
    optimizer = GaLoreAdamW([W], rank=2, refresh_every=None, refresh_below=0.8)
    for number in range(1, 4):
        step(optimizer, W, made.matrix * number)
    assert optimizer.state[W]["refreshes"] == 1
    assert optimizer.state[W]["captured"] == pytest.approx(1.0)
    step(optimizer, W, turned)
    assert optimizer.state[W]["refreshes"] == 1
    step(optimizer, W, turned)
    assert optimizer.state[W]["refreshes"] == 2
    assert optimizer.state[W]["captured"] == pytest.approx(
        float(torch.linalg.svdvals(turned)[:2].square().sum() / turned.square().sum())
    )


def test_groups_have_subspaces_of_their_own() -> None:
    first, second, full = zeros(12, 20), zeros(12, 20), zeros(12, 20)
    optimizer = GaLoreAdamW(
        [
            {"params": [first], "rank": 3, "refresh_every": 1},
            {"params": [second], "rank": 5, "side": "right", "refresh_every": 7},
            {"params": [full]},
        ]
    )
    for number in range(3):
        for W in (first, second, full):
            W.grad = normal(12, 20, seed=number)
        optimizer.step()
    assert optimizer.state[first]["basis"].shape == (12, 3)
    assert optimizer.state[second]["basis"].shape == (20, 5)
    assert [optimizer.state[W].get("refreshes") for W in (first, second, full)] == [3, 1, None]
    assert optimizer.state[full]["momentum"].shape == (12, 20)


# -- moments at a refresh ----------------------------------------------------------------------------------------


def test_kept_moments_find_a_basis_that_lies_as_near_as_it_can_to_the_old_one() -> None:
    """P_newᵀP_old is symmetric with no negative eigenvalue, and the moments are what they were."""
    W = zeros(12, 20)
    optimizer = GaLoreAdamW([W], betas=(0.9, 0.99), rank=3, refresh_every=1)
    step(optimizer, W, normal(12, 20, seed=1))
    old = {name: optimizer.state[W][name].clone() for name in ("basis", "momentum")}
    G = normal(12, 20, seed=2)
    step(optimizer, W, G)
    P = optimizer.state[W]["basis"]
    overlap = P.mT @ old["basis"]
    assert torch.allclose(overlap, overlap.mT, atol=1e-13)
    assert torch.linalg.eigvalsh(overlap).min() > -1e-13
    assert torch.allclose(optimizer.state[W]["momentum"], 0.9 * old["momentum"] + 0.1 * P.mT @ G, atol=1e-14)
    exact = torch.linalg.svd(G).U[:, :3]
    assert projector(P).trace() == pytest.approx(3.0)
    assert float((P.mT @ G).norm() / (exact.mT @ G).norm()) > 0.97, "still the subspace of the new gradient"


def test_kept_moments_survive_signs_and_orders_of_singular_vectors() -> None:
    """The same subspace again, its leading directions swapped: nothing may happen. Unaligned, moments would go to others."""
    U, V = frame(12, 2, 0), frame(20, 2, 1)
    first = U @ torch.diag(torch.tensor([2.0, 1.0], dtype=F64)) @ V.mT
    second = U @ torch.diag(torch.tensor([-1.0, 2.0], dtype=F64)) @ V.mT
    W = zeros(12, 20)
    optimizer = GaLoreAdamW([W], rank=2, refresh_every=1)
    step(optimizer, W, first)
    old = optimizer.state[W]["basis"].clone()
    step(optimizer, W, second)
    assert torch.allclose(optimizer.state[W]["basis"], old, atol=1e-7)


def test_reset_moments_start_again_with_their_bias_corrected() -> None:
    """The step after a refresh is a first step: |N| ≤ 1. With the old count it would be (1−β₁)/√(1−β₂) ≈ 3 times that."""
    W = zeros(12, 20)
    optimizer = GaLoreAdamW([W], lr=1.0, rank=3, refresh_every=50, moments="reset")
    for number in range(50):
        step(optimizer, W, normal(12, 20, seed=number))
    G = normal(12, 20, seed=100)
    change = step(optimizer, W, G)
    fresh = step(GaLoreAdamW([other := zeros(12, 20)], lr=1.0, rank=3), other, G)
    P = optimizer.state[W]["basis"]
    assert float((P.mT @ change).abs().max()) == pytest.approx(1.0, abs=1e-6)
    assert float(change.norm()) == pytest.approx(float(fresh.norm()), rel=1e-6)
    assert optimizer.state[W]["step"] == 51
    assert optimizer.state[W]["age"] == 1


# -- how moments rest --------------------------------------------------------------------------------------------


class TestMomentsInTheParametersDtype(GaLoreContract):
    settings: ClassVar = {"moments_in": "parameter"}

    def test_dtypes_are_kept(self) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            W = zeros(64, 96, dtype=dtype)
            optimizer = self.make_optimizer([W], rank=8)
            for number in range(5):
                step(optimizer, W, normal(64, 96, seed=number).to(dtype))
            resumed = self.make_optimizer([W], rank=8)
            resumed.load_state_dict(optimizer.state_dict())
            kept = [value for value in resumed.state[W].values() if isinstance(value, Tensor)]
            assert {value.dtype for value in kept} == {dtype}
            assert sum(value.numel() for value in kept) == (64 + 2 * 96) * 8


def nearest(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, SimpleNamespace]:
    """What bitsandbytes.functional.quantize_blockwise does: the nearest entry of the code, after dividing by a block's peak."""
    flat = values.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    peaks = blocks.abs().amax(1)
    relative = blocks / peaks.clamp(min=1e-38)[:, None]
    numbers = torch.bucketize(relative, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    return numbers.flatten()[: len(flat)].view(values.shape), SimpleNamespace(absmax=peaks)


def from_nearest(numbers: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    blocks = torch.arange(numbers.numel()) // blocksize
    return (code[numbers.flatten().long()] * absmax[blocks]).view(numbers.shape)


def log_code(signed: bool) -> Tensor:
    """256 numbers spaced like powers, zero among them: as bitsandbytes' dynamic map, in spirit."""
    steps = torch.logspace(-7, 0, 127 if signed else 255)
    return torch.cat([-steps.flip(0), torch.zeros(2), steps]) if signed else torch.cat([torch.zeros(1), steps])


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def eight_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "bitsandbytes":
        if importlib.util.find_spec("bitsandbytes") is None:
            pytest.skip("bitsandbytes is not installed")
        return
    package, functional = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.functional")
    functional.__dict__.update(
        create_dynamic_map=log_code, quantize_blockwise=nearest, dequantize_blockwise=from_nearest
    )
    package.__dict__["functional"] = functional
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    moment_storage._codebook.cache_clear()
    request.addfinalizer(moment_storage._codebook.cache_clear)


@pytest.mark.usefixtures("eight_bits")
@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_eight_bit_moments_take_a_quarter_of_the_memory_and_resume(moments: str) -> None:
    sides = [(zeros(96, 160, dtype=torch.float32), form) for form in ("8-bit", "8-bit", "wide")]
    settings: dict[str, Any] = {"lr": 0.01, "rank": 32, "refresh_every": 4, "moments": moments}
    optimizers = [GaLoreAdamW([W], moments_in=form, **settings) for W, form in sides]
    for number in range(10):
        G = (normal(96, 160, seed=1) + normal(96, 160, seed=number)).float()
        if number == 6:  # goes on from a copy of its state
            resumed = GaLoreAdamW([sides[1][0]], moments_in="8-bit", **settings)
            resumed.load_state_dict(optimizers[1].state_dict())
            optimizers[1] = resumed
        for optimizer, (W, _) in zip(optimizers, sides, strict=True):
            step(optimizer, W, G)
    (one, _), (other, _), (wide, _) = sides
    assert torch.equal(one, other)
    assert float((one - wide).detach().norm() / wide.detach().norm()) < 0.1, (
        "eight bits cost accuracy, not the direction"
    )
    state = optimizers[0].state[one]
    moments_kept = [value for name, value in state.items() if isinstance(value, Tensor) and name != "basis"]
    assert sum(value.numel() * value.element_size() for value in moments_kept) == 2 * 32 * 160 * (1 + 4 / 256)
    assert {value.dtype for value in moments_kept} == {torch.uint8, torch.float32}


def test_eight_bits_without_bitsandbytes_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"rankwise\[bitsandbytes\]"):
        GaLoreAdamW([zeros(4, 4)], rank=2, moments_in="8-bit")


# -- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh_every": None}, "one of refresh_every and refresh_below"),
        ({"refresh_every": 0}, "counts updates from 1"),
        ({"refresh_every": 1.5}, "counts updates from 1"),
        ({"refresh_every": float("nan")}, "counts updates from 1"),
        ({"refresh_below": 1.0}, "is a share"),
        ({"basis": "qr"}, '"iteration" or "svd"'),
        ({"moments": "forget"}, "keep, rotate, reset"),
        ({"side": "top"}, "smaller, larger, left, right"),
        ({"oversample": -1}, "oversample"),
        ({"iterations": 0}, "at least 1"),
        ({"scale": -1.0}, "scale cannot be negative"),
        ({"moments_in": "4-bit"}, "wide, parameter, 8-bit"),
        ({"update_proj_gap": 3}, "no setting update_proj_gap"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GaLoreAdamW([zeros(4, 4)], rank=2, **settings)
