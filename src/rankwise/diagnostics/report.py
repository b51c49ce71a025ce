"""One self-contained HTML page (and its JSON) about one or several fine-tuning runs."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.diagnostics import page
from rankwise.diagnostics.page import number
from rankwise.errors import UserError
from rankwise.files import write_json, write_text

FORMAT_VERSION = 1

_LABELS = {"deep-lora": "Deep LoRA", "lora": "LoRA"}


def write_report(
    runs: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    title: str = "Fine-tuning with low rank",
    checks: dict[str, Any] | None = None,
) -> Path:
    """Write ``path`` (HTML) and, beside it, the same facts as JSON.

    The page loads nothing from outside, runs no script, and escapes everything that comes from data, names or paths.

    Args:
        runs: finished run folders of :func:`rankwise.finetuning.finetune`, in the order to show them.
        path: the HTML file to write; an existing one is replaced.
        title: heading of the page.
        checks: extra facts shown as a small table, such as the result of loading an export with plain PEFT.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: a folder is no finished run, or the runs were scored on different tasks.
    """
    if not runs:
        raise UserError("a report needs at least one finished run folder")
    try:
        from rankwise.diagnostics import plots
    except ImportError as error:
        raise UserError(f"reports need matplotlib ({error}): pip install 'rankwise[report]'") from None
    target = Path(path)
    _check_target(target)
    loaded = [read_run(Path(run)) for run in runs]
    _distinct_labels(loaded)
    for what, key in (("tasks", "task"), ("metrics", "metric")):
        if len({run[key] for run in loaded}) > 1:
            raise UserError(
                f"these runs have different {what} and cannot share a page: "
                + ", ".join(f"{run['folder']} ({run[key]})" for run in loaded)
            )
    figures = [
        (
            "Score on held-out rows",
            "Hollow: before training, a classifier's head at its start. Filled: after.",
            plots.scores_figure(loaded),
        ),
        ("Training loss", "One faint point a batch; the line is a running median.", plots.loss_figure(loaded)),
    ]
    if any(run["validation_steps"] for run in loaded):
        note = "On labelled rows set apart. Dashed: the step whose adapter was kept."
        figures.append(("When to stop", note, plots.validation_figure(loaded)))
    if any(run["layers"] for run in loaded):  # else no update is a product of two factors
        figures += [
            (
                "Singular values of every update",
                "A steep fall means that few directions do the work, whatever width was allowed.",
                plots.spectrum_figure(loaded),
            ),
            (
                "Rank found, layer by layer",
                "Directions that hold 99 % of each update's energy. Dashed: the width allowed.",
                plots.ranks_figure(loaded),
            ),
        ]
    figures.append(("Adapter size", "Bytes of the safetensors files.", plots.sizes_figure(loaded)))
    drawn = [(name, note, plots.as_svg(figure, name)) for name, note, figure in figures]
    text = _page(title, loaded, drawn, checks or {})
    write_json(
        target.with_suffix(".json"),
        {"format_version": FORMAT_VERSION, "title": title, "runs": loaded, "checks": checks or {}},
    )
    write_text(target, text)  # last: where the page is, all is
    return target


def read_run(folder: Path) -> dict[str, Any]:
    """What the page needs of one finished run folder, as plain numbers and names."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
    except (FileNotFoundError, NotADirectoryError) as error:
        name = Path(str(error.filename)).name
        raise UserError(f"{folder} is no finished run: it has no {name}") from None
    except ValueError as error:
        raise UserError(f"{folder} holds a damaged file ({error}); run it again") from None
    try:
        return _facts(folder, result, config, metrics)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged or was made by another version of rankwise ({error!r})") from None


def _facts(
    folder: Path, result: dict[str, Any], config: dict[str, Any], metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    metric = result["primary_metric"]
    settings = config["settings"]
    trained = [entry for entry in metrics if entry.get("loss") is not None]
    validated = [entry for entry in metrics if entry.get("validation") is not None]
    return {
        "label": _LABELS.get(result["method"], result["method"]),
        "folder": folder.resolve().as_posix(),
        "method": result["method"],
        "task": result["task"],
        "metric": metric,
        "greater_is_better": result.get("greater_is_better", True),
        "before": result["scores"]["before"][metric],
        "after": result["scores"]["after"][metric],
        "scores": result["scores"],
        "train_rows": result["train_rows"],
        "held_out_rows": result["held_out_rows"],
        "precision": result["precision"],
        "learning_rate": config["learning_rate"],
        "settings": {key: settings[key] for key in sorted(settings)},
        "environment": config["environment"],
        "seconds_per_step": result["seconds_per_step"],
        "ridge": result.get("ridge"),
        "trainable_parameters": result["trainable_parameters"],
        "adapter_bytes": result["adapter_bytes"],
        "exported_bytes": result["exported_bytes"],
        "layers": result["layers"],
        "steps": [entry["step"] for entry in trained],
        "losses": [entry["loss"] for entry in trained],
        "early_stopping": result.get("early_stopping"),
        "validation_rows": result.get("validation_rows", 0),
        "validation_steps": [entry["step"] for entry in validated],
        "validation_scores": [entry["validation"] for entry in validated],
    }


def _check_target(target: Path) -> None:
    """The page and its JSON replace files of their names: refuse names that would hit something else."""
    if target.is_dir():
        raise UserError(f"{target} is a folder; name a file in it, such as {target / 'report.html'}")
    if target.suffix.lower() == ".json":
        raise UserError(f"{target} is for the page's JSON; give --out the name of the HTML file, such as report.html")
    if target.with_suffix(".json").name in ("config.json", "result.json", "adapter_config.json"):
        raise UserError(
            f"{target} would put its JSON over a run's own {target.with_suffix('.json').name}; use another name"
        )


def _distinct_labels(runs: list[dict[str, Any]]) -> None:
    """Two runs of one method are told apart by their folders."""
    labels = [run["label"] for run in runs]
    folders = [run["folder"] for run in runs]
    for run, folder in zip(runs, _shortest_names(folders), strict=True):
        run["folder"] = folder  # the page and its JSON carry no path of the machine
        if labels.count(run["label"]) > 1:
            run["label"] = f"{run['label']} ({folder})"


def _shortest_names(folders: list[str]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart."""
    parts = [folder.split("/") for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(folders)):
            break
    seen: dict[str, int] = {}
    for index, name in enumerate(names):  # one folder given twice is still two columns
        seen[name] = seen.get(name, 0) + 1
        names[index] = name if seen[name] == 1 else f"{name}, again"
    return names


def _page(title: str, runs: list[dict[str, Any]], figures: list[tuple[str, str, str]], checks: dict[str, Any]) -> str:
    sections = [page.section(name, page.figure(name, svg), note) for name, note, svg in figures]
    sections.append(page.section("Every layer", "".join(_layers(run) for run in runs)))
    sections.append(page.section("Settings", "".join(_settings(run) for run in runs)))
    return page.page(title, _verdict(runs), "\n".join([_table(runs), _checks(checks), *sections]))


def _verdict(runs: list[dict[str, Any]]) -> str:
    """One sentence with the winner, whichever it is, and what one seed cannot say."""
    first = runs[0]
    scored = [run for run in runs if run["after"] is not None]
    about = f"{first['train_rows']:,} labelled rows, scored on {first['held_out_rows']:,} held-out rows"
    if not scored:
        return f"{about}. The score is undefined: every prediction is the same."
    best = _best(scored)
    ahead = "Highest" if first["greater_is_better"] else "Lowest"
    text = f"{about}. "
    if len(scored) > 1:
        rest = ", ".join(f"{run['label']} {run['after']:.4f}" for run in scored if run is not best)
        text += f"{ahead} {first['metric']}: {best['label']} with {best['after']:.4f}, against {rest}. "
    else:
        text += f"{best['label']} reaches {first['metric']} {best['after']:.4f}. "
    if first["before"] is not None:
        text += f"The model started at {first['before']:.4f}. "
    for run in runs:
        if run["ridge"] and run["ridge"]["abstains"]:
            text += f"{run['label']} left the model as it was: the labelled rows supported no change. "
    sign = 1 if first["greater_is_better"] else -1
    if all(run["before"] is not None and sign * (run["after"] - run["before"]) < 0 for run in scored):
        effect = "lowered the score" if first["greater_is_better"] else "raised the error"
        text += f"Training {effect}: these labels do not support a change. "
    return text + "One seed; another draw of rows can turn a small difference around."


def _best(scored: list[dict[str, Any]]) -> dict[str, Any]:
    return (max if scored[0]["greater_is_better"] else min)(scored, key=lambda run: run["after"])


def _table(runs: list[dict[str, Any]]) -> str:
    scored = [run for run in runs if run["after"] is not None]
    best = _best(scored)["after"] if scored else None
    head = ["method", f"{runs[0]['metric']} before", "after", "change", "directions (99\u00a0%)", "of", "trainable"]
    head += ["file", "ms a step"]
    rows = []
    for run in runs:
        directions = sum(layer["rank_99"] for layer in run["layers"])
        width = sum(layer["width"] for layer in run["layers"])
        change = None if run["before"] is None or run["after"] is None else run["after"] - run["before"]
        rows.append(
            [
                run["label"],
                number(run["before"], ".4f"),
                number(run["after"], ".4f"),
                number(change, "+.4f"),
                f"{directions}" if width else "–",
                f"{width}" if width else "–",
                f"{run['trainable_parameters']:,}",
                f"{run['exported_bytes'] / 1e3:,.0f} kB",
                _step(run),
            ]
        )
    marked = [i for i, run in enumerate(runs) if run["after"] is not None and run["after"] == best and len(runs) > 1]
    return page.table(head, rows, marked=marked)


def _step(run: dict[str, Any]) -> str:
    if run["ridge"]:
        return f"solved in {run['ridge']['seconds']:.0f} s"
    return number(None if run["seconds_per_step"] is None else 1000 * run["seconds_per_step"], ".0f")


def _checks(checks: dict[str, Any]) -> str:
    if not checks:
        return ""
    table = page.table([], [[str(name), str(value)] for name, value in checks.items()])
    return page.section("The exported adapter in plain PEFT", table)


def _layers(run: dict[str, Any]) -> str:
    head = ["layer", "size", "width", "numerical rank", "99 % energy", "stable rank", "largest σ"]
    rows = [
        [
            layer["name"],
            f"{layer['shape'][0]} × {layer['shape'][1]}",
            str(layer["width"]),
            str(layer["rank"]),
            str(layer["rank_99"]),
            f"{layer['stable_rank']:.2f}",
            f"{layer['singular_values'][0]:.3g}",
        ]
        for layer in run["layers"]
    ]
    if not rows:
        return page.folded(f"{run['label']}: no update is a product of two factors", "")
    return page.folded(f"{run['label']}: {len(run['layers'])} layers", page.table(head, rows))


def _settings(run: dict[str, Any]) -> str:
    content = {"settings": run["settings"], "precision": run["precision"], "environment": run["environment"]}
    return page.folded(run["label"], page.preformatted(json.dumps(content, indent=2, ensure_ascii=False)))
