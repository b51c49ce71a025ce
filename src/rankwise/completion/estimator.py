"""DeepMatrixCompletion: fills a matrix with holes; scikit-learn's conventions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from rankwise.completion import kernels, storage
from rankwise.completion.balanced import deep_factors
from rankwise.completion.fit_task import Callback
from rankwise.completion.intervals import Calibration, calibrate
from rankwise.completion.observations import Observations, as_observations
from rankwise.completion.options import SolverOptions
from rankwise.completion.solution import Solution
from rankwise.completion.solver import solve
from rankwise.errors import UserError

Array = NDArray[np.floating]


class IntervalPrediction(NamedTuple):
    """Predictions with the interval that holds the true value as often as was asked for, all (n_entries,)."""

    values: Array
    lower: Array
    upper: Array


class DeepMatrixCompletion(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Fills the holes of a matrix by a compressed deep factorization; the rank is found, not chosen.

    Without noise the entries are fitted by the factorization W_L⋯W_1 whose weight decay is let go to zero
    (:mod:`rankwise.completion.weight_decay_path`), which recovers the matrix at whatever bound on the rank. Noise is
    recognized, and then rank, shrinkage and noise level come from the evidence
    (:mod:`rankwise.completion.evidence`). ``solver="gradient-descent"`` is the paper's own method (ICML 2024, eq. 11).

    Args:
        rank: the most directions to use; None takes what the entries could determine, at most 40.
        depth: L, layers of the factorization; more prefers fewer directions more strongly. 2 is the nuclear norm.
        solver: "auto", "weight-decay", "evidence" or "gradient-descent".
        fit_intercept: intercepts for rows, columns and the whole; None: only where the entries are noisy.
        loss: "squared", or "huber" where some entries are far off.
        weight_decay: stop the path at this decay, in units of σ₁ of the observed matrix, instead of at zero. Only for
            ``solver="weight-decay"``.
        early_stopping: with "weight-decay" or "gradient-descent": hold out ``validation_fraction`` of the entries, stop
            where their error is least, then fit all entries as far.
        validation_fraction: share of the entries held out for early stopping, and to calibrate intervals.
        clip: (low, high) of the values, "observed" for their range in the data, None for no bounds.
        tol: relative residual at which the observed entries count as fitted; None: 1e-7 in float64, 3e-6 in float32.
        max_iter: iterations at most; None: 300 steps or sweeps, 100,000 for gradient descent.
        init_scale: ε, the starting size of every inner factor; gradient descent only.
        outer_lr_ratio: γ, the outer factors' learning rate over the inner ones'; gradient descent only.
        learning_rate: η, None for one that is safe; gradient descent only.
        dtype: "float64" or "float32", of the factors and all arithmetic on entries.
        warm_start: go on from the last fit.
        n_jobs: threads; None or -1 for all.
        random_state: seed of the random starts and of what is held out.
        verbose: print a line an iteration.

    Attributes:
        rank_: number of directions found.
        singular_values_: (rank_,) of the low-rank part, falling.
        mean_, row_intercepts_ (m,), column_intercepts_ (n,): 0 where no intercept was fitted.
        left_ (m, rank_), right_ (n, rank_): X ≈ mean + intercepts + left_·right_ᵀ.
        noise_: standard deviation of the observed entries around the fit.
        route_: what solved it: "svd", "weight-decay", "evidence" or "gradient-descent".
        history_: one dict an iteration.
        n_iter_, converged_: iterations made, and whether they ended by themselves.
        unobserved_rows_, unobserved_columns_: indices without any observation, predicted by the intercepts alone.
        merged_duplicates_: how many repeated observations of an entry were averaged.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Example:
        >>> import numpy as np
        >>> from rankwise.completion import DeepMatrixCompletion
        >>> rng = np.random.default_rng(0)
        >>> full = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 50))
        >>> holes = np.where(rng.random(full.shape) < 0.5, full, np.nan)
        >>> model = DeepMatrixCompletion()
        >>> filled = model.fit_transform(holes)
        >>> model.rank_, bool(np.abs(filled - full).max() < 1e-4)
        (3, True)
    """

    def __init__(
        self,
        rank: int | None = None,
        *,
        depth: int = 3,
        solver: Literal["auto", "weight-decay", "evidence", "gradient-descent"] = "auto",
        fit_intercept: bool | None = None,
        loss: Literal["squared", "huber"] = "squared",
        weight_decay: float | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        clip: tuple[float, float] | Literal["observed"] | None = None,
        tol: float | None = None,
        max_iter: int | None = None,
        init_scale: float = 1e-3,
        outer_lr_ratio: float = 0.01,
        learning_rate: float | None = None,
        dtype: Literal["float64", "float32"] = "float64",
        warm_start: bool = False,
        n_jobs: int | None = None,
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
    ):
        self.rank = rank
        self.depth = depth
        self.solver = solver
        self.fit_intercept = fit_intercept
        self.loss = loss
        self.weight_decay = weight_decay
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.clip = clip
        self.tol = tol
        self.max_iter = max_iter
        self.init_scale = init_scale
        self.outer_lr_ratio = outer_lr_ratio
        self.learning_rate = learning_rate
        self.dtype = dtype
        self.warm_start = warm_start
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    # -- fitting ---------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: None = None, *, callback: Callback | None = None) -> "DeepMatrixCompletion":
        """Learn from the observed entries of X.

        Args:
            X: (m, n): scipy sparse matrix (what is stored is observed, explicit zeros too), array or DataFrame with NaN
                where nothing was observed, or a tuple ``(rows, columns, values, shape)``.
            y: ignored.
            callback: called with each iteration's entry of the history.

        Raises:
            UserError (a ValueError): an option or X is unusable; the message says what was expected, what came and what
                to do.
        """
        options = self._options()
        return self._learn(self._observations(X, reset=True), options, callback, self.warm_start)

    def partial_fit(self, X: Any, y: None = None, *, callback: Callback | None = None) -> "DeepMatrixCompletion":
        """Add the entries of X, which replace older values of the same entries, and go on from the last fit.

        X is as in :meth:`fit`; it may have more rows than before, and has the same columns.
        """
        options = self._options()
        if not hasattr(self, "observations_"):
            return self._learn(self._observations(X, reset=True), options, callback, False)
        return self._learn(self.observations_.joined(self._observations(X, reset=False)), options, callback, True)

    def _learn(
        self, observations: Observations, options: SolverOptions, callback: Callback | None, warm: bool
    ) -> "DeepMatrixCompletion":
        start = getattr(self, "solution_", None) if warm else None
        with kernels.threads(_thread_count(self.n_jobs)):
            solution = solve(observations, options, start=start, callback=_printing(self.verbose, callback))
        self.observations_ = observations
        self.calibration_: Calibration | None = None
        self._take(solution)
        self.unobserved_rows_ = np.flatnonzero(~solution.row_seen)
        self.unobserved_columns_ = np.flatnonzero(~solution.column_seen)
        together = observations.collective
        self.merged_duplicates_ = together.total(observations.merged)
        ranges = together.parts((float(observations.values.min()), float(observations.values.max())))
        self.value_range_ = (min(low for low, _ in ranges), max(high for _, high in ranges))
        return self

    def _take(self, solution: Solution) -> None:
        self.solution_ = solution
        factors = solution.balanced
        self.singular_values_ = factors.singular_values if factors.singular_values.any() else np.zeros(0)
        self.rank_ = len(self.singular_values_)
        self.left_, self.right_ = solution.left, solution.right
        self.mean_ = solution.intercepts.mean
        self.row_intercepts_, self.column_intercepts_ = solution.intercepts.rows, solution.intercepts.columns
        self.noise_ = solution.noise
        self.route_ = solution.route
        self.history_ = solution.history
        self.n_iter_ = max(1, len(solution.history))
        if solution.route == "gradient-descent":  # whose history holds every hundredth iteration
            self.n_iter_ = max(1, solution.history[-1]["iteration"])
        self.converged_ = solution.converged

    # -- predicting ------------------------------------------------------------------------------------------------

    def predict_entries(
        self, rows: ArrayLike, columns: ArrayLike, *, interval: float | None = None
    ) -> Array | IntervalPrediction:
        """Values at the pairs given, nothing else is computed.

        Args:
            rows: (k,) indices 0 … m − 1.
            columns: (k,) indices 0 … n − 1.
            interval: a level such as 0.9: also lower and upper bounds that hold the true value that often. They are
                split-conformal (Vovk et al. 2005): the first call fits once more without ``validation_fraction`` of
                the entries (:meth:`calibrate`).

        Returns:
            (k,) values, or :class:`IntervalPrediction`.
        """
        check_is_fitted(self, "solution_")
        row = _pair_indices(rows, len(self.left_), "rows")
        column = _pair_indices(columns, len(self.right_), "columns")
        if len(row) != len(column):
            raise UserError(
                f"rows and columns must be equally long, one pair an entry; got {len(row)} and {len(column)}"
            )
        with kernels.threads(_thread_count(self.n_jobs)):
            values = self.solution_.at(row, column)
        if interval is None:
            return self._clipped(values)
        if not 0 < interval < 1:
            raise UserError(f"interval must be a level between 0 and 1 such as 0.9, got {interval}")
        half = self.calibrate().half_width(interval) * self.solution_.spread_at(row, column)
        return IntervalPrediction(self._clipped(values), self._clipped(values - half), self._clipped(values + half))

    def calibrate(self, *, callback: Callback | None = None) -> Calibration:
        """Errors on held-out entries, from a fit without them; made once, kept for every interval.

        Its ``rmse`` is the error to expect on an unseen entry.

        Args:
            callback: called with each iteration's entry of that fit's history.

        Raises:
            UserError: the model was loaded without a calibration, so there are no entries to hold out.
        """
        check_is_fitted(self, "solution_")
        if self.calibration_ is None:
            if not hasattr(self, "observations_"):
                raise UserError("a loaded model has no entries to calibrate on: call calibrate() before save()")
            with kernels.threads(_thread_count(self.n_jobs)):
                self.calibration_ = calibrate(
                    self.observations_, self._options(), self.validation_fraction, _seed(self.random_state), callback
                )
        return self.calibration_

    def transform(self, X: Any) -> Array:
        """X with its holes filled, (m', n); what was observed stays as it is.

        A row need not have been fitted: it is placed by a closed-form ridge regression on its observed entries, as the
        rows of the fit were, so on those the result is that of :meth:`fit_transform`.
        """
        check_is_fitted(self, "solution_")
        observations, filled = self._new_rows(X)
        with kernels.threads(_thread_count(self.n_jobs)):
            intercepts, factors = self.solution_.fold_in_rows(observations)
        plain = self.solution_.fallback.rows_of(observations)
        filled_rows = self._clipped(self.solution_.rows(intercepts, factors, observations.row_counts > 0, plain))
        if filled is None:
            filled = np.full(observations.shape, np.nan, filled_rows.dtype)
            filled[observations.row_of_each(), observations.columns] = observations.values
        holes = np.isnan(filled)
        filled[holes] = filled_rows[holes]
        return filled

    def row_factors(self, X: Any) -> Array:
        """(m', rank_) factors of the rows of X, known or not, by the same regression as :meth:`transform`."""
        check_is_fitted(self, "solution_")
        observations, _ = self._new_rows(X)
        with kernels.threads(_thread_count(self.n_jobs)):
            return self.solution_.fold_in_rows(observations)[1]

    def reconstruct(self, rows: slice | ArrayLike | None = None) -> Array:
        """The completed matrix, or some of its rows, as a dense array of fitted values (observed entries too)."""
        check_is_fitted(self, "solution_")
        chosen = slice(None) if rows is None else rows if isinstance(rows, slice) else np.asarray(rows)
        found = self.solution_
        return self._clipped(
            found.rows(
                found.intercepts.rows[chosen], found.left[chosen], found.row_seen[chosen], found.fallback.rows[chosen]
            )
        )

    def reconstruct_batches(self, batch_rows: int = 1024) -> Iterator[tuple[slice, Array]]:
        """:meth:`reconstruct` in blocks of rows, for matrices that do not fit in memory: (rows, block) pairs."""
        check_is_fitted(self, "solution_")
        if batch_rows < 1:
            raise UserError(f"batch_rows must be at least 1, got {batch_rows}")
        for start in range(0, len(self.left_), batch_rows):
            rows = slice(start, min(start + batch_rows, len(self.left_)))
            yield rows, self.reconstruct(rows)

    def score(self, X: Any, y: None = None) -> float:
        """R² on hidden entries: a fifth of each row's observations (at least one of two) is hidden, the row placed by the rest.

        1 is perfect, 0 no better than the mean of what was hidden. What :class:`~sklearn.model_selection.GridSearchCV`
        maximizes.
        """
        check_is_fitted(self, "solution_")
        observations, _ = self._new_rows(X)
        if observations.share is not None:
            raise UserError("score() hides entries of whole matrices; pass one process's rows without shard_rows")
        order = np.random.default_rng(_seed(self.random_state)).random(observations.count)
        row = observations.row_of_each()
        place = np.empty(observations.count, np.int64)
        place[np.lexsort((order, row))] = np.arange(observations.count)
        count = observations.row_counts[row]
        hidden = (place - observations.row_starts[row]) < np.where(count > 1, np.maximum(count // 5, 1), 0)
        if not hidden.any():
            raise UserError("no row has two observed entries, so none can be hidden to score on")
        shown = observations.subset(~hidden)
        with kernels.threads(_thread_count(self.n_jobs)):
            intercepts, factors = self.solution_.fold_in_rows(shown)
            plain = self.solution_.fallback.rows_of(shown)
            predicted = self.solution_.at_new(intercepts, factors, plain, row[hidden], observations.columns[hidden])
        truth = observations.values[hidden].astype(np.float64)
        error = float(np.sum((truth - self._clipped(predicted)) ** 2))
        spread = float(np.sum((truth - truth.mean()) ** 2))
        if spread == 0:
            return 1.0 if error <= 1e-20 * max(1.0, float(np.sum(truth**2))) else 0.0
        return 1 - error / spread

    @property
    def deep_factors_(self) -> tuple[Array, Array, Array]:
        """The low-rank part as U W̃_L ⋯ W̃_1 Vᵀ: U (m, k), V (n, k), diagonals of the L inner factors (L, k)."""
        check_is_fitted(self, "solution_")
        return deep_factors(self.solution_.balanced, self.depth)

    # -- keeping ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` and ``config.json`` into a new folder; entries are not saved.

        Call :meth:`calibrate` before if the loaded model is to give intervals.
        """
        check_is_fitted(self, "solution_")
        return storage.save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> "DeepMatrixCompletion":
        """The model that :meth:`save` wrote; it predicts the same numbers.

        Raises:
            UserError: the folder or a file is missing, cut short, of a newer format, or not of such a model.
        """
        return storage.load(cls, Path(folder))

    # -- in between ------------------------------------------------------------------------------------------------

    def _options(self) -> SolverOptions:
        self._check_clip()
        return SolverOptions(
            rank=self.rank,
            depth=self.depth,
            solver=self.solver,
            fit_intercept=self.fit_intercept,
            loss=self.loss,
            weight_decay=self.weight_decay,
            early_stopping=self.early_stopping,
            validation_fraction=self.validation_fraction,
            tol=self.tol,
            max_iter=self.max_iter,
            init_scale=self.init_scale,
            outer_lr_ratio=self.outer_lr_ratio,
            learning_rate=self.learning_rate,
            dtype=self.dtype,
            seed=_seed(self.random_state),
        )

    def _observations(self, X: Any, *, reset: bool) -> Observations:
        if isinstance(X, (tuple, Observations)):
            observations = as_observations(X, self.dtype)
            self._check_columns(observations.shape[1], reset)
            return observations
        return as_observations(self._validated(X, reset), self.dtype)

    def _validated(self, X: Any, reset: bool) -> Any:
        return validate_data(
            self,
            X,
            reset=reset,
            accept_sparse=("csr", "csc", "coo"),
            dtype=np.dtype(self.dtype),
            ensure_all_finite="allow-nan",
            copy=not sp.issparse(X),
        )

    def _new_rows(self, X: Any) -> tuple[Observations, Array | None]:
        """Entries of X and, where X is dense, a copy of it to fill. Nothing observed is allowed here."""
        if isinstance(X, (tuple, Observations)):
            return self._observations(X, reset=False), None
        X = self._validated(X, reset=False)
        dense = None if sp.issparse(X) else X
        empty = X.nnz == 0 if dense is None else bool(np.isnan(dense).all())
        if empty:
            return Observations.empty(X.shape, self.dtype), dense
        return as_observations(X, self.dtype), dense

    def _check_columns(self, width: int, reset: bool) -> None:
        if reset:
            self.n_features_in_ = width
            if hasattr(self, "feature_names_in_"):
                del self.feature_names_in_
        elif width != self.n_features_in_:
            raise UserError(f"X has {width} columns, but the model was fitted on {self.n_features_in_}")

    def _check_clip(self) -> None:
        if self.clip is None or isinstance(self.clip, str):
            fine = self.clip in (None, "observed")
        else:
            fine = len(self.clip) == 2 and bool(self.clip[0] <= self.clip[1])
        if not fine:
            raise UserError(f"clip must be (low, high) with low ≤ high, 'observed' or None, got {self.clip!r}")

    def _clipped(self, values: Array) -> Array:
        if self.clip is None:
            return values
        low, high = self.value_range_ if self.clip == "observed" else self.clip
        return np.clip(values, low, high)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = []
        return tags


def _printing(verbose: bool, callback: Callback | None) -> Callback | None:
    if not verbose:
        return callback

    def printed(entry: dict[str, Any]) -> None:
        shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items())
        print(f"[DeepMatrixCompletion] {shown}", flush=True)
        if callback:
            callback(entry)

    return printed


def _thread_count(n_jobs: int | None) -> int | None:
    if n_jobs is None or n_jobs == -1:
        return None
    if n_jobs < 1:
        raise UserError(f"n_jobs must be a positive number of threads, -1 or None, got {n_jobs}")
    return n_jobs


def _seed(random_state: Any) -> int:
    if isinstance(random_state, (int, np.integer)):
        return int(random_state)
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def _pair_indices(given: ArrayLike, size: int, what: str) -> NDArray[np.int64]:
    index = np.atleast_1d(np.asarray(given))
    if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
        raise UserError(f"{what} must be a list of whole numbers, got {index.dtype} of shape {index.shape}")
    if index.size and not (index.min() >= 0 and index.max() < size):
        bad = int(index.min()) if index.min() < 0 else int(index.max())
        raise UserError(f"{what} index {bad} is outside 0 … {size - 1}")
    return index.astype(np.int64)
