"""Every way of giving a matrix behaves like the dense matrix it stands for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.spectral import MatrixOperator, OuterProduct, SparseRows, truncated_svd
from rankwise.spectral.operators import as_operator
from tests.spectral.planted import F64_EPS, planted, projector

seeds = st.integers(0, 2**31 - 1)
WAYS = ["dense", "coo", "csr", "csc", "outer", "rows"]


def given_as(way: str, m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    """A matrix in one of the ways of giving it, and its dense float64 self, with a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    if way == "outer":
        pairs = min(m, n) + 3
        decay = 0.6 ** torch.arange(pairs, dtype=torch.float64).unsqueeze(1)
        left = (decay * torch.randn(pairs, m, dtype=torch.float64, generator=generator)).to(dtype)
        right = torch.randn(pairs, n, dtype=torch.float64, generator=generator).to(dtype)
        return OuterProduct(left, right), left.double().mT @ right.double()
    spectrum = [0.6**i for i in range(min(m, n))]
    dense = planted(m, n, spectrum, seed).matrix.to(dtype)
    keep = torch.randperm(m, generator=generator)[: max(1, 2 * m // 3)]
    dense = torch.zeros_like(dense).index_copy(0, keep, dense[keep])
    matrix = {
        "dense": lambda: dense,
        "coo": lambda: dense.to_sparse_coo(),
        "csr": lambda: dense.to_sparse_csr(),
        "csc": lambda: dense.to_sparse_csc(),
        "rows": lambda: SparseRows(keep, dense[keep], m),
    }[way]()
    return matrix, dense.double()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:Sparse CS.:UserWarning")
@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (1, 6), (6, 1)])
def test_products_and_norm_are_those_of_the_dense_matrix(way, m, n, generator):
    matrix, dense = given_as(way, m, n)
    operator = as_operator(matrix)
    assert isinstance(operator, MatrixOperator)
    assert operator.shape == (m, n)
    assert operator.dtype == torch.float64
    X, Y = (torch.randn(d, 3, dtype=torch.float64, generator=generator) for d in (n, m))
    assert torch.allclose(operator.matmul(X), dense @ X, rtol=0, atol=200 * F64_EPS)
    assert torch.allclose(operator.rmatmul(Y), dense.mT @ Y, rtol=0, atol=200 * F64_EPS)
    assert operator.squared_norm() == pytest.approx(float(dense.square().sum()), rel=100 * F64_EPS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:Sparse CS.:UserWarning")
@pytest.mark.parametrize(("m", "n"), [(20, 13), (13, 20), (240, 160), (160, 240)])
def test_the_svd_is_that_of_the_dense_matrix(way, m, n, generator):
    """Small sizes take the exact route, large ones the randomized one."""
    matrix, dense = given_as(way, m, n)
    svd = truncated_svd(matrix, 3, generator=generator)
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    scale = float(S[0])
    assert torch.allclose(svd.S, S[:3], rtol=0, atol=1e-12 * scale)
    assert torch.allclose(projector(svd.U), projector(U[:, :3]), rtol=0, atol=1e-9)
    assert torch.allclose(projector(svd.Vh.mT), projector(Vh[:3].mT), rtol=0, atol=1e-9)
    assert svd.error >= float(S[3]) * (1 - 1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:Sparse CS.:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_multiplied_in_float32(way, dtype):
    matrix, dense = given_as(way, 12, 9, dtype=dtype)
    operator = as_operator(matrix)
    assert operator.dtype == torch.float32
    svd = truncated_svd(matrix, 2)
    expected = torch.linalg.svdvals(dense)[:2]
    assert torch.allclose(svd.S.double(), expected, rtol=50 * torch.finfo(torch.float32).eps)
    assert operator.squared_norm() == pytest.approx(float(dense.square().sum()), rel=1e-5)


@given(seed=seeds, m=st.integers(1, 8), n=st.integers(1, 8), pairs=st.integers(1, 10))
def test_an_outer_product_is_the_sum_of_its_pairs(seed, m, n, pairs):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(pairs, d, dtype=torch.float64, generator=generator) for d in (m, n))
    dense = torch.zeros(m, n, dtype=torch.float64)
    for i in range(pairs):
        dense += torch.outer(left[i], right[i])
    operator = OuterProduct(left, right)
    assert torch.allclose(operator.matmul(torch.eye(n, dtype=torch.float64)), dense, atol=1e-13)
    assert torch.allclose(operator.rmatmul(torch.eye(m, dtype=torch.float64)), dense.mT, atol=1e-13)
    scale = float((left.norm(dim=1) * right.norm(dim=1)).sum()) ** 2
    assert operator.squared_norm() == pytest.approx(float(dense.square().sum()), abs=100 * F64_EPS * scale)


@pytest.mark.parametrize("remainder", [1e-2, 1e-4])
def test_the_norm_of_an_outer_product_survives_pairs_that_cancel(remainder, generator):
    """Late in training the tokens' gradients nearly cancel, and what is left of them is the gradient.

    The float32 entries determine the float64 answer to 1e-3 or better at these remainders.
    """
    a, b = torch.randn(5, 40, generator=generator), torch.randn(5, 30, generator=generator)
    left, right = torch.cat([a, -a * (1 - remainder)]), torch.cat([b, b])
    dense = left.double().mT @ right.double()
    assert OuterProduct(left, right).squared_norm() == pytest.approx(float(dense.square().sum()), rel=1e-3)


@pytest.mark.parametrize("way", ["dense", "coo", "outer", "rows"])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_squared_norm_of_a_float32_matrix_neither_overflows_nor_underflows(way, scale):
    """Entries whose squares leave float32 but not float64, into which the sum is declared to go."""
    matrix, dense = given_as(way, 6, 5, dtype=torch.float32)
    if way == "outer":
        scaled = OuterProduct(matrix.left * scale, matrix.right)
    elif way == "rows":
        scaled = SparseRows(matrix.rows, matrix.values * scale, 6)
    else:
        scaled = matrix * scale
    assert as_operator(scaled).squared_norm() == pytest.approx(float(dense.square().sum()) * scale**2, rel=1e-4, abs=0)


def test_repeated_entries_of_a_sparse_tensor_are_added_up():
    matrix = torch.sparse_coo_tensor([[0, 0, 2], [1, 1, 0]], [1.0, 2.0, 4.0], (3, 2), check_invariants=True)
    assert truncated_svd(matrix, 2).S.tolist() == pytest.approx([4.0, 3.0])
    assert as_operator(matrix).squared_norm() == pytest.approx(25.0)


def test_sparse_rows_without_rows_are_the_zero_matrix():
    empty = SparseRows(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 9)
    assert empty.shape == (9, 4)
    assert empty.squared_norm() == 0
    assert torch.equal(truncated_svd(empty, 2).S, torch.zeros(2))


def test_sparse_rows_refuse_what_does_not_fit(unchecked_shapes):
    values = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        SparseRows(torch.tensor([0, 4]), values, 4)
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        SparseRows(torch.tensor([-1, 2]), values, 4)
    with pytest.raises(ValueError, match="distinct"):
        SparseRows(torch.tensor([1, 1]), values, 4)
    with pytest.raises(ValueError, match="N rows"):
        SparseRows(torch.tensor([1]), values, 4)


def test_outer_products_refuse_unequal_numbers_of_pairs(unchecked_shapes):
    with pytest.raises(ValueError, match="same number of rows"):
        OuterProduct(torch.ones(2, 3), torch.ones(3, 3))


def test_any_object_with_the_products_will_do(generator, unchecked_shapes):
    class Diagonal:
        def __init__(self, entries):
            self.entries, self.shape = entries, (len(entries), len(entries))
            self.dtype, self.device = entries.dtype, entries.device

        def matmul(self, X):
            return self.entries.unsqueeze(1) * X

        rmatmul = matmul

        def squared_norm(self):
            return float(self.entries.square().sum())

    entries = 0.5 ** torch.arange(1000, dtype=torch.float64)
    assert truncated_svd(Diagonal(entries), 3, generator=generator).S.tolist() == pytest.approx([1, 0.5, 0.25])
    with pytest.raises(TypeError, match="squared_norm"):
        as_operator(object())
