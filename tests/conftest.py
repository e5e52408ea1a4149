"""Settings that every test runs under: one thread, software rendering, no network."""

import contextlib
import os

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"

# Triton must load its LLVM before a Mesa GL context loads another one, or the process dies.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device, with the reason in the summary."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and none is visible")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
