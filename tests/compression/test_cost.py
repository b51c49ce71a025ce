"""estimate_cost against torch's own count of a real forward and backward pass, and against the formulas of App. B."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankwise.compression import estimate_cost
from tests.tiny_models import Mlp, tiny_bert, tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class LowRank(nn.Module):
    """left·(right·x), as rankwise.compression.LowRankLinear computes it."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.right, self.left = nn.Parameter(torch.zeros(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.right.mT @ self.left.mT


def counted(model: nn.Module, run: Callable[[], Tensor]) -> tuple[int, int]:
    """(forward, backward) FLOPs by torch."""
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        loss = run()
    with backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def of_transformer(model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, int]:
    return counted(model, lambda: model(**batch).loss)


TRANSFORMERS = {"bert": (tiny_bert, "class"), "llama": (tiny_llama, "tokens"), "gpt2": (tiny_gpt2, "tokens")}


@pytest.mark.parametrize(("make", "labels"), TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_a_batch_costs_what_torch_counts(make: Any, labels: str) -> None:
    model, batch = make(attn_implementation="eager"), token_batch(rows=3, tokens=11, labels=labels)
    cost = estimate_cost(model, batch)
    assert cost.attention_forward is not None
    assert cost.attention_backward is not None
    ours = (cost.forward + cost.attention_forward, cost.backward + cost.attention_backward)
    assert ours == of_transformer(model, batch)
    assert cost.uncounted == ()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_number_of_tokens_costs_the_same_where_every_layer_sees_every_token(make: Any) -> None:
    model, batch = make(), token_batch(rows=3, tokens=11, labels="tokens")
    by_number, by_batch = estimate_cost(model, 33, sequence_length=11), estimate_cost(model, batch)
    assert by_number.attention_forward == by_batch.attention_forward
    different = [a.name for a, b in zip(by_number.layers, by_batch.layers, strict=True) if a != b]
    assert different == (["transformer.wpe"] if make is tiny_gpt2 else [])  # whose rows all sequences share
    assert (by_number.forward, by_number.backward) == (by_batch.forward, by_batch.backward)


def test_a_number_of_tokens_counts_an_encoders_pooler_too_often() -> None:
    by_batch, by_number = estimate_cost(tiny_bert(), token_batch(rows=3, tokens=11)), estimate_cost(tiny_bert(), 33)
    for exact, upper in zip(by_batch.layers, by_number.layers, strict=True):
        pooled = "pooler" in exact.name or "classifier" in exact.name
        assert upper.forward == (11 if pooled else 1) * exact.forward


@pytest.mark.parametrize("frozen", ["lin0", "lin1", "head", "all but lin1", "none"])
def test_frozen_weights_and_inputs_without_a_gradient_cost_nothing_backward(frozen: str) -> None:
    model, x = Mlp(), torch.randn(9, 20)
    for name in ("lin0", "lin1", "head"):
        if name == frozen or (frozen == "all but lin1" and name != "lin1"):
            model.get_submodule(name).requires_grad_(False)
    by_torch = counted(model, lambda: model(x).sum())
    for cost in (estimate_cost(model, x), estimate_cost(model, 9)):
        assert (cost.forward, cost.backward) == by_torch
    assert all(parameter.grad is None or not parameter.is_meta for parameter in model.parameters())


def test_an_input_that_wants_a_gradient_costs_one() -> None:
    model, x = Mlp(), torch.randn(9, 20, requires_grad=True)
    by_torch = counted(model, lambda: model(x).sum())
    cost = estimate_cost(model, (x,))
    assert (cost.forward, cost.backward) == by_torch
    assert cost.backward == 2 * cost.forward  # 3·Θ(nd²) in all


def test_lora_and_frozen_weights_side_by_side() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_llama(attn_implementation="eager"), LoraConfig(r=4, target_modules=["v_proj", "up_proj"])
    )
    batch = token_batch(labels="tokens")
    cost = estimate_cost(model, batch)
    by_torch = of_transformer(model, batch)
    assert cost.forward + (cost.attention_forward or 0) == by_torch[0]
    layers = {layer.name.removeprefix("base_model.model.model.layers."): layer for layer in cost.layers}
    assert layers["0.self_attn.v_proj.lora_A.default"].backward_inputs == 0  # nothing trained stands before it
    assert layers["0.self_attn.v_proj.lora_A.default"].backward_weights > 0
    assert layers["1.self_attn.v_proj.base_layer"].backward_weights == 0
    assert layers["1.self_attn.v_proj.base_layer"].backward_inputs > 0
    # scores of the first layer have no gradient, nor do its q and k: torch leaves out what attention_backward has
    assert cost.backward + (cost.attention_backward or 0) == by_torch[1] + 3 * 2 * 28 * 7 * 32


def test_a_pair_of_factors_costs_r_times_in_plus_out() -> None:
    before = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 40, bias=False))
    after = nn.Sequential(LowRank(40, 30, 5), LowRank(30, 40, 5))
    x = torch.randn(8, 40)
    by_torch = counted(after, lambda: after(x).sum())
    for cost in (estimate_cost(after, x), estimate_cost(after, 8)):
        assert (cost.forward, cost.backward) == by_torch
        assert cost.forward == 2 * 2 * 8 * 5 * (40 + 30)
        assert [layer.kind for layer in cost.layers] == ["low-rank pair"] * 2
        assert cost.weight_bytes == 4 * 2 * 5 * (40 + 30)
    assert estimate_cost(before, 8).forward / cost.forward == pytest.approx(40 * 30 / (5 * 70))


def test_the_factorized_layers_of_this_room_are_counted() -> None:
    from rankwise.compression.low_rank_layers import LowRankConv2d, LowRankLinear

    model = nn.Sequential(
        LowRankConv2d.like(nn.Conv2d(3, 12, 3, stride=2, padding=1), 4), nn.Flatten(2), LowRankLinear(16, 10, 3)
    )
    x = torch.randn(2, 3, 8, 8)
    by_torch = counted(model, lambda: model(x).sum())
    cost = estimate_cost(model, x)
    assert (cost.forward, cost.backward) == by_torch
    assert cost.uncounted == ()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, (3, 2), stride=2), nn.Conv2d(4, 6, 3, dilation=2, bias=False),
        nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(4, 6, 3, stride=2),
    ],
    ids=["padded", "strided", "dilated", "pointwise", "transposed"],
)  # fmt: skip
def test_convolutions_cost_what_torch_counts(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer)
    x = torch.randn(2, 3, 9, 8)
    by_torch = counted(model, lambda: model(x).sum())
    cost = estimate_cost(model, x)
    assert (cost.forward, cost.backward) == by_torch
    assert estimate_cost(layer, 100).layers[0].forward == cost.layers[1].forward / cost.layers[1].rows * 100


def test_grouped_convolutions() -> None:
    """Forward as torch counts; backward twice that: torch counts ∇W of all pairs of channels, of which g-th parts exist."""
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose2d(6, 4, 2, groups=2))
    x = torch.randn(2, 6, 9, 8)
    cost = estimate_cost(model, x)
    assert cost.forward == counted(model, lambda: model(x).sum())[0]
    assert cost.layers[1].forward == 2 * 2 * 7 * 6 * 6 * 9
    assert cost.layers[1].backward == 2 * cost.layers[1].forward


def test_bytes_by_hand() -> None:
    """Of Y = WX, n = 100, 64 → 32, float32, after a trained layer."""
    model = nn.Sequential(nn.Linear(8, 64, bias=False), nn.Linear(64, 32, bias=False))
    first, layer = estimate_cost(model, 100).layers
    W, X, Y = 64 * 32, 100 * 64, 100 * 32
    assert layer.weight_bytes == 4 * W
    assert layer.stored_bytes == 4 * X
    assert layer.forward_bytes == 4 * (W + X + Y)
    assert layer.backward_bytes == 4 * 2 * (W + X + Y)
    assert first.backward_bytes == first.forward_bytes  # no ∇X
    model[1].weight.requires_grad_(False)
    layer = estimate_cost(model, 100).layers[1]
    assert (layer.stored_bytes, layer.backward_bytes) == (0, 4 * (W + X + Y))
    half = estimate_cost(model.to(torch.bfloat16), 100)
    assert half.forward_bytes == estimate_cost(model.float(), 100).forward_bytes / 2


def test_a_pair_keeps_both_inputs_for_its_gradients() -> None:
    (pair,) = estimate_cost(LowRank(40, 30, 5), 8).layers
    assert pair.stored_bytes == 4 * 8 * (40 + 5)
    assert pair.forward_bytes == 4 * (5 * 40 + 8 * 40 + 8 * 5 + 30 * 5 + 8 * 5 + 8 * 30)


def test_shared_weights_weigh_once_and_compute_twice() -> None:
    model = tiny_gpt2()
    cost = estimate_cost(model, 10)
    table, head = cost.layers[0], cost.layers[-1]
    assert (table.kind, table.forward, table.weight_bytes) == ("embedding", 0, 4 * 99 * 32)
    assert (head.name, head.forward, head.weight_bytes) == ("lm_head", 2 * 10 * 32 * 99, 0)
    assert cost.weight_bytes == 4 * sum(p.numel() for p in model.parameters() if p.ndim == 2) + 4 * sum(
        p.numel() for name, p in model.named_parameters() if "c_" in name and p.ndim == 1
    )
    shared = nn.Linear(6, 6)
    twice = nn.Sequential(shared, shared)
    (layer,) = estimate_cost(twice, torch.randn(5, 6)).layers
    assert (layer.rows, layer.forward) == (10, 2 * 10 * 36)


def test_nothing_is_computed_and_the_model_stays_as_it_is() -> None:
    model = tiny_bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    estimate_cost(model, token_batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with torch.device("meta"):
        skeleton = tiny_bert()
    assert estimate_cost(skeleton, token_batch()).as_dict() == estimate_cost(model, token_batch()).as_dict()


def test_the_training_mode_and_dropout_change_nothing() -> None:
    batch = token_batch(labels="tokens")
    training = estimate_cost(tiny_llama(attention_dropout=0.5).train(), batch)
    assert training.as_dict() == estimate_cost(tiny_llama().eval(), batch).as_dict()


def test_what_is_not_counted_is_named() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.LayerNorm((3, 8)), "c": nn.Linear(8, 8)})
    cost = estimate_cost(model, 5)
    assert [layer.name for layer in cost.layers] == ["c"]
    assert cost.uncounted == ("a.in_proj_weight", "a.out_proj.weight")


def test_the_dictionary_is_json() -> None:
    content = json.loads(json.dumps(estimate_cost(Mlp(), 9).as_dict()))
    assert content["backward"] == sum(layer["backward"] for layer in content["layers"])
    assert content["attention_forward"] is None


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if bool(x.sum() > 0) else x


def test_mistakes_are_explained() -> None:
    wrong: Any
    for wrong in (0, -3, True, None, "text", 2.5):
        with pytest.raises(ValueError, match="tokens must be a number of at least 1, or a batch"):
            estimate_cost(Mlp(), wrong)
    for wrong in ([], {"y": torch.ones(2, 20)}):
        with pytest.raises(ValueError, match="cannot be called with this batch"):
            estimate_cost(Mlp(), wrong)
    model = LooksAtValues()
    with pytest.raises(ValueError, match="cannot be gone through by shapes alone"):
        estimate_cost(model, torch.ones(2, 4))
    assert not model.linear._forward_hooks
    with pytest.raises(ValueError, match="num_attention_heads"):
        estimate_cost(Mlp(), 8, sequence_length=4)
    with pytest.raises(ValueError, match="sequence_length must be at least 1"):
        estimate_cost(tiny_llama(), 8, sequence_length=0)
    with pytest.raises(ValueError, match="input_ids, which the batch has not"):
        estimate_cost(Mlp(), torch.ones(2, 20), sequence_length=4)
