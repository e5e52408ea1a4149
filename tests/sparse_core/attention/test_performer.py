"""Random features: orthogonal, right in the mean; linear attention against its quadratic formula."""

import pytest
import torch

from sparse_core.attention.performer import draw_projection, exp_features, linear_attention, relu_features


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("features", "width"), [(5, 5), (23, 7), (3, 8), (1, 1)])
def test_rows_are_orthogonal_within_each_block_and_as_long_as_normal_ones(features, width):
    projection = draw_projection(features, width, torch.Generator().manual_seed(0))
    assert projection.shape == (features, width)
    for block in projection.split(width):
        products = block @ block.mT
        torch.testing.assert_close(products, torch.diag(products.diagonal()), atol=1e-4, rtol=0)
    many = draw_projection(4000, 8, torch.Generator().manual_seed(0))
    assert many.square().sum(-1).mean() == pytest.approx(8, rel=0.05)


def test_the_same_seed_draws_the_same():
    one, two, other = (draw_projection(9, 4, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_many_features_give_softmax_attention():
    """In the mean, and slowly: the variance of the estimate grows as exp |q + k|^2."""
    q, k, v = (draw(1, 2, 30, 8, seed=s) for s in range(1, 4))
    q, k, errors = 0.6 * q, 0.6 * k, []
    exact = (q @ k.mT * 8**-0.5).softmax(-1) @ v
    for features in (20, 400, 20000):
        projection = draw_projection(features, 8, torch.Generator().manual_seed(0))
        near = exp_features(q, projection, (-1,)), exp_features(k, projection, (-2, -1))
        errors.append(float((linear_attention(*near, v, causal=False) - exact).abs().mean()))
    assert errors[2] < 0.01 < 0.04 < (exact - v.mean(2, keepdim=True)).abs().mean()
    assert errors[2] < errors[1] / 2 < errors[0] / 4


@pytest.mark.parametrize("length", [1, 5, 64, 65, 130])
@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention_is_its_quadratic_formula(length, causal):
    q, k = (relu_features(draw(2, 3, length, 4, seed=s), draw(6, 4, seed=9)) for s in range(2))
    v = draw(2, 3, length, 5, seed=3)
    weights = q.double() @ k.double().mT
    weights = weights.tril() if causal else weights
    exact = weights / weights.sum(-1, keepdim=True) @ v.double()
    torch.testing.assert_close(linear_attention(q, k, v, causal=causal).double(), exact, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_causal_sum_are_those_of_the_formula():
    q, k, v = (draw(1, 1, 70, 4, seed=s).abs().double().requires_grad_() for s in range(3))
    ours = linear_attention(q, k, v, causal=True)
    weights = (q @ k.mT).tril()
    exact = weights / weights.sum(-1, keepdim=True) @ v
    found, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (ours, exact))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_absent_tokens_change_no_features_of_the_others():
    k, projection = draw(1, 1, 6, 4), draw(9, 4, seed=1)
    longer = torch.cat([k, 100 * projection[None, None, :3]], 2)
    there = (torch.arange(9) < 6)[:, None]
    found = exp_features(longer, projection, (-2, -1), there)[:, :, :6]
    torch.testing.assert_close(found, exp_features(k, projection, (-2, -1)))
