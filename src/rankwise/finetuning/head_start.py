"""Where a head starts: fitted to the labels on the pretrained model's features, before anything below it moves.

A head drawn at random sends a random gradient into the model: Deep LoRA would place its subspaces by it, and every method
spends its first steps on repairing the damage. Fitting the head first (linear probing, then fine-tuning: Kumar et al.,
2022) costs one forward pass over the labelled rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning.batching import model_inputs
from rankwise.finetuning.tasks import HeadTask, Task

PENALTY = 0.1  # of ‖W‖²/2 beside the mean loss, for features of unit mean square
_ROWS = 64  # rows of one forward pass


def fit_head(model: nn.Module, task: Task, positions: Sequence[int]) -> None:
    """Set the last linear layer of the model's head by a ridge-penalized fit on these rows; no head, nothing to do.

    Classes: multinomial logistic regression (scikit-learn), with the task's class weights. Regression: ridge regression of
    the standardized score. Words of a token task: at most ``task.fitted_items`` of them, of rows in a random order that is
    always the same. Features are what the layer sees in eval mode on the pretrained model, centred and divided by one number, so
    that the penalty means the same for every model.

    Raises:
        UserError: the model has no linear output layer, or its features are not finite.
    """
    if not isinstance(task, HeadTask):
        return
    layer = _output_layer(model, task)
    features, targets = _labelled_features(model, layer, task, positions)
    if not np.isfinite(features).all():
        raise UserError(
            "the pretrained model gives NaN or infinite features on the labelled rows; is its file damaged?"
        )
    # without a bias there is nothing to make up for a mean that was taken away
    mean = features.mean(0) if layer.bias is not None else np.zeros(features.shape[1])
    scale = float(np.sqrt(np.mean((features - mean) ** 2)))
    if scale == 0:  # all rows look alike: nothing to fit, the head stays as it is
        return
    weight, bias = task.fit_linear((features - mean) / scale, targets, PENALTY, intercept=layer.bias is not None)
    weight = weight / scale
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.as_tensor(bias - weight @ mean))


def _output_layer(model: nn.Module, task: HeadTask) -> nn.Linear:
    outputs = int(model.config.num_labels)  # type: ignore[union-attr,arg-type]
    body = {id(p) for p in model.base_model.parameters()}  # type: ignore[union-attr]
    linear = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs and id(module.weight) not in body
    ]
    if not linear:
        raise UserError(
            f"{task.name}: found no linear output layer with {outputs} outputs to fit in {type(model).__name__}; "
            "start its head at random with --head-start random"
        )
    return linear[-1]


def _labelled_features(model: nn.Module, layer: nn.Linear, task: HeadTask, positions: Sequence[int]) -> tuple[Any, Any]:
    """What ``layer`` sees of everything that has a label, (n, d) in float64, and the labels (n,)."""
    where = next(model.parameters()).device
    calls: list[tuple[Tensor, Tensor]] = []
    features: list[Tensor] = []
    targets: list[Tensor] = []

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0].float(), output.float()))

    order, limit = list(positions), task.fitted_items
    if limit is not None:  # rows of a sorted file would not do for all
        order = [positions[i] for i in np.random.default_rng(0).permutation(len(positions))]
    was_training = model.training
    handle = layer.register_forward_hook(remember)
    model.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(order), _ROWS):
                batch = task.collate(order[first : first + _ROWS])
                logits = model(**{key: value.to(where) for key, value in model_inputs(batch).items()}).logits.float()
                seen, output = calls.pop()
                found, labels = task.labelled_features(seen, output, logits, batch)
                features.append(found.cpu())
                targets.append(labels.cpu())
                if limit is not None and sum(map(len, targets)) >= limit:
                    break
    finally:
        handle.remove()
        model.train(was_training)
    return torch.cat(features)[:limit].numpy().astype(np.float64), torch.cat(targets)[:limit].numpy()
