"""Double Sparsity: calibration, four-bit labels, what is chosen and read, plans on disk."""

import re
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.layer import DenseAttention
from sparse_core.attention.masks import IndexMask
from sparse_core.kernels.label_scores import dequantise, quantise
from sparse_core.methods.attention.double_sparsity import (
    ChannelPlan,
    Config,
    DoubleSparseCache,
    DoubleSparsity,
    Prefetch,
    calibrate_channels,
    double_sparse_decode,
)

LENGTH, WIDTH = 512, 64


def draw(heads=4, kv_heads=4, length=LENGTH, seed=0):
    """Queries and keys of which some channels are much larger than others, and values."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(1.2 * torch.randn(kv_heads, 1, WIDTH, generator=torch.Generator().manual_seed(99)))
    q, k, v = (torch.randn(1, h, length, WIDTH, generator=generator) for h in (heads, kv_heads, kv_heads))
    return q * scale.repeat_interleave(heads // kv_heads, 0), k * scale, v


def fill(plan, k, v, **options):
    cache = DoubleSparseCache(plan, **options)
    cache.append(k[:, :, :300], v[:, :, :300])
    for t in range(300, k.shape[2], 50):
        cache.append(k[:, :, t : t + 50], v[:, :, t : t + 50])
    return cache


def mass(q1, k, selection):
    group = q1.shape[1] // k.shape[1]
    weights = (q1 @ k.repeat_interleave(group, 1).mT * WIDTH**-0.5).softmax(-1)
    return float((weights * selection.to_token_mask()).sum(-1).mean())


def test_the_channels_are_those_of_the_largest_mean_product():
    q, k, _ = draw()
    expected = (q * k).abs().mean((0, 2)).sort(dim=-1, descending=True).indices[:, :5]
    halves = [(q[:, :, :200], k[:, :, :200]), (q[:, :, 200:], k[:, :, 200:])]
    assert torch.equal(calibrate_channels(halves, 5).channels, expected)


def test_heads_that_share_keys_share_channels():
    q, k, _ = draw(heads=4, kv_heads=2)
    importance = (q * k.repeat_interleave(2, 1)).abs().sum((0, 2)).unflatten(0, (2, 2)).sum(1)
    plan = calibrate_channels([(q, k)], 6)
    assert torch.equal(plan.channels, importance.sort(dim=-1, descending=True).indices[:, :6])


@pytest.mark.parametrize("r", [1, 7, 8])
def test_four_bits_come_back_within_half_a_step(r):
    x = torch.randn(2, 3, 9, r, generator=torch.Generator().manual_seed(0))
    packed = quantise(x)
    assert packed.shape[-1] == 4 + (r + 1) // 2
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
    assert ((dequantise(packed, r) - x).abs() <= 0.5 * step + 0.005 * x.abs().amax() + 1e-3).all()


def test_a_row_of_equal_values_is_no_division_by_zero():
    x = torch.full((1, 1, 2, 4), 0.75)
    torch.testing.assert_close(dequantise(quantise(x), 4), x)


@pytest.mark.parametrize("label_bits", [4, 16])
def test_calibrated_channels_find_what_matters(label_bits):
    q, k, v = draw()
    plan, k2 = calibrate_channels([draw(seed=1)[:2]], 8), LENGTH // 16
    q1 = q[:, :, -1:]
    found = {}
    generator = torch.Generator().manual_seed(3)
    random = torch.stack([torch.randperm(WIDTH, generator=generator)[:8] for _ in range(4)])
    for name, channels in (
        ("ours", plan.channels),
        ("random", random),
        ("all", torch.arange(WIDTH).expand(4, -1)),
    ):
        cache = fill(
            ChannelPlan(channels=channels, width=WIDTH), k, v, label_bits=16 if name == "all" else label_bits
        )
        found[name] = mass(q1, k, cache.select(q1, k2))
    assert found["ours"] > 0.8 * found["all"]
    assert found["ours"] > 2 * found["random"]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_budget_of_everything_is_dense(kv_heads):
    q, k, v = draw(kv_heads=kv_heads)
    plan = calibrate_channels([(q, k)], 4)
    out = double_sparse_decode(q[:, :, -1:], fill(plan, k, v), 9999)
    exact = F.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)
    torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-4)


def test_reads_are_a_fraction_of_the_cache():
    q, k, v = draw()
    cache = fill(calibrate_channels([(q, k)], 8), k, v)
    with counters.count() as counter:
        double_sparse_decode(q[:, :, -1:], cache, LENGTH // 16)
    labels, kept = 4 * LENGTH * (4 + 4), 2 * 4 * (LENGTH // 16) * WIDTH * 4
    assert counter.kv_bytes == labels + kept
    assert counter.kv_bytes < 0.16 * 2 * 4 * LENGTH * WIDTH * 4


@pytest.mark.parametrize(("kv_heads", "label_bits"), [(4, 4), (2, 4), (2, 16)])
def test_the_choice_is_that_of_the_products_with_the_labels(kv_heads, label_bits):
    q, k, v = draw(kv_heads=kv_heads)
    q1, plan = q[:, :, -1:], calibrate_channels([(q, k)], 7)
    near = k.gather(-1, plan.channels[None, :, None].expand(1, -1, LENGTH, -1))
    labels = dequantise(quantise(near), 7) if label_bits == 4 else near.half().float()
    group = 4 // kv_heads
    rows = q1.gather(-1, plan.channels.repeat_interleave(group, 0)[None, :, None])
    scores = rows @ labels.repeat_interleave(group, 1).mT
    chosen = fill(plan, k, v, label_bits=label_bits).select(q1, 30).to_token_mask()
    kept = scores.masked_fill(~chosen, torch.inf).amin(-1)
    assert (chosen.sum(-1) == 30).all()
    assert (kept >= scores.masked_fill(chosen, -torch.inf).amax(-1) - 1e-4).all()


def test_a_choice_made_earlier_may_be_used():
    q, k, v = draw()
    cache = fill(calibrate_channels([(q, k)], 8), k, v, offload=True)
    selection = cache.select(q[:, :, -2:-1], 40)
    ours = double_sparse_decode(q[:, :, -1:], cache, 40, selection)
    assert not torch.allclose(ours, double_sparse_decode(q[:, :, -1:], cache, 40), atol=1e-4)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_keys_are_moved_one_layer_ahead_by_another_thread(offload, kv_heads, monkeypatch):
    layers = [draw(kv_heads=kv_heads, seed=seed) for seed in range(4)]
    plan = calibrate_channels([layers[0][:2]], 8)
    caches = [fill(plan, k, v, offload=offload) for _, k, v in layers]
    guesses, queries = ([q[:, :, at : at + 1] for q, _, _ in layers] for at in (LENGTH - 2, LENGTH - 1))
    movers = []

    def rows(cache, index):
        movers.append((index.shape[2], threading.current_thread().name))
        return KVCache.rows(cache, index)

    monkeypatch.setattr(DoubleSparseCache, "rows", rows)
    with Prefetch(caches, 40) as ahead:
        ahead.start(0, guesses[0])
        for layer, (q1, cache) in enumerate(zip(queries, caches, strict=True)):
            if layer + 1 < len(caches):
                ahead.start(layer + 1, guesses[layer + 1])
            chosen = cache.select(guesses[layer], 40)
            cache.append(*(x[:, :, :1] for x in layers[layer][1:]))  # the newest token comes after the start
            newest = torch.full((1, 4, 1, 1), cache.length - 1)
            wanted = IndexMask(index=torch.cat([chosen.index, newest], -1), kv_len=cache.length)
            exact = double_sparse_decode(q1, cache, 40, wanted)
            torch.testing.assert_close(ahead.decode(layer, q1), exact, atol=2e-6, rtol=1e-5)
    moved = [name for count, name in movers if count == 40 * 4 // kv_heads]
    assert len(moved) == 4
    assert all(name.startswith("prefetch") for name in moved)


def test_no_more_than_two_layers_are_under_way():
    q, k, v = draw()
    caches = [fill(calibrate_channels([(q, k)], 8), k, v) for _ in range(3)]
    with Prefetch(caches, 16) as ahead:
        with pytest.raises(
            RuntimeError, match="decode: expected layer 1 to be on its way, got none; start it"
        ):
            ahead.decode(1, q[:, :, -1:])
        for layer in (0, 1):
            ahead.start(layer, q[:, :, -1:])
        with pytest.raises(RuntimeError, match=r"start: expected at most two layers under way, got \[0, 1\]"):
            ahead.start(2, q[:, :, -1:])


def test_the_method_reads_every_field_of_its_config():
    q, k, v = draw()
    method = DoubleSparsity(Config(channels=5, label_bits=16, topk=40, dense_layers=0))
    plan = method.calibrate([(q, k)])
    assert plan.channels.shape == (4, 5)
    cache = method.cache(plan)
    cache.append(k, v)
    assert (cache.label_bits, cache.labels.shape[-1]) == (16, 5)
    expected = double_sparse_decode(q[:, :, -1:], cache, 40)
    assert torch.equal(method.decode(0, q[:, :, -1:], cache), expected)
    with pytest.raises(ValueError, match="plan: expected 5 channels per head, got 4; calibrate again"):
        method.cache(calibrate_channels([(q, k)], 4))


def test_early_layers_are_dense():
    q, k, v = draw()
    cache, method = (
        fill(calibrate_channels([(q, k)], 2), k, v),
        DoubleSparsity(Config(topk=4, dense_layers=1)),
    )
    exact = F.scaled_dot_product_attention(q[:, :, -1:], k, v)
    torch.testing.assert_close(method.decode(0, q[:, :, -1:], cache), exact, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(method.decode(1, q[:, :, -1:], cache), exact, atol=1e-3)


def test_plans_are_kept_on_disk_and_know_their_model(tmp_path):
    q, k, _ = draw()
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    path = calibrate_channels([(q, k)], 4, model).save(tmp_path / "plan.json")
    plan = ChannelPlan.load(path)
    assert torch.equal(plan.channels, calibrate_channels([(q, k)], 4).channels)
    plan.validate(model)
    with pytest.raises(
        ValueError, match="plan: expected one for the model .*, got one for .*; calibrate again"
    ):
        plan.validate(other)
    path.write_text("{}")
    with pytest.raises(
        ValueError, match=r"plan.json: expected a channel plan, got 'channels'; calibrate again"
    ):
        ChannelPlan.load(path)


def test_labels_of_another_length_are_refused():
    q, k, v = draw()
    cache = fill(calibrate_channels([(q, k)], 4), k, v)
    cache.length += 1
    with pytest.raises(RuntimeError, match="labels: expected one per key, 513, got 512"):
        _ = cache.labels


@pytest.mark.parametrize("channels", [0, 65])
def test_more_channels_than_there_are_is_refused(channels):
    with pytest.raises(ValueError, match=f"channels: expected 1 to 64, got {channels}"):
        calibrate_channels([draw()[:2]], channels)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="pairs: expected queries and keys of at least one token, got none"):
        calibrate_channels([], 4)
    with pytest.raises(ValueError, match="label_bits: expected 4 or 16, got 8"):
        Config(label_bits=8)
    with pytest.raises(ValueError, match="label_bits: expected 4 or 16, got 8"):
        DoubleSparseCache(calibrate_channels([draw()[:2]], 4), label_bits=8)
    plan = ChannelPlan(channels=torch.arange(2)[None], width=8)
    with pytest.raises(ValueError, match="cache: expected at least one token, got none; prefill it first"):
        DoubleSparseCache(plan).select(torch.zeros(1, 1, 1, 8), 4)
    with pytest.raises(
        ValueError, match=r"q: expected \[B, H, T, 64\] of which 4 divides H, got \[1, 6, 1, 64\]"
    ):
        fill(calibrate_channels([draw()[:2]], 4), *draw()[1:]).select(torch.zeros(1, 6, 1, WIDTH), 4)
    with pytest.raises(ValueError, match=r"q: expected \[B, H, T, 64\] of which 3 divides H, got"):
        calibrate_channels([(draw()[0], draw(kv_heads=3, heads=3)[1])], 4)
    with pytest.raises(ValueError, match=r"k, v: expected both \[1, 4, n, 64\], got"):
        DoubleSparseCache(calibrate_channels([draw()[:2]], 4)).append(*[torch.zeros(1, 4, 2, 32)] * 2)
    with pytest.raises(ValueError, match="topk: expected at least one key, got 0"):
        fill(calibrate_channels([draw()[:2]], 4), *draw()[1:]).select(torch.zeros(1, 4, 1, WIDTH), 0)
    with pytest.raises(ValueError, match=r"channels: expected \[H, r\] of 0 to 7, got"):
        ChannelPlan(channels=torch.tensor([[7, 8]]), width=8)
    with pytest.raises(ValueError, match="channels: expected whole numbers, int64, got torch.float32"):
        ChannelPlan(channels=torch.tensor([[0.5, 1.2]]), width=8)
    with pytest.raises(ValueError, match=r"channels: expected each once per head, got \[\[1, 1\]\]"):
        ChannelPlan(channels=torch.tensor([[1, 1]]), width=8)


def test_pairs_that_do_not_fit_are_refused():
    q, k, _ = draw()
    with pytest.raises(
        ValueError, match=r"pairs: expected queries and keys of the same tokens, got \[1, 4, 512, 64\]"
    ):
        calibrate_channels([(q, k[:, :, :20])], 4)
    with pytest.raises(
        ValueError, match="pairs: expected keys of 4 heads and 64 channels in all, got 2 and 64"
    ):
        calibrate_channels([(q, k), draw(kv_heads=2)[:2]], 4)
    for strange in (torch.nan, torch.inf):
        q[0, 1, 3, 5] = strange
        with pytest.raises(ValueError, match="pairs: expected finite queries and keys, got NaN or infinity"):
            calibrate_channels([(q, k)], 4)


@pytest.mark.parametrize("label_bits", [4, 16])
@pytest.mark.parametrize("strange", [1e6, torch.nan])
def test_keys_that_labels_cannot_hold_are_refused_and_leave_the_cache_as_it_was(label_bits, strange):
    q, k, v = draw()
    plan = calibrate_channels([(q, k)], 8)
    cache = fill(plan, k, v, label_bits=label_bits)
    before = cache.select(q[:, :, -1:], 30).index
    for channel in plan.channels[0, :2].tolist():
        k[0, 0, 0, channel] = strange
    with pytest.raises(
        ValueError,
        match=re.escape(f"k: expected keys of at most 65504 in the plan's channels, got {strange:g}; scale"),
    ):
        cache.append(k[:, :, :3], v[:, :, :3])
    assert cache.shape[2] == LENGTH
    assert torch.equal(cache.select(q[:, :, -1:], 30).index, before)


class Two(nn.Module):
    """Two attentions, the second with twice as large keys in reversed channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second = DenseAttention(), DenseAttention()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        q, k = batch
        return self.first(q, k, k) + self.second(q.flip(-1), 2 * k.flip(-1), k)


def test_a_model_gives_a_plan_for_each_of_its_attentions():
    model, batches = Two(), [draw(kv_heads=2, seed=seed)[:2] for seed in range(2)]
    plans = calibrate_channels(model, 5, batches=batches)
    assert list(plans) == ["first", "second"]
    alone = calibrate_channels(batches, 5).channels
    assert torch.equal(plans["first"].channels, alone)
    assert torch.equal(plans["second"].channels, WIDTH - 1 - alone)
    for plan in plans.values():
        plan.validate(model)
    with pytest.raises(ValueError, match="batches: expected what to run the model on, got none"):
        calibrate_channels(model, 5)
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        calibrate_channels(model, 5, batches=[])
