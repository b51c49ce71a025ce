"""Settings of a Deep LoRA adapter."""

import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from rankwise.adapters.registration import DeepLoraPeftType
from rankwise.factorizations.invariant_subspaces import VARIANTS

FORMAT_VERSION = 2  # 1 had no direction_dropout
ZERO_LEFT = "zero-left"
STARTS = (ZERO_LEFT, *VARIANTS)


@dataclass
class DeepLoraConfig(PeftConfig):
    """Deep LoRA: y = W₀x + U(W̃_L⋯W̃_1 − ε^L·I)Vᵀx (ICML 2024, eq. 12, compressed as in §2.3).

    The defaults depart from the paper, by what docs/few-labels.md measured: U starts at zero between random directions
    and inner factors I (``variant="zero-left"``), so that the update grows in every direction from the first step; it is
    zero without the shift, and ε counts for nothing. Each training row sees the adapter without a random part of its
    directions (``direction_dropout``). ``DeepLoraConfig(variant="compressed", direction_dropout=0)`` is the paper's.

    ``r`` is the width of U and V, so an adapter with ``r=8`` has LoRA's size at r=8 plus ``inner_depth·r²`` numbers a
    layer. There is no α: the update needs no scale, and the rank that training leaves in it is usually far below r.

    Example:
        >>> from rankwise.adapters import DeepLoraConfig
        >>> DeepLoraConfig(r=4, target_modules=["query", "value"]).inner_depth
        3
    """

    r: int = field(default=8, metadata={"help": "Width of U and V; an upper bound on the rank of every update."})
    inner_depth: int = field(default=3, metadata={"help": "Number L of r×r inner factors; 1 gives C·B·A."})
    init_scale: float = field(default=1e-3, metadata={"help": "Inner factors start at ε·I; this is ε."})
    variant: str = field(
        default=ZERO_LEFT,
        metadata={
            "help": "The start. 'zero-left': U = 0, V random, inner factors I. The others start the inner factors at "
            "ε·I and place U and V: 'compressed' from the first gradient, as the paper; 'spectral' at the top directions "
            "of -G; 'random' without a gradient."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names or a regex of the linear layers to adapt. None and 'all-linear' mean every nn.Linear but "
            "the output head and layers with min(in, out) <= r."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regex of layers to leave alone."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other widths for some layers: {name or regex: r}."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only these layer numbers (with target_modules as a list)."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that the numbers index."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved beside the adapter, such as a head."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'deeplora_only'."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    direction_dropout: float = field(
        default=0.3,
        metadata={
            "help": "Share of the r directions that each row of a training batch does without (all of its tokens alike)."
        },
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "True if the layer stores (in, out) weights."})
    init_weights: bool = field(
        default=True,
        metadata={"help": "True starts as an exact no-op; False draws random inner factors, for tests."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Tokens whose embeddings are trained too, by PEFT: [1, 5] or {name of the embedding: [1, 5]}."
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of parameters that a module reads itself, such as fused experts: ['experts.gate_up_proj', "
            "'experts.down_proj']. Without target_modules the linear layers are adapted too; target_modules=[] leaves them out."
        },
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={
            "help": "Keep an embedding and an output head that share their weight shared where modules_to_save trains it."
        },
    )
    layouts: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "What adapted weights that are no linear layer's look like; noted when they are adapted."},
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the saved layout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DeepLoraPeftType.DEEPLORA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT matches on sets
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.format_version == 1:  # saved before there was any: training goes on as it began
            self.direction_dropout = 0.0
            self.format_version = FORMAT_VERSION
        self._check()

    @property
    def zero_left(self) -> bool:
        """Whether U starts at zero: no gradient places the frames, and the update has no shift."""
        return self.variant == ZERO_LEFT

    def _check(self) -> None:
        for name, width in [("r", self.r), *self.rank_pattern.items()]:
            if not isinstance(width, int) or width < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {width!r}")
        if not isinstance(self.inner_depth, int) or self.inner_depth < 1:
            raise ValueError(f"inner_depth must be a whole number of at least 1, got {self.inner_depth!r}")
        if not (math.isfinite(self.init_scale) and self.init_scale > 0):
            raise ValueError(
                f"init_scale must be positive (at 0 the inner factors have no gradient), got {self.init_scale!r}"
            )
        if isinstance(self.target_parameters, str):
            raise ValueError(f"target_parameters must be a list of names, got {self.target_parameters!r}")
        if self.variant not in STARTS:
            raise ValueError(f"variant must be one of {', '.join(STARTS)}, got {self.variant!r}")
        for name, share in (("dropout", self.dropout), ("direction_dropout", self.direction_dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {share!r}")
        if self.bias not in ("none", "all", "deeplora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'deeplora_only', got {self.bias!r}")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this adapter was saved in format {self.format_version}, this rankwise reads up to {FORMAT_VERSION}; "
                "upgrade rankwise to load it"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform works with target_modules as a list of names, not a single string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says which list layers_to_transform indexes; give layers_to_transform too")
