# %% [markdown]
# # 14 · The kernel, called
#
# The kernel is written, and follows any plan it is given. Who makes the plan, who brings the memory, and which calls should it decline? How much faster than PyTorch is it, and how near does it come to what the machine can do?
#
# The picture below answers the last question. It shows the time of every depthwise layer of the three MixNets, divided by the layer's *roofline* time from chapter 11: its multiply-adds at the machine's peak, or a copy of as many bytes, whichever takes longer. (A small copy stays in the cache and is quick. So this roof is stricter than the one in chapter 11's first picture, which knows large arrays only.) At 1 nothing is left to gain.
#
# **You will be able to**
# - make a compiled kernel one of an operation's forms, with reasons to decline;
# - check it against the split form, in forward and gradient;
# - say what limits it, from stored measurements.
#
# **Know first:** [chapter 12](12_operation.ipynb), and the page before this one.
#
# **Time:** 15 minutes to read. Runs in under 30 seconds on two cores, after the kernel has been compiled once. This page needs a C++ compiler; without one, read it as it stands. It is the second of two pages, after [The whole kernel](14_whole_kernel.ipynb).

# %% tags=["drawing"]
# fold: The code that draws this
import json
from pathlib import Path

import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style

use_style()
bench = json.loads(Path("../figures/bench.json").read_bytes())
rows = bench["layers"]
batches = sorted({row["batch"] for row in rows})
sizes = sorted({row["size"] for row in rows}, reverse=True)
figure, panels = plt.subplots(1, len(batches), figsize=(8, 3.4), sharey=True)
for axis, batch in zip(panels, batches, strict=True):
    for row in (row for row in rows if row["batch"] == batch):
        ratio = row["seconds"]["fused"] / row["seconds_roofline"]
        color = kernel_color(max(row["kernel_sizes"]))
        place = sizes.index(row["size"]) + 0.1 * (row["stride"] - 1.5)
        axis.plot(place, ratio, "o" if row["stride"] == 1 else "^", ms=5, color=color)
    axis.axhline(1, color="black", lw=0.8)
    axis.set(title=f"batch {batch}", xlabel="height = width")
    axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axis.text(0, 0.85, "nothing left to gain", fontsize=8, va="top")
panels[0].set(ylabel="time / roofline's time", ylim=(0, None))
for k in (3, 5, 7, 9, 11):
    panels[1].plot([], [], "s", color=kernel_color(k), label=f"up to {k}×{k}")
for marker, stride in (("o", 1), ("^", 2)):
    panels[1].plot([], [], marker, color="black", label=f"stride {stride}")
figure.legend(loc="outside upper center", ncols=7, fontsize=8, columnspacing=1)
show(
    figure,
    "kernel_over_roofline.png",
    "How many times as long as its roofline each depthwise layer of the MixNets takes, by image "
    "size and batch; round markers for stride 1, triangles for stride 2, coloured by the largest "
    "kernel. No layer is below 1; most lie between 1.5 and 4. Large kernels at 14×14 and 7×7 come "
    "nearest for one image; for 32 images, layers at 56×56 and 112×112 do.",
    caption="Most layers take one and a half to four times as long as the roofline allows. For one "
    "image, large kernels on small images come nearest; for many, large images do.",
)

# %% [markdown]
# ## The library
#
# Two tables on either side of a language border drift apart one day. So the library says how many numbers it takes for a `Layer` and for a `Strip`, and a disagreement is an error at once, not a wrong result later.

# %%
#| export fast/kernel.py
"""The compiled kernel as a form of the operation: reasons, memory, calls (ours; chapter 14)."""

import ctypes
from typing import Any

from mixconv.fast.native import load_library
from mixconv.fast.plan import Layer, Strip

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


# %%
import logging

from mixconv.fast.native import why_no_library

logging.getLogger("mixconv").setLevel(logging.ERROR)  # it would say here that it compiles
assert not why_no_library(*SOURCES), "the rest of this page needs a C++ compiler"
count_lanes(load_kernel()) in (4, 8, 16)

# %% [markdown]
# Fresh memory can cost more than the work done in it (below). So each thread of Python's keeps its scratch memory from call to call, unless it is very large.

# %%
#| export fast/kernel.py
import threading

import torch
from torch import Tensor

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


# %% [markdown]
# ## What the kernel declines
#
# Chapter 12: a form answers with its reasons, and when there are any, the split form computes. The kernel declines what it has no compiled version for. Dilation and stride 3 could be had with loops whose bounds are known only at run time. But no MixNet has them, and slow code for rare cases is what the split form is for. (How slow? The table below gives it: split, over the kernel.) The size of the scratch memory is asked, too. (That tensors and layer fit together was checked before any form is asked: chapter 12.) Whether the kernel can be compiled is asked last, if nothing else speaks against it.

# %%
#| export fast/kernel.py
from mixconv.fast.forms import Call
from mixconv.fast.native import why_no_library
from mixconv.fast.plan import ring_size
from mixconv.fast.spec import MixSpec


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


# %% [markdown]
# To prepare a call is to make its plan. The table stays alive as long as the function that uses it.

# %%
#| export fast/kernel.py
from mixconv.fast.forms import Runner
from mixconv.fast.native import kernel_threads
from mixconv.fast.plan import count_parts, cut_strips, plan_layer, strip_costs
from mixconv.fast.spec import output_size


class KernelForm(KernelForm):
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


# %% [markdown]
# Outputs are new memory. Linux gives it out in pages of 4 kB, each on first touch, and for a tensor of many megabytes that can take longer than the convolution. It can be asked for pages of 2 MB. A layer of 32 images of 112×112 pixels with 32 channels, whose output takes 32 · 112 · 112 · 32 · 4 / 1,000,000 = 51 MB, took 80 ms without this request and 20 ms with it. <!-- measured: the layer with and without _ask_for_large_pages, shortest of 12, two threads, 2026-11-25 -->

# %%
#| export fast/kernel.py
import sys
from collections.abc import Callable, Sequence

from mixconv.fast.plan import round_up

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


# %% [markdown]
# What is left to do in each call: make sure of the layout, make an output, give six addresses away. `ctypes` lets go of Python's lock while the kernel runs.

# %%
#| export fast/kernel.py
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


# %% [markdown]
# From now on the kernel computes wherever `mixed_depthwise2d` is called. A child that was forked off starts with no plans. Where the idle threads could not be ended before the fork, it uses one thread only (chapter 13), and a plan for two would not suit it.

# %%
#| export fast/kernel.py
import os

from mixconv.fast.operation import FORMS

FORMS.add("cpu", KernelForm())

if hasattr(os, "register_at_fork"):  # plans for several threads do not suit a child
    os.register_at_fork(after_in_child=FORMS.forget)

# %% [markdown]
# Which calls does it take? A layer of 20 channels, some changes of it, and a row of thirty million pixels, which is described without being made:

# %%
from mixconv.fast.operation import describe_call
from mixconv.fast.spec import check_spec

plain = MixSpec((12, 8), (3, 5), 1, (1, 1), "symmetric", "none")
same = plain._replace(kernel_sizes=(1, 3), stride=2, padding="same")
cases = {
    "as it is": plain,
    "1×1 and 3×3, stride 2, SAME": same,
    "stride 3": plain._replace(stride=3),
}
cases |= {
    "dilated": plain._replace(dilations=(1, 2)),
    "15×15": plain._replace(kernel_sizes=(3, 15)),
}
for name, spec in (cases | {"a long row": plain}).items():
    x = torch.zeros(1).expand(1, 20, 1, 30_000_000 if name == "a long row" else 9)
    call = describe_call(x, torch.zeros(check_spec(spec)[1]), None, spec)._replace(threads=1)
    print(f"{name}: {'; '.join(FORMS.reasons(call)['kernel']) or 'taken'}")

# %% [markdown]
# ## Equal to the split form
#
# Random layers: kernels 1 to 13, both strides and paddings, sizes from 1 to 40, channels that are no multiple of anything, one to three threads.

# %%
import random

from mixconv.fast.operation import run_operation
from mixconv.fast.spec import ACTIVATIONS, split_form


def random_layer(rng: random.Random) -> tuple[MixSpec, list[Tensor]]:
    """A layer, and tensors for it."""
    kernels = tuple(rng.choice(KERNEL_SIZES) for _ in range(rng.randint(1, 4)))
    channels = tuple(rng.randint(1, 40) for _ in kernels)
    kind = rng.choice((1, 2)), (1,) * len(kernels), rng.choice(("symmetric", "same"))
    spec = MixSpec(channels, kernels, *kind, rng.choice(ACTIVATIONS))
    sizes = (rng.randint(1, 3), sum(channels), rng.randint(1, 40), rng.randint(1, 40))
    shapes = sizes, (check_spec(spec)[1],), (sum(channels),)
    return spec, [torch.randn(shape) / 4 for shape in shapes]


# %%
torch.manual_seed(0)
rng, threads = random.Random(0), torch.get_num_threads()
for count in 40 * (1, 2, 3):
    spec, tensors = random_layer(rng)
    torch.set_num_threads(count)
    y, wanted = run_operation(*tensors, spec), split_form(*tensors, spec)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4, msg=str(spec))
torch.set_num_threads(threads)
print("equal: 120 layers")

# %% [markdown]
# Forward *and* gradient: the gradient's formulas are chapter 12's, but the outputs, and the sums before the activation, come from the kernel now.

# %%
from mixconv.teaching import check_rewrite

mixed = MixSpec((20, 13), (3, 7), 2, (1, 1), "same", "silu")
check_rewrite(
    lambda *t: split_form(*t, mixed),
    lambda *t: run_operation(*t, mixed),
    *(torch.randn(2, 33, 15, 14), torch.randn(check_spec(mixed)[1]) / 5, torch.randn(33)),
    what="split form and kernel",
)

# %% [markdown]
# ## What it is worth
#
# `make bench` stores its times in `figures/bench.json`. How many times as fast as three ways without a compiler is the kernel, in the middle (geometric mean) of MixNet's layers?

# %%
import statistics

from mixconv.teaching import table

WAYS = {"split (timm)": "timm", "the same, channels last": "timm_channels_last"}
WAYS |= {"merged, channels last": "merged"}


def times_as_fast(way: str, batch: int, mixed: bool) -> float:
    chosen = (r for r in rows if r["batch"] == batch and (len(r["channels"]) > 1) == mixed)
    return statistics.geometric_mean(r["seconds"][way] / r["seconds"]["fused"] for r in chosen)


table(
    ["kernel over", *(f"{kind}, batch {b}" for kind in ("mixed", "one group") for b in batches)],
    [
        [name, *(f"{times_as_fast(way, b, kind):.1f}" for kind in (True, False) for b in batches)]
        for name, way in WAYS.items()
    ],
)

# %% [markdown]
# Layers with one group gain little at larger batches, if the model is in channels last already: for them PyTorch has a good kernel of its own. What is won is won where kernels are mixed.
#
# Before the kernel was written, goals were set for it. They stand in `tools/bench.py`, and here is what became of those for single layers:

# %%
for goal in bench["goals"]:
    if goal["goal"].startswith("mixed layers"):
        verdict = "met" if goal["met"] else "missed"
        print(f"{goal['goal']}: wanted {goal['wanted']}, measured {goal['measured']}, {verdict}")


# %% [markdown]
# ## What limits it
#
# The picture above, in words:

# %%
def over_roof(batch: int, size: int) -> float:
    chosen = [r for r in rows if (r["batch"], r["size"]) == (batch, size)]
    return statistics.geometric_mean(r["seconds"]["fused"] / r["seconds_roofline"] for r in chosen)


for batch in batches:
    best, *_, worst = sorted((over_roof(batch, size), size) for size in sizes)
    print(f"batch {batch}: {best[0]:.1f} times the roofline's time at {best[1]}×{best[1]}, "
          f"{worst[0]:.1f} times at {worst[1]}×{worst[1]}")  # fmt: skip

# %%
for batch in batches:
    ratios = [r["seconds"]["fused"] / r["seconds_roofline"] for r in rows if r["batch"] == batch]
    most = sum(1.45 <= ratio <= 4 for ratio in ratios)
    assert min(ratios) > 1
    assert most > 0.8 * len(ratios)  # the caption's "most"
    print(f"batch {batch}: {min(ratios):.1f} to {max(ratios):.1f}, {most} of {len(ratios)} "
          "between 1.45 and 4")  # fmt: skip


# %% [markdown]
# For one image, large kernels come nearest. For 32 images, large images do: their copy comes from memory, too, and is as slow as they are. Small images' copies stay in the cache.
#
# Where does the rest go? The file also has one layer that was made larger step by step: 28×28 pixels, 240 channels. Two differences take its time apart.
#
# - With one image more, everything is done once more, except the **start**. So the start is 2 · T(1 image) − T(2 images).
# - With larger kernels, only the **sums** grow. A layer with kernels 3, 5, …, 11 has (9 + 25 + 49 + 81 + 121) / 5 = 57 taps for each output, one with 3×3 kernels has 9. Rows of taps above and below the image are skipped, so fewer are computed. From the two times follows the time for a tap. What is left at 0 taps, less the start, is **moving**: reading pixels, writing them into the ring, storing outputs.

# %%
def computed_taps(groups: int, size: int = 28) -> float:
    """Taps of an output, in the middle, without the rows that lie outside the image."""
    kernels = [2 * i + 3 for i in range(groups)]
    rows = [sum(0 <= y + i - k // 2 < size for y in range(size) for i in range(k)) for k in kernels]
    return sum(k * n / size for k, n in zip(kernels, rows, strict=True)) / groups


grown = {(row["axis"], row["value"]): 1e6 * row["seconds"]["fused"] for row in bench["growth"]}
few, many = computed_taps(1), computed_taps(5)
for_a_tap = (grown["groups", 5] - grown["groups", 1]) / (many - few)
start = 2 * grown["batch", 1] - grown["batch", 2]
moving = grown["groups", 1] - few * for_a_tap - start
peak = bench["machine"]["multiply_adds_per_second"] / 1e6

# %%
print(f"start {start:.0f} µs, moving {moving:.0f} µs")
for taps in (few, many):
    print(f"sums of {taps:.1f} taps: {taps * for_a_tap:.0f} µs, "
          f"at the machine's peak {28 * 28 * 240 * taps / peak:.0f} µs")  # fmt: skip
again = [grown[at] for at in (("batch", 1), ("channels", 240), ("size", 28), ("groups", 4))]
print(f"one layer, measured four times: {min(again):.1f} to {max(again):.1f} µs")

# %% [markdown]
# Differences of times are uncertain. The layer with four groups was measured four times for the file, and the last line shows how far apart the times are: so the start is known to a few microseconds, and the moving likewise. Within that, the sums run at the machine's peak. The start and the moving come on top, and the roofline has no room for them: it takes the *larger* of work and copy, as if one could hide behind the other. With 3×3 kernels they are most of the time; with large kernels the sums are.
#
# Do all five layers lie on the line through the two?

# %%
for groups in range(1, 6):
    each, taps = 240 // groups, computed_taps(groups)
    spec = MixSpec((each,) * groups, KERNEL_SIZES[1 : groups + 1], 1, (1,) * groups, "same", "none")
    line = start + moving + taps * for_a_tap
    print(f"{groups} × {each} channels, {len(cut_strips(spec, 28, 28, lanes=16))} strips: "
          f"{grown['groups', groups]:.1f} µs, on the line {line:.1f} µs")  # fmt: skip

# %% [markdown]
# Four groups are slower than five, though they have fewer taps. Groups of 240, 80 or 48 channels end where vectors of 16 do, and make 15 strips. Groups of 60 do not: 18 strips, the narrow ones at the price of full ones, and stored in pieces. On one thread, groups of 64, 64, 64 and 48 channels took a quarter less time than four groups of 60. <!-- measured: mixed_depthwise2d, 28×28, kernels 3, 5, 7, 9, one thread, shortest of 1500: 71 and 98 µs, AVX-512, 2026-11-25 --> Who designs a network for this kernel chooses multiples of 16.
#
# What the three parts are:
#
# - **The start.** Python, and waking the other threads. (The same layer on 7×7 pixels is over in 9 µs, start and all.)
# - **The moving.** Each pixel is read, written into the ring, and read again for each tap. And a strip reads 64 bytes of each pixel and jumps over the rest; a core can wait for only so many cache lines at a time.
# - **Memory.** Many images do not fit the caches, and the system hands out a large output page by page:

# %%
print(f"7×7 pixels: {grown['size', 7]:.0f} µs")
for batch in (8, 32):
    print(f"batch {batch}: {grown['batch', batch] / batch:.0f} µs for each image")

# %% [markdown]
# Tried, and not worth it: tiles of 28 outputs. Registers run out, and three layers took 0.98 to 1.43 times as long. <!-- measured: kTile = 28 against 14, kernels 3, 5 and 9, one thread, shortest of 60, AVX-512, 2026-11-25 -->
#
# Tried while the kernel was written, and not kept, nor their times: reading several neighbouring strips in one pass at 112×112 (better for some distances between pixels, worse for most, since the rings no longer fit the cache); stores that go around the cache; parts that are handed out as threads become free (no better than equal shares, once the rings were apart).
#
# A block of MixNet has five other steps that read or write the same tensor. Chapter 15 does them in the same pass.

# %% [markdown]
# ## Takeaways
# - A kernel that allocates nothing has no error to report; whoever calls it must have checked everything before.
# - Its sums run near the machine's peak. Starting, and moving pixels into the ring, is what is left to save.
# - What has no compiled version is declined with a reason, and the split form computes.
# - A plan is made once for each kind of call; a call is six addresses.
#
# **Further reading**: Ragan-Kelley and others, *Halide*, PLDI 2013: what to compute, apart from where and when; a ring and bands are two of its schedules.
#
# Previous: [14 · The whole kernel](14_whole_kernel.ipynb) · Next: [15 · Bytes of a block](15_block_bytes.ipynb)
