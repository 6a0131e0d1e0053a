"""Wrong calls of everything that is public: each gets a TypeError or ValueError that names what."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mixconv as m
from mixconv import (
    BlockConfig,
    MixConv2d,
    MixConvBlock,
    MixNet,
    MixNetConfig,
    SqueezeExcite,
    decode_block,
    default_kernel_sizes,
    fuse_for_inference,
    load_weights,
    mixnet_s,
    mobilenet_v1,
    mobilenet_v2,
    partition_channels,
    preprocess,
    receptive_field,
    replace_depthwise,
    to_timm,
)
from mixconv.layer import make_pointwise

X = torch.zeros(1, 8, 6, 6)
Any_: Any = None


def layer(*arguments: Any, **options: Any) -> Callable[[], object]:
    return lambda: MixConv2d(*arguments, **options)


def block(**options: Any) -> Callable[[], object]:
    return lambda: MixConvBlock(8, 8, **options)


def net(**options: Any) -> Callable[[], object]:
    return lambda: mixnet_s(width_multiplier=options.pop("width_multiplier", 0.35), **options)


def field(kernel_sizes: Any) -> Callable[[], object]:
    return lambda: receptive_field(kernel_sizes)


def into(x: Any) -> Callable[[], object]:
    return lambda: MixConv2d(8, (3, 5))(x)


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    # what a layer is made of
    "a set of sizes": (layer(8, {3, 5}), "kernel_sizes"),
    "a frozenset": (layer(8, frozenset({3})), "kernel_sizes"),
    "a dictionary": (layer(8, {3: 1, 5: 2}), "kernel_sizes"),
    "sizes as text": (layer(8, "35"), "kernel_sizes"),
    "sizes as bytes": (layer(8, b"35"), "kernel_sizes"),
    "a fraction of a pixel": (layer(8, (3.0, 5)), "kernel_sizes.*3.0"),
    "an even size": (layer(8, (4,)), "kernel_sizes.*odd.*4"),
    "a size of nothing": (layer(8, (0,)), "kernel_sizes.*0"),
    "no sizes": (layer(8, ()), "kernel_sizes.*none"),
    "sizes in sizes": (layer(8, ((3, 5),)), "kernel_sizes"),
    "None for sizes": (layer(8, None), "kernel_sizes"),
    "as nn.Conv2d is called": (layer(32, 64, (3, 5)), "kernel_sizes.*64"),
    "no channels": (layer(0, (3,)), "channels"),
    "minus channels": (layer(-8, (3,)), "channels.*-8"),
    "channels as a float": (layer(8.0, (3,)), "channels.*8.0"),
    "channels as text": (layer("8", (3,)), "channels.*'8'"),
    "True channels": (layer(True, (3,)), "channels.*True"),
    "too few channels": (layer(1, (3, 5)), "empty"),
    "padding in capitals": (layer(8, (3,), padding="SAME"), "padding.*'SAME'"),
    "padding in pixels": (layer(8, (3,), padding=1), "padding.*1"),
    "padding valid": (layer(8, (3,), padding="valid"), "padding.*'valid'"),
    "stride 0": (layer(8, (3,), stride=0), "stride.*0"),
    "half a stride": (layer(8, (3,), stride=1.5), "stride.*1.5"),
    "three strides": (layer(8, (3,), stride=(1, 1, 1)), "stride"),
    "stride as text": (layer(8, (3,), stride="2"), "stride.*'2'"),
    "dilation 0": (layer(8, (3,), dilation=0), "dilation.*0"),
    "bias as text": (layer(8, (3,), bias="False"), "bias.*'False'"),
    "bias as a number": (layer(8, (3,), bias=1), "bias.*1"),
    "dilated as text": (layer(8, (3, 5), dilated="no"), "dilated.*'no'"),
    "dilated 1×1": (layer(8, (1, 3), dilated=True), "dilated"),
    "an unknown partition": (layer(8, (3, 5), partition="half"), "'half'"),
    "a partition of another sum": (layer(8, (3, 5), partition=(4, 5)), "partition.*9"),
    "a partition too short": (layer(8, (3, 5), partition=(8,)), "partition"),
    "an empty group": (layer(8, (3, 5), partition=(8, 0)), "partition.*0"),
    "a set as partition": (layer(8, (3, 5), partition={4}), "partition"),
    "a partition of floats": (layer(8, (3, 5), partition=(4.0, 4.0)), "partition.*4.0"),
    "multiplier 0": (layer(8, (3,), channel_multiplier=0), "channel_multiplier"),
    "multiplier as a float": (layer(8, (3,), channel_multiplier=2.0), "channel_multiplier"),
    # what goes into a layer
    "a list": (into([[1.0]]), "tensor.*list"),
    "None": (into(None), "tensor.*NoneType"),
    "a NumPy array": (into(np.zeros((1, 8, 6, 6), np.float32)), "tensor.*ndarray"),
    "a text": (into("image"), "tensor.*str"),
    "a number": (into(3), "tensor.*int"),
    "other channels": (into(torch.zeros(1, 7, 6, 6)), r"\(1, 7, 6, 6\)"),
    "channels last in order": (into(torch.zeros(1, 6, 6, 8)), r"\(1, 6, 6, 8\)"),
    "a matrix": (into(torch.zeros(8, 6)), r"\(8, 6\)"),
    "five axes": (into(torch.zeros(1, 1, 8, 6, 6)), r"\(1, 1, 8, 6, 6\)"),
    # partitions and receptive fields
    "a float to split": (lambda: partition_channels(Any_ or 32.0, (3, 5)), "channels.*32.0"),  # type: ignore[arg-type]
    "an unknown method": (lambda: partition_channels(32, (3, 5), "half"), "method.*'half'"),
    "a method that is a number": (lambda: partition_channels(32, (3, 5), Any_), "method"),
    "1×1, logarithmic": (lambda: partition_channels(32, (1, 3), "logarithmic"), "log 1"),
    "no groups": (lambda: default_kernel_sizes(0), "groups.*0"),
    "stride 0 in a list": (lambda: receptive_field([3, 3], [0, 1]), "strides"),
    "a minus dilation": (lambda: receptive_field([3], [1], [-1]), "dilations"),
    "a model for kernel sizes": (field(mobilenet_v2()), "theoretical_recep"),
    "half a kernel": (field([3, 4.5]), "kernel_sizes"),
    "a minus kernel": (field([-3]), "kernel_sizes"),
    "one kernel, not in a list": (field(3), "kernel_sizes"),
    "strides too few": (lambda: receptive_field([3, 3], [1]), "shorter|argument"),
    # blocks
    "an unknown activation": (block(activation="gelu"), "activation.*'gelu'"),
    "expansion 0": (block(expand_ratio=0), "expand_ratio.*0"),
    "expansion as a float": (block(expand_ratio=1.5), "expand_ratio.*1.5"),
    "three groups of eight": (block(expand_groups=3), "groups.*3"),
    "0 groups": (block(project_groups=0), "groups"),
    "a gate wider than all": (block(squeeze_ratio=1.5), "squeeze_ratio.*1.5"),
    "a minus gate": (block(squeeze_ratio=-0.1), "squeeze_ratio.*-0.1"),
    "a block's drop rate of 1": (block(drop_path_rate=1.0), "rate.*1"),
    "a drop rate as text": (block(drop_path_rate="a"), "rate.*'a'"),
    "strides that differ": (block(stride=(1, 2)), r"stride.*\(1, 2\)"),
    "a separable block's strides": (
        lambda: m.DepthwiseSeparableBlock(8, 8, stride=(2, 1)),  # type: ignore[arg-type]
        r"stride.*\(2, 1\)",
    ),
    "channels of a block as text": (
        lambda: m.DepthwiseSeparableBlock(Any_ or "8", 8),  # type: ignore[arg-type]
        "'8'",
    ),
    "no channels for a gate": (lambda: SqueezeExcite(32, 0), "0"),
    # networks
    "a network by name": (lambda: MixNet(Any_ or "mixnet_s"), "config.*'mixnet_s'"),  # type: ignore[arg-type]
    "one text for all blocks": (
        lambda: MixNet(MixNetConfig(blocks=Any_ or "r1_k3_a1_p1_s11_e1_i16_o16", stem_channels=16)),  # type: ignore[arg-type]
        "block string",
    ),
    "no blocks": (lambda: MixNet(MixNetConfig((), 16)), "blocks"),
    "blocks that do not follow": (
        lambda: MixNet(MixNetConfig(("r1_k3_a1_p1_s11_e1_i8_o8",), 16)),
        "16 channels",
    ),
    "minus classes": (net(num_classes=-1), "num_classes.*-1"),
    "classes as a float": (net(num_classes=2.0), "num_classes.*2.0"),
    "True classes": (net(num_classes=True), "num_classes.*True"),
    "no image channels": (net(in_channels=0), "in_channels.*0"),
    "a drop rate of 2": (net(drop_rate=2), "drop_rate.*2"),
    "a drop rate of text": (net(drop_rate="0.2"), "drop_rate.*'0.2'"),
    "a drop path rate of text": (net(drop_path_rate="a"), "drop_path_rate.*'a'"),
    "a width of text": (net(width_multiplier="1.0"), "width_multiplier|sequence"),
    "a width of 0": (net(width_multiplier=0), "width_multiplier.*0"),
    "a width of infinity": (net(width_multiplier=float("inf")), "width_multiplier.*inf"),
    "epsilon as text": (net(norm_eps="1e-3"), "norm_eps.*'1e-3'"),
    "a minus epsilon": (net(norm_eps=-1.0), "norm_eps.*-1"),
    "momentum as text": (net(norm_momentum="x"), "norm_momentum.*'x'"),
    "padding of a network": (net(padding="SAME"), "padding.*'SAME'"),
    "timm's in_chans": (net(in_chans=1), "in_channels=1"),
    "timm's pretrained": (net(pretrained=True), "weights="),
    "even kernels in V1": (lambda: mobilenet_v1((3, 4)), "kernel_sizes.*4"),
    "dilated text in V1": (lambda: mobilenet_v1(dilated=Any_ or "x"), "dilated.*'x'"),  # type: ignore[arg-type]
    "a width of minus one in V2": (lambda: mobilenet_v2(width_multiplier=-1), "width_multiplier"),
    "a partition by numbers in V2": (lambda: mobilenet_v2((3, 5), partition="x"), "'x'"),
    "a 1×1 layer without inputs": (lambda: make_pointwise(0, 8), "^in_channels must"),
    "a 1×1 layer without outputs": (lambda: make_pointwise(8, 0), "^out_channels must"),
    "a 1×1 layer without groups": (lambda: make_pointwise(8, 8, 0), "^groups must"),
    # block strings
    "a number as block string": (lambda: decode_block(Any_ or 3), "block string.*3"),  # type: ignore[arg-type]
    "an empty block string": (lambda: decode_block(""), "block string"),
    "half a stride in a string": (lambda: decode_block("r1_k3_a1_p1_s1_e6_i8_o8"), "s1"),
    "an unknown word": (lambda: decode_block("r1_k3_a1_p1_s11_e6_i8_o8_x2"), "x2"),
    "a word twice": (lambda: decode_block("r1_r1_k3_a1_p1_s11_e6_i8_o8"), "r"),
    "words missing": (lambda: decode_block("r1_k3"), "block string"),
    "a block without words": (
        lambda: m.encode_block(BlockConfig(8, 8, (3,), 1, 1, activation="relu6")),
        "no words",
    ),
    # images, weights, models
    "an image of bytes": (lambda: preprocess(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), "uint8"),
    "an image of 0 to 255": (lambda: preprocess(torch.full((1, 3, 4, 4), 255.0)), "255"),
    "one channel": (lambda: preprocess(torch.zeros(1, 1, 4, 4)), r"\(1, 1, 4, 4\)"),
    "weights into a linear layer": (lambda: load_weights(nn.Linear(2, 2), {}), "MixNet.*Linear"),
    "weights that are a number": (lambda: mixnet_s(weights=3), "weights.*int"),
    "weights of another network": (lambda: mixnet_s(weights={"a": torch.zeros(1)}), "missing"),
    "timm's names of a linear layer": (lambda: to_timm(nn.Linear(1, 1)), "MixNet.*Linear"),
    "None to fuse": (lambda: fuse_for_inference(Any_), "model.*None"),
    "an unknown backend": (lambda: fuse_for_inference(nn.ReLU(), backend="x"), "backend.*'x'"),
    "None to replace in": (lambda: replace_depthwise(Any_, (3, 5)), "model.*NoneType"),
    "a layer to replace in itself": (
        lambda: replace_depthwise(nn.Conv2d(8, 8, 3, padding=1, groups=8), (3, 5)),
        "Sequential",
    ),
    "a layer that is not there": (
        lambda: m.theoretical_receptive_field(mobilenet_v2(width_multiplier=0.35), "nosuch", 32),
        "'nosuch'",
    ),
}


def test_there_are_a_hundred_of_them():
    assert len(CALLS) >= 100


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_says_what_is_wrong(name):
    call, words = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_numpys_integers_are_integers():
    layer = MixConv2d(np.int64(8), (np.int32(3), 5), stride=np.int64(2))  # type: ignore[arg-type]
    assert layer.kernel_sizes == (3, 5)
    assert [type(k) for k in layer.kernel_sizes] == [int, int]
    assert type(layer.stride[0]) is int
    assert layer(X).shape == (1, 8, 3, 3)


def test_a_stride_for_both_axes_keeps_the_residual():
    assert MixConvBlock(8, 8, (3, 5), stride=(1, 1)).has_residual  # type: ignore[arg-type]
    assert MixConvBlock(8, 8, (3, 5), stride=(2, 2)).stride == 2  # type: ignore[arg-type]
