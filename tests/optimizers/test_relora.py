"""ReLora: a restart changes no output and nothing of the old factors is left; the schedule's teeth; Trainer and resume."""

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from rankwise.errors import UserError
from rankwise.finetuning.methods.relora import ReLoraRestarts
from rankwise.optimizers.equivariant_adam import EquivariantAdam
from rankwise.optimizers.factor_pairs import LoraPair
from rankwise.optimizers.jagged_schedule import cosine_factor, jagged, jagged_cosine
from rankwise.optimizers.lora_rite import LoraRite, lorarite_param_groups
from rankwise.optimizers.relora import ReLora, base_layer, kaiming_start
from rankwise.optimizers.state_pruning import PruneByMagnitude, PruneRandomly, ResetState
from tests.tiny_models import Mlp, tiny_bert, token_batch

F64 = torch.float64


def adapted(dtype: torch.dtype = F64, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["lin0", "lin1"], **changes}
    return get_peft_model(Mlp().to(dtype), LoraConfig(**config), autocast_adapter_dtype=False)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=lr)


def inputs(model: nn.Module, seed: int = 0) -> Tensor:
    dtype = next(model.parameters()).dtype
    return torch.randn(16, 20, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for number in range(first, first + steps):
        x = inputs(model, seed=number)
        (model(x) - x[:, :4].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer.weight" in name}


def pairs_of(model: nn.Module) -> list[LoraPair]:
    return ReLora(model, adamw(model)).pairs


# --- what a restart does


def test_outputs_stay_what_they_were_and_the_update_is_in_the_weight() -> None:
    model = adapted()
    optimizer = adamw(model)
    relora = ReLora(model, optimizer)
    before = weights(model)
    descend(model, optimizer, 5)
    outputs, updates = model(inputs(model)), [6 / 3 * pair.B.detach() @ pair.A.detach() for pair in relora.pairs]
    restart = relora.merge_and_restart()
    assert torch.allclose(model(inputs(model)), outputs, rtol=0, atol=1e-13)
    for (name, after), update in zip(weights(model).items(), updates, strict=True):
        assert torch.allclose(after - before[name], update, rtol=0, atol=1e-15)
    assert restart.number == 1
    assert restart.update_norm == pytest.approx(math.sqrt(sum(float(u.square().sum()) for u in updates)))
    assert restart.lost < 1e-13


def test_the_factors_start_anew_and_are_never_both_zero() -> None:
    model = adapted()
    relora = ReLora(model, adamw(model))
    seen = [pair.A.detach().clone() for pair in relora.pairs]
    for _ in range(3):
        descend(model, relora.optimizer, 2)
        relora.merge_and_restart()
        for pair, old in zip(relora.pairs, seen, strict=True):
            bound = 1 / math.sqrt(pair.A.shape[1])
            assert not pair.B.any()
            assert 0.8 * bound < float(pair.A.detach().abs().max()) <= bound
            assert not torch.allclose(pair.A, old, atol=0.1 * bound)
            old.copy_(pair.A.detach())
            assert not getattr(pair.layer, "merged")  # noqa: B009


def test_the_rank_of_the_sum_grows_with_the_restarts() -> None:
    model = adapted()
    optimizer = adamw(model)
    relora, start = ReLora(model, optimizer), weights(model)
    for restarts in range(1, 4):
        descend(model, optimizer, 5, first=10 * restarts)
        relora.merge_and_restart()
        for name, weight in weights(model).items():
            assert int(torch.linalg.matrix_rank(weight - start[name], rtol=1e-9)) == 3 * restarts


@pytest.mark.parametrize("kind", ["conv", "embedding", "conv1d", "bias"])
def test_it_merges_by_the_layers_own_merge_whatever_the_layer(kind: str) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer, x, extra = {
        "conv": (nn.Conv2d(3, 8, 3), torch.randn(2, 3, 5, 5), {}),
        "embedding": (nn.Embedding(11, 6), torch.arange(11), {}),
        "conv1d": (Conv1D(6, 5), torch.randn(4, 5), {"fan_in_fan_out": True}),
        "bias": (nn.Linear(5, 6), torch.randn(4, 5), {"lora_bias": True}),
    }[kind]
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"], **extra))  # type: ignore[arg-type]
    optimizer = adamw(model)
    relora = ReLora(model, optimizer)
    for _ in range(3):
        for _ in range(3):
            (model(x) - 1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        before = model(x)
        relora.merge_and_restart()
        assert torch.allclose(model(x), before, atol=1e-5)
    # and what is trained in the end is a model of the base layer alone
    assert torch.allclose(model.merge_and_unload()(x), before, atol=1e-5)  # type: ignore[operator]


def test_a_layer_of_ones_own_is_merged_by_its_own_merge() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 5, dtype=F64), requires_grad=False)
            self.lora_A, self.lora_B = (nn.Parameter(torch.ones(s, dtype=F64)) for s in ((2, 5), (4, 2)))
            self.calls: list[str] = []

        def merge(self) -> None:
            self.calls.append("merge")
            self.weight += self.lora_B.detach() @ self.lora_A.detach()

        def unmerge(self) -> None:
            self.calls.append("unmerge")
            self.weight -= self.lora_B.detach() @ self.lora_A.detach()

    layer = Mine()
    relora = ReLora(nn.Sequential(layer), torch.optim.SGD(trainable(layer), lr=0.1))
    restart = relora.merge_and_restart()
    assert layer.calls == ["merge", "unmerge"]
    assert torch.equal(layer.weight, torch.full((4, 5), 2.0, dtype=F64))
    assert math.isnan(restart.update_norm), "it has no get_delta_weight"


def test_a_start_of_ones_own_changes_no_output_either() -> None:
    """Even where its product is not zero: unmerge() takes it out of the weight again."""
    model = adapted()

    def start(pair: LoraPair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        A, _ = kaiming_start(pair, generator)
        return A, torch.ones(pair.B.shape)

    optimizer = adamw(model)
    relora = ReLora(model, optimizer, start=start)
    descend(model, optimizer, 3)
    before = model(inputs(model))
    relora.merge_and_restart()
    assert all(bool((pair.B == 1).all()) for pair in relora.pairs)
    assert torch.allclose(model(inputs(model)), before, rtol=0, atol=1e-13)


def test_draws_follow_from_the_seed_and_the_restart_alone() -> None:
    def drawn(seed: int, disturb: bool = False) -> list[Tensor]:
        model = adapted()
        relora = ReLora(model, adamw(model), seed=seed)
        relora.merge_and_restart()
        if disturb:
            torch.rand(7)
        relora.merge_and_restart()
        return [pair.A.detach() for pair in relora.pairs]

    first, again, other = drawn(1), drawn(1, disturb=True), drawn(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_bias_on_b_is_merged_and_starts_anew_with_it() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(5, 6)), LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    optimizer = adamw(model)
    relora = ReLora(model, optimizer)
    for _ in range(3):
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer: Any = relora.pairs[0].layer
    bias, before = layer.lora_B["default"].bias, layer.base_layer.bias.detach().clone()
    trained = bias.detach().clone()
    assert trained.any()
    relora.merge_and_restart()
    assert torch.equal(layer.base_layer.bias, before + layer.scaling["default"] * trained)
    assert not bias.any()
    assert not optimizer.state[bias]["exp_avg"].any()
    assert set(relora.state_dict()["base_weights"]) == {"base_model.model.0.weight", "base_model.model.0.bias"}


# --- dtypes


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_a_bfloat16_base_gets_the_float32_sum_rounded_once(factors: torch.dtype) -> None:
    model = adapted(torch.bfloat16)
    relora = ReLora(model, adamw(model))
    before, expected = weights(model), []
    with torch.no_grad():
        for pair in relora.pairs:
            pair.B.normal_(std=0.1)
            for factor in pair.factors:
                factor.data = factor.data.to(factors)
            base = base_layer(pair).weight.float()
            expected.append((base + 2.0 * pair.B.float() @ pair.A.float()).bfloat16())
    restart = relora.merge_and_restart()
    for pair, value, old in zip(relora.pairs, expected, before.values(), strict=True):
        assert torch.equal(base_layer(pair).weight, value)
        assert not torch.equal(value, old)
        assert {p.dtype for p in pair.factors} == {factors}
    assert 1e-3 < restart.lost < 0.1


def test_what_bfloat16_swallows_is_reported() -> None:
    """An update below 1/512 of a weight is less than half of its last bit: nothing of it arrives."""
    model = adapted(torch.bfloat16)
    relora = ReLora(model, adamw(model))
    with torch.no_grad():
        for pair in relora.pairs:
            base_layer(pair).weight.fill_(1.0)
            pair.A.fill_(1e-2)
            pair.B.fill_(1e-2)
    restart = relora.merge_and_restart()
    assert restart.lost == pytest.approx(1.0)
    assert all(bool((base_layer(pair).weight == 1).all()) for pair in relora.pairs)


@pytest.mark.parametrize(("size", "swallowed"), [(1e-2, 0.15), (3e-3, 0.48), (1e-3, 0.83)])
def test_what_bfloat16_swallows_of_small_updates(size: float, swallowed: float) -> None:
    """The shares that docs/relora.md states: random updates of rank 8, of this size beside the weight of a linear layer."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(256, 256, bias=False).bfloat16()), LoraConfig(r=8, target_modules=["0"])
    )
    relora = ReLora(model, adamw(model))
    (pair,) = relora.pairs
    with torch.no_grad():
        pair.A.normal_()
        pair.B.normal_()
        pair.B.mul_(size * base_layer(pair).weight.float().norm() / (pair.B @ pair.A).norm())
    assert relora.merge_and_restart().lost == pytest.approx(swallowed, abs=0.01)


# --- the optimizer's state


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(trainable(model), lr=1e-2),
    "fused AdamW": lambda model: torch.optim.AdamW(trainable(model), lr=1e-2, fused=True),
    "AMSGrad": lambda model: torch.optim.Adam(trainable(model), lr=1e-2, amsgrad=True),
    "momentum": lambda model: torch.optim.SGD(trainable(model), lr=1e-2, momentum=0.9),
    "EquivariantAdam": lambda model: EquivariantAdam(trainable(model), lr=1e-2),
    "LoraRite": lambda model: LoraRite(lorarite_param_groups(model, lr=1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_reset_training_goes_on_as_with_a_new_optimizer(name: str) -> None:
    model = adapted()
    optimizer = OPTIMIZERS[name](model)
    relora = ReLora(model, optimizer)
    descend(model, optimizer, 4)
    relora.merge_and_restart()
    state = [value for entries in optimizer.state.values() for value in entries.values()]
    assert not any(bool(torch.as_tensor(value).any()) for value in state)
    twin = copy.deepcopy(model)
    descend(model, optimizer, 4, first=9)
    descend(twin, OPTIMIZERS[name](twin), 4, first=9)
    for mine, fresh in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, fresh)


def test_what_is_trained_besides_keeps_its_state() -> None:
    model = adapted(modules_to_save=["head"])
    optimizer = adamw(model)
    descend(model, optimizer, 4)
    relora = ReLora(model, optimizer)
    factors = {id(f) for pair in relora.pairs for f in pair.factors}
    before = {p: copy.deepcopy(state) for p, state in optimizer.state.items() if id(p) not in factors}
    relora.merge_and_restart()
    assert len(before) == 2
    for p, state in before.items():
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())


@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0]), min_size=1, max_size=30), st.floats(0, 1))
def test_pruning_takes_exactly_its_share_ties_or_not(values: list[float], share: float) -> None:
    momentum = torch.tensor(values)
    parameter = nn.Parameter(torch.zeros(len(values)))
    marks = torch.arange(1.0, len(values) + 1)  # no entry is zero: what is pruned shows
    count = round(share * len(values))
    for pruning in (PruneByMagnitude(share), PruneRandomly(share)):
        results = []
        for _ in range(2):
            state = {"step": torch.tensor(5.0), "exp_avg": momentum.clone(), "exp_avg_sq": marks.clone()}
            pruning(state, parameter, torch.Generator().manual_seed(3))
            gone = state["exp_avg_sq"] == 0
            assert int(gone.sum()) == count
            assert torch.equal(state["exp_avg"], momentum.masked_fill(gone, 0.0))
            assert torch.equal(state["exp_avg_sq"], marks.masked_fill(gone, 0.0))
            assert float(state["step"]) == 5
            results.append(gone)
        assert torch.equal(*results)
        if isinstance(pruning, PruneByMagnitude) and 0 < count < len(values):
            assert float(momentum[gone].abs().max()) <= float(momentum[~gone].abs().min())
            order = [i for i, v in enumerate(values) if abs(v) == float(momentum[~gone].abs().min())]
            tied = [bool(gone[i]) for i in order]
            assert tied == sorted(tied, reverse=True), "of equal ones the first go"


def test_random_pruning_takes_others_for_every_parameter_and_restart() -> None:
    model = adapted()
    optimizer = adamw(model)
    relora = ReLora(model, optimizer, pruning=PruneRandomly(0.5))
    masks = []
    for _ in range(2):
        descend(model, optimizer, 1)
        for state in optimizer.state.values():
            state["exp_avg"].fill_(1.0)
        relora.merge_and_restart()
        masks += [optimizer.state[pair.B]["exp_avg"].clone() for pair in relora.pairs]
        assert all(float(mask.mean()) == 0.5 for mask in masks)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_single_second_moment_is_kept_and_its_momentum_pruned() -> None:
    model = adapted()
    optimizer = EquivariantAdam(trainable(model), lr=1e-2)
    relora = ReLora(model, optimizer, pruning=PruneByMagnitude(0.9))
    descend(model, optimizer, 2)
    energy = float(optimizer.state[relora.pairs[0].B]["second_moment"])
    relora.merge_and_restart()
    state = optimizer.state[relora.pairs[0].B]
    assert float(state["second_moment"]) == energy > 0
    assert int((state["momentum"] != 0).sum()) == round(0.1 * 72)


@pytest.mark.parametrize("pruning", [PruneRandomly(0.5), PruneByMagnitude(0.5)])
def test_a_state_without_entries_of_its_own_is_not_pruned_by_halves(pruning: Any) -> None:
    model = adapted()
    optimizer = LoraRite(lorarite_param_groups(model, lr=1e-2))
    relora = ReLora(model, optimizer, pruning=pruning)
    descend(model, optimizer, 2)
    with pytest.raises(ValueError, match=r"use ResetState\(\)"):
        relora.merge_and_restart()


def test_codes_of_an_8_bit_optimizer_are_not_taken_for_numbers() -> None:
    for pruning in (ResetState(), PruneRandomly(0.5), PruneByMagnitude(0.5)):
        state = {"state1": torch.ones(4, dtype=torch.uint8)}
        with pytest.raises(ValueError, match="holds codes"):
            pruning(state, nn.Parameter(torch.zeros(4)), torch.Generator())


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_shares_out_of_range_are_refused(share: float) -> None:
    for kind in (PruneRandomly, PruneByMagnitude):
        with pytest.raises(ValueError, match="from 0 to 1"):
            kind(share)


# --- what is refused


def zeroed() -> nn.Module:
    model = adapted()
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.zero_()
    return model


def two_adapters() -> nn.Module:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lin0"]))  # type: ignore[operator]
    return model


def merged() -> nn.Module:
    model = adapted()
    model.merge_adapter()  # type: ignore[operator]
    return model


def quantized() -> nn.Module:
    model = adapted()
    layer = model.base_model.model.lin0.get_base_layer()  # type: ignore[union-attr,operator]
    layer.weight = nn.Parameter(torch.zeros(24, 20, dtype=torch.int8), requires_grad=False)  # type: ignore[union-attr]
    return model


def tied() -> nn.Module:
    model = Mlp(d_in=24)
    model.lin1.weight = model.lin0.weight
    return get_peft_model(model, LoraConfig(r=2, target_modules=["lin0"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (zeroed, "A and B of base_model.model.lin0 are both zero"),
        (two_adapters, r"lin0 has 2 adapters \(default, second\)"),
        (merged, "merged already"),
        (quantized, r"quantized or packed \(Linear, Parameter of torch.int8\)"),
        (tied, "shares its weight with another layer"),
        (lambda: adapted(use_dora=True), "no plain LoRA"),
        (lambda: Mlp(), "no trainable LoRA layers"),
    ],
)
def test_what_cannot_be_restarted_is_refused_at_once(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        ReLora(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_optimizer_without_the_factors_is_refused() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"does not have the factors of base_model\.model\.lin0"):
        ReLora(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def test_a_diverged_adapter_is_not_merged() -> None:
    model = adapted()
    relora = ReLora(model, adamw(model))
    with torch.no_grad():
        relora.pairs[1].B[0, 0] = torch.inf  # the second layer: the first must not be merged either
        relora.pairs[0].B.fill_(1.0)
    before = weights(model)
    with pytest.raises(ValueError, match="nothing has been merged"):
        relora.merge_and_restart()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert relora.restarts == 0


def test_a_start_that_kills_both_factors_is_refused() -> None:
    model = adapted()

    def start(pair: LoraPair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.zeros(pair.A.shape), torch.zeros(pair.B.shape)

    with pytest.raises(ValueError, match="both zero"):
        ReLora(model, adamw(model), start=start).merge_and_restart()


def shaped(*, A: Any = None, B: Any = None) -> Callable[[LoraPair, torch.Generator], Any]:
    """LoRA's own start but for one factor of the second layer, so that the first would have been merged by then."""

    def start(pair: LoraPair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn_A, drawn_B = kaiming_start(pair, generator)
        if pair.name.endswith("lin1"):
            return (drawn_A if A is None else A), (drawn_B if B is None else B)
        return drawn_A, drawn_B

    return start


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (shaped(A=torch.ones(1, 1)), r"of shapes \(3, 24\) and \(24, 3\) for .*lin1, got \[\(1, 1\), \(24, 3\)\]"),
        (shaped(B=torch.ones(7, 3)), "start must return A and B"),
        (shaped(B=5), "got tuple"),
        (lambda pair, generator: None, "got NoneType"),
        (shaped(B=torch.full((24, 3), torch.nan)), "NaN or infinite"),
        (shaped(A=torch.zeros(3, 24)), "both zero"),
    ],
)
@pytest.mark.parametrize("pruning", [ResetState(), PruneRandomly(0.5)])
def test_a_start_that_cannot_be_leaves_everything_as_it_was(start: Any, message: str, pruning: Any) -> None:
    model = adapted()
    optimizer = adamw(model)
    descend(model, optimizer, 2)
    relora = ReLora(model, optimizer, start=start, pruning=pruning)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match=message):
        relora.merge_and_restart()
    assert str((model.state_dict(), optimizer.state_dict()["state"])) == str(before)
    assert relora.restarts == 0


def test_a_state_that_cannot_be_pruned_leaves_the_weights_unmerged() -> None:
    model = adapted()
    optimizer = LoraRite(lorarite_param_groups(model, lr=1e-2))
    descend(model, optimizer, 2)
    before = weights(model)
    with pytest.raises(ValueError, match=r"use ResetState\(\)"):
        ReLora(model, optimizer, pruning=PruneRandomly(0.5)).merge_and_restart()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_random_prunings_draw_in_turn_with_the_starts() -> None:
    """Which entries go is part of what a seed promises."""
    model = adapted()
    optimizer = adamw(model)
    relora = ReLora(model, optimizer, pruning=PruneRandomly(0.5), seed=3)
    descend(model, optimizer, 2)
    relora.merge_and_restart()
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    for pair in relora.pairs:
        A, _ = kaiming_start(pair, generator)
        assert torch.equal(pair.A, A.to(F64))
        for factor in pair.factors:
            gone = torch.randperm(factor.numel(), generator=generator)[: round(0.5 * factor.numel())]
            assert not optimizer.state[factor]["exp_avg_sq"].flatten()[gone].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruning": "reset"}, "pruning must be something to call"),
        ({"start": None}, "start must be something to call"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ],
)
def test_settings_that_would_fail_at_the_first_restart_are_refused(settings: dict[str, Any], message: str) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=message):
        ReLora(model, adamw(model), **settings)


# --- going on from a checkpoint


def test_resuming_is_never_having_stopped() -> None:
    """Through a file read with weights_only=True, into a model built from the pretrained weights."""

    def run(model: nn.Module, relora: ReLora, first: int, last: int) -> None:
        for number in range(first, last):
            descend(model, relora.optimizer, 1, first=number)
            if (number + 1) % 3 == 0:
                relora.merge_and_restart()

    through = adapted()
    uninterrupted = ReLora(through, adamw(through), seed=4)
    run(through, uninterrupted, 0, 11)

    stopped = adapted()
    first = ReLora(stopped, adamw(stopped), seed=4)
    run(stopped, first, 0, 7)
    file = io.BytesIO()
    factors = {name: p for name, p in stopped.state_dict().items() if "lora_" in name}
    torch.save({"adapter": factors, "optimizer": first.optimizer.state_dict(), "relora": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = adapted()
    second = ReLora(fresh, adamw(fresh), seed=99)
    fresh.load_state_dict(saved["adapter"], strict=False)
    second.optimizer.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["relora"])
    assert second.restarts == 2
    run(fresh, second, 7, 11)
    for (name, mine), other in zip(fresh.named_parameters(), through.parameters(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(format_version=2), "another version of rankwise"),
        (lambda state: state["base_weights"].popitem(), "not this model's"),
        (lambda state: state["base_weights"].update(other=torch.zeros(1)), "not this model's"),
        (
            lambda state: state["base_weights"].update({next(iter(state["base_weights"])): torch.zeros(1)}),
            "another shape",
        ),
        (lambda state: state.pop("restarts"), "has no restarts"),
        (lambda state: state.update(restarts=1.5), "whole number from 0"),
        (lambda state: state.update(seed=None), "seed must be a whole number"),
        (lambda state: state.update(base_weights=None), "tensors by name"),
        (
            lambda state: state.update(base_weights={k: v * torch.nan for k, v in state["base_weights"].items()}),
            "NaN or infinite",
        ),
        (lambda state: [state.pop(name) for name in list(state) if name != "format_version"], "has no base_weights"),
    ],
)
def test_the_state_of_another_model_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    model = adapted()
    relora = ReLora(model, adamw(model))
    state = copy.deepcopy(relora.state_dict())
    state["base_weights"] = {name: tensor + 1 for name, tensor in state["base_weights"].items()}
    change(state)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        relora.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_what_is_no_state_is_refused() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="format_version None, expected 1"):
        ReLora(model, adamw(model)).load_state_dict(None)  # type: ignore[arg-type]


# --- the schedule


def test_the_jagged_cosine_is_the_cosine_with_teeth() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    schedule = jagged_cosine(optimizer, total_steps=100, restart_every=25, warmup_steps=10, rewarmup_steps=5, least=0.1)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    for step, rate in enumerate(rates):
        smooth = step / 10 if step < 10 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        teeth = (step % 25) / 5 if step >= 25 and step % 25 < 5 else 1.0
        assert rate == pytest.approx(2.0 * smooth * teeth, abs=1e-12)
    assert rates[25] == rates[50] == rates[75] == 0


def test_a_schedule_resumes() -> None:
    def make() -> Any:
        return jagged_cosine(
            torch.optim.SGD([torch.zeros(1)], lr=1.0), total_steps=30, restart_every=10, rewarmup_steps=4
        )

    through, resumed = make(), make()
    for _ in range(12):
        through.optimizer.step()
        through.step()
    resumed.optimizer.load_state_dict(through.optimizer.state_dict())
    resumed.load_state_dict(through.state_dict())
    for each in (through, resumed):
        each.optimizer.step()
        each.step()
    assert resumed.get_last_lr() == through.get_last_lr()


def test_without_a_rewarmup_nothing_is_cut() -> None:
    smooth = lambda step: cosine_factor(step, total_steps=20, warmup_steps=0, least=0.0)  # noqa: E731
    plain = jagged(smooth, restart_every=5, rewarmup_steps=0)
    assert [plain(step) for step in range(20)] == [smooth(step) for step in range(20)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restart_every": 0}, "restart_every counts optimizer steps"),
        ({"rewarmup_steps": 5}, "below restart_every = 5"),
        ({"rewarmup_steps": -1}, "at least 0"),
        ({"warmup_steps": 21}, "warmup_steps at most that"),
        ({"total_steps": 0}, "at least 1"),
        ({"least": 1.5}, "from 0 to 1"),
    ],
)
def test_schedules_that_never_rise_are_refused(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"total_steps": 20, "restart_every": 5, **changes}
    with pytest.raises(ValueError, match=message):
        jagged_cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), **settings)


# --- inside Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class Recording(ReLoraRestarts):
    """Notes the step of every restart and the rate of every step."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.restarts_at: list[int] = []
        self.rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.relora is not None
        before = self.relora.restarts
        super().on_step_end(args, state, control, **kwargs)
        if self.relora.restarts > before:
            self.restarts_at.append(state.global_step)
            assert not any(f.grad is not None and bool(f.grad.any()) for p in self.relora.pairs for f in p.factors)


def bert() -> Any:
    torch.manual_seed(1)
    return get_peft_model(
        tiny_bert(), LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    )


def trainer(folder: Path, callback: ReLoraRestarts, model: Any = None, **changes: Any) -> Trainer:
    rows = token_batch(rows=16)
    examples = [{key: value[i] for key, value in rows.items()} for i in range(16)]
    settings: dict[str, Any] = {
        "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
        "seed": 3, **changes,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(
        model=model or bert(), args=arguments, train_dataset=examples, eval_dataset=examples, callbacks=[callback],  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_restarts_count_the_optimizers_steps_and_rates_climb_again(tmp_path: Path, accumulate: int) -> None:
    callback = Recording(every=4, rewarmup_steps=2)
    run = trainer(
        tmp_path, callback, gradient_accumulation_steps=accumulate, per_device_train_batch_size=4 // accumulate
    )
    run.train()
    assert callback.restarts_at == [4, 8], "not at 12: the run ends there"
    teeth = [1.0] * 4 + [0.0, 0.5, 1.0, 1.0] * 2
    assert callback.rates == pytest.approx([1e-2 * tooth for tooth in teeth])


def test_a_run_has_four_cycles_unless_told(tmp_path: Path) -> None:
    callback = Recording()
    trainer(tmp_path, callback, max_steps=10).train()
    assert callback.restarts_at == [3, 6, 9]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5}
    through = trainer(tmp_path / "through", Recording(every=4, rewarmup_steps=2), **saving)
    through.train()
    first = trainer(tmp_path / "stopped", Recording(every=4, rewarmup_steps=2), **saving)

    def die(*_: Any, **__: Any) -> None:
        if first.state.global_step == 7:
            raise KeyboardInterrupt

    first.callback_handler.callbacks[-1].on_step_begin = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(tmp_path / "stopped", Recording(every=4, rewarmup_steps=2), **saving)
    second.train(resume_from_checkpoint=True)
    for (name, mine), other in zip(second.model.named_parameters(), through.model.named_parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(mine, other[1]), name
    original = dict(bert().named_parameters())
    moved = [
        n for n, p in second.model.named_parameters() if "base_layer.weight" in n and not torch.equal(p, original[n])
    ]  # type: ignore[union-attr]
    assert len(moved) == 4, "the base weights are part of what was learnt"


def test_a_checkpoint_without_its_base_weights_is_refused(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer(tmp_path, Recording(every=2, rewarmup_steps=0), **saving).train()
    (tmp_path / "checkpoint-3" / "relora.json").unlink()
    again = trainer(tmp_path, Recording(every=2, rewarmup_steps=0), **saving)
    with pytest.raises(UserError, match=r"checkpoint-3 has no relora.json"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.slow
def test_base_weights_are_not_put_under_another_runs_adapter(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    for folder, lr in (("one", 1e-2), ("two", 2e-2)):
        trainer(tmp_path / folder, Recording(every=2, rewarmup_steps=0), learning_rate=lr, **saving).train()
    again = trainer(tmp_path / "one", Recording(every=2, rewarmup_steps=0), **saving)
    with pytest.raises(UserError, match="is not the one of"):
        again.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "no LambdaLR|is ReduceLROnPlateau"),
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"},
            "load_best_model_at_end",
        ),
    ],
)
def test_trainers_that_would_mislead_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run = trainer(tmp_path, ReLoraRestarts(every=3, rewarmup_steps=1), **changes)
    with pytest.raises(UserError, match=message):
        run.train()


def test_a_model_without_lora_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, ReLoraRestarts(every=3), model=tiny_bert())
    with pytest.raises(UserError, match="ReLoRA cannot train this: the model has no trainable LoRA layers"):
        run.train()
    with pytest.raises(UserError, match="every counts optimizer steps"):
        ReLoraRestarts(every=0)
