"""``rankwise complete`` from outside: what it writes, how it goes on, and a sentence for every mistake."""

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rankwise.cli.main import main
from rankwise.completion import DeepMatrixCompletion
from rankwise.completion_runs import CompletionRun
from rankwise.completion_runs.folder import MetricsFile
from tests.cli.complaints import Captured, complaint

TABLE = "--row user --col item --value rating --jobs 1"
FILES = {"config.json", "labels.json", "metrics.jsonl", "model", "report.html", "summary.json"}


def planted(seed: int = 0, height: int = 40, width: int = 30, rank: int = 2) -> Any:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(height, rank)) @ rng.normal(size=(rank, width))


@pytest.fixture(scope="module")
def full() -> Any:
    return planted()


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory, full: Any) -> Path:
    """Rank 2, 40 users × 30 items, 60 % observed, three lines without a value."""
    path = tmp_path_factory.mktemp("data") / "ratings.csv"
    shown = np.random.default_rng(1).random(full.shape) < 0.6
    lines = [f"u{i},film {j},{full[i, j]:.9f}" for i, j in zip(*np.nonzero(shown), strict=True)]
    lines += [f"u{i},film {j}," for i, j in list(zip(*np.nonzero(~shown), strict=True))[:3]]
    path.write_text("user,item,rating\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ratings: Path) -> Path:
    """A finished run, with predictions."""
    root = tmp_path_factory.mktemp("runs")
    write_pairs(root / "pairs.csv")
    arguments = ["complete", str(ratings), *TABLE.split(), "--predict", str(root / "pairs.csv")]
    assert main([*arguments, "--out", str(root / "ml")]) == 0
    return root / "ml"


def write_pairs(path: Path, head: str = "user,item") -> Path:
    path.write_text(
        f"{head}\nu3,film 4\nu39,film 29\nu0,film 0\nzed,film 4\nu3,unheard of\nzed,new\n", encoding="utf-8"
    )
    return path


def predicted(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


# --- what works


def test_help_shows_an_example_and_loads_nothing_heavy(capsys: Captured) -> None:
    assert main(["complete", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example" in shown
    assert "rankwise complete ratings.csv --row user --col item --value rating" in shown


def test_a_table_from_end_to_end(run: Path, full: Any) -> None:
    assert {path.name for path in run.iterdir()} == FILES | {"predictions.csv"}
    found = summary(run)
    assert (found["rows"], found["columns"], found["rank"], found["converged"]) == (40, 30, 2, True)
    assert found["held_out_rmse"] < 1e-4 < 0.5 < found["baseline_rmse"]
    assert found["notes"] == ["3 lines left out: their value is empty"]
    labels = json.loads((run / "labels.json").read_text(encoding="utf-8"))
    model = DeepMatrixCompletion.load(run / "model")
    order = [[int(name[1:]) for name in labels["rows"]], [int(name[5:]) for name in labels["columns"]]]
    assert np.abs(model.reconstruct() - full[np.ix_(*order)]).max() < 1e-4
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert config["inputs"]["data"]["file"] == "ratings.csv"
    assert len(config["inputs"]["data"]["sha256"]) == 64
    assert str(run.parent) not in (run / "config.json").read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert metrics[0] == {"format_version": 1}
    assert {"stage", "iteration", "rank", "residual"} <= set(metrics[-1])
    assert "2 directions found" in (run / "report.html").read_text(encoding="utf-8")


def test_predictions_have_labels_values_and_intervals(run: Path, full: Any) -> None:
    lines = predicted(run / "predictions.csv")
    assert list(lines[0]) == ["user", "item", "prediction", "lower", "upper"]
    assert [(line["user"], line["item"]) for line in lines[:3]] == [
        ("u3", "film 4"), ("u39", "film 29"), ("u0", "film 0"),
    ]  # fmt: skip
    for line, truth in zip(lines, (full[3, 4], full[39, 29], full[0, 0]), strict=False):
        assert abs(float(line["prediction"]) - truth) < 1e-4
        assert float(line["lower"]) <= float(line["prediction"]) <= float(line["upper"])


def test_unknown_labels_are_predicted_by_means_without_interval(run: Path) -> None:
    model = DeepMatrixCompletion.load(run / "model")
    labels = json.loads((run / "labels.json").read_text(encoding="utf-8"))
    means = model.solution_.fallback
    film, user = means.columns[labels["columns"].index("film 4")], means.rows[labels["rows"].index("u3")]
    lines = predicted(run / "predictions.csv")[3:]
    assert [(line["lower"], line["upper"]) for line in lines] == [("", "")] * 3
    guesses = [float(line["prediction"]) for line in lines]
    assert guesses == pytest.approx([means.mean + film, means.mean + user, means.mean], abs=1e-6)


def test_later_predictions_from_a_finished_run(run: Path, tmp_path: Path, capsys: Captured) -> None:
    pairs = write_pairs(tmp_path / "more.csv", "who,what")
    target = tmp_path / "new" / "out.csv"
    arguments = f"complete --from {run} --predict {pairs} --row who --col what --interval .5 --predictions {target}"
    assert main(arguments.split()) == 0
    assert "3 of 6 pairs have labels that the run does not know (zed, unheard of, new)" in capsys.readouterr().err
    again, before = predicted(target), predicted(run / "predictions.csv")
    assert list(again[0]) == ["who", "what", "prediction", "lower", "upper"]
    assert [line["prediction"] for line in again] == [line["prediction"] for line in before]
    for narrow, wide in zip(again[:3], before[:3], strict=True):
        assert float(narrow["upper"]) - float(narrow["lower"]) <= float(wide["upper"]) - float(wide["lower"])


def test_a_finished_run_is_left_alone(run: Path, ratings: Path, capsys: Captured) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["complete", str(ratings), *TABLE.split(), "--out", str(run)]) == 0
    assert "is finished: nothing to fit" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_finished_run_still_predicts(run: Path, ratings: Path, tmp_path: Path) -> None:
    pairs, target = write_pairs(tmp_path / "pairs.csv"), tmp_path / "out.csv"
    arguments = ["complete", str(ratings), *TABLE.split(), "--out", str(run), "--predict", str(pairs)]
    assert main([*arguments, "--predictions", str(target)]) == 0
    assert target.read_bytes() == (run / "predictions.csv").read_bytes()


@pytest.mark.parametrize("changed", ["--seed 1", "--rank 3", "--clip 0,1", "--no-calibrate", "--dtype float32"])
def test_other_settings_are_refused(run: Path, ratings: Path, capsys: Captured, changed: str) -> None:
    assert main(["complete", str(ratings), *TABLE.split(), *changed.split(), "--out", str(run)]) == 2
    assert "holds a run of other settings" in complaint(capsys)


def test_other_data_are_refused_and_a_touched_file_is_no_other(
    run: Path, ratings: Path, tmp_path: Path, capsys: Captured
) -> None:
    content = ratings.read_bytes()
    copy = tmp_path / "ratings.csv"
    copy.write_bytes(content)  # the same bytes at another time
    assert main(["complete", str(copy), *TABLE.split(), "--out", str(run)]) == 0
    copy.write_bytes(content[:-2] + b"\n")
    assert main(["complete", str(copy), *TABLE.split(), "--out", str(run)]) == 2
    assert "other data" in complaint(capsys)
    copy.write_bytes(content.replace(b"u3,", b"u4,"))  # as long as before
    assert main(["complete", str(copy), *TABLE.split(), "--out", str(run)]) == 2


def test_an_interrupted_run_goes_on_without_reading_again(
    run: Path, ratings: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["complete", str(ratings), *TABLE.split(), "--out", str(tmp_path / "run")]
    append = MetricsFile.append

    def stopped(self: MetricsFile, entry: dict[str, Any]) -> None:
        if entry.get("iteration") == 2:
            raise KeyboardInterrupt
        append(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "append", stopped)
        assert main(arguments) == 1
    assert "the same command starts the fit again" in complaint(capsys)
    assert (tmp_path / "run" / "entries.safetensors").is_file()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(["complete", "--from", str(tmp_path / "run"), "--predict", str(ratings)]) == 2
    assert "is not finished" in complaint(capsys)

    def unread(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the text was read again")

    with monkeypatch.context() as patch:
        patch.setattr("rankwise.completion.reading.read_table", unread)
        assert main(arguments) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    again, straight = summary(tmp_path / "run"), summary(run)
    for timing in ("seconds",):
        again.pop(timing), straight.pop(timing)
    assert again == straight  # as if it had never stopped
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_damaged_entries_are_no_traceback(
    ratings: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["complete", str(ratings), *TABLE.split(), "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(CompletionRun, "_fitted", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(arguments) == 1
    (tmp_path / "run" / "entries.safetensors").write_bytes(b"damaged")
    capsys.readouterr()
    assert main(arguments) == 2
    assert "damaged" in complaint(capsys)


@pytest.mark.parametrize("kind", ["npy", "npz", "mtx", "csv", "labelled.csv"])
def test_whole_matrices(tmp_path: Path, full: Any, kind: str) -> None:
    holes = np.where(np.random.default_rng(2).random(full.shape) < 0.6, full, np.nan)
    path = tmp_path / f"m.{kind}"
    if kind == "npy":
        np.save(path, holes)
    elif kind == "npz":
        sp.save_npz(path, sp.coo_array((holes[~np.isnan(holes)], np.nonzero(~np.isnan(holes))), shape=holes.shape))
    elif kind == "mtx":
        scipy.io.mmwrite(path, sp.coo_array((holes[~np.isnan(holes)], np.nonzero(~np.isnan(holes))), shape=holes.shape))
    elif kind == "csv":
        path.write_text(
            "\n".join(",".join("" if x != x else f"{x:.9f}" for x in row) for row in holes), encoding="utf-8"
        )
    else:
        lines = [",".join(["time", *(f"s{j}" for j in range(30))])]
        lines += [f"08:{i:02}," + ",".join("" if x != x else f"{x:.9f}" for x in row) for i, row in enumerate(holes)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    i, j = (int(axis[0]) for axis in np.nonzero(np.isnan(holes)))
    pair = f"08:{i:02},s{j}" if kind == "labelled.csv" else f"{i},{j}"
    (tmp_path / "pairs.csv").write_text(f"row,column\n{pair}\n", encoding="utf-8")
    arguments = f"complete {path} --out {tmp_path / 'run'} --no-calibrate --jobs 1 --predict {tmp_path / 'pairs.csv'}"
    assert main(arguments.split()) == 0
    (line,) = predicted(tmp_path / "run" / "predictions.csv")
    assert list(line) == ["row", "column", "prediction"]
    assert abs(float(line["prediction"]) - full[i, j]) < 1e-4
    assert summary(tmp_path / "run")["held_out_rmse"] is None


@pytest.mark.parametrize("kind", ["npy", "csv", "table.csv"])
def test_the_whole_matrix_is_written_filled(
    tmp_path: Path, ratings: Path, full: Any, kind: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("rankwise.completion_runs.filled._NUMBERS_AT_A_TIME", 7 * 30)  # several blocks of rows
    holes = np.where(np.random.default_rng(2).random(full.shape) < 0.6, full, np.nan)
    np.save(tmp_path / "m.npy", holes)
    target = tmp_path / "new" / f"filled.{kind}"
    data = f"{ratings} {TABLE}" if kind == "table.csv" else f"{tmp_path / 'm.npy'} --jobs 1"
    assert main(f"complete {data} --out {tmp_path / 'run'} --no-calibrate --filled {target}".split()) == 0
    if kind == "table.csv":
        with target.open(encoding="utf-8", newline="") as file:
            head, *lines = csv.reader(file)
        assert head[0] == "user"
        at = {int(name.removeprefix("film ")): place for place, name in enumerate(head) if place}
        filled = np.empty_like(full)
        for line in lines:
            filled[int(line[0][1:])] = [float(line[at[j]]) for j in range(30)]
    else:
        filled = np.load(target, allow_pickle=False) if kind == "npy" else np.loadtxt(target, delimiter=",")
        seen = ~np.isnan(holes)
        np.testing.assert_allclose(filled[seen], holes[seen], rtol=0 if kind == "npy" else 1e-6)
    np.testing.assert_allclose(filled, full, atol=1e-4)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_observed_entries_are_written_as_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    full = 123_456_789 + rng.standard_normal((20, 12))
    holes = np.where(rng.random(full.shape) < 0.7, full, np.nan)
    np.save(tmp_path / "m.npy", holes)
    target = tmp_path / "filled.csv"
    arguments = f"complete {tmp_path / 'm.npy'} --out {tmp_path / 'run'} --no-calibrate --jobs 1 --filled {target}"
    assert main(arguments.split()) == 0
    filled, seen = np.loadtxt(target, delimiter=","), ~np.isnan(holes)
    assert np.array_equal(filled[seen], holes[seen])


def test_a_matrix_that_was_not_written_in_time_is_written_by_the_same_command(
    tmp_path: Path, full: Any, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    np.save(tmp_path / "m.npy", np.where(np.random.default_rng(2).random(full.shape) < 0.6, full, np.nan))
    target = tmp_path / "filled.npy"
    arguments = (
        f"complete {tmp_path / 'm.npy'} --out {tmp_path / 'run'} --no-calibrate --jobs 1 --filled {target}".split()
    )

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rankwise.completion_runs.run.write_filled", stopped)
        assert main(arguments) == 1
    assert not target.exists()
    assert main(arguments) == 0
    np.testing.assert_allclose(np.load(target, allow_pickle=False), full, atol=1e-4)
    assert not (tmp_path / "run" / "entries.safetensors").exists()
    assert main(arguments) == 2
    assert "keeps no entries" in capsys.readouterr().err


def test_a_table_without_header(ratings: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare.tsv"
    text = ratings.read_text(encoding="utf-8").split("\n", 1)[1].replace(",", "\t")
    path.write_text(text, encoding="utf-8")
    (tmp_path / "pairs.tsv").write_text("u3\tfilm 4\n", encoding="utf-8")
    columns = "--no-header --row 1 --col 2 --value 3 --no-calibrate --dtype float32 --clip -1,1 --jobs 1"
    arguments = f"complete {path} {columns} --out {tmp_path / 'run'} --predict {tmp_path / 'pairs.tsv'}"
    assert main(arguments.split()) == 0
    (line,) = predicted(tmp_path / "run" / "predictions.csv")
    assert list(line) == ["row", "column", "prediction"]
    assert -1 <= float(line["prediction"]) <= 1
    (tmp_path / "run" / "predictions.csv").unlink()
    assert main(f"complete --from {tmp_path / 'run'} --predict {tmp_path / 'pairs.tsv'}".split()) == 0
    assert predicted(tmp_path / "run" / "predictions.csv") == [line]


def test_a_table_taken_for_a_matrix_is_said(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "long.csv"
    path.write_text("user,item,rating\n" + "".join(f"{i},{i % 7},{i % 5}\n" for i in range(90)), encoding="utf-8")
    assert main(f"complete {path} --out {tmp_path / 'run'} --no-calibrate --jobs 1".split()) == 0
    assert "name the columns with --row, --col and --value" in capsys.readouterr().err
    path.write_text("user,item,rating\nann,1,2\nbob,2,x\n", encoding="utf-8")
    assert main(f"complete {path} --out {tmp_path / 'other'}".split()) == 2
    assert "if every line is one entry" in complaint(capsys)


def picture_file(path: Path, shape: tuple[int, ...] = (40, 50)) -> Path:
    rng = np.random.default_rng(3)
    smooth = np.outer(np.linspace(0.3, 1, shape[0]), np.linspace(1, 0.2, shape[1]))
    pixels = smooth if len(shape) == 2 else smooth[..., None] * rng.uniform(0.5, 1, shape[2])
    Image.fromarray((255 * pixels).astype(np.uint8)).save(path)
    return path


def test_a_picture_with_a_share_of_its_pixels(tmp_path: Path) -> None:
    path = picture_file(tmp_path / "p.png", (40, 50, 3))
    arguments = f"complete {path} --observed .5 --out {tmp_path / 'run'} --jobs 1"
    assert main(arguments.split()) == 0
    pictures = {"original.png", "observed.png", "filled.png"}
    assert {file.name for file in (tmp_path / "run").iterdir()} == FILES | pictures
    original, filled, observed = (
        np.asarray(Image.open(tmp_path / "run" / f"{name}.png")).astype(int)
        for name in ("original", "filled", "observed")
    )
    assert np.array_equal(original, np.asarray(Image.open(path)))
    kept = observed[..., 3] > 0
    assert kept.mean() == 0.5
    assert np.array_equal(filled[kept], original[kept])
    assert np.abs(filled - original).max() <= 3
    found = summary(tmp_path / "run")["picture"]
    assert found["hidden_pixels"] == 1000
    error = np.mean((filled[~kept] - original[~kept]) ** 2) / 255**2
    assert abs(found["psnr"] + 10 * np.log10(error)) < 1.5  # bytes are rounded
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 3


def test_a_picture_with_a_mask(tmp_path: Path, capsys: Captured) -> None:
    path = picture_file(tmp_path / "p.png")
    mask = np.full((40, 50), 255, np.uint8)
    mask[10:14, 20:30] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = f"complete {path} --mask {tmp_path / 'mask.png'} --out {tmp_path / 'run'} --jobs 1"
    assert main(arguments.split()) == 0
    found = summary(tmp_path / "run")
    assert found["picture"] == {"hidden_pixels": 40, "psnr": None}
    assert found["held_out_rmse"] is not None
    filled, original = (np.asarray(Image.open(p)).astype(int) for p in (tmp_path / "run" / "filled.png", path))
    assert np.array_equal(filled[mask > 0], original[mask > 0])
    assert np.abs(filled - original).max() <= 3
    capsys.readouterr()
    Image.fromarray(np.roll(mask, 1)).save(tmp_path / "mask.png")
    assert main(arguments.split()) == 2
    assert "other data" in complaint(capsys)
    assert main(f"complete {path} --out {tmp_path / 'run'}".split()) == 2
    assert "a run with --mask" in complaint(capsys)


def test_a_missing_matplotlib_costs_only_the_report(
    ratings: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rankwise.diagnostics.completion_report", None)
    arguments = ["complete", str(ratings), *TABLE.split(), "--no-calibrate", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert "no report: reports need more packages" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES - {"report.html"}


# --- mistakes

GOOD = "complete {ratings} --row user --col item --value rating --out {out} "
BAD = {
    "no data": "complete --out {out}",
    "no out": "complete {ratings} --row user --col item --value rating",
    "two of three columns": "complete {ratings} --row user --col item --out {out}",
    "unknown column": "complete {ratings} --row user --col film --value rating --out {out}",
    "one column twice": "complete {ratings} --row user --col user --value rating --out {out}",
    "values that are names": "complete {ratings} --row user --col rating --value item --out {out}",
    "file missing": "complete nope.csv --row user --col item --value rating --out {out}",
    "file a folder": "complete {folder} --out {out}",
    "file empty": "complete {empty} --out {out}",
    "unknown format": "complete {text}.xyz --out {out}",
    "parquet without columns": "complete ratings.parquet --out {out}",
    "key of a csv": "complete {ratings} --key a --out {out}",
    "bad line": "complete {bad} --row user --col item --value rating --out {out}",
    "rank 0": GOOD + "--rank 0",
    "depth 0": GOOD + "--depth 0",
    "depth 1": GOOD + "--depth 1",
    "unknown solver": GOOD + "--solver magic",
    "unknown loss": GOOD + "--loss l1",
    "unknown dtype": GOOD + "--dtype int8",
    "no iterations": GOOD + "--max-iter 0",
    "clip a word": GOOD + "--clip low",
    "clip one number": GOOD + "--clip 5",
    "clip upside down": GOOD + "--clip 5,1",
    "clip nan": GOOD + "--clip nan,1",
    "negative seed": GOOD + "--seed -1",
    "seed a word": GOOD + "--seed x",
    "no jobs": GOOD + "--jobs 0",
    "pairs missing": GOOD + "--predict nope.csv",
    "pairs without the columns": GOOD + "--predict {wrong}",
    "interval 0": GOOD + "--predict {pairs} --interval 0",
    "interval 90": GOOD + "--predict {pairs} --interval 90",
    "interval nan": GOOD + "--predict {pairs} --interval nan",
    "interval without pairs": GOOD + "--interval .9",
    "interval without calibration": GOOD + "--predict {pairs} --interval .9 --no-calibrate",
    "predictions over the pairs": GOOD + "--predict {pairs} --predictions {pairs}",
    "predictions a folder": GOOD + "--predict {pairs} --predictions {folder}",
    "predictions below a file": GOOD + "--predict {pairs} --predictions {text}/p.csv",
    "observed of a table": GOOD + "--observed .5",
    "mask of a table": GOOD + "--mask {picture}",
    "picture whole": "complete {picture} --out {out}",
    "picture observed 0": "complete {picture} --observed 0 --out {out}",
    "picture observed nan": "complete {picture} --observed nan --out {out}",
    "picture observed and mask": "complete {picture} --observed .5 --mask {picture} --out {out}",
    "picture mask missing": "complete {picture} --mask nope.png --out {out}",
    "picture with columns": "complete {picture} --row a --col b --value c --out {out}",
    "picture with pairs": "complete {picture} --observed .5 --predict {pairs} --out {out}",
    "picture that is none": "complete {text}.png --observed .5 --out {out}",
    "out is a file": "complete {ratings} --row user --col item --value rating --out {text}",
    "out below a file": "complete {ratings} --row user --col item --value rating --out {text}/run",
    "out in use": "complete {ratings} --row user --col item --value rating --out {folder}",
    "out name too long": "complete {ratings} --row user --col item --value rating --out " + "o" * 300,
    "from nothing": "complete --from {out} --predict {pairs}",
    "from another folder": "complete --from {folder} --predict {pairs}",
    "from without pairs": "complete --from {run}",
    "from with data": "complete {ratings} --from {run} --predict {pairs}",
    "from with out": "complete --from {run} --predict {pairs} --out {out}",
    "from with options of a fit": "complete --from {run} --predict {pairs} --rank 3 --no-calibrate",
    "filled of another kind": GOOD + "--filled whole.xlsx",
    "filled over the data": GOOD + "--filled {ratings}",
    "filled over the pairs": GOOD + "--predict {pairs} --filled {pairs}",
    "filled and predictions": GOOD + "--predict {pairs} --filled {out}.csv --predictions {out}.csv",
    "predictions over the data": GOOD + "--predict {pairs} --predictions {ratings}",
    "filled below a file": GOOD + "--filled {text}/m.csv",
    "filled a picture": "complete {picture} --observed .5 --out {out} --filled {out}.csv",
    "filled by a finished run": "complete {ratings} --row user --col item --value rating --out {run} --filled {out}.csv",
    "from with wrong pairs": "complete --from {run} --predict {wrong}",
}


@pytest.fixture
def places(run: Path, ratings: Path, tmp_path: Path) -> SimpleNamespace:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine", encoding="utf-8")
    for name in ("notes", "notes.xyz", "notes.png"):
        (tmp_path / name).write_text("text", encoding="utf-8")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    (tmp_path / "bad.csv").write_text("user,item,rating\nann,film,4\nbob,film,four\n", encoding="utf-8")
    return SimpleNamespace(
        run=run, ratings=ratings, out=tmp_path / "out", folder=tmp_path / "folder", text=tmp_path / "notes",
        empty=tmp_path / "empty.csv", wrong=tmp_path / "wrong.csv", bad=tmp_path / "bad.csv",
        pairs=write_pairs(tmp_path / "pairs.csv"), picture=picture_file(tmp_path / "p.png"),
    )  # fmt: skip


@pytest.mark.parametrize("arguments", BAD.values(), ids=[name.replace(" ", "-") for name in BAD])
def test_mistakes_are_explained_with_exit_code_2(
    places: SimpleNamespace, tmp_path: Path, capsys: Captured, arguments: str
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(arguments.format(**vars(places)).split()) == 2
    complaint(capsys)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"kind": "completion"}', '{"kind": "completion", "inputs": 1}']
)
@pytest.mark.parametrize("name", ["config.json", "labels.json", "model/config.json"])
def test_damaged_runs(run: Path, tmp_path: Path, capsys: Captured, name: str, content: str) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / name).write_text(content, encoding="utf-8")
    pairs = write_pairs(tmp_path / "pairs.csv")
    assert main(f"complete --from {copy} --predict {pairs} --predictions {tmp_path / 'p.csv'}".split()) == 2
    complaint(capsys)
    assert not (tmp_path / "p.csv").exists()


OPTIONS = [
    "--row", "--col", "--value", "--delimiter", "--key", "--observed", "--mask", "--rank", "-r", "--depth", "--solver",
    "--loss", "--clip", "--max-iter", "--dtype", "--predict", "--interval", "--predictions", "--filled", "--from", "--seed", "-j",
]  # fmt: skip
VALUES = st.one_of(st.integers().map(str), st.floats().map(str), st.text(max_size=12), st.sampled_from(["", "auto"]))


@settings(max_examples=40)
@given(chosen=st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=4))
def test_any_options_end_in_a_sentence(chosen: dict[str, str]) -> None:
    import contextlib
    import io

    arguments = ["complete", "no-such-file.csv", "--out", "/no/such/place"]
    arguments += [part for option, value in chosen.items() for part in (option, value)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    if "--help" in arguments:
        return
    assert code == 2, (arguments, err.getvalue())
    assert "Traceback" not in out.getvalue() + err.getvalue()
    assert re.search(r"^error: ", err.getvalue(), re.MULTILINE | re.IGNORECASE), (arguments, err.getvalue())
