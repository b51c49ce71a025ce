import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.completion.observations import Observations, as_observations
from rankwise.errors import UserError


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_sorting_keeps_every_entry_and_averages_duplicates(data):
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    count = data.draw(st.integers(1, 25))
    rows = data.draw(st.lists(st.integers(0, height - 1), min_size=count, max_size=count))
    columns = data.draw(st.lists(st.integers(0, width - 1), min_size=count, max_size=count))
    values = data.draw(st.lists(st.floats(-100, 100), min_size=count, max_size=count))
    expected: dict[tuple[int, int], list[float]] = {}
    for r, c, v in zip(rows, columns, values, strict=True):
        expected.setdefault((r, c), []).append(v)
    seen = Observations.from_coordinates(rows, columns, values, (height, width))
    got = dict(zip(zip(seen.row_of_each().tolist(), seen.columns.tolist(), strict=True), seen.values, strict=True))
    assert list(got) == sorted(expected)
    assert seen.merged == count - len(expected)
    for place, several in expected.items():
        assert got[place] == pytest.approx(np.mean(several), abs=1e-9)
    across = seen.transposed()
    np.testing.assert_array_equal(across.matrix().toarray(), seen.matrix().toarray().T)
    np.testing.assert_array_equal(across.transposed().columns, seen.columns)
    np.testing.assert_array_equal(seen.rows, seen.row_of_each()[seen.order])


def test_every_way_to_give_a_matrix_is_the_same():
    holes = np.array([[1.0, np.nan, 0.0], [np.nan, 5.0, np.nan]])
    stored = sp.coo_array(([1.0, 0.0, 5.0], ([0, 0, 1], [0, 2, 1])), shape=(2, 3))
    ways = [
        holes,
        pd.DataFrame(holes),
        stored,
        stored.tocsr(),
        stored.tocsc(),
        sp.csr_matrix(stored),
        ([0, 0, 1], [0, 2, 1], [1, 0, 5], (2, 3)),
    ]
    for way in ways:
        seen = as_observations(way)
        assert seen.values.tolist() == [1.0, 0.0, 5.0]  # the explicit zero is an observation
        assert seen.columns.tolist() == [0, 2, 1]
        assert seen.row_counts.tolist() == [2, 1]


def test_subset_and_joined():
    seen = as_observations(np.array([[1.0, 2.0], [np.nan, 4.0]]))
    assert seen.subset(np.array([True, False, True])).values.tolist() == [1.0, 4.0]
    later = as_observations(([1, 0, 2], [0, 1, 0], [3.0, 20.0, 5.0], (3, 2)))
    joined = seen.joined(later)
    np.testing.assert_array_equal(joined.matrix().toarray(), [[1, 20], [3, 4], [5, 0]])  # the later value counts


@pytest.mark.parametrize(
    ("X", "says"),
    [
        (np.full((2, 2), np.nan), "no entry is observed"),
        (np.array([[1.0, np.inf]]), "finite"),
        (np.array([1.0, 2.0]), "2 dimensions"),
        (np.array([["a", "b"]]), "numeric"),
        (np.array([[1 + 2j]]), "numeric"),
        (([0], [0], [1.0]), "tuple"),
        (([0, 1], [0], [1.0], (2, 2)), "equally long"),
        (([2], [0], [1.0], (2, 2)), "row index 2 is outside"),
        (([-1], [0], [1.0], (2, 2)), "row index -1 is outside"),
        (([0], [5], [1.0], (2, 2)), "column index 5 is outside"),
        (([0.5], [0], [1.0], (2, 2)), "whole numbers"),
        (([2**40], [0], [1.0], (2, 2)), "outside"),
        (([0], [0], [np.nan], (2, 2)), "finite"),
        (([0], [0], ["x"], (2, 2)), "numbers"),
        (([0], [0], [1.0], (0, 2)), "shape"),
        (([0], [0], [1.0], "ab"), "shape"),
        (([0], [0], [1.0], (2**40, 2)), "shape"),
        (([], [], [], (2, 2)), "no entry is observed"),
        (sp.csr_array((3, 3)), "no entry is observed"),
    ],
)
def test_unusable_input_is_one_readable_error(X, says):
    with pytest.raises(UserError, match=says):
        as_observations(X)


def test_values_too_large_for_float32_are_refused():
    with pytest.raises(UserError, match="too large for float32"), np.errstate(over="ignore"):
        as_observations(([0], [0], [1e300], (1, 1)), np.float32)
