"""A step sees the same rows, with the same say, however many processes and passes share it."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.finetuning.launching import largest_even_share
from rankwise.finetuning.step_batches import Part, StepBatches

ROWS = st.lists(st.integers(0, 10_000), min_size=1, max_size=40, unique=True)


def items(positions):
    """Rows count unequally, as texts of different lengths do in a mean over tokens."""
    return sum(1 + position % 7 for position in positions)


def steps_of(rows, per_part, passes, processes, seed, epochs=2):
    """For each step the parts of all processes and passes."""
    shared = [
        StepBatches(
            rows, per_part * passes * processes, items, seed=seed, passes=passes, processes=processes, rank=rank
        )
        for rank in range(processes)
    ]
    steps = []
    for epoch in range(epochs):
        for batches in shared:
            batches.set_epoch(epoch)
        lists = [[part for [part] in batches] for batches in shared]
        assert {len(parts) for parts in lists} == {len(shared[0])}
        for start in range(0, len(shared[0]), passes):
            steps.append([part for parts in lists for part in parts[start : start + passes]])
    return steps


@given(ROWS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_the_parts_of_a_step_are_the_rows_that_one_process_would_see(rows, per_part, passes, processes, seed):
    size = per_part * passes * processes
    alone = steps_of(rows, size, 1, 1, seed)
    for [whole], parts in zip(alone, steps_of(rows, per_part, passes, processes, seed), strict=True):
        real = [part for part in parts if part.weight > 0]
        assert Counter(itertools.chain.from_iterable(p.positions for p in real)) == Counter(whole.positions)
        assert max(len(p.positions) for p in real) <= per_part
        assert all(part.positions for part in parts), "a process without rows would not take part"


@given(ROWS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_the_plain_average_over_parts_is_the_mean_over_the_step(rows, per_part, passes, processes):
    """With a loss of its own for every item; the oracle is the mean over all items at once."""

    def mean_loss(positions):
        return sum((1 + p % 7) * (p % 13) for p in positions) / items(positions)

    alone = steps_of(rows, per_part * passes * processes, 1, 1, 0)
    for [whole], parts in zip(alone, steps_of(rows, per_part, passes, processes, 0), strict=True):
        average = sum(part.weight * mean_loss(part.positions) for part in parts) / len(parts)
        assert average == pytest.approx(mean_loss(whole.positions), rel=1e-12)


def test_epochs_differ_and_come_again():
    batches = StepBatches(range(30), 8, len, seed=1)
    first, second = list(batches), list(batches)
    assert sorted(p for [part] in first for p in part.positions) == list(range(30))
    assert first != second
    batches.set_epoch(0)
    assert list(batches) == first
    assert list(StepBatches(range(30), 8, len, seed=2)) != first


def test_one_part_is_not_weighed():
    assert all(part.weight == 1.0 for [part] in StepBatches(range(7), 3, items, seed=0))


def test_a_row_drawn_twice_is_seen_twice():
    [[part]] = StepBatches([5, 5, 6], 4, len, seed=0)
    assert isinstance(part, Part)
    assert sorted(part.positions) == [5, 5, 6]


@given(st.integers(1, 200), st.integers(0, 16))
def test_as_many_gpus_as_share_evenly(rows, gpus):
    count = largest_even_share(rows, gpus)
    assert rows % count == 0
    assert 1 <= count <= max(1, gpus)
    assert not any(rows % more == 0 for more in range(count + 1, min(rows, gpus) + 1))
