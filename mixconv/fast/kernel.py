# Generated from notebooks/14_whole_kernel_called.ipynb by `make book`.
# Edit the notebook, not this file.

"""The compiled kernel as a form of the operation: reasons, memory, calls (ours; chapter 14)."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixconv.fast.forms import Call, Runner
from mixconv.fast.native import kernel_threads, load_library, why_no_library
from mixconv.fast.operation import FORMS
from mixconv.fast.plan import (
    Layer,
    Strip,
    count_parts,
    cut_strips,
    plan_layer,
    ring_size,
    round_up,
    strip_costs,
)
from mixconv.fast.spec import MixSpec, output_size

__all__ = [
    "KEPT_NUMBERS",
    "KERNEL_SIZES",
    "MOST_NUMBERS",
    "SOURCES",
    "KernelForm",
    "count_lanes",
    "load_kernel",
    "output_maker",
    "scratch",
    "why_not",
]


KERNEL_SIZES = (1, 3, 5, 7, 9, 11, 13)  # for which there is compiled code

SOURCES = ("simd.cpp", "depthwise.cpp")


def load_kernel() -> Any:
    """The kernel's library, compiled at first use; None where it cannot be."""
    library = load_library(*SOURCES)
    if library is not None:
        library.mixed_depthwise2d.argtypes = [ctypes.c_void_p] * 6
        library.mixed_depthwise2d.restype = None
    return library


def count_lanes(library: Any) -> int:
    """Numbers in a vector of a library with `depthwise.cpp` in it.

    Raises:
        RuntimeError: if its tables are not those of this module.
    """
    answer = (ctypes.c_int64 * 3)()
    library.depthwise_layout(answer)
    if answer[:2] != [len(Layer._fields), len(Strip._fields)]:
        raise RuntimeError(f"depthwise.cpp and kernel.py disagree about their tables: {[*answer]}")
    return int(answer[2])


KEPT_NUMBERS = 1 << 22  # of scratch, for each part, that stay from call to call: 16 MB

MOST_NUMBERS = 1 << 28  # that a call may ask for: 1 GB


class _Memory(threading.local):
    kept = torch.empty(0, dtype=torch.float32, device="cpu")


_memory = _Memory()


def scratch(count: int, parts: int) -> Tensor:
    """At least so many float32 numbers to write to, this thread's own; kept if not too large."""
    memory = _memory.kept
    if memory.numel() < count:
        memory = torch.empty(count, dtype=torch.float32, device="cpu")
        if count <= parts * KEPT_NUMBERS:
            _memory.kept = memory
    return memory


def why_not(spec: MixSpec, dtype: torch.dtype, numbers: int) -> list[str]:
    """Reasons why there is no compiled code for a layer, a type, or so much scratch memory."""
    dilations, sizes = set(spec.dilations) - {1}, set(spec.kernel_sizes) - {*KERNEL_SIZES}
    found = {
        f"only float32, not {dtype}": dtype != torch.float32,
        f"only strides 1 and 2, not {spec.stride}": spec.stride > 2,
        f"no dilation, not {sorted(dilations)}": dilations,
        f"only kernel sizes {KERNEL_SIZES}, not {sorted(sizes)}": sizes,
        f"{numbers >> 18} MB of scratch, the most is {MOST_NUMBERS >> 18}": numbers > MOST_NUMBERS,
    }
    return [reason for reason, holds in found.items() if holds]


class KernelForm:
    """The compiled kernel: float32 on a CPU, output in channels_last."""

    name = "kernel"

    def declines(self, call: Call) -> list[str]:
        """Why this form cannot take the call; nothing if it can."""
        ring = 16 * ring_size(call.spec, call.sizes[3])  # 16: the most on any machine
        reasons = why_not(call.spec, call.dtype, call.threads * ring)
        if not reasons and load_kernel() is None:
            reasons.append(f"no compiled kernel: {why_no_library(*SOURCES)}")
        return reasons

    def prepare(self, call: Call) -> Runner:
        """What computes such calls; the plan is made here, once."""
        library, spec = load_kernel(), call.spec
        batch, channels, height, width = call.sizes
        rows, columns = output_size(height, spec.stride), output_size(width, spec.stride)
        lanes = count_lanes(library)
        strips = cut_strips(spec, height, width, lanes)
        costs = strip_costs(spec, height, width, strips)
        threads = min(call.threads, kernel_threads())
        parts = count_parts(batch * rows * columns * sum(costs), threads)
        numbers = plan_layer(spec, call.sizes, strips, costs, parts)
        table = (ctypes.c_int64 * len(numbers))(*numbers)
        needed = parts * ring_size(spec, width) * lanes
        out = batch, channels, rows, columns
        return _make_runner(library.mixed_depthwise2d, table, out, needed, parts)


_PAGE, _MANY_BYTES = 1 << 21, 1 << 25  # 2 MB, 32 MB

_MADV_HUGEPAGE = 14  # the request's number, from Linux's <sys/mman.h>


def _ask_for_large_pages(y: Tensor) -> None:
    """A hint to Linux about memory that nobody has touched yet."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    begin = round_up(y.data_ptr(), _PAGE)
    advise(begin, (y.data_ptr() + 4 * y.numel() - begin) // _PAGE * _PAGE, _MADV_HUGEPAGE)


def output_maker(size: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """What makes outputs of a size `(N, C, H, W)`, in channels_last, of the type of x."""
    batch, channels, height, width = size
    strides = height * width * channels, 1, width * channels, channels
    large = 4 * batch * height * width * channels >= _MANY_BYTES and sys.platform == "linux"

    def make(x: Tensor) -> Tensor:
        y = x.new_empty_strided(size, strides)
        if large:
            _ask_for_large_pages(y)
        return y

    return make


def _make_runner(
    function: Any, table: Any, size: tuple[int, ...], needed: int, parts: int
) -> Runner:
    last, make_output = torch.channels_last, output_maker(size)
    address = ctypes.addressof(table)  # good as long as `run` keeps the table

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, kept: Any = table) -> Tensor:
        x, weight = x.contiguous(memory_format=last), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        y, memory = make_output(x), scratch(needed, parts)
        function(
            address, x.data_ptr(), weight.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), memory.data_ptr(),
        )  # fmt: skip
        return y

    return run


FORMS.add("cpu", KernelForm())


if hasattr(os, "register_at_fork"):  # plans for several threads do not suit a child
    os.register_at_fork(after_in_child=FORMS.forget)
