"""Routing attention: equal to dense attention under its clusters, learning, leaks, padding, and what it refuses."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from sparse_core import counters, registry
from sparse_core.methods.attention.routing import Config, RoutingAttention, RoutingLayer


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ready(heads=4, dim=16, clusters=4, window=None, *, x=None, **options):
    """Attention in evaluation, with centroids of random tokens."""
    attention = RoutingAttention(heads, dim, clusters, window, **options)
    attention.init_centroids(draw(2, heads, 64, dim, seed=9) if x is None else x)
    return attention.eval()


def dense(q, k, v, mask, local_heads):
    """Dense attention under the window, and the mean over clusters of dense attention under the mask of each."""
    parts, group = [], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v.repeat_interleave(k.shape[1] // v.shape[1], 1)))
    if local_heads:
        kept, some = mask.local.to_token_mask(), mask.local.to_token_mask().any(-1, keepdim=True)
        q1, k1, v1 = (x[:, :local_heads] for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(q1, k1, v1, attn_mask=kept | ~some) * some)
    q2, k2, v2 = (x[:, local_heads:] for x in (q, k, v))
    total, times = 0, 0
    for kept in mask.routed.to_token_masks().unbind(2):
        some = kept.any(-1, keepdim=True)
        total = total + F.scaled_dot_product_attention(q2, k2, v2, attn_mask=kept | ~some) * some
        times = times + some.float()
    return torch.cat([*parts, total / times.clamp_min(1)], 1)


CASES = {  # T, key-value heads, padded, options
    "shared": (64, 4, False, {}),
    "shared, all heads route": (60, 4, False, {"local_heads": 0}),
    "ragged, padded": (61, 4, True, {}),
    "wide clusters that overlap": (33, 4, False, {"window": 20}),
    "apart": (64, 4, False, {"shared_qk": False}),
    "apart, grouped, odd split": (47, 2, True, {"shared_qk": False, "local_heads": 1}),
    "looking ahead": (40, 4, True, {"causal": False}),
    "looking ahead, apart": (37, 2, False, {"causal": False, "shared_qk": False}),
    "without leaks": (50, 4, False, {"causal_route": "argmax"}),
    "without leaks, padded": (51, 4, True, {"causal_route": "argmax"}),
}


def arguments(case):
    length, kv_heads, padded, options = CASES[case]
    shared = options.get("shared_qk", True)
    q = draw(2, 4, length, 16).requires_grad_()
    k = q if shared else draw(2, kv_heads, length, 16, seed=1).requires_grad_()
    v = draw(2, kv_heads, length, 16, seed=2).requires_grad_()
    padding = None
    if padded:
        padding = torch.zeros(2, length, dtype=torch.bool)
        padding[0, length - 7 :] = True
        padding[1, :5] = True
    return q, k, v, padding


@pytest.mark.filterwarnings("ignore:num_clusters")
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_dense_attention_under_the_same_clusters(case):
    q, k, v, padding = arguments(case)
    attention = ready(**CASES[case][3])
    out, aux = attention(q, k, v, padding)
    exact = dense(q, k, v, aux["mask"], attention.local_heads)
    torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-5)
    leaves, weight = [q, v] if k is q else [q, k, v], draw(*out.shape, seed=5)
    grads = (torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True) for x in (out, exact))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:num_clusters")
@pytest.mark.parametrize("case", CASES)
def test_nothing_forbidden_is_seen(case):
    q, k, v, padding = arguments(case)
    attention = ready(**CASES[case][3])
    mask, length = attention(q, k, v, padding)[1]["mask"], q.shape[2]
    tokens = mask.to_token_mask()
    if attention.config.causal:
        assert not (tokens & ~torch.ones(length, length, dtype=torch.bool).tril()).any()
    if padding is not None:
        assert not (tokens & (padding[:, None, :, None] | padding[:, None, None, :])).any()
    if attention.config.shared_qk:
        for kept in (mask.routed.to_token_masks(), tokens[:, : attention.local_heads]):
            assert not (kept.diagonal(dim1=-2, dim2=-1) & (kept.sum(-1) > 1)).any()
    assert tokens.shape == (2, 4, length, length)
    assert tokens.any(dim=(0, 2, 3)).all()


def test_clusters_are_the_tokens_of_largest_product_in_order_of_position():
    attention, q = ready(local_heads=0), draw(1, 4, 64, 16)
    index = attention(q, None, q)[1]["mask"].routed.q_index
    r = F.layer_norm(q, (16,))
    best = (r @ attention.router.centroids.mT).mT.topk(16, -1).indices.sort(-1).values
    assert torch.equal(index, best)


def test_padding_changes_nothing_for_the_others_and_gets_zero():
    attention, q, v = ready(window=12), draw(2, 4, 64, 16), draw(2, 4, 64, 16, seed=1)
    padding = torch.zeros(2, 64, dtype=torch.bool)
    padding[:, 48:] = True
    out = attention(q, q, v, padding)[0]
    assert (out[:, :, 48:] == 0).all()
    torch.testing.assert_close(
        out[:, :, :48], attention(q[:, :, :48], None, v[:, :, :48])[0], atol=2e-6, rtol=1e-4
    )


@pytest.mark.parametrize("causal", [True, False])
def test_a_sample_of_padding_alone_gives_zeros(causal):
    attention = ready(causal=causal).train()
    q, v = draw(2, 4, 64, 16).requires_grad_(), draw(2, 4, 64, 16, seed=1)
    padding = torch.tensor([[False] * 64, [True] * 64])
    out, aux = attention(q, q, v, padding)
    assert (out[1] == 0).all()
    (gradient,) = torch.autograd.grad(out.sum() + aux["commit_loss"], q)
    assert gradient.isfinite().all()
    attention(q, q, v, torch.ones(2, 64, dtype=torch.bool))
    attention.update_centroids()
    assert attention.router.centroids.isfinite().all()


def changed_before(attention, t):
    """Whether outputs before token t change with the tokens from t on."""
    q, v = draw(2, 4, 64, 16), draw(2, 4, 64, 16, seed=1)
    q2, v2 = q.clone(), v.clone()
    q2[:, :, t:], v2[:, :, t:] = draw(2, 4, 64 - t, 16, seed=3), draw(2, 4, 64 - t, 16, seed=4)
    return not torch.allclose(attention(q, q, v)[0][:, :, :t], attention(q2, q2, v2)[0][:, :, :t], atol=1e-6)


@pytest.mark.parametrize("t", [1, 17, 40, 63])
def test_argmax_does_not_leak_who_comes_later(t):
    assert not changed_before(ready(causal_route="argmax"), t)


def test_picking_the_best_leaks_membership_but_no_values():
    attention, q, v = ready(), draw(1, 4, 64, 16), draw(1, 4, 64, 16, seed=1)
    assert changed_before(attention, 40)
    later = v.clone()
    later[:, :, 40:] += 1
    assert torch.equal(attention(q, q, v)[0][:, :, :40], attention(q, q, later)[0][:, :, :40])


def test_training_draws_centroids_to_the_tokens_and_evaluation_leaves_them():
    planted = draw(1, 1, 4, 16, seed=1).repeat(1, 4, 1, 1)
    q = planted[:, :, torch.arange(64) % 4] + 0.1 * draw(1, 4, 64, 16)
    attention = ready(decay=0.5, commitment=1.0).train()
    losses = []
    for _ in range(15):
        losses.append(float(attention(q, q, q)[1]["commit_loss"]))
        attention.update_centroids()
    assert losses[-1] < losses[0] / 2
    before = attention.router.centroids.clone()
    attention.eval()(q, q, q)
    assert torch.equal(attention.router.centroids, before)
    with pytest.raises(RuntimeError, match="update: expected a forward pass in training mode"):
        attention.update_centroids()


def test_the_commitment_loss_moves_queries_and_never_centroids():
    attention, q = ready(commitment=1e-4).train(), draw(1, 4, 64, 16).requires_grad_()
    loss = attention(q, q, q)[1]["commit_loss"]
    (gradient,) = torch.autograd.grad(loss, q)
    assert gradient[:, 2:].abs().sum() > 0
    assert (gradient[:, :2] == 0).all()
    assert not list(attention.parameters())
    torch.testing.assert_close(ready(commitment=1.0)(q, q, q)[1]["commit_loss"], loss * 1e4)


def test_load_and_coverage_describe_the_routing_heads():
    attention, q = ready(), draw(2, 4, 64, 16)
    aux = attention(q, q, q)[1]
    assert aux["load"].shape == (2, 4)
    torch.testing.assert_close(aux["load"].sum(-1), torch.ones(2))
    tokens = [set(h.flatten().tolist()) for h in aux["mask"].routed.q_index.flatten(0, 1)]
    counted = torch.tensor([len(t) for t in tokens]).view(2, 2).sum(0) / 128
    torch.testing.assert_close(aux["coverage"], counted)
    assert (ready(window=64)(q, q, q)[1]["coverage"] == 1).all()


def test_work_grows_with_the_clusters_and_not_with_all_pairs():
    attention, q = ready(1, 16, 16, local_heads=0), draw(1, 1, 1024, 16)
    attention(q, q, q)
    with counters.count() as counter:
        attention(q, q, q)
    routing, within = 1024 * 16, 16 * 64 * 65 // 2
    assert counter.products <= routing + within < 1024 * 1025 // 2 // 5
    assert counter.kv_bytes == 2 * 16 * 64 * 16 * 4


def test_nothing_as_large_as_all_pairs_is_kept_for_the_backward_pass():
    attention, q, sizes = ready(2, 8, 32), draw(1, 2, 2048, 8).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        attention(q, q, q)[0].sum().backward()
    assert sizes
    assert max(sizes) <= 2048 * 64


def test_half_precision_comes_back_as_it_was():
    attention, q = ready(), draw(1, 4, 64, 16).bfloat16()
    out, aux = attention(q, q, q)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), attention.attend(q.float(), None, q.float(), aux["mask"]), atol=2e-2, rtol=2e-2
    )


def test_tokens_that_do_not_divide_are_warned_of_once_or_refused():
    attention, q = RoutingAttention(4, 16, 4, local_heads=0).train(), draw(1, 4, 50, 16)
    with pytest.warns(
        UserWarning, match="num_clusters: expected one that divides 50 tokens, got 4; every cluster takes 13"
    ):
        mask = attention(q, q, q)[1]["mask"]
    assert mask.routed.q_index.shape[-1] == 13
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q, q, q)
    with pytest.raises(
        ValueError, match="num_clusters: expected one that divides 50 tokens, got 4; pad the tokens"
    ):
        ready(strict=True)(q, q, q)


OPTIONS = {
    "num_clusters: expected at least 1, got 0": {"num_clusters": 0},
    "window: expected at least 1, got 0": {"window": 0},
    "local_window: expected at least 1, got -1": {"local_window": -1},
    "local_heads: expected 0 to 3 so that one head is left to route, got 4": {"local_heads": 4},
    "decay, commitment: expected 0 <= decay < 1 and 0 or more, got 1 and 0.0001": {"decay": 1},
    "decay, commitment: .* got 0.999 and -1": {"commitment": -1},
    "causal_route: expected 'topw' or 'argmax', got 'x'": {"causal_route": "x"},
    "causal_route: expected causal and shared_qk for 'argmax'": {
        "causal_route": "argmax",
        "shared_qk": False,
    },
}


@pytest.mark.parametrize("sentence", OPTIONS)
def test_bad_options_are_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        RoutingAttention(4, 16, **OPTIONS[sentence])


def test_bad_inputs_are_refused():
    attention, apart, q = ready(), ready(shared_qk=False), draw(1, 4, 64, 16)
    with pytest.raises(ValueError, match="k: expected None or q itself with shared_qk, got another tensor"):
        attention(q, q.clone(), q)
    with pytest.raises(
        ValueError, match="k: expected keys of the 64 tokens of q, got None; set shared_qk=True"
    ):
        apart(q, None, q)
    with pytest.raises(ValueError, match=r"q: expected \[B, 4, T, D\], got \[1, 2, 64, 16\]"):
        attention(q[:, :2], None, q)
    with pytest.raises(
        ValueError, match=r"key_padding_mask: expected bool \[1, 64\], got torch.float32 \[1, 64\]"
    ):
        attention(q, q, q, torch.zeros(1, 64))
    with pytest.raises(ValueError, match="num_clusters: expected at most the 3 tokens, got 4"):
        attention(q[:, :, :3], None, q[:, :, :3])
    with pytest.raises(ValueError, match="x: expected numbers to route by, got NaN"):
        attention(q.masked_fill(q > 2, torch.nan), None, q)
    for lazy in (
        RoutingAttention(4, 16, 4),
        registry.get_method("attention/routing").layer(Config(), 4, 4, 16),
    ):
        with pytest.raises(RuntimeError, match="centroids not initialised"):
            lazy.eval()(q, q, q)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [12, 13, 100, 777, 2000])
def test_a_layer_works_from_its_first_batch_on(length, causal):
    method = registry.get_method("attention/routing")
    layer = method.layer(method.config(causal=causal), 4, 2, 16).train()
    q, k, v = (draw(1, h, length, 16, seed=n) for n, h in enumerate((4, 2, 2)))
    out = layer(q, k, v)
    assert out.shape == q.shape
    assert out.isfinite().all()
    assert float(layer.loss()) > 0
    layer.eval()
    mask = layer.mask(q, k, v)
    torch.testing.assert_close(layer.attend(q, k, v, mask), layer(q, k, v))
    other = (draw(1, h, length, 16, seed=n + 5) for n, h in enumerate((4, 2, 2)))
    assert layer.attend(*other, mask).shape == q.shape
    assert layer.loss() is None


def test_the_first_layers_look_at_a_window_alone():
    config = Config(num_clusters=4, local_window=32, skip_first=2)
    q, k, v = (torch.randn(2, 4, 40, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    local = RoutingLayer(config, 4, 8).mask(q, k, v).local.to_token_mask()
    assert local.sum(-1).max() == 32
    for place in (0, 1):
        layer = RoutingLayer(config, 4, 8, layer=place).train()
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=local)
        torch.testing.assert_close(layer(q, k, v), exact, atol=2e-6, rtol=1e-4)
        assert layer.loss() is None
        assert not layer.routing.router.initialised
    for place in (2, None):
        layer = RoutingLayer(config, 4, 8, layer=place).train()
        layer(q, k, v)
        assert layer.routing.router.initialised
    with pytest.raises(ValueError, match="skip_first: expected 0 layers or more, got -1"):
        Config(skip_first=-1)


def test_a_layer_moves_its_centroids_in_training_unless_told_not_to():
    method, q = registry.get_method("attention/routing"), draw(1, 2, 36, 8)
    for moves in (True, False):
        layer = method.layer(Config(decay=0.5, auto_update=moves, shared_qk=True), 2, 2, 8).train()
        layer.routing.init_centroids(draw(1, 2, 36, 8, seed=1))
        before = layer.routing.router.centroids.clone()
        layer(q, q, q)
        assert torch.equal(layer.routing.router.centroids, before) != moves


@pytest.mark.parametrize("clusters", [4, None])
def test_a_checkpoint_brings_the_clusters(clusters):
    first, second = ready(clusters=clusters), RoutingAttention(4, 16, clusters).eval()
    second.load_state_dict(first.state_dict())
    q = draw(1, 4, 64, 16)
    assert torch.equal(first(q, q, q)[0], second(q, q, q)[0])
