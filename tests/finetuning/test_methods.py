"""What every method must keep: who is trained, at which rate, from which start; and what makes each one itself."""

import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.finetuning import FinetuneSettings, make_task, methods, read_table
from rankwise.finetuning.methods import (
    FRAMES_LR,
    LORA_PLUS_RATIO,
    METHODS,
    AdaLoraBudget,
    adalora_orthogonality,
    adapt,
    create_optimizer,
    default_learning_rate,
    head_parameters,
    learning_rate_grid,
)
from rankwise.finetuning.models import load_model, load_tokenizer
from rankwise.finetuning.tasks import Task
from rankwise.finetuning.training import first_batches, make_trainer, place_frames, predict_rows, quiet_trainer

KINDS = {"pair-similarity": "pairs", "classification": "classes"}
MEMORIZED = [0, 1]
STEPS = 20
HEAD_LR = 2e-2
# high enough to move a tiny random model in so few steps
RATES = {
    "full": 3e-3,
    "full-width": 6e-3,
    "deep-lora": 1e-2,
    "vera": 1e-1,
    "adalora": 1e-1,
    "lora-plus": 3e-3,
    "pissa": 1.5e-2,
}
ALL = [(kind, method) for kind in KINDS for method in METHODS if (kind, method) != ("pair-similarity", "none")]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def settings(method: str, **changes: Any) -> FinetuneSettings:
    values: dict[str, Any] = {
        "model": "", "data": "", "out": "", "method": method, "lr": RATES.get(method, 1e-2), "head_lr": HEAD_LR,
        "r": 4, "init_scale": 0.1, "steps": STEPS, "batch_size": 2, "precision": "fp32",
        "schedule": "constant", "outer_lr_ratio": 1.0, "direction_dropout": 0.0,
    }  # fmt: skip
    return FinetuneSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def tasks(tiny: SimpleNamespace) -> dict[str, Task]:
    tokenizer, _ = load_tokenizer(tiny.model)
    return {
        kind: make_task(kind, read_table(getattr(tiny, file)), tokenizer, source=tiny.model, max_length=32)
        for kind, file in KINDS.items()
    }


def pretrained(tiny: SimpleNamespace, task: Task) -> nn.Module:
    torch.manual_seed(5)  # the head's start
    return load_model(task, tiny.model, None).eval()


def adapted(tiny: SimpleNamespace, task: Task, chosen: FinetuneSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as a run makes them."""
    model = adapt(pretrained(tiny, task), task, chosen)
    if chosen.method == "deep-lora":
        place_frames(model, task, chosen, first_batches(task, chosen, MEMORIZED), "fp32")
    return model, create_optimizer(model, task, chosen)


def train(
    model: nn.Module, task: Task, chosen: FinetuneSettings, optimizer: torch.optim.Optimizer, scratch: Path
) -> Any:
    with quiet_trainer():
        trainer = make_trainer(
            model, task, chosen, MEMORIZED, optimizer, "fp32", output=scratch / "scratch", save_every=None
        )
        trainer.train()
    model.eval()
    return trainer


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loss(model: nn.Module, task: Task) -> float:
    with torch.no_grad():
        return float(task.loss(model, task.collate(MEMORIZED)))


def original_name(name: str) -> str:
    """What a parameter of the pretrained model is called before PEFT wraps it."""
    for added in ("base_model.model.", "base_layer.", "original_module."):
        name = name.replace(added, "")
    return name


def only(*names: str) -> Any:
    """The runs of these methods alone."""
    return pytest.mark.parametrize("run", [pair for pair in ALL if pair[1] in names], indirect=True, ids="-".join)


ADAPTERS = only(*(method for method in METHODS if method not in ("full", "full-width", "none")))


@pytest.fixture(scope="module", params=ALL, ids="-".join)
def run(
    request: pytest.FixtureRequest,
    tiny: SimpleNamespace,
    tasks: dict[str, Task],
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """A method on a task before and after training on two rows."""
    kind, method = request.param
    task, chosen = tasks[kind], settings(method)
    base = pretrained(tiny, task)
    found = SimpleNamespace(
        kind=kind, method=method, task=task, settings=chosen, base=snapshot(base),
        base_predictions=predict_rows(task, base, range(20)), base_layers=linear_layers(base),
    )  # fmt: skip
    found.model, found.optimizer = adapted(tiny, task, chosen)
    found.model.eval()
    found.groups = [{**group, "params": list(group["params"])} for group in found.optimizer.param_groups]
    found.trainable = {name for name, p in found.model.named_parameters() if p.requires_grad}
    found.before, found.loss_before = snapshot(found.model), loss(found.model, task)
    found.predictions_before = predict_rows(task, found.model, range(20))
    found.trainer = train(found.model, task, chosen, found.optimizer, tmp_path_factory.mktemp("run"))
    found.after, found.loss_after = snapshot(found.model), loss(found.model, task)
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
    assert isinstance(run.optimizer, torch.optim.AdamW)
    for group in run.groups:
        assert group["eps"] == run.settings.epsilon
        assert group["weight_decay"] == 0.0


def test_what_is_not_trained_does_not_move(run: SimpleNamespace) -> None:
    still = set(run.before) - run.trainable
    moved = [name for name in still if not torch.equal(run.before[name], run.after[name])]
    assert not moved
    assert run.method == "full" or still


@only(*(method for method in METHODS if method != "full"))
def test_the_pretrained_weights_are_there_unchanged(run: SimpleNamespace) -> None:
    kept = {original_name(name): value for name, value in run.after.items() if name not in run.trainable}
    expected = {
        name for name in run.base if run.method not in ("none", "full-width") or not name.startswith("classifier.")
    }
    assert expected <= set(kept)
    different = {name for name in expected if not torch.equal(kept[name], run.base[name])}
    # PiSSA keeps the residual of its layers
    allowed = {f"{name}.weight" for name in run.base_layers} if run.method == "pissa" else set()
    assert different <= allowed
    assert bool(different) == bool(allowed)


def test_something_of_every_trained_kind_moves(run: SimpleNamespace) -> None:
    """All of it, but where no gradient flows: the pooler that the pair loss does not use."""
    unreached = {name for name in run.trainable if run.kind == "pair-similarity" and "pooler" in name}
    assert run.method == "full" or not unreached
    still = [n for n in run.trainable - unreached if torch.equal(run.before[n], run.after[n])]
    if run.method == "full":  # words that the two rows lack, and no gradient through softmax's shift
        still = [name for name in still if "embeddings" not in name and not name.endswith("key.bias")]
    assert not still


def test_two_rows_are_learnt(run: SimpleNamespace) -> None:
    assert math.isfinite(run.loss_after)
    # a random body makes features that are almost alike: a head alone gets only so far
    assert run.loss_after < (0.9999 if run.method == "none" else 0.8) * run.loss_before


def test_the_start_is_the_pretrained_model(run: SimpleNamespace) -> None:
    """DoRA divides by a norm and multiplies by it, PiSSA adds what it took away: rounding of float32.

    The full-width product is not shifted to zero: it starts at ε³ = 1e-3 here.
    """
    tolerance = {"dora": 2e-6, "pissa": 2e-5, "full-width": 1e-3}.get(run.method, 1e-7)
    assert abs(run.predictions_before - run.base_predictions).max() <= tolerance


@ADAPTERS
def test_all_linear_layers_that_the_loss_reaches_are_adapted(run: SimpleNamespace) -> None:
    layers = {original_name(n) for n, module in run.model.named_modules() if isinstance(module, BaseTunerLayer)}
    left_out = "pooler" if run.kind == "pair-similarity" else "classifier"
    assert layers == {name for name in run.base_layers if left_out not in name}
    assert any("pooler" in name for name in layers) == (run.kind == "classification")


@pytest.mark.parametrize("method", [method for method in METHODS if method != "none"])
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
        ("pissa", 1.0),
        ("rslora", math.sqrt(8)),
    ):
        model = adapt(pretrained(tiny, task), task, settings(method, r=8))
        assert [layer.scaling["default"] for layer in lora_layers(model)] == pytest.approx([expected] * 12), method


@only("dora")
def test_doras_magnitude_is_trained(run: SimpleNamespace) -> None:
    magnitudes = [name for name in run.trainable if "magnitude" in name]
    assert len(magnitudes) == len(lora_layers(run.model))
    assert all(not torch.equal(run.before[name], run.after[name]) for name in magnitudes)


def test_pissa_starts_from_the_top_singular_directions(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    task = tasks["pair-similarity"]
    base = dict(pretrained(tiny, task).named_parameters())
    model = adapt(pretrained(tiny, task), task, settings("pissa", r=4))
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            W = base[original_name(f"{name}.base_layer.weight")].double()
            U, S, Vh = torch.linalg.svd(W)
            best = (U[:, :4] * S[:4]) @ Vh[:4]
            A, B = (getattr(module, f"lora_{letter}")["default"].weight.double() for letter in "AB")
            # randomized: nearly as good as the best; and residual + product is the weight
            error = torch.linalg.matrix_norm(W - B @ A) / torch.linalg.matrix_norm(W - best)
            assert error < 1.01
            assert torch.allclose(module.base_layer.weight.double() + B @ A, W, atol=1e-6)


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


# --- AdaLoRA: its budget and its penalty are ours to call


@only("adalora")
def test_adaloras_budget_falls_to_the_target(run: SimpleNamespace) -> None:
    layers = lora_layers(run.model)
    start, target = 6, 4
    assert all(layer.lora_E["default"].shape == (start, 1) for layer in layers)
    left = [int((layer.lora_E["default"] != 0).sum()) for layer in layers]
    assert sum(left) == target * len(layers)
    pattern = run.model.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == target * len(layers)
    (budget,) = [c for c in run.trainer.callback_handler.callbacks if isinstance(c, AdaLoraBudget)]
    assert budget.updates == STEPS


def test_without_its_callback_adalora_would_be_plain(
    tiny: SimpleNamespace, tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would see: nobody but the callback moves the budget."""
    monkeypatch.setattr(methods, "callbacks", lambda settings: [])
    task, chosen = tasks["pair-similarity"], settings("adalora")
    model, optimizer = adapted(tiny, task, chosen)
    train(model, task, chosen, optimizer, tmp_path)
    left = [int((layer.lora_E["default"] != 0).sum()) for layer in lora_layers(model)]
    assert sum(left) == 6 * len(left)


def test_the_budget_is_moved_between_step_and_zero_grad(
    tiny: SimpleNamespace, tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are counted from 1 to the last, and the gradients that importance is made of are there."""
    task, chosen = tasks["pair-similarity"], settings("adalora", steps=5)
    model, optimizer = adapted(tiny, task, chosen)
    tuner, seen = model.base_model, []
    update = tuner.update_and_allocate

    def watched(step: int) -> None:
        seen.append((step, all(p.grad is not None for p in model.parameters() if p.requires_grad)))
        update(step)

    monkeypatch.setattr(tuner, "update_and_allocate", watched)
    train(model, task, chosen, optimizer, tmp_path)
    assert seen == [(step, True) for step in range(1, 6)]


def test_a_budget_that_never_moved_is_a_bug() -> None:
    budget = AdaLoraBudget()
    with pytest.raises(RuntimeError, match="never updated"):
        budget.on_train_end(None, SimpleNamespace(global_step=3), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [2, 3, 7, 10])
def test_adalora_reaches_its_target_in_few_steps_too(
    tiny: SimpleNamespace, tasks: dict[str, Task], tmp_path: Path, steps: int
) -> None:
    task, chosen = tasks["pair-similarity"], settings("adalora", steps=steps)
    model, optimizer = adapted(tiny, task, chosen)
    train(model, task, chosen, optimizer, tmp_path)
    left = [int((layer.lora_E["default"] != 0).sum()) for layer in lora_layers(model)]
    assert sum(left) == 4 * len(left)


def test_adalora_in_one_step_is_refused(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    """PEFT's allocator ranks by what earlier steps left; without any it fails with a KeyError."""
    task = tasks["pair-similarity"]
    with pytest.raises(UserError, match="at least 2 steps"):
        adapt(pretrained(tiny, task), task, settings("adalora", steps=1))


def test_the_penalty_is_peft_s_own(tiny: SimpleNamespace, tasks: dict[str, Task]) -> None:
    task = tasks["classification"]
    model: Any = adapt(pretrained(tiny, task), task, settings("adalora")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_()
    batch = task.collate([0, 1, 2])
    labels = batch.pop("targets")
    losses = {}
    for weight in (0.0, 0.5):
        model.peft_config["default"].orth_reg_weight = weight
        with torch.no_grad():
            losses[weight] = model(**batch, labels=labels).loss
    penalty = adalora_orthogonality(model)
    torch.testing.assert_close(penalty.detach(), losses[0.5] - losses[0.0], rtol=1e-5, atol=1e-5)
    penalty.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name)


def test_only_adalora_is_penalized_and_once(run: SimpleNamespace) -> None:
    """The trainer's loss is the task's plus the penalty, and PEFT adds no second one."""
    batch = run.task.collate(MEMORIZED)
    with torch.no_grad():
        whole = float(run.trainer.compute_loss(run.model, dict(batch)))
        plain = float(run.task.loss(run.model, dict(batch)))
        extra = float(adalora_orthogonality(run.model)) if run.method == "adalora" else 0.0
    assert whole == pytest.approx(plain + extra)
    assert (extra > 0) == (run.method == "adalora")


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
