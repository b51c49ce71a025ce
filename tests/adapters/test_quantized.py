"""Quantized linear layers, where a library for them is installed: it is none of our dependencies.

pip install bitsandbytes torchao && python -m pytest tests/adapters/test_quantized.py
"""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from rankwise.adapters import DeepLoraConfig, save_as_lora
from rankwise.testing.adapter_contract import deeplora_layers, disturbed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.lin(x)))


def quantized(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.lin, torchao.Int8WeightOnlyConfig())
        return model
    library = pytest.importorskip("bitsandbytes").nn
    if kind == "8 bit":
        layer = library.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        layer = library.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(model.lin.state_dict())
    model.lin = layer.to("cpu")
    return model


def adapted(kind: str) -> Any:
    model = get_peft_model(quantized(kind), DeepLoraConfig(r=4, target_modules=["lin"], direction_dropout=0.0))
    return disturbed(model).eval()


@pytest.mark.parametrize("kind", ["8 bit", "4 bit", "torchao"])
def test_trains_beside_quantized_weights(kind: str, tmp_path: Any) -> None:
    x = torch.randn(5, 64)
    model = adapted(kind)
    (layer,) = deeplora_layers(model).values()
    with torch.no_grad():
        expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").mT
        torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)
    model(x).sum().backward()
    for factor in layer.factors("default"):
        assert factor.grad is not None
        assert factor.grad.count_nonzero()
    assert save_as_lora(model, tmp_path / "lora").layers[0].rank == 4


@pytest.mark.parametrize("kind", ["8 bit", "4 bit"])
def test_merging_requantizes(kind: str) -> None:
    model = adapted(kind)
    (layer,) = deeplora_layers(model).values()
    with torch.no_grad():
        expected = layer.get_base_weight().float() + layer.get_delta_weight("default")
        model.merge_adapter()
        error = (layer.get_base_weight().float() - expected).norm() / expected.norm()
    assert error < (0.02 if kind == "8 bit" else 0.15)  # of 256 and of 16 values a block


def test_merging_without_the_settings_of_the_quantization_is_refused() -> None:
    model = adapted("torchao")
    with pytest.raises(ValueError, match="TorchAoConfig"):
        model.merge_adapter()
