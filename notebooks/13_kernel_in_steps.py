# %% [markdown]
# # 13 · A kernel in steps
#
# Chapter 1's loops are right, and slow. How fast can they get, and why? The picture below shows four versions of them in C++, from plain loops to rows of sums in registers. This chapter writes all four.
#
# **You will be able to**
# - read C++ that computes with vectors, and see in the compiler's output what becomes of it;
# - name what each of three steps changes, and what it buys;
# - compute an exponential of a vector, by parts;
# - find a wrong index from what a kernel prints.
#
# **Know first:** [chapter 1](01_formulation.ipynb) and [chapter 11](11_why_slow.ipynb). C++: loops and pointers. Vectors and templates are explained here.
#
# **Time:** 40 minutes to read. Runs in under 30 seconds on two cores, after the C++ has been compiled once. It is the first of two pages, before [A kernel, compiled](13_kernel_in_steps_compiled.ipynb), which is about packing and may be left out.

# %% tags=["drawing"]
# fold: The code that draws this
import json
from pathlib import Path

import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style

use_style()
bench = json.loads(Path("../figures/bench.json").read_bytes())
layers, machine = bench["steps"], bench["machine"]
STEPS = [name for name in layers[0]["seconds"] if name[0] in "0123"]


def speed(layer: dict, step: str) -> float:
    """Multiply-adds in a second, counting all k² taps of each output."""
    work = layer["size"] ** 2 * layer["channels"] * layer["kernel_size"] ** 2
    return work / layer["seconds"][step]


figure, axis = plt.subplots(figsize=(7.2, 3.4))
for number, layer in enumerate(layers):
    places = [i + 0.26 * (number - 1) for i in range(len(STEPS))]
    speeds = [speed(layer, step) / 1e9 for step in STEPS]
    label = "{size}×{size} pixels, {channels} channels, {kernel_size}×{kernel_size}"
    color = kernel_color(layer["kernel_size"])
    bars = axis.barh(places, speeds, 0.24, color=color, label=label.format(**layer))
    axis.bar_label(
        bars, [f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in speeds], padding=2, fontsize=8
    )
peak = machine["multiply_adds_per_second"] / machine["threads"] / 1e9
axis.axvline(peak, color="black", lw=1)
axis.text(peak * 0.985, 0.5, "most that one\nthread can do", fontsize=8, va="center", ha="right")
axis.set_yticks(range(len(STEPS)), STEPS)
axis.invert_yaxis()
axis.set(xlim=(0, peak * 1.06), xlabel="billion multiply-adds a second, one thread")
axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.1, 1.02))
show(
    figure,
    "kernel_steps.png",
    "The speed of three layers in four versions of the loops. Bars: plain loops, vectors of "
    "sixteen channels, a padded copy, and rows of sums in registers, beside the most that one "
    "thread of the machine can do. Plain loops are hardly to be seen.",
    caption="Vectors bring the loops to a fifth of what a thread can do, the padded copy brings "
    "nothing by itself, or less, and rows of sums come near the most where the kernel is large.",
)

# %% [markdown]
# (Speed counts all k² taps of an output. Those outside the image count, too, though steps 0 and 1 leave them out.)
#
# ## Where a number lies
#
# All loops below work on one image with channels last. In memory the channels of a pixel are neighbours; then comes the next pixel of the row, and after the row the next one. So
#
# $$
# x[iy, ix, c] \ \ \mathrm{lies\ at} \ \ (iy \cdot \mathrm{width} + ix) \cdot \mathrm{channels} + c
# $$
#
# By hand: 2 rows of 3 pixels with 4 channels. Channel 3 of the pixel in row 1, column 2 lies at (1 · 3 + 2) · 4 + 3 = 23, the last place of 24. Its left neighbour is 4 places before, the pixel above it 12.

# %%
import torch

height, width, channels = 2, 3, 4
x = torch.arange(height * width * channels).view(height, width, channels)  # each says its place
assert x[1, 2, 3] == (1 * width + 2) * channels + 3 == 23
x[1, 2, 3] - x[1, 1, 3], x[1, 2, 3] - x[0, 2, 3]

# %% [markdown]
# The kernels lie in the same manner: tap (ky, kx) of channel c at (ky · k + kx) · channels + c.
#
# ## Step 0: loops
#
# Chapter 1's loops in another language. One group, stride 1; `Int` is a 64-bit integer; `const` marks what does not change. Taps that fall outside the image are skipped.
#
# ```c++
# //| export fast/depthwise_steps.cpp
# // Steps towards depthwise.cpp: one group, stride 1, channels a multiple of 16.
# // x and y are (height, width, channels); w is (k, k, channels).
# #include <cstdint>
# #include <vector>
#
# using Int = int64_t;
#
# extern "C" void step0_loops(const float* x, const float* w, float* y, Int height, Int width,
#                             Int channels, Int k) {
#   for (Int c = 0; c < channels; ++c)
#     for (Int oy = 0; oy < height; ++oy)
#       for (Int ox = 0; ox < width; ++ox) {
#         float sum = 0;
#         for (Int ky = 0; ky < k; ++ky)
#           for (Int kx = 0; kx < k; ++kx) {
#             const Int iy = oy + ky - k / 2, ix = ox + kx - k / 2;
#             if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
#             sum += w[(ky * k + kx) * channels + c] * x[(iy * width + ix) * channels + c];
#           }
#         y[(oy * width + ox) * channels + c] = sum;
#       }
# }
# ```
#
# `extern "C"` keeps the function's name as it is written, so that Python can ask for it. `load_library` compiles the file and opens it (how, is the next page), and `ctypes` calls it with addresses and sizes:

# %%
import ctypes
import logging

from mixconv.fast.native import load_library

logging.getLogger("mixconv").setLevel(logging.ERROR)  # this chapter also runs without a compiler
steps = load_library("depthwise_steps.cpp")


def run_step(name: str, image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """One step on an `(H, W, C)` image with a `(C, 1, k, k)` kernel."""
    packed = kernel[:, 0].permute(1, 2, 0).contiguous()  # (k, k, C)
    result = torch.full_like(image, torch.nan)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (image, packed, result)]
    getattr(steps, name)(*pointers, *map(ctypes.c_int64, (*image.shape, kernel.shape[-1])))
    return result


# %% [markdown]
# Is it right? PyTorch's convolution knows. The same comparison will be made after every step, with the step before. (Without a compiler there is nothing to compare, and the cells say so.)

# %%
import torch.nn.functional as F


def by_torch(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    planes, k = image.permute(2, 0, 1)[None], kernel.shape[-1]
    return F.conv2d(planes, kernel, padding=k // 2, groups=len(kernel))[0].permute(1, 2, 0)


def compare(after: str, before: str) -> None:
    for k in (3, 5, 7, 9) if steps else ():
        image, kernel = torch.randn(13, 28, 32), torch.randn(32, 1, k, k)
        one, other = (
            by_torch(image, kernel) if name == "torch" else run_step(name, image, kernel)
            for name in (after, before)
        )
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # sums in another order
    verdict = "equal" if steps else "not compared, for want of a compiler"
    print(f"{verdict}: {after} and {before}, kernels 3, 5, 7 and 9")


torch.manual_seed(0)
compare("step0_loops", "torch")

# %% [markdown]
# ## The three ideas in one picture

# %% tags=["drawing"]
# fold: The code that draws this
from itertools import product

blue, orange, green, grey = "#80B9D9", "#F2CF80", "#8FD3B6", "#eeeeee"


def cell(axis, x: float, y: float, color: str, text: str = "") -> None:
    axis.add_patch(plt.Rectangle((x, y), 0.9, 0.9, facecolor=color, edgecolor="#999999"))
    axis.text(x + 0.45, y + 0.47, text, ha="center", va="center", fontsize=8)


def draw_lanes(axis) -> None:
    for x, c in product(range(4), range(8)):  # a pixel is a column of channels
        cell(axis, x, c, blue if x == 1 and c < 4 else grey, f"c{c}")
    for x in range(4):
        axis.text(x + 0.45, 8.45, f"pixel\n{x}", ha="center", va="center", fontsize=8)
    axis.text(4.1, 1.9, "one\nvector", fontsize=8, va="center", color="#00537f")


def draw_plane(axis) -> None:
    for x, y in product(range(6), range(6)):
        inside = 0 < x < 5 and 0 < y < 5
        window = orange if x < 3 and y < 3 else None
        cell(axis, x, y, window or (grey if inside else "white"), "" if inside else "0")
    words = "orange: the window of\nthe upper left output"
    axis.text(3, 6.4, words, ha="center", va="center", fontsize=8)


# %% tags=["drawing"]
# fold: The code that draws this
def draw_row(axis) -> None:
    for x in range(6):
        cell(axis, x, 0, grey if x in (0, 5) else orange, f"x{x}")
    cell(axis, 6.2, 2.5, green, "tap")
    for t in range(4):
        cell(axis, t, 5, blue, f"sum {t}")
        axis.annotate("", (t + 0.45, 4.9), (t + 1.45, 1), arrowprops={"arrowstyle": "->"})
    axis.text(4.15, 2.97, "each input\ntimes the tap", fontsize=8, va="center")
    axis.text(6.65, 3.9, "kx = 1,\nloaded once", fontsize=8, ha="center", va="center")


figure, (lanes, plane, row) = plt.subplots(1, 3, figsize=(9, 3.3), width_ratios=(0.9, 1, 1.5))
draw_lanes(lanes)
draw_plane(plane)
draw_row(row)
panels = {
    lanes: (5.2, 9.2, "1: a vector is neighbouring\nchannels of one pixel"),
    plane: (6, 7, "2: a copy with zeros around\nhas no border to ask for"),
    row: (7.7, 6, "3: four sums side by side\ndo not wait for one another"),
}
for axis, (wide, high, title) in panels.items():
    axis.set(xlim=(-0.2, wide), ylim=(high, -0.2), aspect="equal")
    axis.set_title(title, fontsize=9)
    axis.axis("off")
show(
    figure,
    "lanes_plane_row.png",
    "The ideas of steps 1, 2 and 3. Left: pixels as columns of channels; four neighbouring "
    "channels of one pixel are one vector. Middle: a 4×4 image in a 6×6 plane with zeros around "
    "it, a 3×3 window in its corner. Right: four sums side by side; each takes the product of the "
    "same tap with its own input.",
    caption="Take neighbouring channels together, put zeros around the image once, and let one tap "
    "serve a row of sums.",
)

# %% [markdown]
# (Drawn with vectors of 4 channels and 4 sums. The code has 16 channels and 14 sums.)
#
# ## Step 1: sixteen channels at once
#
# In a depthwise convolution all channels do the same, each with its own numbers. A processor has instructions for just that: one of them multiplies 4, 8 or 16 pairs of numbers at once, and many machines add the products to a sum in the same instruction. The places in such a *vector* are called *lanes*. With channels last, 16 lanes are 16 neighbours in memory.
#
# There is no need to name the instructions. (`constexpr` below marks a number that the compiler knows, `static` what only this file uses.) GCC and Clang have vector types, on which `+` and `*` work lane by lane. Read the declaration from the left: `Vec` is made of `float`; it is 16 · 4 bytes long; it may begin at any multiple of 4 bytes; it may look at memory that was declared as something else (`float`, here).
#
# ```c++
# //| export fast/depthwise_steps.cpp
# constexpr int kLanes = 16;
# typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
#
# static Vec at(const float* p) { return *(const Vec*)p; }  // the 16 numbers from here on
#
# extern "C" void step1_lanes(const float* x, const float* w, float* y, Int height, Int width,
#                             Int channels, Int k) {
#   for (Int c = 0; c < channels; c += kLanes)
#     for (Int oy = 0; oy < height; ++oy)
#       for (Int ox = 0; ox < width; ++ox) {
#         Vec sum{};
#         for (Int ky = 0; ky < k; ++ky)
#           for (Int kx = 0; kx < k; ++kx) {
#             const Int iy = oy + ky - k / 2, ix = ox + kx - k / 2;
#             if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
#             sum += at(w + (ky * k + kx) * channels + c) * at(x + (iy * width + ix) * channels + c);
#           }
#         *(Vec*)(y + (oy * width + ox) * channels + c) = sum;
#       }
# }
# ```
#
# Four lines have changed: `c` goes up by 16, `sum` is a vector, and so is what is loaded and stored. The indices are the same as before.

# %%
compare("step1_lanes", "step0_loops")

# %% [markdown]
# ## Step 2: no question in the inner loop
#
# The innermost loop still asks at every tap whether it is inside the image. Chapter 3's padding answers once for all: copy the plane of these 16 channels into a *scratch*, with k / 2 zeros on each side. `pitch` is the length of a row there. What was `oy + ky - k / 2` in the image is `oy + ky` in the scratch.
#
# ```c++
# //| export fast/depthwise_steps.cpp
# static void copy_plane(const float* x, Int height, Int width, Int channels, Int c, Int pad,
#                        Vec* plane) {
#   const Int pitch = width + 2 * pad;
#   for (Int i = 0; i < (height + 2 * pad) * pitch; ++i) plane[i] = Vec{};
#   for (Int iy = 0; iy < height; ++iy)
#     for (Int ix = 0; ix < width; ++ix)
#       plane[(iy + pad) * pitch + ix + pad] = at(x + (iy * width + ix) * channels + c);
# }
#
# extern "C" void step2_scratch(const float* x, const float* w, float* y, Int height, Int width,
#                               Int channels, Int k) {
#   const Int pitch = width + k - 1;
#   std::vector<float> memory((height + k - 1) * pitch * kLanes);
#   Vec* plane = (Vec*)memory.data();
#   for (Int c = 0; c < channels; c += kLanes) {
#     copy_plane(x, height, width, channels, c, k / 2, plane);
#     for (Int oy = 0; oy < height; ++oy)
#       for (Int ox = 0; ox < width; ++ox) {
#         Vec sum{};
#         for (Int ky = 0; ky < k; ++ky)
#           for (Int kx = 0; kx < k; ++kx)
#             sum += at(w + (ky * k + kx) * channels + c) * plane[(oy + ky) * pitch + ox + kx];
#         *(Vec*)(y + (oy * width + ox) * channels + c) = sum;
#       }
#   }
# }
# ```

# %%
compare("step2_scratch", "step1_lanes")

# %% [markdown]
# ## Step 3, by hand
#
# A vector multiply-add takes about four ticks of the clock, but a core can *start* two in every tick (typical of today's x86 and ARM cores; Agner Fog's instruction tables list them). So eight could be under way at a time. In step 2 it is hardly more than one: each `sum += …` needs the sum before it. (One at a time would be an eighth of the most, and the picture on top shows a fifth. A processor looks ahead and begins the next output's sum, but it does not look far.) The way out is to work on several outputs at a time, whose sums do not need each other: on eight at least. With more, each tap is loaded less often.
#
# Four outputs of a row, three taps. Input (1, 2, 3, 4) with a zero on each side, taps (5, 10, 100). Step 2 finishes one output before it begins the next: 5 · 0 + 10 · 1 + 100 · 2 = 210. Step 3 takes one *tap* after another, and adds its products to all four sums:

# %%
plane, taps, sums = [0, 1, 2, 3, 4, 0], [5, 10, 100], [0, 0, 0, 0]
for kx, tap in enumerate(taps):
    for t in range(4):
        sums[t] += tap * plane[t + kx]
    print(f"after kx = {kx}, tap {tap}: {sums}")
assert sums == [210, 325, 440, 55]

# %% [markdown]
# The inner loop is over `t` now. Its four additions are independent, and all of them use the same tap: it is loaded once, not four times.
#
# ## Step 3: rows in registers
#
# In the kernel it is 14 sums, and each of them a vector. A *register* is a place inside the processor for one vector; there are 32 of them (or 16). Fourteen sums, one tap and some inputs fit. And 14 divides 112, 56, 28 and 14, the widths of MixNet's layers. (The last ones are 7 wide. For them there is a shorter row, below.)
#
# Two things are new in the language. The kernel size `K` is a *template parameter*: a number that the compiler knows, so that it writes a function for 3, one for 5, and so on, each with its loops written out. And `#pragma GCC unroll` asks for that writing out: `sums[0]` to `sums[13]` must be 14 registers, and a register cannot be chosen by an index at run time. (The loop over `ky` is left as a loop: it chooses no register, and written out it would only make the code longer.)
#
# ```c++
# //| export fast/depthwise_steps.cpp
# template <int K>
# static void rows(const Vec* plane, const float* w, float* y, Int height, Int width,
#                  Int channels, Int c) {
#   constexpr int kTile = 14;  // the width must be a multiple of 14 in this step
#   const Int pitch = width + K - 1;
#   for (Int oy = 0; oy < height; ++oy)
#     for (Int ox = 0; ox < width; ox += kTile) {
#       Vec sums[kTile] = {};
#       for (int ky = 0; ky < K; ++ky)
# #pragma GCC unroll 16
#         for (int kx = 0; kx < K; ++kx) {
#           const Vec tap = at(w + (ky * K + kx) * channels + c);
# #pragma GCC unroll 16
#           for (int t = 0; t < kTile; ++t) sums[t] += tap * plane[(oy + ky) * pitch + ox + kx + t];
#         }
# #pragma GCC unroll 16
#       for (int t = 0; t < kTile; ++t) *(Vec*)(y + (oy * width + ox + t) * channels + c) = sums[t];
#     }
# }
#
# extern "C" void step3_rows(const float* x, const float* w, float* y, Int height, Int width,
#                            Int channels, Int k) {
#   std::vector<float> memory((height + k - 1) * (width + k - 1) * kLanes);
#   Vec* plane = (Vec*)memory.data();
#   for (Int c = 0; c < channels; c += kLanes) {
#     copy_plane(x, height, width, channels, c, k / 2, plane);
#     if (k == 3) rows<3>(plane, w, y, height, width, channels, c);
#     if (k == 5) rows<5>(plane, w, y, height, width, channels, c);
#     if (k == 7) rows<7>(plane, w, y, height, width, channels, c);
#     if (k == 9) rows<9>(plane, w, y, height, width, channels, c);
#   }
# }
# ```

# %%
compare("step3_rows", "step2_scratch")

# %% [markdown]
# ## What the compiler makes of it
#
# Compile the steps to a library and let `objdump -d -M intel` show it. Here is the inner loop of step 2, as GCC 12 writes it for AVX-512. `zmm0` to `zmm31` are the vector registers; `vfmadd231ps a, b, c` is a += b · c, lane by lane.
#
# ```text
# vmovups     zmm1, [rcx]          ; load the tap
# add         rcx, 64              ; to the next input
# vfmadd231ps zmm0, zmm1, [rdi]    ; the sum, in zmm0
# add         rdi, rbx
# cmp         r11, rcx
# jne         ...                  ; six instructions for one multiply-add
# ```
#
# In every turn the sum is the same register, `zmm0`: that is the waiting. And here is one tap of step 3, for 3×3 kernels:
#
# ```text
# vmovups     zmm1, [rax+r9*8]        ; load the tap, once
# vfmadd231ps zmm14, zmm1, [rdx+192]  ; fourteen sums, each in its own register
# vfmadd231ps zmm13, zmm1, [rdx+256]
# vfmadd231ps zmm12, zmm1, [rdx+320]
# ...                                 ; and eleven more; no question, no counting
# ```
#
# No register is named twice on the left, so none waits for another. In the version for 9×9 kernels GCC goes further: most of the inputs stay in registers from one tap to the next.
#
# **13.1** ★ *5 minutes, one line.* In step 2 every multiply-add loads two vectors, a tap and an input. In step 3 a tap is loaded once for a whole row of sums. How many loads for each multiply-add are left with T sums?
#
# <details><summary>Hint: the idea</summary>
#
# Count one turn of the loop over `kx`: how many loads, how many multiply-adds?
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def loads(tile: int) -> float:
    raise NotImplementedError


def test_loads(answer) -> None:
    expect(answer, 1, gives=2.0, why="with one sum, a tap and an input")
    expect(answer, 4, gives=1.25, why="one tap and four inputs for four multiply-adds")
    expect(answer, 14, gives=15 / 14, why="one tap and fourteen inputs for fourteen")


attempt(loads, test_loads)


# %% tags=["solution"]
# fold: Solution
def loads_solution(tile: int) -> float:
    return (1 + tile) / tile  # a tap, and an input for each sum


def every_time(tile: int) -> float:
    """load the tap again for each sum"""
    return 2.0


def taps_only(tile: int) -> float:
    """forget that each sum has an input of its own"""
    return 2 / tile


attempt(loads_solution, test_loads, wrong=[every_time, taps_only])

# %% [markdown]
# ## What each step bought
#
# The stored times, in microseconds, for one image and one thread. The last row is the size of the padded plane.

# %%
from mixconv.teaching import table

titles = ["{size}² × {channels}, {kernel_size}×{kernel_size}".format(**layer) for layer in layers]
sizes = [(layer["size"] + layer["kernel_size"] - 1) ** 2 * 64 for layer in layers]
table(
    ["step", *titles],
    [
        *([step, *(f"{1e6 * r['seconds'][step]:.0f}" for r in layers)] for step in STEPS),
        ["bytes of the plane", *(f"{size / 1024:.0f} kB" for size in sizes)],
    ],
)

# %% [markdown]
# And as factors, each step against the one before it. One thing must be known to read them: steps 0 and 1 leave out the taps that fall outside the image, and steps 2 and 3 multiply zeros there.

# %%
from itertools import pairwise


def part_inside(size: int, k: int) -> float:
    """Of all taps of all outputs, those in the image: as many columns as rows."""
    rows = sum(0 <= oy + ky - k // 2 < size for oy in range(size) for ky in range(k))
    return (rows / (size * k)) ** 2


inside = [part_inside(layer["size"], layer["kernel_size"]) for layer in layers]
print("taps inside the image: " + ", ".join(f"{100 * part:.0f}%" for part in inside))


# %%
def gains(before: str, after: str) -> list[float]:
    return [layer["seconds"][before] / layer["seconds"][after] for layer in layers]


print(f"on {machine['cpu']}, {machine['vectors']}")
for pair in pairwise(STEPS):
    print(f"step {pair[1]}: " + ", ".join(f"{gain:.1f}" for gain in gains(*pair)))
rates = [gain / part for gain, part in zip(gains(*STEPS[1:3]), inside, strict=True)]
print("step 2 for a tap inside the image: " + ", ".join(f"{rate:.1f}" for rate in rates))
best = max(speed(layer, STEPS[-1]) for layer in layers) / 1e9
print(f"at best {best:.0f} of {peak:.0f} billion multiply-adds a second")


# %% [markdown]
# Read it with the reasons in mind.
#
# - **Step 1** can gain as many times as a register has lanes: 16 with AVX-512, 8 with AVX, 4 with the oldest or on ARM. It may be a little more. Step 0 also asks its questions and computes its indices for each single number, step 1 once for sixteen. And memory hands out 64 bytes at a time, a *cache line*, of which step 0 uses one number and step 1 all sixteen.
# - **Step 2** multiplies the zeros that step 1 left out. For a tap that is inside the image it is about as fast as step 1 (the last line but one above): processors guess the outcome of a border test, and guess well, so leaving the question out saves little. Step 2 is not there for its own sake. It is what makes step 3 possible: 14 sums side by side cannot each ask.
# - **Step 3** gains what the sums had waited for one another, and the taps that are loaded once for 14 outputs. The larger the kernel, the larger the part of the time that is spent in sums, and the more step 3 gains.
# - **The copy** costs most where the kernel is small and the plane is large. The *first-level cache*, the fastest memory beside the registers, holds some tens of kilobytes for each core. A plane that does not fit must be fetched from the next level at every output row. Chapter 14 keeps k rows instead of the plane.

# %% [markdown]
# ## Vectors as wide as the machine's
#
# In the steps a vector always had 16 lanes. Where the machine's registers have 8, the compiler makes two of each, and 14 sums need 28 registers of 16: they do not fit, and are written to memory and read again all the time. So the kernel of the next chapter chooses, when it is compiled:
#
# | machine | lanes | registers | sums in a row |
# |---|---:|---:|---:|
# | AVX-512 | 16 | 32 | 14 |
# | AVX | 8 | 16 | 7 |
# | ARM, 64 bits | 4 | 32 | 14 |
# | others | 4 | 16 | 7 |
#
# **13.2** ★★ *10 minutes, two lines.* A row of outputs is computed in tiles of so many sums. Those beyond the row's end are computed, too, and thrown away. What part of all sums is that? (Then see why `simd.cpp` below has a `kShortTile`.)
#
# <details><summary>Hint: the idea</summary>
#
# Round the width up to whole tiles: so many sums are computed, and `width` of them count.
#
# </details>

# %%
def thrown_away(width: int, tile: int) -> float:
    raise NotImplementedError


def test_thrown(answer) -> None:
    expect(answer, 7, 14, gives=0.5, why="14 sums for 7 outputs")
    expect(answer, 10, 14, gives=4 / 14, why="14 sums for 10 outputs")
    for width in (112, 56, 28, 14):
        expect(answer, width, 14, gives=0.0, why="14 divides it")
    expect(answer, 15, 7, gives=6 / 21, why="three tiles for 15 outputs")


attempt(thrown_away, test_thrown)


# %% tags=["solution"]
# fold: Solution
def thrown_away_solution(width: int, tile: int) -> float:
    computed = -(-width // tile) * tile  # whole tiles
    return 1 - width / computed


def over_the_outputs(width: int, tile: int) -> float:
    """divide by the outputs that count, and not by all sums"""
    return -(-width // tile) * tile / width - 1


def kept_of_the_last(width: int, tile: int) -> float:
    """take what the last tile keeps for what it throws away"""
    return width % tile / (-(-width // tile) * tile)


attempt(thrown_away_solution, test_thrown, wrong=[over_the_outputs, kept_of_the_last])

# %% [markdown]
# All of this is in `simd.cpp`, which comes before the kernel's own files. The lines with `#if` are decided before anything is compiled: the compiler defines `__AVX512F__` if it may use AVX-512. `namespace {` keeps the names in this file to itself.
#
# ```c++
# //| export fast/simd.cpp
# // Vectors of float32 as wide as the machine's: load, store, activations.
# #include <cstdint>
# #include <cstring>
# #include <initializer_list>
#
# namespace {
#
# #if defined(__AVX512F__)
# constexpr int kLanes = 16, kTile = 14;
# #elif defined(__AVX__)
# constexpr int kLanes = 8, kTile = 7;
# #elif defined(__aarch64__)
# constexpr int kLanes = 4, kTile = 14;
# #else
# constexpr int kLanes = 4, kTile = 7;
# #endif
# constexpr int kShortTile = 7;  // MixNet's last layers are 7 pixels wide
#
# typedef float Vec __attribute__((vector_size(kLanes * 4)));
# typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
# typedef float LooseVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
# ```
#
# `LooseVec` is the `Vec` of the steps, which may begin anywhere. `Vec` itself begins at a multiple of its length, as scratch memory does. `IntVec` is for the bits of floats.
#
# **Loading and storing.** A group may have 13 channels. Then a vector has 13 lanes that count, and the others must not be written, and at the end of a tensor not even be read. 13 = 8 + 4 + 1: so three copies, whose lengths the compiler knows. The template below asks for half the size each time, down to 1. (`lanes & 8` is 8 if 13 = 8 + 4 + 1 contains an 8, and else 0; `reinterpret_cast` reads the same bytes as another type; `inline` asks that the code be put where it is called.)
#
# Why would one `skip` lanes? So as not to read past the end of a tensor, chapter 14's last vector begins some channels earlier, among its neighbour's. Only its own lanes, from `skip` on, may be stored. With 20 channels and 16 lanes, the second vector begins at channel 20 − 16 = 4. Its first 12 lanes are channels 4 to 15, which the first vector has stored. So `skip` is 12, and `lanes` 4. In a whole vector all lanes are its own, and `skip` is 0.
#
# ```c++
# //| export fast/simd.cpp
# template <int Size = kLanes>
# inline void copy_lanes(float* to, const float* from, int lanes) {  // kLanes, kLanes / 2, ..., 1
#   if (lanes & Size) std::memcpy(to, from, Size * sizeof(float));
#   if constexpr (Size > 1)
#     copy_lanes<Size / 2>(to + (lanes & Size), from + (lanes & Size), lanes);
# }
#
# inline Vec load(const float* from, int lanes) {
#   if (lanes == kLanes) return *reinterpret_cast<const LooseVec*>(from);
#   Vec v{};
#   copy_lanes(reinterpret_cast<float*>(&v), from, lanes);
#   return v;
# }
#
# // Lanes from `skip` on. By value: taking an address would drive the sums out of their registers.
# inline void store(float* to, Vec v, int skip, int lanes) {
#   if (lanes == kLanes) *reinterpret_cast<LooseVec*>(to) = v;
#   else copy_lanes(to, reinterpret_cast<const float*>(&v) + skip, lanes);
# }
# ```
#
# ## An exponential of a vector
#
# After the sums comes the activation. ReLU is a comparison. SiLU is $x / (1 + e^{-x})$, and C++ has no exponential of a vector. Take the number apart: with $n$ the integer nearest to $x / \ln 2$,
#
# $$
# e^x = 2^n \cdot e^r, \qquad r = x - n \ln 2, \qquad |r| \le \tfrac{1}{2} \ln 2 \approx 0.35
# $$
#
# **By hand**, for $x = 3$: $3 / \ln 2 = 4.33$, so $n = 4$ and $r = 3 - 4 \cdot 0.6931 = 0.2274$. For so small an $r$ the series $1 + r + r^2/2 + r^3/6 + \ldots$ is good after few terms: 1 + 0.2274 + 0.0259 + 0.0020 = 1.2553. And $16 \cdot 1.2553 = 20.085$.
#
# How many terms? A float32 is exact to one part in 17 million (6 · 10⁻⁸).

# %% tags=["drawing"]
# fold: The code that draws this
import math

import numpy as np

rest = np.linspace(-math.log(2) / 2, math.log(2) / 2, 400)
errors = {}
for degree in (3, 5, 6, 7):
    series = sum(rest**i / math.factorial(i) for i in range(degree + 1))
    errors[degree] = np.maximum(np.abs(series / np.exp(rest) - 1), 1e-12)
figure, axis = plt.subplots(figsize=(6.6, 3.1))
for degree, shade in zip(errors, ("#bbbbbb", "#888888", "#555555", "black"), strict=True):
    axis.plot(rest, errors[degree], color=shade)
    axis.text(
        rest[-1] + 0.01, errors[degree][-1], f"up to r{'⁰¹²³⁴⁵⁶⁷'[degree]}", va="center", fontsize=8
    )
axis.plot(rest[[0, -1]], [2**-24] * 2, color="#D55E00", lw=1, ls="--")
axis.text(0, 2**-24 * 1.5, "rounding of a float32", color="black", ha="center", fontsize=8)
axis.set(yscale="log", ylim=(1e-11, 1e-2), xlim=(-0.37, 0.44))
axis.set(xlabel="r", ylabel="relative error of the series")
assert max(errors[6]) > 2**-24 > 5 * max(errors[7])
show(
    figure,
    "exponential_error.png",
    f"Relative error of the exponential series over r from {rest[0]:.2f} to {rest[-1]:.2f}, on a "
    "log scale. Up to the sixth power the error still exceeds a float32's rounding at the ends; up "
    "to the seventh it is below it everywhere.",
    caption="Up to r⁷ the series is nowhere worse than a float32's rounding; up to r⁶ it is, at "
    "the ends.",
)

# %% [markdown]
# Up to $r^7$. Two tricks remain, and both use how a float is stored.
#
# **Rounding to an integer.** Floats near $1.5 \cdot 2^{23}$ are whole numbers: there is no bit left for halves. Adding that number rounds, and leaves $n$ in the last bits.
#
# **Two to the n.** A float's exponent is stored from bit 23 on, with 127 added. So $2^n$ is the integer $(n + 127) \cdot 2^{23}$, read as a float. For $x = 3$:

# %%
large = torch.tensor(1.5 * 2**23)
shifted = torch.tensor(3 / math.log(2)) + large
n = shifted.view(torch.int32) - large.view(torch.int32)
power = ((n + 127) << 23).view(torch.float32)
print(f"n from the last bits: {n}, from a subtraction: {shifted - large:.0f}")
print(f"2^n from the exponent's bits: {power:.0f}")
assert hex(large.view(torch.int32)) == "0x4b400000"

# %% [markdown]
# Now `exp_vec` reads line by line. The series is computed from the inside, `((r/5040 + 1/720) · r + 1/120) · r + …`: a multiply-add for each term. Arguments are kept between −87 and 87, where the result is an ordinary float. ln 2 is subtracted in two parts, the first of which has so few bits that its product with n is exact.
#
# ```c++
# //| export fast/simd.cpp
# // n is the nearest integer to x / ln 2, so |r| <= ln 2 / 2.
# inline Vec exp_vec(Vec x) {
#   x = x < 87.0f ? x : Vec{} + 87.0f;  // a NaN becomes 87
#   x = x > -87.0f ? x : Vec{} - 87.0f;
#   const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the last bits
#   Vec shifted = x * 1.44269504f + kRound;
#   Vec n = shifted - kRound;
#   Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact
#   Vec p = Vec{} + 1.0f / 5040;
#   for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
#     p = p * r + term;
#   IntVec power = (reinterpret_cast<IntVec>(shifted) - 0x4B400000 + 127) << 23;
#   return p * reinterpret_cast<Vec>(power);
# }
# ```
#
# A comparison of vectors gives a vector of answers, and `? :` chooses lane by lane. So there is no `if` for a lane; both sides are computed, and one is taken.
#
# Below $x = -80$ the sigmoid counts as zero. Left as it is, less than $10^{-34}$, it would soon be multiplied into *denormal* numbers, which take a processor many times as long as others. A NaN stays a NaN, so that a broken network does not look healthy. (One case differs from PyTorch: its SiLU of −∞ is NaN, since −∞ · 0 is. Here it is 0, the limit.)
#
# ```c++
# //| export fast/simd.cpp
# enum Activation { kNone = 0, kRelu = 1, kSilu = 2, kRelu6 = 3, kSigmoid = 4 };
# constexpr float kLowest = -80;  // below, a sigmoid counts as zero
#
# template <int T>
# inline __attribute__((always_inline)) void activate(Vec (&sums)[T], int64_t activation) {
# #pragma GCC unroll 16
#   for (int t = 0; t < T; ++t) {
#     if (activation == kRelu || activation == kRelu6)
#       sums[t] = sums[t] < 0.0f ? Vec{} : sums[t];  // written so that a NaN stays
#     if (activation == kRelu6) sums[t] = sums[t] > 6.0f ? Vec{} + 6.0f : sums[t];
#     if (activation == kSilu || activation == kSigmoid) {
#       const Vec above = activation == kSilu ? sums[t] : Vec{} + 1.0f;
#       const Vec value = above / (1.0f + exp_vec(-sums[t]));
#       const Vec kept = sums[t] == sums[t] ? value : sums[t];  // a NaN stays
#       sums[t] = sums[t] < kLowest ? Vec{} : kept;
#     }
#   }
# }
#
# }  // namespace
#
# // y = activation of x: for the chapter and the tests to look at.
# extern "C" void simd_activate(const float* x, float* y, int64_t count, int64_t activation) {
#   for (int64_t i = 0; i < count; i += kLanes) {
#     const int lanes = count - i < kLanes ? int(count - i) : kLanes;
#     Vec sums[1] = {load(x + i, lanes)};
#     activate(sums, activation);
#     store(y + i, sums[0], 0, lanes);
#   }
# }
# ```
#
# (`Vec (&sums)[T]` is how C++ hands over an array of T vectors without a copy; `always_inline` keeps them in their registers.)
#
# Is it right? Against PyTorch in float64, for 100,001 numbers from −100 to 100, and for the odd ones. The count is no multiple of 16, so the last vector is a partial one.

# %%
simd = load_library("simd.cpp")


def activate(x: torch.Tensor, activation: int) -> torch.Tensor:
    y, numbers = torch.empty_like(x), map(ctypes.c_int64, (x.numel(), activation))
    simd.simd_activate(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), *numbers)
    return y


# %%
x = torch.linspace(-100, 100, 100_001)
odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
functions = {"relu": F.relu, "silu": F.silu, "relu6": F.relu6, "sigmoid": torch.sigmoid}
for number, (name, function) in enumerate(functions.items(), start=1) if simd else ():
    exact = function(x.double())
    seen, y = (x >= -80) & (exact != 0), activate(x, number)
    assert ((y - exact)[seen] / exact[seen]).abs().max() < 4 * 2**-23, name
    assert not y[~seen].any()  # below -80, and where ReLU cuts
    expected = torch.where(odd == -math.inf, torch.tensor(0.0), function(odd))
    torch.testing.assert_close(activate(odd, number), expected, equal_nan=True)
verdict = (
    "relative error below 4 last places, and 0 below -80"
    if simd
    else "not compared, for want of a compiler"
)
print(f"{verdict}: " + ", ".join(functions))

# %% [markdown]
# ## Exercises
#
# Somebody has typed step 0 with one wrong index, three times. Each time the program ran on an image of 4×6 pixels and 2 channels that is zero but for a single 1, in row 1 and column 2 of both channels. The taps of channel 0 are 1 to 9, row by row, those of channel 1 are ten times that. Here is what the right program prints, and what the three print.

# %% tags=["plumbing"]
# fold: The five typed lines
RIGHT = {
    "iy": "oy + ky - k / 2",
    "w": "w[(ky * k + kx) * channels + c]",
    "x": "x[(iy * width + ix) * channels + c]",
}
WRONG = {
    "A": {"iy": "oy + ky"},
    "B": {"w": "w[(kx * k + ky) * channels + c]"},
    "C": {"w": "w[(ky * k + kx) * channels]"},
    "D": {"x": "x[(iy * height + ix) * channels + c]"},
    "E": {"w": "w[(ky * k + ky) * channels + c]"},
}


# %% tags=["plumbing"]
# fold: What runs them, in Python
def run_typed(typed: dict[str, str]) -> list[list[list[int]]]:
    """Step 0, in Python, with some of its lines as typed; two channels of four rows."""
    names = {"channels": 2, "height": 4, "width": 6, "k": 3}
    names["x"] = [int(place // 2 == 1 * 6 + 2) for place in range(4 * 6 * 2)]
    names["w"] = [(1 + place // 2) * (1, 10)[place % 2] for place in range(3 * 3 * 2)]
    code = {name: text.replace("/", "//") for name, text in {**RIGHT, **typed}.items()}
    y = torch.zeros(2, 4, 6, dtype=torch.int64)
    for c, oy, ox, ky, kx in product(*map(range, (2, 4, 6, 3, 3))):
        names.update(c=c, oy=oy, ox=ox, ky=ky, kx=kx)
        names["iy"], names["ix"] = eval(code["iy"], names), ox + kx - 1
        if 0 <= names["iy"] < 4 and 0 <= names["ix"] < 6:
            y[c, oy, ox] += eval(code["w"], names) * eval(code["x"], names)
    return y.tolist()


# %% tags=["plumbing"]
# fold: How two channels are printed
def print_planes(title: str, planes: list[list[list[int]]]) -> None:
    print(title)
    for rows in zip(*planes, strict=True):
        print("     ".join("".join(f"{value:3}" for value in row) for row in rows))


# %%
PRINTED = {
    "first": [
        [[0, 0, 0, 9, 8, 7], [8, 7, 0, 6, 5, 4], [5, 4, 0, 3, 2, 1], [2, 1, 0, 0, 0, 0]],
        [
            [0, 0, 0, 90, 80, 70],
            [80, 70, 0, 60, 50, 40],
            [50, 40, 0, 30, 20, 10],
            [20, 10] + 4 * [0],
        ],
    ],
    "second": [
        [[0, 9, 9, 9, 0, 0], [0, 5, 5, 5, 0, 0], [0, 1, 1, 1, 0, 0], 6 * [0]],
        [[0, 90, 90, 90, 0, 0], [0, 50, 50, 50, 0, 0], [0, 10, 10, 10, 0, 0], 6 * [0]],
    ],
    "third": 2 * [[[0, 9, 8, 7, 0, 0], [0, 6, 5, 4, 0, 0], [0, 3, 2, 1, 0, 0], 6 * [0]]],
}
print_planes("right", run_typed({}))
for which, planes in PRINTED.items():
    print_planes(which, planes)


# %% [markdown]
# **13.3** ★★★ *20 minutes, one line.* Which of these lines is the wrong one in the first, the second and the third program? (Each stands in the place of step 0's line that it resembles.)
#
# - **A** `const Int iy = oy + ky;`
# - **B** `w[(kx * k + ky) * channels + c]`
# - **C** `w[(ky * k + kx) * channels]`
# - **D** `x[(iy * height + ix) * channels + c]`
# - **E** `w[(ky * k + ky) * channels + c]`
#
# <details><summary>Hint: the idea</summary>
#
# The right program prints the kernel turned by half a turn, around the 1. Ask of each print: has something *moved* (then the wrong index is of the image), or has it other *values* (then of the weights)?
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# The first: what leaves on the right comes back on the left, one row lower. In memory all of it has moved by the same number of places. Which of the lines would put row 1 at another place, and column 2 not?
#
# </details>

# %%
def wrong_lines() -> tuple[str, str, str]:
    """The letters of the first, the second and the third."""
    raise NotImplementedError


def test_lines(answer) -> None:
    for letter, (which, printed) in zip(answer(), PRINTED.items(), strict=True):
        assert run_typed(WRONG[letter]) == printed, f"{letter} does not print the {which}"


attempt(wrong_lines, test_lines)


# %% tags=["solution"]
# fold: Solution
def wrong_lines_solution() -> tuple[str, str, str]:
    # First: row 1 begins at 4 · 1 and not at 6 · 1, so all stands two places further.
    # Second: a row of the output holds one tap only, 9, 5 or 1: those with kx = ky.
    # Third: both channels have the taps of channel 0.
    return "D", "E", "C"


def moved_by_rows() -> tuple[str, str, str]:
    """blame `iy` for what has moved: A would move it up by a row, and not to the right"""
    return "A", "E", "C"


def turned() -> tuple[str, str, str]:
    """take three equal columns for a kernel that was mirrored"""
    return "D", "B", "C"


attempt(wrong_lines_solution, test_lines, wrong=[moved_by_rows, turned])

# %% [markdown]
# ## Takeaways
# - The layout comes first: with channels last, sixteen neighbours in memory need the same arithmetic.
# - A sum that waits for itself leaves most of a core idle. Fourteen sums side by side keep it busy.
# - A rewrite changes one thing, and is compared with the step before it. An image with a single 1 shows which index is wrong.
# - An exponential is a power of two, which is free, times a short series.
#
# **Further reading**: Drepper, *What every programmer should know about memory* (2007), for caches; GCC's manual on [vector extensions](https://gcc.gnu.org/onlinedocs/gcc/Vector-Extensions.html), for lanes.
#
# Previous: [12 · The operation](12_operation.ipynb) · Next: [13 · A kernel, compiled](13_kernel_in_steps_compiled.ipynb)
