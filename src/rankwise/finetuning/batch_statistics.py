"""Batch normalization that stays as pretraining left it."""

from torch import Tensor, nn
from torch.nn import functional


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Normalizes by the running statistics in training as in evaluation, and never changes them.

    An adapter's file holds no statistics of the layers it stands beside: had they moved in training, the adapter would
    come back onto another model than it was trained on. Rows of a batch do not see each other either.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def fix_batch_statistics(model: nn.Module) -> None:
    """Put :class:`FixedBatchNorm2d` for every ``nn.BatchNorm2d`` that keeps running statistics; names stay."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d and child.track_running_stats:
                fixed = FixedBatchNorm2d(child.num_features, eps=child.eps, affine=child.affine)
                fixed.load_state_dict(child.state_dict())
                setattr(parent, name, fixed)
