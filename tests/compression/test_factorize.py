"""A whole model: which layers become pairs, of what rank, what is left alone and said, and training afterwards."""

import copy

import pytest
import torch
from torch import nn

from rankwise.compression import (
    LowRankConv2d,
    LowRankLinear,
    factorize_model,
    freeze_full_rank,
    rank_profile,
    uniform_ranks,
    welore_ranks,
)
from tests.spectral.planted import planted
from tests.tiny_models import Mlp, tiny_bert, tiny_gpt2, tiny_llama, token_batch

BUILDERS = {"bert": (tiny_bert, "class"), "llama": (tiny_llama, "tokens"), "gpt2": (tiny_gpt2, "tokens")}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_outputs_are_those_of_the_cut_weights(name, calibrated):
    """The factorized model against a copy of the dense one with every weight overwritten by left·right."""
    build, labels = BUILDERS[name]
    model, batch = build().eval(), token_batch(labels=labels)
    dense = copy.deepcopy(model)
    done = factorize_model(model, 0.6, calibration=[batch] if calibrated else None)
    assert done.ranks
    for layer in done.layers:
        module = model.get_submodule(layer.name)
        assert isinstance(module, LowRankLinear) == (layer.rank is not None)
        if isinstance(module, LowRankLinear):
            weight = dense.get_submodule(layer.name).weight
            transposed = type(dense.get_submodule(layer.name)).__name__ == "Conv1D"
            product = module.weight.detach()
            weight.data.copy_(product.mT if transposed else product)
    torch.testing.assert_close(model(**batch).logits, dense(**batch).logits, rtol=1e-4, atol=1e-5)


def test_shares_and_bytes_are_those_of_the_parameters():
    model = tiny_llama()
    before = sum(p.numel() for p in model.parameters())
    done = factorize_model(model, 0.5)
    after = sum(p.numel() for p in model.parameters())
    weights = sum(m * n for m, n in (layer.shape for layer in done.layers))
    assert (done.bytes_before, done.bytes_after) == (4 * before, 4 * after)
    assert done.share == pytest.approx(1 - (before - after) / weights)
    assert 0.5 - max(sum(layer.shape) for layer in done.layers) / weights < done.share <= 0.5


def test_planted_layers_are_found_low_rank_and_cut_without_error():
    model = nn.Sequential(nn.Linear(40, 40, dtype=torch.float64), nn.Tanh(), nn.Linear(40, 40, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(planted(40, 40, [3.0, 2.0, 1.0]).matrix)
        model[2].weight.copy_(planted(40, 40, torch.linspace(2, 1, 40), seed=1).matrix)
    x = torch.randn(5, 40, dtype=torch.float64)
    before = model(x)
    profile = rank_profile(model)
    first, second = profile.layers
    assert (first.rank_99, second.rank_99 > 30) == (3, True)
    assert first.stable_rank == pytest.approx(14 / 9)
    assert profile.low_rank(0.6) == ["0"]
    done = factorize_model(model, energy=1 - 1e-9)
    assert done.ranks == {"0": 3}  # the other would need all 40
    assert type(model[2]) is nn.Linear
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-10)


def test_ranks_by_name_and_one_for_all():
    model = tiny_llama()
    done = factorize_model(model, ranks={"q_proj": 4, "layers.1.self_attn.q_proj": 6, "mlp": 5})
    assert done.ranks["model.layers.0.self_attn.q_proj"] == 4
    assert done.ranks["model.layers.1.self_attn.q_proj"] == 6  # the later, narrower name
    assert done.ranks["model.layers.0.mlp.down_proj"] == 5
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
    model = Mlp()
    assert factorize_model(model, ranks=3).ranks == {"lin0": 3, "lin1": 3, "head": 3}


def test_a_rank_that_makes_nothing_smaller_leaves_the_layer_dense():
    model = Mlp()  # 20 → 24 → 24 → 4: the pairs pay up to 10, 11 and 3
    done = factorize_model(model, ranks={"lin0": 10, "lin1": 12, "head": 4})
    assert done.ranks == {"lin0": 10}
    assert [type(module) for module in (model.lin1, model.head)] == [nn.Linear, nn.Linear]


def test_a_profile_once_made_gives_the_same_model_for_every_rule():
    batch = token_batch()
    models = [tiny_bert() for _ in range(2)]
    profile = rank_profile(models[0], [batch])
    for rule in (welore_ranks, uniform_ranks):
        first, second = (copy.deepcopy(model) for model in models)
        with_profile = factorize_model(first, 0.5, calibration=[batch], profile=profile, rule=rule)
        assert with_profile.ranks == factorize_model(second, 0.5, calibration=[batch], rule=rule).ranks
        shapes = {layer.name: layer.shape for layer in profile.layers}
        for name, rank in profile.ranks(0.5, rule).items():
            assert with_profile.ranks.get(name, min(shapes[name])) == rank
        states = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)


@pytest.mark.parametrize(("calibrated", "rule"), [(False, welore_ranks), (True, uniform_ranks)])
def test_the_rule_when_none_is_given_is_the_better_one_for_such_spectra(calibrated, rule):
    calibration = [torch.randn(30, 20)] if calibrated else None
    model, other = Mlp(hidden=40), Mlp(hidden=40)
    profile = rank_profile(model, calibration)
    expected = profile.ranks(0.5, rule)
    assert profile.ranks(0.5) == expected
    assert profile.low_rank(0.5) == [layer.name for layer in profile.layers if expected[layer.name] < min(layer.shape)]
    other.load_state_dict(model.state_dict())
    done, explicit = (
        factorize_model(m, 0.5, calibration=calibration, profile=profile, **options)
        for m, options in ((model, {}), (other, {"rule": rule}))
    )
    assert done.ranks == explicit.ranks


def test_a_layer_too_small_for_its_share_does_not_fail_the_rest():
    model = Mlp(d_out=1)  # rank 1 of the last layer is no smaller than the layer
    x = torch.randn(30, 20)
    with pytest.raises(ValueError, match="less than rank 1"):
        factorize_model(model, 0.5, calibration=[x], rule=uniform_ranks)
    done = factorize_model(model, 0.5, calibration=[x])
    assert list(done.ranks) == ["lin0", "lin1"]
    assert done.share <= 0.5


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_generator_of_batches_serves_the_spectra_and_the_pairs(calibrated):
    x = torch.randn(12, 20)
    models = [Mlp(), Mlp()]
    models[1].load_state_dict(models[0].state_dict())
    for model, calibration in zip(models, (x.split(4), (part for part in x.split(4))), strict=True):
        profile = rank_profile(model, list(x.split(4))) if calibrated else None
        factorize_model(model, 0.5, calibration=calibration, profile=profile)
    states = zip(*(model.state_dict().values() for model in models), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_progress_counts_up_to_its_total():
    seen: list[tuple[int, int]] = []
    factorize_model(Mlp(), ranks=2, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_heads_tied_weights_grouped_convolutions_and_subclasses_are_left_alone_and_named():
    tied = tiny_llama(tie_word_embeddings=True)
    assert "tied" in factorize_model(tied, 0.5).skipped["lm_head"]
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert "output head" in factorize_model(tiny_llama(), 0.5).skipped["lm_head"]
    assert "output head" in factorize_model(tiny_bert(), 0.5).skipped["classifier"]

    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "own": Own(20, 20),
            "line": nn.Conv1d(8, 8, 3),
            "plain": nn.Linear(20, 20),
            "attention": nn.MultiheadAttention(20, 2),
        }
    )
    done = factorize_model(model, 0.5)
    assert list(done.ranks) == ["plain"]
    assert "2 groups" in done.skipped["grouped"]
    assert "subclass of nn.Linear" in done.skipped["own"]
    assert "not Conv1d" in done.skipped["line"]
    assert "subclass of nn.Linear" in done.skipped["attention.out_proj"]  # it is read, never called
    assert set(factorize_model(nn.ModuleList([model["plain"], nn.Linear(20, 20)]), 0.5).skipped.values()) == {
        "low-rank already"
    }


def test_a_head_that_is_named_is_factorized():
    model = tiny_llama()
    assert list(factorize_model(model, ranks=4, include=["lm_head"]).ranks) == ["lm_head"]
    assert model.get_output_embeddings().weight.shape == (99, 32)


def test_include_and_exclude_choose_by_name_end_or_regex():
    kept = factorize_model(tiny_llama(), ranks=4, include=["self_attn"], exclude=r".*\.1\..*")
    assert set(kept.ranks) == {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
    assert kept.skipped["model.layers.1.self_attn.q_proj"] == "named in exclude"


def test_a_layer_that_stands_at_two_places_is_one_pair_at_both():
    shared = nn.Linear(20, 20)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    done = factorize_model(model, ranks=3)
    assert len(done.layers) == 1
    assert model[0] is model[2]
    assert isinstance(model[0], LowRankLinear)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "exactly one of target"),
        ({"target": 0.5, "energy": 0.9}, "exactly one of target"),
        ({"target": 1e-4}, "rank 1 in every layer keeps"),
        ({"energy": 1.5}, r"must lie in \(0, 1\]"),
        ({"ranks": {"lin9": 3}}, "'lin9', which is no layer"),
        ({"ranks": {"lin0": 21}}, "lin0: the rank of a 24 × 20 matrix must be a whole number from 1 to 20, got 21"),
        ({"ranks": 3, "include": ["nowhere"]}, r"include=\['nowhere'\] names no layer"),
        ({"ranks": 3, "exclude": "("}, "no regular expression"),
        ({"ranks": 3, "include": []}, r"include=\[\] names no layer; leave it out"),
        ({"ranks": {}}, "ranks names no layer"),
        ({"target": True}, "must lie in"),
        ({"target": 0.5, "rule": "welore"}, "rule must be a function .*, got 'welore'"),
        ({"target": 0.5, "rule": lambda spectra, target: [1]}, "a list of 3 ranks, one for each layer; it gave 1"),
        ({"target": 0.5, "rule": lambda spectra, target: None}, "a list of 3 ranks, one for each layer; it gave None"),
        ({"target": 0.5, "rule": lambda spectra, target: [1.5] * 3}, "lin0: the rank of .* must be a whole number"),
        ({"ranks": 3, "damping": -1.0}, "damping must be a number of at least 0, got -1.0"),
        ({"ranks": 3, "damping": float("nan")}, "damping must be a number of at least 0, got nan"),
        ({"ranks": 3, "calibration": 5}, "calibration must be a list of batches.* got 5"),
        ({"ranks": 3, "calibration": "text"}, "calibration must be a list of batches.* got 'text'"),
        ({"ranks": 3, "calibration": torch.ones(2, 20)}, "got one batch, which goes into a list"),
        ({"ranks": 3, "calibration": [None]}, "a batch of the calibration data must be .* got None"),
        ({"ranks": 3, "calibration": [torch.ones(0, 20)]}, "holds no batch with a row"),
        ({"ranks": 3, "exclude": ["typo"]}, r"exclude=\['typo'\] names no layer"),
    ],
)
def test_mistakes_are_refused_before_anything_changes(options, says):
    model = Mlp()
    with pytest.raises(ValueError, match=says):
        factorize_model(model, **options)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_weights_that_cannot_be_cut_are_refused_with_their_layer():
    model = Mlp()
    with torch.no_grad():
        model.lin1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lin1: a weight of shape .* has NaN"):
        factorize_model(model, 0.5)
    tied = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head is left alone: its weight is another module's too"):
        factorize_model(tied, ranks=4, include=["lm_head"])
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        factorize_model(nn.Sequential(nn.LayerNorm(3)), 0.5)
    for empty, says in (
        (Mlp().to("meta"), "lin0 is on the meta device"),
        (nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64)), "0: its weight is complex"),
    ):
        for calibration in (None, [torch.ones(2, 20)]):
            with pytest.raises(ValueError, match=says):
                factorize_model(empty, 0.5, calibration=calibration)
    profile = rank_profile(Mlp())
    for other in (tiny_bert(), Mlp(hidden=30)):
        with pytest.raises(ValueError, match="profile is of other layers"):
            factorize_model(other, 0.5, profile=profile)
    with pytest.raises(ValueError, match="must both have calibration data"):
        factorize_model(Mlp(), 0.5, profile=profile, calibration=[torch.ones(2, 20)])


def test_quantized_models_are_refused():
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(ValueError, match="weight of 0 is quantized"):
        factorize_model(nn.Sequential(Packed()), 0.5)
    model = Mlp()
    model.is_quantized = True
    with pytest.raises(ValueError, match="the model is quantized"):
        rank_profile(model)


def test_a_model_with_adapters_is_left_alone():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    skipped = rank_profile(model).skipped
    assert "carries an adapter" in skipped["base_model.model.model.layers.0.self_attn.q_proj.base_layer"]


def test_training_and_evaluation_modes_stay():
    model = tiny_bert().train()
    model.bert.encoder.layer[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    factorize_model(model, 0.5)
    after = {name: module.training for name, module in model.named_modules()}
    assert all(after[name] == mode for name, mode in before.items())


def test_freezing_leaves_the_factors_alone_to_train():
    model = tiny_bert()
    done = factorize_model(model, ranks={"query": 4, "intermediate": 6})
    trained = freeze_full_rank(model, also=["classifier"])
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {f"{layer}.{side}" for layer in done.ranks for side in ("left", "right")}
    assert names == factors | {"classifier.weight", "classifier.bias"}
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**token_batch()).loss.backward()
    optimizer.step()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    assert all(bool(model.get_parameter(name).grad.any()) for name in factors)


def test_freezing_knows_convolutions_and_complains_of_nothing_to_train():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no low-rank layer to train"):
        freeze_full_rank(model)
    factorize_model(model, ranks={"0": 2})
    assert isinstance(model[0], LowRankConv2d)
    assert freeze_full_rank(model) == 2 * (8 + 72)
    with pytest.raises(ValueError, match=r"also=\['head'\] names no module"):
        freeze_full_rank(model, also=["head"])
    with pytest.raises(ValueError, match="'\\(' is no regular expression"):
        freeze_full_rank(model, also="(")


def test_a_bfloat16_model_is_cut_in_its_dtype():
    model, batch = tiny_llama().bfloat16().eval(), token_batch(labels="tokens")
    done = factorize_model(model, 0.6, calibration=[batch])
    assert done.ranks
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert bool(torch.isfinite(model(**batch).logits).all())


def test_the_profile_prints_and_turns_into_plain_values():
    profile = rank_profile(tiny_bert())
    lines = str(profile).splitlines()
    assert len(lines) == 1 + len(profile.layers) + len(profile.skipped)
    assert lines[-1].startswith("left alone: classifier")
    entry = profile.as_dict()["layers"][0]
    assert entry["shape"] == [32, 32]
    assert len(entry["singular_values"]) == 32
