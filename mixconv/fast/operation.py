# Generated from notebooks/12_operation.ipynb by `make book`. Edit the notebook, not this file.

"""MixConv as one operation: how it is called, and which form computes it (chapter 12).

`FORMS` holds the faster ways to compute chapter 11's `split_form`; later chapters add them. PyTorch
knows the operation as `mixconv::mixed_depthwise2d`.
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mixconv.fast.forms import Call, Forms, Runner, must_dispatch, needs_steps
from mixconv.fast.spec import MixSpec, check_spec, split_form

__all__ = [
    "FORMS",
    "as_arguments",
    "check_call",
    "describe_call",
    "meet_exporters",
    "mixed_depthwise2d",
    "run_operation",
]


def _prepare_split(call: Call) -> Runner:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = split_form(x, weight, bias, call.spec)
        return y.contiguous(memory_format=torch.channels_last)

    return run


def check_call(call: Call) -> None:
    """Raise a ValueError unless the sizes of the tensors fit the operation."""
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
    given, cpu, dtype = (weight,) if bias is None else (weight, bias), x.is_cpu, x.dtype
    for tensor in given:
        near = tensor.is_cpu if cpu else tensor.device == x.device  # the first is faster to ask
        if not near or tensor.dtype != dtype:
            raise ValueError(
                f"weight and bias must have the dtype and device of x, {x.dtype} on {x.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    parameters = (weight.shape,) if bias is None else (weight.shape, bias.shape)
    device, threads = "cpu" if cpu else x.device.type, torch.get_num_threads()
    return Call(spec, x.shape, dtype, device, bias is not None, threads, parameters)


def meet_exporters() -> None:
    """Raise for ONNX, and warn for a trace, with which OpenVINO for one begins.

    Raises:
        RuntimeError: saying what to export.
    """
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "ONNX does not know mixconv's operations: "
            'export fuse_for_inference(model, backend="merged")'
        )
    if torch._C._get_tracing_state() is not None:
        warnings.warn(
            "this trace calls mixconv's operations, which other programs, such as OpenVINO, do "
            'not know: for them, fuse with backend="merged"', stacklevel=4,
        )  # fmt: skip


def as_arguments(spec: MixSpec) -> list[Any]:
    """The spec's entries as PyTorch's dispatcher takes them, with lists for tuples."""
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]


def run_operation(x: Tensor, weight: Tensor, bias: Tensor | None, spec: MixSpec) -> Tensor:
    """The operation by the shortest way that everybody who watches allows."""
    if not must_dispatch(x, weight, bias):
        return FORMS.choose(describe_call(x, weight, bias, spec))(x, weight, bias)
    if needs_steps():
        check_call(describe_call(x, weight, bias, spec))
        return split_form(x, weight, bias, spec)
    operation = torch.ops.mixconv.mixed_depthwise2d
    return cast("Tensor", operation(x, weight, bias, *as_arguments(spec)))


def mixed_depthwise2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, channels: Sequence[int],
    kernel_sizes: Sequence[int], stride: int = 1, dilations: Sequence[int] | None = None,
    padding: str = "symmetric", activation: str = "none",
) -> Tensor:  # fmt: skip
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

    Source: ours; the paper (section 3.1) says that MixConv "could be implemented as a single op".
    Chapter 12.
    """
    steps = (1,) * len(kernel_sizes) if dilations is None else tuple(dilations)
    spec = MixSpec(tuple(channels), tuple(kernel_sizes), stride, steps, padding, activation)
    return run_operation(x, weight, bias, spec)
