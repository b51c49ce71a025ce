"""What compression saves on deep matrix factorization (ICML 2024, Figure 4), and what building its frames costs.

python benchmarks/factorization.py              # everything, writes results/factorization.json (about five minutes)
python benchmarks/factorization.py --memory frames   # one side in this process, for the peak memory

Full width is timed over 50 iterations and multiplied by the number of iterations, as it would run for an hour; that the two
sides need the same number is shown by their losses at 1000 × 1000 and by whole runs of both at 200 × 200.
"""

import argparse
import copy
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.protocol import alternate, peak_memory_bytes, write_result
from rankwise.factorizations import (
    CompressedDeepLinear,
    DeepLinear,
    DescentStep,
    FitResult,
    SquaredLoss,
    fit_factorization,
    invariant_subspaces,
)

RANK, DEPTH, INIT_SCALE, TOLERANCE = 5, 3, 1e-3, 1e-10
FULL_WIDTH_STEPS = 50
LARGE, LARGE_RANK = 10_000, 10
STEPS = 3000
SIZES = (200, 500, 1000, 2000, 5000, 10_000, 20_000)


def target(size: int) -> Tensor:
    """The paper's: a Gaussian matrix cut to its leading singular triplets, unscaled (σ ≈ 2√d), float64."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=seeded())
    U, S, Vh = torch.linalg.svd(gaussian)
    return (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]


def low_rank(size: int, rank: int, dtype: torch.dtype) -> Tensor:
    """A Bᵀ with singular values of about 2√d, made without an SVD or a second matrix of its size."""
    A, B = (torch.randn(size, rank, dtype=dtype, generator=seeded(seed)) for seed in (1, 2))
    return (2 * size**-0.5 * A) @ B.mT


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def full_width(size: int) -> DeepLinear:
    return DeepLinear.orthogonal(size, DEPTH, INIT_SCALE, generator=seeded(3), dtype=torch.float64)


def figure_4(pairs: int) -> dict[str, Any]:
    """d = 1000: the compressed run whole, its frames and the projection included; full width by the iteration."""
    phi = target(1000)
    deep = full_width(1000)
    loss = SquaredLoss(phi)
    found: list[FitResult] = []

    def ours() -> None:
        frames = invariant_subspaces(-phi, RANK, generator=seeded(4))
        compressed = CompressedDeepLinear.from_subspaces(frames, DEPTH, INIT_SCALE)
        found.append(fit_factorization(compressed, SquaredLoss(phi), tol=TOLERANCE, steps=100_000))

    def peer() -> None:
        fit_factorization(copy.deepcopy(deep), loss, tol=0.0, steps=FULL_WIDTH_STEPS)

    timing = alternate(ours, peer, pairs)
    explicit = CompressedDeepLinear.from_full_width(deep, -phi, RANK)
    wide = fit_factorization(copy.deepcopy(deep), loss, tol=0.0, steps=FULL_WIDTH_STEPS)
    narrow = fit_factorization(copy.deepcopy(explicit), loss, tol=0.0, steps=FULL_WIDTH_STEPS)
    same_start = fit_factorization(explicit, loss, tol=TOLERANCE, steps=100_000)
    iteration = [seconds / FULL_WIDTH_STEPS for seconds in timing["peer_seconds"]]
    ratios = [same_start.iterations * one / whole for one, whole in zip(iteration, timing["ours_seconds"], strict=True)]
    result = {
        "size": 1000,
        "lr": found[-1].lr,
        "compressed_iterations": found[-1].iterations,
        "full_width_iterations": same_start.iterations,
        "converged": found[-1].converged and same_start.converged,
        "largest_relative_difference_of_losses": max(
            abs(a - b) / a for a, b in zip(wide.losses, narrow.losses, strict=True)
        ),
        "compressed_seconds": timing["ours_seconds"],
        "full_width_seconds_per_iteration": iteration,
        "extrapolated_full_width_minutes": same_start.iterations * statistics.median(iteration) / 60,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }
    show("figure 4", result)
    return result


def whole_runs() -> dict[str, Any]:
    """d = 200, both sides to the same tolerance from the same start."""
    phi, deep = target(200), full_width(200)
    explicit = CompressedDeepLinear.from_full_width(deep, -phi, RANK)
    runs = {"full_width": deep, "compressed": explicit}
    seconds, iterations = {}, {}
    for name, model in runs.items():
        start = time.perf_counter()
        iterations[name] = fit_factorization(model, SquaredLoss(phi), tol=TOLERANCE, steps=100_000).iterations
        seconds[name] = time.perf_counter() - start
    result = {"size": 200, "iterations": iterations, "seconds": seconds}
    show("whole runs", result)
    return result


def frames(repeats: int) -> dict[str, Any]:
    """U and V at d = 10,000, k = 10; the route through given full-width factors where those fit."""
    phi = low_rank(LARGE, LARGE_RANK, torch.float64)
    build, processor = [], []
    for _ in range(repeats):
        started = time.process_time()
        build.append(seconds(lambda: invariant_subspaces(phi, LARGE_RANK, generator=seeded(4))))
        processor.append(time.process_time() - started)
    del phi
    memory = [
        peak_memory_bytes([__file__, "--memory", "frames"]) - peak_memory_bytes([__file__, "--memory", "target"])
        for _ in range(3)
    ]
    explicit = {}
    for size in (1000, 2000):
        small = low_rank(size, LARGE_RANK, torch.float64)

        def through_factors(small: Tensor = small, size: int = size) -> None:
            CompressedDeepLinear.from_full_width(full_width(size), small, LARGE_RANK)

        timing = alternate(
            lambda small=small: invariant_subspaces(small, LARGE_RANK, generator=seeded(4)), through_factors, 3
        )
        explicit[str(size)] = {
            "ours_seconds": timing["median_ours_seconds"], "explicit_seconds": timing["median_peer_seconds"]
        }  # fmt: skip
    result = {
        "size": LARGE,
        "rank": LARGE_RANK,
        "seconds": build,
        "median_seconds": statistics.median(build),
        "median_processor_seconds": statistics.median(processor),
        "bytes_over_the_target": memory,
        "median_megabytes_over_the_target": statistics.median(memory) / 1e6,
        "explicit_route": explicit,
    }
    show("frames", result)
    return result


class Clock:
    """A callback that times the iterations alone, without the projection before them."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, step: DescentStep) -> None:
        self.times.append(time.perf_counter())

    @property
    def microseconds(self) -> float:
        return 1e6 * (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def step_cost(rounds: int) -> dict[str, Any]:
    """Microseconds of a compressed iteration against d, the sizes in turn; float32, so that the largest fits."""
    models, losses = {}, {}
    for size in SIZES:
        phi = low_rank(size, RANK, torch.float32)
        subspaces = invariant_subspaces(phi, RANK, generator=seeded(4))
        models[size], losses[size] = CompressedDeepLinear.from_subspaces(subspaces, DEPTH, INIT_SCALE), SquaredLoss(phi)
    costs: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(rounds):
        for size in SIZES:
            clock = Clock()
            fit_factorization(models[size], losses[size], lr=1e-6, tol=0.0, steps=STEPS, callbacks=[clock])
            costs[size].append(clock.microseconds)
    medians = [(size, statistics.median(values)) for size, values in costs.items()]
    result = {"microseconds": {str(size): values for size, values in costs.items()}, "slope": slope(medians)}
    show("step cost", {"medians": medians, "slope": result["slope"]})
    return result


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares of log cost on log d."""
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    rise = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return rise / math.fsum((x - mean_x) ** 2 for x in xs)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def show(name: str, result: dict[str, Any]) -> None:
    print(name, {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in result.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory", choices=("target", "frames"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        phi = low_rank(LARGE, LARGE_RANK, torch.float64)
        if options.memory == "frames":
            invariant_subspaces(phi, LARGE_RANK, generator=seeded(4))
        return
    before = os.getloadavg()[0]
    results = {
        "rank": RANK, "depth": DEPTH, "init_scale": INIT_SCALE, "tolerance": TOLERANCE,
        "figure_4": figure_4(options.pairs),
        "whole_runs": whole_runs(),
        "frames": frames(options.pairs),
        "step_cost": step_cost(options.pairs),
        "load_average_before": before,
        "load_average_after": os.getloadavg()[0],
    }  # fmt: skip
    write_result("factorization", " ".join(["python", "benchmarks/factorization.py", *sys.argv[1:]]), results)


if __name__ == "__main__":
    main()
