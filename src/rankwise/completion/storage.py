"""A fitted model as a folder: arrays in safetensors, everything else in JSON."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rankwise._version import __version__
from rankwise.completion.intercepts import Intercepts
from rankwise.completion.intervals import Calibration
from rankwise.completion.solution import FoldIn, Solution
from rankwise.errors import UserError
from rankwise.files import replacing_folder, save_tensors, write_json

FORMAT_VERSION = 1
_ARRAYS = "model.safetensors"
_CONFIG = "config.json"
_KIND = "deep-matrix-completion"
_SOLUTION = ("left", "right", "row_seen", "column_seen", "row_spread", "column_spread")
_FOLD_IN = ("penalty", "per_entry", "shift")


def save(model: Any, folder: Path) -> Path:
    """Write the model into a new or empty folder, whole or not at all.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    solution: Solution = model.solution_
    arrays: dict[str, Any] = {name: getattr(solution, name) for name in _SOLUTION}
    arrays |= {f"fold_in.{name}": getattr(solution.fold_in, name) for name in _FOLD_IN}
    for name in ("intercepts", "fallback"):
        arrays |= {f"{name}.rows": getattr(solution, name).rows, f"{name}.columns": getattr(solution, name).columns}
    calibration: Calibration | None = model.calibration_
    if calibration is not None:
        arrays["calibration.scores"] = calibration.scores
    config = {
        "format_version": FORMAT_VERSION,
        "kind": _KIND,
        "rankwise": __version__,
        "parameters": _plain(model.get_params()),
        "n_features_in": model.n_features_in_,
        "feature_names_in": _names(model),
        "route": solution.route,
        "noise": solution.noise,
        "converged": solution.converged,
        "history": solution.history,
        "intercepts": [[i.mean, i.shrinkage] for i in (solution.intercepts, solution.fallback)],
        "fold_in_intercept": solution.fold_in.intercept,
        "merged_duplicates": model.merged_duplicates_,
        "value_range": list(model.value_range_),
        "calibration": None
        if calibration is None
        else {
            "rmse": calibration.rmse,
            "rmse_interval": list(calibration.rmse_interval),
            "baseline_rmse": calibration.baseline_rmse,
            "count": calibration.count,
        },
    }
    try:
        with replacing_folder(folder) as temporary:
            tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
            save_tensors(tensors, temporary / _ARRAYS, kind=_KIND)
            write_json(temporary / _CONFIG, config)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    return folder


def load(cls: type[Any], folder: Path) -> Any:
    """The model saved in ``folder``."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        arrays = {name: tensor.numpy() for name, tensor in load_file(folder / _ARRAYS).items()}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist; expected a folder written by save()") from None
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged ({error}); save the model again") from None
    if not isinstance(config, dict) or config.get("kind") != _KIND:
        raise UserError(f"{folder / _CONFIG} does not describe a saved DeepMatrixCompletion")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder} has format {config.get('format_version')}, this version of rankwise reads {FORMAT_VERSION}; "
            "update rankwise"
        )
    try:
        return _rebuilt(cls, config, arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} is incomplete ({error}); save the model again") from None


def _rebuilt(cls: type[Any], config: dict[str, Any], arrays: dict[str, Any]) -> Any:
    parameters = config["parameters"]
    if isinstance(parameters.get("clip"), list):
        parameters["clip"] = tuple(parameters["clip"])
    model = cls(**parameters)
    intercepts, fallback = (
        Intercepts(float(mean), arrays[f"{name}.rows"], arrays[f"{name}.columns"], float(shrinkage))
        for name, (mean, shrinkage) in zip(("intercepts", "fallback"), config["intercepts"], strict=True)
    )
    solution = Solution(
        route=config["route"],
        intercepts=intercepts,
        fallback=fallback,
        fold_in=FoldIn(config["fold_in_intercept"], *(arrays[f"fold_in.{name}"] for name in _FOLD_IN)),
        noise=float(config["noise"]),
        converged=bool(config["converged"]),
        history=config["history"],
        **{name: arrays[name] for name in _SOLUTION},
    )
    _check_shapes(solution, int(config["n_features_in"]))
    model.n_features_in_ = int(config["n_features_in"])
    if config["feature_names_in"] is not None:
        model.feature_names_in_ = np.asarray(config["feature_names_in"], dtype=object)
    model._take(solution)
    model.unobserved_rows_ = np.flatnonzero(~solution.row_seen)
    model.unobserved_columns_ = np.flatnonzero(~solution.column_seen)
    model.merged_duplicates_ = int(config["merged_duplicates"])
    low, high = config["value_range"]
    model.value_range_ = (float(low), float(high))
    saved = config["calibration"]
    model.calibration_ = saved and Calibration(
        arrays["calibration.scores"],
        saved["rmse"],
        tuple(saved["rmse_interval"]),
        saved["baseline_rmse"],
        saved["count"],
    )
    return model


def _check_shapes(solution: Solution, columns: int) -> None:
    height, width = solution.left.shape[0], solution.left.shape[1]
    expected = {
        "right": (solution.right.shape, (columns, width)),
        "row_seen": (solution.row_seen.shape, (height,)),
        "column_seen": (solution.column_seen.shape, (columns,)),
        "row intercepts": (solution.intercepts.rows.shape, (height,)),
        "column intercepts": (solution.intercepts.columns.shape, (columns,)),
        "fold-in": (solution.fold_in.penalty.shape, (width + solution.fold_in.intercept,) * 2),
    }
    for name, (got, wanted) in expected.items():
        if tuple(got) != tuple(wanted):
            raise ValueError(f"{name} has shape {tuple(got)}, expected {tuple(wanted)}")
    if not (np.isfinite(solution.left).all() and np.isfinite(solution.right).all()):
        raise ValueError("the factors are not finite")


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters as JSON can hold them; a generator as random_state cannot be, and becomes None."""
    plain: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, np.generic):
            value = value.item()
        elif isinstance(value, (type, np.dtype)):
            value = np.dtype(value).name
        elif isinstance(value, np.random.RandomState):
            value = None
        plain[name] = value
    return plain


def _names(model: Any) -> list[str] | None:
    names = getattr(model, "feature_names_in_", None)
    return None if names is None else [str(name) for name in names]
