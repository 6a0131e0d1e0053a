# %% [markdown]
# # 10 · Heirs
#
# What became of the idea after 2019? Look at the uppermost lane of the picture below. Few of the networks that we know have cut the channels into parts since, and four of those six came within one year. (A year is that of the first posting. We say *heir* for a layer that later does the same, whether or not its authors had MixConv in mind.)
#
# This chapter builds five of them. Each becomes a few lines, around `MixConv2d` where it has a depthwise part. Each is compared with a second writing of its authors' definition, and three with a library's module, too. Then come four layers that *look* like MixConv and are not, with a test that tells them apart; and the question why large kernels came back and mixed ones rarely did.
#
# **You will be able to**
# - say of five later layers which channels go through which kernel, and build them;
# - tell by gradient what one output sees, and so tell a mix from its look-alikes;
# - give reasons, cited and our own, why one large size won where MixConv proposed many.
#
# **Know first:** [chapter 1](01_formulation.ipynb) and [chapter 3](03_layer.ipynb).
#
# **Time:** 25 minutes to read. Runs in under 60 seconds on two cores.

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style

use_style()
LANES = [  # name, colour, (year, height in the lane, label)
    ("parts of the channels,\neach its own window", "#222222", [
        (2019.55, 0, "MixConv"), (2021.28, 0, "CoaT"), (2022.85, 0.55, "MogaNet"),
        (2023.18, 0.18, "FasterNet"), (2023.24, -0.19, "InceptionNeXt"), (2023.54, -0.56, "SMT"),
        (2024.37, 0.55, "MambaOut")]),
    ("several windows,\nall channels in each", "#555555", [
        (2020.45, 0.25, "PyConv"), (2020.5, -0.25, "YOLOv5's MixConv2d"),
        (2022.52, 0.25, "SLaK"), (2022.7, -0.25, "SegNeXt")]),
    ("one window a layer", "#777777", [
        (2017.29, 0, "MobileNet 3×3"), (2021.25, 0, "EfficientNetV2 3×3"), (2022.03, 0.5,
        "ConvNeXt 7×7"), (2022.2, -0.5, "RepLKNet 31×31"), (2024.29, 0, "MobileNetV4 3×3, 5×5")]),
]  # fmt: skip
figure, axis = plt.subplots(figsize=(8.6, 3.9))
for lane, (name, color, works) in enumerate(LANES):
    axis.axhspan(-2.2 * lane - 0.95, -2.2 * lane + 0.95, color=color, alpha=0.12, lw=0)
    axis.text(2016.8, -2.2 * lane, name, ha="right", va="center", weight="bold")
    for year, height, label in works:
        weight = "bold" if label == "MixConv" else "normal"
        axis.plot(year, height - 2.2 * lane, "o", color=color, ms=7)
        axis.text(year + 0.1, height - 2.2 * lane, label, va="center", fontsize=9, weight=weight)
axis.set(xlim=(2016.9, 2026.6), ylim=(-5.5, 1.05), yticks=[], xticks=range(2017, 2025))
axis.spines["bottom"].set_bounds(2017, 2025)
axis.spines["left"].set_visible(False)
show(
    figure,
    "after_2019.png",
    "A time line from 2017 to 2024 in three lanes. Parts of the channels, each its own window: "
    "MixConv 2019, CoaT 2021, then MogaNet, FasterNet, InceptionNeXt and SMT in 2022 and 2023, "
    "MambaOut in 2024. Several windows, all channels in each: four layers. One window a layer: "
    "five networks.",
    caption="Most heirs of MixConv came within one year; one window a layer is the rule.",
)

# %% [markdown]
# ## What does one output see?
#
# By hand first. Two channels of 5×5 pixels: channel 0 holds ones, channel 1 tens; all kernels are full of ones. At the centre, a MixConv with kernels 3 and 5 gives 9 · 1 = 9 and 25 · 10 = 250: each output saw one channel. A 3×3 kernel that reads *both* channels gives 9 · 1 + 9 · 10 = 99: two channels are in that number.

# %%
import torch
from torch import nn

from mixconv.layer import MixConv2d

x = torch.stack([torch.ones(5, 5), 10 * torch.ones(5, 5)])[None]
mix, dense = MixConv2d(2, (3, 5)), nn.Conv2d(2, 1, 3, padding=1, bias=False)
for weight in [*mix.parameters(), *dense.parameters()]:
    nn.init.ones_(weight)
[*mix(x)[0, :, 2, 2].tolist(), *dense(x)[0, :, 2, 2].tolist()]

# %% [markdown]
# The gradient says the same of any layer, with any weights. Take one output, at the centre of the image. Where its gradient is not zero, there it looks: which input channels, and which pixels of each. From that follow two numbers: how many channels an output sees, and how large a window of each.

# %%
#| export heirs.py
"""What came after MixConv: five layers, each a few lines around `MixConv2d` (chapter 10).

Each is written from its authors' published code, and keeps its tensors in their order.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv.layer import MixConv2d
from mixconv.partition import default_kernel_sizes


def trace_wires(layer: Callable[[Tensor], Tensor], channels: int, size: int = 13) -> Tensor:
    """Which pixels of which input channels each output sees.

    The gradient of each output channel, at the centre of a random image, is zero where nothing
    is seen. Batch norms must be in evaluation mode.

    Args:
        layer: anything that maps images to images of the same size.
        channels: its input channels.
        size: rows and columns of the image; odd, and at least as large as what is seen.

    Shape:
        Output: `(C_out, C_in, size, size)`, true where output sees input.

    Source: ours. Chapter 10.
    """
    x = torch.randn(1, channels, size, size, requires_grad=True)
    centre = layer(x)[0, :, size // 2, size // 2]
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0][0] for y in centre]
    return torch.stack(rows) != 0


def window_sizes(wires: Tensor) -> Tensor:
    """Rows and columns from the first to the last pixel seen; 0 where there is no wire.

    Shape:
        wires `(C_out, C_in, size, size)`, output `(C_out, C_in, 2)`.
    """
    spans, size = [], wires.shape[-1]
    count = torch.arange(1, size + 1)
    for axis in (3, 2):  # seen in any column: the rows; seen in any row: the columns
        seen = wires.any(dim=axis)
        last, first = (seen * count).amax(-1), (seen * count.flip(0)).amax(-1)
        spans.append((last + first - size).clamp(min=0))
    return torch.stack(spans, dim=-1)


# %%
from mixconv.teaching import check_rewrite, table


def what_is_seen(layer, channels=8, size=13):
    """(channels an output sees, windows it sees them through), over all outputs."""
    wires = trace_wires(layer, channels, size)
    windows = window_sizes(wires)
    pairs = {tuple(pair) for pair in windows.flatten(0, 1).tolist()} - {(0, 0)}
    counts = set(wires.flatten(2).any(dim=2).sum(dim=1).tolist())
    return sorted(counts), [f"{rows}×{columns}" for rows, columns in sorted(pairs)]


def tell(name, layer, channels=8, size=13):
    counts, windows = what_is_seen(layer, channels, size)
    print(f"{name}: an output sees {' or '.join(map(str, counts))} of {channels} channels,",
          "through", " or ".join(windows))  # fmt: skip


tell("MixConv", MixConv2d(8, (3, 5, 7, 9)))
tell("dense", nn.Conv2d(8, 8, 3, padding=1))

# %% [markdown]
# An output of a MixConv sees one channel, through one of four windows; one of a dense layer sees all eight, through the same window.
#
# The same as a picture: one row for each output, one column for each input; in each cell, the pixels that are seen. All wiring pictures of this chapter come from this function.

# %% tags=["drawing"]
# fold: The code that draws this
import numpy as np
from matplotlib.colors import to_rgb


def draw_wires(axis, wires, title):
    windows = window_sizes(wires)
    spare = (wires.shape[2] - max(13, int(windows.max()) + 2)) // 2
    wires = wires[..., spare : wires.shape[2] - spare, spare : wires.shape[3] - spare]
    step = wires.shape[2] + 2
    colors = [[to_rgb(kernel_color(int(pair.max()))) for pair in row] for row in windows]
    cells = np.where(wires[..., None], np.array(colors)[:, :, None, None], 0.94)
    cells = np.pad(cells, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], constant_values=1)
    axis.imshow(
        cells.transpose(0, 2, 1, 3, 4).reshape(8 * step, 8 * step, 3), interpolation="nearest"
    )
    rows = [sorted({(*pair,) for pair in row.tolist()} - {(0, 0)}) for row in windows]
    for pairs in {tuple(row): row for row in rows}.values():
        words = "\n".join("copy" if p == (1, 1) else f"{p[0]}×{p[1]}" for p in pairs)
        place = step * (rows.index(pairs) + rows.count(pairs) / 2)
        axis.text(8 * step + 2, place, words, va="center", weight="bold")
    for row, column in (windows == 1).all(dim=-1).nonzero().tolist():  # copies: easy to miss
        place = (step * (column + 0.5) - 0.5, step * (row + 0.5) - 0.5)
        axis.plot(*place, "o", color="black", mfc="white", ms=5)
    axis.set(xlabel="input channel", ylabel="output channel", title=title, xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def picture(filename, alt, caption, layers, columns):
    torch.manual_seed(0)
    rows = len(layers) // columns
    figure, axes = plt.subplots(rows, columns, figsize=(3.5 * columns, 2.8 * rows))
    for axis, (title, layer) in zip(axes.flat, layers.items(), strict=True):
        draw_wires(axis, trace_wires(layer, 8, size=27), title)
    show(figure, filename, alt, caption)


# %%
from mixconv import heirs

smt = heirs.MultiHeadMixedConv(8, expand_ratio=1)
smt.norm, smt.act, smt.project = nn.Identity(), nn.Identity(), nn.Identity()
moganet = heirs.MultiOrderDWConv(8)
moganet.pointwise = nn.Identity()
picture(
    "wires_of_heirs.png",
    "Six 8×8 grids. MixConv: squares of four sizes on the diagonal. CoaT: three sizes. SMT: in "
    "each row four squares of four sizes. MogaNet: squares of 5, 13, 23. InceptionNeXt: five "
    "circles for copies, a square, two bands. FasterNet: four squares in a corner, six circles.",
    "Most heirs have one window in a row, as MixConv; in SMT four meet, and circles are copies.",
    {
        "MixConv": MixConv2d(8, (3, 5, 7, 9)), "CoaT": heirs.ConvRelPosEnc(1).mix,
        "SMT, after its first 1×1": smt, "MogaNet, before its 1×1": moganet,
        "InceptionNeXt": heirs.InceptionDWConv2d(8), "FasterNet": heirs.PartialConv2d(8),
    },
    columns=3,
)  # fmt: skip

# %% [markdown]
# MixConv is a diagonal whose windows grow; a dense layer would fill every cell. CoaT has the same with other groups. In SMT four sizes meet in each output, MogaNet's windows are wider, InceptionNeXt and FasterNet copy most channels. One after the other they are now built. (The picture imports them from this chapter's module.)
#
# For each, the authors' definition is written a second time, in plain tensor operations, without their modules and without ours. (A second writing catches slips. It cannot catch a misreading; their modules can, see below.) That needs a depthwise convolution with any window: chapter 1's sum of shifted images, with two sides, a bias and a dilation. And `agree` compares a layer with its definition, in the output and every gradient.

# %%
from torch.func import functional_call


def shifted_sum(x, weight, bias, dilation=1):
    """Depthwise convolution with any odd window, as a sum of shifted images."""
    (rows, columns), (height, width) = weight.shape[2:], x.shape[2:]
    top, left = dilation * (rows // 2), dilation * (columns // 2)
    padded = F.pad(x, [left, left, top, top])
    y = bias.view(-1, 1, 1).expand_as(x)
    for i in range(rows):
        for j in range(columns):
            shifted = padded[:, :, dilation * i :, dilation * j :][:, :, :height, :width]
            y = y + shifted * weight[:, 0, i, j].view(-1, 1, 1)
    return y


def agree(definition, layer, *inputs, what, options=()):
    layer = layer.double().eval()
    names = [name for name, _ in layer.named_parameters()]
    weights = [torch.randn_like(w) / w[0].numel() ** 0.5 for w in layer.parameters()]

    def by_layer(*tensors):
        images, kernels = tensors[: len(inputs)], tensors[len(inputs) :]
        return functional_call(layer, dict(zip(names, kernels, strict=True)), (*images, *options))

    check_rewrite(definition, by_layer, *inputs, *weights, what=what)


# %% [markdown]
# ## CoaT (2021): MixConv inside attention
#
# *What changed:* an image transformer needs to know where things are. [CoaT](https://arxiv.org/abs/2104.06399) (Xu and others, ICCV 2021) adds a term to its attention: the values $v$, as an image, pass through a depthwise convolution, and the queries $q$ multiply the result. Channels come in *heads* there: of eight, two get 3×3, three 5×5, three 7×7. *Why:* heads are groups of channels already. Giving each its own window costs no further split, and near and far neighbours are told apart by different heads.
#
# > ⚙️ **Their code.** `ConvRelPosEnc` in [`src/models/coat.py`](https://github.com/mlpc-ucsd/CoaT/blob/main/src/models/coat.py). The convolutions have biases; the first token (the class token) is no pixel and gets zeros; the default is `{3: 2, 5: 3, 7: 3}`: literally a MixConv, with unequal groups.

# %%
#| export heirs.py
class ConvRelPosEnc(nn.Module):
    """CoaT's convolutional relative position encoding: queries times mixed-convolved values.

    Args:
        head_channels: channels of one head.
        heads: how many heads get each kernel size.
        sizes: the kernel sizes, one for each entry of `heads`.

    Shape:
        q and v `(N, heads, 1 + H·W, C)`, the class token first; output the same.

    Raises:
        ValueError: from `forward`, if `size` does not fit the tokens.

    Source: arXiv 2104.06399; `ConvRelPosEnc` in CoaT's `coat.py`. Chapter 10.
    """

    def __init__(
        self, head_channels: int, heads: Sequence[int] = (2, 3, 3), sizes: Sequence[int] = (3, 5, 7)
    ) -> None:
        super().__init__()
        partition = [count * head_channels for count in heads]
        self.mix = MixConv2d(sum(partition), sizes, partition=partition, bias=True)

    def forward(self, q: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """The position term of the attention, for an image of `size` rows and columns."""
        if v.shape[2] != 1 + size[0] * size[1]:
            raise ValueError(f"size {size} needs 1 + {size[0] * size[1]} tokens, got {v.shape[2]}")
        image = v[:, :, 1:].transpose(2, 3).flatten(1, 2).unflatten(2, size)
        position = self.mix(image).flatten(2).unflatten(1, v.shape[1::2]).transpose(2, 3)
        return F.pad(q[:, :, 1:] * position, (0, 0, 1, 0))


# %% [markdown]
# Their definition head by head, with eight heads of two channels on a 4×5 image:

# %%
heads, size = [3, 3, 5, 5, 5, 7, 7, 7], (4, 5)


def coat_definition(q, v, *weights):
    results = []
    for h, k in enumerate(heads):
        group, place = (k - 3) // 2, 2 * heads[:h].count(k)
        w, b = (tensor[place : place + 2] for tensor in weights[2 * group : 2 * group + 2])
        image = v[:, h, 1:].transpose(1, 2).unflatten(2, size)
        position = shifted_sum(image, w, b).flatten(2).transpose(1, 2)
        results.append(F.pad(q[:, h, 1:] * position, (0, 0, 1, 0)))
    return torch.stack(results, dim=1)


q, v = torch.randn(2, 2, 8, 21, 2).double()
agree(coat_definition, ConvRelPosEnc(2), q, v, options=[size], what="CoaT and ConvRelPosEnc")


# %% [markdown]
# ## SMT (2023): MixConv, then the sizes meet
#
# *What changed:* [SMT](https://arxiv.org/abs/2307.08579) (Lin and others, ICCV 2023) has a *multi-head mixed convolution*, MHMC. It is MixConv with equal groups and the paper's own sizes, 3, 5, 7, 9 for four heads. What is new comes after it: one channel of each head is put beside one of each other head, and a 1×1 convolution in groups of four mixes just those. *Why:* in a MixNet the kernel sizes meet in the dense 1×1 layer that follows, all at once. Here each output of the first 1×1 layer sees every size exactly once, for very few weights; a dense 1×1 layer then finishes. The result multiplies another branch, in place of attention's weights.
#
# > ⚙️ **Their code.** `Attention` with `ca_attention == 1` in [`models/smt.py`](https://github.com/AFeng-x/SMT/blob/main/models/smt.py): `local_conv_1` to `local_conv_4`, then `proj0`, `bn`, GELU, `proj1`. The linear layers before it and the product after it are left out here.

# %%
#| export heirs.py
class MultiHeadMixedConv(nn.Module):
    """SMT's multi-head mixed convolution and the aggregation that lets its sizes meet.

    Args:
        channels: a multiple of `heads`.
        heads: groups, with kernel sizes 3, 5, 7 and so on.
        expand_ratio: how much wider the aggregation is inside.

    Shape:
        Input `(N, C, H, W)`, output the same.

    Raises:
        ValueError: if `heads` does not divide `channels`.

    Source: arXiv 2307.08579, MHMC and SAA; `Attention` in SMT's `smt.py`. Chapter 10.
    """

    def __init__(self, channels: int, heads: int = 4, expand_ratio: int = 2) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels must be a multiple of {heads} heads, got {channels}")
        self.heads, wide = heads, expand_ratio * channels
        self.mix = MixConv2d(channels, default_kernel_sizes(heads), bias=True)
        self.narrow = nn.Conv2d(channels, wide, 1, groups=channels // heads)
        self.norm, self.act = nn.BatchNorm2d(wide), nn.GELU()
        self.project = nn.Conv2d(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each head, interleave the heads, mix one channel of each, then all."""
        interleaved = self.mix(x).unflatten(1, (self.heads, -1)).transpose(1, 2).flatten(1, 2)
        y: Tensor = self.project(self.act(self.norm(self.narrow(interleaved))))
        return y


# %% [markdown]
# The definition for eight channels, two per head. Channel $j$ of each head goes into four number $j$, and each four becomes eight numbers:

# %%
def smt_definition(x, *weights):
    convs, (narrow, narrow_bias, scale, shift, project, project_bias) = weights[:8], weights[8:]
    y = [shifted_sum(x[:, 2 * i : 2 * i + 2], *convs[2 * i : 2 * i + 2]) for i in range(4)]
    fours = torch.stack(y, dim=2)  # channel, then head
    y = torch.einsum("gok,ngkhw->ngohw", narrow.view(2, 8, 4), fours).flatten(1, 2)
    y = (y + narrow_bias.view(-1, 1, 1)) / (1 + 1e-5) ** 0.5  # the norm's mean 0, variance 1
    y = F.gelu(y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    y = torch.einsum("ok,nkhw->nohw", project[:, :, 0, 0], y)
    return y + project_bias.view(-1, 1, 1)


x = torch.randn(2, 8, 6, 5).double()
agree(smt_definition, MultiHeadMixedConv(8), x, what="SMT and MultiHeadMixedConv")


# %% [markdown]
# ## MogaNet (2022): a mix of depths
#
# *What changed:* in [MogaNet](https://arxiv.org/abs/2211.03295) (Li and others; posted 2022, ICLR 2024) all channels pass through a 5×5. An eighth of them stop there. Three eighths go on through a 5×5 with dilation 2, the other half through a 7×7 with dilation 3. Windows: 5, 13 and 23 pixels. *Why:* its authors find that large-kernel networks learn the interactions of very few and of very many pixels, and miss those between. So they serve three ranges side by side, and give most channels to the wide ones. The split 1 : 3 : 4 runs the other way than MixConv's exponential one: most channels for the widest.
#
# > ⚙️ **Their code.** `MultiOrderDWConv` in [`models/moganet.py`](https://github.com/Westlake-AI/MogaNet/blob/main/models/moganet.py). A dense 1×1 convolution, `PW_conv`, ends it. `MixConv2d` has one dilation for all its groups (or the `dilated` rule), so the second stage is two layers here.

# %%
#| export heirs.py
class MultiOrderDWConv(nn.Module):
    """MogaNet's multi-order depthwise convolution: 5×5, then dilated for parts of the channels.

    Args:
        channels: a multiple of the sum of `split`.
        split: shares of the channels that see a window of 5, of 13, and of 23 pixels.

    Shape:
        Input `(N, C, H, W)`, output the same.

    Raises:
        ValueError: if `channels` cannot be split so.

    Source: arXiv 2211.03295; `MultiOrderDWConv` in MogaNet's `moganet.py`. Chapter 10.
    """

    def __init__(self, channels: int, split: tuple[int, int, int] = (1, 3, 4)) -> None:
        super().__init__()
        if channels % sum(split):
            raise ValueError(f"channels must be a multiple of {sum(split)}, got {channels}")
        self.partition = [channels // sum(split) * share for share in split]
        self.first = MixConv2d(channels, 5, bias=True)
        self.middle = MixConv2d(self.partition[1], 5, dilation=2, bias=True)
        self.wide = MixConv2d(self.partition[2], 7, dilation=3, bias=True)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve all channels, then two parts once more, then mix them."""
        near, middle, far = self.first(x).split(self.partition, dim=1)
        y: Tensor = self.pointwise(torch.cat([near, self.middle(middle), self.wide(far)], dim=1))
        return y


# %%
def moganet_definition(x, w0, b0, w1, b1, w2, b2, pointwise, bias):
    y = shifted_sum(x, w0, b0)
    y1 = shifted_sum(y[:, 1:4], w1, b1, dilation=2)
    y2 = shifted_sum(y[:, 4:8], w2, b2, dilation=3)
    y = torch.cat([y[:, :1], y1, y2], dim=1)
    return torch.einsum("ok,nkhw->nohw", pointwise[:, :, 0, 0], y) + bias.view(-1, 1, 1)


x = torch.randn(2, 8, 11, 9).double()
agree(moganet_definition, MultiOrderDWConv(8), x, what="MogaNet and MultiOrderDWConv")


# %% [markdown]
# ## InceptionNeXt (2023): most channels are left alone
#
# *What changed:* [InceptionNeXt](https://arxiv.org/abs/2303.16900) (Yu and others; CVPR 2024) replaces ConvNeXt's 7×7 depthwise layer. One eighth of the channels gets a 3×3, one eighth a band of 1×11, one eighth a band of 11×1. The other five eighths are copied: an *identity* group. *Why:* memory traffic. The abstract says that a 7×7 depthwise layer costs few multiply-adds and yet slows a GPU down, by its memory access. Their [table of results](https://github.com/sail-sg/inceptionnext) (cited): InceptionNeXt-T trains on 901 images a second, where ConvNeXt-T does 575, and reaches 82.3% top-1 against 82.1%, with 28 against 29 million parameters.
#
# [The same table](https://github.com/sail-sg/inceptionnext) (cited) has the experiment behind it, ConvNeXt-T with a 3×3 in *some* channels only: in all channels 81.5%, in half of them 81.4%, a quarter 81.3%, an eighth 80.8%. MixConv's premise goes a step further than Tan and Le took it: not every channel needs a large kernel, and many need none.
#
# > ⚙️ **Their code.** `InceptionDWConv2d` in [`models/inceptionnext.py`](https://github.com/sail-sg/inceptionnext/blob/main/models/inceptionnext.py). The copied channels come first.

# %%
#| export heirs.py
class InceptionDWConv2d(nn.Module):
    """InceptionNeXt's depthwise layer: copies, a square kernel, a row band, a column band.

    Args:
        channels: so many that each branch gets at least one.
        side: rows and columns of the square kernel, odd.
        band: length of the two bands, odd.
        ratio: share of the channels for each of the three kernels; the rest are copied.

    Shape:
        Input `(N, C, H, W)`, output the same.

    Raises:
        ValueError: if a branch is left without channels.

    Source: arXiv 2303.16900; `InceptionDWConv2d` in `inceptionnext.py`. Chapter 10.
    """

    def __init__(self, channels: int, side: int = 3, band: int = 11, ratio: float = 1 / 8) -> None:
        super().__init__()
        count = int(channels * ratio)
        if not 1 <= count <= channels // 3:
            raise ValueError(f"ratio {ratio} gives {count} of {channels} channels")
        self.partition = [channels - 3 * count, count, count, count]
        self.square = MixConv2d(count, side, bias=True)
        self.row = nn.Conv2d(count, count, (1, band), padding=(0, band // 2), groups=count)
        self.column = nn.Conv2d(count, count, (band, 1), padding=(band // 2, 0), groups=count)

    def forward(self, x: Tensor) -> Tensor:
        """Copy the first channels, convolve three small groups, concatenate."""
        same, square, row, column = x.split(self.partition, dim=-3)
        return torch.cat([same, self.square(square), self.row(row), self.column(column)], dim=-3)


# %%
def inception_definition(x, square, b0, row, b1, column, b2):
    y = [x[:, :10], shifted_sum(x[:, 10:12], square, b0)]
    y += [shifted_sum(x[:, 12:14], row, b1), shifted_sum(x[:, 14:16], column, b2)]
    return torch.cat(y, dim=1)


x = torch.randn(2, 16, 12, 9).double()
agree(inception_definition, InceptionDWConv2d(16), x, what="InceptionNeXt and InceptionDWConv2d")


# %% [markdown]
# ## FasterNet (2023): one part, and dense
#
# *What changed:* [FasterNet](https://arxiv.org/abs/2303.03667) (Chen and others, CVPR 2023) convolves the first quarter of the channels and copies the rest. Its *partial convolution* is not depthwise: the quarter is an ordinary 3×3 layer among its own channels. *Why:* again memory. Their abstract finds that layers with few multiply-adds need not be fast, depthwise ones least of all, because they fetch so much from memory. A dense layer on a quarter of the channels uses each number that it fetches many times.
#
# > ⚙️ **Their code.** `Partial_conv3` in [`models/fasternet.py`](https://github.com/JierunChen/FasterNet/blob/master/models/fasternet.py), without bias. It shares MixConv's split but not its depthwise layer, so there is no `MixConv2d` in ours.

# %%
#| export heirs.py
class PartialConv2d(nn.Module):
    """FasterNet's partial convolution: a dense 3×3 on the first channels, the rest copied.

    Args:
        channels: at least `divide`.
        divide: one channel in so many is convolved.

    Shape:
        Input `(N, C, H, W)`, output the same.

    Raises:
        ValueError: if no channel would be convolved.

    Source: arXiv 2303.03667; `Partial_conv3` in `fasternet.py`. Chapter 10.
    """

    def __init__(self, channels: int, divide: int = 4) -> None:
        super().__init__()
        count = channels // divide
        if not 1 <= count < channels:
            raise ValueError(f"divide {divide} leaves {count} of {channels} channels to convolve")
        self.partition = [count, channels - count]
        self.conv = nn.Conv2d(count, count, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the first part, copy the second."""
        first, rest = x.split(self.partition, dim=-3)
        return torch.cat([self.conv(first), rest], dim=-3)


# %%
def fasternet_definition(x, weight):
    copies = [x[:, [c, c]] for c in range(2)]  # a dense layer: depthwise ones, added over inputs
    y = [shifted_sum(pair, weight[:, [c]], x.new_zeros(2)) for c, pair in enumerate(copies)]
    return torch.cat([sum(y), x[:, 2:]], dim=1)


x = torch.randn(2, 8, 6, 7).double()
agree(fasternet_definition, PartialConv2d(8), x, what="FasterNet and PartialConv2d")


# %% [markdown]
# Our layers keep their tensors in the authors' order, under other names. So trained weights are taken over by position, `ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values())))`. The tests of this repository do that with the modules of *timm*, a library of trained networks, for CoaT, InceptionNeXt and FasterNet, and compare outputs and gradients. The book runs without timm.

# %% [markdown]
# ## Look-alikes
#
# Four layers with several kernel sizes that are *not* a mix. What they share: every branch gets *all* the channels, and the results are concatenated or added.

# %%
class Branches(nn.Module):
    def __init__(self, join, *branches):
        super().__init__()
        self.join, self.branches = join, nn.ModuleList(branches)

    def forward(self, x):
        return self.join([branch(x) for branch in self.branches])


def conv(inputs, outputs, sides, groups):
    middle = [side // 2 for side in sides]
    return nn.Conv2d(inputs, outputs, sides, padding=middle, groups=groups, bias=False)


# %% [markdown]
# **PyConv** ([Duta and others, 2020](https://arxiv.org/abs/2006.11538); `PyConv4` in [`pyconvresnet.py`](https://github.com/iduta/pyconv/blob/master/models/pyconvresnet.py)) and **YOLOv5's `MixConv2d`** (in [`models/experimental.py`](https://github.com/ultralytics/yolov5/blob/master/models/experimental.py); its docstring cites the MixConv paper, and chapter 1 met it) concatenate. They differ in the `groups` of each branch, the number of blocks that the inputs are cut into. PyConv cuts more for larger kernels. YOLOv5 takes the greatest common divisor of inputs and outputs (since [a change in 2021](https://github.com/ultralytics/yolov5/pull/5410), meant to make it depthwise; with n kernel sizes that divide the channels, and as many outputs as inputs, each output sees n channels). Batch norms and activations are left out.

# %%
def pyconv(channels, groups=(1, 4, 8, 16)):
    pairs = zip((3, 5, 7, 9), groups, strict=True)
    return Branches(torch.hstack, *(conv(channels, channels // 4, (k, k), g) for k, g in pairs))


def yolo_mixconv(channels, kernel_sizes=(3, 5)):
    each = channels // len(kernel_sizes)  # the greatest common divisor, too
    return Branches(torch.hstack, *(conv(channels, each, (k, k), each) for k in kernel_sizes))


tell("PyConv", pyconv(64), channels=64)
tell("YOLOv5's MixConv2d", yolo_mixconv(64), channels=64)


# %% [markdown]
# An output of PyConv sees 64, 16, 8 or 4 channels; one of YOLOv5's layer sees 2. Neither is depthwise.
#
# **SegNeXt's MSCA** ([Guo and others, 2022](https://arxiv.org/abs/2209.08575); `AttentionModule` in [`mscan.py`](https://github.com/Visual-Attention-Network/SegNeXt/blob/main/mmseg/models/backbones/mscan.py)) and **SLaK** ([Liu and others, 2022](https://arxiv.org/abs/2207.03620); `ReparamLargeKernelConv` in [`SLaK.py`](https://github.com/VITA-Group/SLaK/blob/main/models/SLaK.py)) *add*, and are depthwise throughout. MSCA: a 5×5, then on its result four branches, nothing, 7, 11 and 21 long, each as two bands; a 1×1 layer and a product with the input end it. SLaK: two bands of 51×5 and 5×51, and a 5×5; each has a batch norm, left out here.

# %%
def msca(channels):
    def depthwise(*sides):
        return conv(channels, channels, sides, channels)

    bands = [nn.Sequential(depthwise(1, k), depthwise(k, 1)) for k in (7, 11, 21)]
    return nn.Sequential(depthwise(5, 5), Branches(sum, nn.Identity(), *bands))


def slak(channels, long=51, short=5):
    windows = ((long, short), (short, long), (short, short))
    return Branches(sum, *(conv(channels, channels, sides, channels) for sides in windows))


tell("SegNeXt", msca(8), size=27)
tell("SLaK", slak(8), size=53)

# %% [markdown]
# One channel for each output, as in MixConv. But one window for all outputs: the union of what the branches see. In the pictures (PyConv with fewer blocks and SLaK with shorter bands, so that they fit):

# %%
picture(
    "look_alikes.png",
    "Four 8×8 grids. PyConv: eight squares in a row, or four. YOLOv5: two squares in a row. "
    "SegNeXt: equal squares of 25×25 on the diagonal. SLaK: equal crosses on the diagonal.",
    "Look-alikes have several windows in a row, or the same in all rows.",
    {
        "PyConv": pyconv(8, groups=(1, 1, 2, 2)), "YOLOv5's MixConv2d": yolo_mixconv(8),
        "SegNeXt, before its 1×1 layer": msca(8), "SLaK": slak(8, long=11, short=3),
    },
    columns=2,
)  # fmt: skip

# %% [markdown]
# So two questions tell a mix from a look-alike. *How many channels does one output see?* One, in a mix. *Do outputs see through different windows?* Yes, in a mix. (Exercise 10.3 makes a function of it.) Of the heirs, CoaT and InceptionNeXt pass, MogaNet before its last 1×1, and SMT before its first. FasterNet does not, since its dense part sees many channels: it has kept the split alone.
#
# The cost gives a third, the easiest to put to a paper. *Do the kernels share the channels out, or does each get all of them?* A mix shares them out; the last table of this chapter counts.
#
# ## What this asks of `MixConv2d`
#
# The five layers want three things: a window that is not square (InceptionNeXt), a group that is only copied (InceptionNeXt, FasterNet), a dilation for each group (MogaNet). Should the layer take them? A copy seems the easiest: it is a 1×1 kernel of ones. But a weight of one is trained away from one, and costs a multiplication that copying does not.
#
# And all that knows `kernel_sizes` would have to learn the new words: the logarithmic split (log of which side?), `merged`, costs and receptive fields (one side becomes two), block strings such as `k3.5.7`, and the kernels of Part II, which are compiled for square windows. What would `merged` make of InceptionNeXt's layer? One depthwise convolution with the largest window, 11×11, for all 64 channels:

# %%
own, merged = 8 * (3 * 3 + 11 + 11), 64 * 11 * 11
print(f"{own} weights; merged {merged}, {merged / own:.0f} times as many")

# %% [markdown]
# What is a modest price for 3, 5, 7, 9 (chapter 3: twice the weights) is absurd for bands and copies. A function that every part of the package must special-case is not a simple addition.
#
# > ✏️ **Ours.** `MixConv2d` stays square and whole. A layer with bands or copies is put together from it and plain convolutions, in ten lines, as above. What knows a MixConv still knows the square part.
#
# ## Large kernels came back; mixed ones rarely
#
# **ConvNeXt** ([Liu and others, 2022](https://arxiv.org/abs/2201.03545)) turned a ResNet step by step into something shaped like a transformer. One step was a 7×7 depthwise layer in every block. The authors tried 3, 5, 7, 9 and 11; the gain stops at 7 (section 2). One size for all layers.
#
# **RepLKNet** ([Ding and others, 2022](https://arxiv.org/abs/2203.06717)) went to 31×31, with 29, 27 and 13 in the later stages; one size in each. While it trains, a 5×5 runs beside the large kernel and is added; afterwards the two become one kernel (exercise 10.4 does it for SLaK). PyTorch was so slow at such sizes that the authors [released a GPU kernel of their own](https://github.com/DingXiaoH/RepLKNet-pytorch).
#
# **MobileNetV4** ([Qin and others, 2024](https://arxiv.org/abs/2404.10518)) has blocks with up to two depthwise layers, one before the block widens and one inside. A search chose for each whether it is there, and whether 3×3 or 5×5. So sizes are mixed between layers, never within one. MixConv's own authors went that way, too: their **EfficientNetV2** ([Tan and Le, 2021](https://arxiv.org/abs/2104.00298)) came out of its search with 3×3 nearly everywhere, and more layers to make up for the smaller view (section 3).
#
# Why? Two reasons can be cited. Depthwise layers are slow for what multiply-adds do not count, memory traffic (the abstracts of FasterNet and InceptionNeXt). And small kernels in *some* channels lose little accuracy (InceptionNeXt's table above), so that the cheapest mix has copies in it, not 9×9 kernels.
#
# > ✏️ **Ours.** The rest is our reading, not a measurement. MixConv saves multiply-adds, against one large kernel. From 2020 on, networks were judged by their time on GPUs, where a depthwise layer waits for memory ([chapter 11](11_why_slow.ipynb) measures it on a CPU): a mix moves as many numbers as one size does, in g pieces in place of one. And a 31×31 layer *contains* every mix of smaller kernels: chapter 3's `merged` is the proof. Where multiplications are nearly free, a mix only forbids something, and against ConvNeXt's 7×7 it would save little even of those (see the table below). Where they are not, on a phone or a CPU, the saving is real, and it takes a kernel that computes the groups in one pass to get it. Part II builds one.
# > And two places where mixing stayed: where channels are in groups already, namely heads (CoaT, SMT), and where the smallest window is none at all (InceptionNeXt, FasterNet).
#
# ## All of them, on one size
#
# 64 channels, 56×56 pixels. Only kernels larger than 1×1 are counted, without biases. (SMT, MogaNet and SegNeXt end in 1×1 layers that mix the channels, as the layer after a MixConv does in MixNet.)

# %%
from mixconv.formulation import count_costs

moganet = MultiOrderDWConv(64)
moganet.pointwise = nn.Identity()
LAYERS = [  # name, split of 64 channels, kernels, layer, pixels to look at
    ("**MixConv 2019**", "16 16 16 16", "3 5 7 9", MixConv2d(64, (3, 5, 7, 9)), 9),
    ("CoaT 2021", "16 24 24", "3 5 7", ConvRelPosEnc(8).mix, 7),
    ("SMT 2023", "16 16 16 16", "3 5 7 9", MultiHeadMixedConv(64).mix, 9),
    ("MogaNet 2022", "64; 8 24 32", "5; copy, 5, 7 dilated", moganet, 23),
    ("InceptionNeXt 2023", "40 8 8 8", "copy, 3, 1×11, 11×1", InceptionDWConv2d(64), 11),
    ("FasterNet 2023", "16 48", "dense 3, copy", PartialConv2d(64), 3),
    ("PyConv 2020", "none", "3 5 7 9", pyconv(64), 9),
    ("YOLOv5 2020", "none", "3 5", yolo_mixconv(64), 5),
    ("SegNeXt 2022", "none", "5; 7, 11, 21 as bands", msca(64), 25),
    ("SLaK 2022", "none", "51×5 + 5×51 + 5", slak(64), 51),
    ("ConvNeXt 2022", "64", "7", MixConv2d(64, 7), 7),
    ("RepLKNet 2022", "64", "31", MixConv2d(64, 31), 31),
]  # fmt: skip

# %%
rows = []
for name, split, kernels, layer, size in LAYERS:
    convs = [m for m in layer.modules() if isinstance(m, nn.Conv2d)]
    sees = " or ".join(map(str, what_is_seen(layer, 64, size)[0]))
    all_channels = sum(conv.in_channels == 64 for conv in convs)
    weights = sum(conv.weight.numel() for conv in convs)
    costs = count_costs(layer, torch.zeros(1, 64, 56, 56))
    million = f"{sum(cost.multiply_adds for cost in costs) / 1e6:.1f}"
    through_all = f"{all_channels} of {len(convs)}"
    rows.append([name, split, kernels, sees, through_all, weights, million])
header = ["", "split", "kernels", "one output sees", "kernels fed with all"]
table([*header, "weights", "million multiply-adds"], rows)

# %% [markdown]
# InceptionNeXt has less than a tenth of MixConv's weights, SegNeXt more than twice, SLaK more than ten and RepLKNet more than twenty times as many. ConvNeXt, with 7×7 everywhere, costs only a fifth more than MixConv: there is little left to save.

# %% [markdown]
# ## Exercises
#
# **10.1** ★ *3 minutes, one line.* With a pencil: through windows of how many pixels do MogaNet's three parts see? All pass a 5×5; then the second part a 5×5 with dilation 2, the third a 7×7 with dilation 3. (Chapter 1 has the formula.)
#
# <details><summary>Hint: the equation</summary>
#
# A layer of kernel $k$ and dilation $d$ adds $(k - 1) \cdot d$ pixels to the window.
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def three_windows() -> tuple[int, int, int]:
    raise NotImplementedError


def test_windows(answer) -> None:
    expect(answer, gives=(5, 13, 23), why="one layer adds (k - 1) · dilation pixels to one")


attempt(three_windows, test_windows)


# %% tags=["solution"]
# fold: Solution
def three_windows_solution() -> tuple[int, int, int]:
    return 5, 5 + 4 * 2, 5 + 6 * 3


def undilated() -> tuple[int, int, int]:
    """forget that dilation puts the taps apart"""
    return 5, 5 + 4, 5 + 6


def alone() -> tuple[int, int, int]:
    """forget the 5×5 that all pass first"""
    return 5, 1 + 4 * 2, 1 + 6 * 3


attempt(three_windows_solution, test_windows, wrong=[undilated, alone])


# %% [markdown]
# **10.2** ★★ *5 minutes, two lines.* One more heir. [MambaOut](https://arxiv.org/abs/2405.07992) (Yu and Wang, 2024) copies the first channels and gives the *last* ones a 7×7 depthwise layer. Write it for any `MixConv2d` that has fewer channels than the image.
#
# <details><summary>Hint: the idea</summary>
#
# Cut the channels in two: what the layer does not take is copied.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `copied = x.shape[1] - layer.in_channels`
#
# </details>

# %%
def partial_depthwise(x: torch.Tensor, layer: MixConv2d) -> torch.Tensor:
    raise NotImplementedError


def test_partial(answer) -> None:
    x, layer = torch.ones(1, 4, 3, 3), MixConv2d(1, 3)
    nn.init.ones_(layer.convs[0].weight)
    wanted = torch.ones(1, 4, 3, 3)
    wanted[0, 3] = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]])
    expect(answer, x, layer, gives=wanted, why="three copies, then ones added up")


attempt(partial_depthwise, test_partial)


# %% tags=["solution"]
# fold: Solution
def partial_depthwise_solution(x: torch.Tensor, layer: MixConv2d) -> torch.Tensor:
    copied = x.shape[1] - layer.in_channels
    return torch.cat([x[:, :copied], layer(x[:, copied:])], dim=1)


def at_the_front(x: torch.Tensor, layer: MixConv2d) -> torch.Tensor:
    """convolve the first channels and copy the last"""
    return torch.cat([layer(x[:, : layer.in_channels]), x[:, layer.in_channels :]], dim=1)


def copies_last(x: torch.Tensor, layer: MixConv2d) -> torch.Tensor:
    """take the last channels, but put them in front"""
    copied = x.shape[1] - layer.in_channels
    return torch.cat([layer(x[:, copied:]), x[:, :copied]], dim=1)


attempt(partial_depthwise_solution, test_partial, wrong=[at_the_front, copies_last])


# %% [markdown]
# **10.3** ★★ *10 minutes, three lines.* Write the test as a function. From `trace_wires`: does each output see one channel only, and do at least two outputs see through different windows? (`wires.flatten(2).any(dim=2)` says which inputs an output sees; the maximum of `window_sizes(wires)` over the inputs is the window that there is.)
#
# <details><summary>Hint: the idea</summary>
#
# Two questions, and a mix answers yes to both. A layer that sums or concatenates over all channels fails the first, a plain depthwise layer the second.
#
# </details>

# %%
def is_a_mix(wires: torch.Tensor) -> bool:
    raise NotImplementedError


def test_mix(answer) -> None:
    torch.manual_seed(0)
    mixes = {"MixConv": MixConv2d(8, (3, 5)), "InceptionNeXt": InceptionDWConv2d(8)}
    others = {"PyConv": pyconv(8, (1, 1, 2, 2)), "SLaK": slak(8, 11, 3), "3×3": MixConv2d(8, 3)}
    for why, layer in (mixes | others).items():
        expect(answer, trace_wires(layer, 8), gives=why in mixes, why=why)


attempt(is_a_mix, test_mix)


# %% tags=["solution"]
# fold: Solution
def is_a_mix_solution(wires: torch.Tensor) -> bool:
    seen = wires.flatten(2).any(dim=2).sum(dim=1)
    windows = window_sizes(wires).amax(dim=1)
    return bool((seen == 1).all()) and len(windows.unique(dim=0)) > 1


def only_channels(wires: torch.Tensor) -> bool:
    """count the channels and forget the windows"""
    return bool((wires.flatten(2).any(dim=2).sum(dim=1) == 1).all())


def only_windows(wires: torch.Tensor) -> bool:
    """look at the windows and forget the channels"""
    return len(window_sizes(wires).amax(dim=1).unique(dim=0)) > 1


attempt(is_a_mix_solution, test_mix, wrong=[only_channels, only_windows])


# %% [markdown]
# **10.4** ★★★ *20 minutes, five lines.* A sum is *one* kernel. SLaK's three branches (without their norms) are depthwise convolutions of the same channels, added. Turn their weights, a tall band, a wide band and a small square, into the kernels of a single depthwise convolution. RepLKNet does this when training is over. (Convolution is linear: $w_1 * x + w_2 * x = (w_1 + w_2) * x$, once the kernels have the same size; `F.pad(weight, (left, right, top, bottom))` makes one larger.)
#
# <details><summary>Hint: the idea</summary>
#
# The middle of each kernel must come to lie on the middle of the large one: half of the missing rows above, half below; columns likewise.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `long = tall.shape[2]`, the side of the large kernel.
#
# </details>

# %%
def one_kernel(tall: torch.Tensor, wide: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError


def test_kernel(answer) -> None:
    torch.manual_seed(0)
    layer = slak(4, long=9, short=3)
    point = torch.zeros(1, 4, 17, 17)
    point[..., 8, 8] = 1
    seen = layer(point)[0, :, None, 4:13, 4:13].detach()
    weights = [branch.weight.detach() for branch in layer.branches]
    expect(answer, *weights, gives=seen.flip(2, 3), why="what the layer makes of one point")


attempt(one_kernel, test_kernel)


# %% tags=["solution"]
# fold: Solution
def one_kernel_solution(
    tall: torch.Tensor, wide: torch.Tensor, small: torch.Tensor
) -> torch.Tensor:
    long = tall.shape[2]
    kernel = torch.zeros(len(tall), 1, long, long)
    for weight in (tall, wide, small):
        rows, columns = ((long - side) // 2 for side in weight.shape[2:])
        kernel += F.pad(weight, (columns, columns, rows, rows))
    return kernel


def in_the_corner(tall: torch.Tensor, wide: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    """put the smaller kernels into a corner in place of the middle"""
    long = tall.shape[2]
    sides = [(0, long - w.shape[3], 0, long - w.shape[2]) for w in (tall, wide, small)]
    return sum(F.pad(w, s) for w, s in zip((tall, wide, small), sides, strict=True))


def stretched(tall: torch.Tensor, wide: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    """stretch each kernel to the large size in place of putting zeros around it"""
    size = (tall.shape[2],) * 2
    return sum(F.interpolate(weight, size) for weight in (tall, wide, small))


attempt(one_kernel_solution, test_kernel, wrong=[in_the_corner, stretched])

# %% [markdown]
# ## Takeaways
# - CoaT and SMT contain a MixConv, split by attention heads. MogaNet mixes depths, InceptionNeXt shapes and copies, FasterNet a dense part and copies.
# - A mix: each output sees one channel, through one of several windows, and not the same for all. PyConv, YOLOv5, SegNeXt and SLaK send all channels through every kernel.
# - A sum of kernels is one kernel. A mix is one kernel, too, with zeros in it.
# - Large kernels came back in one size. What MixConv saves is arithmetic, and on a GPU arithmetic was not what cost time (our reading).
#
# **Further reading**: the papers are linked where they are met. [ConvNeXt](https://arxiv.org/abs/2201.03545), section 2, is the best one to read whole.
#
# Previous: [9 · A trained network](09_trained_network.ipynb) · Next: [11 · Why it is slow](11_why_slow.ipynb)
