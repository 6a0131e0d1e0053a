# Generated from notebooks/11_why_slow.ipynb by `make book`. Edit the notebook, not this file.

"""A mixed layer, its bias and activation as one task; `split_form` is its meaning (chapter 11)."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixconv.layer import PADDINGS, same_padding

__all__ = [
    "ACTIVATIONS",
    "MixSpec",
    "Pad",
    "activate",
    "check_spec",
    "output_size",
    "pack_weights",
    "pads",
    "split_form",
    "unpack_weights",
]


ACTIVATIONS = ("none", "relu", "silu", "relu6")


class MixSpec(NamedTuple):
    """A mixed layer, its bias and activation: an entry for each group, and what the groups share.

    Attributes:
        channels: of each group.
        kernel_sizes: odd, one a group.
        stride: of rows and columns.
        dilations: one a group.
        padding: "symmetric" or "same".
        activation: "none", "relu", "silu" or "relu6".
    """

    channels: tuple[int, ...]
    kernel_sizes: tuple[int, ...]
    stride: int
    dilations: tuple[int, ...]
    padding: str
    activation: str


class Pad(NamedTuple):
    """Zeros around one group's input, in pixels; `reach` is what its kernel spans."""

    top: int
    bottom: int
    left: int
    right: int
    reach: int


def pads(spec: MixSpec, height: int, width: int) -> list[Pad]:
    """The zeros that each group needs on an image of this size."""
    result = []
    for k, dilation in zip(spec.kernel_sizes, spec.dilations, strict=True):
        half = dilation * (k // 2)
        rows = columns = (half, half)
        if spec.padding == "same":
            rows = same_padding(height, k, spec.stride, dilation)
            columns = same_padding(width, k, spec.stride, dilation)
        result.append(Pad(*rows, *columns, 2 * half + 1))
    return result


def output_size(size: int, stride: int) -> int:
    """Rows or columns of the output: the same for both paddings and every odd kernel."""
    return (size + stride - 1) // stride


def pack_weights(weights: Sequence[Tensor]) -> Tensor:
    """One flat tensor from the groups' kernels; gradients flow through.

    Shape:
        weights `(c, 1, k, k)` each, output one axis: `(k, k, c)` of each group in turn.
    """
    return torch.cat([weight.squeeze(1).permute(1, 2, 0).reshape(-1) for weight in weights])


def unpack_weights(weight: Tensor, spec: MixSpec) -> list[Tensor]:
    """The groups' kernels from `pack_weights`'s flat tensor.

    Shape:
        weight as `pack_weights` gives it, outputs `(c, 1, k, k)`.
    """
    shapes = list(zip(spec.kernel_sizes, spec.kernel_sizes, spec.channels, strict=True))
    parts = torch.split(weight, [a * b * c for a, b, c in shapes])
    return [
        part.view(shape).permute(2, 0, 1).unsqueeze(1)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation by its name in `ACTIVATIONS`, or "sigmoid"."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu, "silu": F.silu, "relu6": F.relu6, "sigmoid": torch.sigmoid,
    }  # fmt: skip
    return functions[activation](x) if activation != "none" else x


def split_form(x: Tensor, weight: Tensor, bias: Tensor | None, spec: MixSpec) -> Tensor:
    """The task as a convolution for each group, concatenated: the reference.

    Shape:
        Input `(N, C, H, W)`, output `(N, C, ceil(H / stride), ceil(W / stride))`.
    """
    outputs = []
    kernels, around = unpack_weights(weight, spec), pads(spec, x.shape[2], x.shape[3])
    groups = zip(x.split(spec.channels, 1), kernels, around, spec.dilations, strict=True)
    for part, kernel, pad, dilation in groups:
        padded = F.pad(part, (pad.left, pad.right, pad.top, pad.bottom))
        count = kernel.shape[0]
        outputs.append(F.conv2d(padded, kernel, None, spec.stride, 0, dilation, count))
    y = torch.cat(outputs, 1)
    return activate(y if bias is None else y + bias.view(-1, 1, 1), spec.activation)


@functools.lru_cache(maxsize=1024)
def check_spec(spec: MixSpec) -> tuple[int, int]:
    """How many channels and packed weights the operation has.

    Raises:
        ValueError: naming the entries that are wrong.
    """
    channels, sizes, stride, dilations, padding, activation = spec
    if not len(channels) == len(sizes) == len(dilations) > 0:
        raise ValueError("channels, kernel_sizes and dilations need an entry for each group")
    if min(channels) < 1 or any(k < 1 or k % 2 == 0 for k in sizes):
        raise ValueError(f"groups need channels and odd kernels, got {channels} and {sizes}")
    if stride < 1 or min(dilations) < 1:
        raise ValueError(f"stride and dilations must be positive, got {stride} and {dilations}")
    if padding not in PADDINGS or activation not in ACTIVATIONS:
        raise ValueError(
            f"padding must be one of {PADDINGS} and activation one of {ACTIVATIONS}, "
            f"got {padding!r} and {activation!r}"
        )
    return sum(channels), sum(c * k * k for c, k in zip(channels, sizes, strict=True))
