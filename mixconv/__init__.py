"""MixConv: depthwise convolution whose channel groups have different kernel sizes.

A PyTorch package, extracted from the tutorial notebooks of this repository.
"""

from mixconv.blocks import (
    DepthwiseSeparableBlock,
    MixConvBlock,
    SqueezeExcite,
)
from mixconv.fast.fuse import fuse_for_inference
from mixconv.fast.operation import mixed_depthwise2d
from mixconv.formulation import count_costs, mixconv_reference, receptive_field
from mixconv.layer import Conv2dSame, MixConv2d, make_pointwise
from mixconv.mixnet import (
    MIXNET_L,
    MIXNET_M,
    MIXNET_S,
    MIXNET_XL,
    BlockConfig,
    MixNet,
    MixNetConfig,
    decode_block,
    encode_block,
    preprocess,
)
from mixconv.mobilenet import mobilenet_v1, mobilenet_v2
from mixconv.official import load_official
from mixconv.partition import default_kernel_sizes, partition_channels
from mixconv.receptive_fields import effective_receptive_field, theoretical_receptive_field
from mixconv.surgery import replace_depthwise
from mixconv.weights import load_weights, to_timm
from mixconv.zoo import mixnet_l, mixnet_m, mixnet_s, mixnet_xl

__version__ = "0.2.0"

GroupedPointwise = make_pointwise  # its name until 0.2

__all__ = [
    "MIXNET_L",
    "MIXNET_M",
    "MIXNET_S",
    "MIXNET_XL",
    "BlockConfig",
    "Conv2dSame",
    "DepthwiseSeparableBlock",
    "GroupedPointwise",
    "MixConv2d",
    "MixConvBlock",
    "MixNet",
    "MixNetConfig",
    "SqueezeExcite",
    "count_costs",
    "decode_block",
    "default_kernel_sizes",
    "effective_receptive_field",
    "encode_block",
    "fuse_for_inference",
    "load_official",
    "load_weights",
    "mixconv_reference",
    "mixed_depthwise2d",
    "mixnet_l",
    "mixnet_m",
    "mixnet_s",
    "mixnet_xl",
    "mobilenet_v1",
    "mobilenet_v2",
    "partition_channels",
    "preprocess",
    "receptive_field",
    "replace_depthwise",
    "theoretical_receptive_field",
    "to_timm",
]
