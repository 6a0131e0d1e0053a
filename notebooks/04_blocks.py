# %% [markdown]
# # 4 · Blocks
#
# A depthwise layer never lets its channels talk. Something around it must. What, and why is it wide in the middle?
#
# The picture below shows the three answers that this book needs: the block of MobileNetV1, that of MobileNetV2, and MixNet's.
#
# **You will be able to**
# - build a depthwise-separable block and an inverted residual block, with MixConv in the middle;
# - compute a squeeze-and-excitation gate by hand;
# - say why two groups of 1×1 convolutions are one grouped convolution;
# - read off where a block spends its parameters and multiply-adds.
#
# **Know first:** [chapter 3](03_layer.ipynb).
#
# **Time:** 25 minutes to read. Runs in under 20 seconds on two cores.

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style


def draw_block(axis, layers: list[tuple[str, float, list[int]]]) -> None:
    """Layers of (words, height, kernel size of each stripe, 0 for a grey one), left to right."""
    for place, (words, height, stripes) in enumerate(layers):
        left, part = 2 * place, height / len(stripes)
        for stripe, k in enumerate(stripes):
            bottom, color = stripe * part - height / 2, kernel_color(k) if k else "#cccccc"
            style = {"facecolor": color, "edgecolor": "white", "linewidth": 2}
            axis.add_patch(plt.Rectangle((left, bottom), 1.2, part, **style))
            axis.text(left + 0.6, bottom + part / 2, f"{k}×{k}" if k else "", ha="center",
                      va="center", color="white" if k == 3 else "black")  # fmt: skip
        axis.text(left + 0.6, -height / 2 - 0.05, words, ha="center", va="top")
        if place:
            axis.annotate("", (left - 0.05, 0), (left - 0.75, 0),
                          arrowprops={"arrowstyle": "-|>", "color": "#555555"})  # fmt: skip


def draw_sum(axis, end: float, low: float, top: float) -> None:
    """A line from the input's top edge, `low`, over the layers, and into a sum at `end`."""
    tip = {"arrowstyle": "-|>", "color": "#555555"}
    axis.plot([0.6, 0.6, end, end], [low, top, top, 0.3], color="#555555")
    axis.annotate("", (end, 0.14), (end, 0.4), arrowprops=tip)
    axis.annotate("", (end - 0.18, 0), (end - 0.68, 0), arrowprops=tip)
    axis.text(end, 0, "+", ha="center", va="center", fontsize=14, weight="bold")


# %% tags=["drawing"]
# fold: The code that draws this
use_style()
blocks = {  # layers: words, channels, the kernel sizes of its stripes
    "MobileNetV1": [("input 64", 64, [0]), ("depthwise 64", 64, [3]), ("1×1 → 128", 128, [0])],
    "MobileNetV2": [("input 24", 24, [0]), ("1×1 → 144", 144, [0]), ("depthwise 144", 144, [3]),
                    ("1×1 → 24", 24, [0])],
    "MixNet-M": [("input 80", 80, [0]), ("1×1 → 480,\n2 groups", 480, [0, 0]),
                 ("MixConv 480", 480, [9, 7, 5, 3]), ("gate 480", 480, [0]),
                 ("1×1 → 80,\n2 groups", 80, [0, 0])],
}  # fmt: skip
blocks = {name: [(words, channels**0.5 / 15, stripes) for words, channels, stripes in layers]
          for name, layers in blocks.items()}  # fmt: skip
figure, axes = plt.subplots(3, 1, figsize=(8.2, 5.8), height_ratios=[1.45, 1.5, 2.3])
for axis, (name, layers) in zip(axes, blocks.items(), strict=True):
    draw_block(axis, layers)
    axis.text(-0.3, 0, name, ha="right", va="center", weight="bold")
    if name != "MobileNetV1":
        draw_sum(axis, 2 * len(layers) - 0.1, layers[0][1] / 2, layers[1][1] / 2 + 0.12)
    tall = max(height for _, height, _ in layers)
    axis.set(xlim=(-2.2, 10.3), ylim=(-tall / 2 - 0.5, tall / 2 + 0.3))
    axis.axis("off")
show(
    figure,
    "three_blocks.png",
    "Three blocks as rows of bars, higher for more channels. MobileNetV1: a 3×3 depthwise "
    "layer, then a wider 1×1. MobileNetV2: 24 channels widen to 144, a 3×3 depthwise layer, back "
    "to 24, and the input is added. MixNet-M: 80 widen to 480 in two groups, MixConv with four "
    "kernel sizes, a gate, back to 80 in two groups, and the input is added.",
    caption="MobileNetV2 and MixNet are wide inside and narrow at their ends, where the input is "
    "added; MobileNetV1 is not. (A bar's height is the root of its channels. A colour is a kernel "
    "size of a depthwise layer; whatever else there is, is grey.)",
)

# %% [markdown]
# ## Why wide inside, why linear at the ends
#
# **Wide inside.** A depthwise layer finds one pattern in each channel: with 24 channels, 24 patterns. Widen to 6 · 24 = 144 before it, and it finds 144. It is the cheapest place to be wide, since a depthwise layer's cost grows with the number of channels, and a 1×1's with its square.
#
# **Narrow between.** What passes from block to block, and what the residual adds to, is the narrow end. Fewer numbers to store, and 1×1 convolutions from 24 to 144 and back cost a third of one from 144 to 144: 2 · 24 · 144 = 6,912 multiply-adds at each pixel, against 144 · 144 = 20,736.
#
# **Linear at the narrow end.** ReLU throws away what is negative. In a wide space the loss can be made good from other channels; in a narrow one it is gone. MobileNetV2's authors show it with an experiment much like this one (they map back with the inverse of the lift): lift points of the plane into n dimensions at random, apply ReLU, and ask the best linear map to bring them back. How much of the points' squared lengths is missing?

# %%
import torch

torch.manual_seed(0)
points = torch.randn(1000, 2).double()
for n in (2, 3, 4, 8, 16):
    lost = []
    for _ in range(20):
        lifted = (points @ torch.randn(2, n).double()).relu()
        back = lifted @ torch.linalg.lstsq(lifted, points, driver="gelsd").solution
        lost.append((back - points).square().sum() / points.square().sum())
    print(f"{n:2} dimensions: {sum(lost) / 20:.0%} of the squared lengths lost, mean of 20 lifts")

# %% [markdown]
# So the projection is not followed by an activation. As an equation, with $E$ and $P$ for the two 1×1 convolutions, "norm" for normalisation, "act" for normalisation and then activation, and a dot for multiplication of each channel:
#
# $$
# u = \mathrm{act}\left(\mathrm{MixConv}\left(\mathrm{act}\left(E\,x\right)\right)\right) \qquad y = x + \mathrm{norm}\left(P\left(\mathrm{gate}(u) \cdot u\right)\right)
# $$
#
# The rest of the chapter builds its parts from left to right.
#
# ## Convolution, normalisation, activation
#
# In all of these networks a convolution is followed by a batch normalisation and mostly by an activation. One small class holds the three, with names that say what is where in a `state_dict`.
#
# > ⚙️ **Official code.** MixNets use ReLU in their first blocks, where images are large, and swish (`nn.SiLU` in PyTorch) later. MobileNetV2 uses ReLU6.

# %%
#| export blocks.py
"""The blocks of MobileNets and MixNets (paper, section 4; chapter 4)."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "swish": nn.SiLU,
}  # fmt: skip


def make_activation(name: str) -> nn.Module:
    """An activation by its name: "relu", "relu6" or "swish" (PyTorch's SiLU).

    Raises:
        ValueError: for another name.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]()


# %%
#| export blocks.py
from mixconv.layer import MixConv2d


class ConvNormActivation(nn.Sequential):
    """A convolution, a normalisation and, if named, an activation.

    Args:
        conv: the convolution.
        norm_layer: makes the normalisation from a number of channels.
        activation: "relu", "relu6", "swish", or None for none.
    """

    def __init__(
        self,
        conv: nn.Conv2d | MixConv2d,
        norm_layer: NormLayer = nn.BatchNorm2d,
        activation: str | None = "relu",
    ) -> None:
        layers = OrderedDict[str, nn.Module](conv=conv, norm=norm_layer(conv.out_channels))
        if activation is not None:
            layers["activation"] = make_activation(activation)
        super().__init__(layers)


# %%
list(ConvNormActivation(MixConv2d(8, (3, 5))).state_dict())

# %% [markdown]
# ## The depthwise-separable block
#
# MobileNetV1 is a stack of these: a depthwise layer that looks around within each channel, then a pointwise layer that looks across channels at each pixel.
#
# The depthwise layer may be mixed. With one kernel size MixConv *is* a depthwise `nn.Conv2d`, so the blocks use that: tools that know PyTorch's layers will recognise it.

# %%
#| export blocks.py
from collections.abc import Sequence
from typing import Any, cast

from mixconv.layer import make_pointwise


def make_depthwise(
    channels: int,
    kernel_sizes: int | Sequence[int],
    stride: int = 1,
    *,
    partition: str | Sequence[int] = "equal",
    dilated: bool = False,
    padding: str = "symmetric",
    dilation: int = 1,
) -> nn.Conv2d | MixConv2d:
    """A MixConv layer or, for a single kernel size, the plain depthwise `nn.Conv2d` it is.

    Arguments and errors are those of `MixConv2d`.
    """
    mixed = MixConv2d(
        channels, kernel_sizes, stride,
        partition=partition, dilated=dilated, padding=padding, dilation=dilation,
    )  # fmt: skip
    return mixed if len(mixed.kernel_sizes) > 1 else cast("nn.Conv2d", mixed.convs[0])


# %%
[type(make_depthwise(8, sizes)).__name__ for sizes in [(3,), (3, 5)]]

# %%
#| export blocks.py
from mixconv._checks import as_stride


class DepthwiseSeparableBlock(nn.Module):
    """Depthwise or mixed depthwise convolution, then pointwise; each normalised and activated.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_sizes: `(3,)` is MobileNetV1's block; more sizes make it a MixConv block.
        stride: of the depthwise layer.
        partition: how channels are split; see `MixConv2d`.
        dilated: see `MixConv2d`.
        padding: "symmetric" or "same".
        activation: "relu", "relu6" or "swish".
        norm_layer: makes a normalisation from a number of channels.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.

    Source: MobileNetV1 (Howard et al., 2017), Table 1. Chapter 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: int | Sequence[int] = (3,),
        stride: int = 1,
        *,
        partition: str | Sequence[int] = "equal",
        dilated: bool = False,
        padding: str = "symmetric",
        activation: str = "relu",
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.stride, self.out_channels = as_stride(stride), out_channels
        mixed = make_depthwise(
            in_channels, kernel_sizes, stride,
            partition=partition, dilated=dilated, padding=padding,
        )  # fmt: skip
        pointwise = make_pointwise(in_channels, out_channels)
        self.depthwise = ConvNormActivation(mixed, norm_layer, activation)
        self.pointwise = ConvNormActivation(pointwise, norm_layer, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Depthwise, then pointwise."""
        y: Tensor = self.pointwise(self.depthwise(x))
        return y


# %% [markdown]
# Its two steps written out, with gradients of the image and of both kernels:

# %%
import torch.nn.functional as F
from torch.func import functional_call

from mixconv.teaching import check_rewrite

torch.manual_seed(0)
plain = DepthwiseSeparableBlock(4, 6, stride=2).double().eval()


def by_block(x, depthwise, pointwise):
    weights = {"depthwise.conv.weight": depthwise, "pointwise.conv.weight": pointwise}
    return functional_call(plain, weights, x)


def two_steps(x, depthwise, pointwise):
    y = F.conv2d(x, depthwise, stride=2, padding=1, groups=4)
    y = F.relu(plain.depthwise.norm(y))
    return F.relu(plain.pointwise.norm(F.conv2d(y, pointwise)))


shapes = [(2, 4, 8, 8), (4, 1, 3, 3), (6, 4, 1, 1)]
tensors = [torch.randn(shape).double() for shape in shapes]
check_rewrite(two_steps, by_block, *tensors, what="block and its two steps")

# %% [markdown]
# What it costs, layer by layer, with chapter 1's counter. With stride 2 both layers compute a quarter of the outputs.

# %%
from mixconv.formulation import count_costs
from mixconv.teaching import table


def cost_table(block: nn.Module, *shape: int):
    costs = count_costs(block, torch.zeros(shape))
    rows = [[c.name, c.kind, c.output_shape, c.parameters, c.multiply_adds] for c in costs]
    return table(["layer", "kind", "output", "parameters", "multiply-adds"], rows)


cost_table(DepthwiseSeparableBlock(64, 128, (3, 5, 7), stride=2), 1, 64, 56, 56)


# %% [markdown]
# ## Squeeze-and-excitation, by hand
#
# A gate for each channel, computed from all of them. Two channels of 2×2 pixels:
#
# - **Squeeze.** Average each channel. Channel 0 holds 1, 2, 3, 6: mean 3. Channel 1 holds 0, 0, 2, 2: mean 1.
# - A small layer from two values to one: say relu(1 · 3 − 1 · 1) = 2.
# - **Excite.** A layer back to two values: say 0 · 2 = 0 and 10 · 2 = 20. The sigmoid makes them 0.5 and nearly 1.
# - Multiply: channel 0 is halved, channel 1 stays.
#
# > 📄 **Paper.** Figure 8 and its text do not draw squeeze-and-excitation.
#
# > ⚙️ **Official code.** Most MixNet blocks have it. The width of the small layer is the squeeze ratio times the block's *input* channels, not of the wide ones that it gates; so a larger expansion does not widen it. Its activation is the block's.

# %%
#| export blocks.py
class SqueezeExcite(nn.Module):
    """Scale each channel by a gate that is computed from the means of all channels.

    Args:
        channels: channels to gate.
        squeezed_channels: width of the small layer between.
        activation: of the small layer: "relu", "relu6" or "swish".

    Shape:
        Input and output `(N, C, H, W)`.

    Source: `_call_se` in the official `mixnet_model.py`; Hu et al., 2018. Chapter 4.
    """

    def __init__(self, channels: int, squeezed_channels: int, activation: str = "relu") -> None:
        super().__init__()
        self.squeeze = make_pointwise(channels, squeezed_channels, bias=True)
        self.activation = make_activation(activation)
        self.excite = make_pointwise(squeezed_channels, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Gate `x`."""
        means = x.mean((2, 3), keepdim=True)
        gate: Tensor = self.excite(self.activation(self.squeeze(means))).sigmoid()
        return x * gate


# %% [markdown]
# The layer, given those weights:

# %%
gate = SqueezeExcite(2, 1)
with torch.no_grad():
    gate.squeeze.weight[:] = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    gate.excite.weight[:] = torch.tensor([0.0, 10.0]).view(2, 1, 1, 1)
    gate.squeeze.bias.zero_(), gate.excite.bias.zero_()
    x = torch.tensor([[[[1.0, 2], [3, 6]], [[0, 0], [2, 2]]]])
    y = gate(x)
assert torch.allclose(y[0, 0], x[0, 0] / 2)
y


# %% [markdown]
# ## Two groups of 1×1 convolutions
#
# The block strings of chapter 7 say `a1.1`: expand with *two* 1×1 convolutions, one on each half of the channels.
#
# > ⚙️ **Official code.** Splits the channels, convolves each part, concatenates: `GroupedConv2D` in `custom_layers.py`.
#
# That is what PyTorch calls `groups=2`. Both groups have the same kernel size, so here PyTorch's grouping is enough.

# %%
def split_and_concatenate(x, first, second):
    low, high = x.chunk(2, dim=1)
    return torch.cat([F.conv2d(low, first), F.conv2d(high, second)], dim=1)


def grouped(x, first, second):
    return F.conv2d(x, torch.cat([first, second]), groups=2)


x, halves = torch.randn(1, 6, 3, 3).double(), [torch.randn(4, 3, 1, 1).double() for _ in "ab"]
check_rewrite(split_and_concatenate, grouped, x, *halves, what="two convolutions and one")

# %% [markdown]
# As a matrix from input to output channels, it is block diagonal. Half of the weights are gone, and so is all traffic between the halves:

# %% tags=["drawing"]
# fold: The code that draws this
figure, axes = plt.subplots(1, 2, figsize=(4.6, 2.5))
for axis, groups in zip(axes, (1, 2), strict=True):
    layer = nn.Conv2d(6, 8, 1, groups=groups, bias=False)
    for out in range(8):
        for channel in range(6):
            wired = channel // (6 // groups) == out // (8 // groups)
            color = "#555555" if wired else "#eeeeee"
            axis.add_patch(plt.Rectangle((channel, out), 0.9, 0.9, color=color))
    axis.set(xlim=(-0.1, 6), ylim=(8, -0.1), aspect="equal", xticks=[], yticks=[])
    axis.set(xlabel="input channel", ylabel="output channel")
    axis.set_title(f"groups={groups}: {layer.weight.numel()} weights", fontsize=10)
    axis.spines[:].set_visible(False)
show(
    figure,
    "grouped_pointwise.png",
    "Weight matrices of a 1×1 convolution from six to eight channels. With one group all "
    "cells are filled; with two groups two 3×4 blocks on the diagonal, 24 cells.",
    caption="With two groups half of the weights are gone, and nothing passes between the halves.",
)

# %% [markdown]
# So chapter 3's `make_pointwise(6, 8, groups=2)` is all there is to it.

# %%
make_pointwise(6, 8, groups=2)

# %% [markdown]
# **4.1** ★★ *10 minutes, two lines.* Two grouped 1×1 layers, one after the other, never let the halves talk. A *channel shuffle* between them does: with two groups, reorder channels 0 1 2 3 4 5 to 0 3 1 4 2 5. Write it for any number of groups.
#
# <details><summary>Hint: the idea</summary>
#
# Write the channels into a table, one row for each group. Read the table by columns.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `split = x.view(n, groups, channels // groups, height, width)`
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    raise NotImplementedError


def test_shuffle(answer) -> None:
    for groups, order in (
        (1, [0, 1, 2, 3, 4, 5]),
        (2, [0, 3, 1, 4, 2, 5]),
        (3, [0, 2, 4, 1, 3, 5]),
    ):
        x = torch.arange(6.0).view(1, 6, 1, 1)
        expect(answer, x, groups, gives=x[:, order], why="one channel of each group in turn")
    x = torch.randn(2, 6, 3, 4)
    expect(answer, x, 2, gives=x[:, [0, 3, 1, 4, 2, 5]], why="pixels stay where they are")


attempt(shuffle, test_shuffle)


# %% tags=["solution"]
# fold: Solution
def shuffle_solution(x: torch.Tensor, groups: int) -> torch.Tensor:
    n, channels, height, width = x.shape
    split = x.view(n, groups, channels // groups, height, width)
    return split.transpose(1, 2).reshape(n, channels, height, width)


def backwards(x: torch.Tensor, groups: int) -> torch.Tensor:
    """shuffle back: that is the way from 0 3 1 4 2 5 to 0 1 2 3 4 5"""
    return shuffle_solution(x, x.shape[1] // groups)


def read_by_rows(x: torch.Tensor, groups: int) -> torch.Tensor:
    """write the table and read it by rows again: nothing moves"""
    return x.view(x.shape[0], groups, -1, *x.shape[2:]).reshape(x.shape)


attempt(shuffle_solution, test_shuffle, wrong=[backwards, read_by_rows])

# %% [markdown]
# MixNet does not shuffle. What its halves see of each other goes through the layers that have one group; between those only the gates, one number for each channel, cross over. [Chapter 7](07_mixnet.ipynb) shows which halves never meet.

# %% [markdown]
# ## The inverted residual, with MixConv
#
# MobileNetV2's block turns a bottleneck inside out: it *widens* by `expand_ratio`, looks around in the wide space, and narrows again. The narrow ends carry the residual connection.
# MixNet's block, the last of the picture, puts MixConv in the middle and gates it.
#
# First a small helper. With *stochastic depth* a block is skipped, for some images, during training. It is off by default.
#
# > ✏️ **Ours.** The official MixNet code has no stochastic depth. timm's has, and engineers expect the switch.

# %% tags=["plumbing"]
# fold: Stochastic depth
#| export blocks.py
from mixconv._checks import check_positive, check_rate


class DropPath(nn.Module):
    """Stochastic depth: in training, zero the whole branch for a random part of the images.

    What remains is scaled up so that the mean stays. In evaluation, nothing happens.

    Args:
        rate: probability of dropping, 0 to less than 1.

    Raises:
        ValueError: if `rate` is out of range.

    Source: Huang et al., 2016. Chapter 4.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        check_rate("rate", rate)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole images of `x` at random."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return f"rate={self.rate}"


# %%
torch.manual_seed(0)
DropPath(0.5).train()(torch.ones(6, 1, 1, 1)).flatten()

# %% [markdown]
# Now the block, signature first. `expand_ratio=1` leaves the first step out, `squeeze_ratio=0` the gate.
#
# > ⚙️ **Official code.** No activation after the projection, as in MobileNetV2.

# %%
#| export blocks.py
from functools import partial


class MixConvBlock(nn.Module):
    """Inverted residual block: expand, MixConv, squeeze-and-excitation, project, add.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_sizes: `(3,)` is MobileNetV2's block; more sizes make it a MixConv block.
        stride: of the depthwise layer.
        expand_ratio: wide channels for each input channel; 1 leaves the expansion out.
        expand_groups: groups of the expanding 1×1 convolution.
        project_groups: groups of the projecting 1×1 convolution.
        squeeze_ratio: width of the gate's small layer as a fraction of `in_channels`; 0 leaves
            the gate out.
        partition: how the wide channels are split; see `MixConv2d`.
        dilated: see `MixConv2d`.
        padding: "symmetric" or "same".
        activation: "relu", "relu6" or "swish".
        norm_layer: makes a normalisation from a number of channels.
        drop_path_rate: stochastic depth of the residual branch.
        skip: whether to add the input where shapes allow.
        dilation: step between the taps of the depthwise kernels; see `MixConv2d`.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.

    Raises:
        ValueError: naming the argument, as the layers inside do.

    Source: paper, section 4 and Figure 8; `MixnetBlock` in the official `mixnet_model.py`.
    Chapter 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: int | Sequence[int] = (3,),
        stride: int = 1,
        *,
        expand_ratio: int = 6,
        expand_groups: int = 1,
        project_groups: int = 1,
        squeeze_ratio: float = 0.0,
        partition: str | Sequence[int] = "equal",
        dilated: bool = False,
        padding: str = "symmetric",
        activation: str = "relu",
        norm_layer: NormLayer = nn.BatchNorm2d,
        drop_path_rate: float = 0.0,
        skip: bool = True,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        check_positive("expand_ratio", expand_ratio)
        self.stride, self.out_channels = as_stride(stride), out_channels
        self.has_residual = skip and self.stride == 1 and in_channels == out_channels
        wide = in_channels * expand_ratio
        unit = partial(ConvNormActivation, norm_layer=norm_layer, activation=activation)
        self.expand: nn.Module = nn.Identity()
        if expand_ratio > 1:
            self.expand = unit(make_pointwise(in_channels, wide, expand_groups))
        options: Any = {"partition": partition, "dilated": dilated, "padding": padding}
        mixed = make_depthwise(wide, kernel_sizes, stride, dilation=dilation, **options)
        self.depthwise = unit(mixed)
        self.squeeze_excite = _make_gate(in_channels, wide, squeeze_ratio, activation)
        self.project = unit(make_pointwise(wide, out_channels, project_groups), activation=None)
        self.drop_path = DropPath(drop_path_rate)


# %%
#| export blocks.py
def _make_gate(channels: int, wide: int, squeeze_ratio: float, activation: str) -> nn.Module:
    """Squeeze-and-excitation over `wide` channels of a block with `channels` input channels."""
    if not 0 <= squeeze_ratio <= 1:
        raise ValueError(f"squeeze_ratio must be between 0 and 1, got {squeeze_ratio}")
    if squeeze_ratio == 0:
        return nn.Identity()
    return SqueezeExcite(wide, max(1, int(channels * squeeze_ratio)), activation)


# %%
#| export blocks.py
class MixConvBlock(MixConvBlock):
    def forward(self, x: Tensor) -> Tensor:
        """Expand, mix, gate, project, and add the input where shapes allow."""
        y: Tensor = self.squeeze_excite(self.depthwise(self.expand(x)))
        y = self.project(y)
        return x + self.drop_path(y) if self.has_residual else y


# %% [markdown]
# The MixNet block of the picture is one of MixNet-M's. In words: kernels 3, 5, 7 and 9; both 1×1 layers in two groups; stride 1; widened 6 times; 80 channels in and out; squeeze ratio 0.25; swish. (Chapter 7 reads that off the string `k3.5.7.9_a1.1_p1.1_s11_e6_i80_o80_se0.25_sw`.) On its 14×14 pixels, with a pencil:
#
# - Expand: 80 · 480 / 2 groups = 19,200 weights.
# - MixConv: 480 / 4 · (9 + 25 + 49 + 81) = 19,680.
# - Gate: 480 · 20 + 20 = 9,620, and 20 · 480 + 480 = 10,080: together 9,620 + 10,080 = 19,700.
# - Project: 480 · 80 / 2 = 19,200.
#
# Each is used 14 · 14 = 196 times, once for each pixel, except the gate's: its weights are used once, and its 20 + 480 = 500 biases multiply nothing.

# %%
block = MixConvBlock(80, 80, (3, 5, 7, 9), expand_groups=2, project_groups=2,
                     squeeze_ratio=0.25, activation="swish")  # fmt: skip
cost_table(block, 1, 80, 14, 14)

# %% [markdown]
# By kind: MixConv is a third of the multiply-adds. A quarter of the parameters sit in the gate, whose multiply-adds are next to nothing.

# %%
costs = count_costs(block, torch.zeros(1, 80, 14, 14))
gates = [c for c in costs if "squeeze_excite" in c.name]
mixed = [c for c in costs if c.kind == "depthwise"]
for name, part in (("gate", gates), ("MixConv", mixed)):
    parameters = sum(c.parameters for c in part) / sum(c.parameters for c in costs)
    work = sum(c.multiply_adds for c in part) / sum(c.multiply_adds for c in costs)
    print(f"{name}: {parameters:.0%} of the parameters, {work:.1%} of the multiply-adds")

# %% [markdown]
# Are the parts wired as described? A block against its steps written out, with the gradients of the input and of the MixConv kernels.

# %%
block = MixConvBlock(8, 8, (3, 5), expand_ratio=2, squeeze_ratio=0.5).double().eval()


def written_out(x, first, second):
    y = F.relu(block.expand.norm(F.conv2d(x, block.expand.conv.weight)))
    low, high = y.split(8, dim=1)
    y = torch.cat([F.conv2d(low, first, padding=1, groups=8),
                   F.conv2d(high, second, padding=2, groups=8)], dim=1)  # fmt: skip
    y = F.relu(block.depthwise.norm(y))
    y = y * torch.sigmoid(block.squeeze_excite.excite(F.relu(block.squeeze_excite.squeeze(
        F.adaptive_avg_pool2d(y, 1)))))  # fmt: skip
    return x + block.project.norm(F.conv2d(y, block.project.conv.weight))


def by_block(x, first, second):
    names = ("depthwise.conv.convs.0.weight", "depthwise.conv.convs.1.weight")
    return functional_call(block, dict(zip(names, (first, second), strict=True)), x)


kernels = [conv.weight.detach() for conv in block.depthwise.conv.convs]
x = torch.randn(2, 8, 7, 7).double()
check_rewrite(written_out, by_block, x, *kernels, what="block and its steps")


# %% [markdown]
# ## Larger maps, for chapter 7
#
# No block above needs this; the networks of chapter 7 will. Segmentation wants the last maps larger than a 32nd of the image. A network with `output_stride=16` (a MixNet has the argument, chapter 7) computes its last block of stride 2 with stride 1, and spreads the kernels of the blocks after it, so that they see as far as ever. Stride and dilation of each block:

# %% tags=["plumbing"]
# fold: Stride 1 and dilation, from where the maps shall not shrink
#| export blocks.py
def stop_at(output_stride: int, strides: Sequence[int]) -> list[tuple[int, int]]:
    """Stride and dilation for each block after a stem of stride 2.

    A block that would make the map smaller than 1 / `output_stride` of the image keeps its size;
    the kernels of the blocks after it are spread out instead, to see as far as ever.

    Raises:
        ValueError: for another output stride than 2, 4, 8, 16 or 32.

    Source: `EfficientNetBuilder` of timm 1.0. Chapter 4.
    """
    if isinstance(output_stride, bool) or output_stride not in (2, 4, 8, 16, 32):
        raise ValueError(f"output_stride must be 2, 4, 8, 16 or 32, got {output_stride!r}")
    reached, spread, found = 2, 1, list[tuple[int, int]]()
    for stride in strides:
        fits = reached * stride <= output_stride or output_stride == 32
        found.append((stride if fits else 1, spread))
        reached, spread = (reached * stride, spread) if fits else (reached, spread * stride)
    return found


# %%
stop_at(16, [1, 2, 2, 2, 1, 2, 1])


# %% [markdown]
# ## Exercises
#
# **4.2** ★ *5 minutes, two lines.* How many weights do the 1×1 convolutions of a block from c to c channels have, with `expand_ratio` e and `groups` groups in each? Leave the gate and the normalisations out, and remember what a ratio of 1 does.
#
# <details><summary>Hint: the idea</summary>
#
# A 1×1 layer from a to b channels has a · b weights. With g groups each output reads only a / g of the inputs.
#
# </details>

# %%
def pair_weights(channels: int, expand_ratio: int, groups: int) -> int:
    raise NotImplementedError


def test_pair(answer) -> None:
    expect(answer, 1, 2, 1, gives=4, why="1 · 2 and 2 · 1")
    expect(answer, 3, 1, 1, gives=9, why="a ratio of 1 leaves the expansion out: 3 · 3")
    for c, e, g in ((40, 6, 2), (40, 6, 1), (24, 3, 4), (24, 3, 2), (40, 1, 2)):
        block = MixConvBlock(c, c, expand_ratio=e, expand_groups=g, project_groups=g)
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)]
        counted = sum(layer.weight.numel() for layer in layers if layer.kernel_size == (1, 1))
        expect(answer, c, e, g, gives=counted, why="counted in a block")


attempt(pair_weights, test_pair)


# %% tags=["solution"]
# fold: Solution
def pair_weights_solution(channels: int, expand_ratio: int, groups: int) -> int:
    layers = 2 if expand_ratio > 1 else 1
    return layers * channels * channels * expand_ratio // groups


def always_two(channels: int, expand_ratio: int, groups: int) -> int:
    """count an expansion at a ratio of 1, where there is none"""
    return 2 * channels * channels * expand_ratio // groups


def two_groups(channels: int, expand_ratio: int, groups: int) -> int:
    """count one layer and no groups, which is right by chance for two groups"""
    return channels**2 * expand_ratio


def one_of_them(channels: int, expand_ratio: int, groups: int) -> int:
    """count one layer and forget the other"""
    return channels**2 * expand_ratio // groups


attempt(pair_weights_solution, test_pair, wrong=[always_two, two_groups, one_of_them])


# %% [markdown]
# **4.3** ★ *5 minutes, one line.* How wide is the small layer of a block's gate? Given the block's input channels, its `expand_ratio` and its `squeeze_ratio`. (Round down, but never to nothing.)
#
# <details><summary>Hint: the idea</summary>
#
# The official code takes the ratio of one of two numbers: the channels that enter the block, or those inside it. Which?
#
# </details>

# %%
def gate_width(in_channels: int, expand_ratio: int, squeeze_ratio: float) -> int:
    raise NotImplementedError


def test_gate_width(answer) -> None:
    for c, e, ratio in ((40, 6, 0.5), (40, 6, 0.25), (24, 3, 0.3), (2, 6, 0.25), (24, 3, 0.33)):
        block = MixConvBlock(c, 8, expand_ratio=e, squeeze_ratio=ratio)
        width = block.squeeze_excite.squeeze.out_channels
        expect(answer, c, e, ratio, gives=width, why="as the block builds it")


attempt(gate_width, test_gate_width)


# %% tags=["solution"]
# fold: Solution
def gate_width_solution(in_channels: int, expand_ratio: int, squeeze_ratio: float) -> int:
    return max(1, int(in_channels * squeeze_ratio))


def of_the_wide_part(in_channels: int, expand_ratio: int, squeeze_ratio: float) -> int:
    """take the ratio of the widened channels, where the gate stands"""
    return max(1, int(in_channels * expand_ratio * squeeze_ratio))


def to_nothing(in_channels: int, expand_ratio: int, squeeze_ratio: float) -> int:
    """round down to nothing: a gate without a layer"""
    return int(in_channels * squeeze_ratio)


def to_the_nearest(in_channels: int, expand_ratio: int, squeeze_ratio: float) -> int:
    """round to the nearest: 7.92 channels become 8"""
    return max(1, round(in_channels * squeeze_ratio))


attempt(gate_width_solution, test_gate_width,
        wrong=[of_the_wide_part, to_nothing, to_the_nearest])  # fmt: skip


# %% [markdown]
# **4.4** ★★ *10 minutes, two lines.* A budget. A block from c to c channels, stride 1, no groups, no gate, one k×k kernel size, may cost `budget` multiply-adds for each pixel. What is the largest whole `expand_ratio`? (0 if no block fits.)
#
# <details><summary>Hint: the idea</summary>
#
# All three layers grow with the ratio: expansion, depthwise, projection. But at a ratio of 1 there are only two.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# For each pixel $e \cdot (c \cdot c + c \cdot k^2 + c \cdot c)$ from a ratio of 2 on, and $c \cdot k^2 + c \cdot c$ at 1.
#
# </details>

# %%
def widest(channels: int, kernel_size: int, budget: int) -> int:
    raise NotImplementedError


def test_widest(answer) -> None:
    expect(answer, 1, 3, 22, gives=2, why="11 for each step: 1 + 9 + 1")
    expect(answer, 40, 3, 24_000, gives=6, why="3,560 for each step")
    expect(answer, 40, 9, 24_000, gives=3, why="6,440 for each step: large kernels narrow a block")
    expect(answer, 1, 3, 10, gives=1, why="a ratio of 1 has no expansion: 9 + 1")
    expect(answer, 40, 3, 1_960, gives=1, why="a ratio of 1 has no expansion: 360 + 1,600")
    expect(answer, 40, 3, 1_959, gives=0, why="one less than that, and no block fits")


attempt(widest, test_widest)


# %% tags=["solution"]
# fold: Solution
def widest_solution(channels: int, kernel_size: int, budget: int) -> int:
    widened = budget // (2 * channels**2 + channels * kernel_size**2)
    return widened or int(budget >= channels**2 + channels * kernel_size**2)


def always_expanded(channels: int, kernel_size: int, budget: int) -> int:
    """charge an expansion at a ratio of 1, where there is none"""
    return budget // (2 * channels**2 + channels * kernel_size**2)


def at_least_one(channels: int, kernel_size: int, budget: int) -> int:
    """take it that a ratio of 1 always fits"""
    return max(1, budget // (2 * channels**2 + channels * kernel_size**2))


def depthwise_is_free(channels: int, kernel_size: int, budget: int) -> int:
    """take the depthwise layer for free"""
    return budget // (2 * channels**2)


def narrow_depthwise(channels: int, kernel_size: int, budget: int) -> int:
    """let the depthwise layer work on the narrow channels"""
    return (budget - channels * kernel_size**2) // (2 * channels**2)


attempt(widest_solution, test_widest,
        wrong=[always_expanded, at_least_one, depthwise_is_free, narrow_depthwise])  # fmt: skip

# %% [markdown]
# ## Takeaways
# - `DepthwiseSeparableBlock`: look around, then across. `MixConvBlock`: widen, look around, gate, narrow, and add the input where it can be added (stride 1, as many channels out as in).
# - The gate's width follows the block's input channels.
# - `a1.1` is one convolution with `groups=2`.
# - In a wide block the pointwise layers cost most; that is what leaves room for large depthwise kernels.
#
# **Further reading**: [MobileNetV1](https://arxiv.org/abs/1704.04861) and [V2](https://arxiv.org/abs/1801.04381), which argues for linear ends in its section 3.2; [squeeze-and-excitation](https://arxiv.org/abs/1709.01507); [swish](https://arxiv.org/abs/1710.05941); [stochastic depth](https://arxiv.org/abs/1603.09382).
#
# Previous: [3 · The layer](03_layer.ipynb) · Next: [5 · MobileNets](05_mobilenets.ipynb)
