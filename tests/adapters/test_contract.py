"""The adapter contract, run for small real architectures and for every variant and two depths."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.adapters import DeepLoraConfig
from rankwise.adapters.layers import scaled_left
from rankwise.factorizations import identity_factors
from rankwise.testing import AdapterContract
from tests.tiny_models import Mlp, tiny_bert, tiny_gpt2, tiny_llama, token_batch


class MlpCase(AdapterContract):
    settings: dict[str, Any] = {}  # noqa: RUF012  # read only

    def make_model(self) -> nn.Module:
        torch.manual_seed(0)
        return Mlp()

    def make_config(self, **changes: Any) -> DeepLoraConfig:
        return DeepLoraConfig(**{"r": 4, "target_modules": ["lin0", "lin1"], **self.settings, **changes})

    def make_batch(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(6, 20, generator=generator), torch.randn(6, 4, generator=generator)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])


class TransformerCase(AdapterContract):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss


class TestMlp(MlpCase):
    pass


class TestMlpCompressed(MlpCase):
    settings = {"variant": "compressed"}  # noqa: RUF012


class TestMlpSpectral(MlpCase):
    settings = {"variant": "spectral"}  # noqa: RUF012


class TestMlpRandom(MlpCase):
    settings = {"variant": "random"}  # noqa: RUF012


class TestMlpOneInnerFactor(MlpCase):
    settings = {"inner_depth": 1}  # noqa: RUF012


class TestMlpCompressedOneInnerFactor(MlpCase):
    settings = {"variant": "compressed", "inner_depth": 1}  # noqa: RUF012


class TestMlpSpectralOneInnerFactor(MlpCase):
    settings = {"variant": "spectral", "inner_depth": 1}  # noqa: RUF012


class TestMlpOddWidthTwoInnerFactors(MlpCase):
    settings = {"variant": "compressed", "r": 5, "inner_depth": 2, "rank_pattern": {"lin1": 3}}  # noqa: RUF012


class TestMlpWide(MlpCase):
    """Width 16 and above: large enough for the matrix product to take another code path."""

    settings = {"variant": "compressed", "r": 18, "rank_pattern": {"lin1": 24}}  # noqa: RUF012


class TestBert(TransformerCase):
    def make_model(self) -> nn.Module:
        return tiny_bert()

    def make_config(self, **changes: Any) -> DeepLoraConfig:
        return DeepLoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS", **changes})

    def make_batch(self) -> Any:
        return token_batch()


class TestBertCompressed(TestBert):
    def make_config(self, **changes: Any) -> DeepLoraConfig:
        return super().make_config(**{"variant": "compressed", **changes})


class TestLlama(TransformerCase):
    def make_model(self) -> nn.Module:
        return tiny_llama()

    def make_config(self, **changes: Any) -> DeepLoraConfig:
        return DeepLoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **changes})

    def make_batch(self) -> Any:
        return token_batch(labels="tokens")


class TestGpt2(TransformerCase):
    """``Conv1D``: linear layers whose weight is stored as (in, out)."""

    def make_model(self) -> nn.Module:
        return tiny_gpt2(bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

    def make_config(self, **changes: Any) -> DeepLoraConfig:
        return DeepLoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})

    def make_batch(self) -> Any:
        return token_batch(labels="tokens")


class TestGpt2Compressed(TestGpt2):
    def make_config(self, **changes: Any) -> DeepLoraConfig:
        return super().make_config(**{"variant": "compressed", **changes})


class TestEmbedding(TestBert):
    """Word embeddings, with a padding token, and positions."""

    def make_config(self, **changes: Any) -> DeepLoraConfig:
        return super().make_config(**{"target_modules": ["word_embeddings", "position_embeddings"], **changes})


class TestEmbeddingCompressed(TestEmbedding):
    def make_config(self, **changes: Any) -> DeepLoraConfig:
        return super().make_config(**{"variant": "compressed", "r": 6, **changes})


class ConvNet(nn.Module):
    """Every option of a convolution that changes what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.shapes = nn.Conv2d(8, 10, (3, 2), dilation=2, padding="same", bias=False)
        self.lines = nn.Conv1d(10, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shapes(torch.tanh(self.edges(x))))
        return self.head(torch.tanh(self.lines(x.flatten(2))).mean(-1))


class TestConvolutions(MlpCase):
    def make_model(self) -> nn.Module:
        torch.manual_seed(0)
        return ConvNet()

    def make_config(self, **changes: Any) -> DeepLoraConfig:
        targets = {"target_modules": ["edges", "shapes", "lines"]}
        return super().make_config(**{**targets, **changes})

    def make_batch(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(6, 3, 12, 10, generator=generator), torch.randn(6, 4, generator=generator)


class TestConvolutionsCompressed(TestConvolutions):
    settings = {"variant": "compressed"}  # noqa: RUF012


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [1, 2, 8, 16, 33, 64, 128])
def test_identity_factors_give_exactly_no_update(width: int, depth: int, dtype: torch.dtype) -> None:
    """At every width: matrix products of other sizes may round, or fuse the subtraction, differently."""
    frame = torch.eye(max(width, 5), width, dtype=dtype)
    for init_scale in (1e-3, 1e-2, 0.07, 0.3, 0.5, 1.1):
        inner = identity_factors(depth, width, init_scale, dtype=dtype)
        assert not scaled_left(frame, inner, init_scale).count_nonzero(), init_scale
