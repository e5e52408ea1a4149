"""Tensors as the flat arrays that the CPU kernels read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def flat_rows(x: Tensor, multiple: int) -> np.ndarray:
    """[.., D] as flat float32 whose rows are padded with zeros to a multiple; the tensor's own memory where that fits."""
    x, spare = x.detach().float(), -x.shape[-1] % multiple
    if spare:  # torch copies even where nothing is added
        x = torch.nn.functional.pad(x, (0, spare))
    return x.contiguous().view(-1).numpy()
