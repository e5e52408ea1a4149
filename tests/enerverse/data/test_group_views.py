"""Groups of views as episodes of their own."""

import pytest
import torch

from enerverse.data import group_views


def test_every_group_becomes_an_episode_with_its_cameras(make_episodes):
    episodes = make_episodes((5, 3))
    marked = episodes.latents.clone()
    marked[:, 1] += 0.5
    episodes = type(episodes)(**(vars(episodes) | {"latents": marked}))
    grouped = group_views(episodes, [[("top", "front"), ("front", "top")], [("top", "top")]])
    assert len(grouped) == 3
    assert grouped.views == ("view_0", "view_1")
    assert grouped.starts.tolist() == [0, 5, 10, 13]
    assert torch.equal(grouped.latents[:5], marked[:5].flip(1))
    assert torch.equal(grouped.latents[5:10], marked[:5])
    assert torch.equal(grouped.latents[10:, 0], grouped.latents[10:, 1])
    assert torch.equal(grouped.action[5:10], episodes.action[:5])
    assert torch.equal(grouped.camera_to_world[0], episodes.camera_to_world[0].flip(0))
    assert grouped.tasks == (episodes.tasks[0], episodes.tasks[0], episodes.tasks[1])
    assert grouped.span(2) == slice(10, 13)


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([[("front",)]], "groups: expected a list for each of 2 episodes"),
        ([[("front",)], [("front", "top")]], "of groups of one size"),
        ([[("front",)], [("wrist",)]], "groups: expected views out of front, top, got 'wrist'"),
    ],
)
def test_groups_that_cannot_be_are_refused(make_episodes, groups, sentence):
    with pytest.raises(ValueError, match=sentence):
        group_views(make_episodes((5, 3)), groups)
