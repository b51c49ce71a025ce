"""The loop against autograd and torch's optimizers, what it stops at, what it costs, and what it refuses."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise.factorizations import (
    CompressedDeepLinear,
    DeepLinear,
    DivergedError,
    MaskedSquaredLoss,
    RegressionLoss,
    SquaredLoss,
    fit_factorization,
    identity_factors,
    invariant_subspaces,
)
from tests.spectral.planted import frame, planted

F64 = torch.float64
TARGET = planted(8, 6, [2.0, 1.0, 0.5]).matrix
MASK = torch.rand(8, 6, generator=torch.Generator().manual_seed(3)) < 0.6
X = torch.randn(6, 9, dtype=F64, generator=torch.Generator().manual_seed(4))

LOSSES = {
    "squared": (SquaredLoss(TARGET), lambda f: 0.5 * (f - TARGET).square().sum()),
    "masked": (MaskedSquaredLoss(TARGET, MASK), lambda f: 0.5 * (MASK * (f - TARGET)).square().sum()),
    "regression": (RegressionLoss(X, TARGET @ X), lambda f: 0.5 * (f @ X - TARGET @ X).square().sum()),
    "any": (lambda f: (f - TARGET).abs().pow(1.5).sum(), lambda f: (f - TARGET).abs().pow(1.5).sum()),
}


def deep():
    return DeepLinear.gaussian([6, 5, 7, 8], init_scale=0.5, generator=torch.Generator().manual_seed(0), dtype=F64)


def compressed(train_outer=False, columns=4):
    inner = torch.randn(3, columns, columns, dtype=F64, generator=torch.Generator().manual_seed(1)) / 4
    return CompressedDeepLinear(frame(8, columns, 5), frame(6, columns, 6), inner, train_outer=train_outer)


def outer_left_only():
    f = compressed()
    f.left.requires_grad_()
    return f


def outer_right_only():
    f = compressed()
    f.right.requires_grad_()
    return f


def one_factor_frozen():
    f = deep()
    f.weights[1].requires_grad_(False)
    return f


MODELS = {
    "deep": deep,
    "compressed": compressed,
    "outer": lambda: compressed(train_outer=True),
    "left": outer_left_only,
    "right": outer_right_only,
    "frozen": one_factor_frozen,
    "single": lambda: DeepLinear.gaussian(
        [6, 8], init_scale=0.5, generator=torch.Generator().manual_seed(0), dtype=F64
    ),
}


def by_autograd(model, definition, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = definition(model.product())
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return [*losses, definition(model.product()).item()]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def groups(model, lr, ratio):
    return [
        {"params": [p], "lr": lr * (1.0 if isinstance(model, DeepLinear) or p is model.inner else ratio)}
        for p in trained(model)
    ]


RULES = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "heavy ball": {"momentum": 0.8, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_descent_is_torch_sgd_by_autograd(model, loss, rule):
    """Every model, loss and kind of momentum, with the outer factors at γ = .3; twelve steps to rounding."""
    ours, theirs = MODELS[model](), MODELS[model]()
    given_loss, definition = LOSSES[loss]
    lr = 0.01
    result = fit_factorization(ours, given_loss, lr=lr, outer_lr_ratio=0.3, steps=12, tol=0.0, **RULES[rule])
    expected = by_autograd(theirs, definition, torch.optim.SGD(groups(theirs, lr, 0.3), lr=lr, **RULES[rule]), 12)
    assert result.losses == pytest.approx(expected, rel=1e-10)
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(got, want, rtol=0, atol=1e-12)
    assert result.reason == "steps"
    assert result.iterations == 12
    assert result.lr == lr


@pytest.mark.parametrize("model", MODELS)
def test_adam_is_torch_adamw(model):
    ours, theirs = MODELS[model](), MODELS[model]()
    given_loss, definition = LOSSES["squared"]
    result = fit_factorization(
        ours, given_loss, optimizer="adam", lr=0.01, weight_decay=0.1, outer_lr_ratio=0.3, steps=12
    )
    expected = by_autograd(
        theirs, definition, torch.optim.AdamW(groups(theirs, 0.01, 0.3), lr=0.01, weight_decay=0.1), 12
    )
    assert result.losses == pytest.approx(expected, rel=1e-9)


def test_adam_s_default_step_makes_progress_without_being_told():
    for factor in (1e-2, 1.0, 1e2):
        model = DeepLinear.orthogonal(
            10, 3, 0.1 * factor ** (1 / 3), generator=torch.Generator().manual_seed(0), dtype=F64
        )
        target = factor * planted(10, 10, [2.0, 1.0]).matrix
        result = fit_factorization(model, SquaredLoss(target), optimizer="adam", steps=1500, tol=1e-3)
        assert result.reason == "tolerance"
        assert max(result.losses) < 1.1 * result.losses[0]


@pytest.mark.parametrize("model", ["deep", "outer", "left"])
def test_a_torch_optimizer_takes_the_steps_it_would_take_by_autograd(model):
    ours, theirs = MODELS[model](), MODELS[model]()
    given_loss, definition = LOSSES["squared"]
    optimizer = torch.optim.RMSprop(trained(ours), lr=1e-3, momentum=0.5)
    result = fit_factorization(ours, given_loss, optimizer=optimizer, steps=10)
    expected = by_autograd(theirs, definition, torch.optim.RMSprop(trained(theirs), lr=1e-3, momentum=0.5), 10)
    assert result.losses == pytest.approx(expected, rel=1e-9)
    assert math.isnan(result.lr)
    assert all(p.grad is None for p in ours.parameters()), "the gradients were the loop's own"


def test_gradients_of_the_caller_s_own_are_left_alone():
    model = deep()
    mine = torch.ones_like(model.weights[0])
    model.weights[0].grad = mine
    fit_factorization(model, LOSSES["squared"][0], optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), steps=3)
    assert model.weights[0].grad is mine
    assert torch.equal(mine, torch.ones_like(mine))


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("make", [SquaredLoss, lambda target: RegressionLoss(torch.eye(50, dtype=F64), target)])
@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_an_iteration_between_fixed_frames_sees_nothing_of_the_size_of_f(make, optimizer):
    """After the projection no tensor has more than L·w² numbers; with frames that train, f itself comes up."""
    target = planted(60, 50, [3.0, 2.0]).matrix
    loss = make(target)

    def largest(train_outer):
        frames = invariant_subspaces(target, 2, generator=torch.Generator().manual_seed(0))
        model = CompressedDeepLinear.from_subspaces(frames, 3, 0.1, train_outer=train_outer)
        watch = LargestTensor()

        def watch_iterations(step):
            if step.iteration == 0:
                watch.__enter__()

        try:
            fit_factorization(model, loss, optimizer=optimizer, lr=1e-3, steps=5, callbacks=[watch_iterations])
        finally:
            watch.__exit__(None, None, None)
        return watch.numbers

    assert largest(train_outer=False) == 3 * 4 * 4
    assert largest(train_outer=True) >= 60 * 50


def test_the_small_path_reports_the_loss_of_the_whole_matrix():
    """Also the part that the frames cannot reach, so tol means the same compressed and at full width."""
    target = planted(20, 20, [3.0, 2.0, 0.1]).matrix
    frames = invariant_subspaces(target, 2, generator=torch.Generator().manual_seed(0))
    model = CompressedDeepLinear.from_subspaces(frames, 3, 0.3)
    result = fit_factorization(model, SquaredLoss(target), steps=400, tol=1e-12)
    whole = 0.5 * float((model.product() - target).detach().square().sum())
    assert result.losses[-1] == pytest.approx(whole, rel=1e-10)
    assert result.losses[-1] > 0.5 * 0.1**2 * 0.5
    assert not result.converged


def test_descent_stops_at_the_tolerance_and_not_before():
    model, loss = deep(), LOSSES["squared"][0]
    result = fit_factorization(model, loss, tol=1e-3, steps=10_000)
    assert result.converged
    assert result.reason == "tolerance"
    assert result.losses[-1] <= 1e-3 * loss.at_zero < result.losses[-2]
    assert len(result.losses) == result.iterations + 1
    again = fit_factorization(model, loss, tol=1e-3)
    assert again.iterations == 0
    assert again.converged


def test_the_tolerance_of_a_loss_without_a_unit_is_absolute():
    result = fit_factorization(deep(), lambda f: (f - TARGET).square().sum(), lr=0.02, tol=0.05, steps=5000)
    assert result.reason == "tolerance"
    assert result.losses[-1] <= 0.05 < result.losses[-2]


def test_callbacks_see_every_iterate_and_may_stop_descent():
    seen = []

    def watch(step):
        seen.append((step.iteration, step.loss, step.model.product().detach().clone()))

    model = deep()
    result = fit_factorization(
        model, LOSSES["squared"][0], steps=50, tol=0.0, callbacks=[watch, lambda step: step.iteration == 7]
    )
    assert result.reason == "callback"
    assert result.iterations == 7
    assert [iteration for iteration, _, _ in seen] == list(range(8))
    for (_, loss, f), recorded in zip(seen, result.losses, strict=True):
        assert loss == recorded == pytest.approx(float(LOSSES["squared"][1](f)), rel=1e-12)
    assert torch.equal(seen[-1][2], model.product().detach())


def test_a_callback_that_returns_something_else_stops_nothing():
    result = fit_factorization(
        deep(), LOSSES["squared"][0], steps=5, tol=0.0, callbacks=[lambda step: step.iteration + 1]
    )
    assert result.iterations == 5


@pytest.mark.parametrize("model", ["deep", "compressed", "outer"])
@pytest.mark.parametrize("settings", [{"lr": 5.0}, {"lr": 5.0, "momentum": 0.9}, {"lr": 1e200}])
def test_divergence_is_detected_and_the_last_good_state_kept(model, settings):
    f, loss = MODELS[model](), LOSSES["squared"][0]
    with pytest.raises(DivergedError, match=r"descent diverged: update \d+ .*; lower lr from") as caught:
        fit_factorization(f, loss, steps=1000, tol=0.0, **settings)
    result = caught.value.result
    assert isinstance(caught.value, ValueError)
    assert result.reason == "diverged"
    assert not result.converged
    assert all(math.isfinite(value) for value in result.losses)
    assert all(bool(p.isfinite().all()) for p in f.parameters())
    now = 0.5 * float((f.product() - TARGET).detach().square().sum())
    assert now == pytest.approx(result.losses[-1], rel=1e-10)
    assert now <= 1e3 * max(result.losses[0], loss.at_zero)


def test_a_torch_optimizer_that_diverges_is_told_to_lower_its_own_lr():
    f = deep()
    with pytest.raises(DivergedError, match="lower the optimizer's lr"):
        fit_factorization(f, LOSSES["squared"][0], optimizer=torch.optim.SGD(f.parameters(), lr=50.0))
    assert all(bool(p.isfinite().all()) for p in f.parameters())


def test_a_start_that_is_not_finite_is_no_matter_of_the_step():
    f = deep()
    with torch.no_grad():
        f.weights[0][0, 0] = math.nan
    with pytest.raises(DivergedError, match="not finite at the start"):
        fit_factorization(f, LOSSES["squared"][0], lr=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"lr": math.inf}, "positive and finite"),
        ({"weight_decay": -0.1}, "cannot be negative"),
        ({"outer_lr_ratio": -0.1}, "cannot be negative"),
        ({"momentum": 1.0}, r"\[0, 1\)"),
        ({"nesterov": True}, "needs a momentum"),
        ({"steps": -1}, "cannot be negative"),
        ({"optimizer": "sgd"}, '"gd", "adam" or a torch optimizer'),
        ({"optimizer": "adam", "momentum": 0.9}, "has its own"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fit_factorization(deep(), LOSSES["squared"][0], **settings)


def test_a_torch_optimizer_is_not_told_twice_nor_given_another_model_s_parameters():
    f, other = deep(), deep()
    sgd = torch.optim.SGD(f.parameters(), lr=0.1)
    for twice in ({"lr": 0.1}, {"weight_decay": 0.1}, {"momentum": 0.1}):
        with pytest.raises(ValueError, match="brings its own"):
            fit_factorization(f, LOSSES["squared"][0], optimizer=sgd, **twice)
    with pytest.raises(ValueError, match=r"build it from model.parameters\(\)"):
        fit_factorization(other, LOSSES["squared"][0], optimizer=sgd)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        fit_factorization(deep().requires_grad_(False), LOSSES["squared"][0])


def test_float32_models_train_in_float32():
    model = DeepLinear.orthogonal(8, 3, 0.3, generator=torch.Generator().manual_seed(0))
    result = fit_factorization(model, SquaredLoss(planted(8, 8, [2.0, 1.0]).matrix.float()), tol=1e-3)
    assert result.converged
    assert model.weights[0].dtype == torch.float32


def test_identity_inner_factors_and_a_zero_target_stay_at_rest_without_complaint():
    f = CompressedDeepLinear(torch.eye(5)[:, :2], torch.eye(5)[:, :2], identity_factors(2, 2, 0.0))
    result = fit_factorization(f, SquaredLoss(torch.zeros(5, 5)), steps=3)
    assert result.converged
    assert result.losses == [0.0]
