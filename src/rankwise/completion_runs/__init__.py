"""Runs of ``rankwise complete``: what was asked for, the folder it fills, predictions from it."""

from rankwise.completion_runs.filled import checked_filled
from rankwise.completion_runs.folder import check_targets
from rankwise.completion_runs.predictions import Pairs, predict_from
from rankwise.completion_runs.run import CompletionRun
from rankwise.completion_runs.settings import CompletionSettings, is_picture, parsed_bounds
from rankwise.completion_runs.several import Others, fair_jobs, follow, torchrun_processes

__all__ = [
    "CompletionRun",
    "CompletionSettings",
    "Others",
    "Pairs",
    "check_targets",
    "checked_filled",
    "fair_jobs",
    "follow",
    "is_picture",
    "parsed_bounds",
    "predict_from",
    "torchrun_processes",
]
