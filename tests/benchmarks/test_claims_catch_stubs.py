"""A claim must fail for what is not the method: dense attention by what it costs, zeros and random choices by what they
are worth. Here at sizes that take seconds, where what the method itself costs still holds and what it learns does not."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks.claims import load_claim
from sparse_core.attention.gate import BlockGate
from sparse_core.attention.masks import BlockMask, IndexMask, TokenCSR
from sparse_core.attention.masks import causal as causal_rule
from sparse_core.kernels.gather_decode import decode_attention
from sparse_core.methods.attention import minference as minference_module
from sparse_core.methods.attention import tidal as tidal_module
from sparse_core.methods.attention.minference import MInferencePrefill, Pattern
from sparse_core.methods.attention.moa import SpanAttention
from sparse_core.methods.attention.routing import RoutingAttention
from sparse_core.methods.attention.sea import SEAAttention

Patch = Callable[[pytest.MonkeyPatch, Any], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """sizes: constants of the claim; stubs: what takes the method's place, and the condition that it must fail; holds: the
    conditions that the method itself meets at these sizes."""

    sizes: dict[str, Any] = field(default_factory=dict)
    stubs: dict[str, tuple[Patch, str]]
    holds: tuple[str, ...]


def set_in_claim(**names: Any) -> Patch:
    def patch(monkeypatch, claim):
        for name, value in names.items():
            monkeypatch.setattr(claim, name, value)

    return patch


def set_in(owner: Any, name: str, value: Any) -> Patch:
    return lambda monkeypatch, claim: monkeypatch.setattr(owner, name, value)


def all_blocks(q, k, block_size=(32, 2), keep=1.0):
    """A mask of every block, or of a random share of them."""
    blocks = [-(-x.shape[2] // size) for x, size in zip((q, k), block_size, strict=True)]
    kept = torch.rand(*q.shape[:2], *blocks, generator=torch.Generator().manual_seed(0)) < keep
    return BlockMask.from_dense_blocks(kept, block_size=block_size, q_len=q.shape[2], kv_len=k.shape[2])


def scan(q, k, **_):
    """Scores of all pairs, and then a mask of a few."""
    assert (q @ k.mT).shape[-1] == k.shape[2]
    return all_blocks(q, k, keep=0.125)


def dense(q, k, v, *_, **__):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def zeros(*arguments, **_):
    """As large as the queries, and with their graph."""
    return 0 * next(x for x in arguments if isinstance(x, torch.Tensor))


def mean_pooled(q, k, v, variant, segment):
    """A Longformer whose global tokens are the means of earlier segments."""
    near, far = torch.arange(q.shape[2]), torch.arange(q.shape[2] // segment)
    own = near[:, None] // segment
    means = [x.unflatten(2, (-1, segment)).mean(3) for x in (k, v)]
    scores = torch.cat([q @ k.mT, q @ means[0].mT], -1) * q.shape[-1] ** -0.5
    seen = torch.cat([(near <= near[:, None]) & (near // segment == own), far < own], -1)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ torch.cat([v, means[1]], 2)


def everything_decoded(q1, cache, *_):
    index = torch.arange(cache.shape[2]).expand(*q1.shape[:2], 1, -1)
    return decode_attention(q1, cache, IndexMask(index=index, kv_len=cache.shape[2]))


def tidal_of_zeros(*arguments, **options):
    out = decode_attention(*arguments, **options)
    return (0 * out[0], *out[1:]) if isinstance(out, tuple) else 0 * out


def tidal_is_dense(monkeypatch, claim):
    real = tidal_module.TidalState.attend

    def attend(state, layer, q1, cache):
        chosen = real(state, layer, q1, cache)
        return chosen if layer in state.schedule.select else tidal_module.attend_to_all(q1, cache)[0]

    monkeypatch.setattr(tidal_module.TidalState, "attend", attend)


def cells(of: Callable[[torch.Tensor], torch.Tensor]) -> Patch:
    """SEA's choice of cells by another rule than its scores."""

    def choose(layer, scores, seen):
        return TokenCSR.from_cells(of(scores), seen, scores.shape[2])

    return set_in(SEAAttention, "choose", choose)


def random_quarter(scores):
    return torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)) < 0.25


def gate_of(keep: float) -> Patch:
    """A gate that keeps all blocks, or some at random."""

    def to_mask(gate, logits, length, **_):
        some = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) < keep
        return BlockMask.from_dense_blocks(
            some.tril(), rule=causal_rule, block_size=gate.block, q_len=length, kv_len=length
        )

    return set_in(BlockGate, "to_mask", to_mask)


def minference_is_dense(monkeypatch, claim):
    def everything(q, k, patterns, config):
        whole = [Pattern("a_shape", (q.shape[2], q.shape[2]))] * q.shape[1]
        return real(q, k, whole, config)

    real = minference_module.pattern_mask
    monkeypatch.setattr(MInferencePrefill, "mask", lambda layer, q, k, v: everything(q, k, (), layer.config))
    monkeypatch.setattr(claim, "pattern_mask", everything)


def random_columns(q, k, n_v, n_s, *_, **__):
    draws = torch.rand(*q.shape[:2], k.shape[2], generator=torch.Generator().manual_seed(0))
    found = draws.argsort(-1)
    return found[..., :n_v], found[..., :n_s]


def spans_are_dense(layer, q, k, v):
    return BlockMask.from_rule(causal_rule, q_len=q.shape[2], kv_len=k.shape[2], block_size=16)


def everybody_in_every_cluster(monkeypatch, claim):
    def begin(generator, seed):
        attention = RoutingAttention(1, claim.WIDTH, claim.CLUSTERS, claim.TOKENS, local_heads=0, decay=0.9)
        attention.init_centroids(torch.randn(1, 1, claim.TOKENS, claim.WIDTH, generator=generator))
        return attention

    monkeypatch.setattr(claim, "_begin", begin)


CASES = {
    "combiner": Case(
        sizes={"STEPS": 1, "TESTED": 8},
        stubs={
            "dense": (set_in_claim(combiner_attention=dense), "multiplies little"),
            "zeros": (set_in_claim(combiner_attention=zeros), "is its formula"),
            "means": (set_in_claim(combiner_attention=mean_pooled), "is its formula"),
        },
        holds=("multiplies little", "is its formula"),
    ),
    "double_sparsity": Case(
        sizes={"LENGTH": 1024, "LONG": 256, "QUERIES": 4, "REPEATS": 1},
        stubs={
            "dense": (set_in_claim(double_sparse_decode=everything_decoded), "bytes"),
            "zeros": (set_in_claim(double_sparse_decode=zeros), "outputs"),
        },
        holds=("bytes", "outputs", "above random channels", "four bits"),
    ),
    "hip": Case(
        sizes={"LENGTH": 2048, "BUDGET": 256, "FIRST": 1024},
        stubs={
            "dense": (set_in_claim(hip_mask=lambda q, k, **_: all_blocks(q, k)), "keeps the budget"),
            "random": (
                set_in_claim(hip_mask=lambda q, k, **_: all_blocks(q, k, keep=0.125)),
                "finds keys with locality",
            ),
            "scan": (set_in_claim(hip_mask=scan), "multiplies as a tree"),
        },
        holds=("keeps the budget", "finds keys with locality", "multiplies as a tree", "misses keys without"),
    ),
    "minference": Case(
        sizes={"LENGTH": 2048, "COLUMNS": 25, "BUDGET": 0.3 * 4 * 64 * 2048 * 2049 / 2},
        stubs={
            "dense": (minference_is_dense, "FLOPs"),
            "zeros": (set_in(MInferencePrefill, "attend", lambda layer, q, k, v, mask: 0 * q), "outputs"),
            "random": (
                lambda monkeypatch, claim: [
                    monkeypatch.setattr(owner, "vertical_slash_index", random_columns)
                    for owner in (claim, minference_module)
                ],
                "columns",
            ),
        },
        holds=("FLOPs", "outputs", "columns"),
    ),
    "moa": Case(
        sizes={
            "removal_error": lambda seed: 0.0,
            "rank_agreement": lambda seed: (1.0, 0.0),
            "optimality_gap": lambda seed, most: 0.0,
        },
        stubs={
            "dense": (set_in(SpanAttention, "mask", spans_are_dense), "density"),
            "zeros": (
                set_in(SpanAttention, "attend", lambda layer, q, k, v, mask: 0 * (q + k + v)),
                "equal spans do not",
            ),
        },
        holds=("density", "planned spans know", "equal spans do not"),
    ),
    "routing": Case(
        sizes={"STEPS": 8, "CONTROLS": 1, "ROWS": 4096, "take_turns": lambda runs, repeats: dict.fromkeys(runs, 1.0)},
        stubs={
            "dense": (everybody_in_every_cluster, "products"),
            "zeros": (set_in(RoutingAttention, "attend", lambda layer, q, k, v, mask: 0 * q), "outputs"),
            "no update": (
                set_in(RoutingAttention, "update_centroids", lambda layer: None),
                "above random centroids",
            ),
        },
        holds=("products", "bytes", "outputs", "above random centroids"),
    ),
    "s2": Case(
        sizes={"STEPS": 1, "BATCH": 1, "TESTED": 2, "LONG": 4096, "REPEATS": 1},
        stubs={
            "dense": (
                set_in_claim(
                    local_stride_mask=lambda heads, length, **_: BlockMask.from_rule(
                        causal_rule, q_len=length, kv_len=length, block_size=16
                    )
                ),
                "shards are no denser",
            ),
            "zeros": (set_in_claim(block_sparse_attention=zeros), "shards copy"),
        },
        holds=("shards are no denser",),
    ),
    "sea": Case(
        sizes={"STEPS": 1, "TESTS": 1, "LENGTH": 64, "CELLS": 16, "KEYS": 16, "RUN": 4},
        stubs={
            "dense": (cells(lambda scores: torch.ones_like(scores, dtype=torch.bool)), "a quarter of the keys"),
            "random": (cells(random_quarter), "mass"),
        },
        holds=("a quarter of the keys", "gradients"),
    ),
    "seer": Case(
        sizes={"STEPS": 1, "BATCH": 1, "TOKENS": 512},
        stubs={"dense": (gate_of(1.0), "blocks"), "random": (gate_of(0.4), "near the best")},
        holds=("blocks", "pooled attention", "weights unchanged"),
    ),
    "tidal": Case(
        sizes={"LENGTH": 1024, "TOPK": 64, "LOGIT": 8.0},
        stubs={
            "dense": (tidal_is_dense, "bytes"),
            "zeros": (set_in(tidal_module, "decode_attention", tidal_of_zeros), "outputs"),
        },
        holds=("bytes", "outputs", "mass in A", "mass in B", "positions are reused"),
    ),
}  # fmt: skip
PAIRS = [(name, stub) for name, case in CASES.items() for stub in case.stubs]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(monkeypatch, name):
    claim = load_claim(f"attention/{name}")
    set_in_claim(**CASES[name].sizes)(monkeypatch, claim)
    return claim


@pytest.mark.parametrize("name", CASES)
def test_the_method_meets_what_needs_no_learning(monkeypatch, name):
    conditions = small(monkeypatch, name).measure(0).conditions
    assert {each: conditions[each] for each in CASES[name].holds} == dict.fromkeys(CASES[name].holds, True)


@pytest.mark.parametrize(("name", "stub"), PAIRS)
def test_a_stub_fails_the_claim(monkeypatch, name, stub):
    claim = small(monkeypatch, name)
    patch, condition = CASES[name].stubs[stub]
    patch(monkeypatch, claim)
    trial = claim.measure(0)
    assert not trial.conditions[condition]
    assert not trial.passed


def test_every_claim_has_a_dense_stub_and_a_worthless_one():
    from benchmarks.claims import list_claims

    assert [f"attention/{name}" for name in CASES] == list_claims()
    for case in CASES.values():
        assert "dense" in case.stubs
        assert {"zeros", "random"} & set(case.stubs)
