"""The command line from outside: help, exit codes, and a readable sentence for every mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise import __version__
from rankwise.cli.main import main
from tests.cli.complaints import Captured, complaint
from tests.finetuning.tiny_checkpoint import offline_environment

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def runs(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One finished run of each method, made through the command line."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("deep-lora", "lora"):
        arguments = f"--shots 16 --steps 3 --batch-size 4 --rank 4 --precision fp32 --lr 0.02 --method {method}".split()
        code = main(["finetune", "--model", tiny.model, "--data", tiny.pairs, "--out", str(root / method), *arguments])
        assert code == 0
    return SimpleNamespace(deep=root / "deep-lora", lora=root / "lora")


# --- what works


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rankwise {__version__}\n"


@pytest.mark.parametrize("command", ["finetune", "export", "report", "memory"])
def test_help_shows_an_example(capsys: Captured, command: str) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example" in shown
    assert f"rankwise {command} " in shown


def test_help_lists_every_command(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("finetune", "export", "report", "memory"))


def test_finetune_leaves_a_report(runs: SimpleNamespace) -> None:
    for folder in (runs.deep, runs.lora):
        assert (folder / "report.html").read_text(encoding="utf-8").count("<svg") == 5
        assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["format_version"] == 1


def test_the_paper_preset(tiny: SimpleNamespace, tmp_path: Path) -> None:
    arguments = f"finetune --model {tiny.model} --data {tiny.pairs} --shots 8 --steps 1 --precision fp32 --preset paper"
    assert main([*arguments.split(), "--out", str(tmp_path / "run"), "--lr", "0.5"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["settings"]["outer_lr_ratio"] == 0.01
    assert config["learning_rate"] == 0.5  # an option said aloud beats the preset


def test_export(runs: SimpleNamespace, tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", str(runs.deep / "adapter"), "--out", str(tmp_path / "lora"), "--rank", "1"]) == 0
    assert str(tmp_path / "lora") in capsys.readouterr().out
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"]) == ("LORA", 1)


def test_report_on_two_runs(runs: SimpleNamespace, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(runs.deep), str(runs.lora), "--out", str(out), "--title", "<Both & each>"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text(encoding="utf-8")
    assert "Deep LoRA" in page
    assert "&lt;Both &amp; each&gt;" in page
    assert [run["method"] for run in json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["runs"]] == [
        "deep-lora",
        "lora",
    ]


# --- mistakes

FINETUNE = "finetune --model {model} --data {pairs} --out {out} "
BAD = {
    "unknown command": "train",
    "unknown global option": "--verbose",
    "unknown option": FINETUNE + "--epochs 3",
    "option without value": FINETUNE + "--shots",
    "stray argument": FINETUNE + "more",
    "no out": "finetune --model {model} --data {pairs}",
    "no model": "finetune --data {pairs} --out {out}",
    "no data": "finetune --model {model} --out {out}",
    "shots no integer": FINETUNE + "--shots many",
    "shots a fraction": FINETUNE + "--shots 1.5",
    "negative shots": FINETUNE + "--shots -3",
    "no shots": FINETUNE + "--shots 0",
    "shots beyond the data": FINETUNE + "--shots 1000",
    "no steps": FINETUNE + "--steps 0",
    "no rows a step": FINETUNE + "--batch-size 0",
    "rank 0": FINETUNE + "--rank 0",
    "rank above the layers": FINETUNE + "--rank 1000",
    "no inner factor": FINETUNE + "--inner-depth 0",
    "negative init scale": FINETUNE + "--init-scale -1",
    "lr nan": FINETUNE + "--lr nan",
    "lr infinite": FINETUNE + "--lr inf",
    "lr 0": FINETUNE + "--lr 0",
    "lr a word": FINETUNE + "--lr fast",
    "outer ratio negative": FINETUNE + "--outer-lr-ratio -1",
    "outer ratio nan": FINETUNE + "--outer-lr-ratio nan",
    "eps 0": FINETUNE + "--adam-eps 0",
    "negative seed": FINETUNE + "--seed -1",
    "seed too large": FINETUNE + "--seed 4294967296",
    "no init batch": FINETUNE + "--init-batches 0",
    "no tokens": FINETUNE + "--max-length 0",
    "no held-out rows": FINETUNE + "--eval-limit 0",
    "save every 0": FINETUNE + "--save-every 0",
    "unknown method": FINETUNE + "--method lorra",
    "unknown preset": FINETUNE + "--preset nature",
    "preset with dora": FINETUNE + "--preset paper --method dora",
    "method for studies only": FINETUNE + "--method full-width",
    "unknown task": FINETUNE + "--task ranking",
    "task without its columns": "finetune --model {model} --data {classes} --out {out} --task pair-similarity",
    "scores that are names": "finetune --model {model} --data {classes} --out {out} --task regression",
    "unknown precision": FINETUNE + "--precision fp8",
    "unknown variant": FINETUNE + "--variant nonsense",
    "unknown text column": FINETUNE + "--text nope",
    "unknown pair column": FINETUNE + "--text-pair nope",
    "unknown label column": FINETUNE + "--label nope",
    "unknown model folder": "finetune --model ./nope --data {pairs} --out {out}",
    "model is a file": "finetune --model {pairs} --data {pairs} --out {out}",
    "hub model offline": "finetune --model nobody/nothing --data {pairs} --out {out}",
    "hub model misspelt": "finetune --model no:body --data {pairs} --out {out}",
    "model name too long": "finetune --model " + "m" * 300 + " --data {pairs} --out {out}",
    "data missing": "finetune --model {model} --data nope.csv --out {out}",
    "data name too long": "finetune --model {model} --data " + "d" * 300 + ".csv --out {out}",
    "data a folder": "finetune --model {model} --data {folder} --out {out}",
    "data of another format": "finetune --model {model} --data {text} --out {out}",
    "data unreadable": "finetune --model {model} --data {latin} --out {out}",
    "data empty": "finetune --model {model} --data {empty} --out {out}",
    "hub data offline": "finetune --model {model} --data hub:nobody/nothing --out {out}",
    "hub data nameless": "finetune --model {model} --data hub: --out {out}",
    "held-out file missing": FINETUNE + "--eval-data nope.csv",
    "held-out file without the columns": FINETUNE + "--eval-data {classes}",
    "out is a file": "finetune --model {model} --data {pairs} --out {text}",
    "out below a file": "finetune --model {model} --data {pairs} --out {text}/run",
    "out in use": "finetune --model {model} --data {pairs} --out {folder}",
    "out name too long": "finetune --model {model} --data {pairs} --out " + "o" * 300,
    "resume with model": "finetune --resume --model {model} --out {out}",
    "resume with data": "finetune --resume --data {pairs} --out {out}",
    "resume of nothing": "finetune --resume --out {out}",
    "resume of a file": "finetune --resume --out {text}",
    "resume without out": "finetune --resume",
    "export without out": "export {folder}",
    "export of nothing": "export {out} --out {out}-lora",
    "export of another folder": "export {folder} --out {out}",
    "export of a lora said to be deep": "export {lora}/adapter --from deep-lora --out {out}",
    "export to another kind": "export {deep}/adapter --to ia3 --out {out}",
    "export into a folder in use": "export {deep}/adapter --out {folder}",
    "export with rank 0": "export {deep}/adapter --out {out} --rank 0",
    "export with energy 2": "export {deep}/adapter --out {out} --energy 2",
    "export with a negative tol": "export {deep}/adapter --out {out} --tol -1",
    "export with rank and energy": "export {deep}/adapter --out {out} --rank 1 --energy 0.9",
    "report on nothing": "report {out} --out {out}.html",
    "report on another folder": "report {folder} --out {out}.html",
    "report on a file": "report {text} --out {out}.html",
    "report on one good and one bad": "report {deep} {folder} --out {out}.html",
    "report into a folder": "report {deep} --out {folder}",
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=[name.replace(" ", "-") for name in BAD])
def test_mistakes_are_explained_with_exit_code_2(
    tiny: SimpleNamespace, runs: SimpleNamespace, tmp_path: Path, capsys: Captured, arguments: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("text", encoding="utf-8")
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,1\nthé,0\n".encode("latin-1"))
    (tmp_path / "empty.csv").touch()
    places = {
        **vars(tiny), "deep": runs.deep, "lora": runs.lora, "out": tmp_path / "out", "folder": tmp_path / "folder",
        "text": tmp_path / "notes.txt", "latin": tmp_path / "latin.csv", "empty": tmp_path / "empty.csv",
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    code = main(arguments.format(**places).split())
    complaint(capsys)
    assert code == 2
    assert sorted(tmp_path.rglob("*")) == before, "a refused command leaves nothing behind"


def test_no_arguments_show_the_help(capsys: Captured) -> None:
    main([])
    captured = capsys.readouterr()
    assert "finetune" in captured.out + captured.err


def test_our_errors_begin_with_error_in_lower_case(capsys: Captured) -> None:
    assert main(["report", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere is no finished run: it has no result.json")


def test_markup_in_a_name_is_shown_as_it_is(capsys: Captured, tmp_path: Path) -> None:
    name = "./[bold]x[/bold].csv"
    assert main(["finetune", "--model", "./m", "--data", name, "--out", str(tmp_path / "o")]) == 2
    assert str(Path(name)) in capsys.readouterr().err


def test_report_on_an_unfinished_run_names_what_is_missing(
    runs: SimpleNamespace, tmp_path: Path, capsys: Captured
) -> None:
    unfinished = Path(shutil.copytree(runs.deep, tmp_path / "run"))
    (unfinished / "result.json").unlink()
    capsys.readouterr()
    assert main(["report", str(unfinished), "--out", str(tmp_path / "page.html")]) == 2
    assert "no finished run: it has no result.json" in complaint(capsys)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 1}', "\udcff"])
@pytest.mark.parametrize("name", ["result.json", "config.json"])
def test_report_on_a_damaged_run(
    runs: SimpleNamespace, tmp_path: Path, capsys: Captured, name: str, content: str
) -> None:
    damaged = Path(shutil.copytree(runs.deep, tmp_path / "run"))
    (damaged / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    capsys.readouterr()
    assert main(["report", str(damaged), "--out", str(tmp_path / "page.html")]) == 2
    complaint(capsys)


@pytest.mark.parametrize("name", ["result.html", "config.html"])
def test_a_report_inside_the_run_folder_overwrites_none_of_the_run(
    runs: SimpleNamespace, tmp_path: Path, capsys: Captured, name: str
) -> None:
    copy = Path(shutil.copytree(runs.deep, tmp_path / "run"))
    before = (copy / name).with_suffix(".json").read_bytes()
    main(["report", str(copy), "--out", str(copy / name)])
    assert (copy / name).with_suffix(".json").read_bytes() == before


def test_a_report_called_json_is_still_a_page_or_refused(
    runs: SimpleNamespace, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "page.json"
    code = main(["report", str(runs.deep), "--out", str(out)])
    assert code == 2 or out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_resume_of_a_finished_run(runs: SimpleNamespace, capsys: Captured) -> None:
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out", str(runs.lora)]) == 2
    assert "is finished" in complaint(capsys)


def test_interrupted_runs_exit_with_1_and_can_be_resumed(
    tiny: SimpleNamespace, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from rankwise.finetuning.trainer import TaskTrainer

    original = TaskTrainer.compute_loss

    def compute_loss(self: TaskTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    arguments = (
        f"finetune --model {tiny.model} --data {tiny.pairs} --shots 8 --solver train --steps 4 --precision fp32 --out"
    )
    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "compute_loss", compute_loss)
        assert main([*arguments.split(), str(tmp_path / "run")]) == 1
    assert f"rankwise finetune --resume --out {tmp_path / 'run'}" in complaint(capsys)
    assert main(["finetune", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_an_unforeseen_failure_is_a_sentence_unless_asked(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.cli import finetune

    def broken() -> None:
        raise RuntimeError("the moon")

    monkeypatch.setattr(finetune, "_load", broken)
    arguments = ["finetune", "--model", "m", "--data", "d", "--out", "o"]
    monkeypatch.delenv("RANKWISE_DEBUG", raising=False)
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: unexpected failure: RuntimeError: the moon")
    assert "RANKWISE_DEBUG=1" in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("RANKWISE_DEBUG", "1")
    with pytest.raises(RuntimeError, match="the moon"):
        main(arguments)


VALUES = st.one_of(
    st.integers().map(str), st.floats().map(str), st.text(max_size=12), st.sampled_from(["", "auto", "lora"])
)
OPTIONS = [
    "--task",
    "--method",
    "--shots",
    "--seed",
    "--eval-data",
    "--eval-limit",
    "--text",
    "--text-pair",
    "--label",
    "--rank",
    "-r",
    "--inner-depth",
    "--init-scale",
    "--variant",
    "--preset",
    "--lr",
    "--outer-lr-ratio",
    "--adam-eps",
    "--steps",
    "--batch-size",
    "--init-batches",
    "--max-length",
    "--precision",
    "--save-every",
]


@settings(max_examples=60)
@given(chosen=st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=5), extra=st.lists(VALUES, max_size=1))
def test_any_options_end_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, str], extra: list[str]
) -> None:
    import contextlib
    import io

    arguments = ["finetune", "--model", "./no-such-model", "--data", "d.csv", "--out", "/no/such/place"]
    arguments += [part for option, value in chosen.items() for part in (option, value)] + extra
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    if "--help" in arguments:
        return
    assert code == 2, (arguments, err.getvalue())
    assert "Traceback" not in out.getvalue() + err.getvalue()
    assert re.search(r"^error: ", err.getvalue(), re.MULTILINE | re.IGNORECASE), (arguments, err.getvalue())


# --- as a process


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, encoding="utf-8", env=offline_environment(), check=False,
        timeout=120,
    )  # fmt: skip


def test_python_dash_m_rankwise() -> None:
    done = python("-m", "rankwise", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"rankwise {__version__}\n", "")


def test_the_exit_code_reaches_the_shell() -> None:
    assert python("-m", "rankwise", "no-such-command").returncode == 2


def test_importing_rankwise_is_light() -> None:
    heavy = ["transformers", "peft", "sklearn", "matplotlib", "plotly", "pandas", "scipy", "datasets", "torch"]
    done = python("-c", f"import rankwise, sys; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_needs_no_heavy_package() -> None:
    code = (
        "import sys; from rankwise.cli.main import main; main(['finetune', '--help']); "
        "print('LOADED', [name for name in ('torch', 'transformers', 'peft', 'matplotlib') if name in sys.modules])"
    )
    assert "LOADED []" in python("-c", code).stdout
