"""TidalDecode: positions travel up the layers, are found anew in every step, and are corrected on the way."""

import pytest
import torch
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.layer import DenseAttention
from sparse_core.methods.attention.tidal import (
    TidalSchedule,
    TidalState,
    choose_correction_layer,
    correct_cache,
)

LAYERS, HEADS, LENGTH, WIDTH = 6, 2, 200, 16


def stack(moved_at=None, seed=0, kv_heads=HEADS):
    """Queries, keys and values of all layers, in which each head looks at 4 needles, which move at layer `moved_at`."""
    generator = torch.Generator().manual_seed(seed)
    needles = torch.randint(LENGTH - 1, (2, 4), generator=generator)
    layers = []
    for layer in range(LAYERS):
        q = torch.randn(1, HEADS, 1, WIDTH, generator=generator)
        k, v = (torch.randn(1, kv_heads, LENGTH, WIDTH, generator=generator) for _ in range(2))
        for place in needles[int(moved_at is not None and layer >= moved_at)]:
            for head in range(kv_heads):
                k[0, head, place] = 5 * q[0, head * (HEADS // kv_heads), 0]
        layers.append((q, k, v))
    return layers


def fill(layers):
    caches = []
    for _, k, v in layers:
        caches.append(KVCache(1, k.shape[1], WIDTH))
        caches[-1].append(k, v)
    return caches


def run(layers, schedule):
    state = TidalState(schedule)
    return [
        state.attend(i, q, cache)
        for i, ((q, _, _), cache) in enumerate(zip(layers, fill(layers), strict=True))
    ]


def errors(layers, schedule):
    exact = [F.scaled_dot_product_attention(*layer, enable_gqa=True) for layer in layers]
    return [float((a - b).abs().max()) for a, b in zip(run(layers, schedule), exact, strict=True)]


def test_full_and_selecting_layers_are_dense():
    found = errors(stack(), TidalSchedule(num_layers=LAYERS, full=(0,), select=(1, 3), topk=8))
    assert max(found[0], found[1], found[3]) < 1e-5


def test_needles_that_stay_are_kept_and_needles_that_move_want_a_correction():
    with_one, with_two = (
        {"num_layers": LAYERS, "full": (0,), "select": s, "topk": 8} for s in ((1,), (1, 3))
    )
    assert max(errors(stack(), TidalSchedule(**with_one))) < 0.05
    moved = stack(moved_at=3)
    assert max(errors(moved, TidalSchedule(**with_one))[3:]) > 0.3
    assert max(errors(moved, TidalSchedule(**with_two))) < 0.05


def test_a_budget_of_everything_is_dense_in_every_layer():
    assert max(errors(stack(), TidalSchedule(num_layers=LAYERS, full=(0,), select=(1,), topk=999))) < 1e-5


def test_positions_are_those_of_each_query_head_with_the_newest_among_them():
    layers = stack(kv_heads=1)
    state, caches = TidalState(TidalSchedule(num_layers=LAYERS, full=(), select=(0,), topk=5)), fill(layers)
    state.attend(0, layers[0][0], caches[0])
    index = state.positions.index
    assert index.shape == (1, HEADS, 1, 5)
    assert (index == LENGTH - 1).any(-1).all()
    assert not torch.equal(index[0, 0].sort().values, index[0, 1].sort().values)


def test_each_step_chooses_anew():
    layers = stack()
    state, caches = TidalState(TidalSchedule(num_layers=LAYERS, full=(), select=(0,), topk=5)), fill(layers)
    state.attend(0, layers[0][0], caches[0])
    first = state.positions
    caches[0].append(layers[0][1][:, :, :1], layers[0][2][:, :, :1])
    state.attend(0, -layers[0][0], caches[0])
    assert state.positions.kv_len == LENGTH + 1
    assert not torch.equal(first.index, state.positions.index)


def test_reads_follow_the_schedule():
    layers, schedule = stack(), TidalSchedule(num_layers=LAYERS, full=(0,), select=(1, 3), topk=8)
    with counters.count() as counter:
        run(layers, schedule)
    assert counter.products == HEADS * (3 * LENGTH + 3 * 8)


def test_sparse_layers_need_a_choice_of_this_step():
    layers = stack()
    state, caches = TidalState(TidalSchedule(num_layers=LAYERS, full=(0,), select=(1,), topk=8)), fill(layers)
    with pytest.raises(
        RuntimeError, match="layer 2: expected positions that layer 1 chose in this step, got none"
    ):
        state.attend(2, layers[2][0], caches[2])
    state.attend(1, layers[1][0], caches[1])
    caches[2].append(layers[2][1][:, :, :1], layers[2][2][:, :, :1])
    with pytest.raises(RuntimeError, match="layer 2: expected positions"):
        state.attend(2, layers[2][0], caches[2])


def test_the_cache_is_corrected_in_place():
    layers = stack()
    caches, fresh = fill(layers), stack(seed=1)
    correct_cache(
        lambda first, last: [(k[:, :, first:last], v[:, :, first:last]) for _, k, v in fresh],
        caches,
        (50, 60),
    )
    expected = layers[3][1].clone()
    expected[:, :, 50:60] = fresh[3][1][:, :, 50:60]
    assert torch.equal(caches[3].keys, expected)
    with pytest.raises(ValueError, match="span: expected 0 <= first < last <= 200, got 60 and 50"):
        correct_cache(lambda first, last: [], caches, (60, 50))


class Stack(torch.nn.Module):
    """The layers of `stack` as a model of its number."""

    def __init__(self, moved_at=None):
        super().__init__()
        self.moved_at, self.layers = moved_at, torch.nn.ModuleList(DenseAttention() for _ in range(LAYERS))

    def forward(self, seed):
        drawn = stack(self.moved_at, seed)
        for layer, (q, k, v) in zip(self.layers, drawn, strict=True):
            layer(q.expand_as(k), k, v)


def test_a_model_corrects_its_caches_and_chooses_its_layer():
    caches, fresh = fill(stack()), stack(seed=1)
    correct_cache(Stack(), caches, (50, 60), batch=1)
    for number, (_, k, v) in enumerate(fresh):
        assert torch.equal(caches[number].keys[:, :, 50:60], k[:, :, 50:60])
        assert torch.equal(caches[number].values[:, :, 50:60], v[:, :, 50:60])
        assert torch.equal(caches[number].keys[:, :, 60:], stack()[number][1][:, :, 60:])
    assert choose_correction_layer(Stack(moved_at=4), range(3), topk=8, select=1) == 4
    with pytest.raises(ValueError, match="batch: expected all tokens so far to run the model on, got none"):
        correct_cache(Stack(), caches, (50, 60))
    with pytest.raises(ValueError, match="data: expected batches to run the model on, got none"):
        choose_correction_layer(Stack())


def test_one_cache_may_stand_for_the_only_layer_and_too_few_are_refused():
    (cache, *_), (_, k, v) = fill(stack()), stack(seed=1)[0]
    correct_cache(lambda first, last: [(k[:, :, first:last], v[:, :, first:last])], cache, (0, 200))
    assert torch.equal(cache.keys, k)
    before = cache.keys
    with pytest.raises(ValueError, match="cache: expected one for each of 6 layers, got 1"):
        correct_cache(Stack(), cache, (0, 200), batch=2)
    assert torch.equal(cache.keys, before)


def test_a_schedule_begins_with_its_layers():
    assert TidalSchedule(12, select=(2, 6)) == TidalSchedule(num_layers=12, select=(2, 6))


def test_the_correcting_layer_is_where_the_needles_move():
    steps = [[(q, k) for q, k, _ in stack(moved_at=4, seed=seed)] for seed in range(3)]
    assert choose_correction_layer(steps, topk=8, select=1) == 4
    with pytest.raises(ValueError, match="steps: expected at least one step"):
        choose_correction_layer([], topk=8)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"topk": 0}, "topk: expected at least one position, got 0"),
        ({"select": ()}, "select: expected at least one layer"),
        ({"select": (13, 2)}, "select: expected at least one layer, in ascending order"),
        ({"select": (2, 2)}, "select: expected at least one layer, in ascending order"),
        ({"select": (2, 40)}, "full and select: expected layers 0 to 31"),
        ({"full": (0,)}, r"full: expected every layer before the first selecting one, got none for \[1\]"),
    ],
)
def test_schedules_that_cannot_be_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        TidalSchedule(**wrong)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="layer: expected 0 to 31, got 32"):
        TidalState(TidalSchedule()).attend(32, torch.zeros(1, 1, 1, 8), KVCache(1, 1, 8))


def test_several_new_tokens_at_once_are_refused():
    with pytest.raises(
        NotImplementedError, match=r"q1: expected one new token, \[B, H, 1, D\], got \[1, 2, 3, 16\]"
    ):
        TidalState(TidalSchedule()).attend(2, torch.zeros(1, 2, 3, WIDTH), KVCache(1, 2, WIDTH))


def test_a_shorter_sample_of_a_batch_keeps_as_many_keys_as_it_has():
    layers = [
        [torch.cat(pair) for pair in zip(*both, strict=True)]
        for both in zip(stack(), stack(seed=1), strict=True)
    ]
    schedule = TidalSchedule(num_layers=LAYERS, full=(), select=(0,), topk=32)
    whole, short, caches = TidalState(schedule), TidalState(schedule), fill_batch(layers, missing=176)
    for layer, (q, k, v) in enumerate(layers[:3]):
        out = whole.attend(layer, q, caches[layer])
        own = KVCache(1, HEADS, WIDTH)
        own.append(k[1:, :, 176:], v[1:, :, 176:])
        torch.testing.assert_close(out[1:], short.attend(layer, q[1:], own), atol=2e-6, rtol=1e-4)
    assert (whole.positions.index >= 0).sum(-1).flatten().tolist() == [32, 32, 24, 24]


def fill_batch(layers, missing):
    """Caches of two samples, of which the second one lacks its first `missing` tokens."""
    caches = []
    for _, k, v in layers:
        caches.append(KVCache(2, HEADS, WIDTH, page=16))
        caches[-1].append(k, v)
        pages = torch.zeros(2, HEADS, missing // 16, dtype=torch.bool)
        pages[1] = True
        caches[-1].evict(pages)
    return caches
