"""Video tokens in tiles."""

import pytest
import torch

from sparse_core.attention.layout import Layout3D
from sparse_core.attention.masks import BlockMask


def coordinates(layout):
    v, f, h, w = layout.grid
    axes = [torch.arange(n) for n in (v, f, h, w)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 4)


@pytest.mark.parametrize(
    ("layout", "block"),
    [
        (Layout3D(views=3, frames=6, height=4, width=8), 16),
        (Layout3D(views=3, height=4, width=4, sink=5), 16),
        (Layout3D(frames=12), 4),
        (Layout3D(frames=5, height=7, width=3), 8),
    ],
)
def test_every_block_is_a_small_cube(layout, block):
    tiles = layout.fit(block)
    order = tiles.order[: tiles.tokens - tiles.sink] - tiles.sink
    cells = coordinates(layout)[order].view(-1, tiles.block, 4)
    for tile in cells:
        low, high = tile.amin(0), tile.amax(0)
        assert tuple((high - low + 1).tolist()) == tiles.tile
        assert len({tuple(cell.tolist()) for cell in tile}) == tiles.block
    assert block % tiles.block == 0


def test_tiles_are_as_cubic_as_the_block_allows():
    assert Layout3D(frames=8, height=16, width=16).fit(64).tile == (1, 4, 4, 4)
    assert Layout3D(views=3, height=4, width=4).fit(16).tile == (1, 1, 4, 4)


def test_there_and_back():
    layout = Layout3D(views=2, frames=4, height=4, width=6, sink=3).fit(8)
    x = torch.randn(2, 5, layout.tokens, 7)
    assert torch.equal(layout.from_tiles(layout.to_tiles(x)), x)
    assert torch.equal(layout.to_tiles(x)[..., -3:, :], x[..., :3, :])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="tile: expected sizes that divide"):
        Layout3D(frames=6, tile=(1, 4, 1, 1))
    with pytest.raises(ValueError, match="grid: expected at least 1 each"):
        Layout3D(frames=0)
    with pytest.raises(ValueError, match="tokens: expected 6 for"):
        Layout3D(frames=6).to_tiles(torch.zeros(1, 1, 5, 2))
    mask = BlockMask.from_dense_blocks(torch.ones(1, 1, dtype=torch.bool), block_size=16, q_len=8, kv_len=8)
    with pytest.raises(ValueError, match="mask: expected one of 10 tokens, got 8 x 8"):
        Layout3D(frames=8, sink=2).keep_sink(mask)
