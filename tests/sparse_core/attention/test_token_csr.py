"""Compressed rows of single keys: where they come from, what they say, what is refused."""

import pytest
import torch

from sparse_core.attention.masks import TokenCSR


def random_mask(batch=2, heads=3, q_len=11, kv_len=17, share=0.3):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(batch, heads, q_len, kv_len, generator=generator) < share
    mask[:, :, 4] = False
    return mask


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3)])
def test_a_token_mask_comes_back_as_it_was(batch, heads, share):
    mask = random_mask(batch, heads, share=share)
    csr = TokenCSR.from_token_mask(mask)
    assert csr.shape == mask.shape
    assert torch.equal(csr.to_token_mask(), mask)
    assert torch.equal(csr.pairs(), mask.sum((-2, -1)))
    assert csr.density() == pytest.approx(mask.float().mean().item())


@pytest.mark.parametrize("block", [4, (2, 8), 32])
@pytest.mark.parametrize(("batch", "heads", "share"), [(1, 1, 0.2), (2, 3, 0.1), (2, 1, 0.0)])
def test_blocks_keep_the_same_pairs(batch, heads, share, block):
    mask = random_mask(batch, heads, share=share)
    blocks = TokenCSR.from_token_mask(mask).to_block_mask(block)
    assert torch.equal(blocks.to_token_mask(), mask)
    assert torch.equal(blocks.pairs(), mask.sum((-2, -1)))


@pytest.mark.parametrize("count", [1, 3, 5, 17, 64])
def test_cells_cover_the_keys_of_their_interval(count):
    """Written out: cell c of a row that sees L keys covers floor(c L / K) to floor((c + 1) L / K)."""
    generator = torch.Generator().manual_seed(1)
    cells = torch.rand(2, 3, 7, count, generator=generator) < 0.5
    lengths = torch.tensor([[1, 2, 3, 4, 0, 16, 17], [7, 7, 7, 5, 5, 5, 0]])
    expected = torch.zeros(2, 3, 7, 17, dtype=torch.bool)
    for b, h, i, c in cells.nonzero().tolist():
        seen = int(lengths[b, i])
        expected[b, h, i, c * seen // count : (c + 1) * seen // count] = True
    assert torch.equal(TokenCSR.from_cells(cells, lengths, 17).to_token_mask(), expected)


@pytest.mark.parametrize("count", [2, 5, 40])
def test_all_cells_together_cover_every_key_once(count):
    lengths = torch.arange(1, 18)
    csr = TokenCSR.from_cells(torch.ones(1, 1, 17, count, dtype=torch.bool), lengths, 17)
    assert torch.equal(csr.to_token_mask()[0, 0], torch.ones(17, 17).tril().bool())
    assert csr.density(causal=True) == 1.0
    assert len(csr.col) == lengths.sum()


REFUSED = {
    r"crow: expected 3 offsets for 1 samples, 1 heads and 2 queries and col \[n\], got \[2\] and \[2\]": (
        [0, 2],
        [0, 1],
    ),
    "crow: expected offsets that rise from 0 to the 2 keys of col, got 0 to 3": ([0, 1, 3], [0, 1]),
    "crow: expected offsets that rise from 0 to the 2 keys of col, got 0 to 2": ([0, 3, 2], [0, 1]),
    "col: expected keys 0 to 3, got 0 to 4": ([0, 1, 2], [0, 4]),
    "col: expected ascending keys in every row, got some out of order or twice": ([0, 2, 2], [1, 1]),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_rows_that_make_no_sense_are_refused(sentence):
    crow, col = REFUSED[sentence]
    with pytest.raises(ValueError, match=sentence):
        TokenCSR(crow=torch.tensor(crow), col=torch.tensor(col), q_len=2, kv_len=4)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"crow, col: expected int64, got torch.int64 and torch.int32"):
        TokenCSR(crow=torch.tensor([0, 1]), col=torch.tensor([0]).int(), q_len=1, kv_len=4)
    with pytest.raises(ValueError, match=r"mask: expected bool \[B, H, Tq, Tk\], got torch.float32 \[2, 3\]"):
        TokenCSR.from_token_mask(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"cells: expected bool \[B, H, Tq, K\], got"):
        TokenCSR.from_cells(torch.ones(2, 3), torch.ones(2).long(), 4)
    with pytest.raises(ValueError, match="lengths: expected 0 to the 4 keys, got 1 to 5"):
        TokenCSR.from_cells(torch.ones(1, 1, 2, 3, dtype=torch.bool), torch.tensor([1, 5]), 4)


def test_a_mask_that_is_there_already_stays_what_it_is():
    csr = TokenCSR.from_token_mask(random_mask())
    assert csr.to(csr.col.device) is csr
    assert csr.to("cpu") is csr
