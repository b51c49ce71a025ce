"""The paper's block for square factors, written down for a tall layer, misses the gradient; ours holds it."""

import torch

from rankwise.factorizations import (
    CompressedDeepLinear,
    DeepLinear,
    SquaredLoss,
    fit_factorization,
    identity_factors,
    invariant_subspaces,
)
from rankwise.spectral import orthonormal_basis, truncated_svd
from tests.spectral.planted import planted

F64 = torch.float64
ROWS, COLUMNS, RANK, DEPTH, SCALE = 40, 12, 2, 3, 0.1


def naive_block(target: torch.Tensor) -> CompressedDeepLinear:
    """V₁ = orth[V_k, PᵀU_k], U₁ = P V₁ with P the product of semi-orthogonal factors of these sizes."""
    sizes = [COLUMNS, ROWS, ROWS, ROWS]
    deep = DeepLinear.orthogonal(sizes, init_scale=1.0, generator=torch.Generator().manual_seed(0), dtype=F64)
    P = deep.product().detach()
    svd = truncated_svd(-target, RANK)
    right = orthonormal_basis(torch.cat([svd.Vh.mT, P.mT @ svd.U], dim=1))
    return CompressedDeepLinear(P @ right, right, identity_factors(DEPTH, 2 * RANK, SCALE, dtype=F64))


def test_the_naive_block_of_a_tall_layer_misses_the_target_and_ours_reaches_it() -> None:
    target = planted(ROWS, COLUMNS, [1.0, 0.7]).matrix
    naive = naive_block(target)
    frames = invariant_subspaces(-target, RANK, generator=torch.Generator().manual_seed(1))
    ours = CompressedDeepLinear.from_subspaces(frames, DEPTH, SCALE)

    left = naive.left.detach()
    out_of_reach = 0.5 * float((target - left @ (left.mT @ target)).square().sum())
    # P's range has 12 of the 40 dimensions, so that most of U_k lies outside of it
    assert out_of_reach > 0.3 * 0.5 * float(target.square().sum())
    stuck = fit_factorization(naive, SquaredLoss(target), steps=3000)
    assert stuck.losses[-1] >= out_of_reach * (1 - 1e-9)
    assert fit_factorization(ours, SquaredLoss(target), tol=1e-5, steps=5000).converged
