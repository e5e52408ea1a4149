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


def test_predicting_a_chunk_changes_nothing(make_policy, watch, play):
    policy = make_policy(execute=3)
    expected = play(policy, 7)
    policy.reset()
    for t in range(7):
        first, second = (policy.predict_action_chunk(*watch(t)) for _ in range(2))
        np.testing.assert_array_equal(first, second)
        action = policy.select_action(*watch(t))
        np.testing.assert_array_equal(action, expected[t])
        if t % 3 == 0:
            np.testing.assert_array_equal(action, first[0])
    assert policy._running[0].memory.now == 6


@pytest.mark.parametrize("missing", ["cameras", "task"])
def test_a_refused_call_is_not_remembered(make_policy, watch, play, missing):
    policy = make_policy(execute=2)
    expected = play(policy, 4)
    policy.reset()
    for t in range(4):
        observation, info = watch(t)
        with pytest.raises(ValueError, match=rf"info\['{missing}'\]: expected .*; "):
            policy.select_action(observation, {name: info[name] for name in info if name != missing})
        np.testing.assert_array_equal(policy.select_action(observation, info), expected[t])


def test_a_failure_in_the_network_is_not_remembered(make_policy, watch, play):
    policy = make_policy()
    expected = play(policy, 2)
    policy.reset()

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = policy.unet.inputs.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        policy.select_action(*watch(0))
    hook.remove()
    np.testing.assert_array_equal(play(policy, 2), expected)


def test_a_generator_takes_the_place_of_the_noise_of_the_episode(make_policy, watch):
    policy = make_policy(world=None)
    chunks = [
        policy.predict_action_chunk(*watch(0), key, generator=torch.Generator().manual_seed(seed))
        for key, seed in (("a", 3), ("b", 3), ("a", 4))
    ]
    np.testing.assert_array_equal(chunks[0], chunks[1])
    assert not np.allclose(chunks[0], chunks[2])
    action = policy.select_action(*watch(0), "c", generator=torch.Generator().manual_seed(3))
    np.testing.assert_array_equal(action, chunks[0][0])


def test_the_number_of_steps_is_a_choice(make_policy, watch):
    policy, times = make_policy(world=None), []
    policy.head.time.register_forward_pre_hook(lambda module, inputs: times.append(1))
    policy.predict_action_chunk(*watch(0), num_inference_steps=5)
    assert len(times) == 5
    policy.select_action(*watch(0))
    assert len(times) == 5 + 2
    with pytest.raises(
        ValueError, match="num_inference_steps: expected a whole number of at least 1, got 2.0"
    ):
        policy.predict_action_chunk(*watch(0), num_inference_steps=2.0)


@pytest.mark.parametrize(
    ("count", "keys", "sentence"),
    [
        (2, ["a"], r"observations: expected one per key \(1\), got 2; give one each"),
        (2, ["a", "b", "c"], r"observations: expected one per key \(3\), got 2; give one each"),
        (2, ["a", "a"], "keys: expected every key once, got 'a' twice; give each environment its own"),
        (0, [], "keys: expected at least one episode, got none; give one key per environment"),
    ],
)
def test_lists_that_do_not_fit_are_refused(make_policy, watch, count, keys, sentence):
    pairs = [watch(0, row) for row in range(count)]
    with pytest.raises(ValueError, match=sentence):
        make_policy(world=None).select_actions([pair[0] for pair in pairs], [pair[1] for pair in pairs], keys)


def test_a_list_of_infos_of_another_length_is_refused(make_policy, watch):
    observation, info = watch(0)
    with pytest.raises(ValueError, match=r"infos: expected one per key \(2\), got 1; give one each"):
        make_policy(world=None).select_actions([observation] * 2, [info], ["a", "b"])


@pytest.mark.parametrize(
    ("generator", "sentence"),
    [
        (7, r"generator: expected a torch\.Generator, .* got 7; make one with"),
        ([torch.Generator()] * 2, r"generator: expected one per key \(1\), got 2; give one each"),
    ],
)
def test_a_generator_that_is_none_is_refused(make_policy, watch, generator, sentence):
    observation, info = watch(0)
    with pytest.raises(ValueError, match=sentence):
        make_policy(world=None).select_actions([observation], [info], ["a"], generator=generator)


def test_views_of_different_size_are_refused(make_policy, watch):
    observation, info = watch(0)
    observation["images"]["top"] = observation["images"]["top"][:8]
    sentence = r"observation\['images'\]: expected views of one size, got .*\(8, 16, 3\).* image_size=16"
    with pytest.raises(ValueError, match=sentence):
        make_policy(world=None).select_action(observation, info)


def test_what_is_no_observation_is_refused(make_policy, watch):
    observation, info = watch(0)
    with pytest.raises(ValueError, match="observation: expected a mapping, got ndarray; pass what env.reset"):
        make_policy(world=None).select_action(observation["state"], info)


def test_a_bad_pose_is_refused_as_part_of_the_info(make_policy, watch):
    observation, info = watch(0)
    info["cameras"] = info["cameras"] | {"top": info["cameras"]["top"] | {"camera_to_world": np.ones((4, 4))}}
    with pytest.raises(ValueError, match=r"info\['cameras'\]: expected a rigid camera_to_world .*'top'"):
        make_policy().select_action(observation, info)
