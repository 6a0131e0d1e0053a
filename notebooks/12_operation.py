# %% [markdown]
# # 12 · The operation
#
# What should one fast MixConv layer compute, and who else must know of it? This chapter says so before any kernel is written.
#
# **You will be able to**
# - say what the operation computes, and pack its weights by hand;
# - register an operation with PyTorch: shapes, gradient, `vmap`, autocast;
# - ask why a fast form was not taken.
#
# **Know first:** [chapter 3](03_layer.ipynb).
#
# **Time:** 30 minutes to read. Runs in under 30 seconds on two cores.

# %%
#| export fast/operation.py
"""MixConv as one operation: what it computes, and who may compute it (chapter 12).

`split_form` is the meaning. `FORMS` holds the faster ways, which later chapters add. PyTorch knows
the operation as `mixconv::mixed_depthwise2d`.
"""

from typing import NamedTuple

from mixconv.layer import PADDINGS, same_padding

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


# %%
#| export fast/operation.py
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


# %%
#| export fast/operation.py
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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


# %%
#| export fast/operation.py
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


# %%
#| export fast/operation.py
import functools


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


# %%
#| export fast/forms.py
"""Who computes: the forms of an operation, each with its reasons to decline (chapter 12).

And who must see a call: `must_dispatch`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Call(NamedTuple):
    """All that is known of a call but the numbers: what forms decide by.

    Attributes:
        spec: what to compute.
        sizes: of x.
        dtype: of all tensors.
        device: its type, such as "cpu".
        has_bias: whether there is one.
        threads: how many a form may use.
        parameters: sizes of the weights and biases.
    """

    spec: Any
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: str
    has_bias: bool
    threads: int
    parameters: tuple[tuple[int, ...], ...] = ()


Runner = Callable[..., Tensor]


class Form(Protocol):
    """A way to compute an operation."""

    name: str

    def declines(self, call: Call) -> list[str]:
        """Why this form cannot take the call; nothing if it can."""

    def prepare(self, call: Call) -> Runner:
        """What computes such calls, planned once: a function of the operation's tensors."""


# %%
#| export fast/forms.py
class Forms:
    """The forms of one operation, by device; the first that does not decline computes.

    `choose` remembers its choices, so that a call which repeats an earlier one plans nothing.

    Args:
        operation: its name, for messages.
        fallback: prepares what computes when all decline.
        check: raises if the sizes of a call do not fit; asked once for calls that are alike.
    """

    def __init__(
        self, operation: str, fallback: Callable[[Call], Runner],
        check: Callable[[Call], None] = lambda call: None,
    ) -> None:  # fmt: skip
        self.operation = operation
        self.fallback = fallback
        self.check = check
        self.forms: dict[str, list[Form]] = {}
        self.choose = functools.lru_cache(maxsize=1024)(self._choose)

    def add(self, device: str, form: Form) -> None:
        """Let a form compute on a device; one of the same name is replaced."""
        others = [other for other in self.forms.get(device, []) if other.name != form.name]
        self.forms[device] = [*others, form]
        self.forget()

    def forget(self) -> None:
        """Choose anew from now on: what the forms decided by has changed."""
        self.choose.cache_clear()

    def reasons(self, call: Call) -> dict[str, list[str]]:
        """Why each form of the call's device declines it; an empty list: it does not."""
        return {form.name: form.declines(call) for form in self.forms.get(call.device, [])}

    def _choose(self, call: Call) -> Runner:
        self.check(call)
        for form in self.forms.get(call.device, []):
            if not form.declines(call):
                return form.prepare(call)
        return self.fallback(call)


# %%
#| export fast/operation.py
from mixconv.fast.forms import Call, Forms, Runner, must_dispatch, needs_steps


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


# %%
#| export fast/operation.py
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


# %%
#| export fast/forms.py
from torch import nn


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in the CPU's memory, as they are.

    Not so for views that are still to be negated, for tensors without memory (on the device
    "meta", or known to be zero), and for what subclasses wrap.
    """
    known = type(tensor) in _CLASSES and tensor.is_cpu and not tensor.is_neg()
    return known and (tensor.data_ptr() != 0 or tensor.numel() == 0)


_CLASSES = frozenset({Tensor, nn.Parameter})


def must_dispatch(*tensors: Tensor | None) -> bool:
    """Whether a call must go through PyTorch's dispatcher, so that others see or change it.

    Those are tracers, modes, function transforms, autocast, the profiler, a wanted gradient, and
    what tensors of other kinds do: subclasses, other devices, views that are to be negated.
    """
    if torch.compiler.is_compiling() or _is_watched():
        return True
    gradients = torch.is_grad_enabled()
    for tensor in tensors:
        wanted = gradients and tensor is not None and tensor.requires_grad
        if wanted or (tensor is not None and not is_plain(tensor)):
            return True
    return False


def _is_watched() -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.autograd.forward_ad._current_level >= 0
    )


def needs_steps() -> bool:
    """Whether a derivative is taken that PyTorch does not offer to registered operations.

    Forward mode, and `torch.func`'s transforms but `vmap`: they need the formulas of the steps.
    """
    if torch.compiler.is_compiling():
        return False
    layers = torch._C._functorch.get_interpreter_stack() or []
    vmap = torch._C._functorch.TransformType.Vmap
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or any(layer.key() != vmap for layer in layers)


# %%
#| export fast/operation.py
from typing import Any, cast


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


# %%
#| export fast/operation.py
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


# %%
#| export fast/rules.py
"""How PyTorch knows the operation: its shapes, gradient, `vmap` and autocast (chapter 12)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixconv.fast.forms import is_plain
from mixconv.fast.operation import (
    FORMS,
    MixSpec,
    Pad,
    as_arguments,
    check_call,
    describe_call,
    output_size,
    pack_weights,
    pads,
    unpack_weights,
)


@torch.library.custom_op(
    "mixconv::mixed_depthwise2d", mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[] channels, int[] kernel_sizes, "
    "int stride, int[] dilations, str padding, str activation) -> Tensor",
)  # fmt: skip
def _operation(x: Tensor, weight: Tensor, bias: Tensor | None, *entries: Any) -> Tensor:
    call = describe_call(x, weight, bias, _as_spec(entries))
    if x.is_cpu and not all(is_plain(t) for t in (x, weight, bias) if t is not None):
        check_call(call)
        return FORMS.fallback(call)(x, weight, bias)  # its steps know what to do with them
    return FORMS.choose(call)(x, weight, bias)


def _as_spec(entries: Sequence[Any]) -> MixSpec:
    """The spec from the operation's arguments, where lists stand for tuples."""
    parts: list[Any] = [tuple(e) if isinstance(e, list | tuple) else e for e in entries]
    return MixSpec(*parts)


# %%
#| export fast/rules.py
@_operation.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *entries: Any) -> Tensor:
    spec = _as_spec(entries)
    check_call(describe_call(x, weight, bias, spec))
    rows, columns = (output_size(size, spec.stride) for size in x.shape[2:])
    size = (*x.shape[:2], rows, columns)
    return x.new_empty(size).to(memory_format=torch.channels_last)


# %%
#| export fast/rules.py
def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.spec = _as_spec(inputs[3:])


def _before_activation(grad: Tensor, inputs: Sequence[Tensor | None], spec: MixSpec) -> Tensor:
    """The gradient of the sums, from that of the activated result."""
    if spec.activation == "none":
        return grad
    plain = as_arguments(spec._replace(activation="none"))
    sums = torch.ops.mixconv.mixed_depthwise2d(*inputs, *plain)
    aten: Any = torch.ops.aten
    gradients: dict[str, Callable[[], Tensor]] = {
        "relu": lambda: aten.threshold_backward(grad, sums, 0),
        "silu": lambda: aten.silu_backward(grad, sums),
        "relu6": lambda: aten.hardtanh_backward(grad, sums, 0, 6),
    }
    return gradients[spec.activation]()


# %%
#| export fast/rules.py
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
    pairs = [
        _group_gradients(part, g, w, pad, spec.stride, d, wanted[:2])
        for part, g, w, pad, d in groups
    ]
    x_grads, weight_grads = zip(*pairs, strict=True)
    return (
        torch.cat(x_grads, 1) if wanted[0] else None,
        pack_weights(weight_grads) if wanted[1] else None,
        grad.sum((0, 2, 3)) if wanted[2] else None,
        *[None] * len(spec),
    )


_operation.register_autograd(_backward, setup_context=_remember)


# %%
#| export fast/rules.py
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
    many = spec._replace(
        channels=spec.channels * n, kernel_sizes=spec.kernel_sizes * n,
        dilations=spec.dilations * n,
    )  # fmt: skip
    y = torch.ops.mixconv.mixed_depthwise2d(*tensors, *as_arguments(many))
    return y.unflatten(1, (n, -1)), 1


if hasattr(torch.library, "register_vmap"):  # since PyTorch 2.5; before, a loop is run
    _operation.register_vmap(_vmap)


# %%
#| export fast/rules.py
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

# %%
#| export fast/fused_layer.py
"""A mixed layer, its bias and the activation behind it as one operation (chapter 12)."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mixconv.fast.folding import refuse_training
from mixconv.fast.operation import MixSpec, pack_weights, run_operation
from mixconv.surgery import find_padding


def describe_mix(convs: Sequence[nn.Conv2d], activation: str = "none") -> MixSpec | None:
    """Depthwise convolutions side by side as one operation; None where it cannot express them."""
    try:
        paddings = {find_padding(conv) for conv in convs}
    except ValueError:
        return None
    squares = [(*conv.kernel_size, *conv.dilation) for conv in convs]
    strides = {stride for conv in convs for stride in conv.stride}
    depthwise = all(c.groups == c.in_channels == c.out_channels for c in convs)
    even = any(k != h or k % 2 == 0 or d != e for k, h, d, e in squares)
    mixed_up = len(paddings) != 1 or len(strides) != 1
    if not depthwise or even or mixed_up or len({c.bias is None for c in convs}) != 1:
        return None
    channels = tuple(conv.out_channels for conv in convs)
    sizes, dilations = tuple(k for k, *_ in squares), tuple(square[2] for square in squares)
    return MixSpec(channels, sizes, strides.pop(), dilations, paddings.pop(), activation)


# %%
#| export fast/fused_layer.py
class FusedMixConv2d(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, add the bias, activate."""
        if x.dim() == 3:
            return cast("Tensor", self(x[None]))[0]
        return run_operation(x, self.weight, self.bias, self.spec)

    def train(self, mode: bool = True) -> "FusedMixConv2d":
        """Refuse training mode.

        Raises:
            RuntimeError: if `mode` is true.
        """
        refuse_training(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return ", ".join(f"{name}={value}" for name, value in self.spec._asdict().items())

# %% [markdown]
# ## Takeaways
# - The operation has one meaning, `split_form`; every form is compared with it.
# - A form declines with reasons, and then the split form computes.
#
# Previous: [11 · Why it is slow](11_why_slow.ipynb) · Next: [13 · A kernel in steps](13_kernel_in_steps.ipynb)
