"""What a study compares, and under which rules: the settings that every run shares, and the list of runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rankwise.adapters.config import ZERO_LEFT
from rankwise.errors import UserError
from rankwise.finetuning.methods import METHODS, learning_rate_grid, usual_learning_rate
from rankwise.finetuning.settings import (
    HEAD_STARTS,
    HEADS,
    PRECISIONS,
    PRESETS,
    SCHEDULES,
    SOLVERS,
    VARIANTS,
    FinetuneSettings,
)

SPLITS = ("evaluation", "tuning")
DRAWS = ("without-replacement", "with-replacement")
_FIRST_TUNING_SEED = 1_000_000  # tuning draws never coincide with a trial's
_SHARED = (  # settings that every run of a study has in common, whatever its method
    "model", "data", "out", "task", "method", "shots", "seed", "steps", "batch_size", "max_length", "precision",
    "save_every", "eval_data", "eval_limit", "text", "text_pair", "label",
)  # fmt: skip
_GROWING = ("tasks", "methods", "shots", "seeds", "budget")  # a study may be extended by these, and by nothing else


@dataclass(frozen=True)
class MethodSpec:
    """A method as typed: ``lora``, ``deep-lora:paper``, ``deep-lora:spectral+r=16``.

    Attributes:
        label: as typed; the name in rows, tables and figures.
        method: the part before the colon.
        overrides: :class:`FinetuneSettings` fields that the options after it set.
    """

    label: str
    method: str
    overrides: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, label: str) -> "MethodSpec":
        """Read a method with its options.

        Options stand after a colon, joined by ``+``: a preset's name, a frame variant's or solver's name, or ``field=value``.

        Raises:
            UserError: unknown method, option, field or value.

        Example:
            >>> from rankwise.finetuning.comparison import MethodSpec
            >>> MethodSpec.parse("deep-lora:spectral+inner_depth=1").overrides
            {'variant': 'spectral', 'inner_depth': 1}
        """
        method, colon, options = label.partition(":")
        if method not in METHODS:
            raise UserError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
        overrides: dict[str, Any] = {}
        for option in options.split("+") if colon else []:
            name, equals, value = option.partition("=")
            if equals:
                overrides[name] = _typed(label, name, value)
            elif method in PRESETS.get(name, {}):
                overrides |= PRESETS[name][method]
            elif name in VARIANTS:
                overrides["variant"] = name
            elif name in SOLVERS:
                overrides["solver"] = name
            else:
                known = ", ".join([*PRESETS, *VARIANTS, *SOLVERS, "field=value"])
                raise UserError(f"unknown option {name!r} in method {label!r}; expected {known}")
        return cls(label, method, overrides)

    @property
    def middle(self) -> float:
        """The method's default learning rate, unless an option sets another."""
        usual = usual_learning_rate(self.method, self.overrides.get("variant", ZERO_LEFT))
        return float(self.overrides.get("lr", usual))

    def grid(self, budget: int) -> tuple[float, ...]:
        """The rates to tune on."""
        return learning_rate_grid(self.middle, budget)


@dataclass(frozen=True)
class RunSpec:
    """One run of a study."""

    phase: str
    task: str
    method: str
    shots: int
    seed: int
    lr: float

    @property
    def key(self) -> str:
        """What tells runs apart, in a study's file and across its parts."""
        return "|".join([self.phase, self.task, self.method, str(self.shots), str(self.seed), f"{self.lr:g}"])


@dataclass(frozen=True)
class StudySettings:
    """The rules of a study; every run follows all of them.

    Attributes:
        model: local folder or hub name.
        out: study folder.
        tasks: names of :data:`rankwise.finetuning.named_tasks.TASK_NAMES`, files or ``hub:`` names.
        methods: as :meth:`MethodSpec.parse` reads them.
        shots: numbers of labelled rows.
        seeds: trials for each; a trial draws the same rows for every method.
        budget: learning rates tried for each method and task, √10 apart around its default.
        fixed: methods that keep their default rate on every task, as a user without a tuning split has to.
        tune_shots: labelled rows of the tuning runs.
        tune_seeds: draws of them.
        split: ``evaluation`` scores the trials on the task's official held-out rows; ``tuning`` on the rows the rates
            are chosen on, split from train, so that ideas can be screened without a look at the official rows.
        eval_limit: at most so many held-out rows; which ones is the same for every run.
        tune_limit: rows set apart from train to choose rates on (at most a fifth).
        schedule: of the learning rates, see :class:`FinetuneSettings`.
        head, head_start: trained or frozen, fitted first or random, see :class:`FinetuneSettings`.
        draw: ``with-replacement`` is the paper's way.
        max_eval_tokens: leave longer held-out rows out, as the paper did with 128; None keeps all.
    """

    model: str
    out: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...] = ("none", "lora", "lora-plus", "lora-rite", "rslora", "deep-lora")
    shots: tuple[int, ...] = (16, 64, 256)
    seeds: int = 5
    budget: int = 5
    fixed: tuple[str, ...] = ()
    tune_shots: int = 64
    tune_seeds: int = 2
    split: str = "evaluation"
    eval_limit: int = 1000
    tune_limit: int = 500
    head: str = "trained"
    head_start: str = "fitted"
    head_lr: float = 1e-3
    steps: int = 200
    schedule: str = "linear"
    batch_size: int = 16
    r: int = 8
    max_length: int = 128
    precision: str = "auto"
    draw: str = "without-replacement"
    max_eval_tokens: int | None = None
    data_root: str | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "shots"):
            values, option = getattr(self, name), "--task" if name == "tasks" else f"--{name}"
            if not values:
                raise UserError(f"{option} is empty; give at least one")
            twice = sorted({str(v) for v in values if list(values).count(v) > 1})
            if twice:
                raise UserError(f"{option} has {', '.join(twice)} more than once")
        for name in ("seeds", "budget", "tune_shots", "tune_seeds", "eval_limit", "tune_limit"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        if self.max_eval_tokens is not None:
            _require(self.max_eval_tokens >= 1, "max_eval_tokens", "at least 1", self.max_eval_tokens)
        for shots in self.shots:
            _require(shots >= 1, "shots", "at least 1", shots)
        for name, known in (
            ("split", SPLITS),
            ("draw", DRAWS),
            ("head", HEADS),
            ("head_start", HEAD_STARTS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
        ):
            _require(getattr(self, name) in known, name, f"one of {', '.join(known)}", getattr(self, name))
        unknown = [label for label in self.fixed if label not in self.methods]
        _require(not unknown, "fixed", f"some of {', '.join(self.methods)}", ", ".join(unknown))
        for label in self.methods:  # every mistake is found before the first run
            self.run_settings(RunSpec("confirm", self.tasks[0], label, 1, 0, MethodSpec.parse(label).middle))

    def spec(self, label: str) -> MethodSpec:
        return MethodSpec.parse(label)

    def grid(self, label: str) -> tuple[float, ...]:
        """The learning rates of a method; one if it is fixed or has none."""
        spec = self.spec(label)
        untuned = label in self.fixed or spec.method == "none" or spec.overrides.get("solver") == "ridge"
        return (spec.middle,) if untuned else spec.grid(self.budget)

    def keeps_default(self, label: str) -> bool:
        """Whether a method runs at the rate that its defaults give it on each task."""
        return label in self.fixed and "lr" not in self.spec(label).overrides

    def run_settings(self, run: RunSpec) -> FinetuneSettings:
        """The fine-tuning settings of one run."""
        spec = self.spec(run.method)
        return FinetuneSettings(
            **{
                "model": self.model,
                "data": run.task,
                "out": self.out,
                "method": spec.method,
                "shots": run.shots,
                "seed": run.seed,
                "head": self.head,
                "head_start": self.head_start,
                "head_lr": self.head_lr,
                "steps": self.steps,
                "schedule": self.schedule,
                "batch_size": self.batch_size,
                "r": self.r,
                "max_length": self.max_length,
                "precision": self.precision,
                **spec.overrides,
                "lr": run.lr,
            }
        )

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "StudySettings":
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise UserError(
                f"the study was made by another version of rankwise (unknown settings: {', '.join(unknown)})"
            )
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
            return cls(**{"schedule": "constant", **values})  # all there was before schedules could be chosen
        except TypeError as error:
            raise UserError(f"the study's settings are incomplete ({error}); start it again in a new folder") from None

    def extended_by(self, wanted: "StudySettings") -> "StudySettings":
        """This study with the other's tasks, methods, labels, trials and learning rates added.

        A larger grid holds every rate of a smaller one (:func:`rankwise.finetuning.methods.learning_rate_grid`), so the
        tuning runs made so far stay good.

        Raises:
            UserError: the two differ in a rule, so their runs cannot stand in one table.
        """
        changed = [
            f.name
            for f in fields(self)
            if f.name not in (*_GROWING, "out", "fixed", "data_root", "precision")
            and getattr(self, f.name) != getattr(wanted, f.name)
        ]
        if wanted.precision not in ("auto", self.precision):
            changed.append("precision")
        changed += [
            f"fixed ({label})"
            for label in set(self.methods) & set(wanted.methods)
            if (label in self.fixed) != (label in wanted.fixed)
        ]
        if changed:
            differences = ", ".join(
                f"{name}: {getattr(self, name)} there, {getattr(wanted, name)} now" if hasattr(self, name) else name
                for name in changed
            )
            raise UserError(
                f"the study in {self.out} follows other rules ({differences}); its runs and new ones could not stand "
                "in one table. Use those rules, or choose another --out"
            )
        return replace(
            self,
            tasks=_union(self.tasks, wanted.tasks),
            methods=_union(self.methods, wanted.methods),
            shots=tuple(sorted({*self.shots, *wanted.shots})),
            seeds=max(self.seeds, wanted.seeds),
            budget=max(self.budget, wanted.budget),
            fixed=_union(self.fixed, wanted.fixed),
            data_root=wanted.data_root,
        )


def tuning_runs(study: StudySettings, task: str, label: str) -> list[RunSpec]:
    """The runs that choose a method's learning rate on a task; none where there is nothing to choose."""
    grid = study.grid(label)
    if len(grid) == 1:
        return []
    seeds = range(_FIRST_TUNING_SEED, _FIRST_TUNING_SEED + study.tune_seeds)
    return [RunSpec("tune", task, label, study.tune_shots, seed, lr) for seed in seeds for lr in grid]


def confirm_runs(study: StudySettings, rates: dict[tuple[str, str], float]) -> list[RunSpec]:
    """The trials of every (task, method) whose rate is known, one whole trial after the other.

    Stopped anywhere, such a list leaves a balanced study: the first trials are complete in every cell.
    """
    return [
        RunSpec("confirm", task, label, shots, seed, rates[task, label])
        for seed in range(study.seeds)
        for shots in study.shots
        for task in study.tasks
        for label in study.methods
        if (task, label) in rates
    ]


def units(study: StudySettings, shard: tuple[int, int] = (1, 1)) -> list[tuple[str, str]]:
    """The (task, method) pairs of one shard; each is tuned and run in one place."""
    number, of = shard
    everything = [(task, label) for task in study.tasks for label in study.methods]
    return everything[number - 1 :: of]


def _typed(label: str, name: str, value: str) -> Any:
    """The text after ``name=`` as the setting's type."""
    kinds = {f.name: f.type.__name__ if isinstance(f.type, type) else str(f.type) for f in fields(FinetuneSettings)}
    if name not in kinds or name in _SHARED:
        raise UserError(f"method {label!r} sets {name!r}, which is no setting of an adapter or its optimizer")
    kind = kinds[name]
    try:
        if "bool" in kind:
            return {"true": True, "false": False}[value.lower()]
        return int(value) if "int" in kind else float(value) if "float" in kind else value
    except (ValueError, KeyError):
        raise UserError(f"method {label!r}: {name} must be of type {kind}, got {value!r}") from None


def _union(first: Sequence[Any], second: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys([*first, *second]))


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {got}")
