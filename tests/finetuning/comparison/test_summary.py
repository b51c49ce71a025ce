"""The whole study: its dictionary, its sentence, its table."""

import json

import pytest

from rankwise.finetuning.comparison.rows import (
    method_label,
)
from rankwise.finetuning.comparison.summary import headline, main_comparison, summarize, summary_lines
from tests.finetuning.comparison.study_rows import METHODS, runs, small_study


def test_summary_of_a_small_study() -> None:
    summary = summarize(small_study(), METHODS)
    assert json.loads(json.dumps(summary, allow_nan=False))["target"] == "deep-lora"
    assert summary["best_baseline"] == {"rte": "lora", "stsb": "lora"}
    main = main_comparison(summary)
    assert main is not None
    assert main["kind"] == "tuned-best"
    # .031 is the mean of .030, .031, .032
    assert main["overall"]["mean"] == pytest.approx((3 * 0.031 - 0.01) / 4)
    assert {gain["task"]: gain["mean"] for gain in main["per_task"]} == pytest.approx({"rte": 0.0105, "stsb": 0.031})
    assert {gain["shots"]: gain["mean"] for gain in main["per_shots"]} == pytest.approx({16: 0.0105, 64: 0.031})
    assert summary["counts"]["missing"] == summary["counts"]["failed"] == 0
    chosen = {(e["task"], e["method"]): (e["lr"], e["at_edge"], e["used"]) for e in summary["learning_rates"]}
    assert chosen["stsb", "lora"] == (1e-3, False, [1e-3])
    assert chosen["stsb", "lora-plus"] == (3e-3, True, [3e-3])
    assert chosen["stsb", "deep-lora"] == (None, False, [1e-3])


def test_missing_and_failed_runs_are_counted() -> None:
    rows = small_study()
    lost = rows.pop()
    rows[-1] = {**rows[-1], "status": "failed", "score": None, "error": "out of memory"}
    rows[-2] = {**rows[-2], "score": None}
    summary = summarize(rows, METHODS)
    assert lost["method"] == "deep-lora"
    assert {key: summary["counts"][key] for key in ("failed", "undefined", "missing")} == {
        "failed": 1, "undefined": 1, "missing": 1,
    }  # fmt: skip
    assert {f["error"] for f in summary["failures"]} == {"out of memory", "the score is undefined"}


def test_nothing_at_all() -> None:
    summary = summarize([], METHODS)
    json.dumps(summary, allow_nan=False)
    assert summary["headline"].startswith("Nothing to compare yet")
    assert summary_lines(summary)


@pytest.mark.parametrize(
    ("gains", "start"),
    [
        ([0.03, 0.04, 0.03, 0.04], "Deep LoRA wins: it scores 0.0350 higher than LoRA (95 % interval +0.0"),
        ([-0.03, -0.04, -0.03, -0.04], "Deep LoRA loses: it scores 0.0350 lower than LoRA (95 % interval -0.0"),
        ([0.03, -0.02, 0.04, -0.03], "No winner: Deep LoRA is 0.0050 ahead of LoRA, and the interval holds 0"),
        ([0.0] * 4, "No winner"),
        ([0.03], "Too few runs to say who wins: Deep LoRA is 0.0300 ahead of LoRA (1 task, 1 pair of runs"),
    ],
)
def test_the_headline_says_who_wins(gains: list[float], start: str) -> None:
    rows = [*runs("lora", dict.fromkeys(range(len(gains)), 0.5))]
    rows += runs("deep-lora", {seed: 0.5 + gain for seed, gain in enumerate(gains)})
    assert summarize(rows, ["lora", "deep-lora"])["headline"].startswith(start)


def test_the_headline_tells_what_speaks_against_it() -> None:
    rows = []
    for task, gain in (("a", 0.2), ("b", -0.05)):
        rows += runs("none", dict.fromkeys(range(5), 0.6), task=task, shots=16)
        rows += runs("lora", {s: 0.5 + s / 1000 for s in range(5)}, task=task, shots=16)
        rows += runs("deep-lora", {s: 0.4 + gain + s / 900 for s in range(5)}, task=task, shots=16)
    text = headline(summarize(rows, ["none", "lora", "deep-lora"]))
    assert "so these tasks do not settle it" in text
    assert "scores below the unadapted model with this many labels: 16 (-0.12" in text


def test_the_terminal_table_has_every_method() -> None:
    text = "\n".join(summary_lines(summarize(small_study(), METHODS)))
    for name in ("Deep LoRA", "LoRA+", "unadapted model", "best baseline, by tuning", "9/0/3"):
        assert name in text
    assert (
        "Learning rate at the edge of its grid: LoRA+ on rte and stsb.\nThe same command with a larger --budget" in text
    )
    assert max(len(line) for line in text.splitlines()[2:]) < 100


def test_labels() -> None:
    assert [method_label(m) for m in ("deep-lora", "deep-lora:paper", "lora-plus", "new")] == [
        "Deep LoRA", "Deep LoRA (paper)", "LoRA+", "new",
    ]  # fmt: skip
