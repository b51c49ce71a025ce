"""What a completion run was asked for."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import UserError

if TYPE_CHECKING:
    from rankwise.completion import DeepMatrixCompletion

_PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class CompletionSettings:
    """Everything that a run's numbers depend on, besides its input files."""

    row: str | None
    col: str | None
    value: str | None
    header: bool | None
    row_labels: bool | None
    delimiter: str | None
    key: str | None
    observed: float | None
    mask: str | None
    rank: int | None
    depth: int
    solver: str
    intercept: bool | None
    loss: str
    clip: list[float] | str | None
    max_iter: int | None
    dtype: str
    calibrate: bool
    seed: int

    def check(self, data: str, *, predicts: bool, with_intervals: bool) -> None:
        """Whatever can be wrong before a file is opened."""
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed must be a whole number from 0 to {2**32 - 1:,}, got {self.seed}")
        named = {"--row": self.row, "--col": self.col, "--value": self.value}
        missing = [option for option, given in named.items() if given is None]
        if 0 < len(missing) < 3:
            raise UserError(f"a table of entries needs --row, --col and --value; {' and '.join(missing)} missing")
        if is_picture(data):
            if not missing:
                raise UserError(f"{data} is a picture; leave --row, --col and --value out")
            if self.observed is not None and self.mask is not None:
                raise UserError("give --observed or --mask, not both")
            if predicts:
                raise UserError("a picture is filled as a whole, into filled.png; leave --predict out")
        elif self.observed is not None or self.mask is not None:
            raise UserError(f"--observed and --mask are for pictures (.png, .jpg); {data} is none")
        if not self.calibrate and with_intervals:
            raise UserError("--interval needs the held-out errors that --no-calibrate leaves out")
        if Path(data).suffix.lower() in (".parquet", ".pq") and missing:
            raise UserError(f"{data} is a table; name its columns with --row, --col and --value")
        if self.dtype not in ("float64", "float32"):
            raise UserError(f"--dtype must be float64 or float32, got {self.dtype}")
        self.model(None)

    def check_for_several(self) -> None:
        """What several processes cannot do with the rows between them, before a file is opened."""
        if self.loss == "huber" or self.solver == "gradient-descent":
            what = "--loss huber" if self.loss == "huber" else "--solver gradient-descent"
            raise UserError(f"{what} needs all entries in one process; leave it out, or start without torchrun")

    def model(self, jobs: int | None) -> "DeepMatrixCompletion":
        """The estimator asked for.

        Raises:
            UserError: an option is out of its range.
        """
        from rankwise.completion import DeepMatrixCompletion
        from rankwise.completion.options import SolverOptions

        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("rank", "depth", "solver", "loss", "max_iter", "dtype")
        }
        SolverOptions(**options)  # complains before any file is read
        clip: Any = tuple(self.clip) if isinstance(self.clip, list) else self.clip
        return DeepMatrixCompletion(
            **options, fit_intercept=self.intercept, clip=clip, n_jobs=jobs, random_state=self.seed
        )


def parsed_bounds(text: str | None) -> list[float] | str | None:
    if text is None or text == "observed":
        return text
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--clip must be low,high such as 1,5, or observed; got {text!r}")
    return [low, high]


def is_picture(data: str) -> bool:
    return Path(data).suffix.lower() in _PICTURES
