"""The video UNet: what it is told, what it reads, and the features taken from its middle."""

from dataclasses import replace

import pytest
import torch

from enerverse.model import Conditions, VideoUNet
from sparse_core import AttentionSlot
from sparse_core.methods.attention.minference import HeadPlan, Pattern
from sparse_core.sparsify import sum_losses


def make_conditions(batch: int = 2, *, views: int = 2, actions: bool = True) -> Conditions:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Conditions(
        memory=draw(batch, views, 4, 4, 4, 4),
        offsets=torch.tensor([[-9, -4, -1, 0]]).expand(batch, -1),
        rays=draw(batch, views, 6, 4, 4),
        text=draw(batch, 8),
        actions=draw(batch, 8, 7).tanh() if actions else None,
        path=draw(batch, views, 8, 4, 4, 4) if actions else None,
    )


@pytest.fixture
def noisy() -> torch.Tensor:
    return torch.randn(2, 2, 8, 4, 4, 4, generator=torch.Generator().manual_seed(4))


TIME = torch.tensor([0.3, 1.0])


def test_prediction_has_the_shape_of_the_noisy_future(make_unet, noisy):
    assert make_unet()(noisy, TIME, make_conditions()).shape == noisy.shape


@pytest.mark.parametrize("views", [1, 3])
def test_any_number_of_views(make_unet, views):
    noisy = torch.randn(1, views, 8, 4, 4, 4)
    assert make_unet()(noisy, TIME[:1], make_conditions(1, views=views)).shape == noisy.shape


def test_views_are_interchangeable(make_unet, noisy):
    unet, told, order = make_unet(), make_conditions(), torch.tensor([1, 0])
    swapped = replace(told, memory=told.memory[:, order], rays=told.rays[:, order], path=told.path[:, order])
    torch.testing.assert_close(
        unet(noisy[:, order], TIME, swapped), unet(noisy, TIME, told)[:, order], atol=1e-4, rtol=1e-4
    )


def test_samples_of_a_batch_do_not_mix(make_unet, noisy):
    unet, told = make_unet(), make_conditions()
    first = Conditions(
        *(getattr(told, name)[:1] for name in ("memory", "offsets", "rays", "text", "actions", "path"))
    )
    torch.testing.assert_close(
        unet(noisy[:1], TIME[:1], first), unet(noisy, TIME, told)[:1], atol=1e-5, rtol=1e-4
    )


def test_dropped_actions_equal_no_actions(make_unet, noisy):
    unet, told = make_unet(), make_conditions()
    dropped = replace(told, has_actions=torch.zeros(2, dtype=torch.bool))
    assert torch.equal(unet(noisy, TIME, dropped), unet(noisy, TIME, replace(told, actions=None, path=None)))


def test_presence_is_decided_per_sample(make_unet, noisy):
    unet, told = make_unet(), make_conditions()
    mixed = unet(noisy, TIME, replace(told, has_actions=torch.tensor([True, False])))
    torch.testing.assert_close(mixed[0], unet(noisy, TIME, told)[0])
    torch.testing.assert_close(mixed[1], unet(noisy, TIME, replace(told, actions=None, path=None))[1])


@pytest.mark.parametrize("name", ["memory", "offsets", "rays", "text", "actions", "path"])
def test_every_condition_is_read(make_unet, noisy, name):
    unet, told = make_unet(), make_conditions()
    value = getattr(told, name)
    other = value - 1 if name == "offsets" else value * 1.5
    assert not torch.allclose(unet(noisy, TIME, replace(told, **{name: other})), unet(noisy, TIME, told))


def test_the_order_of_actions_matters(make_unet, noisy):
    unet, told = make_unet(), make_conditions()
    flipped = replace(told, actions=told.actions.flip(1))
    assert not torch.allclose(unet(noisy, TIME, flipped), unet(noisy, TIME, told))


def test_features_are_what_forward_computes_in_the_middle(make_unet, noisy):
    unet, told, seen = make_unet(), make_conditions(), []
    unet.mid[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    unet(noisy, TIME, told)
    features = unet.features(noisy, TIME, told)
    assert features.shape == (2, 2, 12, 2, 2, 16)
    assert torch.equal(features, seen[0])


def test_features_do_not_run_the_way_up(make_unet, noisy):
    unet, calls = make_unet(), []
    for stage in unet.up:
        for block in stage:
            block.register_forward_hook(lambda *_: calls.append(1))
    unet.features(noisy, TIME, make_conditions())
    assert calls == []


def test_an_untrained_network_predicts_zero(noisy):
    torch.manual_seed(0)
    unet = VideoUNet(channels=4, grid=4, widths=(8, 16), head_width=8, text_width=8, embedding=16)
    assert not unet(noisy, TIME, make_conditions()).any()


def test_a_grid_that_cannot_be_halved_is_refused(make_unet):
    with pytest.raises(ValueError, match="grid: expected a multiple of 2 for 2 levels, got 5"):
        make_unet(grid=5)


def test_saved_and_loaded_bit_for_bit(make_unet, noisy, tmp_path):
    unet = make_unet()
    unet.save_pretrained(tmp_path)
    loaded = VideoUNet.from_pretrained(tmp_path).eval()
    weights = unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(noisy, TIME, make_conditions()), unet(noisy, TIME, make_conditions()))


def test_actions_are_told_to_the_future_frames_they_lead_to(make_unet, noisy):
    """Changing action 5 changes the embeddings of future frames 5 on (a running sum is told, too)."""
    unet, told, seen = make_unet(), make_conditions(), []
    unet.down[0][0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    changed = told.actions.clone()
    changed[:, 5] += 0.5
    for actions in (told.actions, changed):
        unet(noisy, TIME, replace(told, actions=actions))
    frames = ((seen[0] - seen[1]).abs() > 1e-6).any(-1)
    assert frames.tolist() == [[index >= 4 + 5 for index in range(12)]] * 2


SEER = {"block": 4, "gate_dim": 8, "selection": "ratio", "amount": 0.3, "condition": 16}


def test_gates_of_its_attention_learn_while_it_trains(make_unet, noisy):
    unet, told = (
        make_unet(attention="seer", attention_places="views", attention_options=SEER).train(),
        make_conditions(),
    )
    slots = [part for part in unet.modules() if isinstance(part, AttentionSlot) and part.filled]
    gates = [part.layer.gate for part in slots]
    optimizer, losses = torch.optim.Adam([p for gate in gates for p in gate.parameters()], lr=1e-2), []
    for _ in range(40):
        optimizer.zero_grad()
        unet(noisy, TIME, told).square().mean().backward()
        assert all(p.grad is None or not p.grad.any() for gate in gates for p in gate.parameters())
        loss = sum_losses([slot.layer for slot in slots])
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for gate in gates for p in gate.parameters())  # the condition's too
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert len(slots) == 3


def test_the_condition_of_a_gate_is_the_embedding(make_unet):
    with pytest.raises(
        ValueError, match="condition: expected 0 or 16 channels, as this attention is told, got 8"
    ):
        make_unet(attention="seer", attention_places="views", attention_options={**SEER, "condition": 8})
    with pytest.raises(ValueError, match="condition: expected 0, as this attention is told none, got 16"):
        make_unet(attention="seer", attention_places="time", attention_options=SEER)


def test_a_plan_by_its_path_goes_into_a_unet_and_is_missed_where_it_is_gone(make_unet, noisy, tmp_path):
    heads = HeadPlan(patterns=(Pattern("block_sparse", (2,)),) * 2, scores=(0.0, 0.0))
    path = heads.save(tmp_path / "plan.json")
    options = {"block": 4, "slash_block": 4, "plan": str(path)}
    unet = make_unet(attention="minference", attention_places="views", attention_options=options)
    unet.save_pretrained(tmp_path / "unet")
    loaded = VideoUNet.from_pretrained(tmp_path / "unet").eval()
    told = make_conditions()
    torch.testing.assert_close(loaded(noisy, TIME, told), unet(noisy, TIME, told))
    assert all(
        part.layer.plan == heads for name, part in loaded.named_modules() if name.endswith("views.slot")
    )
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"plan: expected a file, found none at .*plan.json"):
        VideoUNet.from_pretrained(tmp_path / "unet")
