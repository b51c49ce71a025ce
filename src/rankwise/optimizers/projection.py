"""From a gradient to its coordinates in a subspace, and from a direction there back to the parameter."""

import torch
from torch import Tensor

from rankwise.optimizers.matricize import Geometry


def project(A: Tensor, P: Tensor) -> Tensor:
    """R = PᵀA: (c, o) in the basis (c, r) is (r, o).

    Computed as (AᵀP)ᵀ: its long side comes first, which BLAS splits better over threads.
    """
    return (A.mT @ P).mT.contiguous()


def lift(N: Tensor, P: Tensor) -> Tensor:
    """P·N: coordinates (r, o) in the basis (c, r) are the matrix (c, o)."""
    return P @ N


def add_lifted(parameter: Tensor, N: Tensor, P: Tensor, geometry: Geometry, *, shrink: float, step: float) -> None:
    """W ← shrink·W − step·PN in place, the lifted matrix never written out.

    One product that accumulates into W, in N's dtype: a bfloat16 parameter is widened, updated and rounded once.

    Args:
        parameter: W, or the rows of it that this process holds.
        N: (r, o) direction; P: (c, r) basis, both oriented as ``geometry`` says.
        shrink, step: plain numbers, 1 − ηλ and ηs.
    """
    matrix = parameter.reshape(parameter.shape[0], geometry.columns).to(N.dtype)
    if geometry.side == "left":
        matrix.addmm_(P, N, beta=shrink, alpha=-step)
    else:
        matrix.addmm_(N.mT, P.mT, beta=shrink, alpha=-step)
    if matrix.data_ptr() != parameter.data_ptr():  # a narrower dtype, or a kernel in channels-last order
        parameter.copy_(matrix.view(parameter.shape))


def add_full(parameter: Tensor, N: Tensor, *, shrink: float, step: float) -> None:
    """W ← shrink·W − step·N in place, for what is not projected; the same rounding as :func:`add_lifted`."""
    wide = parameter.to(N.dtype)
    if shrink != 1:
        wide = wide.mul_(shrink) if wide.data_ptr() == parameter.data_ptr() else wide.mul(shrink)
    wide.sub_(N, alpha=step)
    if wide.data_ptr() != parameter.data_ptr():
        parameter.copy_(wide)


def rotation(new: Tensor, old: Tensor) -> Tensor:
    """C = P_newᵀP_old, (r_new, r_old): what carries coordinates in the old subspace into the new one."""
    return new.mT @ old


def aligned(new: Tensor, overlap: Tensor) -> Tensor:
    """The (r, r) orthogonal O that brings P_new·O nearest to P_old, from the overlap P_newᵀP_old: its polar factor."""
    U, _, Vh = torch.linalg.svd(overlap)
    return (U @ Vh).to(new.dtype)
