"""Starts of a LoRA other than a random A and B = 0: from the weight, from what the layers see, or from their gradients.

PiSSA, OLoRA, CorDA and LoRA-GA start from B₀A₀ ≠ 0 and take it out of the frozen weight: y = (W − B₀A₀)x + BAx. The trained
adapter then fits the changed weight alone. Here the weight stays as it is and the same function is
y = Wx + [B, −B₀][A; A₀]x: a plain LoRA of rank 2r whose second half is not trained. It loads on the unchanged model in every
LoRA runtime, and a checkpoint holds all of it. That is what PEFT's conversion after training
(``path_initial_model_for_weight_conversion``) writes too; to have it from the start costs the arithmetic of a second LoRA.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import UserError
from rankwise.spectral import truncated_svd

if TYPE_CHECKING:
    from rankwise.finetuning.settings import FinetuneSettings
    from rankwise.finetuning.tasks import Task

_ADAPTER = "default"
Pair = tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]  # A₀ and B₀


@dataclass
class InputMoments:
    """Σx and Σxxᵀ of what a layer saw, and how many x: (n,), (n, n)."""

    total: Tensor | float = 0.0
    products: Tensor | float = 0.0
    count: int = 0

    def add(self, x: Float[Tensor, "k n"]) -> None:
        wide = x.double()
        self.total, self.products, self.count = (
            self.total + wide.sum(0),
            self.products + wide.mT @ wide,
            self.count + len(x),
        )

    @property
    def second_moment(self) -> Float[Tensor, "n n"]:
        return torch.as_tensor(self.products) / self.count

    @property
    def covariance(self) -> Float[Tensor, "n n"]:
        mean = torch.as_tensor(self.total) / self.count
        return self.second_moment - torch.outer(mean, mean)


def start_from_weights(kind: str) -> Callable[[nn.Module, "FinetuneSettings"], None]:
    """PEFT's start ``init_lora_weights=kind`` of every layer, beside the unchanged weight."""

    def start(model: nn.Module, settings: "FinetuneSettings") -> None:
        with _drawn_by(settings.seed):
            for _, layer in _lora_layers(model):
                start_beside(layer, pefts_start(layer, kind, settings.r))
        hold_the_start(model, settings)

    return start


def hold_the_start(model: nn.Module, settings: "FinetuneSettings") -> None:
    """Keep the second half of every LoRA's directions as it is, by taking its gradient away.

    AdamW's step from no gradient is none, as long as there is no weight decay.
    """
    for _, layer in _lora_layers(model):
        for factor, dim in ((layer.lora_A, 0), (layer.lora_B, 1)):
            weight = factor[_ADAPTER].weight
            weight.register_hook(partial(_without_second_half, dim=dim, start=settings.r))


def prepare_eva(
    model: nn.Module, task: "Task", settings: "FinetuneSettings", batches: Sequence[dict[str, Any]]
) -> None:
    """EVA (Paischer et al. 2024): A are the r directions in which a layer's inputs vary most, B is 0.

    From the inputs' covariance at once, where PEFT updates a principal component analysis batch by batch. Every layer keeps
    rank r (PEFT's ρ = 1), so that ``--rank`` means the same for it as for the others.
    """
    moments = input_moments(model, task, batches)
    for name, layer in _lora_layers(model):
        A = layer.lora_A[_ADAPTER].weight
        rank = min(A.shape)  # all there are of a layer with fewer inputs than r; the other rows stay as drawn
        generator = torch.Generator().manual_seed(settings.seed)
        found = truncated_svd(moments[name].covariance, rank, generator=generator, estimate_error=False)
        with torch.no_grad():
            A[:rank].copy_(found.U.mT)


def prepare_corda(
    model: nn.Module, task: "Task", settings: "FinetuneSettings", batches: Sequence[dict[str, Any]]
) -> None:
    """CorDA (Yang et al. 2024), instruction-previewed: the top r of the SVD of W·C with C = E[xxᵀ], times C⁻¹."""
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import CordaEigens, collect_eigens_for_layer

    moments, r = input_moments(model, task, batches), settings.r
    config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig())
    for name, layer in _lora_layers(model):
        base: Any = _alone(layer)
        base.covariance_matrix = moments[name].second_moment.float()
        found = collect_eigens_for_layer(base, config)
        where = base.weight.device
        base.eigens = CordaEigens(
            S_WC=found.S_WC[:r], U_WC=found.U_WC[:, :r].to(where), V_WC=found.V_WC[:, :r].to(where)
        )
        start_beside(layer, pefts_start(layer, "corda", r, base, corda_config=CordaConfig()))


def prepare_loraga(
    model: nn.Module, task: "Task", settings: "FinetuneSettings", batches: Sequence[dict[str, Any]]
) -> None:
    """LoRA-GA (Wang et al. 2024): A and B from the singular vectors of the first gradient of the weight itself."""
    from peft.tuners.lora import LoraGAConfig

    gradients = weight_gradients(model, task, batches)
    with _drawn_by(settings.seed):
        for name, layer in _lora_layers(model):
            base: Any = _alone(layer)
            base._peft_loraga_grad = _as_linear(layer.get_base_layer(), gradients[name])
            pair = pefts_start(layer, "lora_ga", settings.r, base, lora_ga_config=LoraGAConfig())
            start_beside(layer, pair)


@torch.no_grad()
def input_moments(model: nn.Module, task: "Task", batches: Sequence[dict[str, Any]]) -> dict[str, InputMoments]:
    """What every LoRA layer sees when the task's loss of these batches is computed, padding left out.

    Raises:
        UserError: a layer sees nothing, or numbers that are not finite.
    """
    layers = dict(_lora_layers(model))
    moments = {name: InputMoments() for name in layers}
    mask: list[Tensor | None] = [None]

    def remember_mask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask[0] = kwargs.get("attention_mask")

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            real = mask[0]
            if real is not None and real.shape == x.shape[:-1]:
                x = x[real.bool()]
            moments[name].add(x.reshape(-1, x.shape[-1]))

        return hook

    base = model.get_base_model()  # type: ignore[operator]
    handles = [base.register_forward_pre_hook(remember_mask, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with _evaluating(model):
            for batch in _on_device(model, batches):
                task.loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in moments.items():
        if not seen.count:
            raise UserError(
                f"no row of the first batch reaches {name}, so that its start cannot be found; --init-batches takes more"
            )
        if not bool(torch.isfinite(torch.as_tensor(seen.products)).all()):
            raise UserError(f"what {name} sees of the training rows is not finite; is the model's file damaged?")
    return moments


def weight_gradients(model: nn.Module, task: "Task", batches: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The gradient of every adapted layer's own weight, of the task's loss averaged over these batches.

    Raises:
        UserError: a layer that the loss does not depend on, or a gradient that is not finite.
    """
    weights = {name: layer.get_base_layer().weight for name, layer in _lora_layers(model)}
    total: dict[str, Tensor] = {}
    with _evaluating(model), torch.enable_grad():
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in _on_device(model, batches):
            found = torch.autograd.grad(task.loss(model, batch), list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    total[name] = total.get(name, 0) + gradient / len(batches)
    for name in weights:
        if name not in total or not bool(torch.isfinite(total[name]).all()):
            what = "has no finite gradient at" if name in total else "does not depend on"
            raise UserError(f"the loss of the first batch {what} {name}, so that its start cannot be found")
    return total


def pefts_start(layer: Any, kind: Any, r: int, base: nn.Module | None = None, **options: Any) -> Pair:
    """A₀ (r, n) and B₀ (m, r) as PEFT would start this layer with scaling 1; the layer itself is left alone."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=r, lora_alpha=r, init_lora_weights=kind, **options)
    started = Linear(base or _alone(layer), _ADAPTER, config=config, r=r, lora_alpha=r)
    A, B = (side[_ADAPTER].weight for side in (started.lora_A, started.lora_B))
    return A.detach(), B.detach()  # type: ignore[operator]


@torch.no_grad()
def start_beside(layer: Any, pair: Pair) -> None:
    """[A₀; A₀] and [B₀, −B₀]: nothing at the start, and PEFT's start once the second half is counted to the weight."""
    A, B = pair
    layer.lora_A[_ADAPTER].weight.copy_(torch.cat([A, A]))
    layer.lora_B[_ADAPTER].weight.copy_(torch.cat([B, -B], dim=1))


@torch.no_grad()
def start_from_gaussian(model: nn.Module) -> None:
    """N(0, 1) in B and zeros in A, the other way round than PEFT: still a no-op, with much larger first steps."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_()
        elif ".lora_A." in name:
            parameter.zero_()


def draw_noise_when_asked(model: nn.Module, settings: "FinetuneSettings") -> None:
    """Let MonteCLoRA draw its noise at the step that takes it: what is drawn ahead no checkpoint holds."""
    for _, layer in _lora_layers(model):
        noise = layer.lora_monteclora_sampler[_ADAPTER].sampler
        noise.index = noise.buffer_size


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _alone(layer: Any) -> nn.Linear:
    """The layer below the adapter as a linear layer of its own, for PEFT to take its start out of."""
    base: Any = layer.get_base_layer()
    weight = _as_linear(base, base.weight)
    alone = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    alone.weight = nn.Parameter(weight.detach().clone())
    return alone


def _as_linear(layer: nn.Module, matrix: Tensor) -> Tensor:
    """(m, n), as ``nn.Linear`` has it, of a matrix in the shape of this layer's weight: GPT-2's are stored as (n, m)."""
    return matrix.mT if isinstance(layer, Conv1D) else matrix


def _without_second_half(gradient: Tensor, dim: int, start: int) -> Tensor:
    gradient = gradient.clone()
    gradient.narrow(dim, start, gradient.shape[dim] - start).zero_()
    return gradient


def _on_device(model: nn.Module, batches: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    where = next(model.parameters()).device
    for batch in batches:
        yield {key: value.to(where) if isinstance(value, Tensor) else value for key, value in batch.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; every flag restored afterwards. The adapter still is a no-op: this is the pretrained model."""
    training = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for parameter, was in trained:
            parameter.requires_grad_(was)
        for module, was in training:
            module.training = was


@contextmanager
def _drawn_by(seed: int) -> Iterator[None]:
    """Random numbers from this seed, and the generator as it was afterwards: a start is the same wherever it is made."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
