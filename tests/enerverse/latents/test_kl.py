"""Diffusers' autoencoder behind the interface of the patch autoencoder."""

import pytest
import torch

from enerverse.latents import KLAutoencoder
from enerverse.train.autoencoder import AutoencoderTask


@pytest.fixture(scope="module")
def autoencoder() -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(channels=4, widths=(16, 16, 32)).eval()


def test_shapes_at_leading_dimensions(autoencoder):
    images = torch.rand(2, 3, 3, 16, 16)
    latents = autoencoder.encode(images)
    assert latents.shape == (2, 3, 4, 16 // autoencoder.patch, 16 // autoencoder.patch)
    assert autoencoder.decode(latents).shape == images.shape


def test_latents_are_standardised_per_channel(autoencoder):
    images = torch.rand(5, 3, 16, 16)
    autoencoder.set_statistics(images)
    latents = autoencoder.encode(images)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


def test_decode_undoes_the_standardisation(autoencoder):
    images = torch.rand(2, 3, 16, 16)
    raw = autoencoder.kl.decode(autoencoder.kl.encode(images * 2 - 1).latent_dist.mode()).sample
    torch.testing.assert_close(
        autoencoder.decode(autoencoder.encode(images)), ((raw + 1) / 2).clamp(0, 1), atol=1e-4, rtol=0
    )


def test_training_adds_the_kl_term(autoencoder):
    task = AutoencoderTask(autoencoder, torch.zeros(4, 1, 3, 16, 16, dtype=torch.uint8), batch=2)
    torch.manual_seed(1)
    loss, _ = task.loss(task.batch(0), torch.Generator())
    images, weights = task.batch(0)
    torch.manual_seed(1)
    error = autoencoder(images) - images
    plain = (weights * (0.5 * error.abs() + error.square())).mean()
    assert autoencoder.kl_loss > 0
    torch.testing.assert_close(loss, plain + 1e-6 * autoencoder.kl_loss)


@pytest.mark.parametrize("shape", [(1, 3, 18, 16), (1, 1, 16, 16)])
def test_sides_that_are_no_multiple_of_the_patch_are_refused(autoencoder, shape):
    with pytest.raises(ValueError, match=r"images: expected \[..., 3, H, W\] with sides in multiples of 4"):
        autoencoder.encode(torch.zeros(shape))


def test_saved_and_loaded_bit_for_bit(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path)
    loaded = KLAutoencoder.from_pretrained(tmp_path)
    state = autoencoder.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
