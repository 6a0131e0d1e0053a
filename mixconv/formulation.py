# Generated from notebooks/01_formulation.ipynb by `make book`. Edit the notebook, not this file.

"""MixConv as its equations say it, and what it costs (paper, section 3.1; chapter 1).

Slow on purpose: the loops are the definition, and what chapter 3's layer is compared with.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "LayerCost",
    "count_costs",
    "count_parameters",
    "depthwise_loops",
    "depthwise_reference",
    "evaluating",
    "layer_cost",
    "mixconv_loops",
    "mixconv_multiply_adds",
    "mixconv_parameters",
    "mixconv_reference",
    "receptive_field",
]


def depthwise_loops(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution, one multiplication at a time.

    Args:
        x: one image.
        weight: kernels of odd size k; output channel z reads input channel z // m.

    Shape:
        x `(C, H, W)`, weight `(m·C, 1, k, k)`, output `(m·C, H, W)`.

    Source: paper, section 3.1.
    """
    (channels, height, width), (outputs, _, k, _) = x.shape, weight.shape
    multiplier, reach = outputs // channels, k // 2
    y = x.new_zeros(outputs, height, width)
    for z in range(outputs):
        for row in range(height):
            for column in range(width):
                for i in range(-reach, reach + 1):
                    for j in range(-reach, reach + 1):
                        if 0 <= row + i < height and 0 <= column + j < width:
                            pixel = x[z // multiplier, row + i, column + j]
                            y[z, row, column] += pixel * weight[z, 0, i + reach, j + reach]
    return y


def mixconv_loops(x: Tensor, weights: Sequence[Tensor], channel_multiplier: int = 1) -> Tensor:
    """MixConv, one multiplication at a time: split, convolve each group, concatenate.

    Args:
        x: one image.
        weights: one tensor of kernels for each group, in channel order.
        channel_multiplier: outputs for each input channel (m in the paper).

    Shape:
        x `(C, H, W)`, weights[t] `(m·c_t, 1, k_t, k_t)`, output `(m·C, H, W)`.

    Source: paper, section 3.1.
    """
    partition = [weight.shape[0] // channel_multiplier for weight in weights]
    groups = x.split(partition)
    outputs = [depthwise_loops(*pair) for pair in zip(groups, weights, strict=True)]
    return torch.cat(outputs)


def depthwise_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution as a sum of k² shifted images.

    Shape:
        x `(N, C, H, W)`, weight `(m·C, 1, k, k)` with odd k, output `(N, m·C, H, W)`.
    """
    height, width, k = x.shape[2], x.shape[3], weight.shape[2]
    repeated = x.repeat_interleave(weight.shape[0] // x.shape[1], dim=1)
    padded = F.pad(repeated, [k // 2] * 4)
    y = torch.zeros_like(repeated)
    for i in range(k):
        for j in range(k):
            shifted = padded[:, :, i : i + height, j : j + width]
            y = y + shifted * weight[:, 0, i, j].view(-1, 1, 1)
    return y


def mixconv_reference(x: Tensor, weights: Sequence[Tensor], channel_multiplier: int = 1) -> Tensor:
    """MixConv from shifted images: equal to the loops, fast enough to compare large layers with.

    Shape:
        x `(N, C, H, W)`, weights[t] `(m·c_t, 1, k_t, k_t)`, output `(N, m·C, H, W)`.
    """
    partition = [weight.shape[0] // channel_multiplier for weight in weights]
    groups = x.split(partition, dim=1)
    return torch.cat([depthwise_reference(*pair) for pair in zip(groups, weights, strict=True)], 1)


def receptive_field(
    kernel_sizes: Sequence[int],
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
) -> int:
    """Side, in input pixels, of the window one output of a stack of layers can see.

    Args:
        kernel_sizes: one for each layer, first layer first.
        strides: one for each layer; all 1 if left out.
        dilations: one for each layer; all 1 if left out.

    Raises:
        TypeError: for what is no list of integers. A model is asked by
            `theoretical_receptive_field`.
        ValueError: if the lists have different lengths, or a number is below 1.
    """
    _check_stack(kernel_sizes=kernel_sizes, strides=strides or [], dilations=dilations or [])
    strides = strides or [1] * len(kernel_sizes)
    dilations = dilations or [1] * len(kernel_sizes)
    field, step = 1, 1
    for k, stride, dilation in zip(kernel_sizes, strides, dilations, strict=True):
        field += (k - 1) * dilation * step
        step *= stride
    return field


def _check_stack(**lists: Sequence[int]) -> None:
    """Raise TypeError or ValueError, naming the list, unless all are of integers from 1 on."""
    for name, values in lists.items():
        if isinstance(values, nn.Module):
            raise TypeError(
                f"{name} must be a list, one for each layer, got a {type(values).__name__}; "
                "a model is asked by theoretical_receptive_field(model, layer)"
            )
        if not isinstance(values, Sequence) or not all(isinstance(v, Integral) for v in values):
            raise TypeError(f"{name} must be a list of integers, got {values!r}")
        if min([1, *values]) < 1:
            raise ValueError(f"{name} must be at least 1, got {values!r}")


def mixconv_parameters(
    partition: Sequence[int], kernel_sizes: Sequence[int], channel_multiplier: int = 1
) -> int:
    """Weights of a MixConv layer without bias.

    Args:
        partition: channels of each group.
        kernel_sizes: kernel size of each group.
        channel_multiplier: outputs for each input channel.
    """
    pairs = zip(partition, kernel_sizes, strict=True)
    return channel_multiplier * sum(c * k * k for c, k in pairs)


def mixconv_multiply_adds(
    partition: Sequence[int],
    kernel_sizes: Sequence[int],
    height: int,
    width: int,
    channel_multiplier: int = 1,
) -> int:
    """Multiply-adds of a MixConv layer for one image.

    Args:
        partition: channels of each group.
        kernel_sizes: kernel size of each group.
        height: rows of the output.
        width: columns of the output.
        channel_multiplier: outputs for each input channel.
    """
    return height * width * mixconv_parameters(partition, kernel_sizes, channel_multiplier)


@dataclass(frozen=True)
class LayerCost:
    """What one layer of a network cost for one input.

    Attributes:
        name: its name in the model, as in `model.named_modules()`.
        kind: "depthwise", "pointwise", "convolution" or "linear".
        output_shape: shape of its output, batch first.
        parameters: weights and biases.
        multiply_adds: for the whole batch; biases are not counted.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def count_parameters(model: nn.Module) -> int:
    """How many numbers a model learns: weights, biases, scales and shifts of normalisations."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_cost(name: str, layer: nn.Conv2d | nn.Linear, output: Tensor) -> LayerCost:
    """The cost of one layer, from its weights and the output it gave.

    Every output value of a convolution is a sum over one kernel: `weight[0].numel()` terms.
    """
    if isinstance(layer, nn.Linear):
        kind = "linear"
    elif layer.groups == layer.in_channels > 1:
        kind = "depthwise"
    else:
        kind = "pointwise" if layer.kernel_size == (1, 1) else "convolution"
    multiply_adds = output.numel() * layer.weight[0].numel()
    return LayerCost(name, kind, tuple(output.shape), count_parameters(layer), multiply_adds)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in evaluation mode; each layer's mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _costs_of(name: str, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> list[LayerCost]:
    """Of one layer, or of the layers whose work it does."""
    if hasattr(layer, "layer_costs"):
        return list(layer.layer_costs(name, *inputs, output))
    return [layer_cost(name, layer, output)]


def count_costs(model: nn.Module, *inputs: Tensor) -> list[LayerCost]:
    """Run a model once and report the cost of each convolution and linear layer, in order.

    A module that does the work of several says so in a method `layer_costs(name, x, output)`.
    Works on the meta device too, where nothing is computed. The model is run in evaluation
    mode without gradients and is left as it was.

    Args:
        model: any module.
        inputs: its arguments.
    """
    costs: list[LayerCost] = []

    def note(name: str, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        costs.extend(_costs_of(name, layer, inputs, output))

    hooks = [
        layer.register_forward_hook(partial(note, name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) or hasattr(layer, "layer_costs")
    ]
    try:
        with torch.no_grad(), evaluating(model):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return costs
