"""Decoding over selected keys against the definition, and against dense attention over the same keys."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.masks import IndexMask
from sparse_core.kernels import dispatch
from sparse_core.kernels.gather_decode import IMPLEMENTATIONS, decode_attention
from sparse_core.kernels.label_scores import label_scores, quantise

FAST = ["numba", "gather"]
CASES = {  # B, Hq, Hkv, T, D, n, heads of the selection
    "plain": (1, 2, 2, 100, 64, 17, 2),
    "grouped": (2, 4, 2, 50, 32, 8, 4),
    "shared by the group": (2, 4, 2, 50, 32, 8, 2),
    "odd width": (1, 3, 3, 20, 40, 5, 3),
    "one key": (1, 1, 1, 9, 16, 1, 1),
    "wide": (1, 2, 1, 70, 128, 70, 1),
}


def draw(case, dtype=torch.float32):
    b, hq, hkv, length, d, n, heads = CASES[case]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(b, h, t, d, generator=generator).to(dtype)
        for h, t in ((hq, 1), (hkv, length), (hkv, length))
    )
    scores = torch.rand(b, heads, 1, length, generator=generator)
    index = IndexMask.from_topk(scores, n).index.clone()
    if n > 4:
        index[..., 3] = -1
    return q, k, v, IndexMask(index=index, kv_len=length)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_definition(case, implementation):
    q, k, v, selection = draw(case)
    ours, exact = (
        decode_attention(q, (k, v), selection, return_lse=True, implementation=name)
        for name in (implementation, "reference")
    )
    torch.testing.assert_close(ours, exact, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_attention_under_the_same_mask(case, implementation):
    q, k, v, selection = draw(case)
    mask = selection.to_token_mask().repeat_interleave(q.shape[1] // selection.index.shape[1], 1)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    ours = decode_attention(q, (k, v), selection, implementation=implementation)
    torch.testing.assert_close(ours, exact, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_was(implementation, dtype):
    q, k, v, selection = draw("plain", dtype)
    out, lse = decode_attention(q, (k, v), selection, return_lse=True, implementation=implementation)
    exact = decode_attention(q.float(), (k.float(), v.float()), selection)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_a_head_without_keys_gives_zero(implementation):
    q, k, v, selection = draw("plain")
    index = selection.index.clone()
    index[0, 1] = -1
    out, lse = decode_attention(
        q, (k, v), IndexMask(index=index, kv_len=100), return_lse=True, implementation=implementation
    )
    assert (out[0, 1] == 0).all()
    assert lse[0, 1] == -torch.inf
    assert out[0, 0].abs().sum() > 0


@pytest.mark.parametrize("implementation", FAST)
def test_keys_that_are_not_named_are_never_read(implementation):
    q, k, v, selection = draw("plain")
    named = selection.to_token_mask()[0, :, 0]
    for x in (k, v):
        x[0][~named] = torch.nan
    assert decode_attention(q, (k, v), selection, implementation=implementation).isfinite().all()


def test_the_counter_counts_the_named_keys():
    q, k, v, selection = draw("plain")
    with counters.count() as counter:
        decode_attention(q, (k, v), selection)
    assert counter.products == 2 * 16
    assert counter.kv_bytes == 2 * 2 * 16 * 64 * 4


def test_pages_name_all_their_keys():
    pages = torch.tensor([[[[2, 0, -1]]]])
    index = IndexMask.from_pages(pages, 4, 10).index
    assert index.flatten().tolist() == [8, 9, -1, -1, 0, 1, 2, 3, -1, -1, -1, -1]


def test_topk_of_keys_breaks_ties_by_order_and_leaves_out_the_impossible():
    scores = torch.tensor([0.0, 1.0, 1.0, -torch.inf])[None, None, None]
    assert IndexMask.from_topk(scores, 4).index.flatten().tolist() == [1, 2, 0, -1]
    force = torch.tensor([True, False, False, False])
    assert IndexMask.from_topk(scores, 2, force).index.flatten().tolist() == [0, 1]
    assert IndexMask.from_topk(scores, 4).density() == 0.75


@pytest.mark.parametrize("values", [3, 1000])
def test_a_selection_is_the_beginning_of_a_stable_sort(values):
    scores = torch.randint(values, (2, 3, 1, 40), generator=torch.Generator().manual_seed(0)).float()
    scores[0, 0] = -torch.inf
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    for k in (1, 7, 39, 40, 60):
        kept = order[..., :k].masked_fill(scores.gather(-1, order[..., :k]) == -torch.inf, -1)
        assert torch.equal(IndexMask.from_topk(scores, k).index, kept)


REFUSED = {
    r"q1: expected \[B, H, 1, D\], one query per head": lambda q, k, v, s: (q.repeat(1, 1, 2, 1), (k, v), s),
    "cache: expected keys .* of at least one token, got .*; prefill it first": lambda q, k, v, s: (
        q, (k[:, :, :0], v[:, :, :0]), s,
    ),
    r"cache: expected keys and values of one shape": lambda q, k, v, s: (q, (k, v[:, :, 1:]), s),
    r"cache: expected keys \[1, H, T, 64\] of which H divides 3, got": lambda q, k, v, s: (
        q[:, :1].expand(-1, 3, -1, -1), (k, v), s,
    ),
    "selection: expected one of 99 cached keys, got one of 100; select again": lambda q, k, v, s: (
        q, (k[:, :, 1:], v[:, :, 1:]), s,
    ),
    r"selection: expected indices \[1, 2 or 2, 1, n\], got": lambda q, k, v, s: (
        q, (k, v), IndexMask(index=s.index.repeat(1, 3, 1, 1), kv_len=100),
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        decode_attention(*REFUSED[sentence](*draw("plain")))


def test_an_index_past_the_end_is_refused():
    with pytest.raises(ValueError, match="index: expected keys 0 to 9, got 10"):
        IndexMask(index=torch.full((1, 1, 1, 1), 10), kv_len=10)


@pytest.mark.parametrize("implementation", ["reference", "numba", "gather"])
def test_scores_are_those_of_the_named_keys(implementation):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 1, 10, generator=generator), torch.randn(2, 2, 30, 10, generator=generator)
    index = torch.randint(-1, 30, (2, 4, 1, 7), generator=generator)
    index[0, 0] = -1
    mask = IndexMask(index=index, kv_len=30)
    index = mask.index
    out, lse, scores = decode_attention(
        q, (k, k), mask, return_lse=True, return_scores=True, implementation=implementation
    )
    near = k.repeat_interleave(2, 1).gather(2, index.clamp_min(0)[:, :, 0, :, None].expand(-1, -1, -1, 10))
    exact = (near @ q.mT)[..., 0][:, :, None] * 10**-0.5
    torch.testing.assert_close(scores, exact.masked_fill(index < 0, -torch.inf))
    torch.testing.assert_close(scores.logsumexp(-1), lse)
    assert torch.equal(out, decode_attention(q, (k, k), mask, implementation=implementation))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_a_list_may_be_shared_by_heads(implementation, heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, t, 16, generator=generator) for h, t in ((4, 1), (2, 30), (2, 30)))
    index = torch.randint(-1, 30, (2, heads, 1, 9), generator=generator)
    found = [
        decode_attention(
            q, (k, v), IndexMask(index=x, kv_len=30), return_scores=True, implementation=implementation
        )
        for x in (index, index.repeat_interleave(4 // heads, 1))
    ]
    for shared, own in zip(*found, strict=True):
        assert torch.equal(shared, own)


def test_what_runs_by_itself_follows_the_device(monkeypatch):
    chosen = {name: dispatch.choose(torch.device(name), IMPLEMENTATIONS) for name in ("cpu", "cuda", "mps")}
    assert chosen == {"cpu": "numba", "cuda": "triton", "mps": "gather"}
    monkeypatch.setattr(dispatch, "installed", lambda name: False)
    assert dispatch.choose(torch.device("cuda"), IMPLEMENTATIONS) == "gather"


def test_a_gradient_that_is_asked_for_is_given():
    q, k, v, selection = draw("grouped")
    gradients = []
    for implementation in ("auto", "reference"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = decode_attention(inputs[0], (inputs[1], inputs[2]), selection, implementation=implementation)
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    torch.testing.assert_close(*gradients, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_kernel_without_a_gradient_refuses_to_be_asked_for_one(which):
    q, k, v, selection = draw("grouped")
    inputs = [q, k, v]
    inputs[which] = inputs[which].clone().requires_grad_()
    q, k, v = inputs
    with pytest.raises(ValueError, match="q1, cache: expected none that needs a gradient for numba, got one"):
        decode_attention(q, (k, v), selection, implementation="numba")
    with torch.no_grad():
        ours = decode_attention(q, (k, v), selection, implementation="numba")
        exact = decode_attention(q, (k, v), selection, implementation="reference")
    torch.testing.assert_close(ours, exact, atol=3e-6, rtol=1e-5)


def test_decoding_needs_no_word_about_gradients():
    """A layer with weights appends, and queries outside of `torch.no_grad`; the cache keeps no graph."""
    layer = torch.nn.Linear(8, 16)
    tokens = layer(torch.randn(1, 5, 8)).unflatten(-1, (2, 8)).transpose(1, 2)
    cache = KVCache(1, 2, 8)
    cache.keep_beside("labels", lambda k, v: k[..., :2])
    cache.append(tokens, tokens)
    assert not any(x.requires_grad for x in (cache.keys, cache.values, cache.side("labels")))
    keys = IndexMask(index=torch.arange(5).expand(1, 2, 1, -1), kv_len=5)
    out = decode_attention(tokens[:, :, -1:], cache, keys)
    out.sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    scores = label_scores(tokens[:, :, -1], quantise(cache.keys))
    torch.testing.assert_close(scores, label_scores(tokens[:, :, -1].detach(), quantise(cache.keys)))


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_a_key_that_is_named_twice_counts_once(implementation):
    q, k, v, _ = draw("plain")
    twice, once = (
        IndexMask(index=torch.tensor(keys).expand(1, 2, 1, -1), kv_len=100) for keys in ([7, 3, 7, 7], [7, 3])
    )
    ours, exact = (decode_attention(q, (k, v), s, implementation=implementation) for s in (twice, once))
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_large_equal_scores_share_the_values(implementation):
    q, v = torch.ones(1, 1, 1, 64), torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    every = IndexMask(index=torch.arange(64).expand(1, 1, 1, -1), kv_len=64)
    out = decode_attention(q, (torch.full_like(v, 1e6 / 8), v), every, implementation=implementation)
    torch.testing.assert_close(out, v.mean(2, keepdim=True), atol=2e-6, rtol=1e-5)


def test_float64_is_not_rounded():
    q, k, v, selection = draw("grouped", torch.float64)
    keep = selection.to_token_mask()
    ours = decode_attention(q, (k, v), selection)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    torch.testing.assert_close(ours, exact, atol=1e-13, rtol=1e-12)


def test_triton_without_its_interpreter_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v, selection = draw("plain")
    with pytest.raises(ValueError, match="implementation: expected one for tensors on the cpu, got 'triton'"):
        decode_attention(q, (k, v), selection, implementation="triton")


def test_the_triton_kernel_agrees_in_the_interpreter():
    """Arithmetic only, and small: the interpreter needs about ten milliseconds per tile."""
    program = Path(__file__).with_name("interpreted_decode.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees:") == 37


@pytest.mark.parametrize("rows", [1, 16])
def test_the_triton_kernel_compiles_for_a_gpu(rows):
    """The interpreter forgives types that change in a loop, and sizes that no matrix unit has; the compiler does not."""
    triton = pytest.importorskip("triton")
    from sparse_core.kernels.gather_decode.triton import attend_part, merge

    half, width = triton.language.bfloat16, 40
    constants = {
        "k_token": width, "v_token": width, "width": width, "padded": 64, "rows": rows, "tile": 128, "most": 64,
        "unit": triton.language.float32 if rows == 1 else half,
    }  # fmt: skip
    if rows == 1:  # the launcher takes an argument of 1 for a constant
        constants |= dict.fromkeys(("lists", "group", "sharing"), 1)
    types = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | {"index": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(("lse", "scores", "part_out", "part_lse"), "*fp32")
    for kernel in (attend_part, merge):
        names = kernel.arg_names
        source = triton.compiler.ASTSource(
            kernel,
            {name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
            {(names.index(name),): value for name, value in constants.items() if name in names},
        )
        target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
        compiled = triton.compile(source, target=target, options={"num_stages": 1, "enable_fp_fusion": True})
        assert compiled.metadata.shared < 64 * 1024
