"""Updates in the backward pass: the numbers of the ordinary mode, with every gradient freed, under accumulation and clipping."""

import copy
import gc
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.optimizers import AdaRankGrad, GaLoreAdafactor, GaLoreAdamW, GaLoreSGD, PerLayerUpdates
from rankwise.optimizers.projected import ProjectedOptimizer
from tests.tiny_models import Mlp

F64 = torch.float64
OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (GaLoreAdamW, {"lr": 0.05, "refresh_every": 3, "weight_decay": 0.1}),
    (GaLoreAdamW, {"lr": 0.05, "refresh_every": 3, "moments": "rotate"}),
    (GaLoreSGD, {"lr": 0.1, "refresh_every": 2, "momentum": 0.9}),
    (GaLoreAdafactor, {"lr": 0.05, "refresh_every": 3}),
    (AdaRankGrad, {"lr": 0.05, "refresh_every": 4, "energy": 0.9, "converged": 0.9}),
]


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 20, dtype=F64, generator=generator), torch.randn(6, 4, dtype=F64, generator=generator))
        for _ in range(count)
    ]


def model_and(kind: Any, settings: dict[str, Any]) -> tuple[Mlp, ProjectedOptimizer]:
    """Matrices projected at rank 3, biases at full size."""
    torch.manual_seed(0)
    model = Mlp().double()
    return model, kind(model.parameters(), rank=3, **settings)


def train(
    model: nn.Module,
    optimizer: ProjectedOptimizer,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    accumulate: int = 1,
    max_norm: float | None = None,
) -> None:
    """A loop as everybody writes it."""
    for number, (x, y) in enumerate(micro_batches, start=1):
        ((model(x) - y).square().mean() / accumulate).backward()
        if number % accumulate == 0:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()


def assert_same(first: nn.Module, second: nn.Module, atol: float = 0.0) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert float((a.detach() - b.detach()).abs().max()) <= atol


@pytest.mark.parametrize(("kind", "settings"), OPTIMIZERS)
def test_it_is_the_ordinary_mode_bit_for_bit(kind: Any, settings: dict[str, Any]) -> None:
    (plain, ordinary), (hooked, inside) = model_and(kind, settings), model_and(kind, settings)
    PerLayerUpdates(inside)
    train(plain, ordinary, batches(10))
    train(hooked, inside, batches(10))
    assert_same(plain, hooked)
    for a, b in zip(plain.parameters(), hooked.parameters(), strict=True):
        assert ordinary.state[a]["step"] == inside.state[b]["step"] == 10
        assert ordinary.state[a].get("refreshes") == inside.state[b].get("refreshes")


@pytest.mark.parametrize(("kind", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches_add_up_to_the_ordinary_update(kind: Any, settings: dict[str, Any], accumulate: int) -> None:
    """Through several refreshes, to rounding: projecting and adding in another order."""
    (plain, ordinary), (hooked, inside) = model_and(kind, settings), model_and(kind, settings)
    PerLayerUpdates(inside, accumulate=accumulate)
    train(plain, ordinary, batches(8 * accumulate), accumulate)
    train(hooked, inside, batches(8 * accumulate), accumulate)
    assert_same(plain, hooked, atol=1e-10)
    matrix, same = plain.lin1.weight, hooked.lin1.weight
    assert ordinary.state[matrix]["step"] == inside.state[same]["step"] == 8
    assert ordinary.state[matrix]["refreshes"] == inside.state[same]["refreshes"] > 1


def test_gradients_are_gone_before_the_next_layer_has_one() -> None:
    """Also while they accumulate: between refreshes only r × o numbers are held of each."""
    model, optimizer = model_and(GaLoreAdamW, {"refresh_every": 100})
    alive: list[int] = []
    gradients: list[weakref.ref[Tensor]] = []

    def count(parameter: Tensor) -> None:
        gradients.append(weakref.ref(parameter.grad))
        alive.append(sum(ref() is not None for ref in gradients))

    for parameter in (model.lin0.weight, model.lin1.weight, model.head.weight):
        parameter.register_post_accumulate_grad_hook(count)
    updates = PerLayerUpdates(optimizer, accumulate=2)
    train(model, optimizer, batches(2), 2)  # the first update refreshes, and needs whole gradients
    gc.collect()
    gradients.clear(), alive.clear()
    train(model, optimizer, batches(2), 2)
    assert alive == [1] * 6
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {tuple(held.shape) for held in updates._sums.values()} == set()


@pytest.mark.parametrize("max_norm", [1e-3, 0.3, 1e3])
def test_the_global_norm_clips_as_torch_does(max_norm: float) -> None:
    for kind, settings in OPTIMIZERS:
        (plain, ordinary), (hooked, inside) = model_and(kind, settings), model_and(kind, settings)
        PerLayerUpdates(inside, max_norm=max_norm, norm="global")
        train(plain, ordinary, batches(8), max_norm=max_norm)
        train(hooked, inside, batches(8))
        # clipped before or after they are projected: the same but for rounding, which Adam's first steps enlarge
        assert_same(plain, hooked, atol=1e-9)


def test_a_global_norm_waits_for_step_with_the_gradients_projected() -> None:
    model, optimizer = model_and(GaLoreAdamW, {"refresh_every": 100})
    updates = PerLayerUpdates(optimizer, max_norm=1.0, norm="global")
    before = copy.deepcopy(model.state_dict())
    for x, y in batches(1):
        (model(x) - y).square().mean().backward()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert updates._waiting[model.lin0.weight][0].shape == (3, 24)
    optimizer.step()
    assert not torch.equal(model.lin0.weight, before["lin0.weight"])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("norm", ["parameter", "global"])
def test_projected_norms_clip_what_is_applied(norm: str, accumulate: int) -> None:
    """The oracle asks a copy of the ordinary optimizer for its subspaces, and clips PᵀG by hand."""
    max_norm = 0.05
    (plain, ordinary), (hooked, inside) = (model_and(GaLoreAdamW, {"lr": 0.05, "refresh_every": 3}) for _ in range(2))
    PerLayerUpdates(inside, accumulate=accumulate, max_norm=max_norm, norm=norm, norm_of="projected")
    clipped = 0
    for at in range(0, 6 * accumulate, accumulate):
        micro_batches = batches(6 * accumulate)[at : at + accumulate]
        for x, y in micro_batches:
            ((plain(x) - y).square().mean() / accumulate).backward()
        rehearsed = copy.deepcopy((plain, ordinary))
        for mine, copied in zip(plain.parameters(), rehearsed[0].parameters(), strict=True):
            copied.grad = mine.grad
        rehearsed[1].step()
        norms = {}
        for mine, copied in zip(plain.parameters(), rehearsed[0].parameters(), strict=True):
            G, basis = mine.grad, rehearsed[1].state[copied].get("basis")
            if basis is not None:
                G = basis.mT @ G if G.shape[0] < G.shape[1] else G @ basis
            norms[mine] = float(G.norm())
        total = sum(value**2 for value in norms.values()) ** 0.5
        for mine, own in norms.items():
            factor = min(1.0, max_norm / ((own if norm == "parameter" else total) + 1e-6))
            clipped += factor < 1
            mine.grad *= factor
        ordinary.step()
        ordinary.zero_grad()
        train(hooked, inside, micro_batches, accumulate)
    assert clipped > 6
    assert_same(plain, hooked, atol=1e-9)


class WithAnExpert(nn.Module):
    """Its expert has no part in some micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expert, self.body = nn.Linear(20, 20, dtype=F64), Mlp().double()

    def forward(self, x: Tensor, *, routed: bool) -> Tensor:
        return self.body(x + self.expert(x) if routed else x)


@pytest.mark.parametrize("routes", [(True, False), (False, True), (False, False), (True, True)])
def test_a_parameter_that_some_micro_batches_leave_out_is_updated_by_step(routes: tuple[bool, bool]) -> None:
    plain, hooked = WithAnExpert(), WithAnExpert()
    ordinary, inside = (GaLoreAdamW(m.parameters(), rank=3, lr=0.05, refresh_every=3) for m in (plain, hooked))
    PerLayerUpdates(inside, accumulate=2)
    for update in range(5):
        for (x, y), routed in zip(batches(2, seed=update), routes, strict=True):
            for model in (plain, hooked):
                ((model(x, routed=routed) - y).square().mean() / 2).backward()
        for optimizer in (ordinary, inside):
            optimizer.step()
            optimizer.zero_grad()
    assert_same(plain, hooked, atol=1e-10)
    assert all(parameter.grad is None for parameter in hooked.parameters())


def test_a_weight_used_twice_is_updated_once() -> None:
    torch.manual_seed(0)
    plain, hooked = (nn.Linear(8, 8, dtype=F64) for _ in range(2))
    hooked.load_state_dict(plain.state_dict())
    ordinary, inside = (GaLoreAdamW(m.parameters(), rank=3, lr=0.05) for m in (plain, hooked))
    PerLayerUpdates(inside)
    for model, optimizer in ((plain, ordinary), (hooked, inside)):
        for seed in range(4):
            x = torch.randn(5, 8, dtype=F64, generator=torch.Generator().manual_seed(seed))
            model(model(x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(plain, hooked)


@pytest.mark.parametrize("norm", ["parameter", "global"])
def test_gradients_that_are_not_finite_are_skipped_and_clip_nobody(norm: str) -> None:
    model, optimizer = model_and(GaLoreAdamW, {"refresh_every": 2})
    PerLayerUpdates(optimizer, max_norm=1.0, norm=norm)
    model.lin1.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, batches(3))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(before) - {"lin1.weight"}
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert optimizer.skipped_updates() == 3


def test_schedules_closures_and_resuming_go_on_as_in_the_ordinary_mode() -> None:
    settings = {"lr": 0.05, "refresh_every": 3}
    (plain, ordinary), (hooked, inside) = model_and(GaLoreAdamW, settings), model_and(GaLoreAdamW, settings)
    PerLayerUpdates(inside, max_norm=0.5, norm="global")
    for model, optimizer in ((plain, ordinary), (hooked, inside)):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for x, y in batches(4):

            def closure(model=model, optimizer=optimizer, x=x, y=y) -> float:
                optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                if model is plain:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                return float(loss.detach())

            assert optimizer.step(closure) > 0
            schedule.step()
    assert_same(plain, hooked, atol=1e-10)
    resumed_model = copy.deepcopy(hooked)
    for parameter in resumed_model.parameters():
        parameter._post_accumulate_grad_hooks = None  # the copy has the original's hooks
    resumed = GaLoreAdamW(resumed_model.parameters(), rank=3)
    resumed.load_state_dict(copy.deepcopy(inside.state_dict()))
    PerLayerUpdates(resumed, max_norm=0.5, norm="global")
    train(hooked, inside, batches(4, seed=5))
    train(resumed_model, resumed, batches(4, seed=5))
    assert_same(hooked, resumed_model)


def test_half_an_update_is_not_saved_but_can_be_dropped() -> None:
    model, optimizer = model_and(GaLoreAdamW, {"refresh_every": 100})
    updates = PerLayerUpdates(optimizer, accumulate=2)
    train(model, optimizer, batches(2), 2)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, batches(1), 2)
    with pytest.raises(RuntimeError, match="middle of an accumulation"):
        optimizer.state_dict()
    updates.discard()
    assert optimizer.state_dict()["state"]
    optimizer.step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", [GaLoreAdamW, AdaRankGrad])
def test_an_update_that_is_dropped_after_its_refresh_leaves_a_state_to_go_on_from(kind: Any) -> None:
    """The basis is new by then and the moments are old: what carries them over stands in the state."""
    model, optimizer = model_and(kind, {"moments": "rotate", "refresh_every": 2})
    updates = PerLayerUpdates(optimizer, max_norm=1.0, norm="global")
    train(model, optimizer, batches(4))
    for x, y in batches(1, seed=7):
        (model(x) - y).square().mean().backward()
    updates.discard()
    assert "overlap" in optimizer.state[model.lin1.weight]
    resumed_model, resumed = model_and(kind, {"moments": "rotate", "refresh_every": 2})
    resumed_model.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    PerLayerUpdates(resumed, max_norm=1.0, norm="global")
    for some, its in ((model, optimizer), (resumed_model, resumed)):
        train(some, its, batches(4, seed=8))
    assert_same(model, resumed_model)
    assert "overlap" not in optimizer.state[model.lin1.weight]


def test_removed_it_is_the_ordinary_mode_again() -> None:
    model, optimizer = model_and(GaLoreAdamW, {})
    PerLayerUpdates(optimizer).remove()
    for x, y in batches(1):
        (model(x) - y).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not optimizer.state
    optimizer.step()
    assert len(optimizer.state) == 5


def test_removed_it_may_be_removed_again_and_given_anew_but_not_twice_at_once() -> None:
    _, optimizer = model_and(GaLoreAdamW, {})
    updates = PerLayerUpdates(optimizer)
    with pytest.raises(ValueError, match=r"already; remove\(\)"):
        PerLayerUpdates(optimizer)
    updates.remove()
    updates.remove()
    PerLayerUpdates(optimizer)


def test_an_optimizer_that_projects_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="for projected optimizers, GaLore's and AdaRankGrad, got AdamW"):
        PerLayerUpdates(torch.optim.AdamW(Mlp().parameters()))  # type: ignore[arg-type]


def test_a_gradient_scaler_is_refused() -> None:
    model, optimizer = model_and(GaLoreAdamW, {})
    PerLayerUpdates(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for x, y in batches(1):
        scaler.scale((model(x) - y).square().mean()).backward()
    with pytest.raises(RuntimeError, match="train in bfloat16"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 0}, "counts backward passes"),
        ({"accumulate": 1.5}, "counts backward passes"),
        ({"accumulate": float("nan")}, "counts backward passes"),
        ({"max_norm": 0.0}, "must be positive"),
        ({"max_norm": float("nan")}, "must be positive"),
        ({"norm": "layer"}, '"parameter" or "global"'),
        ({"norm_of": "update"}, '"gradient" or "projected"'),
        ({"accumulate": 2, "max_norm": 1.0}, 'norm_of="projected"'),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerLayerUpdates(model_and(GaLoreAdamW, {})[1], **settings)


def test_refreshing_by_energy_needs_the_whole_gradient() -> None:
    settings = {"refresh_below": 0.9, "lr": 0.05}
    with pytest.raises(ValueError, match="refresh_every"):
        PerLayerUpdates(model_and(GaLoreAdamW, settings)[1], accumulate=2)
    (plain, ordinary), (hooked, inside) = model_and(GaLoreAdamW, settings), model_and(GaLoreAdamW, settings)
    PerLayerUpdates(inside)
    train(plain, ordinary, batches(10))
    train(hooked, inside, batches(10))
    assert_same(plain, hooked)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="in one process, not in 2"):
        PerLayerUpdates(model_and(GaLoreAdamW, {})[1])
