"""rankwise: learning with low-rank structure.

Sub-packages load on first use, so ``import rankwise`` needs neither transformers nor matplotlib:

``rankwise.spectral``        truncated SVD, ranks, angles between subspaces
``rankwise.factorizations``  matrices kept as products, and their invariant subspaces
``rankwise.regularization``  what small norms, margins and dropout do to the rank
``rankwise.optimizers``      optimizers whose state is low-rank
``rankwise.compression``     trained models made small, and what they cost
``rankwise.completion``      matrices with holes, filled
``rankwise.adapters``        Deep LoRA as a PEFT method
``rankwise.finetuning``      tasks and runs behind ``rankwise finetune``
``rankwise.diagnostics``     reports
"""

import importlib
import logging
from types import ModuleType

from rankwise._version import __version__

__all__ = [
    "__version__",
    "adapters",
    "completion",
    "compression",
    "diagnostics",
    "factorizations",
    "finetuning",
    "optimizers",
    "regularization",
    "spectral",
]

logging.getLogger("rankwise").addHandler(logging.NullHandler())

_ROOMS = {*__all__, "testing"} - {"__version__"}


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"rankwise.{name}")
    raise AttributeError(f"module 'rankwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
