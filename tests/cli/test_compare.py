"""``rankwise compare`` from outside: help, mistakes, and going on with a study."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rankwise.cli.main import main
from tests.cli.complaints import Captured, complaint
from tests.finetuning.comparison.tiny_studies import found, lines

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SMALL = (
    "--shots 8 --seeds 2 --budget 2 --tune-shots 8 --tune-seeds 1 --steps 2 --batch-size 4 --rank 4 --precision fp32"
)


def run(command: str, **places: object) -> int:
    return main([word.format(**places) for word in command.split()])


@pytest.fixture(scope="module")
def finished(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "study"
    command = "compare --model {model} --task {pairs} --methods none,lora --out {out} --fixed lora " + SMALL
    assert run(command, model=tiny.model, pairs=tiny.pairs, out=out) == 0
    return out


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    """A copy to play with."""
    shutil.copytree(finished, tmp_path / "study")
    return tmp_path / "study"


# --- what works


def test_help_shows_an_example_and_groups_the_options(capsys: Captured) -> None:
    assert main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example" in shown
    assert "rankwise compare --model" in shown
    assert all(group in shown for group in ("What to compare", "Rules, the same for every run", "How to run it"))
    assert "rankwise[cluster]" in shown.replace("\n", " ")


def test_a_study_through_the_command_line(finished: Path) -> None:
    rows = lines(finished)
    assert [row["status"] for row in rows] == ["ok"] * 4, [row["error"] for row in rows]
    assert {row["phase"] for row in rows} == {"confirm"}  # lora keeps its rate: nothing to tune
    assert (finished / "report.html").is_file()
    settings = json.loads((finished / "study.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["steps"], settings["batch_size"], settings["r"], settings["fixed"]) == (2, 4, 4, ["lora"])


def test_a_study_is_extended_without_repeating_its_rules(study: Path) -> None:
    """The model, the steps and all the rest come from the folder; the methods asked for now need not be the old ones."""
    before = lines(study)
    assert run("compare --out {out} --methods dora --seeds 3", out=study) == 0
    rows = lines(study)
    assert rows[:4] == before
    assert [row["status"] for row in rows] == ["ok"] * len(rows)
    trials = {(row["method"], row["seed"]) for row in rows if row["phase"] == "confirm"}
    assert trials == {(method, seed) for method in ("none", "lora", "dora") for seed in range(3)}
    tuned = {row["method"] for row in rows if row["phase"] == "tune"}
    assert tuned == {"dora"}  # lora is still fixed, dora never was
    assert len({row["key"] for row in rows}) == len(rows)
    assert {row["steps"] for row in rows} == {2}


def test_the_same_folder_again_does_nothing(study: Path) -> None:
    before = (study / "rows.jsonl").read_bytes()
    assert run("compare --out {out}", out=study) == 0
    assert (study / "rows.jsonl").read_bytes() == before


def test_report_only_on_a_part_of_a_study(study: Path, capsys: Captured) -> None:
    rows = (study / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (study / "rows.jsonl").write_text(rows[0] + rows[1] + rows[2][:50], encoding="utf-8")
    for name in ("report.html", "summary.json"):
        (study / name).unlink()
    assert run("compare --out {out} --report-only", out=study) == 0
    assert str(study / "report.html") in capsys.readouterr().err
    assert (study / "report.html").is_file()
    assert (study / "summary.json").is_file()
    assert len((study / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == 3  # nothing was run


def test_merge(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "other")
    rows = (study / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (study / "rows.jsonl").write_text("".join(rows[:3]), encoding="utf-8")
    (tmp_path / "other" / "rows.jsonl").write_text("".join(rows[2:]), encoding="utf-8")
    command = "compare --out {out} --merge {one} --merge {two}"
    assert run(command, out=tmp_path / "both", one=study, two=tmp_path / "other") == 0
    assert len(lines(tmp_path / "both")) == 4
    assert found(tmp_path / "both") == {row["key"]: row for row in map(_plain, rows)}


def _plain(line: str) -> dict[str, object]:
    row = json.loads(line)
    return {key: value for key, value in row.items() if key not in ("seconds", "seconds_per_step", "peak_memory_bytes")}


# --- mistakes

WHOLE = "compare --model {model} --task {pairs} --out {out} "
BAD = {
    "no out": ("compare --model {model} --task {pairs}", "--out"),
    "no model": ("compare --task {pairs} --out {out}", "--model missing"),
    "no task": ("compare --model {model} --out {out}", "--task missing"),
    "nothing but out": ("compare --out {out}", "--model and --task missing"),
    "no such model": ("compare --model {out}/m --task {pairs} --out {out}", "no model folder"),
    "unknown task": ("compare --model {model} --task sttsb --out {out}", "unknown task 'sttsb'"),
    "empty tasks": ("compare --model {model} --task , --out {out}", "--task"),
    "no such file": ("compare --model {model} --task {out}.csv --out {out}", "does not exist"),
    "task twice": ("compare --model {model} --task {pairs},{pairs} --out {out}", "--task has "),
    "unknown method": (WHOLE + "--methods lorra", "unknown method 'lorra'"),
    "unknown option of a method": (WHOLE + "--methods lora:fast", "unknown option 'fast'"),
    "odd value in a method": (WHOLE + "--methods lora:r=four", "r must be of type int, got 'four'"),
    "rule in a method": (WHOLE + "--methods lora:steps=4", "sets 'steps'"),
    "method twice": (WHOLE + "--methods lora,lora", "lora more than once"),
    "empty methods": (WHOLE + "--methods ,", "--methods is empty"),
    "empty shots": (WHOLE + "--shots ,", "--shots is empty"),
    "shots no numbers": (WHOLE + "--shots abc", "--shots takes whole numbers such as 16,64,256, got 'abc'"),
    "shots fractions": (WHOLE + "--shots 1.5", "--shots takes whole numbers"),
    "shots negative": (WHOLE + "--shots=-4", "--shots must be at least 1"),
    "shots beyond the data": (WHOLE + "--shots 4,1000 --tune-shots 4", "1000 labelled rows asked for"),
    "no seeds": (WHOLE + "--seeds 0", "--seeds must be at least 1"),
    "seeds no number": (WHOLE + "--seeds many", "--seeds"),
    "no budget": (WHOLE + "--budget 0", "--budget must be at least 1"),
    "rank 0": (WHOLE + "--rank 0", "--rank must be at least 1"),
    "fixed nobody": (WHOLE + "--methods lora --fixed dora", "--fixed must be some of lora"),
    "unknown split": (WHOLE + "--split test", "--split must be one of"),
    "unknown draw": (WHOLE + "--draw twice", "--draw must be one of"),
    "unknown head": (WHOLE + "--head fried", "--head must be one of"),
    "no tokens": (WHOLE + "--max-eval-tokens 0", "--max-eval-tokens must be at least 1"),
    "too few tokens": (WHOLE + "--shots 8 --tune-shots 8 --max-eval-tokens 2", "--max-eval-tokens 2"),
    "unknown preset": ("compare --preset nature --out {out}", "unknown preset 'nature'"),
    "shard beyond": (WHOLE + "--shard 3/2", "--shard must be I/N with 1 <= I <= N, got 3/2"),
    "shard 0": (WHOLE + "--shard 0/2", "--shard must be I/N"),
    "shard no fraction": (WHOLE + "--shard 1", "--shard takes I/N such as 1/4, got '1'"),
    "shard words": (WHOLE + "--shard one/two", "--shard takes I/N"),
    "shard superscript": (WHOLE + "--shard 1/²", "--shard takes I/N"),
    "no jobs": (WHOLE + "--jobs 0", "--jobs must be at least 1"),
    "unknown backend": (WHOLE + "--backend threads", "--backend must be one of processes, dask"),
    "merge nothing": ("compare --out {out} --merge", "--merge"),
    "merge no study": ("compare --out {out} --merge {out}/nowhere", "is no study"),
    "merge with a model": (WHOLE + "--merge {out}", "leave --model and --task out"),
    "report of no study": ("compare --out {out} --report-only", "is no study"),
    "report with a task": ("compare --task {pairs} --out {out} --report-only", "leave --model and --task out"),
    "unknown data folder": ("compare --model {model} --task rte --data-root {out}/no --out {out}", "is no folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_gives_exit_code_2_and_one_message(
    tiny: SimpleNamespace, tmp_path: Path, capsys: Captured, case: str
) -> None:
    command, says = BAD[case]
    assert run(command, model=tiny.model, pairs=tiny.pairs, out=tmp_path / "study") == 2
    assert says in complaint(capsys)
    assert not (tmp_path / "study").exists()


def test_other_rules_are_refused_with_the_difference(study: Path, capsys: Captured) -> None:
    before = {path.name: path.read_bytes() for path in study.iterdir()}
    assert run("compare --out {out} --steps 5", out=study) == 2
    assert "steps: 2 there, 5 now" in complaint(capsys)
    assert {path.name: path.read_bytes() for path in study.iterdir()} == before


def test_a_folder_with_something_else(tiny: SimpleNamespace, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    assert run(WHOLE + SMALL, model=tiny.model, pairs=tiny.pairs, out=tmp_path) == 2
    assert "holds something that is no study" in complaint(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_study(study: Path, capsys: Captured) -> None:
    (study / "study.json").write_text('{"settings": ', encoding="utf-8")
    for command in ("compare --out {out}", "compare --out {out} --report-only"):
        assert run(command, out=study) == 2
        assert "study.json is damaged" in complaint(capsys)
