"""The whole matrix, its holes filled, as a file."""

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rankwise.completion_runs.folder import check_parents
from rankwise.completion_runs.progress import progress, say
from rankwise.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rankwise.completion import DeepMatrixCompletion, Observations
    from rankwise.completion.reading import Labels

    Array = NDArray[np.floating]

_NUMBERS_AT_A_TIME = 1 << 22


def checked_filled(filled: str | None) -> Path | None:
    """Refuse what could not be written after a long fit."""
    if filled is None:
        return None
    target = Path(filled)
    if target.suffix.lower() not in (".csv", ".npy"):
        raise UserError(f"--filled must be a .csv or .npy file, got {filled}")
    if os.path.isdir(target):  # noqa: PTH112  # no exception for a name that is too long
        raise UserError(f"--filled {target} is a folder; name a file in it")
    check_parents(target)
    return target


def write_filled(
    target: Path, model: "DeepMatrixCompletion", observations: "Observations", labels: "Labels", console: Console
) -> None:
    """Observed entries as they were, the others as fitted; some rows at a time, whole or not at all.

    A CSV has the labels as its first line and column where there are any.
    """
    import numpy as np

    height, width = observations.shape
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    at_a_time = max(1, _NUMBERS_AT_A_TIME // width)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with progress(console, "filling") as (report, _):
            if target.suffix.lower() == ".npy":
                with temporary.open("wb") as file:
                    form = {"descr": observations.values.dtype.str, "fortran_order": False, "shape": (height, width)}
                    np.lib.format.write_array_header_1_0(file, form)
                    for rows, block in model.reconstruct_batches(at_a_time):
                        _observed_over(block, rows, observations).tofile(file)
                        report(rows.stop, height)
            else:
                with temporary.open("w", encoding="utf-8", newline="") as text:
                    writer = csv.writer(text, lineterminator="\n")
                    if labels.columns is not None:
                        writer.writerow([*([] if labels.rows is None else [labels.row_name]), *labels.columns])
                    for rows, block in model.reconstruct_batches(at_a_time):
                        for i, line in enumerate(block, start=rows.start):
                            name = [] if labels.rows is None else [labels.rows[i]]
                            texts = [f"{number:.10g}" for number in line]
                            for p in range(observations.row_starts[i], observations.row_starts[i + 1]):
                                texts[observations.columns[p]] = str(observations.values[p])  # as short as is exact
                            writer.writerow([*name, *texts])
                        report(rows.stop, height)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    say(console, f"the whole matrix, {height:,} × {width:,}: {target}")


def _observed_over(block: "Array", rows: slice, observations: "Observations") -> "Array":
    import numpy as np

    part = slice(int(observations.row_starts[rows.start]), int(observations.row_starts[rows.stop]))
    counts = observations.row_counts[rows]
    block = np.ascontiguousarray(block, observations.values.dtype)
    block[np.repeat(np.arange(len(counts)), counts), observations.columns[part]] = observations.values[part]
    return block
