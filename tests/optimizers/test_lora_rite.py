"""LoraRite: torch's citizen by the contract, its formula by another basis, its invariance by splitting the product anew."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rankwise.optimizers.factor_pairs import lora_pairs
from rankwise.optimizers.lora_rite import LoraRite, lorarite_param_groups
from rankwise.optimizers.rite_moments import factor_basis, inverse_root
from rankwise.testing.optimizer_contract import OptimizerContract
from tests.tiny_models import Mlp, tiny_bert, token_batch

F64 = torch.float64


class TestContractOfPairs(OptimizerContract):
    shapes = ((4, 6), (5, 4), (2, 3, 3, 3), (7, 2, 1, 1))

    def make_optimizer(self, params: Any, **changes: Any) -> LoraRite:
        settings = {"lr": 0.05, "weight_decay": 0.01, **changes}
        params = list(params)
        if len(params) % 2:  # one alone has no partner
            return outside_pairs(params, **settings)
        return LoraRite([{"pairs": list(zip(params[::2], params[1::2], strict=True))}], **settings)

    def test_it_descends(self) -> None:
        """As the contract's, on a loss of the products: a gradient that is none of B·A has no unmagnified one."""
        parameters = self.parameters()
        pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
        optimizer = self.make_optimizer(parameters)

        def loss() -> Tensor:
            return torch.stack([(B.flatten(1) @ A.flatten(1)).square().sum() for A, B in pairs]).sum()

        start = float(loss().detach())
        for _ in range(300):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert float(loss().detach()) < 0.5 * start


class TestContractOutsidePairs(OptimizerContract):
    def make_optimizer(self, params: Any, **changes: Any) -> LoraRite:
        return outside_pairs(params, **{"lr": 0.05, "weight_decay": 0.01, **changes})


def outside_pairs(params: Any, **settings: Any) -> LoraRite:
    """Over these alone; the pair without which there is no LoraRite is taken away again."""
    optimizer = LoraRite([{"params": list(params)}, pair((1, 1), (1, 1))], **settings)
    del optimizer.param_groups[1]
    return optimizer


def pair(*shapes: Iterable[int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"pairs": [tuple(nn.Parameter(torch.zeros(*s, dtype=dtype), requires_grad=False) for s in shapes)]}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def losses(m: int, n: int, seed: int = 50) -> Callable[[Tensor, int], Tensor]:
    """A loss of the product alone, another one at every step: no quadratic, so the gradient has full rank."""
    target = drawn(m, n, seed=seed)

    def loss(product: Tensor, number: int) -> Tensor:
        noisy = (target + drawn(m, n, seed=seed + 1 + number)).to(product.dtype)
        return (product - noisy).abs().pow(1.5).sum()

    return loss


def trajectory(
    optimizer_of: Callable[[nn.Parameter, nn.Parameter], torch.optim.Optimizer],
    A: Tensor,
    B: Tensor,
    loss: Callable[[Tensor, int], Tensor],
    steps: int,
) -> Tensor:
    """B·A after every step, (steps + 1, m, n)."""
    A, B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    optimizer = optimizer_of(A, B)
    found = [(B @ A).detach()]
    for number in range(steps):
        optimizer.zero_grad()
        loss(B @ A, number).backward()
        optimizer.step()
        found.append((B @ A).detach())
    return torch.stack(found)


def rite(**settings: Any) -> Callable[[nn.Parameter, nn.Parameter], LoraRite]:
    return lambda A, B: LoraRite([{"pairs": [(A, B)]}], **{"lr": 0.1, **settings})


# --- the property it is for


@pytest.mark.parametrize("start", ["both drawn", "B = 0", "B of rank 1"])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "betas": (0.5, 0.9)}, {"maximize": True, "lr": 0.01}])
def test_the_product_moves_alike_however_it_is_split(start: str, settings: dict[str, Any]) -> None:
    m, n, r = 9, 7, 3
    A, B = drawn(r, n, seed=1), drawn(m, r, seed=2)
    if start == "B = 0":
        B = torch.zeros_like(B)
    if start == "B of rank 1":
        B = B[:, :1] @ drawn(1, r, seed=3)
    plain = trajectory(rite(**settings), A, B, losses(m, n), 40)
    moved = float((plain[-1] - plain[0]).abs().max())
    for seed in range(3):
        R = drawn(r, r, seed=10 + seed)
        split = trajectory(rite(**settings), R @ A, B @ torch.linalg.inv(R), losses(m, n), 40)
        assert float((split - plain).abs().max()) < 1e-8
    assert moved > 0.1


def test_the_product_moves_alike_whatever_the_scale_of_the_factors() -> None:
    A, B = drawn(3, 7, seed=1), drawn(9, 3, seed=2)
    plain = trajectory(rite(), A, B, losses(9, 7), 40)
    for s in (1e-4, 1e4):
        assert float((trajectory(rite(), s * A, B / s, losses(9, 7), 40) - plain).abs().max()) < 1e-8


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_control_adam_and_sgd_move_differently(optimizer: type[torch.optim.Optimizer]) -> None:
    A, B, R = drawn(3, 7, seed=1), drawn(9, 3, seed=2), drawn(3, 3, seed=10)

    def make(A: nn.Parameter, B: nn.Parameter) -> torch.optim.Optimizer:
        return optimizer([A, B], lr=1e-3)  # type: ignore[call-arg]

    plain = trajectory(make, A, B, losses(9, 7), 40)
    split = trajectory(make, R @ A, B @ torch.linalg.inv(R), losses(9, 7), 40)
    assert float((split - plain).abs().max()) > 1e-2


# --- its formula, by the polar basis and dense inverses


def polar(F: Tensor) -> tuple[Tensor, Tensor]:
    """U and R with F = U·R and R = (FᵀF)^½ symmetric."""
    values, E = torch.linalg.eigh(F.mT @ F)
    R = E @ torch.diag(values.sqrt()) @ E.mT
    return F @ torch.linalg.inv(R), R


class ByHand:
    """The docstring's update written out for one factor; V and ρ are summed up anew from all gradients at every step."""

    def __init__(self, betas: tuple[float, float], eps: float):
        self.betas, self.eps = betas, eps
        self.M: Any = 0.0
        self.V: Any = 0.0
        self.rho, self.t, self.U = 0.0, 0, None

    def direction(self, gradient: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        U, R = polar(other)
        G = gradient @ torch.linalg.inv(R)
        P = torch.eye(len(R), dtype=F64) if self.U is None else U.mT @ self.U
        if self.U is not None:
            turned = P @ self.V @ P.mT
            gaps = torch.linalg.eigvals(self.V).real.sort().values - torch.linalg.eigvals(turned).real.sort().values
            self.rho = self.betas[1] * (self.rho + float(gaps.abs().max()))
            self.V, self.M = turned, self.M @ P.mT
        self.U, self.t = U, self.t + 1
        self.V = self.betas[1] * self.V + (1 - self.betas[1]) * G.mT @ G
        whole = (self.V + self.rho * torch.eye(len(R), dtype=F64)) / (1 - self.betas[1] ** self.t)
        E, S, _ = torch.linalg.svd(whole)
        self.M = self.betas[0] * self.M + (1 - self.betas[0]) * G @ E @ torch.diag(1 / (S.sqrt() + self.eps)) @ E.mT
        return self.M / (1 - self.betas[0] ** self.t), U


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)])
def test_steps_are_those_of_the_formula(betas: tuple[float, float]) -> None:
    A, B, loss = drawn(3, 7, seed=1), drawn(9, 3, seed=2), losses(9, 7)
    lr, decay, eps = 0.1, 0.2, 1e-3
    found = trajectory(rite(lr=lr, betas=betas, eps=eps, weight_decay=decay), A, B, loss, 8)
    of_A, of_B = ByHand(betas, eps), ByHand(betas, eps)
    for number in range(8):
        A.requires_grad_(True)
        B.requires_grad_(True)
        g_A, g_B = torch.autograd.grad(loss(B @ A, number), (A, B))
        A, B = A.detach(), B.detach()
        M_B, _ = of_B.direction(g_B, A.mT)
        M_A, U_B = of_A.direction(g_A.mT, B)
        B = (1 - lr * decay) * B - lr * M_B @ torch.linalg.inv(polar(A.mT)[1])
        U, R = polar(B)
        A = (1 - lr * decay) * A - lr * (M_A @ U_B.mT @ U @ torch.linalg.inv(R)).mT
        assert float((B @ A - found[number + 1]).abs().max()) < 1e-10


def test_what_v_loses_when_the_basis_turns_is_kept_in_rho() -> None:
    """From span(e₁) to span(e₂) nothing of V is left, and ρ has all of it; with the basis as it was nothing is lost."""
    gradient = torch.tensor([[1.0], [2.0]], dtype=F64)
    for angle, expected in ((0.0, 0.0), (90.0, 1.0), (60.0, 0.75)):
        A = nn.Parameter(torch.ones(1, 2, dtype=F64))
        B = nn.Parameter(torch.tensor([[1.0], [0.0]], dtype=F64))
        optimizer = LoraRite([{"pairs": [(A, B)]}], lr=0.0, betas=(0.9, 0.5))
        A.grad = gradient.mT.clone()
        optimizer.step()
        V = float(optimizer.state[A]["second_moment"])
        assert pytest.approx(0.5 * 5) == V
        radians = torch.deg2rad(torch.tensor(angle, dtype=F64))
        B.data = torch.stack([radians.cos(), radians.sin()])[:, None]
        A.grad = torch.zeros_like(A)
        optimizer.step()
        assert float(optimizer.state[A]["escaped"]) == pytest.approx(0.5 * expected * V, abs=1e-12)
        assert float(optimizer.state[A]["second_moment"]) == pytest.approx(0.5 * (1 - expected) * V, abs=1e-12)


# --- where factors or moments are singular


def test_from_b_zero_the_first_step_moves_b_alone_and_the_second_both() -> None:
    A, B = nn.Parameter(drawn(3, 7, seed=1)), nn.Parameter(torch.zeros(9, 3, dtype=F64))
    optimizer, loss = LoraRite([{"pairs": [(A, B)]}], lr=0.1), losses(9, 7)
    moved = []
    for number in range(2):
        before = A.detach().clone(), B.detach().clone()
        optimizer.zero_grad()
        loss(B @ A, number).backward()
        optimizer.step()
        moved.append([not torch.equal(p, old) for p, old in zip((A, B), before, strict=True)])
    assert moved == [[False, True], [True, True]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_step_moves_the_product_far_where_it_has_small_directions(dtype: torch.dtype, rank: int) -> None:
    """Of a target of less rank than the pair, B·A has directions of nothing but rounding, and A grows along them.

    Stepping both factors at once moves B·A by up to 5.8e5·η here; one after the other each by η·‖M̂‖, where ‖M̂‖ is about 1.
    """
    target = (drawn(30, rank, seed=1) @ drawn(rank, 40, seed=2)).to(dtype)
    A = (drawn(4, 40, seed=3) / 40**0.5).to(dtype)
    eta = 0.5
    found = trajectory(rite(lr=eta), A, torch.zeros(30, 4, dtype=dtype), lambda X, _: (X - target).square().sum(), 60)
    steps = torch.linalg.matrix_norm(found[1:] - found[:-1], 2)
    assert float(steps.max()) < 3 * eta
    assert float((found[-1] - target).norm() / target.norm()) < 0.15


def test_directions_that_a_factor_lacks_are_left_out_of_its_basis() -> None:
    F = drawn(8, 2, seed=1) @ drawn(2, 4, seed=2)
    basis = factor_basis(F)
    assert torch.linalg.matrix_rank(basis.U) == 2
    assert torch.allclose(basis.U @ basis.U.mT @ F, F, atol=1e-12)
    assert torch.allclose(F @ basis.R_inverse, basis.U, atol=1e-12)
    zero = factor_basis(torch.zeros(8, 4, dtype=F64))
    assert not zero.U.any()
    assert not zero.R_inverse.any()


def test_eigenvalues_that_rounding_made_negative_are_clamped() -> None:
    V = torch.diag(torch.tensor([4.0, 1e-20, -1e-17], dtype=F64))
    root = inverse_root(V, torch.zeros((), dtype=F64), 1.0, eps=0.0)
    assert torch.isfinite(root).all()
    assert float(root[0, 0]) == pytest.approx(0.5)
    assert float(root[2, 2]) == pytest.approx((3 * torch.finfo(F64).eps * 4) ** -0.5)
    assert not inverse_root(torch.zeros(3, 3, dtype=F64), torch.zeros((), dtype=F64), 1.0, eps=0.0).any()


# --- what it is used on


def test_bfloat16_factors_are_stepped_in_float32() -> None:
    """Against the same step in float32, rounded once: QR in eight bits would be off by per cents."""
    A, B = drawn(4, 24, seed=1).bfloat16(), drawn(16, 4, seed=2).bfloat16()
    g_A, g_B = drawn(4, 24, seed=3).bfloat16(), drawn(16, 4, seed=4).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        pair = nn.Parameter(A.to(dtype, copy=True)), nn.Parameter(B.to(dtype, copy=True))
        optimizer = LoraRite([{"pairs": [pair]}], lr=0.1)
        for factor, gradient in zip(pair, (g_A, g_B), strict=True):
            factor.grad = gradient.to(dtype)
        optimizer.step()
        tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        assert {v.dtype for v in tensors} == {torch.float32}
        results.append((pair, optimizer))
    (narrow, optimizer), (wide, _) = results
    assert torch.equal(narrow[1], wide[1].bfloat16())
    # A is stepped by what B was rounded to, so half a unit in the last place of B may show
    assert torch.allclose(narrow[0].float(), wide[0], atol=0.02, rtol=0.01)
    fresh = LoraRite([{"pairs": [narrow]}])
    fresh.load_state_dict(optimizer.state_dict())
    assert all(v.dtype == torch.float32 for s in fresh.state.values() for v in s.values() if isinstance(v, Tensor))


def test_a_convolutions_factors_are_stepped_as_their_matrices() -> None:
    kernels = nn.Parameter(drawn(2, 3, 3, 3, seed=1)), nn.Parameter(drawn(8, 2, 1, 1, seed=2))
    matrices = tuple(nn.Parameter(p.detach().flatten(1).clone()) for p in kernels)
    for pair in (kernels, matrices):
        optimizer = LoraRite([{"pairs": [pair]}], lr=0.1)
        for number in range(3):
            for place, factor in enumerate(pair):
                factor.grad = drawn(*factor.flatten(1).shape, seed=10 * number + place).view(factor.shape)
            optimizer.step()
    for kernel, matrix in zip(kernels, matrices, strict=True):
        assert torch.equal(kernel.detach().flatten(1), matrix.detach())


@pytest.mark.parametrize("shape", [(2, 9), (9, 2)])
def test_a_rank_above_the_layers_size_is_stepped_too(shape: tuple[int, int]) -> None:
    m, n = shape
    target = drawn(m, n, seed=3)
    found = trajectory(
        rite(lr=0.1), drawn(4, n, seed=1), drawn(m, 4, seed=2), lambda X, _: (X - target).square().sum(), 100
    )
    assert float((found[-1] - target).norm()) < 0.2 * float((found[0] - target).norm())


def test_a_frozen_factor_stays_and_the_other_learns() -> None:
    A, B = nn.Parameter(drawn(3, 7, seed=1), requires_grad=False), nn.Parameter(drawn(9, 3, seed=2))
    optimizer = LoraRite([{"pairs": [(A, B)]}], lr=0.1)
    start = A.clone(), B.detach().clone()
    losses(9, 7)(B @ A, 0).backward()
    optimizer.step()
    assert torch.equal(A, start[0])
    assert not torch.equal(B, start[1])


def test_outside_pairs_it_is_adamw() -> None:
    ours, theirs = (nn.Parameter(drawn(5, 3, seed=1)) for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2}
    mine, other = outside_pairs([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for number in range(5):
        ours.grad = theirs.grad = drawn(5, 3, seed=number)
        mine.step()
        other.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)


def test_a_models_groups_hold_its_pairs_and_its_head() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier"])
    model = get_peft_model(tiny_bert(), config)
    optimizer = LoraRite(lorarite_param_groups(model, lr=0.02, head_lr=1e-3), weight_decay=0.1)
    pairs = lora_pairs(model)
    first, head, vectors = optimizer.param_groups
    assert [id(p) for p in first["params"]] == [id(f) for pair in pairs for f in (pair.A, pair.B)]
    assert [(g["name"], g["paired"], g["lr"], g["weight_decay"]) for g in (first, head, vectors)] == [
        ("pairs", True, 0.02, 0.1), ("head", False, 1e-3, 0.1), ("vectors", False, 1e-3, 0.0),
    ]  # fmt: skip
    assert {tuple(p.shape) for p in (*head["params"], *vectors["params"])} == {(2, 32), (2,)}
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        model(**token_batch()).loss.backward()
        optimizer.step()
    for p, before in zip(model.parameters(), start, strict=True):
        assert torch.equal(p, before) != p.requires_grad


def test_pairs_of_a_model_are_enough() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    (group,) = LoraRite(lora_pairs(model)).param_groups
    assert group["paired"]
    assert len(group["params"]) == 4


# --- what is refused


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        ([pair((9, 3), (3, 7))], {}, r"A \(r, d_in\) and B \(d_out, r\), in this order; got A \(9, 3\) and B \(3, 7\)"),
        ([pair((3,), (7, 3))], {}, "a pair is A"),
        ([pair((0, 7), (9, 0))], {}, "a pair is A"),
        ([pair((3, 7), (9, 3), (3, 3))], {}, r"a LoraPair or a tuple \(A, B\) of two tensors, got a tuple of 3"),
        ([{"pairs": [5]}], {}, "of two tensors, got int"),
        ([{"pairs": [None]}], {}, "of two tensors, got NoneType"),
        ([{"pairs": None}], {}, r'"pairs" is a list of \(A, B\), got NoneType'),
        ([pair((3, 7), (9, 3), dtype=torch.complex64)], {}, "is torch.complex64; only floating-point"),
        ([pair((3, 7), (9, 3), dtype=torch.int64)], {}, "is torch.int64; only floating-point"),
        ([{"pairs": 2 * pair((3, 7), (9, 3))["pairs"]}], {}, "a pair twice"),
        ([{**pair((3, 7), (9, 3)), "params": [nn.Parameter(torch.zeros(2))]}], {}, "not both"),
        ([{"pairs": []}], {}, "no group has pairs"),
        ([nn.Parameter(torch.zeros(2, 2))], {}, "no group has pairs"),
        ([{"params": [nn.Parameter(torch.zeros(2, 2))], "paired": True}], {}, 'leave "paired" out'),
        ([{**pair((3, 7), (9, 3)), "lr": -1.0}], {}, "lr cannot be negative"),
        ([{**pair((3, 7), (9, 3)), "betas": (2, 2)}], {}, r"\[0, 1\)"),
        ([pair((3, 7), (9, 3))], {"weight_decay": torch.nan}, "weight_decay cannot be negative"),
        ([pair((3, 7), (9, 3))], {"eps": torch.inf}, "eps cannot be negative"),
        ([pair((3, 7), (9, 3))], {"betas": (0.9, 0.9, 0.9)}, "a pair of numbers"),
        ([pair((3, 7), (9, 3))], {"lr": -0.1}, "maximize=True"),
        ([pair((3, 7), (9, 3))], {"weight_decay": -0.1}, "cannot be negative"),
        ([pair((3, 7), (9, 3))], {"eps": -0.1}, "cannot be negative"),
        ([pair((3, 7), (9, 3))], {"betas": (0.9, 1.0)}, r"\[0, 1\)"),
    ],
)
def test_what_is_no_pair_and_settings_out_of_range_are_refused(params: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraRite(params, **settings)


def two_pairs_and_a_head(dtype: torch.dtype) -> tuple[list[nn.Parameter], LoraRite]:
    """A, B, A, B and a head, with gradients."""
    shapes = ((3, 7), (9, 3), (2, 5), (4, 2), (3, 3))
    parameters = [nn.Parameter(drawn(*shape, seed=place).to(dtype)) for place, shape in enumerate(shapes)]
    A, B, C, D, head = parameters
    optimizer = LoraRite([{"pairs": [(A, B), (C, D)]}, {"params": [head]}])
    for place, parameter in enumerate(parameters):
        parameter.grad = drawn(*parameter.shape, seed=10 + place).to(dtype)
    return parameters, optimizer


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf, 1e20, 1e30])
@pytest.mark.parametrize("at", range(5))
def test_what_is_not_finite_or_overflows_leaves_its_pair_as_it_was(at: int, poison: float, after: int) -> None:
    """Factors and state, bit for bit, and the others go on."""
    parameters, optimizer = two_pairs_and_a_head(torch.float32)
    for _ in range(after):
        optimizer.step()
    before = copy.deepcopy([(p.detach(), optimizer.state[p]) for p in parameters])
    hit = [place for place in range(5) if place // 2 == at // 2]
    grads = [p.grad.clone() for p in parameters if p.grad is not None]
    grads[at].fill_(poison)
    for parameter, gradient in zip(parameters, grads, strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert [torch.equal(p, start) for p, (start, _) in zip(parameters, before, strict=True)] == [
        place in hit for place in range(5)
    ]
    assert optimizer.skipped_updates() == 1
    for place in hit:
        now = {name: value for name, value in optimizer.state[parameters[place]].items() if name != "skipped"}
        assert now.keys() == before[place][1].keys()
        for name, value in now.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[place][1][name])), name


def test_a_pair_whose_weights_are_not_finite_is_counted_and_the_others_go_on() -> None:
    parameters, optimizer = two_pairs_and_a_head(torch.float32)
    parameters[1].data[0, 0] = torch.nan
    start = [p.detach().clone() for p in parameters]
    optimizer.step()
    moved = [not torch.equal(p, before) for p, before in zip(parameters[2:], start[2:], strict=True)]
    assert all(moved)
    assert torch.equal(parameters[0], start[0])
    assert optimizer.skipped_updates() == 1


def test_a_sparse_gradient_is_refused_before_anything_moves() -> None:
    parameters, optimizer = two_pairs_and_a_head(torch.float32)
    start = [p.detach().clone() for p in parameters]
    parameters[3].grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert all(torch.equal(p, before) for p, before in zip(parameters, start, strict=True))


def of_other_shapes() -> dict[str, Any]:
    optimizer = LoraRite(
        [{"pairs": [(A := nn.Parameter(drawn(3, 8, seed=1)), B := nn.Parameter(drawn(9, 3, seed=2)))]}]
    )
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    optimizer.step()
    return optimizer.state_dict()


def of_adamw() -> dict[str, Any]:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(3, 7)), nn.Parameter(torch.zeros(9, 3))]).state_dict()


def without_a_basis() -> dict[str, Any]:
    state = of_other_shapes()
    del state["state"][0]["basis"]
    return state


def climbing_by_its_sign() -> dict[str, Any]:
    state = of_other_shapes()
    state["param_groups"][0]["lr"] = -1.0
    return state


def unpaired() -> dict[str, Any]:
    state = of_other_shapes()
    state["param_groups"][0]["paired"] = False
    return state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_adamw, "state of another optimizer than LoraRite"),
        (of_other_shapes, r"saved momentum .* is \(8, 3\) instead of \(7, 3\)"),
        (without_a_basis, "the saved"),
        (climbing_by_its_sign, "lr cannot be negative"),
        (unpaired, "have their pairs elsewhere"),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(make: Callable[[], Any], message: str) -> None:
    A, B = nn.Parameter(drawn(3, 7, seed=1)), nn.Parameter(drawn(9, 3, seed=2))
    optimizer = LoraRite([{"pairs": [(A, B)]}])
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    assert str(optimizer.state_dict()) == str(before)
    optimizer.step()


def test_experts_in_one_pair_are_refused() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0"]))
    pairs = lora_pairs(model)
    pairs[0].layer.num_experts = 4
    with pytest.raises(ValueError, match="4 experts in one pair"):
        LoraRite(pairs)


def test_a_head_needs_a_rate_of_its_own() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match="with head_lr"):
        lorarite_param_groups(model, lr=0.02)
    for rates in ({"lr": torch.nan}, {"lr": 0.02, "head_lr": torch.inf}):
        with pytest.raises(ValueError, match="lr cannot be negative and must be a finite number"):
            lorarite_param_groups(model, **rates)
