"""The rasteriser on CUDA, which is gsplat's; it compiles its kernels at its first call and needs the CUDA toolkit."""

from __future__ import annotations

from typing import Any

import gsplat
from torch import Tensor


def rasterization(**options: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`gsplat.rasterization` with the options of ours."""
    if options["rolling_shutter"] is None:
        del options["rolling_shutter"]
    return gsplat.rasterization(**options)
