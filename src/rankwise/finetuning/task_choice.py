"""Which task a table and a model are for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import UserError
from rankwise.finetuning.class_weights import ClassWeights
from rankwise.finetuning.data import plain
from rankwise.finetuning.named_metrics import WantedMetric
from rankwise.finetuning.table import IMAGES, WORDS, Table
from rankwise.finetuning.tasks import (
    CausalLanguageModel,
    Classification,
    Generation,
    ImageClassification,
    PairSimilarity,
    Regression,
    Task,
    TokenClassification,
)

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        PairSimilarity,
        Classification,
        Regression,
        TokenClassification,
        ImageClassification,
        Generation,
        CausalLanguageModel,
    )
}


def make_task(
    name: str,
    table: Table,
    tokenizer: Any,
    *,
    source: str,
    max_length: int,
    class_weights: ClassWeights | None = None,
    packing: bool = False,
    metrics: Sequence[WantedMetric] = (),
    primary_metric: str | None = None,
) -> Task:
    """The task called ``name``, or for ``auto`` the one the columns and the model suggest.

    Words with tags are token classification and images image classification. Two texts with many-valued numbers on an
    embedding model are pair similarity; other many-valued numbers are regression; everything else is classification.
    Generating text has to be asked for.

    Args:
        tokenizer: what :func:`~rankwise.finetuning.models.load_preprocessor` gives for this model and table.
        source: the model's folder or hub name.
        class_weights: of the tasks with classes (:class:`~rankwise.finetuning.tasks.ClassHead`).
        packing: of ``causal-lm`` (:class:`~rankwise.finetuning.tasks.CausalLanguageModel`).
        metrics, primary_metric: see :class:`~rankwise.finetuning.tasks.Task`.

    Raises:
        UserError: an unknown task, or an option that the task does not have.
    """
    if name == "auto":
        name = _guess(table, source)
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; expected auto, {', '.join(TASKS)}")
    options: dict[str, Any] = {}
    if class_weights is not None:
        options["class_weights"] = class_weights
    if packing:
        options["packing"] = packing
    for option in options:
        if option not in TASKS[name].options:
            takers = ", ".join(task.name for task in TASKS.values() if option in task.options)
            raise UserError(f"--{option.replace('_', '-')} is for {takers}; this task is {name}. Leave it out")
    return TASKS[name](table, tokenizer, max_length, metrics=metrics, primary_metric=primary_metric, **options)


def _guess(table: Table, source: str) -> str:
    if table.kind == WORDS:
        return TokenClassification.name
    if table.kind == IMAGES:
        return ImageClassification.name
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
