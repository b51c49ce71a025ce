"""What every method must keep: who is trained, at which rate, from which start, what is saved; and what makes each one itself.

docs/methods.md is made from this file: ``python -m tests.finetuning.test_methods``.
"""

import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, optimizers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning import FinetuneSettings
from rankwise.finetuning.methods import (
    FRAMES_LR,
    LEFT_OUT,
    LOGITS_RATIO,
    LORA_PLUS_RATIO,
    METHODS,
    adalora_orthogonality,
    adapt,
    create_optimizer,
    default_learning_rate,
    head_parameters,
    learning_rate_grid,
)
from rankwise.finetuning.tasks import Task
from rankwise.optimizers import AdaRankGrad, GaLoreAdamW, LoraRite
from tests.finetuning.method_runs import (
    ADAPTERS,
    HEAD_LR,
    KINDS,
    MEMORIZED,
    STEPS,
    adapted,
    loss,
    original_name,
    outputs,
    pretrained,
    settings,
    snapshot,
    tiny_tasks,
    train,
)

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
# tried on both kinds of task in every test run; the others with a head, and without one in the slow tests
NEAR = ("deep-lora", "lora", "lora-plus", "lora-rite", "relora", "rslora", "dora", "pissa", "adalora", "vera", "full-width", "full", "galore", "adarankgrad", "none")  # fmt: skip
ALL = [
    pytest.param((kind, method), marks=() if kind == "classification" or method in NEAR else pytest.mark.slow)
    for kind in KINDS
    for method in METHODS
    if (kind, method) != ("pair-similarity", "none")
]
TRAINS = [
    pytest.param(method, marks=() if method in NEAR else pytest.mark.slow) for method in METHODS if method != "none"
]
OPTIMIZERS = {"lora-rite": LoraRite, "galore": GaLoreAdamW, "adarankgrad": AdaRankGrad}
# What is exact but for float32's rounding: norms divided by and multiplied back, parts that cancel.
ROUNDED = {"dora": 2e-6, **dict.fromkeys(
    ("lora-orthogonal", "pissa", "olora", "corda", "lora-ga", "deft", "hra", "frod"), 1e-6
)}  # fmt: skip
# What is not: the full-width product is not shifted to zero (ε³ = 1e-3 here), KaSA drops 4 of 32 directions, two trained vectors
# of ±0.02 make every entry of Uni-LoRA's and VB-LoRA's factors.
NEARLY = {"full-width": 1e-3, "kasa": 1e-3, "unilora": 1e-3, "vblora": 1e-3}

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def tasks(tiny: SimpleNamespace) -> dict[str, Task]:
    return tiny_tasks(tiny)


def only(*names: str) -> Any:
    """The runs of these methods alone."""
    return pytest.mark.parametrize(
        "run", [case for case in ALL if case.values[0][1] in names], indirect=True, ids=_name
    )


def _name(case: tuple[str, str]) -> str:
    return "-".join(case)


of_adapters = only(*ADAPTERS)


@pytest.fixture(scope="module", params=ALL, ids=_name)
def run(
    request: pytest.FixtureRequest,
    tiny: SimpleNamespace,
    tasks: dict[str, Task],
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """A method on a task before and after training on two rows, its adapter saved, and a checkpoint from half the way."""
    kind, method = request.param
    task, chosen = tasks[kind], settings(method)
    base = pretrained(tiny, task)
    found = SimpleNamespace(
        kind=kind, method=method, task=task, settings=chosen, base=snapshot(base),
        base_outputs=outputs(base, task), base_layers=linear_layers(base), folder=tmp_path_factory.mktemp("run"),
    )  # fmt: skip
    found.model, found.optimizer = adapted(tiny, task, chosen)
    found.model.eval()
    found.groups = [{**group, "params": list(group["params"])} for group in found.optimizer.param_groups]
    found.trainable = {name for name, p in found.model.named_parameters() if p.requires_grad}
    found.before, found.loss_before = snapshot(found.model), loss(found.model, task)
    found.outputs_before = outputs(found.model, task)
    saves = {"save_every": STEPS // 2} if method in ADAPTERS else {}
    found.trainer = train(found.model, task, chosen, found.optimizer, found.folder / "training", **saves)
    found.after, found.loss_after = snapshot(found.model), loss(found.model, task)
    found.outputs_after = outputs(found.model, task)
    if method in ADAPTERS:
        found.model.save_pretrained(found.folder / "adapter")
    return found


def linear_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# --- the contract of every method


def test_every_trainable_parameter_is_in_one_group(run: SimpleNamespace) -> None:
    in_groups = [id(p) for group in run.groups for p in group["params"]]
    assert len(in_groups) == len(set(in_groups))
    assert set(in_groups) == {id(p) for p in run.model.parameters() if p.requires_grad}
    assert all(group["params"] for group in run.groups)


def test_the_head_learns_at_its_own_rate(run: SimpleNamespace) -> None:
    heads = [group for group in run.groups if group.get("name") == "head"]
    if run.kind == "pair-similarity":
        assert not heads
        return
    (head,) = heads
    assert head["lr"] == HEAD_LR
    assert {tuple(p.shape) for p in head["params"]} == {(2, 32), (2,)}
    assert {id(p) for p in head["params"]} == {id(p) for p in head_parameters(run.model, run.task)}
    assert all(group["lr"] != HEAD_LR for group in run.groups if group is not head)


def test_adam_is_as_the_settings_say(run: SimpleNamespace) -> None:
    assert isinstance(run.optimizer, OPTIMIZERS.get(run.method, torch.optim.AdamW))
    for group in run.groups:
        assert group["eps"] == run.settings.epsilon
        assert group["weight_decay"] == 0.0


def test_what_is_not_trained_does_not_move(run: SimpleNamespace) -> None:
    still = [name for name in run.before if name not in run.trainable]
    moved = [name for name in still if not torch.equal(run.before[name], run.after[name])]
    if run.method == "relora":  # what the restarts merged
        assert moved == [name for name in still if name.endswith("base_layer.weight")]
        return
    assert not moved
    assert METHODS[run.method].every_weight or still


@only(*(method for method in METHODS if not METHODS[method].every_weight and method != "relora"))
def test_the_pretrained_weights_are_there_unchanged(run: SimpleNamespace) -> None:
    """Of PiSSA and its kin too, which PEFT lets take a part out of them; KaSA's least directions are gone."""
    kept = {original_name(name): value for name, value in run.after.items() if name not in run.trainable}
    expected = {
        name for name in run.base if run.method not in ("none", "full-width") or not name.startswith("classifier.")
    }
    assert expected <= set(kept)
    different = {name for name in expected if not torch.equal(kept[name], run.base[name])}
    adapted_weights = {f"{name}.weight" for name in run.base_layers if not name.startswith(left_out(run))}
    assert different == (adapted_weights if run.method == "kasa" else set())


def left_out(run: SimpleNamespace) -> str:
    """The linear layer that is not adapted: what the loss does not reach, or the head."""
    return "pooler" if run.kind == "pair-similarity" else "classifier"


def test_something_of_every_trained_kind_moves(run: SimpleNamespace) -> None:
    """All of it, but where no gradient flows: the pooler that the pair loss does not use."""
    unreached = {name for name in run.trainable if run.kind == "pair-similarity" and "pooler" in name}
    assert METHODS[run.method].every_weight or not unreached
    still = [n for n in run.trainable - unreached if torch.equal(run.before[n], run.after[n])]
    if METHODS[run.method].every_weight:  # words that the two rows lack, and no gradient through softmax's shift
        still = [name for name in still if "embeddings" not in name and not name.endswith("key.bias")]
    if run.method == "glora":  # neither through what shifts the keys (C, E) or scales biases that are 0 (D)
        still = [name for name in still if ".key.glora_" not in name and "glora_D" not in name]
    assert not still


def test_two_rows_are_learnt(run: SimpleNamespace) -> None:
    assert math.isfinite(run.loss_after)
    # a random body makes features that are almost alike: a head alone gets only so far, turning them does not help much, and
    # DeLoRA keeps close to them
    only_so_far = {"none": 0.9999, "oft": 0.995, "hra": 0.999, "delora": 0.999}
    share = only_so_far.get(run.method, 0.8) if run.kind == "classification" else 0.97
    assert run.loss_after < share * run.loss_before


def test_the_start_is_the_pretrained_model(run: SimpleNamespace) -> None:
    tolerance = NEARLY.get(run.method) or ROUNDED.get(run.method, 1e-7)
    assert (run.outputs_before - run.base_outputs).abs().max() <= tolerance


@of_adapters
def test_the_saved_adapter_gives_the_same_on_the_unchanged_model(run: SimpleNamespace, tiny: SimpleNamespace) -> None:
    base = pretrained(tiny, run.task)
    torch.manual_seed(99)  # nothing of it may come from the random state
    loaded = PeftModel.from_pretrained(base, run.folder / "adapter")
    assert torch.equal(outputs(loaded, run.task), run.outputs_after)
    assert (run.outputs_after - run.base_outputs).abs().max() > 100 * NEARLY.get(run.method, 1e-6) / 2


@of_adapters
def test_it_can_be_merged(run: SimpleNamespace, tiny: SimpleNamespace) -> None:
    loaded: Any = PeftModel.from_pretrained(pretrained(tiny, run.task), run.folder / "adapter")
    merged = loaded.merge_and_unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    torch.testing.assert_close(outputs(merged, run.task), run.outputs_after, rtol=1e-5, atol=1e-5)


@of_adapters
def test_a_resumed_run_reaches_the_same_numbers(run: SimpleNamespace, tiny: SimpleNamespace) -> None:
    """From a checkpoint alone: the resumed run draws an adapter of its own, and the data does not prepare it."""
    base = pretrained(tiny, run.task)
    torch.manual_seed(99)
    model = adapt(base, run.task, run.settings)
    optimizer = create_optimizer(model, run.task, run.settings)
    folder = run.folder / "training"
    train(model, run.task, run.settings, optimizer, folder, checkpoint=folder / f"checkpoint-{STEPS // 2}")
    different = [name for name, p in model.named_parameters() if not torch.equal(p, run.after[name])]
    assert not different


@of_adapters
def test_all_linear_layers_that_the_loss_reaches_are_adapted(run: SimpleNamespace) -> None:
    layers = {original_name(n) for n, module in run.model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert layers == {name for name in run.base_layers if left_out(run) not in name}
    assert any("pooler" in name for name in layers) == (run.kind == "classification")


@pytest.mark.parametrize("method", TRAINS)
def test_a_frozen_head_stays_as_it_is(
    tiny: SimpleNamespace, tasks: dict[str, Task], tmp_path: Path, method: str
) -> None:
    task, chosen = tasks["classification"], settings(method, head="frozen", steps=3)
    model, optimizer = adapted(tiny, task, chosen)
    head = head_parameters(model, task)
    assert [tuple(p.shape) for p in head] == [(2, 32), (2,)]
    before = [p.detach().clone() for p in head]
    assert not any(p.requires_grad for p in head)
    assert not [group for group in optimizer.param_groups if group.get("name") == "head"]
    body = snapshot(model)
    train(model, task, chosen, optimizer, tmp_path)
    assert all(torch.equal(p, value) for p, value in zip(head, before, strict=True))
    assert any(not torch.equal(p, body[name]) for name, p in model.named_parameters())


def test_the_head_starts_alike_for_every_method(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    """One trial is one seed: what differs between its methods must not be the luck of the head."""
    task = tasks["classification"]
    heads = [head_parameters(adapt(pretrained(tiny, task), task, settings(method)), task) for method in METHODS]
    for head in heads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(heads[0], head, strict=True))


@pytest.mark.parametrize(
    ("kind", "head"), [("pair-similarity", "trained"), ("classification", "frozen")], ids=["no head", "frozen head"]
)
def test_nothing_to_train_is_refused(tiny: SimpleNamespace, tasks: dict[str, Task], kind: str, head: str) -> None:
    task, chosen = tasks[kind], settings("none", head=head)
    model = adapt(pretrained(tiny, task), task, chosen)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="nothing to train"):
        create_optimizer(model, task, chosen)


def test_a_model_that_cannot_be_adapted(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    task = tasks["classification"]
    with pytest.raises(UserError, match=r"--method deep-lora --rank 1000"):
        adapt(pretrained(tiny, task), task, settings("deep-lora", r=1000))


# --- what makes each method itself


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def factors(model: nn.Module, letter: str) -> set[int]:
    return {id(p) for name, p in model.named_parameters() if f".lora_{letter}." in name}


@pytest.mark.parametrize("kind", KINDS)
def test_lora_plus_learns_b_sixteen_times_as_fast(tiny: SimpleNamespace, tasks: dict[str, Task], kind: str) -> None:
    model, optimizer = adapted(tiny, tasks[kind], settings("lora-plus", lr=1e-3))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert LORA_PLUS_RATIO == 16
    assert {rates[key] for key in factors(model, "A")} == {1e-3}
    assert {rates[key] for key in factors(model, "B")} == {16e-3}


def test_scalings(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    """1 for LoRA and its kin whatever r is, √r (α/√r at α = r) for rsLoRA."""
    task = tasks["pair-similarity"]
    for method, expected in (
        ("lora", 1.0),
        ("lora-plus", 1.0),
        ("dora", 1.0),
        ("rslora", math.sqrt(8)),
    ):
        model = adapt(pretrained(tiny, task), task, settings(method, r=8))
        assert [layer.scaling["default"] for layer in lora_layers(model)] == pytest.approx([expected] * 12), method


@only("dora")
def test_doras_magnitude_is_trained(run: SimpleNamespace) -> None:
    magnitudes = [name for name in run.trainable if "magnitude" in name]
    assert len(magnitudes) == len(lora_layers(run.model))
    assert all(not torch.equal(run.before[name], run.after[name]) for name in magnitudes)


def test_the_riemannian_step_is_the_preconditioned_one(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    """Zhang & Pilanci 2024, eq. 4: g_A ← (BᵀB + δI)⁻¹g_A, g_B ← g_B(AAᵀ + δI)⁻¹, then AdamW; δ is PEFT's 1e-2."""
    task = tasks["classification"]
    chosen = settings("lora-riemannian")
    model, optimizer = adapted(tiny, task, chosen)
    model.eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.3)
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    for each in (model, twin, plain):
        task.loss(each, task.collate([0, 1, 2, 3])).backward()
    for layer in lora_layers(twin):
        A, B = (getattr(layer, f"lora_{letter}")["default"].weight for letter in "AB")
        damping = 1e-2 * torch.eye(len(A))
        gradients = torch.linalg.inv(B.T @ B + damping) @ A.grad, B.grad @ torch.linalg.inv(A @ A.T + damping)
        A.grad, B.grad = (g.detach() for g in gradients)
    optimizer.step()
    for each in (twin, plain):
        create_optimizer(each, task, settings("lora", adam_eps=chosen.epsilon)).step()
    expected, other = dict(twin.named_parameters()), dict(plain.named_parameters())
    differences = 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, expected[name], atol=1e-5, rtol=1e-4)
        differences += int(not torch.allclose(p, other[name], atol=1e-3))
    assert differences >= 0.9 * len(factors(model, "A"))


def test_lora_fa_projects_b_s_gradient_and_leaves_a(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    """Zhang et al. 2023: g_B ← g_B(AAᵀ)⁻¹/s², as PEFT's LoraFAOptimizer takes it."""
    task = tasks["classification"]
    model, _ = adapted(tiny, task, settings("lora-fa"))
    plain = adapt(pretrained(tiny, task), task, settings("lora"))
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        each.eval()
        task.loss(each, task.collate([0, 1, 2, 3])).backward()
    for layer, other in zip(lora_layers(model), lora_layers(plain), strict=True):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = other.lora_B["default"].weight.grad.double() @ torch.linalg.inv(A.double() @ A.double().mT)
        torch.testing.assert_close(B.grad.double(), expected, rtol=1e-4, atol=1e-8)
        assert not A.requires_grad
        assert A.grad is None


def test_vb_lora_learns_its_logits_ten_times_as_fast(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    model, optimizer = adapted(tiny, tasks["classification"], settings("vblora", lr=1e-3))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    of = {name: rates[id(p)] for name, p in model.named_parameters() if "vblora" in name}
    assert LOGITS_RATIO == 10
    assert {"logits" in name: rate for name, rate in of.items()} == {True: 1e-2, False: 1e-3}


@pytest.mark.parametrize("kind", KINDS)
def test_vera_trains_two_vectors_a_layer(tiny: SimpleNamespace, tasks: dict[str, Task], kind: str) -> None:
    task = tasks[kind]
    model = adapt(pretrained(tiny, task), task, settings("vera", seed=3))
    head = {id(p) for p in head_parameters(model, task)}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in head}
    assert all("vera_lambda_" in name and p.ndim == 1 for name, p in trained.items())
    assert len(trained) == 2 * len(lora_layers(model))
    again = adapt(pretrained(tiny, task), task, settings("vera", seed=4))
    one, other = (m.base_model.vera_A["default"] for m in (model, again))
    assert not torch.equal(one, other)  # the projections are drawn by the trial's seed


def test_the_rank_decides_how_much_is_trained(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    """With every method but those made to train a few numbers whatever the rank, and RandLoRA, whose rank is another."""
    whatever = {"vera", "pvera", "tinylora", "road", "ia3", "frod", "randlora"}
    task = tasks["classification"]

    def trained(method: str, r: int) -> int:
        model = adapt(pretrained(tiny, task), task, settings(method, r=r))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    for method in ADAPTERS:
        small, large = trained(method, 2), trained(method, 4)
        assert small == large if method in whatever else small < large, method


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("hra", {"r": 3}, "--rank must be even"),
        ("gralora", {"r": 3}, "divisible"),
        ("shira", {"r": 20}, "lower --rank"),
        ("pissa", {"r": 33}, "fewer than 33 singular directions; lower --rank"),
        ("lora-ga", {"r": 17}, "fewer than 34 singular directions; lower --rank"),
        ("mica", {"r": 33}, "fewer than 33 singular directions"),
        ("psoft", {"r": 33}, "fewer than 33 singular directions"),
        ("osf", {"r": 32}, "fewer than 33 singular directions"),
        ("c3a", {"r": 64}, "no such size divides every layer; choose another --method or a smaller --rank"),
        ("boft", {"r": 1}, "no such size divides every layer"),
        ("adalora", {"steps": 1}, "at least 2 steps"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(
    tiny: SimpleNamespace, tasks: dict[str, Task], method: str, changes: dict[str, Any], says: str
) -> None:
    task = tasks["pair-similarity"]
    with pytest.raises(UserError, match=rf"cannot adapt this model with --method {method} .*{says}"):
        adapt(pretrained(tiny, task), task, settings(method, **changes))


# --- what is added to the loss


def kasa_penalty(model: nn.Module) -> Tensor:
    """Wang et al. 2024, eqs. 9-11: β‖σ‖² + γ(‖BᵀB − I‖ + ‖AAᵀ − I‖) of every layer, with β = 1e-4 and γ = 1e-3."""
    total = torch.zeros(())
    for layer in lora_layers(model):
        A, B, sigma = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
        eye = torch.eye(len(A))
        total = total + 1e-4 * sigma.square().sum()
        total = total + 1e-3 * ((B.mT @ B - eye).norm() + (A @ A.mT - eye).norm())
    return total


@only("lora", "pissa", "adalora", "kasa")
def test_the_penalty_is_added_once(run: SimpleNamespace) -> None:
    """The trainer's loss is the task's plus the penalty, and PEFT adds no second one."""
    expected = {"adalora": adalora_orthogonality, "kasa": kasa_penalty}.get(run.method)
    batch = run.task.collate(MEMORIZED)
    with torch.no_grad():
        whole = float(run.trainer.compute_loss(run.model, dict(batch)))
        plain = float(run.task.loss(run.model, dict(batch)))
        extra = float(expected(run.model)) if expected else 0.0
    assert whole == pytest.approx(plain + extra, rel=1e-5)
    assert (extra > 0) == (expected is not None)


def test_montecloras_distribution_is_held_to_its_prior(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    task, chosen = tasks["classification"], settings("monteclora")
    model, _ = adapted(tiny, task, chosen)
    added = METHODS["monteclora"].penalty
    assert added is not None
    model.train()
    task.loss(model, task.collate(MEMORIZED))
    extra = added(model)
    assert extra.requires_grad
    assert float(extra.detach()) == pytest.approx(model.base_model._get_monteclora_loss().item())  # type: ignore[operator, union-attr]


# --- the grid


@given(st.floats(1e-6, 1.0), st.integers(1, 9))
def test_a_grid_is_geometric_around_its_middle(middle: float, budget: int) -> None:
    grid = learning_rate_grid(middle, budget)
    assert len(grid) == budget
    assert list(grid) == sorted(set(grid))
    assert grid[budget // 2] == pytest.approx(middle, rel=6e-3)
    for low, high in itertools.pairwise(grid):
        assert high / low == pytest.approx(math.sqrt(10), rel=1.2e-2)


@given(st.floats(1e-6, 1.0), st.integers(1, 8))
def test_a_larger_budget_tries_all_that_a_smaller_one_did(middle: float, budget: int) -> None:
    assert set(learning_rate_grid(middle, budget)) <= set(learning_rate_grid(middle, budget + 1))


def test_every_default_rate_is_in_its_grid() -> None:
    for name, method in METHODS.items():
        assert method.lr in learning_rate_grid(method.lr, 5), name


def test_rates_rise_over_the_first_tenth_and_fall_to_zero(
    tiny: SimpleNamespace, tasks: dict[str, Task], tmp_path: Path
) -> None:
    task = tasks["classification"]
    found = {}
    for schedule in ("linear", "constant"):
        chosen = settings("lora", schedule=schedule, steps=20)
        model, optimizer = adapted(tiny, task, chosen)
        trainer = train(model, task, chosen, optimizer, tmp_path / schedule)
        found[schedule] = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert found["constant"] == [1e-2] * 20
    assert found["linear"][:3] == pytest.approx([0, 5e-3, 1e-2])
    assert found["linear"][2:] == pytest.approx([1e-2 * (20 - step) / 18 for step in range(2, 20)])


def test_deep_lora_learns_slower_where_the_output_is_there_already(tasks: dict[str, Task]) -> None:
    def rate(method: str, kind: str, **changes: Any) -> float:
        return default_learning_rate(settings(method, lr=None, **changes), tasks[kind])

    assert 0 < rate("deep-lora", "pair-similarity") < rate("deep-lora", "classification") == METHODS["deep-lora"].lr
    assert rate("lora", "pair-similarity") == rate("lora", "classification") == METHODS["lora"].lr


@pytest.mark.parametrize("variant", ["compressed", "spectral", "random"])
def test_placed_frames_have_rates_of_their_own(tasks: dict[str, Task], variant: str) -> None:
    chosen = settings("deep-lora", lr=None, outer_lr_ratio=None, variant=variant)
    rates = {default_learning_rate(chosen, task) for task in tasks.values()}
    assert rates == {chosen.learning_rate} == {FRAMES_LR}
    assert (chosen.outer_ratio, settings("deep-lora", outer_lr_ratio=None).outer_ratio) == (1.0, 10.0)


def test_settings_of_older_runs_mean_what_they_meant() -> None:
    old = settings("deep-lora", variant="compressed").to_dict()
    for later in ("schedule", "direction_dropout"):
        del old[later]
    loaded = FinetuneSettings.from_dict(old)
    assert (loaded.schedule, loaded.direction_dropout, loaded.variant) == ("constant", 0.0, "compressed")


def test_a_u_that_starts_at_zero_cannot_be_frozen() -> None:
    with pytest.raises(UserError, match="--outer-lr-ratio must be above 0 with --variant zero-left"):
        settings("deep-lora", outer_lr_ratio=0.0)
    assert settings("deep-lora", variant="random", outer_lr_ratio=0.0).outer_ratio == 0


# --- nothing that PEFT has is forgotten


def what_peft_has() -> set[str]:
    """Its kinds of adapters; the starts and variants that a LoraConfig can ask for; its makers of optimizers."""
    starts = next(kind for kind in get_args(get_type_hints(LoraConfig)["init_lora_weights"]) if get_args(kind))
    fields = {
        name
        for name, field in LoraConfig.__dataclass_fields__.items()
        if name.startswith("use_") or name.endswith("_config") or field.metadata.get("is_lora_variant")
    }
    return (
        {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
        | {f"init_lora_weights={start}" for start in get_args(starts) if "[" not in start}
        | fields
        | {name for name in optimizers.__all__ if name.startswith("create_")}
    ) - {"DEEPLORA"}


def test_every_way_of_peft_is_a_method_or_left_out_with_a_reason() -> None:
    """What a new PEFT brings fails here, until it is a method or a line of LEFT_OUT."""
    named = [method.peft for method in METHODS.values() if method.peft]
    assert len(named) == len(set(named))
    assert not set(named) & set(LEFT_OUT)
    assert set(named) | set(LEFT_OUT) == what_peft_has()
    assert all(LEFT_OUT.values())


@pytest.mark.parametrize("method", [name for name in ADAPTERS if METHODS[name].peft])
def test_a_method_is_what_it_says_it_is(tiny: SimpleNamespace, tasks: dict[str, Task], method: str) -> None:
    peft_name = METHODS[method].peft
    assert peft_name is not None
    task = tasks["pair-similarity"]
    config: Any = adapt(pretrained(tiny, task), task, settings(method)).peft_config["default"]  # type: ignore[union-attr]
    assert config.peft_type.value == (peft_name if peft_name in PEFT_TYPE_TO_CONFIG_MAPPING else "LORA")
    built_by_peft = {"init_lora_weights=orthogonal", "init_lora_weights=mica"}
    if peft_name in built_by_peft:
        assert f"init_lora_weights={config.init_lora_weights}" == peft_name
    if peft_name in LoraConfig.__dataclass_fields__ and method != "lora-ga":
        assert getattr(config, peft_name)


def test_what_finetune_does_not_offer_says_why() -> None:
    assert {name for name, method in METHODS.items() if not method.offered} == {
        "relora",
        "full-width",
        "full",
        "galore",
        "adarankgrad",
        "none",
    }
    for method in METHODS.values():
        assert method.offered == (not method.why_not)
        assert method.config is not None or not method.offered
    not_of_peft = {name for name, method in METHODS.items() if method.offered and not method.peft}
    assert not_of_peft == {"deep-lora", "lora-rite"}


def page() -> str:
    lines = [
        "# Methods",
        "",
        "Made from `rankwise.finetuning.methods` by `python -m tests.finetuning.test_methods`. Every method of `rankwise finetune",
        "--method …` passes the same tests: it starts as the pretrained model, trains what it says, its `adapter/` loads with PEFT on",
        "the unchanged model and gives the same outputs, it can be merged, and a run that goes on from a checkpoint ends with the",
        "same numbers.",
        "",
        "`--rank` is the rank; where a method has none, it is chosen so that a layer trains about what LoRA would at this rank.",
        "Those that train a few numbers whatever the rank: `vera`, `pvera`, `tinylora`, `road`, `ia3`, `frod`; `randlora` keeps",
        "PEFT's 32, of which less would train more.",
        "",
        "| `--method` | what is trained | PEFT's name | rate | convolutions |",
        "|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        if method.offered:
            peft_name = f"`{method.peft}`" if method.peft else "rankwise's own"
            adapts = "yes" if method.convolutions else ""
            lines.append(f"| `{name}` | {method.summary} | {peft_name} | {method.lr:g} | {adapts} |")
    lines += [
        "",
        "All adapt `nn.Linear`. On GPT-2's `Conv1D` and on models made of convolutions those that PEFT has no layer for say so.",
        "",
        "`pissa`, `olora`, `corda` and `lora-ga` are saved as LoRAs of twice the rank: what they take out of the weight at the",
        "start stands in the second half, which is not trained, and the weight stays as it is. `kasa` leaves the weight's least",
        "directions out, so that it starts close to the pretrained model and not as it. `unilora` and `vblora` start close to it",
        "too.",
        "",
        "`hra` and `boft` turn every weight anew at every step: on a CPU a step takes many times as long as with `lora`.",
        "",
        "`rankwise compare` has these besides:",
        "",
        "| method | what is trained | why not in `finetune` |",
        "|---|---|---|",
    ]
    lines += [f"| `{name}` | {m.summary} | {m.why_not} |" for name, m in METHODS.items() if not m.offered]
    lines += ["", "## What PEFT has besides", "", "| PEFT's name | why it is left out |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in LEFT_OUT.items()]
    return "\n".join(lines) + "\n"


def test_the_readme_counts_them() -> None:
    offered = sum(method.offered for method in METHODS.values())
    assert f"any of [{offered}\nmethods](docs/methods.md)" in (Path(__file__).parents[2] / "README.md").read_text(
        "utf-8"
    )


def test_the_page_says_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
