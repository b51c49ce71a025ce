"""Matrices kept as products, and the small subspaces their training stays in."""

from rankwise.factorizations.compressed import CompressedDeepLinear, compose, identity_factors
from rankwise.factorizations.deep_linear import DeepLinear
from rankwise.factorizations.invariant_subspaces import (
    InvariantSubspaces,
    compressed_frames,
    invariant_subspaces,
)

__all__ = [
    "CompressedDeepLinear",
    "DeepLinear",
    "InvariantSubspaces",
    "compose",
    "compressed_frames",
    "identity_factors",
    "invariant_subspaces",
]
