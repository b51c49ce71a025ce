"""Queries alone, keys and values together, as latent attention has them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rankwise.compression import LowRankLinear, factorize_key_value, factorize_query
from tests.tiny_models import Mlp, tiny_bert, tiny_gpt2, tiny_llama, token_batch


def projections(model: nn.Module, names: tuple[str, ...]) -> list[list[Any]]:
    """The modules of these names, attention by attention."""
    columns = [[m for n, m in model.named_modules() if n.split(".")[-1] == name] for name in names]
    return [list(row) for row in zip(*columns, strict=True)]


def rows_into(model: nn.Module, module: nn.Module, batch: dict) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("build", "names", "labels"),
    [(tiny_bert, ("key", "value"), "class"), (tiny_llama, ("k_proj", "v_proj"), "tokens")],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_keys_and_values_are_the_best_pair_with_one_latent(build, names, labels, calibrated):
    """Against the truncated SVD of the stacked matrices; with data, in the norm of what comes out."""
    model, batch = build().eval(), token_batch(rows=8, labels=labels)
    dense = copy.deepcopy(model)
    done = factorize_key_value(model, 6, calibration=[batch] if calibrated else None, damping=0.0)
    assert [layer.rank for layer in done.layers] == [6, 6]
    for (key, value), (old_key, old_value) in zip(projections(model, names), projections(dense, names), strict=True):
        assert isinstance(key, LowRankLinear)
        assert key.right is value.right
        assert key.right.shape == (6, 32)
        W = torch.cat([old_key.weight, old_value.weight]).detach().double()
        cut = torch.cat([key.weight, value.weight]).detach().double()
        X = rows_into(dense, old_key, batch).double() if calibrated else torch.eye(32, dtype=torch.float64)
        S = torch.linalg.svdvals(W @ X.mT)
        torch.testing.assert_close(((W - cut) @ X.mT).norm(), S[6:].norm(), rtol=1e-3, atol=1e-5)
        if key.bias is not None:
            assert torch.equal(key.bias, old_key.bias)
            assert torch.equal(value.bias, old_value.bias)
    assert bool(torch.isfinite(model(**batch).logits).all())


@pytest.mark.parametrize(("build", "name"), [(tiny_bert, "query"), (tiny_llama, "q_proj")])
def test_queries_alone_are_cut(build, name):
    model = build()
    done = factorize_query(model, 5)
    assert set(done.ranks.values()) == {5}
    assert all(layer.endswith(name) for layer in done.ranks)
    low_rank = {n.split(".")[-1] for n, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert low_rank == {name}


def test_one_after_the_other_gives_latent_attention_that_still_generates():
    model = tiny_llama(eos_token_id=0, pad_token_id=2).eval()
    factorize_query(model, 6)
    factorize_key_value(model, 6)
    ids = token_batch()["input_ids"][:1]
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    for length in range(ids.shape[1], generated.shape[1]):  # with the cache as without it
        assert int(model(generated[:, :length]).logits[0, -1].argmax()) == int(generated[0, length])


def test_the_latent_is_one_parameter_that_is_trained_by_both():
    model = tiny_llama()
    before = sum(p.numel() for p in model.parameters())
    done = factorize_key_value(model, 6)
    assert sum(p.numel() for p in model.parameters()) == before - 2 * (32 * 32 - 6 * (32 + 32))
    assert done.bytes_after == 4 * sum(p.numel() for p in model.parameters())
    model(**token_batch(labels="tokens")).loss.backward()
    attention = model.model.layers[0].self_attn
    right = attention.k_proj.right
    assert bool(right.grad.any())
    moved = model.to(torch.float64).model.layers[0].self_attn
    assert moved.k_proj.right is moved.v_proj.right


def test_what_has_no_such_projections_is_refused():
    with pytest.raises(ValueError, match=r"in one matrix \(c_attn\)"):
        factorize_query(tiny_gpt2(), 4)
    with pytest.raises(ValueError, match=r"in one matrix \(c_attn\)"):
        factorize_key_value(tiny_gpt2(), 4)
    with pytest.raises(ValueError, match="no attention with linear projections"):
        factorize_key_value(Mlp(), 4)
    with pytest.raises(ValueError, match="rank 16 makes a 32 × 32 matrix no smaller; the highest that does is 15"):
        factorize_query(tiny_llama(), 16)
    with pytest.raises(ValueError, match=r"k_proj and .*v_proj together: rank 16 makes a 32 × 32 matrix no smaller"):
        factorize_key_value(tiny_llama(), 16)
    model = tiny_llama()
    factorize_key_value(model, 6)
    with pytest.raises(ValueError, match="low-rank already"):
        factorize_key_value(model, 6)
