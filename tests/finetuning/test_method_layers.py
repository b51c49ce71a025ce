"""Which layers the methods adapt: GPT-2's, convolutions, a head that PEFT knows or does not know; and what they refuse."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import UserError
from rankwise.finetuning.methods import (
    METHODS,
    adapt,
    adapted_layers,
    create_optimizer,
    head_modules,
    head_parameters,
    is_convolutional,
    prepare,
)
from tests.finetuning.method_runs import ADAPTERS, original_name, settings
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

CONVOLUTIONS = [name for name in ADAPTERS if METHODS[name].convolutions]
CONV1D = (
    "deep-lora", "lora", "lora-gaussian", "lora-plus", "lora-rite", "rslora", "dora", "lora-riemannian", "lora-fa", "lora-orthogonal", "pissa", "olora",
    "mica", "eva", "corda", "lora-ga", "velora", "monteclora", "adalora", "gralora", "hira", "deft", "vera", "pvera",
    "randlora", "unilora", "vblora", "tinylora", "ia3", "frod", "fourierft", "waveft",
)  # fmt: skip


def task_of(kind: str | None, run: Callable[[nn.Module], Tensor], *, head: bool = False) -> Any:
    """A task whose only batch is built in, as far as the methods look at one."""
    return SimpleNamespace(
        peft_task_type=kind, has_head=head, ridge_fits=False, modules_left_out=lambda model: [],
        loss=lambda model, batch: run(model).square().mean(),
    )  # fmt: skip


def tiny_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


def tiny_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def tiny_mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=3)
    return MobileNetV2ForImageClassification(config).eval()


def tiny_distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=2, hidden_dim=48, num_labels=3)
    return DistilBertForSequenceClassification(config).eval()


def tiny_roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).eval()


def pixels(model: nn.Module) -> Tensor:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return model(pixel_values=images).logits


def tokens(model: nn.Module) -> Tensor:
    batch = token_batch()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


IMAGES = task_of(None, pixels, head=True)
TEXTS = task_of("SEQ_CLS", tokens, head=True)
WORDS = task_of("CAUSAL_LM", tokens)


def tuned(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are adapted, by their names in the pretrained model."""
    return {
        original_name(name): module.get_base_layer()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def check_adapter(
    make: Callable[[], nn.Module],
    run: Callable[[nn.Module], Tensor],
    task: Any,
    method: str,
    folder: Path,
    *,
    merges: bool = True,
) -> nn.Module:
    """It starts as the pretrained model, learns, and is saved whole; the adapted model."""
    before = run(make()).detach()
    chosen = settings(method)
    torch.manual_seed(1)
    model = adapt(make(), task, chosen).eval()
    prepare(model, task, chosen, [{}])
    tolerance = 1e-2 if method in ("unilora", "vblora") else 1e-5
    assert (run(model) - before).abs().max() < tolerance
    optimizer = create_optimizer(model, task, chosen)
    task.loss(model, {}).backward()
    optimizer.step()
    after = run(model).detach()
    assert (after - before).abs().max() > 1e-4
    model.save_pretrained(folder)  # type: ignore[operator]
    torch.manual_seed(2)
    loaded: Any = PeftModel.from_pretrained(make(), folder).eval()
    assert torch.equal(run(loaded), after)
    if merges:
        torch.testing.assert_close(run(loaded.merge_and_unload()), after, rtol=1e-4, atol=1e-5)
    return model


# --- kinds of layers


@pytest.mark.parametrize("method", CONV1D)
def test_gpt2_s_layers_are_adapted(method: str, tmp_path: Path) -> None:
    model = check_adapter(lambda: tiny_gpt2().eval(), tokens, WORDS, method, tmp_path)
    layers = tuned(model)
    assert len(layers) == 8
    assert all(isinstance(layer, Conv1D) for layer in layers.values())


@pytest.mark.parametrize("method", [name for name in ADAPTERS if name not in CONV1D])
def test_a_method_that_peft_has_no_layer_of_gpt2_for_says_so(method: str) -> None:
    with pytest.raises(UserError, match=rf"cannot adapt this model with --method {method} --rank 4: .*Conv1D"):
        adapt(tiny_gpt2(), WORDS, settings(method))


@pytest.mark.parametrize("method", CONVOLUTIONS)
def test_convolutions_are_adapted(method: str, tmp_path: Path) -> None:
    model = check_adapter(tiny_resnet, pixels, IMAGES, method, tmp_path)
    layers = tuned(model)
    assert set(layers) == {name for name, m in tiny_resnet().named_modules() if isinstance(m, nn.Conv2d)}
    assert {name for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}


@pytest.mark.parametrize("method", [name for name in ADAPTERS if name not in CONVOLUTIONS])
def test_a_method_of_linear_layers_refuses_a_convolutional_model(method: str) -> None:
    with pytest.raises(UserError, match=rf"--method {method} adapts linear layers, .* take one of deep-lora, lora,"):
        adapt(tiny_resnet(), IMAGES, settings(method))


def test_full_width_factors_stand_beside_linear_layers_alone() -> None:
    for model, task in ((tiny_gpt2(), WORDS), (tiny_resnet(), IMAGES)):
        with pytest.raises(UserError, match=r"--method full-width stands beside nn.Linear"):
            adapt(model, task, settings("full-width"))


def test_adalora_s_penalty_takes_convolutions() -> None:
    model = adapt(tiny_resnet(), IMAGES, settings("adalora"))
    penalty = METHODS["adalora"].penalty
    assert penalty is not None
    total = 0.0
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        A, B = (getattr(layer, f"lora_{side}")["default"].detach() for side in "AB")
        assert A.ndim == B.ndim == 2
        total += float((A @ A.mT - torch.eye(6)).norm() + (B.mT @ B - torch.eye(6)).norm())
    assert float(penalty(model).detach()) == pytest.approx(0.5 * total / (2 * len(layers)), rel=1e-5)


# --- which layers


def test_a_transformer_s_patches_are_left_alone() -> None:
    """ViT cuts its image by a convolution; what it is made of are linear layers."""
    model = tiny_vit()
    assert not is_convolutional(model, IMAGES)
    layers = adapted_layers(model, IMAGES)
    assert len(layers) == 12
    assert all(isinstance(layer, nn.Linear) for layer in layers.values())
    assert set(tuned(adapt(tiny_vit(), IMAGES, settings("lora")))) == set(layers)
    assert set(tuned(adapt(tiny_vit(), IMAGES, settings("vera")))) == set(layers)  # by a list of names


@pytest.mark.parametrize(("kernels", "expected"), [(11, True), (9, False)], ids=["more than half", "less than half"])
def test_a_model_is_convolutional_by_the_larger_part_of_its_weights(kernels: int, expected: bool) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, kernels, 10), nn.Linear(100, 10))
            self.head = nn.Linear(10, 10_000)  # counts for nothing

        @property
        def base_model(self) -> nn.Module:
            return self.body

    model = Mixed()
    assert is_convolutional(model, IMAGES) == expected
    assert set(adapted_layers(model, IMAGES)) == ({"body.0", "body.1"} if expected else {"body.1"})


def test_grouped_convolutions_are_left_alone(tmp_path: Path) -> None:
    model = tiny_mobilenet()
    groups = {name: m.groups for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert max(groups.values()) > 1
    expected = {name for name, count in groups.items() if count == 1}
    assert set(adapted_layers(model, IMAGES)) == expected
    for method in ("lora", "deep-lora", "loha"):
        assert set(tuned(adapt(tiny_mobilenet(), IMAGES, settings(method)))) == expected, method


def test_a_language_model_s_output_layer_is_left_alone() -> None:
    for method in ("lora", "deep-lora", "vera", "road"):
        layers = tuned(adapt(tiny_llama(), WORDS, settings(method)))
        assert len(layers) == 14
        assert "lm_head" not in layers


def test_a_model_without_a_layer_to_adapt() -> None:
    task = task_of("CAUSAL_LM", tokens)
    task.modules_left_out = lambda model: [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with pytest.raises(UserError, match="LlamaForCausalLM has no layer that --method lora could adapt"):
        adapt(tiny_llama(), task, settings("lora"))


# --- the head


@pytest.mark.parametrize(
    ("make", "task", "run", "head"),
    [
        (tiny_bert, TEXTS, tokens, ["classifier"]),
        (tiny_roberta, TEXTS, tokens, ["classifier.dense", "classifier.out_proj"]),
        (tiny_distilbert, TEXTS, tokens, ["pre_classifier", "classifier"]),
        (tiny_vit, IMAGES, pixels, ["classifier"]),
        (tiny_resnet, IMAGES, pixels, ["classifier.1"]),
    ],
    ids=["bert", "roberta", "distilbert", "vit", "resnet"],
)
@pytest.mark.parametrize("method", ["deep-lora", "lora", "ia3"])
def test_all_of_the_head_is_trained_and_saved_and_none_of_it_adapted(
    make: Callable[[], nn.Module], task: Any, run: Callable[[nn.Module], Tensor], head: list[str], method: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    base = make()
    assert head_modules(base, task) == head
    numbers = sum(p.numel() for p in head_parameters(base, task))
    assert numbers == sum(p.numel() for name in head for p in base.get_submodule(name).parameters())
    torch.manual_seed(0)
    # PEFT's merge_and_unload stumbles over a saved head of several layers, but for LoRA's
    merges = make is not tiny_roberta or method == "lora"
    model = check_adapter(lambda: make().eval(), run, task, method, tmp_path, merges=merges)
    trained = head_parameters(model, task)
    assert all(p.requires_grad for p in trained)
    assert sum(p.numel() for p in trained) == numbers
    assert not any(name.startswith(part) for name in tuned(model) for part in head)


def test_a_head_on_every_token_is_not_adapted_either() -> None:
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    model = adapt(BertForTokenClassification(config), task_of("TOKEN_CLS", tokens, head=True), settings("lora"))
    assert "classifier" not in tuned(model)
    assert len(tuned(model)) == 6
