"""The rule behind the paper's "FLOPS": its parts, and the networks whose count was published."""

import pytest
import torch
from torch import nn

from mixconv import MIXNET_L, MIXNET_M, MIXNET_S, MixNet, mobilenet_v1, mobilenet_v2
from mixconv.counting import elementwise_operations, padded_multiply_adds, paper_flops
from mixconv.formulation import LayerCost, count_costs
from mixconv.network import ConvNet
from tests.package.common import PAPER


def on_meta(build, *arguments, **options):
    with torch.device("meta"):
        return build(*arguments, **options)


# What TensorFlow 1.14's profiler counted on the official graphs, halved, without weight decay.
PROFILED = {
    "S": (MIXNET_S, 244.844), "M": (MIXNET_M, 346.061), "L": (MIXNET_L, 565.080),
}  # fmt: skip
# One copy of the weight decay: half of three operations for each decayed weight.
DECAY = {"S": 5.807, "M": 6.969, "L": 10.265}


@pytest.mark.parametrize("name", PROFILED)
def test_mixnets_are_counted_as_the_profiler_does(name):
    config, expected = PROFILED[name]
    model = on_meta(MixNet, config)
    assert paper_flops(model, decays=0) / 1e6 == pytest.approx(expected, abs=0.005)
    assert paper_flops(model, decays=1) / 1e6 == pytest.approx(expected + DECAY[name], abs=0.005)


@pytest.mark.parametrize(("build", "expected"), [(mobilenet_v1, 572.978), (mobilenet_v2, 304.387)])
def test_mobilenets_are_counted_as_the_profiler_does(build, expected):
    assert paper_flops(on_meta(build), decays=0) / 1e6 == pytest.approx(expected, abs=0.005)


def test_dilated_networks_are_counted_as_the_profiler_does():
    counted = {
        mobilenet_v1: [582.3, 586.7, 592.1, 597.7, 605.0],
        mobilenet_v2: [313.5, 319.3, 326.0, 333.8, 343.9],
    }
    for build, expected in counted.items():
        mixes = [tuple(range(3, 2 * groups + 2, 2)) for groups in range(2, 7)]
        found = [paper_flops(on_meta(build, mix, dilated=True), 1) / 1e6 for mix in mixes]
        assert found == pytest.approx(expected, abs=0.06)


def test_the_printed_numbers_follow():
    table = PAPER["table_2"]
    printed = {"S": table["MixNet-S"][1], "M": table["MixNet-M"][1], "L": table["MixNet-L"][1]}
    for name, decays in {"S": 2, "M": 2, "L": 0}.items():
        found = paper_flops(on_meta(MixNet, PROFILED[name][0]), decays) / 1e6
        assert abs(found - printed[name]) < 0.51
    witness = on_meta(MixNet, MIXNET_M, num_classes=10)
    assert round(paper_flops(witness, 2) / 1e6) == 352  # section 4.4


def test_elementwise_operations_by_hand():
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1))
    model = ConvNet(stem, [], nn.Identity(), 4, num_classes=5)
    x = torch.zeros(2, 3, 8, 8)
    pooled, biases = 2 * 4 * 16, 2 * 4 * 16 + 2 * 5
    assert elementwise_operations(model.train(), x) == pooled + biases
    assert model.training
    assert not any(layer._forward_hooks for layer in model.modules())


def test_padding_of_dilated_layers_by_hand():
    def cost(size):
        return LayerCost("layer", "depthwise", (1, 2, size, size), 18, 2 * 9 * size * size)

    assert padded_multiply_adds(cost(7), 1) == 2 * 9 * 49
    assert padded_multiply_adds(cost(7), 6) == 2 * 9 * 144
    assert padded_multiply_adds(cost(14), 2) == 2 * 9 * 196


def test_weights_are_counted_by_kind():
    model = on_meta(mobilenet_v1)
    x = torch.zeros(1, 3, 224, 224, device="meta")
    costs = count_costs(model, x)
    weights = {cost.name: model.get_submodule(cost.name).get_parameter("weight") for cost in costs}
    decayed = sum(weights[c.name].numel() for c in costs if c.kind != "depthwise")
    assert paper_flops(model, 1) - paper_flops(model, 0) == 1.5 * decayed
