"""ZeRO-3's empty parameters: everything is as without sharding, shown with a stand-in for DeepSpeed.

The stand-in keeps DeepSpeed's promises on one process: a parameter is empty outside of ``GatheredParameters``, whole
inside, and what is written there is lost unless a ``modifier_rank`` says whose writing counts. The engine's forward hooks,
which fill a layer's own weights before it runs and before its backward pass, are played by :func:`engine`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from rankwise.adapters import (
    DeepLoraConfig,
    create_deeplora_optimizer,
    initialize_deeplora_weights,
    save_as_lora,
    save_subspaces,
    solve_deeplora_weights,
)
from rankwise.adapters.sharded_weights import gathered
from rankwise.testing.adapter_contract import deeplora_layers, disturbed
from tests.adapters.test_export import mixed
from tests.tiny_models import tiny_gpt2, token_batch

TARGETS = ["words", "lines", "square", "transposed"]


class GatheredParameters:
    """As in ``deepspeed.zero``, on one process."""

    def __init__(self, params: Iterable[Any], modifier_rank: int | None = None):
        self.params, self.modifier_rank = list(params), modifier_rank
        assert all(hasattr(parameter, "ds_id") for parameter in self.params)

    def __enter__(self) -> None:
        for parameter in self.params:
            assert parameter.numel() == 0, "gathered twice: leaving the inner one would empty it for the outer one"
            parameter.data = parameter.stored.clone()

    def __exit__(self, *_: object) -> None:
        for parameter in self.params:
            if self.modifier_rank is not None:
                assert parameter.data.shape == parameter.ds_shape
                parameter.stored = parameter.data.clone()
            parameter.data = parameter.data.new_empty(0)


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("deepspeed")
    stand_in.zero = ModuleType("deepspeed.zero")  # type: ignore[attr-defined]
    stand_in.zero.GatheredParameters = GatheredParameters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)


def sharded(model: Any) -> Any:
    for number, parameter in enumerate(model.parameters()):
        if not hasattr(parameter, "ds_id"):
            parameter.ds_id, parameter.ds_shape, parameter.ds_numel = number, parameter.shape, parameter.numel()
            parameter.stored = parameter.data.clone()
            parameter.data = parameter.data.new_empty(0)
    return model


@contextmanager
def engine(model: nn.Module) -> Iterator[None]:
    """A layer finds its own weights when it runs, and again when it is differentiated."""

    def fill(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "ds_id") and not parameter.numel():
                parameter.data = parameter.stored.clone()  # type: ignore[attr-defined]

    def empty(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.new_empty(0)

    def after(module: nn.Module, _inputs: Any, output: Any) -> None:
        empty(module)
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: fill(module))

    layers = [module for module in model.modules() if not list(module.children())]
    handles = [layer.register_forward_pre_hook(lambda module, _: fill(module)) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            empty(layer)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter as it would be gathered; nothing is left lying about whole."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        assert not hasattr(parameter, "ds_id") or not parameter.numel(), f"{name} was left gathered"
    return {name: getattr(parameter, "stored", parameter).detach().clone() for name, parameter in parameters.items()}


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.numel(), name
        assert torch.equal(value, other[name]), name


def adapted(base: nn.Module | None = None, **settings: Any) -> PeftModel:
    torch.manual_seed(3)
    settings = {"r": 4, "target_modules": TARGETS, "modules_to_save": ["head"], **settings}
    return get_peft_model(mixed() if base is None else base, DeepLoraConfig(**settings))


def gpt2(**settings: Any) -> PeftModel:
    base = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    return adapted(base.double(), **{"target_modules": "all-linear", "modules_to_save": None, **settings})


def test_layers_of_a_sharded_model_get_the_right_sizes() -> None:
    """Also those whose sizes only the weight knows: Conv1D and convolutions."""
    wanted, found = adapted(), adapted(sharded(mixed()))
    assert {n: p.shape for n, p in found.named_parameters() if "deeplora" in n} == {
        n: p.shape for n, p in wanted.named_parameters() if "deeplora" in n
    }
    assert found.peft_config["default"].layouts == wanted.peft_config["default"].layouts


@pytest.mark.parametrize("variant", ["zero-left", "compressed", "spectral", "random"])
def test_initialization_places_the_same_frames(variant: str) -> None:
    batch = [token_batch(labels="tokens")]
    plain = disturbed(gpt2(variant=variant))
    apart = sharded(disturbed(gpt2(variant=variant)))
    wanted = initialize_deeplora_weights(plain, batch, seed=5)
    with engine(apart):
        found = initialize_deeplora_weights(apart, batch, seed=5)
    assert [layer.gradient_norm for layer in found.layers] == pytest.approx(
        [layer.gradient_norm for layer in wanted.layers], nan_ok=True
    )
    assert_alike(whole(plain), whole(apart))


def test_the_ridge_start_is_the_same() -> None:
    ids = token_batch(rows=8)["input_ids"]
    rows, targets = [{"input_ids": row[None]} for row in ids], torch.linspace(-1, 1, 8)
    for noise in (0.0, 10.0):  # with and without an update
        generator = torch.Generator().manual_seed(0)
        noisy = targets + noise * torch.randn(8, generator=generator)
        plain, apart = gpt2(), sharded(gpt2())
        solve_deeplora_weights(plain, rows, noisy, outputs_fn=first_logit)
        with engine(apart):
            solve_deeplora_weights(apart, rows, noisy, outputs_fn=first_logit)
        assert_alike(whole(plain), whole(apart))


def first_logit(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    return model(**row).logits[0, -1, 0]


@pytest.mark.parametrize("bias", ["none", "all", "deeplora_only"])
def test_saving_writes_the_same_tensors(tmp_path: Path, bias: str) -> None:
    plain, apart = disturbed(adapted(bias=bias)), sharded(disturbed(adapted(bias=bias)))
    for name, model in (("plain", plain), ("apart", apart)):
        save_as_lora(model, tmp_path / name / "lora")
        model.save_pretrained(tmp_path / name / "deep")
        save_subspaces(model, tmp_path / name / "frames.safetensors")
    assert_alike(get_peft_model_state_dict(plain), get_peft_model_state_dict(apart))
    for file in ("lora/adapter_model.safetensors", "deep/adapter_model.safetensors", "frames.safetensors"):
        assert_alike(load_file(tmp_path / "plain" / file), load_file(tmp_path / "apart" / file))
    again = sharded(adapted(bias=bias))
    initialize_deeplora_weights(again, subspaces=tmp_path / "apart" / "frames.safetensors")
    frames = load_file(tmp_path / "plain" / "frames.safetensors")
    key = "base_model.model.square.deeplora_right.default.weight"
    assert torch.equal(whole(again)[key], frames["square.right"].mT)
    whole(apart)


def test_a_state_dict_that_somebody_gathered_is_taken_as_it_is(tmp_path: Path) -> None:
    plain, apart = disturbed(adapted()), sharded(disturbed(adapted()))
    save_as_lora(plain, tmp_path / "plain")
    save_as_lora(apart, tmp_path / "apart", state_dict=plain.state_dict())
    assert_alike(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "apart")))


def test_only_the_process_that_writes_writes(tmp_path: Path) -> None:
    model = disturbed(adapted())
    summary = save_as_lora(model, tmp_path / "lora", is_main_process=False)
    assert not list(tmp_path.iterdir())
    assert summary.layers == save_as_lora(model, tmp_path / "lora").layers


def _merge(model: PeftModel) -> None:
    model.merge_adapter(safe_merge=True)


def _merge_and_unmerge(model: PeftModel) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def _unload(model: PeftModel) -> None:
    model.merge_and_unload()


def _mix(model: PeftModel) -> None:
    torch.manual_seed(9)
    model.add_adapter("other", DeepLoraConfig(r=2, target_modules=TARGETS))
    disturbed(model, "other", seed=4)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "mix")


def _start_over(model: PeftModel) -> None:
    torch.manual_seed(9)
    for layer in deeplora_layers(model).values():
        layer.reset_adapter("default", no_op=False)


@pytest.mark.parametrize("work", [_merge, _merge_and_unmerge, _unload, _mix, _start_over])
def test_what_reads_and_writes_weights_does_the_same(work: Callable[[PeftModel], None]) -> None:
    plain, apart = disturbed(adapted()), sharded(disturbed(adapted()))
    work(plain)
    work(apart)
    assert_alike(whole(plain), whole(apart))


def test_merging_a_tied_head_leaves_the_embedding_alone() -> None:
    plain, apart = (disturbed(gpt2(target_modules=["lm_head"])) for _ in range(2))
    merged, merged_apart = plain.merge_and_unload(), sharded(apart).merge_and_unload()
    assert_alike(whole(merged), whole(merged_apart))
    assert merged_apart.lm_head.weight is not merged_apart.transformer.wte.weight


def test_the_dense_update_is_the_same() -> None:
    plain, apart = disturbed(adapted()), sharded(disturbed(adapted()))
    assert_alike(
        {name: layer.get_delta_weight("default") for name, layer in deeplora_layers(plain).items()},
        {name: layer.get_delta_weight("default") for name, layer in deeplora_layers(apart).items()},
    )
    whole(apart)


def test_the_optimizer_sees_whether_u_is_zero() -> None:
    with pytest.raises(ValueError, match="would freeze a U that is zero"):
        create_deeplora_optimizer(sharded(adapted()), outer_lr_ratio=0.0)
    create_deeplora_optimizer(sharded(disturbed(adapted())), outer_lr_ratio=0.0)


def test_reading_keeps_no_changes_and_writing_does() -> None:
    for writing, value in ((False, 1.0), (True, 2.0)):
        (parameter,) = sharded(nn.ParameterList([nn.Parameter(torch.ones(3))]))
        with torch.no_grad(), gathered([parameter, nn.Parameter(torch.ones(2)), parameter], writing=writing):
            assert parameter.shape == (3,)
            with gathered([parameter], writing=True):  # inside of somebody else's: his to scatter
                parameter.fill_(2.0)
            assert parameter.shape == (3,)
        assert parameter.stored.tolist() == [value] * 3


def test_weights_that_are_whole_need_no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it would fail
    model = disturbed(adapted())
    _merge_and_unmerge(model)
    initialize_deeplora_weights(model)
    get_peft_model_state_dict(model)


def test_pieces_that_fsdp_holds_are_not_written_into() -> None:
    model = gpt2()
    layer = next(iter(deeplora_layers(model).values()))
    layer.factors("default").left.data = torch.zeros(5)  # a flat piece
    with pytest.raises(ValueError, match=r"sharded already.*before fully_shard"):
        initialize_deeplora_weights(model)
    with pytest.raises(ValueError, match="sharded already"):
        solve_deeplora_weights(model, [], torch.zeros(0), outputs_fn=first_logit)
