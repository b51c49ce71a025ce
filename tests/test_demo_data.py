"""The rows that the repository ships are those it may ship, unchanged."""

import csv
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parent.parent / "demo" / "data" / "sts_captions.csv"
REDISTRIBUTABLE = {"images", "track5.en-en"}


def rows() -> list[dict[str, str]]:
    with SAMPLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_only_redistributable_rows_with_attribution() -> None:
    assert 0 < len(rows()) <= 600
    assert {row["file"] for row in rows()} <= REDISTRIBUTABLE
    assert "CC BY-SA" in (SAMPLE.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.data
def test_rows_are_those_of_the_benchmark(data_root: Path) -> None:
    original = {}
    for split in ("train", "dev", "test"):
        text = (data_root / "glue_stsb" / f"sts-{split}.csv").read_text(encoding="utf-8")
        for line in text.split("\n"):
            fields = line.split("\t")
            if len(fields) >= 7 and fields[1] in REDISTRIBUTABLE:
                original[split, fields[1], fields[2], fields[3]] = fields[4], fields[5].strip(), fields[6].strip()
    for row in rows():
        key = row["split"], row["file"], row["year"], row["index"]
        assert original[key] == (row["score"], row["sentence1"], row["sentence2"])
