"""Two texts as bytes, each in three parts."""

import gzip
import os
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.errors import UserError

CORPORA = ("wikitext2", "tinyshakespeare")


class Corpus(NamedTuple):
    """Bytes as numbers, each part in reading order: what is trained on, what rates are chosen by, what is reported."""

    train: Tensor
    tuning: Tensor
    held_out: Tensor


@cache
def corpus(name: str) -> Corpus:
    """WikiText-2 in its three parts; of tinyshakespeare the last twentieth is held out and the one before is for tuning."""
    if not os.environ.get("RANKWISE_DATA"):
        raise UserError("set RANKWISE_DATA to the folder that holds wikitext2 and tinyshakespeare")
    parts = _parts(Path(os.environ["RANKWISE_DATA"]) / name)
    return Corpus(*(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts))


def _parts(folder: Path) -> list[bytes]:
    if folder.name == "wikitext2":
        return [_read(folder / f"wiki.{part}.tokens.gz") for part in ("train", "valid", "test")]
    text = _read(folder / "input.txt.gz")
    ends = [0, round(0.9 * len(text)), round(0.95 * len(text)), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


def _read(path: Path) -> bytes:
    with gzip.open(path) as file:
        return file.read()


def random_rows(text: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """(rows, length) pieces that begin anywhere."""
    starts = torch.randint(len(text) - length + 1, (rows,), generator=generator)
    return text[starts[:, None] + torch.arange(length)]


def spread_rows(text: Tensor, rows: int, length: int) -> Tensor:
    """(rows, length) pieces that do not overlap, evenly over the text."""
    starts = torch.linspace(0, len(text) - length, rows).long()
    return text[starts[:, None] + torch.arange(length)]
