"""Initialization against the dense weight gradient, and everything it must leave as it was."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rankwise.adapters import DeepLoraConfig, DeepLoraLayer, initialize_deeplora_weights, save_subspaces
from rankwise.adapters.gradient_capture import GradientCapture, LayerGradient, unadapted
from rankwise.testing.adapter_contract import deeplora_layers, disturbed
from tests.tiny_models import Mlp, tiny_bert, tiny_llama, token_batch

Batch = tuple[Tensor, Tensor]


def mlp(dtype: torch.dtype = torch.float64, **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return Mlp(**sizes).to(dtype)


def adapted(model: nn.Module, **settings: Any) -> PeftModel:
    settings = {
        "r": 4,
        "variant": "compressed",
        "direction_dropout": 0.0,
        "target_modules": ["lin0", "lin1"],
        **settings,
    }
    return get_peft_model(model, DeepLoraConfig(**settings))


def batches(count: int = 1, rows: int = 16, d_in: int = 20, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, d_in, generator=generator).to(dtype), torch.randn(rows, 4, generator=generator).to(dtype))
        for _ in range(count)
    ]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def true_gradients(
    model: nn.Module, names: list[str], data: list[Any], loss: Callable[[nn.Module, Any], Tensor] = loss_fn
) -> dict[str, Tensor]:
    """∂(average loss)/∂W of the plain model, by autograd."""
    weights = [model.get_submodule(name).weight for name in names]
    average = sum(loss(model, batch) for batch in data) / len(data)
    return dict(zip(names, torch.autograd.grad(average, weights), strict=True))


def frames_of(model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name.removeprefix("base_model.model."): (
            layer.deeplora_left[adapter_name].weight.detach(),
            layer.deeplora_right[adapter_name].weight.detach().mT,
        )
        for name, layer in deeplora_layers(model).items()
    }


def outside(directions: Tensor, frame: Tensor) -> float:
    """Largest sine of an angle between the directions and the frame's span."""
    return float(torch.linalg.matrix_norm(directions - frame @ (frame.mT @ directions), ord=2))


def _same(batch: Batch, other: Batch) -> bool:
    return torch.equal(batch[0], other[0])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value), name


# -- the frames hold the gradient's directions -------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("sizes", [{}, {"d_in": 40}, {"d_in": 10, "hidden": 30}], ids=str)
def test_compressed_frames_span_the_leading_singular_vectors(r: int, sizes: dict[str, int]) -> None:
    """k = ⌈r/2⌉ directions on the larger side always; on the other side the frame must hold what Z leaves of them."""
    data = batches(d_in=sizes.get("d_in", 20))
    gradients = true_gradients(mlp(**sizes), ["lin0", "lin1"], data)
    model = adapted(mlp(**sizes), r=r)
    summary = initialize_deeplora_weights(model, data, loss_fn=loss_fn)
    k = (r + 1) // 2
    assert [row.name for row in summary.layers] == ["lin0", "lin1"]
    for row in summary.layers:
        U, S, Vh = torch.linalg.svd(gradients[row.name], full_matrices=False)
        left, right = frames_of(model)[row.name]
        larger, smaller = (U[:, :k], Vh[:k].mT) if left.shape[0] >= right.shape[0] else (Vh[:k].mT, U[:, :k])
        on_larger, on_smaller = (left, right) if left.shape[0] >= right.shape[0] else (right, left)
        assert outside(larger, on_larger) < 1e-6
        if r % 2 == 0:
            assert outside(smaller, on_smaller) < 1e-6
        else:  # an odd width drops one column of the residual: at least k − 1 directions stay
            sines = torch.linalg.svdvals(smaller - on_smaller @ (on_smaller.mT @ smaller))
            assert (sines[1:] < 1e-6).all()
        for frame in (left, right):
            torch.testing.assert_close(frame.mT @ frame, torch.eye(r, dtype=frame.dtype))
        energy = S.square()
        assert row.captured == pytest.approx(float(energy[:k].sum() / energy.sum()), rel=1e-6)
        assert row.gradient_norm == pytest.approx(float(energy.sum().sqrt()), rel=1e-6)
        assert row.width == r
    expected = sum(x.captured * x.gradient_norm**2 for x in summary.layers) / sum(
        x.gradient_norm**2 for x in summary.layers
    )
    assert summary.captured == pytest.approx(expected)
    assert summary.loss == pytest.approx(loss_fn(mlp(**sizes), data[0]).item())
    assert "lin0" in str(summary)


def test_spectral_frames_are_the_leading_singular_pairs_of_the_descent_direction() -> None:
    data = batches()
    gradients = true_gradients(mlp(), ["lin0", "lin1"], data)
    model = adapted(mlp(), variant="spectral")
    initialize_deeplora_weights(model, data, loss_fn=loss_fn)
    for name, (left, right) in frames_of(model).items():
        U, _, Vh = torch.linalg.svd(gradients[name], full_matrices=False)
        torch.testing.assert_close(left @ right.mT, -U[:, :4] @ Vh[:4], rtol=1e-5, atol=1e-5)


def test_random_needs_no_batch() -> None:
    model = adapted(mlp(), variant="random")
    summary = initialize_deeplora_weights(model)
    assert math.isnan(summary.loss)
    assert all(math.isnan(row.captured) for row in summary.layers)
    for left, right in frames_of(model).values():
        for frame in (left, right):
            # drawn in float32 whatever the model's dtype
            torch.testing.assert_close(frame.mT @ frame, torch.eye(4, dtype=frame.dtype), rtol=0, atol=1e-6)


class Shared(nn.Module):
    """One layer, called three times in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(20, 20)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.lin0(x))
        return self.head(x)


def test_a_layer_called_several_times_gets_the_sum() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Shared().double()

    data = batches()
    gradient = true_gradients(build(), ["lin0"], data)["lin0"]
    model = adapted(build(), target_modules=["lin0"])
    (row,) = initialize_deeplora_weights(model, data, loss_fn=loss_fn).layers
    U, S, _ = torch.linalg.svd(gradient)
    assert outside(U[:, :2], frames_of(model)["lin0"][0]) < 1e-6
    assert row.gradient_norm == pytest.approx(float(S.norm()), rel=1e-6)


def test_two_modules_that_share_a_weight_each_get_their_own_part() -> None:
    model = mlp(d_in=24)
    model.lin1.weight = model.lin0.weight
    summary = initialize_deeplora_weights(adapted(model), batches(d_in=24), loss_fn=loss_fn)
    assert len(summary.layers) == 2


class InPlace(nn.Module):
    """An activation that overwrites the adapted layer's output, as in most vision models."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(20, 24)
        self.act = nn.ReLU(inplace=True)
        self.lin1 = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.act(self.lin0(x)))


def test_an_in_place_activation_behind_the_layer() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return InPlace().double()

    gradient = true_gradients(build(), ["lin0"], batches())["lin0"]
    model = adapted(build(), r=2)
    summary = initialize_deeplora_weights(model, batches(), loss_fn=loss_fn)
    assert summary.layers[0].gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-6)


def test_a_residual_added_in_place() -> None:
    """``y = layer(x); y += x`` is everyday code, and trains with the adapter on."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = nn.Linear(20, 20)
            self.head = nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.lin0(x)
            y += x
            return self.head(y)

    torch.manual_seed(0)
    model = adapted(Residual().double(), target_modules=["lin0"])
    loss_fn(model, batches()[0]).backward()
    assert initialize_deeplora_weights(model, batches(), loss_fn=loss_fn).layers[0].gradient_norm > 0


def test_pairs_and_dense_gradient_agree(generator: torch.Generator) -> None:
    m, n = 30, 20
    deltas = torch.randn(3, 8, m, generator=generator, dtype=torch.float64)
    xs = torch.randn(3, 8, n, generator=generator, dtype=torch.float64)
    few, many = LayerGradient(m, n), LayerGradient(m, n)
    few.add(deltas[0], xs[0])  # 8·(30 + 20) ≤ 600 numbers: stays in pairs
    assert few.dense is None
    for delta, x in zip(deltas, xs, strict=True):
        many.add(delta[None], x[None])
    assert many.dense is not None
    assert not many.pairs
    unit = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(few.operator().matmul(unit), deltas[0].mT @ xs[0])
    torch.testing.assert_close(many.operator().matmul(unit), torch.einsum("bim,bin->mn", deltas, xs))
    assert many.operator().squared_norm() == pytest.approx(float(many.dense.square().sum()))
    assert LayerGradient(m, n).operator() is None


@pytest.mark.parametrize("rows", [2, 64], ids=["pairs", "dense"])
def test_captured_gradient_is_the_weight_gradient(rows: int) -> None:
    data = batches(rows=rows)
    wanted = true_gradients(mlp(), ["lin0", "lin1"], data)
    model = adapted(mlp())
    layers = {name.removeprefix("base_model.model."): layer for name, layer in deeplora_layers(model).items()}
    got: dict[str, Tensor] = {}

    def consume(name: str, gradient: LayerGradient) -> None:
        operator = gradient.operator()
        got[name] = operator.matmul(torch.eye(operator.shape[1], dtype=torch.float64))

    with unadapted(model, layers):
        loss = GradientCapture(layers, consume).run(lambda: loss_fn(model, data[0]))
    assert loss == pytest.approx(loss_fn(mlp(), data[0]).item())
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient)


@pytest.mark.parametrize("rows", [2, 16], ids=["pairs", "dense"])
def test_several_batches_are_averaged(rows: int) -> None:
    data = batches(5, rows=rows)
    gradients = true_gradients(mlp(), ["lin0", "lin1"], data[:4])
    model = adapted(mlp())
    summary = initialize_deeplora_weights(model, data, loss_fn=loss_fn, num_batches=4)
    for row in summary.layers:
        U, S, _ = torch.linalg.svd(gradients[row.name], full_matrices=False)
        left = frames_of(model)[row.name][0]
        assert float((left.mT @ U[:, :2]).square().sum() / 2) > 0.99
        energy = S.square()
        assert row.captured == pytest.approx(float(energy[:2].sum() / energy.sum()), abs=1e-2)
    assert summary.loss == pytest.approx(sum(loss_fn(mlp(), batch).item() for batch in data[:4]) / 4)


@pytest.mark.parametrize("rows", [2, 16], ids=["pairs", "dense"])
def test_gradient_norm_of_several_batches_is_that_of_the_average(rows: int) -> None:
    """Comparable between one batch and several: the same batch four times has the same gradient as once."""
    data = batches(1, rows=rows)
    (once, _) = initialize_deeplora_weights(adapted(mlp()), data, loss_fn=loss_fn).layers
    (often, _) = initialize_deeplora_weights(adapted(mlp()), data * 4, loss_fn=loss_fn, num_batches=4).layers
    assert often.gradient_norm == pytest.approx(once.gradient_norm, rel=1e-3)


def test_only_num_batches_are_drawn() -> None:
    drawn = []

    def stream() -> Any:
        for batch in batches(5):
            drawn.append(1)
            yield batch

    initialize_deeplora_weights(adapted(mlp()), stream(), loss_fn=loss_fn, num_batches=2)
    assert len(drawn) == 2


def test_a_layer_that_only_an_earlier_batch_reaches() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        network = model.get_base_model()
        hidden = network.lin0(batch[0])
        return network.head(torch.tanh(network.lin1(hidden) if _same(batch, data[0]) else hidden)).square().mean()

    data = batches(2)
    summary = initialize_deeplora_weights(adapted(mlp()), data, loss_fn=loss, num_batches=2)
    assert all(row.gradient_norm > 0 for row in summary.layers)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_gradient_checkpointing_places_the_same_frames(build: Callable[[], nn.Module], use_reentrant: bool) -> None:
    batch = token_batch(labels="tokens" if build is tiny_llama else "class")
    plain = get_peft_model(build().double(), DeepLoraConfig(r=4, variant="compressed", task_type=None))
    first = initialize_deeplora_weights(plain, [batch])
    model = get_peft_model(build().double(), DeepLoraConfig(r=4, variant="compressed", task_type=None))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()
    second = initialize_deeplora_weights(model, [batch])
    assert [row.name for row in first.layers] == [row.name for row in second.layers]
    for one, two in zip(first.layers, second.layers, strict=True):
        assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-8)
    for name, (left, right) in frames_of(plain).items():
        torch.testing.assert_close(frames_of(model)[name][0], left, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(frames_of(model)[name][1], right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 64], ids=["pairs", "dense"])
def test_bfloat16_base(rows: int) -> None:
    data = batches(2, rows=rows, dtype=torch.bfloat16)
    exact = true_gradients(mlp(), ["lin0", "lin1"], [(x.double(), y.double()) for x, y in data])
    summary = initialize_deeplora_weights(adapted(mlp(torch.bfloat16)), data, loss_fn=loss_fn, num_batches=2)
    for row in summary.layers:
        assert 0 < row.captured <= 1
    model = adapted(mlp(torch.bfloat16))
    initialize_deeplora_weights(model, data, loss_fn=loss_fn, num_batches=2)
    for name, (left, right) in frames_of(model).items():
        assert left.dtype == torch.float32
        U = torch.linalg.svd(exact[name])[0][:, :1].float()
        assert outside(U, left) < 0.1  # bf16 activations: the leading direction within a few of its 2⁻⁸ steps
        assert not deeplora_layers(model)[f"base_model.model.{name}"].get_delta_weight("default").count_nonzero()
        assert right.isfinite().all()


@pytest.mark.parametrize("rows", [2, 64], ids=["pairs", "dense"])
def test_under_autocast(rows: int) -> None:
    data = batches(2, rows=rows, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        summary = initialize_deeplora_weights(adapted(mlp(torch.float32)), data, loss_fn=loss_fn, num_batches=2)
    assert all(0 < row.captured <= 1 for row in summary.layers)


def test_under_no_grad() -> None:
    with torch.no_grad():
        summary = initialize_deeplora_weights(adapted(mlp()), batches(), loss_fn=loss_fn)
        assert not torch.is_grad_enabled()
    assert all(row.gradient_norm > 0 for row in summary.layers)


def test_default_loss_and_data_loader() -> None:
    model = get_peft_model(tiny_bert(), DeepLoraConfig(r=4, variant="compressed", task_type="SEQ_CLS"))
    batch = token_batch()
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    summary = initialize_deeplora_weights(model, DataLoader(rows, batch_size=4))
    assert summary.loss == pytest.approx(tiny_bert()(**batch).loss.item(), rel=1e-5)
    assert len(summary.layers) == 13  # 2 × (q, k, v, out, up, down) and the pooler; the classifier is saved in full


def test_second_adapter_starts_from_the_unadapted_model() -> None:
    data = batches()
    wanted = true_gradients(mlp(), ["lin0"], data)["lin0"]
    model = disturbed(adapted(mlp()))
    before = state(model)
    model.add_adapter("second", DeepLoraConfig(r=4, variant="compressed", target_modules=["lin0"]))
    model.set_adapter("second")
    (row,) = initialize_deeplora_weights(model, data, loss_fn=loss_fn, adapter_name="second").layers
    assert row.gradient_norm == pytest.approx(float(wanted.norm()), rel=1e-6)
    now = model.state_dict()
    assert_same({key: now[key] for key in before}, before)


# -- what it must leave alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [list, lambda data: DataLoader(data, batch_size=None, shuffle=True)])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_but_the_frames_is_left_alone(loader: Callable[[list[Batch]], Any], fails: bool) -> None:
    model = adapted(mlp(), dropout=0.1, modules_to_save=["head"])
    model.train()
    model.get_submodule("base_model.model.lin1").eval()
    model.get_parameter("base_model.model.lin0.base_layer.bias").requires_grad_(True)
    loss_fn(model, batches()[0]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: g.clone() for name, g in gradients.items() if g is not None}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    before = state(model)
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    data = loader(batches(2))
    random_state = torch.get_rng_state()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        torch.rand(3)  # a loss may draw numbers
        return loss_fn(model, batch) * (float("nan") if fails else 1.0)

    if fails:
        with pytest.raises(ValueError, match="loss is nan"):
            initialize_deeplora_weights(model, data, loss_fn=loss)
    else:
        initialize_deeplora_weights(model, data, loss_fn=loss)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert all(p is parameters[name] for name, p in model.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name], name
        if name in copies:
            assert torch.equal(parameter.grad, copies[name]), name
    kept = before if fails else {name: value for name, value in before.items() if ".deeplora_" not in name}
    assert_same({name: model.state_dict()[name] for name in kept}, kept)


def test_gradients_stay_none() -> None:
    model = adapted(mlp())
    initialize_deeplora_weights(model, batches(), loss_fn=loss_fn)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_that_need_gradients_get_none() -> None:
    x, y = batches()[0]
    x.requires_grad_(True)
    initialize_deeplora_weights(adapted(mlp()), [(x, y)], loss_fn=loss_fn)
    assert x.grad is None


# -- refusals ----------------------------------------------------------------------------------------------------


def _unused_layer(model: nn.Module, batch: Batch) -> Tensor:
    network = model.get_base_model()
    network.lin1(network.lin0(batch[0]))
    return network.head(torch.tanh(network.lin0(batch[0]))).square().mean()


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "zero gradient": ({"loss_fn": lambda m, b: loss_fn(m, b) * 0}, "lin0"),
    "unused layer": ({"loss_fn": _unused_layer}, "lin1.*zero"),
    "layer never reached": ({"loss_fn": lambda m, b: m.get_base_model().head.weight.square().mean() * b[0].mean()}, "lin0.*zero"),
    "loss without the model": ({"loss_fn": lambda m, b: torch.tensor(1.0)}, "lin0.*zero"),
    "nan loss": ({"loss_fn": lambda m, b: loss_fn(m, b) * float("nan")}, "nan"),
    "inf loss": ({"loss_fn": lambda m, b: loss_fn(m, b) * float("inf")}, "inf"),
    "nan in a batch": ({"batches": [(torch.full((2, 20), math.nan).double(), torch.zeros(2, 4).double())]}, "nan"),
    "inf gradient": ({"loss_fn": lambda m, b: _InfiniteGradient.apply(loss_fn(m, b))}, "not finite|non-finite"),
    "vector loss": ({"loss_fn": lambda m, b: m(b[0])[:, 0]}, r"single number.*\(16,\)"),
    "loss is a float": ({"loss_fn": lambda m, b: 1.0}, "float"),
    "no batches": ({"batches": None}, "at least one batch"),
    "empty iterable": ({"batches": []}, "at least one batch"),
    "no number of batches": ({"num_batches": 0}, "num_batches"),
    "one batch for a list": ({"batches": {"x": torch.zeros(2, 20)}}, r"\[batch\]"),
    "a tensor for a list": ({"batches": torch.zeros(2, 20)}, r"\[batch\]"),
    "default loss on tuples": ({"loss_fn": None}, "tuple"),
    "unknown adapter": ({"adapter_name": "other"}, "'other'.*default"),
    "no such file": ({"subspaces": "/nowhere/frames.safetensors"}, "no subspace file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("num_batches", [1, 2])
def test_refusals_name_the_trouble_and_change_nothing(case: str, num_batches: int) -> None:
    arguments, message = REFUSALS[case]
    model = disturbed(adapted(mlp()))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        initialize_deeplora_weights(
            model, **{"batches": batches(2), "loss_fn": loss_fn, "num_batches": num_batches} | arguments
        )
    assert_same(state(model), before)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_batch_among_good_ones_is_refused(bad: int) -> None:
    """Also when the trouble is in a gradient and not in the loss."""
    model = disturbed(adapted(mlp()))
    before = state(model)
    data = batches(2)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = loss_fn(model, batch)
        return _InfiniteGradient.apply(value) if _same(batch, data[bad]) else value

    with pytest.raises(ValueError, match="lin0"):
        initialize_deeplora_weights(model, data, loss_fn=loss, num_batches=2)
    assert_same(state(model), before)


def test_a_zero_gradient_in_one_of_several_batches_is_harmless() -> None:
    data = batches(2)
    for zero in (0, 1):

        def loss(model: nn.Module, batch: Batch, zero: int = zero) -> Tensor:
            return loss_fn(model, batch) * (0.0 if _same(batch, data[zero]) else 1.0)

        summary = initialize_deeplora_weights(adapted(mlp()), data, loss_fn=loss, num_batches=2)
        assert all(row.gradient_norm > 0 for row in summary.layers)


def test_an_unused_pooler_is_named() -> None:
    model = get_peft_model(tiny_bert(), DeepLoraConfig(r=4, variant="compressed"))
    before = state(model)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        hidden = model.get_base_model().bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return hidden[..., 0].square().mean()

    with pytest.raises(ValueError, match=r"bert\.pooler\.dense.*exclude_modules"):
        initialize_deeplora_weights(model, [token_batch()], loss_fn=loss)
    assert_same(state(model), before)


def test_no_labels_are_explained() -> None:
    model = get_peft_model(tiny_bert(), DeepLoraConfig(r=4, variant="compressed", task_type="SEQ_CLS"))
    batch = token_batch()
    del batch["labels"]
    with pytest.raises(ValueError, match="labels"):
        initialize_deeplora_weights(model, [batch])


def test_merged_adapter_is_refused() -> None:
    model = disturbed(adapted(mlp()))
    model.merge_adapter()
    before = state(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        initialize_deeplora_weights(model, batches(), loss_fn=loss_fn)
    assert_same(state(model), before)


def test_plain_model_is_refused() -> None:
    with pytest.raises(ValueError, match="get_peft_model"):
        initialize_deeplora_weights(mlp(), batches(), loss_fn=loss_fn)


# -- seeds and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["compressed", "random"])
def test_the_seed_decides_the_random_part(variant: str) -> None:
    def frames(seed: int, global_seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        model = adapted(mlp(), variant=variant)
        torch.manual_seed(global_seed)
        initialize_deeplora_weights(model, batches(), loss_fn=loss_fn, seed=seed)
        return frames_of(model)

    first, again, other = frames(3, 1), frames(3, 2), frames(4, 1)
    for name, (left, right) in first.items():
        assert torch.equal(left, again[name][0])
        assert torch.equal(right, again[name][1])
        assert not torch.allclose(left, other[name][0])
        assert not torch.allclose(right, other[name][1])


def test_layers_of_one_shape_get_different_random_parts() -> None:
    model = adapted(mlp(d_in=24), variant="random")
    initialize_deeplora_weights(model)
    frames = frames_of(model)
    assert not torch.allclose(frames["lin0"][0], frames["lin1"][0])


def test_saved_subspaces_come_back(tmp_path: Path) -> None:
    model = adapted(mlp())
    initialize_deeplora_weights(model, batches(), loss_fn=loss_fn)
    save_subspaces(model, tmp_path / "frames.safetensors")
    wanted = frames_of(model)
    later = disturbed(adapted(mlp()), seed=9)
    summary = initialize_deeplora_weights(later, subspaces=tmp_path / "frames.safetensors")
    for name, (left, right) in frames_of(later).items():
        assert torch.equal(left, wanted[name][0])
        assert torch.equal(right, wanted[name][1])
    assert [row.name for row in summary.layers] == ["lin0", "lin1"]
    x = batches()[0][0]
    assert torch.equal(later(x), mlp()(x))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _garble(path: Path) -> None:
    path.write_bytes(b"not safetensors at all")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _garble, _empty])
def test_damaged_subspace_files_are_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    file = tmp_path / "frames.safetensors"
    model = disturbed(adapted(mlp()))
    save_subspaces(model, file)
    damage(file)
    before = state(model)
    with pytest.raises(ValueError, match="safetensors"):
        initialize_deeplora_weights(model, subspaces=file)
    assert_same(state(model), before)


@pytest.mark.parametrize("other", [{"r": 3}, {"target_modules": ["lin0"]}], ids=str)
def test_subspaces_of_another_adapter_are_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    save_subspaces(adapted(mlp(), **other), tmp_path / "frames.safetensors")
    model = disturbed(adapted(mlp()))
    before = state(model)
    with pytest.raises(ValueError, match=r"expected lin[01]\.left of shape"):
        initialize_deeplora_weights(model, subspaces=tmp_path / "frames.safetensors")
    assert_same(state(model), before)


def test_initialized_adapter_learns_where_the_gradient_points() -> None:
    """After one plain step of the inner factors the update has the gradient's direction inside the frames."""
    data = batches()
    gradient = true_gradients(mlp(), ["lin1"], data)["lin1"]
    model = adapted(mlp(), inner_depth=1, variant="spectral", target_modules=["lin1"])
    initialize_deeplora_weights(model, data, loss_fn=loss_fn)
    (layer,) = deeplora_layers(model).values()
    assert isinstance(layer, DeepLoraLayer)
    inner = layer.deeplora_inner["default"].weight
    (step,) = torch.autograd.grad(loss_fn(model, data[0]), inner)
    with torch.no_grad():
        inner.sub_(step)
    left, right = frames_of(model)["lin1"]
    torch.testing.assert_close(
        layer.get_delta_weight("default"), -left @ left.mT @ gradient @ right @ right.mT, rtol=1e-5, atol=1e-8
    )


def test_zero_left_needs_no_batch_and_is_seeded() -> None:
    models = [adapted(mlp(), variant="zero-left", inner_depth=2) for _ in range(3)]
    for model, seed in zip(models, (4, 4, 5), strict=True):
        summary = initialize_deeplora_weights(model, seed=seed)
        assert all(math.isnan(row.captured) for row in summary.layers)
    first, same, other = ({n: p.detach() for n, p in m.named_parameters() if "deeplora_" in n} for m in models)
    for name, value in first.items():
        assert torch.equal(value, same[name])
        if "left" in name:
            assert not value.count_nonzero()
        elif "inner" in name:
            assert torch.equal(value, torch.eye(4).to(value).expand(2, 4, 4))
        else:
            assert not torch.equal(value, other[name])
            torch.testing.assert_close(value @ value.mT, torch.eye(4).to(value), rtol=1e-5, atol=1e-6)


def test_the_zero_left_start_sees_the_whole_gradient_on_its_left() -> None:
    """The first plain step of U is -G V: every output direction may grow, where the frames of the others choose some."""
    data = batches()
    gradient = true_gradients(mlp(), ["lin1"], data)["lin1"]
    model = adapted(mlp(), variant="zero-left", target_modules=["lin1"])
    (layer,) = deeplora_layers(model).values()
    factors = layer.factors("default")
    (step,) = torch.autograd.grad(loss_fn(model, data[0]), factors.left)
    torch.testing.assert_close(step, gradient @ factors.right.detach().mT, rtol=1e-5, atol=1e-8)
