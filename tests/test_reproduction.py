"""Every figure runs at small scale and gives what is expected; so did the committed runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.completion.gradient_descent import gradient_descent, narrow_random_start
from reproduction.__main__ import ROOT, figures, load, main
from reproduction.icml24.completion_problem import PlantedCompletion, Recorder
from reproduction.icml24.fig5 import run as fig5
from reproduction.icml24.full_width import full_width_descent
from reproduction.record import accepted, deviations

pytest.importorskip("matplotlib")


def _files(figure: str) -> tuple[dict[str, Any], dict[str, Any]]:
    measured, expected = (json.loads((ROOT / figure / f"{kind}.json").read_text()) for kind in ("measured", "expected"))
    return measured, expected


@pytest.mark.parametrize("arguments", [[], ["--list"]])
def test_all_figures_are_listed_with_their_scales(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == figures()
    assert all("small" in line and "paper" in line for line in lines)


@pytest.mark.parametrize("figure", figures())
def test_the_committed_numbers_are_within_their_bands(figure: str) -> None:
    measured, expected = _files(figure)
    checks = expected["scales"][measured["scale"]]
    assert checks
    assert deviations(measured["results"], checks) == []
    assert (ROOT / figure / f"{Path(figure).name}.png").stat().st_size < 150_000


@pytest.mark.parametrize("figure", figures())
def test_the_committed_numbers_come_from_the_settings_in_the_code(figure: str) -> None:
    measured, _ = _files(figure)
    module = load(figure)
    assert measured["scale"] == module.COMMITTED != "small"
    assert measured["settings"] == json.loads(json.dumps(module.SCALES[module.COMMITTED]))


@pytest.mark.parametrize("figure", figures())
def test_the_readme_states_the_committed_numbers(figure: str) -> None:
    """Every number that has a published value to be compared with."""
    measured, expected = _files(figure)
    readme = (ROOT / figure / "README.md").read_text()
    assert f"python -m reproduction {figure}" in readme
    for check in expected["scales"][measured["scale"]]:
        if "value" in check:
            number: Any = measured["results"]
            for part in check["key"].split("."):
                number = number[part]
            stated = f"{number:,}" if isinstance(number, int) else f"{number:.2e}".replace("e-0", "e-")
            assert stated in readme, check["key"]


@pytest.mark.parametrize("figure", figures())
def test_a_figure_at_small_scale_is_as_expected(figure: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if getattr(load(figure), "NEEDS_DATA", False):
        request.getfixturevalue("data_root")  # skips, visibly, where there is none
    _, expected = _files(figure)
    assert expected["scales"]["small"]
    assert main([figure, "--scale", "small", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "measured.json").read_text())["scale"] == "small"
    assert (tmp_path / f"{Path(figure).name}.png").is_file()
    assert main([figure, "--scale", "small", "--out", str(tmp_path), "--redraw"]) == 0


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["icml24/fig5", "--scale", "huge"]) == 2
    assert "it has paper, small" in capsys.readouterr().err
    assert main(["icml24/fig5", "--scale", "small", "--out", str(tmp_path / "none"), "--redraw"]) == 2
    assert "leave out --redraw" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_number_outside_its_band_is_named() -> None:
    checks = [
        {"key": "a.b", "value": 10, "relative_tolerance": 0.1, "source": "here"},
        {"key": "c", "at_most": 1, "source": "there"},
        {"key": "d", "value": 0.0, "absolute_tolerance": 0.1, "source": "there"},
    ]
    (line,) = deviations({"a": {"b": 11.5}, "c": 1, "d": 0.05}, checks)
    assert "a.b is 11.5" in line
    assert "here" in line


def test_accepting_a_run_keeps_published_values() -> None:
    published = {"key": "a", "value": 10, "relative_tolerance": 0.1, "source": "the paper"}
    own = {"key": "a", "value": 0, "from_run": True, "relative_tolerance": 0.1, "source": "this run"}
    assert accepted({"a": 7}, [published, own]) == [published, own | {"value": 7}]


def test_the_seed_fixes_a_figures_numbers_whatever_was_drawn_before() -> None:
    """At a size where the compression's SVD is sketched; to 1e-9 since rounding depends on where arrays lie in memory."""
    small = {"size": 150, "rank": 2, "observed": 0.5, "stop_at_mean_loss": 1e-9, "max_iter": 200}
    settings = {**fig5.SCALES["small"], "small": small, "init_scale": 0.1}
    errors = []
    for drawn_before in (1, 2):
        torch.manual_seed(drawn_before)
        results, _ = fig5._small(settings, seed=0)
        errors.append([results[name]["held_out_error"] for name in ("full_width", "compressed", "stalled")])
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-9)


def test_the_planted_problem_is_the_papers() -> None:
    d, r, p = 101, 3, 0.3
    problem = PlantedCompletion.draw(d, r, p, seed=0)
    full = problem.left @ problem.right.T
    singular_values = np.linalg.svd(full, compute_uv=False)
    assert singular_values[r - 1] > 0.7 * 2 * d**0.5
    assert singular_values[0] == pytest.approx(2 * d**0.5, rel=0.1)
    assert singular_values[r] < 1e-10
    seen = problem.observations
    assert seen.count == int(p * d * d)
    np.testing.assert_allclose(seen.values, full[seen.row_of_each(), seen.columns], atol=1e-12)


def test_recovery_error_and_the_stopping_loss_are_means_over_all_entries() -> None:
    """Against dense sums: half the squared error where nothing was observed, over d²; the loss likewise."""
    problem = PlantedCompletion.draw(24, 2, 0.6, seed=1)
    full, mask = problem.left @ problem.right.T, problem.observations.matrix().toarray() != 0
    dense: list[tuple[float, float]] = []

    def also(step: Any) -> None:
        E = step.factors.left @ step.factors.core @ step.factors.right.T - full
        dense.append((0.5 * float(np.mean(np.where(mask, 0, E**2))), 0.5 * float(np.mean(np.where(mask, E**2, 0)))))

    stop_at = 1e-3
    recorder = Recorder(problem, stop_at, every=1, also=also)
    start = narrow_random_start(problem.observations, 4, init_scale=0.3)
    settings: dict[str, Any] = {"learning_rate": 5e-3, "outer_lr_ratio": 1.0, "tol": 0.0, "max_iter": 5000}
    gradient_descent(problem.observations, rank=1, start=start, callback=recorder, **settings)
    np.testing.assert_allclose([error for _, _, error in recorder.curve], [held_out for held_out, _ in dense])
    losses = [loss for _, loss in dense]
    assert losses[-1] <= stop_at < losses[-2]
    assert recorder.summary()["iterations"] == len(dense) - 1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_full_width_step_is_autograds(depth: int) -> None:
    rng = np.random.default_rng(0)
    full, mask, eta = rng.standard_normal((6, 6)), rng.random((6, 6)) < 0.5, 0.01
    weights = [rng.standard_normal((6, 6)) for _ in range(depth)]
    tensors = [torch.tensor(weight, requires_grad=True) for weight in weights]
    f = tensors[0]
    for tensor in tensors[1:]:
        f = tensor @ f
    loss = 0.5 * ((f - torch.tensor(full))[torch.tensor(mask)] ** 2).sum()
    expected = [w - eta * g for w, g in zip(tensors, torch.autograd.grad(loss, tensors), strict=True)]
    seen: list[float] = []

    def note(iteration: int, at: float, f: Any) -> bool:
        seen.append(at)
        return False

    assert full_width_descent(weights, np.where(mask, full, 0), mask, eta, 1, note) == 1
    assert seen[0] == pytest.approx(loss.item())
    for got, want in zip(weights, expected, strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-12)
