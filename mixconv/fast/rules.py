# Generated from notebooks/12_operation.ipynb by `make book`. Edit the notebook, not this file.

"""How PyTorch knows the operation: its shapes, gradient, `vmap` and autocast (chapter 12)."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, shape_wrapper

from mixconv.fast.forms import check_memory, is_plain
from mixconv.fast.operation import FORMS, as_arguments, check_call, describe_call, meet_exporters
from mixconv.fast.spec import MixSpec, Pad, output_size, pack_weights, pads, unpack_weights


@torch.library.custom_op(
    "mixconv::mixed_depthwise2d", mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[] channels, int[] kernel_sizes, "
    "int stride, int[] dilations, str padding, str activation) -> Tensor",
)  # fmt: skip
def _operation(x: Tensor, weight: Tensor, bias: Tensor | None, *entries: Any) -> Tensor:
    call = describe_call(x, weight, bias, _as_spec(entries))
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if x.is_cpu and not all(map(is_plain, given)):
        check_call(call)
        check_memory(*given)
        return FORMS.fallback(call)(x, weight, bias)  # its steps know what to do with them
    return FORMS.choose(call)(x, weight, bias)


def _as_spec(entries: Sequence[Any]) -> MixSpec:
    """The spec from the operation's arguments, where lists stand for tuples."""
    parts: list[Any] = [tuple(e) if isinstance(e, list | tuple) else e for e in entries]
    return MixSpec(*parts)


@_operation.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *entries: Any) -> Tensor:
    meet_exporters()
    spec = _as_spec(entries)
    check_call(describe_call(x, weight, bias, spec))
    rows, columns = (output_size(size, spec.stride) for size in x.shape[2:])
    size = (*x.shape[:2], rows, columns)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _count_flops(x: list[int], weight: list[int], bias: Any, *entries: Any, **_: Any) -> int:
    spec = _as_spec(entries)
    outputs = x[0] * output_size(x[2], spec.stride) * output_size(x[3], spec.stride)
    return 2 * outputs * weight[0]  # a weight meets every output pixel of its channel once


flop_registry[torch.ops.mixconv.mixed_depthwise2d] = shape_wrapper(_count_flops)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.spec = _as_spec(inputs[3:])


def _before_activation(grad: Tensor, inputs: Sequence[Tensor | None], spec: MixSpec) -> Tensor:
    """The gradient of the sums, from that of the activated result."""
    if spec.activation == "none":
        return grad
    plain = as_arguments(spec._replace(activation="none"))
    sums: Tensor = torch.ops.mixconv.mixed_depthwise2d(*inputs, *plain)
    if spec.activation == "relu":
        return cast("Tensor", torch.ops.aten.threshold_backward(grad, sums, 0))
    if spec.activation == "relu6":
        return cast("Tensor", torch.ops.aten.hardtanh_backward(grad, sums, 0, 6))
    gate = torch.sigmoid(sums)  # SiLU, written out: PyTorch's own has no second derivative
    return grad * gate * (1 + sums * (1 - gate))


def _group_gradients(
    x: Tensor, grad: Tensor, kernel: Tensor, pad: Pad, stride: int, dilation: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of one group's input and kernel, as far as they are wanted."""
    padded = F.pad(x, (pad.left, pad.right, pad.top, pad.bottom))
    x_grad, kernel_grad, _ = torch.ops.aten.convolution_backward(
        grad, padded, kernel, None, [stride] * 2, [0, 0], [dilation] * 2, False, [0, 0],
        kernel.shape[0], [*wanted, False],
    )  # fmt: skip
    if wanted[0]:
        x_grad = x_grad.narrow(2, pad.top, x.shape[2]).narrow(3, pad.left, x.shape[3])
    return x_grad, kernel_grad


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, spec, wanted = ctx.saved_tensors, ctx.spec, ctx.needs_input_grad
    grad = _before_activation(grad, inputs, spec)
    x, weight = inputs[0].split(spec.channels, 1), unpack_weights(inputs[1], spec)
    around = pads(spec, *inputs[0].shape[2:])
    groups = zip(x, grad.split(spec.channels, 1), weight, around, spec.dilations, strict=True)
    pairs = [_group_gradients(*group[:4], spec.stride, group[4], wanted[:2]) for group in groups]
    x_grads, weight_grads = zip(*pairs, strict=True)
    return (
        torch.cat(x_grads, 1) if wanted[0] else None,
        pack_weights(weight_grads) if wanted[1] else None,
        grad.sum((0, 2, 3)) if wanted[2] else None,
        *[None] * len(spec),
    )


_operation.register_autograd(_backward, setup_context=_remember)


def _vmap(
    info: Any, in_dims: Sequence[int | None], x: Tensor, weight: Tensor, bias: Tensor | None,
    *entries: Any,
) -> tuple[Tensor, int]:  # fmt: skip
    """Many operations at once are one with more groups: copies lie side by side as channels."""
    spec, n = _as_spec(entries), info.batch_size
    tensors: list[Tensor | None] = []
    for tensor, axis, at in ((x, in_dims[0], 1), (weight, in_dims[1], 0), (bias, in_dims[2], 0)):
        if tensor is not None:
            whole = tensor.expand(n, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
            tensors.append(whole.movedim(0, at).flatten(at, at + 1))
        else:
            tensors.append(None)
    groups = {name: getattr(spec, name) * n for name in ("channels", "kernel_sizes", "dilations")}
    y = torch.ops.mixconv.mixed_depthwise2d(*tensors, *as_arguments(spec._replace(**groups)))
    return y.unflatten(1, (n, -1)), 1


_operation.register_vmap(_vmap)


def _under_autocast(device: str) -> Callable[..., Tensor]:
    """The operation where autocast rules: float32 on a CPU, else autocast's own type."""
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key])

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, *entries: Any) -> Tensor:
        dtype = torch.float32 if device == "cpu" else torch.get_autocast_dtype(device)
        tensors = [
            t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.double
            else t for t in (x, weight, bias)
        ]  # fmt: skip
        with torch._C._ExcludeDispatchKeyGuard(keys):
            y: Tensor = torch.ops.mixconv.mixed_depthwise2d(*tensors, *entries)
            return y

    return run


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _operation._lib.impl("mixed_depthwise2d", _under_autocast(_device), _key)
