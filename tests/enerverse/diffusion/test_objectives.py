"""Objectives: exact inverses, diffusers' own corruption, and an oracle that must reach the truth."""

import pytest
import torch
from diffusers import DDIMScheduler

from enerverse.diffusion import FlowX0, denoise, make_objective, scheduler_times

NAMES = ("flow_x0", "v_zero_snr")


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_denoises_to_the_truth(name, steps, clean, noise):
    """v and x_0 hold the same knowledge: v = (alpha x_t - x_0) / sigma, as sigma > 0 at every step."""
    objective = make_objective(name)

    def oracle(noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        if name == "flow_x0":
            return clean
        alpha, sigma = objective._coefficients(time, noisy)
        return (alpha * noisy - clean) / sigma

    result = denoise(oracle, noise, objective, objective.scheduler(), steps)
    torch.testing.assert_close(result, clean, atol=2e-4, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("name", NAMES)
def test_the_walk_starts_at_pure_noise_and_asks_ever_less_noisy(name, steps, clean, noise):
    objective, times, first = make_objective(name), [], []

    def predict(noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        times.append(float(time[0]))
        first.append(noisy)
        return clean

    denoise(predict, noise, objective, objective.scheduler(), steps)
    assert len(times) == steps
    assert times[0] == 1.0
    assert torch.equal(first[0], noise)
    assert times == sorted(times, reverse=True)
    assert times[-1] > 0


@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_walks_along_the_corruption_path(name, steps, clean, noise):
    """At the time it is asked at, a sample is the corruption of the truth by the first noise."""
    objective, seen = make_objective(name), []

    def oracle(noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        seen.append((noisy, time))
        return objective.target(clean, noise, time)

    denoise(oracle, noise, objective, objective.scheduler(), steps)
    for noisy, time in seen:
        torch.testing.assert_close(noisy, objective.corrupt(clean, noise, time), atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("time", [0.001, 0.25, 0.7, 1.0])
def test_the_target_at_a_corrupted_sample_gives_the_clean_one(name, time, clean, noise):
    objective, times = make_objective(name), torch.full((3,), time)
    noisy, target = objective.corrupt(clean, noise, times), objective.target(clean, noise, times)
    torch.testing.assert_close(objective.clean(target, noisy, times), clean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_time_one_is_noise_alone(name, clean, noise):
    assert torch.equal(make_objective(name).corrupt(clean, noise, torch.ones(3)), noise)


def test_v_has_zero_terminal_signal():
    assert make_objective("v_zero_snr").scheduler().alphas_cumprod[-1] == 0


def test_v_betas_are_linear_before_rescaling():
    """The rescaling of Lin et al. (arXiv 2305.08891, algorithm 1), done here by hand."""
    roots = (1 - torch.linspace(8.5e-4, 0.012, 1000)).cumprod(0).sqrt()
    shifted = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    products = make_objective("v_zero_snr").scheduler().alphas_cumprod
    torch.testing.assert_close(products, shifted.square(), atol=1e-5, rtol=1e-4)


def test_v_equals_the_scheduler_of_diffusers(clean, noise):
    objective = make_objective("v_zero_snr")
    scheduler = objective.scheduler()
    assert isinstance(scheduler, DDIMScheduler)
    times = torch.tensor([0.001, 0.4, 1.0])
    steps = (times * 1000).round().long() - 1
    torch.testing.assert_close(
        objective.corrupt(clean, noise, times), scheduler.add_noise(clean, noise, steps)
    )
    torch.testing.assert_close(
        objective.target(clean, noise, times), scheduler.get_velocity(clean, noise, steps)
    )


def test_flow_equals_the_scheduler_of_diffusers(clean, noise):
    objective = make_objective("flow_x0")
    scheduler = objective.scheduler()
    picked = torch.tensor([0, 400, 999])
    scaled = scheduler.scale_noise(clean, scheduler.timesteps[picked], noise)
    times = scheduler.sigmas[picked]
    torch.testing.assert_close(objective.corrupt(clean, noise, times), scaled)


def test_flow_times_are_shifted_towards_noise():
    """t = s u / (1 + (s - 1) u) with u uniform has the quantiles of that map."""
    objective = make_objective("flow_x0", shift=3.0, pure_noise=0.0)
    times = objective.sample_times(40_000, torch.Generator().manual_seed(0))
    levels = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(times.quantile(levels), 3 * levels / (1 + 2 * levels), atol=0.01, rtol=0)


def test_a_share_of_flow_times_is_pure_noise():
    times = make_objective("flow_x0", pure_noise=0.2).sample_times(40_000, torch.Generator().manual_seed(0))
    assert float((times == 1).float().mean()) == pytest.approx(0.2, abs=0.01)


def test_v_times_cover_all_steps_evenly():
    times = make_objective("v_zero_snr", steps=10).sample_times(20_000, torch.Generator().manual_seed(0))
    values, counts = times.unique(return_counts=True)
    torch.testing.assert_close(values, torch.arange(1, 11) / 10)
    torch.testing.assert_close(counts / 20_000, torch.full((10,), 0.1), atol=0.01, rtol=0)


def test_a_callback_may_replace_the_sample(clean, noise):
    objective = make_objective("flow_x0")
    result = denoise(
        lambda noisy, time: clean, noise, objective, objective.scheduler(), 3,
        on_step=lambda index, time, sample: torch.full_like(sample, index),
    )  # fmt: skip
    assert torch.equal(result, torch.full_like(clean, 2.0))


@pytest.mark.parametrize(("shift", "steps"), [(1.0, 5), (3.0, 5), (3.0, 2)])
def test_flow_steps_are_even_before_one_shift(shift, steps):
    """No step is wasted next to the clean end."""
    even = torch.linspace(1, 1 / steps, steps)
    times = scheduler_times(FlowX0(shift=shift).scheduler(), steps)
    torch.testing.assert_close(times, shift * even / (1 + (shift - 1) * even))


def test_an_unknown_objective_names_the_closest_one():
    with pytest.raises(ValueError, match="unknown objective 'flow_x': did you mean 'flow_x0'"):
        make_objective("flow_x")
