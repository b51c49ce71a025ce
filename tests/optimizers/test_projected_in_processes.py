"""Projected optimizers in two processes, half of every batch each: the trajectory of one process, under DDP and FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Every process also trains the model alone on whole batches, and compares; argv: how.
_SCRIPT = """
import copy, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from rankwise.optimizers import AdaRankGrad, GaLoreAdafactor, GaLoreAdamW, GaLoreSGD, PerLayerUpdates

how = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
POISONED = 4  # the step whose gradient has a NaN in one process's rows alone

def network():
    torch.manual_seed(0)  # 5 and 7 rows do not divide by 2; kernels are sharded by output channels
    layers = [nn.Unflatten(1, (3, 4, 4)), nn.Conv2d(3, 6, 2), nn.Flatten(), nn.Tanh(), nn.Linear(54, 7), nn.Tanh(), nn.Linear(7, 5)]
    return nn.Sequential(*layers).double()

def distributed():
    model = network()
    if how == "ddp":
        return model, DistributedDataParallel(model)
    for layer in (model[1], model[4]):
        fully_shard(layer)
    return model, fully_shard(model)

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def step(model, optimizer, number, part):
    generator = torch.Generator().manual_seed(number)
    x, y = (torch.randn(8, size, dtype=torch.float64, generator=generator)[part] for size in (48, 5))
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    if number == POISONED:
        gradient = optimizer.param_groups[0]["params"][2].grad
        gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        if how == "ddp" or rank == 1 or part == slice(None):
            gradient[-1, 0] = torch.nan
    optimizer.step()

CASES = [
    (GaLoreAdamW, dict(refresh_every=3, weight_decay=0.1)),
    (GaLoreAdamW, dict(refresh_every=3, moments="rotate", side="larger")),
    (GaLoreAdamW, dict(refresh_every=None, refresh_below=0.95)),
    (GaLoreSGD, dict(refresh_every=2, momentum=0.9, side="left")),
    (GaLoreSGD, dict(refresh_every=2, momentum=0.9, side="right")),
    (AdaRankGrad, dict(refresh_every=4, energy=0.9)),
]
if how == "ddp":
    CASES += [(GaLoreAdafactor, dict(refresh_every=3)), (GaLoreAdamW, dict(basis="svd"))]

for kind, settings in CASES:
    alone = network()
    model, parallel = distributed()
    mine, theirs = (kind(m.parameters(), rank=3, lr=0.02, **settings) for m in (alone, model))
    part = slice(rank, None, 2)
    for number in range(9):
        step(alone, mine, number, slice(None))
        step(parallel, theirs, number, part)
    for (name, a), b in zip(alone.named_parameters(), model.parameters(), strict=True):
        difference = float((a - whole(b)).abs().max())
        assert difference < 1e-9, (kind.__name__, settings, name, difference)
        ours, other = mine.state[a], theirs.state[b]
        assert ours.keys() == other.keys()
        for key, value in ours.items():
            if torch.is_tensor(value):
                assert whole(other[key]).shape == value.shape, (kind.__name__, settings, name, key)
            elif isinstance(value, int):
                assert other[key] == value, (kind.__name__, settings, name, key)
    assert theirs.skipped_updates() == mine.skipped_updates() == 1

    if how == "fsdp":  # a whole state on one process, and back: never having stopped
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        # copies: what is whole in a process anyway is handed out as it is, and trained on below
        snapshot = [{key: copy.deepcopy(whole(value)) for key, value in theirs.state[p].items()} for p in model.parameters()]
        state = copy.deepcopy(get_optimizer_state_dict(model, theirs, options=options))
        if rank == 0:
            for name, parameter in alone.named_parameters():
                for key, value in mine.state[parameter].items():
                    saved = state["state"][name][key]
                    assert not torch.is_tensor(value) or saved.shape == value.shape, (name, key)
        resumed_model, resumed_parallel = distributed()
        for parameter, trained in zip(resumed_model.parameters(), model.parameters(), strict=True):
            parameter.data.copy_(trained.data)
        resumed = kind(resumed_model.parameters(), rank=3, lr=0.5, **settings)
        resumed.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for number in range(9, 13):
            step(parallel, theirs, number, part)
            step(resumed_parallel, resumed, number, part)
        for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True):
            assert torch.equal(a.to_local(), b.to_local()), (kind.__name__, settings)
        if kind is AdaRankGrad:
            continue  # torch loads a whole state into tensors of the first step's shapes, which are other ranks' here
        from_whole_model, _ = distributed()
        from_whole = kind(from_whole_model.parameters(), rank=3, **settings)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(from_whole_model, from_whole, state, options=options)
        for parameter, saved in zip(from_whole_model.parameters(), snapshot, strict=True):
            for key, value in from_whole.state[parameter].items():
                assert torch.is_tensor(value) == torch.is_tensor(saved[key]), key
                assert torch.equal(torch.as_tensor(whole(value)), torch.as_tensor(saved[key])), (settings, key)
        step(from_whole_model, from_whole, 13, part)

def refused(message, make):
    try:
        make()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise SystemExit(f"not refused: {message}")

model, _ = distributed()
refused("in one process, not in 2", lambda: PerLayerUpdates(GaLoreAdamW(model.parameters(), rank=3)))
if how == "fsdp":
    refused("does not step sharded", lambda: GaLoreAdafactor(model.parameters(), rank=3))
    refused("gather whole gradients", lambda: GaLoreAdamW(model.parameters(), rank=3, basis="svd"))
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    columns = nn.Parameter(distribute_tensor(torch.zeros(8, 8), init_device_mesh("cpu", (2,)), [Shard(1)]))
    refused("along their first dimension", lambda: GaLoreAdamW([columns], rank=3))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, how: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), how],
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    raised = [
        line for line in done.stderr.splitlines() if line.startswith("[rank")
    ]  # the launcher's own words come last
    assert done.returncode == 0, "\n".join(raised) or done.stderr[-3000:]
