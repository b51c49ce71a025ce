"""2,000 command lines that nobody should type, and files that nobody should have: a sentence each, never a traceback."""

import contextlib
import io
import re
import shutil
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise.cli.main import app, main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
EACH = 500  # of each of the four tests below

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# no value of these is refused for what it is, and a large one takes long: they get what is no number at all
PATIENT = {"--steps", "--processes", "--jobs", "--seeds", "--tune-seeds", "--budget", "--init-batches", "--eval-limit"}
NUMBERS = ["0", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "1.5", "999999999999999999999", "0x10", "١٢"]
WORDS = [
    "",
    " ",
    "auto",
    "lora",
    "None",
    "[bold]",
    "../..",
    "a" * 5000,
    "\udcff",
    "\x00",
    "--",
    "=",
    "hub:",
    "package:",
]


def options_of(command: str) -> list[Any]:
    return [p for p in COMMANDS[command].params if p.param_type_name == "option" and "--help" not in p.opts]


def values_for(option: Any) -> st.SearchStrategy[str]:
    if PATIENT & set(option.opts):
        return st.sampled_from(["", "x", "nan", "-1", "1.5", "0"])
    return st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | st.text(max_size=10)


@st.composite
def extra_arguments(draw: st.DrawFn, command: str, taken: set[str]) -> list[str]:
    offered = [option for option in options_of(command) if not taken & set(option.opts)]
    if draw(st.booleans()):  # else a mistake among the options would hide every other
        return []
    found: list[str] = []
    for option in draw(st.lists(st.sampled_from(offered), max_size=4, unique_by=lambda o: o.name)):
        name = draw(st.sampled_from(option.opts))
        found += [name] if option.is_flag else [name, draw(values_for(option))]
    return found + draw(st.lists(st.text(max_size=5), max_size=1))


CELLS = st.text(string.printable, max_size=8) | st.sampled_from(
    ["", "1", "nan", "1e999", "-", "good bad", '"', "\ufeff"]
)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """A file's bytes: of no kind, a table of anything, or lines of something like JSON."""
    kind = draw(st.sampled_from(["bytes", "table", "lines"]))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "table":
        header = draw(st.sampled_from(["text,label", "sentence1,sentence2,score", "user,item,rating", "a", ""]))
        rows = draw(st.lists(st.lists(CELLS, min_size=1, max_size=4).map(",".join), max_size=12))
        return "\n".join([header, *rows]).encode(errors="replace")
    entry = st.sampled_from(
        ['{"text": "a", "label": 1}', '{"text": null}', "[1, 2]", '{"text": ["a"], "label": {}}', "{", "1"]
    )
    return "\n".join(draw(st.lists(entry, max_size=6))).encode()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


def check(arguments: list[str], watched: Path | None = None) -> int:
    """Run; the exit code, after checking what a person sees."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    said = out.getvalue() + err.getvalue()
    assert code in (0, 1, 2), (arguments, said)
    assert "Traceback" not in said, (arguments, said)
    assert "unexpected failure" not in said, (arguments, said)
    if code:
        assert len(re.findall(r"^error: .*\S", said, re.MULTILINE)) == 1, (arguments, said)
        assert code == 2 or "disk" in said or "space" in said or "File name too long" in said, (arguments, said)
    if code == 2 and watched is not None and "training diverged" not in said:  # found out only once it had begun
        assert not watched.exists() or not any(watched.iterdir()), (arguments, said, sorted(watched.iterdir()))
    return code


GIVEN = settings(
    max_examples=EACH,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


@GIVEN
@given(data=st.data())
def test_finetune(tiny: SimpleNamespace, place: Path, data: st.DataObject) -> None:
    out = place / "run"
    shutil.rmtree(out, ignore_errors=True)
    table = Path(tiny.classes)
    if data.draw(st.booleans(), "a broken file"):
        table = (
            place / f"table{data.draw(st.sampled_from(['.csv', '.tsv', '.jsonl', '.parquet', '.conll', '.txt', '']))}"
        )
        table.write_bytes(data.draw(contents()))
    fixed = {"--model": tiny.model, "--data": str(table), "--out": str(out), "--steps": "1", "--precision": "fp32"}
    extra = data.draw(extra_arguments("finetune", {*fixed, "--processes"}))
    check(["finetune", *(part for pair in fixed.items() for part in pair), *extra], out)


@GIVEN
@given(data=st.data())
def test_complete(place: Path, data: st.DataObject) -> None:
    out = place / "filled"
    shutil.rmtree(out, ignore_errors=True)
    table = (
        place / f"matrix{data.draw(st.sampled_from(['.csv', '.tsv', '.npy', '.npz', '.mtx', '.png', '.parquet', '']))}"
    )
    if data.draw(st.booleans(), "a good file"):
        table = place / "matrix.csv"
        rows = [f"{i},{j},{(i + 1) * (j + 2)}" for i in range(6) for j in range(5) if (i + j) % 3]
        table.write_text("\n".join(["row,column,value", *rows]))
    else:
        table.write_bytes(data.draw(contents()))
    extra = data.draw(extra_arguments("complete", {"--out"}))
    check(["complete", str(table), "--out", str(out), *extra], out)


@GIVEN
@given(data=st.data())
def test_export_and_report(place: Path, data: st.DataObject) -> None:
    folder = place / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "result.json", "config.json", "metrics.jsonl"):
        if data.draw(st.booleans(), name):
            (folder / name).write_bytes(data.draw(json_like() | contents()))
    command = data.draw(st.sampled_from(["export", "report"]))
    out = place / ("lora" if command == "export" else "page.html")
    shutil.rmtree(out, ignore_errors=True)
    extra = data.draw(extra_arguments(command, {"--out"}))
    code = check([command, str(folder), "--out", str(out), *extra])
    assert code != 0 or not extra or "--help" in extra


def json_like() -> st.SearchStrategy[bytes]:
    known = st.sampled_from(
        ["peft_type", "r", "target_modules", "base_model_name_or_path", "format_version", "settings", "x"]
    )
    values = st.none() | st.integers() | st.text(max_size=4) | st.sampled_from(["LORA", "DEEPLORA", "IA3"])
    return st.dictionaries(known, values, max_size=4).map(lambda content: repr(content).replace("'", '"').encode())


@GIVEN
@given(data=st.data())
def test_words_that_are_no_command_line(place: Path, data: st.DataObject) -> None:
    """Any words at all, and options of one command with another; nothing here names a file that exists."""
    words = st.sampled_from(
        [*COMMANDS, "--out", "--model", "--data", "--resume", "--help", "-r", "--version", "no/file.csv"]
    )
    with contextlib.chdir(place):
        check(data.draw(st.lists(words | st.sampled_from(WORDS) | st.text(max_size=8), max_size=7)))
