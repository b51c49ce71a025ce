"""The page about a completed matrix: whole, self-contained, and right about what the folder says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rankwise.diagnostics.completion_report import convergence_figure, spectrum_figure, write_completion_report
from rankwise.errors import UserError
from tests.diagnostics.run_folders import HOSTILE
from tests.diagnostics.test_report import Page
from tests.diagnostics.test_report_browser import chromium

PATH = [
    {"stage": "path", "iteration": i, "weight_decay": 0.5**i, "residual": 10.0**-i, "rank": i, "products": 1}
    for i in range(1, 5)
]
EVIDENCE = [
    {"stage": "evidence", "iteration": i, "noise": 1 / i, "rank": 6 - i, "turned": 0.1, "held_out": None}
    for i in range(1, 6)
]


def completed(
    folder: Path, *, name: str = "ratings.csv", metrics: list[dict[str, Any]] | None = None, **changes: Any
) -> Path:
    """A finished run folder written by hand."""
    folder.mkdir(parents=True)
    summary = {
        "format_version": 1, "rows": 60, "columns": 50, "observed": 1500, "density": 0.5, "rank": 3,
        "singular_values": [4.0, 2.0, 0.5], "held_out_rmse": 0.8125, "held_out_interval": [0.75, 0.875],
        "held_out_entries": 150, "baseline_rmse": 1.5, "interval_level": 0.95, "seconds": 1.25, "route": "evidence",
        "iterations": 9, "converged": True, "noise": 0.5, "unobserved_rows": 2, "unobserved_columns": 0,
        "merged_duplicates": 7, "picture": None, "notes": ["12 lines left out: their value is empty"],
    }  # fmt: skip
    config = {
        "format_version": 1, "kind": "completion", "settings": {"rank": None, "seed": 0},
        "inputs": {"data": {"file": name, "bytes": 10}}, "environment": {"rankwise": "0"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps({**summary, **changes}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = [{"format_version": 1}, *(PATH + EVIDENCE if metrics is None else metrics)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def assert_self_contained(text: str, page: Page) -> None:
    """Nothing is fetched and nothing runs; pictures are data."""
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "embed", "base", "form", "a"})
    assert "<script" not in text.lower()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "xlink:href", "src"):
                assert (value or "").startswith(("#", "data:")), (tag, name, value)
            assert "url(http" not in (value or "")
    assert "default-src 'none'" in text
    assert page.open == []


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, for tests about words."""
    from rankwise.diagnostics import plots

    monkeypatch.setattr(plots, "as_svg", lambda figure, title: "<svg></svg>")


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    folder = completed(tmp_path / "run")
    assert write_completion_report(folder) == folder / "report.html"
    text, page = read(folder / "report.html")
    assert_self_contained(text, page)
    assert page.count("svg") == 2
    assert page.count("img") == 0
    for shown in (
        "1,500 of 3,000 entries of ratings.csv were observed (50\u00a0%). 3 directions found.",
        "On 150 entries held out of a second fit, the error (RMSE) is 0.8125 (95\u00a0% interval 0.75 to 0.875), against 1.5",
        "60 × 50",
        "evidence: rank, shrinkage and noise",
        "rows without any observation",
        "repeated observations",
        "12 lines left out: their value is empty",
        "relative residual",
        "noise level",
        '"seed": 0',
    ):
        assert shown in page.text, shown
    assert "columns without any observation" not in page.text
    assert "does not help" not in page.text
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*"))


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_completion_report(completed(tmp_path / name)).read_bytes() for name in "ab")
    assert first == second


def test_pictures_are_embedded_before_and_after(tmp_path: Path) -> None:
    folder = completed(
        tmp_path / "run", name="cat.png", held_out_rmse=None, held_out_interval=None,
        picture={"hidden_pixels": 1234, "psnr": 27.218},
    )  # fmt: skip
    for name, tone in (("original.png", 10), ("observed.png", 20), ("filled.png", 30)):
        Image.fromarray(np.full((4, 5), tone, np.uint8)).save(folder / name)
    text, page = read(write_completion_report(folder))
    assert_self_contained(text, page)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == ["as given", "what was observed", "filled"]
    assert len({image["src"] for image in images}) == 3
    assert "On the 1,234 hidden pixels the filled picture has 27.22 dB" in page.text
    assert "not measured" not in page.text


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    folder = completed(
        tmp_path / "run", name=HOSTILE, notes=[HOSTILE], route=HOSTILE, metrics=[{**PATH[0], "stage": HOSTILE}]
    )
    text, page = read(write_completion_report(folder))
    assert_self_contained(text, page)
    assert page.count("title") == 1
    assert page.text.count("<script>alert(1)</script>") >= 4  # shown, as text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"held_out_rmse": None, "held_out_interval": None}, "was not measured"),
        ({"held_out_rmse": 1.6}, "does not help"),
        ({"rank": 0, "singular_values": []}, "No direction was found"),
        ({"rank": 1, "singular_values": [1.0]}, "1 direction found"),
        ({"converged": False}, "before it had converged"),
        ({"noise": None}, "undefined"),
    ],
)
def test_what_the_numbers_mean_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    _, page = read(write_completion_report(completed(tmp_path / "run", **changes)))
    assert said in page.text
    assert "None" not in page.text
    assert "nan" not in page.text.lower().split()


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"stage": "descent", "iteration": 100, "residual": 0.5}],
        [{"stage": "evidence", "iteration": 1, "noise": None, "rank": 0}],
        [{"stage": "path", "iteration": 1, "residual": 0.0, "rank": 1}] * 2,
        [{"stage": "held-out path", "iteration": i, "residual": 1 / i, "rank": 1, "held_out": i} for i in (1, 2)],
        PATH + EVIDENCE + PATH,  # robust fits go through their stages again
    ],
)
def test_any_history_draws(tmp_path: Path, metrics: list[dict[str, Any]]) -> None:
    text, page = read(write_completion_report(completed(tmp_path / "run", metrics=metrics)))
    assert_self_contained(text, page)
    assert page.count("svg") == 2


def test_figures_show_the_numbers() -> None:
    axes = spectrum_figure([4.0, 2.0, 0.5]).axes[0]
    assert axes.lines[0].get_ydata().tolist() == [4.0, 2.0, 0.5]
    assert axes.get_yscale() == "log"
    assert spectrum_figure([4.0, 3.0]).axes[0].get_yscale() == "linear"
    assert spectrum_figure([4.0, 3.0]).axes[0].get_ylim()[0] == 0  # nearly equal values do not look like a fall
    panels = convergence_figure(PATH + EVIDENCE).axes
    assert [axes.get_title(loc="left") for axes in panels[:2]] == ["path", "evidence"]
    assert panels[0].lines[0].get_ydata().tolist() == [10.0**-i for i in range(1, 5)]
    assert panels[1].lines[0].get_ydata().tolist() == [1 / i for i in range(1, 6)]
    assert panels[3].lines[0].get_ydata().tolist() == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("name", ["summary.json", "config.json", "metrics.jsonl"])
def test_an_unfinished_run_names_the_missing_file(tmp_path: Path, name: str) -> None:
    folder = completed(tmp_path / "run")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"no finished run: it has no {name}"):
        write_completion_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "7", '{"inputs": 3}'])
@pytest.mark.parametrize("name", ["summary.json", "config.json", "metrics.jsonl"])
def test_a_damaged_run(tmp_path: Path, name: str, content: str) -> None:
    folder = completed(tmp_path / "run")
    (folder / name).write_text(content, encoding="utf-8")
    if name == "metrics.jsonl" and content in ("", "[]", "{}", '{"inputs": 3}'):
        write_completion_report(folder)  # a history without entries is one
        return
    with pytest.raises(UserError, match=r"damaged|another version"):
        write_completion_report(folder)


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the PATH")
def test_the_page_draws_without_a_complaint(tmp_path: Path) -> None:
    folder = completed(tmp_path / "run", name=HOSTILE, picture={"hidden_pixels": 1, "psnr": None})
    for name in ("original.png", "observed.png", "filled.png"):
        Image.fromarray(np.full((40, 50), 99, np.uint8)).save(folder / name)
    page = write_completion_report(folder)
    drawn = chromium(page, tmp_path / "profile", f"--screenshot={tmp_path / 'page.png'}")
    assert [line for line in drawn.stderr.splitlines() if "CONSOLE" in line] == []
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert (np.abs(pixels - 99).max(axis=2) == 0).sum() > 3 * 40 * 50  # all three pictures, scaled up


def test_the_page_needs_neither_peft_nor_transformers() -> None:
    code = (
        "import sys; sys.modules['peft'] = sys.modules['transformers'] = None\n"
        "import rankwise.completion, rankwise.diagnostics.completion_report"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
