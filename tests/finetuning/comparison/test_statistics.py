"""The numbers that decide: against hand-made cases, exhaustive enumeration, scipy, and simulation."""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rankwise.finetuning.comparison.statistics import (
    best_baseline,
    cell_gain,
    compare,
    harm,
    mean_interval,
    mean_scores,
    paired_differences,
    pooled_gain,
    rank_histogram,
    resources,
    score_against_rank,
    strict_baselines,
    tuned_baselines,
    wilcoxon_p,
)
from rankwise.finetuning.comparison.summary import summarize
from tests.finetuning.comparison.study_rows import METHODS, row, runs, tuning

# --- the interval ----------------------------------------------------------------------------------------------------


def exhaustive_interval(values: Sequence[float]) -> tuple[float, float]:
    """The same interval from all nⁿ bootstrap samples instead of a random draw of them."""
    x = np.array(values)
    n = len(x)
    means = np.array([x[list(index)].mean() for index in itertools.product(range(n), repeat=n)])
    stretch = math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.975, n - 1) / scipy.stats.norm.ppf(0.975)
    low, high = (np.quantile(means, [0.025, 0.975]) - x.mean()) * stretch + x.mean()
    return float(low), float(high)


@pytest.mark.parametrize("values", [[0.0, 0.01, 0.03, 0.02, -0.01], [0.1, 0.5, 0.2, 0.9, 0.35], [1.0, 0.0, 0.0, 0.0]])
def test_interval_agrees_with_the_full_enumeration(values: list[float]) -> None:
    found, exact = mean_interval([values], resamples=200_000), exhaustive_interval(values)
    assert found == pytest.approx(exact, abs=0.03 * (exact[1] - exact[0]))


def test_interval_tends_to_scipys_bootstrap_and_to_the_t_interval() -> None:
    values = np.random.default_rng(3).normal(0.1, 1, size=400)
    found = mean_interval([values])
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(0)
    ).confidence_interval
    student = scipy.stats.t.interval(0.95, 399, values.mean(), values.std(ddof=1) / 20)
    assert found == pytest.approx(tuple(theirs), abs=0.006)
    assert found == pytest.approx(student, abs=0.006)


@pytest.mark.parametrize("strata", [1, 4])
def test_interval_covers_what_it_says(strata: int) -> None:
    """600 studies of 5 seeds: 95 % coverage ± 3 standard errors (.027); plain percentiles give .84 with one stratum."""
    generator = np.random.default_rng(11)
    held = 0
    for study in range(600):
        values = [generator.normal(0, scale, size=5) for scale in np.linspace(0.5, 2, strata)]
        low, high = mean_interval(values, resamples=600, seed=study) or (1.0, -1.0)
        held += low <= 0 <= high
    assert 0.92 < held / 600 < 0.98


def test_interval_weighs_strata_alike_and_resamples_inside_them() -> None:
    # far apart, constant inside: nothing to be unsure of
    assert mean_interval([[0.0, 0.0], [1.0] * 8]) == pytest.approx((0.5, 0.5))


def test_interval_needs_two_values() -> None:
    assert mean_interval([]) is None
    assert mean_interval([[0.1]]) is None
    assert mean_interval([[0.1, 0.2], [0.1]]) is None


# --- Wilcoxon --------------------------------------------------------------------------------------------------------


def brute_force_wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p over all 2ⁿ sign assignments."""
    ranks = scipy.stats.rankdata(np.abs(differences))
    centre = ranks.sum() / 2
    observed = abs(sum(r for r, d in zip(ranks, differences, strict=True) if d > 0) - centre)
    signs = itertools.product((0, 1), repeat=len(ranks))
    return float(np.mean([abs(np.dot(sign, ranks) - centre) >= observed - 1e-9 for sign in signs]))


@pytest.mark.parametrize(
    "differences",
    [
        [0.01, 0.02, 0.03, 0.04, 0.05],
        [0.01, -0.02, 0.03, 0.04, 0.05, 0.07],
        [-0.1, 0.2, -0.3, 0.4, -0.5, 0.6, -0.7, 0.8],
        [0.02, 0.02, -0.02, 0.04, 0.04, 0.01, 0.03],  # ties
    ],
)
def test_wilcoxon_agrees_with_all_sign_assignments(differences: list[float]) -> None:
    assert wilcoxon_p(differences) == pytest.approx(brute_force_wilcoxon(differences))


def test_wilcoxon_is_silent_where_it_knows_nothing() -> None:
    assert wilcoxon_p([0.0] * 20) is None
    assert wilcoxon_p([0.1, 0.2, 0.3, 0.4]) is None
    assert wilcoxon_p([0.1, 0.2, 0.3, 0.4, 0.0]) is None  # four are left
    assert wilcoxon_p([0.1, 0.2, 0.3, 0.4, 0.5, 0.0]) == pytest.approx(2 / 2**5)


def test_equal_differences_share_a_rank_whatever_their_last_bit() -> None:
    differences = [0.3 - 0.2, 0.4 - 0.3, 0.1, -0.2, 0.9 - 0.7, 0.5]
    assert len({abs(d) for d in differences}) > 3  # three sizes, told apart by rounding alone
    assert wilcoxon_p(differences) == pytest.approx(brute_force_wilcoxon([round(d, 9) for d in differences]))


# --- pairing ---------------------------------------------------------------------------------------------------------


def test_pairs_are_runs_with_the_same_task_labels_and_seed() -> None:
    rows = [
        *runs("deep-lora", {0: 0.5, 1: 0.6, 2: 0.7, 5: 0.9}),
        *runs("lora", {3: 0.1, 2: 0.5, 1: 0.6, 0: 0.4}),
        *runs("lora", {0: 0.0, 1: 0.0}, shots=16),
        *runs("deep-lora", {0: 0.3}, task="rte"),
        *runs("lora", {0: 0.2}, task="rte"),
        *tuning("lora", {1e-3: [0.99]}, shots=64),
        row("deep-lora", 0.99, phase="tune", seed=100),
    ]
    cells = paired_differences(rows, "deep-lora", "lora")
    assert [(c.task, c.shots, c.seeds) for c in cells] == [("rte", 64, (0,)), ("stsb", 64, (0, 1, 2))]
    assert cells[1].differences == pytest.approx((0.1, 0.0, 0.2))


def test_numbers_of_one_cell_by_hand() -> None:
    rows = [*runs("deep-lora", {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.3}), *runs("lora", {0: 0.4, 1: 0.6, 2: 0.5, 3: 0.4})]
    gain = cell_gain(*paired_differences(rows, "deep-lora", "lora"))
    differences = [0.1, 0.0, 0.2, -0.1]
    assert (gain.wins, gain.ties, gain.losses, gain.pairs) == (2, 1, 1, 4)
    assert gain.mean == pytest.approx(0.05)
    assert gain.standard_error == pytest.approx(scipy.stats.sem(differences))
    assert (gain.method_mean, gain.baseline_mean) == pytest.approx((0.525, 0.475))
    assert gain.wilcoxon_p is None
    assert gain.interval is not None
    assert gain.interval[0] < 0.05 < gain.interval[1]


def test_a_single_pair_has_no_interval() -> None:
    gain = cell_gain(*paired_differences([row("deep-lora", 0.5), row("lora", 0.4)], "deep-lora", "lora"))
    assert (gain.standard_error, gain.interval, gain.wilcoxon_p) == (None, None, None)
    assert gain.mean == pytest.approx(0.1)


@pytest.mark.parametrize(
    "spoiled",
    [{"status": "failed", "score": None}, {"status": "failed"}, {"score": None}, {"score": math.nan}],
)
def test_runs_without_a_score_are_no_pairs(spoiled: dict[str, Any]) -> None:
    rows = [*runs("deep-lora", {0: 0.5, 1: 0.6}), *runs("lora", {0: 0.4, 1: 0.4})]
    rows[1] = {**rows[1], **spoiled}
    (cell,) = paired_differences(rows, "deep-lora", "lora")
    assert cell.seeds == (0,)


def test_of_repeated_rows_the_last_counts() -> None:
    rows = [row("deep-lora", 0.9), row("lora", 0.4), row("deep-lora", 0.5)]
    assert paired_differences(rows, "deep-lora", "lora")[0].differences == pytest.approx((0.1,))


def test_pooled_weighs_cells_alike() -> None:
    rows = [
        *runs("lora", dict.fromkeys(range(10), 0.5)),
        *runs("deep-lora", dict.fromkeys(range(10), 0.6)),
        *runs("lora", {0: 0.5, 1: 0.5}, task="rte"),
        *runs("deep-lora", {0: 0.2, 1: 0.2}, task="rte"),
    ]
    gain = pooled_gain(paired_differences(rows, "deep-lora", "lora"))
    assert gain is not None
    assert gain.mean == pytest.approx((0.1 - 0.3) / 2)  # the mean of all pairs is .033
    assert (gain.cells, gain.tasks, gain.pairs, gain.wins, gain.losses) == (2, 2, 12, 10, 2)
    assert gain.interval == pytest.approx((-0.1, -0.1))  # seeds agree on these tasks …
    assert gain.new_task_interval is not None
    assert gain.new_task_interval[0] < -0.5 < 0.3 < gain.new_task_interval[1]  # … another task may go either way


def test_cells_with_one_pair_are_left_out_of_the_pooled_mean() -> None:
    rows = [*runs("lora", {0: 0.5, 1: 0.5}), *runs("deep-lora", {0: 0.6, 1: 0.7})]
    rows += [row("lora", 0.5, task="rte"), row("deep-lora", 0.0, task="rte")]
    gain = pooled_gain(paired_differences(rows, "deep-lora", "lora"))
    assert gain is not None
    assert (gain.cells, gain.cells_left_out, gain.mean) == (1, 1, pytest.approx(0.15))
    alone = pooled_gain(paired_differences(rows[-2:], "deep-lora", "lora"))
    assert alone is not None
    assert (alone.mean, alone.interval, alone.cells_left_out) == (pytest.approx(-0.5), None, 0)
    assert pooled_gain([]) is None


# --- properties ------------------------------------------------------------------------------------------------------

SCORE = st.integers(-50, 50).map(lambda n: 0.5 + n / 1000)


@st.composite
def studies(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of three methods with holes and failures."""
    rows = []
    for task, shots, seed, method in itertools.product(("a", "b"), (16, 64), range(3), ("deep-lora", "lora", "none")):
        kind = draw(st.sampled_from(("ok", "ok", "ok", "ok", "missing", "failed")))
        if kind != "missing":
            score = draw(SCORE) if kind == "ok" else None
            rows.append(row(method, score, task=task, shots=shots, seed=seed, status=kind))
    for lr in (1e-3, 3e-3):
        rows += tuning("lora", {lr: [draw(SCORE), draw(SCORE)]}, task="a")
    return rows


@given(studies(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(rows: list[dict[str, Any]], random: Any) -> None:
    methods = ["none", "lora", "deep-lora"]
    first = summarize(rows, methods)
    shuffled = list(rows)
    random.shuffle(shuffled)
    second = summarize(shuffled, methods)
    key = json.dumps
    assert sorted(map(key, first.pop("failures"))) == sorted(map(key, second.pop("failures")))
    assert first == second


@given(studies())
def test_repeating_rows_changes_nothing(rows: list[dict[str, Any]]) -> None:
    assert summarize(rows + rows, METHODS) == summarize(rows, METHODS)


@given(studies())
def test_swapping_sides_negates(rows: list[dict[str, Any]]) -> None:
    there, back = (compare(rows, a, b) for a, b in (("deep-lora", "lora"), ("lora", "deep-lora")))
    assert len(there.cells) == len(back.cells)
    pooled = [(there.overall, back.overall)] if there.overall and back.overall else []
    for ours, theirs in [*zip(there.cells, back.cells, strict=True), *pooled]:
        assert ours.mean == pytest.approx(-theirs.mean, abs=1e-12)
        assert (ours.wins, ours.ties, ours.losses) == (theirs.losses, theirs.ties, theirs.wins)
        assert ours.wilcoxon_p == pytest.approx(theirs.wilcoxon_p)
        if ours.interval is not None:
            assert theirs.interval is not None
            assert ours.interval == pytest.approx((-theirs.interval[1], -theirs.interval[0]), abs=1e-12)


@given(studies(), st.data())
def test_a_missing_row_only_shrinks_the_pairs(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    if not rows:
        return
    lost = data.draw(st.integers(0, len(rows) - 1))
    before = {(c.task, c.shots): c for c in paired_differences(rows, "deep-lora", "lora")}
    after = {(c.task, c.shots): c for c in paired_differences(rows[:lost] + rows[lost + 1 :], "deep-lora", "lora")}
    assert set(after) <= set(before)
    for cell, kept in after.items():
        pairs = dict(zip(before[cell].seeds, before[cell].differences, strict=True))
        assert set(kept.seeds) <= set(pairs)
        assert kept.differences == tuple(pairs[seed] for seed in kept.seeds)


@given(studies())
def test_a_shift_of_all_scores_shifts_no_gain(rows: list[dict[str, Any]]) -> None:
    moved = [{**r, "score": None if r["score"] is None else r["score"] + 0.25} for r in rows]
    for one, other in zip(
        compare(rows, "deep-lora", "lora").cells, compare(moved, "deep-lora", "lora").cells, strict=True
    ):
        assert one.mean == pytest.approx(other.mean, abs=1e-12)
        assert one.interval == pytest.approx(other.interval, abs=1e-12)


# --- baselines ---------------------------------------------------------------------------------------------------------


def test_the_baseline_is_chosen_without_the_evaluation_rows() -> None:
    rows = [
        *tuning("lora", {1e-3: [0.5], 3e-3: [0.8]}),
        *tuning("rslora", {1e-3: [0.7], 3e-3: [0.6]}),
        *runs("lora", {0: 0.1, 1: 0.1}),
        *runs("rslora", {0: 0.9, 1: 0.9}),
        *runs("deep-lora", {0: 0.5, 1: 0.5}),
    ]
    assert best_baseline(rows, "stsb", ["lora", "rslora", "lora-plus"]) == "lora"
    assert best_baseline(rows, "rte", ["lora", "rslora"]) is None
    assert tuned_baselines(rows, ["lora", "rslora"]) == {("stsb", 64): "lora"}
    assert strict_baselines(rows, ["lora", "rslora"]) == {("stsb", 64): "rslora"}
    tuned, strict = summarize(rows, ["lora", "rslora", "deep-lora"])["comparisons"][:2]
    assert (tuned["kind"], tuned["overall"]["mean"]) == ("tuned-best", pytest.approx(0.4))
    assert (strict["kind"], strict["overall"]["mean"]) == ("strict-best", pytest.approx(-0.4))


def test_the_strict_baseline_is_compared_on_shared_seeds() -> None:
    # rsLoRA has only run the lucky seed yet
    rows = [*runs("lora", {0: 0.9, 1: 0.1}), *runs("rslora", {0: 0.8})]
    assert strict_baselines(rows, ["lora", "rslora"]) == {("stsb", 64): "lora"}


def test_the_strict_gain_is_never_above_one_against_a_single_candidate() -> None:
    generator = np.random.default_rng(0)
    rows = [
        r
        for method in ("lora", "rslora", "lora-plus", "deep-lora")
        for task in "ab"
        for r in runs(method, dict(enumerate(generator.normal(0.5, 0.1, 6))), task=task)
    ]
    by_kind = {c["label"]: c for c in summarize(rows, ["lora", "rslora", "lora-plus", "deep-lora"])["comparisons"]}
    strict = next(c for c in by_kind.values() if c["kind"] == "strict-best")
    for single in (c for c in by_kind.values() if c["kind"] == "single"):
        assert strict["overall"]["mean"] <= single["overall"]["mean"] + 1e-12


# --- harm, resources, ranks ------------------------------------------------------------------------------------------


def test_harm_is_paired_by_seed_and_names_the_worst_task() -> None:
    rows = [
        *runs("none", {0: 0.5, 1: 0.7}),
        *runs("lora", {0: 0.6, 1: 0.8, 2: 0.0}),
        *runs("none", {0: 0.5, 1: 0.5}, task="rte"),
        *runs("lora", {0: 0.2, 1: 0.2}, task="rte"),
        *runs("none", {0: 0.5}, shots=16),
        *runs("lora", {0: 0.4}, shots=16),
    ]
    small, large = harm(rows, "lora")
    assert (small.shots, small.gain.mean, small.gain.interval) == (16, pytest.approx(-0.1), None)
    assert (large.shots, large.gain.mean, large.gain.tasks) == (64, pytest.approx((0.1 - 0.3) / 2), 2)
    assert (large.worst_task, large.worst_mean) == ("rte", pytest.approx(-0.3))
    assert harm(rows[2:5], "lora") == []


def test_resources_are_medians_of_successful_runs() -> None:
    rows = [row("lora", 0.5, seed=seed, seconds=seconds) for seed, seconds in enumerate((1.0, 2.0, 30.0))]
    rows.append(row("lora", None, seed=3, status="failed", seconds=1000.0))
    rows += tuning("lora", {1e-3: [0.5] * 9}, seconds=1000.0)
    found = resources(rows, "lora")
    assert (found.runs, found.seconds, found.peak_memory_bytes, found.adapter_bytes) == (3, 2.0, None, 4000)
    assert resources([], "lora").seconds is None


def test_rank_histogram_counts_every_layer_of_every_run() -> None:
    rows = [row("lora", 0.5, seed=0, ranks=[3, 1, 3]), row("lora", 0.5, seed=1, ranks=[1, 0]), row("dora", 0.5)]
    assert rank_histogram([*rows, *rows], "lora") == {0: 1, 1: 2, 3: 2}
    assert rank_histogram([{**rows[0], "ranks": None}], "lora") == {}


def test_score_against_rank_uses_the_runs_that_exist_at_every_rank() -> None:
    rows = [row("lora", 0.5 + r / 100 + seed / 10, seed=seed, r=r) for r in (4, 8) for seed in range(3)]
    rows.append(row("lora", 9.0, seed=3, r=4))
    rows.append(row("dora", 0.5))
    points = score_against_rank(rows, ["lora", "dora"])
    assert [(p.method, p.r, p.runs) for p in points] == [("lora", 4, 3), ("lora", 8, 3)]
    assert [p.mean for p in points] == pytest.approx([0.64, 0.68])
    single = score_against_rank([r for r in rows if r["seed"] == 0], ["lora"])
    assert [(p.runs, p.interval) for p in single] == [(1, None), (1, None)]


def test_variants_that_differ_in_r_alone_are_one_line() -> None:
    rows = [row("lora", 0.5), row("lora:r=16", 0.6, r=16), row("deep-lora:x+r=4", 0.7, r=4), row("deep-lora:x", 0.8)]
    points = score_against_rank(rows, ["lora", "lora:r=16", "deep-lora:x", "deep-lora:x+r=4", "deep-lora"])
    assert [(p.method, p.r, p.mean) for p in points] == [
        ("lora", 8, 0.5), ("lora", 16, 0.6), ("deep-lora:x", 4, 0.7), ("deep-lora:x", 8, 0.8),
    ]  # fmt: skip


def test_mean_scores_by_hand() -> None:
    found = mean_scores([*runs("lora", {0: 0.4, 1: 0.6}), *runs("lora", {0: 0.9}, shots=16)], "lora")
    assert [(s.shots, s.runs, s.mean) for s in found] == [(16, 1, 0.9), (64, 2, 0.5)]
    assert found[0].interval is None
    assert [s.seconds for s in found] == [2.0, 2.0]


# --- the whole -------------------------------------------------------------------------------------------------------
