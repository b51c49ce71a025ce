"""The spectrum of every layer, and what it says about how far the layer can be compressed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from rankwise.compression.calibration import MEMORY, Batches, SecondMoments
from rankwise.compression.factors import DAMPING, output_spectrum, require_damping
from rankwise.compression.low_rank_layers import require_rank
from rankwise.compression.model_layers import layers_of, require_values
from rankwise.compression.rank_rules import RankRule, Spectrum, highest_paying_rank, uniform_ranks_from_one
from rankwise.compression.welore import min_max_normalized, welore_ranks
from rankwise.model_structure import Names
from rankwise.spectral import effective_rank, rank_for_energy, stable_rank

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerProfile:
    """One layer, an m × n matrix.

    Attributes:
        name: in the model.
        kind: "linear" or "conv2d".
        shape: (m, n); n = in·k·k of a convolution.
        spectrum: singular values, largest first, (min(m, n),): of W, or of W·C^{1/2} where the profile is of a model that read
            calibration data; Σ of their squares is then the mean squared output.
        seen: whether calibration data reached the layer.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    spectrum: Tensor
    seen: bool

    @property
    def normalized(self) -> Tensor:
        """The spectrum from 1 (largest) to 0 (smallest), as WeLore compares layers by."""
        return min_max_normalized(self.spectrum)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ/Σσ."""
        return effective_rank(self.spectrum)

    @property
    def stable_rank(self) -> float:
        """Σσ²/σ₁²."""
        return stable_rank(self.spectrum)

    @property
    def rank_99(self) -> int:
        """Directions that hold 99 % of Σσ²."""
        return rank_for_energy(self.spectrum, 0.99)

    @property
    def highest_paying_rank(self) -> int:
        """The largest k with k(m + n) < mn."""
        return highest_paying_rank(self.shape)

    def relative_error(self, rank: int) -> float:
        """√(Σ_{i>k}σ_i² / Σσ_i²): ‖W − W_k‖/‖W‖, or of the outputs."""
        energies = self.spectrum.double().square()
        total = float(energies.sum())
        return float(energies[rank:].sum() / total) ** 0.5 if total else 0.0


@dataclass(frozen=True)
class RankProfile:
    """What :func:`rank_profile` found.

    Attributes:
        layers: in the model's order.
        skipped: layers left alone, and why.
        calibrated: whether the spectra are those of outputs on calibration data.
    """

    layers: tuple[LayerProfile, ...]
    skipped: dict[str, str]
    calibrated: bool

    def spectra(self) -> list[Spectrum]:
        """What a rank rule looks at."""
        return [Spectrum(layer.spectrum, layer.shape) for layer in self.layers]

    def ranks(self, target: float, rule: RankRule | None = None) -> dict[str, int]:
        """A rank a layer, so that at most this share of the layers' weights is kept; of a layer kept dense min(m, n).

        Without a rule it is :func:`uniform_ranks` on a calibrated profile and :func:`welore_ranks` on any other: on MiniLM at
        75, 50 and 35 % of the weights the better of the two, but for 75 % without calibration. Of a layer whose uniform share
        is below rank 1 rank 1 is kept then, and of the others a little less.

        Raises:
            ValueError: a target outside (0, 1] or out of reach; a rule that does not give every layer a rank that it can have.
        """
        if rule is None:
            rule = uniform_ranks_from_one if self.calibrated else welore_ranks
        if not callable(rule):
            raise ValueError(f"rule must be a function such as welore_ranks or uniform_ranks, got {rule!r}")
        found: Any = rule(self.spectra(), target)
        if not isinstance(found, Sequence) or len(found) != len(self.layers):
            raise ValueError(
                f"the rule must give a list of {len(self.layers)} ranks, one for each layer; it gave {_short(found)}"
            )
        ranks = {}
        for layer, rank in zip(self.layers, found, strict=True):
            ranks[layer.name] = int(rank) if isinstance(rank, Integral) else rank
            with errors_about(layer.name):
                require_rank(ranks[layer.name], *layer.shape)
        return ranks

    def low_rank(self, target: float = 0.5) -> list[str]:
        """The layers that would be factorized to keep this share of the weights; the others stay dense."""
        ranks = self.ranks(target)
        return [layer.name for layer in self.layers if ranks[layer.name] <= layer.highest_paying_rank]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        return {
            "calibrated": self.calibrated,
            "skipped": dict(self.skipped),
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "highest_paying_rank": layer.highest_paying_rank,
                    "effective_rank": layer.effective_rank,
                    "stable_rank": layer.stable_rank,
                    "rank_99": layer.rank_99,
                    "singular_values": layer.spectrum.tolist(),
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        head = f"{'layer':<{width}}  {'m × n':>13}  pays up to  99 % energy  effective  stable"
        lines = [
            f"{layer.name:<{width}}  {layer.shape[0]:>5} × {layer.shape[1]:>5}  {layer.highest_paying_rank:>10}  "
            f"{layer.rank_99:>11}  {layer.effective_rank:>9.1f}  {layer.stable_rank:>6.1f}"
            for layer in self.layers
        ]
        return "\n".join([head, *lines, *(f"left alone: {name} ({why})" for name, why in self.skipped.items())])


def rank_profile(
    model: nn.Module,
    calibration: Batches | None = None,
    *,
    include: Names | None = None,
    exclude: Names | None = None,
    damping: float = DAMPING,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> RankProfile:
    """The spectra and ranks of a model's linear layers, ``Conv1D`` and ungrouped 2-d convolutions; nothing is changed.

    Without calibration data the spectra are those of the weights, which says how well a layer can be compressed for inputs
    that go in every direction alike. Inputs do not: with calibration data the spectra are those of W·C^{1/2}, C = E[xxᵀ], and
    say what share of the output every direction carries.

    Args:
        model: any module.
        calibration: batches for the model, as for :class:`~rankwise.compression.calibration.SecondMoments`.
        include, exclude: which layers, as in :func:`~rankwise.compression.model_layers.layers_of`; output heads and tied weights
            are left alone, and listed.
        damping: ridge on C in units of its mean diagonal.
        memory: bytes of second moments held at a time; a smaller bound takes more passes over the data.
        progress: called with (done, of) after every layer.

    Raises:
        ValueError: no layer that can be factorized, NaN or infinite weights or inputs, weights on the meta device, no batches,
            unknown names, a negative damping.

    Source: WeLore (Jaiswal et al. 2024, §3), overview §3.3; the weighing by C as in SVD-LLM (Wang et al. 2024).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from rankwise.compression import rank_profile
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.outer(torch.ones(64), torch.arange(64.0)))
        >>> [(layer.name, layer.rank_99, layer.highest_paying_rank) for layer in rank_profile(model).layers]
        [('0', 1, 31), ('2', 8, 7)]
    """
    require_damping(damping)
    found = layers_of(model, include, exclude)
    require_values(found.layers)
    moments = None if calibration is None else SecondMoments(model, found.layers, calibration, memory)
    profiles = []
    for done, layer in enumerate(found.layers, 1):
        C = None if moments is None else moments.of(layer)
        with errors_about(layer.name):
            spectrum = output_spectrum(layer.matrix(), C, damping)
        profiles.append(LayerProfile(layer.name, layer.kind, layer.shape, spectrum.cpu(), C is not None))
        if progress is not None:
            progress(done, len(found.layers))
    return RankProfile(tuple(profiles), found.skipped, moments is not None)


def _short(value: Any) -> str:
    return f"{len(value)}" if isinstance(value, Sequence) and not isinstance(value, str) else repr(value)[:100]


@contextmanager
def errors_about(name: str) -> Iterator[None]:
    """An error from inside says which layer it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
