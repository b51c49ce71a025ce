"""Matrix completion against cmfrec, at the settings that suit cmfrec best, and alone where no peer gets there.

    pip install cython findblas && pip install --no-build-isolation cmfrec     # builds from source
    python benchmarks/completion.py             # writes results/completion.json
    python benchmarks/completion.py ratings     # measures this again and keeps the rest

Both sides get the same arrays in one process, one thread each, and alternate. cmfrec is told the rank or the bound; its
penalty is the best of those tried on the true error. Without cmfrec only our side runs. ``RANKWISE_DATA`` names the
folder that holds movielens_100k/; without it the ratings are left out.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if "--without-numba" in sys.argv:
    sys.modules["numba"] = None  # type: ignore[assignment]
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from PIL import Image
from sklearn.impute import KNNImputer

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.protocol import alternate, peak_memory_bytes, write_result
from rankwise.completion import DeepMatrixCompletion, Observations, kernels
from rankwise.completion.entry_products import EntryProducts, entry_products, numba_serial
from rankwise.completion.weight_decay_path import follow_weight_decay

try:
    import cmfrec
except ImportError:
    cmfrec = None

Array = NDArray[np.float64]
SIDE, RANK = 1000, 5
DATA = Path(__file__).parent.parent / "docs" / "data"
RESULTS = Path(__file__).parent / "results" / "completion.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--draws", type=int, default=20, help="of every hard problem")
    parser.add_argument("sections", nargs="*", help="measure these again and keep the others")
    parser.add_argument("--only-scaling", type=int, metavar="ENTRIES", help="one run of that size, nothing written")
    parser.add_argument("--only-first-fit", action="store_true", help="one fit of the easy problem, nothing written")
    parser.add_argument("--without-numba", action="store_true", help="as if it were not installed")
    options = parser.parse_args()
    if options.only_scaling:
        scaling(options.only_scaling)
        return
    if options.only_first_fit:
        rng = np.random.default_rng(0)
        seen = entries(rng, *planted(rng), 0.2)
        print(json.dumps([_seconds(lambda: DeepMatrixCompletion(n_jobs=1).fit(seen)) for _ in range(4)]))
        return
    sections: dict[str, Callable[[], Any]] = {
        "noiseless": lambda: [noiseless(p, k, options.pairs) for p in (0.2, 0.05) for k in (5, 10, 20)],
        "noisy": lambda: [noisy(sigma, options.pairs) for sigma in (0.1, 0.5)],
        "hard": lambda: [hard(kappa, rho, options.draws) for kappa in (10, 100, 1e5) for rho in (4, 3, 2, 1.5)],
        "scaling": lambda: [scaling(count) for count in (10**5, 10**6, 10**7)],
        "scaling_at_one_size": lambda: [scaling(count, 20_000) for count in (10**6, 10**7)],
        "kernel": lambda: [
            kernel(side, count) for side, count in ((1000, 2 * 10**5), (20_000, 10**6), (20_000, 10**7))
        ],
        "first_fit": lambda: first_fit(),
        "full_width": lambda: full_width(),
        "sensors": lambda: [sensors(holes) for holes in ("four hours", "single readings")],
        "picture": lambda: [picture(share) for share in (0.4, 0.3, 0.1)],
        "ratings": lambda: ratings(options.pairs),
        "peak_memory_bytes": lambda: peak_memory_bytes([str(Path(__file__)), "--only-scaling", str(10**7)]),
    }
    if unknown := set(options.sections) - set(sections):
        parser.error(f"no sections named {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    content = {}
    if options.sections:  # the others stay as they were measured
        content = {key: value for key, value in json.loads(RESULTS.read_text()).items() if key in sections}
    for name in options.sections or sections:
        content[name] = sections[name]()
    write_result("completion", "python benchmarks/completion.py", content)


def planted(rng: np.random.Generator, kappa: float | None = None) -> tuple[Array, Array]:
    """Left and right of a d × d matrix of rank 5; Gaussian, or of condition κ with singular values even in log."""
    A, B = (rng.standard_normal((SIDE, RANK)) for _ in range(2))
    if kappa is None:
        return A, B / np.sqrt(RANK)
    return np.linalg.qr(A)[0] * np.geomspace(kappa, 1, RANK) * SIDE, np.linalg.qr(B)[0]


def entries(rng: np.random.Generator, A: Array, B: Array, density: float, sigma: float = 0.0) -> Observations:
    rows, columns = np.nonzero(rng.random((SIDE, SIDE)) < density)
    values = np.einsum("ij,ij->i", A[rows], B[columns])
    return Observations.from_coordinates(rows, columns, values + sigma * rng.standard_normal(len(values)), (SIDE, SIDE))


def relative_error(left: Array, right: Array, A: Array, B: Array) -> float:
    """‖left·rightᵀ − ABᵀ‖/‖ABᵀ‖ from two thin QRs."""
    T = np.linalg.qr(np.hstack([left, A]))[1] @ np.linalg.qr(np.hstack([right, -B]))[1].T
    return float(np.linalg.norm(T) / np.linalg.norm(np.linalg.qr(A)[1] @ np.linalg.qr(B)[1].T))


def peer_fit(seen: Observations, k: int, penalty: float, method: str = "lbfgs") -> Callable[[], Any]:
    coordinates = sp.coo_matrix((seen.values, (seen.row_of_each(), seen.columns)), shape=seen.shape)

    def fit() -> Any:
        model = cmfrec.CMF(
            k=k, lambda_=penalty, method=method, user_bias=False, item_bias=False, center=False, nthreads=1,
            use_float=False, verbose=False,
        )  # fmt: skip
        return model.fit(coordinates)

    return fit


def compared(
    seen: Observations, ours: Callable[[], Any], k: int, penalties: tuple[float, ...], A: Array, B: Array, pairs: int
) -> dict[str, Any]:
    model = ours()
    offset = np.hstack([model.left_, model.row_intercepts_[:, None], np.ones((SIDE, 2))])
    right = np.hstack(
        [model.right_, np.ones((SIDE, 1)), model.column_intercepts_[:, None], np.full((SIDE, 1), model.mean_)]
    )
    result: dict[str, Any] = {
        "bound": k, "our_error": relative_error(offset, right, A, B), "our_rank": model.rank_, "route": model.route_
    }  # fmt: skip
    if cmfrec is None:
        return {**result, "our_seconds": statistics.median(_seconds(ours) for _ in range(pairs))}
    fits = {}
    for penalty in penalties:
        found = peer_fit(seen, k, penalty)()
        fits[penalty] = relative_error(found.A_, found.B_, A, B)
    best = min(fits, key=lambda penalty: fits[penalty])
    timing = alternate(ours, peer_fit(seen, k, best), pairs)
    return {**result, "peer_error": fits[best], "peer_penalty": best, "peer_errors": fits, **timing}


def noiseless(density: float, k: int, pairs: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    A, B = planted(rng)
    seen = entries(rng, A, B, density)
    result = compared(seen, lambda: DeepMatrixCompletion(rank=k, n_jobs=1).fit(seen), k, (1e-6, 1e-3), A, B, pairs)
    print("noiseless", density, k, _short(result), flush=True)
    return {"density": density, **result}


def noisy(sigma: float, pairs: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    A, B = planted(rng)
    seen = entries(rng, A, B, 0.05, sigma)
    ours = lambda: DeepMatrixCompletion(rank=20, n_jobs=1).fit(seen)  # noqa: E731
    wide = compared(seen, ours, 20, (1e-3, 0.1, 1.0, 3.0, 10.0), A, B, pairs)
    told = compared(seen, ours, RANK, (1e-3, 0.1, 1.0, 3.0, 10.0), A, B, pairs) if cmfrec else {}
    print("noisy", sigma, _short(wide), _short(told), flush=True)
    return {"sigma": sigma, "density": 0.05, "peer_given_the_bound": wide, "peer_told_the_rank": told}


def hard(kappa: float, oversampling: float, draws: int) -> dict[str, Any]:
    """Few entries, every row and column with at least 5, rank unknown (bound 20)."""
    errors, seconds, ranks, steps = [], [], [], []
    for draw in range(draws):
        rng = np.random.default_rng(1000 + draw)
        A, B = planted(rng, kappa)
        rows, columns = _covering(rng, int(oversampling * RANK * (2 * SIDE - RANK)))
        seen = Observations.from_coordinates(rows, columns, np.einsum("ij,ij->i", A[rows], B[columns]), (SIDE, SIDE))
        start = time.perf_counter()
        model = DeepMatrixCompletion(rank=20, n_jobs=1).fit(seen)
        seconds.append(time.perf_counter() - start)
        errors.append(relative_error(model.left_, model.right_, A, B))
        ranks.append(model.rank_)
        steps.append(sum("path" in entry["stage"] for entry in model.history_))
    result = {
        "condition": kappa,
        "oversampling": oversampling,
        "draws": draws,
        "median_error": statistics.median(errors),
        "recovered": sum(error < 1e-3 for error in errors),
        "median_seconds": statistics.median(seconds),
        "median_path_steps": statistics.median(steps),
        "errors": errors,
        "ranks": ranks,
    }
    print("hard", {k: v for k, v in result.items() if k not in ("errors", "ranks")}, flush=True)
    return result


def scaling(count: int, side: int | None = None) -> dict[str, Any]:
    """Planted rank 10; without a side it grows with the entries, so that every row has a hundred."""
    side = side or count // 100
    rng = np.random.default_rng(0)
    A, B = (rng.standard_normal((side, 10)) for _ in range(2))
    rows, columns = (rng.integers(0, side, count) for _ in range(2))
    start = time.perf_counter()
    seen = Observations.from_coordinates(rows, columns, np.einsum("ij,ij->i", A[rows], B[columns]), (side, side))
    sorting = time.perf_counter() - start
    with kernels.threads(1):
        follow_weight_decay(seen, max_rank=12, max_iter=1)
        start = time.perf_counter()
        end = follow_weight_decay(seen, max_rank=12, tolerance=1e-6)
        seconds = time.perf_counter() - start
    products = sum(entry["products"] for entry in end.history)
    result = {
        "entries": count,
        "side": side,
        "error": relative_error(end.factors.left, end.factors.right, A, B),
        "rank": len(end.factors.singular_values),
        "steps": len(end.history),
        "products": products,
        "sorting_seconds": sorting,
        "seconds": seconds,
        "seconds_a_step": seconds / len(end.history),
        "nanoseconds_an_entry_and_step": 1e9 * seconds / len(end.history) / count,
    }
    print("scaling", result, flush=True)
    return result


def kernel(side: int, count: int) -> dict[str, Any]:
    """Residual and both sparse-times-tall products of eq. 11, width 16, float32, one thread; best of 12."""
    rng = np.random.default_rng(0)
    places = (rng.integers(0, side, count) for _ in range(2))
    seen = Observations.from_coordinates(*places, rng.standard_normal(count), (side, side), np.float32)
    A, B = (rng.standard_normal((side, 16)).astype(np.float32) for _ in range(2))
    out = EntryProducts.empty(seen, 16)
    best = min(_seconds(lambda: entry_products(seen, A, B, out=out, kernel=numba_serial)) for _ in range(12))
    result = {"side": side, "entries": seen.count, "nanoseconds_an_entry": 1e9 * best / seen.count}
    print("kernel", result, flush=True)
    return result


def first_fit() -> dict[str, float]:
    """Seconds of the first fit in a process, with kernels to compile, with kernels compiled before, and without numba."""

    def fits(cache: str, *more: str) -> list[float]:
        command = [sys.executable, __file__, "--only-first-fit", *more]
        done = subprocess.run(command, env=os.environ | {"NUMBA_CACHE_DIR": cache}, capture_output=True, check=True)
        return [float(seconds) for seconds in json.loads(done.stdout)]

    with tempfile.TemporaryDirectory() as cache:
        compiling, compiled, without = fits(cache), fits(cache), fits(cache, "--without-numba")
    result = {
        "compiling": compiling[0], "compiled_before": compiled[0], "later": min(compiled), "without_numba": min(without)
    }  # fmt: skip
    print("first fit", result, flush=True)
    return result


def full_width() -> dict[str, float]:
    """Gradient descent on three d × d factors, as measured for the paper's Figure 5: steps times seconds a step."""
    figure = Path(__file__).parent.parent / "reproduction" / "icml24" / "fig5" / "measured.json"
    measured = json.loads(figure.read_text())["results"]
    steps, each = measured["compressed"]["iterations"], measured["full_width_seconds_per_iteration"]
    return {"iterations": steps, "seconds_per_iteration": each, "hours": steps * each / 3600}


def sensors(holes: str, draws: int = 3) -> dict[str, Any]:
    """Root mean square error (miles per hour) on three tenths of the documentation's traffic speeds, hidden."""
    speeds = pd.read_csv(DATA / "traffic_speeds.csv.gz")
    length = 16 if holes == "four hours" else 1
    errors: dict[str, list[float]] = {}
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        hidden = np.repeat(rng.random((len(speeds) // length, speeds.shape[1])) < 0.3, length, axis=0)
        shown = speeds.mask(hidden)
        model = DeepMatrixCompletion(n_jobs=1)
        guesses = {
            "ours": model.fit_transform(shown),
            "straight_lines": shown.interpolate(limit_direction="both").to_numpy(),
            "means": shown.fillna(shown.mean()).to_numpy(),
            "nearest_neighbours": KNNImputer().fit_transform(shown),
            **_peer_guesses(shown.to_numpy()),
        }
        for name, guess in guesses.items():
            error = np.asarray(guess)[hidden] - speeds.to_numpy()[hidden]
            errors.setdefault(name, []).append(float(np.sqrt(np.mean(error**2))))
        errors.setdefault("expected_by_calibration", []).append(model.calibrate().rmse)
    result = {"holes": holes, "draws": draws, **_with_best_peer(errors, min)}
    print("sensors", _short(result), flush=True)
    return result


def picture(share: float, draws: int = 3) -> dict[str, Any]:
    """Peak signal to noise (dB) on the hidden pixels of the documentation's picture."""
    full = np.asarray(Image.open(DATA / "camera.png")).astype(float) / 255
    found: dict[str, list[float]] = {}
    for draw in range(draws):
        seen = np.random.default_rng(draw).random(full.shape) < share
        holes = np.where(seen, full, np.nan)
        guesses = {"ours": DeepMatrixCompletion(clip=(0, 1), n_jobs=1).fit_transform(holes), **_peer_guesses(holes)}
        for name, guess in guesses.items():
            error = np.clip(guess, 0, 1)[~seen] - full[~seen]
            found.setdefault(name, []).append(float(-10 * np.log10(np.mean(error**2))))
    result = {"observed": share, "draws": draws, **_with_best_peer(found, max)}
    print("picture", _short(result), flush=True)
    return result


def _peer_guesses(holes: Array) -> dict[str, Array]:
    """cmfrec with biases at several penalties, ranks 10 and 20; the caller keeps the best by the true error."""
    if cmfrec is None:
        return {}
    seen = ~np.isnan(holes)
    scale = float(np.nanstd(holes))
    rows, columns = np.nonzero(seen)
    coordinates = sp.coo_matrix((holes[seen] / scale, (rows, columns)), shape=holes.shape)
    guesses = {}
    every_row, every_column = (index.ravel() for index in np.indices(holes.shape))
    for k in (10, 20):
        for penalty in (0.1, 0.3, 1.0, 3.0, 10.0):
            model = cmfrec.CMF(k=k, lambda_=penalty, nthreads=1, verbose=False, use_float=False).fit(coordinates)
            guess = model.predict(every_row, every_column).reshape(holes.shape)
            guesses[f"cmfrec k={k} λ={penalty}"] = scale * guess
    return guesses


def _with_best_peer(found: dict[str, list[float]], better: Callable[..., float]) -> dict[str, Any]:
    means = {name: statistics.mean(values) for name, values in found.items()}
    peers = {name: value for name, value in means.items() if name.startswith("cmfrec")}
    shown = {name: value for name, value in means.items() if name not in peers}
    if peers:
        best = better(peers, key=lambda name: peers[name])
        shown |= {"cmfrec": peers[best], "cmfrec_setting": best}
    return {**shown, "single": {name: values for name, values in found.items() if name in shown}}


def ratings(pairs: int) -> dict[str, Any] | None:
    """MovieLens-100K, official u1: ids only, clipped to 1…5; cmfrec with implicit features, k = 20, λ = 12."""
    folder = Path(os.environ.get("RANKWISE_DATA", "")) / "movielens_100k"
    if not (folder / "u1.base.gz").is_file():
        return None
    with gzip.open(folder / "u1.base.gz", "rt") as file:
        train = np.loadtxt(file, dtype=np.int64)[:, :3]
    test = np.loadtxt(folder / "u1.test", dtype=np.int64)[:, :3]
    shape = (943, 1682)

    def ours() -> DeepMatrixCompletion:
        return DeepMatrixCompletion(clip=(1, 5), n_jobs=1).fit((train[:, 0] - 1, train[:, 1] - 1, train[:, 2], shape))

    model = ours()
    error = model.predict_entries(test[:, 0] - 1, test[:, 1] - 1) - test[:, 2]
    result: dict[str, Any] = {"our_rmse": float(np.sqrt(np.mean(error**2))), "our_rank": model.rank_}
    if cmfrec is not None:
        coordinates = sp.coo_matrix((train[:, 2].astype(float), (train[:, 0] - 1, train[:, 1] - 1)), shape=shape)

        def peer() -> Any:
            return cmfrec.CMF(
                k=20, lambda_=12.0, add_implicit_features=True, nthreads=1, verbose=False, use_float=False
            ).fit(coordinates)

        found = peer().predict(test[:, 0] - 1, test[:, 1] - 1)
        result["peer_rmse"] = float(np.sqrt(np.mean((np.clip(found, 1, 5) - test[:, 2]) ** 2)))
        result |= alternate(ours, peer, pairs)
    print("ratings", _short(result), flush=True)
    return result


def _covering(rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``count`` uniform places, some moved so that each row and column has at least 5."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask.ravel()[rng.choice(SIDE * SIDE, count, replace=False)] = True
    for view in (mask, mask.T):
        for line in np.flatnonzero(view.sum(1) < RANK):
            missing = RANK - int(view[line].sum())
            view[line, rng.choice(np.flatnonzero(~view[line]), missing, replace=False)] = True
    surplus = int(mask.sum()) - count
    while surplus > 0:
        row, column = (int(v) for v in rng.integers(0, SIDE, 2))
        if mask[row, column] and mask[row].sum() > RANK and mask[:, column].sum() > RANK:
            mask[row, column] = False
            surplus -= 1
    return np.nonzero(mask)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _short(result: dict[str, Any]) -> dict[str, Any]:
    hidden = ("ours_seconds", "peer_seconds", "ratios", "peer_errors", "single")
    return {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in result.items() if k not in hidden}


if __name__ == "__main__":
    main()
