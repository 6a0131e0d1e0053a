# Generated from notebooks/10_heirs.ipynb by `make book`. Edit the notebook, not this file.

"""What came after MixConv: five layers, each a few lines around `MixConv2d` (chapter 10).

Each is written from its authors' published code, and keeps its tensors in their order.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv.layer import MixConv2d
from mixconv.partition import default_kernel_sizes

__all__ = [
    "ConvRelPosEnc",
    "InceptionDWConv2d",
    "MultiHeadMixedConv",
    "MultiOrderDWConv",
    "PartialConv2d",
    "trace_wires",
    "window_sizes",
]


def trace_wires(layer: Callable[[Tensor], Tensor], channels: int, size: int = 13) -> Tensor:
    """Which pixels of which input channels each output sees.

    The gradient of each output channel, at the centre of a random image, is zero where nothing
    is seen. Batch norms must be in evaluation mode.

    Args:
        layer: anything that maps images to images of the same size.
        channels: its input channels.
        size: rows and columns of the image; odd, and at least as large as what is seen.

    Shape:
        Output: `(C_out, C_in, size, size)`, true where output sees input.

    Source: ours. Chapter 10.
    """
    x = torch.randn(1, channels, size, size, requires_grad=True)
    centre = layer(x)[0, :, size // 2, size // 2]
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0][0] for y in centre]
    return torch.stack(rows) != 0


def window_sizes(wires: Tensor) -> Tensor:
    """Rows and columns from the first to the last pixel seen; 0 where there is no wire.

    Shape:
        wires `(C_out, C_in, size, size)`, output `(C_out, C_in, 2)`.
    """
    spans, size = [], wires.shape[-1]
    count = torch.arange(1, size + 1)
    for axis in (3, 2):  # seen in any column: the rows; seen in any row: the columns
        seen = wires.any(dim=axis)
        last, first = (seen * count).amax(-1), (seen * count.flip(0)).amax(-1)
        spans.append((last + first - size).clamp(min=0))
    return torch.stack(spans, dim=-1)


class ConvRelPosEnc(nn.Module):
    """CoaT's convolutional relative position encoding: queries times mixed-convolved values.

    Args:
        head_channels: channels of one head.
        heads: how many heads get each kernel size.
        sizes: the kernel sizes, one for each entry of `heads`.

    Shape:
        q and v `(N, heads, 1 + H·W, C)`, the class token first; output the same.

    Raises:
        ValueError: from `forward`, if `size` does not fit the tokens.

    Source: arXiv 2104.06399; `ConvRelPosEnc` in CoaT's `coat.py`. Chapter 10.
    """

    def __init__(
        self, head_channels: int, heads: Sequence[int] = (2, 3, 3), sizes: Sequence[int] = (3, 5, 7)
    ) -> None:
        super().__init__()
        partition = [count * head_channels for count in heads]
        self.mix = MixConv2d(sum(partition), sizes, partition=partition, bias=True)

    def forward(self, q: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """The position term of the attention, for an image of `size` rows and columns."""
        if v.shape[2] != 1 + size[0] * size[1]:
            raise ValueError(f"size {size} needs 1 + {size[0] * size[1]} tokens, got {v.shape[2]}")
        image = v[:, :, 1:].transpose(2, 3).flatten(1, 2).unflatten(2, size)
        position = self.mix(image).flatten(2).unflatten(1, v.shape[1::2]).transpose(2, 3)
        return F.pad(q[:, :, 1:] * position, (0, 0, 1, 0))


class MultiHeadMixedConv(nn.Module):
    """SMT's multi-head mixed convolution and the aggregation that lets its sizes meet.

    Args:
        channels: a multiple of `heads`.
        heads: groups, with kernel sizes 3, 5, 7 and so on.
        expand_ratio: how much wider the aggregation is inside.

    Shape:
        Input `(N, C, H, W)`, output the same.

    Raises:
        ValueError: if `heads` does not divide `channels`.

    Source: arXiv 2307.08579, MHMC and SAA; `Attention` in SMT's `smt.py`. Chapter 10.
    """

    def __init__(self, channels: int, heads: int = 4, expand_ratio: int = 2) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels must be a multiple of {heads} heads, got {channels}")
        self.heads, wide = heads, expand_ratio * channels
        self.mix = MixConv2d(channels, default_kernel_sizes(heads), bias=True)
        self.narrow = nn.Conv2d(channels, wide, 1, groups=channels // heads)
        self.norm, self.act = nn.BatchNorm2d(wide), nn.GELU()
        self.project = nn.Conv2d(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each head, interleave the heads, mix one channel of each, then all."""
        interleaved = self.mix(x).unflatten(1, (self.heads, -1)).transpose(1, 2).flatten(1, 2)
        y: Tensor = self.project(self.act(self.norm(self.narrow(interleaved))))
        return y


class MultiOrderDWConv(nn.Module):
    """MogaNet's multi-order depthwise convolution: 5×5, then dilated for parts of the channels.

    Args:
        channels: a multiple of the sum of `split`.
        split: shares of the channels that see a window of 5, of 13, and of 23 pixels.

    Shape:
        Input `(N, C, H, W)`, output the same.

    Raises:
        ValueError: if `channels` cannot be split so.

    Source: arXiv 2211.03295; `MultiOrderDWConv` in MogaNet's `moganet.py`. Chapter 10.
    """

    def __init__(self, channels: int, split: tuple[int, int, int] = (1, 3, 4)) -> None:
        super().__init__()
        if channels % sum(split):
            raise ValueError(f"channels must be a multiple of {sum(split)}, got {channels}")
        self.partition = [channels // sum(split) * share for share in split]
        self.first = MixConv2d(channels, 5, bias=True)
        self.middle = MixConv2d(self.partition[1], 5, dilation=2, bias=True)
        self.wide = MixConv2d(self.partition[2], 7, dilation=3, bias=True)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve all channels, then two parts once more, then mix them."""
        near, middle, far = self.first(x).split(self.partition, dim=1)
        y: Tensor = self.pointwise(torch.cat([near, self.middle(middle), self.wide(far)], dim=1))
        return y


class InceptionDWConv2d(nn.Module):
    """InceptionNeXt's depthwise layer: copies, a square kernel, a row band, a column band.

    Args:
        channels: so many that each branch gets at least one.
        side: rows and columns of the square kernel, odd.
        band: length of the two bands, odd.
        ratio: share of the channels for each of the three kernels; the rest are copied.

    Shape:
        Input `(N, C, H, W)`, output the same.

    Raises:
        ValueError: if a branch is left without channels.

    Source: arXiv 2303.16900; `InceptionDWConv2d` in `inceptionnext.py`. Chapter 10.
    """

    def __init__(self, channels: int, side: int = 3, band: int = 11, ratio: float = 1 / 8) -> None:
        super().__init__()
        count = int(channels * ratio)
        if not 1 <= count <= channels // 3:
            raise ValueError(f"ratio {ratio} gives {count} of {channels} channels")
        self.partition = [channels - 3 * count, count, count, count]
        self.square = MixConv2d(count, side, bias=True)
        self.row = nn.Conv2d(count, count, (1, band), padding=(0, band // 2), groups=count)
        self.column = nn.Conv2d(count, count, (band, 1), padding=(band // 2, 0), groups=count)

    def forward(self, x: Tensor) -> Tensor:
        """Copy the first channels, convolve three small groups, concatenate."""
        same, square, row, column = x.split(self.partition, dim=-3)
        return torch.cat([same, self.square(square), self.row(row), self.column(column)], dim=-3)


class PartialConv2d(nn.Module):
    """FasterNet's partial convolution: a dense 3×3 on the first channels, the rest copied.

    Args:
        channels: at least `divide`.
        divide: one channel in so many is convolved.

    Shape:
        Input `(N, C, H, W)`, output the same.

    Raises:
        ValueError: if no channel would be convolved.

    Source: arXiv 2303.03667; `Partial_conv3` in `fasternet.py`. Chapter 10.
    """

    def __init__(self, channels: int, divide: int = 4) -> None:
        super().__init__()
        count = channels // divide
        if not 1 <= count < channels:
            raise ValueError(f"divide {divide} leaves {count} of {channels} channels to convolve")
        self.partition = [count, channels - count]
        self.conv = nn.Conv2d(count, count, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the first part, copy the second."""
        first, rest = x.split(self.partition, dim=-3)
        return torch.cat([self.conv(first), rest], dim=-3)
