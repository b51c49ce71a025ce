"""``rankwise memory``."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from rankwise.errors import UserError

if TYPE_CHECKING:
    from rankwise.optimizers.memory import MemoryEstimate, ParameterMemory

_HELP = """
How many bytes of weights, gradients and optimizer state training takes, method by method, before anything is allocated.

The model is built from its configuration alone: no weights are read or downloaded. Activations are not counted: they depend on
the batch.

[bold]Example[/bold]

  rankwise memory --model ./Llama-2-7b --rank 1024 --dtype bf16

  rankwise memory --model ./all-MiniLM-L6-v2 --rank 64 --methods adamw,galore,lora --layers
"""
_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_REFERENCE = "adamw"
_UNBOUNDED = 200  # columns: as many as the widest table of a few methods takes
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def register(app: typer.Typer) -> None:
    app.command("memory", help=_HELP, no_args_is_help=True)(memory)


def memory(
    model: Annotated[
        str, typer.Option(help="Model folder, a hub name such as org/name, or package:NAME; only its config is read.")
    ],
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of projections and adapters.")] = 128,
    methods: Annotated[str | None, typer.Option(help="Comma-separated; all of them by default.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: fp32, bf16, fp16 or fp64; the config's by default.")
    ] = None,
    include: Annotated[
        str | None, typer.Option(help="Comma-separated names of layers (or their ends): only these get a rank.")
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Comma-separated names of layers that get none.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also the optimizer state of every kind of layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes as JSON, for other programs.")] = False,
) -> None:
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    chosen, named, left_out = _names(methods), _names(include), _names(exclude)
    try:
        import torch

        from rankwise.optimizers.memory import METHODS, optimizer_memory
        from rankwise.optimizers.training_methods import method_called

        for name in chosen or ():
            method_called(name)  # a slip here should not wait for the model
        skeleton, own_dtype = _skeleton(model)
        weights = own_dtype if dtype is None else getattr(torch, _DTYPES[dtype])
        estimates = {
            name: optimizer_memory(skeleton, name, rank, dtype=weights, include=named, exclude=left_out)
            for name in dict.fromkeys([_REFERENCE, *(chosen or METHODS)])
        }
    except ImportError as error:
        raise UserError(f"memory needs more packages ({error}): pip install 'rankwise[hf]'") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    shown = {name: estimate for name, estimate in estimates.items() if chosen is None or name in chosen}
    used = str(weights).removeprefix("torch.")
    if as_json:
        typer.echo(json.dumps(_as_json(model, rank, used, shown, estimates[_REFERENCE]), indent=2))
        return
    console = Console()
    if not console.is_terminal:  # a pipe or a file has no width to fit into
        console = Console(width=_UNBOUNDED)
    console.print(_methods_table(model, rank, used, shown, estimates[_REFERENCE]))
    console.print(_legend(list(shown)))
    if layers:
        console.print(_layers_table(shown))


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"expected comma-separated names, got {text!r}")
    return names


def _skeleton(name: str) -> tuple[Any, Any]:
    """The model on the meta device, of the class its config names, and the dtype its weights are saved in."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModel

    from rankwise.compression.layer_list import described_layers, put_layers
    from rankwise.compression.pretrained import model_class, reason_of
    from rankwise.finetuning import efficientnet_lite
    from rankwise.finetuning.models import model_source

    transformers.logging.set_verbosity_error()
    source = model_source(name)
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):  # noqa: PTH112, PTH113, PTH118
        raise UserError(f"the folder {source} has no config.json; expected a Hugging Face model folder")
    with torch.device("meta"):
        if efficientnet_lite.is_weights(source):
            return efficientnet_lite.EfficientNetLite(efficientnet_lite.EfficientNetLiteConfig()), torch.float32
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            named = model_class(config.architectures)
            built = AutoModel.from_config(config, trust_remote_code=False) if named is None else named(config)
            compressed = getattr(config, "rankwise", None)
            if compressed is not None:  # some of its layers are pairs
                put_layers(built, described_layers(compressed, Path(source, "config.json")))
        except Exception as error:  # a config may hold anything, and whatever reads it may stumble over it anyhow
            raise UserError(
                f"cannot build the model that --model {source} describes by its config.json: {reason_of(error)}"
            ) from None
    return built, config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _methods_table(
    model: str, rank: int, dtype: str, estimates: "dict[str, MemoryEstimate]", reference: "MemoryEstimate"
) -> Table:
    unit = max(_unit(estimate.total) for estimate in estimates.values())
    table = _table(f"Training {model} in {dtype}, rank {rank}; sizes in {_UNITS[unit]}")
    table.add_column("method", no_wrap=True)
    for heading in ("trained", "weights", "gradients", "state", "total", "state saved", "total saved"):
        table.add_column(heading, justify="right", no_wrap=not heading.endswith("saved"))
    for name, estimate in estimates.items():
        sizes = (estimate.weights, estimate.gradients, estimate.state, estimate.total)
        saved = (_share(estimate.state, reference.state), _share(estimate.total, reference.total))
        shares = ("" if share is None else f"{100 * share:.1f}%" for share in saved)
        table.add_row(name, _count(estimate.trainable), *(_in_unit(size, unit) for size in sizes), *shares)
    return table


def _legend(names: list[str]) -> Group:
    from rankwise.optimizers.memory import METHODS

    lines = Table.grid(padding=(0, 2))
    for name in names:
        lines.add_row(name, METHODS[name].does)
    note = "One process, without activations and what a step needs for a moment. Saved: against adamw."
    return Group(lines, "", note, "")


def _layers_table(estimates: "dict[str, MemoryEstimate]") -> Table:
    """One row for the parameters that are called alike but for a number; the state of all of them together."""
    columns = [_alike(estimate) for estimate in estimates.values()]
    unit = max(_unit(sum(entry.state for entry in entries)) for column in columns for entries in column.values())
    table = _table(f"Optimizer state by layer, in {_UNITS[unit]}")
    table.add_column("parameter", overflow="fold")
    for heading in ("×", "shape"):
        table.add_column(heading, justify="right")
    table.add_column("kind")
    for name in estimates:
        table.add_column(name, justify="right")
    for key, entries in columns[0].items():
        states = [_in_unit(sum(entry.state for entry in column[key]), unit) for column in columns]
        shape = "×".join(map(str, entries[0].shape)) or "1"
        table.add_row(escape(key[0]), str(len(entries)), shape, entries[0].kind, *states)
    return table


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def _alike(estimate: "MemoryEstimate") -> "dict[tuple[Any, ...], list[ParameterMemory]]":
    found: dict[tuple[Any, ...], list[ParameterMemory]] = {}
    for entry in estimate.parameters:
        key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", entry.name), entry.shape, entry.kind)
        found.setdefault(key, []).append(entry)
    return found


def _as_json(
    model: str, rank: int, dtype: str, estimates: "dict[str, MemoryEstimate]", reference: "MemoryEstimate"
) -> dict[str, Any]:
    methods = [
        {
            **estimate.as_dict(),
            "state_saved": _share(estimate.state, reference.state),
            "total_saved": _share(estimate.total, reference.total),
        }
        for estimate in estimates.values()
    ]
    return {"format_version": 1, "model": model, "rank": rank, "dtype": dtype, "methods": methods}


def _share(used: int, reference: int) -> float | None:
    return 1 - used / reference if reference else None


def _count(numbers: int) -> str:
    return f"{numbers / 1e6:,.1f} M" if numbers >= 1e6 else f"{numbers:,}"


def _unit(size: int) -> int:
    """The number of the unit in which a size is at least 1."""
    return min(max(size, 1).bit_length() - 1, 10 * (len(_UNITS) - 1)) // 10


def _in_unit(size: int, unit: int) -> str:
    return f"{size / 1024**unit:,.{2 if unit else 0}f}"
