"""What every Deep LoRA adapter must do, whatever the model and the settings: a pytest mixin."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from rankwise.adapters import DeepLoraConfig, DeepLoraLayer, initialize_deeplora_weights

_FACTORS = ("deeplora_left", "deeplora_right", "deeplora_inner")


class AdapterContract:
    """Subclass it as ``TestSomething`` and say which model, settings, batch and loss to use.

    ``make_model`` must return the same weights at every call, without dropout. Models that are no transformers are
    excused from gradient checkpointing, and nothing else.

    Example:
        >>> from torch import nn
        >>> from rankwise.adapters import DeepLoraConfig
        >>> from rankwise.testing import AdapterContract
        >>> class TestOneLayer(AdapterContract):
        ...     def make_model(self):
        ...         torch.manual_seed(0)
        ...         return nn.Sequential(nn.Linear(12, 10))
        ...     def make_config(self, **changes):
        ...         return DeepLoraConfig(**{"r": 4, "target_modules": ["0"], **changes})
        ...     def make_batch(self):
        ...         return torch.ones(3, 12)
        ...     def loss(self, model, batch):
        ...         return self.outputs(model, batch).square().mean()
    """

    def make_model(self) -> nn.Module:
        """The base model in float32, on the CPU, with the same weights at every call."""
        raise NotImplementedError

    def make_config(self, **changes: Any) -> DeepLoraConfig:
        """The adapter's settings, with ``changes`` on top."""
        raise NotImplementedError

    def make_batch(self) -> Any:
        """One batch: a mapping for ``model(**batch)``, anything else for ``model(batch)``. Floats are float32."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """A scalar on which every targeted layer has an influence."""
        raise NotImplementedError

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """The tensor in which two models are compared."""
        result = model(**batch) if isinstance(batch, Mapping) else model(batch)
        return getattr(result, "logits", result)

    # -- how the tests build things ------------------------------------------------------------------------------

    def adapted(self, dtype: torch.dtype = torch.float32, *, trained: bool = False, **changes: Any) -> PeftModel:
        """The adapted model in eval mode; ``trained`` moves every factor away from the start, by a known seed."""
        model = get_peft_model(self.make_model().to(dtype), self.make_config(**changes)).eval()
        return disturbed(model) if trained else model

    def batch(self, dtype: torch.dtype = torch.float32) -> Any:
        return _floats_to(self.make_batch(), dtype)

    def base_outputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.no_grad():
            return self.outputs(self.make_model().to(dtype).eval(), self.batch(dtype))

    @torch.no_grad()
    def outputs_of(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.outputs(model.eval(), self.batch(dtype))

    # -- step 0 --------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_a_new_adapter_changes_no_bit_of_the_output(self, dtype: torch.dtype) -> None:
        assert torch.equal(self.outputs_of(self.adapted(dtype), dtype), self.base_outputs(dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_a_new_adapter_has_a_zero_update(self, dtype: torch.dtype) -> None:
        """Sharper than equal outputs: bf16 outputs would round a small update away."""
        for name, layer in deeplora_layers(self.adapted(dtype)).items():
            assert not layer.get_delta_weight("default").count_nonzero(), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_placing_the_frames_changes_no_bit_of_the_output(self, dtype: torch.dtype) -> None:
        model = self.adapted(dtype)
        before = {
            name: layer.deeplora_right["default"].weight.clone() for name, layer in deeplora_layers(model).items()
        }
        initialize_deeplora_weights(model, [self.batch(dtype)], loss_fn=self.loss)
        assert torch.equal(self.outputs_of(model, dtype), self.base_outputs(dtype))
        for name, layer in deeplora_layers(model).items():
            assert not torch.equal(layer.deeplora_right["default"].weight, before[name]), f"{name} was not placed"

    def test_frames_are_orthonormal(self) -> None:
        model = self.adapted(torch.float64)
        for name, layer in deeplora_layers(model).items():
            left, right = layer.deeplora_left["default"].weight, layer.deeplora_right["default"].weight
            unit = torch.eye(layer.r["default"], dtype=left.dtype)
            # The frames are drawn in float32 and stored in the base model's dtype.
            gram = torch.zeros_like(unit) if self.make_config().zero_left else unit
            assert (left.mT @ left - gram).abs().max() < 1e-5, name
            assert (right @ right.mT - unit).abs().max() < 1e-5, name

    # -- training ------------------------------------------------------------------------------------------------

    def test_plain_sgd_moves_every_factor_and_no_base_weight(self) -> None:
        model = self.adapted(torch.float64, init_scale=0.5).train()
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            self.loss(model, self.batch(torch.float64)).backward()
            optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved <= trainable
        factors = {name for name in before if any(f".{factor}." in name for factor in _FACTORS)}
        assert factors
        assert factors <= moved, sorted(factors - moved)

    def test_only_factors_and_saved_modules_are_trainable(self) -> None:
        for name, parameter in self.adapted().named_parameters():
            expected = any(f".{factor}." in name for factor in _FACTORS) or ".modules_to_save." in name
            assert parameter.requires_grad == expected, name

    def test_gradient_checkpointing_gives_the_same_gradients(self) -> None:
        if not hasattr(self.make_model(), "gradient_checkpointing_enable"):
            pytest.skip("not a transformer")
        plain = self._gradients(self.adapted(torch.float64, trained=True).train())
        model = self.adapted(torch.float64, trained=True)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        checkpointed = self._gradients(model.train())
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)

    def test_bfloat16_base_trains_float32_factors(self) -> None:
        model = self.adapted(torch.bfloat16, trained=True)
        batch = self.batch(torch.bfloat16)
        assert self.outputs(model, batch).dtype == torch.bfloat16
        self.loss(model, batch).backward()
        for name, layer in deeplora_layers(model).items():
            for factor in _FACTORS:
                weight = getattr(layer, factor)["default"].weight
                assert weight.dtype == weight.grad.dtype == torch.float32, (name, factor)
                assert weight.grad.isfinite().all(), (name, factor)
                assert weight.grad.count_nonzero(), (name, factor)

    def test_runs_under_autocast(self) -> None:
        model = self.adapted(trained=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(model, self.batch())
        loss.backward()
        exact = self._gradients(self.adapted(torch.float64, trained=True))
        for name, layer in deeplora_layers(model).items():
            gradient = layer.deeplora_inner["default"].weight.grad
            assert gradient.dtype == torch.float32, name
            wanted = exact[f"{_full_name(model, layer)}.deeplora_inner.default.weight"].flatten()
            # bf16 keeps 8 bits; small gradients lose more of them to cancellation, so compare directions loosely
            assert torch.cosine_similarity(gradient.double().flatten(), wanted, dim=0) > 0.9, name

    def test_dropout_acts_in_training_only(self) -> None:
        model = self.adapted(trained=True, dropout=0.5)
        assert torch.equal(self.outputs_of(model), self.outputs_of(self.adapted(trained=True)))
        with torch.no_grad():
            model.train()
            assert not torch.equal(self.outputs(model, self.batch()), self.outputs(model, self.batch()))

    def test_direction_dropout_hides_directions_from_whole_rows(self) -> None:
        layer = next(iter(deeplora_layers(self.adapted(torch.float64, trained=True, direction_dropout=0.5)).values()))
        hidden = layer.deeplora_direction_dropout["default"].train()
        seen = hidden(torch.ones(40, 7, layer.r["default"], dtype=torch.float64))
        assert torch.equal(seen, seen[:, :1].expand_as(seen))  # every token of a row alike
        assert set(seen.unique().tolist()) == {0.0, 2.0}  # hidden, or scaled up: the mean stays
        assert len(seen[:, 0].unique(dim=0)) > 1  # rows differ
        x = layer_input(layer, (3,))
        torch.testing.assert_close(layer.eval()(x), dense_forward(layer, x))

    def test_direction_dropout_keeps_the_mean(self) -> None:
        layer = next(iter(deeplora_layers(self.adapted(torch.float64, trained=True, direction_dropout=0.5)).values()))
        x = layer_input(layer, (1,)).repeat_interleave(4000, dim=0)
        with torch.no_grad():
            mean = (layer.train()(x) - layer.base_layer(x)).mean(0)
        x = x[:1]
        expected = (dense_forward(layer, x) - layer.base_layer(x))[0]
        assert (mean - expected).norm() < 0.15 * expected.norm()

    def test_a_new_adapter_with_dropout_is_a_no_op_in_training_too(self) -> None:
        model = self.adapted(dropout=0.5, direction_dropout=0.5).train()
        with torch.no_grad():
            assert torch.equal(self.outputs(model, self.batch()), self.base_outputs())

    # -- one layer, against the dense matrix ---------------------------------------------------------------------

    def test_the_update_is_the_dense_product_minus_its_start(self) -> None:
        for name, layer in deeplora_layers(self.adapted(torch.float64, trained=True)).items():
            expected = in_weight_layout(layer, dense_update(layer))
            torch.testing.assert_close(layer.get_delta_weight("default"), expected, msg=name)

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1,), (0,), (2, 0)], ids=str)
    def test_forward_is_the_base_layer_plus_the_dense_update(self, shape: tuple[int, ...]) -> None:
        layer = next(iter(deeplora_layers(self.adapted(torch.float64, trained=True)).values()))
        x = layer_input(layer, shape)
        expected = dense_forward(layer, x)
        assert layer(x).shape == expected.shape
        torch.testing.assert_close(layer(x), expected)

    def test_non_contiguous_input(self) -> None:
        layer = next(iter(deeplora_layers(self.adapted(torch.float64, trained=True)).values()))
        x = layer_input(layer, (5,))
        x = torch.stack([x, x], dim=-1)[..., 0]
        assert not x.is_contiguous()
        torch.testing.assert_close(layer(x), dense_forward(layer, x))

    def test_gradients_are_those_of_the_dense_expression(self) -> None:
        layer = next(iter(deeplora_layers(self.adapted(torch.float64, trained=True)).values()))
        factors = [getattr(layer, factor)["default"].weight for factor in _FACTORS]
        x = layer_input(layer, (4,))
        if x.is_floating_point():
            factors.append(x.requires_grad_())
        dense = dense_forward(layer, x)
        probe = torch.randn_like(dense)
        found = torch.autograd.grad((layer(x) * probe).sum(), factors)
        for got, wanted in zip(found, torch.autograd.grad((dense * probe).sum(), factors), strict=True):
            torch.testing.assert_close(got, wanted)

    def test_output_seen_by_a_hook_on_the_base_layer_is_left_alone(self) -> None:
        layer = next(iter(deeplora_layers(self.adapted(trained=True)).values()))
        seen: list[tuple[Tensor, Tensor]] = []
        layer.base_layer.register_forward_hook(lambda _m, _x, output: seen.append((output, output.clone())))
        layer(layer_input(layer, (3,), torch.float32))
        assert torch.equal(*seen[0])

    def test_output_seen_by_a_global_hook_is_left_alone(self) -> None:
        layer = next(iter(deeplora_layers(self.adapted(trained=True)).values()))
        seen: list[tuple[Tensor, Tensor]] = []

        def record(module: nn.Module, _x: Any, output: Tensor) -> None:
            if module is layer.base_layer:
                seen.append((output, output.clone()))

        handle = nn.modules.module.register_module_forward_hook(record)
        try:
            layer(layer_input(layer, (3,), torch.float32))
        finally:
            handle.remove()
        assert torch.equal(*seen[0])

    def test_input_is_left_alone(self) -> None:
        layer = next(iter(deeplora_layers(self.adapted(trained=True)).values()))
        x = layer_input(layer, (3,), torch.float32)
        before = x.clone()
        layer(x)
        assert torch.equal(x, before)

    # -- merging -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_unmerging_restores_the_weights_up_to_rounding(self, dtype: torch.dtype) -> None:
        model = self.adapted(dtype, trained=True)
        before = _base_weights(model)
        updates = {name: layer.get_delta_weight("default") for name, layer in deeplora_layers(model).items()}
        model.merge_adapter()
        model.unmerge_adapter()
        for name, weight in _base_weights(model).items():
            largest = before[name].abs().double() + updates[name].abs().double()
            # one rounding on the way in, one on the way out
            assert ((weight.double() - before[name].double()).abs() <= 2 * torch.finfo(dtype).eps * largest).all(), name

    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_merged_forward_equals_unmerged_forward(self, safe_merge: bool) -> None:
        model = self.adapted(torch.float64, trained=True)
        unmerged = self.outputs_of(model, torch.float64)
        model.merge_adapter(safe_merge=safe_merge)
        for name, layer in deeplora_layers(model).items():
            assert layer.merged, name
        torch.testing.assert_close(self.outputs_of(model, torch.float64), unmerged)

    def test_safe_merge_refuses_nan_and_leaves_the_weight_alone(self) -> None:
        model = self.adapted(trained=True)
        layer = next(iter(deeplora_layers(model).values()))
        before = layer.base_layer.weight.detach().clone()
        with torch.no_grad():
            layer.deeplora_left["default"].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="non-finite"):
            layer.merge(safe_merge=True)
        assert torch.equal(layer.base_layer.weight, before)
        assert not layer.merged

    def test_merge_and_unload_leaves_a_plain_model(self) -> None:
        model = self.adapted(torch.float64, trained=True)
        adapted = self.outputs_of(model, torch.float64)
        plain = model.merge_and_unload()
        assert not deeplora_layers(plain)
        torch.testing.assert_close(self.outputs_of(plain, torch.float64), adapted)

    def test_unload_gives_back_the_base_model(self) -> None:
        plain = self.adapted(trained=True).unload()
        assert not deeplora_layers(plain)
        assert torch.equal(self.outputs_of(plain), self.base_outputs())

    # -- several adapters, none ----------------------------------------------------------------------------------

    def test_disabling_gives_base_outputs(self) -> None:
        model = self.adapted(trained=True)
        adapted = self.outputs_of(model)
        with model.disable_adapter():
            assert torch.equal(self.outputs_of(model), self.base_outputs())
        assert torch.equal(self.outputs_of(model), adapted)
        assert not torch.equal(adapted, self.base_outputs())

    def test_disabling_a_merged_adapter_gives_base_outputs(self) -> None:
        model = self.adapted(torch.float64, trained=True)
        model.merge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(self.outputs_of(model, torch.float64), self.base_outputs(torch.float64))

    def test_deleting_an_adapter(self) -> None:
        model = self.adapted(trained=True)
        first = self.outputs_of(model)
        model.add_adapter("second", self.make_config())
        model.set_adapter("second")
        disturbed(model, "second", seed=7)
        assert not torch.equal(self.outputs_of(model), first)
        model.delete_adapter("second")
        model.set_adapter("default")
        assert torch.equal(self.outputs_of(model), first)
        assert not any(".second." in key for key in model.state_dict())
        assert all(list(layer.r) == ["default"] for layer in deeplora_layers(model).values())

    def test_a_second_adapter_can_have_another_width(self) -> None:
        model = self.adapted(trained=True)
        first = self.outputs_of(model)
        model.add_adapter("narrow", self.make_config(r=2, inner_depth=2))
        model.set_adapter("narrow")
        assert torch.equal(self.outputs_of(model), self.base_outputs())
        model.set_adapter("default")
        assert torch.equal(self.outputs_of(model), first)

    def test_every_row_of_a_batch_can_have_its_own_adapter(self) -> None:
        model = self.adapted(torch.float64, trained=True)
        model.add_adapter("second", self.make_config(r=2))
        disturbed(model, "second", seed=7)
        layer = next(iter(deeplora_layers(model.to(torch.float64).eval()).values()))
        x = layer_input(layer, (5,))
        mixed = layer(x, adapter_names=["second", "default", "__base__", "default", "second"])
        torch.testing.assert_close(mixed[[1, 3]], dense_forward(layer, x[[1, 3]]))
        torch.testing.assert_close(mixed[[0, 4]], dense_forward(layer, x[[0, 4]], "second"))
        assert torch.equal(mixed[2], layer.base_layer(x)[2])
        with pytest.raises(ValueError, match="one name for each of the 5 rows"):
            layer(x, adapter_names=["default"])

    # -- files ---------------------------------------------------------------------------------------------------

    def test_state_dict_keys(self) -> None:
        model = self.adapted()
        keys = {key for key in get_peft_model_state_dict(model) if "deeplora" in key}
        layers = {_full_name(model, layer) for layer in deeplora_layers(model).values()}
        assert keys == {f"{layer}.{factor}.weight" for layer in layers for factor in _FACTORS}

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("adapter_name", ["default", "other"])
    def test_saving_and_loading_changes_no_bit(
        self, tmp_path: Path, adapter_name: str, low_cpu_mem_usage: bool
    ) -> None:
        model = self.adapted(trained=True)
        model.save_pretrained(str(tmp_path))
        assert (tmp_path / "adapter_model.safetensors").is_file()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # PEFT only warns of them
            loaded = PeftModel.from_pretrained(
                self.make_model(), tmp_path, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
            )
        assert torch.equal(self.outputs_of(loaded), self.outputs_of(model))
        for parameter in loaded.parameters():
            assert not parameter.is_meta
            assert not parameter.requires_grad

    def test_a_loaded_adapter_goes_on_training(self, tmp_path: Path) -> None:
        model = self.adapted(trained=True)
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(self.make_model(), tmp_path, is_trainable=True).eval()
        expected = self._gradients(model)
        found = self._gradients(loaded)
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name

    def test_an_untrained_adapter_is_a_no_op_after_loading(self, tmp_path: Path) -> None:
        self.adapted().save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(self.make_model(), tmp_path)
        assert torch.equal(self.outputs_of(loaded), self.base_outputs())

    def test_copies_are_independent(self) -> None:
        model = self.adapted(trained=True)
        before = self.outputs_of(model)
        duplicate = copy.deepcopy(model)
        assert torch.equal(self.outputs_of(duplicate), before)
        disturbed(duplicate, seed=3)
        assert torch.equal(self.outputs_of(model), before)

    def _gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Of every trainable parameter, for a batch in the base model's dtype."""
        dtype = next(p.dtype for name, p in model.named_parameters() if "deeplora" not in name)
        model.zero_grad()
        self.loss(model, self.batch(dtype)).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        assert found
        return found


@torch.no_grad()
def disturbed(model: PeftModel, adapter_name: str = "default", *, seed: int = 1, scale: float = 0.3) -> PeftModel:
    """Stand-in for training: noise on every factor, the same for the same seed whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    for layer in deeplora_layers(model).values():
        for factor in _FACTORS if adapter_name in layer.r else ():
            weight = getattr(layer, factor)[adapter_name].weight
            weight.add_(scale * torch.randn(weight.shape, generator=generator).to(weight.dtype))
    return model


def deeplora_layers(model: nn.Module) -> dict[str, Any]:
    """Every Deep LoRA layer by name; never empty for an adapted model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DeepLoraLayer)}


def dense_update(layer: Any, adapter_name: str = "default") -> Tensor:
    """U(W̃_L⋯W̃_1 − ε^L·I)Vᵀ written out, in the dtype of the factors."""
    left, right, inner = (getattr(layer, factor)[adapter_name].weight for factor in _FACTORS)
    core = torch.eye(inner.shape[-1], dtype=inner.dtype)
    for factor in inner:
        core = factor @ core
    start = layer.init_scale[adapter_name] ** layer.inner_depth[adapter_name]
    return left @ (core - start * torch.eye(core.shape[0], dtype=core.dtype)) @ right


def in_weight_layout(layer: Any, matrix: Tensor) -> Tensor:
    """A (m, n) matrix as the base layer stores its weight; nothing for an embedding's padding token."""
    base = layer.base_layer
    if isinstance(base, nn.Embedding):
        rows = matrix.mT.clone()
        if base.padding_idx is not None:
            rows[base.padding_idx] = 0
        return rows
    return matrix.mT if isinstance(base, Conv1D) else matrix.reshape(base.weight.shape)


def dense_forward(layer: Any, x: Tensor, adapter_name: str = "default") -> Tensor:
    """The base layer with the dense update added to its weight: what the adapted layer must give."""
    weight = layer.base_layer.weight + in_weight_layout(layer, dense_update(layer, adapter_name))
    return torch.func.functional_call(layer.base_layer, {"weight": weight}, (x,))


def layer_input(layer: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """A random input of a layer with these leading dimensions."""
    base = layer.base_layer
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, shape)
    if isinstance(base, _ConvNd):
        if len(shape) > 1:
            pytest.skip("a convolution has one batch dimension")
        return torch.randn(*shape, base.in_channels, *[9 + 2 * n for n in range(base.weight.ndim - 2)], dtype=dtype)
    return torch.randn(*shape, layer.in_features, dtype=dtype)


def _full_name(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.base_layer.weight.detach().clone() for name, layer in deeplora_layers(model).items()}


def _floats_to(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _floats_to(value, dtype) for key, value in batch.items()}
    return type(batch)(_floats_to(value, dtype) for value in batch)
