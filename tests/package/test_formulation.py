from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixconv import MixConv2d, count_costs, mixconv_reference, receptive_field
from mixconv.formulation import (
    depthwise_loops,
    depthwise_reference,
    mixconv_loops,
    mixconv_multiply_adds,
    mixconv_parameters,
)

from .common import noise


def test_a_pixel_by_hand():
    x = torch.arange(9.0).view(1, 3, 3)
    weight = torch.arange(9.0).view(1, 1, 3, 3)
    corner = 0 * 4 + 1 * 5 + 3 * 7 + 4 * 8  # the other five taps see the border
    assert depthwise_loops(x, weight)[0, 0, 0] == corner
    assert depthwise_loops(x, weight)[0, 1, 1] == sum(i * i for i in range(9))


@pytest.mark.parametrize("multiplier", [1, 2, 3])
@pytest.mark.parametrize("size", [(4, 5), (1, 1), (2, 7)])
@pytest.mark.parametrize("kernels", [(3,), (1, 5), (3, 5, 7)])
def test_loops_and_shifted_images_agree_with_torch(multiplier, size, kernels):
    counts = [1, 2, 1][: len(kernels)]
    x = noise(sum(counts), *size)
    weights = [
        noise(count * multiplier, 1, k, k, seed=k) for count, k in zip(counts, kernels, strict=True)
    ]
    loops = mixconv_loops(x, weights, multiplier)
    shifted = mixconv_reference(x[None], weights, multiplier)[0]
    groups = zip(x.split(counts), weights, strict=True)
    library = torch.cat(
        [
            nn.functional.conv2d(part, weight, padding="same", groups=len(part))
            for part, weight in groups
        ]
    )
    torch.testing.assert_close(loops, library)
    torch.testing.assert_close(shifted, library)


def test_output_channel_z_reads_input_channel_z_over_m():
    x = torch.zeros(1, 2, 3, 3)
    x[:, 1] = 1
    y = depthwise_reference(x, torch.ones(6, 1, 1, 1))
    assert y[0, :, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("kernels", "strides", "dilations"),
    [
        ([3], None, None),
        ([3, 5], [2, 1], None),
        ([7, 3, 3], [1, 2, 2], [1, 2, 3]),
        ([1], [2], None),
    ],
)
def test_receptive_field_is_what_a_gradient_sees(kernels, strides, dilations):
    steps, spreads = strides or [1] * len(kernels), dilations or [1] * len(kernels)
    stack = nn.Sequential(
        *(
            nn.Conv2d(1, 1, k, s, d * (k // 2), d, bias=False)
            for k, s, d in zip(kernels, steps, spreads, strict=True)
        )
    )
    for weight in stack.parameters():
        nn.init.ones_(weight)
    x = torch.zeros(1, 1, 64, 64, requires_grad=True)
    y = stack(x)
    y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
    assert x.grad is not None
    touched = x.grad[0, 0].nonzero()
    side = int(touched[:, 0].max() - touched[:, 0].min()) + 1
    assert receptive_field(kernels, strides, dilations) == side


def test_receptive_field_wants_lists_of_one_length():
    with pytest.raises(ValueError, match="zip"):
        receptive_field([3, 3], [1])


def test_counting_wants_a_kernel_size_for_each_group():
    for partition, kernels in [([4, 4], [3]), ([4], [3, 5])]:
        with pytest.raises(ValueError, match="zip"):
            mixconv_parameters(partition, kernels)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_closed_form_hooks_and_torch_count_alike(multiplier, stride):
    layer = MixConv2d(13, (3, 5, 7), stride, channel_multiplier=multiplier)
    x = noise(1, 13, 9, 11)
    height, width = -(-9 // stride), -(-11 // stride)
    parameters = mixconv_parameters(layer.partition, layer.kernel_sizes, multiplier)
    assert parameters == sum(p.numel() for p in layer.parameters())
    closed = mixconv_multiply_adds(layer.partition, layer.kernel_sizes, height, width, multiplier)
    costs = count_costs(layer, x)
    assert [cost.kind for cost in costs] == ["depthwise"] * 3
    assert [cost.name for cost in costs] == [f"convs.{i}" for i in range(3)]
    assert sum(cost.multiply_adds for cost in costs) == closed
    assert sum(cost.parameters for cost in costs) == parameters
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * closed


def test_count_costs_names_kinds_and_leaves_the_model_alone():
    model: Any = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 6, 3, groups=6),
        nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    model[3].eval()
    before = model[3].running_mean.clone()
    costs = count_costs(model, noise(2, 4, 4, 4))
    assert [cost.kind for cost in costs] == ["convolution", "pointwise", "depthwise", "linear"]
    assert [cost.parameters for cost in costs] == [4 * 6 * 9 + 6, 24, 60, 125]
    assert [cost.output_shape for cost in costs] == [
        (2, 6, 4, 4), (2, 6, 4, 4), (2, 6, 2, 2), (2, 5),
    ]  # fmt: skip
    adds = [2 * 16 * 6 * 36, 2 * 16 * 18, 2 * 4 * 6 * 9, 2 * 24 * 5]
    assert [cost.multiply_adds for cost in costs] == adds
    assert model.training
    assert not model[3].training
    assert torch.equal(model[3].running_mean, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_count_costs_cleans_up_after_an_error():
    model: Any = nn.Sequential(nn.Conv2d(3, 3, 1)).train()
    with pytest.raises(RuntimeError):
        count_costs(model, noise(1, 4, 2, 2))
    assert model.training
    assert not model[0]._forward_hooks


def test_count_costs_on_the_meta_device():
    layer = MixConv2d(8, (3, 5), device="meta")
    costs = count_costs(layer, torch.zeros(1, 8, 500, 500, device="meta"))
    assert sum(cost.multiply_adds for cost in costs) == 500 * 500 * 4 * (9 + 25)
