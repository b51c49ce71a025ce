"""A model's layers in place of which two thin ones do nearly the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from rankwise.compression.calibration import MEMORY, Batches, SecondMoments, read_again
from rankwise.compression.factors import DAMPING, balanced_factors, output_directions, require_damping
from rankwise.compression.layer_list import record_layers
from rankwise.compression.low_rank_layers import LowRankConv2d, LowRankLinear, require_rank
from rankwise.compression.model_layers import is_named, layers_of, replace_layer, require_values
from rankwise.compression.rank_profile import LayerProfile, Progress, RankProfile, errors_about, rank_profile
from rankwise.compression.rank_rules import RankRule, highest_paying_rank, kept_weights, ranks_for_energy
from rankwise.model_structure import Names, is_called


@dataclass(frozen=True)
class FactorizedLayer:
    """One layer that was looked at.

    Attributes:
        name: in the model.
        kind: "linear" or "conv2d".
        shape: (m, n) of the weight.
        rank: k of the pair; None where the layer stays dense.
        relative_error: ‖W − W_k‖/‖W‖, or of the outputs on calibration data; 0 where dense.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int | None
    relative_error: float

    @property
    def weights(self) -> int:
        """Numbers in the weight or its factors, without the bias."""
        m, n = self.shape
        return m * n if self.rank is None else self.rank * (m + n)


@dataclass(frozen=True)
class Factorization:
    """What :func:`factorize_model` did.

    Attributes:
        layers: those looked at, in the model's order.
        skipped: layers left alone, and why.
        unseen: layers that the calibration data did not reach: cut by their weights alone.
        bytes_before, bytes_after: of all parameters of the model.
    """

    layers: tuple[FactorizedLayer, ...]
    skipped: dict[str, str]
    unseen: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    @property
    def share(self) -> float:
        """Numbers kept of the weights of the layers looked at."""
        dense = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return sum(layer.weights for layer in self.layers) / dense

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer that became a pair."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        return {
            "share": self.share,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "skipped": dict(self.skipped),
            "unseen": list(self.unseen),
            "layers": [{**vars(layer), "shape": list(layer.shape)} for layer in self.layers],
        }

    def __str__(self) -> str:
        ranks = sorted(self.ranks.values())
        found = f", rank {ranks[0]} to {ranks[-1]}" if ranks else ""
        return (
            f"{len(ranks)} of {len(self.layers)} layers factorized{found}: {100 * self.share:.1f} % of their weights kept, "
            f"{self.bytes_before / 1e6:.1f} MB of parameters became {self.bytes_after / 1e6:.1f} MB"
        )


def factorize_model(
    model: nn.Module,
    target: float | None = None,
    *,
    ranks: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    rule: RankRule | None = None,
    calibration: Batches | None = None,
    profile: RankProfile | None = None,
    include: Names | None = None,
    exclude: Names | None = None,
    damping: float = DAMPING,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Factorization:
    """Replace linear layers, ``Conv1D`` and ungrouped 2-d convolutions by pairs of low rank, in place.

    W becomes left·right wherever k(m + n) < mn, and stays as it is where that would not be smaller; biases are kept. Without
    calibration data the pair is the truncated SVD, nearest to W. With it, it is nearest in what comes out: it minimizes the mean
    of ‖(W − left·right)x‖² over the inputs x of the layer in the original model.

    Exactly one of ``target``, ``ranks`` and ``energy`` says how far to go.

    Args:
        model: changed in place. Of a transformers model the config then lists the pairs, so that
            :func:`~rankwise.compression.load_factorized` can rebuild it from what ``save_pretrained`` writes.
        target: share of these layers' weights to keep, in (0, 1]; ``rule`` spreads it over them.
        ranks: one rank for all, or by name or end of a name ({"q_proj": 64}); layers that no name picks stay dense.
        energy: share of Σσ² to keep in every layer, in (0, 1].
        rule: :func:`welore_ranks` (one threshold for all), :func:`uniform_ranks` (the same share each), or any function of the
            spectra and the target. None is uniform_ranks with calibration data and welore_ranks without; a layer whose uniform
            share is below rank 1 then keeps rank 1.
        calibration: batches for the model: dicts of tensors, tuples or tensors. A hundred rows of the kind of data that the
            model will see. Read twice, or as often as ``memory`` makes necessary.
        profile: of :func:`rank_profile` for this model, with the same names and data: spares computing the spectra again.
        include, exclude: which layers, as in :func:`~rankwise.compression.model_layers.layers_of`. Output heads and tied weights
            are left alone, and listed.
        damping: ridge on the second moments of the inputs, in units of their mean diagonal.
        memory: bytes of second moments held at a time.
        progress: called with (done, of) after every layer, of the spectra and of the pairs together.

    Raises:
        ValueError: none or several of target, ranks and energy; a target that rank 1 everywhere exceeds; a name that picks no
            layer; a rank that a layer cannot have; a quantized model, or one on the meta device; NaN or infinite weights or
            inputs; calibration data that is no list of batches.

    Source: WeLore (Jaiswal et al. 2024, §3), overview §3.3; activation-aware truncation as in SVD-LLM (Wang et al. 2024, §3).

    Example:
        >>> from torch import nn
        >>> from rankwise.compression import factorize_model
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> done = factorize_model(model, ranks=8)
        >>> done.ranks, round(done.share, 3), model[0].rank
        ({'0': 8, '2': 8}, 0.156, 8)
    """
    if sum(option is not None for option in (target, ranks, energy)) != 1:
        raise ValueError("give exactly one of target (a share of the weights to keep), ranks and energy")
    require_damping(damping)
    found = layers_of(model, include, exclude)
    require_values(found.layers)
    if calibration is not None:
        calibration = read_again(calibration)  # the spectra and the pairs each take a pass
    steps = _Steps(progress, (2 if profile is None else 1) * len(found.layers))
    if profile is None:
        profile = rank_profile(
            model, calibration, include=include, exclude=exclude, damping=damping, memory=memory, progress=steps.at
        )
    if [(layer.name, layer.shape) for layer in profile.layers] != [(layer.name, layer.shape) for layer in found.layers]:
        raise ValueError(
            "the profile is of other layers than those to factorize; make it of this model, with the same include and exclude"
        )
    if profile.calibrated != (calibration is not None):
        raise ValueError("the profile and the factorization must both have calibration data, the same, or neither")
    wanted = _ranks(profile, target, ranks, energy, rule)
    before = parameter_bytes(model)
    cut = [layer for layer, rank in zip(found.layers, wanted, strict=True) if rank <= highest_paying_rank(layer.shape)]
    # all pairs are of the original model's inputs: none is put in before the last is computed
    pairs: list[tuple[tuple[str, ...], nn.Module]] = []
    moments = None if calibration is None else SecondMoments(model, cut, calibration, memory)
    for layer, rank in zip(found.layers, wanted, strict=True):
        if rank <= highest_paying_rank(layer.shape):
            C = None if moments is None else moments.of(layer)
            W = layer.matrix()
            with errors_about(layer.name):
                U, _ = output_directions(W, C, damping)
            pairs.append((layer.places, layer.from_factors(*balanced_factors(W, U[:, :rank]))))
        steps.more()
    for places, pair in pairs:
        replace_layer(model, places, pair)
    record_layers(model)
    layers = tuple(_outcome(layer, rank) for layer, rank in zip(profile.layers, wanted, strict=True))
    unseen = tuple(layer.name for layer in profile.layers if profile.calibrated and not layer.seen)
    return Factorization(layers, found.skipped, unseen, before, parameter_bytes(model))


def freeze_full_rank(model: nn.Module, *, also: Names = ()) -> int:
    """Train the factors of the low-rank layers alone: everything else gets ``requires_grad=False``.

    WeLore's way to fine-tune: the layers that could be compressed are also those whose gradients are rich enough to learn from,
    and with them alone gradients and optimizer state shrink.

    Args:
        model: after :func:`factorize_model`.
        also: further modules to train, such as a classifier's head; a regex or a list of names or their ends.

    Returns:
        How many numbers are trained.

    Raises:
        ValueError: the model has no low-rank layer; a name in ``also`` that is no module's, or no regular expression.

    Source: WeLore (Jaiswal et al. 2024, §3.3).

    Example:
        >>> from torch import nn
        >>> from rankwise.compression import factorize_model, freeze_full_rank
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> _ = factorize_model(model, ranks={"0": 4})
        >>> freeze_full_rank(model), model[2].weight.requires_grad
        (512, False)
    """
    factors = [
        factor
        for module in model.modules()
        if isinstance(module, LowRankLinear | LowRankConv2d)
        for factor in _factors(module)
    ]
    if not factors:
        raise ValueError("the model has no low-rank layer to train; call factorize_model first")
    named = list(model.named_modules(remove_duplicate=False))
    for pattern in [also] if isinstance(also, str) else [[name] for name in also]:
        picked = [module for name, module in named if name and is_named((name,), pattern)]
        if not picked:
            raise ValueError(f"also={pattern!r} names no module of this model")
        factors += [parameter for module in picked for parameter in module.parameters()]
    model.requires_grad_(False)
    for factor in factors:
        factor.requires_grad_()
    return sum(factor.numel() for factor in {id(factor): factor for factor in factors}.values())


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, shared ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _factors(module: LowRankLinear | LowRankConv2d) -> list[nn.Parameter]:
    return [
        cast(nn.Parameter, side if isinstance(side, nn.Parameter) else side.weight)
        for side in (module.left, module.right)
    ]


def _ranks(
    profile: RankProfile,
    target: float | None,
    ranks: int | Mapping[str, int] | None,
    energy: float | None,
    rule: RankRule | None,
) -> list[int]:
    if target is not None:
        return list(profile.ranks(target, rule).values())
    if energy is not None:
        return ranks_for_energy(profile.spectra(), energy)
    if isinstance(ranks, Mapping):
        return _named_ranks(profile, ranks)
    assert ranks is not None  # noqa: S101  # for the type checker: one of the three is given
    return [_checked(layer, ranks) for layer in profile.layers]


def _named_ranks(profile: RankProfile, ranks: Mapping[str, int]) -> list[int]:
    if not ranks:
        raise ValueError("ranks names no layer; give at least one name with a rank, or one rank for all")
    wanted = {layer.name: min(layer.shape) for layer in profile.layers}
    for name, rank in ranks.items():
        picked = [layer for layer in profile.layers if is_called(layer.name, [name])]
        if not picked:
            why = next((f" ({reason})" for other, reason in profile.skipped.items() if is_called(other, [name])), "")
            raise ValueError(f"ranks names {name!r}, which is no layer that can be factorized{why}")
        wanted |= {layer.name: _checked(layer, rank) for layer in picked}
    return list(wanted.values())


def _checked(layer: LayerProfile, rank: int) -> int:
    with errors_about(layer.name):
        require_rank(rank, *layer.shape)
    return rank


def _outcome(layer: LayerProfile, rank: int) -> FactorizedLayer:
    if kept_weights(layer.shape, rank) == layer.shape[0] * layer.shape[1]:
        return FactorizedLayer(layer.name, layer.kind, layer.shape, None, 0.0)
    return FactorizedLayer(layer.name, layer.kind, layer.shape, rank, layer.relative_error(rank))


class _Steps:
    """One count over two rounds."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def at(self, done: int, _of: int) -> None:
        self.done = done
        if self.progress is not None:
            self.progress(done, self.total)

    def more(self) -> None:
        self.at(self.done + 1, self.total)
