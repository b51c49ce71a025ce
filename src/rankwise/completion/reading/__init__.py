"""From a user's file to observed entries: tables of triples, whole matrices, pictures."""

from rankwise.completion.reading.entry_cache import (
    Labels,
    load_entries,
    load_labels,
    save_entries,
    save_labels,
)
from rankwise.completion.reading.entry_table import EntryTable, read_table
from rankwise.completion.reading.matrix import LabelledMatrix, read_matrix
from rankwise.completion.reading.picture import Picture, read_image

__all__ = [
    "EntryTable",
    "LabelledMatrix",
    "Labels",
    "Picture",
    "load_entries",
    "load_labels",
    "read_image",
    "read_matrix",
    "read_table",
    "save_entries",
    "save_labels",
]
