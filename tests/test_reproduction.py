"""Every figure runs, quickly; what was measured and committed is what was expected."""

import json
from pathlib import Path

import pytest

from reproduction.__main__ import ROOT, figures, main
from reproduction.record import deviations

pytest.importorskip("matplotlib")


def test_there_are_figures_and_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert figures()
    assert all(name in listed for name in figures())


@pytest.mark.parametrize("figure", figures())
def test_the_committed_numbers_are_within_tolerance(figure: str) -> None:
    measured, expected = (json.loads((ROOT / figure / f"{kind}.json").read_text()) for kind in ("measured", "expected"))
    assert not measured["quick"]
    assert expected["checks"]
    assert deviations(measured["results"], expected) == []
    assert (ROOT / figure / f"{Path(figure).name}.png").stat().st_size < 150_000


@pytest.mark.parametrize("figure", figures())
def test_a_figure_runs(figure: str, tmp_path: Path) -> None:
    assert main([figure, "--quick", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "measured.json").read_text())["quick"]
    assert (tmp_path / f"{Path(figure).name}.png").is_file()


def test_a_number_outside_its_tolerance_is_named() -> None:
    checks = [
        {"key": "a.b", "value": 10, "relative_tolerance": 0.1, "source": "here"},
        {"key": "c", "at_most": 1, "source": "there"},
    ]
    (line,) = deviations({"a": {"b": 11.5}, "c": 1}, {"checks": checks})
    assert "a.b is 11.5" in line
    assert "here" in line
