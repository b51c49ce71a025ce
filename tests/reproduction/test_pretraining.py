"""The pretraining study: what is trained on and looked at, what every method does between steps, what is kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from rankwise.optimizers import optimizer_memory
from reproduction.beyond.pretraining import corpus, run, training
from reproduction.beyond.pretraining.corpus import Corpus, random_rows, spread_rows
from reproduction.beyond.pretraining.training import _METHODS, Run, small_llama, train

SETTINGS: dict[str, Any] = {
    **run.SCALES["small"], "length": 8, "rows": 4, "looked_at_rows": 6, "looks": 2, "width": 16,
    "inner_width": 24, "rank": 4,
}  # fmt: skip
STEPS = 12


def a_run(method: str, **changes: Any) -> Run:
    return Run(
        "text", method, 4, 1e-2, 2e-2, 0, STEPS * SETTINGS["rows"] * SETTINGS["length"], "held_out", 1e-2
    )._replace(**changes)


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """A cycle of ten tokens, which a model can learn, and other cycles to look at."""
    made = Corpus(torch.arange(400) % 10, torch.arange(100) % 7 + 20, torch.arange(100) % 10)
    monkeypatch.setattr(training, "corpus", lambda name: made)
    return made


def test_rows_are_pieces_of_the_text() -> None:
    text = torch.arange(50)
    for rows in (random_rows(text, 30, 5, torch.Generator().manual_seed(0)), spread_rows(text, 10, 5)):
        assert (rows.diff(dim=1) == 1).all()
    assert spread_rows(text, 10, 5).flatten().equal(text)
    every = random_rows(text, 2000, 5, torch.Generator().manual_seed(0))
    assert (int(every.min()), int(every.max())) == (0, 49)


def test_the_parts_of_a_text_do_not_overlap(data_root: Path) -> None:
    parts = corpus._parts(data_root / "tinyshakespeare")
    assert [len(part) for part in parts] == [1_003_855, 55_769, 55_770]
    assert [len(part) for part in corpus._parts(data_root / "wikitext2")] == pytest.approx(
        [10.8e6, 1.12e6, 1.26e6], rel=0.02
    )


@pytest.mark.parametrize("method", list(_METHODS))
def test_every_method_learns(method: str, text: Corpus) -> None:
    looks = train(a_run(method), SETTINGS).looks
    assert [tokens for tokens, _ in looks] == [0, 6 * 32, 12 * 32]
    assert looks[-1][1] < 0.8 * looks[0][1]


def test_every_method_has_the_same_start_and_batches(text: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    starts = {}
    for method in _METHODS:
        rows = seen[method] = []

        def watched(*arguments: Any, rows: list[torch.Tensor] = rows) -> torch.Tensor:
            rows.append(random_rows(*arguments))
            return rows[-1]

        monkeypatch.setattr(training, "random_rows", watched)
        starts[method] = train(a_run(method), SETTINGS).looks[0][1]
    assert len(set(starts.values())) == 1
    assert all(torch.equal(torch.stack(rows), torch.stack(seen["adamw"])) for rows in seen.values())


def test_relora_restarts_at_every_quarter_and_warm_relora_begins_at_the_first(text: Corpus) -> None:
    plain, warm = (
        _METHODS[method](small_llama(SETTINGS, 0), a_run(method), SETTINGS, STEPS)
        for method in ("relora", "relora_warm")
    )
    first_model = warm.model
    restarts = []
    rows = spread_rows(text.train, 4, 8)
    for step in range(STEPS):
        for trainer in (plain, warm):
            before = float(training._loss(trainer.model, rows).detach())
            trainer.before(step)
            assert float(training._loss(trainer.model, rows).detach()) == pytest.approx(before, rel=1e-3)  # bfloat16
            training._loss(trainer.model, rows).backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        restarts.append((plain.relora.restarts, warm.model is not first_model))  # type: ignore[attr-defined]
    assert restarts == [(step // 3, step >= 3) for step in range(STEPS)]
    assert warm.relora.relora.restarts == 2  # type: ignore[attr-defined]
    rates = [plain.factor(step) for step in range(STEPS)]
    assert rates[2] > rates[5] > rates[8] > rates[11]


@pytest.mark.parametrize(("method", "named"), [("adamw", "adamw"), ("galore", "galore"), ("relora_warm", "adamw")])
def test_bytes_of_state_are_the_most_that_was_kept(method: str, named: str, text: Corpus) -> None:
    done = train(a_run(method), SETTINGS)
    model = small_llama(SETTINGS, 0)
    counts = 4 * len(list(model.parameters()))  # AdamW counts its steps in a tensor of four bytes
    assert done.state_bytes == pytest.approx(optimizer_memory(model, named, rank=4).state, abs=counts)


def test_finished_runs_are_found_again_by_all_that_their_numbers_depend_on() -> None:
    first = run._digest(a_run("adamw"), SETTINGS)
    assert run._digest(a_run("adamw"), {**SETTINGS, "seeds": 9, "rates": {}}) == first
    others = [
        run._digest(a_run("lora"), SETTINGS),
        run._digest(a_run("adamw", rate=0.5), SETTINGS),
        run._digest(a_run("adamw"), {**SETTINGS, "layers": 2}),
    ]
    assert len({first, *others}) == 4


def test_the_lowest_loss_on_the_tuning_part_chooses_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Run] = []

    def made_up(runs: list[Run], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        asked.extend(runs)
        return iter([{"losses": [9.0, abs(trial.rate - 3e-3) + abs(trial.other_rate - 2e-2)]} for trial in runs])

    monkeypatch.setattr(run, "_all_of", made_up)
    rates = {"adamw": [1e-3, 3e-3, 5e-3], "lora": [1e-2, 3e-2], "relora_warm": [1e-3]}
    settings = {**SETTINGS, "other_rates": [1e-2, 2e-2, 4e-2], "rates": rates, "widenings": 2}
    best, losses = run._tuned(settings, seed=0)
    assert best == {"other": 2e-2, "adamw": 3e-3, "lora": 2.5e-3, "relora_warm": 2e-3}
    assert sorted(losses["lora"]) == ["0.0025", "0.005", "0.01", "0.03"]  # two beyond the grid
    assert {trial.part for trial in asked} == {"tuning"}
    assert {trial.other_rate for trial in asked[3:]} == {2e-2}
    assert {trial.warm_rate for trial in asked if trial.method == "relora_warm"} == {3e-3}


def test_longer_runs_have_their_rates_tuned_at_their_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Run] = []

    def made_up(runs: list[Run], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        asked.extend(runs)
        return iter([{"losses": [9.0, abs(trial.rate - (1e-3 if trial.method == "adamw" else 1.0))]} for trial in runs])

    monkeypatch.setattr(run, "_all_of", made_up)
    settings = {**SETTINGS, "longer": {"tokens": 999, "methods": ["adamw", "lora"]}, "widenings": 1}
    best, losses = run._tuned_longer(settings, {"other": 2e-2, "adamw": 1e-3, "lora": 0.2, "galore": 0.3}, seed=0)
    assert best == {"other": 2e-2, "adamw": 1e-3, "lora": 0.8}
    assert sorted(losses["lora"]) == ["0.1", "0.2", "0.4", "0.8"]
    assert {(trial.tokens, trial.part, trial.other_rate, trial.corpus) for trial in asked} == {
        (999, "tuning", 2e-2, "tinyshakespeare")
    }


def test_longer_runs_are_compared_with_adamw_of_the_same_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(runs: list[Run], settings: dict[str, Any]) -> list[dict[str, Any]]:
        losses = {"adamw": 1.0, "lora": 1.5}
        return [
            {"losses": [9.0, losses.get(trial.method, 2.0) - trial.tokens / 1e6 + trial.rate], "tokens": [0, trial.tokens],
             "state_bytes": 1, "trainable": 1}
            for trial in runs
        ]  # fmt: skip

    monkeypatch.setattr(run, "_all_of", made_up)
    settings = {**SETTINGS, "tokens": 100_000, "longer": {"tokens": 900_000, "methods": ["adamw", "lora"]}}
    results = run.measure(settings, seed=0)["results"]
    assert results["longer"]["rates"] == {"other": 1e-2, "adamw": 1.5e-3, "lora": 1.5e-3}  # half the short runs' best
    assert results["longer"]["adamw"]["loss"] == pytest.approx(0.1 + 1.5e-3)
    assert results["longer"]["lora"]["above_adamw"] == pytest.approx(0.5)
    assert results["tinyshakespeare"]["lora"]["above_adamw"] == pytest.approx(0.5)
    assert results["tinyshakespeare"]["adamw"]["loss"] == pytest.approx(0.9 + 3e-3)
