"""Two processes, half of every batch each: the same adapter as one process with the whole batches, saved whole and once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# one script for one process and for two; argv: folder, how ("ddp" or "fsdp"), variant
_SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from rankwise.adapters import DeepLoraConfig, create_deeplora_optimizer, initialize_deeplora_weights, save_as_lora
from safetensors.torch import save_file
from tests.tiny_models import tiny_bert, token_batch

folder, how, variant = sys.argv[1:]
several = "WORLD_SIZE" in os.environ
if several:
    dist.init_process_group("gloo")
rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
torch.manual_seed(rank if how == "ddp" else 0)  # replicas may be drawn differently: the first one's count
base = tiny_bert().double()  # Adam makes rounding in float32 visible where gradients are tiny
torch.manual_seed(0 if how == "fsdp" else 10 + rank)
config = DeepLoraConfig(r=4, task_type="SEQ_CLS", variant=variant, direction_dropout=0.0, init_scale=0.3)
model = get_peft_model(base, config)
whole = token_batch(rows=8)
mine = {key: value[rank::size] for key, value in whole.items()}
if variant == "compressed":
    initialize_deeplora_weights(model, [whole if rank == 0 else mine])  # the frames of the first process are everybody's
if several and how == "ddp":
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
elif several:
    from torch.distributed.fsdp import fully_shard
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer)
    parallel = fully_shard(model)
    try:
        initialize_deeplora_weights(model, [whole])
        raise SystemExit("wrote into the pieces of a sharded adapter")
    except ValueError as error:
        assert "before fully_shard" in str(error), error
else:
    parallel = model
optimizer = create_deeplora_optimizer(model, lr=1e-2, outer_lr_ratio=1.0)
for step in range(6):
    optimizer.zero_grad()
    parallel(**mine).loss.backward()
    optimizer.step()
state = {
    key: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().contiguous()
    for key, value in get_peft_model_state_dict(model).items()
}
if rank == 0:
    save_file(state, f"{folder}/{how}-{variant}-{size}.safetensors")
model.save_pretrained(f"{folder}/{how}-{variant}-{size}-deep", is_main_process=rank == 0)
save_as_lora(model, f"{folder}/{how}-{variant}-{size}-lora")  # the second to write would be refused: it is not empty
if several:
    dist.destroy_process_group()
"""


def run(*command: Any) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_the_same_updates(one: Path, other: Path) -> None:
    """Of two LoRA folders; experts stand side by side in the factors, so that every product of the two sides counts."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for key in (key for key in first if "lora_A" in key):
        experts = 4 if ".experts." in key else 1
        products = []
        for lora in (first, second):
            A, B = lora[key], lora[key.replace("lora_A", "lora_B")]
            A = A.reshape(experts, -1, A.shape[-1])
            products.append(B.reshape(B.shape[0], -1, experts).permute(2, 0, 1) @ A)
        assert products[0].any()
        assert (products[1] - products[0]).abs().max() < 1e-9, key


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("variant", ["zero-left", "compressed"])
def test_the_same_adapter_as_one_process(tmp_path: Path, how: str, variant: str) -> None:
    from safetensors.torch import load_file

    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    run(script, tmp_path, how, variant)
    run("-m", "torch.distributed.run", "--nproc-per-node", 2, script, tmp_path, how, variant)
    alone, together = (load_file(tmp_path / f"{how}-{variant}-{size}.safetensors") for size in (1, 2))
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        difference = (together[key] - value).abs().max()
        assert difference < 1e-9, (key, float(difference))
    saved = load_file(tmp_path / f"{how}-{variant}-2-deep" / "adapter_model.safetensors")
    assert saved.keys() == together.keys()
    assert all(torch.equal(value, together[key]) for key, value in saved.items())
    assert_the_same_updates(*(tmp_path / f"{how}-{variant}-{size}-lora" for size in (1, 2)))
    moved = [key for key in alone if "deeplora" in key and torch.count_nonzero(alone[key])]
    assert moved


# argv: folder, how
_EXPERTS = """
import os, sys
import torch
import torch.distributed as dist
from rankwise.adapters import create_deeplora_optimizer, save_as_lora
from tests.adapters.test_expert_parameters import MODELS, adapted

folder, how = sys.argv[1:]
several = "WORLD_SIZE" in os.environ
if several:
    dist.init_process_group("gloo")
rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
family = MODELS["mixtral"]
torch.manual_seed(3)
parallel = model = adapted(family, target_modules=None, direction_dropout=0.0).train()
mine = {key: value[rank::size] for key, value in family.data().items()}
if several and how == "ddp":
    parallel = torch.nn.parallel.DistributedDataParallel(model)
elif several:
    from torch.distributed.fsdp import fully_shard
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    parallel = fully_shard(model)
optimizer = create_deeplora_optimizer(model, lr=1e-2, outer_lr_ratio=1.0)
for step in range(4):
    optimizer.zero_grad()
    parallel(**mine).loss.backward()
    optimizer.step()
save_as_lora(model, f"{folder}/{size}")
if several:
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_fused_experts_too(tmp_path: Path, how: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(_EXPERTS)
    run(script, tmp_path, how)
    run("-m", "torch.distributed.run", "--nproc-per-node", 2, script, tmp_path, how)
    assert_the_same_updates(tmp_path / "1", tmp_path / "2")
