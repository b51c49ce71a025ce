"""Which task a table and a model are for."""

from pathlib import Path
from typing import Any

from rankwise.errors import UserError
from rankwise.finetuning.data import Table
from rankwise.finetuning.tasks import Classification, PairSimilarity, Regression, Task, plain
from rankwise.finetuning.text_tasks import CausalLanguageModel, Generation

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (PairSimilarity, Classification, Regression, Generation, CausalLanguageModel)
}


def make_task(name: str, table: Table, tokenizer: Any, *, source: str, max_length: int) -> Task:
    """The task called ``name``, or for ``auto`` the one the columns and the model suggest.

    Two texts with many-valued numbers on an embedding model are pair similarity; other many-valued numbers are
    regression; everything else is classification. Generating text has to be asked for.
    """
    if name == "auto":
        name = _guess(table, source)
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; expected auto, {', '.join(TASKS)}")
    return TASKS[name](table, tokenizer, max_length)


def _guess(table: Table, source: str) -> str:
    labels = [plain(row["label"]) for row in table.rows]
    numeric = all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels)
    fractional = numeric and any(float(label) != int(label) for label in labels)
    if not numeric or not (fractional or len(set(labels)) > 20):
        return Classification.name
    if table.columns.text_pair is not None and _is_embedding_model(source):
        return PairSimilarity.name
    return Regression.name


def _is_embedding_model(source: str) -> bool:
    """Sentence-transformers folders carry modules.json; bare encoders name no head in their architecture."""
    folder = Path(source)
    if (folder / "modules.json").is_file():
        return True
    from transformers import AutoConfig

    architectures = AutoConfig.from_pretrained(source).architectures or []
    return all("For" not in name and "LMHead" not in name for name in architectures)
