"""Which parameters model_param_groups gives a rank: every one in exactly one group, and the right one."""

from typing import Any

import pytest
import torch
from torch import nn

from rankwise.optimizers.galore import GaLoreAdamW
from rankwise.optimizers.param_groups import model_param_groups
from tests.tiny_models import Mlp, tiny_bert, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class LanguageModel(nn.Module):
    """A plain model: nothing says where its head is, but the last layer has the shape of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.square = nn.Linear(50, 16)
        self.out = nn.Linear(16, 50, bias=False)


class Experts(nn.Module):
    """Fused experts and a router, as in transformers' mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 24, 20))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 24))
        self.table = nn.Parameter(torch.zeros(24, 20))
        self.router = nn.Linear(20, 4)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 12, 3, groups=3), nn.Conv3d(12, 12, 2),
        nn.ConvTranspose2d(12, 14, 3), nn.Conv1d(14, 14, 3), nn.LayerNorm((6, 14)), nn.Linear(14, 16),
    )  # fmt: skip


def recurrent() -> nn.Module:
    return nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "lstm": nn.LSTM(16, 16)})


def mixture() -> nn.Module:
    return nn.ModuleDict({"experts": Experts(), "square": nn.Linear(20, 20)})


def masked_lm() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
    ))  # fmt: skip


def encoder_decoder() -> nn.Module:
    """Its output layer stands beside the stacks, not on top of a body that has a name."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, tie_word_embeddings=False,
    ))  # fmt: skip


def around(model: nn.Module) -> nn.Module:
    """A wrapper that knows nothing of transformers, like DistributedDataParallel."""
    wrapper = nn.Module()
    wrapper.add_module("module", model)
    return wrapper


MODELS = {
    "bert": tiny_bert, "llama": tiny_llama, "gpt2": tiny_gpt2, "masked": masked_lm, "t5": encoder_decoder, "mlp": Mlp, "mixture": mixture,
    "conv": convolutional, "recurrent": recurrent, "wrapped": lambda: around(tiny_gpt2()), "plain": LanguageModel,
}  # fmt: skip


def projected(model: nn.Module, rank: int | None = 8, **options: Any) -> list[str]:
    return [
        name for g in model_param_groups(model, rank, **options) if g["rank"] is not None for name in g["param_names"]
    ]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_trained_parameter_is_in_one_group(make: Any) -> None:
    model = make()
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    groups = model_param_groups(model, 8)
    placed = [parameter for group in groups for parameter in group["params"]]
    wanted = [parameter for parameter in model.parameters() if parameter is not frozen]
    assert sorted(map(id, placed)) == sorted(map(id, wanted))
    named = dict(model.named_parameters())
    for group in groups:
        assert all(named[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
        if group["rank"] is not None:
            assert all(min(p.shape[0], p.numel() // p.shape[0]) > 8 for p in group["params"])


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_meta_device_gives_the_same_groups(make: Any) -> None:
    with torch.device("meta"):
        skeleton = model_param_groups(make(), 8)
    groups = model_param_groups(make(), 8)
    assert [g["param_names"] for g in skeleton] == [g["param_names"] for g in groups]
    assert [g["rank"] for g in skeleton] == [g["rank"] for g in groups]


def test_transformers_hidden_matrices_are_projected_and_no_others() -> None:
    llama = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    llama += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert projected(tiny_llama()) == [f"model.layers.{i}.{name}.weight" for i in range(2) for name in llama]
    gpt2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert projected(tiny_gpt2()) == [f"transformer.h.{i}.{name}.weight" for i in range(2) for name in gpt2]
    of_bert = projected(tiny_bert(num_labels=12))
    assert len(of_bert) == 2 * 6 + 1
    assert "bert.pooler.dense.weight" in of_bert
    assert not any("classifier" in name or "embeddings" in name for name in of_bert)
    assert not any(name.startswith("cls.") for name in projected(masked_lm()))
    of_t5 = projected(encoder_decoder())
    assert len(of_t5) == (4 + 2) + (8 + 2)
    assert not any("lm_head" in name or "shared" in name for name in of_t5)


def test_a_head_is_found_inside_wrappers() -> None:
    from peft import LoraConfig, get_peft_model

    inside = [f"module.{name}" for name in projected(tiny_llama())]
    assert projected(around(tiny_llama())) == inside
    wrapped = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    (group,) = model_param_groups(wrapped, None)
    assert any("lm_head" in name for name in group["param_names"])
    with pytest.raises(ValueError, match="no hidden matrix is larger"):  # the factors are too thin, the head is a head
        model_param_groups(wrapped, 8)


def test_a_plain_language_model_keeps_its_last_layer_of_the_tables_shape() -> None:
    assert projected(LanguageModel()) == ["square.weight"]
    assert projected(Mlp(d_out=20)) == ["lin0.weight", "lin1.weight", "head.weight"]  # nothing says it is one


def test_kernels_stacks_and_recurrent_weights() -> None:
    assert projected(convolutional(), 6) == ["0.weight", "3.weight", "4.weight", "7.weight"]
    assert projected(recurrent()) == ["attention.in_proj_weight", "attention.out_proj.weight"] + [
        f"lstm.weight_{kind}_l0" for kind in ("ih", "hh")
    ]
    assert projected(mixture()) == ["square.weight"]


def test_a_shared_matrix_is_named_once_and_by_its_least_projectable_place() -> None:
    tied = nn.ModuleDict({
        "one": nn.Linear(12, 12), "two": nn.Linear(12, 12), "table": nn.Embedding(12, 12), "last": nn.Linear(12, 3),
    })  # fmt: skip
    tied["two"].weight = tied["one"].weight
    assert projected(tied) == ["one.weight"]
    assert projected(tied, include=["two"]) == ["one.weight"]
    tied["table"].weight = tied["one"].weight
    with pytest.raises(ValueError, match="no hidden matrix"):
        projected(tied)


def test_a_matrix_needs_more_than_rank_rows_and_columns() -> None:
    model = nn.Sequential(nn.Linear(8, 30), nn.Linear(30, 9))
    assert projected(model, 8) == ["1.weight"]
    assert projected(model, 7) == ["0.weight", "1.weight"]


def test_norms_and_biases_do_not_decay_and_matrices_do() -> None:
    model = nn.ModuleDict({"experts": Experts(), "net": convolutional()})
    low, full, vectors = model_param_groups(model, 6, weight_decay=0.1)
    assert (low["weight_decay"], full["weight_decay"], vectors["weight_decay"]) == (0.1, 0.1, 0.0)
    assert {"experts.gate_up_proj_bias", "net.6.weight", "net.1.weight", "net.7.bias"} <= set(vectors["param_names"])
    assert all("bias" in name or name in ("net.6.weight", "net.1.weight") for name in vectors["param_names"])
    low, full, vectors = model_param_groups(model, 6, scale=0.25, refresh_every=7)
    assert (low["scale"], low["refresh_every"]) == (0.25, 7)
    assert set(full) == {"params", "param_names", "rank"}
    assert set(vectors) == {"params", "param_names", "rank", "weight_decay"}


def test_include_and_exclude_follow_pefts_rule() -> None:
    model = tiny_llama()
    every = projected(model)
    assert projected(model, include=["q_proj", "model.layers.1.mlp"]) == [
        name for name in every if "q_proj" in name or "layers.1.mlp" in name
    ]
    assert projected(model, include=r".*layers\.0\.self_attn\.[qk]_proj") == every[:2]
    assert projected(model, exclude=["mlp"]) == [name for name in every if "mlp" not in name]
    assert projected(model, exclude=r".*\.1\..*") == [name for name in every if ".0." in name]
    assert projected(model, include=["self_attn"], exclude=["o_proj"]) == [
        name for name in every if "self_attn" in name and "o_proj" not in name
    ]
    assert projected(Experts(), include=["table"]) == ["table"]  # a matrix of the user's own, once named


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "at least 1"),
        ({"rank": True}, "at least 1"),
        ({"rank": 4.0}, "at least 1"),
        ({"rank": 32}, "at most 32. Choose a lower rank"),
        ({"include": ["q_proj", "w_proj"]}, r"include=\['w_proj'\] matches no trainable parameter"),
        ({"include": ["roj"]}, "matches no"),
        ({"include": ".*layers"}, None),
        ({"include": "layers"}, "matches no"),
        ({"exclude": ["head"]}, "matches no"),
        ({"include": "*q_proj"}, "no regular expression"),
        ({"include": ["embed_tokens"]}, "kind: embedding"),
        ({"include": ["lm_head", "norm"]}, "kind: norm or bias and output head"),
        ({"exclude": ["layers"]}, "leaves no hidden matrix"),
        ({"include": 5}, "include must be a regular expression or a list of names, got 5"),
        ({"exclude": [5]}, "exclude must be a regular expression or a list"),
        ({"weight_decay": float("nan")}, "weight_decay cannot be negative and must be a finite number"),
    ],
)
def test_a_wrong_choice_is_explained(options: dict[str, Any], says: str | None) -> None:
    rank = options.pop("rank", 8)
    if says is None:
        assert len(projected(tiny_llama(), rank, **options)) == 14
        return
    with pytest.raises(ValueError, match=says):
        model_param_groups(tiny_llama(), rank, **options)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a model, a torch\.nn\.Module, got list"):
        model_param_groups([1], 8)  # type: ignore[arg-type]


def test_a_model_with_nothing_to_train_or_to_project_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        model_param_groups(Mlp().requires_grad_(False), 8)
    with pytest.raises(ValueError, match="no hidden matrix that could be projected"):
        model_param_groups(nn.Embedding(9, 9), 2)
    (group,) = model_param_groups(nn.Embedding(9, 9), None)
    assert group["rank"] is None


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_galore_projects_what_has_a_rank(make: Any) -> None:
    model = make()
    groups = model_param_groups(model, 8, scale=0.5)
    optimizer = GaLoreAdamW(groups, lr=0.1, weight_decay=0.3)
    for group in optimizer.param_groups:
        assert all(optimizer.is_projected(p) == (group["rank"] == 8) for p in group["params"])
        assert group["scale"] == (0.5 if group["rank"] else 1.0)
    assert optimizer.param_groups[-1]["weight_decay"] == (0.0 if len(groups) > 1 else 0.3)
