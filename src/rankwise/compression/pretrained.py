"""What transformers says of a model folder, in sentences."""

import os
from collections.abc import Iterable, Mapping
from typing import Any


def model_class(architectures: Any) -> Any:
    """The class of transformers that a config names first under "architectures"; None if it names no such class."""
    import transformers

    name = architectures[0] if isinstance(architectures, list) and architectures else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def reason_of(error: Exception) -> str:
    """What an error of transformers says first, which is where it says it; a heading with the line below it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def require_all_tensors(source: str | os.PathLike[str], report: Mapping[str, Any], *, left_over: bool) -> None:
    """Refuse what ``from_pretrained`` would fill in at random, by its ``output_loading_info``.

    Args:
        source: what the model was loaded from, for the message.
        report: with ``ignore_mismatched_sizes``, or else it would have raised a text of its own.
        left_over: whether tensors that the model has no place for are refused too.

    Raises:
        ValueError: tensors that are missing, of other shapes, or left over.
    """
    _require_none(source, "lack", report.get("missing_keys"))
    if left_over:
        _require_none(source, "have, unlike the model,", report.get("unexpected_keys"))
    other = [(name, tuple(found), tuple(wanted)) for name, found, wanted in report.get("mismatched_keys") or ()]
    _require_none(source, "have in another shape", [f"{name} ({a} instead of {b})" for name, a, b in other])


def _require_none(source: str | os.PathLike[str], what: str, names: Iterable[str] | None) -> None:
    found = sorted(names or ())
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"the tensors in {source} {what} {', '.join(found[:3])}{more}; the files do not belong together, or one is damaged"
        )
