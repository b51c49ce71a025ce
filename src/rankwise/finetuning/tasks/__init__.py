"""What is trained on and how it is scored, a file for each kind of task."""

from rankwise.finetuning.batching import Array, Batch
from rankwise.finetuning.data import plain
from rankwise.finetuning.tasks.base import Task
from rankwise.finetuning.tasks.causal_lm import CausalLanguageModel
from rankwise.finetuning.tasks.generation import Generation
from rankwise.finetuning.tasks.heads import ClassHead, HeadTask
from rankwise.finetuning.tasks.images import ImageClassification
from rankwise.finetuning.tasks.pair_similarity import PairSimilarity
from rankwise.finetuning.tasks.sequence import Classification, Regression
from rankwise.finetuning.tasks.tokens import TokenClassification

__all__ = [
    "Array",
    "Batch",
    "CausalLanguageModel",
    "ClassHead",
    "Classification",
    "Generation",
    "HeadTask",
    "ImageClassification",
    "PairSimilarity",
    "Regression",
    "Task",
    "TokenClassification",
    "plain",
]
