"""Making PEFT know a method that lives outside its tree.

``peft.utils.register_peft_method`` accepts only names of PEFT's own enum. The mappings behind it are ordinary
dictionaries keyed by strings (its enum members *are* strings), so our own ``str`` enum member and one insertion each
are enough; no PEFT object is changed.
"""

import enum
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

PREFIX = "deeplora_"  # transformers derives it too, as peft_type.lower() + "_"


class DeepLoraPeftType(str, enum.Enum):  # noqa: UP042  # as PEFT's own enum, whose members print the same way
    """What ``adapter_config.json`` says in its ``peft_type``."""

    DEEPLORA = "DEEPLORA"


def register_with_peft(config_class: type, tuner_class: type) -> None:
    """Insert the method into PEFT's three mappings; harmless when repeated.

    Raises:
        RuntimeError: another package registered a different DEEPLORA.
    """
    name = DeepLoraPeftType.DEEPLORA
    entries: list[tuple[dict[Any, Any], object]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_class),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner_class),
        (PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
    ]
    for mapping, value in entries:
        present = mapping.setdefault(name, value)
        if present is not value and present != value:
            raise RuntimeError(
                f"PEFT already knows a method named {name.value} ({present!r}); "
                "another installed package claims the name: import only one of the two"
            )
