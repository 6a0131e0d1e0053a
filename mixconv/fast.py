# Generated from notebooks/08_fast.ipynb by `make book`. Edit the notebook, not this file.

"""MixConv as one operation, and models rewritten for inference (chapter 8).

`mixed_depthwise2d` runs a C++ kernel, compiled at first use; without a compiler, one merged
convolution. `inverted_residual` does the same for a whole network block. `fuse_for_inference`
rewrites a model to use them.
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv.blocks import DropPath, GroupedPointwise
from mixconv.layer import PADDINGS, Conv2dSame, MixConv2d, embed_kernel, make_conv2d, same_padding
from mixconv.mobilenet import _find_padding

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "FLAGS",
    "PANEL",
    "BlockSpec",
    "FoldedNorm",
    "FusedBlock",
    "FusedMixConv2d",
    "Mix",
    "Pad",
    "Point",
    "activate",
    "block_form",
    "block_kernel_form",
    "compilers",
    "describe_mix",
    "find_chains",
    "fold_line",
    "fuse_block",
    "fuse_for_inference",
    "inverted_residual",
    "kernel_form",
    "load_kernel",
    "load_library",
    "log",
    "merge_kernels",
    "merged_form",
    "mixed_depthwise2d",
    "norm_as_line",
    "output_size",
    "pack_pointwise",
    "pack_weights",
    "pads",
    "split_form",
    "triton_form",
    "unpack_pointwise",
    "unpack_weights",
]


ACTIVATIONS = ("none", "relu", "silu", "relu6")  # in the order of the kernel's enum


class Mix(NamedTuple):
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


def pads(mix: Mix, height: int, width: int) -> list[Pad]:
    """The zeros that each group of the operation needs on an image of this size."""
    result = []
    for k, dilation in zip(mix.kernel_sizes, mix.dilations, strict=True):
        half = dilation * (k // 2)
        rows = columns = (half, half)
        if mix.padding == "same":
            rows = same_padding(height, k, mix.stride, dilation)
            columns = same_padding(width, k, mix.stride, dilation)
        result.append(Pad(*rows, *columns, 2 * half + 1))
    return result


def pack_weights(weights: Sequence[Tensor]) -> Tensor:
    """One flat tensor from the groups' kernels; gradients flow through.

    Shape:
        weights `(c, 1, k, k)` each, output one axis: `(k, k, c)` of each group in turn.
    """
    return torch.cat([weight.squeeze(1).permute(1, 2, 0).reshape(-1) for weight in weights])


def unpack_weights(weight: Tensor, mix: Mix) -> list[Tensor]:
    """The groups' kernels from `pack_weights`'s flat tensor.

    Shape:
        weight as `pack_weights` gives it, outputs `(c, 1, k, k)`.
    """
    shapes = list(zip(mix.kernel_sizes, mix.kernel_sizes, mix.channels, strict=True))
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


def split_form(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation as a convolution for each group, concatenated: the reference.

    Shape:
        Input `(N, C, H, W)`, output `(N, C, ceil(H / stride), ceil(W / stride))`.
    """
    outputs = []
    groups = zip(x.split(mix.channels, 1), unpack_weights(weight, mix), mix.dilations, strict=True)
    around = pads(mix, x.shape[2], x.shape[3])
    for (part, kernel, dilation), pad in zip(groups, around, strict=True):
        padded = F.pad(part, (pad.left, pad.right, pad.top, pad.bottom))
        outputs.append(
            F.conv2d(padded, kernel, None, mix.stride, dilation=dilation, groups=len(kernel))
        )
    y = torch.cat(outputs, 1)
    return activate(y if bias is None else y + bias.view(-1, 1, 1), mix.activation)


def merge_kernels(weight: Tensor, mix: Mix, around: Sequence[Pad]) -> Tensor:
    """All kernels in windows of one size, each where its padding puts it.

    Shape:
        weight as `pack_weights` gives it, output `(C, 1, rows, columns)`.
    """
    top, left = max(pad.top for pad in around), max(pad.left for pad in around)
    rows = max(top - pad.top + pad.reach for pad in around)
    columns = max(left - pad.left + pad.reach for pad in around)
    merged = []
    groups = zip(unpack_weights(weight, mix), mix.dilations, around, strict=True)
    for kernel, d, pad in groups:
        larger = kernel.new_zeros(len(kernel), 1, rows, columns)
        i, j = top - pad.top, left - pad.left
        larger[:, :, i : i + pad.reach : d, j : j + pad.reach : d] = kernel
        merged.append(larger)
    return torch.cat(merged)


def merged_form(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation as one depthwise convolution with zeros in its kernels."""
    around = pads(mix, x.shape[2], x.shape[3])
    kernels = merge_kernels(weight, mix, around)
    ends = []
    for size, window, before in (
        (x.shape[3], kernels.shape[3], max(pad.left for pad in around)),
        (x.shape[2], kernels.shape[2], max(pad.top for pad in around)),
    ):
        spanned = (output_size(size, mix.stride) - 1) * mix.stride + window
        ends += [before, spanned - size - before]
    y = F.conv2d(F.pad(x, ends), kernels, bias, mix.stride, groups=x.shape[1])
    return activate(y, mix.activation)


def output_size(size: int, stride: int) -> int:
    """Rows or columns of the output: the same for both paddings and every odd kernel."""
    return (size + stride - 1) // stride


def norm_as_line(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel that a batch norm in evaluation amounts to.

    Raises:
        ValueError: if the norm keeps no running statistics.

    Shape:
        Outputs `(C,)` each, float64.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


@torch.no_grad()
def fold_line(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Put a scale and a shift of each output channel into a convolution, in place."""
    weight, dtype = conv.weight, conv.weight.dtype
    bias = 0 if conv.bias is None else conv.bias.double()
    conv.weight = nn.Parameter((weight.double() * scale.view(-1, 1, 1, 1)).to(dtype), False)
    conv.bias = nn.Parameter((bias * scale + shift).to(dtype), False)


log = logging.getLogger("mixconv")


# The first that compiles is taken: not every compiler has OpenMP or knows -march=native.
FLAGS = [
    ("-march=native", "-fopenmp"), ("-march=native", "-pthread"),
    ("-mcpu=native", "-fopenmp"), ("-mcpu=native", "-pthread"), ("-pthread",),
]  # fmt: skip

_COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-ignored-attributes")


def compilers() -> list[list[str]]:
    """Compiler commands to try: `$CXX` alone where it is set, else the usual names."""
    if chosen := os.environ.get("CXX"):
        return [shlex.split(chosen)]
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    return [[path] for path in found if path]


def _cpu_identity() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder() -> Path:
    """The user's cache folder, or a private temporary one where that cannot be written."""
    default = os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(os.environ.get("XDG_CACHE_HOME") or default) / "mixconv"
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    return Path(tempfile.mkdtemp(prefix="mixconv-"))


def _compile(command: Sequence[str], source: str, target: Path) -> str:
    """Compile to `target` in one step; returns the compiler's complaint, or nothing."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        full = [*command, *_COMMON_FLAGS, "-x", "c++", "-", "-o", name]
        done = subprocess.run(full, input=source, capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip() or f"exit status {done.returncode}"
        os.chmod(name, 0o700)
        os.replace(name, target)
    except OSError as error:
        return str(error)
    finally:
        Path(name).unlink(missing_ok=True)
    return ""


def _version(command: Sequence[str]) -> str:
    """What a compiler says it is; nothing if it does not run."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


def _recipes(source: str) -> list[tuple[list[str], Path]]:
    """Commands to try, each with the file in the cache that it would make."""
    folder, cpu, recipes = _cache_folder(), _cpu_identity(), []
    for command in compilers():
        if not (version := _version(command)):
            continue
        for flags in FLAGS:
            parts = "\0".join((source, *command, version, *_COMMON_FLAGS, *flags, cpu))
            digest = hashlib.sha256(parts.encode()).hexdigest()[:16]
            recipes.append(([*command, *flags], folder / f"mixconv-{digest}.so"))
    return recipes


def _find_or_build(name: str) -> ctypes.CDLL | None:
    """The library of one C++ file of the package; None, and a log line, if none can be made."""
    source, told = files("mixconv").joinpath(name).read_text(), False
    reason = "no C++ compiler found"
    for command, target in _recipes(source):
        if target.exists():
            with contextlib.suppress(OSError):  # a damaged file: make it again
                return ctypes.CDLL(str(target))
        if not told:
            log.warning("compiling %s, once on this machine: some seconds", name)
            told = True
        complaint = _compile(command, source, target)
        if not complaint:
            return ctypes.CDLL(str(target))
        reason = complaint.splitlines()[0]
    log.warning("%s not compiled (%s); the merged form is used", name, reason)
    return None


class _Libraries:
    """What this process has loaded. A forked child gets a fresh lock, and stays on one thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded: dict[str, ctypes.CDLL | None] = {}
        self.forked = False

    def after_fork(self) -> None:
        # OpenMP's threads do not survive a fork, and GNU's would be waited for without end.
        self.lock, self.forked = threading.Lock(), True


_libraries = _Libraries()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _libraries.after_fork())


def load_library(name: str) -> ctypes.CDLL | None:
    """A C++ file of the package as a library, compiled at first use; any thread may call.

    Args:
        name: such as "mixed_depthwise2d.cpp".

    Returns:
        The library, or None where it cannot be compiled; one log line says why.
    """
    if name not in _libraries.loaded:
        with _libraries.lock:
            if name not in _libraries.loaded:
                _libraries.loaded[name] = _find_or_build(name)
    return _libraries.loaded[name]


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in (
            "batch", "height", "width", "channels", "out_height", "out_width", "stride",
            "activation",
        )
    ]  # fmt: skip


class _Group(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("channels", "kernel", "dilation", "top", "left")
    ]


@functools.cache
def load_kernel() -> Any:
    """The compiled kernel's library, or None where there is no compiler."""
    library = load_library("mixed_depthwise2d.cpp")
    if library is not None:
        pointer, size, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.new_plan.argtypes = [pointer, pointer, pointer, size, count]
        library.new_plan.restype = pointer
        library.delete_plan.argtypes = [pointer]
        library.mixed_depthwise2d.argtypes = library.inverted_residual.argtypes = [pointer] * 5
        library.mixed_depthwise2d.restype = library.inverted_residual.restype = None
    return library


@functools.lru_cache(maxsize=1024)
def _check_mix(mix: Mix) -> tuple[int, int]:
    """How many channels and packed weights the operation has."""
    channels, sizes, stride, dilations, padding, activation = mix
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


def _check_sizes(mix: Mix, x: torch.Size, weight: torch.Size, bias: torch.Size | None) -> None:
    count, packed = _check_mix(mix)
    if len(x) != 4 or x[1] != count:
        raise ValueError(f"x must be (N, {count}, H, W), got {tuple(x)}")
    if len(weight) != 1 or weight[0] != packed:
        raise ValueError(f"weight must hold {packed} packed numbers, got {tuple(weight)}")
    if bias is not None and (len(bias) != 1 or bias[0] != count):
        raise ValueError(f"bias must be ({count},), got {tuple(bias)}")


def _check_kinds(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for other in (weight,) if bias is None else (weight, bias):
        if other.dtype != x.dtype or other.device != x.device:
            raise ValueError("x, weight and bias must agree in dtype and device")


class _Plan:
    """A call's sizes, cut into blocks for so many threads; any thread may use it."""

    def __init__(self, library: Any, sizes: _Sizes, expand: Any, groups: Any, threads: int) -> None:
        self.delete = library.delete_plan
        point = None if expand is None else ctypes.byref(expand)
        self.handle = library.new_plan(ctypes.byref(sizes), point, groups, len(groups), threads)

    def __del__(self) -> None:
        self.delete(self.handle)


def _groups(mix: Mix, height: int, width: int) -> "ctypes.Array[_Group]":
    groups = zip(mix.channels, mix.kernel_sizes, mix.dilations, strict=True)
    entries = [
        _Group(*group, pad.top, pad.left)
        for group, pad in zip(groups, pads(mix, height, width), strict=True)
    ]
    return (_Group * len(entries))(*entries)


def _sizes(mix: Mix, size: torch.Size) -> _Sizes:
    out = output_size(size[2], mix.stride), output_size(size[3], mix.stride)
    activation = ACTIVATIONS.index(mix.activation)
    return _Sizes(size[0], *size[2:], sum(mix.channels), *out, mix.stride, activation)


@functools.lru_cache(maxsize=1024)
def _plan(
    library: Any, mix: Mix, x: torch.Size, weight: torch.Size, bias: torch.Size | None, threads: int
) -> tuple[_Plan | None, tuple[int, ...]]:
    """The plan for tensors of these sizes (None: rings too large), and the output's shape."""
    _check_sizes(mix, x, weight, bias)
    sizes = _sizes(mix, x)
    out = x[0], x[1], sizes.out_height, sizes.out_width
    if _ring_size(mix, x[3]) > _LARGEST_RING:
        return None, out
    return _Plan(library, sizes, None, _groups(mix, x[2], x[3]), threads), out


_LARGEST_RING = 1 << 22  # vectors; only extreme dilations need more, and then the split form runs


def _ring_size(mix: Mix, width: int) -> int:
    spans = (1 + d * (k - 1) for k, d in zip(mix.kernel_sizes, mix.dilations, strict=True))
    return max(span * (width + 16 * mix.stride + 2 * span) for span in spans)


def _threads() -> int:
    return 1 if _libraries.forked else torch.get_num_threads()


def kernel_form(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation by the compiled kernel: float32 on a CPU, output in channels_last.

    Raises:
        ValueError: for sizes that do not fit together.
    """
    library, bias_size = load_kernel(), None if bias is None else bias.shape
    plan, size = _plan(library, mix, x.shape, weight.shape, bias_size, _threads())
    if plan is None:
        return split_form(x, weight, bias, mix).contiguous(memory_format=torch.channels_last)
    x = x.resolve_neg().contiguous(memory_format=torch.channels_last)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    if mix.stride == 1:
        y = torch.empty_like(x)
    else:
        y = torch.empty(size, memory_format=torch.channels_last, dtype=x.dtype, device=x.device)
    bias_at = None if bias is None else bias.data_ptr()
    library.mixed_depthwise2d(plan.handle, x.data_ptr(), weight.data_ptr(), bias_at, y.data_ptr())
    return y


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation in the fastest form that this machine, device and dtype allow."""
    _check_kinds(x, weight, bias)
    if x.dtype == torch.float32 and x.is_cpu and load_kernel() is not None:
        return kernel_form(x, weight, bias, mix)
    _check_sizes(mix, x.shape, weight.shape, None if bias is None else bias.shape)
    if x.is_cuda and x.dtype != torch.float64 and find_spec("triton") is not None:
        return triton_form(x, weight, bias, mix)
    form = merged_form if set(mix.dilations) == {1} and not x.is_cuda else split_form
    return form(x, weight, bias, mix).clone(memory_format=torch.channels_last)


@torch.library.custom_op("mixconv::mixed_depthwise2d", mutates_args=())
def _operation(
    x: Tensor, weight: Tensor, bias: Tensor | None, channels: Sequence[int],
    kernel_sizes: Sequence[int], stride: int, dilations: Sequence[int], padding: str,
    activation: str,
) -> Tensor:  # fmt: skip
    mix = Mix(tuple(channels), tuple(kernel_sizes), stride, tuple(dilations), padding, activation)
    return _forward(x, weight, bias, mix)


@_operation.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, channels: Sequence[int],
    kernel_sizes: Sequence[int], stride: int, dilations: Sequence[int], padding: str,
    activation: str,
) -> Tensor:  # fmt: skip
    mix = Mix(tuple(channels), tuple(kernel_sizes), stride, tuple(dilations), padding, activation)
    _check_kinds(x, weight, bias)
    _check_sizes(mix, x.shape, weight.shape, None if bias is None else bias.shape)
    size = (*x.shape[:2], output_size(x.shape[2], stride), output_size(x.shape[3], stride))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    channels, sizes, stride, dilations, padding, activation = inputs[3:]
    ctx.mix = Mix(tuple(channels), tuple(sizes), stride, tuple(dilations), padding, activation)


def _before_activation(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient of the sums, from that of the activated result."""
    if ctx.mix.activation == "none":
        return grad
    plain = ctx.mix._replace(activation="none")
    sums: Tensor = torch.ops.mixconv.mixed_depthwise2d(*ctx.saved_tensors, *map(_as_list, plain))
    if ctx.mix.activation == "silu":
        gate = torch.sigmoid(sums)
        return grad * gate * (1 + sums * (1 - gate))
    ceiling = 6 if ctx.mix.activation == "relu6" else torch.inf
    return grad * ((sums > 0) & (sums < ceiling))


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _group_gradients(
    x: Tensor, grad: Tensor, kernel: Tensor, pad: Pad, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Gradients of one group's input and kernel."""
    padded = F.pad(x, (pad.left, pad.right, pad.top, pad.bottom))
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, padded, kernel, None, [stride] * 2, [0, 0], [dilation] * 2, False, [0, 0],
        len(kernel), [True, True, False],
    )  # fmt: skip
    rows, columns = pad.top + x.shape[2], pad.left + x.shape[3]
    return x_grad[:, :, pad.top : rows, pad.left : columns], weight_grad


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    mix: Mix = ctx.mix
    grad = _before_activation(ctx, grad)
    groups = zip(
        x.split(mix.channels, 1), grad.split(mix.channels, 1), unpack_weights(weight, mix),
        pads(mix, x.shape[2], x.shape[3]), mix.dilations, strict=True,
    )  # fmt: skip
    pairs = [_group_gradients(part, g, w, pad, mix.stride, d) for part, g, w, pad, d in groups]
    x_grads, weight_grads = zip(*pairs, strict=True)
    bias_grad = None if bias is None else grad.sum((0, 2, 3))
    return torch.cat(x_grads, 1), pack_weights(weight_grads), bias_grad, *[None] * 6


_operation.register_autograd(_backward, setup_context=_remember)


def _is_watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient, tracer, mode or tensor subclass must see the operation."""
    if type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0:
        return True
    wants = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch._C._get_tracing_state() is not None or (wants and torch.is_grad_enabled())


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
    Chapter 8.
    """
    steps = (1,) * len(kernel_sizes) if dilations is None else tuple(dilations)
    mix = Mix(tuple(channels), tuple(kernel_sizes), stride, steps, padding, activation)
    return _call(x, weight, bias, mix)


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation by the shortest way that everybody who watches allows."""
    if not torch.compiler.is_compiling():
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        if forward_mode or torch._C._are_functorch_transforms_active():  # they need its formulas
            _check_kinds(x, weight, bias)
            _check_sizes(mix, x.shape, weight.shape, None if bias is None else bias.shape)
            return split_form(x, weight, bias, mix)
        if not _is_watched(x, weight, bias):
            return _forward(x, weight, bias, mix)
    operation = torch.ops.mixconv.mixed_depthwise2d
    return cast("Tensor", operation(x, weight, bias, *map(_as_list, mix)))


def triton_form(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation by the Triton kernel, summed in float32; output in channels_last."""
    from mixconv.triton_kernel import launch  # imports Triton: only for those who use it

    x = x.contiguous(memory_format=torch.channels_last)
    height, width = x.shape[2:]
    size = (*x.shape[:2], output_size(height, mix.stride), output_size(width, mix.stride))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    groups = tuple(
        (c, k, d, pad.top, pad.left)
        for c, k, d, pad in zip(*mix[:2], mix.dilations, pads(mix, height, width), strict=True)
    )
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        launch(x, weight.contiguous(), bias, y, groups, mix.stride,
               ACTIVATIONS.index(mix.activation))  # fmt: skip
    return y


def _is_mixed(module: nn.Module) -> bool:
    """Ours, or the `MixedConv2d` of timm and its relatives: a dictionary of convolutions."""
    if isinstance(module, MixConv2d):
        return True
    parts = list(module.children())
    split = isinstance(module, nn.ModuleDict) and hasattr(module, "splits")
    return split and bool(parts) and all(isinstance(part, nn.Conv2d) for part in parts)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that a layer consists of; none for a layer of another kind."""
    if _is_mixed(module):
        return [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    known = type(module) in (nn.Conv2d, Conv2dSame, GroupedPointwise)
    same = isinstance(module, nn.Conv2d) and type(module).__name__ == "Conv2dSame"
    return [cast("nn.Conv2d", module)] if known or same else []


class _Tracer(torch.fx.Tracer):
    """Looks into blocks, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layer = _is_mixed(m) or isinstance(m, nn.modules.batchnorm._BatchNorm)
        return layer or not list(m.children()) or super().is_leaf_module(m, module_qualified_name)


def find_chains(model: nn.Module) -> list[list[str]]:
    """Names of layers that feed each other and nothing else, each list from a convolution on."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # anything may go wrong in a stranger's forward
        parts = [(f"{name}.", find_chains(child)) for name, child in model.named_children()]
        return [[prefix + name for name in chain] for prefix, found in parts for chain in found]
    layers = dict(model.named_modules())
    calls = Counter(layers[str(n.target)] for n in graph.nodes if n.op == "call_module")
    read = [str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"]
    calls.update(layers[name] for name in read)  # whose weights are also used directly
    called = [node for node in graph.nodes if node.op == "call_module"]
    starts = [node for node in called if _convolutions(layers[str(node.target)])]
    chains = [_follow(node, layers) for node in starts]  # what is used twice is left alone:
    return [chain for chain in chains if all(calls[layers[name]] == 1 for name in chain)]


def _aliased(model: nn.Module) -> set[nn.Module]:
    """Modules that can be reached under several names: replacing one would not replace all."""
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return {module for module, count in names.items() if count > 1}


def _follow(node: torch.fx.Node, layers: dict[str, nn.Module]) -> list[str]:
    """The layers that a node feeds, one after another; identities are passed over."""
    chain = [str(node.target)]
    while len(node.users) == 1:
        (node,) = node.users
        if node.op != "call_module":
            break
        layer = layers[str(node.target)]
        if layer._forward_hooks or layer._forward_pre_hooks or _convolutions(layer):
            break
        if type(layer) is not nn.Identity:
            chain.append(str(node.target))
    return chain


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class FoldedNorm(nn.Identity):
    """Where a batch norm was that is part of the convolution before it now."""

    def train(self, mode: bool = True) -> "FoldedNorm":
        """Refuse training mode: there is no norm left to train.

        Raises:
            RuntimeError: if `mode` is true.
        """
        _refuse(mode)
        return super().train(mode)


def _refuse(mode: bool) -> None:
    if mode:
        raise RuntimeError(
            "this model was fused for inference and cannot be trained: batch norms and weights "
            "are merged. Train the model you gave to fuse_for_inference, and fuse it again."
        )


def _fold_norm(model: nn.Module, chain: list[str]) -> list[str]:
    """Fold the norm that follows a convolution; returns the chain without it."""
    convs, norm = _convolutions(model.get_submodule(chain[0])), model.get_submodule(chain[1])
    known = type(norm).__name__ in ("BatchNorm2d", "SyncBatchNorm", "BatchNormAct2d")
    drop = getattr(norm, "drop", None)
    if not known or norm.running_mean is None or type(drop) not in (type(None), nn.Identity):
        return chain
    sizes = [conv.out_channels for conv in convs]
    scale, shift = (line.split(sizes) for line in norm_as_line(cast("nn.BatchNorm2d", norm)))
    for conv, *line in zip(convs, scale, shift, strict=True):
        fold_line(conv, *line)
    inner = getattr(norm, "act", nn.Identity())
    _replace(model, chain[1], FoldedNorm() if type(inner) is nn.Identity else inner)
    return chain if type(inner) is not nn.Identity else [chain[0], *chain[2:]]


def describe_mix(convs: Sequence[nn.Conv2d], activation: str = "none") -> Mix | None:
    """Depthwise convolutions side by side as one operation; None where it cannot express them."""
    try:
        paddings = {_find_padding(conv) for conv in convs}
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
    return Mix(channels, sizes, strides.pop(), dilations, paddings.pop(), activation)


class FusedMixConv2d(nn.Module):
    """Depthwise convolutions, their bias and the activation behind them as one operation.

    Args:
        convs: the convolutions of the groups.
        mix: what `describe_mix` says of them.

    Shape:
        Input `(N, C, H, W)` or `(C, H, W)`, output as from the layer it replaces.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, convs: Sequence[nn.Conv2d], mix: Mix) -> None:
        super().__init__()
        self.mix = mix
        biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
        self.register_buffer("weight", pack_weights([conv.weight.detach() for conv in convs]))
        self.register_buffer("bias", torch.cat(biases) if biases else None)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, add the bias, activate."""
        if x.dim() == 3:
            return cast("Tensor", self(x[None]))[0]
        x = x.to(self.weight.dtype)  # under autocast the layers around may give another
        return _call(x, self.weight, self.bias, self.mix)

    def train(self, mode: bool = True) -> "FusedMixConv2d":
        """Refuse training mode.

        Raises:
            RuntimeError: if `mode` is true.
        """
        _refuse(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return ", ".join(f"{name}={value}" for name, value in self.mix._asdict().items())


def _merge_convolutions(convs: Sequence[nn.Conv2d], mix: Mix) -> nn.Conv2d | None:
    """The depthwise convolutions as one, or None where one cannot do."""
    size, count = max(mix.kernel_sizes), sum(mix.channels)
    if set(mix.dilations) != {1} or (mix.padding == "same" and min(mix.kernel_sizes) < mix.stride):
        return None
    like = convs[0].weight
    merged = make_conv2d(
        count, count, size, mix.stride, groups=count, bias=convs[0].bias is not None,
        padding=mix.padding, device=like.device, dtype=like.dtype,
    )  # fmt: skip
    weight = torch.cat([embed_kernel(conv.weight.detach(), size) for conv in convs])
    merged.weight = nn.Parameter(weight, requires_grad=False)
    biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
    merged.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return merged.eval()


def _merge_pointwise(convs: Sequence[nn.Conv2d]) -> nn.Conv2d | None:
    """Equal 1×1 convolutions side by side as one grouped convolution, or None."""
    kinds = {
        (c.in_channels, c.out_channels, c.kernel_size, c.groups, c.bias is None) for c in convs
    }
    first = convs[0]
    plain = first.kernel_size == (1, 1) == first.stride and first.groups == 1 < first.in_channels
    if len(kinds) != 1 or not plain or any(c.padding not in (0, (0, 0)) for c in convs):
        return None
    n, like = len(convs), first.weight
    merged = nn.Conv2d(
        n * first.in_channels, n * first.out_channels, 1, groups=n, bias=first.bias is not None,
        device=like.device, dtype=like.dtype,
    )  # fmt: skip
    merged.weight = nn.Parameter(torch.cat([c.weight.detach() for c in convs]), False)
    biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
    merged.bias = nn.Parameter(torch.cat(biases), False) if biases else None
    return merged.eval()


BACKENDS = ("auto", "kernel", "merged")

_ACTIVATIONS_OF_TORCH = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Sigmoid: "sigmoid"}

_ACTIVATIONS_OF_PEERS = {"Swish": "silu", "SwishMe": "silu", "Sigmoid": "sigmoid"}


def _is_of_peer(module: nn.Module) -> bool:
    """A class of a library whose names mean what we think they mean."""
    return type(module).__module__.partition(".")[0] in ("timm", "geffnet", "torchvision")


def _activation_name(module: nn.Module, known: Sequence[str] = ACTIVATIONS) -> str | None:
    """What a module applies to each number, by its name; None if it is not among the known."""
    peers = _ACTIVATIONS_OF_PEERS if _is_of_peer(module) else {}
    found = _ACTIVATIONS_OF_TORCH.get(type(module), peers.get(type(module).__name__))
    return found if found in known and not _is_touched(module) else None


_SMALLEST_PLAIN_KERNEL = 5  # plain 3×3 layers: neither kernel is faster everywhere


def _fuse_layer(model: nn.Module, chain: list[str], backend: str) -> None:
    """Put the fast form of a layer in its place, with the activation behind it if it can."""
    layer = model.get_submodule(chain[0])
    convs = _convolutions(layer)
    behind: Any = model.get_submodule(chain[1]) if len(chain) > 1 else nn.Identity()
    activation = _activation_name(behind) or "none"
    mix = describe_mix(convs, activation)
    worth = _is_mixed(layer) or convs[0].kernel_size[0] >= _SMALLEST_PLAIN_KERNEL
    if mix is not None and worth and backend == "kernel":
        _replace(model, chain[0], FusedMixConv2d(convs, mix).eval())
        if activation != "none":
            _replace(model, chain[1], nn.Identity())
    elif _is_mixed(layer):
        merged = _merge_convolutions(convs, mix) if mix else _merge_pointwise(convs)
        _replace(model, chain[0], merged or layer)
    if activation != "none" and hasattr(behind, "inplace"):
        behind.inplace = True


PANEL = 16  # the kernel's kPanel

_POINT_ACTIVATIONS = (*ACTIVATIONS, "sigmoid")


class Point(NamedTuple):
    """A 1×1 convolution in equal groups, and the activation behind it."""

    inputs: int
    outputs: int
    groups: int
    activation: str


def pack_pointwise(weight: Tensor, groups: int) -> Tensor:
    """A 1×1 convolution's weight `(outputs, inputs / groups, 1, 1)` as panels, one axis."""
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    rows = F.pad(weight.reshape(groups, outputs, inputs), (0, 0, 0, -outputs % PANEL))
    return rows.view(groups, -1, PANEL, inputs).transpose(2, 3).reshape(-1)


def unpack_pointwise(packed: Tensor, point: Point) -> Tensor:
    """`pack_pointwise` undone."""
    inputs, outputs = point.inputs // point.groups, point.outputs // point.groups
    rows = packed.view(point.groups, -1, inputs, PANEL).transpose(2, 3).flatten(1, 2)
    return rows[:, :outputs].reshape(point.outputs, inputs, 1, 1)


class BlockSpec(NamedTuple):
    """An inverted residual block; what is None is left out.

    Weights and biases go with it in the order expand, depthwise, squeeze, excite, project: 1×1
    weights from `pack_pointwise`, the depthwise ones from `pack_weights`, empty where left out.
    """

    mix: Mix
    expand: Point | None
    squeeze: Point | None
    excite: Point | None
    project: Point
    residual: bool


def block_form(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """The block as separate operations: the reference.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.
    """

    def pointwise(y: Tensor, index: int, point: Point) -> Tensor:
        weight = unpack_pointwise(weights[index], point)
        return activate(F.conv2d(y, weight, biases[index], groups=point.groups), point.activation)

    with torch.autocast(x.device.type, enabled=False):  # all in the type of the weights
        y = x if spec.expand is None else pointwise(x, 0, spec.expand)
        y = _call(y, weights[1], biases[1], spec.mix)
        if spec.squeeze is not None and spec.excite is not None:
            means = y.mean((2, 3), keepdim=True)
            y = y * pointwise(pointwise(means, 2, spec.squeeze), 3, spec.excite)
        y = pointwise(y, 4, spec.project)
        return x + y if spec.residual else y


class _Point(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias")] + [
        (name, ctypes.c_int64) for name in ("inputs", "outputs", "groups", "activation")
    ]


class _InvertedResidual(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("squeeze", _Point),
        ("excite", _Point), ("project", _Point), ("residual", ctypes.c_int64),
        ("batch", ctypes.c_int64),
    ]  # fmt: skip


def _points(spec: BlockSpec, pointers: tuple[int, ...]) -> list[_Point]:
    """The 1×1 layers; weights and biases lie at even and odd places, depthwise at 2 and 3."""
    return [
        _Point(*pointers[i : i + 2], *point[:3], _POINT_ACTIVATIONS.index(point.activation))
        if point is not None else _Point()
        for i, point in zip((0, 4, 6, 8), spec[1:5], strict=True)
    ]  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _block(
    library: Any, spec: BlockSpec, size: torch.Size, pointers: tuple[int, ...], threads: int
) -> tuple[_InvertedResidual, _Plan, _Plan, tuple[int, ...]]:
    """A block as the kernel takes it, its plans, and the shape of its output.

    The pointers are those of all weights and biases in turn.
    """
    expand, *points = _points(spec, pointers)
    sizes, groups = _sizes(spec.mix, size), _groups(spec.mix, size[2], size[3])
    sizes.batch = 1
    first = expand if spec.expand is not None else None
    plans = [_Plan(library, sizes, first, groups, n) for n in (1, threads)]
    block = _InvertedResidual(*pointers[2:4], *points, spec.residual, size[0])
    out = size[0], spec.project.outputs, sizes.out_height, sizes.out_width
    return block, plans[0], plans[1], out


def block_kernel_form(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """The block by the compiled kernel: float32 on a CPU, output in channels_last."""
    x = x.resolve_neg().contiguous(memory_format=torch.channels_last)
    pairs = zip(weights, biases, strict=True)
    kept = [tensor.contiguous() for pair in pairs for tensor in pair]
    library, pointers = load_kernel(), tuple([tensor.data_ptr() for tensor in kept])
    block, alone, together, size = _block(library, spec, x.shape, pointers, _threads())
    y = torch.empty(size, memory_format=torch.channels_last, dtype=x.dtype, device=x.device)
    library.inverted_residual(
        ctypes.byref(block), alone.handle, together.handle, x.data_ptr(), y.data_ptr()
    )
    return y


def _fits(spec: BlockSpec, count: int, inputs: int) -> bool:
    """Whether each layer of a block takes what the one before gives."""
    mix, expand, squeeze, excite, project, residual = spec
    ends = [project.inputs, count if expand is None else expand.outputs]
    gate = squeeze is None and excite is None
    if squeeze is not None and excite is not None:
        ends += [squeeze.inputs, excite.outputs]
        gate = squeeze.outputs == excite.inputs
    same = not residual or (mix.stride == 1 and inputs == project.outputs)
    return gate and same and set(ends) == {count}


@functools.lru_cache(maxsize=1024)
def _check_spec(spec: BlockSpec) -> tuple[int, list[int], list[int]]:
    """Channels of the input, and how many weights and biases each layer has."""
    count, packed = _check_mix(spec.mix)
    inputs = count if spec.expand is None else spec.expand.inputs
    if not _fits(spec, count, inputs):
        raise ValueError(f"the block's layers do not fit together: {spec}")
    weights, biases = [0, packed, 0, 0, 0], [0, count, 0, 0, 0]
    for index, point in zip((0, 2, 3, 4), spec[1:5], strict=True):
        if point is not None:
            if point.groups < 1 or point.inputs % point.groups or point.outputs % point.groups:
                raise ValueError(f"groups must divide inputs and outputs, got {point}")
            panels = point.groups * -(-point.outputs // point.groups // PANEL)
            weights[index] = panels * PANEL * (point.inputs // point.groups)
            biases[index] = point.outputs
    return inputs, weights, biases


def _check_block(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> None:
    inputs, *expected = _check_spec(spec)
    if x.dim() != 4 or x.shape[1] != inputs:
        raise ValueError(f"x must be (N, {inputs}, H, W), got {tuple(x.shape)}")
    for name, tensors, sizes in zip(
        ("weights", "biases"), (weights, biases), expected, strict=True
    ):
        if [t.numel() for t in tensors] != sizes:
            raise ValueError(
                f"{name} must hold {sizes} numbers, got {[t.numel() for t in tensors]}"
            )
        if any(t.dtype != x.dtype or t.device != x.device for t in tensors):
            raise ValueError(f"x and {name} must agree in dtype and device")


_LARGEST_WIDE = 1 << 30  # numbers in one image's wide tensor; for more, PyTorch finds the memory


def _block_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    _check_block(x, weights, biases, spec)
    pixels = output_size(x.shape[2], spec.mix.stride) * output_size(x.shape[3], spec.mix.stride)
    small = pixels * sum(spec.mix.channels) < _LARGEST_WIDE
    small = small and _ring_size(spec.mix, x.shape[3]) <= _LARGEST_RING
    if small and x.dtype == torch.float32 and x.is_cpu and load_kernel() is not None:
        return block_kernel_form(x, weights, biases, spec)
    y = block_form(x, weights, biases, spec)
    return y.contiguous(memory_format=torch.channels_last)


def _as_numbers(spec: BlockSpec) -> list[int]:
    """The 1×1 layers as `torch.library` can take them; zeros for what is left out."""
    return [
        number
        for p in spec[1:5]
        for number in ((*p[:3], _POINT_ACTIVATIONS.index(p.activation)) if p else (0, 0, 0, 0))
    ]


def _as_spec(points: Sequence[int], mix: Mix, residual: bool) -> BlockSpec:
    rows = [points[i : i + 4] for i in range(0, 16, 4)]
    found = [Point(i, o, g, _POINT_ACTIVATIONS[a]) if i else None for i, o, g, a in rows]
    return BlockSpec(mix, found[0], found[1], found[2], cast("Point", found[3]), residual)


@torch.library.custom_op("mixconv::inverted_residual", mutates_args=())
def _block_operation(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], points: Sequence[int],
    channels: Sequence[int], kernel_sizes: Sequence[int], stride: int, dilations: Sequence[int],
    padding: str, activation: str, residual: bool,
) -> Tensor:  # fmt: skip
    mix = Mix(tuple(channels), tuple(kernel_sizes), stride, tuple(dilations), padding, activation)
    return _block_forward(x, weights, biases, _as_spec(points, mix, residual))


@_block_operation.register_fake
def _block_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], points: Sequence[int],
    channels: Sequence[int], kernel_sizes: Sequence[int], stride: int, dilations: Sequence[int],
    padding: str, activation: str, residual: bool,
) -> Tensor:  # fmt: skip
    size = output_size(x.shape[2], stride), output_size(x.shape[3], stride)
    project = points[12:]  # inputs, outputs, groups, activation
    shape = (x.shape[0], project[1], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def inverted_residual(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """An inverted residual block, from its input to its output, in one operation.

    Args:
        x: best in channels_last; anything else is copied to it first.
        weights: of the five layers of `spec`, packed; see `BlockSpec`.
        biases: of the five layers.
        spec: the block.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.

    Raises:
        ValueError: for sizes and dtypes that do not fit together.

    Source: ours; the block is the paper's (section 4, Figure 8). Chapter 8.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *biases)):
        return block_form(x, weights, biases, spec)
    if not torch.compiler.is_compiling():
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        if forward_mode or torch._C._are_functorch_transforms_active():
            return block_form(x, weights, biases, spec)
        if not _is_watched(x, weights[1], biases[1]):
            return _block_forward(x, weights, biases, spec)
    lists = [*map(_as_list, spec.mix)]
    operation = torch.ops.mixconv.inverted_residual
    numbers = _as_numbers(spec)
    return cast("Tensor", operation(x, weights, biases, numbers, *lists, spec.residual))


class FusedBlock(nn.Module):
    """An inverted residual block, or a depthwise separable one, as one operation.

    Args:
        spec: the block.
        weights: packed, as `inverted_residual` takes them.
        biases: of the five layers.

    Shape:
        Input `(N, C, H, W)` or `(C, H, W)`, output as from the block it replaces.
    """

    def __init__(
        self, spec: BlockSpec, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.spec = spec
        for index, pair in enumerate(zip(weights, biases, strict=True)):
            for name, tensor in zip(("weight", "bias"), pair, strict=True):
                self.register_buffer(f"{name}{index}", tensor.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        if x.dim() == 3:
            return cast("Tensor", self(x[None]))[0]
        buffers = [*self._buffers.values()]
        weights, biases = cast("list[Tensor]", buffers[0::2]), cast("list[Tensor]", buffers[1::2])
        return inverted_residual(x.to(weights[1].dtype), weights, biases, self.spec)

    def train(self, mode: bool = True) -> "FusedBlock":
        """Refuse training mode.

        Raises:
            RuntimeError: if `mode` is true.
        """
        _refuse(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return ",\n".join(f"{name}={value}" for name, value in self.spec._asdict().items())


_IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath, FoldedNorm)  # in evaluation

_IDLE_OF_PEERS = ("DropPath", "StochasticDepth")


def _is_idle(layer: nn.Module | None) -> bool:
    """Whether a module does nothing in evaluation."""
    if layer is None or _is_touched(layer):
        return False
    named = type(layer).__name__ in _IDLE_OF_PEERS and _is_of_peer(layer)
    return type(layer) in _IDLE or named


class _Unit(NamedTuple):
    """A convolution, the activation behind it, and the node that it takes."""

    layer: nn.Module
    activation: str
    source: Any


class _Reader:
    """Reads a traced module from its output to its input."""

    def __init__(self, module: nn.Module) -> None:
        self.layers = dict(module.named_modules())
        self.graph = _Tracer().trace(module)
        self.inputs = [node for node in self.graph.nodes if node.op == "placeholder"]

    def layer(self, node: Any) -> nn.Module | None:
        """The module that a node calls."""
        called = isinstance(node, torch.fx.Node) and node.op == "call_module"
        return self.layers[str(node.target)] if called else None

    def name(self, node: Any) -> str:
        """What a node calls, whether module, method or function."""
        if not isinstance(node, torch.fx.Node):
            return ""
        target = node.target if isinstance(node.target, str) else type(node.target).__name__
        function = getattr(node.target, "__name__", target)
        return type(self.layer(node)).__name__ if node.op == "call_module" else function

    def skip(self, node: Any) -> Any:
        """The node, or the first one before it that does something."""
        while _is_idle(self.layer(node)):
            node = node.args[0]
        return node

    def activation(self, node: Any) -> str | None:
        """What a node applies to each number; None if it does something else."""
        if (layer := self.layer(node)) is not None:
            return _activation_name(layer, _POINT_ACTIVATIONS)
        name = self.name(node).rstrip("_")
        return name if name in _POINT_ACTIVATIONS[1:] else None

    def unit(self, node: Any) -> _Unit | None:
        """The convolution whose activated output a node is; None if it is something else."""
        node, activation = self.skip(node), "none"
        if (found := self.activation(node)) in ACTIVATIONS:
            activation, node = found, self.skip(node.args[0])
        layer = self.layer(node)
        if layer is None or not (isinstance(layer, FusedMixConv2d) or _convolutions(layer)):
            return None
        return _Unit(layer, activation, node.args[0])

    def all_used(self) -> bool:
        """Whether the output depends on every step; the others may change something in place."""
        used, waiting = set(), [node for node in self.graph.nodes if node.op == "output"]
        while waiting:
            if (node := waiting.pop()) not in used:
                used.add(node)
                waiting += node.all_input_nodes
        return len(used) == len(self.graph.nodes)

    def pooled(self, node: Any) -> Any:
        """What a node takes the mean of, over all pixels; None if it does something else."""
        node = self.skip(node)
        if (layer := self.layer(node)) is not None:
            whole = type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1))
        elif self.name(node) == "adaptive_avg_pool2d":
            whole = node.args[1:] in ((1,), ((1, 1),))
        else:
            values = [*node.args[1:], *node.kwargs.values()] if self.name(node) == "mean" else []
            axes, keep = values if len(values) == 2 else ((), False)
            whole = keep is True and axes in ((2, 3), [2, 3], (-2, -1), [-2, -1])
        return self.skip(node.args[0]) if whole else None


def _read_point(unit: _Unit | None) -> tuple[nn.Conv2d, Point] | None:
    """A 1×1 convolution and its description."""
    if unit is None or not isinstance(conv := unit.layer, nn.Conv2d):
        return None
    plain = conv.kernel_size == (1, 1) == conv.stride and conv.padding in (0, (0, 0), "same")
    point = Point(conv.in_channels, conv.out_channels, conv.groups, unit.activation)
    return (conv, point) if plain else None


def _read_mix(unit: _Unit) -> tuple[Mix, Tensor, Tensor | None] | None:
    """A depthwise layer as one operation: what, weight and bias."""
    layer, activation, _ = unit
    if isinstance(layer, FusedMixConv2d):
        mix = layer.mix if activation == "none" else layer.mix._replace(activation=activation)
        once = activation == "none" or layer.mix.activation == "none"
        return (mix, layer.weight, layer.bias) if once else None
    conv = cast("nn.Conv2d", layer)
    if (found := describe_mix([conv], activation)) is None:
        return None
    return found, pack_weights([conv.weight]), conv.bias


def _read_gate(reader: _Reader, node: Any) -> tuple[Any, list[Any]] | None:
    """What a gate scales, and its two 1×1 convolutions; (node, two Nones) without a gate."""
    node = reader.skip(node)
    if reader.name(node) not in ("mul", "imul", "mul_"):
        return node, [None, None]
    factors = [reader.skip(factor) for factor in node.args]
    gates = [f for f in factors if reader.activation(f) == "sigmoid"]
    if len(factors) != 2 or len(gates) != 1:
        return None
    (scaled,) = (f for f in factors if f is not gates[0])
    outer = reader.unit(gates[0].args[0])
    inner = reader.unit(outer.source) if outer is not None else None
    excite, squeeze = _read_point(outer), _read_point(inner)
    if inner is None or squeeze is None or excite is None or excite[1].activation != "none":
        return None
    gate = [squeeze, (excite[0], excite[1]._replace(activation="sigmoid"))]
    return (scaled, gate) if reader.pooled(inner.source) is scaled else None


def _read_addition(reader: _Reader) -> tuple[Any, bool]:
    """What the output is without the addition of the input, and whether that is added."""
    (x,), (output,) = reader.inputs, (n for n in reader.graph.nodes if n.op == "output")
    node = reader.skip(output.args[0])
    if reader.name(node) in ("add", "iadd", "add_") and not node.kwargs and len(node.args) == 2:
        others = [part for part in node.args if reader.skip(part) is not x]
        if len(others) == 1:
            return others[0], True
    return node, False


def _read_block(reader: _Reader) -> tuple[list[Any], Any, bool] | None:
    """The 1×1 convolutions (None where left out), the depthwise layer, and the addition."""
    node, residual = _read_addition(reader)
    last = reader.unit(node)
    project = _read_point(last)
    if last is None or project is None or (gated := _read_gate(reader, last.source)) is None:
        return None
    node, gate = gated
    middle = reader.unit(node)
    if middle is None or (mix := _read_mix(middle)) is None:
        return None
    (x,), expand, node = reader.inputs, None, reader.skip(middle.source)
    if node is not x and (first := reader.unit(node)) is not None:
        if (expand := _read_point(first)) is None:
            return None
        node = reader.skip(first.source)
    return ([expand, *gate, project], mix, residual) if node is x else None


def _pack_block(
    points: list[Any], mix: tuple[Mix, Tensor, Tensor | None], residual: bool
) -> FusedBlock:
    expand, squeeze, excite, project = (pair and pair[1] for pair in points)
    spec = BlockSpec(mix[0], expand, squeeze, excite, project, residual)
    none = mix[1].new_zeros(0)
    weights = [pack_pointwise(pair[0].weight, pair[1].groups) if pair else none for pair in points]
    given = [pair[0].bias if pair else none for pair in points]
    weights.insert(1, mix[1])
    given.insert(1, mix[2])
    counts = _check_spec(spec)[2]
    biases = [none.new_zeros(n) if b is None else b for b, n in zip(given, counts, strict=True)]
    return FusedBlock(spec, weights, biases).eval()


def _keep_attributes(fused: FusedBlock, block: nn.Module) -> FusedBlock:
    """Numbers and names that others may read from the block, such as its stride."""
    for name, value in vars(block).items():
        plain = isinstance(value, int | float | str | tuple)
        if plain and not name.startswith("_") and not hasattr(fused, name):
            setattr(fused, name, value)
    return fused


@torch.no_grad()
def _computes_the_same(fused: FusedBlock, block: nn.Module) -> bool:
    channels = _check_spec(fused.spec)[0]
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, channels, 12, 11, generator=generator, dtype=torch.float32, device="cpu")
    given = x.clone()
    wanted, found = block(given), fused(x)
    same = isinstance(wanted, Tensor) and wanted.shape == found.shape and torch.equal(given, x)
    return same and bool((wanted - found).abs().max() <= 1e-3 * wanted.abs().max())


def fuse_block(block: nn.Module) -> FusedBlock | None:
    """The block as one operation; None if the operation cannot stand in for it.

    Args:
        block: without batch norms, in evaluation mode, float32 on a CPU.
    """
    if any(_is_touched(part) for part in block.modules()):
        return None
    try:
        reader = _Reader(block)
        found = _read_block(reader) if len(reader.inputs) == 1 else None
        fused = _pack_block(*found) if found is not None and reader.all_used() else None
        return fused if fused is not None and _computes_the_same(fused, block) else None
    except Exception as error:  # anything may go wrong in a stranger's forward
        log.debug("%s left as it is: %s", type(block).__name__, error)
        return None


def _fuse_blocks(model: nn.Module) -> None:
    """Put `FusedBlock`s in place of all blocks that are such."""
    for name, child in model.named_children():
        parts = [_is_depthwise(part) for part in child.modules()]
        wrapper = type(child) is nn.Sequential and len(child) == 1
        once = sum(parts) == 1 and len(parts) > 1 and not wrapper
        if once and (fused := fuse_block(child)) is not None:
            setattr(model, name, _keep_attributes(fused, child))
        elif any(parts):
            _fuse_blocks(child)


def _is_depthwise(layer: nn.Module) -> bool:
    convs = _convolutions(layer)
    plain = bool(convs) and all(c.groups == c.in_channels > 1 for c in convs)
    return plain or isinstance(layer, FusedMixConv2d)


def fuse_for_inference(model: nn.Module, *, backend: str = "auto") -> nn.Module:
    """A copy of a model that computes the same in evaluation, and faster.

    Batch norms are folded, mixed depthwise layers become one operation, grouped 1×1 convolutions
    one convolution; weights are put in channels_last. With the kernel, whole inverted residual
    and depthwise separable blocks become one operation. The copy cannot be trained. Works on
    this package's layers and networks, on timm's MixNets, and on what else is built like them.

    Args:
        model: any module; it is not changed.
        backend: "kernel" for `mixconv::mixed_depthwise2d` and `mixconv::inverted_residual`;
            "merged" for ordinary convolutions only, as ONNX needs; "auto" for the kernel where
            it can be compiled (or Triton is there for a model on a GPU), else merged.

    Raises:
        ValueError: for an unknown backend.

    Source: ours. Chapter 8.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    root = nn.Sequential(copy.deepcopy(model)).eval().requires_grad_(False)
    if backend == "auto":
        backend = "kernel" if _kernel_at_hand(root) else "merged"
    _fuse_layers(root, backend)
    weight = next(root.parameters(), torch.empty(0))
    if backend == "kernel" and weight.dtype == torch.float32 and weight.device.type == "cpu":
        _fuse_blocks(root)
    return root[0]


def _fuse_layers(root: nn.Module, backend: str) -> None:
    """Fold what can be folded, and put the fast form of each layer in its place."""
    aliased = _aliased(root)
    for chain in find_chains(root):
        layer = root.get_submodule(chain[0])
        members = {root.get_submodule(name) for name in chain}
        if not members & aliased and not any(_is_touched(part) for part in layer.modules()):
            if len(chain) > 1:
                chain = _fold_norm(root, chain)
            _fuse_layer(root, chain, backend)
    for conv in root.modules():
        if isinstance(conv, nn.Conv2d):
            conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _kernel_at_hand(model: nn.Module) -> bool:
    weight = next(model.parameters(), torch.empty(0))
    if weight.is_cuda:
        return find_spec("triton") is not None
    return weight.dtype == torch.float32 and load_kernel() is not None


def _is_touched(module: nn.Module) -> bool:
    """Whether hooks, parametrisations or a forward of its own do what cannot be seen."""
    hooks = bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
    return hooks or torch.nn.utils.parametrize.is_parametrized(module)
