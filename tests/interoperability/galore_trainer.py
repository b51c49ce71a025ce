"""Trains a tiny Llama with Trainer and GaLoreAdamW: ``galore_trainer.py FOLDER [KILL_AT_STEP]``.

Goes on from the folder's last checkpoint, ends itself by SIGKILL in the middle of a run where asked to, and saves the
weights it ends with.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))
from rankwise.optimizers import GaLoreAdamW, model_param_groups
from tests.tiny_models import tiny_llama, token_batch


class KilledAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kill_at: int) -> None:
    torch.set_num_threads(1)
    model = tiny_llama()
    rows = token_batch(rows=32, labels="tokens")
    dataset = Dataset.from_dict({key: value.tolist() for key, value in rows.items()}).with_format("torch")
    optimizer = GaLoreAdamW(model_param_groups(model, rank=8), lr=1e-2, refresh_every=3)
    arguments = TrainingArguments(
        str(folder), max_steps=14, save_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        warmup_steps=3, seed=1, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=dataset, optimizers=(optimizer, None), callbacks=[KilledAt(kill_at)]
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    save_model(model, str(folder / "end.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
