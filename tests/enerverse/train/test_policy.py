"""Training the policy: what it takes from the data, and what it writes down."""

import json
from dataclasses import replace

import pytest
import torch

from enerverse import presets
from enerverse.policy import PolicyConfig
from enerverse.presets import AutoencoderConfig
from enerverse.train import TrainConfig
from enerverse.train.policy import train_policy


@pytest.fixture
def preset():
    return replace(
        presets.tiny(),
        views=("front", "top"),
        image_size=16,
        autoencoder=AutoencoderConfig(channels=4),
        train_policy=TrainConfig(steps=2, batch=2, warmup=1, precision="no", log_every=1),
    )


@pytest.fixture
def narrow(make_episodes):
    """Episodes of another robot: nine numbers of state, four of action."""
    generator = torch.Generator().manual_seed(0)
    action = torch.rand(21, 4, generator=generator) * 2 - 1
    return make_episodes((12, 9), state=torch.rand(21, 9, generator=generator), action=action, label=action)


def test_widths_come_from_the_data_and_the_config_is_the_one_trained(preset, narrow, make_pipe, tmp_path):
    config = PolicyConfig(world=None, width=16, layers=1, heads=2, keypoints=4, steps=2)
    policy = train_policy(narrow, make_pipe(), preset, tmp_path, config=config, device="cpu")
    assert policy.head.settings == replace(config, action_dim=4, state_dim=9)
    written = json.loads((tmp_path / "config.json").read_text())["policy"]
    assert (written["world"], written["width"], written["action_dim"], written["state_dim"]) == (
        None,
        16,
        4,
        9,
    )


def test_a_run_goes_on_with_its_own_config_alone(preset, narrow, make_pipe, tmp_path):
    config = PolicyConfig(world=None, width=16, layers=1, heads=2, keypoints=4, steps=2)
    train_policy(narrow, make_pipe(), preset, tmp_path, config=config, device="cpu")
    with pytest.raises(ValueError, match="width"):
        train_policy(narrow, make_pipe(), preset, tmp_path, config=replace(config, width=32), device="cpu")
