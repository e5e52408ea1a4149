"""The patch autoencoder: principal components before training, exact files, plain errors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from enerverse.latents import PatchAutoencoder
from enerverse.train.autoencoder import AutoencoderTask
from enerverse.train.loop import TrainConfig, train


def numpy_reconstruction(images: Tensor, patch: int, channels: int) -> np.ndarray:
    """Images rebuilt from the leading principal components of their patches, by singular values in numpy."""
    n, c, height, width = images.shape
    blocks = images.double().numpy().reshape(n, c, height // patch, patch, width // patch, patch)
    rows = blocks.transpose(0, 2, 4, 1, 3, 5).reshape(-1, c * patch * patch)
    mean = rows.mean(0)
    _, _, basis = np.linalg.svd(rows - mean, full_matrices=False)
    rebuilt = (rows - mean) @ basis[:channels].T @ basis[:channels] + mean
    shape = (n, height // patch, width // patch, c, patch, patch)
    return rebuilt.reshape(shape).transpose(0, 3, 1, 4, 2, 5).reshape(images.shape)


@pytest.fixture
def frames(pictures: Tensor) -> Tensor:
    return pictures.flatten(0, 2)


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_before_training_it_is_a_principal_component_reconstruction(make_autoencoder, frames, channels):
    autoencoder = make_autoencoder(channels=channels)
    autoencoder.initialise_from(frames)
    expected = numpy_reconstruction(frames, autoencoder.patch, channels)
    np.testing.assert_allclose(autoencoder(frames).detach().numpy(), expected, atol=1e-4)


def test_standardising_changes_no_reconstruction(make_autoencoder, frames):
    autoencoder = make_autoencoder()
    autoencoder.initialise_from(frames)
    before = autoencoder(frames).clamp(0, 1)
    autoencoder.set_statistics(frames)
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(frames)), before, atol=1e-5, rtol=0)


def test_latents_are_standardised_per_channel(make_autoencoder, frames):
    autoencoder = make_autoencoder()
    autoencoder.initialise_from(frames)
    autoencoder.set_statistics(frames)
    latents = autoencoder.encode(frames)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 5), (2, 1, 2)])
def test_leading_dimensions_are_kept(make_autoencoder, leading):
    autoencoder = make_autoencoder()
    images = torch.rand(*leading, 3, 8, 12)
    if not leading:
        images = images[None]
        leading = (1,)
    latents = autoencoder.encode(images)
    assert latents.shape == (*leading, 4, 2, 3)
    assert autoencoder.decode(latents).shape == images.shape


def test_leading_dimensions_do_not_mix(make_autoencoder, pictures):
    autoencoder = make_autoencoder()
    together = autoencoder.encode(pictures)
    torch.testing.assert_close(together[1, 2, 1], autoencoder.encode(pictures[1, 2, 1:])[0])


@pytest.mark.parametrize("shape", [(1, 3, 17, 16), (1, 3, 16, 18), (1, 1, 16, 16)])
def test_sides_that_are_no_multiple_of_the_patch_are_refused(make_autoencoder, shape):
    with pytest.raises(ValueError, match=r"images: expected \[..., 3, H, W\] with sides in multiples of 4"):
        make_autoencoder().encode(torch.zeros(shape))


def test_saved_and_loaded_bit_for_bit(make_autoencoder, frames, tmp_path):
    autoencoder = make_autoencoder()
    autoencoder.initialise_from(frames)
    autoencoder.set_statistics(frames)
    autoencoder.save_pretrained(tmp_path)
    loaded = PatchAutoencoder.from_pretrained(tmp_path)
    state = autoencoder.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded.encode(frames), autoencoder.encode(frames))


def test_training_improves_on_principal_components(make_autoencoder, pictures, tmp_path):
    images = (pictures.flatten(0, 1) * 255).byte()
    autoencoder = make_autoencoder(width=16)
    frames = images.flatten(0, 1).float() / 255
    autoencoder.initialise_from(frames)
    before = (autoencoder(frames) - frames).square().mean()
    config = TrainConfig(steps=60, batch=16, warmup=5, precision="no", average=0.9)
    train(AutoencoderTask(autoencoder, images, batch=16), config, tmp_path, device="cpu")
    after = (autoencoder(frames) - frames).square().mean()
    assert after < 0.8 * before


def test_moving_pixels_weigh_more():
    images = torch.zeros(9, 1, 3, 4, 4, dtype=torch.uint8)
    images[0, 0, :, 1, 2] = 200
    task = AutoencoderTask(torch.nn.Identity(), images, batch=64, moving_weight=5.0)
    pictures, weights = task.batch(0)
    moved = (pictures > 0).any(1, keepdim=True)
    assert moved.any()
    assert torch.equal(weights, 1.0 + 4.0 * moved)
