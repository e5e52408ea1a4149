"""The building blocks against obvious references, forward and backward."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from enerverse.model.attention import SelfAttention
from enerverse.model.blocks import Downsample, FrameConv, SpaceTimeBlock, TemporalConv, Upsample
from sparse_core.attention.layer import dense_attention


def compare_with_conv3d(layer: nn.Module, kernel: tuple[int, int, int], inputs: int, outputs: int) -> None:
    """Outputs and gradients of a token-major layer equal those of `nn.Conv3d` on [B V, C, T, h, w]."""
    torch.manual_seed(0)
    nn.init.normal_(layer.conv.weight)
    nn.init.normal_(layer.conv.bias)
    reference = nn.Conv3d(inputs, outputs, kernel, padding=tuple(k // 2 for k in kernel))
    with torch.no_grad():
        reference.weight.copy_(layer.conv.weight.view_as(reference.weight))
        reference.bias.copy_(layer.conv.bias)
    x = torch.randn(2, 3, 5, 3, 7, inputs, requires_grad=True)
    plain = x.detach().flatten(0, 1).permute(0, 4, 1, 2, 3).contiguous().requires_grad_()
    ours, theirs = layer(x), reference(plain)
    restored = theirs.permute(0, 2, 3, 4, 1).view(2, 3, 5, 3, 7, outputs)
    torch.testing.assert_close(ours, restored, atol=1e-4, rtol=1e-4)
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (restored * weights).sum().backward()
    grad = plain.grad.permute(0, 2, 3, 4, 1).view_as(x)
    torch.testing.assert_close(x.grad, grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(
        layer.conv.weight.grad.view_as(reference.weight), reference.weight.grad, atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(layer.conv.bias.grad, reference.bias.grad, atol=1e-3, rtol=1e-4)


def test_temporal_convolution_is_a_conv3d_of_kernel_3_1_1():
    compare_with_conv3d(TemporalConv(6), (3, 1, 1), 6, 6)


def test_frame_convolution_is_a_conv3d_of_kernel_1_3_3():
    compare_with_conv3d(FrameConv(6, 10), (1, 3, 3), 6, 10)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 3, 7, 5), (3, 2, 12, 8)])
def test_the_training_path_of_attention_equals_the_fused_one(shape):
    torch.manual_seed(0)
    q, k, v, weights = (torch.randn(shape) for _ in range(4))
    results = []
    for function in (dense_attention, F.scaled_dot_product_attention):
        inputs = [part.clone().requires_grad_() for part in (q, k, v)]
        out = function(*inputs)
        (out * weights).sum().backward()
        results.append([out, *(part.grad for part in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_attention_gives_the_same_with_and_without_gradients():
    torch.manual_seed(0)
    layer = SelfAttention(12, 3)
    nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        fused = layer(x)
    torch.testing.assert_close(layer(x), fused, atol=1e-5, rtol=1e-4)


def test_attention_does_not_depend_on_the_order_of_tokens():
    torch.manual_seed(0)
    layer = SelfAttention(12, 3)
    nn.init.normal_(layer.out.weight)
    x, order = torch.randn(2, 5, 12), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-5, rtol=1e-4)


@pytest.fixture
def make_block():
    def make(*, attention: bool) -> SpaceTimeBlock:
        torch.manual_seed(0)
        block = SpaceTimeBlock(8, 6, 2, attention=attention)
        for value in block.parameters():
            nn.init.normal_(value, std=0.3)
        return block

    return make


def changed_places(block: SpaceTimeBlock, view: int, frame: int) -> torch.Tensor:
    """Which [V, T] outputs differ when one cell of one frame of one view changes."""
    torch.manual_seed(1)
    x, embedding = torch.randn(1, 2, 5, 3, 3, 8), torch.randn(1, 5, 6)
    other = x.clone()
    other[:, view, frame, 0, 0, 3] += 1
    return ((block(x, embedding) - block(other, embedding)).abs() > 1e-6).any(-1).any(-1).any(-1)[0]


def test_a_view_sees_the_other_views(make_block):
    assert changed_places(make_block(attention=True), view=1, frame=2)[0, 2]


def test_without_attention_a_frame_sees_only_itself(make_block):
    changed = changed_places(make_block(attention=False), view=1, frame=2)
    assert changed.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize(("frame", "looked_at"), [(4, 0), (0, 4)])
def test_time_is_mixed_in_both_directions(make_block, frame, looked_at):
    assert changed_places(make_block(attention=True), view=0, frame=frame)[0, looked_at]


def test_an_untrained_block_passes_its_input_through():
    torch.manual_seed(0)
    x, embedding = torch.randn(1, 2, 5, 3, 3, 8), torch.randn(1, 5, 6)
    for attention in (True, False):
        block = SpaceTimeBlock(8, 6, 2, attention=attention)
        assert torch.equal(block(x, embedding), x)


def test_down_and_up_change_the_grid_by_two():
    x = torch.randn(1, 2, 3, 4, 6, 8)
    down = Downsample(8, 10)(x)
    assert down.shape == (1, 2, 3, 2, 3, 10)
    assert Upsample(10, 8)(down).shape == x.shape


def test_upsampling_puts_the_four_children_at_their_places():
    layer = Upsample(1, 1)
    with torch.no_grad():
        layer.split.weight.zero_()
        layer.split.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert layer(torch.zeros(1, 1, 1, 1, 1, 1)).view(2, 2).tolist() == [[0, 1], [2, 3]]
