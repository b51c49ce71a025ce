"""Trained models made smaller: every layer's spectrum, a rank for each, and low-rank layers in the place of dense ones."""

from rankwise.compression.attention import factorize_key_value, factorize_query
from rankwise.compression.calibration import SecondMoments
from rankwise.compression.cost import estimate_cost
from rankwise.compression.factorize import Factorization, FactorizedLayer, factorize_model, freeze_full_rank
from rankwise.compression.low_rank_layers import LowRankConv2d, LowRankLinear
from rankwise.compression.quality import Agreement, agreement, perplexity
from rankwise.compression.rank_profile import LayerProfile, RankProfile, rank_profile
from rankwise.compression.rank_rules import Spectrum, highest_paying_rank, ranks_for_energy, uniform_ranks
from rankwise.compression.saving import load_factorized, save_factorized
from rankwise.compression.text import mean_features, token_windows
from rankwise.compression.welore import min_max_normalized, welore_ranks

__all__ = [
    "Agreement",
    "Factorization",
    "FactorizedLayer",
    "LayerProfile",
    "LowRankConv2d",
    "LowRankLinear",
    "RankProfile",
    "SecondMoments",
    "Spectrum",
    "agreement",
    "estimate_cost",
    "factorize_key_value",
    "factorize_model",
    "factorize_query",
    "freeze_full_rank",
    "highest_paying_rank",
    "load_factorized",
    "mean_features",
    "min_max_normalized",
    "perplexity",
    "rank_profile",
    "ranks_for_energy",
    "save_factorized",
    "token_windows",
    "uniform_ranks",
    "welore_ranks",
]
