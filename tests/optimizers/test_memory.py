"""optimizer_memory against what optimizers really hold after a step, and against the published figures."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.optimizers.adarankgrad import AdaRankGrad
from rankwise.optimizers.equivariant_adam import EquivariantAdam
from rankwise.optimizers.galore import GaLoreAdafactor, GaLoreAdamW
from rankwise.optimizers.lora_rite import LoraRite, lorarite_param_groups
from rankwise.optimizers.memory import METHODS, MemoryEstimate, optimizer_memory
from rankwise.optimizers.param_groups import HIDDEN, model_param_groups
from rankwise.optimizers.per_layer import PerLayerUpdates
from tests.tiny_models import Mlp, tiny_bert, tiny_gpt2, tiny_llama, token_batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
RANK = 6


def held(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state_of(optimizer: torch.optim.Optimizer) -> int:
    return held(value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))


def check_after_steps(model: nn.Module, optimizer: torch.optim.Optimizer, estimate: MemoryEstimate) -> None:
    """Every number of the estimate against the tensors there are after two steps."""
    for _ in range(2):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert estimate.state == state_of(optimizer)
    assert estimate.weights == held(model.parameters()) + held(model.buffers())
    assert estimate.gradients == held(p.grad for p in model.parameters() if p.grad is not None)
    assert estimate.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.total == estimate.weights + estimate.gradients + estimate.state


def low(model: nn.Module) -> Any:
    return model_param_groups(model, RANK)


OF_WEIGHTS: dict[str, tuple[str, dict[str, Any], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "adamw": ("adamw", {}, lambda m: torch.optim.AdamW(m.parameters())),
    "amsgrad": ("adamw", {"amsgrad": True}, lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True)),
    "sgd": ("sgd", {}, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
    "sgd-momentum": ("sgd-momentum", {}, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)),
    "adafactor": ("adafactor", {}, lambda m: torch.optim.Adafactor(m.parameters())),
    "equivariant-adam": ("equivariant-adam", {}, lambda m: EquivariantAdam(m.parameters())),
    "galore": ("galore", {}, lambda m: GaLoreAdamW(low(m))),
    "galore-larger": ("galore", {"side": "larger"}, lambda m: GaLoreAdamW(low(m), side="larger")),
    "galore-narrow": ("galore-narrow", {}, lambda m: GaLoreAdamW(low(m), moments_in="parameter")),
    "galore-adafactor": ("galore-adafactor", {}, lambda m: GaLoreAdafactor(low(m))),
    "galore-adafactor-momentum": (
        "galore-adafactor", {"beta1": 0.9}, lambda m: GaLoreAdafactor(low(m), beta1=0.9),
    ),
    "adarankgrad": ("adarankgrad", {}, lambda m: AdaRankGrad(low(m), energy=0.9999)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OF_WEIGHTS.values(), ids=OF_WEIGHTS)
def test_methods_that_train_the_weights_hold_what_is_said(case: Any, dtype: torch.dtype) -> None:
    name, settings, make = case
    for model in (tiny_llama().to(dtype), nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv1d(8, 8, 3))):
        if isinstance(model, nn.Sequential):
            model.add_module("wide", nn.Linear(8, 9, dtype=dtype))
        estimate = optimizer_memory(model, name, RANK, **settings)
        check_after_steps(model, make(model), estimate)


@pytest.mark.parametrize("case", OF_WEIGHTS.values(), ids=OF_WEIGHTS)
def test_an_optimizer_is_told_before_its_first_step_and_left_alone(case: Any) -> None:
    _, _, make = case
    model = tiny_llama().to(torch.bfloat16)
    optimizer = make(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimate = optimizer_memory(model, optimizer)
    assert not optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check_after_steps(model, optimizer, estimate)
    assert optimizer_memory(model, optimizer).state == estimate.state


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("NAdam", {}), ("RAdam", {}), ("Adamax", {}), ("Adagrad", {}), ("Adadelta", {}), ("Rprop", {}),
        ("RMSprop", {"momentum": 0.9, "centered": True}), ("AdamW", {"fused": True}), ("Adam", {"foreach": True}),
    ],
)  # fmt: skip
def test_optimizers_without_a_rule_are_rehearsed(kind: str, settings: dict[str, Any]) -> None:
    model = Mlp()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **settings)
    check_after_steps(model, optimizer, optimizer_memory(model, optimizer))


def test_a_rehearsal_calls_neither_hooks_nor_schedulers_nor_the_optimizer_itself() -> None:
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    estimate = optimizer_memory(model, optimizer)
    assert not called
    assert not getattr(optimizer, "_opt_called", False)
    assert all(parameter.grad is None for parameter in model.parameters())
    check_after_steps(model, optimizer, estimate)
    scheduler.step()
    assert called == ["before", "after"] * 2


def test_what_cannot_be_rehearsed_says_so() -> None:
    model = Mlp()
    optimizer = torch.optim.ASGD(model.parameters())
    with pytest.raises(ValueError, match="what ASGD keeps cannot be told before its first step"):
        optimizer_memory(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer_memory(model, optimizer).state == state_of(optimizer)


def test_eight_bits_by_hand() -> None:
    """A byte an entry and four for every 256 of them, the last block not full; small tensors in float32."""
    model = nn.Sequential(nn.Linear(100, 90), nn.Linear(90, 40, bias=False))
    large, small = 90 * 100, 90 + 40 * 90
    assert optimizer_memory(model, "adamw-8bit").state == 2 * (large + 4 * 36 + 4 * small)
    r, m, n = 50, 90, 100  # the projected gradient, r × n, is large; 40 rows are fewer than r
    assert optimizer_memory(model, "galore-8bit", r).state == 4 * m * r + 2 * (r * n + 4 * 20) + 2 * 4 * small


@pytest.mark.parametrize("name", ["adamw-8bit", "galore-8bit"])
def test_eight_bits_as_bitsandbytes_keeps_them(name: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(200, 300), nn.LayerNorm(300), nn.Linear(300, 130)).to(torch.bfloat16)
    if name == "galore-8bit":
        optimizer: Any = GaLoreAdamW(model_param_groups(model, 64), moments_in="8-bit")
    else:
        optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    codes = {id(value): value for state in optimizer.state.values() for key, value in state.items() if "qmap" in key}
    own = [
        v for state in optimizer.state.values() for k, v in state.items() if isinstance(v, Tensor) and "qmap" not in k
    ]
    assert held(codes.values()) <= 2048  # one table of 256 numbers for each of the two moments, however many parameters
    assert optimizer_memory(model, name, 64).state == held(own)


# --- adapters


def adapted(name: str, model: nn.Module, task: str | None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    from rankwise.adapters import DeepLoraConfig

    config: Any = DeepLoraConfig if name == "deep-lora" else LoraConfig
    return get_peft_model(model, config(r=RANK, target_modules="all-linear", task_type=task))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("make", "task"), [(tiny_llama, "CAUSAL_LM"), (tiny_gpt2, "CAUSAL_LM"), (tiny_bert, "SEQ_CLS"), (tiny_bert, None)]
)
@pytest.mark.parametrize("name", ["lora", "deep-lora"])
def test_adapters_hold_what_is_said(name: str, make: Any, task: str | None, dtype: torch.dtype) -> None:
    base = make().to(dtype)
    if task is None:  # without a head on top
        base = base.bert
    estimate = optimizer_memory(base, name, RANK)
    model = adapted(name, base, task)
    check_after_steps(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), estimate)
    assert optimizer_memory(model, "adamw").total == estimate.total  # counted as it stands


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("make", "task"), [(tiny_llama, "CAUSAL_LM"), (tiny_bert, "SEQ_CLS")])
def test_lora_rite_holds_what_is_said(make: Any, task: str, dtype: torch.dtype) -> None:
    base = make().to(dtype)
    estimate = optimizer_memory(base, "lora-rite", RANK)
    model = adapted("lora", base, task)
    optimizer = LoraRite(lorarite_param_groups(model, lr=0.1, head_lr=0.1))
    assert optimizer_memory(model, optimizer).state == estimate.state
    check_after_steps(model, optimizer, estimate)


def test_lora_variants_take_what_lora_takes_and_a_narrow_layer_gets_no_deep_lora() -> None:
    model = Mlp(d_out=4)
    assert len({optimizer_memory(model, name, 4).total for name in ("lora", "lora-plus", "relora")}) == 1
    lora, deep = optimizer_memory(model, "lora", 4), optimizer_memory(model, "deep-lora", 4)
    assert [row.rank for row in lora.parameters if row.kind == HIDDEN] == [4, 4, 4]
    assert [row.rank for row in deep.parameters if row.kind == HIDDEN] == [4, 4, None]
    one = optimizer_memory(model, "deep-lora", 4, inner_depth=1)
    assert deep.trainable - one.trainable == 2 * 2 * 4 * 4


def test_adapters_beside_quantized_weights_go_by_the_layers_sides_and_are_float32() -> None:
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    packed = torch.zeros(48 * 64 // 2, 1, dtype=torch.uint8)  # two entries a byte, as bitsandbytes packs four bits
    model[0].weight = nn.Parameter(packed, requires_grad=False)
    estimate = optimizer_memory(model, "lora", 4)
    assert estimate.trainable == 4 * (64 + 48)
    assert estimate.weights == 48 * 32 + 4 * estimate.trainable


def test_convolutions_get_adapters_in_models_made_of_them() -> None:
    mostly = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(16, 10))
    hardly = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(160, 100))
    kernel, dense = 4 * (8 * 9 + 16), lambda m, n: 4 * (m + n)
    assert optimizer_memory(mostly, "lora", 4).trainable == kernel + dense(10, 16)
    assert optimizer_memory(hardly, "lora", 4).trainable == dense(100, 160)
    assert optimizer_memory(hardly, "lora", 4, include=["0"]).trainable == kernel


# --- the published figures


@pytest.fixture(scope="module")
def llama_7b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


def test_galore_saves_65_1_percent_of_adams_state_at_llama_7b(llama_7b: nn.Module) -> None:
    full = optimizer_memory(llama_7b, "adamw", dtype=torch.bfloat16)
    galore = optimizer_memory(llama_7b, "galore-narrow", rank=1024, dtype=torch.bfloat16)
    assert full.trainable == galore.trainable == 6_738_415_616
    assert 1 - galore.state / full.state == pytest.approx(0.651, abs=5e-4)
    rows = [(a.state, b.state) for a, b in zip(full.parameters, galore.parameters, strict=True) if b.rank is not None]
    assert len(rows) == 32 * 7
    assert 1 - sum(b for _, b in rows) / sum(a for a, _ in rows) == pytest.approx(0.677, abs=5e-4)
    others = {b.kind for b in galore.parameters if b.rank is None}
    assert others == {"embedding", "output head", "norm or bias"}
    # the same by hand: mr + 2nr for m ≤ n, against 2mn; 2 bytes each
    m, n, wide, r = 4096, 4096, 11008, 1024
    projected = 32 * (4 * (m * r + 2 * n * r) + 3 * (m * r + 2 * wide * r))
    assert sum(b for _, b in rows) == 2 * projected
    # wide moments, the default, cost twice that
    wide_state = optimizer_memory(llama_7b, "galore", rank=1024, dtype=torch.bfloat16).state
    assert wide_state == pytest.approx(2 * galore.state, rel=1e-6)


def test_everything_about_llama_7b_is_told_without_memory_or_patience(llama_7b: nn.Module) -> None:
    start = time.perf_counter()
    for name in METHODS:
        estimate = optimizer_memory(llama_7b, name, 64, dtype=torch.bfloat16)
        assert estimate.weights >= 2 * 6_738_415_616
    assert all(parameter.is_meta and parameter.grad is None for parameter in llama_7b.parameters())
    assert time.perf_counter() - start < 30


# --- what is counted


def test_the_dtype_is_as_if_the_model_had_been_cast() -> None:
    model = tiny_llama()
    model.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    for name in METHODS:
        said = optimizer_memory(model, name, 4, dtype=torch.bfloat16)
        assert said.as_dict() == optimizer_memory(tiny_cast(model), name, 4).as_dict(), name


def tiny_cast(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).to(torch.bfloat16)


def test_shared_weights_count_once_and_frozen_ones_have_no_state() -> None:
    model = tiny_gpt2()
    estimate = optimizer_memory(model)
    assert sum("wte" in row.name or "lm_head" in row.name for row in estimate.parameters) == 1
    assert estimate.weights == held(model.parameters()) + held(model.buffers())
    model.transformer.wte.weight.requires_grad_(False)
    for name in ("adamw", "galore"):
        row = next(row for row in optimizer_memory(model, name, 4).parameters if "wte" in row.name)
        assert (row.trainable, row.gradients, row.state) == (0, 0, 0)
        assert row.weights == 99 * 32 * 4


def test_an_optimizer_over_some_parameters_leaves_the_gradients_of_all() -> None:
    model = Mlp()
    estimate = optimizer_memory(model, torch.optim.AdamW(model.lin1.parameters()))
    assert estimate.gradients == held(model.parameters())
    assert estimate.state == 2 * held(model.lin1.parameters()) + 4


def test_per_layer_updates_hold_the_largest_gradient_only() -> None:
    model = tiny_llama()
    optimizer = GaLoreAdamW(low(model))
    PerLayerUpdates(optimizer)
    estimate = optimizer_memory(model, "galore-per-layer", RANK)
    largest = 0

    def watch(_: Tensor) -> None:
        nonlocal largest
        largest = max(largest, held(p.grad for p in model.parameters() if p.grad is not None))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(watch)
    model(**token_batch(labels="tokens")).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert estimate.gradients == 4 * 99 * 32
    assert largest <= estimate.gradients
    optimizer.step()
    assert estimate.state == state_of(optimizer)


def test_include_and_exclude_choose_layers_for_every_low_rank_method() -> None:
    model = tiny_llama()
    for name in ("galore", "lora", "deep-lora"):
        rows = optimizer_memory(model, name, 4, include=["self_attn"], exclude=["o_proj"]).parameters
        assert {row.name.split(".")[-2] for row in rows if row.rank == 4} == {"q_proj", "k_proj", "v_proj"}


def test_the_dictionary_holds_plain_numbers() -> None:
    import json

    content = json.loads(json.dumps(optimizer_memory(Mlp(), "galore", 4).as_dict()))
    assert content["total"] == content["weights"] + content["gradients"] + content["state"]
    assert sum(row["state"] for row in content["parameters"]) == content["state"]
    assert content["parameters"][0] == {
        "name": "lin0.weight", "shape": [24, 20], "kind": HIDDEN, "rank": 4, "trainable": 480, "weights": 1920,
        "gradients": 1920, "state": 4 * (20 * 4 + 2 * 24 * 4),
    }  # fmt: skip


def test_mistakes_are_explained() -> None:
    model = Mlp()
    with pytest.raises(ValueError, match="no method 'adam'; there are adamw,"):
        optimizer_memory(model, "adam")
    with pytest.raises(ValueError, match="no hidden matrix is larger than rank=128"):
        optimizer_memory(model, "galore")
    with pytest.raises(ValueError, match=r"include=\['x'\] matches no"):
        optimizer_memory(model, "lora", include=["x"])
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        optimizer_memory(model, "lora", rank=0)
    with pytest.raises(ValueError, match="parameters that are not the model's"):
        optimizer_memory(model, torch.optim.SGD(Mlp().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="has its settings"):
        optimizer_memory(model, torch.optim.SGD(model.parameters(), lr=0.1), momentum=0.9)
    with pytest.raises(ValueError, match="expected the name of a method or a torch optimizer, got float"):
        optimizer_memory(model, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not depend on 'momentum'; its settings are amsgrad"):
        optimizer_memory(model, "adamw", momentum=0.9)
    with pytest.raises(ValueError, match="moments_in must be one of wide, parameter, 8-bit, got 'narrow'"):
        optimizer_memory(model, "galore", 4, moments_in="narrow")
    for dtype in ("bf16", torch.int8):
        with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
            optimizer_memory(model, "adamw", dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="side must be one of"):
        optimizer_memory(model, "galore", 4, side="top")
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="has adapters already"):
        optimizer_memory(get_peft_model(model, LoraConfig(target_modules=["lin0"])), "lora")
