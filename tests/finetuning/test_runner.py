"""Whole runs on a tiny checkpoint: what they leave behind, and that stopping changes nothing."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.errors import UserError
from rankwise.finetuning import FinetuneSettings, Interrupted, finetune, make_task, read_table, resume
from rankwise.finetuning.models import load_model, load_tokenizer
from rankwise.finetuning.tasks import PairSimilarity
from tests.finetuning.run_outcomes import STEPS, losses, outcome, predictions, settings
from tests.finetuning.tiny_checkpoint import offline_environment, save_tiny_checkpoint, write_csv, write_pairs

DATA = {"pair-similarity": "pairs", "classification": "classes", "regression": "ratings"}
SECRET = "hf_" + "notARealToken" * 2

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(
    scope="module", params=[(task, method) for task in DATA for method in ("deep-lora", "lora")], ids="-".join
)
def run(request: pytest.FixtureRequest, tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    task, method = request.param
    out = tmp_path_factory.mktemp("runs") / f"{task}-{method}"
    before = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = SECRET
    try:
        # a fitted regressor's weights are large on so small a model: rounding would hide what the tests look for
        start = "random" if task == "regression" else "fitted"
        chosen = settings(tiny, out, data=getattr(tiny, DATA[task]), task=task, method=method, head_start=start)
        result = finetune(chosen)
    finally:
        if before is None:
            del os.environ["HF_TOKEN"]
        else:
            os.environ["HF_TOKEN"] = before
    return SimpleNamespace(task=task, method=method, out=out, settings=chosen, result=result)


@pytest.fixture(scope="module")
def whole(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An uninterrupted run with these settings, made once for every combination."""
    made: dict[str, Path] = {}

    def find(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            finetune(settings(tiny, made[key], **changes))
        return made[key]

    return find


# --- what a run leaves behind


def test_the_folder_holds_what_the_docstring_says(run: SimpleNamespace) -> None:
    expected = {"adapter", "config.json", "metrics.jsonl", "predictions.csv", "result.json"}
    assert {path.name for path in run.out.iterdir()} == expected | ({"lora"} if run.method == "deep-lora" else set())
    assert (run.out / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(run.out.rglob("*.bin"))
    assert not list(run.out.rglob("*.tmp"))


def test_the_result_is_on_disk_finite_and_consistent(run: SimpleNamespace) -> None:
    result = json.loads((run.out / "result.json").read_text(encoding="utf-8"))
    assert result.pop("format_version") == 1
    assert result == json.loads(json.dumps(run.result))
    assert (result["task"], result["method"], result["steps"]) == (run.task, run.method, STEPS)
    assert (result["train_rows"], result["held_out_rows"]) == (17, 23)
    assert len(predictions(run.out)) == 23
    numbers = [result["seconds_per_step"], result["trainable_parameters"], result["exported_bytes"]]
    numbers += [value for when in ("before", "after") for value in result["scores"][when].values() if value is not None]
    assert all(math.isfinite(number) for number in numbers)
    assert result["primary_metric"] in result["scores"]["after"]
    for layer in result["layers"]:
        assert 0 <= layer["rank_99"] <= layer["rank"] <= layer["width"] == 4
        assert len(layer["singular_values"]) == 4
    assert any(layer["rank"] > 0 for layer in result["layers"])


def test_every_json_names_its_format(run: SimpleNamespace) -> None:
    for name in ("config.json", "result.json"):
        assert json.loads((run.out / name).read_text(encoding="utf-8"))["format_version"] == 1


def test_one_line_of_metrics_a_step(run: SimpleNamespace) -> None:
    assert [step for step, _ in losses(run.out)] == list(range(1, STEPS + 1))
    assert all(math.isfinite(loss) for _, loss in losses(run.out))


def test_the_config_holds_every_setting_and_no_environment_variable(run: SimpleNamespace) -> None:
    config = json.loads((run.out / "config.json").read_text(encoding="utf-8"))
    assert FinetuneSettings.from_dict(config["settings"]) == run.settings
    assert len(config["data"]["train_rows"]) == 17
    assert set(config["data"]["train_rows"]).isdisjoint(int(row["row"]) for row in predictions(run.out))
    for path in run.out.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_the_scores_are_those_of_the_predictions(run: SimpleNamespace) -> None:
    rows = predictions(run.out)
    for when in ("before", "after"):
        scores = run.result["scores"][when]
        if run.task == "classification":
            assert {row["target"] for row in rows} == {"neg", "pos"}
            assert scores["accuracy"] == pytest.approx(np.mean([row[when] == row["target"] for row in rows]))
            continue
        guess, truth = (np.array([float(row[name]) for row in rows]) for name in (when, "target"))
        if scores["pearson"] is not None:
            assert scores["pearson"] == pytest.approx(np.corrcoef(guess, truth)[0, 1])


def test_training_moves_the_predictions(run: SimpleNamespace) -> None:
    rows = predictions(run.out)
    assert any(row["before"] != row["after"] for row in rows)


@pytest.mark.parametrize("saved", ["adapter", "lora"])
def test_the_saved_adapter_predicts_what_the_run_did(run: SimpleNamespace, saved: str) -> None:
    """Loaded into a fresh model: ``lora/`` as the plain PEFT LoRA that it claims to be."""
    from peft import PeftModel

    if saved == "lora" and run.method == "lora":
        saved = "adapter"
    kind = json.loads((run.out / saved / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    assert kind == ("DEEPLORA" if (saved, run.method) == ("adapter", "deep-lora") else "LORA")
    table = read_table(run.settings.data)
    task = make_task(run.task, table, load_tokenizer(run.settings.model)[0], source=run.settings.model, max_length=128)
    torch.manual_seed(99)  # the head must come from the adapter, not from the seed of the run
    base = load_model(task, run.settings.model, None)
    model = PeftModel.from_pretrained(base, run.out / saved).eval()
    rows = predictions(run.out)
    position = {row["row"]: number for number, row in enumerate(table.rows)}
    trained_on = json.loads((run.out / "config.json").read_text(encoding="utf-8"))["data"]["train_rows"]
    task.learn_scale([position[row] for row in trained_on])
    with torch.no_grad():
        found = task.predict(model, task.collate([position[int(row["row"])] for row in rows]))
    if run.task == "classification":
        assert task.in_words(found.tolist()) == [row["after"] for row in rows]
        return
    scale = task.spread if run.task == "regression" else 1.0
    expected = [float(row["after"]) for row in rows]
    np.testing.assert_allclose(found.double().numpy(), expected, atol=2e-5 * scale, rtol=0)


# --- the same numbers again


@pytest.mark.parametrize("method", ["deep-lora", "lora"])
def test_the_same_seed_gives_the_same_run(
    tiny: SimpleNamespace, tmp_path: Path, whole: Callable[..., Path], method: str
) -> None:
    torch.manual_seed(12345)
    finetune(settings(tiny, tmp_path / "again", method=method))
    assert outcome(tmp_path / "again") == outcome(whole(method=method))


def test_another_seed_gives_another_run(tiny: SimpleNamespace, tmp_path: Path, whole: Callable[..., Path]) -> None:
    finetune(settings(tiny, tmp_path / "other", method="lora", seed=1))
    assert [row["row"] for row in predictions(tmp_path / "other")] != [
        row["row"] for row in predictions(whole(method="lora"))
    ]


def test_measuring_the_precision_does_not_change_the_run(
    tiny: SimpleNamespace, tmp_path: Path, whole: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` draws random numbers while it times; the run must not hear of it."""
    from rankwise.finetuning import runner

    def measure(*_: Any) -> tuple[str, dict[str, float]]:
        torch.rand(123)
        np.random.rand(7)
        return "fp32", {}

    monkeypatch.setattr(runner, "choose_precision", measure)
    finetune(settings(tiny, tmp_path / "auto", precision="auto"))
    assert outcome(tmp_path / "auto") == outcome(whole(method="deep-lora"))


# --- stopping and going on


def at_loss(monkeypatch: pytest.MonkeyPatch, call: int, action: Callable[[], None]) -> None:
    """Do something in the middle of the ``call``-th training step (gradient capture comes before the first)."""
    from rankwise.finetuning.trainer import TaskTrainer

    original, calls = TaskTrainer.compute_loss, [0]

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            action()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TaskTrainer, "compute_loss", compute_loss)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def press_ctrl_c_twice() -> None:
    press_ctrl_c()
    press_ctrl_c()


class _KilledError(BaseException):
    """Stands for SIGKILL inside one process: nothing in the run may catch it."""


def be_killed() -> None:
    raise _KilledError


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "deep-lora"},
        {"method": "lora"},
        {"method": "deep-lora", "task": "classification"},
        {"method": "lora", "task": "regression"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)
def test_ctrl_c_and_resume_reach_the_same_numbers(
    tiny: SimpleNamespace,
    tmp_path: Path,
    whole: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
) -> None:
    if "task" in changes:
        changes = {**changes, "data": getattr(tiny, DATA[changes["task"]])}
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        at_loss(patch, 5, press_ctrl_c)
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(
            Interrupted, match=rf"stopped at step 5 of 8; go on with\n  rankwise finetune --resume --out {out}"
        ):
            finetune(settings(tiny, out, **changes))
        assert signal.getsignal(signal.SIGINT) is handler
    assert not (out / "result.json").exists()
    torch.manual_seed(777)
    resume(out)
    assert outcome(out) == outcome(whole(**changes))
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize(("stop", "call"), [(press_ctrl_c_twice, 2), (be_killed, 4), (be_killed, 7)])
def test_a_sudden_end_and_resume_reach_the_same_numbers(
    tiny: SimpleNamespace,
    tmp_path: Path,
    whole: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    stop: Callable[[], None],
    call: int,
) -> None:
    """In step 2 there is no checkpoint yet, in 4 and 7 the last one lies a step behind."""
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        at_loss(patch, call, stop)
        with pytest.raises((Interrupted, _KilledError)):
            finetune(settings(tiny, out))
    resume(out)
    assert outcome(out) == outcome(whole(method="deep-lora"))


def test_a_line_of_metrics_cut_short_is_forgotten(
    tiny: SimpleNamespace, tmp_path: Path, whole: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        at_loss(patch, 2, be_killed)
        with pytest.raises(_KilledError):
            finetune(settings(tiny, out))
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    resume(out)
    assert losses(out) == losses(whole(method="deep-lora"))


def test_an_unfinished_checkpoint_is_passed_over(
    tiny: SimpleNamespace, tmp_path: Path, whole: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        at_loss(patch, 5, be_killed)
        with pytest.raises(_KilledError):
            finetune(settings(tiny, out))
    broken = out / "checkpoints" / "checkpoint-6"
    shutil.copytree(out / "checkpoints" / "checkpoint-4", broken)
    (broken / "trainer_state.json").unlink()
    resume(out)
    assert outcome(out) == outcome(whole(method="deep-lora"))


def test_killed_while_finishing(
    tiny: SimpleNamespace, tmp_path: Path, whole: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.finetuning import run_results

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(run_results, "_write_predictions", lambda *_: be_killed())
        with pytest.raises(_KilledError):
            finetune(settings(tiny, out))
    assert (out / "adapter").is_dir()
    resume(out)
    assert outcome(out) == outcome(whole(method="deep-lora"))


def test_ctrl_c_in_the_last_step_finishes_the_run(
    tiny: SimpleNamespace, tmp_path: Path, whole: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_loss(patch, STEPS, press_ctrl_c)
        finetune(settings(tiny, tmp_path / "run"))
    assert outcome(tmp_path / "run") == outcome(whole(method="deep-lora"))


def test_a_stopped_run_holds_no_secret(tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    at_loss(monkeypatch, 3, press_ctrl_c)
    with pytest.raises(Interrupted):
        finetune(settings(tiny, tmp_path / "run"))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "optimizer.pt" for path in files)
    assert all(SECRET.encode() not in path.read_bytes() for path in files)


@pytest.fixture
def stopped(tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run stopped in step 3, on files of its own."""
    data, held = write_pairs(tmp_path / "train.csv"), write_pairs(tmp_path / "held.csv", rows=12)
    with monkeypatch.context() as patch:
        at_loss(patch, 3, press_ctrl_c)
        with pytest.raises(Interrupted):
            finetune(settings(tiny, tmp_path / "run", data=str(data), eval_data=str(held)))
    return SimpleNamespace(out=tmp_path / "run", data=data, eval_data=held)


@pytest.mark.parametrize("file", ["data", "eval_data"])
def test_resume_refuses_changed_data(stopped: SimpleNamespace, file: str) -> None:
    path: Path = getattr(stopped, file)
    rows = path.read_text(encoding="utf-8").splitlines()
    rows[1] = "red red red," + rows[1].split(",", 1)[1]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"{path.name} has changed since the run began"):
        resume(stopped.out)
    assert not (stopped.out / "result.json").exists()


def test_resume_says_that_the_data_changed_whatever_else_is_wrong_with_it(stopped: SimpleNamespace) -> None:
    write_csv(stopped.data, ["sentence1", "sentence2", "score"], [("red", "blue", 1)] * 20)
    with pytest.raises(UserError, match="has changed since the run began"):
        resume(stopped.out)


def test_resume_without_the_data(stopped: SimpleNamespace) -> None:
    stopped.data.unlink()
    with pytest.raises(UserError, match="does not exist"):
        resume(stopped.out)


def test_a_moved_run_can_be_resumed(stopped: SimpleNamespace, tmp_path: Path) -> None:
    moved = stopped.out.rename(tmp_path / "moved")
    resume(moved)
    assert (moved / "result.json").is_file()
    assert not stopped.out.exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": {}}'])
def test_resume_with_a_damaged_config(stopped: SimpleNamespace, content: str) -> None:
    (stopped.out / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"damaged|another version|config\.json"):
        resume(stopped.out)


def test_resume_of_a_run_of_a_newer_version(stopped: SimpleNamespace) -> None:
    file = stopped.out / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["settings"]["invented_later"] = 1
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"another version of rankwise \(unknown settings: invented_later\)"):
        resume(stopped.out)


def test_resume_of_a_finished_run(whole: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"is finished: its scores are in .*result\.json"):
        resume(whole(method="deep-lora"))


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch])
def test_resume_of_what_is_no_run(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no run to resume: it has no config\.json"):
        resume(tmp_path / "nothing")


# --- refusals, before anything is written


def untouched(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_output_folder_in_use_is_refused_and_untouched(tiny: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match=r"in use or choose another|in use.*--out"):
        finetune(settings(tiny, tmp_path / "run"))
    assert untouched(tmp_path) == {"run/thesis.tex": b"years of work"}


def test_an_unfinished_run_is_refused_with_a_hint(stopped: SimpleNamespace, tiny: SimpleNamespace) -> None:
    before = untouched(stopped.out)
    with pytest.raises(UserError, match="--resume"):
        finetune(settings(tiny, stopped.out))
    assert untouched(stopped.out) == before


def test_an_output_that_is_a_file(tiny: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("here", encoding="utf-8")
    for out in (tmp_path / "run", tmp_path / "run" / "inside"):
        with pytest.raises(UserError, match="output folder"):
            finetune(settings(tiny, out))
    assert untouched(tmp_path) == {"run": b"here"}


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder where nobody can make one")
def test_a_place_where_nothing_can_be_written_is_found_at_once(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even the administrator makes no folder in /sys; nothing has been loaded by then."""
    from rankwise.finetuning import runner

    monkeypatch.setattr(runner, "load_model", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match="cannot make the output folder /sys/rankwise/run: "):
        finetune(settings(tiny, Path("/sys/rankwise/run")))


def test_looking_for_a_place_leaves_nothing_behind(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--shots 99"):
        finetune(settings(tiny, tmp_path / "new" / "run", shots=99))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_output_folder_is_fine(tiny: SimpleNamespace, tmp_path: Path) -> None:
    assert finetune(settings(tiny, tmp_path, steps=1, method="lora"))["steps"] == 1


def refuse(tiny: SimpleNamespace, tmp_path: Path, match: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=match):
        finetune(settings(tiny, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "a/b/c"])
def test_unknown_model_folder(tiny: SimpleNamespace, tmp_path: Path, name: str) -> None:
    refuse(tiny, tmp_path, f"there is no model folder {name}; --model takes a folder or a hub name", model=name)


def test_model_folder_without_config(tiny: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    refuse(tiny, tmp_path, r"has no config\.json", model=str(tmp_path / "model"))


def test_model_folder_without_safetensors(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refuse(tiny, tmp_path, r"no \.safetensors weights; rankwise does not unpickle", model=str(model))


def test_model_folder_with_cut_weights(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    refuse(tiny, tmp_path, "cannot load the model in", model=str(model))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "never-heard-of"}'])
def test_model_folder_with_a_damaged_config(tiny: SimpleNamespace, tmp_path: Path, content: str) -> None:
    model = save_tiny_checkpoint(tmp_path / "model")
    (model / "config.json").write_text(content, encoding="utf-8")
    refuse(tiny, tmp_path, "cannot load the model in", model=str(model))


def test_model_folder_without_a_tokenizer(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (model / name).unlink()
    refuse(tiny, tmp_path, "tokenizer", model=str(model))


def test_hub_model_offline(tiny: SimpleNamespace, tmp_path: Path) -> None:
    refuse(tiny, tmp_path, r"cannot get nobody/no-such-model/config\.json.*Offline\?", model="nobody/no-such-model")


def test_shots_beyond_the_data(tiny: SimpleNamespace, tmp_path: Path) -> None:
    refuse(tiny, tmp_path, r"--shots 41 asks for more rows than .* has \(40\)", shots=41)


def test_nothing_left_to_hold_out(tiny: SimpleNamespace, tmp_path: Path) -> None:
    refuse(tiny, tmp_path, r"all 40 rows of .* trained on and none held out.*--eval-data", shots=40)


def test_one_training_class(tiny: SimpleNamespace, tmp_path: Path) -> None:
    refuse(tiny, tmp_path, "training rows have the same label", shots=1, data=tiny.classes)


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("variant", {"variant": "nonsense"}),
        ("rank", {"r": 1000}),
        ("rank", {"r": 1000, "variant": "random"}),
        ("rank", {"r": 1000, "variant": "spectral"}),
    ],
)
def test_settings_that_do_not_fit_the_model_are_mistakes_of_the_user(
    tiny: SimpleNamespace, tmp_path: Path, option: str, changes: dict[str, Any]
) -> None:
    refuse(tiny, tmp_path, option, **changes)


def test_a_rank_above_the_layers_is_fine_for_lora(tiny: SimpleNamespace, tmp_path: Path) -> None:
    assert finetune(settings(tiny, tmp_path / "run", method="lora", r=100, steps=1))["layers"][0]["width"] == 100


def test_texts_longer_than_the_model_reads(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """The tiny model has 64 positions: the default --max-length of 128 must not run into them."""
    rows = [("good cat " * 60, "bad dog " * (i + 1), i / 8) for i in range(20)]
    data = write_csv(tmp_path / "long.csv", ["sentence1", "sentence2", "score"], rows)
    try:
        finetune(settings(tiny, tmp_path / "run", data=str(data), shots=10, steps=1))
    except UserError as error:
        assert "max-length" in str(error)


@pytest.mark.parametrize("method", ["deep-lora", "lora"])
def test_a_run_that_diverges_says_so(tiny: SimpleNamespace, tmp_path: Path, method: str) -> None:
    with pytest.raises(UserError, match=r"--lr|learning rate"):
        finetune(settings(tiny, tmp_path / "run", method=method, lr=1e30))


# --- the remaining settings


def test_bf16_runs(tiny: SimpleNamespace, tmp_path: Path) -> None:
    result = finetune(settings(tiny, tmp_path / "run", precision="bf16", steps=3))
    assert result["precision"] == "bf16"
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path / "run"))


def test_auto_precision_is_recorded(tiny: SimpleNamespace, tmp_path: Path) -> None:
    result = finetune(settings(tiny, tmp_path / "run", precision="auto", steps=1))
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert result["precision"] == config["precision"] in ("fp32", "bf16")


@pytest.mark.parametrize("variant", ["compressed", "spectral", "random"])
def test_every_variant_runs(tiny: SimpleNamespace, tmp_path: Path, variant: str) -> None:
    result = finetune(settings(tiny, tmp_path / "run", variant=variant, steps=2, init_batches=3))
    assert all(layer["rank"] <= 4 for layer in result["layers"])


def test_held_out_file_and_limit(tiny: SimpleNamespace, tmp_path: Path) -> None:
    held = write_pairs(tmp_path / "held.csv", rows=12)
    result = finetune(
        settings(tiny, tmp_path / "run", shots=None, eval_data=str(held), eval_limit=5, steps=1, method="lora")
    )
    assert (result["train_rows"], result["held_out_rows"]) == (40, 5)


def test_a_fifth_is_held_out_without_shots(tiny: SimpleNamespace, tmp_path: Path) -> None:
    result = finetune(settings(tiny, tmp_path / "run", shots=None, steps=1, method="lora"))
    assert (result["train_rows"], result["held_out_rows"]) == (32, 8)


def test_fewer_rows_than_a_batch(tiny: SimpleNamespace, tmp_path: Path) -> None:
    result = finetune(settings(tiny, tmp_path / "run", shots=3, batch_size=16, steps=2))
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]
    assert result["train_rows"] == 3


def test_predictions_follow_the_rows_of_the_file(tiny: SimpleNamespace, whole: Callable[..., Path]) -> None:
    """Scoring sorts by length; the file must be in the order of the rows, each with its own target."""
    rows = predictions(whole(method="deep-lora"))
    scores = {row["row"]: row["label"] / 5 for row in read_table(tiny.pairs).rows}
    assert [int(row["row"]) for row in rows] == sorted(int(row["row"]) for row in rows)
    assert [float(row["target"]) for row in rows] == pytest.approx([scores[int(row["row"])] for row in rows])


def test_the_loss_is_that_of_the_batches(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """One step on all rows without dropout: the logged loss is the task's own on the base model."""
    model = str(save_tiny_checkpoint(tmp_path / "model", dropout=0.0))
    finetune(settings(tiny, tmp_path / "run", model=model, shots=10, batch_size=10, steps=1, method="lora"))
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    table = read_table(tiny.pairs)
    task = make_task("pair-similarity", table, load_tokenizer(model)[0], source=model, max_length=128)
    base = load_model(task, model, None).eval()
    assert isinstance(task, PairSimilarity)
    with torch.no_grad():
        expected = float(task.loss(base, task.collate(config["data"]["train_rows"])))
    # Trainer logs losses rounded
    assert losses(tmp_path / "run")[0][1] == pytest.approx(expected, rel=1e-3)


# --- a real process, really killed


def start(tiny: SimpleNamespace, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rankwise", "finetune", "--out", str(out), *more]
    return subprocess.Popen(
        command, env=offline_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def options(tiny: SimpleNamespace) -> list[str]:
    return (
        f"--model {tiny.model} --data {tiny.pairs} --shots 17 --steps 150 --batch-size 4 --rank 4 --precision fp32 "
        "--solver train --lr 0.02 --init-scale 0.1 --save-every 10"
    ).split()


def wait_for(found: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_real_process_is_stopped_and_resumed(tiny: SimpleNamespace, tmp_path: Path, kind: signal.Signals) -> None:
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    process = start(tiny, whole, *options(tiny))
    assert process.wait(timeout=200) == 0, process.communicate()
    process = start(tiny, out, *options(tiny))
    wait_for(lambda: (out / "checkpoints" / "checkpoint-20").is_dir(), process)
    process.send_signal(kind)
    _, stderr = process.communicate(timeout=60)
    assert not (out / "result.json").exists()
    if kind == signal.SIGINT:
        assert process.returncode == 1
        assert f"rankwise finetune --resume --out {out}" in stderr
        assert "Traceback" not in stderr
    process = start(tiny, out, "--resume")
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stdout + stderr
    assert outcome(out) == outcome(whole)
