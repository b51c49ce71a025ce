"""Scores the held-out pairs with the exported LoRA, using transformers and PEFT alone; rankwise cannot be imported here.

python demo/check_with_plain_peft.py MODEL LORA_FOLDER DATA_CSV PREDICTIONS_CSV
"""

import sys

sys.modules["rankwise"] = None  # type: ignore[assignment]  # any import of it now fails

import csv
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer, logging


def main(model_folder: str, adapter: str, data: str, predictions: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with Path(data).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with Path(predictions).open(encoding="utf-8", newline="") as file:
        expected = {int(row["row"]): float(row["after"]) for row in csv.DictReader(file)}
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(model_folder, use_safetensors=True), adapter).eval()
    largest = 0.0
    numbers = sorted(expected)
    for start in range(0, len(numbers), 64):
        chunk = numbers[start : start + 64]
        texts = [rows[n]["sentence1"] for n in chunk] + [rows[n]["sentence2"] for n in chunk]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).float()
        pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        first, second = pooled.chunk(2)
        scores = (first * second).sum(-1)
        wanted = torch.tensor([expected[n] for n in chunk])
        largest = max(largest, float((scores - wanted).abs().max()))
    kind = type(model.peft_config["default"]).__name__
    print(json.dumps({"loaded as": kind, "rows": len(numbers), "largest difference": largest}))


if __name__ == "__main__":
    main(*sys.argv[1:])
