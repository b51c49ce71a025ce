"""What goes into every layer when the model reads calibration data: second moments, a bounded number at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.compression.model_layers import MatrixLayer

MEMORY = 2**31
_NUMBER = 8  # bytes: sums over many tokens are kept in float64

Batches = Iterable[Any]


class SecondMoments:
    """C = mean of xxᵀ over the inputs x of each layer, gathered when it is asked for.

    The layers are taken in groups whose matrices fit into ``memory``, each group in one pass over the data and dropped when
    the next begins. So ask in the model's order: one group means one pass however often it is asked.

    Args:
        model: run in eval mode, without gradients, as it stands when a layer is asked for.
        layers: in the model's order.
        batches: dicts of tensors (passed by name), tuples (by position) or tensors. Of a dict with a 2-d "attention_mask"
            the padded tokens are left out. Iterated once a group; a generator is kept as a list.
        memory: bytes of the matrices held at a time, n² · 8 a layer; one layer's is always held.

    Raises:
        ValueError: what is no list of batches.
    """

    def __init__(self, model: nn.Module, layers: Sequence[MatrixLayer], batches: Batches, memory: int = MEMORY):
        self.model = model
        self.batches = read_again(batches)
        self.groups = list(_groups(layers, memory))
        self.group_of = {layer.name: place for place, group in enumerate(self.groups) for layer in group}
        self.held: int | None = None
        self.moments: dict[str, Tensor] = {}

    def of(self, layer: MatrixLayer) -> Tensor | None:
        """(n, n) in float64, or None where no batch reached the layer, such as an expert that no token chose.

        Raises:
            ValueError: no batches, none with a row, or inputs with NaN or infinite entries.
        """
        wanted = self.group_of[layer.name]
        if wanted != self.held:
            self.moments.clear()  # before the next group is gathered, not after
            self.moments, self.held = self._gathered(self.groups[wanted]), wanted
        return self.moments.get(layer.name)

    def _gathered(self, layers: Sequence[MatrixLayer]) -> dict[str, Tensor]:
        gatherer = _Gatherer()
        handles = [layer.module.register_forward_pre_hook(gatherer.hook(layer)) for layer in layers]
        batches = 0
        try:
            with evaluating(self.model):
                for batch in self.batches:
                    batches += _has_rows(batch)
                    gatherer.start(batch)
                    run_on(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        if batches == 0:
            raise ValueError(
                "the calibration data holds no batch with a row in it; give at least one, better a hundred rows of real data"
            )
        return gatherer.means()


class _Gatherer:
    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.mask: Tensor | None = None
        self.last: tuple[Tensor, str, Tensor, int] | None = None

    def start(self, batch: Any) -> None:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.last = None

    def hook(self, layer: MatrixLayer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            # queries, keys and values are made of one tensor: multiplied once
            if self.last is None or self.last[0] is not x or self.last[1] != layer.kind or layer.kind != "linear":
                product, rows = self._product(layer, x)
                self.last = (x, layer.kind, product, rows)
            _, _, product, rows = self.last
            held = self.sums.get(layer.name)
            self.sums[layer.name] = product.double() if held is None else held.add_(product)
            self.rows[layer.name] = self.rows.get(layer.name, 0) + rows

        return hook

    def _product(self, layer: MatrixLayer, x: Tensor) -> tuple[Tensor, int]:
        rows = layer.input_rows(x)
        if self.mask is not None and rows.shape[:-1] == self.mask.shape:
            rows = rows[self.mask.to(rows.device)]
        rows = rows.reshape(-1, rows.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        product = rows.mT @ rows
        if not bool(torch.isfinite(product).all()):
            raise ValueError(
                f"the inputs of {layer.name} have NaN, infinite or far too large entries on the calibration data; look at "
                "the batch, or load the model in bfloat16 or float32 instead of float16"
            )
        return product, len(rows)

    def means(self) -> dict[str, Tensor]:
        return {name: total / self.rows[name] for name, total in self.sums.items() if self.rows[name]}


def read_again(batches: Batches) -> Batches:
    """Batches that can be gone through several times: those of a generator as a list.

    Raises:
        ValueError: no list of batches, such as a single one of them.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes | Mapping | Tensor):
        raise ValueError(
            "calibration must be a list of batches, or a DataLoader: dicts of tensors, tuples or tensors; got "
            f"{'one batch, which goes into a list' if isinstance(batches, Mapping | Tensor) else repr(batches)[:100]}"
        )
    return list(batches) if isinstance(batches, Iterator) else batches


def _has_rows(batch: Any) -> bool:
    """Whether there is anything in a batch; an error if it is none."""
    if not isinstance(batch, Mapping | tuple | list | Tensor):
        raise ValueError(
            f"a batch of the calibration data must be a dict of tensors, a tuple or a tensor, got {repr(batch)[:100]}"
        )
    values = batch.values() if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else batch
    return any(not isinstance(value, Tensor) or value.numel() > 0 for value in values)


def run_on(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a dict by name, a tuple or list by position, else the one argument."""
    where = next(iter(model.parameters())).device
    if isinstance(batch, Mapping):
        return model(**{key: _moved(value, where) for key, value in batch.items()})
    if isinstance(batch, tuple | list):
        return model(*(_moved(value, where) for value in batch))
    return model(_moved(batch, where))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients; the mode of every module is restored afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training:
            module.training = was


def _moved(value: Any, where: torch.device) -> Any:
    return value.to(where) if isinstance(value, Tensor) else value


def _groups(layers: Sequence[MatrixLayer], memory: int) -> Iterator[list[MatrixLayer]]:
    group: list[MatrixLayer] = []
    used = 0
    for layer in layers:
        size = _NUMBER * layer.shape[1] ** 2
        if group and used + size > memory:
            yield group
            group, used = [], 0
        group.append(layer)
        used += size
    if group:
        yield group
