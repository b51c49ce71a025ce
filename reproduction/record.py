"""What a run leaves behind, and whether it is what was expected."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.protocol import machine

_PACKAGES = ("rankwise", "numpy", "scipy", "torch", "numba", "matplotlib")


def as_record(figure: str, scale: str, settings: dict[str, Any], seed: int, measured: dict[str, Any]) -> dict[str, Any]:
    """Results and curves of a run with everything needed to make them again."""
    return {
        "format_version": 2,
        "command": f"python -m reproduction {figure} --scale {scale} --seed {seed}",
        "scale": scale,
        "seed": seed,
        "settings": settings,
        "versions": {**{name: _version(name) for name in _PACKAGES}, "python": platform.python_version()},
        "machine": machine(),
        **rounded(measured),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def deviations(results: dict[str, Any], checks: list[dict[str, Any]]) -> list[str]:
    """One line for every check of expected.json that the results fail.

    A check names a ``key`` (dots lead into the results), a ``source``, and either ``value`` with ``relative_tolerance`` or
    ``absolute_tolerance``, or ``at_least`` and ``at_most``.
    """
    found = []
    for check in checks:
        value = _at(results, check["key"])
        if "value" in check:
            width = check.get("absolute_tolerance", abs(check["value"]) * check.get("relative_tolerance", 0.0))
            low, high = check["value"] - width, check["value"] + width
        else:
            low, high = check.get("at_least", float("-inf")), check.get("at_most", float("inf"))
        if not low <= value <= high:
            found.append(f"{check['key']} is {value:g}, expected {low:g} to {high:g} ({check['source']})")
    return found


def accepted(results: dict[str, Any], checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The checks with this run's numbers where they say ``from_run``; published values and claims stay."""
    return [
        check | ({"value": rounded(_at(results, check["key"]))} if check.get("from_run") else {}) for check in checks
    ]


def _at(results: dict[str, Any], key: str) -> Any:
    value: Any = results
    for part in key.split("."):
        value = value[part]
    return value


def rounded(value: Any) -> Any:
    """Six digits are more than any picture shows."""
    if isinstance(value, dict):
        return {key: rounded(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inside) for inside in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
