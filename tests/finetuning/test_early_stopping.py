"""Early stopping: what is kept is the best that was seen, on rows never trained on, and resuming changes nothing."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerControl, TrainerState

from rankwise.errors import Interrupted, UserError
from rankwise.finetuning import finetune, resume
from rankwise.finetuning.early_stopping import EarlyStopping
from tests.finetuning.run_outcomes import losses, outcome, settings, validations
from tests.finetuning.test_checkpoints import stop_after
from tests.finetuning.tiny_checkpoint import write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
SCORES = st.lists(st.none() | st.just(math.nan) | st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=12)


class Scripted:
    """A model whose one weight counts the steps, scored as the script says."""

    def __init__(self, scores, patience, greater_is_better=True, every=1):
        self.model, self.recorded = nn.Linear(1, 1, bias=False), []
        self.scores = iter(scores)
        self.stopping = EarlyStopping(
            lambda model: next(self.scores), every=every, patience=patience, greater_is_better=greater_is_better,
            record=lambda step, score: self.recorded.append((step, score)),
        )  # fmt: skip

    def run(self, steps, start=0):
        """The step it stopped at."""
        if not start:
            with torch.no_grad():
                self.model.weight.zero_()
            self.stopping.on_train_begin(None, TrainerState(max_steps=steps), TrainerControl(), model=self.model)
        for step in range(start + 1, steps + 1):
            with torch.no_grad():
                self.model.weight.fill_(step)
            control = TrainerControl()
            state = TrainerState(global_step=step, max_steps=steps)
            self.stopping.on_step_end(None, state, control, model=self.model)
            if control.should_training_stop:
                assert control.should_save
                return step
        return steps


def expected(scores, patience, better):
    """(step of the best, step of the end), by the definition."""
    best, best_step, since = None, -1, 0
    for step, score in enumerate(scores):
        score = None if score is None or math.isnan(score) else score
        if best_step < 0 or (score is not None and (best is None or better(score, best))):
            best, best_step, since = score, step, 0
        else:
            since += 1
        if since >= patience:
            return best_step, step
    return best_step, len(scores) - 1


@given(SCORES, st.integers(1, 4), st.booleans())
def test_it_stops_and_keeps_by_the_definition(scores, patience, greater):
    script = Scripted(scores, patience, greater)
    best, end = expected(scores, patience, float.__gt__ if greater else float.__lt__)
    assert script.run(len(scores) - 1) == end
    script.stopping.restore_best(script.model)
    assert script.model.weight.item() == script.stopping.best_step == best


@given(SCORES, st.integers(1, 4), st.data())
def test_saved_and_loaded_it_decides_alike(tmp_path_factory, scores, patience, data):
    steps = len(scores) - 1
    whole = Scripted(scores, patience)
    end = whole.run(steps)
    cut = data.draw(st.integers(0, end))
    first, second = Scripted(scores[: cut + 1], patience), Scripted(scores[cut + 1 :], patience)
    first.run(cut)
    folder = tmp_path_factory.mktemp("checkpoint")
    first.stopping.save(folder)
    second.stopping.load(folder)
    if not second.stopping.stopped and cut < steps:
        assert second.run(steps, start=cut) == end
    assert (second.stopping.best_step, second.stopping.stopped) == (whole.stopping.best_step, whole.stopping.stopped)
    second.stopping.restore_best(second.model)
    assert second.model.weight.item() == whole.stopping.best_step


def test_it_scores_every_so_many_steps_and_at_the_end():
    script = Scripted([0.0, 0.1, 0.2, 0.3], patience=9, every=3)
    script.run(8)
    assert [step for step, _ in script.recorded] == [0, 3, 6, 8]


@pytest.fixture(scope="module")
def stopping(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps at a rate so high that it soon gets no better."""
    out = tmp_path_factory.mktemp("early") / "run"
    finetune(settings(tiny, out, **FAST))
    return out


FAST = {
    "steps": 40,
    "early_stopping": 2,
    "validate_every": 2,
    "validation_rows": 6,
    "save_every": 2,
    "lr": 1e-2,
    "seed": 2,
}


def test_a_run_stops_early_and_reports_the_best(stopping: Path) -> None:
    result = json.loads((stopping / "result.json").read_text())
    scores = dict(validations(stopping))
    kept = result["early_stopping"]
    best = max(score for score in scores.values() if score is not None)
    assert kept["best_score"] == best == scores[kept["best_step"]]
    assert kept["stopped_early"]
    assert result["steps"] == max(scores) == kept["best_step"] + 4 < 40
    assert len(losses(stopping)) == result["steps"]
    assert result["validation_rows"] == 6


def test_no_row_serves_two_ends(stopping: Path) -> None:
    config = json.loads((stopping / "config.json").read_text())["data"]
    held_out = {int(line.split(",")[0]) for line in (stopping / "predictions.csv").read_text().splitlines()[1:]}
    train, validation = set(config["train_rows"]), set(config["validation_rows"])
    assert (len(train), len(validation)) == (11, 6)
    assert not train & validation
    assert not (train | validation) & held_out


def test_the_adapter_kept_is_that_of_a_run_of_so_many_steps(
    tiny: SimpleNamespace, stopping: Path, tmp_path: Path
) -> None:
    """The oracle stops there by itself; a constant rate, for the length of the run decides the falling one."""
    steps = {**FAST, "schedule": "constant"}
    finetune(settings(tiny, tmp_path / "stopped", **steps))
    best = json.loads((tmp_path / "stopped" / "result.json").read_text())["early_stopping"]["best_step"]
    finetune(settings(tiny, tmp_path / "oracle", **{**steps, "steps": best, "early_stopping": 99}))
    kept, oracle = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("stopped", "oracle")
    )
    assert kept.keys() == oracle.keys()
    assert all(torch.equal(kept[key], oracle[key]) for key in kept)


@pytest.mark.parametrize("at", [2, 4])
def test_a_stopped_run_resumes_to_the_same_end(
    tiny: SimpleNamespace, tmp_path: Path, stopping: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    with monkeypatch.context() as patch:
        stop_after(at, patch)
        with pytest.raises(Interrupted):
            finetune(settings(tiny, tmp_path / "run", **FAST))
    resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(stopping)


def test_killed_after_it_stopped_early_it_trains_no_further(
    tiny: SimpleNamespace, tmp_path: Path, stopping: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.finetuning import runner

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_results", fail)
        with pytest.raises(Interrupted):
            finetune(settings(tiny, tmp_path / "run", **FAST))
    resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(stopping)


def test_rows_of_a_file(tiny: SimpleNamespace, tmp_path: Path) -> None:
    file = str(write_pairs(tmp_path / "validation.csv", rows=9))
    chosen = {**FAST, "validation_rows": None, "validation_data": file, "eval_data": tiny.pairs}
    result = finetune(settings(tiny, tmp_path / "run", **chosen))
    assert (result["train_rows"], result["validation_rows"], result["held_out_rows"]) == (17, 9, 40)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"early_stopping": 0}, "--early-stopping must be at least 1, got 0"),
        ({"validate_every": 3}, "--validate-every must be given with --early-stopping only, got 3"),
        ({"early_stopping": 2, "validation_rows": 17}, "leaves none to train on"),
        ({"early_stopping": 2, "solver": "ridge"}, "no steps to stop at"),
        ({"early_stopping": 2, "validation_rows": 3, "validation_data": "x.csv"}, "left out where --validation-data"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_mistakes(tiny: SimpleNamespace, tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        finetune(settings(tiny, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
