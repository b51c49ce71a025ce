"""A user's own metric, by module and name, in a whole run and in a resumed one."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rankwise.cli.main import main
from rankwise.errors import Interrupted, UserError
from rankwise.finetuning import finetune, resume
from rankwise.finetuning.named_metrics import chosen_metrics, imported_metric
from tests.cli.complaints import Captured, complaint
from tests.finetuning.run_outcomes import outcome, predictions, settings
from tests.finetuning.test_checkpoints import stop_after

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

MODULE = """
def share_of_positives(predictions, targets):
    return float((predictions == 1).mean())

def misses(predictions, targets):
    return float((predictions != targets).sum())

misses.greater_is_better = False
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the working folder, under a name that no other test has imported."""
    name = f"metrics_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_run_reports_and_follows_it(tiny: SimpleNamespace, tmp_path: Path, module: str) -> None:
    chosen = settings(
        tiny, tmp_path / "run", task="classification", data=tiny.classes, early_stopping=9, validation_rows=6,
        metrics=(f"{module}:misses", f"{module}:share_of_positives", "cohen_kappa"), primary_metric="misses",
    )  # fmt: skip
    result = finetune(chosen)
    rows = predictions(tmp_path / "run")
    scores = result["scores"]["after"]
    assert scores["misses"] == sum(row["target"] != row["after"] for row in rows)
    assert scores["share_of_positives"] == pytest.approx(np.mean([row["after"] == "pos" for row in rows]))
    assert "cohen_kappa" in scores
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert result["early_stopping"]["best_score"] == min(e["validation"] for e in lines if "validation" in e)


def test_a_resumed_run_finds_it_again(
    tiny: SimpleNamespace, tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"task": "classification", "data": tiny.classes, "metrics": (f"{module}:misses",)}
    finetune(settings(tiny, tmp_path / "whole", **chosen))
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(Interrupted):
            finetune(settings(tiny, tmp_path / "run", **chosen))
    resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_module:f", "cannot import 'f' from 'no_such_module'"),
        ("{module}:other", "cannot import 'other'"),
        ("{module}:number", "must be a function"),
        (":f", "cannot import"),
        ("broken:f", "cannot import"),
    ],
)
def test_what_is_no_function(module: str, tmp_path: Path, path: str, said: str) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('of its own')")
    with pytest.raises(UserError, match=said):
        imported_metric(path.format(module=module))


def test_an_error_is_better_lower(module: str) -> None:
    better = [
        metric.greater_is_better
        for metric in chosen_metrics([f"{module}:misses", f"{module}:share_of_positives"], {}, (), "t")
    ]
    assert better == [False, True]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("pos=x", "--class-weights must be balanced or weights by name"),
        ("heavy", "must be 'balanced'"),
        ("neither=2", "name the class 'neither'"),
        ("pos=-1", "at least 0"),
    ],
)
def test_class_weights_on_the_command_line(
    tiny: SimpleNamespace, tmp_path: Path, capsys: Captured, given: str, said: str
) -> None:
    arguments = f"finetune --model {tiny.model} --data {tiny.classes} --out {tmp_path / 'run'} --class-weights {given}"
    assert main(arguments.split()) == 2
    assert said in complaint(capsys)


def test_class_weights_by_name_reach_the_run(tiny: SimpleNamespace, tmp_path: Path) -> None:
    arguments = (
        f"finetune --model {tiny.model} --data {tiny.classes} --out {tmp_path / 'run'} --steps 2 --precision fp32"
    )
    assert main([*arguments.split(), "--class-weights", "neg=1,pos=3"]) == 0
    details = json.loads((tmp_path / "run" / "config.json").read_text())["task_details"]
    used = details["class_weights_used"]
    assert used["pos"] / used["neg"] == pytest.approx(3)
