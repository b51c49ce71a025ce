"""Every example in docstrings and documentation runs; every number in the README comes from a committed JSON."""

import doctest
import importlib
import json
import pkgutil
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import rankwise

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
_NOT_IMPORTED = {"rankwise.__main__"}


def _modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(rankwise.__path__, "rankwise.")]
    return [name for name in names if name not in _NOT_IMPORTED]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_public_names_carry_an_example() -> None:
    missing = []
    for room in (
        "spectral",
        "factorizations",
        "regularization",
        "optimizers",
        "completion",
        "adapters",
        "diagnostics",
        "finetuning",
    ):
        module = importlib.import_module(f"rankwise.{room}")
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and not isinstance(value, type) and ">>>" not in (value.__doc__ or ""):
                missing.append(f"{room}.{name}")
    # no example: protocols of a whole run or of internals that the docs show in full
    assert set(missing) <= {
        "factorizations.compressed_frames",
        "factorizations.identity_factors",
        "adapters.export_adapter_folder",
        "adapters.save_subspaces",
        "diagnostics.write_report",
        "finetuning.finetune",
        "finetuning.resume",
        "finetuning.make_task",
    }


def _python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def _tiny_setting() -> dict[str, Any]:
    """Names that the documentation's snippets take for granted: a model, data and batches of the reader's own."""
    from datasets import Dataset
    from torch.utils.data import DataLoader

    from tests.finetuning.tiny_checkpoint import sentences, word_tokenizer
    from tests.tiny_models import tiny_bert, tiny_llama, token_batch

    rows = token_batch(rows=16)
    train_dataset = Dataset.from_dict({key: value.tolist() for key, value in rows.items()}).with_format("torch")
    return {
        "model": tiny_bert(),
        "train_dataset": train_dataset,
        "batches": DataLoader(train_dataset, batch_size=8),
        "causal_lm": tiny_llama(eos_token_id=0, pad_token_id=2, bos_token_id=None),
        "tokenizer": word_tokenizer(["<end>", "<unk>", "<pad>"], eos_token="<end>", pad_token="<pad>"),
        "texts": sentences(16),
    }


def _pages() -> list[Any]:
    """Every page; the one that imports other trainers takes seconds."""
    slow = {"interoperability.md"}
    return [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in slow else [])
        for page in sorted((ROOT / "docs").glob("*.md"))
    ]


def test_readme_trainer_example_is_at_most_fifteen_lines_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in _python_blocks(README) if "Trainer(" in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    names = _tiny_setting()
    exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", _pages())
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_examples_on_documentation_pages_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "docs" / "data", tmp_path / "docs" / "data")  # named from the root of a checkout
    names = _tiny_setting()
    for block in _python_blocks(page):
        exec(compile(block, page.name, "exec"), names)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [README, *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("README.md", 10),
        ("docs/few-labels.md", 10),
        ("docs/completion.md", 10),
        ("docs/theory.md", 1),
        ("docs/compression.md", 10),
        ("docs/galore.md", 10),
        ("docs/lora-rite.md", 10),
        ("docs/lora-plus.md", 8),
    ],
)
def test_numbers_are_those_of_the_committed_results(page: str, least: int) -> None:
    """Figures stand as <!--file:path.to.value:format-->text<!---->; file is a study's or in benchmarks/results/."""
    text = (ROOT / page).read_text(encoding="utf-8")
    figures = re.findall(r"<!--([\w/-]+):([^>]+):([^:>]*)-->(.*?)<!---->", text)
    assert len(figures) >= least
    for file, keys, spec, shown in figures:
        folder = ROOT if "/" in file else ROOT / "benchmarks" / "results"
        value: Any = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
        for key in re.split(r"(?<!\d)\.|\.(?=[a-z])", keys):  # not at the point of a number
            value = _step_into(value, key)
        assert shown == format(value, spec), f"{page}: {file}.{keys} is {format(value, spec)}, the page says {shown}"


def _step_into(value: Any, key: str) -> Any:
    """value[key]; of a list the entry at a position, or the one whose fields are those of ``field=value&field=value``."""
    if not isinstance(value, list):
        return value[key]
    if "=" not in key:
        return value[int(key)]
    wanted = dict(part.split("=", 1) for part in key.split("&"))
    (found,) = [entry for entry in value if all(str(entry[field]) == text for field, text in wanted.items())]
    return found


def test_version_is_the_same_everywhere() -> None:
    assert rankwise.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
