"""Export to a plain LoRA folder, ours against PEFT's conversion, and back: a BERT-base-sized adapter (72 layers, r = 8).

    python benchmarks/export.py        # writes results/export.json

Both sides write the folder. The model is built from its config: export touches the adapter, not the base weights.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import convert_to_lora, get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.protocol import alternate, write_result
from rankwise.adapters import DeepLoraConfig, deeplora_from_adapter, save_as_lora

RANK = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = DeepLoraConfig(r=RANK, exclude_modules=["pooler.dense"], target_modules="all-linear", init_weights=False)
    model = get_peft_model(BertModel(BertConfig()), config)
    folder = Path(tempfile.mkdtemp())
    target = folder / "lora"

    def ours() -> None:
        shutil.rmtree(target, ignore_errors=True)
        save_as_lora(model, target)

    def peer() -> None:
        shutil.rmtree(target, ignore_errors=True)
        lora_config, tensors = convert_to_lora(model, rank=RANK)
        lora_config.save_pretrained(str(target))
        save_file({key: value.contiguous() for key, value in tensors.items()}, target / "adapter_model.safetensors")

    timing = alternate(ours, peer, options.pairs)
    layers = len(save_as_lora(model, folder / "count").layers)

    def back() -> float:
        shutil.rmtree(folder / "deep", ignore_errors=True)
        start = time.perf_counter()
        deeplora_from_adapter(folder / "count", folder / "deep")
        return time.perf_counter() - start

    from_lora = statistics.median(back() for _ in range(options.pairs))
    shutil.rmtree(folder)
    speed_up = 1 / timing["median_ratio"]
    print(f"{layers} layers: {timing['median_ours_seconds']:.3f} s, {speed_up:.0f} x faster than PEFT's conversion")
    write_result(
        "export",
        " ".join(["python", "benchmarks/export.py", *sys.argv[1:]]),
        {"layers": layers, "rank": RANK, "speed_up": speed_up, "median_from_lora_seconds": from_lora, **timing},
    )


if __name__ == "__main__":
    main()
