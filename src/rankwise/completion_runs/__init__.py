"""Runs of ``rankwise complete``: what was asked for, the folder it fills, predictions from it."""

from rankwise.completion_runs.predictions import Pairs, predict_from
from rankwise.completion_runs.run import CompletionRun
from rankwise.completion_runs.settings import CompletionSettings, parsed_bounds
from rankwise.completion_runs.several import Others, fair_jobs, follow, torchrun_processes

__all__ = [
    "CompletionRun",
    "CompletionSettings",
    "Others",
    "Pairs",
    "fair_jobs",
    "follow",
    "parsed_bounds",
    "predict_from",
    "torchrun_processes",
]
