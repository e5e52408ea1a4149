import math
import re

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dataengine import quality
from enerverse import metrics
from enerverse.metrics.intervals import student_quantile


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Image pairs [2, 3, 3, 24, 31]: unrelated, near, and flat (where cancellation would show)."""
    image, other = noise(0, 2, 3, 3, 24, 31), noise(1, 2, 3, 3, 24, 31)
    near = (image + 0.05 * (other - 0.5)).clamp(0, 1)
    return [(image, other), (image, near), (image * 0 + 0.9, other * 1e-3 + 0.9)]


@pytest.mark.parametrize("case", range(3))
def test_ssim_and_psnr_equal_scikit_image(case: int) -> None:
    images, reference = pairs()[case]
    ours, decibels = metrics.ssim(images, reference), metrics.psnr(images, reference)
    assert ours.shape == decibels.shape == (2, 3)
    for index in np.ndindex(2, 3):
        a, b = images[index].double().numpy(), reference[index].double().numpy()
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        theirs = structural_similarity(a, b, data_range=1.0, channel_axis=0, **options)
        assert ours[index].item() == pytest.approx(theirs, abs=1e-4)
        assert decibels[index].item() == pytest.approx(
            peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-4
        )


def test_equal_images() -> None:
    image = noise(0, 3, 16, 16)
    assert metrics.psnr(image, image).item() == math.inf
    assert metrics.ssim(image, image).item() == pytest.approx(1.0)


def test_psnr_on_a_mask_sees_only_the_mask() -> None:
    reference = torch.full((2, 3, 16, 16), 0.5)
    images = reference.clone()
    images[..., :4, :4] += 0.1
    images[..., 15, 15] = math.nan
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:4, :4] = True
    assert metrics.psnr(images, reference, mask).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert metrics.psnr(images, reference, torch.zeros_like(mask)).isnan().all()


def test_the_window_is_the_same_by_matrices_and_by_convolutions(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.rand(2, 3, 23, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    found = []
    for small in (quality.SMALL, 0):
        monkeypatch.setattr(quality, "SMALL", small)
        value = quality.ssim_map(x, y)
        found.append((value.detach(), torch.autograd.grad(value.square().sum(), x)[0]))
    torch.testing.assert_close(*(value for value, _ in found))
    torch.testing.assert_close(*(gradient for _, gradient in found))


def test_ssim_on_a_mask_sees_only_its_centres() -> None:
    reference, other = noise(0, 3, 32, 32), noise(1, 3, 32, 32)
    images = reference.clone()
    images[..., 16:] = other[..., 16:]
    far = torch.zeros(32, 32, dtype=torch.bool)
    far[:, :11] = True  # windows centred here end at column 15
    assert metrics.ssim(images, reference, far).item() == pytest.approx(1.0)
    assert metrics.ssim(images, reference, ~far).item() < 0.5
    whole = torch.ones(32, 32, dtype=torch.bool)
    assert metrics.ssim(images, reference, whole) == pytest.approx(metrics.ssim(images, reference))


def test_moving_mask_finds_a_changed_channel() -> None:
    reference = torch.full((1, 3, 8, 8), 0.5)
    frames = reference.repeat(2, 1, 1, 1)
    frames[1, 2, 3, 4] += 21 / 255
    frames[1, :, 0, 0] += 19 / 255
    mask = metrics.moving_mask(frames, reference)
    assert mask.nonzero().tolist() == [[1, 3, 4]]


def test_mask_iou() -> None:
    a, b = torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(3, 4, 4, dtype=torch.bool)
    a[0, :2], b[0, 1:3] = True, True
    a[1, 0, 0] = True
    assert metrics.mask_iou(a, b).tolist() == pytest.approx([1 / 3, 0.0, 1.0])


ok, small = torch.zeros(3, 16, 16), torch.zeros(3, 8, 16)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: metrics.psnr(ok.byte(), ok),
            "images: expected floats in [0, 1], got torch.uint8; divide bytes by 255",
        ),
        (
            lambda: metrics.ssim(torch.zeros(16, 16, 3), ok),
            "images: expected shape [..., 3, H, W], got [16, 16, 3]; move the channels",
        ),
        (lambda: metrics.psnr(ok, ok[None]), "reference: expected shape [3, 16, 16], got [1, 3, 16, 16]"),
        (lambda: metrics.moving_mask(ok, small), "reference: expected shape [3, 16, 16], got [3, 8, 16]"),
        (
            lambda: metrics.ssim(small, small),
            "images: expected sides of at least 11 pixels for SSIM, got 8x16; enlarge them",
        ),
        (
            lambda: metrics.psnr(ok, ok, torch.ones(16, 16)),
            "mask: expected a bool mask [..., H, W] of 16x16 pixels, got float32 [16, 16]",
        ),
        (
            lambda: metrics.mask_iou(ok > 0, small > 0),
            "mask, reference: expected two bool masks of one shape [..., H, W], "
            "got bool [3, 16, 16] and bool [3, 8, 16]",
        ),
        (
            lambda: metrics.wilson(3, 2),
            "successes: expected 0 <= successes <= n and n >= 1, got 3 of 2",
        ),
        (
            lambda: metrics.wilson(1, 2, confidence=95),
            "confidence: expected a share between 0 and 1, got 95; 0.95 is usual",
        ),
        (
            lambda: metrics.student_mean([1.0]),
            "values: expected two or more finite numbers in one row, got shape (1,)",
        ),
        (
            lambda: metrics.bootstrap_mean([1.0, math.nan]),
            "values: expected two or more finite numbers in one row, got nan or inf among them",
        ),
        (
            lambda: metrics.bootstrap_paired_difference([1, 2], [1, 2, 3]),
            "baseline: expected 2 values, one per case, got 3",
        ),
        (
            lambda: metrics.mcnemar_exact([True], [True, False]),
            "second: expected one outcome per case of first, got (1,) and (2,)",
        ),
        (
            lambda: metrics.frechet_distance(torch.zeros(1, 4), torch.zeros(3, 4)),
            "features: expected shape [N, D] with N >= 2, got [1, 4]",
        ),
        (
            lambda: metrics.frechet_distance(torch.zeros(3, 4), torch.zeros(3, 5)),
            "reference: expected 4 features per row, got 5",
        ),
        (
            lambda: metrics.frechet_distance(torch.zeros(3, 4), torch.full((3, 4), math.inf)),
            "reference: expected finite numbers, got nan or inf; check the feature network",
        ),
        (
            lambda: student_quantile(0.4, 1),
            "probability: expected 0.5 <= p < 1 and degrees >= 1, got 0.4 and 1",
        ),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call()


@given(n=st.integers(1, 500), share=st.floats(0, 1), confidence=st.floats(0.5, 0.99))
@settings(max_examples=50)
def test_wilson_equals_scipy(n: int, share: float, confidence: float) -> None:
    successes = round(share * n)
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    ours = metrics.wilson(successes, n, confidence)
    assert ours == pytest.approx((successes / n, theirs.low, theirs.high), abs=1e-9)
    assert 0 <= ours.low <= ours.estimate <= ours.high <= 1


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 30, 101])
@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.975, 0.995])
def test_student_quantile_equals_scipy(probability: float, degrees: int) -> None:
    theirs = scipy.stats.t.ppf(probability, degrees)
    assert student_quantile(probability, degrees) == pytest.approx(theirs, rel=1e-8, abs=1e-8)


def test_student_mean_covers_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(1000, 3))
    covered = np.mean([(i := metrics.student_mean(row)).low <= 0 <= i.high for row in draws])
    assert 0.93 < covered < 0.97


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(size=400)
    first = metrics.bootstrap_mean(values, seed=1)
    assert first == metrics.bootstrap_mean(values, seed=1)
    assert first != metrics.bootstrap_mean(values, seed=2)
    width = 2 * 1.96 * values.std(ddof=1) / 20
    assert first.high - first.low == pytest.approx(width, rel=0.05)
    assert first.low < values.mean() < first.high


def test_paired_difference_sees_through_shared_variation() -> None:
    cases = np.random.default_rng(0).normal(size=30) * 100
    paired = metrics.bootstrap_paired_difference(cases + 1, cases, seed=0)
    assert paired == pytest.approx((1, 1, 1))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=50)
def test_mcnemar_equals_the_binomial_test(outcomes: list[tuple[bool, bool]]) -> None:
    first, second = zip(*outcomes, strict=True)
    wins = sum(a and not b for a, b in outcomes)
    discordant = sum(a != b for a, b in outcomes)
    theirs = scipy.stats.binomtest(wins, discordant).pvalue if discordant else 1.0
    assert metrics.mcnemar_exact(first, second) == pytest.approx(theirs)


def test_frechet_distance_equals_the_formula_with_a_matrix_root() -> None:
    mixing = noise(2, 6, 6, dtype=torch.float64)
    first, second = noise(0, 50, 6, dtype=torch.float64) @ mixing, noise(1, 40, 6, dtype=torch.float64) + 0.3
    a, b = first.numpy(), second.numpy()
    covariance, other = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(covariance @ other).real
    theirs = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(covariance + other - 2 * root)
    assert metrics.frechet_distance(first, second) == pytest.approx(theirs, rel=1e-8)
    assert metrics.frechet_distance(second, first) == pytest.approx(theirs, rel=1e-8)


def test_frechet_distance_of_known_sets() -> None:
    row = torch.tensor([[-1.0], [0.0], [1.0]])  # mean 0, deviation 1
    assert metrics.frechet_distance(row, 3 * row + 2) == pytest.approx(2**2 + (3 - 1) ** 2)
    few = noise(0, 4, 64)  # fewer rows than features: singular covariances
    assert metrics.frechet_distance(few, few) == pytest.approx(0.0, abs=1e-6)
