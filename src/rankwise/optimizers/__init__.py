"""Optimizers that know about low-rank structure."""

from rankwise.optimizers.equivariant_adam import EquivariantAdam

__all__ = ["EquivariantAdam"]
