"""HiP: the tree search against a plain one, its cost, what it finds and what it cannot, decoding."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparse_core import counters
from sparse_core.attention.kv_cache import KVCache
from sparse_core.methods.attention.hip import Config, HiPAttention, Search, hip_mask


def draw(tq, tk, heads=(2, 1), width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, h, t, width, generator=generator)
        for h, t in zip((*heads, heads[1]), (tq, tk, tk), strict=True)
    ]


def plain_tree(q, k, rows, blocks, config):
    """Key blocks that the paper's loop keeps for one head and one query block: q [Tq, D], k [Tk, D], `rows` of q."""
    m, bk, shift = config.budget // config.block_k, config.block_k, len(k) - len(q)
    nodes = [(i * blocks // m, (i + 1) * blocks // m) for i in range(m)]
    while max(high - low for low, high in nodes) > 1:
        halves = []
        for low, high in nodes:
            middle = (low + high + 1) // 2
            halves += [(low, middle), (middle, high)]
        scored = []
        for order, (low, high) in enumerate(halves):
            if high <= low:
                continue
            rep, best = low + (high - low) // 2, -math.inf
            for i in rows:
                for j in range(rep * bk, min(len(k), rep * bk + bk)):
                    if not config.causal or i + shift >= j:
                        best = max(best, float(q[i] @ k[j]))
            scored.append((-best, order, (low, high)))
        nodes = [node for _, _, node in sorted(sorted(scored)[:m], key=lambda entry: entry[1])]
    return {low for low, high in nodes if high > low}


@pytest.mark.parametrize(("causal", "q_stride"), [(True, 1), (True, 2), (False, 1)])
def test_the_search_is_the_papers(causal, q_stride):
    q, k, _ = draw(75, 75)
    config = Config(budget=16, block_q=8, block_k=2, window=0, sink=0, causal=causal, q_stride=q_stride)
    mask = hip_mask(q, k, **vars(config)).blocks
    for head in range(2):
        for block in range(10):
            rows = list(range(block * 8, min(75, block * 8 + 8)))
            end = rows[-1] + 1 if causal else 75
            found = plain_tree(q[0, head], k[0, 0], rows[::q_stride], math.ceil(end / 2), config)
            own = {j for j in range(38) if j * 2 + 2 > block * 8 and j * 2 < block * 8 + 8}  # on the diagonal
            assert set(mask[0, head, block].nonzero().flatten().tolist()) - own == found - own


@pytest.mark.parametrize("causal", [True, False])
def test_a_budget_of_everything_is_dense_attention(causal):
    q, k, v = draw(50, 50)
    attention = HiPAttention(Config(budget=64, block_q=16, window=0, sink=0, causal=causal))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v), exact, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("tq", [1, 33, 60])
def test_queries_may_be_the_last_of_the_keys(tq):
    q, k, v = draw(60, 60)
    config = Config(budget=64, block_q=16, window=8, sink=2)
    whole = HiPAttention(config)(q, k, v)
    last = HiPAttention(config)(q[:, :, -tq:], k, v)
    torch.testing.assert_close(last, whole[:, :, -tq:], atol=2e-6, rtol=1e-5)


def test_nothing_of_the_future_is_seen_and_the_window_and_sink_always_are():
    q, k, _ = draw(90, 90)
    tokens = hip_mask(q, k, budget=8, block_q=8, window=10, sink=3).to_token_mask()
    i, j = torch.arange(90)[:, None], torch.arange(90)
    assert not (tokens & (j > i)).any()
    assert tokens[..., (j <= i) & (j > i - 10)].all()
    assert tokens[..., (j <= i) & (j < 3)].all()


def test_the_search_costs_what_the_tree_costs_and_no_scan():
    length, budget = 2048, 32
    q, k, _ = draw(length, length, heads=(1, 1))
    with counters.count() as counter:
        hip_mask(q, k, budget=budget, window=0, sink=0)
    limit = sum(2 * budget * math.ceil(math.log2(max(1, (i + 1) / budget)) + 1) for i in range(length))
    assert 0 < counter.products <= limit
    assert counter.products < length * length / 4


def test_a_block_that_stands_alone_is_looked_at_once():
    length, budget = 1300, 64  # 10 to 20 blocks per node: halving splits them unevenly
    q, k, _ = draw(length // 2, length, heads=(1, 1))
    with counters.count() as counter:
        hip_mask(q, k, budget=budget, block_q=1, window=0, sink=0)
    ends = torch.arange(length - length // 2, length) + 1
    assert counter.products <= 1.05 * float((2 * budget * (ends / budget).log2()).sum())


@pytest.mark.parametrize("config", [{}, {"causal": False}, {"q_stride": 2}, {"block_q": 1}])
def test_what_is_counted_is_what_is_multiplied(config):
    q, k, _ = draw(1000, 1000)
    with counters.count() as counter, FlopCounterMode(display=False) as meter:
        hip_mask(q, k, **{"budget": 64, "window": 0, "sink": 0, **config})
    assert meter.get_total_flops() == 2 * counter.multiply_adds == 2 * 8 * counter.products > 0


def test_rows_of_a_block_choose_together_which_leaks_unless_each_row_is_a_block():
    changed = {}
    for block_q in (16, 1):
        q, k, _ = draw(100, 100)
        config = {"budget": 16, "block_q": block_q, "window": 0, "sink": 0}
        before = hip_mask(q, k, **config).to_token_mask()
        q[:, :, 60:] += 3
        changed[block_q] = (hip_mask(q, k, **config).to_token_mask() != before).any(-1)[0, 0]
    assert changed[16][48:60].any()
    assert not changed[16][:48].any()
    assert not changed[1][:60].any()


def test_the_first_layers_attend_to_everything():
    q, k, v = draw(50, 50)
    config = Config(budget=4, block_q=16, window=2, sink=0, dense_layers=2)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    cache = KVCache(1, 1, 8)
    cache.append(k, v)
    for layer in (1, 2, None):
        attention = HiPAttention(config, layer=layer)
        for out, wanted in (
            (attention(q, k, v), exact),
            (attention.decode(q[:, :, -1:], cache, Search()), exact[:, :, -1:]),
        ):
            assert torch.allclose(out, wanted, atol=1e-5) == (layer == 1)


@pytest.mark.parametrize("causal", [True, False])
def test_a_batch_of_none_is_none(causal):
    q, k, v = (x[:0].requires_grad_() for x in draw(40, 40))
    out = HiPAttention(Config(budget=8, window=4, causal=causal))(q, k, v)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape


def test_of_equal_scores_the_earlier_blocks_are_kept_every_time():
    q, k, _ = (torch.zeros_like(x) for x in draw(64, 64))
    config = Config(budget=8, block_q=16, block_k=2, window=0, sink=0)
    first, again = (hip_mask(q, k, **vars(config)).blocks for _ in range(2))
    assert torch.equal(first, again)
    found = plain_tree(q[0, 0], k[0, 0], range(48, 64), 32, config)
    assert set(first[0, 0, 3, :24].nonzero().flatten().tolist()) == {block for block in found if block < 24}


def autoregressive(rho, length, seed=0):
    """Keys that change slowly with rho near 1, and queries that each ask for one earlier key."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(length, 64, generator=generator)
    keys = [noise[0]]
    for step in noise[1:]:
        keys.append(rho * keys[-1] + math.sqrt(1 - rho**2) * step)
    k = torch.stack(keys)
    wanted = (torch.rand(length, generator=generator) * torch.arange(1, length + 1)).long()
    return 2 * k[wanted], k


def mass(q, k, mask, first):
    scores = (q @ k.T / 8).masked_fill(torch.ones(len(q), len(k)).triu(1).bool(), -torch.inf).softmax(-1)
    return float((scores * mask.to_token_mask()[0, 0]).sum(-1)[first:].mean())


def test_it_finds_keys_with_locality_and_cannot_find_those_without():
    found = {}
    for rho in (0.9, 0.0):
        q, k = autoregressive(rho, 1024)
        mask = hip_mask(q[None, None], k[None, None], budget=256, block_q=32, block_k=2, window=0, sink=0)
        found[rho] = mass(q, k, mask, 512)
    assert found[0.9] > 0.9
    assert found[0.0] < 0.85


def test_decoding_with_a_fresh_search_gives_the_rows_of_a_block_of_one():
    q, k, v = draw(70, 70)
    config = Config(budget=16, block_q=1, window=8, sink=2, refresh=1)
    whole, cache = HiPAttention(config)(q, k, v), KVCache(1, 1, 8)
    for t in range(70):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        row = HiPAttention(config).decode(q[:, :, t : t + 1], cache, Search())
        torch.testing.assert_close(row, whole[:, :, t : t + 1], atol=2e-6, rtol=1e-4)


def test_a_search_is_shared_by_the_steps_in_between():
    q, k, v = draw(64, 64)
    attention, state, cache = (
        HiPAttention(Config(budget=8, window=4, sink=0, refresh=3)),
        Search(),
        KVCache(1, 1, 8),
    )
    cache.append(k[:, :, :60], v[:, :, :60])
    seen = []
    for t in range(60, 64):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        attention.decode(q[:, :, t : t + 1], cache, state)
        seen.append(state.blocks)
    assert seen[0] is seen[1] is seen[2]
    assert seen[3] is not seen[2]


REFUSED = {
    "budget: expected a multiple of block_k 2, got 7": {"budget": 7},
    "block_q: expected a power of two, got 12": {"block_q": 12},
    "rep: expected 'mid' or 'first', got 'last'": {"rep": "last"},
    "window, sink, dense_layers: expected 0 or more, and q_stride, refresh at least 1": {"q_stride": 0},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_settings_are_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**REFUSED[sentence])


def test_what_does_not_fit_is_refused():
    q, k, _ = draw(20, 20)
    with pytest.raises(ValueError, match="heads: expected a multiple of the 3 key-value heads, got 2"):
        hip_mask(q, k.expand(-1, 3, -1, -1))
    with pytest.raises(
        ValueError, match="k: expected at least as many keys as the 20 queries of a causal mask, got 5"
    ):
        hip_mask(q, k[:, :, :5])
    with pytest.raises(ValueError, match="unknown option 'budgett': did you mean 'budget'"):
        hip_mask(q, k, budgett=3)
    with pytest.raises(ValueError, match="cache: expected at least one token, got none"):
        HiPAttention().decode(q[:, :, :1], KVCache(1, 1, 8), Search())
