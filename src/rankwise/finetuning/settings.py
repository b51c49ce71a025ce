"""Everything that decides a fine-tuning run."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rankwise.adapters.config import STARTS, ZERO_LEFT
from rankwise.errors import UserError
from rankwise.finetuning.methods import METHODS, usual_learning_rate

AUTO = "auto"
HEADS = ("trained", "frozen")
HEAD_STARTS = ("fitted", "random")
PRECISIONS = ("auto", "fp32", "bf16")
SOLVERS = ("auto", "ridge", "train")
RIDGE_ROWS = 256  # labelled rows up to which `auto` solves: the kernel's cost grows with their square
MEASURED_ROWS = 256  # labelled rows up to which `--method auto` has evidence for classification
VARIANTS = STARTS
LORA_STARTS = ("kaiming", "gaussian")
SCHEDULES = ("linear", "constant")
WARM_UP = 0.1  # of the steps, in the linear schedule
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        # ICML 2024, App. B and the published code: inner 1e-2, γ = 0.01, Adam eps 1e-6, batch 16, constant rate.
        "deep-lora": {
            "solver": "train",
            "head_start": "random",
            "schedule": "constant",
            "variant": "compressed",
            "direction_dropout": 0.0,
            "lr": 1e-2,
            "outer_lr_ratio": 1e-2,
            "adam_eps": 1e-6,
            "inner_depth": 3,
            "init_scale": 1e-3,
            "r": 8,
        },
        # what the published tables were made with
        "full-width": {
            "head_start": "random",
            "schedule": "constant",
            "lr": 1e-4,
            "adam_eps": 1e-6,
            "inner_depth": 3,
            "init_scale": 1e-3,
        },
        # the paper's baseline, as its code has it
        "lora": {
            "head_start": "random",
            "schedule": "constant",
            "lr": 1e-4,
            "lora_start": "gaussian",
            "adam_eps": 1e-6,
            "r": 8,
        },
    },
}


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of :func:`rankwise.finetuning.finetune`; ``None`` means "choose for me" and is resolved in the run.

    Attributes:
        model: local folder or hub name of a pretrained model.
        data: CSV, TSV, JSONL, Parquet or CoNLL file, a folder of images, or ``hub:NAME``.
        out: run folder to create.
        task: auto, or one of :data:`rankwise.finetuning.task_choice.TASKS`.
        method: one of :data:`rankwise.finetuning.methods.METHODS`, or ``auto``: what the committed study recommends for
            this task and number of rows (docs/few-labels.md).
        head: trained, or frozen at its start as in the paper; without effect on a task that has none.
        head_start: ``fitted`` to the labels on the pretrained model's features (:mod:`rankwise.finetuning.head_start`),
            or ``random``, as the model library draws it.
        head_lr: the head's own learning rate, the same for every method.
        shots: labelled rows to train on, drawn by ``seed``; all (less the held-out fifth) unless given.
        eval_data: held-out file; otherwise the rows not drawn, or a fifth.
        eval_limit: at most this many held-out rows.
        text, text_pair, label: column names; guessed unless given.
        r, inner_depth, init_scale, variant, direction_dropout: the adapter, see :class:`rankwise.adapters.DeepLoraConfig`.
        lora_start: ``kaiming`` A and zero B (PEFT's), or ``gaussian``: N(0, 1) on the output side and zero on the input
            side, the baseline of the paper's code.
        solver: how Deep LoRA finds its factors: ``train`` (optimizer steps), ``ridge``
            (closed form, see :mod:`rankwise.adapters.tangent`; ``steps`` and ``lr`` then count for nothing), or
            ``auto``: ridge where the task's output is one number without a head and there are at most 256 rows.
        lr, outer_lr_ratio, adam_eps: η, γ and Adam's eps; the method's defaults unless given; γ = 10
            with the zero-left variant, else 1.
        schedule: of all rates: ``linear`` (up over the first tenth of the steps, then down to 0) or ``constant``, the
            paper's.
        batch_size: rows of an optimizer step, of all processes and passes together.
        accumulate: forward passes a process takes for a step, one after the other: less memory, the same step.
        early_stopping: stop after so many scores in a row, on rows set apart, that are no better than the best, and keep
            the adapter of the best; None trains to the end.
        validate_every: steps between those scores; a tenth of the run unless given.
        validation_rows: how many of the labelled rows are set apart for them; a fifth unless given.
        validation_data: a file that brings such rows instead.
        class_weights: of a task with classes: ``balanced``, or a weight by class name; see
            :func:`rankwise.finetuning.class_weights.class_weights`.
        packing: several rows of ``causal-lm`` in one sequence: less padding, the same steps.
        metrics: more to report, by name, or ``module:function`` with a function (predictions, targets) → number.
        primary_metric: which of the reported ones early stopping and the report look at; the task's own unless given.
        init_batches: batches averaged for the gradient that places U and V.
        max_length: tokens kept of every text.
        precision: auto measures bf16 autocast against fp32 on this machine and takes it only where it is faster.
        save_every: steps between checkpoints; a tenth of the run unless given.
    """

    model: str
    data: str
    out: str
    task: str = "auto"
    method: str = "deep-lora"
    head: str = "trained"
    head_start: str = "fitted"
    head_lr: float = 1e-3
    shots: int | None = None
    seed: int = 0
    eval_data: str | None = None
    eval_limit: int = 2000
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    r: int = 8
    inner_depth: int = 3
    init_scale: float = 1e-3
    variant: str = ZERO_LEFT
    direction_dropout: float = 0.3
    lora_start: str = "kaiming"
    solver: str = "auto"
    lr: float | None = None
    outer_lr_ratio: float | None = None
    adam_eps: float | None = None
    steps: int = 200
    schedule: str = "linear"
    batch_size: int = 16
    accumulate: int = 1
    early_stopping: int | None = None
    validate_every: int | None = None
    validation_rows: int | None = None
    validation_data: str | None = None
    class_weights: str | dict[str, float] | None = None
    packing: bool = False
    metrics: tuple[str, ...] = ()
    primary_metric: str | None = None
    init_batches: int = 1
    max_length: int = 128
    precision: str = "auto"
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "r",
            "inner_depth",
            "init_batches",
            "max_length",
            "eval_limit",
        ):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("shots", "save_every", "early_stopping", "validate_every", "validation_rows"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        for name in ("lr", "head_lr", "adam_eps", "init_scale"):
            value = getattr(self, name)
            _require(value is None or 0 < value < float("inf"), name, "a positive number", value)
        _require(0 <= self.outer_ratio < float("inf"), "outer_lr_ratio", "0 or more", self.outer_lr_ratio)
        frozen = self.method == "deep-lora" and self.variant == ZERO_LEFT and self.outer_ratio == 0
        _require(not frozen, "outer_lr_ratio", f"above 0 with --variant {ZERO_LEFT}, whose U starts at zero", 0)
        _require(0 <= self.direction_dropout < 1, "direction_dropout", "at least 0, below 1", self.direction_dropout)
        _require(0 <= self.seed < 2**32, "seed", "between 0 and 2^32 - 1", self.seed)
        _require(self.method in (AUTO, *METHODS), "method", f"one of {', '.join((AUTO, *METHODS))}", self.method)
        _require(self.head in HEADS, "head", f"one of {', '.join(HEADS)}", self.head)
        _require(self.head_start in HEAD_STARTS, "head_start", f"one of {', '.join(HEAD_STARTS)}", self.head_start)
        _require(self.variant in VARIANTS, "variant", f"one of {', '.join(VARIANTS)}", self.variant)
        _require(self.lora_start in LORA_STARTS, "lora_start", f"one of {', '.join(LORA_STARTS)}", self.lora_start)
        _require(self.solver in SOLVERS, "solver", f"one of {', '.join(SOLVERS)}", self.solver)
        _require(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", self.schedule)
        _require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)

        for name in ("validate_every", "validation_rows", "validation_data"):
            value = getattr(self, name)
            _require(value is None or self.early_stopping is not None, name, "given with --early-stopping only", value)
        both = self.validation_rows is not None and self.validation_data is not None
        _require(not both, "validation_rows", "left out where --validation-data brings the rows", self.validation_rows)

    @property
    def learning_rate(self) -> float:
        return self.lr if self.lr is not None else usual_learning_rate(self.method, self.variant)

    @property
    def outer_ratio(self) -> float:
        return self.outer_lr_ratio if self.outer_lr_ratio is not None else 10.0 if self.variant == ZERO_LEFT else 1.0

    @property
    def epsilon(self) -> float:
        return self.adam_eps if self.adam_eps is not None else METHODS[self.method].adam_eps

    @property
    def checkpoint_every(self) -> int:
        return self.save_every if self.save_every is not None else max(1, self.steps // 10)

    @property
    def score_every(self) -> int:
        return self.validate_every if self.validate_every is not None else max(1, self.steps // 10)

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "FinetuneSettings":
        """The settings of a saved run; unknown entries of a newer version are refused."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise UserError(f"the run was made by another version of rankwise (unknown settings: {', '.join(unknown)})")
        content = {**content, "metrics": tuple(content.get("metrics", ()))}
        try:
            # what a run followed before either could be chosen
            return cls(**{"schedule": "constant", "direction_dropout": 0.0, **content})
        except TypeError as error:
            raise UserError(f"the run's settings are incomplete ({error}); start it again in a new folder") from None


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        option = "--rank" if name == "r" else "--" + name.replace("_", "-")
        raise UserError(f"{option} must be {expected}, got {got}")
