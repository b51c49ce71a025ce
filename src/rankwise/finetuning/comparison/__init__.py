"""Which method wins, on which task, with how many labels: paired trials under one protocol, and what they show."""

from rankwise.finetuning.comparison.presets import STUDY_PRESETS, study_settings
from rankwise.finetuning.comparison.protocol import MethodSpec, RunSpec, StudySettings
from rankwise.finetuning.comparison.study import Execution, compare, merge, summarize_study

__all__ = [
    "STUDY_PRESETS",
    "Execution",
    "MethodSpec",
    "RunSpec",
    "StudySettings",
    "compare",
    "merge",
    "study_settings",
    "summarize_study",
]
