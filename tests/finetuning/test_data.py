"""Reading tables: every format alike, nothing lost, every mistake explained."""

import codecs
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.finetuning import read_table
from rankwise.finetuning.data import draw, numeric_labels
from tests.finetuning.tiny_checkpoint import write_csv

ROWS = [
    ("a good day", "a fine day", 4.5),
    ("žluťoučký kůň", "日本語 🐈", 0.25),
    ("NA", "null", 3.0),
    ("None", "nan", 1.0),
    ("-1", "<b>", 2.0),
]
FORMATS = ("csv", "tsv", "jsonl", "parquet")


def write(path: Path, rows: list[tuple[Any, ...]], names: list[str]) -> str:
    if path.suffix == ".csv":
        write_csv(path, names, rows)
    elif path.suffix == ".tsv":
        lines = ["\t".join(names), *("\t".join(str(cell) for cell in row) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        pd.DataFrame(rows, columns=names).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_reads_alike(tmp_path: Path, ending: str) -> None:
    table = read_table(write(tmp_path / f"d.{ending}", ROWS, ["sentence1", "sentence2", "score"]))
    assert [(row["text"], row["text_pair"], row["label"]) for row in table.rows] == ROWS
    assert [row["row"] for row in table.rows] == list(range(len(ROWS)))
    assert (table.columns.text, table.columns.text_pair, table.columns.label) == ("sentence1", "sentence2", "score")
    assert table.dropped == 0
    assert len(table.revision) == 64


@pytest.mark.parametrize("ending", FORMATS)
def test_class_names_stay_text(tmp_path: Path, ending: str) -> None:
    rows = [("one", "NA"), ("two", "yes"), ("three", "null")]
    table = read_table(write(tmp_path / f"d.{ending}", rows, ["text", "label"]))
    assert [row["label"] for row in table.rows] == ["NA", "yes", "null"]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("texts", [["007", "1e3"], ["00", "0"], ["TRUE", "FALSE"], ["1.50", "2"]])
def test_texts_that_look_like_numbers_stay_as_written(tmp_path: Path, ending: str, texts: list[str]) -> None:
    rows = [(text, label) for text, label in zip(texts, ["p", "q"], strict=True)]
    table = read_table(write(tmp_path / f"d.{ending}", rows, ["text", "label"]), text="text")
    assert [row["text"] for row in table.rows] == texts


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=6))
@example([("a\r\nb", 'c,"d"')])
@example([("x", "\ufeffy"), ("  padded  ", "'")])
def test_any_text_survives_csv(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    # one plainly textual row, so that this is about characters and not about the type of the column
    rows = [("plain words", "more words", 1), *((a, b, 2) for a, b in pairs)]
    path = write_csv(tmp_path_factory.mktemp("csv") / "d.csv", ["sentence1", "sentence2", "score"], rows)
    table = read_table(str(path))
    kept = [(number, row) for number, row in enumerate(rows) if row[0].strip() and row[1].strip()]
    assert [(row["row"], row["text"], row["text_pair"], row["label"]) for row in table.rows] == [
        (number, *row) for number, row in kept
    ]
    assert table.dropped == len(rows) - len(kept)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"d.{ending}"
    write(path, [("one", "x"), ("two", "y")], ["text", "label"])
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    table = read_table(str(path))
    assert table.columns.text == "text"
    assert [row["text"] for row in table.rows] == ["one", "two"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["text", "label"], ("text", None, "label")),
        (["Text", "Label"], ("Text", None, "Label")),
        (["premise", "hypothesis", "label"], ("premise", "hypothesis", "label")),
        (["question1", "question2", "class"], ("question1", "question2", "class")),
        (["score", "sentence1", "sentence2"], ("sentence1", "sentence2", "score")),
        (["remark", "stars", "rating"], ("remark", None, "rating")),
    ],
)
def test_usual_names_are_guessed(tmp_path: Path, names: list[str], expected: tuple[str, str | None, str]) -> None:
    row = {name: ("long words here" if name not in ("stars",) else "s") for name in names}
    path = write(tmp_path / "d.jsonl", [tuple(row.values()), tuple(row.values())], names)
    columns = read_table(path).columns
    assert (columns.text, columns.text_pair, columns.label) == expected


def test_without_a_usual_name_the_longest_text_is_the_text(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.csv", [("a1", "a longer remark", 7, 1), ("a2", "another one", 7, 0)], ["id", "body", "n", "y"]
    )
    assert read_table(path).columns.text == "body"


def test_named_columns_win(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", [("a", "b", "c", 1)], ["text", "left", "right", "label"])
    table = read_table(path, text="right", text_pair="left", label="label")
    assert (table.rows[0]["text"], table.rows[0]["text_pair"]) == ("c", "b")


@pytest.mark.parametrize(("option", "flag"), [("text", "--text"), ("text_pair", "--text-pair"), ("label", "--label")])
def test_a_missing_named_column_is_named_with_what_there_is(tmp_path: Path, option: str, flag: str) -> None:
    path = write(tmp_path / "d.csv", [("a", 1)], ["text", "label"])
    with pytest.raises(UserError, match=rf"no column 'wrong' \({flag}\); it has text, label"):
        read_table(path, **{option: "wrong"})


def test_no_label_column(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"label; it has text, other.*--label"):
        read_table(write(tmp_path / "d.csv", [("a", "b")], ["text", "other"]))


def test_no_text_column(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text column.*--text"):
        read_table(write(tmp_path / "d.csv", [(1, 1), (2, 0)], ["n", "label"]))


@pytest.mark.parametrize(
    "chosen",
    [
        {"text": "text", "label": "text"},
        {"text": "text", "text_pair": "text"},
        {"text": "text", "text_pair": "label", "label": "label"},
        {"text_pair": "label", "label": "label"},
    ],
)
def test_one_column_in_two_roles_is_refused(tmp_path: Path, chosen: dict[str, str]) -> None:
    path = write(tmp_path / "d.csv", [("a", "b", 1), ("c", "d", 2)], ["text", "other", "label"])
    with pytest.raises(UserError, match="different columns"):
        read_table(path, **chosen)


@pytest.mark.parametrize("ending", FORMATS)
def test_incomplete_rows_are_dropped_and_counted(tmp_path: Path, ending: str) -> None:
    blank = "" if ending in ("csv", "tsv") else None
    rows = [("one", 1.5), (blank, 2.5), ("   ", 2.5), ("three", blank), ("four", 4.5)]
    table = read_table(write(tmp_path / f"d.{ending}", rows, ["text", "label"]))
    assert [(row["row"], row["text"], row["label"]) for row in table.rows] == [(0, "one", 1.5), (4, "four", 4.5)]
    assert table.dropped == 3


def test_only_incomplete_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"every row .* empty text or label \(columns text, label\)"):
        read_table(write(tmp_path / "d.jsonl", [("", 1), ("x", None)], ["text", "label"]))


@pytest.mark.parametrize("ending", FORMATS)
def test_empty_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"d.{ending}"
    path.touch()
    with pytest.raises(UserError, match=r"d\.\w+ (is empty|has no rows)|cannot read"):
        read_table(str(path))


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_header_only(tmp_path: Path, ending: str) -> None:
    with pytest.raises(UserError, match="no rows; expected a header and at least one labelled row"):
        read_table(write(tmp_path / f"d.{ending}", [], ["text", "label"]))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_another_encoding_is_named_with_the_way_out(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"d.{ending}"
    write(path, [("café au lait", "x"), ("naïve", "y")], ["text", "label"])
    path.write_bytes(path.read_text(encoding="utf-8").encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8 .*iconv"):
        read_table(str(path))


@pytest.mark.parametrize("name", ["d.txt", "d.xlsx", "d", "d.csv.gz"])
def test_unknown_ending(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text,label\na,b\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"expected \.csv, \.tsv, \.jsonl, \.parquet, \.conll .*or hub:NAME"):
        read_table(str(tmp_path / name))


def test_the_ending_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "D.CSV").write_text("text,label\na,b\n", encoding="utf-8")
    assert read_table(str(tmp_path / "D.CSV")).rows[0]["text"] == "a"


def test_folder_instead_of_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        read_table(str(tmp_path))


@pytest.mark.parametrize("name", ["missing.csv", "no/such/folder/missing.csv", "x" * 300 + ".csv"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_table(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": \n'),
        ("d.jsonl", b"text,label\na,b\n"),
        ("d.jsonl", b'[1, 2]\n{"text": null}'),
        ("d.csv", b'text,label\n"never closed,1\nb,2\n'),
        ("d.csv", b"text,label\na,1\nb,2,3\n"),
        ("d.parquet", b"PAR1 but not really"),
        ("d.parquet", b"text,label\na,1\n"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"cannot read .*{name} as {name[2:]}"):
        read_table(str(tmp_path / name))


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_rows_wider_than_the_header_are_refused(tmp_path: Path, ending: str) -> None:
    """An unquoted comma in the first text must not shift the columns: pandas would take the first cell as an index."""
    between = {"csv": ",", "tsv": "\t"}[ending]
    path = tmp_path / f"d.{ending}"
    rows = [["text", "label"], ["hello", "world", "1"], ["good", "day", "0"]]
    path.write_text("\n".join(between.join(row) for row in rows) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"d\.\w+"):
        read_table(str(path))


def test_hub_offline_names_the_data_set() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"cannot get the data set 'nobody/no-such-set'.*Parquet"):
        read_table("hub:nobody/no-such-set")


def test_hub_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'rankwise\[hub\]'"):
        read_table("hub:nobody/no-such-set")


def test_the_revision_follows_the_bytes(tmp_path: Path) -> None:
    first = read_table(write(tmp_path / "a.csv", [("a", 1)], ["text", "label"])).revision
    same = read_table(write(tmp_path / "b.csv", [("a", 1)], ["text", "label"])).revision
    other = read_table(write(tmp_path / "c.csv", [("a", 2)], ["text", "label"])).revision
    assert first == same != other


@given(count=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_draw_splits_without_replacement(count: int, share: float, seed: int) -> None:
    shots = int(share * count)
    drawn, rest = draw(count, shots, seed)
    assert len(drawn) == shots
    assert sorted(drawn + rest) == list(range(count))
    assert drawn == sorted(drawn)
    assert draw(count, shots, seed) == (drawn, rest)


def test_draw_depends_on_the_seed_and_reaches_every_row() -> None:
    draws = [draw(10, 3, seed)[0] for seed in range(60)]
    assert len({tuple(drawn) for drawn in draws}) > 20
    assert {position for drawn in draws for position in drawn} == set(range(10))
    # the same on every machine: numpy keeps PCG64's permutation
    assert draw(10, 3, 0)[0] == sorted(np.random.default_rng(0).permutation(10)[:3].tolist())


@pytest.mark.parametrize("bad", ["seven", "", None, "nan", float("inf"), [1]])
def test_numeric_labels_name_the_row_that_is_none(bad: object) -> None:
    rows = [{"row": 4, "label": "1.5"}, {"row": 9, "label": bad}]
    with pytest.raises(UserError, match=r"column 'score' of d\.csv must hold numbers.*row 9"):
        numeric_labels(rows, "d.csv", "score")


def test_numeric_labels_read_numbers_in_text() -> None:
    assert numeric_labels([{"row": 0, "label": " 1.5 "}, {"row": 1, "label": 2}], "", "").tolist() == [1.5, 2.0]
