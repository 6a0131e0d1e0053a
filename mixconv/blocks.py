# Generated from notebooks/04_blocks.ipynb by `make book`. Edit the notebook, not this file.

"""The blocks of MobileNets and MixNets (paper, section 4; chapter 4)."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixconv._checks import as_stride, check_positive, check_rate
from mixconv.layer import MixConv2d, make_pointwise

__all__ = [
    "ConvNormActivation",
    "DepthwiseSeparableBlock",
    "DropPath",
    "MixConvBlock",
    "NormLayer",
    "SqueezeExcite",
    "make_activation",
    "make_depthwise",
    "stop_at",
]


NormLayer = Callable[[int], nn.Module]


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "swish": nn.SiLU,
}  # fmt: skip


def make_activation(name: str) -> nn.Module:
    """An activation by its name: "relu", "relu6" or "swish" (PyTorch's SiLU).

    Raises:
        ValueError: for another name.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]()


class ConvNormActivation(nn.Sequential):
    """A convolution, a normalisation and, if named, an activation.

    Args:
        conv: the convolution.
        norm_layer: makes the normalisation from a number of channels.
        activation: "relu", "relu6", "swish", or None for none.
    """

    def __init__(
        self,
        conv: nn.Conv2d | MixConv2d,
        norm_layer: NormLayer = nn.BatchNorm2d,
        activation: str | None = "relu",
    ) -> None:
        layers = OrderedDict[str, nn.Module](conv=conv, norm=norm_layer(conv.out_channels))
        if activation is not None:
            layers["activation"] = make_activation(activation)
        super().__init__(layers)


def make_depthwise(
    channels: int,
    kernel_sizes: int | Sequence[int],
    stride: int = 1,
    *,
    partition: str | Sequence[int] = "equal",
    dilated: bool = False,
    padding: str = "symmetric",
    dilation: int = 1,
) -> nn.Conv2d | MixConv2d:
    """A MixConv layer or, for a single kernel size, the plain depthwise `nn.Conv2d` it is.

    Arguments and errors are those of `MixConv2d`.
    """
    mixed = MixConv2d(
        channels, kernel_sizes, stride,
        partition=partition, dilated=dilated, padding=padding, dilation=dilation,
    )  # fmt: skip
    return mixed if len(mixed.kernel_sizes) > 1 else cast("nn.Conv2d", mixed.convs[0])


class DepthwiseSeparableBlock(nn.Module):
    """Depthwise or mixed depthwise convolution, then pointwise; each normalised and activated.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_sizes: `(3,)` is MobileNetV1's block; more sizes make it a MixConv block.
        stride: of the depthwise layer.
        partition: how channels are split; see `MixConv2d`.
        dilated: see `MixConv2d`.
        padding: "symmetric" or "same".
        activation: "relu", "relu6" or "swish".
        norm_layer: makes a normalisation from a number of channels.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.

    Source: MobileNetV1 (Howard et al., 2017), Table 1. Chapter 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: int | Sequence[int] = (3,),
        stride: int = 1,
        *,
        partition: str | Sequence[int] = "equal",
        dilated: bool = False,
        padding: str = "symmetric",
        activation: str = "relu",
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.stride, self.out_channels = as_stride(stride), out_channels
        mixed = make_depthwise(
            in_channels, kernel_sizes, stride,
            partition=partition, dilated=dilated, padding=padding,
        )  # fmt: skip
        pointwise = make_pointwise(in_channels, out_channels)
        self.depthwise = ConvNormActivation(mixed, norm_layer, activation)
        self.pointwise = ConvNormActivation(pointwise, norm_layer, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Depthwise, then pointwise."""
        y: Tensor = self.pointwise(self.depthwise(x))
        return y


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate that is computed from the means of all channels.

    Args:
        channels: channels to gate.
        squeezed_channels: width of the small layer between.
        activation: of the small layer: "relu", "relu6" or "swish".

    Shape:
        Input and output `(N, C, H, W)`.

    Source: `_call_se` in the official `mixnet_model.py`; Hu et al., 2018. Chapter 4.
    """

    def __init__(self, channels: int, squeezed_channels: int, activation: str = "relu") -> None:
        super().__init__()
        self.squeeze = make_pointwise(channels, squeezed_channels, bias=True)
        self.activation = make_activation(activation)
        self.excite = make_pointwise(squeezed_channels, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Gate `x`."""
        means = x.mean((2, 3), keepdim=True)
        gate: Tensor = self.excite(self.activation(self.squeeze(means))).sigmoid()
        return x * gate


class DropPath(nn.Module):
    """Stochastic depth: in training, zero the whole branch for a random part of the images.

    What remains is scaled up so that the mean stays. In evaluation, nothing happens.

    Args:
        rate: probability of dropping, 0 to less than 1.

    Raises:
        ValueError: if `rate` is out of range.

    Source: Huang et al., 2016. Chapter 4.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        check_rate("rate", rate)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole images of `x` at random."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return f"rate={self.rate}"


class MixConvBlock(nn.Module):
    """Inverted residual block: expand, MixConv, squeeze-and-excitation, project, add.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_sizes: `(3,)` is MobileNetV2's block; more sizes make it a MixConv block.
        stride: of the depthwise layer.
        expand_ratio: wide channels for each input channel; 1 leaves the expansion out.
        expand_groups: groups of the expanding 1×1 convolution.
        project_groups: groups of the projecting 1×1 convolution.
        squeeze_ratio: width of the gate's small layer as a fraction of `in_channels`; 0 leaves
            the gate out.
        partition: how the wide channels are split; see `MixConv2d`.
        dilated: see `MixConv2d`.
        padding: "symmetric" or "same".
        activation: "relu", "relu6" or "swish".
        norm_layer: makes a normalisation from a number of channels.
        drop_path_rate: stochastic depth of the residual branch.
        skip: whether to add the input where shapes allow.
        dilation: step between the taps of the depthwise kernels; see `MixConv2d`.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.

    Raises:
        ValueError: naming the argument, as the layers inside do.

    Source: paper, section 4 and Figure 8; `MixnetBlock` in the official `mixnet_model.py`.
    Chapter 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: int | Sequence[int] = (3,),
        stride: int = 1,
        *,
        expand_ratio: int = 6,
        expand_groups: int = 1,
        project_groups: int = 1,
        squeeze_ratio: float = 0.0,
        partition: str | Sequence[int] = "equal",
        dilated: bool = False,
        padding: str = "symmetric",
        activation: str = "relu",
        norm_layer: NormLayer = nn.BatchNorm2d,
        drop_path_rate: float = 0.0,
        skip: bool = True,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        check_positive("expand_ratio", expand_ratio)
        self.stride, self.out_channels = as_stride(stride), out_channels
        self.has_residual = skip and self.stride == 1 and in_channels == out_channels
        wide = in_channels * expand_ratio
        unit = partial(ConvNormActivation, norm_layer=norm_layer, activation=activation)
        self.expand: nn.Module = nn.Identity()
        if expand_ratio > 1:
            self.expand = unit(make_pointwise(in_channels, wide, expand_groups))
        options: Any = {"partition": partition, "dilated": dilated, "padding": padding}
        mixed = make_depthwise(wide, kernel_sizes, stride, dilation=dilation, **options)
        self.depthwise = unit(mixed)
        self.squeeze_excite = _make_gate(in_channels, wide, squeeze_ratio, activation)
        self.project = unit(make_pointwise(wide, out_channels, project_groups), activation=None)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Expand, mix, gate, project, and add the input where shapes allow."""
        y: Tensor = self.squeeze_excite(self.depthwise(self.expand(x)))
        y = self.project(y)
        return x + self.drop_path(y) if self.has_residual else y


def _make_gate(channels: int, wide: int, squeeze_ratio: float, activation: str) -> nn.Module:
    """Squeeze-and-excitation over `wide` channels of a block with `channels` input channels."""
    if not 0 <= squeeze_ratio <= 1:
        raise ValueError(f"squeeze_ratio must be between 0 and 1, got {squeeze_ratio}")
    if squeeze_ratio == 0:
        return nn.Identity()
    return SqueezeExcite(wide, max(1, int(channels * squeeze_ratio)), activation)


def stop_at(output_stride: int, strides: Sequence[int]) -> list[tuple[int, int]]:
    """Stride and dilation for each block after a stem of stride 2.

    A block that would make the map smaller than 1 / `output_stride` of the image keeps its size;
    the kernels of the blocks after it are spread out instead, to see as far as ever.

    Raises:
        ValueError: for another output stride than 2, 4, 8, 16 or 32.

    Source: `EfficientNetBuilder` of timm 1.0. Chapter 4.
    """
    if isinstance(output_stride, bool) or output_stride not in (2, 4, 8, 16, 32):
        raise ValueError(f"output_stride must be 2, 4, 8, 16 or 32, got {output_stride!r}")
    reached, spread, found = 2, 1, list[tuple[int, int]]()
    for stride in strides:
        fits = reached * stride <= output_stride or output_stride == 32
        found.append((stride if fits else 1, spread))
        reached, spread = (reached * stride, spread) if fits else (reached, spread * stride)
    return found
