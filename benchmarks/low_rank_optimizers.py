"""GaLoreAdamW against the galore-torch package: refresh, step over a window of T = 200, state bytes, loss curve; and the
state it saves against AdamW.

python benchmarks/low_rank_optimizers.py            # everything, writes results/low_rank_optimizers.json
python benchmarks/low_rank_optimizers.py --quick    # fewer pairs, writes nothing

The peer is used as it is installed (``pip install galore-torch bitsandbytes``: its package imports the latter); where it is
missing, what needs no peer is measured. Both sides have the same rank, T, scale, eps and learning rates. The loss curves need
RANKWISE_DATA.
"""

import argparse
import gzip
import importlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.protocol import alternate, write_result
from rankwise.optimizers import GaLoreAdamW, model_param_groups, optimizer_memory
from rankwise.optimizers.projected import PROJECTION_DEFAULTS
from rankwise.optimizers.refresh import subspace_by_iteration
from rankwise.optimizers.sharding import Whole

SIZE, RANK, WINDOW = 2048, 128, 200


def peer_package() -> Any | None:
    try:
        return importlib.import_module("galore_torch")
    except ImportError as missing:
        print(f"galore_torch cannot be imported ({missing}); its side is left out")
        return None


def drifting_gradients(rows: int, columns: int, count: int, seed: int = 0) -> Iterator[Tensor]:
    """Directions with energies that fall like 1/k, which turn slowly, the tenth as large as a mini-batch's noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width = 2 * RANK
    left, right = normal(rows, width), normal(width, columns)
    scales = torch.arange(1, width + 1).rsqrt()
    for _ in range(count):
        left, right = left + 0.1 * normal(rows, width), right + 0.1 * normal(width, columns)
        yield (left * scales) @ right / width + 0.03 * normal(rows, columns)


# -- what is measured --------------------------------------------------------------------------------------------


def refresh(peer: Any, pairs: int) -> dict[str, Any]:
    """One new subspace of a 2048 × 2048 gradient from the old one, against the peer's SVD; and how much each captures."""
    first, second = drifting_gradients(SIZE, SIZE, 2)
    defaults = {name: PROJECTION_DEFAULTS[name] for name in ("oversample", "iterations", "seed")}
    settings = {**defaults, "pieces": Whole(), "whole_shape": (SIZE, SIZE)}
    old = subspace_by_iteration(first, RANK, None, number=0, **settings)
    assert old is not None
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = subspace_by_iteration(second, RANK, old.basis, number=1, **settings)

    def theirs() -> None:
        # a square matrix is projected on the right there
        found["peer"] = peer.galore_projector.GaLoreProjector(RANK).get_orthogonal_matrix(second, RANK, type="right")

    timing = alternate(ours, theirs, pairs)
    shares = {
        "ours": float(found["ours"].projected.square().sum() / second.square().sum()),
        "peer": float((second @ found["peer"].mT).square().sum() / second.square().sum()),
    }
    print(f"refresh: ratio {timing['median_ratio']:.4f}, captured {shares['ours']:.4f} of {shares['peer']:.4f}")
    return {**timing, "captured_energy": shares}


def window(peer: Any, pairs: int, steps: int = WINDOW) -> dict[str, Any]:
    """The steps between two refreshes, the refresh included, of one 2048 × 2048 parameter."""
    gradients = list(drifting_gradients(SIZE, SIZE, 4))

    def side(make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> Callable[[], None]:
        parameter = nn.Parameter(torch.zeros(SIZE, SIZE))
        optimizer = make(parameter)

        def run() -> None:
            for number in range(steps):
                parameter.grad = gradients[number % len(gradients)]
                optimizer.step()

        return run

    timing = alternate(side(our_optimizer([], 1e-3)), side(their_optimizer(peer, [], 1e-3)), pairs)
    print(f"window of {steps} steps: ratio {timing['median_ratio']:.3f}")
    return {**timing, "steps": steps}


def state_bytes(peer: Any) -> dict[str, Any]:
    """Of a 1024 × 2048 parameter at r = 128; ours in bfloat16 once in the parameter's dtype as theirs, once wide."""
    measured: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        sides = {
            "ours": our_optimizer([], 1e-3, moments_in="parameter"),
            "ours_wide": our_optimizer([], 1e-3),
            "peer": their_optimizer(peer, [], 1e-3),
        }
        for name, make in sides.items():
            parameter = nn.Parameter(torch.zeros(1024, 2048, dtype=dtype))
            optimizer = make(parameter)
            parameter.grad = torch.randn(1024, 2048).to(dtype)
            optimizer.step()
            measured.setdefault(str(dtype).removeprefix("torch."), {})[name] = sum(
                map(bytes_in, optimizer.state[parameter].values())
            )
    print(f"state bytes: {measured}")
    return measured


def saving_over_adamw() -> dict[str, Any]:
    """Bytes of state after a step of a small Llama model, both optimizers, next to what the formulas say beforehand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    rank = 64
    optimizers = {
        "adamw": torch.optim.AdamW(model.parameters()),
        "galore": GaLoreAdamW(model_param_groups(model, rank=rank)),
    }
    ids = torch.randint(2048, (2, 32))
    model(input_ids=ids, labels=ids).loss.backward()
    found: dict[str, Any] = {"rank": rank}
    for name, optimizer in optimizers.items():
        optimizer.step()
        states = (value for state in optimizer.state.values() for value in state.values())
        predicted = optimizer_memory(model, name, rank=rank).state
        found[name] = {"measured": sum(map(bytes_in, states)), "predicted": predicted}
    for which in ("measured", "predicted"):
        found[f"saving_{which}"] = 1 - found["galore"][which] / found["adamw"][which]
    print(f"saving over AdamW: {found['saving_measured']:.4f} measured, {found['saving_predicted']:.4f} predicted")
    return found


def bytes_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_in, vars(value).values())) if hasattr(value, "__dict__") else 0


def batching(pairs: int) -> dict[str, Any]:
    """Projecting 12 gradients of 512 × 512 at r = 64 one by one, against stacking them for one batched product."""
    gradients = [torch.randn(512, 512) for _ in range(12)]
    bases = [torch.linalg.qr(torch.randn(512, 64)).Q for _ in range(12)]

    def one_by_one() -> None:
        for P, G in zip(bases, gradients, strict=True):
            P.mT @ G

    def stacked() -> None:
        torch.stack(bases).mT @ torch.stack(gradients)

    timing = alternate(one_by_one, stacked, pairs, warmup=3)
    print(f"one by one against stacked: ratio {timing['median_ratio']:.3f}")
    return timing


# -- both sides --------------------------------------------------------------------------------------------------

Made = Callable[[nn.Parameter], torch.optim.Optimizer]


def our_optimizer(rest: list[nn.Parameter], lr: float, rank: int = RANK, every: int = WINDOW, **more: Any) -> Made:
    def make(*parameters: nn.Parameter) -> torch.optim.Optimizer:
        groups = [{"params": list(parameters), "rank": rank, "refresh_every": every}]
        return GaLoreAdamW([*groups, *([{"params": rest}] if rest else [])], lr=lr, **more)

    return make


def their_optimizer(peer: Any, rest: list[nn.Parameter], lr: float, rank: int = RANK, every: int = WINDOW) -> Made:
    def make(*parameters: nn.Parameter) -> torch.optim.Optimizer:
        settings = {"rank": rank, "update_proj_gap": every, "scale": 1.0, "proj_type": "std"}
        groups = [{"params": list(parameters), **settings}, *([{"params": rest}] if rest else [])]
        return peer.GaLoreAdamW(groups, lr=lr, eps=1e-8, no_deprecation_warning=True)

    return make


# -- loss curves -------------------------------------------------------------------------------------------------

WIDTH, CONTEXT, BATCH = 128, 64, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(rows, tokens, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, tokens, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x))))


class LanguageModel(nn.Module):
    def __init__(self, symbols: int):
        super().__init__()
        self.symbol, self.position = nn.Embedding(symbols, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, symbols))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.symbol(ids) + self.position(torch.arange(ids.shape[1]))))


def loss_curve(
    make: Callable[[list[nn.Parameter], float], Made], text: Tensor, steps: int, lr: float, seed: int
) -> list[float]:
    """Training loss, a mean every 25 steps, of a character model; warmed up over 30 steps, then falling to zero."""
    torch.manual_seed(seed)
    model = LanguageModel(int(text.max()) + 1)
    projected = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in projected)]
    optimizer = make(rest, lr)(*projected)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / 30) * (1 - t / steps))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        rows = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return [statistics.mean(losses[at : at + 25]) for at in range(0, steps, 25)]


def loss_curves(peer: Any, seeds: int, steps: int = 600) -> dict[str, Any]:
    """On tinyshakespeare, 2 layers of width 128, r = 16, T = 50, at three learning rates."""
    with gzip.open(Path(os.environ["RANKWISE_DATA"]) / "tinyshakespeare" / "input.txt.gz", "rt") as file:
        text = str(file.read())
    numbers = {symbol: number for number, symbol in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[symbol] for symbol in text])
    sides: dict[str, Any] = {
        "ours": lambda rest, lr: our_optimizer(rest, lr, 16, 50),
        "peer": lambda rest, lr: their_optimizer(peer, rest, lr, 16, 50),
        "adamw": lambda rest, lr: lambda *projected: torch.optim.AdamW([*projected, *rest], lr=lr, weight_decay=0.0),
    }
    curves: dict[str, Any] = {}
    for lr in (1e-3, 3e-3, 1e-2):
        for name, make in sides.items():
            curves.setdefault(str(lr), {})[name] = [loss_curve(make, ids, steps, lr, seed) for seed in range(seeds)]
        ends = {name: statistics.mean(curve[-1] for curve in found) for name, found in curves[str(lr)].items()}
        print(f"loss after {steps} steps at {lr}: {ends}", flush=True)
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    pairs = 1 if options.quick else options.pairs
    results: dict[str, Any] = {"size": SIZE, "rank": RANK, "window": WINDOW, "batching": batching(max(pairs, 5))}
    results["saving_over_adamw"] = saving_over_adamw()
    peer = peer_package()
    if peer is not None:
        results["refresh"] = refresh(peer, pairs)
        results["window_of_steps"] = window(peer, pairs)
        results["state_bytes"] = state_bytes(peer)
        if os.environ.get("RANKWISE_DATA") and not options.quick:
            results["loss"] = loss_curves(peer, options.seeds)
    if not options.quick:
        write_result(
            "low_rank_optimizers", " ".join(["python", "benchmarks/low_rank_optimizers.py", *sys.argv[1:]]), results
        )


if __name__ == "__main__":
    main()
