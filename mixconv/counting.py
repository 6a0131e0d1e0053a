# Generated from notebooks/05_mobilenets.ipynb by `make book`. Edit the notebook, not this file.

"""What the paper's "FLOPS" count: a rule that gives every MobileNet it plots (chapter 5)."""

from math import ceil

import torch
from torch import Tensor, nn

from mixconv.blocks import MixConvBlock, SqueezeExcite
from mixconv.formulation import LayerCost, count_costs, evaluating
from mixconv.network import ConvNet

__all__ = ["elementwise_operations", "padded_multiply_adds", "paper_flops"]


def elementwise_operations(model: ConvNet, x: Tensor) -> int:
    """Residual sums, a gate's means and products, the pool, biases: one operation an element."""
    total = 0

    def count(layer: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal total
        gate = 2 * isinstance(layer, SqueezeExcite)
        sum_ = isinstance(layer, MixConvBlock) and layer.has_residual
        bias = isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None
        total += (gate + sum_ + bias + (layer is model.head)) * output.numel()

    hooks = [layer.register_forward_hook(count) for layer in model.modules()]
    with torch.no_grad(), evaluating(model):
        model(x)
    for hook in hooks:
        hook.remove()
    return total


def padded_multiply_adds(cost: LayerCost, dilation: int) -> int:
    """Multiply-adds of a layer of stride 1, with the padding that dilation brings in TensorFlow."""
    size = cost.output_shape[-1]
    padded = dilation * ceil(size / dilation)
    return cost.multiply_adds * padded**2 // size**2


def paper_flops(model: ConvNet, decays: int, size: int = 224) -> float:
    """The "FLOPS" that the paper would print for a network, as we found it to count them.

    Args:
        model: on the meta device nothing is computed.
        decays: how often the weight decay stands in the graph: 1 for the paper's MobileNets.
        size: height and width of the image.

    Source: ours. TensorFlow's profiler, halved, run on TF-slim's MobileNets and the official
    MixNets; published nowhere.
    """
    x = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    work, initialised, decayed = 0, 0, 0
    for cost in count_costs(model, x):
        layer = model.get_submodule(cost.name)
        dilation = layer.dilation[0] if isinstance(layer, nn.Conv2d) else 1
        work += padded_multiply_adds(cost, dilation)
        weights = layer.get_parameter("weight").numel()
        initialised += weights
        decayed += weights if cost.kind != "depthwise" else 0
    return work + elementwise_operations(model, x) / 2 + initialised + 1.5 * decays * decayed
