from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixconv import count_costs, mobilenet_v1, mobilenet_v2
from mixconv.blocks import DropPath
from mixconv.formulation import count_parameters

from .common import PAPER, noise

MAKERS = {"v1": mobilenet_v1, "v2": mobilenet_v2}
EXPONENTIAL = ["3 5", "3 5 7", "3 5 7 9", "3 5 7 9 11", "3 5 7 9 11 13"]


def sizes_of(text: str) -> tuple[int, ...]:
    return tuple(int(k) for k in text.split())


def meta(version: str, text: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return MAKERS[version](sizes_of(text), **options)


def millions(version: str, text: str, **options: Any) -> float:
    image = torch.empty(1, 3, 224, 224, device="meta")
    costs = count_costs(meta(version, text, **options), image)
    return sum(cost.multiply_adds for cost in costs) / 1e6


@pytest.mark.parametrize(("version", "count"), [("v1", 4_231_976), ("v2", 3_504_872)])
def test_published_parameter_counts(version, count):
    assert count_parameters(meta(version, "3")) == count


@pytest.mark.parametrize(("version", "column"), [("v1", 0), ("v2", 2)])
@pytest.mark.parametrize("family", ["depthwise", "mixconv"])
def test_figure_4_growth(version, column, family):
    points = PAPER["figure_4"][family]
    base = PAPER["figure_4"]["depthwise"]["3"][column]
    plain = millions(version, "3")
    for text, point in points.items():
        growth = millions(version, text) - plain
        assert abs(growth - (point[column] - base)) < 1.5, text


@pytest.mark.parametrize(("version", "column"), [("v1", 0), ("v2", 2)])
def test_figure_6_growth(version, column):
    base = PAPER["figure_4"]["depthwise"]["3"][column]
    plain = millions(version, "3")
    for text, point in zip(EXPONENTIAL, PAPER["figure_6"]["exponential"][version], strict=True):
        growth = millions(version, text, partition="exponential") - plain
        assert abs(growth - (point - base)) < 1.5, text


@pytest.mark.parametrize(("version", "column"), [("v1", 0), ("v2", 3)])
def test_table_1_parameters(version, column):
    table, plain = PAPER["table_1"], count_parameters(meta(version, "3"))
    for text in ("5", "3 5", "7", "3 5 7"):
        growth = (count_parameters(meta(version, text)) - plain) / 1e6
        assert abs(growth - (table[text][column] - table["3"][column])) <= 0.01 + 1e-9, text


@pytest.mark.parametrize("version", MAKERS)
@pytest.mark.parametrize("kernels", [(3,), (3, 5, 7)])
def test_hooks_and_torch_count_alike(version, kernels):
    model = MAKERS[version](kernels, width_multiplier=0.5, num_classes=10).eval()
    x = noise(1, 3, 64, 64)
    counted = sum(cost.multiply_adds for cost in count_costs(model, x))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() == 2 * counted


@pytest.mark.parametrize("rate", [-0.1, 1.0])
@pytest.mark.parametrize("name", ["drop_rate", "drop_path_rate"])
def test_bad_drop_rates(name, rate):
    with pytest.raises(ValueError, match=f"^{name} must be .*{rate}"):
        mobilenet_v2(width_multiplier=0.35, **{name: rate})


@pytest.mark.parametrize(("width", "features"), [(0.35, 1280), (1.0, 1280), (1.4, 1792)])
def test_the_head_of_v2_grows_but_does_not_shrink(width, features):
    with torch.device("meta"):
        assert mobilenet_v2(width_multiplier=width).num_features == features


def test_what_the_networks_are_made_of():
    with torch.device("meta"):
        v1, v2 = mobilenet_v1(), mobilenet_v2(drop_path_rate=0.34)
    for model, wanted, count in ((v1, nn.ReLU, 27), (v2, nn.ReLU6, 35)):
        kinds = [type(m) for m in model.modules() if "ReLU" in type(m).__name__]
        assert kinds == [wanted] * count
    rates = [m.rate for m in v2.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.02 * i for i in range(17)])


@pytest.mark.parametrize("width", [0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("version", MAKERS)
def test_a_bad_width_is_called_by_its_name(version, width):
    with pytest.raises(ValueError, match=f"^width_multiplier.*{width}"):
        MAKERS[version](width_multiplier=width)
