"""The loss of the world model, against the same sums written out."""

import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from enerverse.model import Conditions
from enerverse.train.stages import build_reader
from enerverse.train.world import WorldLossConfig, measure_residual_scale, noisy_memory

runs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("interrupted.py"))))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PLAIN = {"memory_noise": 0.0, "drop_text": 0.0, "drop_actions": 0.0}


def test_an_untrained_network_costs_the_squared_residual():
    """It predicts zero, so the loss is the mean square of what it should have predicted."""
    task = runs.make_world_task(**PLAIN, ended_weight=1.0)
    clip = task.batch(0)
    expected = ((clip.future - clip.memory[:, :, -1:]) / 0.7).square().mean()
    torch.testing.assert_close(task.loss(clip, seeded())[0], expected)


def test_absolute_latents_are_the_target_without_residual():
    task = runs.make_world_task(**PLAIN, ended_weight=1.0, residual=False)
    clip = task.batch(0)
    torch.testing.assert_close(task.loss(clip, seeded())[0], (clip.future / 0.7).square().mean())


def test_end_frames_weigh_less():
    task = runs.make_world_task(**PLAIN, ended_weight=0.25)
    clip = task.batch(0)
    clip = replace(clip, ended=torch.zeros_like(clip.ended))
    clip.ended[0, 5:] = 1
    frames = ((clip.future - clip.memory[:, :, -1:]) / 0.7).square().mean((1, 3, 4, 5))
    expected = (frames * torch.where(clip.ended > 0, 0.25, 1.0)).mean()
    torch.testing.assert_close(task.loss(clip, seeded())[0], expected)


def test_channels_weigh_by_their_deviation():
    task = runs.make_world_task(**PLAIN, ended_weight=1.0)
    weights = torch.tensor([0.4, 0.8, 1.2, 1.6])
    task.channel_weights = weights[:, None, None]
    clip = task.batch(0)
    squares = ((clip.future - clip.memory[:, :, -1:]) / 0.7).square().mean((0, 1, 2, 4, 5))
    torch.testing.assert_close(task.loss(clip, seeded())[0], (squares * weights).mean())


@pytest.fixture
def told():
    """The conditions that the network is given when the loss of a batch of 64 is computed."""

    def look(**loss) -> Conditions:
        task, seen = runs.make_world_task(**loss), []
        task.sampler.batch_size = 64
        task.module.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
        task.loss(task.batch(0), seeded())
        return seen[0]

    return look


def test_a_share_of_samples_is_not_told_the_instruction(told):
    silent = (told(drop_text=0.5).text == 0).all(1).float().mean()
    assert float(silent) == pytest.approx(0.5, abs=0.2)
    assert (told(drop_text=0.0).text != 0).any(1).all()


def test_a_share_of_samples_is_not_told_the_actions(told):
    assert float(told(drop_actions=0.5).has_actions.float().mean()) == pytest.approx(0.5, abs=0.2)
    assert told(drop_actions=0.0).has_actions.all()


def test_memory_noise_grows_towards_the_newest_frame_and_spares_half():
    memory = torch.zeros(600, 1, 4, 8, 8, 8)
    deviation = noisy_memory(memory, 0.2, seeded()).std((1, 3, 4, 5))
    assert (deviation[:, 1:] - deviation[:, :-1] >= -0.03).all()
    assert float((deviation == 0).float().mean()) == pytest.approx(0.5, abs=0.04)
    means = deviation.mean(0)
    assert (means[1:] > means[:-1]).all()


def test_memory_noise_has_the_strength_of_one_minus_cosine():
    """With one frame: E[(1 - cos u)^2] over u uniform in (-pi/2, pi/2), clipped at zero."""
    noisy = noisy_memory(torch.zeros(40_000, 1, 1, 2, 2, 2), 0.2, seeded())
    u = torch.linspace(0, math.pi / 2, 10_001)
    expected = 0.2**2 * float((1 - u.cos()).square().mean()) / 2
    assert float(noisy.square().mean()) == pytest.approx(expected, rel=0.03)


def test_without_strength_memory_is_untouched():
    memory = torch.randn(2, 1, 4, 2, 2, 2)
    assert noisy_memory(memory, 0.0, seeded()) is memory


def test_the_residual_scale_is_the_deviation_of_the_residual_where_the_episode_runs():
    task = runs.make_world_task()
    moved = []
    for step in range(32):
        clip = task.sampler.batch(10_000_000 + step)
        moved.append((clip.future - clip.memory[:, :, -1:]).transpose(1, 2)[clip.ended == 0])
    expected = math.sqrt(torch.cat(moved).square().mean())
    assert measure_residual_scale(task.sampler, task.config) == pytest.approx(expected, rel=1e-5)
    assert measure_residual_scale(task.sampler, replace(task.config, residual=False)) == 1.0


def test_the_plan_tells_the_facts_where_the_data_hold_them():
    """The reader adds its error, weighted; its gradient reaches the way down of the UNet and not the way up."""
    facts = torch.randn(60, 5, generator=seeded()) * 3 + 1
    task = runs.make_world_task(replace(runs.random_episodes(), privileged=facts), plan_tokens=3, act=0.0)
    plain, logs = task.loss(task.batch(0), seeded())
    assert set(logs) == {"pictures"}
    unet, seen = task.module.unet, []
    task.module.reader = build_reader(unet, facts)
    torch.testing.assert_close(task.module.reader.mean, facts.mean(0))
    unet.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    total, logs = task.loss(task.batch(0), seeded())
    assert logs["pictures"] == pytest.approx(plain.item(), rel=1e-5)
    assert total.item() == pytest.approx(logs["pictures"] + task.config.localize * logs["places"], rel=1e-5)
    torch.nn.init.normal_(unet.plan.readings[0].out.weight)
    task.loss(task.batch(0), seeded())
    task.module.reader.loss(seen[-1], task.batch(0).facts).backward()
    assert unet.inputs.conv.weight.grad.abs().sum() > 0
    assert unet.out.conv.weight.grad is None


def test_the_plan_tells_the_actions_of_samples_that_were_not_told_them():
    task = runs.make_world_task(plan_tokens=3, act=0.5, drop_actions=0.6, memory_noise=0.0)
    task.sampler.batch_size = 16
    torch.nn.init.normal_(task.module.unet.plan.act.weight)
    clip, seen = task.batch(0), []
    task.module.unet.register_forward_hook(lambda module, inputs, output: seen.append((inputs[2], output[1])))
    total, logs = task.loss(clip, seeded())
    (conditions, tokens), plan = seen[0], task.module.unet.plan
    said = plan.act(tokens.flatten(1)).view(16, 8, 7)
    blind = ~conditions.has_actions
    assert 0 < blind.sum() < 16
    expected = (said - clip.actions)[blind].square().mean()
    assert logs["actions"] == pytest.approx(expected.item(), rel=1e-5)
    assert total.item() == pytest.approx(logs["pictures"] + 0.5 * logs["actions"], rel=1e-5)


def test_where_every_sample_is_told_its_actions_the_plan_is_not_asked():
    task = runs.make_world_task(plan_tokens=3, drop_actions=0.0)
    total, logs = task.loss(task.batch(0), seeded())
    assert logs["actions"] == 0
    assert total.item() == pytest.approx(logs["pictures"], rel=1e-5)


@pytest.mark.parametrize("name", ["drop_text", "drop_actions"])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_shares_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected a share from 0 to 1, got {value}"):
        WorldLossConfig(**{name: value})


@pytest.mark.parametrize("name", ["memory_noise", "ended_weight", "channel_power", "localize", "act"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_weights_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected a finite number of at least 0, got {value}"):
        WorldLossConfig(**{name: value})


def test_where_nothing_moves_the_residual_scale_is_not_zero():
    task = runs.make_world_task()
    clip = task.sampler.batch(0)
    clip = replace(clip, future=clip.memory[:, :, -1:].expand_as(clip.future))
    assert measure_residual_scale(SimpleNamespace(batch=lambda step: clip), task.config, 2) == 1e-3


def test_facts_are_those_of_the_last_memory_frame():
    episodes = runs.random_episodes()
    episodes = replace(episodes, privileged=torch.arange(60.0)[:, None])
    clip = runs.make_world_task(episodes).sampler.batch(0)
    assert torch.equal(clip.facts[:, 0], episodes.starts[clip.episode] + clip.time)


def test_data_without_facts_need_no_reader():
    task = runs.make_world_task()
    assert build_reader(runs.make_world_task(plan_tokens=3).module.unet, torch.zeros(60, 0)) is None
    assert build_reader(task.module.unet, torch.zeros(60, 5)) is None  # nor does a UNet without a plan
