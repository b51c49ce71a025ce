"""From a labelled table and a pretrained model to a trained adapter in a run folder."""

from rankwise.errors import Interrupted
from rankwise.finetuning.data import Table, read_table
from rankwise.finetuning.runner import finetune, resume
from rankwise.finetuning.settings import PRESETS, FinetuneSettings
from rankwise.finetuning.task_choice import TASKS, make_task
from rankwise.finetuning.tasks import Task

__all__ = [
    "PRESETS",
    "TASKS",
    "FinetuneSettings",
    "Interrupted",
    "Table",
    "Task",
    "finetune",
    "make_task",
    "read_table",
    "resume",
]
