"""Full-width factors beside a linear layer, and what the compressed adapter is to them."""

import pytest
import torch
from torch import nn

from rankwise.adapters.full_width import FullWidthLinear, add_full_width
from rankwise.diagnostics import adapter_spectra
from tests.tiny_models import Mlp

SHAPES = [(8, 8), (8, 5), (5, 8)]


@pytest.mark.parametrize(("columns", "rows"), SHAPES, ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_output_and_gradients_are_those_of_the_dense_product(rows: int, columns: int, depth: int) -> None:
    torch.manual_seed(0)
    base = nn.Linear(columns, rows).double()
    layer = FullWidthLinear(base, depth, 0.5)
    x = torch.randn(7, columns, dtype=torch.float64)
    dense = base.weight.detach().clone()
    for_product = [w.detach().clone().requires_grad_() for w in layer.deep.weights]
    product = for_product[0]
    for weight in for_product[1:]:
        product = weight @ product
    expected = x @ (dense + product).mT + base.bias
    torch.testing.assert_close(layer(x), expected)
    probe = torch.randn_like(expected)
    found = torch.autograd.grad((layer(x) * probe).sum(), list(layer.deep.weights))
    for got, wanted in zip(found, torch.autograd.grad((expected * probe).sum(), for_product), strict=True):
        torch.testing.assert_close(got, wanted)
    left, right = layer.factor_pair()
    torch.testing.assert_close(left @ right, product)


@pytest.mark.parametrize(("columns", "rows"), SHAPES, ids=str)
def test_every_factor_starts_semi_orthogonal_at_epsilon(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    for weight in FullWidthLinear(nn.Linear(columns, rows), 3, 1e-3).deep.weights:
        values = torch.linalg.svdvals(weight.detach())
        torch.testing.assert_close(values, torch.full_like(values, 1e-3), rtol=1e-4, atol=0)


def test_start_is_the_base_model_up_to_the_size_of_the_product() -> None:
    torch.manual_seed(0)
    model = Mlp()
    x = torch.randn(6, 20)
    before = model(x).detach()
    add_full_width(model, ["lin0", "lin1"], 3, 1e-2)
    assert (model(x) - before).abs().max() < 1e-4
    spectra = adapter_spectra(model)
    assert [layer.name for layer in spectra] == ["lin0", "lin1"]
    assert spectra[0].singular_values[0] == pytest.approx(1e-6, rel=1e-3)


def test_only_linear_layers() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="0 is a LayerNorm"):
        add_full_width(model, ["0"], 3, 1e-3)
