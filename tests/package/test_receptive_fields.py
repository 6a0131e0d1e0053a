"""What an output can see and what it looks at: against closed forms, and on any model."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv.blocks import MixConvBlock, SqueezeExcite
from mixconv.formulation import receptive_field
from mixconv.layer import MixConv2d, make_conv2d
from mixconv.mixnet import MixNet
from mixconv.receptive_fields import (
    effective_receptive_field,
    energy_curve,
    energy_pixels,
    energy_sigma,
    energy_square,
    theoretical_receptive_field,
)
from mixconv.zoo import mixnet_s
from tests.package.common import noise, same_state, snapshot


def row(kernel: list[float], layers: int) -> np.ndarray:
    """The convolution power of a kernel, by NumPy."""
    power = np.ones(1)
    for _ in range(layers):
        power = np.convolve(power, kernel)
    return power


def ones(layers: int, k: int) -> nn.Sequential:
    """Linear layers whose weights are all 1."""
    stack = nn.Sequential(*(nn.Conv2d(1, 1, k, padding=k // 2, bias=False) for _ in range(layers)))
    for parameter in stack.parameters():
        nn.init.ones_(parameter)
    return stack


# What an output looks at


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("layers", "k"), [(1, 3), (4, 3), (3, 5), (2, 9)])
def test_energy_of_ones_is_the_square_of_a_convolution_power(layers, k, dtype):
    side = 1 + (k - 1) * layers
    maps = effective_receptive_field(ones(layers, k).to(dtype), size=side + 4, images=3)
    line = row([1.0] * k, layers) ** 2
    known = np.pad(np.outer(line, line), 2)
    assert (maps.shape, maps.dtype) == ((3, side + 4, side + 4), torch.float64)
    torch.testing.assert_close(maps.mean(0), torch.from_numpy(known / known.sum()))


def test_energy_sums_over_the_channels_of_the_image():
    conv: Any = nn.Conv2d(2, 1, 3, padding=1, bias=False)
    known = conv.weight.detach()[0].double().square().sum(0)
    maps = effective_receptive_field(conv, size=3, images=1)
    torch.testing.assert_close(maps[0], known / known.sum())


def test_signs_leave_the_energies_of_the_channels_and_no_products():
    """Two outputs with opposite kernels would cancel in a plain sum."""
    conv: Any = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight[0] = torch.arange(9.0).view(1, 3, 3) - 2
        conv.weight[1] = -conv.weight[0] + F.pad(torch.ones(1, 1, 1), [1] * 4)
    known = conv.weight.detach().double().square().sum((0, 1))
    maps = effective_receptive_field(conv, size=3, images=400)
    assert (maps / maps.sum((1, 2), keepdim=True) - known / known.sum()).abs().max() > 0.9
    assert (maps.mean(0) - known / known.sum()).abs().max() < 0.05


def test_image_that_is_shut_out_counts_as_nothing():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU())
    images = torch.ones(2, 1, 3, 3) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    maps = effective_receptive_field(model, images=images)
    assert sorted(maps[:, 1, 1].tolist()) == [0, 2]
    assert float(maps.mean(0).sum()) == 1


def test_random_networks_look_where_the_blend_of_boxes_says():
    maps = []
    for seed in range(40):
        torch.manual_seed(seed)
        mixes = [MixConv2d(16, (3, 7), partition=(12, 4)) for _ in range(2)]
        points = [make_conv2d(i, 16, 1) for i in (3, 16, 16)]
        stack = nn.Sequential(points[0], mixes[0], points[1], mixes[1], points[2])
        maps.append(effective_receptive_field(stack, size=13, images=4, seed=seed).mean(0))
    box = np.pad(np.full((3, 3), 0.75 / 9), 2) + np.full((7, 7), 0.25 / 49)
    known = F.conv2d(*(torch.from_numpy(box)[None, None],) * 2, padding=6)[0, 0]
    average = torch.stack(maps).mean(0)
    assert (energy_curve(average) - energy_curve(known)).abs().max() < 0.03
    weights = 0.75 * 9 + 0.25 * 49
    assert math.isclose(energy_sigma(known) ** 2, 2 * (weights - 1) / 12)


def test_the_scale_of_an_output_does_not_matter():
    torch.manual_seed(0)
    conv: Any = nn.Conv2d(3, 4, 5, padding=2)
    before = effective_receptive_field(conv, size=9, images=2)
    for factor in (1e-30, 1e30):  # squares of these do not fit into single precision
        with torch.no_grad():
            conv.weight.mul_(factor)
        torch.testing.assert_close(effective_receptive_field(conv, size=9, images=2), before)
        with torch.no_grad():
            conv.weight.div_(factor)


def test_seed_decides_and_nothing_else():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    first = effective_receptive_field(model, size=9, seed=5)
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert torch.equal(effective_receptive_field(model, size=9, seed=5), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(effective_receptive_field(model, size=9, seed=6), first)
    assert not torch.equal(first[0], first[1])


def test_images_can_be_given():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1))
    images = noise(2, 1, 8, 12)
    maps = effective_receptive_field(model, images=images.double())
    assert maps.shape == (2, 8, 12)
    assert not images.requires_grad
    with pytest.raises(ValueError, match="size must be left out when images are given, got 8"):
        effective_receptive_field(model, size=8, images=images)


def test_groups_of_a_layer_look_through_their_own_kernels():
    layer = MixConv2d(16, (3, 9, 5), partition=(8, 2, 6))
    for group, k in ((slice(0, 8), 3), (slice(8, 10), 9), (slice(10, 16), 5), (None, 9)):
        energy = effective_receptive_field(layer, size=15, images=2, channels=group).mean(0)
        assert energy_square(energy, 1.0) == k
        window = theoretical_receptive_field(layer, size=15, channels=group)
        assert (window.height, window.width) == (k, k)


# What an output can see


@pytest.mark.parametrize(
    ("kernels", "strides", "dilations"),
    [
        ([3], [1], [1]),
        ([3, 3, 3], [1, 1, 1], [1, 1, 1]),
        ([5, 3, 3], [2, 1, 1], [1, 2, 1]),
        ([3, 1, 5, 7], [2, 1, 2, 1], [1, 1, 1, 2]),
        ([2, 4], [2, 1], [1, 1]),
    ],
)
def test_window_is_that_of_the_list(kernels, strides, dilations):
    layers = [
        nn.Conv2d(1, 1, k, stride=s, dilation=d)
        for k, s, d in zip(kernels, strides, dilations, strict=True)
    ]
    window = theoretical_receptive_field(nn.Sequential(*layers), size=(90, 101))
    side = receptive_field(kernels, strides, dilations)
    assert (window.height, window.width, window.touches_border) == (side, side, False)


def test_window_stands_where_the_gradient_arrives():
    """All four edges of an oblong window, off the middle."""
    layers: Any = nn.Sequential(
        nn.ZeroPad2d((1, 4, 3, 0)), nn.Conv2d(1, 1, (3, 7), stride=(2, 1)), nn.Conv2d(1, 1, (5, 2))
    )
    window = theoretical_receptive_field(layers, size=(40, 48))
    image = torch.zeros(1, 1, 40, 48, requires_grad=True)
    output = layers(image)
    output[0, 0, output.shape[2] // 2, output.shape[3] // 2].backward()
    assert image.grad is not None
    rows, columns = (image.grad[0, 0] != 0).nonzero(as_tuple=True)
    assert window.top == rows.min()
    assert window.left == columns.min()
    assert window.height == rows.max() - rows.min() + 1
    assert window.width == columns.max() - columns.min() + 1


def test_window_that_ends_at_the_border_says_so():
    stack = ones(4, 5)
    assert theoretical_receptive_field(stack, size=9) == (0, 0, 9, 9, True)
    assert theoretical_receptive_field(stack, size=19) == (1, 1, 17, 17, False)


def test_zero_weights_and_closed_gates_are_still_seen():
    stack = nn.Sequential(*ones(1, 3), nn.ReLU(), *ones(1, 3))
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
    assert theoretical_receptive_field(stack, size=11).height == 5


def test_gate_sees_everything():
    block = MixConvBlock(8, 8, (3, 5), squeeze_ratio=0.5)
    assert theoretical_receptive_field(block, size=21).height == 21
    assert theoretical_receptive_field(block, "depthwise", size=21).height == 5
    assert any(isinstance(part, SqueezeExcite) for part in block.modules())


# Any model, any layer


@pytest.fixture(scope="module")
def mixnet() -> MixNet:
    torch.manual_seed(0)
    return mixnet_s(num_classes=10)


def test_mixnet_by_layer_name(mixnet):
    """Stem 3×3 stride 2, block 0 3×3, block 1 3×3 stride 2: 1 + 2 + 2·2 + 2·2 = 11."""
    side = receptive_field([3, 3, 3], [2, 1, 2])
    assert (side, theoretical_receptive_field(mixnet, "blocks.1", 64).height) == (11, 11)
    maps = effective_receptive_field(mixnet, "blocks.1", 64, images=2)
    window = theoretical_receptive_field(mixnet, "blocks.1", 64)
    inside = maps[:, window.top :, window.left :][:, : window.height, : window.width]
    torch.testing.assert_close(inside.mean(dim=0).sum(), torch.tensor(1.0).double())
    groups = [slice(0, 48), slice(48, 96), slice(96, 144)]  # block 3: 3, 5, 7 at stride 2
    sides = [
        theoretical_receptive_field(mixnet, "blocks.3.depthwise.conv", 64, channels=g).height
        for g in groups
    ]
    assert sides == [receptive_field([3, 3, 3, 3, k], [2, 1, 2, 1, 2]) for k in (3, 5, 7)]


def test_every_part_of_a_strided_model_can_be_asked():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip
    sides = [theoretical_receptive_field(model, str(i), 48).height for i in range(6)]
    assert sides == [3, 3, 3, 5, 21, 48]
    for index, side in enumerate(sides):
        maps = effective_receptive_field(model, str(index), 48, images=2)
        rows = (maps.sum((0, 2)) > 0).nonzero()
        assert rows.max() - rows.min() + 1 <= side


def test_value_is_read_before_an_activation_in_place_changes_it():
    conv: Any = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(conv.weight, -1.0)
    model = nn.Sequential(conv, nn.ReLU(inplace=True))
    images = torch.ones(1, 1, 3, 3)  # the activation lets no gradient through
    assert effective_receptive_field(model, "0", images=images)[0, 1, 1] == 1
    with pytest.raises(ValueError, match="gradient that is not zero must reach the image from '1'"):
        effective_receptive_field(model, "1", images=images)


@pytest.mark.parametrize("measure", [theoretical_receptive_field, effective_receptive_field])
def test_model_is_left_as_it_was(measure):
    model: Any = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()
    )
    model.train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[0].bias.requires_grad_(False)
    before = snapshot(model)
    with torch.no_grad():
        measure(model, "2", 9)
        assert not torch.is_grad_enabled()
    with pytest.raises(ValueError, match="channels"):
        measure(model, "2", 9, channels=slice(2, 9))
    assert same_state(model, before)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[0].bias.grad is None
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_and_inference_contexts():
    model = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    expected = effective_receptive_field(model, size=7, images=2)
    with torch.inference_mode():
        assert torch.equal(effective_receptive_field(model, size=7, images=2), expected)
        images = noise(1, 3, 7, 7)
        assert effective_receptive_field(model, images=images).shape == (1, 7, 7)


# What is refused


class TwoFaced(nn.Module):
    """Runs one layer twice, hides NaN, makes NaN, or cuts the gradient."""

    def __init__(self, face: str) -> None:
        super().__init__()
        self.conv, self.face = nn.Conv2d(1, 1, 3, padding=1), face

    def forward(self, x: Tensor) -> Any:
        y: Tensor = self.conv(x)
        if self.face == "twice":
            y = self.conv(y)
        if self.face == "hides":
            y = y.nan_to_num()
        if self.face == "makes":
            y = y / 0 * 0
        if self.face == "cuts":
            y = y.detach()
        return (y, y) if self.face == "pair" else y


@pytest.mark.parametrize("measure", [theoretical_receptive_field, effective_receptive_field])
@pytest.mark.parametrize(
    ("face", "layer", "options", "message"),
    [
        ("", "cnov", {}, r"got 'cnov'; close: 'conv'"),
        ("", "head.9", {}, "layer must be in model.named_modules"),
        ("twice", "conv", {}, "'conv' must run once in a pass, it ran 2 times"),
        ("pair", "", {}, r"must return \(N, C, H, W\), got tuple"),
        ("", "", {"channels": slice(1, 2)}, "channels must lie in the 1 of"),
        ("", "", {"channels": slice(0, 2)}, "channels must lie in the 1 of"),
        ("", "", {"size": 0}, "size must be at least 1, got 0"),
        ("", "", {"size": (8, 8, 8)}, "size must be an integer or two"),
    ],
)
def test_refusals(measure, face, layer, options, message):
    with pytest.raises(ValueError, match=message):
        measure(TwoFaced(face), layer, **({"size": 8} | options))


def test_refusals_of_one():
    for face in ("hides", "makes"):
        with pytest.raises(ValueError, match="must give NaN for an image of NaN and for no other"):
            theoretical_receptive_field(TwoFaced(face), size=8)
    for face in ("cuts", "makes"):
        with pytest.raises(ValueError, match="a finite gradient that is not zero must reach"):
            effective_receptive_field(TwoFaced(face), size=8)
    flat = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    with pytest.raises(ValueError, match=r"layer '1' must return \(N, C, H, W\), got \(8, 72\)"):
        effective_receptive_field(flat, "1", 8)
    with pytest.raises(ValueError, match="model must have a layer with in_channels"):
        effective_receptive_field(nn.ReLU(), size=8)
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        effective_receptive_field(flat, "0", 8, images=0)
    with pytest.raises(TypeError, match=r"size must be an integer, got 8\.5"):
        effective_receptive_field(flat, "0", 8.5)  # type: ignore[arg-type]


# How large


def test_sizes_by_hand():
    energy = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert [energy_pixels(energy, share) for share in (0.25, 0.26, 0.5, 0.75, 1)] == [1, 2, 3, 5, 9]
    assert [energy_square(energy, share) for share in (0.25, 0.26, 1.0)] == [1, 3, 3]
    assert energy_curve(energy).tolist() == [0.25, 1]
    assert energy_curve(energy, (0, 0)).tolist() == [1 / 16, 9 / 16, 1]
    assert energy_square(energy, 0.6, (0, 0)) == 5
    assert math.isclose(energy_sigma(energy), math.sqrt(0.5))


def test_sizes_of_an_oblong_map():
    energy = torch.zeros(5, 9)
    energy[2, 0] = energy[2, 8] = 1
    assert (energy_square(energy, 0.5), energy_pixels(energy, 0.5)) == (9, 1)
    assert math.isclose(energy_sigma(energy), math.sqrt(16 / 2))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_sizes_do_not_depend_on_scale_or_dtype(scale):
    energy = effective_receptive_field(ones(3, 5).double(), size=13, images=1)[0] * scale
    for dtype in (torch.float64, torch.float32):
        sizes = [energy_square(energy.to(dtype), share) for share in (0.2, 0.3, 0.5, 0.99)]
        assert sizes == [3, 3, 5, 11]  # 4%, 33%, 69%, 90%, 98% and 99.8% in 1, 3, 5, …
    assert math.isclose(energy_sigma(energy), energy_sigma(energy / scale), rel_tol=1e-12)


def test_a_logarithm_makes_them_depend_on_scale():
    """The measure of a published script: one bell, σ = 60, on 1024×1024 pixels."""
    squares = (torch.arange(1024).double() - 512).square()
    bell = torch.exp(-(squares[:, None] + squares) / (2 * 60**2))
    assert energy_square(bell, 0.5) == energy_square(1e6 * bell, 0.5) == 127
    assert energy_square(torch.log10(1e6 * bell + 1), 0.5) == 309


@pytest.mark.parametrize("size", [energy_square, energy_pixels])
def test_sizes_refuse_what_is_no_map(size):
    good = torch.ones(3, 3)
    for share in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="share must be more than 0 and at most 1"):
            size(good, share)
    bad = [torch.ones(2, 3, 3), torch.zeros(3, 3), -good, good * math.nan, good * math.inf]
    for energy in bad:
        with pytest.raises(ValueError, match=r"energy must be one map \(H, W\)"):
            size(energy, 0.5)


def test_centre_outside_the_map_is_refused():
    for centre in ((3, 0), (0, -1)):
        with pytest.raises(ValueError, match="centre must be a pixel of 3×3"):
            energy_square(torch.ones(3, 3), 0.5, centre)
