# %% [markdown]
# # 6 · Receptive fields
#
# An output of eight MixConv layers with kernels 3, 5, 7 and 9 *can* see 65×65 pixels. How many of them does it *look at*?
#
# The picture below shows it for four stacks that differ in their depthwise kernels alone. The dashed square is what an output can see. The colour is how strongly it reacts to each pixel: the *energy*, a squared gradient, explained below. Half of the energy lies inside the small blue square.
#
# **You will be able to**
# - say what each group of a MixConv can see, alone and in a stack;
# - measure what an output looks at, in any layer of any model, and check the measurement on a network whose answer is known;
# - say what mixing kernel sizes buys, and what it does not;
# - read other people's receptive-field figures with care.
#
# **Know first:** [chapter 1](01_formulation.ipynb) for the theoretical field of a list of layers, [chapter 3](03_layer.ipynb), [chapter 4](04_blocks.ipynb) and [chapter 5](05_mobilenets.ipynb).
#
# **Time:** 35 minutes to read. Runs in under 60 seconds on two cores.

# %% [markdown]
# A stack is a 1×1 convolution from red, green, blue, then eight of chapter 4's blocks: a depthwise layer and a 1×1 layer, both with ReLU, untrained. (Their normalisations do nothing yet: it is evaluation mode, and what they subtract and divide by is still 0 and 1.) The exponential split of 32 channels is 16, 8, 4, 4, for kernels 3, 5, 7, 9. `measure` asks eight such networks. (What it uses is built in this chapter; here it is used ahead.)

# %%
import torch
from torch import nn

from mixconv.blocks import DepthwiseSeparableBlock
from mixconv.layer import make_conv2d
from mixconv.receptive_fields import effective_receptive_field

KINDS = {"3×3": ((3,), "equal"), "9×9": ((9,), "equal")}
KINDS["MixConv 3579"] = ((3, 5, 7, 9), "equal")
KINDS["3579, exponential"] = ((3, 5, 7, 9), "exponential")


def stack(kernel_sizes, partition="equal", layers=8) -> nn.Sequential:
    make = DepthwiseSeparableBlock
    blocks = (make(32, 32, kernel_sizes, partition=partition) for _ in range(layers))
    return nn.Sequential(make_conv2d(3, 32, 1), *blocks)


def measure(kernel_sizes, partition="equal", layers=8, networks=8) -> torch.Tensor:
    """One map of energy for each of several random networks, the mean over four images."""
    window, maps = 1 + (max(kernel_sizes) - 1) * layers, []
    for seed in range(networks):
        torch.manual_seed(seed)
        model = stack(kernel_sizes, partition, layers).double()
        maps.append(effective_receptive_field(model, size=window, images=4, seed=seed).mean(0))
    return torch.stack(maps)


measured = {name: measure(*kind) for name, kind in KINDS.items()}

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm

from mixconv.receptive_fields import energy_square
from mixconv.teaching import kernel_color, show, use_style

use_style()
figure, axes = plt.subplots(1, 4, figsize=(9.2, 2.9), sharey=True)
norm, sides = PowerNorm(0.5, vmin=0, vmax=0.01), []
for axis, (name, maps) in zip(axes, measured.items(), strict=True):
    window, energy = maps.shape[-1], maps.mean(dim=0)
    axis.set_facecolor(plt.get_cmap("magma")(0))
    drawn = axis.imshow(energy, cmap="magma", norm=norm, extent=(-window / 2, window / 2) * 2)
    sides.append(energy_square(energy, 0.5))
    for side, color, style in ((window, "white", "--"), (sides[-1], "#33bbff", "-")):
        corner = (-side / 2, -side / 2)
        axis.add_patch(plt.Rectangle(corner, side, side, fill=False, color=color, ls=style, lw=1.5))
    axis.set(xlim=(-36, 36), ylim=(-36, 36), xticks=[-32, 0, 32], yticks=[-32, 0, 32], title=name)
    axis.set_xlabel(f"can see {window}×{window}\nhalf within {sides[-1]}×{sides[-1]}")
axes[0].set_ylabel("pixels from the centre")
bar = figure.colorbar(drawn, ax=axes, ticks=[0, 0.001, 0.004, 0.01], shrink=0.7, extend="max")
bar.set_label("share of the energy in one pixel")
show(
    figure,
    "effective_fields.png",
    "Heat maps of where four stacks of eight layers look, on one colour scale. 3×3 kernels can "
    "see 17×17 pixels and the other three 65×65, drawn as dashed squares. Each map is a round "
    f"spot in the middle. Half of its energy lies within {sides[0]} pixels a side for 3×3, "
    f"{sides[1]} for 9×9, {sides[2]} for MixConv 3579 and {sides[3]} for the exponential split.",
    caption="What an output looks at is far smaller than what it can see.",
)

# %% [markdown]
# A 3×3 stack can see 17×17 pixels, the others 65×65. All four look at a round spot in the middle. The rest of the chapter makes this picture: first the dashed squares, then the spots, then the numbers.
#
# ## What can be seen
#
# Chapter 1 had the rule: every layer adds $(k - 1)$ pixels to the side of the window. In a MixConv each group has its own $k$, so each group has its own window. Stack $L$ MixConv layers of kernels 3, 5, 7 and 9 *without* anything between, and the groups stay apart: they see $1 + 2L$, $1 + 4L$, $1 + 6L$ and $1 + 8L$ pixels a side.
#
# Now put a 1×1 layer between them, as every network does. A channel of the second layer reads all channels of the first. What an output sees is then the *union* over all paths. A path chooses one group in every layer. Of the $4^L$ choices one takes 3×3 everywhere and sees $1 + 2L$; one takes 9×9 everywhere, and the union is as large as its window: $1 + 8L$ for every channel.

# %% tags=["drawing"]
# fold: The code that draws this
figure, axes = plt.subplots(1, 4, figsize=(9.2, 2.0))
panels = [("1 layer", 1), ("2 layers", 2), ("4 layers", 4), ("4, with 1×1 between", 4)]
for axis, (title, layers) in zip(axes, panels, strict=True):
    mixed = "between" in title
    for k in (9,) if mixed else (9, 7, 5, 3):
        side, color = 1 + (k - 1) * layers, kernel_color(k)
        axis.add_patch(plt.Rectangle((-side / 2, -side / 2), side, side, color=color, alpha=0.85))
        label = f"all: {side}" if mixed else f"{k}×{k}: {side}"
        x, y = 2.5 + 4 * layers, 2.3 * (k - 6)
        axis.plot(x, y, "s", color=color)
        axis.text(x + 2, y, label, weight="bold", va="center")
    axis.plot(0, 0, "s", color="black", markersize=2.5)
    axis.set(xlim=(-17, 34), ylim=(-17, 17), aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=10, loc="left")
show(
    figure,
    "fields_of_groups.png",
    "Concentric squares: what the groups of MixConv 3579 can see. After one layer 3, 5, 7 and 9 "
    "pixels a side, after four 9, 17, 25 and 33. With 1×1 layers between, all see the largest.",
    caption="Alone, each group keeps a window of its own; with 1×1 layers between, all share one.",
)

# %% [markdown]
# ## A pixel that is not a number
#
# The formula needs a list of layers. A real model has branches, and layers that no list names. There is a way to ask any model what it can see: make one pixel NaN, "not a number". Whatever is computed from it becomes NaN too, even multiplied by zero. So an output sees a pixel exactly if the NaN arrives there. By hand: a row of seven pixels, NaN in the middle, a layer of kernel 3. Three outputs see it.

# %%
row = torch.zeros(1, 1, 7)
row[0, 0, 3] = torch.nan
nn.functional.conv1d(row, torch.ones(1, 1, 3), padding=1).isnan()[0, 0].int().tolist()

# %% [markdown]
# Asking pixel by pixel takes 224 · 224 = 50,176 passes. Four edges are enough, and an edge can be searched. Make the upper half of the rows NaN: if the output is still a number, its window starts further down. Eight such halvings find the edge among 224 rows, and turning the image brings the other edges to the top. The model is copied to double precision first. In single precision a convolution may take a short cut (Winograd's) that computes several outputs together, and a NaN would leak to neighbours.

# %%
#| export receptive_fields.py
"""What an output can see, and what it looks at, for any model (Luo et al., 2016; chapter 6).

For a plain list of kernel sizes, `mixconv.receptive_field` of chapter 1 is enough. That function
is why this module's name is plural: a module of its name would take its place in the package.
"""

import copy
from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Window(NamedTuple):
    """The rectangle of input pixels that an output can see."""

    top: int
    left: int
    height: int
    width: int
    touches_border: bool  # of the image, which may have cut it


# %%
#| export receptive_fields.py
@torch.no_grad()
def theoretical_receptive_field(
    model: nn.Module,
    layer: str = "",
    size: int | tuple[int, int] = 224,
    *,
    channels: slice | None = None,
) -> Window:
    """The window of input pixels that the middle output of a layer can see, in any model.

    Arguments and errors are those of `effective_receptive_field`. Refused, too, is a model that
    hides NaN or makes it. A copy runs in double precision, on the CPU. A gate or a mean over all
    pixels sees the whole image, and so does all that follows it. For a plain list of layers,
    `receptive_field` gives the side by arithmetic.

    Source: ours. Chapter 6.
    """
    twin = copy.deepcopy(model).to("cpu", torch.double).eval()
    clean = _noise(model, size, 1, seed=0)

    def sees(image: Tensor) -> bool:
        return bool(read_middle(twin, layer, image, channels).isnan().any())

    def hidden(turns: int, length: int) -> int:
        """Lines at an edge that the output cannot see; quarter turns bring the edge up."""

        def notices(lines: int) -> bool:
            image = clean.rot90(turns, (2, 3)).clone()
            image[:, :, :lines] = torch.nan
            return sees(image.rot90(-turns, (2, 3)))

        return bisect_left(range(1, length), True, key=notices)

    if sees(clean) or not sees(torch.full_like(clean, torch.nan)):
        raise ValueError(f"layer {layer!r} must give NaN for an image of NaN and for no other")
    height, width = clean.shape[2:]
    top, right, bottom, left = map(hidden, range(4), (height, width) * 2)
    edges = min(top, right, bottom, left)
    return Window(top, left, height - top - bottom, width - left - right, edges == 0)


# %% [markdown]
# How to read a layer by its name, while the model runs: a hook copies its middle as soon as the layer returns, before an in-place activation can change it.

# %%
#| export receptive_fields.py
from difflib import get_close_matches


def read_middle(model: nn.Module, layer: str, images: Tensor, channels: slice | None) -> Tensor:
    """Run a model and return what a layer holds at its middle position: `(N, channels)`."""
    layers = dict(model.named_modules(remove_duplicate=False))
    if layer not in layers:
        close = ", ".join(map(repr, get_close_matches(str(layer), layers, cutoff=0.3))) or "none"
        raise ValueError(f"layer must be in model.named_modules(), got {layer!r}; close: {close}")
    seen: list[Tensor] = []
    hook = layers[layer].register_forward_hook(
        lambda _layer, _inputs, output: seen.append(_middle(output, layer, channels))
    )
    try:
        model(images)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise ValueError(f"layer {layer!r} must run once in a pass, it ran {len(seen)} times")
    return seen[0]


# %% tags=["plumbing"]
# fold: Reading the middle of a layer by its name, and random images
#| export receptive_fields.py
from mixconv._checks import as_pair, check_positive


def _noise(model: nn.Module, size: int | tuple[int, int], count: int, seed: int) -> Tensor:
    """Images of mean 0 and variance 1, with the channels of the model's first layer."""
    known = (getattr(module, "in_channels", None) for module in model.modules())
    channels = next((number for number in known if isinstance(number, int)), None)
    if channels is None:
        raise ValueError("model must have a layer with in_channels, as nn.Conv2d has")
    check_positive("images", count)
    shape, generator = (count, channels, *as_pair("size", size)), torch.Generator()
    return torch.randn(shape, generator=generator.manual_seed(seed), dtype=torch.double)


def _middle(output: object, layer: str, channels: slice | None) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 4:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"layer {layer!r} must return (N, C, H, W), got {got}")
    chosen, count = channels or slice(None), output.shape[1]
    if not range(count)[chosen] or (chosen.stop or 0) > count:
        raise ValueError(f"channels must lie in the {count} of layer {layer!r}, got {channels}")
    return output[:, chosen, output.shape[2] // 2, output.shape[3] // 2].clone()


# %% [markdown]
# Ask it about MixConv, group by group: one layer, four layers without 1×1 between, and four of the blocks above.

# %%
from mixconv.formulation import receptive_field
from mixconv.layer import MixConv2d
from mixconv.teaching import attempt, check, expect, table

mix, rows = MixConv2d(32, (3, 5, 7, 9)), []
models = {"one layer": mix, "four, apart": nn.Sequential(mix, mix, mix, mix)}
for name, model in (models | {"four, with 1×1": stack((3, 5, 7, 9), layers=4)}).items():
    groups = [slice(8 * t, 8 * t + 8) for t in range(4)]
    sides = [theoretical_receptive_field(model, size=64, channels=g).height for g in groups]
    rows.append([name, *sides])
assert rows[1][1:] == [receptive_field([k] * 4) for k in (3, 5, 7, 9)]
table(["layers", "channels 0–7", "8–15", "16–23", "24–31"], rows)

# %% [markdown]
# ## What is looked at
#
# To be seen is not to matter. Take one row of pixels and two layers of kernel 3 with all weights 1. The output sees five pixels. The left-most reaches it by one path: left, left. The middle reaches it by three: left and right, right and left, stay and stay. The numbers of paths, 1, 2, 3, 2, 1, are how strongly the output reacts to each pixel: they are its gradient, and autograd finds them.

# %%
x = torch.zeros(1, 1, 9, requires_grad=True)
ones = torch.ones(1, 1, 3)
y = nn.functional.conv1d(nn.functional.conv1d(x, ones, padding=1), ones, padding=1)
y[0, 0, 4].backward()
x.grad[0, 0].int().tolist()

# %% [markdown]
# > 📄 **Luo et al., 2016** (*Understanding the Effective Receptive Field in Deep Convolutional Neural Networks*). The gradient of one output is spread over the window like a Gaussian bell: strong in the middle, next to nothing at the edge. They call where it is strong the **effective receptive field**. Its width grows with the *square root* of the number of layers, while the window grows with the number itself.
#
# Our measure of "how strongly" is **energy**: the gradient squared, $(\partial y / \partial x_{c,p})^2$ for output $y$, pixel $p$ and channel $c$, summed over the image's channels. All of it is divided by one number, so that the mean map over the images has sum 1. Squares are never negative, so nothing cancels, and a network whose outputs are a thousand times larger has the same map.
#
# A layer has many channels. One backward pass for each would be slow, and a plain sum of channels would let their gradients cancel. So each image gets a random sign for each channel. Square the signed sum: each product of two *different* channels comes with the product of their signs, +1 as often as −1, and averages to nothing. The channels' own energies remain.

# %%
#| export receptive_fields.py
from mixconv.formulation import evaluating


def effective_receptive_field(
    model: nn.Module,
    layer: str = "",
    size: int | tuple[int, int] | None = None,
    *,
    images: int | Tensor = 8,
    seed: int = 0,
    channels: slice | None = None,
) -> Tensor:
    """How strongly the middle output of a layer reacts to each input pixel, in any model.

    The energy of a pixel: the squared gradient, summed over the image's channels, for a random
    sign of each output channel. The model runs in evaluation mode and is left as it was. Where
    the window is larger than the image (ask `theoretical_receptive_field`), it is cut.

    Args:
        model: takes images.
        layer: a name from `model.named_modules()`; the model's own output if left out.
        size: of random images, one number or height and width; 224 if left out.
        images: how many random images (mean 0, variance 1), or the images, without `size`.
        seed: of the random images and signs.
        channels: which output channels to ask; all if left out.

    Shape:
        Output `(N, H, W)`, float64: one map for each image; the mean map has sum 1.

    Raises:
        ValueError: for an unknown layer, one whose output is not `(N, C, H, W)` or that does
            not run once, channels out of range, or where no finite gradient arrives.

    Source: Luo et al., 2016, for the gradient; the energy and the signs are ours. Chapter 6.
    """
    if not isinstance(images, Tensor):
        images = _noise(model, 224 if size is None else size, images, seed)
    elif size is not None:
        raise ValueError(f"size must be left out when images are given, got {size}")
    like = next((p for p in model.parameters() if p.is_floating_point()), images)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        x = images.detach().to(like.device, like.dtype, copy=True).requires_grad_()
        outputs = read_middle(model, layer, x, channels)
        coins = torch.randint(2, outputs.shape, generator=torch.Generator().manual_seed(seed))
        score = (outputs * (2 * coins - 1).to(outputs)).sum()
        return _energy(score, x, layer)


# %%
#| export receptive_fields.py
def _energy(score: Tensor, x: Tensor, layer: str) -> Tensor:
    """The squared gradient, summed over channels, divided by the mean of the images' sums."""
    gradient = None
    if score.requires_grad:
        (gradient,) = torch.autograd.grad(score, x, allow_unused=True)
    peak = torch.zeros(()) if gradient is None else gradient.abs().max()
    if gradient is None or not (peak.isfinite() and peak > 0):
        raise ValueError(f"a finite gradient that is not zero must reach the image from {layer!r}")
    energy = (gradient.double() / peak.double()).square().sum(dim=1)  # no square underflows
    return energy / energy.sum(dim=(1, 2)).mean()


# %% [markdown]
# ## A network whose answer is known
#
# Is the measurement right? Try it where the answer can be computed without gradients. **All weights 1.** A layer replaces each number by the sum over a box of k×k. The gradient of $L$ layers is the box convolved with itself: in one dimension 1 1 1, then 1 2 3 2 1, then 1 3 6 7 6 3 1. This is a *convolution power*, and it has no gradients in it. For four 3×3 layers of ones, the measured energy must be this field squared, and divided by its sum:

# %%
import torch.nn.functional as F


def box_power(kernel_sizes, shares, layers: int) -> torch.Tensor:
    """Boxes of each kernel size, blended by their shares, convolved with themselves."""
    largest = max(kernel_sizes)
    blend = torch.zeros(1, 1, largest, largest, dtype=torch.double)
    for k, share in zip(kernel_sizes, shares, strict=True):
        box = torch.full((k, k), share / k**2, dtype=torch.double)
        blend += F.pad(box, [(largest - k) // 2] * 4)
    field = blend
    for _ in range(layers - 1):
        field = F.conv2d(field, blend, padding=largest - 1)
    return field[0, 0]


linear = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(4))).double()
for layer in linear:
    nn.init.ones_(layer.weight)
known = box_power((3,), (1,), 4).square()
energy = effective_receptive_field(linear, size=9, images=1)[0]
check(energy, known / known.sum(), "autograd and convolution power")

# %% [markdown]
# **Random weights.** Real networks do not start with ones. Let all weights be independent, with mean 0. One layer: $\partial y / \partial x_p$ is one weight $w_p$. Its square is on average the variance of the weights, the same in the whole box. Two layers: the gradient is a sum over paths, each a product of two weights. Square the sum, and take the average. The product of two *different* paths has mean 0. What remains is the sum over paths of variance times variance: again the box convolved with itself. So for random weights *the expected energy itself*, not its root, is the box power.
#
# > 📄 **Luo et al., 2016** find the same for the variance of the gradient, and conclude from the central limit theorem that it becomes a Gaussian.
#
# **Mixed kernels.** PyTorch, like the official code, draws the weights of a depthwise k×k kernel with a variance proportional to $1 / k^2$. A small kernel has fewer weights, each of them larger, and all groups pass on the same energy. A 1×1 layer with random weights spreads it over all channels: every output after it is a random mix of all groups. So one MixConv layer is a *blend of boxes*: group $t$ has share $c_t / c$. That is what `shares` is for.
#
# Check it, on MixConv with 1×1 layers and no activation: the mean over 60 random networks, against the closed form, in the energy of two layers within the middle 1×1, 3×3, …, 17×17.

# %%
from mixconv.receptive_fields import energy_curve

maps = []
for seed in range(60):
    torch.manual_seed(seed)
    mixes = [MixConv2d(32, (3, 5, 7, 9)) for _ in range(2)]
    points = [make_conv2d(i, 32, 1) for i in (3, 32, 32)]
    model = nn.Sequential(points[0], mixes[0], points[1], mixes[1], points[2])
    maps.append(effective_receptive_field(model, size=17, images=4, seed=seed).mean(dim=0))
known = energy_curve(box_power((3, 5, 7, 9), [0.25] * 4, 2))
assert (energy_curve(torch.stack(maps).mean(dim=0)) - known).abs().max() < 0.02
[f"{float(share):.2f}" for share in known]


# %% [markdown]
# The measured average agrees within 0.02 everywhere. Over two thirds of the energy of two layers lies in the middle 7×7 of 17×17.

# %% [markdown]
# ## How large is a spot?
#
# A bell has no edge. So name a share of the energy, and ask how much room it takes:
#
# - the **smallest set of pixels** that holds the share: take the strongest first until there is enough;
# - the **smallest square** around the middle that holds it: easier to picture and to compare with a window.
# - And, without a share, the **standard deviation** σ along one axis, which has a formula.
#
# By hand, for the 3×3 map with 4 in the middle, 2 beside it and 1 in the corners, sixteenths all. Half of the energy is 8 sixteenths: the middle and two neighbours, 4 + 2 + 2, so three pixels. The square of side 1 holds 4. That is not enough, so the side is 3.

# %%
#| export receptive_fields.py
def energy_square(energy: Tensor, share: float, centre: tuple[int, int] | None = None) -> int:
    """Side of the smallest square around a pixel that holds a share of a map's energy.

    Args:
        energy: a map `(H, W)`, nowhere negative; its scale does not matter.
        share: more than 0, at most 1.
        centre: the pixel, row and column; `(H // 2, W // 2)` if left out.

    Raises:
        ValueError: for what is no map, a share outside 0 to 1 or a pixel outside the map.

    Source: ours. Chapter 6.
    """
    _shares(energy, share)
    return 2 * int((energy_curve(energy, centre) < share - 1e-9).sum()) + 1  # up to rounding


def energy_pixels(energy: Tensor, share: float) -> int:
    """How many pixels, strongest first, hold a share of a map's energy; see `energy_square`."""
    strongest = _shares(energy, share).flatten().sort(descending=True).values
    return int((strongest.cumsum(0) < share - 1e-9).sum()) + 1


def energy_curve(energy: Tensor, centre: tuple[int, int] | None = None) -> Tensor:
    """Shares of a map's energy within the squares of side 1, 3, 5, … around a pixel."""
    shares = _shares(energy)
    height, width = shares.shape
    row, column = (height // 2, width // 2) if centre is None else centre
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"centre must be a pixel of {height}×{width}, got {centre}")
    rows, columns = (torch.arange(height) - row).abs(), (torch.arange(width) - column).abs()
    ring = torch.maximum(rows[:, None], columns[None, :])  # 0 in the middle, then 1, 2, …
    sums = torch.zeros(int(ring.max()) + 1, dtype=torch.double)
    return sums.index_add(0, ring.flatten(), shares.flatten()).cumsum(0)


# %%
#| export receptive_fields.py
def energy_sigma(energy: Tensor) -> float:
    """Standard deviation of a map along one axis, in pixels: the mean over both axes."""
    variances = []
    for axis, length in enumerate(energy.shape):
        line, places = _shares(energy).sum(dim=1 - axis), torch.arange(length).double()
        variances.append(float(line @ (places - line @ places).square()))
    return float((sum(variances) / 2) ** 0.5)


def _shares(energy: Tensor, share: float = 1.0) -> Tensor:
    """A map with sum 1, in double precision, on the CPU."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be more than 0 and at most 1, got {share}")
    total = energy.double().sum()
    if energy.ndim != 2 or not (total.isfinite() and total > 0 and (energy >= 0).all()):
        raise ValueError("energy must be one map (H, W), finite, not negative, not all zero")
    return energy.detach().double().cpu() / total.cpu()


# %%
small = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
assert (energy_pixels(small, 0.5), energy_square(small, 0.5)) == (3, 3)
[f"{float(share):.4f}" for share in energy_curve(small)]

# %% [markdown]
# ## It grows with the root
#
# A box of $k$ pixels has variance $(k^2 - 1) / 12$ along an axis. Convolving adds variances, and blending averages them. So after $L$ layers
#
# $$
# \sigma^2 = L \cdot \frac{\overline{k^2} - 1}{12}, \qquad \overline{k^2} = \sum_t \frac{c_t}{c}\, k_t^2
# $$
#
# The field grows as $\sqrt{L}$, the window as $L$. Measured on the blocks of the first picture, with their ReLUs, which the formula does not know of:

# %%
from mixconv.partition import partition_channels


def weights_per_channel(kernel_sizes, partition="equal") -> float:
    split = partition_channels(32, kernel_sizes, partition)
    return sum(c * k * k for c, k in zip(split, kernel_sizes, strict=True)) / 32


rows = []
for name, layers in [("3×3", n) for n in (1, 2, 4, 8, 16, 32)] + [("MixConv 3579", 4)]:
    maps = measure(*KINDS[name], layers=layers, networks=4)
    sigma, window = energy_sigma(maps.mean(dim=0)), maps.shape[-1]
    formula = (layers * (weights_per_channel(*KINDS[name]) - 1) / 12) ** 0.5
    assert abs(sigma / formula - 1) < 0.15
    shown = f"{sigma:.1f}", f"{formula:.1f}", f"{2 * sigma / window:.0%}"
    rows.append([name, layers, window, *shown])
table(["network", "layers", "window", "σ measured", "σ by formula", "2σ / window"], rows)

# %% [markdown]
# Twice the layers, $\sqrt{2}$ times the *width* of the spot, and a falling share of the window. All within 15% of the formula (four networks a row). Note what stands in the formula. $\overline{k^2}$ is the number of depthwise weights for each channel. By the *area* of the spot we mean $\sigma^2$: a square that holds a given share has a fixed number of them. So **the area of the spot is all but proportional to what the depthwise kernels cost** (3×3 loses a ninth to the 1 that is taken off, 9×9 next to nothing), and the formula does not ask whether the kernels are mixed.
#
# ## What mixing buys
#
# Cost and sight side by side, for the first picture: eight blocks, output of the last one, images as large as the window, four random images for each of eight networks (seeds 0 to 7), mean and standard deviation over the networks. (The first picture measured the mean of the eight maps; here each map is measured, and the sides averaged. The two need not agree to the pixel.) The multiply-adds are those of one depthwise layer of 32 channels at 56×56. First the sides of the smallest squares:

# %%
SHARES = (0.2, 0.3, 0.5, 0.99)


def spread(size, maps: torch.Tensor, share: float) -> str:
    values = torch.tensor([float(size(energy, share)) for energy in maps])
    return f"{values.mean():.0f} ± {values.std():.0f}"


rows = []
for name, maps in measured.items():
    cost = weights_per_channel(*KINDS[name])
    work = f"{cost * 32 * 56 * 56 / 1e6:.1f}M"
    rows.append([name, work, maps.shape[-1], *(spread(energy_square, maps, t) for t in SHARES)])
table(["stack", "multiply-adds", "can see", *(f"{t:.0%} within" for t in SHARES)], rows)

# %% [markdown]
# Now how many pixels, strongest first, and the area of the spot beside the weights. By the formula for eight layers $\sigma^2$ is two thirds of the weights, less the 1:

# %%
rows = []
for name, maps in measured.items():
    cost = weights_per_channel(*KINDS[name])
    area = f"{energy_sigma(maps.mean(dim=0)) ** 2 / cost:.2f}", f"{8 / 12 * (1 - 1 / cost):.2f}"
    rows.append([name, *(spread(energy_pixels, maps, t) for t in SHARES), int(cost), *area])
header = [*(f"{t:.0%}" for t in SHARES), "weights", "σ² / weights", "by formula"]
table(["pixels that hold", *header], rows)

# %% [markdown]
# Read the last two columns: the area of the spot for each weight (of one channel) is nearly the same in all four rows. MixConv 3579 has half the weights of 9×9 and half its area. The exponential partition has a third and a third. And by formula, next to a single kernel size of about the same cost, 7×7: how much of the energy lies within a square.

# %% tags=["drawing"]
# fold: The code that draws this
known, blends = {}, KINDS | {"7×7": ((7,), "equal")}
for name, (sizes, partition) in blends.items():
    shares = [c / 32 for c in partition_channels(32, sizes, partition)]
    known[name] = [box_power(sizes, shares, layers) for layers in (1, 8)]
for name in ("MixConv 3579", "7×7"):
    one, eight = ([energy_pixels(field, t) for t in (0.5, 0.99)] for field in known[name])
    cost = weights_per_channel(*blends[name])
    print(f"{name}, {cost:.0f} weights: 50% and 99% in {one} pixels, after eight layers {eight}")
figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.3), sharey=True)
for axis, layers, index in zip(axes, (1, 8), (0, 1), strict=True):
    for name in ("3×3", "3579, exponential", "MixConv 3579", "7×7", "9×9"):
        color = kernel_color(int(name[0])) if "×" in name else "black"
        line = ":" if "exponential" in name else "-"
        curve = 100 * energy_curve(known[name][index])
        sides = 2 * torch.arange(len(curve)) + 1
        axis.plot(sides, curve, line, color=color, marker="" if index else "o", ms=3, label=name)
    axis.set(title=f"{layers} layer{'s' * index}", xlabel="side of the square, pixels")
    axis.axhline(50, color="#bbbbbb", lw=0.8, zorder=0)
    axis.set_xlim(0.5, 9.5 if index == 0 else 50)
axes[1].legend(title="left to right", loc="lower right")
axes[0].annotate("7×7 overtakes\nthe mix", (6.55, 86), (6.3, 8), arrowprops={"arrowstyle": "-"})
axes[0].set(ylabel="energy inside, %", ylim=(0, 102), xticks=[1, 3, 5, 7, 9])
show(
    figure,
    "energy_curves.png",
    "Energy inside a square against the square's side, by formula. After one layer MixConv 3579 "
    "starts above 7×7 and ends below it: a sharp middle and a long tail. After eight layers the "
    "curves have one shape and differ in width alone, in the order of their cost: 3×3, "
    "exponential, MixConv 3579, 7×7, 9×9.",
    caption="One mixed layer looks sharply and far at once; after eight, all are bells.",
)

# %% [markdown]
# In *one* layer, mixing changes the shape: MixConv 3579 has half of its energy in 14 pixels where 7×7 needs 25, and still reaches out to 78 where 7×7 ends at 49. A sharp middle *and* a long reach, for fewer weights. After *eight* layers little of that is left: adding many independent steps makes every blend a bell, and a bell has one number, its width.

# %% [markdown]
# So what does mixing buy, before any training?
#
# - **Reach.** 65×65 pixels can be seen with half of the 9×9 weights, or a third. But reach is permission. Each of eight layers chooses one of four groups. Of all such choices, $4^8$ or 256 · 256 = 65,536, one uses the reach in full.
# - **Not more field for its weights.** In a stack the spot is as large as the weights pay for, mixed or not.
# - **Different channels, side by side.** In every layer some channels look at 3×3 and others at 9×9. The next 1×1 layer can choose. A single kernel size of the same cost has no such choice. (Exercise 6.1 measures the four sides.)
#
# > 📄 **Paper.** Figure 4: at equal cost, mixed kernels give MobileNets a higher accuracy than single sizes (cited). The untrained spot does not explain that. Training decides which channels are used, and how much of the reach.
#
# ## Any model, by layer name
#
# The same two functions on MobileNetV2, for two of its blocks. `blocks.2` and `blocks.5` end at strides 4 and 8. One untrained network for each kernel choice, 160×160 pixels, four random images, seed 0.

# %%
from mixconv.mobilenet import mobilenet_v2

rows = []
for sizes in ((3,), (3, 5, 7, 9), (9,)):
    torch.manual_seed(0)
    model = mobilenet_v2(sizes).double()
    for layer in ("blocks.2", "blocks.5"):
        window = theoretical_receptive_field(model, layer, 160)
        energy = effective_receptive_field(model, layer, 160, images=4, seed=0).mean(dim=0)
        half, most = (energy_square(energy, share) for share in (0.5, 0.99))
        seen = f"{window.height}{' or more' if window.touches_border else ''}"
        rows.append([" ".join(map(str, sizes)), layer, seen, half, most])
table(["kernels", "layer", "can see", "50% within", "99% within"], rows)


# %% [markdown]
# With mixed kernels, an output of `blocks.5` can see the whole picture. Half of what it looks at lies within 41×41 pixels of 160×160, a fifteenth of the area. ("or more": the window reaches the border of the image.) One caution about windows: a gate (chapter 4) takes the mean over *all* pixels, so whatever stands behind a gate can see the whole image, however small its kernels.
#
# ## Why a published number depends on its scale
#
# A script that others build on is that of RepLKNet (`erf/visualize_erf.py` and `erf/analyze_erf.py` in [its repository](https://github.com/DingXiaoH/RepLKNet-pytorch)). VMamba's, for one, is [mainly adopted from it](https://github.com/MzeroMiko/VMamba/issues/48). It takes the gradient where it is positive and not its square, averages 50 images of ImageNet at 1024×1024, and looks for the smallest central square with 20, 30, 50 and 99%. Before it measures, it replaces every $z$ by $\log_{10}(z + 1)$, "for better readability". That is fine for a picture. But the squares are measured *afterwards*, and $\log_{10}(z + 1)$ has a scale built in: the 1. Where $z$ is far below 1, it is $z / \ln 10$ and changes nothing. Where $z$ is far above, it flattens the peak and lifts the tail.
#
# By hand, for a Gaussian bell of height $p$: where $z = p\, e^{-r^2 / 2\sigma^2}$ is large, its logarithm is $\log_{10} p - r^2 / (2 \sigma^2 \ln 10)$. The bell has become a dome. It ends where $z$ falls to 1, at $r = \sigma \sqrt{2 \ln p}$: the higher the peak, the wider the dome, for one and the same bell. Nothing about the network changed but the unit in which its outputs are counted. Compute it: one bell, σ = 60 pixels, on the script's 1024×1024 pixels. The share of the image's *area* that the square takes:

# %%
def area(contribution: torch.Tensor, share: float) -> float:
    return energy_square(contribution, share) ** 2 / contribution.numel()


squares = (torch.arange(1024).double() - 512).square()
one_bell = torch.exp(-(squares[:, None] + squares[None, :]) / (2 * 60**2))
maps = {"as it is, any peak": one_bell}
maps |= {f"logged, peak 10^{n}": torch.log10(10.0**n * one_bell + 1) for n in (-3, 0, 3, 6, 9)}
rows = [[name, *(f"{area(energy, t):.1%}" for t in SHARES)] for name, energy in maps.items()]
assert (rows[0][3], rows[4][3]) == ("1.5%", "9.1%")
table(["the same bell", *(f"{share:.0%}" for share in SHARES)], rows)

# %% tags=["drawing"]
# fold: The code that draws this
figure, axis = plt.subplots(figsize=(7.4, 3.2))
across = torch.arange(1024) - 512
names = [list(maps)[index] for index in (0, 3, 4)]
for row, (name, color) in enumerate(zip(names, ("black", "#56B4E9", "#D55E00"), strict=True)):
    axis.plot(across, maps[name][512] / maps[name].max(), color=color)
    half, y = energy_square(maps[name], 0.5), -0.08 - 0.08 * row
    axis.plot([-half / 2, half / 2], [y, y], color=color, lw=5, solid_capstyle="butt")
    words = f"{name}: half within {half}, {area(maps[name], 0.5):.1%} of the area"
    axis.text(half / 2 + 10, y, words, va="center", fontsize=8, clip_on=False)
axis.set(xlabel="pixels from the centre", ylabel="contribution / maximum", yticks=[0, 0.5, 1])
axis.set(xlim=(-512, 512), ylim=(-0.36, 1.05), xticks=range(-400, 401, 200))
sides = [energy_square(maps[name], 0.5) for name in names]
show(
    figure,
    "log_artefact.png",
    "One bell of σ = 60 pixels, as it is and after log10(z + 1) with a peak of a thousand and of a "
    "million, where it becomes a wide dome. The square that holds half of it grows from "
    f"{sides[0]} to {sides[1]} and {sides[2]} pixels a side, from 1.5% to 4.8% and 9.1% of the "
    "area.",
    caption="The same bell: only the unit of its height changed, and with it the measured square.",
)


# %% [markdown]
# One bell: 1.5% of the area as it is, and 9.1% with a peak of a million. This does not say that RepLKNet's field is small; its kernels of 31×31 are large. It says that two such numbers can be compared only between networks whose gradients have the same size, and the script does not look at that. Without the logarithm there is nothing to look at.
#
# ## What this does not show
#
# - **The networks are untrained.** Luo et al. report that training widens the field (cited). [Chapter 9](09_trained_network.ipynb) asks one network, and gets another answer. A trained network may prefer some groups to others; then shares are not $c_t / c$.
# - **The images are noise.** In an untrained network they hardly matter. In a trained one they do: give `images`.
# - **A gradient is a local answer**: what a small change of a pixel does, at this image. And if the image is smaller than the window, the map shows what is left of it.
#
# ## Exercises
#
# **6.1** ★ *5 minutes, three lines.* What does each group of *one* MixConv layer look at? Return, for each group, the side of the square that holds all of its energy. (`channels` takes a slice; the groups lie one after the other, as `layer.partition` says.)
#
# <details><summary>Hint: the idea</summary>
#
# A map of one group alone has the side of that group's kernel. Where a group begins is the sum of the groups before it.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `ends = torch.tensor(layer.partition).cumsum(0).tolist()`
#
# </details>

# %%
def side_of_each_group(layer: MixConv2d) -> list[int]:
    raise NotImplementedError


def test_sides(answer) -> None:
    layer = MixConv2d(16, (3, 7, 5), partition=(2, 10, 4))
    expect(answer, layer, gives=[3, 7, 5], why="groups of 2, 10 and 4 channels")


attempt(side_of_each_group, test_sides)


# %% tags=["solution"]
# fold: Solution
def side_of_each_group_solution(layer: MixConv2d) -> list[int]:
    ends = torch.tensor(layer.partition).cumsum(0).tolist()
    groups = [slice(end - c, end) for end, c in zip(ends, layer.partition, strict=True)]
    maps = [effective_receptive_field(layer, size=15, images=1, channels=g)[0] for g in groups]
    return [energy_square(energy, 1.0) for energy in maps]


def all_channels(layer: MixConv2d) -> list[int]:
    """ask all channels each time: the largest kernel answers for everybody"""
    energy = effective_receptive_field(layer, size=15, images=1)[0]
    return [energy_square(energy, 1.0)] * len(layer.partition)


def equal_groups(layer: MixConv2d) -> list[int]:
    """cut the channels into equal groups, whatever the layer's partition says"""
    each = sum(layer.partition) // len(layer.partition)
    groups = [slice(each * t, each * t + each) for t in range(len(layer.partition))]
    maps = [effective_receptive_field(layer, size=15, images=1, channels=g)[0] for g in groups]
    return [energy_square(energy, 1.0) for energy in maps]


attempt(side_of_each_group_solution, test_sides, wrong=[all_channels, equal_groups])


# %% [markdown]
# **6.2** ★ *5 minutes, one line.* How many k×k layers make a spot as wide (the same σ) as one K×K layer? The number need not be whole. Then compare weights and windows for 3 and 9.
#
# <details><summary>Hint: the idea</summary>
#
# Variances add. One layer of K×K has the variance $(K^2 - 1) / 12$.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# $L \cdot (k^2 - 1) / 12 = (K^2 - 1) / 12$
#
# </details>

# %%
def layers_to_match(k: int, large: int) -> float:
    raise NotImplementedError


def test_layers(answer) -> None:
    expect(answer, 3, 9, gives=10.0, why="80 / 8")
    expect(answer, 5, 13, gives=7.0, why="168 / 24")


attempt(layers_to_match, test_layers)


# %% tags=["solution"]
# fold: Solution
def layers_to_match_solution(k: int, large: int) -> float:
    # Ten 3×3 layers: 90 weights and a window of 21, for the spot of one 9×9 with 81 weights.
    return (large**2 - 1) / (k**2 - 1)


def by_window(k: int, large: int) -> float:
    """match the windows and not the spots"""
    return (large - 1) / (k - 1)


def by_weights(k: int, large: int) -> float:
    """match the weights, and forget that a box of one pixel has no width at all"""
    return large**2 / k**2


attempt(layers_to_match_solution, test_layers, wrong=[by_window, by_weights])


# %% [markdown]
# **6.3** ★★ *15 minutes, six lines.* `dilated=True` spreads nine weights over a large window. A window can have holes. How many pixels does a stack of 3×3 layers with these dilations really see? (Along one axis a layer steps by −d, 0 or d: collect the set of all sums.)
#
# <details><summary>Hint: the idea</summary>
#
# Along one axis, begin with the set {0}. Each layer replaces it by all sums of a place and a step. Both axes step independently, so the pixels are the square.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `places = {0}`, then one comprehension for each dilation.
#
# </details>

# %%
def pixels_seen(dilations: list[int]) -> int:
    raise NotImplementedError


def test_seen(answer) -> None:
    expect(answer, [2, 2], gives=25, why="five places a side, −4, −2, 0, 2 and 4, in a window of 9")
    expect(answer, [1, 2, 4], gives=225, why="15 places a side: no hole in a window of 15")


attempt(pixels_seen, test_seen)


# %% tags=["solution"]
# fold: Solution
def pixels_seen_solution(dilations: list[int]) -> int:
    places = {0}
    for d in dilations:
        places = {place + step for place in places for step in (-d, 0, d)}
    return len(places) ** 2


def whole_window(dilations: list[int]) -> int:
    """count the whole window, holes included"""
    return receptive_field([3] * len(dilations), dilations=dilations) ** 2


def taps_only(dilations: list[int]) -> int:
    """multiply the taps, as if no two paths ever met at one pixel"""
    return 9 ** len(dilations)


attempt(pixels_seen_solution, test_seen, wrong=[whole_window, taps_only])


# %% [markdown]
# **6.4** ★★★ *30 minutes, one line.* Blocks with a skip add their input: y = x + conv(x). Let the random k×k convolution pass on `gain` times the energy that it gets. What is the expected energy after `layers` such blocks? Return the map, with sum 1. (What kernel size does a skip have?)
#
# <details><summary>Hint: the idea</summary>
#
# A skip is a 1×1 kernel whose weight is 1. So a block is a mix of 1×1 and k×k, and `box_power` takes mixes.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# The shares must sum to 1, and stand as 1 to `gain`: $1 / (1 + g)$ and $g / (1 + g)$.
#
# </details>

# %%
def residual_field(k: int, layers: int, gain: float) -> torch.Tensor:
    raise NotImplementedError


def test_residual(answer) -> None:
    one = F.pad(torch.full((1, 1), 0.5).double(), [1] * 4) + 0.5 / 9
    expect(answer, 3, 1, 1.0, gives=one, why="half stays in the middle, half is spread over nine")
    sigma = energy_sigma(answer(3, 6, 2.0))
    assert abs(sigma**2 - 6 * (2 / 3) * 8 / 12) < 1e-9, f"σ² is {sigma**2:.3f}, wanted 2.667"


attempt(residual_field, test_residual)


# %% tags=["solution"]
# fold: Solution
def residual_field_solution(k: int, layers: int, gain: float) -> torch.Tensor:
    return box_power((1, k), (1 / (1 + gain), gain / (1 + gain)), layers)


def half_and_half(k: int, layers: int, gain: float) -> torch.Tensor:
    """give skip and convolution the same share, whatever the gain"""
    return box_power((1, k), (0.5, 0.5), layers)


def no_skip(k: int, layers: int, gain: float) -> torch.Tensor:
    """forget the skip: then every path goes through every convolution"""
    return box_power((k,), (1,), layers)


attempt(residual_field_solution, test_residual, wrong=[half_and_half, no_skip])

# %% [markdown]
# ## Takeaways
# - After $L$ MixConv layers with 1×1 layers between, every output can see $1 + (k_{max} - 1) L$ pixels. `theoretical_receptive_field` asks any model, `receptive_field` a list.
# - What it looks at is a bell whose area is proportional to the depthwise weights: $\sigma^2 = L\,(\overline{k^2} - 1) / 12$. It grows with $\sqrt{L}$.
# - Mixing buys reach, and channels that differ in every layer. It buys no larger spot for the same weights, in untrained networks.
# - Measure energy without a logarithm, and say layer, input size, images, seeds and spread. (The table of MobileNetV2 has one network a row: take differences of a few pixels there for chance.)
#
# **Further reading**: [Luo and others](https://arxiv.org/abs/1701.04128) define the effective receptive field; [Araujo, Norris and Sim](https://distill.pub/2019/computing-receptive-fields/) derive the theoretical one for any network; [RepLKNet](https://arxiv.org/abs/2203.06717) uses it to argue for large kernels.
#
# Previous: [5 · MobileNets](05_mobilenets.ipynb) · Next: [7 · MixNet](07_mixnet.ipynb)
