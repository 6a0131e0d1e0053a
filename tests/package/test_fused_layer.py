"""What operation some convolutions are, if they are one, and the layer that is the operation."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixconv import MixConv2d
from mixconv.fast.fused_layer import FusedMixConv2d, describe_mix
from mixconv.fast.spec import ACTIVATIONS, MixSpec, activate
from mixconv.formulation import LayerCost
from mixconv.layer import Conv2dSame
from tests.package.common import noise


def depthwise(channels: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A depthwise convolution that keeps the size, but for what the options say."""
    plain = {"padding": options.get("dilation", 1) * (kernel // 2), "groups": channels}
    return nn.Conv2d(channels, channels, kernel, **(plain | options))


def fuse(layer: MixConv2d, activation: str = "none") -> FusedMixConv2d:
    convs = list(layer.convs)
    spec = describe_mix(convs, activation)  # type: ignore[arg-type]
    assert spec is not None
    return FusedMixConv2d(convs, spec)  # type: ignore[arg-type]


# What they are


def test_convolutions_in_words() -> None:
    convs = [depthwise(4, 3, stride=2), depthwise(6, 5, stride=2), depthwise(2, 3, stride=2)]
    wanted = MixSpec((4, 6, 2), (3, 5, 3), 2, (1, 1, 1), "symmetric", "silu")
    assert describe_mix(convs, "silu") == wanted
    dilated = [depthwise(4, 3, dilation=2), depthwise(4, 3)]
    assert describe_mix(dilated) == MixSpec((4, 4), (3, 3), 1, (2, 1), "symmetric", "none")
    same = [Conv2dSame(4, 4, k, 2, groups=4) for k in (1, 3)]
    assert describe_mix(same) == MixSpec((4, 4), (1, 3), 2, (1, 1), "same", "none")


class Louder(nn.Conv2d):
    """Computes something else than its class's parent."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


ODD: dict[str, Callable[[], list[nn.Conv2d]]] = {
    "not depthwise": lambda: [nn.Conv2d(4, 4, 3, padding=1)],
    "grouped, not depthwise": lambda: [depthwise(groups=2)],
    "a channel multiplier": lambda: [nn.Conv2d(4, 8, 3, padding=1, groups=4)],
    "an even kernel": lambda: [depthwise(kernel=4)],
    "an even kernel, padded as TensorFlow does": lambda: [Conv2dSame(4, 4, 4, groups=4)],
    "a kernel that is not square": lambda: [nn.Conv2d(4, 4, (3, 5), 1, (1, 2), groups=4)],
    "two strides in one": lambda: [depthwise(stride=(1, 2))],
    "strides of two kinds": lambda: [depthwise(), depthwise(stride=2)],
    "two dilations in one": lambda: [depthwise(dilation=(1, 2), padding=(1, 2))],
    "no padding": lambda: [depthwise(padding=0)],
    "too much padding": lambda: [depthwise(padding=2)],
    "zeros that are not zeros": lambda: [depthwise(padding_mode="reflect")],
    "paddings of two kinds": lambda: [depthwise(), Conv2dSame(4, 4, 3, groups=4)],
    "a bias here and none there": lambda: [depthwise(), depthwise(bias=False)],
    "a subclass": lambda: [Louder(4, 4, 3, padding=1, groups=4)],
}


@pytest.mark.parametrize("name", list(ODD))
def test_what_the_operation_cannot_express(name: str) -> None:
    assert describe_mix([depthwise()]) is not None
    assert describe_mix(ODD[name]()) is None


# The layer


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_layer_does(activation: str, bias: bool) -> None:
    same: dict[str, Any] = {"kernel_sizes": (1, 3, 5), "stride": 2, "padding": "same"}
    for options in ({"kernel_sizes": (1, 3, 5)}, same, {"kernel_sizes": (3, 5), "dilated": True}):
        layer = MixConv2d(20, bias=bias, **options)
        fused, x = fuse(layer, activation), noise(2, 20, 9, 10)
        with torch.no_grad():
            wanted = activate(layer(x), activation)
            torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fused(x[0]), wanted[0], rtol=1e-4, atol=1e-4)


def test_it_holds_the_weights_and_nothing_to_train() -> None:
    layer = MixConv2d(8, (3, 5), bias=True)
    fused = fuse(layer)
    assert list(fused.parameters()) == []
    assert [name for name, _ in fused.named_buffers()] == ["weight", "bias"]
    before = fused.weight.clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(fused.weight, before)  # a copy, not a view
    assert not any(buffer.requires_grad for buffer in fused.buffers())
    assert fuse(MixConv2d(8, (3, 5))).bias is None


@pytest.mark.parametrize(("bias", "parameters"), [(False, 4 * 9 + 4 * 25), (True, 4 * 34 + 8)])
def test_its_costs_are_the_layers(bias: bool, parameters: int) -> None:
    fused, x = fuse(MixConv2d(8, (3, 5), bias=bias)), noise(2, 8, 6, 6)
    with torch.no_grad():
        (cost,) = fused.layer_costs("mixed", x, fused(x))
    assert cost == LayerCost("mixed", "depthwise", (2, 8, 6, 6), parameters, 2 * 36 * 4 * 34)


def test_it_moves_and_copies_as_modules_do() -> None:
    fused, x = fuse(MixConv2d(8, (3, 5), bias=True)), noise(1, 8, 6, 6)
    wanted = fused(x)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(again(x), wanted)
    doubled = copy.deepcopy(fused).double()
    torch.testing.assert_close(doubled(x.double()).float(), wanted)
    other = fuse(MixConv2d(8, (3, 5), bias=True))
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), wanted)


def test_it_does_not_train_and_says_what_it_is() -> None:
    fused = fuse(MixConv2d(8, (3, 5)), "relu")
    assert not fused.training
    assert fused.eval() is fused
    with pytest.raises(RuntimeError, match="fuse it again"):
        fused.train()
    assert not fused.training
    assert "kernel_sizes=(3, 5)" in repr(fused)
    assert "activation=relu" in repr(fused)
