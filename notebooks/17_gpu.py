# %% [markdown]
# # 17 · On a GPU
#
# A graphics card has thousands of lanes and one wish: that neighbouring lanes read neighbouring addresses. What becomes of the mixed layer there?
#
# > ✏️ **Ours.** No GPU was at hand when this was written. The interpreter has checked what the kernel computes, and Triton's compiler has made GPU code of it. Nothing here says how fast that is, and no number is published.
#
# The picture below shows how the work is cut: each rectangle is one *program*, a tile of 4 rows and 8 columns of pixels for 32 neighbouring channels of one group. All groups start in one launch.
#
# **You will be able to**
# - say why channels last suits a GPU for the same reason as it suits a CPU;
# - read a kernel in Triton, and see what it does without a GPU;
# - add a form for another device to the operation.
#
# **Know first:** [chapter 12](12_operation.ipynb) for forms, [chapter 13](13_kernel_in_steps.ipynb) for the loops.
#
# **Time:** 15 minutes to read. Runs in under 60 seconds on two cores.

# %%
import os

# Triton reads this when it is imported, and PyTorch may import it at any time: so, first.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidia0") else "1")
print("interpreted" if os.environ["TRITON_INTERPRET"] == "1" else "on a GPU")

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style

use_style()
figure, axes = plt.subplots(1, 4, figsize=(8.3, 2.3))
for axis, (k, channels) in zip(axes, ((3, 64), (5, 64), (7, 32), (9, 32)), strict=True):
    for layer in reversed(range(channels // 32)):
        for row in range(3):
            for column in range(2):
                corner = (column * 8 + 1.6 * layer, row * 4 + 1.2 * layer)
                axis.add_patch(plt.Rectangle(corner, 7.4, 3.5, color=kernel_color(k),
                                             alpha=0.55 if layer else 0.95))  # fmt: skip
    axis.set(xlim=(-0.5, 18.5), ylim=(14, -0.5), title=f"{k}×{k}\n")
    axis.set_xlabel(f"{channels} channels:\n{channels // 32 * 6} programs")
    if k == 3:
        axis.set_ylabel("rows of pixels")
        axis.text(7.7, -0.9, "columns", ha="center", fontsize=9)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
show(
    figure,
    "programs_on_a_gpu.png",
    "A layer with groups of 64, 64, 32 and 32 channels, cut into programs: tiles of pixels by 32 "
    "channels. The groups with 64 channels are two tiles deep, those with 32 one.",
    caption="Every group is cut into programs of one size, so that all can start together: 64 "
    "channels are two programs deep. (The gaps only tell them apart.)",
)

# %% [markdown]
# ## The same reason as before
#
# A GPU computes in *warps*, 32 lanes that do the same thing at the same time. It reads memory in runs, too: if the lanes of a warp want 32 neighbouring numbers, one run or a few serve them all. If the lanes are neighbouring pixels of a row, then a stride of 2, a padded border, or a row of 14 spoils the run. If they are neighbouring *channels* of one pixel, then every lane does the same thing, whatever the width, stride or padding. So: channels last, again.
#
# By hand: 14×14 pixels of 90 channels each, one group. Tiles of 4×8 pixels cover 14×14 with 4 · 2 = 8 of them, and 90 channels take 3 programs each: 32, 32 and 26 channels. 24 programs.
#
# A launch for each group would run the groups one after another, and a small group cannot fill the card. So all start at once: a *table* has a row for each 32 channels, and tells a program which group it works on.

# %%
#| export fast/gpu.py
"""The operation on a GPU: one launch for all groups, by Triton (ours; chapter 17).

Importing this does not import Triton; the kernel itself is in `gpu_kernel.py`.
"""

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

LANES = 32  # channels of a program


class GpuGroup(NamedTuple):
    """One group of a layer, as the kernel's table tells it."""

    channels: int
    kernel_size: int
    dilation: int
    top: int
    left: int


def table_rows(groups: Sequence[GpuGroup]) -> list[list[int]]:
    """A row for each `LANES` channels of a group; large kernels first, since they take longest.

    Each row: first channel, how many, kernel size, dilation, zeros above and left, where the
    packed weights begin, and the step from one tap to the next.
    """
    rows, first, weight = [], 0, 0
    for channels, size, *rest in groups:
        for start in range(0, channels, LANES):
            count = min(LANES, channels - start)
            rows.append([first + start, count, size, *rest, weight + start, channels])
        first, weight = first + channels, weight + channels * size * size
    return sorted(rows, key=lambda row: -row[2])


@functools.lru_cache(maxsize=256)
def group_table(groups: tuple[GpuGroup, ...], device: torch.device) -> Tensor:
    """`table_rows` on a device, `(rows, 8)`."""
    return torch.tensor(table_rows(groups), dtype=torch.int32, device=device)


# %%
from mixconv.teaching import table

names = ["first", "count", "k", "dilation", "top", "left", "weight", "step"]
table(names, table_rows([GpuGroup(90, 3, 1, 1, 1), GpuGroup(40, 5, 1, 2, 2)]))

# %% [markdown]
# The last row of a group need not be full: 90 channels take 3 · 32 = 96 lanes, and 40 take 64. How many lanes idle in MixNet-S?

# %%
from mixconv import MixConv2d, mixnet_s

layers = [block.depthwise.conv for block in mixnet_s().blocks]
convs = [c for one in layers for c in (one.convs if isinstance(one, MixConv2d) else [one])]
groups = [conv.out_channels for conv in convs]
lanes = [-(-count // LANES) * LANES for count in groups]
idle = 1 - sum(groups) / sum(lanes)
print(f"{100 * idle:.0f}% of the lanes are idle")

# %% [markdown]
# Fewer channels to a program would leave fewer lanes idle, and load fewer at once; only a card could say what is better.
#
# ## The kernel
#
# Triton compiles a Python-like function for the GPU. What looks like a number in it may be a *block* in Triton's sense: a small array, worked on as a whole. (Triton does not understand type hints; hence none.)
#
# The package does not need Triton. Without a GPU, Triton can interpret its kernels on the CPU, slowly; that is why the first cell set a variable. Where Triton is not installed, the next cells define functions that nobody calls.

# %%
#| export fast/gpu_kernel.py
"""The kernel of `gpu.py`, in Triton: channels last, sums in float32 (ours; chapter 17).

Without Triton the module still imports; `AVAILABLE` says whether it can be used.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

AVAILABLE = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if AVAILABLE else None
tl: Any = importlib.import_module("triton.language") if AVAILABLE else None
constexpr: Any = tl.constexpr if AVAILABLE else int  # known when the kernel is compiled
_jit: Callable[[Callable[..., Any]], Any] = triton.jit if AVAILABLE else lambda f: f


# %% [markdown]
# The taps: for each, one row of weights and one tile of inputs, with zeros outside the image.

# %%
#| export fast/gpu_kernel.py
@_jit
def _sum_taps(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, group, oy, ox, lanes, height, width, channels, stride, sums
):
    count, size, dilation, top, left, step = group
    used = lanes < count
    for ky in range(0, size):
        iy = oy * stride + ky * dilation - top
        for kx in range(0, size):
            ix = ox * stride + kx * dilation - left
            inside = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
            tap = tl.load(weight_ptr + (ky * size + kx) * step + lanes, mask=used, other=0.0)
            at = x_ptr + (iy * width + ix)[:, None] * channels + lanes[None, :]
            value = tl.load(at, mask=inside[:, None] & used[None, :], other=0.0)
            sums += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    return sums


# %% [markdown]
# Then the activation, by its place in `ACTIVATIONS`:

# %%
#| export fast/gpu_kernel.py
@_jit
def _activate(sums, activation):  # type: ignore[no-untyped-def]
    if activation == 1:
        sums = tl.where(sums < 0, 0.0, sums)  # written so that a NaN stays
    elif activation == 2:
        sums = sums / (1.0 + tl.exp(-sums))
    elif activation == 3:
        sums = tl.where(sums < 0, 0.0, tl.where(sums > 6, 6.0, sums))
    return sums


# %% [markdown]
# A program: find the group in the table, find the tile, sum, add the bias, store.

# %%
#| export fast/gpu_kernel.py
@_jit
def _read_group(entry):  # type: ignore[no-untyped-def]
    first, count, size = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    dilation, top, left = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    return first, tl.load(entry + 6), (count, size, dilation, top, left, tl.load(entry + 7))


# %%
#| export fast/gpu_kernel.py
@_jit
def _mixed_depthwise(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, y_ptr, table_ptr,
    height, width, channels, out_height, out_width, tiles,
    stride: constexpr, has_bias: constexpr, activation: constexpr,
    rows: constexpr, columns: constexpr, lanes_: constexpr,
):  # fmt: skip
    first, start, group = _read_group(table_ptr + tl.program_id(1) * 8)
    image, lanes, tile = tl.program_id(2).to(tl.int64), tl.arange(0, lanes_), tl.program_id(0)
    pixels = tl.arange(0, rows * columns)
    oy = tile // tiles * rows + pixels // columns
    ox = tile % tiles * columns + pixels % columns
    x_ptr += image * height * width * channels + first
    sums = tl.zeros((rows * columns, lanes_), dtype=tl.float32)
    sums = _sum_taps(
        x_ptr, weight_ptr + start, group, oy, ox, lanes, height, width, channels, stride, sums
    )  # fmt: skip
    if has_bias:
        sums += tl.load(bias_ptr + first + lanes, mask=lanes < group[0], other=0.0)[None, :]
    at = (image * out_height + oy) * out_width + ox
    to = y_ptr + at[:, None] * channels + first + lanes[None, :]
    written = ((oy < out_height) & (ox < out_width))[:, None] & (lanes < group[0])[None, :]
    tl.store(to, _activate(sums, activation).to(y_ptr.dtype.element_ty), mask=written)


# %% [markdown]
# Watch one of them, with the same lines on tensors: tile 3 of an image of 14×14 outputs, two tiles to a row.

# %%
tile, tiles, rows, columns = 3, 2, 4, 8
pixels = torch.arange(rows * columns)
oy = tile // tiles * rows + pixels // columns
ox = tile % tiles * columns + pixels % columns
print("rows", sorted(set(oy.tolist())), "columns", sorted(set(ox.tolist())))
print("written:", int(((oy < 14) & (ox < 14)).sum()), "of", len(pixels), "pixels")

# %% [markdown]
# Columns 14 and 15 do not exist: they are computed and not written. A program holds a sum for each pixel and lane, 32 · 32 = 1,024 of them, which a card keeps in registers, 8 in each of 4 warps' lanes: 1,024 / (4 · 32) = 8. That is why a tile is small. Whether 4×8 is the best shape, only a GPU can tell; nothing was tuned.
#
# ## One launch
#
# The grid has three axes: tiles of pixels, rows of the table, images. Tiles have 4×8 pixels, fewer where the image is smaller.

# %%
#| export fast/gpu.py
from mixconv.fast.spec import ACTIVATIONS, MixSpec, output_size, pads


def _groups(spec: MixSpec, height: int, width: int) -> tuple[GpuGroup, ...]:
    around = pads(spec, height, width)
    entries = zip(spec.channels, spec.kernel_sizes, spec.dilations, around, strict=True)
    return tuple(GpuGroup(c, k, d, pad.top, pad.left) for c, k, d, pad in entries)


# %%
#| export fast/gpu.py
def gpu_form(x: Tensor, weight: Tensor, bias: Tensor | None, spec: MixSpec) -> Tensor:
    """The operation by the Triton kernel: summed in float32, output in channels_last.

    Shape:
        Input `(N, C, H, W)`, output `(N, C, ceil(H / stride), ceil(W / stride))`.
    """
    import mixconv.fast.gpu_kernel as kernel  # imports Triton: only for those who use it

    x = x.resolve_neg().contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.resolve_neg().contiguous()
    height, width = (output_size(size, spec.stride) for size in x.shape[2:])
    y = torch.empty((*x.shape[:2], height, width), dtype=x.dtype, device=x.device,
                    memory_format=torch.channels_last)  # fmt: skip
    if y.numel():
        groups = group_table(_groups(spec, x.shape[2], x.shape[3]), x.device)
        columns, rows = min(8, _power_of_two(width)), min(4, _power_of_two(height))
        tiles = -(-width // columns)
        kernel._mixed_depthwise[tiles * -(-height // rows), groups.shape[0], x.shape[0]](
            x, weight.resolve_neg().contiguous(), x if bias is None else bias, y, groups,
            *x.shape[2:], x.shape[1], height, width, tiles, stride=spec.stride, lanes_=LANES,
            has_bias=bias is not None, activation=ACTIVATIONS.index(spec.activation),
            rows=rows, columns=columns,
        )  # fmt: skip
    return y


# %%
#| export fast/gpu.py
def _power_of_two(size: int) -> int:
    """The next one, at least `size`."""
    return 1 << (size - 1).bit_length()


# %% [markdown]
# ## As a form
#
# Like the CPU's kernel, it says why it declines. Double precision is one reason: its sums are float32. The grid is another: CUDA counts at most 65,535 programs on its second and on its third axis. ([CUDA's programming guide](https://docs.nvidia.com/cuda/cuda-c-programming-guide/), on the dimensions of a grid.)

# %%
#| export fast/gpu.py
from mixconv.fast.forms import Call, Runner
from mixconv.fast.operation import FORMS

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_NUMBERS = 2**31  # the kernel counts within an image in 32 bits
_MOST_PROGRAMS = 65535  # on the second and third axis of CUDA's grid: rows of the table, images


class GpuForm:
    """Triton's kernel as a form of the operation."""

    name = "triton"

    def declines(self, call: Call) -> list[str]:
        """Why it cannot take a call; nothing if it can."""
        reasons = []
        if call.dtype not in _DTYPES:
            reasons.append(f"it sums in float32, and the tensors are {call.dtype}")
        if call.sizes[1] * call.sizes[2] * call.sizes[3] >= _MOST_NUMBERS:
            reasons.append(f"an image has {_MOST_NUMBERS:,} numbers or more")
        rows = sum(-(-count // LANES) for count in call.spec.channels)
        if max(call.sizes[0], rows) > _MOST_PROGRAMS:
            reasons.append(f"a launch has at most {_MOST_PROGRAMS:,} images and parts of groups")
        if find_spec("triton") is None:
            reasons.append("Triton is not installed")
        return reasons


# %%
#| export fast/gpu.py
class GpuForm(GpuForm):
    def prepare(self, call: Call) -> Runner:
        """A function of x, weight and bias."""

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return gpu_form(x, weight, bias, call.spec)

        return run


FORMS.add("cuda", GpuForm())

# %%
spec = MixSpec((40, 20, 4), (3, 5, 7), 2, (1, 2, 1), "same", "silu")
x_size, parameters = (2, 64, 9, 11), ((40 * 9 + 20 * 25 + 4 * 49,), (64,))
for dtype, images in ((torch.float64, 2), (torch.float16, 2), (torch.float16, 70_000)):
    call = Call(spec, (images, *x_size[1:]), dtype, "cuda", True, 1, parameters)
    reasons = [r for r in GpuForm().declines(call) if "installed" not in r]
    print(dtype, images, "images →", reasons or "taken, where Triton is")

# %% [markdown]
# Is it right? Where Triton is installed, the interpreter (or the GPU) computes this layer, with each activation:

# %%
from mixconv.fast.gpu_kernel import AVAILABLE
from mixconv.fast.spec import split_form

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
tensors = [torch.randn(x_size), torch.randn(parameters[0]) / 5, torch.randn(64)]
for activation in ACTIVATIONS if AVAILABLE else ():
    case = spec._replace(activation=activation)
    with torch.no_grad():
        result = gpu_form(*(t.to(device) for t in tensors), case).cpu()
    torch.testing.assert_close(result, split_form(*tensors, case), rtol=1e-4, atol=1e-4)
agrees = "Triton's kernel agrees with the split form"
print(agrees if AVAILABLE else "not compared: Triton is not installed")

# %% [markdown]
# Gradients are those of chapter 12, group by group: a form computes the forward only.
#
# How fast is it? What can be said without a card is a bound. A 14×14 layer of 360 channels reads and writes 564,480 bytes ([chapter 11](11_why_slow.ipynb)). Suppose that a card moves 2,000 GB a second, and that starting a kernel takes 3 microseconds: both are assumed, to see the order of size. Then the bytes take 0.3 microseconds, at one image the launches are the cost, and one in place of five would be most of what can be gained. That is a thought, and not a measurement; and a recorded graph of launches, which PyTorch offers as CUDA graphs, makes launches cheaper, too.
#
# Against it speaks what the kernel does not do. Chapters 13 and 14 kept rows of the input in a ring. Here each program reads its input anew for each tap, from whatever cache still has it: 9 · 9 = 81 times for a 9×9 kernel. And lanes without a channel do nothing, as counted above.

# %%
layer_bytes = 2 * 14 * 14 * 360 * 4
assert layer_bytes == 564_480
print(f"{layer_bytes / 2000e9 * 1e6:.2f} microseconds at 2,000 GB a second")

# %% [markdown]
# ## Exercises
#
# **17.1** ★ *3 minutes, two lines.* How many programs does a launch have? Tiles of 4×8 pixels, 32 channels of one group each.
#
# <details><summary>Hint: the idea</summary>
#
# Round up on each axis, and for each group by itself: a program never works on two groups.
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def count_programs(batch: int, height: int, width: int, channels: tuple[int, ...]) -> int:
    raise NotImplementedError


def test_programs(answer) -> None:
    expect(answer, 1, 4, 8, (32,), gives=1, why="one tile, one group of 32 channels")
    expect(answer, 1, 14, 14, (90,), gives=24, why="4 · 2 tiles, and 3 programs for 90 channels")
    expect(answer, 2, 14, 14, (90, 90), gives=96, why="twice the images, twice the groups")
    expect(answer, 1, 7, 7, (40, 40), gives=8, why="2 tiles; 40 channels of a group take 2")


attempt(count_programs, test_programs)


# %% tags=["solution"]
# fold: Solution
def count_programs_solution(batch: int, height: int, width: int, channels: tuple[int, ...]) -> int:
    tiles = -(-height // 4) * -(-width // 8)
    return batch * tiles * sum(-(-count // 32) for count in channels)


def all_channels(batch: int, height: int, width: int, channels: tuple[int, ...]) -> int:
    """cut all channels together: two groups may not share a program"""
    return batch * -(-height // 4) * -(-width // 8) * -(-sum(channels) // 32)


def rounded_down(batch: int, height: int, width: int, channels: tuple[int, ...]) -> int:
    """round down: the pixels at the border need a tile, too"""
    return batch * max(1, height // 4) * max(1, width // 8) * sum(-(-c // 32) for c in channels)


attempt(count_programs_solution, test_programs, wrong=[all_channels, rounded_down])


# %% [markdown]
# **17.2** ★★ *5 minutes, one line.* Two lanes of a program read pixel $(y, x)$ of neighbouring channels, or neighbouring pixels $x$ and $x + s$ of one channel, at stride $s$. How many numbers apart do the two reads lie, in a channels-last image of $C$ channels?
#
# <details><summary>Hint: the equation</summary>
#
# Channels last: number $(y, x, c)$ lies at $(y W + x) C + c$.
#
# </details>

# %%
def numbers_apart(lanes: str, channels: int, stride: int) -> int:
    """`lanes` is "channels" or "pixels"."""
    raise NotImplementedError


def test_apart(answer) -> None:
    expect(answer, "channels", 360, 2, gives=1, why="neighbouring channels lie side by side")
    expect(answer, "pixels", 360, 1, gives=360, why="one pixel further are all its channels")
    expect(answer, "pixels", 360, 2, gives=720, why="stride 2 passes over a pixel")


attempt(numbers_apart, test_apart)


# %% tags=["solution"]
# fold: Solution
def numbers_apart_solution(lanes: str, channels: int, stride: int) -> int:
    return 1 if lanes == "channels" else stride * channels


def channels_first(lanes: str, channels: int, stride: int) -> int:
    """think of channels first, where neighbouring pixels of a row lie side by side"""
    return 1 if lanes == "channels" else stride


def no_stride(lanes: str, channels: int, stride: int) -> int:
    """forget the stride"""
    return 1 if lanes == "channels" else channels


attempt(numbers_apart_solution, test_apart, wrong=[channels_first, no_stride])

# %% [markdown]
# ## Takeaways
# - Lanes are channels, on a GPU as on a CPU: then stride, padding and width do not disturb the reads.
# - All groups go in one launch; a table tells each program which group is its own.
# - Another device is another form: what it computes is checked against the split form, and why it declines can be asked.
#
# **Further reading**: Tillet, Kung and Cox, *Triton*, MAPL 2019; [Triton's tutorials](https://triton-lang.org/main/getting-started/tutorials/index.html).
#
# Previous: [16 · A model, rewritten](16_model_rewritten.ipynb) · Next: [18 · Using it](18_using_it.ipynb)
