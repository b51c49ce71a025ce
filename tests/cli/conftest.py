"""Tiny checkpoints and tables, made once a session and only read by the tests."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.finetuning.tiny_checkpoint import save_tiny_checkpoint, write_classes, write_pairs, write_ratings


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """``model`` (an embedding folder) and the files ``pairs``, ``classes`` and ``ratings``, all as str."""
    root: Path = tmp_path_factory.mktemp("tiny")
    return SimpleNamespace(
        model=str(save_tiny_checkpoint(root / "embedding")),
        pairs=str(write_pairs(root / "pairs.csv")),
        classes=str(write_classes(root / "classes.csv")),
        ratings=str(write_ratings(root / "ratings.csv")),
    )


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and waiting for them on a busy machine takes seconds a run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
