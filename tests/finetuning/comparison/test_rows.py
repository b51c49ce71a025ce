"""Which rows of a study count, and the learning rates that they speak for."""

import itertools

import pytest

from rankwise.finetuning.comparison.rows import at_chosen_rate, at_rank, chosen_learning_rate, main_rank
from rankwise.finetuning.comparison.summary import summarize
from tests.finetuning.comparison.study_rows import row, runs, tuning


def test_the_best_mean_wins_and_the_smaller_rate_a_tie() -> None:
    chosen = chosen_learning_rate(
        tuning("lora", {1e-3: [0.5, 0.7], 3e-3: [0.8, 0.4], 1e-2: [0.9, 0.1]}), "stsb", "lora"
    )
    assert (chosen.lr, chosen.score) == (1e-3, pytest.approx(0.6))
    assert [entry.lr for entry in chosen.grid] == [1e-3, 3e-3, 1e-2]
    assert chosen.complete


@pytest.mark.parametrize(("best", "edge"), [(1e-3, True), (3e-3, False), (1e-2, True)])
def test_the_edge_of_the_grid_is_flagged(best: float, edge: bool) -> None:
    rows = tuning("lora", {lr: [0.5 + (lr == best)] for lr in (1e-3, 3e-3, 1e-2)})
    assert chosen_learning_rate(rows, "stsb", "lora").at_edge is edge


def test_one_rate_is_no_grid_and_has_no_edge() -> None:
    assert not chosen_learning_rate(tuning("lora", {1e-3: [0.5]}), "stsb", "lora").at_edge


def test_a_rate_with_a_failed_run_is_out() -> None:
    rows = tuning("lora", {1e-3: [0.5, 0.5], 3e-3: [0.9, None], 1e-2: [0.4, 0.4]})
    chosen = chosen_learning_rate(rows, "stsb", "lora")
    assert chosen.lr == 1e-3
    assert [(entry.mean, entry.runs, entry.failed) for entry in chosen.grid][1] == (None, 2, 1)
    rows[2]["score"], rows[2]["status"] = None, "ok"  # undefined, not failed
    assert chosen_learning_rate(rows, "stsb", "lora").lr == 1e-3


def test_a_rate_below_one_that_failed_is_not_at_the_edge() -> None:
    rows = tuning("lora", {1e-3: [0.5], 3e-3: [0.9], 1e-2: [None]})
    assert not chosen_learning_rate(rows, "stsb", "lora").at_edge


def test_no_rate_where_all_failed_or_nothing_was_tried() -> None:
    failed = chosen_learning_rate(tuning("lora", {1e-3: [None], 3e-3: [None]}), "stsb", "lora")
    assert (failed.lr, failed.score, failed.at_edge, len(failed.grid)) == (None, None, False, 2)
    untried = chosen_learning_rate([row("lora", 0.5)], "stsb", "lora")
    assert (untried.lr, untried.grid, untried.complete) == (None, (), False)


def test_an_unfinished_grid_is_said() -> None:
    assert not chosen_learning_rate(tuning("lora", {1e-3: [0.5, 0.5], 3e-3: [0.6]}), "stsb", "lora").complete


def test_rates_are_per_task_and_on_request_per_number_of_labels() -> None:
    rows = [
        *tuning("lora", {1e-3: [0.5], 3e-3: [0.6]}),
        *tuning("lora", {1e-3: [0.9], 3e-3: [0.1]}, task="rte"),
        *tuning("lora", {1e-3: [0.9], 3e-3: [0.1]}, shots=256),
    ]
    assert chosen_learning_rate(rows, "rte", "lora").lr == 1e-3
    assert chosen_learning_rate(rows, "stsb", "lora").lr == 1e-3  # both numbers of labels
    assert chosen_learning_rate(rows, "stsb", "lora", shots=64).lr == 3e-3


@pytest.mark.parametrize("order", list(itertools.permutations([0, 1, 2])))
def test_of_trials_at_several_rates_the_chosen_one_counts(order: tuple[int, ...]) -> None:
    trials = [row("lora", score, lr=lr) for lr, score in ((1e-3, 0.9), (3e-3, 0.4), (1e-2, 0.8))]
    rows = [*tuning("lora", {1e-3: [0.2], 3e-3: [0.7], 1e-2: [0.1]}), *(trials[i] for i in order)]
    assert [r["score"] for r in at_chosen_rate(rows) if r["phase"] == "confirm"] == [0.4]
    untuned = at_chosen_rate(rows[-3:])
    assert [r["score"] for r in untuned] == [trials[order[-1]]["score"]]  # nothing was tuned: the last one made
    summary = summarize(rows, ["lora"])
    assert [(s["mean"], s["runs"]) for s in summary["scores"]] == [(0.4, 1)]
    assert (summary["counts"]["repeated"], summary["learning_rates"][0]["used"]) == (1, [3e-3])


def test_trials_at_an_older_rate_count_until_they_are_made_anew() -> None:
    rows = [
        *tuning("lora", {1e-3: [0.2], 3e-3: [0.7]}),
        *runs("lora", {0: 0.5, 1: 0.6}, lr=1e-3),
        row("lora", 0.4, lr=3e-3),
    ]
    assert [(r["lr"], r["score"]) for r in at_chosen_rate(rows) if r["phase"] == "confirm"] == [
        (1e-3, 0.6),
        (3e-3, 0.4),
    ]


def test_every_rank_has_its_own_chosen_rate() -> None:
    rows = []
    for r, best in ((4, 1e-3), (8, 3e-3)):
        rows += tuning("lora", {lr: [float(lr == best)] for lr in (1e-3, 3e-3)}, r=r)
        rows += [row("lora", lr, lr=lr, r=r) for lr in (3e-3, 1e-3)]
    assert [(r["r"], r["lr"]) for r in at_chosen_rate(rows) if r["phase"] == "confirm"] == [(4, 1e-3), (8, 3e-3)]


def test_methods_are_compared_at_one_rank() -> None:
    rows = [row(method, r / 100, seed=s, r=r) for method in ("lora", "deep-lora") for s in (0, 1) for r in (8, 64)]
    rows += [row("lora", 0.2, seed=2, r=8), row("vera", 0.3, r=256), row("full", 0.4, r=None)]
    assert main_rank(rows) == 8
    kept = at_rank(rows)
    assert {(r["method"], r["r"]) for r in kept} == {("lora", 8), ("deep-lora", 8), ("vera", 256), ("full", None)}
    assert {r["score"] for r in at_rank(rows, 64) if r["method"] == "lora"} == {0.64}
