"""One run: the rows it is given, what it says about itself, and that nothing but its own settings decides it."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.finetuning.comparison import RunSpec, StudySettings
from rankwise.finetuning.comparison import trial as trial_module
from rankwise.finetuning.comparison.protocol import confirm_runs, tuning_runs
from rankwise.finetuning.comparison.trial import Rows, load_task, run_trial, split_rows, training_rows
from rankwise.finetuning.methods import ADAPTED_OUTPUT, METHODS
from rankwise.finetuning.models import load_model
from rankwise.finetuning.training import predict_rows
from tests.finetuning.comparison.tiny_studies import study, without_measurements
from tests.finetuning.tiny_checkpoint import sentences, write_csv, write_pairs

FIELDS = {
    "format_version", "key", "phase", "task", "method", "shots", "seed", "lr", "steps", "batch_size", "r", "head",
    "status", "error", "score", "before", "seconds", "peak_memory_bytes",
}  # fmt: skip
MORE_WHEN_OK = {
    "metric", "scores", "held_out_rows", "train_rows", "trainable_parameters", "adapter_bytes", "seconds_per_step",
    "ranks", "directions_99", "update_norm",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def confirm(task: str, method: str, *, seed: int = 0, lr: float = 1e-2, shots: int = 8) -> RunSpec:
    return RunSpec("confirm", task, method, shots, seed, lr)


def rows_of(rules: StudySettings, name: str) -> Rows:
    named, task, _ = load_task(rules, name)
    return split_rows(named, rules, task)


def one_named(folder: Path, train: int, evaluation: int) -> None:
    """An RTE of the given sizes, in the format of the GLUE release."""
    (folder / "glue_rte").mkdir(parents=True)
    for file, count, seed in (("train.tsv", train, 1), ("dev.tsv", evaluation, 2)):
        first, second = sentences(count, seed), sentences(count, seed + 10)
        lines = ["index\tsentence1\tsentence2\tlabel"]
        lines += [f"{i}\t{first[i]}\t{second[i]}\t{'not_' * (i % 2)}entailment" for i in range(count)]
        (folder / "glue_rte" / file).write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- which rows


@pytest.mark.parametrize("named", [False, True], ids=["own table", "official split"])
def test_the_three_kinds_of_rows_never_meet(tiny: SimpleNamespace, tmp_path: Path, named: bool) -> None:
    one_named(tmp_path / "data", 60, 30)
    task = "rte" if named else tiny.pairs
    rules = study(tiny, tmp_path, tasks=(task,), data_root=str(tmp_path / "data"))
    rows = rows_of(rules, task)
    pool, tuning, evaluation = set(rows.pool), set(rows.tuning), set(rows.evaluation)
    assert not pool & tuning
    assert not pool & evaluation
    assert not tuning & evaluation
    assert len(pool) + len(tuning) + len(evaluation) == (90 if named else 40)
    assert len(tuning) == (12 if named else 8)
    if named:
        assert evaluation == set(range(60, 90))


def test_which_rows_are_set_apart_is_no_matter_of_the_run(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Other methods, seeds, labels, steps: the same held-out rows."""
    rules = study(tiny, tmp_path)
    other = study(tiny, tmp_path, methods=("dora",), shots=(4, 16), seeds=7, steps=9, head="frozen", budget=3)
    assert rows_of(rules, tiny.pairs) == rows_of(other, tiny.pairs)


def test_limits_on_held_out_rows(tiny: SimpleNamespace, tmp_path: Path) -> None:
    whole = rows_of(study(tiny, tmp_path), tiny.pairs)
    few = rows_of(study(tiny, tmp_path, eval_limit=3, tune_limit=5), tiny.pairs)
    assert len(few.evaluation) == 3
    assert len(few.tuning) == 5
    less = rows_of(study(tiny, tmp_path, eval_limit=3), tiny.pairs)
    assert set(less.evaluation) < set(whole.evaluation)
    assert less.pool == whole.pool


def test_long_held_out_rows_are_left_out(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Tokens of both texts together with the special ones; the pool keeps its long rows, as in the paper's code."""
    rules = study(tiny, tmp_path)
    whole = rows_of(rules, tiny.pairs)
    short = rows_of(dataclasses.replace(rules, max_eval_tokens=13), tiny.pairs)
    assert (short.pool, short.tuning) == (whole.pool, whole.tuning)
    _, task, _ = load_task(rules, tiny.pairs)
    # every word of the tiny vocabulary is one token: [CLS] a [SEP] b [SEP]
    tokens = {p: sum(len(task.table.rows[p][k].split()) for k in ("text", "text_pair")) + 3 for p in whole.evaluation}
    assert short.evaluation == [p for p in whole.evaluation if tokens[p] <= 13]
    assert 0 < len(short.evaluation) < len(whole.evaluation)


def test_no_held_out_row_left_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--max-eval-tokens"):
        rows_of(study(tiny, tmp_path, max_eval_tokens=2), tiny.pairs)


@given(st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_trial_rows_without_replacement(shots: int, seed: int) -> None:
    pool = list(range(100, 140, 2))
    drawn = training_rows(pool, shots, seed, "without-replacement")
    assert len(set(drawn)) == len(drawn) == shots
    assert set(drawn) <= set(pool)
    assert drawn == training_rows(pool, shots, seed, "without-replacement")


def test_trial_rows_with_replacement() -> None:
    pool = [10, 20, 30]
    drawn = training_rows(pool, 300, 4, "with-replacement")
    assert set(drawn) == set(pool)
    assert drawn == training_rows(pool, 300, 4, "with-replacement")
    assert drawn != training_rows(pool, 300, 5, "with-replacement")
    counts = np.bincount(np.array(drawn) // 10)[1:]
    assert counts.min() > 70  # uniform: 100 ± 8


def test_fewer_labels_are_a_part_of_more() -> None:
    """The same seed with more labels keeps the rows it had: the curve over labels is not another draw at each point."""
    pool = list(range(50))
    draws = [set(training_rows(pool, shots, 3, "without-replacement")) for shots in (4, 16, 50)]
    assert draws[0] < draws[1] < draws[2] == set(pool)


def test_too_few_rows(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="9 labelled rows; a comparison needs at least 10"):
        few = str(write_pairs(tmp_path / "few.csv", 9))
        rows_of(study(tiny, tmp_path, tasks=(few,)), few)
    with pytest.raises(UserError, match="25 labelled rows asked for, 24 to draw from; lower --shots"):
        training_rows(rows_of(study(tiny, tmp_path), tiny.pairs).pool, 25, 0, "without-replacement")
    ten = str(write_pairs(tmp_path / "ten.csv", 10))
    rows = rows_of(study(tiny, tmp_path, tasks=(ten,)), ten)
    assert (len(rows.pool), len(rows.tuning), len(rows.evaluation)) == (6, 2, 2)


def test_all_methods_of_a_trial_get_the_same_rows(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Two trials and the tuning of two methods: rows depend on the seed, and on nothing else."""
    methods = ("lora", "deep-lora:random")
    rules = study(tiny, tmp_path, methods=methods, steps=1, batch_size=2)
    runs = confirm_runs(rules, {(tiny.pairs, m): 1e-3 for m in methods})
    runs += [run for method in methods for run in tuning_runs(rules, tiny.pairs, method)]
    drawn: dict[int, set[str]] = {}
    for run in runs:
        row = run_trial(rules, run)
        assert row["status"] == "ok", row["error"]
        drawn.setdefault(run.seed, set()).add(row["train_rows"])
    assert {len(hashes) for hashes in drawn.values()} == {1}
    assert len(set.union(*drawn.values())) == len(drawn) == 3


@pytest.mark.parametrize(
    ("phase", "split", "expected"),
    [("confirm", "evaluation", "evaluation"), ("confirm", "tuning", "tuning"), ("tune", "evaluation", "tuning")],
)
def test_only_trials_see_the_evaluation_rows(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, split: str, expected: str
) -> None:
    rules = study(tiny, tmp_path, steps=1, split=split)
    seen: list[list[int]] = []

    def watched(task: Any, model: Any, positions: Any) -> Any:
        seen.append(list(positions))
        return predict_rows(task, model, positions)

    monkeypatch.setattr(trial_module, "predict_rows", watched)
    row = run_trial(rules, RunSpec(phase, tiny.pairs, "lora", 8, 0, 1e-3))
    assert row["status"] == "ok", row["error"]
    wanted = getattr(rows_of(rules, tiny.pairs), expected)
    assert seen
    assert all(positions == wanted for positions in seen)
    assert row["held_out_rows"] == len(wanted)


# --- what a row says


@pytest.mark.parametrize("method", METHODS)
def test_the_row_of_every_method(tiny: SimpleNamespace, tmp_path: Path, method: str) -> None:
    rules = study(tiny, tmp_path, tasks=(tiny.classes,), methods=(method,), steps=2)
    row = run_trial(rules, confirm(tiny.classes, method))
    assert row["status"] == "ok", row["error"]
    assert set(row) >= FIELDS | MORE_WHEN_OK
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["error"] is None
    assert (row["format_version"], row["r"], row["steps"], row["batch_size"], row["head"]) == (1, 4, 2, 4, "trained")
    assert row["key"] == f"confirm|{tiny.classes}|{method}|8|0|0.01"
    assert row["metric"] == "accuracy"
    assert row["score"] == row["scores"]["accuracy"]
    assert 0 <= row["score"] <= 1
    assert row["adapter_bytes"] >= 4 * 66  # the head at least
    assert row["trainable_parameters"] >= 66
    assert row["seconds"] >= row["seconds_per_step"] > 0
    if row["ranks"] is not None:
        assert len(row["ranks"]) == 13
        widest = 32 if method == "full-width" else 8  # AdaLoRA starts at 1.5·r, PiSSA and its kin have 2·r
        assert all(0 <= rank <= widest for rank in row["ranks"])
        assert row["update_norm"] >= 0


def test_the_row_of_a_deep_lora_solved_in_closed_form(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Pair similarity with few rows: no optimizer step, and the row says what was decided."""
    rules = study(tiny, tmp_path, methods=("deep-lora",))
    row = run_trial(rules, confirm(tiny.pairs, "deep-lora"))
    assert row["status"] == "ok", row["error"]
    assert set(row) >= FIELDS | MORE_WHEN_OK
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["metric"] == "spearman"


def test_the_sizes_are_those_of_the_method(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """By hand: 12 layers (8 of 32×32, 2 of 48×32, 2 of 32×48) at r = 4, float32."""
    rules = study(tiny, tmp_path, methods=("none", "lora", "full", "galore"), steps=1)
    found = {m: run_trial(rules, confirm(tiny.pairs, m)) for m in rules.methods}
    lora = 8 * 4 * 64 + 4 * 4 * 80
    assert (found["none"]["trainable_parameters"], found["none"]["adapter_bytes"]) == (0, 0)
    assert found["lora"]["trainable_parameters"] == lora
    assert 4 * lora < found["lora"]["adapter_bytes"] < 4 * lora + 8_000
    weights = sum(p.numel() for p in load_model(load_task(rules, tiny.pairs)[1], tiny.model, None).parameters())
    for method in ("full", "galore"):
        assert (found[method]["trainable_parameters"], found[method]["adapter_bytes"]) == (weights, 4 * weights)


def test_an_option_of_the_method_is_in_its_row(tiny: SimpleNamespace, tmp_path: Path) -> None:
    label = "lora:r=2+head=frozen"
    rules = study(tiny, tmp_path, tasks=(tiny.classes,), methods=("lora", label), steps=1)
    rows = [run_trial(rules, confirm(tiny.classes, method)) for method in rules.methods]
    assert [(row["r"], row["head"], row["method"]) for row in rows] == [(4, "trained", "lora"), (2, "frozen", label)]
    assert rows[0]["trainable_parameters"] - 66 == 2 * rows[1]["trainable_parameters"]


def test_none_is_the_pretrained_model(tiny: SimpleNamespace, tmp_path: Path) -> None:
    rules = study(tiny, tmp_path, methods=("none",))
    row = run_trial(rules, confirm(tiny.pairs, "none"))
    _, task, _ = load_task(rules, tiny.pairs)
    held_out = rows_of(rules, tiny.pairs).evaluation
    model = load_model(task, tiny.model, None).eval()
    expected = task.score(predict_rows(task, model, held_out), task.targets[held_out])
    assert row["scores"] == expected
    assert row["score"] == expected["spearman"]
    other = run_trial(rules, confirm(tiny.pairs, "none", seed=1))
    assert other["score"] == row["score"]


# --- what goes wrong is in the row


@pytest.mark.parametrize(
    ("task", "steps", "method"),
    [
        *((task, steps, "lora") for task in ("pairs", "classes", "ratings") for steps in (1, 3)),
        ("classes", 1, "deep-lora:train"),
        ("pairs", 3, "deep-lora:train"),
        ("classes", 3, "lora-rite"),
    ],
)
def test_a_run_that_diverges_is_a_failed_row(
    tiny: SimpleNamespace, tmp_path: Path, task: str, steps: int, method: str
) -> None:
    """After one step of 1e30 the weights are finite and the predictions are not."""
    name = getattr(tiny, task)
    rules = study(tiny, tmp_path, tasks=(name,), methods=(method,), steps=steps)
    row = run_trial(rules, confirm(name, method, lr=1e30))
    json.dumps(row, allow_nan=False)
    assert (row["status"], row["score"]) == ("failed", None)
    assert "diverged" in row["error"] or "NaN or infinite" in row["error"]
    assert set(row) >= FIELDS


@pytest.mark.parametrize("error", [UserError("no such thing"), ValueError("odd"), MemoryError(), RuntimeError("")])
def test_a_run_that_raises_is_a_failed_row(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(trial_module, "adapt", fail)
    row = run_trial(study(tiny, tmp_path), confirm(tiny.pairs, "lora"))
    assert row["status"] == "failed"
    assert row["score"] is None
    expected = "no such thing" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    assert row["error"] == expected
    assert set(row) >= FIELDS
    json.dumps(row, allow_nan=False)


def test_numbers_that_json_cannot_hold_fail_the_run(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that could not be written would stop the study."""
    _, task, _ = load_task(study(tiny, tmp_path), tiny.pairs)
    monkeypatch.setattr(type(task), "score", lambda self, p, t: {"spearman": math.nan, "pearson": math.inf})
    row = run_trial(study(tiny, tmp_path, steps=1), confirm(tiny.pairs, "lora"))
    json.dumps(row, allow_nan=False)
    assert row["status"] == "failed"
    assert row["score"] is None
    assert "diverged" in row["error"]


def test_ctrl_c_is_no_failed_row(tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial_module, "adapt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_trial(study(tiny, tmp_path), confirm(tiny.pairs, "lora"))


def test_an_undefined_score_is_null(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """One held-out row has no correlation: the run is fine, its score is none."""
    rules = study(tiny, tmp_path, methods=("none",), eval_limit=1)
    row = run_trial(rules, confirm(tiny.pairs, "none"))
    assert (row["status"], row["score"]) == ("ok", None)


# --- nothing but the settings decides


METHODS_TO_REPEAT = ("lora", "deep-lora", "deep-lora:train", "vera", "adalora")


@pytest.fixture(scope="module")
def first_time(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of several methods and tasks, each done once in this order."""
    rules = study(
        tiny, tmp_path_factory.mktemp("s"), tasks=(tiny.pairs, tiny.classes), methods=METHODS_TO_REPEAT, steps=3
    )
    runs = [confirm(tiny.pairs, method) for method in METHODS_TO_REPEAT] + [confirm(tiny.classes, "lora")]
    return {"rules": rules, "runs": runs, "rows": {run.key: run_trial(rules, run) for run in runs}}


def test_the_order_of_runs_does_not_matter(first_time: dict[str, Any]) -> None:
    """Backwards, with another random state and somebody else's run before each."""
    rules, runs = first_time["rules"], first_time["runs"]
    for number, run in enumerate(reversed(runs)):
        torch.manual_seed(number)
        np.random.seed(number)
        again = run_trial(rules, run)
        assert again["status"] == "ok", again["error"]
        assert without_measurements(again) == without_measurements(first_time["rows"][run.key])


def test_different_methods_and_seeds_do_differ(tiny: SimpleNamespace, first_time: dict[str, Any]) -> None:
    """Else the test above would hold for a harness that trains nothing."""
    rows = [row for row in first_time["rows"].values() if row["task"] == tiny.pairs]
    other = run_trial(first_time["rules"], confirm(tiny.pairs, "lora", seed=1))
    outcomes = {(row["score"], row["update_norm"], row.get("final_loss")) for row in (*rows, other)}
    assert len(outcomes) == len(rows) + 1


def test_texts_longer_than_the_model_reads(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """64 positions, 128 asked for: cut, and not an index error in the middle of a study."""
    texts = [" ".join(["good bad"] * 50) + f" {word}" for word in sentences(20, 9)]
    long = str(write_csv(tmp_path / "long.csv", ["text", "label"], [(t, "ab"[i % 2]) for i, t in enumerate(texts)]))
    rules = study(tiny, tmp_path, tasks=(long,), steps=1)
    row = run_trial(rules, confirm(long, "lora"))
    assert row["status"] == "ok", row["error"]


@pytest.mark.parametrize(
    ("label", "fixed", "rate"),
    [
        ("deep-lora:train", True, METHODS["deep-lora"].lr * ADAPTED_OUTPUT),
        ("deep-lora:train+lr=2e-3", True, 2e-3),
        ("deep-lora:train", False, 7e-3),
        ("lora", True, METHODS["lora"].lr),
    ],
)
def test_a_fixed_method_runs_at_its_default_rate_for_the_task(
    tiny: SimpleNamespace, tmp_path: Path, label: str, fixed: bool, rate: float
) -> None:
    rules = study(tiny, tmp_path, methods=(label,), fixed=(label,) if fixed else (), steps=1, batch_size=2)
    lr = rules.grid(label)[0] if fixed else rate
    row = run_trial(rules, RunSpec("confirm", tiny.pairs, label, 8, 0, lr))
    assert row["status"] == "ok", row["error"]
    assert row["lr"] == rate
