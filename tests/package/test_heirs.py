"""The heirs against definitions in `F.conv2d`, and the tool that traces what an output sees."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv import MixConv2d
from mixconv.heirs import (
    ConvRelPosEnc,
    InceptionDWConv2d,
    MultiHeadMixedConv,
    MultiOrderDWConv,
    PartialConv2d,
    trace_wires,
    window_sizes,
)

from .common import noise


def assert_same(
    layer: nn.Module,
    definition: Callable[..., Tensor],
    *inputs: Tensor,
    options: tuple[Any, ...] = (),
) -> None:
    """Output and the gradients of inputs and weights agree, in float64."""
    layer = layer.double()
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    everything = [*leaves, *layer.parameters()]
    ours, wanted = layer(*leaves, *options), definition(*everything)
    torch.testing.assert_close(ours, wanted)
    upstream = noise(*ours.shape, seed=1, dtype=torch.double)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    pairs = zip(
        torch.autograd.grad(ours, everything, upstream),
        torch.autograd.grad(wanted, everything, upstream),
        strict=True,
    )
    for place, (a, b) in enumerate(pairs):
        assert float(b.abs().max()) > 0, f"{names[min(place, len(names) - 1)]} is not in the result"
        torch.testing.assert_close(a, b)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1) -> Tensor:
    zeros = [dilation * (side // 2) for side in weight.shape[2:]]
    return F.conv2d(x, weight, bias, padding=zeros, dilation=dilation, groups=len(weight))


# What an output sees


def test_wires_of_a_mix_are_a_diagonal_of_its_windows():
    layer = MixConv2d(6, (3, 5, 9), partition=(1, 3, 2))
    wires = trace_wires(layer, 6, 9)
    for z, k in enumerate((3, 5, 5, 5, 9, 9)):
        expected = torch.zeros(6, 9, 9, dtype=torch.bool)
        edge = (9 - k) // 2
        expected[z, edge : 9 - edge, edge : 9 - edge] = True
        assert torch.equal(wires[z], expected)
    sizes = window_sizes(wires)
    assert [sizes[z, z].tolist() for z in range(6)] == [[k, k] for k in (3, 5, 5, 5, 9, 9)]
    assert int(sizes.sum()) == 2 * (3 + 3 * 5 + 2 * 9), "0 where there is no wire"


def test_wires_of_groups_strides_of_taps_and_bands():
    dilated = trace_wires(nn.Conv2d(2, 2, 3, padding=3, dilation=3, groups=2), 2)
    assert int(dilated[0, 0].sum()) == 9
    assert window_sizes(dilated)[0].tolist() == [[7, 7], [0, 0]], "from the first tap to the last"
    band = trace_wires(nn.Conv2d(1, 1, (1, 7), padding=(0, 3)), 1)
    assert window_sizes(band).tolist() == [[[1, 7]]]
    pairs = trace_wires(nn.Conv2d(4, 2, 1, groups=2), 4)
    assert pairs.flatten(2).any(2).tolist() == [
        [True, True, False, False],
        [False, False, True, True],
    ]


def test_windows_of_single_pixels():
    wires = torch.zeros(1, 3, 5, 5, dtype=torch.bool)
    wires[0, 0, 0, 4] = wires[0, 1, 0, 0] = wires[0, 1, 4, 2] = True
    assert window_sizes(wires).tolist() == [[[1, 1], [5, 3], [0, 0]]]


# The heirs


@pytest.mark.parametrize("heads", [(2, 3, 3), (1, 4, 2)])
def test_conv_rel_pos_enc(heads):
    size, channels = (4, 6), 3
    layer = ConvRelPosEnc(channels, heads)
    assert layer.mix.partition == tuple(channels * count for count in heads)
    assert layer.mix.kernel_sizes == (3, 5, 7)

    def definition(q, v, *weights):
        images = v[:, :, 1:].reshape(v.shape[0], v.shape[1], *size, channels)
        results, first = [], 0
        for group, count in enumerate(heads):
            w, b = weights[2 * group : 2 * group + 2]
            for head in range(count):
                part = slice(channels * head, channels * (head + 1))
                image = images[:, first + head].movedim(-1, 1)
                position = depthwise(image, w[part], b[part]).movedim(1, -1).flatten(1, 2)
                results.append(q[:, first + head, 1:] * position)
            first += count
        return F.pad(torch.stack(results, 1), (0, 0, 1, 0))

    q, v = noise(2, 2, sum(heads), 25, channels)
    assert_same(layer, definition, q, v, options=(size,))


def test_the_class_token_has_no_position():
    layer = ConvRelPosEnc(2)
    q, v = noise(2, 1, 8, 10, 2)
    y = layer(q, v, (3, 3))
    assert y.shape == q.shape
    assert not y[:, :, 0].any()
    v[:, :, 0] += 100
    assert torch.equal(layer(q, v, (3, 3)), y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("heads", [4, 2])
def test_multi_head_mixed_conv(training, heads):
    channels, wide = 12, 36
    layer = MultiHeadMixedConv(channels, heads, expand_ratio=3)
    mean, var = noise(wide).double(), (noise(wide, seed=2).abs() + 0.5).double()
    layer.double().load_state_dict(
        {"norm.running_mean": mean, "norm.running_var": var}, strict=False
    )
    layer.train(training)
    each = channels // heads

    def definition(x, *weights):
        outputs = [
            depthwise(x[:, each * i : each * (i + 1)], *weights[2 * i : 2 * i + 2])
            for i in range(heads)
        ]
        shuffled = torch.stack([outputs[i][:, j] for j in range(each) for i in range(heads)], 1)
        narrow, narrow_bias, scale, shift, project, project_bias = weights[2 * heads :]
        y = F.conv2d(shuffled, narrow, narrow_bias, groups=each)
        y = F.batch_norm(y, mean.clone(), var.clone(), scale, shift, training)
        return F.conv2d(F.gelu(y), project, project_bias)

    x = noise(3, channels, 7, 6)
    if training:  # the norm takes the mean away, and with it the narrow layer's bias
        y = layer(x.double())
        torch.testing.assert_close(y, definition(x.double(), *layer.parameters()))
    else:
        assert_same(layer, definition, x)


@pytest.mark.parametrize("split", [(1, 3, 4), (2, 1, 1)])
def test_multi_order_dw_conv(split):
    channels = 2 * sum(split)
    near, middle = 2 * split[0], 2 * (split[0] + split[1])

    def definition(x, w0, b0, w1, b1, w2, b2, w3, b3):
        y = depthwise(x, w0, b0)
        parts = [y[:, :near], depthwise(y[:, near:middle], w1, b1, 2)]
        parts.append(depthwise(y[:, middle:], w2, b2, 3))
        return F.conv2d(torch.cat(parts, 1), w3, b3)

    assert_same(MultiOrderDWConv(channels, split), definition, noise(2, channels, 10, 13))


@pytest.mark.parametrize(("channels", "options"), [(8, (3, 11, 0.125)), (21, (5, 7, 0.25))])
def test_inception_dw_conv(channels, options):
    count = int(channels * options[2])
    first = channels - 3 * count

    def definition(x, square, b0, row, b1, column, b2):
        assert row.shape[2:] == (1, options[1])
        assert column.shape[2:] == (options[1], 1)
        parts = [x[:, first + count * i : first + count * (i + 1)] for i in range(3)]
        triples = zip(parts, (square, row, column), (b0, b1, b2), strict=True)
        return torch.cat([x[:, :first], *(depthwise(*triple) for triple in triples)], 1)

    assert_same(InceptionDWConv2d(channels, *options), definition, noise(2, channels, 9, 14))


@pytest.mark.parametrize("divide", [4, 3])
def test_partial_conv(divide):
    def definition(x, weight):
        count = 10 // divide
        return torch.cat([F.conv2d(x[:, :count], weight, padding=1), x[:, count:]], 1)

    layer = PartialConv2d(10, divide)
    assert_same(layer, definition, noise(2, 10, 5, 6))
    x = noise(2, 10, 5, 6).double()
    before = x.clone()
    layer(x)
    assert torch.equal(x, before), "the input is left as it was"


@pytest.mark.parametrize(
    "layer", [InceptionDWConv2d(8), PartialConv2d(8)], ids=["bands", "partial"]
)
def test_a_single_image_needs_no_batch(layer):
    x = noise(8, 5, 6)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiHeadMixedConv(10), "channels must be a multiple of 4 heads, got 10"),
        (lambda: MultiOrderDWConv(12), "channels must be a multiple of 8, got 12"),
        (lambda: InceptionDWConv2d(7), "ratio 0.125 gives 0 of 7 channels"),
        (lambda: InceptionDWConv2d(8, ratio=0.5), "ratio 0.5 gives 4 of 8 channels"),
        (lambda: PartialConv2d(3), "divide 4 leaves 0 of 3 channels to convolve"),
        (lambda: PartialConv2d(3, 1), "divide 1 leaves 3 of 3 channels to convolve"),
        (
            lambda: ConvRelPosEnc(1)(*torch.zeros(2, 1, 8, 9, 1), (3, 3)),
            "size (3, 3) needs 1 + 9 tokens, got 9",
        ),
        (lambda: ConvRelPosEnc(1, heads=(2, 3)), "one entry for each kernel size"),
    ],
)
def test_bad_arguments_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
