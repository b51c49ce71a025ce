"""Files of all kinds become the entries that were written, in chunks of any size; a bad one is a readable error."""

import datetime
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
from hypothesis import example, given
from hypothesis import strategies as st

from rankwise.completion import Observations
from rankwise.completion.reading import (
    EntryTable,
    Labels,
    Picture,
    load_entries,
    load_labels,
    read_image,
    read_matrix,
    read_table,
    save_entries,
    save_labels,
)
from rankwise.errors import UserError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

RATINGS = "user,item,rating\nann,film,4\nbob,book,2.5\nann,book,-1e0\n"
NAMES = {"row": "user", "column": "item", "value": "rating"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property: function-scoped ones and hypothesis do not go together."""
    return tmp_path_factory.mktemp("files")


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def triples(table: EntryTable) -> list[tuple[str, str, float]]:
    return [
        (table.row_labels[r], table.column_labels[c], float(v))
        for r, c, v in zip(table.rows, table.columns, table.values, strict=True)
    ]


EXPECTED = [("ann", "film", 4.0), ("bob", "book", 2.5), ("ann", "book", -1.0)]


class TestTables:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("comma.csv", RATINGS),
            ("semicolon.csv", RATINGS.replace(",", ";")),
            ("bar.txt", RATINGS.replace(",", "|")),
            ("tab.tsv", RATINGS.replace(",", "\t")),
            ("windows.csv", RATINGS.replace("\n", "\r\n")),
            ("marked.csv", "\ufeff" + RATINGS),
            ("blank.csv", "\n\n" + RATINGS.replace("bob", "\nbob")),
            ("unended.csv", RATINGS.rstrip("\n")),
            ("quoted.csv", '"user","item","rating"\n"ann","film","4"\n"bob","book",2.5\nann,book,-1e0\n'),
            ("spaces.csv", "user, item, rating\nann , film, 4\nbob,book ,2.5 \nann,book, -1e0\n"),
            ("more.csv", 'text,rating,item,user\n"a, b\nc",4,film,ann\n"",2.5,book,bob\n"say ""no""",-1,book,ann\n'),
            ("r.tsv", '"user"\t"item"\t"rating"\n"ann"\t"film"\t4\n"bob"\t"book"\t2.5\n"ann"\t"book"\t-1\n'),
        ],
    )  # fmt: skip
    def test_every_dialect_gives_the_same_entries(self, tmp_path: Path, name: str, content: str) -> None:
        assert triples(read_table(written(tmp_path, name, content), **NAMES)) == EXPECTED
        packed = written(tmp_path, f"{name}.gz", gzip.compress(content.encode()))
        assert triples(read_table(packed, **NAMES)) == EXPECTED
        misnamed = written(tmp_path, f"packed-{name}", gzip.compress(content.encode()))  # told by content
        assert triples(read_table(misnamed, **NAMES)) == EXPECTED

    def test_a_given_delimiter_counts(self, tmp_path: Path) -> None:
        path = written(tmp_path, "a.txt", RATINGS.replace(",", " "))
        assert triples(read_table(path, delimiter="space", **NAMES)) == EXPECTED
        path = written(tmp_path, "b.dat", "ann::film::4::9\nbob::book::2.5::9\nann::book::-1::9\n")
        assert triples(read_table(path, delimiter=":", header=False, row="1", column="3", value="5")) == EXPECTED

    def test_columns_go_by_number_without_a_header(self, tmp_path: Path) -> None:
        path = written(tmp_path, "u.data", "196\t242\t3\t881\n186\t302\t3\t891\n196\t302\t1\t878\n")
        table = read_table(path, row="1", column="2", value="3", header=False)
        assert table.row_labels == ["196", "186"]
        assert table.column_labels == ["242", "302"]
        assert table.values.tolist() == [3, 3, 1]
        assert table.rows.dtype == table.columns.dtype == np.int32

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("chunk_rows", [1, 250, 10**6])
    def test_the_chunks_do_not_show(self, folder: Path, chunk_rows: int, packed: bool) -> None:
        rng = np.random.default_rng(1)
        rows, columns, values = rng.integers(0, 300, 3000), rng.integers(0, 200, 3000), rng.normal(size=3000)
        lines = [f"u{r},{c},{'' if v > 1.5 else repr(float(v))}" for r, c, v in zip(rows, columns, values, strict=True)]
        text = "\n".join(["user,item,rating", *lines]).encode()
        path = written(folder, f"chunks-{chunk_rows}-{packed}.csv", gzip.compress(text) if packed else text)
        calls: list[tuple[int, int]] = []
        table = read_table(path, chunk_rows=chunk_rows, progress=lambda *done: calls.append(done), **NAMES)
        seen = values <= 1.5
        assert [table.row_labels[code] for code in table.rows] == [f"u{row}" for row in rows[seen]]
        assert [table.column_labels[code] for code in table.columns] == [str(column) for column in columns[seen]]
        assert np.array_equal(table.values, values[seen])
        assert table.empty_values == int((~seen).sum())
        assert table.row_labels == list(dict.fromkeys(f"u{row}" for row in rows))
        # small chunks really are many chunks
        assert len(calls) == 1 if chunk_rows == 10**6 else len(calls) > 5
        assert calls == sorted(calls)
        assert calls[-1] == (path.stat().st_size, path.stat().st_size)

    def test_memory_follows_the_chunk_and_not_the_file(self, tmp_path: Path) -> None:
        """One long text a line: 40 MB of it pass, and what pyarrow holds at any time stays a fraction of that."""
        line = "ann,film,4," + "x" * 4000 + "\n"
        path = tmp_path / "long.csv"
        with path.open("w", encoding="utf-8") as opened:
            opened.write("user,item,rating,text\n")
            opened.writelines(line for _ in range(10_000))
        held: list[int] = []
        table = read_table(path, chunk_rows=100, progress=lambda *_: held.append(pa.total_allocated_bytes()), **NAMES)
        assert len(table.values) == 10_000
        assert max(held) < path.stat().st_size / 5

    def test_missing_values_are_counted_and_their_labels_stay(self, tmp_path: Path) -> None:
        content = "user,item,rating\nann,film,4\nbob,film,\ncat,film,NaN\ndan,book, n/a \n,film,3\neve,,3\n"
        table = read_table(written(tmp_path, "holes.csv", content), **NAMES)
        assert triples(table) == [("ann", "film", 4.0)]
        assert (table.empty_values, table.empty_labels) == (3, 2)
        assert table.row_labels == ["ann", "bob", "cat", "dan"]  # eve has no column: no line of the matrix
        assert table.column_labels == ["film", "book"]
        assert table.shape == (4, 2)
        assert table.observations().row_counts.tolist() == [1, 0, 0, 0]

    def test_duplicates_are_left_to_the_observations(self, tmp_path: Path) -> None:
        table = read_table(written(tmp_path, "twice.csv", RATINGS + "ann,film,6\n"), **NAMES)
        assert len(table.values) == 4
        seen = table.observations(np.float32)
        assert seen.merged == 1
        assert seen.matrix().toarray()[0, 0] == 5
        assert seen.values.dtype == np.float32

    def test_requests_take_the_codes_of_a_known_table(self, tmp_path: Path) -> None:
        known = read_table(written(tmp_path, "known.csv", RATINGS), **NAMES)
        asked = read_table(
            written(tmp_path, "asked.csv", "item,user\nbook,ann\nplay,bob\nbook,zoe\n"),
            row="user", column="item", value=None, labels=(known.row_labels, known.column_labels),
        )  # fmt: skip
        assert asked.rows.tolist() == [0, 1, 2]
        assert asked.columns.tolist() == [1, 2, 1]
        assert asked.row_labels == ["ann", "bob", "zoe"]
        assert np.isnan(asked.values).all()
        with pytest.raises(UserError, match="not distinct"):
            read_table(written(tmp_path, "k.csv", RATINGS), **NAMES, labels=(["a", "a"], []))

    @pytest.mark.parametrize("chunk_rows", [1, 1000])
    @pytest.mark.parametrize(
        ("labels", "texts"),
        [
            ([7, 8, 7], ["7", "8", "7"]),
            ([7.0, 8.5, 7.0], ["7", "8.5", "7"]),
            ([datetime.date(2024, 1, 5), datetime.date(2024, 1, 6), datetime.date(2024, 1, 5)], None),
            ([b"x", b"y", b"x"], ["x", "y", "x"]),
            (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
            ([True, False, True], ["true", "false", "true"]),
        ],
    )
    def test_parquet_labels_of_any_type(self, tmp_path: Path, labels: Any, texts: Any, chunk_rows: int) -> None:
        table = pa.table({"user": labels, "item": ["a", "b", "b"], "rating": pa.array([1, None, 3], pa.int32())})
        parquet.write_table(table, tmp_path / "t.parquet")
        read = read_table(tmp_path / "t.parquet", chunk_rows=chunk_rows, **NAMES)
        texts = texts or [str(label) for label in labels]
        assert read.row_labels == list(dict.fromkeys(texts))
        assert triples(read) == [(texts[0], "a", 1.0), (texts[2], "b", 3.0)]
        assert read.empty_values == 1

    @pytest.mark.parametrize(
        "values",
        [
            pa.array(["4", "2.5", " -1"]),
            pa.array([4, 2.5, -1], pa.float16()),
            pa.array(["4", "2.5", "-1"]).dictionary_encode(),
            pa.array(["4.0", "2.5", "-1.0"]).cast(pa.decimal128(5, 2)),
        ],
        ids=lambda values: str(values.type),
    )
    def test_parquet_values_of_any_type(self, tmp_path: Path, values: Any) -> None:
        table = pa.table({"user": ["ann", "bob", "ann"], "item": ["film", "book", "book"], "rating": values})
        parquet.write_table(table, tmp_path / "t.parquet")
        assert triples(read_table(tmp_path / "t.parquet", **NAMES)) == EXPECTED

    @given(
        entries=st.lists(
            st.tuples(
                st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6),
                st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6),
                st.none() | st.floats(allow_nan=False, allow_infinity=False),
            ),
            min_size=1,
            max_size=30,
        ),
        chunk_rows=st.sampled_from([1, 7, 1000]),
    )
    def test_whatever_csv_can_hold_comes_back(self, folder: Path, entries: list[Any], chunk_rows: int) -> None:
        import csv

        text = io.StringIO(newline="")
        writer = csv.writer(text, quoting=csv.QUOTE_ALL)
        writer.writerow(["user", "item", "rating"])
        writer.writerows([u, i, "" if v is None else repr(v)] for u, i, v in entries)
        path = written(folder, "any.csv", text.getvalue())
        expected = [
            (_trimmed(u), _trimmed(i), v) for u, i, v in entries if v is not None and _trimmed(u) and _trimmed(i)
        ]
        if expected:
            assert triples(read_table(path, chunk_rows=chunk_rows, **NAMES)) == expected
        else:
            with pytest.raises(UserError):
                read_table(path, chunk_rows=chunk_rows, **NAMES)


def _trimmed(label: str) -> str:
    return str(pa.compute.utf8_trim_whitespace(label))


def _read_ratings(path: Path) -> Any:
    return read_table(path, **NAMES)


class TestTableErrors:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("user,item,rating\nann,film,4\nbob,film,good\n", r"line 3, column 'rating': expected a finite number, got 'good'"),
            ("user,item,rating\n\nann,film,4\nbob,film,inf\n", r"line 4, column 'rating': .* got 'inf'"),
            ("user,item,rating\nann,film,1e999\n", r"line 2, .* got '1e999'"),
            ('user,item,rating\n"a\nb",film,4\nbob,film,x\n', r"line 4, .* got 'x'"),
            ("user;item;rating\nann;film;4,5\n", "write decimals with a point"),
            ("user,item,rating\nann,film,4\nbob,fi", r"line 3: expected 3 fields .* got 2; is the file cut short"),
            ("user,item,rating\nann,film,4\nbob,film,4,5\n", r"line 3: expected 3 fields .* got 4"),
            ('user,item,rating\nann,film,4\n"bob,film,5\ncat,film,3\n', r"line 3: a double quote opens here and never closes"),
            ("user,film,rating\nann,film,4\n", "has no column 'item'; it has user, film, rating"),
            ("user,item,item,rating\nann,film,book,4\n", "2 columns named 'item'"),
            ("1::2::3\n4::5::6\n", "numbers 1, 3, 5"),
            ("useritemrating\n1\n", "name another with delimiter="),
            ("user,item,rating\n", "nothing below it"),
            ("\n\n\n", "no rows"),
            ("", "is empty"),
            ("user,item,rating\nann,film,\n", "nothing is observed"),
            ("user,item,rating\n,film,3\n", "no line with both"),
            (b"user,item,rating\nann,film,4\nb\xf6b,film,3\n", r"line 3, is not UTF-8; .*iconv"),
            (b"us\xe9r,item,rating\nann,film,4\n", r"line 1, is not UTF-8"),
            (RATINGS.encode("utf-16"), "is UTF-16"),
            (b"user,item\0,rating\n", "zero bytes"),
            (b"PAR1" + bytes(20), "holds Parquet"),
            (b"PK\x03\x04" + bytes(20), "zip archive"),
            (gzip.compress(RATINGS.encode() * 50, mtime=0)[:-20], "cut short"),
            (gzip.compress(RATINGS.encode(), mtime=0)[:-8] + b"12345678", "cannot be read"),
        ],
    )  # fmt: skip
    def test_the_message_says_where_and_what(self, tmp_path: Path, content: str | bytes, said: str) -> None:
        path = written(tmp_path, "bad.csv", content)
        with pytest.raises(UserError, match=said) as raised:
            _read_ratings(path)
        assert str(path) in str(raised.value)

    def test_the_line_is_named_chunks_later(self, tmp_path: Path) -> None:
        lines = [f"u{i},film,{i}" for i in range(5000)]
        lines[4321] = "u,film,four"
        path = written(tmp_path, "late.csv", "\n".join(["user,item,rating", *lines]))
        for chunk_rows in (10, 10**6):
            with pytest.raises(UserError, match="line 4,323"):
                read_table(path, chunk_rows=chunk_rows, **NAMES)

    def test_a_quote_inside_a_field_is_a_letter(self, tmp_path: Path) -> None:
        path = written(tmp_path, "inch.csv", 'user,item,rating\nann,5" pipe,4\n')
        assert read_table(path, **NAMES).column_labels == ['5" pipe']

    def test_a_file_without_header_read_with_one(self, tmp_path: Path) -> None:
        path = written(tmp_path, "u.data", "1\t2\t3\n4\t5\t6\n")
        with pytest.raises(UserError, match=r"has no column '4'.*--no-header"):
            read_table(path, row="4", column="2", value="3")

    def test_what_is_no_table_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="does not exist"):
            _read_ratings(tmp_path / "absent.csv")
        with pytest.raises(UserError, match="does not exist"):
            _read_ratings(tmp_path / ("x" * 5000))
        with pytest.raises(UserError, match="is a folder"):
            _read_ratings(tmp_path)
        with pytest.raises(UserError, match=r"from '\.xlsx'; expected a table as \.csv"):
            _read_ratings(written(tmp_path, "a.xlsx", "x"))

    def test_mistakes_in_the_options(self, tmp_path: Path) -> None:
        path = written(tmp_path, "a.csv", RATINGS)
        with pytest.raises(UserError, match="must be different"):
            read_table(path, row="user", column="user", value="rating")
        with pytest.raises(UserError, match="chunk_rows"):
            read_table(path, chunk_rows=0, **NAMES)
        with pytest.raises(UserError, match="one character"):
            read_table(path, delimiter="::", **NAMES)
        big = written(tmp_path, "big.csv", RATINGS + "bob,film,1e300\n")
        assert read_table(big, **NAMES).values.max() == 1e300
        with pytest.raises(UserError, match="too large for float32"):
            read_table(big, dtype=np.float32, **NAMES)

    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "t.parquet"
        columns = {"user": ["a", "b"], "item": ["c", "d"], "rating": ["1", "one"]}
        parquet.write_table(pa.table(columns), path)
        with pytest.raises(UserError, match="row 2, column 'rating': expected a finite number, got 'one'"):
            _read_ratings(path)
        with pytest.raises(UserError, match="no column 'value'; it has user, item, rating"):
            read_table(path, row="user", column="item", value="value")
        parquet.write_table(pa.table({**columns, "rating": [1.0, float("inf")]}), path)
        with pytest.raises(UserError, match=r"row 2, .* got inf"):
            _read_ratings(path)
        parquet.write_table(pa.table({**columns, "rating": [[1.0], [2.0]]}), path)
        with pytest.raises(UserError, match="must hold numbers"):
            _read_ratings(path)
        parquet.write_table(pa.table({**columns, "user": [[1.0], [2.0]]}), path)
        with pytest.raises(UserError, match="cannot be read"):
            _read_ratings(path)
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(UserError, match="cut short"):
            _read_ratings(path)

    @pytest.mark.parametrize("column", NAMES.values())
    def test_parquet_strings_that_are_not_utf8(self, tmp_path: Path, column: str) -> None:
        texts = {name: pa.array(["1", "2"]) for name in NAMES.values()}
        texts[column] = pa.array([b"a\xffb", b"b"]).view(pa.string())
        parquet.write_table(pa.table(texts), tmp_path / "t.parquet")
        with pytest.raises(UserError, match=r"cannot be read as Parquet \(.*UTF8"):
            _read_ratings(tmp_path / "t.parquet")

    def test_parquet_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "t.parquet"
        parquet.write_table(pa.table({name: ["1", "2"] for name in NAMES.values()}), path)
        path.write_bytes(path.read_bytes().replace(b"user", b"us\xffr"))
        with pytest.raises(UserError, match="cannot be read as Parquet"):
            _read_ratings(path)


HOLED = np.array([[1.0, np.nan, 3.0], [np.nan, 0.0, -2.5]])


class TestMatrices:
    @pytest.mark.parametrize("name", ["m.npy", "m.npz", "m.csv", "m.mtx", "sparse.npz", "m.mtx.gz"])
    def test_every_format_gives_the_same_entries(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        rows, columns = np.nonzero(~np.isnan(HOLED))
        stored = sp.coo_array((HOLED[rows, columns], (rows, columns)), shape=HOLED.shape)  # an explicit zero among them
        if name == "m.npy":
            np.save(path, HOLED)
        elif name == "m.npz":
            np.savez(path, HOLED)
        elif name == "sparse.npz":
            sp.save_npz(path, stored.tocsr())
        elif name == "m.csv":
            np.savetxt(path, HOLED, delimiter=",")
        else:
            buffer = io.BytesIO()
            scipy.io.mmwrite(buffer, stored)
            path.write_bytes(gzip.compress(buffer.getvalue()) if name.endswith("gz") else buffer.getvalue())
        read = read_matrix(path)
        dense = np.full(read.observations.shape, np.nan)
        dense[read.observations.row_of_each(), read.observations.columns] = read.observations.values
        assert np.array_equal(dense, HOLED, equal_nan=True)
        assert read.row_labels is None
        assert read_matrix(path, dtype=np.float32).observations.values.dtype == np.float32

    @pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia"])
    def test_every_sparse_form(self, tmp_path: Path, form: str) -> None:
        matrix = sp.random_array((6, 8), density=0.4, rng=np.random.default_rng(0))
        sp.save_npz(tmp_path / "m.npz", matrix.asformat(form))
        assert np.array_equal(read_matrix(tmp_path / "m.npz").observations.matrix().toarray(), matrix.toarray())

    @pytest.mark.parametrize("form", ["coordinate", "array"])
    @pytest.mark.parametrize("symmetry", ["general", "symmetric", "skew-symmetric"])
    @pytest.mark.parametrize("field", ["real", "integer"])
    def test_matrix_market_as_scipy_writes_it(self, tmp_path: Path, form: str, symmetry: str, field: str) -> None:
        matrix = np.random.default_rng(0).integers(-9, 10, (5, 5)).astype(float)
        sign = {"general": 0, "symmetric": 1, "skew-symmetric": -1}[symmetry]
        matrix = np.triu(matrix, 1) + sign * np.triu(matrix, 1).T + (sign >= 0) * np.diag(np.arange(5.0))
        scipy.io.mmwrite(
            tmp_path / "m.mtx", sp.coo_array(matrix) if form == "coordinate" else matrix,
            field=field, symmetry=symmetry, comment="of\n% two lines",
        )  # fmt: skip
        observations = read_matrix(tmp_path / "m.mtx").observations
        assert np.array_equal(observations.matrix().toarray(), matrix)
        assert observations.count == (25 if form == "array" else (matrix != 0).sum())

    def test_matrix_market_that_ends_in_a_space(self, tmp_path: Path) -> None:
        """scipy.io.mmread (1.17) ends the process on it."""
        text = "%%MatrixMarket matrix coordinate real general\r\n% x\r\n2 2 2\r\n1 1 1.5\r\n2 2 -1e0 "
        assert read_matrix(written(tmp_path, "m.mtx", text)).observations.values.tolist() == [1.5, -1]

    def test_a_key_chooses_the_array(self, tmp_path: Path) -> None:
        path = tmp_path / "two.npz"
        np.savez(path, first=np.ones((2, 2)), second=HOLED)
        assert read_matrix(path, key="second").observations.shape == (2, 3)
        with pytest.raises(UserError, match=r"holds 2 arrays; .*: first, second"):
            read_matrix(path)
        with pytest.raises(UserError, match="no array 'third'; it has first, second"):
            read_matrix(path, key="third")

    @pytest.mark.parametrize(
        ("content", "rows", "columns", "values"),
        [
            ("1,,3\n,0,-2.5\n", None, None, [1, 3, 0, -2.5]),
            ("a,b,c\n1,,3\n,0,-2.5\n", None, ["a", "b", "c"], [1, 3, 0, -2.5]),
            (",a,b,c\nx,1,NA,3\ny,,0,-2.5\n", ["x", "y"], ["a", "b", "c"], [1, 3, 0, -2.5]),
            ("x;1;;3\ny;nan;0;-2.5\n", ["x", "y"], None, [1, 3, 0, -2.5]),
            (",a,b,c\n7,1,,3\n8,,0,-2.5\n", ["7", "8"], ["a", "b", "c"], [1, 3, 0, -2.5]),
            ("time,a,b,c\n08:00,1,,3\n08:05,,0,-2.5\n", ["08:00", "08:05"], ["a", "b", "c"], [1, 3, 0, -2.5]),
        ],
    )
    def test_text_with_and_without_names(
        self, tmp_path: Path, content: str, rows: Any, columns: Any, values: list[float]
    ) -> None:
        read = read_matrix(written(tmp_path, "wide.csv", content))
        assert (read.row_labels, read.column_labels) == (rows, columns)
        assert read.observations.shape == (2, 3)
        assert read.observations.values.tolist() == values

    def test_what_cannot_be_guessed_can_be_said(self, tmp_path: Path) -> None:
        path = written(tmp_path, "numbers.csv", "0,400001,400017\n5,1,2\n6,3,4\n")
        assert read_matrix(path).observations.shape == (3, 3)
        read = read_matrix(path, header=True, labels=True)
        assert (read.row_labels, read.column_labels) == (["5", "6"], ["400001", "400017"])
        assert read.observations.matrix().toarray().tolist() == [[1, 2], [3, 4]]

    def test_a_long_text_comes_in_chunks(self, tmp_path: Path) -> None:
        dense = np.random.default_rng(0).normal(size=(300, 4000)).round(2)
        path = tmp_path / "wide.csv"
        np.savetxt(path, dense, delimiter=",", fmt="%g")
        calls: list[tuple[int, int]] = []
        read = read_matrix(path, progress=lambda *done: calls.append(done))
        assert np.array_equal(read.observations.values.reshape(dense.shape), dense)
        assert len(calls) > 0

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.csv", "1,2\n3,x\n", r"line 2, column '2': expected a finite number, got 'x'"),
            ("a.csv", "a,b\n1,2\n3,-inf\n", r"line 3, column 'b'"),
            ("a.csv", "1,2\n3\n", r"line 2: expected 2 fields"),
            ("a.csv", ",\n,\n", "no entry is observed"),
            ("a.csv", "a b c\n1 2 3\n4 5 6\n", "delimiter="),
            ("a.npy", b"not an array", r"cannot be read as NumPy's \.npy"),
            ("a.npz", b"not an archive", r"cannot be read as NumPy's \.npz"),
            ("a.mtx", "1 2 3\n", "does not begin as a Matrix Market"),
            ("a.mtx", "%%MatrixMarket matrix coordinate pattern general\n2 2 1\n1 1\n", "is a pattern"),
            ("a.mtx", "%%MatrixMarket matrix coordinate complex general\n2 2 1\n1 1 1 1\n", "complex"),
            ("a.mtx", "%%MatrixMarket matrix coordinate real general\n2 2 2\n1 1 1\n", "cut short"),
            (
                "a.mtx",
                "%%MatrixMarket matrix coordinate real general\n2 2 1\n5 1 1\n",
                r"entry 1 lies at \(5, 1\), outside",
            ),
            ("a.mtx", "%%MatrixMarket matrix coordinate real general\n9999999999 2 1\n5 1 1\n", "shape must be"),
            ("a.mtx", "%%MatrixMarket matrix coordinate real general\n2 2 1\n1 x 1\n", "after 0 lines of numbers"),
            (
                "a.mtx",
                "%%MatrixMarket matrix coordinate real general\n2 2\n1 1 1\n",
                "expected the numbers of rows, columns, entries",
            ),
            ("a.mtx", "%%MatrixMarket matrix array real symmetric\n2 3\n1\n", "expected a square"),
            ("a.mtx", b"%%MatrixMarket matrix array real general\n2 1\n1\0\n1\n", "zero bytes"),
            ("a.parquet", "PAR1", "names of its row, column"),
            ("a.h5", "x", "cannot tell the format"),
            ("a.npy", "", "is empty"),
        ],
    )
    def test_errors(self, tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
        path = written(tmp_path, name, content)
        with pytest.raises(UserError, match=said) as raised:
            read_matrix(path)
        assert str(path) in str(raised.value)

    @pytest.mark.parametrize(
        ("array", "said"),
        [
            (np.array([[1, 1j]]), "complex"),
            (np.array([["a", "b"]]), "numeric"),
            (np.array([[1, np.inf]]), "finite"),
            (np.ones(3), "2 dimensions"),
            (np.ones((2, 2, 2)), "2 dimensions"),
            (np.full((2, 2), np.nan), "no entry"),
            (np.array([[{"a": 1}, None]], dtype=object), "cannot be read"),
        ],
    )
    def test_arrays_that_are_no_matrix(self, tmp_path: Path, array: Any, said: str) -> None:
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        with pytest.raises(UserError, match=said):
            read_matrix(tmp_path / "a.npy")

    def test_damaged_indices_are_not_followed(self, tmp_path: Path) -> None:
        matrix = sp.csr_array(np.eye(3))
        for name, bad in (("indices", [0, 10**6, 2]), ("indptr", [0, 1, 10**6, 3]), ("indptr", [0, -5, 2, 3])):
            parts = {"indices": matrix.indices, "indptr": matrix.indptr, "data": matrix.data} | {name: np.array(bad)}
            np.savez(tmp_path / "m.npz", format=b"csr", shape=matrix.shape, **parts)
            with pytest.raises(UserError):
                read_matrix(tmp_path / "m.npz")

    def test_a_key_needs_an_archive(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="leave the key out"):
            read_matrix(written(tmp_path, "a.csv", "1,2\n"), key="x")


class TestEntryCache:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_entries_come_back_bit_for_bit(self, tmp_path: Path, dtype: Any) -> None:
        rng = np.random.default_rng(0)
        rows, columns = rng.integers(0, 7, 40), rng.integers(0, 9, 40)  # row 7 and some others may stay empty
        seen = Observations.from_coordinates(rows, columns, rng.normal(size=40), (8, 9), dtype)
        assert seen.merged > 0
        save_entries(seen, tmp_path)
        again = load_entries(tmp_path)
        assert (again.shape, again.merged) == (seen.shape, seen.merged)
        for name in ("row_starts", "columns", "values", "column_starts", "rows", "order"):
            kept, came = getattr(seen, name), getattr(again, name)
            assert kept.dtype == came.dtype
            assert np.array_equal(kept, came)

    @pytest.mark.parametrize("rows", [["ann", "žluť 日本 🐈", ""], None])
    def test_labels_come_back(self, tmp_path: Path, rows: list[str] | None) -> None:
        labels = Labels(rows, ["x", "y"], "user", "item", (3, 2))
        save_labels(labels, tmp_path)
        assert load_labels(tmp_path) == labels
        assert labels.texts() == (rows or ["0", "1", "2"], ["x", "y"])

    def test_what_is_damaged_is_no_traceback(self, tmp_path: Path) -> None:
        for content in (b"", b"{", b"[]", b'{"shape": [3, 2], "rows": ["a"], "columns": null}', b"\xff"):
            written(tmp_path, "labels.json", content)
            written(tmp_path, "entries.safetensors", content)
            with pytest.raises(UserError, match=r"labels\.json is missing or damaged"):
                load_labels(tmp_path)
            with pytest.raises(UserError, match=r"entries\.safetensors is missing or damaged"):
                load_entries(tmp_path)

    @given(data=st.data())
    def test_any_damaged_byte(self, folder: Path, data: st.DataObject) -> None:
        save_entries(Observations.from_coordinates([0, 1, 1], [0, 0, 1], [1.0, 2.0, 3.0], (2, 2)), folder)
        content = bytearray((folder / "entries.safetensors").read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        written(folder, "entries.safetensors", bytes(content))
        try:
            seen = load_entries(folder)
        except UserError:
            return
        assert np.isfinite(seen.values).all()


def picture_file(path: Path, pixels: Any, **options: Any) -> Path:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


class TestPictures:
    def test_grey_and_colour_go_there_and_back(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for shape in ((5, 7), (5, 7, 3)):
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            picture = read_image(picture_file(tmp_path / "p.png", pixels))
            assert picture.matrix.shape == (5, 7 * picture.channels)
            assert picture.observed.all()
            assert np.array_equal(picture.pixels(), pixels)
            assert picture.observations().count == pixels.size
        assert np.array_equal(picture.matrix[:, 7:14], pixels[:, :, 1] / 255)  # green stands in the middle

    def test_a_fraction_is_drawn_by_the_seed(self, tmp_path: Path) -> None:
        path = picture_file(tmp_path / "p.png", np.zeros((10, 20, 3)))
        first, again, other = (read_image(path, mask=0.3, seed=seed).observed for seed in (1, 1, 2))
        assert first.sum() == 60
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
        seen = read_image(path, mask=0.3, seed=1).observations()
        assert seen.count == 180  # the three channels of a pixel are known together
        assert np.array_equal(seen.matrix(np.ones(180)).toarray() > 0, np.tile(first, (1, 3)))

    def test_a_mask_file(self, tmp_path: Path) -> None:
        mask = np.array([[0, 1, 255], [7, 0, 0]])
        path = picture_file(tmp_path / "p.png", np.ones((2, 3)))
        for name, content in (("grey.png", mask), ("rgb.png", np.stack([0 * mask, mask, 0 * mask], 2))):
            observed = read_image(path, mask=picture_file(tmp_path / name, content)).observed
            assert np.array_equal(observed, mask > 0)

    def test_transparent_pixels_are_holes_and_save_makes_them(self, tmp_path: Path) -> None:
        picture = read_image(picture_file(tmp_path / "p.png", np.arange(24).reshape(2, 4, 3)), mask=0.5)
        again = read_image(picture.save(tmp_path / "holes.png", holes=True))
        assert np.array_equal(again.observed, picture.observed)
        assert np.array_equal(again.matrix[again.mask], picture.matrix[picture.mask])
        filled = picture.save(tmp_path / "filled.png", np.clip(picture.matrix * 2 - 0.3, -1, 2))
        assert read_image(filled).observed.all()

    def test_sixteen_bits_palettes_and_turned_pictures(self, tmp_path: Path) -> None:
        deep = np.array([[0, 65535], [32768, 1]], np.uint16)
        Image.fromarray(deep).save(tmp_path / "deep.png")
        assert np.array_equal(read_image(tmp_path / "deep.png").matrix, deep / 65535)
        Image.fromarray(np.zeros((3, 4, 3), np.uint8)).convert("P").save(tmp_path / "palette.png")
        assert read_image(tmp_path / "palette.png").channels == 3
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        Image.fromarray(np.zeros((3, 4), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
        assert read_image(tmp_path / "turned.jpg").matrix.shape == (4, 3)

    def test_errors(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3))
        for name in ("p.png", "p.jpg"):
            path = picture_file(tmp_path / name, noise)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            with pytest.raises(UserError, match="cut short"):
                read_image(path)
        good = picture_file(tmp_path / "good.png", noise)
        with pytest.raises(UserError, match="no JPEG or PNG"):
            read_image(written(tmp_path, "text.png", "no picture"))
        with pytest.raises(UserError, match=r"ends in '\.gif'"):
            read_image(written(tmp_path, "a.gif", "GIF89a"))
        with pytest.raises(UserError, match="same size"):
            read_image(good, mask=picture_file(tmp_path / "small.png", noise[:5]))
        with pytest.raises(UserError, match="save it as PNG"):
            read_image(good, mask=picture_file(tmp_path / "mask.jpg", noise))
        with pytest.raises(UserError, match="no pixel"):
            read_image(good, mask=picture_file(tmp_path / "black.png", 0 * noise))
        for fraction in (0, -0.1, 1.5, float("nan")):
            with pytest.raises(UserError, match="above 0 and at most 1"):
                read_image(good, mask=fraction)
        with pytest.raises(UserError, match="mask must be"):
            read_image(good, mask=True)
        picture = read_image(good)
        with pytest.raises(UserError, match="expected a matrix of shape"):
            picture.pixels(np.zeros((2, 2)))
        with pytest.raises(UserError, match="NaN"):
            picture.pixels(picture.matrix * np.nan)
        with pytest.raises(UserError, match=r"ends in \.png"):
            picture.save(tmp_path / "out.jpg")

    def test_a_bomb_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = picture_file(tmp_path / "big.png", np.zeros((50, 50)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(UserError, match="more pixels"):
            read_image(path)


def _write_whole_files(folder: Path) -> Path:
    """One good file of every kind."""
    table = pa.table({"user": ["a", "b", "a"], "item": [1, 2, 2], "rating": [1.0, None, 3.0]})
    parquet.write_table(table, folder / "t.parquet")
    np.save(folder / "m.npy", HOLED)
    np.savez_compressed(folder / "m.npz", a=HOLED, b=HOLED)
    sp.save_npz(folder / "s.npz", sp.csr_array(np.eye(4)))
    scipy.io.mmwrite(folder / "m.mtx", sp.coo_array(np.eye(4)))
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3))
    for name in ("p.png", "p.jpg"):
        picture_file(folder / name, noise)
    written(folder, "t.csv", RATINGS * 3)
    written(folder, "t.csv.gz", gzip.compress(RATINGS.encode()))
    written(folder, "w.csv", "time,a,b\n08:00,1,\n08:05,,2\n")
    return folder


READERS: dict[str, Callable[[Path], Any]] = {
    "t.csv": _read_ratings,
    "t.csv.gz": _read_ratings,
    "t.parquet": _read_ratings,
    "w.csv": read_matrix,
    "m.npy": read_matrix,
    "m.npz": lambda path: read_matrix(path, key="a"),
    "s.npz": read_matrix,
    "m.mtx": read_matrix,
    "p.png": read_image,
    "p.jpg": read_image,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_whole_files(tmp_path_factory.mktemp("whole"))


def read_or_refused(read: Callable[[Path], Any], path: Path) -> None:
    """A result whose values are all finite, or the one error a user can act on."""
    try:
        result = read(path)
    except UserError as error:
        assert str(path) in str(error)
        assert "Traceback" not in str(error)
        return
    if isinstance(result, EntryTable):
        assert np.isfinite(result.values).all()
        assert len(result.rows) == len(result.columns) == len(result.values)
        assert result.rows.max() < result.shape[0]
        assert result.columns.max() < result.shape[1]
    elif isinstance(result, Picture):
        assert result.matrix.min() >= 0
        assert result.matrix.max() <= 1
    else:
        assert np.isfinite(result.observations.values).all()


@pytest.mark.parametrize("name", READERS)
class TestAnyBytes:
    @given(content=st.binary(min_size=1, max_size=200) | st.text(max_size=200).map(str.encode))
    @example(content=b"\x1f\x8b")
    @example(content=b"\xef\xbb\xbf")
    @example(content=b'"')
    @example(content=b'user,item,rating\n1,2,3\n\r\r\n"')
    def test_random(self, folder: Path, name: str, content: bytes) -> None:
        read_or_refused(READERS[name], written(folder, name, content))

    @given(data=st.data())
    def test_cut_short(self, folder: Path, whole: Path, name: str, data: st.DataObject) -> None:
        content = (whole / name).read_bytes()
        kept = data.draw(st.integers(0, len(content) - 1))
        read_or_refused(READERS[name], written(folder, name, content[:kept]))

    @given(data=st.data())
    def test_damaged(self, folder: Path, whole: Path, name: str, data: st.DataObject) -> None:
        content = bytearray((whole / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        read_or_refused(READERS[name], written(folder, name, bytes(content)))


@given(
    content=st.lists(
        st.lists(st.sampled_from(["", "1", "-2.5e3", "x", '"', '"a,b"', "nan", "inf", " ", "é", "\r"]), max_size=4),
        max_size=6,
    ),
    delimiter=st.sampled_from([",", "\t", ";"]),
)
def test_text_that_looks_like_a_table(folder: Path, content: list[list[str]], delimiter: str) -> None:
    text = "\n".join(delimiter.join(fields) for fields in content)
    path = written(folder, "looks.csv", text)
    read_or_refused(read_matrix, path)
    read_or_refused(lambda path: read_table(path, row="1", column="2", value="3", header=False), path)
