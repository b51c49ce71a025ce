"""What a model is judged by before and after it is compressed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.compression import agreement, mean_features, perplexity
from rankwise.compression.calibration import evaluating, run_on
from rankwise.compression_runs.settings import CLASSES
from rankwise.compression_runs.texts import ROWS, SCORED, Parts, Texts
from rankwise.errors import UserError
from rankwise.finetuning.data import Table, read_table
from rankwise.finetuning.tasks import PairSimilarity
from rankwise.finetuning.tasks.pair_similarity import pooling_of
from rankwise.finetuning.training import predict_rows


@dataclass(frozen=True)
class Score:
    """A name, its value for a model, which way is better, and what it is taken on."""

    name: str
    of: Callable[[Any], float]
    greater_is_better: bool
    about: str


def score_of(texts: Texts, parts: Parts) -> Score | None:
    """By the labels of a task, or by text; None where there is neither.

    Raises:
        UserError: a table without labels, or with others than the model's; one text only.
    """
    if texts.settings.task is not None:
        return _by_labels(texts)
    return _by_text(texts, parts) if parts.held_out else None


def _by_text(texts: Texts, parts: Parts) -> Score:
    batches = texts.batches(parts.held_out)
    if texts.loaded.predicts_tokens:
        windows = [batch["input_ids"] for batch in batches]
        return Score("perplexity", lambda model: perplexity(model, windows), False, parts.about)
    if len(parts.held_out) < 2:
        raise UserError(f"{parts.about} has one text only; how alike two models are takes at least two")
    original = mean_features(texts.loaded.model, batches)
    return Score(
        "cosine to the original's features",
        lambda model: agreement(original, mean_features(model, batches)).cosine, True, parts.about,
    )  # fmt: skip


def _by_labels(texts: Texts) -> Score:
    asked = texts.settings
    file = str(asked.eval)
    table = read_table(file, text=asked.text, text_pair=asked.text_pair, label=asked.label)
    if table.kind != "texts":
        raise UserError(f"{file} holds no texts (column {table.columns.text!r}); name the text column with --text")
    if asked.task == CLASSES:
        return Score("accuracy", _accuracy(texts, table), True, Path(file).name)
    pairs: Any = PairSimilarity(table, texts.loaded.tokenizer, texts.length)
    pairs.pooling = pooling_of(texts.loaded.source)
    positions = list(range(min(len(table.rows), 4 * SCORED)))
    return Score(
        "spearman",
        lambda model: pairs.score(predict_rows(pairs, model, positions), pairs.targets[positions])["spearman"] or 0.0,
        True, Path(file).name,
    )  # fmt: skip


def _accuracy(texts: Texts, table: Table) -> Callable[[Any], float]:
    """Of the model's own head: the labels are its classes, by name or by number."""
    names = {str(name): number for number, name in texts.loaded.model.config.id2label.items()}
    known = {**{str(number): number for number in names.values()}, **names}
    rows = table.rows[: 4 * SCORED]
    unknown = next((str(row["label"]) for row in rows if str(row["label"]) not in known), None)
    if unknown is not None:
        raise UserError(f"the label {unknown!r} is no class of the model; it has {', '.join(list(names)[:10])}")

    def accuracy(model: Any) -> float:
        right = 0
        with evaluating(model):
            for start in range(0, len(rows), ROWS):
                part = rows[start : start + ROWS]
                pairs = None if part[0]["text_pair"] is None else [row["text_pair"] for row in part]
                output = run_on(model, texts.tokens([row["text"] for row in part], pairs))
                if not hasattr(output, "logits") or output.logits.ndim != 2:
                    raise UserError(f"{texts.settings.model} has no classifier's head; leave --task out")
                found = output.logits.argmax(-1).tolist()
                right += sum(known[str(row["label"])] == number for row, number in zip(part, found, strict=True))
        return right / len(rows)

    return accuracy
