"""A checkpoint that was not finished, or is no longer what was written, is never gone on from."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from rankwise.errors import Interrupted
from rankwise.finetuning import finetune, resume
from rankwise.finetuning.checkpoints import seal, set_aside_damaged, whole_checkpoints
from rankwise.finetuning.trainer import TaskTrainer
from tests.finetuning.run_outcomes import outcome, settings

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(bytes(range(100)))
        (folder / "state.json").write_text("{}")
        seal(folder)
    return tmp_path


def test_the_newest_comes_first(sealed: Path) -> None:
    assert [step for step, _ in whole_checkpoints(sealed)] == [10, 2]
    assert set_aside_damaged(sealed) == []


def flip(folder: Path) -> None:
    content = bytearray((folder / "weights").read_bytes())
    content[50] ^= 1
    (folder / "weights").write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one bit": flip,
    "cut short": lambda folder: (folder / "weights").write_bytes(bytes(range(99))),
    "missing": lambda folder: (folder / "state.json").unlink(),
    "seal cut short": lambda folder: (folder / "checksums.json").write_text('{"sha256": {"wei'),
    "seal of another kind": lambda folder: (folder / "checksums.json").write_text('{"sha256": [1]}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_seen(sealed: Path, damage: Callable[[Path], object]) -> None:
    damage(sealed / "checkpoint-10")
    assert [step for step, _ in whole_checkpoints(sealed)] == [2]
    assert set_aside_damaged(sealed) == [sealed / "checkpoint-10"]
    assert {folder.name for folder in sealed.iterdir()} == {"checkpoint-2", "damaged-checkpoint-10"}


def test_what_was_never_finished_is_no_damage(sealed: Path) -> None:
    (sealed / "checkpoint-10" / "checksums.json").unlink()
    (sealed / "checkpoint-12").mkdir()
    (sealed / "checkpoint-best").mkdir()
    assert [step for step, _ in whole_checkpoints(sealed)] == [2]
    assert set_aside_damaged(sealed) == []
    assert {folder.name for folder in sealed.iterdir()} == {"checkpoint-2", "checkpoint-best"}


@pytest.mark.parametrize(
    ("which", "goes_on_at"), [(["checkpoint-6"], 4), (["checkpoint-6", "checkpoint-4"], 0)], ids=["newest", "all"]
)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: list[str], goes_on_at: int
) -> None:
    finetune(settings(tiny, tmp_path / "whole"))
    stop_after(6, monkeypatch)
    with pytest.raises(Interrupted):
        finetune(settings(tiny, tmp_path / "run"))
    monkeypatch.undo()
    for name in which:
        file = tmp_path / "run" / "checkpoints" / name / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
    console = Console(record=True, width=200)
    resume(tmp_path / "run", console)
    said = console.export_text()
    assert all(f"passing over {tmp_path / 'run' / 'checkpoints' / name}" in said for name in which)
    assert ("resuming at" in said) == (goes_on_at > 0)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no space were left for anything after this step's checkpoint."""
    original = TaskTrainer._save_checkpoint

    def save(self: TaskTrainer, model: object, trial: object) -> None:
        if self.state.global_step > step:
            raise OSError(28, "No space left on device")
        original(self, model, trial)

    monkeypatch.setattr(TaskTrainer, "_save_checkpoint", save)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=["system", "torch"],
)
def test_no_space_for_a_checkpoint_leaves_a_run_to_go_on_with(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    finetune(settings(tiny, tmp_path / "whole"))

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "_save_optimizer_and_scheduler", fail)
        with pytest.raises(
            Interrupted,
            match=r"(?s)cannot write a checkpoint to .*(No space|PytorchStreamWriter).*rankwise finetune --resume",
        ):
            finetune(settings(tiny, tmp_path / "run"))
    resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_no_space_for_the_results_leaves_a_run_to_go_on_with(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.finetuning import run_results

    finetune(settings(tiny, tmp_path / "whole"))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_results, "save_as_lora", fail)
        with pytest.raises(Interrupted, match="cannot write its results"):
            finetune(settings(tiny, tmp_path / "run"))
    (tmp_path / "run" / ".adapter.cut").mkdir()  # what a kill leaves of a folder on its way
    resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert not list((tmp_path / "run").glob(".*"))


def test_every_file_of_a_checkpoint_is_sealed(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(2, monkeypatch)
    with pytest.raises(Interrupted):
        finetune(settings(tiny, tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    named = json.loads((folder / "checksums.json").read_text())["sha256"]
    assert set(named) == {file.name for file in folder.iterdir()} - {"checksums.json"}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(
        named
    )
