"""Matrices kept as products, and the small subspaces their training stays in."""

from rankwise.factorizations.compressed import CompressedDeepLinear, compose, identity_factors
from rankwise.factorizations.compressed_network import (
    CompressedNetwork,
    NetworkInFrames,
    TrajectoryGap,
    trajectory_gap,
)
from rankwise.factorizations.deep_linear import DeepLinear
from rankwise.factorizations.descent import DescentStep, DivergedError, FitResult, fit_factorization
from rankwise.factorizations.dynamics import (
    rho_bounds,
    rho_trajectory,
    trajectory_error,
    trajectory_error_bound,
)
from rankwise.factorizations.invariant_blocks import (
    InvariantBases,
    InvariantBlocks,
    invariant_bases,
    invariant_blocks,
)
from rankwise.factorizations.invariant_subspaces import (
    InvariantSubspaces,
    compressed_frames,
    invariant_subspaces,
)
from rankwise.factorizations.loss import AutogradLoss, Loss
from rankwise.factorizations.nonlinear import DeepNetwork, gradient_spectrum, network_gradients
from rankwise.factorizations.products import factor_gradients, prefix_products
from rankwise.factorizations.squared_losses import MaskedSquaredLoss, RegressionLoss, SquaredLoss, whitened
from rankwise.factorizations.stable_step import stable_learning_rate
from rankwise.factorizations.wide_target import compress_wide_target

__all__ = [
    "AutogradLoss",
    "CompressedDeepLinear",
    "CompressedNetwork",
    "DeepLinear",
    "DeepNetwork",
    "DescentStep",
    "DivergedError",
    "FitResult",
    "InvariantBases",
    "InvariantBlocks",
    "InvariantSubspaces",
    "Loss",
    "MaskedSquaredLoss",
    "NetworkInFrames",
    "RegressionLoss",
    "SquaredLoss",
    "TrajectoryGap",
    "compose",
    "compress_wide_target",
    "compressed_frames",
    "factor_gradients",
    "fit_factorization",
    "gradient_spectrum",
    "identity_factors",
    "invariant_bases",
    "invariant_blocks",
    "invariant_subspaces",
    "network_gradients",
    "prefix_products",
    "rho_bounds",
    "rho_trajectory",
    "stable_learning_rate",
    "trajectory_error",
    "trajectory_error_bound",
    "trajectory_gap",
    "whitened",
]
