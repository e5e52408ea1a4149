"""Combiner: the resulting attention matrix, element by element; causality, cost, gradients."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparse_core import counters
from sparse_core.attention.merge import attend_part, merge_lse
from sparse_core.methods.attention.combiner import Combiner, Config, combiner_attention, effective_attention

LENGTH = 24
VARIANTS = {
    "fixed": {"segment": 5},
    "logsparse": {"variant": "logsparse"},
    "axial": {"variant": "axial", "grid": (4, 6)},
    "fixed both ways": {"segment": 5, "causal": False},
    "axial both ways": {"variant": "axial", "grid": (4, 6), "causal": False},
    "axial rows": {"variant": "axial", "grid": (4, 6), "axial": "rows"},
}


def draw(length=LENGTH, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, length, width, generator=generator) for _ in range(3)]


def regions(variant, i, length=LENGTH):
    """Direct keys of row i, and its regions, written out."""
    config = VARIANTS[variant]
    causal = config.get("causal", True)
    if config.get("variant") == "logsparse":
        found = []
        for level in range(10):
            if i >> level & 1:
                found.append(list(range((i >> level << level) - 2**level, i >> level << level)))
        return [i], found
    if config.get("axial") == "rows":
        config = {"segment": config["grid"][1]}
    if config.get("variant") == "axial":
        rows, columns = config["grid"]
        r, c = divmod(i, columns)
        own_row = [r * columns + x for x in range(columns) if not causal or x <= c]
        own_column = [y * columns + c for y in range(rows) if y != r and (not causal or y < r)]
        found = []
        for x in range(columns):
            if x != c:
                found.append([y * columns + x for y in range(r)])
                if not causal:
                    found.append([y * columns + x for y in range(r + 1, rows)])
        return own_row + own_column, [region for region in found if region]
    b = config["segment"]
    own = i // b
    direct = [j for j in range(own * b, min(length, own * b + b)) if not causal or j <= i]
    parts = [list(range(s * b, min(length, s * b + b))) for s in range(-(-length // b))]
    return direct, [part for s, part in enumerate(parts) if (s < own if causal else s != own)]


def written_out(variant, q, k, pool=torch.amax, bias=False):
    """The paper's formula for one head, q and k [T, D]."""
    q = q.double() * q.shape[-1] ** -0.5
    k, matrix = k.double(), torch.zeros(len(q), len(q), dtype=torch.double)
    for i in range(len(q)):
        direct, parts = regions(variant, i, len(q))
        logits = [q[i] @ k[j] for j in direct]
        for part in parts:
            logits.append(q[i] @ pool(k[part], 0) + (math.log(len(part)) if bias else 0))
        weights = torch.stack(logits).softmax(0)
        for weight, j in zip(weights, direct, strict=False):
            matrix[i, j] += weight
        for weight, part in zip(weights[len(direct) :], parts, strict=True):
            matrix[i, part] += weight * (k[part] @ pool(q[part], 0)).softmax(0)
    return matrix


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_matrix_is_the_papers(variant):
    q, k, _ = draw()
    matrix = effective_attention(q, k, **VARIANTS[variant])
    torch.testing.assert_close(
        matrix[1, 2].double(), written_out(variant, q[1, 2], k[1, 2]), atol=1e-6, rtol=1e-5
    )


def relu(pool):
    return lambda x, dim: pool(x.relu(), dim)


POOLED = {"mean": torch.mean, "sum": torch.sum, "relu-max": relu(torch.amax), "relu-mean": relu(torch.mean),
          "relu-sum": relu(torch.sum)}  # fmt: skip


@pytest.mark.parametrize(("pool", "function"), POOLED.items())
def test_other_pools_and_the_count(pool, function):
    q, k, _ = draw()
    matrix = effective_attention(q, k, segment=5, pool=pool, log_count_bias=True)
    exact = written_out("fixed", q[0, 0], k[0, 0], function, bias=True)
    torch.testing.assert_close(matrix[0, 0].double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_key_that_may_be_seen_is_reached(variant):
    q, k, _ = draw()
    matrix = effective_attention(q, k, **VARIANTS[variant])
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, LENGTH))
    allowed = torch.ones(LENGTH, LENGTH).bool()
    if VARIANTS[variant].get("causal", True):
        allowed = allowed.tril()
    assert (matrix[..., allowed] > 0).all()
    assert (matrix[..., ~allowed] == 0).all()


@pytest.mark.parametrize("segment", [1, LENGTH])
def test_segments_of_one_token_or_of_all_are_dense_attention(segment):
    q, k, v = draw()
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(combiner_attention(q, k, v, segment=segment), exact, atol=1e-6, rtol=1e-5)


def test_a_mixture_is_half_by_columns_and_half_by_rows():
    q, k, v = draw()
    grid = {"variant": "axial", "grid": (4, 6)}
    ours, columns, rows = (
        combiner_attention(q, k, v, axial=x, **grid) for x in ("mixture", "columns", "rows")
    )
    assert torch.equal(ours[:, :2], columns[:, :2])
    assert torch.equal(ours[:, 2:], rows[:, 2:])
    assert not torch.allclose(columns, rows, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_is_seen_by_nobody_and_gets_0(variant):
    q, k, v = draw()
    hidden = torch.zeros(2, LENGTH, dtype=torch.bool)
    hidden[0, [0, 3, 4, 20, 21, 22, 23]], hidden[1, 10:] = True, True
    there = ~hidden[:, None, :, None]
    eye = torch.eye(LENGTH).expand(2, 3, -1, -1)
    matrix = combiner_attention(q, k, eye, key_padding_mask=hidden, **VARIANTS[variant])
    torch.testing.assert_close(matrix.sum(-1, keepdim=True), there.float().expand(2, 3, -1, 1))
    assert (matrix * ~there.mT == 0).all()
    wanted = there & there.mT
    if VARIANTS[variant].get("causal", True):
        wanted = wanted & torch.ones(LENGTH, LENGTH).bool().tril()
    assert (matrix[wanted.expand(2, 3, -1, -1)] > 0).all()
    assert (matrix[~wanted.expand(2, 3, -1, -1)] == 0).all()
    junk = [x.masked_fill(hidden[:, None, :, None], torch.nan).requires_grad_() for x in (q, k, v)]
    out = combiner_attention(*junk, key_padding_mask=hidden, **VARIANTS[variant])
    torch.testing.assert_close(out, matrix @ v, atol=1e-5, rtol=1e-4)
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in junk)


@pytest.mark.parametrize("config", [{"segment": 5}, {"variant": "logsparse"}])
def test_padding_at_the_end_changes_nothing_before_it(config):
    q, k, v = draw()
    hidden = (torch.arange(LENGTH) >= 17).expand(2, -1)
    ours = Combiner(Config(**config)).attend(q, k, v, key_padding_mask=hidden)
    alone = combiner_attention(*(x[:, :, :17] for x in (q, k, v)), **config)
    torch.testing.assert_close(ours[:, :, :17], alone)
    nobody = torch.ones(2, LENGTH, dtype=torch.bool)
    assert (combiner_attention(q, k, v, key_padding_mask=nobody, **config) == 0).all()


def test_equal_keys_weigh_what_they_should_with_the_count():
    q, _, v = draw()
    k = torch.ones(2, 3, LENGTH, 8)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for variant in ("fixed", "logsparse", "axial"):
        ours = combiner_attention(q, k, v, log_count_bias=True, **VARIANTS[variant])
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["fixed", "logsparse", "axial"])
@pytest.mark.parametrize("moved", [0, 7, 23])
def test_a_token_changes_nothing_before_it(variant, moved):
    q, k, v = draw()
    before = combiner_attention(q, k, v, **VARIANTS[variant])
    for x in (q, k, v):
        x[:, :, moved] += 1
    after = combiner_attention(q, k, v, **VARIANTS[variant])
    assert torch.equal(before[:, :, :moved], after[:, :, :moved])
    assert not torch.allclose(before[:, :, moved:], after[:, :, moved:])


@pytest.mark.parametrize("length", [1, 2, 31, 33])
@pytest.mark.parametrize("variant", ["fixed", "logsparse"])
def test_any_length_will_do(variant, length):
    q, k, _ = draw(length)
    matrix = effective_attention(q, k, variant=variant)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, length))
    assert matrix.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_finite_and_reach_everything(variant):
    q, k, v = (x.requires_grad_() for x in draw())
    combiner_attention(q, k, v, **VARIANTS[variant]).square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert (x.grad.abs().sum((0, 1, 3)) > 0).sum() >= LENGTH - 1


@pytest.mark.parametrize(
    ("pool", "plain"),
    [("deepset", "mean"), ("deepset-max", "max"), ("deepset-mean", "mean"), ("deepset-sum", "sum")],
)
def test_a_learned_pool_starts_as_a_plain_one_and_learns(pool, plain):
    q, k, v = draw()
    module = Combiner(Config(segment=5, pool=pool), 8)
    torch.testing.assert_close(module(q, k, v), combiner_attention(q, k, v, segment=5, pool=plain))
    module(q, k, v).square().sum().backward()
    assert module.pools[1].outer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layer_serves_heads_that_share_keys(variant):
    q, k, v = draw()
    module = Combiner(Config(**VARIANTS[variant]))
    exact = combiner_attention(q, *(x[:, :1].expand(-1, 3, -1, -1) for x in (k, v)), **VARIANTS[variant])
    torch.testing.assert_close(module(q, k[:, :1], v[:, :1]), exact)
    with pytest.raises(
        ValueError, match="heads: expected a multiple of the 2 key-value heads, got 3 query heads"
    ):
        module(q, k[:, :2], v[:, :2])


def test_regions_without_a_token_weigh_nothing():
    q, k, v = draw(17)  # logsparse fills up to 32: the last regions of every level are empty or ragged
    for config in ({"variant": "logsparse"}, {"segment": 16}, {"segment": 16, "causal": False}):
        matrix = effective_attention(q, k, log_count_bias=True, **config)
        torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, 17))
        torch.testing.assert_close(matrix @ v, combiner_attention(q, k, v, log_count_bias=True, **config))


def test_cost_is_far_below_dense():
    q, k, v = (x[:1, :1] for x in draw(4096))
    with counters.count() as counter:
        combiner_attention(q, k, v)
    assert counter.products == 4096 * (64 + 64 + 1)
    with counters.count() as counter:
        combiner_attention(q, k, v, variant="logsparse")
    assert counter.products < 4096 * 26


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "logsparse"])
@pytest.mark.parametrize("length", [24, 22])
def test_what_is_counted_is_what_is_multiplied(variant, length):
    config = {**VARIANTS[variant], **({"grid": (length // 2, 2)} if "axial" in variant else {})}
    with counters.count() as counter, FlopCounterMode(display=False) as meter:
        combiner_attention(*draw(length), **config)
    assert meter.get_total_flops() == 2 * counter.multiply_adds > 0


def test_parts_merge_to_the_whole():
    scores, values = torch.randn(3, 5, 9), torch.randn(3, 9, 4)
    scores[0, 0], scores[:, :, :4] = -torch.inf, -torch.inf
    parts = [attend_part(scores[..., a:b], values[:, a:b]) for a, b in ((0, 4), (4, 6), (6, 9))]
    whole = attend_part(scores, values)
    torch.testing.assert_close(merge_lse(parts), whole)
    assert (merge_lse(parts)[0][0, 0] == 0).all()
    with pytest.raises(ValueError, match="parts: expected at least one"):
        merge_lse([])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"variant": "cubic"}, "variant: expected fixed, logsparse or axial, got 'cubic'"),
        ({"pool": "min"}, "pool: expected max, mean, sum, relu-max, .* deepset-sum, got 'min'"),
        ({"axial": "rows and columns"}, "axial: expected columns, rows or mixture, got 'rows and columns'"),
        (
            {"key_padding_mask": torch.zeros(2, 3, dtype=torch.bool)},
            r"key_padding_mask: expected bool \[2, 24\], got torch.bool \[2, 3\]",
        ),
        ({"segment": 0}, "segment: expected at least one token, got 0"),
        ({"variant": "logsparse", "causal": False}, "variant: expected a causal logsparse"),
        ({"variant": "axial"}, "grid: expected rows times columns to be 24 tokens, got None"),
        (
            {"variant": "axial", "grid": (5, 5)},
            r"grid: expected rows times columns to be 24 tokens, got \(5, 5\)",
        ),
        (
            {"segment": 5, "strict": True},
            "segment: expected one that divides 24 tokens, got 5; set strict=False",
        ),
        ({"pool": "deepset"}, "pool: expected learned pools for deepset, got none"),
    ],
)
def test_bad_input_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        combiner_attention(*draw(), **wrong)


def test_sizes_may_be_given_in_order():
    q, k, v = draw()
    assert torch.equal(combiner_attention(q, k, v, "fixed", 5), combiner_attention(q, k, v, segment=5))
    with pytest.raises(ValueError, match="unknown option 'segmnt': did you mean 'segment'"):
        combiner_attention(q, k, v, segmnt=5)


def test_shapes_that_differ_are_refused():
    q, k, v = draw()
    with pytest.raises(ValueError, match=r"q, k, v: expected one \[B, H, T, D\], got"):
        combiner_attention(q, k[:, :1], v)
    with pytest.raises(ValueError, match="width: expected the channels per head"):
        Combiner(Config(pool="deepset"))
