"""A share of the weights to keep, spread over layers: what is promised of every rule, and what tells them apart."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise.compression import (
    Spectrum,
    highest_paying_rank,
    min_max_normalized,
    ranks_for_energy,
    uniform_ranks,
    welore_ranks,
)
from rankwise.compression.rank_rules import uniform_ranks_from_one


def cost(shape: tuple[int, int], rank: int) -> int:
    """Numbers kept, from the definition: the pair if it is smaller, the matrix otherwise."""
    m, n = shape
    return min(rank * (m + n), m * n)


def share(spectra: list[Spectrum], ranks: list[int]) -> float:
    kept = sum(cost(spectrum.shape, rank) for spectrum, rank in zip(spectra, ranks, strict=True))
    return kept / sum(m * n for _, (m, n) in spectra)


@st.composite
def models(draw: st.DrawFn) -> list[Spectrum]:
    sides = st.integers(2, 40)
    spectra = []
    for _ in range(draw(st.integers(1, 5))):
        shape = (draw(sides), draw(sides))
        # few different values: ties within a layer and between layers
        values = draw(st.lists(st.integers(0, 6), min_size=min(shape), max_size=min(shape)))
        spectra.append(Spectrum(torch.tensor(sorted(values, reverse=True), dtype=torch.float64), shape))
    return spectra


@given(models(), st.floats(0.01, 1))
def test_the_target_is_kept_and_met_to_one_direction(spectra, target):
    shapes = [spectrum.shape for spectrum in spectra]
    least = share(spectra, [1] * len(spectra))
    if target < least:
        with pytest.raises(ValueError, match="cannot be reached: rank 1 in every layer"):
            welore_ranks(spectra, target)
        return
    ranks = welore_ranks(spectra, target)
    assert all(1 <= rank <= min(shape) for rank, shape in zip(ranks, shapes, strict=True))
    # no rank that is not smaller than the matrix: those layers are dense
    assert all(
        rank == min(shape) or rank * (shape[0] + shape[1]) < shape[0] * shape[1]
        for rank, shape in zip(ranks, shapes, strict=True)
    )
    total = sum(m * n for m, n in shapes)
    found = share(spectra, ranks)
    assert found <= target + 1e-12
    assert found > target - max(m + n for m, n in shapes) / total or found == share(spectra, [min(s) for s in shapes])


@given(models(), st.floats(0.2, 1), st.floats(0.2, 1))
def test_a_larger_target_keeps_no_layer_at_less(spectra, first, second):
    low, high = sorted((first, second))
    try:
        below = welore_ranks(spectra, low)
    except ValueError:
        return
    above = welore_ranks(spectra, high)
    assert all(a <= b for a, b in zip(below, above, strict=True))


def test_it_is_the_papers_threshold_found_by_trying_all():
    """Ranks count normalized singular values above one number; all numbers are tried."""
    torch.manual_seed(1)
    shapes = [(30, 40), (25, 25), (50, 20)]
    spectra = [Spectrum(torch.rand(min(shape)).sort(descending=True).values, shape) for shape in shapes]
    normalized = [(s - s.min()) / (s.max() - s.min()) for s, _ in spectra]

    def counts(threshold: float) -> list[int]:
        return [max(1, int((values >= threshold).sum())) for values in normalized]

    for target in (0.2, 0.4, 0.6, 0.8):
        fitting = [counts(float(v)) for v in torch.cat(normalized) if share(spectra, counts(float(v))) <= target]
        best = max(fitting, key=lambda ranks: (share(spectra, ranks), sum(ranks)))
        dense = [min(shape) if r > highest_paying_rank(shape) else r for r, shape in zip(best, shapes, strict=True)]
        assert welore_ranks(spectra, target) == dense


def test_steep_spectra_give_up_more_than_slow_ones_whatever_their_scale():
    steep, slow = 0.8 ** torch.arange(64.0), torch.linspace(1, 0.5, 64)
    for scale in (1e-3, 1.0, 1e3):
        first, second = welore_ranks([Spectrum(scale * steep, (64, 64)), Spectrum(slow, (64, 64))], 0.6)
        assert first < 16
        assert second == 64  # dense


def test_equal_layers_are_cut_equally():
    spectra = [Spectrum(torch.ones(32), (32, 32))] * 4
    ranks = welore_ranks(spectra, 0.5)
    assert max(ranks) - min(ranks) <= 1
    assert share(spectra, ranks) == pytest.approx(0.5)


@given(st.integers(1, 60), st.integers(1, 60))
def test_the_highest_paying_rank_is_the_last_that_makes_the_matrix_smaller(m, n):
    k = highest_paying_rank((m, n))
    assert k * (m + n) < m * n <= (k + 1) * (m + n)


@given(models(), st.floats(0.3, 1))
def test_the_uniform_rule_keeps_at_most_its_share_of_every_layer(spectra, target):
    try:
        ranks = uniform_ranks(spectra, target)
    except ValueError:
        assert any((m + n) / (m * n) > target for _, (m, n) in spectra)
        return
    for (_, (m, n)), rank in zip(spectra, ranks, strict=True):
        assert cost((m, n), rank) <= target * m * n + 1e-9
        assert target == 1 or (rank + 1) * (m + n) > target * m * n


@given(models(), st.floats(0.05, 1))
def test_where_a_share_is_below_rank_one_the_target_is_kept_all_the_same(spectra, target):
    try:
        expected = uniform_ranks(spectra, target)
    except ValueError:
        least = share(spectra, [1] * len(spectra))
        if target < least:
            with pytest.raises(ValueError, match="cannot be reached: rank 1 in every layer"):
                uniform_ranks_from_one(spectra, target)
            return
        ranks = uniform_ranks_from_one(spectra, target)
        assert all(1 <= rank <= min(shape) for rank, (_, shape) in zip(ranks, spectra, strict=True))
        assert share(spectra, ranks) <= target + 1e-12
    else:
        assert uniform_ranks_from_one(spectra, target) == expected


def test_the_others_go_on_having_one_share_beside_a_layer_of_rank_one():
    shapes = [(2, 40), (64, 64), (64, 64), (200, 50)]
    ranks = uniform_ranks_from_one([Spectrum(torch.ones(min(shape)), shape) for shape in shapes], 0.4)
    assert ranks[0] == 1  # more than 0.4 of it
    for (m, n), rank in list(zip(shapes, ranks, strict=True))[1:]:
        assert rank == pytest.approx(0.4 * m * n / (m + n), abs=1)


def test_ranks_for_energy_are_the_smallest_that_hold_it():
    S = torch.tensor([4.0, 2.0, 1.0, 0.5])
    energies = S.square().cumsum(0) / S.square().sum()
    for energy in (0.5, 0.9, 0.99, 1.0):
        expected = next(k for k, held in enumerate(energies.tolist(), 1) if held >= energy - 1e-6)
        assert ranks_for_energy([Spectrum(S, (4, 9))], energy) == [expected]
    assert ranks_for_energy([Spectrum(torch.zeros(3), (3, 3))], 0.9) == [1]


@pytest.mark.parametrize("target", [0.0, -0.5, 1.5, float("nan"), True, "half"])
@pytest.mark.parametrize("rule", [welore_ranks, uniform_ranks, uniform_ranks_from_one])
def test_no_share_is_refused(rule, target):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        rule([Spectrum(torch.ones(4), (4, 4))], target)


def test_normalized_spectra_run_from_one_to_zero_and_flat_ones_are_all_ones():
    def listed(values: list[float]) -> list[float]:
        found: Tensor = min_max_normalized(torch.tensor(values))
        return found.tolist()

    assert listed([3.0, 2.0, 1.0]) == [1.0, 0.5, 0.0]
    assert listed([2.0, 2.0, 2.0]) == [1.0, 1.0, 1.0]
    assert listed([0.0, 0.0]) == [0.0, 0.0]
    for a, b in itertools.pairwise((1e-3, 1.0, 1e3)):
        assert listed([a * 5, a * 2, a]) == pytest.approx(listed([b * 5, b * 2, b]))
