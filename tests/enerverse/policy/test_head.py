"""The action head: it learns, stores its scales, and reads every token it is given."""

from dataclasses import replace

import pytest
import torch

from enerverse.policy import ActionHead, PolicyConfig, PolicyInputs, read_features
from enerverse.policy.condition import SpatialSoftmax
from enerverse.policy.features import fixed_noise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def inputs() -> PolicyInputs:
    generator = seeded(2)
    return PolicyInputs(
        state=torch.randn(16, 11, generator=generator),
        texts=tuple(f"task {i % 3}" for i in range(16)),
        latents=torch.randn(16, 2, 2, 4, 4, 4, generator=generator),
        world=torch.randn(16, 3, 2, 2, 2, 16, generator=generator),
    )


@pytest.fixture
def actions() -> torch.Tensor:
    return torch.rand(16, 8, 7, generator=seeded(3)) * 1.6 - 0.8


@pytest.mark.parametrize("world", ["tokens", "mean"])
def test_sixteen_decisions_are_learned_by_heart(make_head, inputs, actions, world):
    head = make_head(world=world, width=32, noise_draws=4, steps=4)
    head.set_statistics(inputs.state, actions.flatten(0, 1))
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    losses = []
    for step in range(150):
        loss, _ = head.loss(inputs, actions, seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    error = (head.sample(inputs, seeded()) - actions).abs().mean()
    assert error < 0.6 * (actions - actions.mean((0, 1))).abs().mean()


def test_statistics_are_those_of_the_data_and_stored_in_the_checkpoint(make_head, inputs, actions, tmp_path):
    head = make_head()
    head.set_statistics(inputs.state, actions.flatten(0, 1))
    head.save_pretrained(tmp_path)
    loaded = ActionHead.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.action_mean, actions.mean((0, 1)))
    torch.testing.assert_close(loaded.action_std, actions.flatten(0, 1).std(0))
    torch.testing.assert_close(loaded.condition.state_mean, inputs.state.mean(0))
    torch.testing.assert_close(loaded.condition.state_std, inputs.state.std(0))


def test_saved_and_loaded_samples_the_same(make_head, inputs, tmp_path):
    head = make_head(frames=(0, 4, 11), world="mean")
    head.save_pretrained(tmp_path)
    loaded = ActionHead.from_pretrained(tmp_path).eval()
    assert loaded.settings == head.settings
    torch.testing.assert_close(loaded.sample(inputs, seeded()), head.sample(inputs, seeded()))


def test_samples_are_in_the_units_of_the_actions(make_head, inputs):
    """A network that predicts zero gives the mean action."""
    head = make_head()
    with torch.no_grad():
        for value in head.out[-1].parameters():
            value.zero_()
        head.action_mean.copy_(torch.linspace(-0.9, 0.9, 7))
    expected = head.action_mean.expand(16, 8, -1)
    torch.testing.assert_close(head.sample(inputs, seeded()), expected, atol=1e-5, rtol=0)


def test_samples_are_clipped(make_head, inputs):
    head = make_head()
    head.action_std.fill_(100.0)
    assert head.sample(inputs, seeded()).abs().max() == 1


def swap_frames(world: torch.Tensor) -> torch.Tensor:
    return world.flip(1)


def swap_cells(world: torch.Tensor) -> torch.Tensor:
    return world.flip(4)


def swap_views(world: torch.Tensor) -> torch.Tensor:
    return world.flip(2)


@pytest.mark.parametrize("swap", [swap_frames, swap_cells, swap_views])
def test_the_place_of_a_world_token_matters(make_head, inputs, swap):
    head = make_head(world="tokens")
    other = replace(inputs, world=swap(inputs.world))
    assert not torch.allclose(head.sample(other, seeded()), head.sample(inputs, seeded()), atol=1e-4)


@pytest.mark.parametrize(("swap", "same"), [(swap_frames, False), (swap_cells, True), (swap_views, True)])
def test_the_mean_keeps_only_the_order_of_frames(make_head, inputs, swap, same):
    head = make_head(world="mean")
    other = replace(inputs, world=swap(inputs.world))
    equal = torch.allclose(head.sample(other, seeded()), head.sample(inputs, seeded()), atol=1e-4)
    assert equal is same


@pytest.mark.parametrize(("world", "tokens"), [("tokens", 2 + 34 + 24), ("mean", 2 + 34 + 3), (None, 2 + 34)])
def test_number_of_condition_tokens(make_head, inputs, world, tokens):
    given = inputs if world else replace(inputs, world=None)
    assert make_head(world=world).condition(given).shape == (16, tokens, 16)


@pytest.mark.parametrize("name", ["state", "latents", "world"])
def test_every_input_is_read(make_head, inputs, name):
    head = make_head()
    other = replace(inputs, **{name: getattr(inputs, name) + 0.5 * torch.randn(getattr(inputs, name).shape)})
    assert not torch.allclose(head.sample(other, seeded()), head.sample(inputs, seeded()), atol=1e-4)


def test_a_missing_input_is_refused(make_head, inputs):
    with pytest.raises(ValueError, match="expected every input that this policy was trained on, got None"):
        make_head().sample(replace(inputs, latents=None))


def test_a_policy_that_sees_nothing_is_refused():
    with pytest.raises(ValueError, match="expected at least one of world, latents, pixels or privileged"):
        PolicyConfig(world=None, latents=False)


def test_keypoints_are_the_expected_places_of_peaks():
    pictures = torch.zeros(1, 2, 3, 5)
    pictures[0, 0, 2, 0] = pictures[0, 1, 0, 4] = 50.0
    torch.testing.assert_close(SpatialSoftmax()(pictures), torch.tensor([[-1.0, 1.0, 1.0, -1.0]]))


def test_features_are_read_at_pure_noise_of_the_frames_asked_for(make_unet):
    unet, generator, seen = make_unet(), seeded(6), []
    memory = torch.randn(3, 2, 4, 4, 4, 4, generator=generator)
    rays, text = torch.randn(3, 2, 6, 4, 4, generator=generator), torch.randn(3, 8, generator=generator)
    offsets = torch.tensor([[-9, -4, -1, 0]]).expand(3, -1)
    unet.inputs.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    unet.mid[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = read_features(unet, memory, offsets, rays, text, (3, 11))
    assert features.shape == (3, 2, 2, 2, 2, 16)
    torch.testing.assert_close(features, seen[1][:, :, [3, 11]].transpose(1, 2).float())
    noise = fixed_noise(unet, 2).expand(3, -1, -1, -1, -1, -1).permute(0, 1, 2, 4, 5, 3)
    torch.testing.assert_close(seen[0][:, :, 4:, ..., :4], noise)


def test_features_do_not_flicker(make_unet):
    assert torch.equal(fixed_noise(make_unet(), 2), fixed_noise(make_unet(), 2))


def test_where_things_are_is_learned_from_the_facts(make_head, inputs, actions):
    """With the facts at hand they are told from the inputs; without them the locator's read-out stays as it was."""
    torch.manual_seed(0)
    facts = torch.randn(16, 5, generator=seeded(4)) * 3 + 1
    head = make_head(width=32, facts=5)
    head.set_statistics(inputs.state, actions.flatten(0, 1), facts)
    torch.testing.assert_close(head.locator.mean, facts.mean(0))
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    read_out = head.locator.read[2].weight.detach().clone()
    losses = []
    for step in range(100):
        loss, parts = head.loss(inputs, actions, seeded(step), facts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(parts["places"])
        assert loss.item() == pytest.approx(
            parts["actions"] + head.settings.localize * parts["places"], rel=1e-5
        )
    assert losses[-1] < 0.1 * losses[0]
    assert not torch.equal(head.locator.read[2].weight, read_out)
    assert set(head.loss(inputs, actions, seeded())[1]) == {"actions"}


def test_what_the_locator_found_reaches_the_actions(make_head, inputs):
    head = make_head(facts=5)
    torch.nn.init.normal_(head.locator.gather.out.weight)
    before = head.sample(inputs, seeded())
    torch.nn.init.normal_(head.locator.queries)
    assert not torch.allclose(head.sample(inputs, seeded()), before)


@pytest.mark.parametrize(("localize", "facts", "privileged"), [(0.0, 5, 0), (0.3, 0, 0), (0.3, 5, 5)])
def test_there_is_no_locator_where_it_has_nothing_to_learn(make_head, localize, facts, privileged):
    """It is off, the data hold no facts, or the policy is given them."""
    assert make_head(localize=localize, facts=facts, privileged=privileged).locator is None
