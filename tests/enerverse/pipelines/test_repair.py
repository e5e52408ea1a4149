"""The world model as a generator of the data engine: what it may change, and what it must not."""

import dataclasses

import pytest
import torch

from dataengine.cameras import Cameras
from dataengine.generators import ConstantFill, Renders
from dataengine.views import Views
from enerverse.diffusion import denoise, make_objective, scheduler_times
from enerverse.pipelines.repair import WorldRepairer, nearest
from tests.enerverse.conftest import look_at

FRAMES, SIZE = 11, 24  # more than one chunk of 8; pictures larger than the model's


def place(eyes, start):
    poses = [look_at(eye) for eye in eyes]
    matrix = [[27.0, 0.0, 12.0], [0.0, 27.0, 12.0], [0.0, 0.0, 1.0]]
    return Cameras([f"{start}{i}" for i in range(len(eyes))], [matrix] * len(eyes), poses, SIZE, SIZE)


@pytest.fixture
def references():
    cameras = place([(0.9, 0.1, 0.5), (-0.8, 0.3, 0.6), (0.1, 0.9, 0.5)], "real")
    images = torch.rand(FRAMES, 3, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1))
    return Views(cameras=cameras, images=images)


@pytest.fixture
def renders():
    generator = torch.Generator().manual_seed(2)
    cameras = place([(0.8, -0.2, 0.5), (0.2, 0.8, 0.6)], "new")
    images = torch.rand(FRAMES, 2, SIZE, SIZE, 3, generator=generator)
    alpha = (torch.rand(FRAMES, 2, SIZE, SIZE, generator=generator) > 0.3).float()
    return Renders(images=images * alpha[..., None], depth=alpha, alpha=alpha, cameras=cameras)


def test_it_imagines_frames_after_the_first_and_keeps_shapes(make_pipe, renders, references):
    repaired = WorldRepairer(make_pipe(), steps=4).repair(renders, references, None)
    filled = ConstantFill().repair(renders, references, None)
    assert repaired.images.shape == renders.images.shape
    assert repaired.images.min() >= 0
    assert repaired.images.max() <= 1
    torch.testing.assert_close(
        repaired.images[0], filled.images[0]
    )  # a world model continues what it is shown
    assert (repaired.images[1:] - filled.images[1:]).abs().amax((2, 3, 4)).min() > 1e-3
    assert torch.equal(repaired.depth, filled.depth)
    assert torch.equal(repaired.confidence, filled.confidence)
    again = WorldRepairer(make_pipe(), steps=4).repair(renders, references, None)
    assert torch.equal(again.images, repaired.images)
    other = WorldRepairer(make_pipe(), steps=4, seed=1).repair(renders, references, None)
    assert not torch.equal(other.images, repaired.images)


def test_the_real_views_of_later_frames_have_a_say(make_pipe, renders, references):
    changed = references.images.clone()
    changed[5:] = 1 - changed[5:]
    pipe, first = make_pipe(), ConstantFill()
    same_fill = dataclasses.replace(references, images=changed)
    plain = WorldRepairer(pipe, Fixed(first, references), steps=4).repair(renders, references, None)
    told = WorldRepairer(pipe, Fixed(first, references), steps=4).repair(renders, same_fill, None)
    assert (plain.images[5:] - told.images[5:]).abs().max() > 1e-4


class Fixed:
    """A generator that reads other references than it is given."""

    name = "fixed"

    def __init__(self, inner, references):
        self.inner, self.references = inner, references

    def repair(self, renders, references, anchors):
        return self.inner.repair(renders, self.references, anchors)


def test_no_strength_changes_nothing(make_pipe, renders, references):
    repaired = WorldRepairer(make_pipe(), strength=0.0).repair(renders, references, None)
    assert torch.equal(repaired.images, ConstantFill().repair(renders, references, None).images)


def test_the_nearest_real_views_stand_beside(renders, references):
    own = renders.cameras.select(["new1"])
    assert nearest(own, references.cameras, 2) == ["real2", "real0"]


@pytest.mark.parametrize("objective", ["flow_x0", "v_zero_snr"])
def test_a_walk_that_starts_late_reaches_the_sample_that_is_always_told(objective):
    """With a network that knows the clean sample, every walk ends there, from wherever it starts."""
    kind = make_objective(objective)
    scheduler, generator = kind.scheduler(), torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 2, 3, generator=generator) for _ in range(2))
    times, seen = scheduler_times(scheduler, 5), []

    def predict(noisy, time):
        seen.append(float(time))
        return kind.target(clean, noise, time)

    noisy = kind.corrupt(clean, noise, times[2:3].float())
    found = denoise(predict, noisy, kind, scheduler, 5, start=2)
    torch.testing.assert_close(found, clean, atol=1e-4, rtol=0)
    assert seen == pytest.approx(times[2:].tolist())


@pytest.mark.parametrize(("strength", "steps"), [(-0.1, 5), (1.1, 5), (0.5, 0)])
def test_bad_settings_are_refused(make_pipe, strength, steps):
    with pytest.raises(ValueError, match="strength, steps: expected a share from 0 to 1"):
        WorldRepairer(make_pipe(), strength=strength, steps=steps)


def test_renders_without_cameras_are_refused(make_pipe, renders, references):
    with pytest.raises(ValueError, match="renders: expected their cameras, got none"):
        WorldRepairer(make_pipe()).repair(dataclasses.replace(renders, cameras=None), references, None)
