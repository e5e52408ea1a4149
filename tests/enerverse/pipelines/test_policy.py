"""The policy pipeline: episodes side by side, one backbone pass per decision, plain errors."""

from typing import Any

import numpy as np
import pytest
import torch

VIEWS = ("front", "top")


def test_actions_lie_in_range(make_policy, play):
    actions = play(make_policy(), 9)
    assert actions.shape == (9, 7)
    assert np.abs(actions).max() <= 1


@pytest.mark.parametrize("changes", [{"world": None}, {}], ids=["latents", "world"])
def test_episodes_in_lock_step_equal_episodes_one_by_one(make_policy, play, watch, changes):
    policy = make_policy(**changes)
    alone = [play(policy, 10, row, key) for row, key in ((0, "a"), (1, "b"))]
    policy.reset()
    together = []
    for t in range(10):
        observations, infos = zip(watch(t, 0), watch(t, 1), strict=True)
        together.append(policy.select_actions(observations, infos, ["a", "b"]))
    # Features are read in bfloat16, whose rounding may depend on the batch.
    tolerance = 1e-4 if changes else 0.02
    np.testing.assert_allclose(np.stack(together, 1), alone, atol=tolerance)


def test_an_episode_may_join_later(make_policy, play, watch):
    policy = make_policy(world=None)
    alone = play(policy, 5, 1, "b")
    policy.reset()
    play(policy, 3, 0, "a")
    joined = []
    for t in range(5):
        observations, infos = zip(watch(3 + t, 0), watch(t, 1), strict=True)
        joined.append(policy.select_actions(observations, infos, ["a", "b"])[1])
    np.testing.assert_allclose(joined, alone, atol=1e-4)


def test_reset_forgets_everything(make_policy, play):
    policy = make_policy(world=None)
    first = play(policy, 6)
    assert not np.allclose(play(policy, 6), first)
    policy.reset()
    np.testing.assert_array_equal(play(policy, 6), first)


def test_reset_of_one_key_leaves_the_others(make_policy, play, watch):
    policy = make_policy(world=None)
    whole = play(policy, 8, key="a")
    policy.reset()
    first = play(policy, 4, key="a")
    play(policy, 4, key="b")
    policy.reset("b")
    rest = np.stack([policy.select_action(*watch(t), "a") for t in range(4, 8)])
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole)


def test_keys_and_seeds_draw_their_own_noise(make_policy, play):
    policy = make_policy(world=None)
    first = play(policy, 4, key="a")
    assert not np.allclose(play(policy, 4, key="b"), first)
    other = make_policy({"seed": 1}, world=None)
    assert not np.allclose(play(other, 4, key="a"), first)


@pytest.mark.parametrize("execute", [1, 3, 8])
def test_the_backbone_runs_once_per_decision(make_policy, play, execute):
    policy, passes = make_policy(execute=execute), []
    policy.unet.mid[-1].register_forward_hook(lambda *_: passes.append(1))
    play(policy, 12)
    assert len(passes) == -(-12 // execute)


def test_episodes_in_lock_step_share_a_backbone_pass(make_policy, watch):
    policy, batches = make_policy(), []
    policy.unet.mid[-1].register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    observations, infos = zip(watch(0, 0), watch(0, 1), strict=True)
    policy.select_actions(observations, infos, [0, 1])
    assert batches == [2]


def test_the_first_actions_of_a_chunk_are_carried_out(make_policy, play, watch):
    policy = make_policy(world=None, execute=3)
    chunk = policy.predict_action_chunk(*watch(0))
    policy.reset()
    assert chunk.shape == (8, 7)
    np.testing.assert_array_equal(play(policy, 3), chunk[:3])


def test_more_actions_than_the_chunk_are_refused(make_policy):
    with pytest.raises(ValueError, match=r"execute: expected 1 to 8 \(the chunk\), got 9"):
        make_policy(execute=9)


@pytest.mark.parametrize("name", ["none", "dense", "fifo", "sparse_uniform"])
def test_the_last_two_frames_are_seen_under_every_memory(make_policy, play, watch, name):
    policy, seen = make_policy({"memory_policy": name}, execute=1), []
    policy.head.condition.latents.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    play(policy, 3)
    latents = [policy.autoencoder.encode(torch.from_numpy(_stack(watch(t)[0]))) for t in range(3)]
    pairs = ((0, 0), (0, 1), (1, 2))
    for (before, now), pair in zip(pairs, seen, strict=True):
        torch.testing.assert_close(pair, torch.stack([latents[before], latents[now]]))


def _stack(observation: dict[str, Any]) -> np.ndarray:
    return np.stack([observation["images"][view] for view in VIEWS]).transpose(0, 3, 1, 2) / np.float32(255)


def test_the_context_of_the_world_is_what_the_memory_selects(make_policy, play, watch):
    """With one frame per push, the policy's context equals the selection over all frames seen."""
    policy, seen = make_policy(execute=1), []
    hook = policy.unet.inputs.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    play(policy, 11)
    hook.remove()
    latents = [policy.autoencoder.encode(torch.from_numpy(_stack(watch(t)[0]))) for t in range(11)]
    expected = torch.stack([latents[t] for t in (0, 5, 9, 10)], 1)
    torch.testing.assert_close(seen[-1][0, :, :4, ..., :4].permute(0, 1, 4, 2, 3), expected)


def test_a_policy_on_simulator_state_needs_no_pictures(make_policy):
    policy = make_policy(world=None, latents=False, privileged=2)
    action = policy.select_action({"state": np.zeros(11)}, {"task": "lift", "privileged": np.ones(2)})
    assert action.shape == (7,)


def test_a_policy_on_pixels(make_policy, play):
    assert play(make_policy(world=None, latents=False, pixels=True), 5).shape == (5, 7)


def test_a_missing_view_is_named(make_policy, watch):
    observation, info = watch(0)
    del observation["images"]["top"]
    with pytest.raises(ValueError, match=r"expected an image of the view 'top', got \('front',\); add"):
        make_policy().select_action(observation, info)


@pytest.mark.parametrize("missing", ["cameras", "top"])
def test_missing_cameras_are_named(make_policy, watch, missing):
    observation, info = watch(0)
    if missing == "cameras":
        del info["cameras"]
    else:
        info["cameras"] = {"front": info["cameras"]["front"]}
    with pytest.raises(ValueError, match=r"info\['cameras'\]: expected the views \('front', 'top'\), got"):
        make_policy().select_action(observation, info)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (np.zeros(9), r"observation\['state'\]: expected \[11\], got \[9\]"),
        (np.full(11, np.nan), r"observation\['state'\]: expected finite values, got NaN or infinity"),
    ],
)
def test_a_bad_state_is_refused_and_not_remembered(make_policy, play, watch, state, sentence):
    policy = make_policy(world=None)
    expected = play(policy, 2)
    policy.reset()
    observation, info = watch(0)
    with pytest.raises(ValueError, match=sentence):
        policy.select_action(observation | {"state": state}, info)
    np.testing.assert_array_equal(play(policy, 2), expected)


def test_a_missing_instruction_is_named(make_policy, watch):
    observation, info = watch(0)
    del info["task"]
    with pytest.raises(ValueError, match=r"info\['task'\]: expected the instruction, got the keys"):
        make_policy().select_action(observation, info)
