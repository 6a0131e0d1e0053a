import copy
from typing import Any

import pytest
import torch
from torch import nn

from mixconv import (
    DepthwiseSeparableBlock,
    GroupedPointwise,
    MixConv2d,
    MixConvBlock,
    SqueezeExcite,
    count_costs,
)
from mixconv.blocks import ConvNormActivation, DropPath, make_activation, make_depthwise, stop_at
from mixconv.layer import make_pointwise

from .common import noise, randomize


@pytest.mark.parametrize(
    ("name", "at_minus_1", "at_9"),
    [("relu", 0, 9), ("relu6", 0, 6), ("swish", -0.26894143, 8.99888968)],
)
def test_activations(name, at_minus_1, at_9):
    values = make_activation(name)(torch.tensor([-1.0, 9.0]))
    torch.testing.assert_close(values, torch.tensor([at_minus_1, at_9], dtype=torch.float))
    with pytest.raises(ValueError, match=r"activation.*relu6, swish.*'gelu'"):
        make_activation("gelu")


def test_conv_norm_activation_is_just_that():
    unit = ConvNormActivation(MixConv2d(4, (3, 5), channel_multiplier=2), nn.BatchNorm2d, None)
    assert [name for name, _ in unit.named_children()] == ["conv", "norm"]
    assert unit(noise(2, 4, 3, 3)).shape == (2, 8, 3, 3)
    assert isinstance(ConvNormActivation(nn.Conv2d(3, 4, 1))[2], nn.ReLU)


def test_a_single_size_is_a_plain_depthwise_layer():
    assert type(make_depthwise(8, (5,))) is nn.Conv2d
    assert isinstance(make_depthwise(8, (3, 5)), MixConv2d)
    assert make_depthwise(8, 5, dilated=True).dilation == (2, 2)


def test_the_old_name_of_a_pointwise_layer_still_works():
    assert GroupedPointwise is make_pointwise
    assert type(GroupedPointwise(6, 4, 2)) is nn.Conv2d


def test_squeeze_excite_by_hand():
    layer: Any = SqueezeExcite(4, 2, "swish")
    x = noise(2, 4, 3, 5)
    means = x.flatten(2).mean(2)
    small = means @ layer.squeeze.weight.flatten(1).T + layer.squeeze.bias
    small = small * torch.sigmoid(small)
    gate = torch.sigmoid(small @ layer.excite.weight.flatten(1).T + layer.excite.bias)
    torch.testing.assert_close(layer(x), x * gate[:, :, None, None])


def test_drop_path_statistics():
    torch.manual_seed(0)
    layer, x = DropPath(0.3), torch.ones(20_000, 2, 1, 2)
    y = layer(x)
    kept = y[:, 0, 0, 0] != 0
    assert abs(float(kept.float().mean()) - 0.7) < 0.02
    torch.testing.assert_close(y[kept], x[kept] / 0.7)  # whole images, scaled up
    assert not y[~kept].any()
    assert layer.eval()(x) is x
    assert DropPath(0.0)(x) is x
    assert repr(layer) == "DropPath(rate=0.3)"
    assert DropPath(0.5)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_drop_path_rates(rate):
    with pytest.raises(ValueError, match=f"rate.*{rate}"):
        DropPath(rate)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernels", [(3,), (3, 5, 7)])
def test_depthwise_separable_block_step_by_step(kernels, stride):
    block: Any = randomize(DepthwiseSeparableBlock(8, 12, kernels, stride)).eval()
    x = noise(2, 8, 7, 6)
    y = block.depthwise.norm(block.depthwise.conv(x)).relu()
    y = block.pointwise.norm(block.pointwise.conv(y)).relu()
    torch.testing.assert_close(block(x), y)
    assert y.shape == (2, 12, -(-7 // stride), -(-6 // stride))


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("expand_ratio", [1, 3])
@pytest.mark.parametrize(
    ("out", "stride", "skip", "residual"),
    [(8, 1, True, True), (8, 2, True, False), (10, 1, True, False), (8, 1, False, False)],
)
def test_mixconv_block_step_by_step(out, stride, skip, residual, expand_ratio, ratio):
    block: Any = MixConvBlock(
        8, out, (3, 5), stride, expand_ratio=expand_ratio, expand_groups=2, project_groups=2,
        squeeze_ratio=ratio, activation="swish", skip=skip, padding="same",
    )  # fmt: skip
    randomize(block).eval()
    x = noise(2, 8, 7, 6)
    wide = block.expand.norm(block.expand.conv(x)) if expand_ratio > 1 else x
    wide = nn.functional.silu(wide) if expand_ratio > 1 else x
    wide = nn.functional.silu(block.depthwise.norm(block.depthwise.conv(wide)))
    if ratio:
        assert isinstance(block.squeeze_excite, SqueezeExcite)
        assert block.squeeze_excite.squeeze.out_channels == 4  # of the block's input channels
        assert isinstance(block.squeeze_excite.activation, nn.SiLU)
        wide = block.squeeze_excite(wide)
    y = block.project.norm(block.project.conv(wide))
    assert block.has_residual is residual
    torch.testing.assert_close(block(x), x + y if residual else y)
    assert y.shape == (2, out, -(-7 // stride), -(-6 // stride))


def test_only_the_residual_branch_is_dropped():
    block = MixConvBlock(8, 8, (3, 5), drop_path_rate=0.999)
    x = noise(4, 8, 5, 5)
    torch.testing.assert_close(block(x), x)
    strided = MixConvBlock(8, 8, (3, 5), 2, drop_path_rate=0.999)
    assert strided(x).any()


def test_squeeze_is_never_empty():
    block = MixConvBlock(4, 4, squeeze_ratio=0.01)
    assert isinstance(block.squeeze_excite, SqueezeExcite)
    assert block.squeeze_excite.squeeze.out_channels == 1


def test_block_costs_by_hand():
    block = MixConvBlock(8, 16, (3, 5), 2, expand_ratio=6, expand_groups=2, squeeze_ratio=0.5)
    costs = {cost.name: cost for cost in count_costs(block, noise(1, 8, 10, 10))}
    adds = {name: cost.multiply_adds for name, cost in costs.items()}
    assert adds == {
        "expand.conv": 100 * 8 * 48 // 2,
        "depthwise.conv.convs.0": 25 * 24 * 9,
        "depthwise.conv.convs.1": 25 * 24 * 25,
        "squeeze_excite.squeeze": 48 * 4,
        "squeeze_excite.excite": 4 * 48,
        "project.conv": 25 * 48 * 16,
    }
    assert costs["squeeze_excite.squeeze"].parameters == 48 * 4 + 4


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"squeeze_ratio": 1.5}, ValueError, "squeeze_ratio.*1.5"),
        ({"squeeze_ratio": -0.5}, ValueError, "squeeze_ratio.*-0.5"),
        ({"expand_ratio": 0}, ValueError, "expand_ratio.*0"),
        ({"expand_ratio": 1.5}, TypeError, "expand_ratio.*1.5"),
        ({"expand_groups": 3}, ValueError, "groups must divide.*3"),
        ({"project_groups": 5}, ValueError, "groups must divide.*5"),
        ({"kernel_sizes": (3, 4)}, ValueError, "kernel_sizes.*4"),
        ({"stride": 0}, ValueError, "stride.*0"),
        ({"padding": "valid"}, ValueError, "padding.*'valid'"),
        ({"activation": "gelu"}, ValueError, "activation.*'gelu'"),
        ({"drop_path_rate": 1.0}, ValueError, "rate.*1.0"),
    ],
    ids=str,
)
def test_block_errors(options, error, words):
    with pytest.raises(error, match=words):
        MixConvBlock(**({"in_channels": 8, "out_channels": 8} | options))


def test_norm_layer_is_used_everywhere():
    block = MixConvBlock(8, 8, norm_layer=lambda channels: nn.GroupNorm(2, channels))
    assert sum(isinstance(m, nn.GroupNorm) for m in block.modules()) == 3
    assert not any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    assert copy.deepcopy(block)(noise(1, 8, 4, 4)).isfinite().all()


@pytest.mark.parametrize(
    ("output_stride", "found"),
    [
        (32, [(1, 1), (2, 1), (2, 1), (2, 1), (2, 1), (1, 1)]),
        (16, [(1, 1), (2, 1), (2, 1), (2, 1), (1, 1), (1, 2)]),
        (8, [(1, 1), (2, 1), (2, 1), (1, 1), (1, 2), (1, 4)]),
    ],
)
def test_strides_end_where_they_are_told_to(output_stride, found):
    """A block that keeps its size still has tight kernels; those after it are spread."""
    assert stop_at(output_stride, [1, 2, 2, 2, 2, 1]) == found


@pytest.mark.parametrize("output_stride", [1, 12, 64, True])
def test_no_network_ends_at_another_stride(output_stride):
    with pytest.raises(ValueError, match=f"^output_stride must be 2, .* got {output_stride}"):
        stop_at(output_stride, [1])
