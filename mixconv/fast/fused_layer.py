# Generated from notebooks/12_operation.ipynb by `make book`. Edit the notebook, not this file.

"""A mixed layer, its bias and the activation behind it as one operation (chapter 12)."""

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from mixconv._checks import refuse_script
from mixconv.fast.folding import refuse_training
from mixconv.fast.operation import as_arguments, meet_exporters, run_operation
from mixconv.fast.spec import MixSpec, pack_weights
from mixconv.formulation import LayerCost
from mixconv.surgery import find_padding

__all__ = ["FusedMixConv2d", "FusedModule", "describe_mix", "lie_as"]


def describe_mix(convs: Sequence[nn.Conv2d], activation: str = "none") -> MixSpec | None:
    """Depthwise convolutions side by side as one operation; None where it cannot express them."""
    try:
        paddings = {find_padding(conv) for conv in convs}
    except ValueError:
        return None
    squares = [(*conv.kernel_size, *conv.dilation) for conv in convs]
    strides = {stride for conv in convs for stride in conv.stride}
    depthwise = all(c.groups == c.in_channels == c.out_channels for c in convs)
    crooked = any(k != h or d != e for k, h, d, e in squares)
    mixed_up = len(paddings) != 1 or len(strides) != 1
    if not depthwise or crooked or mixed_up or len({c.bias is None for c in convs}) != 1:
        return None
    channels = tuple(conv.out_channels for conv in convs)
    sizes, dilations = tuple(k for k, *_ in squares), tuple(square[2] for square in squares)
    return MixSpec(channels, sizes, strides.pop(), dilations, paddings.pop(), activation)


class FusedModule(nn.Module):
    """What stands in a fused model: one operation, for inference only.

    Attributes:
        spec: what to compute.
        preserves_format: whether the output lies in memory as the input does. If not, it is in
            channels_last, as the kernels write it.
    """

    spec: Any
    preserves_format = False
    __prepare_scriptable__ = refuse_script

    def compute(self, x: Tensor) -> Tensor:
        """The operation itself, on a batch; a graph of torch.fx gets it as one call."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The operation, on one image or many."""
        meet_exporters()
        if isinstance(x, torch.fx.Proxy):
            y = self.compute(x)
            kept = self.preserves_format
            return x.tracer.create_proxy("call_function", lie_as, (y, x), {}) if kept else y
        if x.dim() == 3:
            return cast("Tensor", self(x[None]))[0]
        return lie_as(self.compute(x), x) if self.preserves_format else self.compute(x)

    def train(self, mode: bool = True) -> Self:
        """Refuse training mode.

        Raises:
            RuntimeError: if `mode` is true.
        """
        refuse_training(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return ",\n".join(f"{name}={value}" for name, value in self.spec._asdict().items())


def lie_as(y: Tensor, x: Tensor) -> Tensor:
    """`y` in channels_last if the channels of `x` lie side by side, else contiguous."""
    last = x.stride(1) == 1
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class FusedMixConv2d(FusedModule):
    """Depthwise convolutions, their bias and the activation behind them as one operation.

    Args:
        convs: the convolutions of the groups.
        spec: what `describe_mix` says of them.

    Shape:
        Input `(N, C, H, W)` or `(C, H, W)`, output as from the layer it replaces.

    Source: ours. Chapter 12.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, convs: Sequence[nn.Conv2d], spec: MixSpec) -> None:
        super().__init__()
        self.spec = spec
        biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
        self.register_buffer("weight", pack_weights([conv.weight.detach() for conv in convs]))
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        super().train(False)

    def compute(self, x: Tensor) -> Tensor:
        """Convolve, add the bias, activate."""
        if isinstance(x, torch.fx.Proxy):
            operation = torch.ops.mixconv.mixed_depthwise2d
            return cast("Tensor", operation(x, self.weight, self.bias, *as_arguments(self.spec)))
        return run_operation(x, self.weight, self.bias, self.spec)

    def layer_costs(self, name: str, x: Tensor, output: Tensor) -> list[LayerCost]:
        """What `count_costs` counts: one depthwise layer."""
        weights, bias = self.weight.numel(), 0 if self.bias is None else self.bias.numel()
        pixels = output.numel() // sum(self.spec.channels)
        shape = tuple(output.shape)
        return [LayerCost(name, "depthwise", shape, weights + bias, pixels * weights)]
