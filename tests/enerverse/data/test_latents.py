"""Recorded episodes as latents: encoded row by row, saved and loaded bit for bit."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from dataengine.episodes import EpisodeDataset, EpisodeWriter
from enerverse.data import ClipConfig, ClipSampler, LatentEpisodes, encode_dataset, read_images

VIEWS = ("front", "left", "top")


@pytest.fixture
def autoencoder(make_autoencoder):
    return make_autoencoder(patch=8)


@pytest.fixture
def encoded(recorded, autoencoder) -> LatentEpisodes:
    return encode_dataset(recorded, autoencoder, VIEWS)


def test_rows_are_the_encoded_pictures_of_their_episodes(recorded, autoencoder, encoded):
    places = [(dataset, index) for dataset in recorded for index in range(len(dataset))]
    assert len(encoded) == 4
    for number, (dataset, index) in enumerate(places):
        episode = dataset.episode(index, views=VIEWS)
        pictures = torch.from_numpy(np.array(episode.stacked_images)).permute(0, 1, 4, 2, 3).float() / 255
        span = encoded.span(number)
        assert encoded.length(number) == len(episode)
        with torch.no_grad():
            expected = autoencoder.encode(pictures)
        torch.testing.assert_close(encoded.latents[span].float(), expected, atol=2e-3, rtol=2e-3)
        np.testing.assert_array_equal(encoded.action[span].numpy(), episode.action)
        np.testing.assert_array_equal(encoded.state[span].numpy(), episode.state)
        np.testing.assert_array_equal(encoded.label[span].numpy(), episode.extra["action.clean"])
        assert encoded.tasks[number] == episode.task


def test_cameras_are_those_of_the_views_in_order(recorded, encoded):
    episode = recorded[0].episode(0, views=VIEWS)
    chosen = episode.cameras.select(VIEWS).at(0)
    np.testing.assert_allclose(encoded.camera_to_world[0].numpy(), chosen.camera_to_world, atol=1e-6)
    np.testing.assert_allclose(encoded.intrinsics[0].numpy(), chosen.intrinsics, atol=1e-5)
    assert encoded.views == VIEWS
    assert encoded.image == (32, 32)


def test_saved_and_loaded_bit_for_bit(encoded, tmp_path):
    encoded.save(tmp_path / "latents.safetensors")
    loaded = LatentEpisodes.load(tmp_path / "latents.safetensors")
    for field in fields(encoded):
        before, after = getattr(encoded, field.name), getattr(loaded, field.name)
        if isinstance(before, torch.Tensor):
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
        else:
            assert after == before


def test_the_commanded_position_follows_from_the_state(encoded):
    """State and actions agree: the next commanded position is the last one plus the scaled action."""
    config = ClipConfig()
    sampler = ClipSampler(encoded, config)
    rows = torch.arange(3, 20)
    command = encoded.state[:, :3] + encoded.state[:, 8:11]
    step = encoded.action[rows, :3] * torch.tensor(config.action_scale)
    torch.testing.assert_close(command[rows] + step, command[rows + 1], atol=3e-3, rtol=0)
    assert sampler.batch(0).path.shape == (8, 3, 8, 4, 4, 4)


def test_images_are_read_every_so_many_frames(recorded):
    episode = recorded[1].episode(0, views=VIEWS)
    images = read_images(recorded[1], VIEWS, every=5)
    expected = np.array(episode.stacked_images)[::5].transpose(0, 1, 4, 2, 3)
    np.testing.assert_array_equal(images.numpy(), expected)


def write(
    root, cameras: bool = True, length: int = 4, spoilt: tuple[str, float] = ("", 0.0)
) -> EpisodeDataset:
    """One episode without (or with) cameras; what `spoilt` names takes its value from frame 2 on."""
    with EpisodeWriter(
        root,
        fps=10,
        views=("front",),
        image_size=(16, 16),
        state_dim=11,
        action_dim=7,
        extra={"action.clean": 7},
    ) as writer:
        for t in range(length):
            values = {"action": 0.0, "action.clean": 0.0, "pose": 0.0, "intrinsics": 9.0}
            values |= {spoilt[0]: spoilt[1]} if t >= 2 else {}
            pose = np.eye(4)
            pose[0, 3] = values["pose"]
            camera = {"intrinsics": np.diag([values["intrinsics"], 9.0, 1.0]), "camera_to_world": pose}
            writer.add_frame(
                images={"front": np.full((16, 16, 3), 50 * t, np.uint8)},
                state=np.zeros(11),
                action=np.full(7, values["action"]),
                extra={"action.clean": np.full(7, values["action.clean"])},
                task="lift",
                cameras={"front": camera} if cameras else None,
            )
        writer.save_episode(success=True)
    return EpisodeDataset(root)


@pytest.mark.parametrize("column", ["action", "action.clean"])
def test_actions_out_of_range_are_refused(make_autoencoder, tmp_path, column):
    dataset = write(tmp_path / "wild", spoilt=(column, -1.5))
    sentence = rf"dataset: expected {column} in \[-1, 1\], got -1.5 in episode 0, frame 2; divide"
    with pytest.raises(ValueError, match=sentence):
        encode_dataset(dataset, make_autoencoder(), ("front",))


def test_actions_that_rounding_left_above_one_are_accepted(make_autoencoder, tmp_path):
    dataset = write(tmp_path / "rounded", spoilt=("action", 1.00002))
    assert len(encode_dataset(dataset, make_autoencoder(), ("front",))) == 1


@pytest.mark.parametrize(("part", "value"), [("pose", 2e-4), ("intrinsics", 9.01)])
def test_moving_cameras_are_refused(make_autoencoder, tmp_path, part, value):
    dataset = write(tmp_path / "moving", spoilt=(part, value))
    sentence = f"dataset: expected cameras that stand still, got another {part} of 'front' in episode 0 from frame 2 on"
    with pytest.raises(ValueError, match=sentence):
        encode_dataset(dataset, make_autoencoder(), ("front",))


def test_an_episode_of_one_frame_is_refused(make_autoencoder, tmp_path):
    with pytest.raises(
        ValueError, match="expected at least 2 frames in every episode, got 1 in episode 0; record"
    ):
        encode_dataset(write(tmp_path / "short", length=1), make_autoencoder(), ("front",))


def test_missing_cameras_are_refused(make_autoencoder, tmp_path):
    dataset = write(tmp_path / "bare", cameras=False)
    with pytest.raises(
        ValueError, match="dataset: expected camera poses with every frame, got none in episode 0"
    ):
        encode_dataset(dataset, make_autoencoder(), ("front",))


def test_without_clean_actions_the_executed_ones_are_the_labels(make_autoencoder, tmp_path):
    camera = {"intrinsics": np.diag([9.0, 9.0, 1.0]), "camera_to_world": np.eye(4)}
    with EpisodeWriter(
        tmp_path, fps=10, views=("front",), image_size=(16, 16), state_dim=11, action_dim=7
    ) as writer:
        for t in range(4):
            images = {"front": np.full((16, 16, 3), 50 * t, np.uint8)}
            action = np.full(7, 0.1 * t)
            writer.add_frame(
                images=images, state=np.zeros(11), action=action, task="lift", cameras={"front": camera}
            )
        writer.save_episode(success=True)
    encoded = encode_dataset(EpisodeDataset(tmp_path), make_autoencoder(), ("front",))
    assert torch.equal(encoded.label, encoded.action)
    assert encoded.action[3, 0] == pytest.approx(0.3)
    assert encoded.privileged.shape == (4, 0)


def test_an_empty_dataset_is_refused(make_autoencoder):
    with pytest.raises(
        ValueError, match="dataset: expected at least one episode, got none; record some first"
    ):
        encode_dataset([], make_autoencoder(), ("front",))
