# Generated from notebooks/14_whole_kernel.ipynb by `make book`. Edit the notebook, not this file.

"""The compiled kernel as a form of the operation: its plan and its memory (ours; chapter 14)."""

import bisect
import ctypes
import itertools
import os
import threading
from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixconv.fast.forms import Call, Runner
from mixconv.fast.native import kernel_threads, load_library, why_no_library
from mixconv.fast.operation import FORMS
from mixconv.fast.spec import ACTIVATIONS, MixSpec, output_size, pads

__all__ = [
    "BAND_BYTES",
    "COPY_COST",
    "KEPT_NUMBERS",
    "KERNEL_SIZES",
    "MOST_NUMBERS",
    "SOURCES",
    "WORK_OF_A_THREAD",
    "KernelForm",
    "Layer",
    "Strip",
    "band_rows",
    "count_lanes",
    "count_parts",
    "cut_strips",
    "last_strides",
    "load_kernel",
    "plan_layer",
    "ring_size",
    "round_up",
    "scratch",
    "share_out",
    "why_not",
]


class Strip(NamedTuple):
    """Neighbouring channels of one group, computed together; as in `depthwise.cpp`."""

    kernel: int
    top: int  # zeros above and left of the group's input
    left: int
    window: int  # the first channel that is read
    read: int  # how many are
    skip: int  # the first lane that is the strip's own
    lanes: int  # how many are
    weight: int  # of the strip's first channel, among the packed ones
    step: int  # to the weight of the next tap


def cut_strips(spec: MixSpec, height: int, width: int, lanes: int, part: int = 0) -> list[Strip]:
    """The layer's channels as strips of up to `lanes`, cut where vectors of the tensor end.

    Where `part` is given, vectors begin anew after so many channels.
    """
    total, strips, first, weight = sum(spec.channels), [], 0, 0
    groups = zip(spec.channels, spec.kernel_sizes, pads(spec, height, width), strict=True)
    for count, k, pad in groups:
        at = first
        while at < first + count:
            inside = at % (part or total)
            vector = min(lanes - inside % lanes, (part or total) - inside)
            own = min(vector, first + count - at)
            window = min(at, max(0, total - lanes))
            place = window, min(lanes, total), at - window, own
            strips.append(Strip(k, pad.top, pad.left, *place, weight + at - first, count))
            at += own
        first, weight = first + count, weight + count * k * k
    return strips


BAND_BYTES = 1 << 20  # rows worked on: half of a common second-level cache


def band_rows(out_height: int, row_bytes: int) -> int:
    """Rows of a band: as many as the cache holds, but not so few that most are read twice."""
    return max(1, min(out_height, max(4, BAND_BYTES // max(1, row_bytes))))


COPY_COST = 16  # of reading a pixel and writing an output, in multiply-adds of a vector

WORK_OF_A_THREAD = 10000  # multiply-adds of vectors: for less, waking it costs more


def count_parts(work: int, threads: int) -> int:
    """Into how many parts some work is cut."""
    return max(1, min(threads, work // WORK_OF_A_THREAD))


Layer = namedtuple(
    "Layer",
    "batch height width channels out_height out_width stride activation "
    "band bands strips parts ring",
)


def share_out(strips: Sequence[Strip], costs: Sequence[int], layer: Layer) -> list[int]:
    """Where each part of the work begins, and where the last one ends, in numbered rows."""
    before = [0, *itertools.accumulate(costs)]
    image_cost, cuts = before[-1] * layer.out_height, []
    for part in range(layer.parts + 1):
        image, cost = divmod(layer.batch * image_cost * part // layer.parts, max(1, image_cost))
        band, cost = divmod(cost, before[-1] * layer.band)
        rows = min(layer.band, layer.out_height - band * layer.band)
        strip = bisect.bisect_right(before, cost // max(1, rows)) - 1
        row = (cost - before[strip] * rows) // costs[strip]
        if min(row, rows - row) < strips[strip].kernel:
            row = 0 if 2 * row <= rows else layer.band
        cuts.append(((image * layer.bands + band) * layer.strips + strip) * layer.band + row)
    return cuts


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


def round_up(value: int, to: int) -> int:
    """The next multiple."""
    return -(-value // to) * to


def ring_size(spec: MixSpec, width: int) -> int:
    """Vectors that the largest ring of a layer takes at most, and the weights behind it."""
    columns = round_up(output_size(width, spec.stride), 14)
    return max(k * ((columns - 1) * spec.stride + k) + k * k for k in spec.kernel_sizes)


def plan_layer(
    spec: MixSpec, sizes: Sequence[int], strips: Sequence[Strip], costs: Sequence[int], parts: int
) -> list[int]:
    """A layer's work, cut into bands and parts: the table that the kernel reads.

    Args:
        spec: the layer.
        sizes: of x, `(N, C, H, W)`.
        strips: from `cut_strips`.
        costs: of a strip, for one output pixel.
        parts: into how many the work is cut.
    """
    batch, pixel, height, width = sizes
    rows, columns = output_size(height, spec.stride), output_size(width, spec.stride)
    channels, activation = sum(spec.channels), ACTIVATIONS.index(spec.activation)
    band = band_rows(rows, 4 * (spec.stride * width * pixel + columns * channels))
    layer = Layer(
        batch, height, width, channels, rows, columns, spec.stride, activation,
        band, -(-rows // band), len(strips), parts, ring_size(spec, width),
    )  # fmt: skip
    return [*layer, *share_out(strips, costs, layer), *itertools.chain(*strips)]


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
        costs = [strip.kernel**2 + COPY_COST for strip in strips]
        threads = min(call.threads, kernel_threads())
        parts = count_parts(batch * rows * columns * sum(costs), threads)
        numbers = plan_layer(spec, call.sizes, strips, costs, parts)
        table = (ctypes.c_int64 * len(numbers))(*numbers)
        needed = parts * ring_size(spec, width) * lanes
        out = batch, channels, rows, columns
        return _make_runner(library.mixed_depthwise2d, table, out, needed, parts)


def last_strides(size: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor `(N, C, H, W)` in channels_last."""
    _, channels, height, width = size
    return height * width * channels, 1, width * channels, channels


def _make_runner(
    function: Any, table: Any, size: tuple[int, ...], needed: int, parts: int
) -> Runner:
    last, address, strides = torch.channels_last, ctypes.addressof, last_strides(size)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.contiguous(memory_format=last), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        y, memory = x.new_empty_strided(size, strides), scratch(needed, parts)
        function(
            address(table), x.data_ptr(), weight.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), memory.data_ptr(),
        )  # fmt: skip
        return y

    return run


FORMS.add("cpu", KernelForm())


if hasattr(os, "register_at_fork"):  # plans for several threads do not suit a child
    os.register_at_fork(after_in_child=FORMS.forget)
