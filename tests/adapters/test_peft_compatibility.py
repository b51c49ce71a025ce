"""What PEFT's documentation promises, feature by feature: works with Deep LoRA, or is refused with a reason.

docs/peft-compatibility.md is made from this file: ``python -m tests.adapters.test_peft_compatibility``.
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    TaskType,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from rankwise.adapters import DeepLoraConfig, save_as_lora
from rankwise.testing.adapter_contract import deeplora_layers, disturbed
from tests.tiny_models import Mlp, tiny_bert, tiny_gpt2, token_batch

PAGE = Path(__file__).parents[2] / "docs" / "peft-compatibility.md"


class Feature(NamedTuple):
    page: str
    name: str
    works: bool
    note: str


FEATURES: list[Feature] = []


def feature(page: str, name: str, note: str = "", *, works: bool = True) -> Callable[[Any], Any]:
    FEATURES.append(Feature(page, name, works, note))
    return lambda test: test


def bert(**settings: Any) -> Any:
    return get_peft_model(tiny_bert(), DeepLoraConfig(**{"r": 4, "task_type": "SEQ_CLS", **settings}))


@torch.no_grad()
def logits(model: nn.Module, **options: Any) -> Tensor:
    return model.eval()(**token_batch(), **options).logits


@contextlib.contextmanager
def refused(error: type[Exception], says: str) -> Iterator[None]:
    with pytest.raises(error, match=says):
        yield


# -- quick tour -----------------------------------------------------------------------------------------------------


@feature("Quick tour", "`get_peft_model`, `print_trainable_parameters`")
def test_wrapping(capsys: Any) -> None:
    bert().print_trainable_parameters()
    assert "trainable params: 4,274" in capsys.readouterr().out


@feature("Quick tour", "`save_pretrained`, `PeftModel.from_pretrained(is_trainable=…)`")
def test_saving(tmp_path: Path) -> None:
    model = disturbed(bert())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert any(p.requires_grad for p in loaded.parameters())


@feature("Quick tour", "`AutoPeftModelFor…`", "with `import rankwise.adapters` before")
def test_auto_model(tmp_path: Path) -> None:
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    model = disturbed(
        get_peft_model(type(base).from_pretrained(tmp_path / "base"), DeepLoraConfig(task_type="SEQ_CLS"))
    )
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        logits(AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")), logits(model)
    )


@feature("Quick tour", "task types", "every `TaskType`; the head of `SEQ_CLS` and `TOKEN_CLS` is trained and saved")
def test_task_types() -> None:
    for task in TaskType:
        DeepLoraConfig(task_type=task.value)


# -- adapters -------------------------------------------------------------------------------------------------------


@feature("Adapters", "several adapters: `add_adapter`, `set_adapter`, `delete_adapter`, `load_adapter`")
def test_several_adapters(tmp_path: Path) -> None:
    model = disturbed(bert())
    model.add_adapter("second", DeepLoraConfig(r=2, task_type="SEQ_CLS"))
    disturbed(model, "second", seed=4)
    model.save_pretrained(tmp_path)
    model.set_adapter("second")
    second = logits(model)
    model.load_adapter(tmp_path / "second", adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(logits(model), second)
    model.delete_adapter("again")
    assert set(model.peft_config) == {"default", "second"}


@feature(
    "Adapters",
    "several active at once: `base_model.set_adapter([…])`",
    "their updates add up; without `modules_to_save`",
)
def test_several_active() -> None:
    model = disturbed(get_peft_model(Mlp().double(), DeepLoraConfig(r=4, target_modules=["lin0"])))
    model.add_adapter("second", DeepLoraConfig(r=2, target_modules=["lin0"]))
    disturbed(model, "second", seed=4).double().eval()
    model.base_model.set_adapter(["default", "second"])
    (layer,) = deeplora_layers(model).values()
    x = torch.randn(3, 20, dtype=torch.float64)
    total = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ total.mT)


@feature(
    "Adapters", 'mixed batches: `adapter_names=[…]`, `"__base__"`', "in `forward` and `generate`, beam search included"
)
def test_mixed_batch() -> None:
    model = disturbed(bert())
    base = logits(model, adapter_names=["__base__"] * 4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)


@feature("Adapters", "`disable_adapter()`, `merge_adapter`, `unmerge_adapter`, `merge_and_unload`, `unload`")
def test_merging() -> None:
    model = disturbed(bert())
    adapted = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=True)), adapted, rtol=1e-4, atol=1e-5)


@feature("Adapters", "tied weights", "an adapted `lm_head` is untied when it is merged, and the config says so")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_weights() -> None:
    base = tiny_gpt2(bos_token_id=0, eos_token_id=0, pad_token_id=0).double()
    assert base.lm_head.weight is base.transformer.wte.weight
    model = disturbed(get_peft_model(base, DeepLoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")))
    ids = {"input_ids": torch.arange(1, 8).unsqueeze(0)}
    with torch.no_grad():
        adapted = model.eval()(**ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**ids).logits, adapted)
    assert merged.lm_head.weight is not merged.transformer.wte.weight
    assert not merged.config.tie_word_embeddings


@feature("Adapters", "`rank_pattern`, `layers_to_transform`, `layers_pattern`, `exclude_modules`, regular expressions")
def test_choosing_layers() -> None:
    model = bert(target_modules=r".*\.(query|value)", exclude_modules=r".*1\..*", rank_pattern={"value": 2})
    assert {n.split(".")[-1]: layer.r["default"] for n, layer in deeplora_layers(model).items()} == {
        "query": 4,
        "value": 2,
    }


@feature("Adapters", "`modules_to_save`, `bias`")
def test_modules_to_save() -> None:
    state = get_peft_model_state_dict(bert(bias="all"))
    assert {"base_model.model.classifier.weight"} <= set(state)
    assert any(key.endswith("query.base_layer.bias") for key in state)


@feature("Adapters", "`trainable_token_indices`", "PEFT's own, beside ours; not carried into an exported LoRA")
def test_trained_tokens(tmp_path: Path) -> None:
    model = bert(target_modules=["query"], trainable_token_indices={"word_embeddings": [1, 5]})
    trained = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name and p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(2, 32)]
    with torch.no_grad():
        trained[0].add_(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_bert(), tmp_path)), logits(model))
    with refused(ValueError, "trainable_token_indices"):
        save_as_lora(model, tmp_path / "lora")


@feature(
    "Adapters",
    "tied weights: `ensure_weight_tying`",
    "for `modules_to_save` of `lm_head` or `embed_tokens`; refused for adapted ones",
)
def test_ensured_tying() -> None:
    settings = {"r": 4, "ensure_weight_tying": True, "task_type": "CAUSAL_LM"}
    base = tiny_gpt2(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = get_peft_model(base, DeepLoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"], **settings))
    network = model.get_base_model()
    assert (
        network.lm_head.modules_to_save["default"].weight is network.transformer.wte.modules_to_save["default"].weight
    )
    with refused(ValueError, "merging unties the weights"):
        get_peft_model(tiny_gpt2(pad_token_id=0), DeepLoraConfig(target_modules=["wte", "lm_head"], **settings))


@feature("Adapters", "`target_parameters`", "one product an expert; without dropout, mixed batches and weighted sums")
def test_target_parameters() -> None:
    model = get_peft_model(Mlp(), DeepLoraConfig(r=4, target_modules=[], target_parameters=["lin1.weight"]))
    (layer,) = deeplora_layers(disturbed(model)).values()
    x = torch.randn(3, 20)
    adapted = model.eval()(x)
    assert torch.equal(layer.get_delta_weight("default").count_nonzero(), torch.tensor(24 * 24))
    torch.testing.assert_close(model.merge_and_unload()(x), adapted)


@feature("Adapters", "`inject_adapter_in_model`, `set_peft_model_state_dict`")
def test_low_level() -> None:
    model = inject_adapter_in_model(DeepLoraConfig(r=4, target_modules=["query"]), tiny_bert())
    assert set(deeplora_layers(model))
    source = disturbed(bert())
    target = bert()
    assert not set_peft_model_state_dict(target, get_peft_model_state_dict(source)).unexpected_keys
    assert torch.equal(logits(target), logits(source))


@feature(
    "Adapters", "transformers' own `add_adapter`, `set_adapter`, `disable_adapters`, `delete_adapter`, `load_adapter`"
)
def test_transformers(tmp_path: Path) -> None:
    model = tiny_bert()
    base = logits(model)
    model.add_adapter(DeepLoraConfig(r=4, target_modules=["query"]), adapter_name="first")
    model.add_adapter(DeepLoraConfig(r=2, target_modules=["query"]), adapter_name="second")
    model.set_adapter("first")
    disturbed(model, "first")
    adapted = logits(model)
    assert not torch.equal(adapted, base)
    model.delete_adapter("second")
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    again = tiny_bert()
    again.load_adapter(tmp_path)
    torch.testing.assert_close(logits(again), adapted)


@feature("Adapters", "`low_cpu_mem_usage=True`")
def test_meta_device(tmp_path: Path) -> None:
    model = disturbed(bert())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(model))


# -- checkpoint format ----------------------------------------------------------------------------------------------


@feature("Checkpoint format", "keys without adapter name, `adapter_config.json`, safetensors")
def test_checkpoint(tmp_path: Path) -> None:
    bert(target_modules=["query"]).save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in tmp_path.iterdir()}


@feature("Checkpoint format", "`convert_to_lora`", "`save_as_lora` is exact, and faster")
def test_conversion() -> None:
    config, state = convert_to_lora(disturbed(bert(target_modules=["query"])), rank=4)
    assert isinstance(config, LoraConfig)
    assert state


# -- model merging --------------------------------------------------------------------------------------------------


@feature("Model merging", "`add_weighted_adapter`: `cat`, `svd`", '"cat" is exact')
def test_weighted() -> None:
    model = disturbed(bert(modules_to_save=None, task_type=None))
    model.add_adapter("second", DeepLoraConfig(r=2))
    disturbed(model, "second", seed=4)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mix")
    assert "mix" in model.peft_config


@feature(
    "Model merging",
    "`ties`, `dare_*`, `magnitude_prune`, `linear`",
    "they work on LoRA's entries, which are not unique",
    works=False,
)
def test_ties() -> None:
    model = bert()
    model.add_adapter("second", DeepLoraConfig(r=2, task_type="SEQ_CLS"))
    with refused(ValueError, "not unique"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "mix", combination_type="ties")


# -- mixed adapters, hot swap, helpers ------------------------------------------------------------------------------


@feature(
    "Mixed adapter types", "`get_peft_model(mixed=True)`", "PEFT allows only methods of its own list there", works=False
)
def test_mixed_types() -> None:
    with refused(ValueError, "not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_bert(), DeepLoraConfig(target_modules=["query"]), mixed=True)


@feature("Hot swapping", "of exported adapters", "`save_as_lora`, then `hotswap_adapter` as for any LoRA")
def test_hot_swap(tmp_path: Path) -> None:
    model = disturbed(get_peft_model(Mlp(), DeepLoraConfig(r=4, target_modules=["lin0", "lin1"]))).eval()
    save_as_lora(model, tmp_path / "one")
    disturbed(model, seed=5)
    save_as_lora(model, tmp_path / "two")
    x = torch.randn(3, 20)
    torch.manual_seed(0)
    served = PeftModel.from_pretrained(model.unload(), tmp_path / "one").eval()
    hotswap_adapter(served, tmp_path / "two", "default")
    again = PeftModel.from_pretrained(served.unload(), tmp_path / "two").eval()
    torch.testing.assert_close(served(x), again(x))


@feature("Hot swapping", "of Deep LoRA folders", "PEFT swaps LoRA only; export first", works=False)
def test_hot_swap_of_ours(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path)
    with refused(ValueError, "only supports LORA"):
        hotswap_adapter(model, tmp_path, "default")


@feature("Helpers", "`get_layer_status`, `get_model_status`, `set_requires_grad`")
def test_status() -> None:
    model = bert()
    assert model.get_model_status().adapter_model_type == "DeepLoraModel"
    assert len(model.get_layer_status()) == len(deeplora_layers(model)) + 1  # and the head
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "deeplora" in name)


@feature("Helpers", "`disable_input_dtype_casting`", "nothing to do: the factors follow the activations")
def test_input_casting() -> None:
    model = disturbed(bert())
    with disable_input_dtype_casting(model):
        inside = logits(model)
    assert torch.equal(inside, logits(model))


@feature(
    "Helpers",
    "`rescale_adapter_scale`",
    "there is no α to scale; `add_weighted_adapter([name], [s], …)` scales",
    works=False,
)
def test_rescale() -> None:
    with refused(ValueError, "LoraLayer"), rescale_adapter_scale(bert(), 0.5):
        pass


# -- precision and compilation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@feature("Troubleshooting", "bases in float16 and bfloat16", "the factors train in float32")
def test_half_precision(dtype: torch.dtype) -> None:
    model = disturbed(get_peft_model(tiny_bert().to(dtype), DeepLoraConfig(r=4, task_type="SEQ_CLS")))
    model(**token_batch()).loss.backward()
    for layer in deeplora_layers(model).values():
        gradient = layer.deeplora_inner["default"].weight.grad
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


# in a process of its own: the tests' run-time type checks cannot be compiled
_COMPILED = """
import torch
from peft import get_peft_model
from torch._dynamo.testing import CompileCounter
from rankwise.adapters import DeepLoraConfig
from rankwise.testing.adapter_contract import disturbed
from tests.tiny_models import tiny_bert, token_batch

for variant in ("zero-left", "compressed"):
    for training in (False, True):
        base = tiny_bert(problem_type="single_label_classification")  # else the first call writes it into the config
        model = get_peft_model(base, DeepLoraConfig(r=4, task_type="SEQ_CLS", variant=variant))
        model = disturbed(model).train(training)
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
        for rows in (4, 3, 5, 7):
            compiled(**token_batch(rows=rows))
        assert counter.frame_count == 1, (variant, training, counter.frame_count)
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**token_batch()).logits, model(**token_batch()).logits, rtol=1e-5, atol=1e-5)
print("compiled")
"""


@pytest.mark.slow
@feature("torch.compile", "the forward", "no graph break; one compilation for changing batch sizes")
def test_compiles_once() -> None:
    done = subprocess.run([sys.executable, "-c", _COMPILED], capture_output=True, text=True, cwd=PAGE.parents[1])
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]


# -- the page -------------------------------------------------------------------------------------------------------


def page() -> str:
    lines = [
        "# PEFT's features with Deep LoRA",
        "",
        "Made from `tests/adapters/test_peft_compatibility.py`: every line is a test.",
        "",
        "| PEFT's documentation | feature | | |",
        "|---|---|---|---|",
    ]
    for page, name, works, note in dict.fromkeys(FEATURES):
        lines.append(f"| {page} | {name} | {'works' if works else 'refused'} | {note} |")
    return "\n".join(lines) + "\n"


def test_the_page_says_what_the_tests_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
