"""The .splat layout: order, quantisation, and what is no such file."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dataengine.export import read_splat, write_splat


def test_comes_back_within_a_byte_and_sorted(tmp_path, gaussians) -> None:
    wanted = gaussians(80, 2)
    wanted = wanted.replace(harmonics=wanted.harmonics.clamp(-1.5, 1.5))
    path = write_splat(tmp_path / "a.splat", wanted)
    assert path.stat().st_size == 32 * 80
    found = read_splat(path)
    weight = wanted.opacities.sigmoid().log() + wanted.scales.sum(1)
    wanted = wanted[weight.argsort(descending=True)]
    assert found.means.equal(wanted.means)
    assert found.degree == 0
    assert found.scales.allclose(wanted.scales, atol=1e-5)
    assert found.colors.allclose(wanted.colors, atol=0.502 / 255)
    assert found.opacities.sigmoid().allclose(wanted.opacities.sigmoid(), atol=0.502 / 255)
    alike = (found.quats * F.normalize(wanted.quats, dim=1)).sum(1).abs()
    assert alike.min() > 0.9999


def test_bytes_are_those_of_the_layout(tmp_path, gaussians) -> None:
    one = gaussians(1).replace(
        quats=torch.tensor([[2.0, 0.0, 0.0, -2.0]]), opacities=torch.zeros(1), harmonics=torch.zeros(1, 1, 3)
    )
    content = write_splat(tmp_path / "a.splat", one).read_bytes()
    numbers = np.frombuffer(content[:24], "<f4")
    assert numbers[:3].tolist() == one.means[0].tolist()
    assert numbers[3:] == pytest.approx(one.scales[0].exp().numpy())
    assert list(content[24:28]) == [128, 128, 128, 128]
    assert list(content[28:]) == [219, 128, 128, 37]  # 128 + 128 q


def test_ends_of_the_range(tmp_path, gaussians) -> None:
    ends = gaussians(2).replace(
        opacities=torch.tensor([torch.inf, -torch.inf]), scales=torch.full((2, 3), -200.0)
    )
    found = read_splat(write_splat(tmp_path / "a.splat", ends))
    assert found.opacities.isfinite().all()
    assert found.scales.isfinite().all()
    assert len(read_splat(write_splat(tmp_path / "none.splat", gaussians(0)))) == 0


def test_what_is_no_splat_file(tmp_path) -> None:
    path = tmp_path / "a.splat"
    with pytest.raises(FileNotFoundError, match=r"expected a \.splat file, found none"):
        read_splat(path)
    path.write_bytes(bytes(33))
    with pytest.raises(ValueError, match="expected a multiple of 32 bytes, got 33"):
        read_splat(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="expected finite positions and sizes"):
        read_splat(path)
