"""DeepMatrixCompletion as its users meet it."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from rankwise.completion import DeepMatrixCompletion
from rankwise.errors import UserError
from tests.completion.planted import low_rank, observed, relative_error, with_holes


@pytest.fixture(scope="module")
def clean():
    full = low_rank(90, 70, 3)
    return full, observed(full, 0.4)


@pytest.fixture(scope="module")
def noisy():
    full = 3 + low_rank(200, 150, 3)
    mask = observed(full, 0.3)
    return full, mask, full + 0.3 * np.random.default_rng(5).standard_normal(full.shape)


@pytest.mark.parametrize("rank", [None, 3, 10])
def test_recovers_with_nothing_to_choose(clean, rank):
    full, mask = clean
    model = DeepMatrixCompletion(rank=rank)
    filled = model.fit_transform(with_holes(full, mask))
    assert model.rank_ == 3
    assert model.converged_
    assert model.route_ == "weight-decay"
    assert relative_error(filled, full) < 1e-6
    np.testing.assert_array_equal(filled[mask], full[mask])
    np.testing.assert_allclose(model.singular_values_, np.linalg.svd(full)[1][:3], rtol=1e-5)


def test_noise_is_recognized_and_weighed(noisy):
    full, mask, values = noisy
    model = DeepMatrixCompletion().fit(with_holes(values, mask))
    assert model.route_ == "evidence"
    assert model.noise_ == pytest.approx(0.3, rel=0.05)
    assert np.sqrt(np.mean((model.reconstruct() - full) ** 2)) < 0.15


@pytest.mark.parametrize("fixture", ["clean", "noisy"])
def test_transform_places_training_rows_where_fit_did(fixture, request):
    if fixture == "noisy":
        _, mask, values = request.getfixturevalue(fixture)
    else:
        values, mask = request.getfixturevalue(fixture)
    X = with_holes(values, mask)
    model = DeepMatrixCompletion()
    filled = model.fit_transform(X)
    rows, columns = np.nonzero(~mask)
    np.testing.assert_allclose(filled[~mask], model.predict_entries(rows, columns), atol=1e-8)
    np.testing.assert_allclose(model.transform(X[7:9]), filled[7:9], atol=1e-10)
    np.testing.assert_allclose(model.row_factors(X), model.left_, atol=1e-8)


def test_new_rows_are_filled_without_a_refit(clean):
    full, mask = clean
    model = DeepMatrixCompletion().fit(with_holes(full[:60], mask[:60]))
    filled = model.transform(with_holes(full[60:], mask[60:]))
    assert relative_error(filled, full[60:]) < 1e-5


def test_dense_sparse_frame_and_tuple_learn_the_same(clean):
    full, mask = clean
    rows, columns = np.nonzero(mask)
    X = with_holes(full, mask)
    expected = DeepMatrixCompletion().fit(X).reconstruct()
    frame = pd.DataFrame(X, columns=[f"c{j}" for j in range(X.shape[1])])
    for way in (
        frame,
        sp.csr_array((full[mask], (rows, columns)), shape=full.shape),
        (rows, columns, full[mask], full.shape),
    ):
        np.testing.assert_array_equal(DeepMatrixCompletion().fit(way).reconstruct(), expected)
    model = DeepMatrixCompletion().set_output(transform="pandas").fit(frame)
    assert list(model.transform(frame).columns) == list(frame.columns)


def test_everything_observed_is_the_truncated_svd():
    X = np.random.default_rng(0).standard_normal((30, 20))
    model = DeepMatrixCompletion(rank=4).fit(X)
    U, s, Vh = np.linalg.svd(X, full_matrices=False)
    np.testing.assert_allclose(model.reconstruct(), (U[:, :4] * s[:4]) @ Vh[:4], atol=1e-10)
    np.testing.assert_allclose(model.singular_values_, s[:4])


@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (400, 5), (5, 400), (2, 2), (1, 1)])
@pytest.mark.parametrize("fit_intercept", [None, True, False])
def test_any_shape_is_filled_with_finite_numbers(shape, fit_intercept):
    rng = np.random.default_rng(0)
    full = rng.standard_normal((shape[0], 1)) @ rng.standard_normal((1, shape[1]))
    mask = observed(full, 0.7)
    mask[0, 0] = True
    model = DeepMatrixCompletion(fit_intercept=fit_intercept)
    filled = model.fit_transform(with_holes(full, mask))
    assert filled.shape == shape
    assert np.isfinite(filled).all()


@pytest.mark.parametrize("constant", [0.0, 5.0, -1e-8])
def test_constant_matrices(constant):
    X = np.full((12, 9), constant)
    X[np.random.default_rng(0).random(X.shape) < 0.4] = np.nan
    filled = DeepMatrixCompletion().fit_transform(X)
    np.testing.assert_allclose(filled, constant, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("fixture", ["clean", "noisy"])
def test_unseen_rows_and_columns_get_the_intercepts(fixture, request):
    full, mask, values = (*request.getfixturevalue(fixture), None)[:3]
    values = full if values is None else values
    mask = mask.copy()
    mask[5] = False
    mask[:, 8] = False
    model = DeepMatrixCompletion().fit(with_holes(values, mask))
    assert model.unobserved_rows_.tolist() == [5]
    assert model.unobserved_columns_.tolist() == [8]
    fallback = model.solution_.fallback
    got = model.predict_entries([5, 3, 5], [2, 8, 8])
    np.testing.assert_allclose(
        got,
        [fallback.mean + fallback.columns[2], fallback.mean + fallback.rows[3], fallback.mean],
    )
    np.testing.assert_allclose(model.reconstruct()[[5, 3, 5], [2, 8, 8]], got)
    np.testing.assert_allclose(model.transform(with_holes(values, mask))[[5, 3, 5], [2, 8, 8]], got)


def test_duplicates_are_averaged_and_reported():
    rows, columns, values = [0, 0, 1, 1, 0], [0, 1, 0, 1, 0], [1.0, 2.0, 2.0, 4.0, 3.0]
    model = DeepMatrixCompletion().fit((rows, columns, values, (2, 2)))
    assert model.merged_duplicates_ == 1
    assert model.observations_.values.tolist() == [2.0, 2.0, 2.0, 4.0]


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_cover_as_often_as_they_say(noisy, level):
    full, mask, values = noisy
    model = DeepMatrixCompletion().fit(with_holes(values, mask))
    rows, columns = np.nonzero(~mask)
    fresh = full + 0.3 * np.random.default_rng(77).standard_normal(full.shape)
    found = model.predict_entries(rows, columns, interval=level)
    covered = np.mean((found.lower <= fresh[~mask]) & (fresh[~mask] <= found.upper))
    # 900 calibration entries: ± .02 is two standard errors, and the refit on all entries covers slightly more
    assert level - 0.03 < covered < level + 0.05
    calibration = model.calibrate()
    assert calibration.rmse == pytest.approx(np.hypot(0.3, 0.1), rel=0.1)
    assert calibration.rmse_interval[0] < calibration.rmse < calibration.rmse_interval[1]
    assert calibration.rmse < calibration.baseline_rmse


def test_an_interval_beyond_what_the_calibration_can_tell_is_infinite():
    X = with_holes(low_rank(8, 6, 1), observed(np.zeros((8, 6)), 0.8))
    found = DeepMatrixCompletion().fit(X).predict_entries([0], [0], interval=0.99)
    assert found.upper[0] == np.inf


def test_huber_shrugs_off_what_squares_follow(noisy):
    full, mask, values = noisy
    rng = np.random.default_rng(3)
    broken = values + (rng.random(values.shape) < 0.03) * rng.choice([-30, 30], values.shape)
    errors = {
        loss: np.sqrt(
            np.mean((DeepMatrixCompletion(loss=loss).fit(with_holes(broken, mask)).reconstruct() - full) ** 2)
        )
        for loss in ("squared", "huber")
    }
    assert errors["huber"] < 0.35 * errors["squared"]


@pytest.mark.parametrize("solver", ["weight-decay", "gradient-descent"])
def test_early_stopping_beats_going_to_the_end_on_noise(noisy, solver):
    full, mask, values = noisy
    X = with_holes(values - 3, mask)

    def error(early):
        most = 3000 if solver == "gradient-descent" else None
        model = DeepMatrixCompletion(
            rank=12, solver=solver, early_stopping=early, max_iter=most, outer_lr_ratio=0.1, init_scale=0.3
        )
        return relative_error(model.fit(X).reconstruct(), full - 3)

    assert error(True) < 0.25
    assert error(True) < error(False)


@pytest.mark.parametrize("solver", ["auto", "weight-decay", "evidence", "gradient-descent"])
def test_every_solver_finds_a_clean_matrix(clean, solver):
    full, mask = clean
    model = DeepMatrixCompletion(rank=6, solver=solver, outer_lr_ratio=0.1).fit(with_holes(full, mask))
    assert relative_error(model.reconstruct(), full) < 1e-3
    assert model.n_iter_ == (model.history_[-1]["iteration"] if solver == "gradient-descent" else len(model.history_))
    assert model.rank_ <= 6
    if solver != "evidence":
        assert model.rank_ == 3


def test_float32_is_as_good_as_float32_can_be(clean):
    full, mask = clean
    model = DeepMatrixCompletion(dtype="float32").fit(with_holes(full, mask))
    assert model.left_.dtype == np.float32
    assert model.route_ == "weight-decay"
    assert relative_error(model.reconstruct(), full) < 1e-4


def test_weight_decay_shrinks(clean):
    full, mask = clean
    X = with_holes(full, mask)
    model = DeepMatrixCompletion(solver="weight-decay", weight_decay=0.05).fit(X)
    assert 0 < model.singular_values_[0] < 0.99 * np.linalg.norm(full, 2)


def test_new_entries_are_added_and_replace_old_ones(clean):
    full, mask = clean
    first, rest = mask.copy(), mask.copy()
    first[::2] &= np.random.default_rng(0).random(first[::2].shape) < 0.9
    rest &= ~first
    wrong = full.copy()
    place = tuple(np.argwhere(first)[0])
    wrong[place] += 100
    model = DeepMatrixCompletion().fit(with_holes(wrong, first))
    rest[place] = True
    model.partial_fit(with_holes(full, rest))
    assert model.observations_.count == mask.sum()
    assert relative_error(model.reconstruct(), full) < 1e-6


def test_warm_start_goes_on(clean):
    full, mask = clean
    model = DeepMatrixCompletion(warm_start=True).fit(with_holes(full, mask))
    cold = model.n_iter_
    model.fit(with_holes(full, mask | observed(full, 0.1, seed=4)))
    assert model.n_iter_ < cold
    assert relative_error(model.reconstruct(), full) < 1e-6


def test_batches_are_the_whole(clean):
    full, mask = clean
    model = DeepMatrixCompletion().fit(with_holes(full, mask))
    whole = model.reconstruct()
    blocks = list(model.reconstruct_batches(32))
    assert [block.shape[0] for _, block in blocks] == [32, 32, 26]
    np.testing.assert_allclose(np.vstack([block for _, block in blocks]), whole, atol=1e-12)
    np.testing.assert_allclose(model.reconstruct([3, 50]), whole[[3, 50]], atol=1e-12)
    with pytest.raises(UserError, match="batch_rows"):
        next(model.reconstruct_batches(0))


def test_clipping(noisy):
    _, mask, values = noisy
    X = with_holes(values, mask)
    model = DeepMatrixCompletion(clip=(2.5, 3.5)).fit(X)
    assert model.reconstruct().min() >= 2.5
    assert model.reconstruct().max() <= 3.5
    observed_range = DeepMatrixCompletion(clip="observed").fit(X).reconstruct()
    assert observed_range.max() <= np.nanmax(X)


def test_deep_factors_multiply_to_the_low_rank_part(clean):
    full, mask = clean
    model = DeepMatrixCompletion(depth=4).fit(with_holes(full, mask))
    U, V, inner = model.deep_factors_
    assert inner.shape == (4, 3)
    assert relative_error(U @ np.diag(inner.prod(0)) @ V.T, full) < 1e-6


@pytest.mark.parametrize("fixture", ["clean", "noisy"])
def test_saved_and_loaded_predicts_the_same(fixture, request, tmp_path):
    full, mask, values = (*request.getfixturevalue(fixture), None)[:3]
    values = full if values is None else values
    X = pd.DataFrame(with_holes(values, mask), columns=[f"c{j}" for j in range(full.shape[1])])
    model = DeepMatrixCompletion(clip=(-50, 50)).fit(X)
    model.calibrate()
    model.save(tmp_path / "model")
    again = DeepMatrixCompletion.load(tmp_path / "model")
    np.testing.assert_array_equal(again.reconstruct(), model.reconstruct())
    np.testing.assert_array_equal(again.transform(X), model.transform(X))
    a, b = (m.predict_entries([1, 2], [3, 4], interval=0.9) for m in (model, again))
    np.testing.assert_array_equal(np.stack(a), np.stack(b))
    assert again.get_params() == model.get_params()
    assert again.rank_ == model.rank_
    assert again.history_ == model.history_


def test_a_loaded_model_without_calibration_says_so(clean, tmp_path):
    full, mask = clean
    DeepMatrixCompletion().fit(with_holes(full, mask)).save(tmp_path / "model")
    with pytest.raises(UserError, match="calibrate"):
        DeepMatrixCompletion.load(tmp_path / "model").predict_entries([0], [0], interval=0.9)


def test_damaged_files_are_one_readable_error(clean, tmp_path):
    full, mask = clean
    model = DeepMatrixCompletion().fit(with_holes(full, mask))
    folder = model.save(tmp_path / "model")
    with pytest.raises(UserError, match="not empty"):
        model.save(folder)
    with pytest.raises(UserError, match="does not exist"):
        DeepMatrixCompletion.load(tmp_path / "nowhere")
    arrays, config = (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").write_bytes(arrays[: len(arrays) // 2])
    with pytest.raises(UserError, match="damaged"):
        DeepMatrixCompletion.load(folder)
    (folder / "model.safetensors").write_bytes(arrays)
    for change, says in (
        ({"format_version": 99}, "format 99"),
        ({"kind": "other"}, "does not describe"),
        ({"n_features_in": 3}, "incomplete"),
        ({"parameters": {"unknown": 1}}, "incomplete"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=says):
            DeepMatrixCompletion.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        DeepMatrixCompletion.load(folder)


def test_works_in_a_pipeline_and_a_grid_search(noisy):
    _, mask, values = noisy
    X = with_holes(values, mask)
    target = np.nan_to_num(values).sum(1)
    make_pipeline(DeepMatrixCompletion(rank=4), Ridge()).fit(X, target).predict(X)
    search = GridSearchCV(DeepMatrixCompletion(), {"rank": [1, 4]}, cv=3).fit(X)
    assert search.best_params_ == {"rank": 4}
    assert 0 < search.best_score_ < 1


def test_score_is_high_where_rows_are_predictable(clean):
    full, mask = clean
    X = with_holes(full, mask)
    assert DeepMatrixCompletion().fit(X).score(X) > 0.999
    with pytest.raises(UserError, match="two observed"):
        DeepMatrixCompletion().fit(X).score(np.where(np.eye(*full.shape, dtype=bool), full, np.nan))


def test_pickles_and_progress(clean, capsys):
    full, mask = clean
    seen = []
    model = DeepMatrixCompletion(verbose=True).fit(with_holes(full, mask), callback=seen.append)
    assert "residual" in capsys.readouterr().out
    assert seen == model.history_
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).reconstruct(), model.reconstruct())


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"rank": 0}, "rank must be"),
        ({"rank": 2.5}, "rank must be"),
        ({"depth": 1}, "depth must be"),
        ({"solver": "magic"}, "solver must be"),
        ({"loss": "absolute"}, "loss must be"),
        ({"weight_decay": 0.1}, "weight_decay must be None unless"),
        ({"weight_decay": -1.0, "solver": "weight-decay"}, "weight_decay must be"),
        ({"early_stopping": True}, "early_stopping must be False unless"),
        ({"validation_fraction": 1.5}, "validation_fraction must be"),
        ({"tol": -1.0}, "tol must be"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"n_jobs": 0}, "n_jobs must be"),
        ({"clip": (5, 1)}, "clip must be"),
        ({"clip": "seen"}, "clip must be"),
        ({"clip": (1, 2, 3)}, "clip must be"),
    ],
)
def test_unusable_options_are_named(clean, parameters, says):
    full, mask = clean
    with pytest.raises(UserError, match=says):
        DeepMatrixCompletion(**parameters).fit(with_holes(full, mask))


def test_prediction_mistakes_are_named(clean):
    full, mask = clean
    model = DeepMatrixCompletion().fit(with_holes(full, mask))
    for rows, columns, says in (
        ([0], [999], "outside"),
        ([-1], [0], "outside"),
        ([0, 1], [0], "equally long"),
        ([0.5], [0], "whole"),
    ):
        with pytest.raises(UserError, match=says):
            model.predict_entries(rows, columns)
    with pytest.raises(UserError, match="level between"):
        model.predict_entries([0], [0], interval=90)
    with pytest.raises(UserError, match="columns"):
        model.transform(([0], [0], [1.0], (1, 3)))
    assert model.transform(np.full((2, full.shape[1]), np.nan)).shape == (2, full.shape[1])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_whatever_is_observed_the_answer_is_finite(seed):
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 12, 2)
    scale = 10.0 ** rng.integers(-6, 7)
    X = scale * rng.standard_normal(shape)
    if rng.random() < 0.3:
        X = scale * rng.integers(0, 3, shape).astype(float)
    X[rng.random(shape) < rng.random()] = np.nan
    if np.isnan(X).all():
        X[0, 0] = 1
    filled = DeepMatrixCompletion(rank=int(rng.integers(1, 6)) if rng.random() < 0.5 else None).fit_transform(X)
    assert np.isfinite(filled).all()
    assert np.abs(filled).max() <= 1e4 * max(np.nanmax(np.abs(X)), 1e-300)
