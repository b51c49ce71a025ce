"""The compressed factorization replaces the wide one exactly (ICML 2024, Theorem 2.1 and Proposition 2.2)."""

import pytest
import torch
from torch import Tensor

from rankwise.factorizations import (
    CompressedDeepLinear,
    DeepLinear,
    compressed_frames,
    identity_factors,
    invariant_subspaces,
)
from rankwise.spectral import truncated_svd
from tests.properties.plain_descent import descend, gradients, product
from tests.spectral.planted import planted

F64 = torch.float64


def inner_trajectory(f: CompressedDeepLinear, target: Tensor, lr: float, steps: int) -> list[Tensor]:
    """End-to-end products of GD on the inner factors, frames fixed, loss ½‖f − Φ‖²."""
    U, V, inner = f.left.detach(), f.right.detach(), list(f.inner.detach().unbind(0))
    products = []
    for _ in range(steps):
        products.append(U @ product(inner) @ V.mT)
        inner = descend(inner, U.mT @ (products[-1] - target) @ V, lr, 0.0)
    return products


def trained(f: CompressedDeepLinear, target: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (f.product() - target).square().sum()).backward()
        optimizer.step()
    return f.product().detach()


def test_the_closed_form_gradients_are_those_of_autograd(generator):
    weights = [torch.randn(a, b, dtype=F64, generator=generator) for a, b in ((3, 2), (4, 3), (5, 4), (2, 5))]
    for weight in weights:
        weight.requires_grad_()
    target = torch.ones(2, 2, dtype=F64)
    f = product(weights)
    expected = torch.autograd.grad(0.5 * (f - target).square().sum(), weights)
    for got, want in zip(gradients(weights, f - target), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_factor_free_frames_reproduce_the_explicit_construction(depth):
    """Given P = Q_L ⋯ Q_1, Z = PᵀU_k and Y = P·orth((I − ZZᵀ)V_k) lead to the same products at every step."""
    d, k, scale = 30, 3, 0.3
    target = planted(d, d, [1.0, 0.8, 0.6]).matrix
    deep = DeepLinear.orthogonal(d, depth, scale, generator=torch.Generator().manual_seed(1), dtype=F64)
    explicit = CompressedDeepLinear.from_full_width(deep, -target, k)

    svd = truncated_svd(-target, k)
    U, V, P = svd.U, svd.Vh.mT, deep.product().detach() / scale**depth
    Z = P.mT @ U
    Q, R = torch.linalg.qr(V - Z @ (Z.mT @ V))
    Y = P @ (Q * R.diagonal().sign())  # the signs that compressed_frames fixes: column j of Y meets column j of Q
    left, right = compressed_frames(U, V, Z, Y)
    factor_free = CompressedDeepLinear(left, right, identity_factors(depth, 2 * k, scale, dtype=F64))

    first = inner_trajectory(explicit, target, 0.3, 150)
    second = inner_trajectory(factor_free, target, 0.3, 150)
    # rounding of the frames, 1e-15, times what escaping the saddle multiplies it by
    assert max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) < 1e-10
    # not vacuous: descent has reached the target, which the two starts were far from
    assert float((first[0] - target).norm() / target.norm()) > 0.9
    assert float((first[-1] - target).norm() / target.norm()) < 0.1


@pytest.mark.parametrize("decay", [0.0, 5e-3])
@pytest.mark.parametrize("scales", [(0.2, 0.3), (0.3, 0.4, 0.5), (0.4, 0.5, 0.6, 0.5)], ids=["L=2", "L=3", "L=4"])
def test_the_error_of_compression_is_d_minus_2r_times_the_product_of_rho_squared(scales, decay):
    """Proposition 2.2 as an equality at every iterate, with ρ from Theorem 2.1's recursion.

    The tolerance is 1e-9 of the squared error: the difference of two products of size 1 is about 0.1 to 0.5 here, so
    float64 holds its square to about 1e-13 and descent multiplies that by less than 1e3.
    """
    d, r, lr, steps = 200, 5, 0.4, 40
    epsilon = torch.tensor(scales, dtype=F64)
    others = epsilon.prod() / epsilon
    assert decay < 0.1 * float(others.min())
    assert lr * (decay + float(others.square().max())) <= 2

    target = planted(d, d, torch.linspace(1, 0.6, r, dtype=F64)).matrix
    deep = DeepLinear.orthogonal(d, len(scales), scales, generator=torch.Generator().manual_seed(0), dtype=F64)
    compressed = CompressedDeepLinear.from_full_width(deep, -target, r)
    U, V = compressed.left.detach(), compressed.right.detach()
    wide, narrow, rho = [w.detach() for w in deep.weights], list(compressed.inner.detach().unbind(0)), epsilon
    bound = (d - 2 * r) * float(epsilon.square().prod())
    start = product(wide)
    for t in range(steps + 1):
        f, f_C = product(wide), U @ product(narrow) @ V.mT
        error = float((f - f_C).square().sum())
        assert error == pytest.approx((d - 2 * r) * float(rho.square().prod()), rel=1e-9, abs=0)
        assert error <= bound * (1 + 1e-9)
        if t == 0:
            assert error == pytest.approx(bound, rel=1e-9, abs=0)
        wide = descend(wide, f - target, lr, decay)
        narrow = descend(narrow, U.mT @ (f_C - target) @ V, lr, decay)
        rho = rho * (1 - lr * decay - lr * (rho.prod() / rho).square())

    assert error < 0.9 * bound
    assert float((V.mT @ (f - start).mT @ U).norm()) > 0.7 * float(target.norm())
    inside = U.mT @ (f - target) @ V
    assert float(inside.norm()) < 0.3 * float(target.norm())


def test_directions_outside_the_block_never_turn():
    """Theorem 2.1: outside the block, every factor stays ρ_l Q_l of its start."""
    d, r, lr, scales = 40, 2, 0.3, (0.4, 0.6, 0.5)
    target = planted(d, d, [1.0, 0.7]).matrix
    deep = DeepLinear.orthogonal(d, 3, scales, generator=torch.Generator().manual_seed(0), dtype=F64)
    V = CompressedDeepLinear.from_full_width(deep, -target, r).right.detach()
    start = wide = [w.detach() for w in deep.weights]
    rho = torch.tensor(scales, dtype=F64)
    outside = torch.eye(d, dtype=F64) - V @ V.mT
    for _ in range(100):
        wide = descend(wide, product(wide) - target, lr, 0.0)
        rho = rho * (1 - lr * (rho.prod() / rho).square())
    entering = outside
    for weight, first, scale, now in zip(wide, start, scales, rho, strict=True):
        assert torch.allclose(weight @ entering, first @ entering * (now / scale), rtol=0, atol=1e-12)
        entering = first @ entering / scale
    assert float((wide[0] - start[0]).norm()) > 0.5


def rotated_pair(train_outer: bool) -> tuple[CompressedDeepLinear, CompressedDeepLinear, Tensor]:
    """The same compressed start in two bases of its block."""
    target = planted(12, 9, [1.0, 0.8]).matrix
    frames = invariant_subspaces(-target, 2, generator=torch.Generator().manual_seed(0))
    R = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(1))).Q
    inner = identity_factors(3, 4, 0.4, dtype=F64)
    plain = CompressedDeepLinear(frames.left, frames.right, inner, train_outer=train_outer)
    rotated = CompressedDeepLinear(frames.left @ R, frames.right @ R, inner, train_outer=train_outer)
    return plain, rotated, target


def trainable(f: CompressedDeepLinear) -> list[torch.nn.Parameter]:
    return [p for p in f.parameters() if p.requires_grad]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("train_outer", [False, True])
def test_the_basis_of_the_block_is_free_under_gradient_descent(train_outer, momentum):
    plain, rotated, target = rotated_pair(train_outer)
    start = plain.product().detach()
    first, second = (
        trained(f, target, torch.optim.SGD(trainable(f), lr=0.1, momentum=momentum), 150) for f in (plain, rotated)
    )
    assert torch.allclose(first, second, rtol=0, atol=1e-10)
    assert float((first - start).norm()) > 0.5 * float(target.norm())


def test_the_basis_of_the_block_is_not_free_under_elementwise_adam():
    """The control: a test of the basis that Adam passed as well would see nothing."""
    plain, rotated, target = rotated_pair(False)
    first, second = (trained(f, target, torch.optim.Adam(trainable(f), lr=0.03), 10) for f in (plain, rotated))
    assert float((first - second).norm()) > 1e-3
