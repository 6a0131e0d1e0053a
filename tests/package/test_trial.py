"""The trial of a rewrite: what it finds, and that it leaves everything as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixconv.fast.describe import describe_layer
from mixconv.fast.fuse import fuse_for_inference
from mixconv.fast.trial import CannotTryError, difference, make_image, piece_difference, twin
from mixconv.layer import MixConv2d
from tests.package.common import noise


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Any:
        functions: dict[str, Callable[[], Any]] = {
            "double": lambda: 2 * x,
            "nearly": lambda: x * (2 + 1e-5),
            "off": lambda: x * 2.01,
            "one number": lambda: torch.where(x == x.max(), 0, 2 * x),
            "not a number": lambda: torch.where(x == x.max(), torch.nan, 2 * x),
            "infinite": lambda: torch.where(x == x.max(), torch.inf, 2 * x),
            "random": lambda: x + torch.rand_like(x),
            "in place": lambda: x.mul_(2),
            "pair": lambda: (2 * x, {"more": [x]}),
            "pair, off": lambda: (2 * x, {"more": [x + 1]}),
            "long": lambda: torch.cat([2 * x, x]),
            "fails": lambda: x.view(-1, 7, 7, 7, 7),
        }
        return functions[self.name]()


def compare(before: str, after: str) -> str:
    return difference(Apply(before), Apply(after), make_image(3, 4, 5))


@pytest.mark.parametrize(
    ("before", "after"),
    [("double", "double"), ("double", "nearly"), ("in place", "in place"), ("pair", "pair")],
)
def test_the_same(before: str, after: str) -> None:
    assert compare(before, after) == ""


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("double", "off", "off by up to"),
        ("double", "one number", "off by up to"),
        ("double", "not a number", "off by up to nan"),
        ("double", "infinite", "off by up to inf"),
        ("double", "in place", "off by up to"),
        ("in place", "double", "off by up to"),
        ("random", "random", "off by up to"),
        ("pair", "pair, off", "off by up to"),
        ("double", "pair", "other shapes"),
        ("double", "long", "other shapes"),
        ("double", "fails", "tried, and failed: shape"),
    ],
)
def test_not_the_same(before: str, after: str, reason: str) -> None:
    assert reason in compare(before, after)


@pytest.mark.parametrize("before", ["fails", "not a number", "infinite"])
def test_nothing_to_compare_with(before: str) -> None:
    with pytest.raises(CannotTryError, match=r"random image"):
        compare(before, "double")


def test_the_same_random_numbers_on_request() -> None:
    image = make_image(3, 4, 5)
    assert difference(Apply("random"), Apply("random"), image, random=True) == ""


def test_a_tolerance_for_what_weights_can_hold() -> None:
    exact, rounded = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3).half()
    exact.load_state_dict(rounded.state_dict())
    rounded.weight.data *= 1 + 4e-3
    image = make_image(3, 6, 6)
    assert difference(exact, rounded, image) == ""
    assert "off by" in difference(rounded, exact, image), "what is not rounded is not excused"
    assert "off by" in difference(exact, rounded.float(), image)


def test_a_twin_shares_parameters_only() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    module.register_forward_hook(lambda *_: 1 / 0)
    copied = twin(module)
    assert all(a is b for a, b in zip(module.parameters(), copied.parameters(), strict=True))
    assert not any(a is b for a, b in zip(module.buffers(), copied.buffers(), strict=True))
    copied(noise(1, 3, 4, 4))
    with pytest.raises(ZeroDivisionError):
        module(noise(1, 3, 4, 4))


@pytest.mark.parametrize(("bend", "seen"), [(0.5, True), (6.0, True), (40.0, True), (1e3, False)])
def test_pieces_are_tried_on_a_louder_image(bend: float, seen: bool) -> None:
    image = make_image(8, 16, 16)
    found = piece_difference(nn.ReLU(), nn.Hardtanh(0, bend), image)
    assert bool(found) == seen
    assert piece_difference(nn.ReLU(), nn.ReLU(), image) == ""
    assert (difference(nn.ReLU(), nn.Hardtanh(0, bend), image) == "") == (bend > 1)


def test_a_rule_that_forgets_a_clamp_is_found_out() -> None:
    class Clamped(MixConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clamp(max=6)

    describe_layer.register(Clamped, lambda layer: list(layer.convs))
    fused: Any = fuse_for_inference(nn.Sequential(Clamped(8, (3, 5))), backend="kernel")
    report = fused.fusion_report
    assert not report.fused
    assert "not the same" in report.left[0].reason
