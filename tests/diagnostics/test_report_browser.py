"""The page in a real browser: it draws, and nothing in it makes the browser complain."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rankwise.diagnostics import write_report
from tests.diagnostics.run_folders import finished_run
from tests.diagnostics.test_report import hostile_runs

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the PATH"),
]

HEIGHT = 3500


def chromium(page: Path, profile: Path, *more: str) -> subprocess.CompletedProcess[str]:
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=3000 --enable-logging=stderr --v=0 "
        f"--hide-scrollbars --window-size=1000,{HEIGHT}"
    ).split()
    done = subprocess.run(
        ["chromium", *flags, f"--user-data-dir={profile}", *more, page.as_uri()],
        capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("names", ["plain", "hostile"])
def test_the_page_draws_without_a_complaint(tmp_path: Path, names: str) -> None:
    if names == "plain":
        runs = [finished_run(tmp_path / "deep"), finished_run(tmp_path / "plain", method="lora", after=0.5)]
    else:
        runs = hostile_runs(tmp_path)
    page = write_report(runs, tmp_path / "page.html")
    dumped = chromium(page, tmp_path / "profile", "--dump-dom")
    assert len(re.findall(r"<svg\b", dumped.stdout)) == 5
    assert "<script" not in dumped.stdout
    shot = tmp_path / "page.png"
    drawn = chromium(page, tmp_path / "profile", f"--screenshot={shot}")
    complaints = [line for line in (dumped.stderr + drawn.stderr).splitlines() if "CONSOLE" in line]
    assert complaints == []
    assert_figures_are_drawn(shot)


def assert_figures_are_drawn(shot: Path) -> None:
    """Coloured ink in at least five separate bands of the page: text is grey, only figures have colour."""
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert pixels.std() > 0.02
    coloured = (pixels.max(axis=2) - pixels.min(axis=2) > 0.3).any(axis=1)
    rows = np.flatnonzero(coloured)
    bands = 1 + int((np.diff(rows) > 60).sum()) if len(rows) else 0
    assert bands >= 5, f"{bands} bands of colour"
