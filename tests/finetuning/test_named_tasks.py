"""Tasks by name: what lies in the official files is what comes out, and every mistake is explained."""

import gzip
import hashlib
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import UserError
from rankwise.finetuning import TASKS, make_task, read_table
from rankwise.finetuning.named_tasks import TASK_NAMES, NamedTask, load_named_task
from tests.finetuning.tiny_checkpoint import write_csv

TREE = "( ( a ) )"

# name → (first file, second file) → lines as the release writes them, and the rows they hold
LAYOUTS: dict[str, tuple[dict[str, str], list[tuple[int, str, str | None, Any]]]] = {
    "cola": (
        {
            "train.tsv": 'gj04\t1\t\tHe said "hi.\ngj04\t0\t*\t The  MAN ran.\n',
            "dev.tsv": "gj04\t1\t\tNo last newline.",
        },
        [(0, 'He said "hi.', None, 1), (1, " The  MAN ran.", None, 0)],
    ),
    "sst2": (
        {"train.tsv": "sentence\tlabel\nhide new secretions \t0\n'tis fun\t1\n", "dev.tsv": "sentence\tlabel\nok\t1\n"},
        [(0, "hide new secretions ", None, 0), (1, "'tis fun", None, 1)],
    ),
    "mrpc": (
        {
            "train.tsv": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t"A b.\tA "c".\r\n0\t7\t9\tx\ty\r\n',
            "dev.tsv": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\ta\tb\n",
        },
        [(0, '"A b.', 'A "c".', 1), (1, "x", "y", 0)],
    ),
    "stsb": (
        {
            "sts-train.csv": "news\tMSRvid\t2012\t1\t5.000\tA, b.\tA \u2028 b.\nnews\tx\t2013\t2\t0.25\tc\td\tsrc1\tsrc2\n",
            "sts-dev.csv": "news\tMSRvid\t2012\t1\t3\te\tf\n",
        },
        [(0, "A, b.", "A \u2028 b.", 5.0), (1, "c", "d", 0.25)],
    ),
    "qqp": (
        {
            "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow?\t0\n4\t5\t6\tA?\tB?\t1\n",
            "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow?\t0\n",
        },
        [(0, "Why?", "How?", 0), (1, "A?", "B?", 1)],
    ),
    "mnli": (
        {
            "train.tsv": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
            f"\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n0\t1\t1e\tx\t{TREE}\t{TREE}\t{TREE}\t{TREE}"
            f"\tIt rains.\tIt is wet.\tneutral\tentailment\n1\t1\t1n\tx\t{TREE}\t{TREE}\t{TREE}\t{TREE}\tp\th\tneutral\tneutral\n",
            "dev_matched.tsv": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
            "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
            "0\t1\t1e\tx\ta\tb\tc\td\tA\tB\tneutral\tneutral\tneutral\tneutral\tneutral\tcontradiction\n",
        },
        [(0, "It rains.", "It is wet.", "entailment"), (1, "p", "h", "neutral")],
    ),
    "qnli": (
        {
            "train.tsv": "index\tquestion\tsentence\tlabel\n0\tWho?\tBob.\tentailment\n1\tWhen?\tBob.\tnot_entailment\n",
            "dev.tsv": "index\tquestion\tsentence\tlabel\n0\tWho?\tBob.\tentailment\n",
        },
        [(0, "Who?", "Bob.", "entailment"), (1, "When?", "Bob.", "not_entailment")],
    ),
    "rte": (
        {
            "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n1\tC.\tD.\tentailment\n",
            "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n",
        },
        [(0, "A.", "B.", "not_entailment"), (1, "C.", "D.", "entailment")],
    ),
}
GLUE = tuple(LAYOUTS)
METRICS = {
    "cola": "matthews",
    "sst2": "accuracy",
    "mrpc": "accuracy_f1",
    "stsb": "spearman",
    "qqp": "accuracy_f1",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
    "e2e-price": "accuracy",
    "e2e-nlg": "bleu",
}
E2E_ROWS = [
    ("name[Vaults], priceRange[less than £20]", "The Vaults, cheap."),
    ("name[Giraffe], food[Thai]", 'Giraffe,\r\n a "Thai" place.'),
    ("name[Vaults], priceRange[less than £20]", "Cheap: the Vaults."),
    ("name[Wok], priceRange[high], area[a, b]", "Wok is dear."),
]


def write_glue(root: Path, name: str, **changed: str) -> Path:
    folder = root / f"glue_{name}"
    folder.mkdir()
    for file, text in {
        **LAYOUTS[name][0],
        **{key.replace("_tsv", ".tsv"): text for key, text in changed.items()},
    }.items():
        (folder / file).write_bytes(text.encode())
    return root


def files_of(root: Path, name: str) -> list[Path]:
    return [root / f"glue_{name}" / file for file in LAYOUTS[name][0]]


def write_e2e(root: Path, train: list[tuple[str, str]] = E2E_ROWS, dev: list[tuple[str, str]] = E2E_ROWS) -> Path:
    (root / "e2e_nlg").mkdir()
    for name, rows in (("trainset", train), ("devset", dev)):
        plain = write_csv(root / f"{name}.csv", ["mr", "ref"], rows)
        (root / "e2e_nlg" / f"{name}.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return root


def written(table: Any) -> list[tuple[int, str, str | None, Any]]:
    return [(row["row"], row["text"], row["text_pair"], row["label"]) for row in table.rows]


# --- names


def test_there_are_ten_names_each_with_its_headline_metric() -> None:
    assert set(TASK_NAMES) == set(METRICS)
    assert set(GLUE) | {"e2e-price", "e2e-nlg"} == set(TASK_NAMES)


@pytest.mark.parametrize("name", ["sts-b", "RTE", "", "no such thing", "x" * 5000, "e2e"])
def test_an_unknown_name_lists_the_known_and_says_that_files_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_named_task(name, tmp_path)
    assert all(known in str(error.value) for known in TASK_NAMES)
    assert "path" in str(error.value)
    assert "hub:NAME" in str(error.value)


def test_a_users_file_is_read_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path / "not there"))  # and needs no data folder
    path = str(write_csv(tmp_path / "mine.csv", ["text", "label"], [("good", "yes"), ("bad", "no")]))
    task = load_named_task(path)
    assert task == NamedTask(path, task.title, "auto", "", read_table(path), None)
    assert path in task.title


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.csv", r"data file missing\.csv does not exist"),
        ("a folder", "is a folder without images"),
        ("hub:", "needs a name"),
    ],
)
def test_a_users_table_that_cannot_be_read(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a folder").mkdir()
    with pytest.raises(UserError, match=message):
        load_named_task(name)


def test_a_task_name_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_glue(tmp_path, "rte"))
    (tmp_path / "rte").write_text("not a table", encoding="utf-8")
    assert load_named_task("rte", tmp_path).name == "rte"


# --- GLUE files


@pytest.mark.parametrize("name", GLUE)
def test_rows_come_as_the_release_writes_them(tmp_path: Path, name: str) -> None:
    task = load_named_task(name, write_glue(tmp_path, name))
    assert (task.name, task.metric) == (name, METRICS[name])
    assert written(task.train) == LAYOUTS[name][1]
    assert [type(row["label"]) for row in task.train.rows] == [type(row[3]) for row in LAYOUTS[name][1]]
    assert task.evaluation is not None
    assert len(task.evaluation.rows) == 1
    for table, path in zip((task.train, task.evaluation), files_of(tmp_path, name), strict=True):
        assert table.source == str(path)
        assert table.revision == hashlib.sha256(path.read_bytes()).hexdigest()
        assert table.dropped == 0
        assert (table.columns.text_pair is not None) == (name not in ("cola", "sst2"))


def test_data_is_searched_in_the_argument_and_then_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one := tmp_path / "one").mkdir()
    (two := tmp_path / "two").mkdir()
    write_glue(one, "rte")
    write_glue(two, "rte")
    monkeypatch.setenv("RANKWISE_DATA", str(one))
    assert load_named_task("rte").train.source.startswith(str(one))
    assert load_named_task("rte", two).train.source.startswith(str(two))


@pytest.mark.parametrize("name", ["rte", "e2e-nlg"])
def test_a_data_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(UserError, match=r"data folder .*gone is no folder"):
        load_named_task(name, tmp_path / "gone")
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="that RANKWISE_DATA names is no folder"):
        load_named_task(name)


def test_empty_texts_and_labels_are_dropped_and_counted(tmp_path: Path) -> None:
    lines = "sentence\tlabel\n \t1\ngood\t1\nbad\t\n\t0\n"
    train = load_named_task("sst2", write_glue(tmp_path, "sst2", train_tsv=lines)).train
    assert written(train) == [(1, "good", None, 1)]
    assert train.dropped == 3


@pytest.mark.parametrize("name", GLUE)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    root = write_glue(tmp_path, name)
    last = files_of(root, name)[1]
    last.unlink()
    with pytest.raises(UserError, match=rf"{re.escape(str(last))} does not exist"):
        load_named_task(name, root)


@pytest.mark.parametrize("name", [name for name in GLUE if name != "qqp"])
def test_a_file_cut_short_within_a_row_is_named(tmp_path: Path, name: str) -> None:
    root = write_glue(tmp_path, name)
    path = files_of(root, name)[0]
    content = path.read_bytes()
    path.write_bytes(content[: content.rstrip().rindex(b"\n") + 3])
    with pytest.raises(UserError, match=rf"of {re.escape(str(path))} has [12] columns, expected \d+; is the file cut"):
        load_named_task(name, root)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\textra\tentailment\n", r"line 2 of .* has 5 columns, expected 4"),
        ("cola", "a\t1\t\tb\n\na\t1\t\tb\n", r"line 2 of .* has 1 columns, expected 4"),
        ("stsb", "\t".join(["a"] * 10) + "\n", r"line 1 of .* has 10 columns, expected 7"),
        ("rte", "index\tpremise\thypothesis\tlabel\n0\ta\tb\tentailment\n", "header of .* lacks sentence1, sentence2"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "row 0 of .* label 'maybe'.*one of entailment, not_"),
        ("cola", "sentence\tlabel\tx\ty\n", "row 0 of .* label 'label', expected one of 0, 1"),
        ("cola", "a\t2\t\tb\n", "label '2'"),
        ("stsb", "a\tb\tc\td\t5.5\te\tf\n", r"label '5\.5', expected a score from 0 to 5"),
        ("stsb", "a\tb\tc\td\tnan\te\tf\n", "label 'nan'"),
        ("stsb", "a\tb\tc\td\thigh\te\tf\n", "label 'high'"),
        ("sst2", "sentence\tlabel\n", "no labelled row"),
        ("sst2", "", "no labelled row"),
        ("cola", "", "no labelled row"),
        ("sst2", "sentence\tlabel\n \t1\n", r"no labelled row \(1 incomplete\)"),
    ],
)  # fmt: skip
def test_a_file_in_another_format_is_named(tmp_path: Path, name: str, lines: str, message: str) -> None:
    root = write_glue(tmp_path, name)
    files_of(root, name)[0].write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        load_named_task(name, root)
    assert str(root) in str(error.value)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    root = write_glue(tmp_path, "sst2")
    (root / "glue_sst2" / "dev.tsv").write_bytes("sentence\tlabel\ncafé\t1\n".encode("latin1"))
    with pytest.raises(UserError, match=r"dev\.tsv is not UTF-8 \(byte 18"):
        load_named_task("sst2", root)


def test_the_few_broken_rows_of_qqp_are_dropped_and_many_are_an_error(tmp_path: Path) -> None:
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = [f"{i}\t1\t2\tWhy {i}?\tHow?\t{i % 2}" for i in range(1500)]
    root = write_glue(
        tmp_path, "qqp", train_tsv="\n".join([header, *rows[:10], "11\t1\t2\tWhy", "now?\tHow?\t1", *rows[10:]])
    )
    train = load_named_task("qqp", root).train
    assert train.dropped == 2
    assert [row["row"] for row in train.rows] == [*range(10), *range(12, 1502)]
    (root / "glue_qqp" / "train.tsv").write_text("\n".join([header, *rows, *["a\tb"] * 3]), encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.tsv has 2 columns, expected 6"):
        load_named_task("qqp", root)


# --- GLUE from the hub


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize("root", [True, False])
def test_offline_the_error_says_where_it_looked_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, root: bool
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.delenv("RANKWISE_DATA", raising=False)
    with pytest.raises(UserError) as error:
        load_named_task(name, tmp_path if root else None)
    message = str(error.value)
    assert (str(tmp_path / f"glue_{name}") if root else "RANKWISE_DATA names no data folder") in message
    assert "nyu-mll/glue on the hub gave" in message
    assert all(file in message for file in LAYOUTS[name][0])
    assert "\n" not in message


def test_without_datasets_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'rankwise\[hub\]'"):
        load_named_task("sst2", tmp_path)


HUB_CLASSES = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
}
HUB_TEXTS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
}


@pytest.mark.parametrize("name", GLUE)
def test_the_hub_gives_the_labels_of_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """The hub's names are not the files': sorted, ``not_equivalent`` would become the positive class of F1."""
    datasets = pytest.importorskip("datasets")
    texts = HUB_TEXTS.get(name, ["sentence1", "sentence2"])
    classes = HUB_CLASSES.get(name)
    label = datasets.ClassLabel(names=classes) if classes else datasets.Value("float32")
    features = datasets.Features({**{text: datasets.Value("string") for text in texts}, "label": label})
    labels = [0, 1, -1] if classes else [4.6, 0.0, -1.0]
    content = {**{text: [f"{text} {i} " for i in range(3)] for text in texts}, "label": labels}
    asked = []

    def load(repository: str, config: str, *, split: str) -> Any:
        asked.append((repository, config, split))
        return datasets.Dataset.from_dict(content, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = load_named_task(name, tmp_path)
    validation = "validation_matched" if name == "mnli" else "validation"
    assert asked == [("nyu-mll/glue", name, "train"), ("nyu-mll/glue", name, validation)]
    if classes is None:
        expected: list[Any] = [4.6, 0.0]
    else:
        expected = classes[:2] if name in ("mnli", "qnli", "rte") else [0, 1]
    pairs = [f"{texts[-1]} {i} " if len(texts) == 2 else None for i in range(2)]
    assert written(task.train) == [(i, f"{texts[0]} {i} ", pairs[i], expected[i]) for i in range(2)]
    assert task.train.dropped == 1
    assert task.train.source == f"hub:nyu-mll/glue:{name}:train"
    assert len(task.train.revision) == 64
    content[texts[0]][0] = "changed"
    assert load_named_task(name, tmp_path).train.revision != task.train.revision


# --- E2E


def test_price_ranges_come_out_of_the_meaning_representation(tmp_path: Path) -> None:
    task = load_named_task("e2e-price", write_e2e(tmp_path, dev=E2E_ROWS[2:]))
    assert written(task.train) == [
        (0, "The Vaults, cheap.", None, "less than £20"),
        (2, "Cheap: the Vaults.", None, "less than £20"),
        (3, "Wok is dear.", None, "high"),
    ]
    assert task.train.dropped == 1
    assert task.evaluation is not None
    assert [row["row"] for row in task.evaluation.rows] == [0, 1]
    assert (task.kind, task.metric) == ("classification", "accuracy")
    path = tmp_path / "e2e_nlg" / "trainset.csv.gz"
    assert task.train.revision == hashlib.sha256(path.read_bytes()).hexdigest()


def test_generation_knows_all_references_of_an_evaluation_row(tmp_path: Path) -> None:
    task = load_named_task("e2e-nlg", write_e2e(tmp_path))
    assert written(task.train) == [(i, mr, None, ref) for i, (mr, ref) in enumerate(E2E_ROWS)]
    assert task.evaluation is not None
    assert written(task.evaluation) == [
        (0, E2E_ROWS[0][0], None, ["The Vaults, cheap.", "Cheap: the Vaults."]),
        (1, E2E_ROWS[1][0], None, [E2E_ROWS[1][1]]),
        (3, E2E_ROWS[3][0], None, ["Wok is dear."]),
    ]
    assert (task.kind, task.metric) == ("generation", "bleu")
    assert make_task(task.kind, task.evaluation, None, source="", max_length=8).describe()["references"] == 4


def test_a_reference_without_text_is_dropped(tmp_path: Path) -> None:
    evaluation = load_named_task(
        "e2e-nlg", write_e2e(tmp_path, dev=[("a[b]", " "), ("a[b]", "B."), ("", "x")])
    ).evaluation
    assert evaluation is not None
    assert written(evaluation) == [(1, "a[b]", None, ["B."])]
    assert evaluation.dropped == 2


@pytest.mark.parametrize("name", ["e2e-price", "e2e-nlg"])
@pytest.mark.parametrize("cut", [1, 10, 40, -1, -8, -9])
def test_a_gzip_cut_short_is_named(tmp_path: Path, name: str, cut: int) -> None:
    path = write_e2e(tmp_path) / "e2e_nlg" / "devset.csv.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} is cut short or damaged"):
        load_named_task(name, tmp_path)


@pytest.mark.parametrize("name", ["e2e-price", "e2e-nlg"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"mr,ref\nno gzip,x\n", "cut short or damaged"),
        (gzip.compress(b"mr,ref\nx,y\n", mtime=0)[:10] + b"\xff" * 20, "cut short or damaged"),
        (b"", "no labelled row"),
        (gzip.compress(b"mr,ref\n", mtime=0), "no labelled row"),
        (gzip.compress(b'mr,ref\nx,"unfinished', mtime=0), "cannot read .* as CSV"),
        (gzip.compress(b"mr,ref\nx\n", mtime=0), r"row 0 of .* has 1 columns, expected 2 \(mr, ref\)"),
        (gzip.compress(b"mr,ref\nx,y,z\n", mtime=0), "row 0 of .* has 3 columns"),
        (gzip.compress(b"text,label\nx,y\n", mtime=0), "must be mr,ref; it is text,label"),
        (gzip.compress("mr,ref\nx,é\n".encode("latin1"), mtime=0), "is not UTF-8"),
    ],
)
def test_an_e2e_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write_e2e(tmp_path) / "e2e_nlg" / "trainset.csv.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_named_task(name, tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["e2e-price", "e2e-nlg"])
def test_e2e_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(UserError, match=r"trainset\.csv\.gz does not exist"):
        load_named_task(name, tmp_path)
    monkeypatch.delenv("RANKWISE_DATA", raising=False)
    with pytest.raises(UserError, match=r"set RANKWISE_DATA to one that holds e2e_nlg/trainset\.csv\.gz"):
        load_named_task(name)


# --- the real files: counts and checksums of their READMEs


def readme_checksums(folder: Path) -> dict[str, str]:
    lines = (folder / "README.txt").read_text(encoding="utf-8")
    return {name: sha256 for sha256, name in re.findall(r"^([0-9a-f]{64}) +\d+ +(\S+)$", lines, flags=re.MULTILINE)}


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "evaluation", "train_labels", "evaluation_labels"),
    [
        ("cola", 8551, 1043, {1: 6023}, {1: 721}),
        ("mrpc", 3668, 408, {1: 2474}, {1: 279}),
        ("rte", 2490, 277, {"entailment": 1249, "not_entailment": 1241}, {"entailment": 146, "not_entailment": 131}),
        ("stsb", 5749, 1500, {}, {}),
    ],
)
def test_official_rows_of_glue(
    data_root: Path, name: str, train: int, evaluation: int, train_labels: Any, evaluation_labels: Any
) -> None:
    task = load_named_task(name, data_root)
    assert task.evaluation is not None
    checksums = readme_checksums(data_root / f"glue_{name}")
    for table, count, labels in ((task.train, train, train_labels), (task.evaluation, evaluation, evaluation_labels)):
        assert len(table.rows) + table.dropped == count
        assert table.dropped == 0
        assert [row["row"] for row in table.rows] == list(range(count))
        found = Counter(row["label"] for row in table.rows)
        assert {label: found[label] for label in labels} == labels
        assert table.revision == checksums[Path(table.source).name]
    if name == "rte":
        assert task.train.rows[0]["text"] == "No Weapons of Mass Destruction Found in Iraq Yet."
    if name == "stsb":
        assert (task.train.rows[0]["text_pair"], task.train.rows[1]["label"]) == ("An air plane is taking off.", 3.8)


@pytest.mark.data
@pytest.mark.parametrize(("name", "kind"), [("cola", "classification"), ("stsb", "pair-similarity")])
def test_headline_metrics_are_keys_of_the_tasks_score(data_root: Path, tiny: Any, name: str, kind: str) -> None:
    named = load_named_task(name, data_root)
    task = make_task(named.kind, named.train, None, source=tiny.model, max_length=8)
    assert task.name == kind
    assert named.metric in task.score(task.targets[:50], task.targets[:50])


def test_headline_metrics_of_the_two_class_tasks(tmp_path: Path) -> None:
    for name in ("mrpc", "qqp", "sst2", "rte", "qnli"):
        named = load_named_task(name, write_glue(tmp_path, name))
        task = TASKS[named.kind](named.train, None, 8)
        assert task.score(task.targets, task.targets)[named.metric] == 1.0


@pytest.mark.data
def test_official_rows_of_e2e(data_root: Path) -> None:
    price, generation = load_named_task("e2e-price", data_root), load_named_task("e2e-nlg", data_root)
    assert price.evaluation is not None
    assert generation.evaluation is not None
    assert len(generation.train.rows) == 42061
    assert len({row["text"] for row in generation.train.rows}) == 4862
    assert len(generation.evaluation.rows) == 547
    assert sum(len(row["label"]) for row in generation.evaluation.rows) == 4672
    assert len(price.train.rows) + price.train.dropped == 42061
    assert len(price.evaluation.rows) + price.evaluation.dropped == 4672
    classes = {"cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"}
    for table in (price.train, price.evaluation):
        assert {row["label"] for row in table.rows} == classes
    # counted with grep -c in the uncompressed files
    assert (len(price.train.rows), len(price.evaluation.rows)) == (29127, 2419)
    checksums = readme_checksums(data_root / "e2e_nlg")
    for named in (price, generation):
        assert named.train.revision == checksums["trainset.csv.gz"]
        assert named.evaluation is not None
        assert named.evaluation.revision == checksums["devset.csv.gz"]


@pytest.mark.data
def test_a_real_file_cut_short(data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "e2e_nlg").mkdir()
    for file in ("trainset.csv.gz", "devset.csv.gz"):
        whole = (data_root / "e2e_nlg" / file).read_bytes()
        (tmp_path / "e2e_nlg" / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short or damaged"):
        load_named_task("e2e-nlg", tmp_path)


def test_damaged_bytes_in_the_middle_of_a_gzip_are_noticed(tmp_path: Path) -> None:
    path = write_e2e(tmp_path) / "e2e_nlg" / "devset.csv.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # in the checksum
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="cut short or damaged"):
        load_named_task("e2e-nlg", tmp_path)
