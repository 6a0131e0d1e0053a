# %% [markdown]
# # 1 · Formulation
#
# Which input channels does an output channel read, and through how large a window? Two questions, and their answers tell all convolutions of this book apart. The picture below answers both, for four layers: an ordinary convolution, a depthwise one, MixConv, and a layer of another project (YOLOv5) that has its name.
#
# **You will be able to**
# - write MixConv as loops, and as a few tensor operations, from the equations of section 3.1;
# - compute its parameters and multiply-adds with a pencil, and how far a stack of layers sees;
# - tell MixConv from a layer that has the same name and is not the same thing.
#
# **Know first:** `nn.Conv2d`, and [chapter 0](00_start_here.ipynb) for the tools.
#
# **Time:** 25 minutes to read. Runs in under 15 seconds on two cores.

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, live, show, use_style

use_style()
layers = {  # for output z: the kernel size, and the channels it reads
    "convolution": lambda z: (3, range(8)),
    "depthwise": lambda z: (3, [z]),
    "MixConv": lambda z: (3 if z < 4 else 5, [z]),
    "YOLOv5's MixConv2d": lambda z: (3 if z < 4 else 5, [z % 4 * 2, z % 4 * 2 + 1]),
}
figure, axes = plt.subplots(1, 4, figsize=(8.3, 2.6))
for axis, (name, reads) in zip(axes, layers.items(), strict=True):
    for z in range(8):
        k, channels = reads(z)
        for channel in range(8):
            color = kernel_color(k) if channel in channels else "#eeeeee"
            axis.add_patch(plt.Rectangle((channel, z), 0.86, 0.86, color=color))
    for z, k in ((1.9, reads(0)[0]), (5.9, reads(7)[0])):
        axis.text(8.2, z, f"{k}×{k}", va="center", fontsize=9)
    axis.set(xlim=(-0.1, 10), ylim=(8, -0.1), aspect="equal", xticks=[], yticks=[])
    axis.set_title(name, fontsize=10, loc="left")
    axis.set_xlabel("input channel", loc="left")
    axis.spines[:].set_visible(False)
axes[0].set_ylabel("output channel")
show(
    figure,
    "four_layers.png",
    "Four 8×8 grids, a coloured cell where an output channel reads an input channel. Convolution: "
    "all cells. Depthwise: the diagonal, all 3×3. MixConv: the diagonal, half of it 3×3 and half "
    "5×5. YOLOv5's layer of the same name: two cells for each output, four outputs with 3×3 "
    "kernels and four with 5×5, so that every kernel size reads all channels.",
    caption="A row is an output channel, a column an input channel. Depthwise layers and MixConv "
    "read their own channel only; in the layer that YOLOv5 calls MixConv2d each output reads "
    "several, as drawn here two.",
)

# %% [markdown]
# ## Three convolutions
#
# A **convolution** looks at all input channels to make one output channel.
# From $c$ to $c$ channels with k×k kernels it has $k^2 c^2$ weights.
#
# A **depthwise convolution** looks at one: output channel $z$ sees input channel $z$ and nothing else. It has $k^2 c$ weights.
# A network then needs a 1×1 (*pointwise*) convolution after it, to let the channels talk.
#
# **MixConv** is a depthwise convolution in which the kernel size depends on the channel.
# The channels are split into groups. Each group has a kernel size of its own.
#
# How does a channel "know" that it needs the large kernel? It does not: which channels get which size is fixed before training, by position.
#
# > ✏️ **Ours.** The pointwise layer *before* can learn to route to those channels what profits from a wide window, and the one after puts the parts together again. [Chapter 9](09_trained_network.ipynb) looks into a trained network.
#
# > 📄 **Paper.** Section 3.1. The next three formulas are the paper's: a depthwise convolution with channel multiplier $m$, the same for group $t$ of a MixConv, and the concatenation.
#
# $$
# Y_{x,y,z} = \sum_{-\frac{k}{2} \le i,j \le \frac{k}{2}} X_{x+i,\ y+j,\ z/m} \cdot W_{i,j,z}, \qquad z = 1, \dots, m \cdot c
# $$
#
# $$
# Y^t_{x,y,z} = \sum_{-\frac{k_t}{2} \le i,j \le \frac{k_t}{2}} X^t_{x+i,\ y+j,\ z/m} \cdot W^t_{i,j,z}, \qquad z = 1, \dots, m \cdot c_t
# $$
#
# $$
# Y = \mathrm{Concat}\left(Y^1, \dots, Y^g\right), \qquad c_1 + \dots + c_g = c
# $$
#
# In the formulas $x$ is also a position: $X_{x,y,z}$ is the value of channel $z$ in row $x$ and column $y$.
#
# What they leave open, we fix as the official code does. $k/2$ rounds down: for $k = 3$, the index $i$ runs over −1, 0, 1.
# The paper counts $z$ from 1, so $z/m$ rounds up: with $m = 2$, outputs 1 and 2 read input 1. Python counts from 0, and there it is `z // m`.
# Positions outside the image count as zero, so the output is as large as the input. (That is stride 1; larger strides are chapter 3's matter.) Like `nn.Conv2d`, this does not flip the kernel.

# %% tags=["drawing"]
# fold: The code that draws this
from matplotlib.patches import FancyArrowPatch

figure, axis = plt.subplots(figsize=(7.5, 4.3))
arrow = {"arrowstyle": "-|>", "mutation_scale": 10, "color": "#555555", "linewidth": 1.2}
for group, k in enumerate((3, 5, 7, 9)):
    color, top = kernel_color(k), 1.35 * group
    for channel in range(4):
        for left, alpha in ((0.0, 0.35), (8.2, 0.9)):
            corner = (left, top + 0.28 * channel)
            axis.add_patch(plt.Rectangle(corner, 1.5, 0.24, color=color, alpha=alpha))
    middle, side = top + 0.54, 0.12 * k
    axis.add_patch(plt.Rectangle((4.6 - side / 2, middle - side / 2), side, side, color=color))
    axis.text(5.4, middle, f"{k}×{k}", va="center", weight="bold")
    for start, stop in ((1.7, 3.8), (6.3, 8.0)):
        axis.add_patch(FancyArrowPatch((start, middle), (stop, middle), **arrow))
words = {
    0.75: "16 channels,\nsplit",
    4.8: "one depthwise convolution\nfor each group",
    8.95: "16 channels,\nconcatenated",
}
for place, word in words.items():
    axis.text(place, -0.25, word, ha="center", va="bottom")
axis.set(xlim=(-0.1, 9.8), ylim=(5.3, -1.0), aspect="equal")
axis.axis("off")
show(
    figure,
    "mixconv_overview.png",
    "Sixteen channels on the left are split into four groups of four. Each group passes through a "
    "depthwise convolution with its own kernel size, 3×3, 5×5, 7×7 or 9×9, and the results are "
    "concatenated to sixteen channels on the right.",
    caption="MixConv is split, one depthwise convolution for each group, and concatenate.",
)

# %% [markdown]
# With one group it is plain depthwise convolution. With two groups or more, one layer sees fine detail and wide context at once.

# %% [markdown]
# ## By hand
#
# Take two channels of 5×5 pixels. Channel 0 counts from 0 to 24. Channel 1 is all ones.
# Give channel 0 a 3×3 kernel of ones and channel 1 a 5×5 kernel of ones. That is a MixConv with $g = 2$, $c_t = 1, 1$ and $k_t = 3, 5$.
#
# With kernels of ones, an output is the sum of its window.

# %%
import torch

x = torch.stack([torch.arange(25.0).view(5, 5), torch.ones(5, 5)])
x

# %% tags=["drawing"]
# fold: The code that draws this
figure, axes = plt.subplots(1, 4, figsize=(7.5, 2.3))
windows = [(0, 3, 2, 2), (0, 3, 0, 0), (1, 5, 2, 2), (1, 5, 0, 0)]
for axis, (channel, k, row, column) in zip(axes, windows, strict=True):
    corner = (column - k / 2, row - k / 2)
    window = plt.Rectangle(corner, k, k, color=kernel_color(k), alpha=0.3, linewidth=0)
    axis.add_patch(window)
    axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, linewidth=2))
    for i in range(5):
        for j in range(5):
            axis.text(j, i, f"{x[channel, i, j]:.0f}", ha="center", va="center", fontsize=8)
    axis.set(xlim=(-2.6, 4.6), ylim=(5.7, -2.6), xticks=[], yticks=[], aspect="equal")
    axis.set_title(f"channel {channel}, {k}×{k}\nat ({row}, {column})", fontsize=9, x=0.64)
    axis.add_patch(plt.Rectangle((-0.5, -0.5), 5, 5, fill=False, color="black", linewidth=0.8))
    inside = x[channel, max(0, row - k // 2) : row + k // 2 + 1, max(0, column - k // 2) :]
    total = inside[:, : column + k // 2 + 1 - max(0, column - k // 2)].sum()
    axis.text(2, 5.3, f"sum {total:.0f}", weight="bold", ha="center", va="center")
    axis.spines[:].set_visible(False)
show(
    figure,
    "by_hand.png",
    "Four copies of a 5×5 grid of numbers with the window of one output shaded: a 3×3 window at "
    "the centre and at a corner of channel 0, a 5×5 window at the centre and corner of channel 1. "
    "At the corner, part of each window lies outside the grid. The sums: 108, 12, 25 and 9.",
    caption="The output at the framed pixel is the sum of the shaded window; what lies outside "
    "the image counts as zero.",
    live=live("Convolution", kernel_sizes=(3, 5), row=2, column=2),
)

# %% [markdown]
# In JupyterLab, run that cell and the figure answers back: point at an output, or step with the arrow keys, and see its window, its weights and its sum. Then change the layer, the kernels, the stride.
#
# Four outputs, by hand:
#
# | channel | at | window | sum |
# |---|---|---|---|
# | 0 | (2, 2) | 6 7 8, 11 12 13, 16 17 18 | 9 · 12 = **108** |
# | 0 | (0, 0) | 0 1, 5 6 (the rest is outside) | 0 + 1 + 5 + 6 = **12** |
# | 1 | (2, 2) | all 25 ones | **25** |
# | 1 | (0, 0) | 3 × 3 ones (the rest is outside) | **9** |

# %% [markdown]
# ## As loops
#
# The equation, symbol for symbol, for one image.

# %%
#| export formulation.py
"""MixConv as its equations say it, and what it costs (paper, section 3.1; chapter 1).

Slow on purpose: the loops are the definition, and what chapter 3's layer is compared with.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_loops(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution, one multiplication at a time.

    Args:
        x: one image.
        weight: kernels of odd size k; output channel z reads input channel z // m.

    Shape:
        x `(C, H, W)`, weight `(m·C, 1, k, k)`, output `(m·C, H, W)`.

    Source: paper, section 3.1.
    """
    (channels, height, width), (outputs, _, k, _) = x.shape, weight.shape
    multiplier, reach = outputs // channels, k // 2
    y = x.new_zeros(outputs, height, width)
    for z in range(outputs):
        for row in range(height):
            for column in range(width):
                for i in range(-reach, reach + 1):
                    for j in range(-reach, reach + 1):
                        if 0 <= row + i < height and 0 <= column + j < width:
                            pixel = x[z // multiplier, row + i, column + j]
                            y[z, row, column] += pixel * weight[z, 0, i + reach, j + reach]
    return y


# %%
y0 = depthwise_loops(x[:1], torch.ones(1, 1, 3, 3))
y0[0, 2, 2], y0[0, 0, 0]


# %% [markdown]
# 108 and 12, as by hand. MixConv is that function once for each group. The weights carry all that is needed: how many there are, and how large, says how the channels are split.

# %%
#| export formulation.py
def mixconv_loops(x: Tensor, weights: Sequence[Tensor], channel_multiplier: int = 1) -> Tensor:
    """MixConv, one multiplication at a time: split, convolve each group, concatenate.

    Args:
        x: one image.
        weights: one tensor of kernels for each group, in channel order.
        channel_multiplier: outputs for each input channel (m in the paper).

    Shape:
        x `(C, H, W)`, weights[t] `(m·c_t, 1, k_t, k_t)`, output `(m·C, H, W)`.

    Source: paper, section 3.1.
    """
    partition = [weight.shape[0] // channel_multiplier for weight in weights]
    groups = x.split(partition)
    outputs = [depthwise_loops(*pair) for pair in zip(groups, weights, strict=True)]
    return torch.cat(outputs)


# %%
weights = [torch.ones(1, 1, 3, 3), torch.ones(1, 1, 5, 5)]
y = mixconv_loops(x, weights)
assert (y[0, 2, 2], y[0, 0, 0], y[1, 2, 2], y[1, 0, 0]) == (108, 12, 25, 9)
y


# %% [markdown]
# Compare the last channel with the figure: 25 in the middle, where the whole 5×5 window lies inside, falling to 9 in the corners.

# %% [markdown]
# ## As tensor operations
#
# Swap the order of the loops. Instead of visiting every output and collecting its window, visit every kernel position (i, j) and add, for all outputs at once, the image shifted by (i, j) times one weight for each channel.
# k² tensor operations remain. This version takes a batch.

# %%
#| export formulation.py
def depthwise_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution as a sum of k² shifted images.

    Shape:
        x `(N, C, H, W)`, weight `(m·C, 1, k, k)` with odd k, output `(N, m·C, H, W)`.
    """
    height, width, k = x.shape[2], x.shape[3], weight.shape[2]
    repeated = x.repeat_interleave(weight.shape[0] // x.shape[1], dim=1)
    padded = F.pad(repeated, [k // 2] * 4)
    y = torch.zeros_like(repeated)
    for i in range(k):
        for j in range(k):
            shifted = padded[:, :, i : i + height, j : j + width]
            y = y + shifted * weight[:, 0, i, j].view(-1, 1, 1)
    return y


# %%
#| export formulation.py
def mixconv_reference(x: Tensor, weights: Sequence[Tensor], channel_multiplier: int = 1) -> Tensor:
    """MixConv from shifted images: equal to the loops, fast enough to compare large layers with.

    Shape:
        x `(N, C, H, W)`, weights[t] `(m·c_t, 1, k_t, k_t)`, output `(N, m·C, H, W)`.
    """
    partition = [weight.shape[0] // channel_multiplier for weight in weights]
    groups = x.split(partition, dim=1)
    return torch.cat([depthwise_reference(*pair) for pair in zip(groups, weights, strict=True)], 1)


# %% [markdown]
# Equal? Forward, and in the gradient of the image and of both kernels, in double precision on random numbers:

# %%
from mixconv.teaching import check_rewrite

torch.manual_seed(0)
image = torch.randn(2, 5, 5, dtype=torch.double)
kernels = [torch.randn(1, 1, 3, 3).double(), torch.randn(1, 1, 5, 5).double()]
check_rewrite(
    lambda x, *w: mixconv_loops(x, w),
    lambda x, *w: mixconv_reference(x[None], w)[0],
    image,
    *kernels,
    what="loops and shifted images",
)

# %% [markdown]
# And with two outputs for each input channel ($m = 2$), on a 4×6 image:

# %%
image = torch.randn(2, 4, 6, dtype=torch.double)
kernels = [torch.randn(2, 1, 3, 3).double(), torch.randn(2, 1, 5, 5).double()]
check_rewrite(
    lambda x, *w: mixconv_loops(x, w, channel_multiplier=2),
    lambda x, *w: mixconv_reference(x[None], w, channel_multiplier=2)[0],
    image,
    *kernels,
    what="the same with multiplier 2",
)

# %% [markdown]
# PyTorch has depthwise convolution too: `conv2d` with as many groups as channels. Beware of the word. In PyTorch, `groups=c` cuts a layer into c pieces of one channel each, all of one kernel size. MixConv's g groups are runs of channels, each with a size of its own, so it takes one call of `conv2d` for each group. (Or one call with zeros around the smaller kernels: exercise 1.2.)

# %%
check_rewrite(
    lambda x, w: F.conv2d(x, w, padding=2, groups=6),
    depthwise_reference,
    torch.randn(2, 6, 7, 8).double(),
    torch.randn(6, 1, 5, 5).double(),
    what="PyTorch's depthwise convolution and ours",
)

# %% [markdown]
# **1.1** ★★ *10 minutes, one line.* Backward, by yourself. A layer of stride 1 computed `y`; somebody hands you $\partial L / \partial y$. Return $\partial L / \partial x$, as a MixConv of other kernels.
#
# <details><summary>Hint: the idea</summary>
#
# Input pixel $q$ reached output $p$ through the weight at offset $q - p$. Backward, output $p$ reaches input $q$ through the same weight. Seen from $q$, that output lies at the opposite offset.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# $\partial L / \partial x_q = \sum_p w_{q - p} \cdot \partial L / \partial y_p$: the sum that `mixconv_reference` computes, with each kernel turned by half a turn.
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def input_gradient(gradient: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    raise NotImplementedError


def test_input_gradient(answer) -> None:
    impulse = torch.zeros(1, 1, 3, 3)
    impulse[0, 0, 1, 1] = 1
    kernel = torch.arange(1.0, 10).view(1, 1, 3, 3)
    expect(answer, impulse, [kernel], gives=kernel, why="each pixel reached it through its weight")
    torch.manual_seed(0)
    weights = [torch.randn(2, 1, 3, 3), torch.randn(1, 1, 5, 5)]
    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    gradient = torch.randn(2, 3, 6, 7)
    mixconv_reference(x, weights).backward(gradient)
    expect(answer, gradient, weights, gives=x.grad, why="autograd's answer")


attempt(input_gradient, test_input_gradient)


# %% tags=["solution"]
# fold: Solution
def input_gradient_solution(gradient: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    return mixconv_reference(gradient, [w.flip(2, 3) for w in weights])


def unturned(gradient: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """use the kernels as they are, which is right for symmetric ones only"""
    return mixconv_reference(gradient, weights)


def transposed(gradient: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """swap rows and columns instead of turning by half a turn"""
    return mixconv_reference(gradient, [w.transpose(2, 3) for w in weights])


def one_axis(gradient: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """flip the columns and forget the rows"""
    return mixconv_reference(gradient, [w.flip(3) for w in weights])


attempt(input_gradient_solution, test_input_gradient, wrong=[unturned, transposed, one_axis])


# %% [markdown]
# **1.2** ★★ *10 minutes, three lines.* A 3×3 kernel does what a 5×5 kernel with a border of zeros does. Use that: turn the kernels of a MixConv into *one* tensor of kernels of the largest size, so that a single depthwise convolution gives the same result. (Chapter 3 builds on it.)
#
# <details><summary>Hint: the idea</summary>
#
# Where must the small kernel sit inside the large one, so that its middle stays in the middle?
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `largest = max(w.shape[-1] for w in weights)`, and then `F.pad(w, [left, right, top, bottom])` for each.
#
# </details>

# %%
def embed(weights: list[torch.Tensor]) -> torch.Tensor:
    raise NotImplementedError


def test_embed(answer) -> None:
    one, three = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 3)
    middle = F.pad(one, [1] * 4)
    expect(answer, [one, three], gives=torch.cat([middle, three]), why="the middle stays there")
    torch.manual_seed(0)
    weights = [torch.randn(2, 1, 3, 3), torch.randn(3, 1, 7, 7)]
    x = torch.randn(1, 5, 6, 6)
    merged = F.conv2d(x, answer(weights), padding=3, groups=5)
    assert torch.allclose(merged, mixconv_reference(x, weights), atol=1e-5), "not the same layer"


attempt(embed, test_embed)


# %% tags=["solution"]
# fold: Solution
def embed_solution(weights: list[torch.Tensor]) -> torch.Tensor:
    largest = max(w.shape[-1] for w in weights)
    return torch.cat([F.pad(w, [(largest - w.shape[-1]) // 2] * 4) for w in weights])


def in_the_corner(weights: list[torch.Tensor]) -> torch.Tensor:
    """put the zeros on the right and below only: the window moves off its pixel"""
    largest = max(w.shape[-1] for w in weights)
    return torch.cat([F.pad(w, [0, largest - w.shape[-1]] * 2) for w in weights])


def stretched(weights: list[torch.Tensor]) -> torch.Tensor:
    """stretch the small kernels instead of putting zeros around them"""
    largest = max(w.shape[-1] for w in weights)
    return torch.cat([F.interpolate(w, (largest, largest)) for w in weights])


attempt(embed_solution, test_embed, wrong=[in_the_corner, stretched])

# %% [markdown]
# ## What MixConv is not
#
# YOLOv5 has a class `MixConv2d` that cites the same paper ([version 7.0](https://github.com/ultralytics/yolov5/blob/v7.0/models/experimental.py)). It is the fourth layer of the first picture. In it *every* branch convolves *all* input channels, and the branches' outputs are concatenated.
# Here are both, reduced to the wiring, with 8 channels and kernels 3 and 5. In the second, 8 inputs are shared among the 4 outputs of a branch (`groups=4`), so each output reads two channels, and the branch reads all eight.

# %%
from torch import nn

branches = [nn.Conv2d(8, 4, k, padding=k // 2, groups=4, bias=False) for k in (3, 5)]
mixconv_weights = [torch.randn(4, 1, 3, 3), torch.randn(4, 1, 5, 5)]
designs = {
    "MixConv": lambda x: mixconv_reference(x, mixconv_weights),
    "every branch\nsees all channels": lambda x: torch.cat([b(x) for b in branches], dim=1),
}

# %% [markdown]
# Which input channel reaches which output channel? Feed images that are constant in each channel: 8 numbers in, 8 sums out. The Jacobian of that is an 8×8 table, zero where there is no wire. Wires into each output:

# %%
wires = {}
for name, design in designs.items():
    jacobian = torch.autograd.functional.jacobian(
        lambda v, f=design: f(v.view(1, 8, 1, 1).expand(1, 8, 9, 9)).sum((0, 2, 3)), torch.ones(8)
    )
    wires[name] = jacobian != 0
    print(" ".join(name.split()), wires[name].sum(dim=1).tolist())

# %%
drawn = {
    "MixConv": layers["MixConv"],
    "every branch\nsees all channels": layers["YOLOv5's MixConv2d"],
}
for name, reads in drawn.items():
    table_of = torch.tensor([[channel in reads(z)[1] for channel in range(8)] for z in range(8)])
    assert torch.equal(wires[name], table_of)
print("wired as drawn at the top")

# %% [markdown]
# MixConv is a diagonal: one wire for each channel. The other layer mixes channels, sees each input at *every* kernel size, and has twice the weights here. It may be a good layer. It is another one, and its costs are not the paper's.

# %% [markdown]
# **1.3** ★★★ *20 minutes, eight lines.* A black box. Somebody hands you a layer as a function from `(N, channels, 15, 15)` to the same shape. Find its mix: return `(channels, kernel size)` for each run of neighbouring channels of one kernel size. If an output reads another channel than its own, raise ValueError: it is no MixConv.
#
# <details><summary>Hint: the idea</summary>
#
# Ask it about one pixel of one channel at a time: an *impulse*, a single 1 in an image of zeros. Whatever is lit afterwards has seen that pixel.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# A batch of `channels` images, image $c$ with the 1 in channel $c$, answers all at once: the result at `[c, z]` is what output $z$ makes of input $c$. It must be dark for $z \ne c$.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `impulses = torch.zeros(channels, channels, 15, 15)`, then `impulses[range(channels), range(channels), 7, 7] = 1`
#
# </details>

# %%
from collections.abc import Callable
from itertools import groupby

Layer = Callable[[torch.Tensor], torch.Tensor]


def find_mix(layer: Layer, channels: int) -> list[tuple[int, int]]:
    raise NotImplementedError


def test_find_mix(answer) -> None:
    torch.manual_seed(0)
    for mix in ([(1, 3)], [(1, 5), (2, 3)], [(2, 7), (1, 3), (3, 5)], [(2, 3), (1, 5), (2, 3)]):
        weights = [torch.randn(c, 1, k, k) for c, k in mix]

        def hidden(x: torch.Tensor, weights=weights) -> torch.Tensor:
            return mixconv_reference(x, weights)

        expect(answer, hidden, sum(c for c, _ in mix), gives=mix, why="so it was built")
    try:
        found = answer(designs["every branch\nsees all channels"], 8)
    except ValueError:
        return
    raise AssertionError(f"YOLOv5's layer was taken for a MixConv: {found}")


attempt(find_mix, test_find_mix)


# %% tags=["solution"]
# fold: Solution
def find_mix_solution(layer: Layer, channels: int) -> list[tuple[int, int]]:
    impulses = torch.zeros(channels, channels, 15, 15)
    impulses[range(channels), range(channels), 7, 7] = 1
    lit = layer(impulses) != 0
    if not torch.equal(lit.any(dim=3).any(dim=2), torch.eye(channels).bool()):
        raise ValueError("an output reads another channel than its own")
    sides = [int(lit[c, c].any(dim=0).sum()) for c in range(channels)]
    return [(len(list(run)), side) for side, run in groupby(sides)]


def unasked(layer: Layer, channels: int) -> list[tuple[int, int]]:
    """never ask which channels an output reads"""
    lit = layer(torch.eye(15)[7].outer(torch.eye(15)[7]).expand(1, channels, 15, 15)) != 0
    sides = [int(lit[0, c].any(dim=0).sum()) for c in range(channels)]
    return [(len(list(run)), side) for side, run in groupby(sides)]


def area(layer: Layer, channels: int) -> list[tuple[int, int]]:
    """count the pixels of a window, and forget that its side is their root"""
    return [(c, side**2) for c, side in find_mix_solution(layer, channels)]


def by_size(layer: Layer, channels: int) -> list[tuple[int, int]]:
    """sort by kernel size: two groups may share a size and stand apart"""
    return sorted(find_mix_solution(layer, channels), key=lambda pair: pair[1])


attempt(find_mix_solution, test_find_mix, wrong=[unasked, area, by_size])


# %% [markdown]
# ## Receptive field
#
# How many input pixels can one output see, along one axis? One layer with kernel size $k$ sees $k$ pixels: the first, and $k - 1$ more, a step apart.
# Each further layer $l$ adds $k_l - 1$ steps of its own. A step is $d_l$ pixels of that layer's input (its *dilation*), and one of those pixels is as many image pixels as all earlier strides multiplied.
#
# By hand, for a 5×5 of stride 2, a 3×3 of dilation 2, and a 3×3: 1 + 4·1·1 + 2·2·2 + 2·1·2 = 17. As a formula:
#
# $$
# r = 1 + \sum_{l} (k_l - 1) \cdot d_l \cdot \prod_{j < l} s_j
# $$

# %%
#| export formulation.py
def receptive_field(
    kernel_sizes: Sequence[int],
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
) -> int:
    """Side, in input pixels, of the window one output of a stack of layers can see.

    Args:
        kernel_sizes: one for each layer, first layer first.
        strides: one for each layer; all 1 if left out.
        dilations: one for each layer; all 1 if left out.

    Raises:
        TypeError: for what is no list of integers. A model is asked by
            `theoretical_receptive_field`.
        ValueError: if the lists have different lengths, or a number is below 1.
    """
    _check_stack(kernel_sizes=kernel_sizes, strides=strides or [], dilations=dilations or [])
    strides = strides or [1] * len(kernel_sizes)
    dilations = dilations or [1] * len(kernel_sizes)
    field, step = 1, 1
    for k, stride, dilation in zip(kernel_sizes, strides, dilations, strict=True):
        field += (k - 1) * dilation * step
        step *= stride
    return field


# %% tags=["plumbing"]
# fold: What is no stack of layers
#| export formulation.py
from numbers import Integral


def _check_stack(**lists: Sequence[int]) -> None:
    """Raise TypeError or ValueError, naming the list, unless all are of integers from 1 on."""
    for name, values in lists.items():
        if isinstance(values, nn.Module):
            raise TypeError(
                f"{name} must be a list, one for each layer, got a {type(values).__name__}; "
                "a model is asked by theoretical_receptive_field(model, layer)"
            )
        if not isinstance(values, Sequence) or not all(isinstance(v, Integral) for v in values):
            raise TypeError(f"{name} must be a list of integers, got {values!r}")
        if min([1, *values]) < 1:
            raise ValueError(f"{name} must be at least 1, got {values!r}")


# %%
(
    [receptive_field([k]) for k in (3, 5, 7)],
    receptive_field([3, 3, 3]),
    receptive_field([3, 3], [2, 1]),
)

# %% [markdown]
# Three 3×3 layers see as far as one 7×7. In a MixConv layer, each group sees as far as its own kernel. In a network, a 1×1 convolution between two MixConvs mixes the groups, so the farthest that anything sees follows from the formula with each layer's *largest* kernel.
#
# The stack from above, measured: send a gradient back from one output and count how wide it arrives.

# %%
stack = nn.Sequential(
    nn.Conv2d(1, 1, 5, stride=2), nn.Conv2d(1, 1, 3, dilation=2), nn.Conv2d(1, 1, 3)
)
pixels = torch.zeros(1, 1, 64, 64, requires_grad=True)
stack(pixels)[0, 0, 8, 8].backward()
seen = int((pixels.grad[0, 0].abs().sum(dim=0) > 0).sum())
assert seen == receptive_field([5, 3, 3], [2, 1, 1], [1, 2, 1])
seen


# %% [markdown]
# ## What it costs
#
# Group $t$ has $m \cdot c_t$ kernels of $k_t^2$ weights, and each weight is used once for each of the $H' \cdot W'$ output positions:
#
# $$
# \mathrm{parameters} = m \sum_t c_t \cdot k_t^2 \qquad \mathrm{multiply\text{-}adds} = H' \cdot W' \cdot m \sum_t c_t \cdot k_t^2
# $$

# %%
#| export formulation.py
def mixconv_parameters(
    partition: Sequence[int], kernel_sizes: Sequence[int], channel_multiplier: int = 1
) -> int:
    """Weights of a MixConv layer without bias.

    Args:
        partition: channels of each group.
        kernel_sizes: kernel size of each group.
        channel_multiplier: outputs for each input channel.
    """
    pairs = zip(partition, kernel_sizes, strict=True)
    return channel_multiplier * sum(c * k * k for c, k in pairs)


def mixconv_multiply_adds(
    partition: Sequence[int],
    kernel_sizes: Sequence[int],
    height: int,
    width: int,
    channel_multiplier: int = 1,
) -> int:
    """Multiply-adds of a MixConv layer for one image.

    Args:
        partition: channels of each group.
        kernel_sizes: kernel size of each group.
        height: rows of the output.
        width: columns of the output.
        channel_multiplier: outputs for each input channel.
    """
    return height * width * mixconv_parameters(partition, kernel_sizes, channel_multiplier)


# %%
from mixconv.teaching import table

table(
    ["kernel sizes", "partition of 32", "parameters", "multiply-adds at 14×14"],
    [
        [k, p, mixconv_parameters(p, k), mixconv_multiply_adds(p, k, 14, 14)]
        for k, p in [((3,), (32,)), ((3, 5), (16, 16)), ((3, 5, 7, 9), (8,) * 4), ((9,), (32,))]
    ],
)

# %% [markdown]
# Four kernel sizes cost about half of what 9×9 everywhere costs: (9 + 25 + 49 + 81) / 4 = 41 against 81.
#
# PyTorch has a counter of its own. It counts a multiplication and an addition as two, so its figure is twice ours.

# %%
from torch.utils.flop_counter import FlopCounterMode

with FlopCounterMode(display=False) as counter:
    for c, k in ((8, 3), (8, 5), (8, 7), (8, 9)):
        F.conv2d(torch.zeros(1, c, 14, 14), torch.zeros(c, 1, k, k), padding=k // 2, groups=c)
counter.get_total_flops() == 2 * mixconv_multiply_adds((8,) * 4, (3, 5, 7, 9), 14, 14)

# %% [markdown]
# ## Why large kernels are cheap, until they are not
#
# A depthwise layer comes with a pointwise layer. For each output position, $c$ channels in and $c$ out, the first costs $k^2 c$ and the second $c^2$.
# The depthwise share is $k^2 / (k^2 + c)$: at 3×3 and 512 channels, 9 of 9 + 512 = 521. (MobileNetV1, chapter 5, has five such pairs in a row.)

# %%
channels = 512
share = {k: k * k / (k * k + channels) for k in (3, 5, 7, 9, 11, 13)}
table(
    ["kernel", "multiply-adds per pixel, depthwise", "pointwise", "depthwise share", "pair grows"],
    [[f"{k}×{k}", k * k * channels, channels**2, f"{share[k]:.0%}",
      f"{(k * k - 9) / (9 + channels):.0%}"] for k in share],
)  # fmt: skip

# %% tags=["drawing"]
# fold: The code that draws this
figure, axis = plt.subplots(figsize=(6.4, 2.6))
for position, k in enumerate(share):
    axis.bar(position, channels**2, color="#cccccc")
    axis.bar(position, k * k * channels, bottom=channels**2, color=kernel_color(k))
    axis.text(position, (channels + k * k) * channels + 5000, f"{share[k]:.0%}", ha="center")
axis.set_xticks(range(6), [f"{k}×{k}" for k in share])
axis.text(5.55, channels**2 / 2, "pointwise", va="center", color="#555555")
axis.text(5.55, channels**2 + 43_000, "depthwise", va="center")
axis.yaxis.set_major_formatter("{x:,.0f}")
axis.set(
    ylabel="multiply-adds per pixel",
    title="Share of the depthwise layer in the pair, 512 channels",
    xlim=(-0.6, 6.9), ylim=(0, 395_000),
)  # fmt: skip
show(
    figure,
    "depthwise_share.png",
    "Stacked bars of the multiply-adds per pixel for kernels 3×3 to 13×13 at 512 channels. The "
    "grey pointwise part is the same; the coloured depthwise part grows from 2% to 25%.",
    caption="At 512 channels a 3×3 depthwise layer is 2% of the pair's work, a 13×13 one 25%.",
)

# %% [markdown]
# Going from 3×3 to 5×5 adds (25 − 9) · 512 = 8,192 weights to the pair's 521 · 512 = 266,752: 3%. Going to 13×13 adds (169 − 9) · 512 = 81,920: 31%. In a block that is wide only inside (chapter 4), the pointwise layers are smaller, and the depthwise share is larger. MixConv pays for large kernels in some of the channels only.
#
# > 📄 **Paper.** Section 1 and Figure 1: for MobileNets the accuracy rises from 3×3 to 7×7 or 9×9 and then falls; the largest kernels hurt both cost and accuracy (cited; it takes ImageNet to show).

# %% [markdown]
# ## Counting a whole network
#
# The same arithmetic for any model, by hooks: each convolution and each linear layer reports what it cost when an input passes through.
# Normalisation, activations, pooling, and the sums and products of whole maps count as nothing, as is the custom in this field.

# %%
#| export formulation.py
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LayerCost:
    """What one layer of a network cost for one input.

    Attributes:
        name: its name in the model, as in `model.named_modules()`.
        kind: "depthwise", "pointwise", "convolution" or "linear".
        output_shape: shape of its output, batch first.
        parameters: weights and biases.
        multiply_adds: for the whole batch; biases are not counted.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


# %%
#| export formulation.py
def count_parameters(model: nn.Module) -> int:
    """How many numbers a model learns: weights, biases, scales and shifts of normalisations."""
    return sum(parameter.numel() for parameter in model.parameters())


# %%
#| export formulation.py
def layer_cost(name: str, layer: nn.Conv2d | nn.Linear, output: Tensor) -> LayerCost:
    """The cost of one layer, from its weights and the output it gave.

    Every output value of a convolution is a sum over one kernel: `weight[0].numel()` terms.
    """
    if isinstance(layer, nn.Linear):
        kind = "linear"
    elif layer.groups == layer.in_channels > 1:
        kind = "depthwise"
    else:
        kind = "pointwise" if layer.kernel_size == (1, 1) else "convolution"
    multiply_adds = output.numel() * layer.weight[0].numel()
    return LayerCost(name, kind, tuple(output.shape), count_parameters(layer), multiply_adds)


# %% tags=["plumbing"]
# fold: A model in evaluation mode for a while, and a module that counts itself
#| export formulation.py
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in evaluation mode; each layer's mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _costs_of(name: str, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> list[LayerCost]:
    """Of one layer, or of the layers whose work it does."""
    if hasattr(layer, "layer_costs"):
        return list(layer.layer_costs(name, *inputs, output))
    return [layer_cost(name, layer, output)]


# %%
#| export formulation.py
def count_costs(model: nn.Module, *inputs: Tensor) -> list[LayerCost]:
    """Run a model once and report the cost of each convolution and linear layer, in order.

    A module that does the work of several says so in a method `layer_costs(name, x, output)`.
    Works on the meta device too, where nothing is computed. The model is run in evaluation
    mode without gradients and is left as it was.

    Args:
        model: any module.
        inputs: its arguments.
    """
    costs: list[LayerCost] = []

    def note(name: str, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        costs.extend(_costs_of(name, layer, inputs, output))

    hooks = [
        layer.register_forward_hook(partial(note, name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) or hasattr(layer, "layer_costs")
    ]
    try:
        with torch.no_grad(), evaluating(model):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return costs


# %%
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16),
    nn.Conv2d(16, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip
costs = count_costs(model, torch.zeros(1, 3, 32, 32))
table(
    ["layer", "kind", "output", "parameters", "multiply-adds"],
    [[c.name, c.kind, c.output_shape, c.parameters, c.multiply_adds] for c in costs],
)

# %% [markdown]
# The sum against PyTorch's counter:

# %%
with FlopCounterMode(display=False) as counter:
    model(torch.zeros(1, 3, 32, 32))
assert counter.get_total_flops() == 2 * sum(c.multiply_adds for c in costs)
sum(c.multiply_adds for c in costs)


# %% [markdown]
# ## Exercises
#
# **1.4** ★ *5 minutes, two lines.* A MixConv layer has stride $s$ on an input of H×W. Its output has ⌈H/s⌉ × ⌈W/s⌉ positions. How many multiply-adds is that?
#
# <details><summary>Hint: the idea</summary>
#
# `mixconv_multiply_adds` takes the size of the *output*. In Python, `-(-h // s)` rounds up.
#
# </details>

# %%
def strided_cost(partition: Sequence[int], kernel_sizes: Sequence[int], h, w, stride) -> int:
    raise NotImplementedError


def test_strided(answer) -> None:
    expect(answer, (1,), (3,), 2, 2, 1, gives=36, why="four positions, nine weights")
    expect(answer, (8, 8), (3, 5), 14, 14, 1, gives=53_312, why="196 positions, 272 weights")
    expect(answer, (8, 8), (3, 5), 7, 9, 2, gives=5_440, why="4 · 5 positions, 272 weights")


attempt(strided_cost, test_strided)


# %% tags=["solution"]
# fold: Solution
def strided_cost_solution(
    partition: Sequence[int], kernel_sizes: Sequence[int], h, w, stride
) -> int:
    rows, columns = -(-h // stride), -(-w // stride)
    return mixconv_multiply_adds(partition, kernel_sizes, rows, columns)


def rounded_down(partition: Sequence[int], kernel_sizes: Sequence[int], h, w, stride) -> int:
    """round down: the last pixel of an odd row has an output, too"""
    return mixconv_multiply_adds(partition, kernel_sizes, h // stride, w // stride)


def one_direction(partition: Sequence[int], kernel_sizes: Sequence[int], h, w, stride) -> int:
    """stride along the rows only"""
    return mixconv_multiply_adds(partition, kernel_sizes, h, -(-w // stride))


attempt(strided_cost_solution, test_strided, wrong=[rounded_down, one_direction])


# %% [markdown]
# **1.5** ★ *5 minutes, one line.* Two questions about indices. Channel multiplier $m = 3$, counting from zero: which input channel does output channel `z` read? And how many 3×3 layers of stride 1 see as far as one k×k layer? Return both.
#
# <details><summary>Hint: the idea</summary>
#
# Outputs 0, 1 and 2 read input 0. And every 3×3 layer adds two pixels to the window.
#
# </details>

# %%
def two_answers(z: int, k: int) -> tuple[int, int]:
    raise NotImplementedError


def test_answers(answer) -> None:
    weight = torch.ones(6, 1, 3, 3, dtype=torch.double)
    x = torch.stack([torch.zeros(3, 3), torch.ones(3, 3)]).double()
    reads = [int(plane.abs().sum() > 0) for plane in depthwise_loops(x, weight)]
    for z, channel in enumerate(reads):
        expect(answer, z, 3, gives=(channel, 1), why="so the loops do")
    for k in (5, 7, 13):
        layers = next(n for n in range(99) if receptive_field([3] * n) == k)
        expect(answer, 0, k, gives=(0, layers), why=f"{layers} layers see {k} pixels")


attempt(two_answers, test_answers)


# %% tags=["solution"]
# fold: Solution
def two_answers_solution(z: int, k: int) -> tuple[int, int]:
    return z // 3, (k - 1) // 2


def in_turn(z: int, k: int) -> tuple[int, int]:
    """deal the outputs to the inputs in turn, like cards"""
    return z % 2, (k - 1) // 2


def side_by_side(z: int, k: int) -> tuple[int, int]:
    """lay the windows side by side: they overlap in all but two pixels"""
    return z // 3, -(-k // 3)


attempt(two_answers_solution, test_answers, wrong=[in_turn, side_by_side])

# %% [markdown]
# ## Takeaways
# - MixConv: split the channels, one depthwise convolution with its own kernel size for each part, concatenate.
# - It keeps channels apart. Only pointwise layers mix them.
# - Its cost is $\sum_t c_t \cdot k_t^2$ for each output position: large kernels are affordable in some of the channels.
# - `mixconv_loops` is the definition. Chapter 3's layer is compared with it on small images; the package's tests use `mixconv_reference`, which is faster.
#
# **Further reading**: [the paper](https://arxiv.org/abs/1907.09595), section 3.1. [A guide to convolution arithmetic](https://arxiv.org/abs/1603.07285) (Dumoulin and Visin) draws every stride and padding; [Xception](https://arxiv.org/abs/1610.02357) (Chollet) is where depthwise layers became a way to build networks.
#
# Previous: [0 · Start here](00_start_here.ipynb) · Next: [2 · Partitioning](02_partitioning.ipynb)
