"""Whole studies: what they leave on disk, and that stopping, resuming, splitting and extending change no score."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from rankwise.errors import UserError
from rankwise.finetuning.comparison import Execution, RunSpec, StudySettings, compare, merge, summarize_study
from rankwise.finetuning.comparison import study as study_module
from rankwise.finetuning.comparison import trial as trial_module
from rankwise.finetuning.comparison.study import StudyFolder
from rankwise.finetuning.comparison.trial import run_trial
from tests.finetuning.comparison.test_trial import one_named
from tests.finetuning.comparison.tiny_studies import found, lines, study
from tests.finetuning.tiny_checkpoint import offline_environment, write_pairs

SECRET = "hf_" + "notARealToken" * 2
PLACE = "nobodys-business"

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def invented(rules: StudySettings, run: RunSpec) -> dict[str, Any]:
    """A row without training: the score is a hash of the run's key."""
    score = int(hashlib.sha256(run.key.encode()).hexdigest()[:6], 16) / 16**6
    return {
        "format_version": 1, "key": run.key, **dataclasses.asdict(run), "steps": rules.steps, "batch_size": 4,
        "r": rules.r, "head": rules.head, "status": "ok", "error": None, "score": score, "before": None,
        "seconds": 1.0, "peak_memory_bytes": None, "metric": "spearman", "scores": {"spearman": score},
        "held_out_rows": 8, "train_rows": f"rows {run.seed}", "trainable_parameters": 10, "adapter_bytes": 40,
        "seconds_per_step": 0.1, "ranks": None, "directions_99": None, "update_norm": None, "final_loss": 0.1,
    }  # fmt: skip


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """Runs are invented, not trained, and the report is left out; the list names the runs that were done."""
    calls: list[RunSpec] = []

    def run(rules: StudySettings, run: RunSpec) -> dict[str, Any]:
        calls.append(run)
        return invented(rules, run)

    monkeypatch.setattr(study_module, "run_trial", run)
    monkeypatch.setattr(study_module, "write_comparison_report", lambda path, *_: path / "report.html")
    return calls


@pytest.fixture(scope="module")
def whole(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished study of a named task and a user's table, with a secret in the environment."""
    root = tmp_path_factory.mktemp("whole")
    one_named(root / PLACE, 40, 12)
    rules = study(tiny, root / "study", tasks=(tiny.pairs, "rte"), data_root=str(root / PLACE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        summary = compare(rules)
    return SimpleNamespace(out=root / "study", rules=rules, summary=summary, data_root=str(root / PLACE))


def copy(whole: SimpleNamespace, out: Path) -> StudySettings:
    shutil.copytree(whole.out, out)
    return dataclasses.replace(whole.rules, out=str(out))


# --- a whole study


def test_a_study_holds_every_run_once(whole: SimpleNamespace, tiny: SimpleNamespace) -> None:
    rows = lines(whole.out)
    assert [row["status"] for row in rows] == ["ok"] * 12, [row["error"] for row in rows]
    tuning = [(r["task"], r["method"], r["lr"]) for r in rows if r["phase"] == "tune"]
    grid = whole.rules.grid("lora")
    assert sorted(tuning) == sorted((task, "lora", lr) for task in (tiny.pairs, "rte") for lr in grid)
    trials = [(r["task"], r["method"], r["seed"]) for r in rows if r["phase"] == "confirm"]
    assert sorted(trials) == sorted((t, m, s) for t in (tiny.pairs, "rte") for m in ("none", "lora") for s in (0, 1))
    assert {row["shots"] for row in rows} == {8}


def test_the_trials_use_the_best_rate_of_the_tuning(whole: SimpleNamespace) -> None:
    for task in whole.rules.tasks:
        mine = [row for row in lines(whole.out) if (row["task"], row["method"]) == (task, "lora")]
        tuned = {row["lr"]: row["score"] for row in mine if row["phase"] == "tune"}
        best = min(lr for lr, score in tuned.items() if score == max(tuned.values()))
        assert {row["lr"] for row in mine if row["phase"] == "confirm"} == {best}


def test_what_is_on_disk(whole: SimpleNamespace) -> None:
    names = {path.name for path in whole.out.iterdir()}
    assert names - {"rows.jsonl.lock"} == {"study.json", "rows.jsonl", "summary.json", "report.html"}
    for name in ("study.json", "summary.json"):
        assert json.loads((whole.out / name).read_text(encoding="utf-8"))["format_version"] == 1
    assert "<svg" in (whole.out / "report.html").read_text(encoding="utf-8")
    known = StudyFolder(whole.out).read_settings()
    assert known == dataclasses.replace(whole.rules, data_root=None)


def test_no_secret_and_no_data_folder_on_disk(whole: SimpleNamespace) -> None:
    for path in whole.out.rglob("*"):
        content = path.read_bytes()
        assert SECRET.encode() not in content, path
        assert PLACE.encode() not in content, path


@pytest.mark.parametrize("told", ["setting", "variable"])
def test_no_data_folder_in_what_a_failed_run_says(
    whole: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    (tmp_path / PLACE / "glue_rte").mkdir(parents=True)
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path / PLACE))
    rules = dataclasses.replace(whole.rules, data_root=str(tmp_path / PLACE) if told == "setting" else None)
    row = run_trial(rules, RunSpec("confirm", "rte", "lora", 8, 0, 1e-3))
    assert row["status"] == "failed"
    assert PLACE not in row["error"]
    assert str(Path("DATA_ROOT") / "glue_rte" / "train.tsv") in row["error"]


def test_the_same_command_again_does_nothing(whole: SimpleNamespace, tmp_path: Path, done: list[RunSpec]) -> None:
    rules = copy(whole, tmp_path / "again")
    before = (tmp_path / "again" / "rows.jsonl").read_bytes()
    assert compare(rules) == whole.summary
    assert not done
    assert (tmp_path / "again" / "rows.jsonl").read_bytes() == before


def test_deleted_rows_are_done_again_with_the_same_result(whole: SimpleNamespace, tmp_path: Path) -> None:
    """Real runs in another order after others, and half a line at the end."""
    out = tmp_path / "resumed"
    rules = copy(whole, out)
    kept = (out / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    half = kept[7][: len(kept[7]) // 2]
    (out / "rows.jsonl").write_text("".join(kept[i] for i in (11, 0, 3, 4, 5, 6)) + half, encoding="utf-8")
    compare(rules)
    rows = StudyFolder(out).rows()
    assert len(rows) == 12  # the half line is no row
    assert {row["key"]: {**row, **unmeasured(row)} for row in rows} == {
        key: {**row, **unmeasured(row)} for key, row in found(whole.out).items()
    }


def unmeasured(row: dict[str, Any]) -> dict[str, None]:
    return dict.fromkeys(("seconds", "seconds_per_step", "peak_memory_bytes"))


def test_a_line_cut_short_swallows_no_other(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.append({"key": "a", "x": 1})
    with folder.rows_file.open("ab") as file:
        file.write('{"key": "b", "text": "Ü'.encode()[:-1])  # even in the middle of a character
    folder.append({"key": "c", "x": 3})
    folder.append({"key": "d", "x": 4})
    assert [row["key"] for row in folder.rows()] == ["a", "c", "d"]


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.rows_file.write_text('\n[1]\nnull\n{"key": 3}\n{"no": "key"}\n{"key": "a"}\n{"key', encoding="utf-8")
    assert folder.rows() == [{"key": "a"}]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_rows_of_many_processes_never_mix(tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(tmp_path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    rows = lines(tmp_path)
    assert sorted(row["key"] for row in rows) == sorted(f"{w} {i}" for w in range(4) for i in range(40))
    assert all(row["text"] == "x" * 20_000 for row in rows)


def _append_many(path: Path, worker: int) -> None:
    for number in range(40):
        StudyFolder(path).append({"key": f"{worker} {number}", "text": "x" * 20_000})


# --- growing


def test_more_methods_seeds_labels_and_tasks_redo_nothing(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec]
) -> None:
    rules = study(tiny, tmp_path / "s")
    compare(rules)
    first = list(done)
    before = (tmp_path / "s" / "rows.jsonl").read_text(encoding="utf-8")
    done.clear()
    other = str(write_pairs(tmp_path / "other.csv", 40))
    compare(study(tiny, tmp_path / "s", methods=("dora",), seeds=3, shots=(4,), tasks=(other,)))
    assert not set(done) & set(first)
    assert (tmp_path / "s" / "rows.jsonl").read_text(encoding="utf-8").startswith(before)
    rows = lines(tmp_path / "s")
    assert len({row["key"] for row in rows}) == len(rows)
    trials = {(r["task"], r["method"], r["shots"], r["seed"]) for r in rows if r["phase"] == "confirm"}
    assert len(trials) == 2 * 3 * 2 * 3
    known = StudyFolder(tmp_path / "s").read_settings()
    assert (known.tasks, known.methods, known.shots, known.seeds) == (
        (tiny.pairs, other), ("none", "lora", "dora"), (4, 8), 3,
    )  # fmt: skip


def test_a_larger_budget_tries_more_rates_and_makes_the_trials_anew(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec]
) -> None:
    rules = study(tiny, tmp_path / "s", budget=1)
    compare(rules)
    compare(dataclasses.replace(rules, budget=2))
    compare(dataclasses.replace(rules, budget=5))
    assert len({run.key for run in done}) == len(done)  # nothing was done twice
    tried = {run.lr: invented(rules, run)["score"] for run in done if run.phase == "tune"}
    assert sorted(tried) == list(dataclasses.replace(rules, budget=5).grid("lora"))
    summary = summarize_study(tmp_path / "s")
    (chosen,) = [entry for entry in summary["learning_rates"] if entry["method"] == "lora"]
    assert (chosen["lr"], chosen["used"]) == (max(tried, key=lambda lr: tried[lr]), [chosen["lr"]])
    assert summary["counts"]["missing"] == 0
    done.clear()
    compare(rules)  # fewer rates: the study stays as it is
    assert not done
    assert summarize_study(tmp_path / "s") == summary


def test_other_rules_are_refused_and_nothing_changes(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec]
) -> None:
    compare(study(tiny, tmp_path / "s"))
    done.clear()
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    with pytest.raises(UserError) as caught:
        compare(study(tiny, tmp_path / "s", steps=4, head="frozen"))
    assert "steps: 3 there, 4 now" in str(caught.value)
    assert "head: trained there, frozen now" in str(caught.value)
    assert not done
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before


@pytest.mark.parametrize("taken", ["a file in it", "a file of that name", "a damaged study", "no study.json"])
def test_a_folder_with_something_else_is_refused(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec], taken: str
) -> None:
    out = tmp_path / "s"
    if taken == "a file of that name":
        out.write_text("mine", encoding="utf-8")
    else:
        out.mkdir()
        name = {"a file in it": "thesis.tex", "a damaged study": "study.json", "no study.json": "rows.jsonl"}[taken]
        (out / name).write_text('{"key": ', encoding="utf-8")
    with pytest.raises(UserError, match=r"no study; choose another --out|is damaged"):
        compare(study(tiny, out))
    assert not done
    assert out.is_file() or len(list(out.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ("sttsb",)}, "unknown task 'sttsb'"),
        ({"tasks": ("nowhere.csv",)}, "does not exist"),
        ({"model": "/no/such/model"}, "there is no model folder"),
        ({"shots": (8, 1000)}, "1000 labelled rows asked for, 24 to draw from; lower --shots"),
        ({"tune_shots": 64}, "64 labelled rows asked for, 24 to draw from; lower --tune-shots"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        compare(study(tiny, tmp_path / "s", **changes))
    assert says in str(caught.value)
    assert not done
    assert not (tmp_path / "s").exists()


def test_where_nothing_is_tuned_its_number_of_labels_is_no_matter(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec]
) -> None:
    compare(study(tiny, tmp_path / "s", tune_shots=64, fixed=("lora",)))
    assert {run.phase for run in done} == {"confirm"}


@pytest.mark.parametrize("rows", [10, 14])
def test_fewer_rows_than_a_batch(tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec], rows: int) -> None:
    """Precision is measured on a batch, and a batch need not be full."""
    few = str(write_pairs(tmp_path / "few.csv", rows))
    rules = study(tiny, tmp_path / "s", tasks=(few,), shots=(4,), tune_shots=4, batch_size=16, precision="auto")
    compare(rules)
    assert StudyFolder(tmp_path / "s").read_settings().precision in ("fp32", "bf16")
    compare(rules)  # auto again: what was measured once stays


def test_a_table_that_changed_under_a_study_is_refused(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec]
) -> None:
    own = write_pairs(tmp_path / "own.csv", 40)
    compare(study(tiny, tmp_path / "s", tasks=(str(own),)))
    text = own.read_text(encoding="utf-8").splitlines()
    own.write_text("\n".join([text[0], *reversed(text[1:])]) + "\n", encoding="utf-8")
    trial_module._load_task.cache_clear()  # as in a new process
    with pytest.raises(UserError, match="changed"):
        compare(study(tiny, tmp_path / "s", tasks=(str(own),), seeds=3))


# --- failing runs


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[RunSpec], bool]) -> list[RunSpec]:
    calls: list[RunSpec] = []

    def run(rules: StudySettings, run: RunSpec) -> dict[str, Any]:
        calls.append(run)
        if fails(run):
            return {**invented(rules, run), "status": "failed", "error": "no luck", "score": None}
        return invented(rules, run)

    monkeypatch.setattr(study_module, "run_trial", run)
    return calls


def test_a_failing_run_stops_nothing_and_is_retried_on_request(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = study(tiny, tmp_path / "s")
    calls = failing(monkeypatch, lambda run: run.phase == "confirm" and run.seed == 0)
    compare(rules)
    assert len(calls) == 6
    calls = failing(monkeypatch, lambda run: False)
    compare(rules)
    assert not calls
    compare(rules, Execution(retry_failed=True))
    assert sorted(run.method for run in calls) == ["lora", "none"]
    assert {run.seed for run in calls} == {0}
    assert all(row["status"] == "ok" for row in found(tmp_path / "s").values())
    calls.clear()
    compare(rules, Execution(retry_failed=True))
    assert not calls


def test_a_rate_that_fails_is_not_chosen(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    low, high = study(tiny, tmp_path).grid("lora")
    for name, bad in (("low", low), ("high", high)):
        failing(monkeypatch, lambda run, bad=bad: run.phase == "tune" and run.lr == bad)
        compare(study(tiny, tmp_path / name))
        trials = [row for row in lines(tmp_path / name) if (row["phase"], row["method"]) == ("confirm", "lora")]
        assert {row["lr"] for row in trials} == {low, high} - {bad}


def test_a_method_that_always_fails_is_left_out_and_said_so(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task's path may look like markup to rich."""
    odd = tmp_path / "a [" / "bold] b.csv"
    odd.parent.mkdir()
    write_pairs(odd, 40)
    failing(monkeypatch, lambda run: run.method == "lora")
    said = StringIO()
    compare(study(tiny, tmp_path / "s", tasks=(str(odd),)), console=Console(file=said, width=400))
    assert f"lora failed at every learning rate on {odd}: left out" in said.getvalue()
    assert {row["method"] for row in lines(tmp_path / "s") if row["phase"] == "confirm"} == {"none"}


def test_a_study_in_which_everything_fails_still_has_a_summary_and_a_report(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda run: True)
    compare(study(tiny, tmp_path / "s"))
    assert (tmp_path / "s" / "report.html").is_file()
    assert json.loads((tmp_path / "s" / "summary.json").read_text(encoding="utf-8"))["format_version"] == 1
    assert {row["phase"] for row in lines(tmp_path / "s")} == {"tune", "confirm"}  # the unadapted model has no rate


def test_ctrl_c_keeps_what_is_done(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[RunSpec] = []

    def run(rules: StudySettings, run: RunSpec) -> dict[str, Any]:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(run)
        return invented(rules, run)

    monkeypatch.setattr(study_module, "run_trial", run)
    said = StringIO()
    with pytest.raises(KeyboardInterrupt):
        compare(study(tiny, tmp_path / "s"), console=Console(file=said, width=400))
    assert len(lines(tmp_path / "s")) == 4
    assert "4 runs are kept" in said.getvalue()
    failing(monkeypatch, lambda run: False)
    compare(study(tiny, tmp_path / "s"))
    assert len(found(tmp_path / "s")) == len(lines(tmp_path / "s")) == 6


# --- in parts


def test_shards_merged_are_the_study(tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec]) -> None:
    rules = study(tiny, tmp_path / "whole", methods=("none", "lora", "dora", "deep-lora"))
    summary = compare(rules)
    done.clear()
    parts = []
    for number in (1, 2, 3):
        part = dataclasses.replace(rules, out=str(tmp_path / f"part{number}"))
        compare(part, Execution(shard=(number, 3)))
        parts.append(part.out)
    keys = [run.key for run in done]
    assert len(keys) == len(set(keys))  # nothing twice
    assert merge(parts, tmp_path / "merged") == summary
    assert found(tmp_path / "merged") == found(tmp_path / "whole")
    before = (tmp_path / "merged" / "rows.jsonl").read_bytes()
    merge(parts, tmp_path / "merged")
    assert (tmp_path / "merged" / "rows.jsonl").read_bytes() == before
    done.clear()
    compare(dataclasses.replace(rules, out=str(tmp_path / "merged")))
    assert not done


def test_merging_failed_runs(
    tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that succeeded in one part and failed in another has succeeded; merging twice adds nothing."""
    failing(monkeypatch, lambda run: run.phase == "confirm")
    compare(study(tiny, tmp_path / "bad"))
    failing(monkeypatch, lambda run: run.phase == "confirm" and run.method == "lora")
    compare(study(tiny, tmp_path / "good"))
    for order in (("bad", "good"), ("good", "bad")):
        out = tmp_path / "-".join(order)
        for _ in range(2):
            merge([tmp_path / part for part in order], out)
            status = {(row["phase"], row["method"]): row["status"] for row in StudyFolder(out).rows()}
            assert status == {("tune", "lora"): "ok", ("confirm", "none"): "ok", ("confirm", "lora"): "failed"}
        size = len(lines(out))
        merge([tmp_path / part for part in order], out)
        assert len(lines(out)) == size


def test_parts_of_other_rules_are_not_merged(tiny: SimpleNamespace, tmp_path: Path, done: list[RunSpec]) -> None:
    compare(study(tiny, tmp_path / "a"))
    compare(study(tiny, tmp_path / "b", steps=4))
    with pytest.raises(UserError, match="steps: 3 there, 4 now"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match="is no study"):
        merge([tmp_path / "a", tmp_path / "nowhere"], tmp_path / "merged")
    with pytest.raises(UserError, match="at least one study folder"):
        merge([], tmp_path / "merged")
    compare(study(tiny, tmp_path / "c", steps=4))
    with pytest.raises(UserError, match="follows other rules"):
        merge([tmp_path / "a"], tmp_path / "c")


# --- the report


def test_names_are_escaped_in_the_report(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = tmp_path / "x<script>alert(1)<" / "script>&amp;.csv"
    evil.parent.mkdir()
    write_pairs(evil, 40)
    failing(monkeypatch, lambda run: run.seed == 1)
    compare(study(tiny, tmp_path / "s", tasks=(str(evil),)))
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page


def test_summary_of_a_part_of_a_study(whole: SimpleNamespace, tmp_path: Path) -> None:
    copy(whole, tmp_path / "s")
    kept = (tmp_path / "s" / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for count in (0, 1, 5, 12):
        (tmp_path / "s" / "rows.jsonl").write_text("".join(kept[:count]), encoding="utf-8")
        summary = summarize_study(tmp_path / "s")
    assert summary == whole.summary
    with pytest.raises(UserError, match="is no study"):
        summarize_study(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "changes", [{"jobs": 0}, {"backend": "threads"}, {"shard": (0, 2)}, {"shard": (3, 2)}, {"shard": (1, 0)}]
)
def test_bad_executions_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        Execution(**changes)


# --- many processes


def scores(out: Path) -> dict[str, Any]:
    return {key: (row["status"], row["error"], row["score"]) for key, row in found(out).items()}


@pytest.mark.slow
def test_two_processes_find_the_same(whole: SimpleNamespace, tmp_path: Path) -> None:
    compare(dataclasses.replace(whole.rules, out=str(tmp_path / "two")), Execution(jobs=2))
    assert scores(tmp_path / "two") == scores(whole.out)


@pytest.mark.slow
def test_two_dask_workers_find_the_same(whole: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="needs the cluster extra")
    compare(dataclasses.replace(whole.rules, out=str(tmp_path / "dask")), Execution(jobs=2, backend="dask"))
    assert scores(tmp_path / "dask") == scores(whole.out)


@pytest.mark.slow
def test_a_scheduler_out_of_reach(whole: SimpleNamespace, tmp_path: Path) -> None:
    dask = pytest.importorskip("dask", reason="needs the cluster extra")
    pytest.importorskip("distributed", reason="needs the cluster extra")
    execution = Execution(backend="dask", scheduler="tcp://127.0.0.1:9")
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(UserError, match=r"cannot reach tcp://127.0.0.1:9"),
    ):
        compare(dataclasses.replace(whole.rules, out=str(tmp_path / "dask")), execution)


def start(rules: StudySettings, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "rankwise", "compare", "--model", rules.model, "--task", ",".join(rules.tasks),
        "--methods", ",".join(rules.methods), "--shots", "8", "--seeds", str(rules.seeds), "--budget", "2",
        "--tune-shots", "8", "--tune-seeds", "1", "--steps", str(rules.steps), "--batch-size", "4", "--rank", "4",
        "--precision", "fp32", "--out", rules.out, *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job has it ignored
        env=offline_environment(),
    )  # fmt: skip


def wait_for_rows(out: Path, count: int, process: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        have = len(StudyFolder(out).rows())
        if have >= count:
            return have
        time.sleep(0.02)
    raise AssertionError(f"no {count} rows: {process.communicate()[0] if process.poll() is not None else 'too slow'}")


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("kind", ["ctrl-c", "kill"])
def test_stopping_a_real_study_loses_the_run_in_progress_and_nothing_else(
    tiny: SimpleNamespace, tmp_path: Path, kind: str, jobs: int
) -> None:
    rules = study(tiny, tmp_path / "s", methods=("lora",), seeds=4, steps=40)
    process = start(rules, "--jobs", str(jobs))
    had = wait_for_rows(tmp_path / "s", 3, process)
    if kind == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 1
        assert "Traceback" not in said
        assert "runs are kept" in said
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    kept = StudyFolder(tmp_path / "s").rows()
    assert had <= len(kept) < 6
    assert all(row["status"] == "ok" for row in kept)
    again = start(rules)
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0, said
    rows = StudyFolder(tmp_path / "s").rows()
    assert rows[: len(kept)] == kept
    assert len(rows) == len({row["key"] for row in rows}) == 6
    whole = study(tiny, tmp_path / "uninterrupted", methods=("lora",), seeds=4, steps=40)
    compare(whole)
    assert scores(tmp_path / "s") == scores(tmp_path / "uninterrupted")
