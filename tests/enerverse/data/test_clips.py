"""Training windows: reproducible, causal, and right at the ends of episodes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from enerverse.data import ClipConfig, ClipSampler, gripper_start
from enerverse.data.clips import Clip
from enerverse.views import commanded_path, path_map, ray_map


def read_times(latents: torch.Tensor) -> torch.Tensor:
    """Episode and frame [B, T, 2] that each latent frame [B, V, T, C, h, w] names (see `make_episodes`)."""
    values = latents[:, 0, :, 0, 0, 0]
    return torch.stack([values // 100, values % 100], -1).long()


def same(first: Clip, second: Clip) -> bool:
    tensors = [name for name, value in vars(first).items() if isinstance(value, torch.Tensor)]
    return first.texts == second.texts and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in tensors
    )


def test_a_batch_is_a_function_of_seed_and_step(make_episodes):
    episodes = make_episodes()
    first, second = (ClipSampler(episodes, ClipConfig(), batch=6, seed=3) for _ in range(2))
    second.batch(0)
    assert same(first.batch(17), second.batch(17))


@pytest.mark.parametrize("other", [(3, 18), (4, 17)])
def test_another_seed_or_step_draws_another_batch(make_episodes, other):
    episodes = make_episodes()
    seed, step = other
    first = ClipSampler(episodes, ClipConfig(), batch=6, seed=3).batch(17)
    assert not same(first, ClipSampler(episodes, ClipConfig(), batch=6, seed=seed).batch(step))


@pytest.fixture
def batches(make_episodes) -> list[Clip]:
    sampler = ClipSampler(make_episodes((30, 20, 9), (True, False, True)), ClipConfig(), batch=16)
    return [sampler.batch(step) for step in range(30)]


def test_memory_ascends_and_ends_with_the_last_observed_frame(batches):
    for clip in batches:
        times = read_times(clip.memory)
        assert torch.equal(times[..., 0], clip.episode[:, None].expand(-1, 4))
        assert (times[:, 1:, 1] >= times[:, :-1, 1]).all()
        assert torch.equal(times[:, -1, 1], clip.time)


def test_offsets_match_the_chosen_frames(batches):
    for clip in batches:
        assert torch.equal(read_times(clip.memory)[..., 1] - clip.time[:, None], clip.offsets)


def test_the_future_is_the_frames_after_the_last_observed_one(batches):
    for clip in batches:
        times = read_times(clip.future)
        running = clip.ended == 0
        length = torch.tensor([30, 20, 9])[clip.episode]
        ahead = clip.time[:, None] + torch.arange(1, 9)
        expected = torch.minimum(ahead, length[:, None] - 1)
        assert torch.equal(times[..., 1][running], expected[running])
        assert torch.equal(times[..., 0][running], clip.episode[:, None].expand(-1, 8)[running])


def test_end_frames_stand_exactly_after_the_end_of_successful_episodes(batches):
    seen = set()
    for clip in batches:
        length = torch.tensor([30, 20, 9])[clip.episode]
        over = clip.time[:, None] + torch.arange(1, 9) >= length[:, None]
        success = torch.tensor([True, False, True])[clip.episode]
        assert torch.equal(clip.ended.bool(), over & success[:, None])
        assert not clip.future.transpose(1, 2)[clip.ended.bool()].any()
        seen |= set(clip.episode[clip.ended.any(1)].tolist())
    assert seen == {0, 2}


def test_actions_are_those_taken_from_the_last_observed_frame_on(make_episodes):
    episodes = make_episodes()
    clip = ClipSampler(episodes, ClipConfig()).gather(np.array([1]), np.array([5]), [[0, 2, 4, 5]])
    assert torch.equal(clip.actions[0], episodes.action[30 + 5 : 30 + 13])


def test_past_the_last_transition_the_arm_rests_and_the_gripper_keeps_its_command(make_episodes):
    episodes = make_episodes()
    clip = ClipSampler(episodes, ClipConfig()).gather(np.array([0]), np.array([27]), [[0, 9, 26, 27]])
    assert torch.equal(clip.actions[0, :2], episodes.action[27:29])
    assert not clip.actions[0, 2:, :6].any()
    assert torch.equal(clip.actions[0, 2:, 6], episodes.action[28, 6].expand(6))


def test_path_maps_follow_the_actions_from_the_commanded_position(make_episodes):
    episodes = make_episodes()
    clip = ClipSampler(episodes, ClipConfig()).gather(np.array([1]), np.array([5]), [[0, 2, 4, 5]])
    start = gripper_start(episodes.state[35:36], ClipConfig())
    torch.testing.assert_close(start, episodes.state[35:36, :3] + episodes.state[35:36, 8:11])
    path = commanded_path(start, clip.actions, torch.tensor([0.016] * 3))
    poses = episodes.intrinsics[1:2], episodes.camera_to_world[1:2]
    torch.testing.assert_close(clip.path, path_map(path, clip.actions[..., -1], *poses, (16, 16), (4, 4)))
    torch.testing.assert_close(clip.rays, ray_map(*poses, (16, 16), (4, 4)))


def classify(offsets: torch.Tensor) -> str:
    """Which kind of memory gave these offsets, far enough into an episode for them to differ."""
    if not offsets.any():
        return "none"
    if offsets.tolist() == [-3, -2, -1, 0]:
        return "dense"
    return "spread"


def test_every_kind_of_memory_occurs_at_its_share(make_episodes):
    config = ClipConfig(mix=(0.4, 0.3, 0.2, 0.1))
    sampler = ClipSampler(make_episodes((400,)), config)
    rng, now, count = np.random.default_rng(0), 300, 4000
    drawn = [torch.tensor(sampler._draw_memory(now, rng)) - now for _ in range(count)]
    kinds = [classify(row) for row in drawn]
    uniform = sum(row.tolist() == [-300, -150, -1, 0] for row in drawn) / count
    assert kinds.count("none") / count == pytest.approx(0.1, abs=0.02)
    assert kinds.count("dense") / count == pytest.approx(0.2, abs=0.02)
    assert uniform == pytest.approx(0.3, abs=0.02)
    assert kinds.count("spread") / count - uniform == pytest.approx(0.4, abs=0.02)


def test_random_memory_covers_the_whole_past(make_episodes):
    sampler = ClipSampler(make_episodes((60,)), ClipConfig(mix=(1.0, 0.0, 0.0, 0.0)))
    rng = np.random.default_rng(0)
    drawn = [sampler._draw_memory(40, rng) for _ in range(1500)]
    assert {time for row in drawn for time in row[:2]} == set(range(39))
    assert all(row[2:] == [39, 40] and row[0] < row[1] for row in drawn)


@pytest.mark.parametrize("now", [0, 1, 2])
def test_early_memory_repeats_frames_and_never_reaches_ahead(make_episodes, now):
    sampler = ClipSampler(make_episodes((60,)), ClipConfig())
    rng = np.random.default_rng(0)
    for _ in range(200):
        row = sampler._draw_memory(now, rng)
        assert row == sorted(row)
        assert len(row) == 4
        assert row[0] >= 0
        assert row[-1] == now


def test_every_task_is_drawn_equally_often(make_episodes):
    """Ten times as many frames of one task do not make it more likely."""
    sampler = ClipSampler(make_episodes((300, 30)), ClipConfig(stillness=1.0), batch=4000)
    clip = sampler.batch(0)
    assert float((clip.episode == 0).float().mean()) == pytest.approx(0.5, abs=0.03)


def test_emphasis_draws_a_kind_of_task_more_often(make_episodes):
    episodes = replace(make_episodes((40, 40, 40)), tasks=("lift it", "reach red", "reach blue"))
    config = ClipConfig(onset=0.0, stillness=1.0, emphasis={"reach": 4.0, "fly": 9.0})
    drawn = ClipSampler(episodes, config, batch=4000).batch(0).episode
    shares = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.4, 0.4]), atol=0.03, rtol=0)


def test_emphasis_of_a_kind_that_is_not_there_is_logged(make_episodes, caplog):
    config = ClipConfig(emphasis={"Lift": 2.0})
    with caplog.at_level("INFO"):
        ClipSampler(make_episodes((40, 40)), config)
    assert "no task begins with ['Lift']; there are ['lift', 'push']" in caplog.text
    assert isinstance(hash(config), int)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan"), "x"])
def test_emphasis_is_a_finite_weight_above_zero(weight):
    with pytest.raises(
        ValueError, match=rf"emphasis\['reach'\]: expected a finite weight above 0, got {weight!r}"
    ):
        ClipConfig(emphasis={"reach": weight})


def test_moving_windows_are_drawn_more_often(make_episodes):
    episodes = make_episodes((100,))
    still = episodes.latents.clone()
    still[50:] = still[50]
    clip = ClipSampler(replace(episodes, latents=still), ClipConfig(stillness=0.1), batch=4000).batch(0)
    assert float((clip.time < 50).float().mean()) > 0.85


def test_an_episode_in_which_nothing_moves_is_drawn_evenly(make_episodes):
    episodes = make_episodes((40,))
    clip = ClipSampler(
        replace(episodes, latents=torch.zeros_like(episodes.latents)), ClipConfig(onset=0.0), batch=4000
    )
    counts = torch.bincount(clip.batch(0).time, minlength=40)
    assert counts.min() > 50


def start_acting_at(episodes, frame: int):
    """The same episodes, in which nothing is commanded before `frame` and a steady motion from then on."""
    label = torch.zeros_like(episodes.label)
    label[frame:, 0] = 0.5
    return replace(episodes, label=label)


def test_windows_at_the_onset_of_action_take_their_share(make_episodes):
    """Four frames (half a chunk) before and after the start, more is commanded ahead than behind; most at the start."""
    episodes = start_acting_at(make_episodes((100,)), 60)
    for share in (0.0, 0.5, 1.0):
        sampler = ClipSampler(episodes, ClipConfig(onset=share, stillness=1.0), batch=4000)
        counts = torch.bincount(sampler.batch(0).time, minlength=100)
        expected = (1 - share) / 100 + share * (1 - (torch.arange(100) - 60).abs() / 4).clamp_min(
            0
        ) ** 2 / 2.75
        torch.testing.assert_close(counts / 4000, expected.float(), atol=0.025, rtol=0)


def test_the_first_frame_counts_as_an_onset_and_the_last_does_not(make_episodes):
    episodes = start_acting_at(make_episodes((12,)), 0)
    time = ClipSampler(episodes, ClipConfig(onset=1.0), batch=400).batch(0).time
    assert set(time.tolist()) == {0, 1, 2, 3}


def test_without_any_onset_the_other_weights_stand(make_episodes):
    episodes = make_episodes((40,))
    still = replace(episodes, latents=torch.zeros_like(episodes.latents), label=episodes.label * 0)
    counts = torch.bincount(ClipSampler(still, ClipConfig(onset=1.0), batch=4000).batch(0).time, minlength=40)
    assert counts.min() > 50


@pytest.mark.parametrize("onset", [-0.1, 1.5])
def test_the_share_of_onsets_is_a_share(onset):
    with pytest.raises(ValueError, match=rf"onset: expected a share from 0 to 1, got {onset}"):
        ClipConfig(onset=onset)


@pytest.mark.parametrize("recent", [0, 5])
def test_recent_frames_must_fit_the_memory(recent):
    with pytest.raises(ValueError, match=rf"recent: expected 1 to 4 \(the memory slots\), got {recent}"):
        ClipConfig(recent=recent)


@pytest.mark.parametrize(
    ("part", "width", "sentence"),
    [
        (
            "state",
            9,
            r"a state of at least 11 numbers, .* from entry 8 on, got 9; add it or set ClipConfig\.command",
        ),
        ("action", 3, "actions of at least 4 numbers, translation first and the gripper last, got 3"),
    ],
)
def test_data_too_narrow_for_the_path_are_refused(make_episodes, part, width, sentence):
    with pytest.raises(ValueError, match=f"dataset: expected {sentence}"):
        ClipSampler(make_episodes(**{part: torch.zeros(50, width)}), ClipConfig())


def test_shares_must_sum_to_one():
    with pytest.raises(ValueError, match="mix: expected four shares that sum to 1"):
        ClipConfig(mix=(0.5, 0.5, 0.5, 0.5))
