"""The page of a study: whole at any point of it, self-contained, and deaf to whatever names it is given."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import UserError
from rankwise.finetuning.comparison.report import write_comparison_report
from rankwise.finetuning.comparison.summary import summarize
from tests.diagnostics.run_folders import HOSTILE
from tests.diagnostics.test_report import Page, assert_self_contained, read
from tests.finetuning.comparison.study_rows import METHODS, row, runs, small_study


def written(folder: Path, rows: list[dict[str, Any]], methods: Any = METHODS, **settings: Any) -> tuple[str, Page]:
    path = write_comparison_report(folder, settings, rows, summarize(rows, methods))
    assert path == folder / "report.html"
    assert [entry.name for entry in folder.iterdir()] == ["report.html"]
    text, page = read(path)
    assert_self_contained(text, page)
    assert "None" not in page.text
    assert not re.search(r"\bnan\b", page.text)
    return text, page


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.diagnostics import plots

    monkeypatch.setattr(plots, "as_svg", lambda figure, title: "<svg></svg>")


def test_the_page_of_a_whole_study(tmp_path: Path) -> None:
    rows = small_study() + [row("lora", 0.5 + r / 1000, seed=seed, r=r) for r in (4, 16) for seed in range(3)]
    _, page = written(tmp_path, rows, model="tiny", seeds=3)
    assert page.count("svg") == 5
    for section in (
        "Gain in every setting", "Deep LoRA against each", "Score against number of labels", "Does adapting do harm?",
        "Ranks found", "Score against r", "Learning rates", "What it costs", "The runs", "Settings",
    ):  # fmt: skip
        assert section in page.text
    assert "Runs that failed" not in page.text
    assert "0.003 (edge)" in page.text
    assert "0.001 (fixed)" in page.text
    assert '"model": "tiny"' in page.text
    assert summarize(rows, METHODS)["headline"] in page.text


@pytest.mark.parametrize("count", [0, 1])
def test_a_study_that_has_just_begun(tmp_path: Path, count: int) -> None:
    _, page = written(tmp_path, [row("deep-lora", 0.5)][:count])
    assert "Nothing to compare yet" in page.text
    assert page.count("svg") == 2 * count


def test_one_pair(tmp_path: Path) -> None:
    _, page = written(tmp_path, [row("deep-lora", 0.5), row("lora", 0.4)])
    assert "Too few runs to say who wins" in page.text


@pytest.mark.usefixtures("undrawn")
def test_failed_runs_are_shown_with_their_message(tmp_path: Path) -> None:
    broken = row("lora", None, status="failed", error="RuntimeError: <out> of memory", ranks=None, seconds=None, r=None)
    _, page = written(tmp_path, [*small_study()[:-1], {**broken, "task": "mrpc", "key": "x"}])
    assert "Runs that failed" in page.text
    assert "RuntimeError: <out> of memory" in page.text


def test_a_study_where_everything_failed(tmp_path: Path) -> None:
    bare = {"phase": "confirm", "task": "t", "method": "lora", "shots": 4, "seed": 0, "lr": None, "status": "failed"}
    _, page = written(tmp_path, [{**bare, "key": "k", "score": None, "error": "no"}])
    assert page.count("svg") == 0
    assert "Runs that failed" in page.text


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    methods = ["none", "lora", "deep-lora", HOSTILE]
    rows = [r for method in methods for r in runs(method, {0: 0.4, 1: 0.5}, task=HOSTILE, metric=HOSTILE)]
    rows.append(row(HOSTILE, None, seed=7, task=HOSTILE, status="failed", error=HOSTILE))
    text, page = written(tmp_path, rows, methods, **{HOSTILE: HOSTILE, "path": Path("x")}, rank_rule=HOSTILE)
    assert page.count("title") == 1
    assert "<script>alert(1)" in page.text
    assert "&amp;amp;" in text


def test_many_methods_and_ranks_beyond_r(tmp_path: Path) -> None:
    methods = ["none", *(f"method-{i}" for i in range(12)), "deep-lora", "full"]
    rows = [r for m in methods for r in runs(m, {0: 0.5, 1: 0.6}, ranks=[384, 8] if m == "full" else [1])]
    assert written(tmp_path, rows, methods)[1].count("svg") == 4


def test_a_sweep_over_r_by_variants_whose_plain_method_is_absent(tmp_path: Path) -> None:
    methods = ["deep-lora:r=4", "deep-lora:r=16"]
    rows = [r for n in (4, 16) for r in runs(f"deep-lora:r={n}", {0: 0.5, 1: 0.6}, r=n)]
    assert "Deep LoRA varies by 0.0000" in written(tmp_path, rows, methods)[1].text


@pytest.mark.usefixtures("undrawn")
def test_the_unadapted_model_has_no_histogram(tmp_path: Path) -> None:
    assert "Ranks found" not in written(tmp_path, [row("none", 0.5, ranks=[0, 0])])[1].text


@pytest.mark.usefixtures("undrawn")
def test_an_existing_page_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old", encoding="utf-8")
    assert written(tmp_path, small_study())[0].startswith("<!doctype html>")


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    assert written(tmp_path / "a", small_study())[0] == written(tmp_path / "b", small_study())[0]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rankwise.diagnostics

    summary = summarize([], METHODS)
    monkeypatch.delattr(rankwise.diagnostics, "plots", raising=False)
    monkeypatch.delitem(sys.modules, "rankwise.diagnostics.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"reports need matplotlib .*pip install 'rankwise\[report\]'"):
        write_comparison_report(tmp_path, {}, [], summary)
    assert not list(tmp_path.iterdir())
