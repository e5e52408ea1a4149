"""What an arm does after its last action: it rests, and the gripper keeps its command."""

from __future__ import annotations

import torch
from torch import Tensor


def at_rest(actions: Tensor) -> Tensor:
    """`actions` [.., A] with every motion zero and the gripper's command, the last entry, kept."""
    resting = torch.zeros_like(actions)
    resting[..., -1] = actions[..., -1]
    return resting


def actions_ahead(actions: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """Rows `rows` [B, M] of `actions` [N, A]: [B, M, A]; at rest past the last transition of the episodes, whose
    last frames lie before `ends` [B]."""
    last = (ends - 2).clamp_min(0)[:, None]
    taken = actions[torch.minimum(rows, last)]
    return torch.where((rows > last)[..., None], at_rest(taken), taken)
