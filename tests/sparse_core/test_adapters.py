"""Attentions of diffusers: what its processors do besides attention stays, and those that do another thing are refused."""

import copy

import pytest
import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from diffusers.models.transformers.transformer_wan import WanAttention

from sparse_core import BlockMask, sparsify

TOKENS, WIDTH, HEADS = 40, 32, 4


def full(length):
    blocks = torch.ones(-(-length // 16), -(-length // 16), dtype=torch.bool)
    return BlockMask.from_dense_blocks(blocks, block_size=16, q_len=length, kv_len=length)


def window(length):
    blocks = torch.eye(-(-length // 16), dtype=torch.bool)
    return BlockMask.from_dense_blocks(blocks, block_size=16, q_len=length, kv_len=length)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(length, width=WIDTH // HEADS):
    angle = torch.arange(length)[:, None] * torch.ones(width) * 0.3
    return angle.cos(), angle.sin()


def attention(name="AttnProcessor2_0", **options):
    torch.manual_seed(0)
    module = Attention(WIDTH, heads=HEADS, dim_head=8, **options)
    module.set_processor(getattr(processors, name)())
    return module.eval()


def fused():
    module = attention("FusedAttnProcessor2_0")
    with torch.no_grad():
        module.fuse_projections()
    return module


def allegro():
    positions = torch.arange(TOKENS)[None].expand(2, -1)
    return angles(TOKENS, 8), angles(TOKENS, 8), angles(TOKENS, 8), (positions, positions, positions)


def _allegro_call(module, x):
    *frequencies, positions = allegro()
    return module(x, image_rotary_emb=(frequencies, positions))


def _wan():
    torch.manual_seed(0)
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    return WanAttention(WIDTH, heads=HEADS, dim_head=8, processor=WanAttnProcessor()).eval()


def _flux():
    torch.manual_seed(0)
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    options = {"added_kv_proj_dim": WIDTH, "context_pre_only": False, "bias": True}
    return FluxAttention(WIDTH, heads=HEADS, dim_head=8, processor=FluxAttnProcessor(), **options).eval()


KNOWN = {
    "AttnProcessor": (lambda: attention("AttnProcessor"), lambda m, x: m(x)),
    "AttnProcessor, no scale": (lambda: attention("AttnProcessor", scale_qk=False), lambda m, x: m(x)),
    "AttnProcessor2_0": (attention, lambda m, x: m(x)),
    "AttnProcessor2_0, pictures": (
        lambda: attention(norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0),
        lambda m, x: m(x.mT.unflatten(-1, (5, 8))),
    ),
    "AttnProcessor2_0, norms": (lambda: attention(qk_norm="layer_norm"), lambda m, x: m(x)),
    "FusedAttnProcessor2_0": (fused, lambda m, x: m(x)),
    "HunyuanAttnProcessor2_0": (
        lambda: attention("HunyuanAttnProcessor2_0", qk_norm="layer_norm"),
        lambda m, x: m(x, image_rotary_emb=angles(TOKENS)),
    ),
    "AllegroAttnProcessor2_0": (
        lambda: Attention(48, heads=2, dim_head=24, processor=processors.AllegroAttnProcessor2_0()).eval(),
        lambda m, x: _allegro_call(m, torch.cat([x, x[..., :16]], -1)),
    ),
    "StableAudioAttnProcessor2_0, grouped": (
        lambda: attention("StableAudioAttnProcessor2_0", kv_heads=2),
        lambda m, x: m(x, rotary_emb=angles(TOKENS, 4)),
    ),
    "WanAttnProcessor": (
        _wan, lambda m, x: m(x, None, None, tuple(a[None, :, None] for a in angles(TOKENS))),
    ),
    "CogVideoXAttnProcessor2_0": (
        lambda: attention("CogVideoXAttnProcessor2_0", qk_norm="layer_norm"),
        lambda m, x: torch.cat(
            m(x[:, 6:], encoder_hidden_states=x[:, :6], image_rotary_emb=angles(TOKENS - 6)), 1
        ),
    ),
    "FluxAttnProcessor": (
        _flux,
        lambda m, x: torch.cat(m(x[:, 6:], encoder_hidden_states=x[:, :6], image_rotary_emb=angles(TOKENS)), 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_a_mask_of_everything_changes_nothing(name):
    make, call = KNOWN[name]
    module, x = make(), draw(2, TOKENS, WIDTH)
    with torch.no_grad():
        dense = call(module, x)
        processor = module.processor
        handle = sparsify(module, full(TOKENS))
        torch.testing.assert_close(call(module, x), dense, atol=2e-6, rtol=1e-5)
        assert module.processor is processor
        (row,) = handle.report()
        assert (row["calls"], row["tokens"], row["dense"]) == (1, TOKENS, "")
        handle.detach()
        handle = sparsify(module, window(TOKENS))
        assert not torch.allclose(call(module, x), dense, atol=1e-3)
        handle.detach()
        assert torch.equal(call(module, x), dense)


@pytest.mark.parametrize("name", ["HunyuanAttnProcessor2_0", "CogVideoXAttnProcessor2_0"])
def test_copies_attend_with_their_own_weights(name):
    make, call = KNOWN[name]
    module, x = make(), draw(2, TOKENS, WIDTH)
    sparsify(module, full(TOKENS))
    with torch.no_grad():
        expected = call(module, x)
        other = copy.deepcopy(module)
        module.to_q.weight.zero_()
        torch.testing.assert_close(call(other, x), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_module_does_the_same():
    make, call = KNOWN["HunyuanAttnProcessor2_0"]
    module, x = make(), draw(2, TOKENS, WIDTH)
    handle = sparsify(module, full(TOKENS))
    with torch.no_grad():
        expected = call(module, x)
        torch.testing.assert_close(call(torch.compile(module, backend="eager"), x), expected)
    assert handle.report()[0]["calls"] == 2


def test_what_stays_dense_is_unchanged_and_says_why():
    x, other = draw(2, TOKENS, WIDTH), draw(2, TOKENS, WIDTH, seed=1)
    module = attention("HunyuanAttnProcessor2_0", cross_attention_dim=WIDTH, qk_norm="layer_norm")
    turn = {"image_rotary_emb": angles(TOKENS)}
    calls = [
        lambda: module(x, encoder_hidden_states=other, **turn),  # as many keys as queries
        lambda: module(x, attention_mask=torch.zeros(2, 1, TOKENS), **turn),
    ]
    with torch.no_grad():
        before = [call() for call in calls]
        handle = sparsify(module, window(TOKENS))
        assert all(torch.equal(call(), was) for call, was in zip(calls, before, strict=True))
    (row,) = handle.report()
    assert (row["calls"], row["dense"]) == (0, "1 for keys of other tokens; 1 for a mask of its own")


def test_a_processor_that_is_set_later_is_looked_at_too():
    module, x = attention(), draw(2, TOKENS, WIDTH)
    handle = sparsify(module, full(TOKENS))
    other = attention("SanaLinearAttnProcessor2_0")
    module.set_processor(other.processor)
    with torch.no_grad():
        torch.testing.assert_close(module(x), other(x))
    (row,) = handle.report()
    assert (row["calls"], row["dense"]) == (
        0,
        "1 for SanaLinearAttnProcessor2_0, set later, which is not known",
    )


def test_a_processor_that_is_not_known_is_refused_by_name():
    class Mine:
        def __call__(self, attn, hidden_states, *args, **options):
            return hidden_states

    with pytest.raises(
        ValueError,
        match="module: expected a processor among AttnProcessor, .*, got SanaLinearAttnProcessor2_0; leave",
    ):
        sparsify(attention("SanaLinearAttnProcessor2_0"), "hip")
    module = attention()
    module.set_processor(Mine())
    with pytest.raises(ValueError, match=r"got .*\.Mine; leave it out of include"):
        sparsify(torch.nn.Sequential(attention(), module), "hip")
    with pytest.raises(ValueError, match="expected another processor where queries and keys have norms, got"):
        sparsify(attention("AttnProcessor", qk_norm="layer_norm"), "hip")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision_comes_out_as_it_did(dtype):
    module, x = attention(qk_norm="layer_norm").to(dtype), draw(2, TOKENS, WIDTH).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        dense = module(x)
        sparsify(module, full(TOKENS))
        out = module(x)
    assert out.dtype == dense.dtype
    torch.testing.assert_close(out, dense, atol=2e-2, rtol=2e-2)


def test_training_reaches_the_weights_of_the_model():
    module = attention(qk_norm="layer_norm").train()
    x = draw(2, TOKENS, WIDTH)
    exact = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    sparsify(module, full(TOKENS))
    ours = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
