"""Pure tensor maths: truncated SVD, ranks, subspaces, orthonormal frames."""

from rankwise.spectral.operators import MatrixOperator, OuterProduct, SparseRows
from rankwise.spectral.orthogonal import haar_frame
from rankwise.spectral.rank import (
    effective_rank,
    numerical_rank,
    numerical_rank_icml24,
    rank_for_energy,
    singular_values,
    stable_rank,
)
from rankwise.spectral.subspaces import (
    orthonormal_basis,
    principal_angles,
    smallest_angle_cosine,
    subspace_alignment,
)
from rankwise.spectral.svd import TruncatedSVD, truncated_svd

__all__ = [
    "MatrixOperator",
    "OuterProduct",
    "SparseRows",
    "TruncatedSVD",
    "effective_rank",
    "haar_frame",
    "numerical_rank",
    "numerical_rank_icml24",
    "orthonormal_basis",
    "principal_angles",
    "rank_for_energy",
    "singular_values",
    "smallest_angle_cosine",
    "stable_rank",
    "subspace_alignment",
    "truncated_svd",
]
