"""MixConv: depthwise convolution whose channel groups have different kernel sizes."""

__version__ = "0.1.0"
