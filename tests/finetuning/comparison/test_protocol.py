"""The rules of a study and the list of its runs, without training anything."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.finetuning.comparison import STUDY_PRESETS, MethodSpec, RunSpec, StudySettings, study_settings
from rankwise.finetuning.comparison.protocol import confirm_runs, tuning_runs, units
from rankwise.finetuning.methods import METHODS
from rankwise.finetuning.settings import PRESETS, VARIANTS


def rules(**changes: Any) -> StudySettings:
    values: dict[str, Any] = {"model": "m", "out": "o", "tasks": ("rte", "stsb"), "methods": ("none", "lora", "dora")}
    return StudySettings(**{**values, **changes})


# --- methods as typed


@pytest.mark.parametrize("method", METHODS)
def test_every_method_parses_by_its_name(method: str) -> None:
    spec = MethodSpec.parse(method)
    assert (spec.label, spec.method, spec.overrides) == (method, method, {})
    assert spec.middle == METHODS[method].lr


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_by_its_name(variant: str) -> None:
    assert MethodSpec.parse(f"deep-lora:{variant}").overrides == {"variant": variant}


def test_options_count_from_left_to_right() -> None:
    spec = MethodSpec.parse("deep-lora:paper+random+r=16+lr=2e-3+init_batches=2")
    assert spec.overrides == {
        **PRESETS["paper"]["deep-lora"],
        "variant": "random",
        "r": 16,
        "lr": 2e-3,
        "init_batches": 2,
    }
    assert spec.middle == 2e-3
    assert spec.label == "deep-lora:paper+random+r=16+lr=2e-3+init_batches=2"
    assert MethodSpec.parse("deep-lora:r=16+paper").overrides["r"] == PRESETS["paper"]["deep-lora"]["r"]


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("lorra", "unknown method 'lorra'"),
        ("", "unknown method ''"),
        (" lora", "unknown method ' lora'"),
        ("LoRA", "unknown method 'LoRA'"),
        ("lora:", "unknown option ''"),
        ("lora:r=4+", "unknown option ''"),
        ("lora:fast", "unknown option 'fast'"),
        ("lora:rank=4", "sets 'rank'"),
        ("lora:r=four", "r must be of type int, got 'four'"),
        ("lora:r=4.5", "r must be of type int"),
        ("lora:r=", "r must be of type int"),
        ("lora:lr=fast", "lr must be of type float"),
        ("lora:=4", "sets ''"),
        *((f"lora:{name}=1", f"sets '{name}'") for name in ("steps", "shots", "seed", "batch_size", "model", "data")),
        # these would give one method other rows, other texts or another way of scoring
        *((f"lora:{name}=1", f"sets '{name}'") for name in ("text", "text_pair", "label", "eval_data", "eval_limit")),
        *((f"lora:{name}=1", f"sets '{name}'") for name in ("max_length", "precision", "save_every")),
    ],
)  # fmt: skip
def test_a_mistake_in_a_method_is_named(label: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        MethodSpec.parse(label)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "label", ["lora:r=0", "lora:lr=nan", "lora:lr=-1", "deep-lora:variant=odd", "deep-lora:init_scale=0"]
)
def test_a_value_out_of_range_is_found_before_the_first_run(label: str) -> None:
    with pytest.raises(UserError):
        rules(methods=("none", label))


# --- runs


def test_keys_tell_all_runs_of_a_study_apart() -> None:
    study = rules(methods=("none", "lora", "lora:r=4", "deep-lora", "deep-lora:paper"), seeds=4)
    rates = {(task, label): study.grid(label)[0] for task in study.tasks for label in study.methods}
    runs = [run for task in study.tasks for label in study.methods for run in tuning_runs(study, task, label)]
    runs += confirm_runs(study, rates)
    assert len({run.key for run in runs}) == len(runs)
    assert len(set(runs)) == len(runs)


def test_tuning_runs_are_the_same_draws_at_every_rate_and_for_every_method() -> None:
    study = rules(budget=3, tune_seeds=2, tune_shots=32, shots=(16,))
    runs = {label: tuning_runs(study, "rte", label) for label in study.methods}
    assert runs["none"] == []
    assert {run.seed for run in runs["lora"]} == {run.seed for run in runs["dora"]}
    assert Counter(run.lr for run in runs["lora"]) == dict.fromkeys(study.grid("lora"), 2)
    assert {(run.phase, run.task, run.shots) for run in runs["lora"]} == {("tune", "rte", 32)}


def test_a_fixed_method_is_not_tuned() -> None:
    study = rules(methods=("lora", "lora:lr=0.123"), fixed=("lora:lr=0.123",))
    assert tuning_runs(study, "rte", "lora:lr=0.123") == []
    assert study.grid("lora:lr=0.123") == (0.123,)
    assert len(tuning_runs(study, "rte", "lora")) == study.budget * study.tune_seeds


def test_tuning_draws_never_coincide_with_trials() -> None:
    study = rules(seeds=10_000, tune_seeds=50)
    tuned = {run.seed for run in tuning_runs(study, "rte", "lora")}
    assert tuned.isdisjoint(range(study.seeds))
    assert len(tuned) == 50


@given(st.integers(0, 5 * 2 * 2 * 3), st.data())
def test_cut_anywhere_the_trials_are_balanced(cut: int, data: st.DataObject) -> None:
    """No cell is ahead of another by more than the trial in progress, and no method by more than one run."""
    study = rules(seeds=5, shots=(16, 64))
    runs = confirm_runs(study, {(task, label): 1e-3 for task in study.tasks for label in study.methods})
    assert len(runs) == 5 * 2 * 2 * 3
    done = runs[:cut]
    cells = Counter((run.task, run.shots, run.method) for run in done)
    every = [cells[task, shots, m] for task in study.tasks for shots in study.shots for m in study.methods]
    assert max(every) - min(every) <= 1
    complete = {run.seed for run in done} - {run.seed for run in runs[cut:]}
    assert complete == set(range(cut // 12))


def test_what_has_no_rate_is_left_out() -> None:
    study = rules(seeds=2, shots=(16,))
    runs = confirm_runs(study, {("rte", "lora"): 1e-3, ("stsb", "lora"): 3e-3})
    assert [(run.seed, run.task, run.lr) for run in runs] == [
        (0, "rte", 1e-3), (0, "stsb", 3e-3), (1, "rte", 1e-3), (1, "stsb", 3e-3),
    ]  # fmt: skip


@given(st.integers(1, 40), st.lists(st.sampled_from(sorted(METHODS)), min_size=1, unique=True))
def test_the_shards_are_the_study(of: int, methods: list[str]) -> None:
    study = rules(methods=tuple(methods))
    parts = [units(study, (number, of)) for number in range(1, of + 1)]
    together = [unit for part in parts for unit in part]
    assert sorted(together) == sorted(units(study))
    assert len(together) == len(set(together))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_settings_of_a_run() -> None:
    study = rules(methods=("deep-lora:paper+r=16",), head="frozen", steps=7, r=4, max_length=33, batch_size=5)
    run = RunSpec("confirm", "rte", "deep-lora:paper+r=16", 48, 3, 5e-3)
    chosen = study.run_settings(run)
    assert (chosen.method, chosen.r, chosen.outer_lr_ratio, chosen.lr) == ("deep-lora", 16, 0.01, 5e-3)
    assert (chosen.shots, chosen.seed, chosen.steps, chosen.batch_size) == (48, 3, 7, 5)
    assert (chosen.max_length, chosen.head, chosen.data) == (33, "frozen", "rte")


# --- rules


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ()}, "empty"),
        ({"methods": ()}, "empty"),
        ({"shots": ()}, "empty"),
        ({"methods": ("lora", "lora")}, "lora more than once"),
        ({"shots": (16, 16)}, "16 more than once"),
        ({"shots": (16, 0)}, "--shots must be at least 1"),
        *(({name: 0}, "at least 1") for name in ("seeds", "budget", "tune_shots", "tune_seeds", "eval_limit")),
        *(({name: 0}, "at least 1") for name in ("tune_limit", "steps", "batch_size", "r", "max_length")),
        ({"max_eval_tokens": 0}, "--max-eval-tokens must be at least 1"),
        ({"head": "fried"}, "--head must be one of"),
        ({"head_lr": -1.0}, "--head-lr"),
        ({"split": "test"}, "--split must be one of evaluation, tuning"),
        ({"draw": "odd"}, "--draw must be one of"),
        ({"precision": "fp16"}, "--precision must be one of"),
        ({"fixed": ("vera",)}, "--fixed must be some of none, lora, dora, got vera"),
        ({"methods": ("none", "lorra")}, "unknown method 'lorra'"),
    ],
)
def test_bad_rules_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        rules(**changes)
    assert says in str(caught.value)


def test_settings_survive_json() -> None:
    study = rules(fixed=("lora",), shots=(16, 64), max_eval_tokens=128, head="frozen", draw="with-replacement")
    assert StudySettings.from_dict(json.loads(json.dumps(study.to_dict()))) == study


def test_settings_of_another_version_are_refused() -> None:
    content = rules().to_dict()
    with pytest.raises(UserError, match=r"another version of rankwise \(unknown settings: flavour\)"):
        StudySettings.from_dict({**content, "flavour": 1})
    del content["model"]
    with pytest.raises(UserError, match="incomplete"):
        StudySettings.from_dict(content)


def test_a_study_grows() -> None:
    old = rules(tasks=("rte",), methods=("none", "lora"), shots=(64,), seeds=2, precision="fp32", fixed=("lora",))
    new = rules(tasks=("stsb", "rte"), methods=("lora", "dora"), shots=(16,), seeds=5, fixed=("lora", "dora"))
    grown = old.extended_by(dataclasses.replace(new, budget=7))
    assert grown.tasks == ("rte", "stsb")
    assert grown.methods == ("none", "lora", "dora")
    assert grown.shots == (16, 64)
    assert (grown.seeds, grown.budget, grown.fixed, grown.precision) == (5, 7, ("lora", "dora"), "fp32")


@given(
    budget=st.integers(1, 9),
    more=st.integers(0, 4),
    method=st.sampled_from(["lora", "lora-plus", "lora-rite", "galore"]),
)
def test_a_larger_budget_keeps_every_rate(budget: int, more: int, method: str) -> None:
    grids = [MethodSpec.parse(method).grid(n) for n in (budget, budget + more)]
    assert set(grids[0]) <= set(grids[1])


def test_a_study_never_shrinks() -> None:
    study = rules(shots=(16, 64), seeds=5)
    fewer = dataclasses.replace(study, tasks=("rte",), methods=("lora",), shots=(16,), seeds=1, budget=1)
    assert study.extended_by(fewer) == study
    assert study.extended_by(study) == study


GROWING = {"tasks", "methods", "shots", "seeds", "budget"}
OTHER = {
    "model": "other", "tune_shots": 8, "tune_seeds": 1, "split": "tuning", "eval_limit": 7,
    "tune_limit": 7, "head": "frozen", "head_start": "random", "head_lr": 0.5, "schedule": "constant", "steps": 9, "batch_size": 3, "r": 3, "max_length": 9,
    "precision": "bf16", "draw": "with-replacement", "max_eval_tokens": 9, "fixed": ("lora",),
}  # fmt: skip


def test_every_rule_is_known_to_the_test_below() -> None:
    names = {field.name for field in dataclasses.fields(StudySettings)}
    assert names - GROWING - set(OTHER) == {"out", "data_root"}


@pytest.mark.parametrize("name", OTHER)
def test_other_rules_are_refused_by_name(name: str) -> None:
    study = rules(precision="fp32")
    with pytest.raises(UserError) as caught:
        study.extended_by(dataclasses.replace(study, **{name: OTHER[name]}))
    message = str(caught.value)
    assert "follows other rules" in message
    assert name in message
    if name != "fixed":
        assert f"{name}: {getattr(study, name)} there, {OTHER[name]} now" in message


# --- presets


@pytest.mark.parametrize("preset", STUDY_PRESETS)
def test_every_preset_is_a_study(preset: str, tmp_path: Path) -> None:
    study = study_settings(str(tmp_path / "study"), {}, preset)
    assert StudySettings.from_dict(study.to_dict()) == study
    runs = confirm_runs(study, {(task, label): study.grid(label)[0] for task in study.tasks for label in study.methods})
    assert len(runs) == len(study.tasks) * len(study.methods) * len(study.shots) * study.seeds
    for run in runs:
        study.run_settings(run)
    assert not [run for task in study.tasks for label in study.methods for run in tuning_runs(study, task, label)]


def test_what_is_given_beside_a_preset_counts(tmp_path: Path) -> None:
    study = study_settings(str(tmp_path / "study"), {"seeds": 2, "model": "mine"}, "icml24-fig6")
    assert (study.seeds, study.model, study.tasks, study.steps) == (2, "mine", ("stsb",), 500)


def test_other_methods_beside_a_preset_are_tuned(tmp_path: Path) -> None:
    """The preset fixes its own methods; those given in their stead it cannot have meant."""
    study = study_settings(str(tmp_path / "study"), {"methods": ("lora", "deep-lora:paper")}, "icml24-fig6")
    assert study.fixed == ("deep-lora:paper",)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model and --task missing"):
        study_settings(str(tmp_path / "study"), {})
    with pytest.raises(UserError, match=r"^--task missing"):
        study_settings(str(tmp_path / "study"), {"model": "m"})
    with pytest.raises(UserError, match="unknown preset 'nature'; expected icml24-table1"):
        study_settings(str(tmp_path / "study"), {}, "nature")


def test_a_study_made_before_schedules_keeps_its_constant_rates() -> None:
    old = rules().to_dict()
    del old["schedule"]
    assert StudySettings.from_dict(old).schedule == "constant"
    assert rules().schedule == "linear"
