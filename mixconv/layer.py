# Generated from notebooks/03_layer.ipynb by `make book`. Edit the notebook, not this file.

"""`MixConv2d`, the layer, and TensorFlow's 'SAME' padding (paper, section 3; chapter 3)."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv.partition import check_kernel_sizes, check_positive, resolve_partition

__all__ = ["PADDINGS", "Conv2dSame", "MixConv2d", "embed_kernel", "make_conv2d", "same_padding"]


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

    def forward(self, input: Tensor) -> Tensor:  # nn.Conv2d's name for it
        """Pad by TensorFlow's rule, then convolve."""
        zeros: list[int] = []
        for axis in (1, 0):  # F.pad begins with the last axis
            k, step, spread = self.kernel_size[axis], self.stride[axis], self.dilation[axis]
            before, _ = same_padding(input.shape[axis - 2], k, step, spread)
            # Zeros after the last window change nothing, and keep exported sizes simple.
            zeros += [before, spread * (k - 1) - before]
        x = F.pad(input, zeros)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


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

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd.
        stride: step between outputs, for both axes or each.
        dilation: step between taps, for both axes or each.
        groups: as in `nn.Conv2d`.
        bias: whether to add a bias; off, since a batch norm mostly follows.
        padding: "symmetric" (k // 2 on each side, PyTorch's habit) or "same" (TensorFlow's rule).
        device: where the weights live.
        dtype: their type.

    Raises:
        ValueError: for an unknown padding.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding must be 'symmetric' or 'same', got {padding!r}")
    check_positive("in_channels", in_channels)
    check_positive("out_channels", out_channels)
    spread = (dilation, dilation) if isinstance(dilation, int) else dilation
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
        self.kernel_sizes = check_kernel_sizes(kernel_sizes)
        self.partition = resolve_partition(channels, self.kernel_sizes, partition)
        self.in_channels, self.out_channels = channels, channels * channel_multiplier
        self.stride = _pair("stride", stride)
        self.dilation = _pair("dilation", dilation)
        self.padding = padding
        self.channel_multiplier = channel_multiplier
        self.dilated = dilated
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

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each group with its own kernel size.

        Raises:
            ValueError: if `x` is not an image or batch with the layer's channels.
        """
        # Tracers pass stand-ins for tensors; those cannot be compared.
        if isinstance(x, Tensor) and (x.dim() not in (3, 4) or x.shape[-3] != self.in_channels):
            raise ValueError(
                f"x must be (N, {self.in_channels}, H, W) or ({self.in_channels}, H, W), "
                f"got {tuple(x.shape)}"
            )
        groups = x.split(self.partition, dim=-3)
        outputs = [conv(groups[index]) for index, conv in enumerate(self.convs)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-3)

    def reset_parameters(self) -> None:
        """Draw new weights, as each `nn.Conv2d` does."""
        for conv in self._convolutions():
            conv.reset_parameters()

    def _convolutions(self) -> list[nn.Conv2d]:
        return cast("list[nn.Conv2d]", list(self.convs))

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

    def _check_centres(self) -> None:
        """Raise unless the windows of all kernels have the same centres."""
        if self.padding == "symmetric" or len(self.kernel_sizes) == 1:
            return
        for k, spread in self._kernels():
            if any(d * (k - 1) < s - 1 for d, s in zip(spread, self.stride, strict=True)):
                raise ValueError(
                    f"cannot merge kernel size {k} at stride {self.stride} with padding 'same': "
                    "(k - 1) * dilation must be at least stride - 1"
                )

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """The same operation as one depthwise convolution with zero-embedded kernels.

        Returns:
            A new `nn.Conv2d` with copies of the weights; the layer is not changed.

        Raises:
            ValueError: with padding "same", if a kernel is too small for the stride: its windows
                are then centred elsewhere than those of the larger kernels.
        """
        self._check_centres()
        convs, size = self._convolutions(), max(self.kernel_sizes)
        merged = make_conv2d(
            self.in_channels, self.out_channels, size, self.stride, dilation=self.dilation,
            groups=self.in_channels, bias=convs[0].bias is not None, padding=self.padding,
            device=convs[0].weight.device, dtype=convs[0].weight.dtype,
        )  # fmt: skip
        spreads = [(1, 1) if spread == self.dilation else spread for _, spread in self._kernels()]
        pairs = zip(convs, spreads, strict=True)
        merged.weight.copy_(torch.cat([embed_kernel(c.weight, size, s) for c, s in pairs]))
        if merged.bias is not None:
            biases = [conv.bias for conv in convs if conv.bias is not None]
            merged.bias.copy_(torch.cat(biases))
        return merged.train(self.training)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an integer or two of them, got {value!r}")
    for number in pair:
        check_positive(name, number)
    return pair


def embed_kernel(weight: Tensor, size: int, dilation: tuple[int, int] = (1, 1)) -> Tensor:
    """Kernels in the middle of larger ones that are zero elsewhere; gradients flow through.

    Args:
        weight: kernels of odd size k.
        size: odd, at least `dilation * (k - 1) + 1`.
        dilation: steps to put between the taps, rows and columns.

    Shape:
        weight `(C, 1, k, k)`, output `(C, 1, size, size)`.
    """
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    top, left = ((size - r) // 2 for r in reach)
    larger = weight.new_zeros(*weight.shape[:2], size, size)
    larger[:, :, top : top + reach[0] : dilation[0], left : left + reach[1] : dilation[1]] = weight
    return larger
