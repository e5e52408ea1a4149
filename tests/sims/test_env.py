"""The Gymnasium contract, determinism and kind errors."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import sims

IDS = (*(f"enerverse/{task}-v0" for task in sims.TASKS), "enerverse/CueDelayReachMarkov-v0")


@pytest.mark.parametrize("name", IDS)
@pytest.mark.filterwarnings("ignore")
def test_check_env(name):
    env = gymnasium.make(name, image_size=32, cameras=("front", "wrist"), modalities=sims.MODALITIES, render_mode="rgb_array")
    check_env(env.unwrapped)
    env.close()
