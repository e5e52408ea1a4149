"""A small network that finds the robot's pixels, so that imagined pictures can be scored by the arm they
show."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RobotSegmenter(nn.Module):
    """Robot or not, for every pixel of [N, 3, P, P]; trained on simulator masks in under a minute."""

    def __init__(self, width: int = 24):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 5
        for dilation in (1, 2, 4, 8, 1):
            layers += [nn.Conv2d(inputs, width, 3, padding=dilation, dilation=dilation), nn.ReLU()]
            inputs = width
        self.net = nn.Sequential(*layers, nn.Conv2d(width, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, P, P]."""
        ys, xs = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in images.shape[-2:]), indexing="ij")
        place = torch.stack([xs, ys]).to(images).expand(len(images), -1, -1, -1)
        return self.net(torch.cat([images * 2 - 1, place], 1))[:, 0]

    @torch.no_grad()
    def mask(self, frames: Tensor) -> Tensor:
        """Robot pixels [..., P, P] of frames [..., 3, P, P]."""
        flat = frames.reshape(-1, *frames.shape[-3:]).float()
        return (self(flat) > 0).view(*frames.shape[:-3], *frames.shape[-2:])


def train_segmenter(images: Tensor, masks: Tensor, steps: int = 400, seed: int = 0) -> RobotSegmenter:
    """Fit to images uint8 [N, 3, P, P] and robot masks bool [N, P, P]."""
    torch.manual_seed(seed)
    model = RobotSegmenter()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        rows = torch.randint(
            len(images), (16,), generator=torch.Generator().manual_seed(seed * 10_007 + step)
        )
        pictures = images[rows].float() / 255
        # Imagined pictures are softer than rendered ones: half the batch is blurred.
        pictures[::2] = F.avg_pool2d(pictures[::2], 3, 1, 1, count_include_pad=False)
        loss = F.binary_cross_entropy_with_logits(model(pictures), masks[rows].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
