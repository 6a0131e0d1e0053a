# Generated from notebooks/03_layer.ipynb by `make book`. Edit the notebook, not this file.

"""`MixConv2d`, the layer, and TensorFlow's 'SAME' padding (paper, section 3; chapter 3)."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv._checks import as_pair, check_flags, check_kernel_sizes, check_positive, refuse_script
from mixconv.partition import resolve_partition

__all__ = [
    "PADDINGS",
    "Conv2dSame",
    "MixConv2d",
    "embed_kernel",
    "make_conv2d",
    "make_pointwise",
    "merge_depthwise",
    "same_padding",
]


def same_padding(
    size: int, kernel_size: int, stride: int = 1, dilation: int = 1
) -> tuple[int, int]:
    """Zeros before and after an axis under TensorFlow's 'SAME' rule.

    The output has `ceil(size / stride)` positions. Where the zeros are odd in number, the
    extra one goes after. Works on symbolic sizes, so that exported models keep them free.

    Args:
        size: pixels along the axis.
        kernel_size: taps of the kernel along it.
        stride: step between outputs.
        dilation: step between taps.

    Source: TensorFlow's padding rule; the official MixNet uses it everywhere.
    """
    total = dilation * (kernel_size - 1) - (size - 1) % stride
    if dilation * (kernel_size - 1) < stride - 1:  # otherwise never negative
        total = torch.sym_max(total, 0)
    return total // 2, total - total // 2


class Conv2dSame(nn.Conv2d):
    """`nn.Conv2d` with TensorFlow's 'SAME' padding, for any input size and stride.

    Takes the arguments of `nn.Conv2d`; `padding` and `padding_mode` are not used.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor) -> Tensor:  # nn.Conv2d's name for it
        """Pad by TensorFlow's rule, then convolve."""
        zeros: list[int] = []
        for axis in (1, 0):  # F.pad begins with the last axis
            k, step, spread = self.kernel_size[axis], self.stride[axis], self.dilation[axis]
            before, _ = same_padding(input.shape[axis - 2], k, step, spread)
            # The rest behind: what lies after the last window is never read.
            zeros += [before, spread * (k - 1) - before]
        x = F.pad(input, zeros)
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


PADDINGS = ("symmetric", "same")


def make_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int | tuple[int, int] = 1,
    *,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: bool = False,
    padding: str = "symmetric",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Conv2d:
    """A convolution with an odd kernel that keeps `ceil(size / stride)` outputs.

    Args as in `nn.Conv2d`, for odd kernels, but for two: `bias` is off, since a batch norm mostly
    follows, and `padding` is "symmetric" (k // 2 on each side, PyTorch's habit) or "same"
    (TensorFlow's rule).

    Raises:
        ValueError: for an unknown padding.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding must be 'symmetric' or 'same', got {padding!r}")
    check_positive("in_channels", in_channels)
    check_positive("out_channels", out_channels)
    spread = as_pair("dilation", dilation)
    conv: type[nn.Conv2d] = nn.Conv2d
    zeros = (spread[0] * (kernel_size // 2), spread[1] * (kernel_size // 2))
    if padding == "same" and stride not in (1, (1, 1)):
        conv, zeros = Conv2dSame, (0, 0)
    return conv(
        in_channels, out_channels, kernel_size, stride, zeros,
        dilation=dilation, groups=groups, bias=bias, device=device, dtype=dtype,
    )  # fmt: skip


class MixConv2d(nn.Module):
    """Mixed depthwise convolution: groups of channels with kernel sizes of their own.

    With one kernel size it is the depthwise layer `nn.Conv2d(channels, channels, k,
    padding=k // 2, groups=channels, bias=False)`.

    Args:
        channels: input channels.
        kernel_sizes: one odd size for each group; one integer makes it a plain depthwise layer.
        stride: step between outputs, for both axes or each.
        partition: "equal", "exponential", "logarithmic", or the channels of each group.
        dilated: replace k×k kernels by 3×3 with dilation (k - 1) / 2; only acts at stride 1,
            as in the official code.
        padding: "symmetric" (PyTorch's habit) or "same" (TensorFlow's rule).
        channel_multiplier: outputs for each input channel.
        bias: whether to add a bias.
        dilation: step between the taps of every kernel; not together with `dilated`.
        device: where the weights live.
        dtype: their type.

    Shape:
        Input `(N, C, H, W)` or `(C, H, W)`; output `(N, m·C, ceil(H / stride),
        ceil(W / stride))`, or the same without N.

    Raises:
        TypeError: for a number that is not an integer.
        ValueError: naming the argument, its value and what would be right.

    Source: paper, section 3; `MixConv` in the official `custom_layers.py`. Chapter 3.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        channels: int,
        kernel_sizes: int | Sequence[int],
        stride: int | tuple[int, int] = 1,
        *,
        partition: str | Sequence[int] = "equal",
        dilated: bool = False,
        padding: str = "symmetric",
        channel_multiplier: int = 1,
        bias: bool = False,
        dilation: int | tuple[int, int] = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("channel_multiplier", channel_multiplier)
        check_flags(dilated=dilated, bias=bias)
        self.kernel_sizes = check_kernel_sizes(kernel_sizes)
        self.partition = resolve_partition(channels, self.kernel_sizes, partition)
        self.in_channels, self.out_channels = channels, channels * channel_multiplier
        self.stride, self.dilation = as_pair("stride", stride), as_pair("dilation", dilation)
        self.padding, self.dilated, self.channel_multiplier = padding, dilated, channel_multiplier
        self.convs = nn.ModuleList(
            make_conv2d(
                count, count * channel_multiplier, size, self.stride, dilation=spread,
                groups=count, bias=bias, padding=padding, device=device, dtype=dtype,
            )
            for count, (size, spread) in zip(self.partition, self._kernels(), strict=True)
        )  # fmt: skip

    def _kernels(self) -> list[tuple[int, tuple[int, int]]]:
        """Kernel size and dilation of each group, after the rule for `dilated`."""
        if not self.dilated or self.stride != (1, 1):
            return [(k, self.dilation) for k in self.kernel_sizes]
        if self.dilation != (1, 1):
            raise ValueError(f"dilated sets the dilation itself, got dilation={self.dilation}")
        if 1 in self.kernel_sizes:
            raise ValueError(f"dilated needs kernel_sizes of 3 or more, got {self.kernel_sizes}")
        return [(3, ((k - 1) // 2, (k - 1) // 2)) for k in self.kernel_sizes]

    def _convolutions(self) -> list[nn.Conv2d]:
        return cast("list[nn.Conv2d]", list(self.convs))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each group with its own kernel size.

        Raises:
            TypeError: if `x` is not a tensor.
            ValueError: if it is not an image or batch with the layer's channels.
        """
        # torch.fx passes proxies: they can be split, but have no shape to compare.
        if not hasattr(x, "split") or isinstance(x, str):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        sizes = [conv.in_channels for conv in self._convolutions()]  # narrower ones, once pruned
        count = sum(sizes)
        if isinstance(x, Tensor) and (x.dim() not in (3, 4) or x.shape[-3] != count):
            wanted = f"(N, {count}, H, W) or ({count}, H, W)"
            raise ValueError(f"x must be {wanted}, got {tuple(x.shape)}")
        groups = x.split(sizes, dim=-3)
        outputs = [conv(groups[index]) for index, conv in enumerate(self.convs)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-3)

    def reset_parameters(self) -> None:
        """Draw new weights, as each `nn.Conv2d` does."""
        for conv in self._convolutions():
            conv.reset_parameters()

    def __repr__(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_sizes={self.kernel_sizes}",
            f"partition={self.partition}, stride={self.stride}, padding={self.padding!r}",
        ]
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.dilated:
            parts.append("dilated=True")
        if self._convolutions()[0].bias is None:
            parts.append("bias=False")
        return f"MixConv2d({', '.join(parts)})"

    def merged(self) -> nn.Conv2d:
        """The same operation as one depthwise convolution, with copies of the weights.

        Raises:
            ValueError: if one convolution cannot do it; see `merge_depthwise`.
        """
        return merge_depthwise(self._convolutions()).train(self.training)


def embed_kernel(weight: Tensor, size: int, dilation: tuple[int, int] = (1, 1)) -> Tensor:
    """Kernels in the middle of larger ones that are zero elsewhere; gradients flow through.

    Args:
        weight: kernels of odd size k.
        size: odd, at least `dilation * (k - 1) + 1`.
        dilation: steps to put between the taps, rows and columns.

    Shape:
        weight `(C, 1, k, k)`, output `(C, 1, size, size)`.
    """
    rows, columns = (d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True))
    top, left = (size - rows) // 2, (size - columns) // 2
    larger = weight.new_zeros(*weight.shape[:2], size, size)
    larger[:, :, top : top + rows : dilation[0], left : left + columns : dilation[1]] = weight
    return larger


@torch.no_grad()
def merge_depthwise(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """Depthwise convolutions side by side as one, with zero-embedded kernels.

    Args:
        convs: `nn.Conv2d` or `Conv2dSame`, one for each group of channels, in channel order.

    Returns:
        A new convolution of all channels, with copies of the weights.

    Raises:
        ValueError: saying why one convolution cannot do it: another class; another padding than
            "symmetric" or "same"; layers that differ in stride, multiplier, bias, dtype or device;
            with "same", a kernel too small for the stride.

    Source: ours. Chapter 3.
    """
    _check_mergeable(convs)
    first, spreads = convs[0], cast("list[tuple[int, int]]", [c.dilation for c in convs])
    dilation = spreads[0] if len(set(spreads)) == 1 else (1, 1)
    pairs = [(c, (1, 1) if s == dilation else s) for c, s in zip(convs, spreads, strict=True)]
    size = max(d * (k - 1) + 1 for c, s in pairs for k, d in zip(c.kernel_size, s, strict=True))
    channels, outputs = sum(c.in_channels for c in convs), sum(c.out_channels for c in convs)
    merged = make_conv2d(
        channels, outputs, size, cast("tuple[int, int]", first.stride), dilation=dilation,
        groups=channels, bias=first.bias is not None, padding=PADDINGS[type(first) is Conv2dSame],
    ).to(first.weight)  # fmt: skip
    merged.weight.copy_(torch.cat([embed_kernel(c.weight, size, s) for c, s in pairs]))
    if merged.bias is not None:
        merged.bias.copy_(torch.cat([c.bias for c in convs if c.bias is not None]))
    return merged.train(first.training)


def _check_depthwise(convs: Sequence[nn.Conv2d]) -> None:
    """Raise ValueError unless there are layers, all depthwise and padded as `MixConv2d` pads."""
    if not convs:
        raise ValueError("convs must hold at least one convolution, got none")
    for c in convs:
        if type(c) not in (nn.Conv2d, Conv2dSame):
            raise ValueError(f"a {type(c).__name__} may compute more than a convolution")
        if c.groups != c.in_channels or not all(k % 2 for k in c.kernel_size):
            raise ValueError(f"{c} is not depthwise with an odd kernel")
        zeros = tuple(d * (k // 2) for k, d in zip(c.kernel_size, c.dilation, strict=True))
        symmetric = c.padding in (zeros, "same") and c.padding_mode == "zeros"
        if type(c) is nn.Conv2d and not symmetric:
            raise ValueError(f"{c} is not padded by {zeros} zeros")


def _check_mergeable(convs: Sequence[nn.Conv2d]) -> None:
    """Raise ValueError, saying why, unless one depthwise convolution can do the work of all."""
    _check_depthwise(convs)
    settings = {
        (type(c).__name__, c.stride, c.out_channels // c.in_channels, c.bias is None,
         c.weight.dtype, c.weight.device) for c in convs
    }  # fmt: skip
    if len(settings) > 1:
        what = "class, stride, outputs per channel, bias, dtype or device"
        raise ValueError(f"convs differ in {what}: {settings}")
    if type(convs[0]) is Conv2dSame and len({(c.kernel_size, c.dilation) for c in convs}) > 1:
        _check_centres(convs)


def _check_centres(convs: Sequence[nn.Conv2d]) -> None:
    """Raise ValueError if 'SAME' would centre the windows of a kernel elsewhere."""
    for c in convs:
        axes = zip(c.kernel_size, c.dilation, c.stride, strict=True)
        if any(d * (k - 1) < s - 1 for k, d, s in axes):
            why = "(k - 1) * dilation must be at least stride - 1 for padding 'same'"
            raise ValueError(f"cannot merge {c}: {why}")


def make_pointwise(
    in_channels: int, out_channels: int, groups: int = 1, *, bias: bool = False
) -> nn.Conv2d:
    """A 1×1 convolution, on all channels or on equal groups of them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        groups: how many groups; must divide both.
        bias: whether to add a bias; off, since a batch norm mostly follows.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, H, W)`; weight `(C_out, C_in / groups, 1, 1)`.

    Raises:
        TypeError: for a number that is not an integer.
        ValueError: if a number is below 1 or `groups` does not divide the channels.

    Source: `GroupedConv2D` in the official `custom_layers.py`. Chapter 3.
    """
    check_positive("in_channels", in_channels)
    check_positive("out_channels", out_channels)
    check_positive("groups", groups)
    if in_channels % groups or out_channels % groups:
        numbers = f"{groups} groups for {in_channels} and {out_channels} channels"
        raise ValueError(f"groups must divide in_channels and out_channels, got {numbers}")
    return nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=bias)
