"""Scores of imagined frames, against sums over the same pixels."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from enerverse.evaluate.imagination import (
    COLUMNS,
    HORIZON,
    SPANS,
    Window,
    best_of,
    copy_last,
    gain,
    held_out_windows,
    imagine_window,
    measure,
    pool,
    reconstruct,
)
from enerverse.metrics import moving_mask, ssim

VIEWS = ("front", "left", "top")


@pytest.fixture
def make_window():
    """A window of random pictures in which the right half of every future frame differs from the last one."""

    def make(seed: int = 0, seen: int = 3, segmentation: dict | None = None) -> Window:
        rng = np.random.default_rng(seed)
        pictures = rng.integers(0, 120, (1, 2, 16, 16, 3), dtype=np.uint8).repeat(seen + HORIZON, 0)
        pictures[seen:, :, :, 8:] += rng.integers(60, 120, (HORIZON, 2, 16, 8, 3), dtype=np.uint8)
        return Window(
            pictures=pictures,
            seen=seen,
            episode=SimpleNamespace(segmentation=segmentation),
            latents=torch.zeros(seen, 2, 4, 4, 4),
        )

    return make


def row(frames: torch.Tensor, windows: list[Window], span: str = "1-8") -> dict[str, float]:
    return pool(np.stack([measure(frames, window)[span] for window in windows]))


def test_psnr_is_that_of_all_pixels_together(make_window):
    """Errors are pooled before the logarithm: two windows of different error weigh by their pixels."""
    windows = [make_window(0), make_window(1)]
    guess = torch.full((HORIZON, 2, 3, 16, 16), 0.3)
    joined = torch.cat([window.truth[:8] for window in windows]).double()
    expected = -10 * np.log10(float((joined - 0.3).square().mean()))
    assert row(guess, windows)["psnr"] == pytest.approx(expected, abs=1e-4)


def test_moving_psnr_counts_pixels_that_differ_from_the_last_observed_frame(make_window):
    window = make_window()
    guess = torch.full((HORIZON, 2, 3, 16, 16), 0.3)
    moved = moving_mask(window.truth, window.last)[8:]
    assert torch.equal(moved, (torch.arange(16) >= 8).expand_as(moved))
    errors = (window.truth[8:].double() - 0.3).square().mean(2)[moved]
    expected = -10 * np.log10(float(errors.mean()))
    assert row(guess, [window], "9-16")["psnr_moving"] == pytest.approx(expected, abs=1e-4)


def test_similarity_is_the_mean_over_frames(make_window):
    window = make_window()
    guess = (window.truth + 0.1 * torch.rand(window.truth.shape)).clamp(0, 1)
    expected = float(ssim(guess[:8], window.truth[:8]).mean())
    assert row(guess, [window])["ssim"] == pytest.approx(expected, abs=1e-5)


def test_the_truth_scores_best(make_window):
    window = make_window()
    figures = row(window.truth, [window])
    assert figures["psnr"] > 100
    assert figures["ssim"] == pytest.approx(1, abs=1e-5)
    assert figures["ssim_moving"] == pytest.approx(1, abs=1e-5)


def test_spans_cover_the_horizon_once():
    frames = [index for span in SPANS.values() for index in range(HORIZON)[span]]
    assert frames == list(range(HORIZON))


def test_the_overlap_is_that_of_the_robot_mask(make_window):
    rng = np.random.default_rng(3)
    truth = {view: rng.integers(0, 3, (3 + HORIZON, 16, 16)) for view in ("front", "top")}
    window = make_window(segmentation=truth)
    mask = torch.from_numpy(np.stack([truth["front"][3:], truth["top"][3:]], 1) == 1)
    found = mask & (torch.rand(mask.shape) < 0.5)
    sums = measure(window.truth, window, robot=lambda frames: found)["1-8"]
    expected = (found & mask)[:8].sum((-2, -1)) / mask[:8].sum((-2, -1))
    assert pool(sums[None])["robot_iou"] == pytest.approx(float(expected.double().mean()), abs=1e-6)


def test_copying_repeats_the_last_observed_frame(make_window):
    window = make_window()
    frames = copy_last(window)
    assert frames.shape == window.truth.shape
    expected = torch.from_numpy(window.pictures[2]).permute(0, 3, 1, 2).float() / 255
    assert all(torch.equal(frame, expected) for frame in frames)


def test_copying_has_no_error_where_nothing_moves(make_window):
    window = make_window()
    sums = dict(zip(COLUMNS, measure(copy_last(window), window)["1-8"], strict=True))
    assert sums["error"] == pytest.approx(sums["moving_error"])
    assert sums["moving"] == sums["pixels"] / 2


def test_the_gain_over_oneself_is_nothing(make_window):
    windows = [make_window(seed) for seed in range(4)]
    sums = np.stack([measure(copy_last(window), window)["1-8"] for window in windows])
    found = gain(sums, sums, np.arange(4), resamples=20)
    assert found == (0, 0, 0)


def test_the_gain_is_the_difference_of_pooled_figures(make_window):
    windows = [make_window(seed) for seed in range(4)]
    ours = np.stack([measure(0.5 * (copy_last(w) + w.truth), w)["1-8"] for w in windows])
    base = np.stack([measure(copy_last(w), w)["1-8"] for w in windows])
    found = gain(ours, base, np.array([0, 0, 1, 1]), resamples=50)
    assert found.estimate == pytest.approx(20 * np.log10(2), abs=0.01)  # half the error
    assert found.low <= found.estimate <= found.high


@pytest.fixture
def pipe(make_pipe, make_autoencoder, make_unet):
    pipe = make_pipe(make_unet(plan_tokens=2), views=VIEWS, image_size=32)
    pipe.register_modules(autoencoder=make_autoencoder(patch=8))
    return pipe


def test_windows_are_spread_over_long_enough_episodes(pipe, recorded):
    windows = held_out_windows(pipe, recorded[0], per_episode=3)
    assert 3 <= len(windows) <= 9
    for window in windows:
        assert window.truth.shape == (HORIZON, 3, 3, 32, 32)
        assert len(window.pictures) == window.seen + HORIZON <= len(window.episode)
        assert window.latents.shape == (window.seen, 3, 4, 4, 4)
        picture = np.array(window.episode.stacked_images)[window.seen - 1]
        assert torch.equal(window.last, torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize("told", ["instruction", "plan", "actions"])
def test_imagined_windows_have_the_length_of_the_truth(pipe, recorded, told):
    window = held_out_windows(pipe, recorded[0], per_episode=1)[0]
    frames = imagine_window(
        pipe,
        window,
        told=told,
        generator=torch.Generator().manual_seed(0),
        steps=1,
        samples=2,
    )
    assert frames.shape == (2, *window.truth.shape)
    assert not torch.allclose(frames[0], frames[1], atol=1e-3)


def test_the_ceiling_is_the_truth_through_the_autoencoder(pipe, recorded):
    window = held_out_windows(pipe, recorded[0], per_episode=1)[0]
    with torch.no_grad():
        expected = pipe.autoencoder.decode(pipe.autoencoder.encode(window.truth))
    torch.testing.assert_close(reconstruct(pipe, window), expected)


def test_the_best_of_several_is_the_closest_on_moving_pixels(pipe, recorded):
    window = held_out_windows(pipe, recorded[0], per_episode=1)[0]
    window = replace(window, latents=window.latents + 0.5)
    options = {"steps": 1, "samples": 3}
    samples = imagine_window(pipe, window, generator=torch.Generator().manual_seed(0), **options)
    moved = moving_mask(window.truth, window.last)[:, :, None]
    errors = [float(((frames - window.truth).square() * moved).sum()) for frames in samples]
    best = best_of(pipe, window, 3, torch.Generator().manual_seed(0), steps=1)
    torch.testing.assert_close(best, samples[int(np.argmin(errors))])
