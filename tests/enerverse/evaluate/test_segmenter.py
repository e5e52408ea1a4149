"""The robot segmenter learns what its masks show and says it for any shape of input."""

import torch

from enerverse.evaluate.segmenter import train_segmenter
from enerverse.metrics import mask_iou


def make_scenes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright squares (the robot) on dark noise, beside dim squares that are none: images, masks."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, 3, 24, 24), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(count, 24, 24, dtype=torch.bool)
    for index, (top, left, other) in enumerate(
        torch.randint(0, 16, (count, 3), generator=generator).tolist()
    ):
        images[index, :, other : other + 8, 15 - other : 23 - other] = 110
        images[index, :, top : top + 8, left : left + 8] = 220
        masks[index, top : top + 8, left : left + 8] = True
    return images, masks


def test_it_finds_the_robot_on_scenes_it_has_not_seen():
    model = train_segmenter(*make_scenes(120, 0), steps=120)
    images, masks = make_scenes(40, 1)
    found = model.mask(images.float() / 255)
    assert float(mask_iou(found, masks).mean()) > 0.85
    assert torch.equal(model.mask((images.float() / 255).view(4, 10, 3, 24, 24)), found.view(4, 10, 24, 24))


def test_the_same_seed_trains_the_same_segmenter():
    first, second, other = (train_segmenter(*make_scenes(20, 0), steps=3, seed=seed) for seed in (0, 0, 1))
    weights = [model.net[0].weight for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
