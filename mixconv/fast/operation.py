# Generated from notebooks/12_operation.ipynb by `make book`. Edit the notebook, not this file.

"""MixConv as one operation: what it computes, and who may compute it (chapter 12).

`split_form` is the meaning. `FORMS` holds the faster ways, which later chapters add. PyTorch knows
the operation as `mixconv::mixed_depthwise2d`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mixconv.fast.forms import Call, Forms, Runner, must_dispatch, needs_steps
from mixconv.layer import PADDINGS, same_padding

__all__ = [
    "ACTIVATIONS",
    "FORMS",
    "MixSpec",
    "Pad",
    "activate",
    "as_arguments",
    "check_call",
    "check_spec",
    "describe_call",
    "mixed_depthwise2d",
    "output_size",
    "pack_weights",
    "pads",
    "run_operation",
    "split_form",
    "unpack_weights",
]


ACTIVATIONS = ("none", "relu", "silu", "relu6")


class MixSpec(NamedTuple):
    """What the operation computes: an entry for each group, and what the groups share.

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
    """The zeros that each group of the operation needs on an image of this size."""
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
    """The operation as a convolution for each group, concatenated: the reference.

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


def _prepare_split(call: Call) -> Runner:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = split_form(x, weight, bias, call.spec)
        return y.contiguous(memory_format=torch.channels_last)

    return run


def check_call(call: Call) -> None:
    """Raise unless the sizes of the tensors fit the operation.

    Raises:
        ValueError: naming the tensor, its size and what it must be.
    """
    count, packed = check_spec(call.spec)
    if len(call.sizes) != 4 or call.sizes[1] != count:
        raise ValueError(f"x must be (N, {count}, H, W), got {tuple(call.sizes)}")
    weight, *bias = map(tuple, call.parameters)
    if weight != (packed,):
        raise ValueError(f"weight must hold {packed} packed numbers, got {weight}")
    if bias and bias[0] != (count,):
        raise ValueError(f"bias must be ({count},), got {bias[0]}")


FORMS = Forms("mixed_depthwise2d", _prepare_split, check_call)


def describe_call(x: Tensor, weight: Tensor, bias: Tensor | None, spec: MixSpec) -> Call:
    """The call that these tensors make.

    Raises:
        ValueError: if they differ in dtype or device. (Sizes are the business of `check_call`.)
    """
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(_disagreement("weight", weight, x))
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(_disagreement("bias", bias, x))
    parameters = (weight.shape,) if bias is None else (weight.shape, bias.shape)
    device = "cpu" if x.is_cpu else x.device.type  # the first is faster to ask
    threads = torch.get_num_threads()
    return Call(spec, x.shape, x.dtype, device, bias is not None, threads, parameters)


def _disagreement(name: str, tensor: Tensor, x: Tensor) -> str:
    return (
        f"{name} must have the dtype and device of x, {x.dtype} on {x.device}, "
        f"got {tensor.dtype} on {tensor.device}"
    )


def as_arguments(spec: MixSpec) -> list[Any]:
    """The spec's entries as PyTorch's dispatcher takes them, with lists for tuples."""
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]


def run_operation(x: Tensor, weight: Tensor, bias: Tensor | None, spec: MixSpec) -> Tensor:
    """The operation by the shortest way that everybody who watches allows.

    Raises:
        ValueError: for tensors that do not fit together.
    """
    if not must_dispatch(x, weight, bias):
        return FORMS.choose(describe_call(x, weight, bias, spec))(x, weight, bias)
    if needs_steps():
        check_call(describe_call(x, weight, bias, spec))
        return split_form(x, weight, bias, spec)
    operation = torch.ops.mixconv.mixed_depthwise2d
    return cast("Tensor", operation(x, weight, bias, *as_arguments(spec)))


def mixed_depthwise2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    channels: Sequence[int],
    kernel_sizes: Sequence[int],
    stride: int = 1,
    dilations: Sequence[int] | None = None,
    padding: str = "symmetric",
    activation: str = "none",
) -> Tensor:
    """Mixed depthwise convolution, bias and activation in one operation.

    Args:
        x: best in channels_last; anything else is copied to it first.
        weight: packed by `pack_weights`. Pack once for inference; in every forward for training.
        bias: one number for each channel.
        channels: of each group; they add up to C.
        kernel_sizes: odd, one a group.
        stride: of rows and columns.
        dilations: one a group; 1 if left out.
        padding: "symmetric" or "same".
        activation: "none", "relu", "silu" or "relu6".

    Shape:
        Input `(N, C, H, W)`, output `(N, C, ceil(H / stride), ceil(W / stride))`, channels_last.

    Raises:
        ValueError: for sizes, dtypes or names that do not fit together.

    Source: ours; the paper (section 3) says that MixConv "could be implemented as a single op".
    Chapter 12.
    """
    steps = (1,) * len(kernel_sizes) if dilations is None else tuple(dilations)
    spec = MixSpec(tuple(channels), tuple(kernel_sizes), stride, steps, padding, activation)
    return run_operation(x, weight, bias, spec)
