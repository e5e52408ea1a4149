"""Online k-means: routing vectors, both assignments, the moving centroids, and what they must refuse."""

import pytest
import torch

from sparse_core import counters
from sparse_core.attention.kmeans import (
    KMeansRouter,
    balanced_assignment,
    recent_assignment,
    routing_vectors,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ready(heads=2, clusters=3, dim=8, **options):
    router = KMeansRouter(heads, clusters, dim, **options)
    router.init_centroids(routing_vectors(draw(2, heads, 30, dim, seed=7)))
    return router


def test_routing_vectors_have_one_length_so_that_nearest_is_greatest_product():
    r = routing_vectors(3 + 5 * draw(2, 2, 11, 16))
    torch.testing.assert_close(r.norm(dim=-1), torch.full((2, 2, 11), 4.0), atol=1e-3, rtol=0)
    centroids = routing_vectors(draw(2, 5, 16, seed=1))
    nearest = torch.cdist(r, centroids).argmin(-1)
    assert torch.equal((r @ centroids.mT).argmax(-1), nearest)


def test_nan_is_refused():
    x = draw(1, 1, 4, 8)
    x[0, 0, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="x: expected numbers to route by, got NaN"):
        routing_vectors(x)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_centroids_pick_their_best_tokens_in_order_of_position(size):
    affinity = draw(2, 3, 9, 4)
    index = balanced_assignment(affinity, size)
    assert index.shape == (2, 3, 4, size)
    assert (index.diff(dim=-1) > 0).all()
    best = affinity.mT.topk(size, dim=-1).indices.sort(-1).values
    assert torch.equal(index, best)


def test_of_equal_affinities_the_first_positions_win():
    assert balanced_assignment(torch.zeros(1, 1, 9, 2), 3).tolist() == [[[[0, 1, 2], [0, 1, 2]]]]


def test_absent_tokens_are_never_picked():
    there = torch.tensor([[True] * 2 + [False] * 5, [False] * 7])
    index = balanced_assignment(draw(2, 1, 7, 2), 3, there)
    assert index[0].tolist() == [[[0, 1, -1]] * 2]
    assert (index[1] == -1).all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_the_most_recent_of_a_bucket(size, padded):
    b, h, length = 2, 2, 17
    assigned = torch.randint(0, 3, (b, h, length), generator=torch.Generator().manual_seed(1))
    there = torch.rand(b, length, generator=torch.Generator().manual_seed(2)) < 0.7 if padded else None
    own, near, allowed = recent_assignment(assigned, size, there)
    present = torch.ones(b, length, dtype=torch.bool) if there is None else there
    found = {}
    for n in torch.cartesian_prod(*(torch.arange(x) for x in own.shape)).tolist():
        token = int(own[tuple(n)])
        if token >= 0:
            keys = near[n[0], n[1], n[2]][allowed[tuple(n)] & (near[n[0], n[1], n[2]] >= 0)]
            found[n[0], n[1], token] = sorted(keys.tolist())
    expected = {
        (i, j, t): [u for u in range(t + 1) if assigned[i, j, u] == assigned[i, j, t] and present[i, u]][-size:]
        for i in range(b) for j in range(h) for t in range(length) if present[i, t]
    }  # fmt: skip
    assert found == expected


def test_lloyd_finds_planted_clusters():
    planted = routing_vectors(draw(1, 4, 32))
    owner = torch.arange(80) % 4
    rows = routing_vectors(planted[:, owner] + 0.1 * draw(1, 80, 32, seed=1))[None]
    best = 0
    for seed in range(3):  # from some rows Lloyd's algorithm ends in a worse optimum
        router = KMeansRouter(1, 4, 32, seed=seed)
        router.init_centroids(rows)
        found = router.affinity(rows).argmax(-1)[0, 0]
        best = max(best, len({(int(a), int(b)) for a, b in zip(found, owner, strict=True)}) == 4)
    assert best


def test_beginning_is_repeatable_and_leaves_out_what_is_absent():
    rows = draw(2, 2, 20, 8)
    there = torch.ones(2, 20, dtype=torch.bool)
    there[:, 12:] = False
    first, second = KMeansRouter(2, 4, 8), KMeansRouter(2, 4, 8)
    first.init_centroids(rows, there)
    second.init_centroids(torch.where(there[:, None, :, None], rows, 1e3), there)
    assert torch.equal(first.centroids, second.centroids)
    assert not torch.equal(first.centroids, first.centroids.roll(1, 0))


def test_an_update_is_the_moving_mean_and_spares_empty_clusters():
    router = KMeansRouter(1, 3, 2, decay=0.9)
    router.load_state_dict(
        {
            "centroids": torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-5.0, -5.0]]]),
            "initialised": torch.tensor(True),
        }
    )
    r = torch.tensor([[[[2.0, 0.0], [4.0, 0.0], [0.0, 3.0]]]])
    router.observe([(r, torch.tensor([[[0, 0, 1]]]))])
    router.update()
    expected = torch.tensor([[[0.9 + 0.3, 0.0], [0.0, 0.9 + 0.3], [-5.0, -5.0]]])
    torch.testing.assert_close(router.centroids, expected)


def test_queries_and_keys_have_half_a_say_each_and_what_is_absent_none():
    router = KMeansRouter(1, 2, 1, decay=0.0)
    router.load_state_dict({"centroids": torch.zeros(1, 2, 1), "initialised": torch.tensor(True)})
    q, k = torch.tensor([[[[1.0], [1.0], [9.0]]]]), torch.tensor([[[[3.0], [7.0], [9.0]]]])
    there = torch.tensor([[True, True, False]])
    router.observe([(q, torch.tensor([[[0, 0, 0]]])), (k, torch.tensor([[[0, 1, 1]]]))], there)
    router.update()
    assert router.centroids.flatten().tolist() == [2.0, 7.0]


def test_what_was_observed_since_the_last_update_adds_up():
    halves, whole = ready(), ready()
    r = routing_vectors(draw(4, 2, 10, 8))
    owners = whole.affinity(r).argmax(-1)
    whole.observe([(r, owners)])
    for part in (slice(0, 1), slice(1, 4)):
        halves.observe([(r[part], owners[part])])
    whole.update()
    halves.update()
    torch.testing.assert_close(halves.centroids, whole.centroids)


def test_the_commitment_loss_and_its_gradient():
    router = ready()
    r = draw(2, 2, 5, 8).requires_grad_()
    owners = router.affinity(r.detach()).argmax(-1)
    there = torch.tensor([[True] * 5, [True, True, False, False, False]])
    mu = torch.stack([router.centroids[h][owners[:, h]] for h in range(2)], 1)
    kept = there[:, None].expand(2, 2, 5)
    torch.testing.assert_close(router.commitment_loss(r, owners), (r - mu).square().mean())
    loss = router.commitment_loss(r, owners, there)
    torch.testing.assert_close(loss, (r - mu)[kept].square().mean())
    (gradient,) = torch.autograd.grad(loss, r)
    torch.testing.assert_close(gradient, 2 * (r - mu).detach() * kept[..., None] / (14 * 8))
    assert not list(router.parameters())


def test_products_with_centroids_are_counted():
    router = ready()
    with counters.count() as counter:
        router.affinity(draw(3, 2, 10, 8))
    assert (counter.products, counter.multiply_adds) == (3 * 2 * 10 * 3, 3 * 2 * 10 * 3 * 8)


@pytest.mark.parametrize("clusters", [4, None])
def test_a_checkpoint_brings_its_centroids(clusters):
    first = KMeansRouter(2, clusters, 8)
    first.init_centroids(draw(1, 2, 16, 8))
    second = KMeansRouter(2, clusters, 8)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.affinity(draw(1, 2, 5, 8)), first.affinity(draw(1, 2, 5, 8)))
    assert second.centroids.shape == (2, 4, 8)


def test_bad_inputs():
    with pytest.raises(ValueError, match="num_clusters: expected at least 1, got 0"):
        KMeansRouter(1, 0, 8)
    with pytest.raises(ValueError, match="decay: expected 0 or more and less than 1, got 1"):
        KMeansRouter(1, 2, 8, decay=1)
    with pytest.raises(RuntimeError, match="centroids not initialised"):
        KMeansRouter(1, 2, 8).affinity(draw(1, 1, 4, 8))
    with pytest.raises(ValueError, match="num_clusters: expected at most the 3 tokens, got 4"):
        KMeansRouter(1, 4, 8).init_centroids(draw(1, 1, 3, 8))
    with pytest.raises(ValueError, match="x: expected at least one token to begin with, got padding alone"):
        KMeansRouter(1, 2, 8).init_centroids(draw(1, 1, 3, 8), torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="update: expected a forward pass in training mode"):
        ready().update()
