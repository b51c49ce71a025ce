"""Subspaces and the angles between them."""

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.spectral.orthogonal import project_out
from rankwise.spectral.precision import compute_dtype, require_finite, require_matrix
from rankwise.spectral.rank import numerical_rank


def orthonormal_basis(matrix: Float[Tensor, "m k"]) -> Float[Tensor, "m r"]:
    """An orthonormal basis of the column space, r = numerical rank.

    Raises:
        ValueError: not a matrix, non-finite, or zero (the zero subspace has no basis).

    Example:
        >>> import torch
        >>> from rankwise.spectral import orthonormal_basis
        >>> orthonormal_basis(torch.ones(4, 3)).shape
        torch.Size([4, 1])
    """
    require_matrix(matrix)
    wide = matrix.to(compute_dtype(matrix.dtype))
    require_finite(wide)
    U, S, _ = torch.linalg.svd(wide, full_matrices=False)
    rank = numerical_rank(S, shape=(matrix.shape[0], matrix.shape[1]))
    if rank == 0:
        raise ValueError(f"a zero matrix of shape {tuple(matrix.shape)} spans no subspace")
    return U[:, :rank]


def principal_angles(first: Float[Tensor, "m j"], second: Float[Tensor, "m k"]) -> Float[Tensor, " p"]:
    """Principal angles between two column spaces in radians, smallest first; p = min of the two dimensions.

    Angles below 45° come from their sines, those above from their cosines (Björck & Golub 1973): arccos alone loses
    half the digits near 0 and cannot see an angle of 1e-9.

    Raises:
        ValueError: different numbers of rows, zero or non-finite input.

    Example:
        >>> import torch
        >>> from rankwise.spectral import principal_angles
        >>> x, y = torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]
        >>> [round(float(a), 4) for a in principal_angles(x, y)]
        [1.5708]
    """
    A, B = _two_bases(first, second)
    if A.shape[1] < B.shape[1]:
        A, B = B, A
    cosines = torch.linalg.svdvals(A.mT @ B).clamp(max=1.0)
    # the sines of the angles between B and its projection on A, smallest first
    sines = torch.linalg.svdvals(project_out(B, A)).flip(0).clamp(max=1.0)
    return torch.where(cosines.square() > 0.5, torch.arcsin(sines), torch.arccos(cosines))


def subspace_alignment(first: Float[Tensor, "m j"], second: Float[Tensor, "m k"]) -> float:
    """Mean squared cosine of the principal angles: 1 for equal (or nested) subspaces, 0 for orthogonal ones.

    Example:
        >>> import torch
        >>> from rankwise.spectral import subspace_alignment
        >>> round(subspace_alignment(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3]), 6)
        0.5
    """
    return float(torch.cos(principal_angles(first, second)).square().mean())


def smallest_angle_cosine(first: Float[Tensor, "m j"], second: Float[Tensor, "m k"]) -> float:
    """Cosine of the *smallest* principal angle: what the paper's Fig. 1 (middle) plots as alignment (ICML 2024).

    It is 1 as soon as the subspaces share a single direction; :func:`subspace_alignment` is the stricter measure.

    Example:
        >>> import torch
        >>> from rankwise.spectral import smallest_angle_cosine
        >>> round(smallest_angle_cosine(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3]), 6)
        1.0
    """
    return float(torch.cos(principal_angles(first, second)[0]))


def _two_bases(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    for name, matrix in (("first", first), ("second", second)):
        require_matrix(matrix, name)
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            "expected two sets of columns in one space, "
            f"got {first.shape[0]} and {second.shape[0]} rows (shapes {tuple(first.shape)} and {tuple(second.shape)})"
        )
    dtype = torch.promote_types(compute_dtype(first.dtype), compute_dtype(second.dtype))
    return orthonormal_basis(first).to(dtype), orthonormal_basis(second).to(dtype)
