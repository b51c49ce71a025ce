"""TRL's SFTTrainer on a tiny causal language model: what it does with ``peft_config``, and what is left to the user."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankwise.adapters import (
    DeepLoraConfig,
    DeepLoraLayer,
    create_deeplora_optimizer,
    initialize_deeplora_weights,
    save_as_lora,
)
from rankwise.testing.adapter_contract import deeplora_layers
from tests.finetuning.tiny_checkpoint import sentences, word_tokenizer
from tests.interoperability.plain_loop import (
    RATES,
    assert_moved,
    assert_same,
    assert_same_way,
    frozen,
    train,
    trainable,
)
from tests.tiny_models import tiny_llama

trl = pytest.importorskip("trl", reason="needs the dev extra")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

ROWS, STEPS = 12, 4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> nn.Module:
    return tiny_llama(pad_token_id=2, eos_token_id=0, bos_token_id=None)


def config(**settings: Any) -> DeepLoraConfig:
    return DeepLoraConfig(**{"r": 4, "direction_dropout": 0.0, "task_type": "CAUSAL_LM", **settings})


def placeable(**settings: Any) -> DeepLoraConfig:
    return config(variant="compressed", init_scale=0.5, **settings)


def sft(model: nn.Module, folder: Path, *, optimizer: Any = None, peft_config: Any = None, **settings: Any) -> Any:
    tokenizer = word_tokenizer(["<end>", "<unk>", "<pad>"], eos_token="<end>", pad_token="<pad>")
    arguments = trl.SFTConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=3,
        **{"max_steps": STEPS, "per_device_train_batch_size": ROWS, "save_strategy": "no", **settings},
    )  # fmt: skip
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict({"text": sentences(ROWS)}),
        processing_class=tokenizer, peft_config=peft_config, optimizers=(optimizer, None),
    )  # fmt: skip


# In float64 and without what TRL adds of its own: the arithmetic of the plain loop.
EXACT = {"bf16": False, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=torch.arange(3, 15).view(2, 6)).logits


def test_peft_config_alone_trains_deep_lora_and_nothing_else(tmp_path: Path) -> None:
    """With TRL's own precision, checkpointing and optimizer: one rate for all factors."""
    trainer = sft(llama(), tmp_path, peft_config=config(), learning_rate=1e-2)
    model = trainer.model
    assert {name.rpartition(".")[2] for name in deeplora_layers(model)} == set(LINEAR)
    assert len(deeplora_layers(model)) == 2 * len(LINEAR)
    start, untouched = trainable(model), frozen(model)
    assert {value.dtype for value in start.values()} == {torch.float32}
    assert torch.equal(logits(model), logits(llama()))  # still the base model
    trainer.train()
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    assert_moved(trainable(trainer.model), start, only="deeplora_")
    assert_same(frozen(trainer.model), untouched, scale=0)
    assert len({group["initial_lr"] for group in trainer.optimizer.param_groups}) == 1


@pytest.mark.parametrize(("kind", "lr"), [(torch.optim.SGD, 2.0), (torch.optim.AdamW, 1e-2)], ids=["SGD", "AdamW"])
def test_the_optimizer_of_an_adapted_model_takes_the_steps_of_the_plain_loop(
    tmp_path: Path, kind: type[torch.optim.Optimizer], lr: float
) -> None:
    ours, theirs = (get_peft_model(llama().double(), config(variant="random", init_scale=0.5)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    start, rates = trainable(ours), {**RATES, "lr": lr}
    trainer = sft(theirs, tmp_path, optimizer=create_deeplora_optimizer(theirs, kind, **rates), **EXACT)
    whole = next(iter(trainer.get_train_dataloader()))  # one batch of all rows: their order does not matter

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        scores = ours(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return nn.functional.cross_entropy(scores.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)

    train(ours, create_deeplora_optimizer(ours, kind, **rates), [whole] * STEPS, loss_of)
    trainer.train()
    assert trainer.model is theirs
    assert {g["name"]: g["initial_lr"] for g in trainer.optimizer.param_groups} == {"inner": lr, "outer": lr / 2}
    assert_moved(trainable(theirs), start, only="deeplora_")
    assert_same_way(trainable(theirs), trainable(ours), start, within=1e-5)  # TRL rounds the loss to float32


def test_frames_and_optimizer_after_the_trainer_and_before_train(tmp_path: Path) -> None:
    """The paper's start needs a gradient: of the trainer's model, on the trainer's batches."""
    trainer = sft(llama(), tmp_path, peft_config=placeable())
    random = {
        name: layer.deeplora_right["default"].weight.clone() for name, layer in deeplora_layers(trainer.model).items()
    }
    summary = initialize_deeplora_weights(trainer.model, trainer.get_train_dataloader())
    trainer.optimizer = create_deeplora_optimizer(trainer.model, **RATES)
    assert len(summary.layers) == 2 * len(LINEAR)
    for name, layer in deeplora_layers(trainer.model).items():
        assert not torch.equal(layer.deeplora_right["default"].weight, random[name]), name
    start = trainable(trainer.model)
    trainer.train()
    assert_moved(trainable(trainer.model), start, only="deeplora_")
    assert [group["name"] for group in trainer.optimizer.param_groups] == ["inner", "outer"]


def test_resuming_equals_never_stopping(tmp_path: Path) -> None:
    def run(folder: str, resume: str | None = None, **settings: Any) -> nn.Module:
        torch.manual_seed(5)
        model = get_peft_model(llama(), config(direction_dropout=0.3))
        trainer = sft(
            model, tmp_path / folder, optimizer=create_deeplora_optimizer(model, **RATES),
            per_device_train_batch_size=3, **settings,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("whole", save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    assert_same(trainable(run("parts", resume=str(checkpoint))), trainable(whole), scale=0)


def test_what_was_trained_is_saved_reloaded_and_exported(tmp_path: Path) -> None:
    # bf16: accelerate would leave the autocast around the trained model, and outputs would be compared in eight bits
    trainer = sft(llama(), tmp_path / "run", peft_config=config(), learning_rate=5e-2, bf16=False)
    trainer.train()
    trainer.save_model(str(tmp_path / "deep"))
    save_as_lora(trainer.model, tmp_path / "lora")
    deep, lora = (PeftModel.from_pretrained(llama(), tmp_path / name) for name in ("deep", "lora"))
    assert len(deeplora_layers(deep)) == 2 * len(LINEAR)
    assert any(isinstance(module, LoraLayer) for module in lora.modules())
    assert not any(isinstance(module, DeepLoraLayer) for module in lora.modules())
    wanted = logits(trainer.model)
    assert torch.equal(logits(deep), wanted)
    torch.testing.assert_close(logits(lora), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits(llama())).abs().max() > 1e-3  # the adapter does something


def test_the_output_layer_is_left_out_by_us_and_refused_by_trl(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm_head"):
        sft(llama(), tmp_path, peft_config=config(target_modules=["lm_head"]))
    adapted = deeplora_layers(sft(llama(), tmp_path, peft_config=config()).model)
    assert not any("lm_head" in name for name in adapted)
