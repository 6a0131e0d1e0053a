"""What layers and blocks consist of: exact types, values, and rules of one's own."""

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixconv.fast.describe as describe
from mixconv import DepthwiseSeparableBlock, MixConv2d, MixConvBlock
from mixconv.fast.describe import (
    BlockParts,
    activation_name,
    ask,
    describe_block,
    describe_layer,
    read_block,
    read_unit,
)
from tests.package.common import noise, randomize


def named(name: str, base: type[nn.Module], **members: Any) -> Any:
    """A class that has the name of another."""
    return type(name, (base,), members)


# Names are not trusted


@pytest.mark.parametrize("base", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid])
def test_an_activation_is_known_by_its_class(base: type[nn.Module]) -> None:
    assert activation_name(base()) in ("relu", "relu6", "silu", "sigmoid")
    assert activation_name(named(base.__name__, base)()) == ""
    assert activation_name(named("Swish", nn.Module)()) == ""
    assert activation_name(torch.sigmoid) == ""  # only what a rule hands in


@pytest.mark.parametrize(
    "layer",
    [named("Conv2d", nn.Conv2d)(4, 4, 3), named("Conv2dSame", nn.Conv2d)(4, 4, 3),
     named("MixConv2d", MixConv2d)(4, (3, 5)), named("MixedConv2d", nn.ModuleDict)()],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_a_layer_is_known_by_its_class(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(layer).__name__} is not a class that is known"):
        ask(describe_layer, layer)


def test_peers_are_not_imported_and_a_module_of_their_name_is_no_peer() -> None:
    before = set(sys.modules)
    describe.register_peers()
    assert not {name for name in set(sys.modules) - before if "timm" in name}
    assert describe.loaded("no_such_library.part.Class") is None


def test_a_peer_is_registered_once_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("timm.layers.mixed_conv2d")
    module.MixedConv2d = named("MixedConv2d", nn.ModuleDict)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    describe.register_peers()
    layer = module.MixedConv2d({"0": nn.Conv2d(4, 4, 3), "1": nn.Conv2d(4, 4, 5)})
    assert ask(describe_layer, layer) == list(layer.values())


# Units


def test_a_unit_is_folded_in_a_copy() -> None:
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    last = nn.Tanh()
    row = randomize(nn.Sequential(conv, norm, nn.Dropout(), nn.SiLU(), last)).eval()
    weight = conv.weight.clone()
    unit = read_unit([row])
    assert torch.equal(conv.weight, weight)
    assert (unit.activation, unit.rest) == ("silu", [last])
    x = noise(2, 3, 6, 7)
    with torch.no_grad():
        torch.testing.assert_close(unit.layer(x), norm(conv(x)))


BAD_NORMS: dict[str, Callable[[], nn.Module]] = {
    "in training mode": lambda: nn.BatchNorm2d(4),
    "other channels": lambda: nn.BatchNorm2d(8).eval(),
    "running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(),
}


@pytest.mark.parametrize("message", list(BAD_NORMS))
def test_a_norm_that_cannot_be_folded(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_unit([nn.Conv2d(3, 4, 1).eval(), BAD_NORMS[message]()])


def test_a_weight_of_another_class_is_not_folded() -> None:
    class Wrapped(nn.Parameter):
        pass

    conv = nn.Conv2d(3, 4, 1)
    conv.weight = Wrapped(conv.weight.detach())
    with pytest.raises(ValueError, match="Conv2d with a Wrapped"):
        read_unit([conv, nn.BatchNorm2d(4).eval()])


def test_a_layer_with_a_convolution_of_another_class() -> None:
    layer = MixConv2d(4, (3, 5)).eval()
    layer.convs[0] = named("Louder", nn.Conv2d)(2, 2, 3, padding=1, groups=2)
    with pytest.raises(ValueError, match="Louder is not a class that is known"):
        read_unit([layer])


def test_a_norm_of_another_class_is_left_in_the_row() -> None:
    norm = named("BatchNorm2d", nn.BatchNorm2d)(4).eval()
    assert read_unit([nn.Conv2d(3, 4, 1), norm]).rest == [norm]


# Blocks


def test_our_blocks_are_read() -> None:
    block = MixConvBlock(8, 8, (3, 5), squeeze_ratio=0.5, activation="swish", drop_path_rate=0.1)
    units, residual = read_block(block.eval())
    activations = [unit.activation if unit else None for unit in units]
    assert activations == ["silu", "silu", "silu", "sigmoid", "none"]
    assert residual
    units, residual = read_block(DepthwiseSeparableBlock(8, 8).eval())
    assert [bool(unit) for unit in units] == [False, True, False, False, True]
    assert not residual


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def change(block: MixConvBlock, part: str, new: nn.Module) -> None:
    parent, _, name = part.rpartition(".")
    setattr(block.get_submodule(parent), name, new)


CHANGES: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "an activation": ("expand.activation", named("ReLU", Halves), "ReLU in a place"),
    "a norm": ("project.norm", lambda: nn.InstanceNorm2d(8), "InstanceNorm2d in a place"),
    "a gate": ("squeeze_excite", Halves, "Halves is not a gate"),
    "a drop path": ("drop_path", named("DropPath", Halves), "DropPath in a place"),
    "a drop path in training mode": ("drop_path", lambda: nn.Dropout(0.5).train(), "Dropout in"),
    "something after it": ("project.more", nn.Tanh, "Tanh in a place"),
    "something more": ("more", Halves, "'more', a Halves, is not described"),
    "a subclass of a row": ("expand", named("Row", nn.Sequential), "Row is not a class"),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_a_block_with_a_part_that_is_not_known(what: str) -> None:
    part, make, message = CHANGES[what]
    block = MixConvBlock(8, 8, (3, 5), squeeze_ratio=0.5).eval()
    change(block, part, make() if "training" in what else make().eval())
    with pytest.raises(ValueError, match=message):
        read_block(block)


def test_a_block_with_numbers_of_its_own() -> None:
    block = MixConvBlock(8, 8, (3, 5)).eval()
    block.scale = nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match="is not described"):
        read_block(block)


def hook(kind: str) -> Callable[[nn.Module], Any]:
    return lambda part: getattr(part, f"register_{kind}")(lambda *_: None)


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("part", ["", "expand", "expand.conv", "project.norm", "depthwise.conv"])
def test_hooks_anywhere_in_a_block(kind: str, part: str) -> None:
    block = MixConvBlock(8, 8, (3, 5)).eval()
    hook(kind)(block.get_submodule(part))
    with pytest.raises(ValueError, match="has hooks"):
        read_block(block)


def test_a_subclass_of_a_block_is_not_known() -> None:
    with pytest.raises(ValueError, match="Sub is not a class that is known"):
        read_block(named("Sub", MixConvBlock)(8, 8).eval())


class Own(nn.Module):
    """A block of somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.act, self.last = MixConv2d(8, (3, 5)), nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.last(self.act(self.mix(x)))
        return y


def test_a_rule_of_ones_own() -> None:
    @describe_block.register
    def _(block: Own) -> BlockParts:
        return BlockParts([block.mix, block.act], [block.last], residual=True)

    units, residual = read_block(Own().eval())
    assert [bool(unit) for unit in units] == [False, True, False, False, True]
    assert residual
