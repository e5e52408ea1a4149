"""What holds for every attention method alike."""

import copy
import json
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sparse_core import counters, get_method, list_methods, registry
from sparse_core.attention.slot import AttentionSlot
from sparse_core.methods.attention.routing import RoutingMask
from sparse_core.sparsify import make_layer, sparsify

HERE = Path(__file__)
contract = runpy.run_path(str(HERE.with_name("contract.py")))
LAYERS, OPTIONS, draw, build = (contract[name] for name in ("LAYERS", "OPTIONS", "draw", "build"))
MASKED = [
    name for name in LAYERS if name != "attention/combiner"
]  # which keeps every pair, far ones by summaries
STATIC = {"attention/moa", "attention/s2"}  # whose masks know nothing of the tokens


def test_ten_papers_and_every_one_that_serves_whole_sequences_is_tested_here():
    assert len(list_methods()) == 10
    assert [name for name in list_methods() if get_method(name).layer is not None] == LAYERS
    assert [name for name in list_methods() if get_method(name).kind == "decode"] == [
        "attention/double_sparsity",
        "attention/tidal",
    ]


@pytest.mark.parametrize("name", list_methods())
def test_a_config_goes_to_json_and_back(name):
    method = registry.get_method(name)
    config = method.config(**OPTIONS.get(name, {}))
    data = {
        key: tuple(x) if isinstance(x, list) else x
        for key, x in json.loads(json.dumps(asdict(config))).items()
    }
    assert method.config(**data) == config
    assert method.paper.count(".") == 1


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("length", [5, 16, 37, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_any_length_both_ways_and_the_same_twice(name, length, causal):
    layer, tokens = build(name, causal=causal), draw(length)
    out = layer(*tokens)
    assert out.shape == tokens[0].shape
    assert out.isfinite().all()
    assert torch.equal(layer(*tokens), out)
    assert torch.equal(build(name, causal=causal)(*tokens), out)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_batch_of_none_is_none(name, causal):
    tokens = [x.requires_grad_() for x in draw(37, batch=0)]
    out = build(name, causal=causal)(*tokens)
    out.sum().backward()
    assert out.shape == tokens[0].shape
    assert all(x.grad.shape == x.shape for x in tokens)


@pytest.mark.parametrize("name", list_methods())
def test_a_method_is_made_by_its_name_and_options(name):
    made = registry.make_attention(name, heads=4, width=16, **OPTIONS.get(name, {}))
    layer = registry.get_method(name).layer
    if layer is None:
        assert isinstance(made, type(registry.get_method(name).make(registry.get_method(name).config())))
        return
    made.train()(*draw(64, seed=9))
    out = made.eval()(*draw(37))
    assert out.shape == (2, 4, 37, 16)
    assert out.isfinite().all()


def test_an_option_that_is_none_names_the_closest():
    with pytest.raises(ValueError, match="unknown option 'bugdet': did you mean 'budget'"):
        registry.make_attention("attention/hip", bugdet=3)


@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_comes_back_as_it_came(name):
    layer = build(name)
    out = layer(*draw(37, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_queries_keys_and_values(name):
    tokens = [x.requires_grad_() for x in draw(37)]
    build(name)(*tokens).square().sum().backward()
    for x in tokens:
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_serves_other_tokens(name, causal):
    """What it gives them is dense attention under the pairs of the mask, wherever it came from."""
    plain = {"scaler": False} if name == "attention/sea" else {}  # its gates read the tokens at hand
    layer, (q, k, v) = build(name, causal=causal, **plain), draw(37, seed=1)
    mask = layer.mask(*draw(37))
    again = layer.attend(q, k, v, mask)
    torch.testing.assert_close(again, dense(q, k, v, mask), atol=2e-5, rtol=1e-4)
    own = layer.attend(q, k, v, layer.mask(q, k, v))
    assert torch.allclose(again, own, atol=1e-3) == (name in STATIC)


def dense(q, k, v, mask):
    """Dense attention under a mask; of clusters, the mean over those in which a query sees a key."""
    if isinstance(mask, RoutingMask):
        near, far = (
            [x[:, heads] for x in (q, k, v)]
            for heads in (slice(mask.local_heads), slice(mask.local_heads, None))
        )
        each = mask.routed.to_token_masks().unbind(2)
        total = sum(masked(*far, kept) for kept in each)
        times = sum(kept.any(-1, keepdim=True) for kept in each)
        return torch.cat([masked(*near, mask.local.to_token_mask()), total / times.clamp_min(1)], 1)
    return masked(q, k, v, mask.to_token_mask())


def masked(q, k, v, kept):
    some = kept.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept | ~some) * some


@pytest.mark.parametrize("name", MASKED)
def test_causal_masks_look_at_no_later_token(name):
    layer = build(name, causal=True)
    assert not layer.mask(*draw(37)).to_token_mask().triu(1).any()


@pytest.mark.parametrize("name", [name for name in MASKED if name not in ("attention/seer", "attention/sea")])
def test_attending_costs_what_the_mask_keeps(name):
    layer, (q, k, v) = build(name), draw(64)
    mask = layer.mask(q, k, v)
    with counters.count() as cost:
        layer.attend(q, k, v, mask)
    dense = 2 * 4 * 64 * 64
    assert 0 < cost.products < 0.8 * dense
    assert cost.multiply_adds >= 2 * 16 * cost.products * 0.99


@pytest.mark.parametrize("name", LAYERS)
def test_attaching_and_detaching_leave_the_model_as_it_was(name):
    slot = AttentionSlot(4, 16)
    untouched, tokens = copy.deepcopy(slot), draw(37)
    handle = sparsify(slot, name, **OPTIONS[name])
    if name == "attention/routing":
        slot.train()(*tokens)
    slot.eval()(*tokens)
    assert handle.report()[0]["calls"] > 0
    handle.detach()
    assert torch.equal(slot(*tokens), untouched(*tokens))
    assert list(slot.state_dict()) == list(untouched.state_dict())


@pytest.mark.parametrize("name", LAYERS)
def test_options_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected options among .*, got colour"):
        make_layer(name, 4, 4, 16, colour="red")


def test_implementations_agree_on_the_masks_that_methods_make():
    program = HERE.with_name("agreement.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    agreed = [line for line in done.stdout.splitlines() if line.startswith("agrees:")]
    assert len(agreed) == 2 * len(MASKED) + 2 + 2, done.stdout  # two decoders; routing has two masks
    for name in (*MASKED, "attention/tidal", "attention/double_sparsity"):
        assert any(f" {name} " in line for line in agreed), name
    assert sum("reference, numba, gather, triton, flex" in line for line in agreed) == 8
