# Generated from notebooks/05_mobilenets.ipynb by `make book`. Edit the notebook, not this file.

"""MobileNetV1 and V2 with any kernel mix (paper, section 3.3; chapter 5)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from mixconv._checks import check_multiplier
from mixconv.blocks import ConvNormActivation, DepthwiseSeparableBlock, MixConvBlock
from mixconv.layer import make_conv2d, make_pointwise
from mixconv.network import (
    ConvNet,
    drop_path_rates,  # stochastic depth, milder for early blocks
    initialize,
    refuse_timm_names,  # whoever writes timm's names is told ours
    round_channels,
)

__all__ = ["mobilenet_v1", "mobilenet_v2"]


_V1_STAGES = [(64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2)]


def _unroll(stages: list[tuple[int, int, int]], width_multiplier: float) -> list[dict[str, Any]]:
    """Channels and stride of each block, for a network whose stem has 32 channels."""
    check_multiplier("width_multiplier", width_multiplier)
    rows, channels = [], round_channels(32, width_multiplier)
    for out_channels, repeats, first_stride in stages:
        wider = round_channels(out_channels, width_multiplier)
        for stride in [first_stride] + [1] * (repeats - 1):
            rows.append({"in_channels": channels, "out_channels": wider, "stride": stride})
            channels = wider
    return rows


def _assemble(
    in_channels: int,
    rows: list[dict[str, Any]],
    blocks: Sequence[nn.Module],
    head_channels: int | None,
    activation: str,
    padding: str,
    num_classes: int,
    drop_rate: float,
) -> ConvNet:
    """A network from its blocks, its weights drawn; `head_channels=None` leaves the head out."""
    first, last = rows[0]["in_channels"], rows[-1]["out_channels"]
    stem_conv = make_conv2d(in_channels, first, 3, stride=2, padding=padding)
    stem = ConvNormActivation(stem_conv, activation=activation)
    head: nn.Module = nn.Identity()
    if head_channels is not None:
        head = ConvNormActivation(make_pointwise(last, head_channels), activation=activation)
    model = ConvNet(
        stem, blocks, head, head_channels or last, num_classes=num_classes, drop_rate=drop_rate
    )
    initialize(model)
    return model


@refuse_timm_names
def mobilenet_v1(
    kernel_sizes: int | Sequence[int] = (3,),
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_multiplier: float = 1.0,
    partition: str = "equal",
    dilated: bool = False,
    padding: str = "symmetric",
    drop_rate: float = 0.0,
) -> ConvNet:
    """MobileNetV1 with MixConv in place of every depthwise layer.

    Args:
        kernel_sizes: `(3,)` is the plain network; `(3, 5, 7)` is the paper's "MixConv 357".
        num_classes: outputs; 0 for features.
        in_channels: channels of the images.
        width_multiplier: scales every channel count.
        partition: "equal", "exponential" or "logarithmic".
        dilated: see `MixConv2d`.
        padding: "symmetric" or "same".
        drop_rate: dropout before the classifier.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`.

    Raises:
        TypeError: for a number that is not an integer.
        ValueError: naming the argument.

    Source: Howard et al., 2017, Table 1; paper, section 3.3. Chapter 5.
    """
    block = partial(
        DepthwiseSeparableBlock,
        kernel_sizes=kernel_sizes, partition=partition, dilated=dilated, padding=padding,
    )  # fmt: skip
    rows = _unroll(_V1_STAGES, width_multiplier)
    blocks = [block(**row) for row in rows]
    return _assemble(in_channels, rows, blocks, None, "relu", padding, num_classes, drop_rate)


_V2_STAGES = [
    (16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1),
]  # fmt: skip


@refuse_timm_names
def mobilenet_v2(
    kernel_sizes: int | Sequence[int] = (3,),
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_multiplier: float = 1.0,
    partition: str = "equal",
    dilated: bool = False,
    padding: str = "symmetric",
    drop_rate: float = 0.2,
    drop_path_rate: float = 0.0,
) -> ConvNet:
    """MobileNetV2 with MixConv in place of every depthwise layer.

    Args:
        kernel_sizes: `(3,)` is the plain network; `(3, 5, 7)` is the paper's "MixConv 357".
        num_classes: outputs; 0 for features.
        in_channels: channels of the images.
        width_multiplier: scales every channel count; the head never gets narrower than 1280.
        partition: "equal", "exponential" or "logarithmic".
        dilated: see `MixConv2d`.
        padding: "symmetric" or "same".
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth; block i of n gets `drop_path_rate * i / n`, i from 0.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`.

    Raises:
        TypeError: for a number that is not an integer.
        ValueError: naming the argument.

    Source: Sandler et al., 2018, Table 2; paper, section 3.3. Chapter 5.
    """
    block = partial(
        MixConvBlock, kernel_sizes=kernel_sizes, activation="relu6",
        partition=partition, dilated=dilated, padding=padding,
    )  # fmt: skip
    rows = _unroll(_V2_STAGES, width_multiplier)
    rates = drop_path_rates(drop_path_rate, len(rows))
    blocks = [
        block(**row, expand_ratio=6 if index else 1, drop_path_rate=rate)
        for index, (row, rate) in enumerate(zip(rows, rates, strict=True))
    ]
    head = round_channels(1280, max(1.0, width_multiplier))
    return _assemble(in_channels, rows, blocks, head, "relu6", padding, num_classes, drop_rate)
