"""What a run was asked for."""

from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import UserError

PAIRS, CLASSES = "pair-similarity", "classification"
RULES = ("welore", "uniform")
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class CompressionSettings:
    """The options of ``rankwise compress``, by the names that they have there.

    Attributes:
        target, rank, energy: how small; one of them.
        rule: "welore" or "uniform"; None leaves it to :func:`rankwise.compression.factorize_model`.
        calibrate, eval: files; None has none.
        include, exclude: names of layers or their ends.

    Raises:
        UserError: an option out of range, or two that exclude each other.
    """

    model: str
    target: float | None = None
    rank: int | None = None
    energy: float | None = None
    rule: str | None = None
    calibrate: str | None = None
    calibrate_rows: int = 256
    eval: str | None = None
    task: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    max_length: int = 128
    include: list[str] | None = None
    exclude: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = [option for option in (self.target, self.rank, self.energy) if option is not None]
        if len(sizes) > 1:
            raise UserError("--target, --rank and --energy exclude each other; give one of them")
        if not sizes:
            object.__setattr__(self, "target", 0.5)
        for option, given in (("--model", self.model), ("--calibrate", self.calibrate), ("--eval", self.eval)):
            if given is not None and not given.strip():
                raise UserError(f"{option} is empty; give a name, or leave the option out")
        if self.rule is not None and self.rule not in RULES:
            raise UserError(f"--rule must be {' or '.join(RULES)}, got {self.rule!r}")
        if self.task is not None and self.task not in (PAIRS, CLASSES):
            raise UserError(
                f"--task must be {PAIRS} or {CLASSES}, got {self.task!r}; leave it out for perplexity or agreement"
            )
        if self.task is not None and self.eval is None:
            raise UserError("--task needs --eval with a labelled table to score on")
        for option, value in (("--calibrate-rows", self.calibrate_rows), ("--max-length", self.max_length)):
            if value < 2:
                raise UserError(f"{option} must be at least 2, got {value}")
        named = (self.text, self.text_pair, self.label) != (None, None, None)
        if named and not any(map(is_table, (self.calibrate, self.eval))):
            raise UserError(
                f"--text, --text-pair and --label name columns of a table ({', '.join(_TABLES)}), and neither --calibrate nor "
                "--eval is one; leave them out"
            )


def is_table(file: str | None) -> bool:
    """Whether a file is read by columns, and not a text a line."""
    return file is not None and Path(file).suffix.lower() in _TABLES
