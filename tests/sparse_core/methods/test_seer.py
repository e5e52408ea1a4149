"""SeerAttention: the gate against its definition, what it selects, how it learns, decoding with kept gate keys."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.calibrate import model_hash
from sparse_core.attention.gate import BlockGate, rotate
from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.slot import AttentionSlot
from sparse_core.distill import load_learned, pooled_attention, save_learned
from sparse_core.methods.attention.seer import (
    Config,
    GateCache,
    SeerAttention,
    distill_gates,
    gate_loss,
    gate_truth,
)
from sparse_core.registry import get_method
from sparse_core.sparsify import sparsify

TINY = Config(block=16, gate_dim=8)
DECODE = replace(TINY, q_pool=(), selection="budget", amount=32)


def tokens(heads, kv_heads, length, width=16, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, length, width, generator=generator) for h in (heads, kv_heads, kv_heads)]


def turn(x, place, base):
    """The rotary embedding of one vector, pair by pair."""
    out, half = x.clone(), len(x) // 2
    for c in range(half):
        angle = torch.tensor(place * base ** (-c / half))
        out[c] = x[c] * angle.cos() - x[c + half] * angle.sin()
        out[c + half] = x[c] * angle.sin() + x[c + half] * angle.cos()
    return out


@pytest.mark.parametrize("rope", [None, 100.0])
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 2, 50), (2, 2, 48), (2, 1, 5)])
def test_logits_are_those_of_the_definition(heads, kv_heads, length, rope):
    q, k, _ = tokens(heads, kv_heads, length, batch=1)
    gate = BlockGate(heads, kv_heads, 16, block=16, gate_dim=8, rope=rope)
    logits = gate(q, k)
    assert logits.shape == (1, heads, -(-length // 16), -(-length // 16))
    for h in range(heads):
        for i, rows in enumerate(q[0, h].split(16)):
            for j, keys in enumerate(k[0, h * kv_heads // heads].split(16)):
                summary = torch.cat([keys.amax(0), keys.amin(0), keys.mean(0)])
                a, b = rows.mean(0) @ gate.w_q[h], summary @ gate.w_k[h * kv_heads // heads]
                if rope:
                    a, b = turn(a.detach(), 16 * i, rope), turn(b.detach(), 16 * j, rope)
                expected = (a @ b / 8**0.5).detach() if j <= i else torch.tensor(-torch.inf)
                torch.testing.assert_close(logits[0, h, i, j].detach(), expected, atol=1e-5, rtol=1e-4)


def test_every_pool_has_channels_of_its_own_and_a_gate_may_look_ahead():
    q, k, _ = tokens(2, 2, 40)
    gate = BlockGate(2, 2, 16, 16, 8, q_pool=("avg", "max"), k_pool=("min",), causal=False)
    assert gate.w_q.shape == (2, 32, 8)
    assert gate.w_k.shape == (2, 16, 8)
    assert gate(q, k).isfinite().all()
    assert torch.equal(gate.score(q, k), gate(q, k))


def test_gates_are_alike_by_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, same, other = (BlockGate(2, 1, 16, seed=seed).w_q for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 1.0])
def test_a_ratio_is_the_density_of_the_mask(ratio, causal):
    gate, blocks = BlockGate(2, 2, 16, block=16, causal=causal), 64
    logits = torch.randn(1, 2, blocks, blocks, generator=torch.Generator().manual_seed(0))
    if causal:
        logits = logits.masked_fill(torch.ones(blocks, blocks).triu(1).bool(), -torch.inf)
    mask = gate.to_mask(logits, 16 * blocks, ratio=ratio)
    possible = blocks * (blocks + 1) / 2 if causal else blocks**2
    chosen = gate.choose(logits, "ratio", ratio).sum().item() / 2 / possible
    assert chosen == pytest.approx(ratio, abs=0.03)
    assert chosen <= mask.blocks.sum().item() / 2 / possible <= chosen + blocks / possible
    assert mask.blocks.diagonal(dim1=-2, dim2=-1).all()


def test_a_threshold_keeps_what_weighs_more_and_a_budget_the_best():
    gate = BlockGate(1, 1, 16, block=16)
    weights = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.3, 0.6, 0.1, 0], [0.5, 0.15, 0.3, 0.05]])
    logits = weights.log()[None, None]
    by_weight = gate.to_mask(logits, 60, threshold=0.2).blocks[0, 0].int().tolist()
    assert by_weight == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    by_budget = gate.to_mask(logits, 60, budget=10).blocks[0, 0].int().tolist()
    assert by_budget == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]
    dense = gate.to_mask(logits, 60, budget=10, dense_rows=2).blocks[0, 0].int().tolist()
    assert dense == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("causal", [True, False])
def test_a_threshold_that_drops_everything_leaves_the_diagonal(causal):
    q, k, v = tokens(2, 1, 70)
    layer = SeerAttention(replace(TINY, amount=1.0, causal=causal), 2, 1, 16)
    mask = layer.mask(q, k, v)
    assert torch.equal(mask.blocks, torch.eye(5, dtype=torch.bool).expand(2, 2, -1, -1))
    near = F.scaled_dot_product_attention(
        q[:, :, 64:], k[:, :, 64:], v[:, :, 64:], is_causal=causal, enable_gqa=True
    )
    torch.testing.assert_close(layer.attend(q, k, v, mask)[:, :, 64:], near, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [12, 100, 128])
def test_values_and_gradients_are_those_of_the_masked_definition(length, causal):
    layer = SeerAttention(replace(TINY, selection="ratio", amount=0.3, causal=causal), 4, 2, 16)
    q, k, v = (x.requires_grad_() for x in tokens(4, 2, length))
    mask = layer.mask(q, k, v)
    assert mask.density() < 0.6 or length == 12
    out = layer(q, k, v)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_token_mask(), enable_gqa=True)
    torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-5)
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    for a, b in zip(ours, torch.autograd.grad(exact.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_fewer_tokens_than_a_block_are_attended_to_densely():
    q, k, v = tokens(2, 2, 13)
    exact = F.scaled_dot_product_attention(q, k, v)
    layer = SeerAttention(Config(selection="budget", amount=1, causal=False), 2, 2, 16)
    torch.testing.assert_close(layer(q, k, v), exact, atol=2e-5, rtol=1e-4)


def test_half_precision_stays_half_precision():
    q, k, v = (x.bfloat16() for x in tokens(2, 1, 70))
    layer = SeerAttention(replace(TINY, selection="ratio", amount=0.5), 2, 1, 16)
    out = layer(q, k, v)
    assert out.dtype == torch.bfloat16
    kept = layer.mask(q, k, v).to_token_mask()
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=kept, enable_gqa=True)
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)


def test_cost_follows_the_density():
    q, k, v = tokens(2, 2, 640, batch=1)
    layer = SeerAttention(replace(TINY, selection="budget", amount=32), 2, 2, 16)
    with counters.count() as gate:
        mask = layer.mask(q, k, v)
    assert gate.products == 2 * 40 * 40
    assert gate.kv_bytes == k.numel() * 4
    with counters.count() as both:
        layer(q, k, v)
    assert both.products == gate.products + int(mask.pairs().sum())
    assert both.products < 0.2 * 2 * 640 * 641 / 2


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that one tensor had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.most = max(self.most, x.untyped_storage().nbytes() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("config", [TINY, DECODE])
def test_choosing_and_learning_never_hold_a_token_by_token_tensor(config):
    q, k, v = tokens(1, 1, 4096, width=8, batch=1)
    layer = SeerAttention(replace(config, block=64), 1, 1, 8)
    with Largest() as memory:
        layer.mask(q, k, v)
        layer._last = (q, k, None)
        layer.loss().backward()
    assert 4096 * 8 * 4 <= memory.most < 4096 * 4096 / 8


def test_a_mask_serves_later_calls_and_no_layer_of_another_block():
    q, k, v = tokens(2, 2, 64)
    layer = SeerAttention(replace(TINY, selection="budget", amount=16), 2, 2, 16)
    mask, (q2, k2, v2) = layer.mask(q, k, v), tokens(2, 2, 64, seed=1)
    exact = F.scaled_dot_product_attention(q2, k2, v2, attn_mask=mask.to_token_mask())
    torch.testing.assert_close(layer.attend(q2, k2, v2, mask), exact, atol=2e-5, rtol=1e-4)
    other = SeerAttention(replace(TINY, block=32), 2, 2, 16)
    with pytest.raises(ValueError, match=r"mask: expected blocks of 32 tokens, got \(16, 16\)"):
        other.attend(q, k, v, mask)
    logits = layer.gate(q, k)
    with pytest.raises(
        ValueError, match="logits: expected 2 x 2 blocks for 64 tokens at block 32, got 4 x 4"
    ):
        other.gate.to_mask(logits, 64, ratio=0.5)


def test_with_a_rotary_embedding_the_layer_rotates_for_attention_and_truth():
    q, k, v = tokens(2, 1, 40)
    layer = SeerAttention(replace(TINY, rope=100.0, selection="ratio", amount=1.0), 2, 1, 16)
    turned = [
        torch.stack([turn(row, t, 100.0) for x_ in x.flatten(0, 1) for t, row in enumerate(x_)]).view(x.shape)
        for x in (q, k)
    ]
    exact = F.scaled_dot_product_attention(*turned, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(layer(q, k, v), exact, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(gate_truth(layer.gate, q, k), pooled_attention(*turned, 16), atol=1e-5, rtol=0)
    a, b = q[:, :, 3:4], k[:, :, 5:6].expand_as(q[:, :, :1])
    near, far = (
        (rotate(a, torch.tensor([p + 4]), 100.0) * rotate(b, torch.tensor([p]), 100.0)).sum() for p in (2, 90)
    )
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)


def test_the_loss_is_ten_times_the_divergence_of_rows():
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(2, 3, 4, 4, generator=generator), torch.rand(2, 3, 4, 4, generator=generator)
    goal = truth / truth.sum(-1, keepdim=True)
    expected = 10 * F.kl_div(logits.log_softmax(-1), goal, reduction="sum") / 24
    torch.testing.assert_close(gate_loss(logits, truth), expected)
    torch.testing.assert_close(gate_loss((7 * goal).log(), truth), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_what_may_not_be_seen_adds_nothing_to_the_loss_and_its_gradient():
    logits = torch.zeros(1, 1, 3, 3).masked_fill(torch.ones(3, 3).triu().bool(), -torch.inf).requires_grad_()
    truth = torch.full((1, 1, 3, 3), 0.5)
    truth[0, 0, 2, 1] = 0
    loss = gate_loss(logits, truth)
    torch.testing.assert_close(
        loss, 10 * torch.tensor(2.0).log() / 2
    )  # row 0 sees nothing, row 1 has no choice
    gradient = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(gradient[0, 0, 2], torch.tensor([-2.5, 2.5, 0.0]))
    assert not gradient[0, 0, :2].any()


def test_the_layers_loss_reaches_the_gate_alone_and_only_in_training():
    layer = SeerAttention(replace(TINY, selection="budget", amount=16), 2, 1, 16)
    assert layer.loss() is None
    q, k, v = (x.requires_grad_() for x in tokens(2, 1, 50))
    layer(q, k, v)
    loss = layer.loss()
    torch.testing.assert_close(loss, gate_loss(layer.gate(q, k), pooled_attention(q, k, 16)))
    loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in layer.parameters())
    assert q.grad is None
    layer.eval()(q, k, v)
    assert layer.loss() is None


class Blocks(nn.Module):
    """Two attention layers with weights of their own, the second conditioned on what comes beside the tokens."""

    def __init__(self, config=TINY, condition=0):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(16, 16)
        self.layers = nn.ModuleList(
            SeerAttention(replace(config, condition=condition, seed=seed), 2, 1, 16) for seed in range(2)
        )
        self.given = condition > 0

    def forward(self, batch):
        x, condition = batch if self.given else (batch, None)
        for layer in self.layers:
            x = x + layer(4 * self.project(x), x[:, :1], x[:, 1:], condition=condition)
        return x

    def base_hash(self):
        return model_hash(self.project)


def stream(condition=False, length=90):
    generator = torch.Generator().manual_seed(1)
    while True:
        topics = torch.randn(2, 1, -(-length // 16), 16, generator=generator).repeat_interleave(16, 2)[
            :, :, :length
        ]
        x = topics + 0.3 * torch.randn(2, 2, length, 16, generator=generator)
        yield (x, torch.randn(2, 3, generator=generator)) if condition else x


@pytest.mark.parametrize("config", [TINY, DECODE, replace(TINY, causal=False), replace(TINY, rope=100.0)])
def test_gates_of_a_model_learn_from_it_densely_and_nothing_else_changes(config):
    model = Blocks(config)
    model.layers[1].eval()
    batch, before = next(stream()), model.base_hash()
    sparse = model(batch)
    losses = distill_gates(model, stream(), steps=30, lr=2e-2, warm_up=3)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert model.base_hash() == before
    assert model.project.weight.grad is None
    assert [(layer.dense, layer.training) for layer in model.layers] == [(False, True), (False, False)]
    for layer in model.layers:
        layer.dense = True
    dense = model(batch)
    exact = Blocks(replace(config, q_pool=("avg",), selection="ratio", amount=1.0))(batch)
    torch.testing.assert_close(dense, exact, atol=2e-4, rtol=1e-4)
    assert sparse.shape == dense.shape


def test_layers_are_sparse_again_when_distilling_fails():
    model = Blocks()
    with pytest.raises(ValueError, match="losses: expected 3, got 0"):
        distill_gates(model, [], steps=3)
    assert not any(layer.dense for layer in model.layers)


class Plain(nn.Module):
    """Somebody else's attention, inside a module that is called with something else."""

    def __init__(self):
        super().__init__()
        self.inner = SeerAttention(replace(TINY, selection="ratio", amount=1.0), 2, 1, 16)

    def forward(self, x):
        return self.inner(x, x[:, :1], x[:, 1:])


def test_gates_may_belong_to_other_modules_by_name():
    model, gate = Plain(), BlockGate(2, 1, 16, 16, 8)
    before = model_hash(model)
    losses = distill_gates(model, stream(), steps=30, lr=2e-2, warm_up=3, gates={"inner": gate})
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert model_hash(model) == before
    with pytest.raises(
        ValueError, match="gates: expected names of modules called with q and k, got one called with x"
    ):
        distill_gates(model, stream(), steps=1, gates={"": gate})
    with pytest.raises(ValueError, match="gates: expected at least one, got a model without SeerAttention"):
        distill_gates(nn.Linear(2, 2), stream(), steps=1)


def test_an_embedding_of_the_diffusion_step_is_added_to_the_pooled_queries():
    q, k, v = tokens(2, 1, 50)
    layer, plain = (SeerAttention(replace(TINY, causal=False, condition=c), 2, 1, 16) for c in (3, 0))
    step = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.gate(q, k, step), plain.gate(q, k))  # zeros at first
    with torch.no_grad():
        layer.gate.w_condition.normal_(generator=torch.Generator().manual_seed(0))
    shift = torch.einsum("bc,hcd->bhd", step, layer.gate.w_condition)
    torch.testing.assert_close(
        layer.gate(q, k, step), plain.gate(q + shift[:, :, None], k), atol=1e-4, rtol=1e-4
    )
    assert layer(q, k, v, step).shape == q.shape
    with pytest.raises(ValueError, match=r"condition: expected \[2, 3\], got none"):
        layer(q, k, v)
    with pytest.raises(ValueError, match=r"condition: expected \[2, 3\], got \[1, 3\]"):
        layer(q, k, v, step[:1])


def test_conditioned_gates_learn_too():
    model = Blocks(replace(TINY, causal=False), condition=3)
    distill_gates(model, stream(condition=True), steps=5, lr=1e-2)
    assert all(layer.gate.w_condition.abs().sum() > 0 for layer in model.layers)


@pytest.mark.parametrize("rope", [None, 100.0])
def test_the_cache_keeps_what_the_gate_makes_of_whole_blocks(rope):
    _, k, v = tokens(4, 2, 75)
    gate = BlockGate(4, 2, 16, 16, 8, q_pool=(), rope=rope)
    cache = GateCache(gate, 2, page=8)
    first = 0
    for size in (1, 20, 11, 40, 3):
        cache.append(k[:, :, first : first + size], v[:, :, first : first + size])
        first += size
    torch.testing.assert_close(cache.gate_keys, gate.keys(k[:, :, :64]).detach(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(cache.keys, rotate(k, torch.arange(75), rope))
    assert cache.bytes == 2 * 2 * 4 * (2 * 2 * cache._pool[0].shape[2] * 16 // 2 + 11 * 16 + 4 * 8)


@pytest.mark.parametrize("rope", [None, 100.0])
@pytest.mark.parametrize("selection", [("budget", 32), ("threshold", 0.3), ("ratio", 0.4)])
def test_decoding_attends_to_the_blocks_that_the_gate_of_the_group_selects(selection, rope):
    layer = SeerAttention(replace(DECODE, selection=selection[0], amount=selection[1], rope=rope), 4, 2, 16)
    q, k, v = tokens(4, 2, 150)
    cache = GateCache(layer.gate, 2)
    logits, turned = layer.gate(q, k), [rotate(x, torch.arange(150), rope) for x in (q, k)]
    for t in range(150):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        if t not in (0, 14, 15, 16, 31, 100, 149):
            continue
        whole = (t + 1) // 16
        chosen = layer.gate.choose(logits[:, :, t, :whole], *selection).detach()
        kept = torch.cat([chosen, torch.zeros(2, 2, 10 - whole, dtype=torch.bool)], -1)
        kept[..., t // 16] = True
        visible = kept.repeat_interleave(16, -1)[..., : t + 1].repeat_interleave(2, 1)[:, :, None]
        exact = F.scaled_dot_product_attention(
            turned[0][:, :, t : t + 1],
            turned[1][:, :, : t + 1],
            v[:, :, : t + 1],
            attn_mask=visible,
            enable_gqa=True,
        )
        torch.testing.assert_close(layer.decode(q[:, :, t : t + 1], cache), exact, atol=2e-5, rtol=1e-4)


def test_a_decoding_step_reads_the_budget_and_the_gate_keys_alone():
    layer = SeerAttention(DECODE, 4, 2, 16)
    q, k, v = tokens(4, 2, 512, batch=1)
    cache = GateCache(layer.gate)
    cache.append(k, v)
    with counters.count() as step:
        layer.decode(q[:, :, -1:], cache)
    assert step.products <= 2 * 32 + 4 * (32 + 16)
    assert 2 * 32 * 8 * 4 < step.kv_bytes < 0.3 * cache.bytes


def test_a_decoding_gate_prefills_densely_and_a_prefill_gate_decodes_densely():
    q, k, v = tokens(4, 2, 70)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(SeerAttention(DECODE, 4, 2, 16)(q, k, v), exact, atol=2e-5, rtol=1e-4)
    cache = KVCache(2, 2, 16)
    cache.append(k, v)
    out = SeerAttention(replace(TINY, amount=1.0), 4, 2, 16).decode(q[:, :, -1:], cache)
    torch.testing.assert_close(out, exact[:, :, -1:], atol=2e-5, rtol=1e-4)


def test_the_truth_of_a_decoding_gate_is_that_of_its_group():
    q, k, _ = tokens(4, 2, 40)
    gate = BlockGate(4, 2, 16, 16, 8, q_pool=())
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    pooled = F.max_pool2d(scores.softmax(-1), (1, 16), ceil_mode=True)
    torch.testing.assert_close(gate_truth(gate, q, k), torch.maximum(pooled[:, ::2], pooled[:, 1::2]))
    seen = gate(q, k) > -torch.inf
    assert seen[0, 0].sum(-1).tolist() == [(t + 1) // 16 for t in range(40)]


def test_decoding_refuses_caches_that_do_not_fit():
    layer, (q, k, v) = SeerAttention(DECODE, 4, 2, 16), tokens(4, 2, 20)
    plain = KVCache(2, 2, 16)
    plain.append(k, v)
    with pytest.raises(ValueError, match="cache: expected a GateCache of this gate, got a plain one"):
        layer.decode(q[:, :, -1:], plain)
    with pytest.raises(ValueError, match="cache: expected .* at least one token"):
        layer.decode(q[:, :, -1:], GateCache(layer.gate, 2))
    with pytest.raises(
        ValueError, match=r"gate: expected one for decoding, got one of pooled queries; .*q_pool=\(\)"
    ):
        GateCache(BlockGate(4, 2, 16))
    with pytest.raises(ValueError, match="rewrite: expected a cache without gate keys"):
        GateCache(layer.gate, 2).rewrite(0, k, v)


def test_gates_come_back_from_disk_and_want_their_block_and_rotary_embedding(tmp_path):
    q, k, _ = tokens(2, 1, 50)
    gate, again = (BlockGate(2, 1, 16, 16, 8, rope=100.0, seed=seed) for seed in range(2))
    path = save_learned(tmp_path / "gates.safetensors", {"layer": gate})
    load_learned(path, {"layer": again})
    assert torch.equal(gate(q, k), again(q, k))
    sentences = {
        "layer: expected rope 100.0, with which it was trained, got None; make it so": {"rope": None},
        "layer: expected block 16, with which it was trained, got 32; make it so": {"block": 32},
        r"layer: expected k_pool \['max', 'min', 'avg'\], with which it was trained, got \['avg'\]": {
            "k_pool": ("avg",)
        },
        "layer: expected q_heads 2, with which it was trained, got 4; make it so": {"q_heads": 4},
    }
    for sentence, change in sentences.items():
        options = {
            "q_heads": 2,
            "kv_heads": 1,
            "head_dim": 16,
            "block": 16,
            "gate_dim": 8,
            "rope": 100.0,
        } | change
        with pytest.raises(ValueError, match=sentence):
            load_learned(path, {"layer": BlockGate(**options)})


REFUSED = {
    "block: expected a power of two, got 48": {"block": 48},
    "block: expected a power of two, got 0": {"block": 0},
    "gate_dim: expected at least 1, and even with a rotary embedding, got 7": {"gate_dim": 7, "rope": 100.0},
    "q_pool, k_pool: expected some of avg, max and min": {"k_pool": ("mean",)},
    r"q_pool, k_pool: expected some of avg, max and min, got \('avg',\) and \(\)": {"k_pool": ()},
    "q_pool: expected a pool for a gate that looks ahead, got none": {"q_pool": (), "causal": False},
    "condition: expected 0 or more channels, got -1": {"condition": -1},
    "selection: expected threshold, ratio or budget, got 'topk'": {"selection": "topk"},
    "ratio: expected more than 0 and at most 1, got 0": {"selection": "ratio", "amount": 0},
    "ratio: expected more than 0 and at most 1, got 1.5": {"selection": "ratio", "amount": 1.5},
    "budget: expected at least one token, got 0": {"selection": "budget", "amount": 0},
    "threshold: expected 0 or more, got -0.1": {"amount": -0.1},
    "dense_rows: expected 0 or more, got -1": {"dense_rows": -1},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_configs_are_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**REFUSED[sentence])


def test_bad_tokens_heads_and_rules_are_refused():
    gate, (q, k, _) = BlockGate(4, 2, 16, 16, 8), tokens(4, 2, 40)
    with pytest.raises(ValueError, match="q_heads, kv_heads, head_dim: expected .*, got 4, 3, 16"):
        BlockGate(4, 3, 16)
    with pytest.raises(ValueError, match="head_dim: expected an even number with a rotary embedding, got 5"):
        BlockGate(4, 2, 5, rope=100.0)
    with pytest.raises(ValueError, match=r"q: expected \[B, 4, T, 16\], got \[2, 2, 40, 16\]"):
        gate(k, k)
    with pytest.raises(ValueError, match=r"k: expected \[2, 2, 40, 16\], got \[2, 2, 39, 16\]"):
        gate(q, k[:, :, 1:])
    logits = gate(q, k)
    for rules, count in (({}, 0), ({"ratio": 0.5, "budget": 64}, 2)):
        with pytest.raises(ValueError, match=f"threshold, ratio, budget: expected one of them, got {count}"):
            gate.to_mask(logits, 40, **rules)
    for ratio in (0, 1.01):
        with pytest.raises(ValueError, match=f"ratio: expected more than 0 and at most 1, got {ratio}"):
            gate.to_mask(logits, 40, ratio=ratio)
    with pytest.raises(
        ValueError, match="logits: expected 3 x 3 blocks for 40 tokens at block 16, got 40 x 3"
    ):
        decoding = BlockGate(4, 2, 16, 16, 8, q_pool=())
        decoding.to_mask(decoding(q, k), 40, ratio=0.5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [12, 65, 700])
def test_the_registered_layer_is_usable_at_once_and_nearly_dense(length, causal):
    method = get_method("attention/seer")
    assert method.needs == ("distillation",)
    layer = method.layer(method.config(causal=causal), 2, 1, 16)
    q, k, v = tokens(2, 1, length)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert (layer(q, k, v) - exact).abs().mean() < 0.02
    assert torch.equal(layer(q, k, v), layer(q, k, v))


def needles(seed, blocks=8, block=8, width=16, heads=2):
    """q, k, v [4, H, T, D]: every query asks for the needle of one block, and each block holds it in one token alone."""
    generator = torch.Generator().manual_seed(seed)
    marks = F.normalize(torch.randn(blocks, width, generator=torch.Generator().manual_seed(7)), dim=-1)
    shape = (4, heads, blocks, block, width)
    k, v = (0.3 * torch.randn(shape, generator=generator) for _ in range(2))
    at = torch.randint(block, shape[:3], generator=generator)[..., None, None]
    order = torch.rand(shape[:3], generator=generator).argsort(-1)
    k.scatter_(3, at.expand(*shape[:3], 1, width), 8 * marks[order][..., None, :])
    wanted = torch.randint(blocks, shape[:3], generator=generator)
    q = 4 * marks[wanted][..., None, :] + 0.3 * torch.randn(shape, generator=generator)
    return [x.flatten(2, 3) for x in (q, k, v)]


def kept_attention(slot, q, k, v):
    """Share of the attention that the slot's mask keeps."""
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return float((weights * slot.layer.mask(q, k, v).to_token_mask()).sum(-1).mean())


def test_gates_learn_in_a_slot_and_then_find_what_gates_at_random_do_not():
    slot = AttentionSlot(2, 16)
    handle = sparsify(slot, "seer", block=8, gate_dim=16, selection="ratio", amount=0.25)
    held_out = needles(1000)
    before, losses = kept_attention(slot, *held_out), []
    optimizer = torch.optim.Adam(slot.parameters(), lr=1e-2)
    slot.train()
    for step in range(150):
        optimizer.zero_grad()
        tokens = [x.requires_grad_() for x in needles(step)]
        slot(*tokens)
        loss = handle.loss()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in slot.parameters())
        assert all(x.grad is None for x in tokens)  # gates learn from the model, which does not follow them
        optimizer.step()
        losses.append(loss.item())
    slot.eval()
    assert handle.loss() is None
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    after = kept_attention(slot, *held_out)
    assert after > before + 0.3
    assert slot.layer.mask(*held_out).density() < 0.4


@pytest.mark.parametrize("layer", ["slot", "torch"])
def test_gates_of_a_model_that_was_made_sparse_are_distilled(layer):
    if layer == "slot":
        model = AttentionSlot(2, 16)
        batches = (needles(step) for step in range(40))
        run = {"run": lambda model, batch: model(*batch)}
    else:
        torch.manual_seed(0)
        model, run = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True), {}
        batches = (needles(step)[0].transpose(1, 2).flatten(2) for step in range(40))
    handle = sparsify(model, "seer", block=8, gate_dim=16)
    others = {name: x.clone() for name, x in model.state_dict().items() if ".gate." not in f".{name}"}
    losses = distill_gates(model, batches, steps=40, lr=1e-2, **run)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(torch.equal(model.state_dict()[name], x) for name, x in others.items())
    assert not any(slot.layer.dense for slot in handle.slots.values())


def test_a_slot_attends_to_everything_while_its_layer_is_dense_and_tells_the_gate_its_condition():
    slot, (q, k, v) = AttentionSlot(2, 16, condition=3), needles(0)
    sparsify(slot, "seer", block=8, gate_dim=16, selection="ratio", amount=0.25, condition=3)
    told = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    with torch.no_grad():
        slot.layer.gate.w_condition.normal_(generator=torch.Generator().manual_seed(2))
        first, second = (slot(q, k, v, condition=x) for x in told)
        assert not torch.allclose(first, second)
        slot.layer.dense = True
        torch.testing.assert_close(
            slot(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-4
        )
        slot.layer.dense = False
        with pytest.raises(ValueError, match=r"condition: expected \[4, 3\], got none"):
            slot(q, k, v)
    with pytest.raises(
        ValueError, match="condition: expected 0 or 3 channels, as this attention is told, got 8"
    ):
        sparsify(AttentionSlot(2, 16, condition=3), "seer", condition=8)
