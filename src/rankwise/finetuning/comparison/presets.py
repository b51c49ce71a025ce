"""The paper's experiments on language models as studies (ICML 2024, §4 and App. B; what its public code really does).

A preset is a set of rules to start from: whatever is given beside it counts instead. The tables and figures of the
paper were made with BERT-base and T5-base; the names below are hub names for those who have them.

Table 1 and Figs 6 and 7 were made with full-width, uncompressed factors: their presets run those (``full-width:paper``)
beside the compressed method. One of the code's habits is no switch here: the word embeddings as a further adapted matrix.
"""

from pathlib import Path
from typing import Any

from rankwise.errors import UserError
from rankwise.finetuning.comparison.protocol import StudySettings

_BERT = "google-bert/bert-base-cased"
_T5 = "google-t5/t5-base"
_GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")

# What the code does everywhere: the head stays at its random start, rows are drawn with replacement, long held-out rows
# are left out, LoRA starts from N(0, 1) on the output side without α/r at the one rate 1e-4, and nothing is tuned.
_CODE: dict[str, Any] = {
    "model": _BERT,
    "methods": ("lora:paper", "deep-lora:paper"),
    "fixed": ("lora:paper", "deep-lora:paper"),
    "head": "frozen",
    "head_start": "random",
    "schedule": "constant",
    "draw": "with-replacement",
    "max_eval_tokens": 128,
    "eval_limit": 1_000_000,
    "batch_size": 16,
    "r": 8,
}

# the tables and figures whose published "Deep LoRA" is the full-width model
_PUBLISHED = {**_CODE, **dict.fromkeys(("methods", "fixed"), ("lora:paper", "full-width:paper", "deep-lora:paper"))}

STUDY_PRESETS: dict[str, dict[str, Any]] = {
    "icml24-table1": {**_PUBLISHED, "tasks": _GLUE, "shots": (1024,), "seeds": 10, "steps": 1000},
    "icml24-fig6": {**_PUBLISHED, "tasks": ("stsb",), "shots": (16, 64, 256, 1024), "seeds": 20, "steps": 500},
    "icml24-fig7": {**_PUBLISHED, "tasks": ("stsb",), "shots": (16,), "seeds": 1, "steps": 500},
    "icml24-fig8": {
        **_CODE,
        "tasks": ("stsb",),
        "methods": tuple(
            label for r in (8, 16, 32, 64) for label in (f"lora:paper+r={r}", f"deep-lora:paper+random+r={r}")
        ),
        "fixed": tuple(
            label for r in (8, 16, 32, 64) for label in (f"lora:paper+r={r}", f"deep-lora:paper+random+r={r}")
        ),
        "shots": (16,),
        "seeds": 5,
        "steps": 200,
    },
    "icml24-fig11": {
        **_CODE,
        "tasks": ("stsb",),
        "methods": ("deep-lora:paper", "deep-lora:paper+random"),
        "fixed": ("deep-lora:paper", "deep-lora:paper+random"),
        "shots": (16,),
        "seeds": 1,
        "steps": 200,
    },
    "icml24-table2": {**_CODE, "tasks": ("stsb",), "shots": (1024,), "seeds": 1, "steps": 200},
    "icml24-table3": {
        **_CODE,
        "model": _T5,
        "tasks": ("e2e-nlg",),
        "shots": (16,),
        "seeds": 10,
        "steps": 500,
        "head": "trained",
    },
}


def study_settings(out: str, rules: dict[str, Any], preset: str | None = None) -> StudySettings:
    """The settings of a study: those given, then the preset's, then the study's in ``out``, then the defaults.

    Raises:
        UserError: unknown preset, or no model or task from any of them.
    """
    if preset is not None and preset not in STUDY_PRESETS:
        raise UserError(f"unknown preset {preset!r}; expected {', '.join(STUDY_PRESETS)}")
    there: dict[str, Any] = {}
    if (Path(out) / "study.json").is_file():
        from rankwise.finetuning.comparison.study import StudyFolder

        there = dict(vars(StudyFolder(Path(out)).read_settings()))
    values = {**there, **STUDY_PRESETS.get(preset or "", {}), **rules, "out": out}
    missing = [option for option, key in (("--model", "model"), ("--task", "tasks")) if not values.get(key)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing; for example:\n"
            f"  rankwise compare --model ./my-model --task pairs.csv --out {out}"
        )
    if "fixed" not in rules:  # a preset's or an older study's names its own methods, which may not be asked for now
        values["fixed"] = tuple(label for label in values.get("fixed", ()) if label in values.get("methods", ()))
    return StudySettings(**values)
