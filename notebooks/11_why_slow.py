# %% [markdown]
# # 11 · Why it is slow
#
# MixNet needs few multiply-adds, and the usual programs run it slowly all the same. Why? In the picture below every dot is one of its depthwise layers, and the black line, the *roof*, is how fast this machine could be. The hollow dots are PyTorch's usual way.
#
# **You will be able to**
# - tell from a layer's multiply-adds and bytes how fast it can be;
# - say where split, convolve, concatenate loses its time;
# - merge kernels and fold a batch norm, on paper and in code;
# - say a mixed layer as one task, and pack its weights by hand.
#
# **Know first:** [chapter 3](03_layer.ipynb) and [chapter 4](04_blocks.ipynb). [Chapter 7](07_mixnet.ipynb) for the networks.
#
# **Time:** 30 minutes to read. Runs in under 20 seconds on two cores.

# %% tags=["drawing"]
# fold: The code that draws this
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from mixconv.teaching import attempt, check_rewrite, expect, kernel_color, show, table, use_style

use_style()
bench = json.loads(Path("../figures/bench.json").read_text())
machine = bench["machine"]
peak, copying = (machine[f"{what}_per_second"] for what in ("multiply_adds", "copy_bytes"))
layers = [layer for layer in bench["layers"] if "fused" in layer["seconds"]]
at_batch_8 = [layer for layer in layers if layer["batch"] == 8]
alike = [round(row["multiply_adds"] / row["bytes"], 1) for row in at_batch_8]

# %% tags=["drawing"]
# fold: The code that draws this
figure, axis = plt.subplots(figsize=(7.2, 4.2))
axis.plot([0.3, peak / copying, 40], [0.3 * copying / 1e9, peak / 1e9, peak / 1e9], "k")
for number, row in enumerate(at_batch_8):
    x, color = row["multiply_adds"] / row["bytes"], kernel_color(max(row["kernel_sizes"]))
    one = alike[number]  # layers that are alike stand side by side
    x *= 1.03 ** (alike[:number].count(one) - (alike.count(one) - 1) / 2)
    before, after = (row["multiply_adds"] / row["seconds"][f] / 1e9 for f in ("timm", "fused"))
    axis.plot([x, x], [before, after], color=color, alpha=0.35, linewidth=1)
    axis.plot(x, before, "o", color="white", markeredgecolor=color, markersize=5)
    axis.plot(x, after, "o", color=color, markersize=5)
for k in (3, 5, 7, 9, 11):
    label = f"up to {k}×{k}" if k > 3 else "3×3, one group"
    axis.plot([], [], "o", color=kernel_color(k), label=label)
for fill, label in (("white", "split (timm)"), ("black", "one operation")):
    axis.plot([], [], "o", color=fill, markeredgecolor="black", label=label)
axis.legend(loc="lower right", fontsize=8)
axis.loglog()
axis.set(xlabel="multiply-adds per byte", ylabel="billion multiply-adds per second")
axis.set_xticks([0.5, 1, 2, 5, 10, 20], [0.5, 1, 2, 5, 10, 20])
axis.set_yticks([5, 10, 20, 50, 100, 200], [5, 10, 20, 50, 100, 200])
axis.set_ylim(5, 400)
axis.annotate("peak", (25, peak * 1.1 / 1e9), fontsize=9)
words = "roof: bandwidth\nof large arrays"
axis.annotate(words, (0.33, copying * 0.5 / 1e9), rotation=37, rotation_mode="anchor", fontsize=9)
show(
    figure,
    "roofline.png",
    "Speed against multiply-adds per byte for MixNet's depthwise layers at batch 8, under the "
    "machine's roof. A line joins the two dots of each layer: hollow for split, convolve, "
    "concatenate, far below the roof; full for one operation, near it or above.",
    caption="The usual way leaves every layer far below the roof; one operation brings 20 of 28 "
    "near it or above, and the others to 62% of it or more.",
)


# %% [markdown]
# Hollow: split, convolve, concatenate, as chapter 3's layer and timm do it. Full: the one operation that this part of the book builds. (Layers of the same intensity are drawn side by side.) A third way is worth a look: the same split, but in *channels-last* memory order, of which more below. How near do they come to the roof, in the middle of the layers?

# %%
def of_the_roof(row, form):
    """The speed of a layer, as a part of what the roof allows."""
    roof = min(peak, copying * row["multiply_adds"] / row["bytes"])
    return row["multiply_adds"] / row["seconds"][form] / roof


kinds = {
    "mixed layers": [row for row in at_batch_8 if len(row["channels"]) > 1],
    "layers with one group": [row for row in at_batch_8 if len(row["channels"]) == 1],
}
THREE = {"split (timm)": "timm", "channels last": "timm_channels_last", "one operation": "fused"}
for kind, chosen in kinds.items():
    parts = {n: np.median([of_the_roof(r, form) for r in chosen]) for n, form in THREE.items()}
    said = ", ".join(f"{name} {100 * part:.0f}%" for name, part in parts.items())
    print(f"{len(chosen)} {kind}: {said}")
print(f"measured on: {machine['cpu']}, {machine['threads']} threads, {machine['system']}")

# %%
parts = [of_the_roof(row, "fused") for row in at_batch_8]
below = [row for row, part in zip(at_batch_8, parts, strict=True) if part < 0.9]
assert (len(parts), len(below)) == (28, 8)  # the caption
print(f"one operation, below 90% of the roof: {len(below)} of {len(parts)} layers, "
      f"at {100 * min(parts):.0f}% and more")  # fmt: skip

# %% [markdown]
# Two things can be read off. A layer with *one* group has nothing to split and nothing to concatenate, and is slow as well. For it the memory order is nearly all: in channels last it is at the roof. A mixed layer hardly gains from the order alone. It has a trouble of its own.
#
# And eight layers stay below the roof in one operation, too. Five of them are at the roof's corner, at 5.1 multiply-adds per byte. There moving and multiplying take equally long, and the roof lets one hide behind the other. The kernel does them one after the other (chapter 14). The other three have stride 2, and one of them has groups of 60 channels, which do not fit vectors of 16 (chapter 14 again).
#
# More than 100% is possible: the roof is drawn for data that comes from memory, and a small layer's data may still be in the *cache*, the small fast memory inside the processor. (Chapter 14 draws a stricter roof.)
#
# Every time in a table or a figure of this part of the book comes from one file, `figures/bench.json`. `make bench` writes it. No cell measures anything, so a slow day cannot change the book. (A few times that stand in a sentence only were measured by hand.)
#
# ## Bytes, by hand
#
# One layer of MixNet-M: 14×14 pixels, 360 channels, kernels 3, 5, 7, 9 on 90 channels each, one image.
#
# **Multiply-adds.** Every output takes k² of them: 14 · 14 · 90 · (9 + 25 + 49 + 81) = 2,892,960.
#
# **Bytes.** Read the input once, write the output once, four bytes per number: 2 · 14 · 14 · 360 · 4 = 564,480. (The weights are a tenth of that, and the same for any number of images. They are left out.)
#
# **Intensity.** 2,892,960 / 564,480 = 5.1 multiply-adds for each byte.
#
# For one channel at stride 1 it is k² / 8, whatever the size of the image:
#
# | kernel | 3×3 | 5×5 | 7×7 | 9×9 | 11×11 |
# |---|---:|---:|---:|---:|---:|
# | multiply-adds per byte | 1.1 | 3.1 | 6.1 | 10.1 | 15.1 |
#
# A machine has such a number too: the multiply-adds that it does in the time in which it moves one byte. A layer with less than that waits for memory, and its multiply-adds are free.

# %%
layer_work, layer_bytes = 14 * 14 * 90 * (9 + 25 + 49 + 81), 2 * 14 * 14 * 360 * 4
assert (layer_work, layer_bytes) == (2_892_960, 564_480)
assert [round(k * k / 8, 1) for k in (3, 5, 7, 9, 11)] == [1.1, 3.1, 6.1, 10.1, 15.1]
assert 0.1 < 4 * 90 * (9 + 25 + 49 + 81) / layer_bytes < 0.11  # the weights
print(f"this layer: {layer_work / layer_bytes:.1f} multiply-adds for each byte")
print(f"this machine: {peak / copying:.1f}")


# %% [markdown]
# So this layer still waits for memory, but only just: it stands left of the corner of the roof.

# %% [markdown]
# **11.1** ★ *5 minutes, three lines.* What does a layer move, in bytes, this time with its weights? Input, weights and output once each, float32. Work the second case out on paper before you run anything: it is the layer above.
#
# <details><summary>Hint: the equation</summary>
#
# An output has $\lceil \mathrm{size} / \mathrm{stride} \rceil$ rows and columns. A group of $c$ channels has $c k^2$ weights, however many images there are.
#
# </details>

# %%
def bytes_moved(
    batch: int, size: int, stride: int, channels: tuple[int, ...], kernel_sizes: tuple[int, ...]
) -> int:
    raise NotImplementedError


def test_bytes_moved(answer) -> None:
    layer = (90, 90, 90, 90), (3, 5, 7, 9)
    expect(answer, 1, 2, 1, (1,), (1,), gives=36, why="four numbers in, one weight, four out")
    expect(answer, 1, 14, 1, *layer, gives=623_520, why="564,480 and 14,760 weights")
    expect(answer, 8, 14, 1, *layer, gives=4_574_880, why="eight images, and the same weights")
    expect(answer, 1, 5, 2, (3,), (3,), gives=516, why="25 pixels in, 9 out, 27 weights")


attempt(bytes_moved, test_bytes_moved)


# %% tags=["solution"]
# fold: Solution
def bytes_moved_solution(
    batch: int, size: int, stride: int, channels: tuple[int, ...], kernel_sizes: tuple[int, ...]
) -> int:
    pixels = batch * (size**2 + (-(-size // stride)) ** 2)
    weights = sum(c * k * k for c, k in zip(channels, kernel_sizes, strict=True))
    return 4 * (pixels * sum(channels) + weights)


def weights_each_time(
    batch: int, size: int, stride: int, channels: tuple[int, ...], kernel_sizes: tuple[int, ...]
) -> int:
    """read the weights again for each image"""
    return batch * bytes_moved_solution(1, size, stride, channels, kernel_sizes)


def without_stride(
    batch: int, size: int, stride: int, channels: tuple[int, ...], kernel_sizes: tuple[int, ...]
) -> int:
    """take the output to be as large as the input"""
    return bytes_moved_solution(batch, size, 1, channels, kernel_sizes)


attempt(bytes_moved_solution, test_bytes_moved, wrong=[weights_each_time, without_stride])


# %% [markdown]
# So time is at least the larger of work / peak and bytes / bandwidth. As a speed, against intensity:
#
# $$
# \mathrm{speed} \le \min\left(\mathrm{peak},\ \mathrm{bandwidth} \times \mathrm{intensity}\right)
# $$
#
# That is a slope and a flat part: the roof in the picture. The rule is known as the *roofline model* (Williams, Waterman and Patterson, 2009). The bandwidth is that of a copy between two large arrays. The peak is that of multiply-adds whose numbers stay in registers, on all threads.
#
# **11.2** ★★ *5 minutes, one line.* How many multiply-adds for each byte has a depthwise layer with a k×k kernel at *stride 2*? Count float32 numbers read and written, for a large image, without weights, and for k of 3 or more. (A 1×1 kernel need not read the pixels that it skips.) Is stride 2 good or bad for a layer that waits for memory?
#
# <details><summary>Hint: the idea</summary>
#
# Stand at one output. How many inputs are read for it, if each input of the image is read once?
#
# </details>

# %%
def intensity_at_stride_2(k: int) -> float:
    raise NotImplementedError


def test_intensity(answer) -> None:
    expect(answer, 3, gives=9 / 20, why="nine multiply-adds; four numbers read, one written")
    for k in (5, 11):
        outputs = 112**2
        moved = 4 * ((2 * 112) ** 2 + outputs)
        expect(answer, k, gives=outputs * k * k / moved, why="224 rows in, 112 rows out")


attempt(intensity_at_stride_2, test_intensity)


# %% tags=["solution"]
# fold: Solution
def intensity_at_stride_2_solution(k: int) -> float:
    return k * k / (4 * 5)  # lower than k² / 8: the same kernel waits longer for memory


def as_at_stride_1(k: int) -> float:
    """count one number read for each output, as at stride 1"""
    return k * k / 8


def by_numbers(k: int) -> float:
    """count numbers and not bytes"""
    return k * k / 5


attempt(intensity_at_stride_2_solution, test_intensity, wrong=[as_at_stride_1, by_numbers])

# %% [markdown]
# ## Why split, convolve, concatenate is slow
#
# Follow the bytes of one layer with g groups.
#
# - **Copies.** The convolutions read C channels and write C channels. Then the concatenation reads those and writes them again. Twice the traffic, for nothing. (Layers with one group are spared that.)
# - **Calls.** g convolutions and one concatenation, each with a start of its own. In a small layer the starts may take longer than the work.
# - **Layout.** In memory order (N, C, H, W) neighbours are pixels of one channel. A processor computes with *vectors* of up to 16 neighbouring numbers at a time (chapter 13). Such a vector does not fit a row of 14 or 7 pixels, and one shifted by a pixel straddles two *cache lines* (memory comes in pieces, mostly of 64 bytes). With channels last, (N, H, W, C), neighbours are *channels* of one pixel: a depthwise convolution does the same to all of them. But then split gives views with gaps, and the gain is lost again.
# - **Cache.** Between two calls, what was in the cache may be gone.
#
# The first two can be counted without a clock. PyTorch shows a *mode* every operation that runs; this one adds up what each reads and writes:

# %%
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view:  # split only gives names to parts
            return result
        given = [*args[0]] if isinstance(args[0], list) else args[:1]  # not the weights
        self.calls += 1
        self.bytes += sum(4 * tensor.numel() for tensor in (*given, result))
        return result


# %%
from mixconv import MixConv2d

torch.manual_seed(0)
layer = MixConv2d(360, (3, 5, 7, 9)).eval().requires_grad_(False)
x = torch.randn(1, 360, 14, 14)
with Traffic() as traffic:
    layer(x)
assert traffic.bytes == 2 * layer_bytes
print(f"split: {traffic.calls} calls, {traffic.bytes / layer_bytes:.0f} times the bytes needed")

# %% [markdown]
# So the copies explain a factor of two at most. The rest is calls, layout and cache.
#
# ## Merging, as algebra
#
# Call $w$ a kernel and $E w$ the same kernel with zeros around it. Adding zeros adds nothing:
#
# $$
# \sum_{i,j \in \mathrm{large}} (E w)_{i,j} \  x_{t+i,\ u+j} = \sum_{i,j \in \mathrm{small}} w_{i,j} \  x_{t+i,\ u+j}
# $$
#
# So g convolutions are one, with kernels of the largest size: chapter 3's `merge_depthwise`. It saves calls and the concatenation, and pays with multiplications by zero.

# %%
from mixconv.layer import merge_depthwise

merged = merge_depthwise(list(layer.convs))
with Traffic() as traffic:
    merged(x)
check_rewrite(layer, merged, x, what="split and merged")
print(f"merged: {traffic.calls} call, {traffic.bytes / layer_bytes:.0f} times the bytes needed")
print(f"multiply-adds: {81 * 4 / (9 + 25 + 49 + 81):.1f} times those of the split form")

# %% [markdown]
# What that is worth is on file. Take as the unit the time to copy as many bytes as the layer must move. (Geometric means over MixNet's layers with two or more groups; 1 would be perfect for a layer that waits for memory.)
#
# This unit is stricter than the first picture's roof. The copy has the layer's own size, so it may stay in the cache:

# %%
for batch in sorted({row["batch"] for row in layers}):
    copies = [row["bytes"] / row["seconds"]["copy"] for row in layers if row["batch"] == batch]
    print(f"batch {batch}: a layer's bytes are copied at {np.median(copies) / 1e9:.0f} GB/s")
print(f"large arrays: {copying / 1e9:.0f} GB/s")

# %% [markdown]
# At batch 8 that is four times the slope of the roof above. So a full dot on that roof is four copies here:

# %% tags=["drawing"]
# fold: The code that draws this
from statistics import geometric_mean

WAYS = {
    "split (timm)": "timm",
    "split, channels last": "timm_channels_last",
    "merged, channels last": "merged",
    "one operation": "fused",
}
mixed = [row for row in layers if len(row["channels"]) > 1]
batches = sorted({row["batch"] for row in mixed})


def copies(form: str, batch: int) -> float:
    times = (row["seconds"] for row in mixed if row["batch"] == batch)
    return geometric_mean(seconds[form] / seconds["copy"] for seconds in times)


figure, axis = plt.subplots(figsize=(7, 2.9))
for index, batch in enumerate(batches):
    values = [copies(form, batch) for form in WAYS.values()]
    places = np.arange(len(WAYS)) + 0.26 * (index - 1)
    shade = ("#BBBBBB", "#777777", "#333333")[index]
    bars = axis.barh(places, values, 0.24, color=shade, label=f"batch {batch}")
    axis.bar_label(bars, [f"{value:.0f}" for value in values], padding=2, fontsize=8)
axis.set_yticks(np.arange(len(WAYS)), list(WAYS))
axis.invert_yaxis()
axis.set(
    xscale="log",
    xlim=(1, None),
    xlabel="time, in copies of the layer's own bytes, mostly in the cache",
)
axis.set_xticks([1, 2, 5, 10, 20, 50], [1, 2, 5, 10, 20, 50])
axis.minorticks_off()
axis.legend(fontsize=8)
show(
    figure,
    "times_in_copies.png",
    "Bars: the time of a mixed layer in copies of the bytes that it must move, for split, split "
    "with channels last, merged, and one operation, at three batch sizes.",
    caption="Memory order alone does little, merging more, one operation most.",
)

# %% [markdown]
# Merging is the part of the gain that needs no compiler. What is left between the last two rows is the subject of the next chapters.
#
# ## Folding a batch norm
#
# A batch norm is one more pass over memory. In evaluation it is a straight line for each channel, scale · y + shift: it knows its mean $\mu$ and variance $v$, and computes $\gamma (y - \mu) / \sqrt{v + \epsilon} + \beta$. Collect:
#
# $$
# \mathrm{scale} = \frac{\gamma}{\sqrt{v + \epsilon}}, \qquad \mathrm{shift} = \beta - \mu \cdot \mathrm{scale}
# $$
#
# A convolution before it is linear. So scale its weights, and let the shift be its bias.
#
# **By hand.** Let a channel have weights (2, −4), bias 1, and μ = 3, v + ε = 4, γ = 6, β = 5. Then scale = 6 / 2 = 3 and shift = 5 − 3 · 3 = −4. Folded: weights (6, −12), bias 3 · 1 − 4 = −1. Try the input (1, 1): convolution 2 − 4 + 1 = −1, batch norm 6 · (−1 − 3) / 2 + 5 = −7. Folded: 6 − 12 − 1 = −7.

# %%
#| export fast/folding.py
"""Algebra that makes a network shorter: norms folded, 1×1 convolutions merged (chapter 11)."""

import torch
from torch import Tensor, nn


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


# %%
conv, norm = nn.Conv2d(2, 1, 1), nn.BatchNorm2d(1, eps=0).eval()
with torch.no_grad():
    conv.weight.copy_(torch.tensor([2.0, -4.0]).view(1, 2, 1, 1))
    for value, number in ((conv.bias, 1), (norm.weight, 6), (norm.bias, 5)):
        value.fill_(number)
    norm.running_mean.fill_(3), norm.running_var.fill_(4)
    by_norm = norm(conv(torch.ones(1, 2, 1, 1)))
    fold_line(conv, *norm_as_line(norm))
    folded = conv(torch.ones(1, 2, 1, 1))
assert by_norm.item() == folded.item() == -7
conv.weight.flatten().tolist(), conv.bias.tolist()

# %% [markdown]
# And with numbers that are not chosen, forward and the gradient of the input:

# %%
conv, norm = nn.Conv2d(6, 8, 3, padding=1, bias=False).double(), nn.BatchNorm2d(8).double()
with torch.no_grad():
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2)
norm.eval()
before = nn.Conv2d(6, 8, 3, padding=1, bias=False).double()
before.load_state_dict(conv.state_dict())
fold_line(conv, *norm_as_line(norm))
check_rewrite(
    lambda x: norm(before(x)), conv, torch.randn(2, 6, 5, 5).double(), what="norm and folded norm"
)


# %% [markdown]
# Where the norm was stands an identity. A folded model cannot be trained: the norm's statistics are gone. It says so:

# %% tags=["plumbing"]
# fold: What says that a fused model cannot be trained
#| export fast/folding.py
def refuse_training(mode: bool) -> None:
    """Raise if a module that was fused for inference is put in training mode.

    Raises:
        RuntimeError: saying what to do instead.
    """
    if mode:
        raise RuntimeError(
            "this model was fused for inference and cannot be trained: batch norms and weights "
            "are merged. Train the model you gave to fuse_for_inference, and fuse it again. (A "
            "module of yours that holds this copy may be half in training now: call .eval() on it. "
            "create_feature_extractor asks for training: use torch.fx, or hooks, on this copy.)"
        )


class FoldedNorm(nn.Identity):
    """Where a batch norm was that is part of the convolution before it now."""

    def train(self, mode: bool = True) -> "FoldedNorm":
        """Refuse training mode: there is no norm left to train.

        Raises:
            RuntimeError: if `mode` is true.
        """
        refuse_training(mode)
        return super().train(mode)


# %%
try:
    nn.Sequential(conv, FoldedNorm()).train()
except RuntimeError as error:
    print(error)

# %% [markdown]
# **11.3** ★★ *10 minutes, two lines.* A batch norm may also come *before* a 1×1 convolution. Fold its scale and shift (one number for each *input* channel) into weight `(out, in, 1, 1)` and bias `(out,)`. Why would this fail for a 3×3 convolution with padding?
#
# <details><summary>Hint: the equation</summary>
#
# One channel: $w (s x + t) + b = (w s)\, x + (w t + b)$. With several, the sum over inputs of $w t$ goes into the bias.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `weight * scale.view(1, -1, 1, 1)` scales the inputs; a view of `(-1, 1, 1, 1)` would scale the outputs.
#
# </details>

# %%
import torch.nn.functional as F


def fold_before(
    weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def test_fold(answer) -> None:
    one = torch.ones(1, 1, 1, 1)
    numbers = 2 * one, torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([5.0])
    wanted = 6 * one, torch.tensor([11.0])
    expect(answer, *numbers, gives=wanted, why="2 (3 x + 5) + 1 = 6 x + 11")
    torch.manual_seed(0)
    weight, bias, x = torch.randn(6, 4, 1, 1), torch.randn(6), torch.randn(2, 4, 3, 3)
    scale, shift = torch.randn(2, 4)
    line = x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    folded = F.conv2d(x, *answer(weight, bias, scale, shift))
    torch.testing.assert_close(folded, F.conv2d(line, weight, bias), rtol=1e-4, atol=1e-4)


attempt(fold_before, test_fold)


# %% tags=["solution"]
# fold: Solution
def fold_before_solution(
    weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    # Why not for 3×3 with padding: the zeros come after the norm. A tap outside the image meets 0
    # and not the shift, but a folded bias would add the shift for it, too.
    return weight * scale.view(1, -1, 1, 1), bias + weight[:, :, 0, 0] @ shift


def as_behind(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """fold it as if the norm came behind"""
    return weight * scale.view(-1, 1, 1, 1), bias * scale + shift


def past_the_weights(
    weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """add the shift without sending it through the weights"""
    return weight * scale.view(1, -1, 1, 1), bias + shift.sum()


attempt(fold_before_solution, test_fold, wrong=[as_behind, past_the_weights])

# %% [markdown]
# ## Merging 1×1 convolutions
#
# timm writes MixNet's 1×1 layers of two groups as two convolutions between split and concatenation. They are equal in size, so they are *one* convolution with `groups=2`, without zeros and without loss. (This book's own blocks have it so from the start.)

# %%
#| export fast/folding.py
from collections.abc import Sequence


def merge_pointwise(convs: Sequence[nn.Conv2d]) -> nn.Conv2d | None:
    """Equal 1×1 convolutions side by side as one grouped convolution; None if they are not that."""
    first = convs[0]
    sizes = {(c.in_channels, c.out_channels, c.bias is None) for c in convs}
    plain = all(type(c) is nn.Conv2d and c.padding in (0, (0, 0)) for c in convs)
    single = all(c.kernel_size == c.stride == (1, 1) and c.groups == 1 for c in convs)
    if len(sizes) > 1 or not plain or not single or first.in_channels == 1:  # 1: depthwise
        return None
    n, like = len(convs), first.weight
    merged = nn.Conv2d(
        n * first.in_channels, n * first.out_channels, 1, groups=n, bias=first.bias is not None,
        device=like.device, dtype=like.dtype,
    )  # fmt: skip
    merged.weight = nn.Parameter(torch.cat([c.weight.detach() for c in convs]), False)
    if merged.bias is not None:
        biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
        merged.bias = nn.Parameter(torch.cat(biases), False)
    return merged.train(first.training)


# %%
pair = [nn.Conv2d(10, 6, 1, bias=False).double() for _ in range(2)]
check_rewrite(
    lambda x: torch.cat([conv(part) for conv, part in zip(pair, x.chunk(2, 1), strict=True)], 1),
    merge_pointwise(pair),
    torch.randn(2, 20, 4, 4).double(),
    what="two 1×1 convolutions and one",
)
merge_pointwise([*pair, nn.Conv2d(10, 5, 1)])  # not equal in size: None

# %% [markdown]
# All this algebra holds for what a *class* computes. A module may do more than its class says: a hook, a `forward` of its own, a parametrised weight. Then its parts must stay as they are. So before anything is rewritten, chapter 9's question is asked:

# %%
from mixconv.surgery import has_hooks

plain, hooked, changed = (nn.Conv2d(4, 4, 1) for _ in range(3))
hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
changed.forward = lambda x: x
[has_hooks(module) for module in (plain, hooked, changed)]

# %% [markdown]
# What folding and merging bring to whole networks, without any compiler (chapter 16 applies them for you; times from the file, in milliseconds, the shortest of several rounds):

# %%
rows = [row for row in bench["networks"] if "timm, eager" in row["seconds"]]
table(
    ["network", "images", "ours, split", "timm", "folded and merged", "times as fast as timm"],
    [
        [
            row["network"],
            row["batch"],
            *(f"{1e3 * t:.1f}" for t in times),
            f"{times[1] / times[2]:.1f}",
        ]
        for row in rows
        for times in [[row["seconds"][n] for n in ("split", "timm, eager", "fused, merged")]]
    ],
)

# %% [markdown]
# Ours and timm's compute nearly the same operations, and for MixNet-L with 16 images their times differ by 577.2 / 419.8 = 1.37 all the same. Of the two, timm's is the odd one: from MixNet-M to MixNet-L its time grows by 419.8 / 356.2 = 1.18, ours by 577.2 / 336.0 = 1.72, that of the folded network by 198.3 / 115.5 = 1.72. We do not know why. So do not lean on the decimals: read the last column as "two to three times".
#
# ## The layer as one task
#
# Merging cannot do everything. It multiplies by zeros. And at stride 2 with 'SAME' padding no one kernel holds a 1×1 for every size of image (chapter 3; chapter 12 says why). So the rest of this part writes the layer as one piece of work. What is its task? This section says it, and the next chapters do it.
#
# To say it takes six things, and no weights:

# %%
#| export fast/spec.py
"""A mixed layer, its bias and activation as one task; `split_form` is its meaning (chapter 11)."""

from typing import NamedTuple

from mixconv.layer import same_padding

ACTIVATIONS = ("none", "relu", "silu", "relu6")


class MixSpec(NamedTuple):
    """A mixed layer, its bias and activation: an entry for each group, and what the groups share.

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


# %% [markdown]
# **Padding** is worked out for each group: symmetric, or TensorFlow's rule, which needs the size of the image. `reach` is how far a kernel spans: with dilation 2, three taps span five pixels.

# %%
#| export fast/spec.py
class Pad(NamedTuple):
    """Zeros around one group's input, in pixels; `reach` is what its kernel spans."""

    top: int
    bottom: int
    left: int
    right: int
    reach: int


def pads(spec: MixSpec, height: int, width: int) -> list[Pad]:
    """The zeros that each group needs on an image of this size."""
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
same = MixSpec((1, 1, 1), (1, 3, 3), 2, (1, 1, 2), "same", "none")
for pad in pads(same, height=6, width=7):
    print(pad)

# %% [markdown]
# Six rows at stride 2: three outputs. The 1×1 kernel looks at rows 0, 2, 4 and needs no zero. The 3×3 kernel needs one, and it goes below. The third kernel is dilated, and spans five. Seven columns make four outputs, and the 3×3 kernel needs one zero on each side.
#
# **Weights.** A kernel wants to read its weights in the order in which it uses them. On channels-last images the innermost loop runs over channels. So the weights lie as (row, column, channel), group after group, in one flat tensor.
#
# By hand: a group of two channels with 3×3 kernels numbered 0 to 8 and 9 to 17, and a group of one channel with a 1×1 kernel, 99. First the two upper left weights, 0 and 9. Then their right neighbours, 1 and 10. So on to 8 and 17. Then the second group: 99.

# %%
#| export fast/spec.py
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
packed = pack_weights([torch.arange(18.0).view(2, 1, 3, 3), torch.full((1, 1, 1, 1), 99.0)])
assert packed[:4].tolist() == [0, 9, 1, 10]
assert packed[-3:].tolist() == [8, 17, 99]
packed


# %% [markdown]
# Packing is plain PyTorch. Gradients flow through it, and a layer that trains may keep its kernels apart and pack them in every forward.
#
# **Meaning.** Unpack, pad, one convolution for each group, concatenate, bias, activation. That is slow, as we saw, and it is the definition: all that follows is compared with it.

# %%
#| export fast/spec.py
def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation by its name in `ACTIVATIONS`, or "sigmoid"."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu, "silu": F.silu, "relu6": F.relu6, "sigmoid": torch.sigmoid,
    }  # fmt: skip
    return functions[activation](x) if activation != "none" else x


def split_form(x: Tensor, weight: Tensor, bias: Tensor | None, spec: MixSpec) -> Tensor:
    """The task as a convolution for each group, concatenated: the reference.

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


# %% [markdown]
# Two channels of 3×3 pixels by hand. Channel 0 counts from 0 to 8 under a 3×3 kernel of ones: 36 at the centre, 0 + 1 + 3 + 4 = 8 in the corner. Channel 1 is all ones under a 1×1 kernel of weight 10, with bias −12 and ReLU: −2, so 0.

# %%
spec = MixSpec((1, 1), (3, 1), 1, (1, 1), "symmetric", "relu")
image = torch.stack([torch.arange(9.0).view(3, 3), torch.ones(3, 3)])[None]
weight = pack_weights([torch.ones(1, 1, 3, 3), torch.full((1, 1, 1, 1), 10.0)])
y = split_form(image, weight, torch.tensor([0.0, -12.0]), spec)
assert (y[0, 0, 1, 1], y[0, 0, 0, 0], y[0, 1].max()) == (36, 8, 0)
y[0, 0]

# %% [markdown]
# And it is the layer of chapter 3, forward and gradient, in single and double precision:

# %%
from torch.func import functional_call

layer = MixConv2d(40, (1, 3, 5, 7), stride=2, padding="same", bias=True)
spec = MixSpec((10, 10, 10, 10), (1, 3, 5, 7), 2, (1, 1, 1, 1), "same", "none")
names = [name for name, _ in layer.named_parameters()]  # a weight and a bias for each group
tensors = [torch.randn(2, 40, 14, 15), *(p.detach() for p in layer.parameters())]
for dtype in (torch.float32, torch.float64):
    check_rewrite(
        lambda x, *p: functional_call(layer, dict(zip(names, p, strict=True)), x),
        lambda x, *p: split_form(x, pack_weights(p[0::2]), torch.cat(p[1::2]), spec),
        *(tensor.to(dtype) for tensor in tensors),
        what=f"layer and split form, {dtype}",
    )

# %% [markdown]
# **Sense.** Numbers and addresses will go to C++, which believes everything. So what makes no sense is refused before that, in words. The answer is remembered: a layer asks the same thing in every forward.

# %% tags=["plumbing"]
# fold: What is refused, in words
#| export fast/spec.py
import functools

from mixconv.layer import PADDINGS


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
CHANGES = {"kernel_sizes": (1, 3, 4, 7)}, {"channels": (1,)}, {"stride": 0}, {"padding": "valid"}
for change in CHANGES:
    try:
        check_spec(spec._replace(**change))
    except ValueError as error:
        print(error)
check_spec(spec)  # channels, and numbers in the packed tensor


# %% [markdown]
# ## Exercises
#
# **11.4** ★★ *10 minutes, two lines.* Where in the packed tensor lies the weight of channel `c` of group `group`, at row `i` and column `j` of its kernel? Count from 0.
#
# <details><summary>Hint: the idea</summary>
#
# Three things come before it: all earlier groups; in its own group, all channels of the taps before; in its own tap, the channels before.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# A group takes $c k^2$ places, and its tap $(i, j)$ begins $(i k + j) \cdot c$ places after the group.
#
# </details>

# %%
def place(
    channels: tuple[int, ...], kernel_sizes: tuple[int, ...], group: int, c: int, i: int, j: int
) -> int:
    raise NotImplementedError


def test_place(answer) -> None:
    expect(answer, (1,), (3,), 0, 0, 1, 2, gives=5, why="row 1, column 2 of a 3×3 kernel")
    expect(answer, (2,), (3,), 0, 1, 0, 0, gives=1, why="the second channel's first tap")
    expect(answer, (2, 1), (3, 1), 1, 0, 0, 0, gives=18, why="behind the 18 of the first group")
    channels, sizes = (2, 3, 1), (3, 5, 1)
    for group in range(3):
        kernels = [torch.zeros(n, 1, k, k) for n, k in zip(channels, sizes, strict=True)]
        c, i, j = channels[group] - 1, sizes[group] // 2, sizes[group] - 1
        kernels[group][c, 0, i, j] = 1
        at = pack_weights(kernels).nonzero().item()
        expect(answer, channels, sizes, group, c, i, j, gives=at, why="pack_weights puts it there")


attempt(place, test_place)


# %% tags=["solution"]
# fold: Solution
def place_solution(
    channels: tuple[int, ...], kernel_sizes: tuple[int, ...], group: int, c: int, i: int, j: int
) -> int:
    before = sum(n * k * k for n, k in zip(channels[:group], kernel_sizes[:group], strict=True))
    return before + (i * kernel_sizes[group] + j) * channels[group] + c


def channel_first(
    channels: tuple[int, ...], kernel_sizes: tuple[int, ...], group: int, c: int, i: int, j: int
) -> int:
    """let a channel's taps lie side by side, as PyTorch stores them"""
    before, k = place_solution(channels, kernel_sizes, group, 0, 0, 0), kernel_sizes[group]
    return before + c * k * k + i * k + j


def alone(
    channels: tuple[int, ...], kernel_sizes: tuple[int, ...], group: int, c: int, i: int, j: int
) -> int:
    """forget the groups that come before"""
    return (i * kernel_sizes[group] + j) * channels[group] + c


attempt(place_solution, test_place, wrong=[channel_first, alone])

# %% [markdown]
# ## Takeaways
# - Depthwise layers have few multiply-adds *and* few multiply-adds per byte. Time goes where the bytes go.
# - Split, convolve, concatenate moves everything twice, in many small calls, and keeps a mixed layer from the memory order that suits it.
# - Merging and folding are algebra: same outputs, fewer passes over memory, no compiler.
# - What is left is one task: `MixSpec` says it, `split_form` is its meaning.
#
# **Further reading**: Williams, Waterman and Patterson, *Roofline: an insightful visual performance model for multicore architectures*, Communications of the ACM 52(4), 2009: ten pages, and every kernel looks different afterwards.
#
# Previous: [10 · Heirs](10_heirs.ipynb) · Next: [12 · The operation](12_operation.ipynb)
