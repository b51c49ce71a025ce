"""Labelled rows, whatever they are of."""

from dataclasses import dataclass
from typing import Any

TEXTS, WORDS, IMAGES = "texts", "words", "images"


@dataclass(frozen=True)
class Columns:
    """Which column is the text, its pair (if any) and the label."""

    text: str
    text_pair: str | None
    label: str


@dataclass(frozen=True)
class Table:
    """Labelled rows, still as they were written.

    Attributes:
        rows: one dict per row with ``text``, ``text_pair`` (None without one), ``label`` (as read) and ``row``, the
            row's number in the file (0 for the first after the header). Rows of words hold ``words`` besides, a tuple of
            texts with as many tags in ``label``; rows of images ``file``, the image's path.
        columns: the file's names for them.
        source: what was read.
        revision: sha256 of the file (and of the images it names), or the hub's commit.
        dropped: rows left out because a text or the label was empty, or files that are no images.
        kind: ``texts``, ``words`` or ``images``.
        evaluation: where the rows to evaluate on are, if the source sets them apart itself.
    """

    rows: list[dict[str, Any]]
    columns: Columns
    source: str
    revision: str
    dropped: int
    kind: str = TEXTS
    evaluation: str | None = None
