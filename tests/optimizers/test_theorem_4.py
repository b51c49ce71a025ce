"""Overview Theorem 4: GaLore with gradient descent is ReLoRA whose B is U_r of the gradient and frozen; where it ends, too.

Both train the two hidden layers of one network (left projector, m ≤ n), refresh at the same steps and start alike. With LoRA's
scale s, A's gradient is s·PᵀG and its step counts s times: GaLore's scale is α = s². Adam divides a gradient's scale out: α = s.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rankwise.optimizers import GaLoreAdamW, GaLoreSGD
from rankwise.optimizers.factor_pairs import LoraPair
from rankwise.optimizers.relora import ReLora, base_layer
from rankwise.optimizers.state_pruning import PruneRandomly, ResetState, StatePruning
from tests.tiny_models import Mlp

F64 = torch.float64
RANK, EVERY, STEPS, ETA = 4, 5, 23, 0.05  # five subspaces, the last of them cut short
LAYERS = ("lin0", "lin1")
KEEP = PruneRandomly(0.0)

Trajectory = list[list[Tensor]]
Rule = Callable[[Tensor, dict[str, Tensor], int], Tensor]


def network() -> Mlp:
    torch.manual_seed(0)
    return Mlp(d_in=30, hidden=24).double()


def loss_of(model: nn.Module) -> Tensor:
    x = torch.randn(40, 30, dtype=F64, generator=torch.Generator().manual_seed(1))
    return 10 * (model(x) - (3 * x[:, :4]).sin()).square().mean()


def top_directions(G: Tensor) -> Tensor:
    """U_r, each column with its largest entry positive: where moments are kept the signs have to be anybody's."""
    U = torch.linalg.svd(G, full_matrices=False)[0][:, :RANK]
    return U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()


# --- GaLore, written down independently


def plain(R: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
    return R


def heavy_ball(R: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
    state["M"] = 0.9 * state.get("M", 0.0) + R
    return state["M"]


def adam(R: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
    """Overview Algorithm 1, with eps 1e-8."""
    state["M"] = 0.9 * state.get("M", 0.0) + 0.1 * R
    state["V"] = 0.999 * state.get("V", 0.0) + 0.001 * R**2
    return (state["M"] / (1 - 0.9**t)) / ((state["V"] / (1 - 0.999**t)).sqrt() + 1e-8)


def galore(rule: Rule, alpha: float, eta: float) -> Trajectory:
    model = network()
    weights = [getattr(model, name).weight for name in LAYERS]
    P, states, found = [None] * 2, [{}, {}], []  # type: ignore[var-annotated]
    for t in range(STEPS):
        gradients = torch.autograd.grad(loss_of(model), weights)
        with torch.no_grad():
            for i, (W, G) in enumerate(zip(weights, gradients, strict=True)):
                P[i] = top_directions(G) if t % EVERY == 0 else P[i]
                W -= eta * alpha * P[i] @ rule(P[i].mT @ G, states[i], t + 1)
        found.append([W.detach().clone() for W in weights])
    return found


# --- ReLoRA


def relora(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    s: float,
    *,
    pruning: StatePruning = KEEP,
    train_B: bool = False,
    delay: int = 0,
) -> Trajectory:
    """The weight beside the pair plus s·B·A, after every step."""
    config = LoraConfig(r=RANK, lora_alpha=s * RANK, target_modules=list(LAYERS))  # type: ignore[arg-type]
    model = get_peft_model(network(), config, autocast_adapter_dtype=False)
    sides = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    trained = [p for n, p in sides if train_B or ".lora_A." in n]
    for name, p in sides:
        p.requires_grad_(train_B or ".lora_A." in name)
    optimizer = make(trained)
    gradients: dict[str, Tensor] = {}

    def start(pair: LoraPair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(pair.A), top_directions(gradients[pair.name])

    trainer = ReLora(model, optimizer, start=start, pruning=pruning)
    found = []
    for t in range(STEPS):
        if t % EVERY == (delay if t else 0):
            gradients.update(full_gradients(model, trainer.pairs))
            trainer.merge_and_restart()
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        found.append([(base_layer(p).weight + s * p.B @ p.A).detach().clone() for p in trainer.pairs])
    return found


def full_gradients(model: nn.Module, pairs: list[LoraPair]) -> dict[str, Tensor]:
    """Of W + s·B·A, which is that of W."""
    weights = [base_layer(pair).weight.requires_grad_(True) for pair in pairs]
    found = torch.autograd.grad(loss_of(model), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {pair.name: G for pair, G in zip(pairs, found, strict=True)}


def sgd(momentum: float = 0.0, decay: float = 0.0) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda trained: torch.optim.SGD(trained, lr=ETA, momentum=momentum, weight_decay=decay)


def adam_of(s: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """eps in units of the gradient, which is s times GaLore's."""
    return lambda trained: torch.optim.Adam(trained, lr=ETA / 10, eps=1e-8 * s)


def difference(first: Trajectory, second: Trajectory) -> float:
    assert len(first) == len(second) == STEPS
    return max(
        float((a - b).abs().max()) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_the_run_is_no_trivial_one() -> None:
    """Far enough for the subspaces to turn and for a wrong rate to show."""
    run = galore(plain, 1.0, ETA)
    start = [getattr(network(), name).weight for name in LAYERS]
    moved = [W - W0.detach() for W, W0 in zip(run[-1], start, strict=True)]
    assert all(float(update.norm()) > 0.3 for update in moved)
    assert all(int(torch.linalg.matrix_rank(update, rtol=1e-6)) > RANK for update in moved)


# --- gradient descent


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
def test_theorem_4_at_every_iteration(s: float) -> None:
    assert difference(galore(plain, s**2, ETA), relora(sgd(), s)) < 1e-10


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_the_scale_is_s_squared_and_not_s(s: float) -> None:
    assert difference(galore(plain, s, ETA), relora(sgd(), s)) > 1e-3


def test_heavy_ball_matches_if_both_keep_momentum_at_a_refresh() -> None:
    run = galore(heavy_ball, 1.0, ETA / 5)

    def make(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(trained, lr=ETA / 5, momentum=0.9)

    assert difference(run, relora(make, 1.0)) < 1e-10
    assert difference(run, relora(make, 1.0, pruning=ResetState())) > 1e-3, "and not where ReLoRA resets its own"


@pytest.mark.parametrize(
    "condition",
    [
        {"make": sgd(decay=0.3)},
        {"make": sgd(), "train_B": True},
        {"make": sgd(), "delay": 1},
    ],
    ids=["decay on A", "B trained too", "refreshed at other steps"],
)
def test_each_condition_is_needed(condition: dict[str, Any]) -> None:
    assert difference(galore(plain, 1.0, ETA), relora(s=1.0, **condition)) > 1e-4


# --- Adam


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_under_adam_the_scale_is_s(s: float) -> None:
    run = relora(adam_of(s), s)
    assert difference(galore(adam, s, ETA / 10), run) < 1e-10
    assert difference(galore(adam, s**2, ETA / 10), run) > 1e-3, "and not s²"


# --- against our own GaLore


def our_galore(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Trajectory:
    model = network()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weights = [getattr(model, name).weight.requires_grad_(True) for name in LAYERS]
    optimizer, found = make(weights), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        found.append([W.detach().clone() for W in weights])
    return found


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_theorem_4_holds_for_our_galore(s: float) -> None:
    def make(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return GaLoreSGD(weights, lr=ETA, rank=RANK, scale=s**2, side="left", basis="svd", refresh_every=EVERY)

    assert difference(our_galore(make), relora(sgd(), s)) < 1e-10


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_under_adam_our_galore_matches_where_both_reset_at_a_refresh(s: float) -> None:
    """Kept moments would stay in coordinates whose signs an SVD is free to choose; within one subspace signs cancel."""

    def make(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return GaLoreAdamW(
            weights, lr=ETA / 10, rank=RANK, scale=s, side="left", basis="svd", refresh_every=EVERY, moments="reset"
        )

    ours, theirs = our_galore(make), relora(adam_of(s), s, pruning=ResetState())
    assert difference(ours, theirs) < 1e-10
