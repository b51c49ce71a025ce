"""A real SentenceTransformer with a Deep LoRA, trained by SentenceTransformerTrainer with a loss of its own library."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from rankwise.adapters import DeepLoraConfig, create_deeplora_optimizer, initialize_deeplora_weights, save_as_lora
from rankwise.testing.adapter_contract import deeplora_layers
from tests.interoperability.plain_loop import (
    assert_moved,
    assert_same,
    assert_same_way,
    frozen,
    train,
    trainable,
)

st = pytest.importorskip("sentence_transformers", reason="needs the demo extra")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.pretrained,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

RATES = {"lr": 1e-3, "outer_lr_ratio": 5.0}
PAIRS = [
    ("a red cat sleeps", "the cat is red and asleep", 0.875),
    ("a dog barks", "a car drives by", 0.125),
    ("rain falls on the road", "it is raining", 0.75),
    ("music plays", "nobody makes a sound", 0.25),
    ("the river is cold", "cold water in the river", 1.0),
    ("an old stone house", "a new wooden boat", 0.375),
]
TEXTS = ["a blue bird", "two people walk to the station", "cold rain"]


def embedder(folder: Path, *, dtype: str = "float32", dropout_of_base: float = 0.1, **settings: Any) -> Any:
    torch.manual_seed(0)
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout_of_base)
    model = st.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype}, config_kwargs=dropout)
    model.add_adapter(DeepLoraConfig(**{"r": 4, "target_modules": ["query", "value"], **settings}))
    return model


def trainer(model: Any, folder: Path, *, kind: Any = torch.optim.AdamW, lr: float = 1e-3, **settings: Any) -> Any:
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=3,
        **{"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "no", **settings},
    )  # fmt: skip
    first, second, score = zip(*PAIRS, strict=True)
    return st.SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"sentence1": first, "sentence2": second, "score": score}),
        loss=st.sentence_transformer.losses.CosineSimilarityLoss(model),
        optimizers=(create_deeplora_optimizer(model, kind, **{**RATES, "lr": lr}), None),
    )


def embeddings(model: Any) -> Tensor:
    return model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)


def test_add_adapter_of_sentence_transformers_adds_deep_lora(minilm: Path) -> None:
    base = embeddings(st.SentenceTransformer(str(minilm), device="cpu"))
    model = embedder(minilm)
    assert model.active_adapters() == ["default"]
    assert len(deeplora_layers(model)) == 12
    assert all(".deeplora_" in name for name in trainable(model))
    assert torch.equal(embeddings(model), base)


@pytest.mark.parametrize(("kind", "lr"), [(torch.optim.SGD, 1.0), (torch.optim.AdamW, 1e-3)], ids=["SGD", "AdamW"])
def test_their_trainer_takes_the_steps_of_the_plain_loop(
    minilm: Path, tmp_path: Path, kind: type[torch.optim.Optimizer], lr: float
) -> None:
    exact = {"variant": "random", "init_scale": 0.5, "direction_dropout": 0.0}
    ours, theirs = (embedder(minilm, dtype="float64", dropout_of_base=0.0, **exact) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    start, untouched = trainable(theirs), frozen(theirs)

    def loss_of(_: None) -> Tensor:
        first, second, score = zip(*PAIRS, strict=True)
        a, b = (ours(ours.preprocess(list(texts)))["sentence_embedding"] for texts in (first, second))
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        return (cosine - torch.tensor(score, dtype=torch.float64)).square().mean()

    train(ours, create_deeplora_optimizer(ours, kind, **{**RATES, "lr": lr}), [None] * 4, loss_of)
    trainer(
        theirs, tmp_path, kind=kind, lr=lr,
        per_device_train_batch_size=len(PAIRS), lr_scheduler_type="constant", max_grad_norm=0.0,
    ).train()  # fmt: skip
    assert_moved(trainable(theirs), start, only=".deeplora_")
    assert_same_way(
        trainable(theirs), trainable(ours), start, within=1e-10
    )  # float64, of which Adam's √v costs some digits
    assert_same(frozen(theirs), untouched, scale=0)


def test_saved_and_loaded_again_as_a_sentence_transformer(minilm: Path, tmp_path: Path) -> None:
    model = embedder(minilm)
    start = embeddings(model)
    trainer(model, tmp_path / "run").train()
    wanted = embeddings(model)
    assert (wanted - start).abs().max() > 1e-4
    model.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "saved").rglob("model.safetensors"))  # the base model is named, not copied
    loaded = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert len(deeplora_layers(loaded)) == 12
    assert torch.equal(embeddings(loaded), wanted)


def test_resuming_from_their_checkpoint_equals_never_stopping(minilm: Path, tmp_path: Path) -> None:
    """With the base model's dropout and direction dropout on: the random state comes back too."""
    whole = embedder(minilm)
    trainer(whole, tmp_path, save_strategy="steps", save_steps=2).train()
    second = embedder(minilm)
    with torch.no_grad():
        for name, p in second.named_parameters():
            if ".deeplora_" in name:
                p.add_(1.0)  # what is not loaded shows
    resumed = trainer(second, tmp_path, lr=1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {g["name"]: g["initial_lr"] for g in resumed.optimizer.param_groups} == {"inner": 1e-3, "outer": 5e-3}
    assert_same(trainable(second), trainable(whole), scale=0)


def test_the_papers_start_is_placed_in_the_transformer_inside(minilm: Path) -> None:
    model = embedder(minilm, variant="compressed")
    base = embeddings(model)
    loss = st.sentence_transformer.losses.CosineSimilarityLoss(model)
    first, second, score = zip(*PAIRS, strict=True)
    batch = {"features": [model.preprocess(list(first)), model.preprocess(list(second))], "labels": torch.tensor(score)}
    summary = initialize_deeplora_weights(
        model.transformers_model, [batch], loss_fn=lambda _, batch: loss(batch["features"], batch["labels"])
    )
    assert len(summary.layers) == 12
    assert all(row.captured > 0.3 for row in summary.layers)  # of 384, random frames of four directions take about 0.01
    assert torch.equal(embeddings(model), base)


def test_the_exported_lora_loads_into_a_sentence_transformer(minilm: Path, tmp_path: Path) -> None:
    model = embedder(minilm)
    trainer(model, tmp_path / "run").train()
    save_as_lora(model.transformers_model, tmp_path / "lora")
    plain = st.SentenceTransformer(str(minilm), device="cpu")
    plain.load_adapter(str(tmp_path / "lora"))
    assert any("lora_A" in name for name, _ in plain.named_parameters())
    assert not any("deeplora_" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(embeddings(plain), embeddings(model), rtol=1e-5, atol=1e-6)
