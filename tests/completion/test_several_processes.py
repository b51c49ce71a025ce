"""Several processes with a part of the rows each end with the model that one process finds."""

import os
import subprocess
import sys

import numpy as np
import pytest

from rankwise.completion import DeepMatrixCompletion, Observations, shard_rows
from rankwise.completion.collective import ALONE
from rankwise.completion.sharding import row_cuts
from rankwise.errors import UserError
from tests.completion.planted import low_rank, observed

# what every process runs; alone it is the oracle
_SCRIPT = """
import os, sys
import numpy as np
import torch.distributed as dist
from rankwise.completion import DeepMatrixCompletion, shard_rows

out, several = sys.argv[1], "WORLD_SIZE" in os.environ
if several:
    dist.init_process_group("gloo")
rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
problems = np.load(out + "/problems.npz", allow_pickle=False)
found = {}
for name in sorted({key.split(".")[0] for key in problems}):
    rows, columns, values, shape = (problems[f"{name}.{part}"] for part in ("rows", "columns", "values", "shape"))
    mine = slice(rank, None, size)  # any part of the entries: they are sent to where their rows are
    seen = shard_rows(rows[mine], columns[mine], values[mine], tuple(shape), str(values.dtype))
    model = DeepMatrixCompletion(n_jobs=1, clip="observed").fit(seen)
    low, high = model.predict_entries([0, 1], [1, 0], interval=0.8)[1:]
    found |= {
        f"{name}.matrix": model.reconstruct(), f"{name}.rank": model.rank_, f"{name}.noise": model.noise_,
        f"{name}.unobserved": model.unobserved_rows_, f"{name}.merged": model.merged_duplicates_,
        f"{name}.held_out": model.calibrate().count, f"{name}.bounded": np.all(low < high),
    }
np.savez(f"{out}/found-{rank}-of-{size}.npz", **found)
if several:
    dist.destroy_process_group()
"""


def run(command, **options):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


def torchrun(processes, *command, **options):
    return run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *map(str, command)],
        **options,
    )


def problem(full, mask, sigma=0.0, dtype=np.float64):
    rng = np.random.default_rng(1)
    mask[7] = False  # a row without any entry
    rows, columns = np.nonzero(mask)
    values = full[mask] + sigma * rng.standard_normal(len(rows))
    again = slice(0, 5)  # entries that are there twice
    parts = {"rows": rows, "columns": columns, "values": values.astype(dtype)}
    return {name: np.append(part, part[again]) for name, part in parts.items()} | {"shape": np.array(full.shape)}


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    clean, tall = low_rank(300, 200, 4), low_rank(400, 60, 3)
    problems = {
        "clean": problem(clean, observed(clean, 0.2, least=8)),
        "noisy": problem(clean, observed(clean, 0.3), sigma=0.3),
        "around_a_mean": problem(tall + 10, observed(tall, 0.4), sigma=0.2),
        "few": problem(clean, observed(clean, 0.1, least=6)),
        "float32": problem(tall, observed(tall, 0.4), sigma=0.3, dtype=np.float32),
    }
    np.savez(
        tmp_path / "problems.npz", **{f"{name}.{k}": v for name, parts in problems.items() for k, v in parts.items()}
    )
    script = tmp_path / "fit.py"
    script.write_text(_SCRIPT)
    for done in (run([sys.executable, script, tmp_path]), torchrun(2, script, tmp_path)):
        assert done.returncode == 0, done.stderr
    alone = np.load(tmp_path / "found-0-of-1.npz", allow_pickle=False)
    for rank in (0, 1):
        together = np.load(tmp_path / f"found-{rank}-of-2.npz", allow_pickle=False)
        for name in problems:
            matrix = alone[f"{name}.matrix"]
            difference = np.abs(together[f"{name}.matrix"] - matrix).max() / np.abs(matrix).max()
            assert difference < (1e-3 if name == "float32" else 1e-6), (name, difference)
            for exact in ("rank", "unobserved", "merged", "bounded"):
                np.testing.assert_array_equal(together[f"{name}.{exact}"], alone[f"{name}.{exact}"])
            assert together[f"{name}.noise"] == pytest.approx(alone[f"{name}.noise"], rel=1e-3, abs=1e-8)
            assert abs(together[f"{name}.held_out"] - alone[f"{name}.held_out"]) <= 1


@pytest.mark.slow
def test_the_command_under_torchrun_makes_the_run_that_one_process_makes(tmp_path):
    full = low_rank(120, 80, 3)
    rows, columns = np.nonzero(observed(full, 0.4))
    table = tmp_path / "entries.csv"
    lines = [f"r{i},c{j},{full[i, j]:.6f}" for i, j in zip(rows, columns, strict=True)]
    table.write_text("\n".join(["row,col,value", *lines]))
    (tmp_path / "pairs.csv").write_text("row,col\nr3,c4\nr5,c6\n")
    options = [
        "complete",
        table,
        "--row",
        "row",
        "--col",
        "col",
        "--value",
        "value",
        "--predict",
        tmp_path / "pairs.csv",
    ]
    alone = run([sys.executable, "-m", "rankwise", *options, "--out", tmp_path / "alone"])
    together = torchrun(2, "-m", "rankwise", *options, "--out", tmp_path / "together")
    assert alone.returncode == 0, alone.stderr
    assert together.returncode == 0, together.stderr
    assert together.stderr.count("rank 3") == 1  # one process speaks
    model, other = (DeepMatrixCompletion.load(tmp_path / run / "model") for run in ("alone", "together"))
    np.testing.assert_allclose(other.reconstruct(), model.reconstruct(), rtol=0, atol=1e-6)
    files = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "together").iterdir()} == files


@pytest.mark.slow
def test_one_process_s_mistake_is_everybody_s_error(tmp_path):
    script = tmp_path / "bad.py"
    script.write_text("""
import numpy as np, torch.distributed as dist
from rankwise.completion import DeepMatrixCompletion, shard_rows
from rankwise.errors import UserError

dist.init_process_group("gloo")
rank = dist.get_rank()
for rows, shape in (([0, 9 if rank else 1], (5, 4)), ([0, 1], (5, 4 + rank)), ([0, 0], (5, 4))):
    try:
        shard_rows(rows, [0, 1], [1.0, 2.0], shape)
    except UserError as error:
        print(f"{error}", flush=True)
seen = shard_rows([0, 1], [0, 1], [1.0, 2.0], (5, 4))
DeepMatrixCompletion().fit(seen)
for step in ("partial_fit", "score"):
    try:
        getattr(DeepMatrixCompletion().fit(seen), step)(seen)
    except UserError as error:
        print(f"{error}", flush=True)
try:
    DeepMatrixCompletion().fit(seen).calibrate()
except UserError as error:
    print(f"{error}", flush=True)
uneven = shard_rows([0, 1, 1, 1], [0, 0, 1, 2], [1.0, 2.0, 3.0, 4.0], (2, 4))
print(f"held out {DeepMatrixCompletion().fit(uneven).calibrate().count}", flush=True)
for options in ({"loss": "huber"}, {"solver": "gradient-descent"}, {"warm_start": True}):
    try:
        model = DeepMatrixCompletion(**options).fit(seen)
        model.fit(seen)
    except UserError as error:
        print(f"{error}", flush=True)
dist.destroy_process_group()
""")
    done = torchrun(2, script)
    assert done.returncode == 0, done.stderr
    for says in (
        "row index 9 is outside",
        "every process must give the same shape",
        "cannot be cut by rows into 2 parts",
        "loss='huber' needs all entries in one process",
        "solver='gradient-descent' needs all entries",
        "warm_start or partial_fit needs all entries",
        "partial_fit needs all entries in one process; join",
        "score() hides entries of whole matrices",
        "every process has only one entry",
        "held out 1",
    ):
        assert done.stdout.count(says) == 2, (says, done.stdout)


def test_alone_sharding_is_reading_coordinates():
    seen = shard_rows([1, 0, 1], [0, 2, 0], [1.0, 5.0, 3.0], (2, 3))
    same = Observations.from_coordinates([1, 0, 1], [0, 2, 0], [1.0, 5.0, 3.0], (2, 3))
    assert seen.values.tolist() == same.values.tolist()
    assert seen.share is None
    assert seen.collective is ALONE


def test_rows_are_cut_where_the_entries_are_halved():
    assert row_cuts(np.array([1, 1, 1, 1, 4]), 2).tolist() == [0, 4, 5]
    assert row_cuts(np.array([3, 0, 0, 3, 0]), 2).tolist() == [0, 1, 5]
    assert row_cuts(np.ones(10, int), 3).tolist() == [0, 4, 7, 10]
    assert row_cuts(np.array([2, 2, 6]), 2).tolist() == [0, 2, 3]
    assert row_cuts(np.array([5, 9]), 2).tolist() == [0, 1, 2]
    assert row_cuts(np.array([0, 9, 0, 0, 1, 1]), 3).tolist() == [0, 2, 5, 6]
    with pytest.raises(UserError, match="cannot be cut"):
        row_cuts(np.array([0, 9, 0]), 2)
