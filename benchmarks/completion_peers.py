"""What other packages make of the same holes, each in an environment of its own since they do not install beside us.

    python -m venv peers && peers/bin/pip install fancyimpute "scikit-learn<1.8" pandas pillow   # or: myfm scikit-surprise
    peers/bin/python benchmarks/completion_peers.py       # adds what it can import to results/completion_peers.json

Every peer's setting is the best of those tried by the true error: its best case. Ours are in results/completion.json.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np

HERE = Path(__file__).parent
DATA = HERE.parent / "docs" / "data"
RESULTS = HERE / "results" / "completion_peers.json"
DRAWS = 3
Fill = Callable[[Any], Any]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"format_version": 1, "peers": {}}
    found["command"] = "python benchmarks/completion_peers.py"
    found["machine"] = {"cores": os.cpu_count(), "threads": 1}
    for package, name, measure in (
        ("fancyimpute", "SoftImpute", soft_impute),
        ("fancyimpute", "IterativeSVD", iterative_svd),
        ("sklearn", "IterativeImputer", iterative_imputer),
        ("myfm", "myFM", myfm_ratings),
        ("surprise", "surprise SVD", surprise_svd),
        ("surprise", "surprise KNNBaseline", surprise_knn),
    ):
        try:
            import_module(package)
        except ImportError:
            continue
        distribution = {"sklearn": "scikit-learn", "surprise": "scikit-surprise"}.get(package, package)
        result = {"version": metadata.version(distribution), "python": platform.python_version(), **measure()}
        found["peers"][name] = result
        print(name, json.dumps(result), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def on_pictures_and_sensors(settings: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Mean score of each setting over the draws of every problem; the best setting's, and its time."""
    import pandas as pd
    from PIL import Image

    camera = np.asarray(Image.open(DATA / "camera.png")).astype(float) / 255
    speeds = pd.read_csv(DATA / "traffic_speeds.csv.gz").to_numpy()
    result: dict[str, Any] = {}
    for share in (0.4, 0.3, 0.1):
        masks = [np.random.default_rng(draw).random(camera.shape) >= share for draw in range(DRAWS)]
        result[f"picture at {share}"] = _best(settings, camera, masks, _decibels, max)
    for holes, length in (("four hours", 16), ("single readings", 1)):
        masks = [
            np.repeat(
                np.random.default_rng(draw).random((len(speeds) // length, speeds.shape[1])) < 0.3, length, axis=0
            )
            for draw in range(DRAWS)
        ]
        result[f"sensors, {holes}"] = _best(settings, speeds, masks, _root_mean_square, min)
    return {"problems": result}


def _best(
    settings: dict[str, Callable[[], Any]], full: Any, hidden: list[Any], score: Fill, better: Callable[..., str]
) -> dict[str, Any]:
    # standardized by the seen entries, as the peers' documentation advises
    scores, seconds = {}, {}
    for name, make in settings.items():
        values, times = [], []
        for mask in hidden:
            centre, spread = full[~mask].mean(), full[~mask].std()
            holes = np.where(mask, np.nan, (full - centre) / spread)
            start = time.perf_counter()
            filled = np.asarray(make().fit_transform(holes)) * spread + centre
            times.append(time.perf_counter() - start)
            values.append(score(filled[mask], full[mask]))
        scores[name], seconds[name] = statistics.mean(values), statistics.median(times)
        print("  ", name, scores[name], seconds[name], flush=True)
    best = better(scores, key=lambda name: scores[name])
    return {"score": scores[best], "setting": best, "seconds": seconds[best], "settings_tried": len(scores)}


def _decibels(guess: Any, truth: Any) -> float:
    return float(-10 * np.log10(np.mean((np.clip(guess, 0, 1) - truth) ** 2)))


def _root_mean_square(guess: Any, truth: Any) -> float:
    return float(np.sqrt(np.mean((guess - truth) ** 2)))


def soft_impute() -> dict[str, Any]:
    from fancyimpute import SoftImpute

    return on_pictures_and_sensors(
        {
            f"shrinkage {value}": lambda value=value: SoftImpute(shrinkage_value=value, max_iters=300, verbose=False)
            for value in (0.5, 1, 2, 5, 10, 20, 40)
        }
    )


def iterative_svd() -> dict[str, Any]:
    from fancyimpute import IterativeSVD

    return on_pictures_and_sensors(
        {f"rank {rank}": lambda rank=rank: IterativeSVD(rank=rank, verbose=False) for rank in (2, 4, 8, 12, 20)}
    )


def iterative_imputer() -> dict[str, Any]:
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    return on_pictures_and_sensors(
        {
            f"{near} nearest features": lambda near=near: IterativeImputer(n_nearest_features=near, random_state=0)
            for near in (10, 30)
        }
    )


def _ratings() -> tuple[Any, Any]:
    folder = Path(os.environ["RANKWISE_DATA"]) / "movielens_100k"
    with gzip.open(folder / "u1.base.gz", "rt") as file:
        train = np.loadtxt(file, dtype=np.int64)[:, :3]
    return train, np.loadtxt(folder / "u1.test", dtype=np.int64)[:, :3]


def _on_ratings(settings: dict[str, Callable[[Any, Any], Any]]) -> dict[str, Any]:
    train, test = _ratings()
    scores, seconds = {}, {}
    for name, predict in settings.items():
        start = time.perf_counter()
        guess = predict(train, test)
        seconds[name] = time.perf_counter() - start
        scores[name] = _root_mean_square(np.clip(guess, 1, 5), test[:, 2])
        print("  ", name, scores[name], seconds[name], flush=True)
    best = min(scores, key=lambda name: scores[name])
    found = {"score": scores[best], "setting": best, "seconds": seconds[best], "settings_tried": len(scores)}
    return {"problems": {"MovieLens-100K u1": found}}


def myfm_ratings() -> dict[str, Any]:
    import myfm
    from scipy import sparse as sp

    def predict(rank: int) -> Callable[[Any, Any], Any]:
        def fitted(train: Any, test: Any) -> Any:
            def features(pairs: Any) -> Any:
                each = np.arange(len(pairs))
                columns = np.concatenate([pairs[:, 0], 943 + pairs[:, 1]])
                return sp.csr_matrix((np.ones(2 * len(pairs)), (np.tile(each, 2), columns)), (len(pairs), 943 + 1683))

            model = myfm.MyFMRegressor(rank=rank, random_seed=0)
            model.fit(
                features(train - [1, 0, 0]), train[:, 2], n_iter=512, n_kept_samples=500, group_shapes=[943, 1683]
            )
            return model.predict(features(test - [1, 0, 0]))

        return fitted

    return _on_ratings({f"rank {rank}, 512 iterations": predict(rank) for rank in (5, 10)})


def surprise_svd() -> dict[str, Any]:
    from surprise import SVD

    tried = {
        f"{k} factors, penalty {penalty}, 60 epochs": lambda k=k, penalty=penalty: SVD(
            n_factors=k, reg_all=penalty, n_epochs=60, random_state=0
        )
        for k in (20, 50)
        for penalty in (0.05, 0.1, 0.15)
    }
    return _surprise(tried)


def surprise_knn() -> dict[str, Any]:
    from surprise import KNNBaseline

    options = {"name": "pearson_baseline", "user_based": False}
    return _surprise({"items, Pearson": lambda: KNNBaseline(sim_options=options, verbose=False)})


def _surprise(tried: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    import pandas as pd
    from surprise import Dataset, Reader

    def predict(make: Callable[[], Any]) -> Callable[[Any, Any], Any]:
        def fitted(train: Any, test: Any) -> Any:
            frame = pd.DataFrame(train, columns=["user", "item", "rating"])
            data = Dataset.load_from_df(frame, Reader(rating_scale=(1, 5))).build_full_trainset()
            model = make().fit(data)
            return np.array([model.predict(user, item).est for user, item in test[:, :2]])

        return fitted

    return _on_ratings({name: predict(make) for name, make in tried.items()})


if __name__ == "__main__":
    main()
