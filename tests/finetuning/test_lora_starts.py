"""Starts of a LoRA from the weight, from what the layers see and from their gradients: what PEFT's would be, weight unchanged."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning.methods import adapt, prepare
from rankwise.finetuning.methods.lora_starts import input_moments
from rankwise.finetuning.tasks import Task
from rankwise.finetuning.training import first_batches
from tests.finetuning.method_runs import (
    MEMORIZED,
    adapted,
    original_name,
    outputs,
    pretrained,
    settings,
    tiny_tasks,
    train,
)  # fmt: skip
from tests.tiny_models import Mlp, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

R = 4
HELD = ("pissa", "olora", "corda", "lora-ga")


@pytest.fixture(scope="module")
def tasks(tiny: SimpleNamespace) -> dict[str, Task]:
    return tiny_tasks(tiny)


@pytest.fixture
def task(tasks: dict[str, Task]) -> Task:
    return tasks["pair-similarity"]


def factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, n) and B (m, r) of every layer, in float64, by the layer's name in the pretrained model."""
    return {
        original_name(name): tuple(side["default"].weight.detach().double() for side in (layer.lora_A, layer.lora_B))  # type: ignore[misc]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def started(
    tiny: SimpleNamespace, task: Task, method: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Every layer's weight, A₀ and B₀, in float64; the second half of the adapter is checked to take B₀A₀ away."""
    weights = dict(pretrained(tiny, task).named_parameters())
    found = factors(adapted(tiny, task, settings(method, r=R))[0])
    for A, B in found.values():
        assert A.shape[0] == B.shape[1] == 2 * R
        assert torch.equal(A[:R], A[R:])
        assert torch.equal(B[:, :R], -B[:, R:])
    return (
        {name: weights[f"{name}.weight"].detach().double() for name in found},
        {name: A[:R] for name, (A, _) in found.items()},
        {name: B[:, :R] for name, (_, B) in found.items()},
    )


def seen_by_layers(tiny: SimpleNamespace, task: Task) -> dict[str, Tensor]:
    """What every linear layer of the pretrained model is given, (k, n): text by text, so that nothing is padded."""
    model = pretrained(tiny, task)
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, x, name=name: seen.setdefault(name, []).append(x[0].flatten(0, -2))  # type: ignore[misc]
            )
    with torch.no_grad():
        for text in [task.table.rows[p][side] for p in MEMORIZED for side in ("text", "text_pair")]:
            model(**task.tokenizer(text, return_tensors="pt"))
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


# --- from the weight


def test_pissa_starts_from_the_top_singular_directions(tiny: SimpleNamespace, task: Task) -> None:
    weights, A, B = started(tiny, task, "pissa")
    for name, W in weights.items():
        U, S, Vh = torch.linalg.svd(W)
        best = (U[:, :R] * S[:R]) @ Vh[:R]
        # randomized: nearly as good as the best
        assert torch.linalg.matrix_norm(W - B[name] @ A[name]) < 1.01 * torch.linalg.matrix_norm(W - best)
        # balanced: both factors carry √σ
        assert torch.allclose(B[name].mT @ B[name], A[name] @ A[name].mT, atol=1e-5)


def test_olora_starts_from_the_first_reflections(tiny: SimpleNamespace, task: Task) -> None:
    """Büyükakyüz 2024: W = QR, B₀ the first columns of Q and A₀ the first rows of R."""
    weights, A, B = started(tiny, task, "olora")
    for name, W in weights.items():
        assert torch.allclose(B[name].mT @ B[name], torch.eye(R, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(B[name] @ (B[name].mT @ W), B[name] @ A[name], atol=1e-6)
        assert A[name].tril(-1).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["olora", "pissa"])
def test_training_is_that_of_peft_s_own_start(tiny: SimpleNamespace, tasks: dict[str, Task], method: str) -> None:
    """PEFT takes B₀A₀ out of the weight. Function for function the two must stay the same, step by step."""
    task, chosen = tasks["classification"], settings(method, r=R, lr=3e-3)
    ours, _ = adapted(tiny, task, chosen)
    kind = "olora" if method == "olora" else "pissa"
    config = LoraConfig(r=R, lora_alpha=R, init_lora_weights=kind, target_modules="all-linear", task_type="SEQ_CLS")
    theirs = get_peft_model(pretrained(tiny, task), config)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5) for m in (ours, theirs)]
    base = outputs(pretrained(tiny, task), task)
    for _ in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.eval()
            optimizer.zero_grad()
            task.loss(model, task.collate(MEMORIZED)).backward()
            optimizer.step()
    assert (outputs(ours, task) - base).abs().max() > 1e-3
    torch.testing.assert_close(outputs(ours, task), outputs(theirs, task), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("method", HELD)
def test_what_was_taken_out_stays(tiny: SimpleNamespace, task: Task, tmp_path: Path, method: str) -> None:
    chosen = settings(method, r=R, steps=3)
    model, optimizer = adapted(tiny, task, chosen)
    before = factors(model)
    train(model, task, chosen, optimizer, tmp_path)
    for name, (A, B) in factors(model).items():
        A0, B0 = before[name]
        assert torch.equal(A[R:], A0[R:])
        assert torch.equal(B[:, R:], B0[:, R:])
        assert not torch.equal(A[:R], A0[:R])
        assert not torch.equal(B[:, :R], B0[:, :R])


def test_the_start_leaves_the_random_state_alone(tiny: SimpleNamespace, task: Task) -> None:
    """And does not depend on it: the same start in every process, and in a run that is resumed."""
    found = []
    for seed in (1, 2):
        model = pretrained(tiny, task)
        torch.manual_seed(seed)
        found.append(factors(adapt(model, task, settings("pissa", r=R))))
    assert all(torch.equal(found[0][name][0], found[1][name][0]) for name in found[0])


# --- from what the layers see


def test_eva_starts_where_the_inputs_vary_most(tiny: SimpleNamespace, task: Task) -> None:
    model, _ = adapted(tiny, task, settings("eva", r=R))
    seen = seen_by_layers(tiny, task)
    for name, (A, B) in factors(model).items():
        X = seen[name] - seen[name].mean(0)
        S, Vh = torch.linalg.svd(X, full_matrices=False)[1:]
        assert not B.any()
        assert torch.allclose(A @ A.mT, torch.eye(R, dtype=torch.float64), atol=1e-5)
        # as much of the variance as any r directions hold
        assert float((X @ A.mT).square().sum()) == pytest.approx(float(S[:R].square().sum()), rel=1e-4)
        if S[R - 1] > 1.05 * S[R]:
            assert torch.allclose(A.mT @ A, Vh[:R].mT @ Vh[:R], atol=1e-2)


def test_eva_is_peft_s(tiny: SimpleNamespace, task: Task) -> None:
    """PEFT's incremental analysis of one batch, once it has converged, and without redistribution of ranks."""
    from peft import get_eva_state_dict
    from peft.tuners.lora.config import EvaConfig

    chosen = settings("eva", r=R)
    ours = factors(adapted(tiny, task, chosen)[0])
    config = LoraConfig(
        r=R, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), target_modules="all-linear",
        exclude_modules=task.modules_left_out(pretrained(tiny, task)),
    )  # fmt: skip
    model = get_peft_model(pretrained(tiny, task), config)
    texts = [task.table.rows[p][side] for p in MEMORIZED for side in ("text", "text_pair")]
    batch = dict(task.tokenizer(texts, padding=True, return_tensors="pt"))
    found = {original_name(name): A for name, A in get_eva_state_dict(model, [batch], show_progress_bar=False).items()}
    seen = seen_by_layers(tiny, task)
    assert set(found) == set(ours)
    for name, theirs in found.items():
        X = seen[name] - seen[name].mean(0)
        captured = [float((X @ A.double().mT).square().sum()) for A in (ours[name][0], theirs)]
        assert captured[0] == pytest.approx(captured[1], rel=2e-2)


def test_corda_starts_from_the_directions_that_the_inputs_use(tiny: SimpleNamespace, task: Task) -> None:
    """Yang et al. 2024, eqs. 3-6: W·C = USVᵀ, B₀A₀ = U_r S_r V_rᵀ C⁻¹, with PEFT's hundredth of the mean on C's diagonal."""
    weights, A, B = started(tiny, task, "corda")
    seen = seen_by_layers(tiny, task)
    for name, W in weights.items():
        C = seen[name].mT @ seen[name] / len(seen[name])
        C += 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        best = (U[:, :R] * S[:R]) @ Vh[:R]
        assert torch.allclose(B[name] @ A[name] @ C, best, atol=1e-3 * float(S[0]))


def test_padding_is_not_seen() -> None:
    """Where the model is given whole padded batches, as on a GPU or by a decoder."""
    task: Any = SimpleNamespace(
        peft_task_type="CAUSAL_LM", has_head=False, modules_left_out=lambda model: [],
        loss=lambda model, batch: model(**batch).logits.mean(),
    )  # fmt: skip
    model = adapt(tiny_llama(), task, settings("eva"))
    batch = {key: value for key, value in token_batch(rows=2).items() if key != "labels"}
    whole = input_moments(model, task, [{key: value[:, :4] for key, value in batch.items()}])
    batch["attention_mask"][:, 4:] = 0
    padded = input_moments(model, task, [batch])
    for name, seen in whole.items():
        assert padded[name].count == seen.count == 8
        torch.testing.assert_close(padded[name].second_moment, seen.second_moment, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(padded[name].covariance, seen.covariance, rtol=1e-3, atol=1e-6)


# --- from the gradient


def test_loraga_starts_from_the_gradient_s_singular_vectors(tiny: SimpleNamespace, task: Task) -> None:
    """Wang et al. 2024, "ArB2r": A₀ the first r right singular vectors of the gradient, B₀ along its left ones r+1 to 2r."""
    weights, A, B = started(tiny, task, "lora-ga")
    model = pretrained(tiny, task)
    task.loss(model, task.collate(MEMORIZED)).backward()
    for name in weights:
        G = model.get_submodule(name).weight.grad.double()  # type: ignore[union-attr, operator]
        U, S, _ = torch.linalg.svd(G)
        # by what of the gradient they hold: single vectors are as sharp as the gaps between singular values
        assert float((G @ A[name].mT).norm()) == pytest.approx(float(S[:R].norm()), rel=1e-3)
        between = U[:, R : 2 * R] * S[R : 2 * R]
        assert float(B[name].norm() / between.norm()) == pytest.approx(len(U) ** 0.25 / 4, rel=0.05)
        assert torch.allclose(A[name] @ A[name].mT, torch.eye(R, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("method", ["eva", "corda", "lora-ga"])
def test_flags_are_as_they_were(tiny: SimpleNamespace, tasks: dict[str, Task], method: str) -> None:
    task, chosen = tasks["classification"], settings(method, head="frozen")
    model = adapt(pretrained(tiny, task), task, chosen).train()
    before = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    prepare(model, task, chosen, first_batches(task, chosen, MEMORIZED))
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "says"),
    [("eva", "no row of the first batch reaches"), ("corda", "no row"), ("lora-ga", "does not depend on")],
)
def test_a_layer_that_the_data_does_not_reach_is_refused(method: str, says: str) -> None:
    model = Mlp()
    model.unused = nn.Linear(24, 24)
    task: Any = SimpleNamespace(
        peft_task_type=None, has_head=False, modules_left_out=lambda model: [],
        loss=lambda model, batch: model(batch["x"]).square().mean(),
    )  # fmt: skip
    chosen = settings(method, r=2)
    adapted_model = adapt(model, task, chosen)
    with pytest.raises(UserError, match=rf"{says} .*unused"):
        prepare(adapted_model, task, chosen, [{"x": torch.randn(8, 20)}])


@pytest.mark.parametrize("method", ["eva", "corda", "lora-ga"])
def test_what_is_not_finite_is_refused(method: str) -> None:
    task: Any = SimpleNamespace(
        peft_task_type=None, has_head=False, modules_left_out=lambda model: [],
        loss=lambda model, batch: model(batch["x"]).square().mean(),
    )  # fmt: skip
    chosen = settings(method, r=2)
    model = adapt(Mlp(), task, chosen)
    with pytest.raises(UserError, match="finite"):
        prepare(model, task, chosen, [{"x": torch.full((8, 20), float("inf"))}])
