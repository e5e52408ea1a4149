"""What a result depends on besides the code: Python, platform, package versions, device."""

from __future__ import annotations

import platform
import re
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "enerverse",
    "torch",
    "numpy",
    "diffusers",
    "accelerate",
    "safetensors",
    "transformers",
    "gsplat",
    "triton",
    "numba",
    "mujoco",
    "gymnasium",
    "mink",
    "opencv-python",
    "pyarrow",
    "av",
    "ray",
)


def versions() -> dict[str, str]:
    """Return `{"python": ..., package: version}` for the packages that are installed, in a fixed order."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def device_name(device: str | torch.device = "cpu") -> str:
    """Return the model name of a device, `AMD EPYC 9B14` or `NVIDIA H200`; never the name of the machine."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def describe(device: str | torch.device = "cpu") -> str:
    """Return the text of `environment.txt`: one `name value` pair per line, no host names, no paths."""
    lines = [f"platform {platform.platform()}", f"device {device_name(device)}"]
    lines += [f"{name} {version}" for name, version in versions().items()]
    return "\n".join(lines) + "\n"
