"""Lightning's Trainer around an adapted model: the steps of the plain loop, its checkpoints, its accumulation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rankwise.adapters import DeepLoraLayer, create_deeplora_optimizer, initialize_deeplora_weights, save_as_lora
from tests.interoperability.plain_loop import (
    RATES,
    adapted_bert,
    assert_moved,
    assert_same,
    batches,
    frozen,
    train,
    trainable,
)
from tests.tiny_models import tiny_bert

pl = pytest.importorskip("pytorch_lightning", reason="needs the dev extra")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning",
        "ignore:.*does not have many workers",
        "ignore:.*tensorboardX",
        "ignore:Found keys that are",
    ),
]


def placed() -> PeftModel:
    """The paper's start: U and V from one gradient, before Lightning sees the model."""
    model = adapted_bert(variant="compressed")
    initialize_deeplora_weights(model, batches(1))
    return model


def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)


class Classifier(pl.LightningModule):
    def __init__(self, model: nn.Module, rates: dict[str, float] | None = None, optimizer: Any = torch.optim.AdamW):
        super().__init__()
        self.model, self.rates, self.kind = model, rates or RATES, optimizer

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        optimizer = create_deeplora_optimizer(self.model, self.kind, **self.rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay(optimizer), "interval": "step"}}


class AdapterOnly(Classifier):
    """A module whose checkpoints hold what is trained, and not the base model."""

    strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        learnt = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in learnt}


def data(rows: list[dict[str, Tensor]] | None = None) -> DataLoader:
    return DataLoader(rows or batches(), batch_size=None)  # the batches as they are, in their order


def trainer(folder: Path, **settings: Any) -> Any:
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", precision="64-true", logger=False, enable_progress_bar=False,
        enable_model_summary=False, **{"max_epochs": 1, "enable_checkpointing": False, **settings},
    )  # fmt: skip


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 2.0), (torch.optim.AdamW, 1e-2)], ids=["SGD", "AdamW"])
def test_lightning_takes_the_steps_of_the_plain_loop(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer], lr: float
) -> None:
    ours, theirs = placed(), placed()
    start, untouched, rates = trainable(theirs), frozen(theirs), {**RATES, "lr": lr}
    reference = create_deeplora_optimizer(ours, optimizer, **rates)
    train(ours, reference, batches(), scheduler=decay(reference))
    trainer(tmp_path).fit(Classifier(theirs, rates, optimizer), data())
    assert_moved(trainable(theirs), start)
    assert_same(trainable(theirs), trainable(ours))
    assert_same(frozen(theirs), untouched, scale=0)


def test_accumulated_batches_are_one(tmp_path: Path) -> None:
    """Two batches of the mean loss: what one batch of both gives."""
    ours, theirs = placed(), placed()
    whole = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*[iter(batches())] * 2, strict=True)]
    reference = create_deeplora_optimizer(ours, **RATES)
    train(ours, reference, whole, scheduler=decay(reference))
    trainer(tmp_path, accumulate_grad_batches=2).fit(Classifier(theirs), data())
    assert_same(trainable(theirs), trainable(ours), scale=1e4)  # Adam's √v of small gradients


@pytest.mark.parametrize("kind", [Classifier, AdapterOnly])
def test_resuming_equals_never_stopping(tmp_path: Path, kind: type[Classifier]) -> None:
    whole = placed()
    trainer(tmp_path, max_epochs=2).fit(kind(whole), data())

    first = trainer(tmp_path, max_epochs=1)
    first.fit(kind(placed()), data())
    first.save_checkpoint(tmp_path / "half.ckpt")

    second = adapted_bert(variant="compressed")  # other frames: they come from the checkpoint
    resumed = trainer(tmp_path, max_epochs=2)
    resumed.fit(kind(second, {**RATES, "lr": 1.0}), data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert resumed.global_step == 8
    assert_same(trainable(second), trainable(whole), scale=0)


def test_a_checkpoint_can_hold_the_adapter_only(tmp_path: Path) -> None:
    model = placed()
    fitted = trainer(tmp_path)
    fitted.fit(AdapterOnly(model), data())
    fitted.save_checkpoint(tmp_path / "adapter.ckpt")
    saved = torch.load(tmp_path / "adapter.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"model.{name}" for name in trainable(model)}
    again = AdapterOnly.load_from_checkpoint(
        tmp_path / "adapter.ckpt", model=adapted_bert(variant="compressed"), weights_only=True
    )
    batch = batches()[0]
    with torch.no_grad():
        assert torch.equal(again.model.eval()(**batch).logits, model.eval()(**batch).logits)


def test_what_was_trained_is_saved_reloaded_and_exported(tmp_path: Path) -> None:
    model = placed()
    trainer(tmp_path).fit(Classifier(model), data())
    model.save_pretrained(tmp_path / "deep")
    save_as_lora(model, tmp_path / "lora")
    deep, lora = (PeftModel.from_pretrained(tiny_bert().double(), tmp_path / name).eval() for name in ("deep", "lora"))
    assert any(isinstance(module, LoraLayer) for module in lora.modules())
    assert not any(isinstance(module, DeepLoraLayer) for module in lora.modules())
    batch = batches()[0]
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
        assert torch.equal(deep(**batch).logits, wanted)
        torch.testing.assert_close(lora(**batch).logits, wanted, rtol=1e-10, atol=1e-12)
