"""Scores of packed labels against the definition, and what four bits are worth."""

import pytest
import torch

from sparse_core.kernels.label_scores import dequantise, label_scores, quantise

CASES = {  # B, Hq, Hkv, T, r
    "plain": (1, 2, 2, 100, 8),
    "grouped": (2, 4, 2, 33, 16),
    "odd": (1, 6, 3, 17, 7),
    "one channel": (2, 1, 1, 5, 1),
    "one key": (1, 2, 1, 1, 3),
    "no key": (1, 2, 1, 0, 4),
}


def draw(case):
    b, hq, hkv, length, r = CASES[case]
    generator = torch.Generator().manual_seed(0)
    labels = 10 * torch.randn(b, hkv, length, r, generator=generator)
    return torch.randn(b, hq, r, generator=generator), labels


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_definition(case):
    q, labels = draw(case)
    ours, exact = (label_scores(q, quantise(labels), implementation=name) for name in ("numba", "reference"))
    torch.testing.assert_close(ours, exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "numba"])
@pytest.mark.parametrize("case", list(CASES)[:-1])
def test_values_are_those_of_the_labels_but_for_half_a_step(case, implementation):
    q, labels = draw(case)
    group = q.shape[1] // labels.shape[1]
    exact = (labels.repeat_interleave(group, 1) @ q[..., None])[..., 0]
    step = (labels.amax(-1) - labels.amin(-1)).amax() / 15
    error = (label_scores(q, quantise(labels), implementation=implementation) - exact).abs()
    assert (error <= (0.5 * step + 0.03) * q.abs().sum(-1, keepdim=True)).all()


@pytest.mark.parametrize("implementation", ["reference", "numba"])
def test_extremes(implementation):
    rows = torch.tensor(
        [[0.0, 0, 0], [6e4, 6e4, 6e4], [-6e4, -2e4, 0], [1e-6, 2e-6, 3e-6], [torch.nan, 1, 2]]
    )
    q = torch.tensor([[[1.0, 2, -1]]])
    found = label_scores(q, quantise(rows[None, None]), implementation=implementation)[0, 0]
    assert found[0] == 0
    torch.testing.assert_close(found[1:3], rows[1:3] @ q[0, 0], rtol=2e-3, atol=0)
    assert abs(found[3]) < 1e-5
    assert found[4].isnan()


def test_half_precision_queries_and_rows_in_pieces():
    q, labels = draw("grouped")
    packed = quantise(labels)
    apart = packed.repeat_interleave(2, 2)[:, :, ::2]
    assert not apart.is_contiguous()
    torch.testing.assert_close(
        label_scores(q.half(), apart), label_scores(q.half().float(), packed, implementation="reference"),
        atol=2e-5, rtol=1e-5,
    )  # fmt: skip
    torch.testing.assert_close(dequantise(apart, 16), dequantise(packed, 16))


def test_what_does_not_fit_is_refused():
    q, labels = draw("plain")
    with pytest.raises(ValueError, match=r"q, packed: expected \[B, H, r\] and bytes \[B, H, T, n\], got"):
        label_scores(q, labels)
    with pytest.raises(
        ValueError, match=r"packed: expected \[1, H, T, 8\] of which H divides 2, got \[1, 2, 100, 7\]"
    ):
        label_scores(q, quantise(labels[..., :6]))
    with pytest.raises(
        ValueError, match=r"packed: expected \[1, H, T, 8\] of which H divides 2, got \[1, 3, 100, 8\]"
    ):
        label_scores(q, quantise(labels[:, :1].expand(-1, 3, -1, -1)))
    with pytest.raises(
        ValueError, match="implementation: expected auto or one of reference, numba, got 'triton'"
    ):
        label_scores(q, quantise(labels), implementation="triton")
