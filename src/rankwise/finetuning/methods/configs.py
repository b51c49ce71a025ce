"""PEFT's configuration of every method: the settings that ``--rank`` decides, and those that the layers' sizes do.

A rank that is a rank is taken as it is, with scaling 1. Where PEFT's own size is something else, it is chosen so that a
layer of d × d trains about the 2·d·r numbers that LoRA would, or is the method's own default where the method is made to
train far fewer.
"""

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers.pytorch_utils import Conv1D

from rankwise.adapters import DeepLoraConfig
from rankwise.adapters.layers import matrix_shape
from rankwise.finetuning.methods.method import Config, Target

if TYPE_CHECKING:
    from peft import PeftConfig


def deep_lora(target: Target) -> "PeftConfig":
    """Deep LoRA as the settings say."""
    settings = target.settings
    return _configured(
        DeepLoraConfig,
        target,
        r=settings.r,
        inner_depth=settings.inner_depth,
        init_scale=settings.init_scale,
        variant=settings.variant,
        direction_dropout=settings.direction_dropout,
    )


def lora(**options: Any) -> Config:
    """LoRA of scaling 1 (1·√r with rsLoRA): rank and α are not to be confused."""

    def build(target: Target) -> "PeftConfig":
        from peft import LoraConfig

        r = target.settings.r
        return _configured(LoraConfig, target, r=r, lora_alpha=r, **options)

    return build


def lora_of_twice_the_rank(target: Target) -> "PeftConfig":
    """For starts whose second half stays as it is (:mod:`rankwise.finetuning.methods.lora_starts`)."""
    from peft import LoraConfig

    _require_directions(target, target.settings.r)
    return _configured(LoraConfig, target, r=2 * target.settings.r, lora_alpha=2 * target.settings.r)


def lora_ga(target: Target) -> "PeftConfig":
    """A and B from the first 2·r singular directions of the gradient."""
    _require_directions(target, 2 * target.settings.r)
    return lora_of_twice_the_rank(target)


def mica(target: Target) -> "PeftConfig":
    """B from the r least singular directions of the weight, which every layer must have."""
    _require_directions(target, target.settings.r)
    return lora(init_lora_weights="mica")(target)


def kasa(target: Target) -> "PeftConfig":
    """The paper's two penalties with the weights of its published GLUE runs, which are PEFT's defaults."""
    from peft import KasaConfig

    return lora(kasa_config=KasaConfig())(target)


def velora(target: Target) -> "PeftConfig":
    """Inputs kept in groups of about 64 features, in as many groups as divide every layer."""
    from peft.tuners.lora import VeloraConfig

    groups = _divisor((columns for _, columns in _shapes(target)), 64)
    return lora(velora_config=VeloraConfig(num_groups=groups))(target)


def monteclora(target: Target) -> "PeftConfig":
    """PEFT's defaults, but for the noise of 150 steps that it would draw ahead: 8·150 times the size of every A."""
    from peft import MontecloraConfig

    return lora(monteclora_config=MontecloraConfig(buffer_size=1))(target)


def adalora(target: Target) -> "PeftConfig":
    """From 1.5·r directions a layer to r on average, between a tenth and seven tenths of the steps."""
    from peft import AdaLoraConfig

    settings = target.settings
    if settings.steps < 2:
        raise ValueError("AdaLoRA ranks its directions by what earlier steps did; give it at least 2 steps")
    start = max(settings.r + 1, round(1.5 * settings.r))
    return _configured(
        AdaLoraConfig,
        target,
        target_r=settings.r,
        init_r=start,
        lora_alpha=start,
        tinit=settings.steps // 10,
        tfinal=settings.steps * 3 // 10,
        deltaT=max(1, settings.steps // 40),
        total_step=settings.steps,
        orth_reg_weight=0.0,  # added by the method's penalty, whoever computes the loss
    )


def adamss(target: Target) -> "PeftConfig":
    """r subspaces of rank 1 within the first hundred singular directions, PEFT's default."""
    from peft import AdamssConfig

    r = target.settings.r
    return _configured(
        AdamssConfig, target, r=max(100, r), num_subspaces=r, subspace_rank=1, random_seed=target.settings.seed
    )


def boft(target: Target) -> "PeftConfig":
    """Blocks of at most r columns, as wide as divide every layer."""
    from peft import BOFTConfig

    size = _divisor((columns for _, columns in _shapes(target)), target.settings.r)
    return _configured(
        BOFTConfig, target, boft_block_size=_at_least(2, size, "--method boft rotates blocks of columns")
    )


def c3a(target: Target) -> "PeftConfig":
    """Circulant blocks whose size b divides every layer; a layer trains m·n/b numbers."""
    from peft import C3AConfig

    common = math.gcd(*(size for shape in _shapes(target) for size in shape))
    size = _divisor([common], max(1, common // (2 * target.settings.r)))
    size = _at_least(2, size, "--method c3a works in circulant blocks", "or a smaller --rank")
    return _configured(C3AConfig, target, block_size=size, init_weights=True)


def deft(target: Target) -> "PeftConfig":
    from peft import DeftConfig

    return _configured(DeftConfig, target, r=target.settings.r)


def delora(target: Target) -> "PeftConfig":
    """λ bounds an update's norm, and B's first step fills the bound: at most λ/√(r·n) of the weight's for n inputs.

    PEFT's λ = 15 is meant for r = 32 and n = 4096, 4 % of the weight. The same share is taken of every layer: with 15 a MiniLM
    (n = 384, r = 8: 27 %) forgot what it knew at the first step, whatever the rate.
    """
    from peft import DeloraConfig

    r = target.settings.r
    bounds = {
        re.escape(name): 15 * math.sqrt(r * columns / (32 * 4096))
        for name, (_, columns) in zip(target.layers, _shapes(target), strict=True)
    }
    return _configured(DeloraConfig, target, r=r, lambda_pattern=bounds)


def fourierft(target: Target) -> "PeftConfig":
    """125·r coefficients a layer: the paper's 1000 at r = 8; from zero, so that the start changes nothing."""
    from peft import FourierFTConfig

    return _configured(
        FourierFTConfig,
        target,
        n_frequency=_coefficients(target, 125),
        random_loc_seed=target.settings.seed,
        init_weights=True,
    )


def frod(target: Target) -> "PeftConfig":
    from peft import FrodConfig

    return _configured(FrodConfig, target, projection_prng_key=target.settings.seed, progressbar=False)


def glora(target: Target) -> "PeftConfig":
    from peft import GloraConfig

    return _configured(GloraConfig, target, r=target.settings.r)


def gralora(target: Target) -> "PeftConfig":
    """Two by two blocks, what PEFT recommends up to rank 32."""
    from peft import GraloraConfig

    r = target.settings.r
    return _configured(GraloraConfig, target, r=r, alpha=r, gralora_k=2)


def hira(target: Target) -> "PeftConfig":
    from peft import HiraConfig

    return _configured(HiraConfig, target, r=target.settings.r)


def hra(target: Target) -> "PeftConfig":
    """r reflections; an even number of them cancels at the start."""
    from peft import HRAConfig

    if target.settings.r % 2:
        raise ValueError(
            f"reflections start in pairs that cancel, so that --rank must be even, got {target.settings.r}"
        )
    return _configured(HRAConfig, target, r=target.settings.r)


def ia3(target: Target) -> "PeftConfig":
    """A factor for every output of every layer; which layers are "feed-forward" and scaled at the input, no name says."""
    from peft import IA3Config

    return _configured(IA3Config, target, feedforward_modules=[])


def loha(target: Target) -> "PeftConfig":
    from peft import LoHaConfig

    return _configured(LoHaConfig, target, r=target.settings.r, alpha=target.settings.r)


def lokr(target: Target) -> "PeftConfig":
    from peft import LoKrConfig

    return _configured(LoKrConfig, target, r=target.settings.r, alpha=target.settings.r)


def miss(target: Target) -> "PeftConfig":
    from peft import MissConfig

    return _configured(MissConfig, target, r=target.settings.r)


def oft(target: Target) -> "PeftConfig":
    """Rotations of at most 4·r columns, as wide as divide every layer: r = 8 gives PEFT's default of 32."""
    from peft import OFTConfig

    size = _divisor((columns for _, columns in _shapes(target)), 4 * target.settings.r)
    return _configured(OFTConfig, target, oft_block_size=_at_least(2, size, "--method oft rotates blocks of columns"))


def osf(target: Target) -> "PeftConfig":
    """The r least singular directions are trained; PEFT asks for the number of those that are not."""
    from peft import OSFConfig

    r = target.settings.r
    _require_directions(target, r + 1)
    kept = {rf"{re.escape(name)}": min(matrix_shape(layer)) - r for name, layer in target.layers.items()}
    return _configured(OSFConfig, target, rank_pattern=kept)


def peanut(target: Target) -> "PeftConfig":
    """One hidden layer over the weight's own columns, the shallowest of PEFT's."""
    from peft import PeanutConfig

    return _configured(PeanutConfig, target, r=target.settings.r)


def psoft(target: Target) -> "PeftConfig":
    """An r × r rotation inside the weight's principal subspace."""
    from peft import PsoftConfig

    _require_directions(target, target.settings.r)
    return _configured(PsoftConfig, target, r=target.settings.r, psoft_alpha=target.settings.r)


def pvera(target: Target) -> "PeftConfig":
    """Two vectors a layer, so that the random projections are wide: PEFT's default, not r."""
    from peft import PveraConfig

    return _configured(PveraConfig, target, projection_prng_key=target.settings.seed)


def randlora(target: Target) -> "PeftConfig":
    """The bases' rank is PEFT's default: the smaller it is, the more is trained."""
    from peft import RandLoraConfig

    return _configured(RandLoraConfig, target, projection_prng_key=target.settings.seed)


def road(target: Target) -> "PeftConfig":
    """Outputs in pairs, in groups as large as divide every layer, at most PEFT's 64."""
    from peft import RoadConfig

    pairs = _divisor((rows for rows, _ in _shapes(target)), 64) // 2
    return _configured(RoadConfig, target, group_size=2 * _at_least(1, pairs, "--method road turns outputs in pairs"))


def shira(target: Target) -> "PeftConfig":
    """r·(m + n) entries of the weight, drawn by the seed."""
    from peft import ShiraConfig

    for name, (rows, columns) in zip(target.layers, _shapes(target), strict=True):
        if target.settings.r * (rows + columns) > rows * columns:
            raise ValueError(f"{name} has {rows} × {columns} entries, fewer than r·({rows} + {columns}); lower --rank")
    return _configured(ShiraConfig, target, r=target.settings.r, random_seed=target.settings.seed)


def supertuning(target: Target) -> "PeftConfig":
    """The largest entries of the weight, as large a share of it as LoRA would train numbers in the largest layer."""
    from peft import SupertuningConfig

    share = min(target.settings.r * (rows + columns) / (rows * columns) for rows, columns in _shapes(target))
    return _configured(SupertuningConfig, target, sparsity=max(0.0, 1 - share))


def tinylora(target: Target) -> "PeftConfig":
    """The paper's two singular directions and 64 numbers a layer."""
    from peft import TinyLoraConfig

    return _configured(TinyLoraConfig, target, projection_seed=target.settings.seed)


def unilora(target: Target) -> "PeftConfig":
    """One vector for all factors; of 2880·r numbers, which is the paper's 23,040 at r = 8, or all there are."""
    from peft import UniLoraConfig

    r = target.settings.r
    everything = sum(r * (rows + columns) for rows, columns in _shapes(target))
    length = min(2880 * r, everything)
    return _configured(UniLoraConfig, target, r=r, theta_d_length=length, proj_seed=target.settings.seed)


def vblora(target: Target) -> "PeftConfig":
    """A bank of 256 vectors, whose length divides every layer; two of them for every part of a factor."""
    from peft import VBLoRAConfig

    length = _divisor((size for shape in _shapes(target) for size in shape), 256)
    return _configured(VBLoRAConfig, target, r=target.settings.r, vector_length=length)


def vera(target: Target) -> "PeftConfig":
    """Two vectors a layer, so that the random projections are wide: PEFT's default, not r. They are saved with them."""
    from peft import VeraConfig

    return _configured(VeraConfig, target, r=256, projection_prng_key=target.settings.seed)


def waveft(target: Target) -> "PeftConfig":
    """324·r coefficients a layer: PEFT's default of 2592 at r = 8."""
    from peft import WaveFTConfig

    return _configured(
        WaveFTConfig, target, n_frequency=_coefficients(target, 324), random_loc_seed=target.settings.seed
    )


def _configured(kind: Any, target: Target, **options: Any) -> "PeftConfig":
    """The configuration with what it shares with every other, as far as it has a field for it."""
    known = kind.__dataclass_fields__
    options["task_type"] = target.task_type
    if "exclude_modules" in known and not target.convolutional:
        options |= {"target_modules": "all-linear", "exclude_modules": list(target.left_out) or None}
    else:
        options["target_modules"] = "|".join(map(re.escape, target.layers))
    if target.head:
        options["modules_to_save"] = list(target.head)
    if "fan_in_fan_out" in known and target.layers and all(isinstance(m, Conv1D) for m in target.layers.values()):
        options["fan_in_fan_out"] = True  # how GPT-2's layers store their weight
    return kind(**options)


def _shapes(target: Target) -> list[tuple[int, int]]:
    """(out, in) of every layer's weight as a matrix."""
    return [matrix_shape(layer) for layer in target.layers.values()]


def _divisor(sizes: Iterable[int], at_most: int) -> int:
    """The largest number up to ``at_most`` that divides all of these."""
    common = math.gcd(*sizes)
    return max(size for size in range(1, max(1, at_most) + 1) if common % size == 0)


def _at_least(least: int, size: int, what: str, or_else: str = "") -> int:
    if size < least:
        raise ValueError(f"{what}, and no such size divides every layer; choose another --method {or_else}".rstrip())
    return size


def _coefficients(target: Target, per_rank: int) -> int:
    """So many coefficients a rank, but no more than the smallest layer has."""
    return min(per_rank * target.settings.r, *(rows * columns for rows, columns in _shapes(target)))


def _require_directions(target: Target, count: int) -> None:
    for name, shape in zip(target.layers, _shapes(target), strict=True):
        if min(shape) < count:
            raise ValueError(
                f"{name} is {shape[0]} × {shape[1]}: it has fewer than {count} singular directions; lower --rank"
            )
