"""Experts fused into one parameter (``target_parameters``), against a model whose weights were changed expert by expert."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from rankwise.adapters import (
    DeepLoraConfig,
    create_deeplora_optimizer,
    deeplora_from_adapter,
    export_adapter_folder,
    initialize_deeplora_weights,
    save_as_lora,
    save_subspaces,
    solve_deeplora_weights,
)
from rankwise.testing.adapter_contract import deeplora_layers, dense_update, disturbed
from tests.adapters.test_initialization import assert_same, state
from tests.adapters.test_model_families import FAMILIES, LLAMA, Family, logits

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
MODELS = {
    "mixtral": FAMILIES["mixtral"],
    "olmoe": FAMILIES["olmoe"],
    "qwen2-moe": FAMILIES["qwen2-moe"],
    "deepseek-v3": FAMILIES["deepseek-v3"],
    "gpt-oss": Family(  # weights stored as (experts, in, out), with biases
        "GptOssForCausalLM", "GptOssConfig",
        {**LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}, set(),
    ),
}  # fmt: skip


def adapted(family: Family, **settings: Any) -> PeftModel:
    return get_peft_model(family.build(), config_of(**settings)).eval()


def config_of(**settings: Any) -> DeepLoraConfig:
    return DeepLoraConfig(**{"r": 4, "target_modules": [], "target_parameters": BOTH, **settings})


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """A layer's weight in a plain model, by what the wrapper is called in an adapted one."""
    layer = deeplora_layers(model)[name]
    path = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return path + "." + layer.parameter_name


@torch.no_grad()
def changed_by_hand(family: Family, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """The plain model with every expert's dense update added to its weight."""
    plain = family.build()
    for name, layer in deeplora_layers(model).items():
        weight = plain.get_parameter(parameter_of(model, name))
        left, inner, right = layer.factors(adapter_name)
        for expert in range(len(weight)):
            core = torch.eye(inner.shape[-1], dtype=inner.dtype)
            for factor in inner[:, expert]:
                core = factor @ core
            start = layer.init_scale[adapter_name] ** layer.inner_depth[adapter_name]
            update = left[expert] @ (core - start * torch.eye(len(core), dtype=core.dtype)) @ right[expert]
            weight[expert] += update.mT if family is MODELS["gpt-oss"] else update
    return plain


@pytest.fixture(params=MODELS)
def family(request: pytest.FixtureRequest) -> Family:
    return MODELS[request.param]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# -- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["zero-left", "compressed"])
def test_a_new_adapter_changes_no_bit(family: Family, variant: str) -> None:
    base = logits(family.build(), family)
    model = adapted(family, variant=variant)
    assert torch.equal(logits(model, family), base)
    initialize_deeplora_weights(model, [family.data()])
    assert torch.equal(logits(model, family), base)


@pytest.mark.parametrize("settings", [{}, {"variant": "compressed", "init_scale": 0.3}, {"inner_depth": 1}], ids=str)
def test_every_expert_has_its_own_update(family: Family, settings: dict[str, Any]) -> None:
    model = disturbed(adapted(family, **settings))
    assert len(deeplora_layers(model)) == 2 * sum(
        n.endswith("experts.down_proj") for n, _ in family.build().named_parameters()
    )
    wanted = logits(changed_by_hand(family, model), family)
    assert not torch.allclose(wanted, logits(family.build(), family))
    assert_close(logits(model, family), wanted)


def test_gradients_are_those_of_the_dense_expression(family: Family) -> None:
    """By the chain rule from the gradient of the plain model's weight, taken at the changed weights."""
    model = disturbed(adapted(family))
    plain = changed_by_hand(family, model)
    plain(**family.data()).loss.backward()
    model(**family.data()).loss.backward()
    for name, layer in deeplora_layers(model).items():
        gradient = plain.get_parameter(parameter_of(model, name)).grad
        gradient = gradient.mT if family is MODELS["gpt-oss"] else gradient
        left, inner, right = (factor.detach().requires_grad_() for factor in layer.factors("default"))
        core = inner[2] @ inner[1] @ inner[0]
        ((left @ core @ right) * gradient).sum().backward()
        for factor, expected in zip(layer.factors("default"), (left, inner, right), strict=True):
            torch.testing.assert_close(factor.grad, expected.grad, rtol=1e-8, atol=1e-12)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = disturbed(adapted(MODELS["mixtral"]))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()(**MODELS["mixtral"].data()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_a_step_trains_every_expert_that_tokens_reach(family: Family) -> None:
    model = adapted(family).train()
    optimizer = create_deeplora_optimizer(model, torch.optim.SGD, lr=0.1, outer_lr_ratio=1.0)
    model(**family.data()).loss.backward()
    optimizer.step()
    trained = [
        bool(expert.any()) for layer in deeplora_layers(model).values() for expert in layer.get_delta_weight("default")
    ]
    assert sum(trained) > len(trained) / 2


def test_experts_beside_linear_layers() -> None:
    family = MODELS["mixtral"]
    model = disturbed(adapted(family, target_modules=None))
    kinds = {type(layer).__name__ for layer in deeplora_layers(model).values()}
    assert kinds == {"DeepLoraLinear", "ParamWrapper"}
    adapted_logits = logits(model, family)
    assert_close(logits(model.merge_and_unload(), family), adapted_logits)


def test_a_matrix_that_is_no_layers() -> None:
    """The router of Mixtral: one (experts, hidden) matrix."""
    family = MODELS["mixtral"]
    model = disturbed(adapted(family, target_parameters=["mlp.gate.weight"], r=2))
    wanted = logits(model, family)
    plain = family.build()
    with torch.no_grad():
        for name, layer in deeplora_layers(model).items():
            plain.get_parameter(parameter_of(model, name)).add_(dense_update(layer))
    assert_close(logits(plain, family), wanted)


# -- placing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frames_are_placed_by_every_experts_own_gradient(family: Family, checkpointing: bool) -> None:
    model = adapted(family, variant="spectral")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    summary = initialize_deeplora_weights(model, [family.data()])
    plain = family.build()
    plain(**family.data()).loss.backward()
    rows = {row.name: row for row in summary.layers}
    for name, layer in deeplora_layers(model).items():
        path = parameter_of(model, name)
        gradients = plain.get_parameter(path).grad
        for expert, gradient in enumerate(gradients.mT if family is MODELS["gpt-oss"] else gradients):
            row = rows[f"{path}[{expert}]"]
            assert row.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-9)
            left, _, right = (factor.detach() for factor in layer.factors("default"))
            if row.gradient_norm:
                U, _, Vh = torch.linalg.svd(gradient)
                assert_close(left[expert] @ right[expert], -U[:, :4] @ Vh[:4])
            else:
                assert row.name in summary.without_gradient
                assert_close(left[expert].mT @ left[expert], torch.eye(4, dtype=left.dtype))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "deeplora" not in n)


def test_saved_subspaces_come_back(tmp_path: Path) -> None:
    family = MODELS["mixtral"]
    model = adapted(family, variant="compressed")
    initialize_deeplora_weights(model, [family.data()])
    save_subspaces(model, tmp_path / "frames.safetensors")
    again = adapted(family, variant="compressed")
    initialize_deeplora_weights(again, subspaces=tmp_path / "frames.safetensors")
    assert_same(state(again), state(model))


# -- merging, several adapters, files -------------------------------------------------------------------------------


def test_merging_changes_nothing_and_goes_back(family: Family) -> None:
    model = disturbed(adapted(family))
    wanted, base = logits(model, family), logits(family.build(), family)
    model.merge_adapter(safe_merge=True)
    assert_close(logits(model, family), wanted)
    with model.disable_adapter():
        assert_close(logits(model, family), base)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_close(logits(model, family), wanted)
    assert_close(logits(copy.deepcopy(model).unload(), family), base)
    plain = model.merge_and_unload()
    assert not deeplora_layers(plain)
    assert_close(logits(plain, family), wanted)


def test_several_adapters() -> None:
    family = MODELS["mixtral"]
    model = disturbed(adapted(family))
    first = logits(model, family)
    model.add_adapter("second", config_of(r=2, inner_depth=2))
    disturbed(model, "second", seed=5)
    model.set_adapter("second")
    assert_close(logits(model, family), logits(changed_by_hand(family, model, "second"), family))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model, family), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), logits(family.build(), family))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_and_loading_changes_no_bit(family: Family, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = disturbed(adapted(family))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded, family), logits(model, family))


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate-up", "down"])
@pytest.mark.parametrize("from_folder", [False, True])
def test_the_export_is_a_lora_of_the_same_experts(
    family: Family, tmp_path: Path, parameters: list[str], from_folder: bool
) -> None:
    model = disturbed(adapted(family, target_parameters=parameters))
    if from_folder:
        model.save_pretrained(tmp_path / "deep")
        summary = export_adapter_folder(tmp_path / "deep", tmp_path / "lora")
    else:
        summary = save_as_lora(model, tmp_path / "lora")
    assert {row.name.split(".")[-1] for row in summary.layers} == {
        f"{name.split('.')[-1]}[{expert}]" for name in parameters for expert in range(4)
    }
    lora = PeftModel.from_pretrained(family.build(), tmp_path / "lora").eval()
    assert_close(logits(lora, family), logits(model, family))


@torch.no_grad()
def test_experts_of_different_ranks_and_parameters_without_any(tmp_path: Path) -> None:
    """Those with fewer directions are padded; a parameter that learnt nothing is left out, whichever of the two it is."""
    family = MODELS["mixtral"]
    for silent in ("gate_up_proj", "down_proj"):
        model = disturbed(adapted(family))
        for layer in deeplora_layers(model).values():
            if layer.parameter_name == silent:
                layer.factors("default").left.zero_()
            else:
                layer.factors("default").left[0, :, 2:] = 0
                layer.factors("default").left[1] = 0
        summary = save_as_lora(model, tmp_path / silent)
        ranks = {row.name.split("experts.")[1]: row.rank for row in summary.layers}
        loud = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}[silent]
        assert [ranks[f"{loud}[{expert}]"] for expert in range(4)] == [2, 0, 4, 4]
        assert [ranks[f"{silent}[{expert}]"] for expert in range(4)] == [0] * 4
        assert all("experts.lora_" in key for key in load_file(tmp_path / silent / "adapter_model.safetensors"))
        lora = PeftModel.from_pretrained(family.build(), tmp_path / silent).eval()
        assert_close(logits(lora, family), logits(model, family))


# -- refusals -------------------------------------------------------------------------------------------------------


def _mixed_batch(model: PeftModel, family: Family, _: Path) -> None:
    model(**family.data(), adapter_names=["default"] * 4)


def _combined(model: PeftModel, _f: Family, _: Path) -> None:
    model.add_adapter("second", config_of())
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


def _other_parameters(model: PeftModel, _f: Family, _: Path) -> None:
    model.add_adapter("second", config_of(target_parameters=BOTH[:1]))


def _solved(model: PeftModel, _f: Family, _: Path) -> None:
    solve_deeplora_weights(model, [], torch.zeros(0), outputs_fn=lambda m, x: x)


def _resized(model: PeftModel, _f: Family, folder: Path) -> None:
    model.save_pretrained(folder / "deep")
    deeplora_from_adapter(folder / "deep", folder / "other")


REFUSED: dict[str, tuple[Callable[[PeftModel, Family, Path], None], str]] = {
    "rows with their own adapters": (_mixed_batch, "experts share one weight"),
    "a weighted sum": (_combined, "bare parameters"),
    "an adapter of other parameters": (_other_parameters, "must have the same"),
    "the ridge start": (_solved, "leave target_parameters out"),
    "another Deep LoRA": (_resized, "stack of experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_says_so(case: str, tmp_path: Path) -> None:
    work, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        work(adapted(MODELS["mixtral"]), MODELS["mixtral"], tmp_path)


def test_what_cannot_be_adapted_says_so() -> None:
    with pytest.raises(ValueError, match=r"dropout=0\.1 hides inputs"):
        adapted(MODELS["mixtral"], dropout=0.1)
    with pytest.raises(TypeError, match=r"matrix or a stack of matrices.*input_layernorm\.weight is \(32,\)"):
        adapted(MODELS["mixtral"], target_parameters=["input_layernorm.weight"])
    with pytest.raises(ValueError, match="must be a list"):
        config_of(target_parameters="experts.down_proj")
