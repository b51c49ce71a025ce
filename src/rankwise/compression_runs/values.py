"""Scores as they are written down and shown: a perplexity may be infinite."""

import math


def finite(value: float | None) -> float | None:
    """JSON has no number that is infinite."""
    return value if value is not None and math.isfinite(value) else None


def shown(value: float | None) -> str:
    return "not finite" if value is None or finite(value) is None else f"{value:.4f}"
