"""Deep LoRA beside ``nn.Embedding``: the weight is the matrix whose columns are the tokens' vectors."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.layers.base import DeepLoraLayer, WeightGradient


class _Columns(torch.autograd.Function):
    """Columns of a wide matrix, as rows; its gradient is zero but for those, and sparse if asked for."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, index: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.sparse = matrix.shape, sparse
        return matrix[:, index].movedim(0, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        rows, index = ctx.shape[0], index.reshape(-1)
        values = delta.reshape(-1, rows).mT
        if not ctx.sparse:
            return delta.new_zeros(ctx.shape).index_add_(1, index, values), None, None
        places = torch.stack(
            [torch.arange(rows, device=index.device).repeat_interleave(len(index)), index.repeat(rows)]
        )
        gradient = torch.sparse_coo_tensor(places, values.reshape(-1), ctx.shape, check_invariants=False)
        return gradient, None, None


class DeepLoraEmbedding(DeepLoraLayer):
    """y = W e_i for token i. Only the columns of Vᵀ of the tokens seen get a gradient; the padding token gets no update.

    With ``nn.Embedding(sparse=True)`` that gradient is a sparse tensor, for ``torch.optim.SparseAdam``.
    """

    def _table(self) -> nn.Embedding:
        return cast(nn.Embedding, self.get_base_layer())

    def project(self, x: Tensor, right: Float[Tensor, "r n"], adapter_name: str) -> Tensor:
        projected = _Columns.apply(self.without_ignored(right), x, self._table().sparse)
        # dropout of a token's input, which is 1 at its place and 0 elsewhere, leaves out the token's update
        kept = self.deeplora_dropout[adapter_name](projected.new_ones(*x.shape, 1))
        return projected * kept

    def lift(self, projected: Tensor, B: Float[Tensor, "m r"]) -> Tensor:
        update = nn.functional.linear(projected, B)
        scale = self._get_embed_scale()  # of embeddings that multiply their output, as Gemma's do
        return update if scale is None else update * scale.to(update.dtype)

    def add_gradient(self, gradient: WeightGradient, delta: Tensor, x: Tensor) -> None:
        scale = self._get_embed_scale()
        delta = delta.reshape(-1, self.out_features)
        delta = delta if scale is None else delta * scale.to(delta.dtype)
        index = x.reshape(-1)
        padding = self._table().padding_idx
        if padding is not None:
            delta, index = delta[index != padding], index[index != padding]
        matrix = delta.new_zeros(self.out_features, self.in_features)
        gradient.add_matrix(matrix.index_add_(1, index, delta.mT))

    def in_layout(self, delta: Float[Tensor, "m n"]) -> Tensor:
        return self.without_ignored(delta).mT

    def without_ignored(self, right: Float[Tensor, "r n"]) -> Float[Tensor, "r n"]:
        padding = self._table().padding_idx
        if padding is None:
            return right
        known = torch.ones_like(right[:1])
        known[:, padding] = 0
        return right * known

    def fitting_frame(self, right: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
        """Nothing for the padding token, so that what is exported means the same."""
        padding = self._table().padding_idx
        if padding is None:
            return right
        right = right.clone()
        right[padding] = 0
        return torch.linalg.qr(right)[0]

    def __repr__(self) -> str:
        return "deeplora." + super().__repr__()
