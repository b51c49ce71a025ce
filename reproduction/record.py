"""What a run leaves behind, and whether it is what was expected."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.protocol import machine

_PACKAGES = ("rankwise", "numpy", "scipy", "torch", "numba", "matplotlib")


def as_record(
    figure: str, settings: dict[str, Any], seed: int, quick: bool, measured: dict[str, Any]
) -> dict[str, Any]:
    """Results and curves of a run with everything needed to make them again."""
    return {
        "format_version": 1,
        "command": f"python -m reproduction {figure} --seed {seed}" + (" --quick" if quick else ""),
        "quick": quick,
        "seed": seed,
        "settings": settings,
        "versions": {**{name: _version(name) for name in _PACKAGES}, "python": platform.python_version()},
        "machine": machine(),
        **measured,
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(_rounded(record), indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def deviations(results: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One line for every check of expected.json that the results fail.

    A check names a ``key`` (dots lead into the results) and either ``value`` with ``relative_tolerance``, or
    ``at_least`` or ``at_most``.
    """
    found = []
    for check in expected["checks"]:
        value: Any = results
        for part in check["key"].split("."):
            value = value[part]
        if "value" in check:
            low, high = sorted(check["value"] * (1 + sign * check["relative_tolerance"]) for sign in (-1, 1))
        else:
            low, high = check.get("at_least", float("-inf")), check.get("at_most", float("inf"))
        if not low <= value <= high:
            found.append(f"{check['key']} is {value:g}, expected {low:g} to {high:g} ({check['source']})")
    return found


def _rounded(value: Any) -> Any:
    """Six digits are more than any picture shows."""
    if isinstance(value, dict):
        return {key: _rounded(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inside) for inside in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
