# %% [markdown]
# # 7 · MixNet
#
# Give a search the choice of one to five kernel sizes in every block of a network, and let it look for the best one. **Which kernels does it take, and where?** The picture below is its answer: each column is a block, each square a kernel size in it, and the image gets smaller from left to right.
#
# This chapter reads that answer, builds the three networks that came of it (MixNet-S, M and L) from the official code's block strings, and counts what they cost. At the end it shows something about them that the paper does not say.
#
# **You will be able to**
# - read and write the block strings that define a MixNet, and build one of your own;
# - say where the paper's Figure 8 and its code differ;
# - count the parameters and multiply-adds of each block;
# - show which channels of a block can reach which, and which never meet.
#
# **Know first:** [chapter 4](04_blocks.ipynb) and [chapter 5](05_mobilenets.ipynb).
#
# **Time:** 30 minutes to read. Runs in under 60 seconds on two cores.

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.mixnet import MIXNET_L, MIXNET_M, MIXNET_S, unroll  # told below
from mixconv.teaching import kernel_color, live, show, use_style

use_style()
figure, axes = plt.subplots(2, 1, figsize=(8.4, 3.9))
for axis, (name, config) in zip(axes, (("S", MIXNET_S), ("M", MIXNET_M)), strict=True):
    side = 112
    for column, run in enumerate(unroll(config)):
        if run.stride == 2:
            axis.axvline(column - 0.5, color="#bbbbbb", linewidth=1)
        if run.stride == 2 or column == 0:
            side //= run.stride
            start, align = (column - 0.42, "left") if column else (0.42, "right")
            axis.text(start, 5.4, f"{side} px", ha=align, fontsize=8, color="#555555")
        for row, k in enumerate(run.kernel_sizes):
            axis.add_patch(plt.Rectangle((column - 0.4, row), 0.8, 0.94, color=kernel_color(k)))
            axis.text(column, row + 0.43, str(k), ha="center", va="center", weight="bold")
        axis.text(column, -0.15, str(column), ha="center", va="top", fontsize=8, color="#555555")
    axis.text(-0.7, -0.15, "block", ha="right", va="top", fontsize=8, color="#555555")
    if name == "S":
        axis.add_patch(plt.Rectangle((10.54, -0.06), 1.92, 4.1, fill=False, linestyle="--"))
        axis.text(11.5, 4.2, "paper: 3, 5, 7", ha="center", fontsize=8)
    axis.set(xlim=(-1.8, 18.7), ylim=(-0.8, 6), xticks=[], yticks=[])
    axis.set_title(f"MixNet-{name}", loc="left")
    axis.spines[:].set_visible(False)
show(
    figure,
    "mixnet_kernels.png",
    "MixNet-S and MixNet-M as rows of 16 and 19 blocks, each a stack of its kernel sizes. Grey "
    "lines mark where the image halves, from 112 to 7 pixels a side. While the image is large the "
    "kernels are mostly 3×3; later most blocks mix up to four or five sizes. Two blocks of "
    "MixNet-S are framed: the paper's figure has kernels 3, 5, 7 there, the code 3, 5, 7, 9.",
    caption="3×3 while the image is large, mixes later, and often the widest where it halves.",
    live=live("Blocks", networks={name: unroll(config) for name, config in (
        ("S", MIXNET_S), ("M", MIXNET_M), ("L", MIXNET_L))}),
)  # fmt: skip


# %% [markdown]
# In JupyterLab, run that cell and the figure answers back: choose any block of S, M or L, and see its layers, their groups and wires, and what each costs.
#
# Three things to see:
#
# - **While the image is large, 3×3 is nearly all there is.** A kernel costs its taps at every pixel, and there are 112 · 112 of them. One block is out of line: M's block 1, with kernels up to 7×7. Keep it in mind until the costs are counted.
# - **Later most blocks mix,** with four or five sizes where the image is smallest. The fifth is S's one 11×11, in the block that brings the image down to 7×7.
# - **Where the image halves, the mix is often the widest around.** It is where the paper's one-layer experiment gains most from large kernels (section 3.4, Figure 5). One reason may be that neighbouring outputs stand two pixels apart there, so that small windows hardly overlap. Often is not always, and we can count:

# %%
def wider_than_neighbours(config) -> dict[int, bool]:
    sizes = [len(run.kernel_sizes) for run in unroll(config)]
    halving = [i for i, run in enumerate(unroll(config)) if run.stride == 2]
    return {i: sizes[i] > max(sizes[i - 1], sizes[i + 1]) for i in halving}


for name, config in (("S", MIXNET_S), ("M", MIXNET_M)):
    found = wider_than_neighbours(config)
    print(f"MixNet-{name}: {sum(found.values())} of {len(found)}: {found}")

# %% [markdown]
# The exceptions are block 1 of S, which has 3×3 alone, and blocks 7 and 15 of M, which have neighbours as wide or wider. Block 11 of M is a lone 3×3 among blocks of 3, 5, 7, 9.
#
# ## The search, in short
#
# Where does such an answer come from? From a program that proposes networks, trains them, and learns from the results what to propose next. Three things define it.
#
# **The space: what may be proposed.** A MobileNetV2-like row of blocks, and for each block a kernel mix, an expansion ratio, a number of channels.
#
# > 📄 **Paper.** Section 4.1: the search options of a block include five MixConvs, with one to five groups: 3, then 3, 5, up to 3, 5, 7, 9, 11, always split equally. Exponential splits and dilation are left out to keep the space small.
#
# Small is relative. MnasNet's search, which the paper follows, chooses once for a *run* of equal blocks. Whether MixNet's did, the paper does not say; in its networks all blocks of a run have the same mix. Count the kernel choices alone, one for each run that MixNet-S has:

# %%
f"{5 ** len(MIXNET_S.blocks):,} networks"

# %% [markdown]
# Nobody trains them all. MnasNet's search tried some 8,000 networks, and trained each for five epochs only ([MnasNet](https://arxiv.org/abs/1807.11626), section 5).
#
# **The objective: what is good.** Accuracy alone would always choose the largest network. MnasNet divides by cost, gently. With accuracy $A$, cost $C$ and a target $T$ for the cost, the reward of a network is
#
# $$
# R = A \cdot (C / T)^{w}, \qquad w = -0.07
# $$
#
# What does $-0.07$ mean? Ask how much better a network must be to be worth twice the cost:

# %%
wanted = 2**0.07  # R is the same if A grows by this factor while C doubles
f"{100 * (wanted - 1):.1f}% better, as a factor: from 75.0% to {75 * wanted:.1f}%"

# %% [markdown]
# A doubling of cost must bring some 5% of accuracy. That is about what it brought in networks made by hand, so $w$ asks a search to do no worse than the trade that people already made (MnasNet, section 3: there $C$ is the time on a phone).
#
# **The method: what to try next.** In MnasNet a recurrent network writes a description, token by token, and is rewarded with $R$: reinforcement learning. MixNet's authors say only that their settings are similar to MnasNet, FBNet and ProxylessNAS, and that they search on ImageNet's training set and then verify a few of the best. No code of the search was published, as far as we know.
#
# > 📄 **Paper.** Section 4.2: MixNet-S and M were found this way. L is M made 1.3 times as wide.
#
# How to read the picture, then? With a cost in the objective, a large kernel must earn its taps. At 112×112 pixels they are dearest, and 3×3 stays. Where the image halves they gain most (Figure 5), and the mix is often wide. Late in the network the image is small, and a large kernel is cheap there ("Every block as it is built", below, has the price). What no reason explains may be chance: a search stops at *a* good network, and M's lone 3×3 in block 11 may be just that.
#
# Running a search takes many trained networks, and is out of this book's scope. Its results are strings, and those we can read.
#
# ## A block string, by hand
#
# > ⚙️ **Official code.** `mixnet_builder.py` writes a network as strings, one for each run of equal blocks.
#
# `r3_k3.5_a1.1_p1.1_s11_e6_i40_o40_se0.5_sw` is
#
# | part | meaning |
# |---|---|
# | `r3` | three blocks |
# | `k3.5` | MixConv with kernels 3 and 5 |
# | `a1.1` | expand with two groups of 1×1 |
# | `p1.1` | project with two groups of 1×1 |
# | `s11` | stride 1 along rows, 1 along columns |
# | `e6` | expand to 6 · 40 = 240 channels |
# | `i40`, `o40` | 40 channels in, 40 out |
# | `se0.5` | squeeze to 0.5 · 40 = 20 channels |
# | `sw` | swish; without it ReLU |
#
# With a stride, only the first of the repeated blocks has it. Two more flags: `noskip` leaves the residual out, `dilated` dilates. In Python each part gets a name: a `BlockConfig`.

# %% tags=["plumbing"]
# fold: BlockConfig, a field for each part of the string
#| export mixnet.py
"""MixNet from the official block strings (paper, section 4; chapter 7)."""

import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class BlockConfig:
    """A run of equal MixConv blocks; `decode_block` makes one from a string.

    Attributes:
        in_channels: channels into the first block.
        out_channels: channels out of every block.
        kernel_sizes: MixConv kernel sizes.
        stride: of the first block; the others have 1.
        expand_ratio: wide channels for each input channel.
        repeats: how many blocks.
        expand_groups: groups of the expanding 1×1 convolution.
        project_groups: groups of the projecting 1×1 convolution.
        squeeze_ratio: of squeeze-and-excitation to input channels; 0 for none.
        activation: "relu", "swish", or "relu6", for which the notation has no word.
        skip: residual connection where shapes allow.
        dilated: dilated 3×3 kernels in blocks of stride 1.
    """

    in_channels: int
    out_channels: int
    kernel_sizes: tuple[int, ...] = (3,)
    stride: int = 1
    expand_ratio: int = 6
    repeats: int = 1
    expand_groups: int = 1
    project_groups: int = 1
    squeeze_ratio: float = 0.0
    activation: str = "relu"
    skip: bool = True
    dilated: bool = False


# %% [markdown]
# Decoding is splitting at underscores. The rest is manners: for each word, what it must look like, and how to say so.

# %% tags=["plumbing"]
# fold: What each word must look like
#| export mixnet.py
_COUNT = r"[1-9]\d*"
_WORDS = {  # the form of each word after its letters, and how to say it
    "r": (_COUNT, "how many blocks, at least 1, as in r2"),
    "k": (r"\d*[13579](\.\d*[13579])*", "odd kernel sizes with dots between, as in k3.5"),
    "a": (r"1(\.1)*", "a 1 for each group of the expansion, as in a1 or a1.1"),
    "p": (r"1(\.1)*", "a 1 for each group of the projection, as in p1 or p1.1"),
    "s": (r"([1-9])\1", "the stride twice, for rows and columns, equal and 1 to 9, as in s22"),
    "e": (_COUNT, "the expansion ratio, a whole number of at least 1, as in e6"),
    "i": (_COUNT, "the input channels, at least 1, as in i40"),
    "o": (_COUNT, "the output channels, at least 1, as in o40"),
    "se": (r"0(\.\d+)?|1(\.0+)?", "the squeeze ratio, 0 to 1, as in se0.25"),
    **dict.fromkeys(("sw", "noskip", "dilated"), ("", "nothing")),
}


# %% tags=["plumbing"]
# fold: Splitting a string, and what is said of a wrong one
#| export mixnet.py
def _split_words(text: str) -> dict[str, str]:
    """The words of a block string: what follows the letters of each, "" after a flag."""
    words: dict[str, str] = {}
    for word in text.split("_"):
        start = f"block string {text!r}: cannot read {word!r}: "
        name = re.split("[^a-z]", word, maxsplit=1)[0]
        if name not in _WORDS:
            raise ValueError(f"{start}words begin with {', '.join(_WORDS)}")
        form, meaning = _WORDS[name]
        if name in words or not re.fullmatch(form, word[len(name) :], re.ASCII):
            raise ValueError(f"{start}{name} stands once, followed by {meaning}")
        words[name] = word[len(name) :]
    missing = [f"{name} ({_WORDS[name][1]})" for name in "rkapseio" if name not in words]
    if missing:
        raise ValueError(f"block string {text!r} has no {'; no '.join(missing)}")
    return words


# %%
#| export mixnet.py
def decode_block(text: str) -> BlockConfig:
    """A block configuration from the official notation.

    Args:
        text: such as `r3_k3.5_a1.1_p1.1_s11_e6_i40_o40_se0.5_sw`; the order is free.

    Raises:
        TypeError: for what is no string.
        ValueError: naming the word that is wrong and what would be right.

    Source: `_decode_block_string` in the official `mixnet_builder.py`. Chapter 7.
    """
    if not isinstance(text, str):
        raise TypeError(f"a block string is text, such as 'r1_k3_a1_p1_s11_…', got {text!r}")
    words = _split_words(text)
    return BlockConfig(
        in_channels=int(words["i"]), out_channels=int(words["o"]),
        kernel_sizes=tuple(map(int, words["k"].split("."))),
        stride=int(words["s"][0]), expand_ratio=int(words["e"]), repeats=int(words["r"]),
        expand_groups=words["a"].count("1"), project_groups=words["p"].count("1"),
        squeeze_ratio=float(words.get("se", 0)),
        activation="swish" if "sw" in words else "relu",
        skip="noskip" not in words, dilated="dilated" in words,
    )  # fmt: skip


# %% [markdown]
# Encoding is the way back. Numbers are printed as the official code prints them, and what the notation cannot say is refused: the string must read back as what it came from.

# %% tags=["plumbing"]
# fold: Encoding a configuration as a string
#| export mixnet.py
def encode_block(config: BlockConfig) -> str:
    """The official notation of a block configuration; `decode_block` reads it back.

    Raises:
        ValueError: for a configuration that the notation has no words for.

    Source: `_encode_block_string` in the official `mixnet_builder.py`. Chapter 7.
    """
    kernels = ".".join(map(str, config.kernel_sizes))
    expand, project = (".".join("1" * g) for g in (config.expand_groups, config.project_groups))
    words = [
        f"r{config.repeats}_k{kernels}_a{expand}_p{project}",
        f"s{config.stride}{config.stride}_e{config.expand_ratio}",
        f"i{config.in_channels}_o{config.out_channels}",
    ]
    words += [f"se{config.squeeze_ratio}"] if config.squeeze_ratio else []
    words += ["noskip"] if not config.skip else []
    words += ["sw"] if config.activation == "swish" else []
    words += ["dilated"] if config.dilated else []
    same = replace(config, kernel_sizes=tuple(config.kernel_sizes))
    if decode_block("_".join(words)) != same:
        raise ValueError(f"the notation has no words for {config}")
    return "_".join(words)


# %%
config = decode_block("r3_k3.5_a1.1_p1.1_s11_e6_i40_o40_se0.5_sw")
print(encode_block(config))
print(config)

# %%
for text in ("r1_k3_a1_p1_s1_e6_i8_o8", "r1_k3_a1_p1_s11_e6_i8_o8_x2", "r1_k3_a1_p1_s11"):
    try:
        decode_block(text)
    except ValueError as error:
        print(error)


# %% [markdown]
# ## The networks as configurations

# %%
#| export mixnet.py
@dataclass(frozen=True)
class MixNetConfig:
    """All that defines a MixNet.

    Attributes:
        blocks: block strings in the official notation, or `BlockConfig`s.
        stem_channels: channels of the first convolution.
        head_channels: channels of the last one; not scaled by the width multiplier.
        drop_rate: dropout before the classifier.
        width_multiplier: scales stem and blocks.
        activation: of stem and head, "relu", "relu6" or "swish"; each block has its own.
    """

    blocks: tuple[str | BlockConfig, ...]
    stem_channels: int
    head_channels: int = 1536
    drop_rate: float = 0.2
    width_multiplier: float = 1.0
    activation: str = "relu"


# %%
#| export mixnet.py
MIXNET_S = MixNetConfig(
    blocks=(
        "r1_k3_a1_p1_s11_e1_i16_o16",
        "r1_k3_a1.1_p1.1_s22_e6_i16_o24",
        "r1_k3_a1.1_p1.1_s11_e3_i24_o24",
        "r1_k3.5.7_a1_p1_s22_e6_i24_o40_se0.5_sw",
        "r3_k3.5_a1.1_p1.1_s11_e6_i40_o40_se0.5_sw",
        "r1_k3.5.7_a1_p1.1_s22_e6_i40_o80_se0.25_sw",
        "r2_k3.5_a1_p1.1_s11_e6_i80_o80_se0.25_sw",
        "r1_k3.5.7_a1.1_p1.1_s11_e6_i80_o120_se0.5_sw",
        "r2_k3.5.7.9_a1.1_p1.1_s11_e3_i120_o120_se0.5_sw",
        "r1_k3.5.7.9.11_a1_p1_s22_e6_i120_o200_se0.5_sw",
        "r2_k3.5.7.9_a1_p1.1_s11_e6_i200_o200_se0.5_sw",
    ),
    stem_channels=16,
)

# %%
#| export mixnet.py
MIXNET_M = MixNetConfig(
    blocks=(
        "r1_k3_a1_p1_s11_e1_i24_o24",
        "r1_k3.5.7_a1.1_p1.1_s22_e6_i24_o32",
        "r1_k3_a1.1_p1.1_s11_e3_i32_o32",
        "r1_k3.5.7.9_a1_p1_s22_e6_i32_o40_se0.5_sw",
        "r3_k3.5_a1.1_p1.1_s11_e6_i40_o40_se0.5_sw",
        "r1_k3.5.7_a1_p1_s22_e6_i40_o80_se0.25_sw",
        "r3_k3.5.7.9_a1.1_p1.1_s11_e6_i80_o80_se0.25_sw",
        "r1_k3_a1_p1_s11_e6_i80_o120_se0.5_sw",
        "r3_k3.5.7.9_a1.1_p1.1_s11_e3_i120_o120_se0.5_sw",
        "r1_k3.5.7.9_a1_p1_s22_e6_i120_o200_se0.5_sw",
        "r3_k3.5.7.9_a1_p1.1_s11_e6_i200_o200_se0.5_sw",
    ),
    stem_channels=24,
    drop_rate=0.25,
)

# %% [markdown]
# MixNet-L is M with every channel count but the head's multiplied by 1.3, and rounded as in chapter 5.

# %%
#| export mixnet.py
MIXNET_L = replace(MIXNET_M, width_multiplier=1.3)

# %% [markdown]
# The paper ends there. timm has trained a larger one, MixNet-XL: M, 1.6 times as wide, with a fourth block in each run of three.

# %%
#| export mixnet.py
_FOURS = tuple(str(block).replace("r3_", "r4_") for block in MIXNET_M.blocks)
MIXNET_XL = replace(MIXNET_M, blocks=_FOURS, width_multiplier=1.6)

# %% [markdown]
# ### Try it: write one
#
# **7.1** ★ *2 minutes, one line.* Write the block string of one block with kernels 3, 5, 7, 9, ungrouped, stride 2, expansion 4, from 64 to 96 channels, squeeze ratio 0.25, swish.
#
# <details><summary>Hint: the idea</summary>
#
# Kernels and the groups of the two 1×1 layers are lists, with dots between. The stride is written for both axes.
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def my_block() -> str:
    raise NotImplementedError


def test_block(answer) -> None:
    block = asdict(decode_block(str(answer())))
    wanted = BlockConfig(64, 96, (3, 5, 7, 9), 2, 4, squeeze_ratio=0.25, activation="swish")
    wrong = [name for name, value in asdict(wanted).items() if block[name] != value]
    assert not wrong, f"{answer()} has another {', '.join(wrong)}"


attempt(my_block, test_block)


# %% tags=["solution"]
# fold: Solution
def my_block_solution() -> str:
    return "r1_k3.5.7.9_a1_p1_s22_e4_i64_o96_se0.25_sw"


def no_swish() -> str:
    """leave out sw: ReLU is what a string without it means"""
    return "r1_k3.5.7.9_a1_p1_s22_e4_i64_o96_se0.25"


def grouped() -> str:
    """write two groups for the 1×1 layers"""
    return "r1_k3.5.7.9_a1.1_p1.1_s22_e4_i64_o96_se0.25_sw"


attempt(my_block_solution, test_block, wrong=[no_swish, grouped])

# %% [markdown]
# ## From configuration to network
#
# First the strings are unrolled: one configuration for each block, with its channels scaled.

# %%
#| export mixnet.py
from mixconv._checks import check_multiplier, check_positive
from mixconv.network import round_channels


def unroll(config: MixNetConfig) -> list[BlockConfig]:
    """One configuration for each block of a network, repeats written out and widths scaled.

    Raises:
        ValueError: if there are no blocks, or a run does not begin with the channels that the
            one before it gave.
    """
    check_positive("the number of blocks", len(config.blocks))
    check_multiplier("width_multiplier", config.width_multiplier)
    width = partial(round_channels, multiplier=config.width_multiplier)
    blocks, channels = list[BlockConfig](), config.stem_channels
    for entry in config.blocks:
        run = entry if isinstance(entry, BlockConfig) else decode_block(entry)
        check_positive("repeats", run.repeats)
        if run.in_channels != channels:
            raise ValueError(f"{run} follows a block of {channels} channels")
        wide_in, wide_out = width(run.in_channels), width(run.out_channels)
        first = replace(run, in_channels=wide_in, out_channels=wide_out, repeats=1)
        later = replace(first, in_channels=wide_out, stride=1)
        blocks += [first] + [later] * (run.repeats - 1)
        channels = run.out_channels
    return blocks


# %% [markdown]
# Then the network: chapter 5's `ConvNet`, filled with chapter 4's blocks.
#
# > ⚙️ **Official code.** Stem and head use ReLU. Padding is TensorFlow's 'SAME' everywhere. Batch normalisation has decay 0.99 and epsilon 0.001; PyTorch calls 1 − 0.99 = 0.01 the *momentum*.

# %% tags=["plumbing"]
# fold: Checks, and the blocks from their configurations
#| export mixnet.py
from mixconv.blocks import ConvNormActivation, MixConvBlock, stop_at
from mixconv.layer import make_conv2d, make_pointwise
from mixconv.network import ConvNet, drop_path_rates, initialize, refuse_timm_names


def _check_network(config: MixNetConfig, **positive: float) -> None:
    """Raise TypeError or ValueError for what is no configuration, or a number out of range."""
    if not isinstance(config, MixNetConfig):
        raise TypeError(f"config must be a MixNetConfig such as MIXNET_S, got {config!r}")
    for name, value in positive.items():
        check_multiplier(name, value)


def _make_blocks(
    configs: list[BlockConfig], drop_path_rate: float, output_stride: int, **options: Any
) -> list[MixConvBlock]:
    """The blocks of a network; stochastic depth grows with depth."""
    rates = drop_path_rates(drop_path_rate, len(configs))
    strides = stop_at(output_stride, [config.stride for config in configs])
    blocks: list[MixConvBlock] = []
    for config, rate, (stride, dilation) in zip(configs, rates, strides, strict=True):
        arguments = asdict(config) | {"stride": stride, "dilation": dilation}
        del arguments["repeats"]  # written out by unroll
        blocks.append(MixConvBlock(**arguments, **options, drop_path_rate=rate))
    return blocks


# %%
#| export mixnet.py
class MixNet(ConvNet):
    """A MixNet from its configuration; the defaults are the official network's.

    Args:
        config: `MIXNET_S`, `MIXNET_M`, `MIXNET_L`, or one of your own.
        num_classes: outputs; 0 for features.
        in_channels: channels of the images.
        width_multiplier: scales channels, on top of the configuration's own.
        drop_rate: dropout before the classifier; the configuration's if left out.
        drop_path_rate: stochastic depth; block i of n gets `drop_path_rate * i / n`, i from 0.
        padding: "same" (official, timm's `tf_mixnet_*`) or "symmetric" (timm's `mixnet_*`).
        norm_eps: batch-norm epsilon; 1e-3 is official, timm's `mixnet_*` have 1e-5.
        norm_momentum: share of a new batch in the running statistics.
        output_stride: 8 or 16 for larger maps, with spread kernels after them, as in timm.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`.

    Raises:
        TypeError: for a number that is no integer, or timm's `in_chans`, naming `in_channels`.
        ValueError: naming the argument or the block string.

    Source: paper, section 4.2; `MixnetModel` in the official `mixnet_model.py`. Chapter 7.
    """

    @refuse_timm_names
    def __init__(
        self,
        config: MixNetConfig,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width_multiplier: float = 1.0,
        drop_rate: float | None = None,
        drop_path_rate: float = 0.0,
        padding: str = "same",
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.01,
        output_stride: int = 32,
    ) -> None:
        _check_network(config, norm_eps=norm_eps, norm_momentum=norm_momentum)
        scaled = replace(config, width_multiplier=config.width_multiplier * width_multiplier)
        norm = partial(nn.BatchNorm2d, eps=norm_eps, momentum=norm_momentum)
        options = {"padding": padding, "norm_layer": norm}
        blocks = _make_blocks(unroll(scaled), drop_path_rate, output_stride, **options)
        width = round_channels(config.stem_channels, scaled.width_multiplier)
        stem = make_conv2d(in_channels, width, 3, stride=2, padding=padding)
        head = make_pointwise(blocks[-1].out_channels, config.head_channels)
        end = partial(ConvNormActivation, norm_layer=norm, activation=config.activation)
        super().__init__(
            end(stem), blocks, end(head), config.head_channels, num_classes=num_classes,
            drop_rate=config.drop_rate if drop_rate is None else drop_rate,
        )  # fmt: skip
        self.config = scaled
        initialize(self)


# %% [markdown]
# Weights do not show which padding and which epsilon they were trained with, and with the wrong ones a network computes something else. So a MixNet's `state_dict` carries both along, in the place where PyTorch keeps version numbers; `torch.save` keeps it. (`class MixNet(MixNet)` in the folded cell means: two more methods for the class above. In `mixnet.py` they stand in it.)

# %% tags=["plumbing"]
# fold: Two more methods: the settings, and the note of them in a state dict
#| export mixnet.py
from typing import cast

from mixconv.layer import Conv2dSame


class MixNet(MixNet):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata") and isinstance(self.stem, ConvNormActivation):
            destination._metadata[prefix[:-1]]["settings"] = self.settings()

    def settings(self) -> dict[str, Any]:
        """Padding, and epsilon and momentum of the normalisation: what weights cannot say."""
        conv, norm = self.stem.conv, cast("nn.BatchNorm2d", self.stem.norm)
        padding = "same" if isinstance(conv, Conv2dSame) else "symmetric"
        return {"padding": padding, "norm_eps": norm.eps, "norm_momentum": norm.momentum}


# %%
MixNet(MIXNET_S, padding="symmetric").state_dict()._metadata[""]

# %% [markdown]
# Is that the official network? Two counts say something; chapter 8 compares the numbers that come out. The repository holds the names and shapes of the variables that the unmodified official code created for S and M. Multiplied out, without those that training does not touch (running means and variances), they give its parameters.

# %%
import json
from math import prod
from pathlib import Path

import torch

from mixconv.teaching import table

data = Path("../tests/data")
official = json.loads((data / "variables.json").read_text())
trained = {
    name: sum(prod(shape) for role, shape, _ in part["variables"] if "moving" not in role)
    for name, part in official.items()
}
torch.manual_seed(0)
networks = {"S": MixNet(MIXNET_S), "M": MixNet(MIXNET_M), "L": MixNet(MIXNET_L)}
counted = {name: sum(p.numel() for p in model.parameters()) for name, model in networks.items()}
assert trained == {"mixnet-s": counted["S"], "mixnet-m": counted["M"]}
table(["network", "parameters"], [[f"MixNet-{name}", count] for name, count in counted.items()])

# %% [markdown]
# timm and gen-efficientnet (geffnet) count the same for all three, L included: `tests/peers` holds it.
#
# ## Every block as it is built
#
# MixNet-S on 224×224 pixels:

# %% tags=["drawing"]
# fold: The code that draws this
from mixconv.formulation import count_costs

model = networks["S"].eval()
costs = count_costs(model, torch.zeros(1, 3, 224, 224))


def block_row(index: int) -> list[object]:
    run = unroll(model.config)[index]
    parts = [c for c in costs if c.name.startswith(f"blocks.{index}.")]
    side = parts[-1].output_shape[-1]
    total = sum(c.multiply_adds for c in parts)
    depthwise = sum(c.multiply_adds for c in parts if c.kind == "depthwise")
    return [index, ", ".join(map(str, run.kernel_sizes)), run.expand_ratio,
            f"{run.in_channels}→{run.out_channels}", f"{run.expand_groups}/{run.project_groups}",
            run.squeeze_ratio or "–", f"{side}×{side}", sum(c.parameters for c in parts), total,
            f"{100 * depthwise / total:.0f}%"]  # fmt: skip


table(
    ["block", "kernels", "expand", "channels", "1×1 groups", "squeeze", "output", "parameters",
     "multiply-adds", "depthwise"],
    [block_row(index) for index in range(len(model.blocks))],
)  # fmt: skip


# %% [markdown]
# (Parameters of convolutions; batch normalisation adds two for each channel. The last column is the depthwise kernels' share of the multiply-adds.) The same along the depth, kernel size by kernel size; grey lines mark where the image halves:

# %% tags=["drawing"]
# fold: The code that draws this
def costs_by_part(network: nn.Module) -> list[dict[int, list[int]]]:
    """Multiply-adds and weights of each block: of each kernel size, and, as 1, of all else."""
    blocks: list[dict[int, list[int]]] = [{1: [0, 0]} for _ in network.blocks]
    for cost in count_costs(network, torch.zeros(1, 3, 224, 224)):
        if cost.name.startswith("blocks."):
            kernel_size = network.get_submodule(cost.name).kernel_size[0]
            part = blocks[int(cost.name.split(".")[1])].setdefault(kernel_size, [0, 0])
            part[0], part[1] = part[0] + cost.multiply_adds, part[1] + cost.parameters
    return blocks


# %% tags=["drawing"]
# fold: The code that draws this
from matplotlib.patches import Patch

figure, axes = plt.subplots(2, 2, figsize=(8.4, 4.4), sharex="col", sharey="row")
for column, name in enumerate("SM"):
    network = networks[name].eval()
    for index, parts in enumerate(costs_by_part(network)):
        bottom = [0.0, 0.0]
        for k, part in sorted(parts.items()):
            color = "#bbbbbb" if k == 1 else kernel_color(k)
            for axis, row in zip(axes[:, column], (0, 1), strict=True):
                axis.bar(index, part[row] / 1e6, 0.85, bottom[row], color=color)
                bottom[row] += part[row] / 1e6
    axes[0, column].set_title(f"MixNet-{name}", loc="left")
    first = max(sum(part[1] for part in parts.values()) for parts in costs_by_part(network)[:7])
    axes[1, column].text(3, 0.08, f"blocks 0–6: at\nmost {first / 1e6:.3f} each", fontsize=9,
                         ha="center", bbox={"color": "white", "pad": 1})  # fmt: skip
    axes[1, column].set(xlabel="block", xticks=range(0, len(network.blocks), 3))
    for axis in axes[:, column]:
        for index in [i for i, block in enumerate(network.blocks) if block.stride == 2]:
            axis.axvline(index - 0.5, color="#bbbbbb", linewidth=1, zorder=0)
axes[0, 0].set_ylabel("multiply-adds, M")
axes[1, 0].set_ylabel("weights, M")
patches = [Patch(color=kernel_color(k), label=f"{k}×{k}") for k in (3, 5, 7, 9, 11)]
patches = [Patch(color="#bbbbbb", label="1×1 and gates"), *patches]
figure.legend(handles=patches, ncols=6, loc="outside upper center")
show(
    figure,
    "cost_along_depth.png",
    "Bars of the multiply-adds and the weights of each block of MixNet-S and M, 1×1 layers with "
    "gates in grey, depthwise kernels in their colours. Multiply-adds are spread over the depth; "
    "the tallest bar of all is M's block 1. Weights pile up in the last three or four blocks, "
    "nearly all of them grey; the first seven are too small to see.",
    caption="Multiply-adds are spread along the depth, weights pile up at its end, and most of "
    "both is 1×1.",
)

# %% [markdown]
# Why can a search afford large kernels late? Not because they are a small share of their block: it is 36% in block 0, 25% in blocks 11 and 12, 8% in block 13, with no order in it. Look at the price. What does one channel with an 11×11 kernel cost, where S has it and where S begins?

# %%
late, early = 11 * 11 * 7 * 7, 11 * 11 * 112 * 112
f"{late:,} multiply-adds at 7×7, {early:,} at 112×112: {early // late} times as many"

# %% [markdown]
# The same budget buys 256 channels late for one early. Once the answer breaks the rule. The block that you kept in mind, block 1 of M, has kernels up to 7×7 at 56×56 pixels, and it is the dearest block of S and M together:

# %%
dear = [sum(p[0] for p in parts.values()) for n in "SM" for parts in costs_by_part(networks[n])]
f"dearest: block {dear.index(max(dear)) - len(networks['S'].blocks)} of M, {max(dear):,}"


# %% [markdown]
# A good half of it is the expansion, 24 to 144 channels at 112×112 pixels in two groups, and has nothing to do with kernels: 24 · 144 · 112 · 112 / 2 = 21,676,032. Three kernel sizes on 48 channels each take (9 + 25 + 49) · 48 · 56 · 56 = 12,493,824. With 3×3 alone they would take a third of that.
#
# > 📄 **Paper.** Figure 8 draws S and M as rows of blocks with their kernel sizes.
#
# > ⚙️ **Official code.** What is built differs. For MixNet-S the last two blocks at 14×14, framed in the picture above, have kernels 3, 5, 7, 9, where the figure has 3, 5, 7. And the figure shows neither the squeeze-and-excitation gates, nor swish, nor the grouped 1×1 convolutions, nor the expansion ratios. The published numbers were computed with the code, so this book follows the code.
#
# ## What it costs
#
# Multiply-adds by type of layer:

# %%
def by_type(model: nn.Module) -> dict[str, int]:
    sums = {"stem and pointwise": 0, "depthwise": 0, "squeeze-and-excitation": 0, "classifier": 0}
    for cost in count_costs(model, torch.zeros(1, 3, 224, 224)):
        kinds = {"depthwise": "depthwise", "linear": "classifier"}
        kind = kinds.get(cost.kind, "stem and pointwise")
        kind = "squeeze-and-excitation" if "squeeze_excite" in cost.name else kind
        sums[kind] += cost.multiply_adds
    return sums


counts = {name: by_type(model) for name, model in networks.items()}
table(["network", *counts["S"], "sum", "depthwise share"],
      [[f"MixNet-{n}", *c.values(), sum(c.values()), f"{c['depthwise'] / sum(c.values()):.0%}"]
       for n, c in counts.items()])  # fmt: skip

# %% [markdown]
# The depthwise kernels, which this book is about, are 16% of S, 19% of M and 15% of L.
#
# `tests/package/test_mixnet.py` counts the same, type by type, from the official side alone: the shape of each kernel that the official code created, times the pixels of the official output where it stands. PyTorch's own counter agrees, too (tested).
#
# > 📄 **Paper.** Table 2 prints these parameters, and "FLOPS" that are higher. Section 4.4 has MixNet-M with ten classes.
#
# Chapter 5 found out what the paper's FLOPS count besides, and made a rule of it. To the multiply-adds of convolutions and classifier it adds
#
# - half an operation for each element of gates, residual sums, the pool and biases;
# - one for the initialiser of each weight;
# - 1.5 for each weight that is decayed, which a depthwise weight is not, *once, twice, or not at all*: as often as the decay stands in the graph.
#
# The last is the only number to choose. All three choices, beside what the paper prints:

# %%
from mixconv.counting import paper_flops

printed = json.loads((data / "paper.json").read_text())["table_2"]
printed = {name: printed[f"MixNet-{name}"][:3] for name in networks}
rows = []
for name, (size, flops, accuracy) in (printed | {"M, 10 classes": [3.49, 352, "–"]}).items():
    network = networks.get(name) or MixNet(MIXNET_M, num_classes=10)
    rule = [f"{paper_flops(network, decays) / 1e6:.1f}" for decays in (0, 1, 2)]
    weights = sum(p.numel() for p in network.parameters())
    rows.append([name, f"{weights / 1e6:.2f}", size,
                 f"{sum(by_type(network).values()) / 1e6:.1f}", *rule, flops, accuracy,
                 ])  # fmt: skip
table(["MixNet", "weights, M", "paper's weights", "multiply-adds, M", "rule, no decay", "once",
       "twice", "paper's FLOPS", "paper's top-1, %"], rows)  # fmt: skip

# %% [markdown]
# > ✏️ **Ours.** S, M and M with ten classes agree with the decay counted twice, L with none. That the paper counts something for each weight is sure: the two Ms differ in their classifiers alone, by 1.5 million weights and as many multiply-adds, and the paper's figures differ by 8 million. In S and M each weight that is not depthwise costs 2 · 1.5 = 3 of the paper's FLOPS more than in L. Which operations those are is not known; they match a decay counted twice. No single setting fits S, M and L.

# %% [markdown]
# **7.2** ★★ *15 minutes, seven lines.* MobileNetV2 is a MixNet with one kernel size. Write its seven runs of blocks (chapter 5) as block strings, so that a MixNet of them, with a stem of 32 and a head of 1280 channels, has MobileNetV2's 3,504,872 parameters. (Its activation is ReLU6, which the notation does not know. Write ReLU.)
#
# <details><summary>Hint: the idea</summary>
#
# Chapter 5 lists output channels, repeats and stride of each run. The stride is that of its first block; the others have stride 1, and so do their strings' readers assume.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `r1_k3_a1_p1_s11_e1_i32_o16`, then `r2_k3_a1_p1_s22_e6_i16_o24`, and so on
#
# </details>

# %%
from mixconv.mobilenet import mobilenet_v2


def mobilenet_v2_blocks() -> list[str]:
    raise NotImplementedError


def test_v2_blocks(answer) -> None:
    blocks = answer()
    assert isinstance(blocks, list), f"a list of seven strings, got {blocks!r}"
    assert len(blocks) == 7, f"seven strings, got {len(blocks)}"
    with torch.device("meta"):
        ours, theirs = MixNet(MixNetConfig((*blocks,), 32, 1280)), mobilenet_v2()
    counts = [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]
    assert counts[0] == counts[1] == 3_504_872, f"{counts[0]:,} parameters, not {counts[1]:,}"
    shapes = [[tuple(p.shape) for p in m.parameters()] for m in (ours, theirs)]
    assert shapes[0] == shapes[1], "as many parameters, of other shapes"
    strides = [[block.stride for block in m.blocks] for m in (ours, theirs)]
    assert strides[0] == strides[1], f"strides {strides[0]}, not {strides[1]}"


attempt(mobilenet_v2_blocks, test_v2_blocks)


# %% tags=["solution"]
# fold: Solution
def mobilenet_v2_blocks_solution() -> list[str]:
    return [
        "r1_k3_a1_p1_s11_e1_i32_o16", "r2_k3_a1_p1_s22_e6_i16_o24", "r3_k3_a1_p1_s22_e6_i24_o32",
        "r4_k3_a1_p1_s22_e6_i32_o64", "r3_k3_a1_p1_s11_e6_i64_o96", "r3_k3_a1_p1_s22_e6_i96_o160",
        "r1_k3_a1_p1_s11_e6_i160_o320",
    ]  # fmt: skip


def always_six() -> list[str]:
    """widen the first block, too"""
    return [text.replace("e1", "e6") for text in mobilenet_v2_blocks_solution()]


def halved_at_96() -> list[str]:
    """halve the image where the channels grow to 96: weights cannot tell, shapes of maps can"""
    return [text.replace("s11_e6_i64", "s22_e6_i64") for text in mobilenet_v2_blocks_solution()]


attempt(mobilenet_v2_blocks_solution, test_v2_blocks, wrong=[always_six, halved_at_96])

# %% [markdown]
# ## The halves that never meet
#
# Look at blocks 4 to 6 of both networks: `r3_k3.5_a1.1_p1.1_s11_e6_i40_o40_se0.5_sw`. Follow the channels by hand.
#
# - 40 channels come in. `a1.1` expands them in two groups, to 6 · 40 = 240: channels 0–19 make the lower half of the wide channels, 0 to 120 − 1 = 119; channels 20–39 make the upper half, 120 to 240 − 1 = 239.
# - `k3.5` splits 240 channels equally: 3×3 for the wide channels 0–119, 5×5 for 120–239: 240 / 2 = 120. **That is the same cut.**
# - `p1.1` projects in two groups: 0–119 make the output channels 0–19, 120–239 make 20–39. The same cut again.
# - The residual adds each channel to itself.
#
# So what came in on channels 0–19 sees only 3×3 kernels and leaves on channels 0–19, and the next block starts where this one ended. Only the gate looks across: it computes its factors from the means of all channels. Gate aside, three blocks in a row are a 3×3 network beside a 5×5 network.
#
# Is that so? Chapter 1's wires tell: the Jacobian from each input channel to each output channel. First one block, then three, then three with their gates. Only channels count here, so the images are constant in each: one number a channel goes in, one mean comes out, in float64.

# %%
import copy

from mixconv.layer import MixConv2d


def wires(layers: nn.Module, channels: int) -> Tensor:
    def means(values: Tensor) -> Tensor:
        return layers(values.view(1, channels, 1, 1).expand(-1, -1, 14, 14)).mean((2, 3))[0]

    values = torch.linspace(-1, 1, channels, dtype=torch.float64)
    return torch.autograd.functional.jacobian(means, values) != 0


def without_gates(layers: nn.Sequential) -> nn.Sequential:
    bare = copy.deepcopy(layers)
    for block in bare:
        block.squeeze_excite = nn.Identity()
    return bare


# %%
gated = nn.Sequential(*copy.deepcopy(model.blocks[4:7])).double()
three = without_gates(gated)
wired = {"one block": wires(three[:1], 40), "three blocks": wires(three, 40),
         "three blocks, with gates": wires(gated, 40)}  # fmt: skip
table(
    ["wires from → to", "0–19 → 0–19", "20–39 → 20–39", "0–19 → 20–39", "20–39 → 0–19"],
    [[name, int(w[:20, :20].sum()), int(w[20:, 20:].sum()), int(w[20:, :20].sum()),
      int(w[:20, 20:].sum())] for name, w in wired.items()],
)  # fmt: skip


# %% [markdown]
# All 20 · 20 wires inside a half, and not one between the halves: exact zeros, in float64. With the gates, every channel reaches every channel.

# %% tags=["drawing"]
# fold: The code that draws this
def draw_lanes(lanes: plt.Axes) -> None:
    """Blocks 4 to 6 as two lanes with gates between them."""
    for column in range(3):
        for row, k in ((1, 3), (0, 5)):
            box = plt.Rectangle((column + 0.2, row + 0.2), 0.6, 0.6, color=kernel_color(k))
            lanes.add_patch(box)
            lanes.text(column + 0.5, row + 0.5, f"{k}×{k}", ha="center", va="center", weight="bold")
            lanes.annotate("", (column + 0.18, row + 0.5), (column - 0.18, row + 0.5),
                           arrowprops={"arrowstyle": "->"})  # fmt: skip
        lanes.plot([column + 0.5] * 2, [0.82, 1.18], color="#555555", linestyle=":")
        lanes.text(column + 0.55, 1, "gate", va="center", fontsize=9, color="#555555")
        lanes.text(column + 0.5, 2, f"block {4 + column}", ha="center")
    for row, channels in ((1, "channels\n0–19"), (0, "channels\n20–39")):
        lanes.text(-0.25, row + 0.5, channels, ha="right", va="center", fontsize=9)
    lanes.set(xlim=(-1.1, 3), ylim=(0, 2.2))
    lanes.axis("off")


# %% tags=["drawing"]
# fold: The code that draws this
import numpy as np
from matplotlib.colors import to_rgb

figure, axes = plt.subplots(1, 3, figsize=(8.4, 3), width_ratios=[1.35, 1, 1])
draw_lanes(axes[0])
for axis, name in zip(axes[1:], ("three blocks", "three blocks, with gates"), strict=True):
    w, picture = wired[name], np.ones((40, 40, 3))
    colours = {(0, 0): kernel_color(3), (1, 1): kernel_color(5)}
    for half in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows, columns = (slice(20 * h, 20 * h + 20) for h in half)
        picture[rows, columns][w[rows, columns].numpy()] = to_rgb(colours.get(half, "#bbbbbb"))
        said = "gate" if half not in colours else ("3×3", "5×5")[half[0]]
        if w[rows, columns].any():
            axis.text(
                20 * half[1] + 10, 20 * half[0] + 10, said, ha="center", va="center", weight="bold"
            )
    axis.imshow(picture, extent=(0, 40, 40, 0))
    axis.set(xticks=[0, 20, 40], yticks=[0, 20, 40], xlabel="input channel")
    axis.set_title(name.replace(", with", ",\nwith"), fontsize=10)
axes[1].set_ylabel("output channel")
show(
    figure,
    "halves_that_never_meet.png",
    "Left: blocks 4 to 6 as two lanes, 3×3 kernels for channels 0 to 19, 5×5 for channels 20 to "
    "39, joined by nothing but gates. Middle and right: grids of wires from input channels to "
    "output channels. Without gates, only two squares on the diagonal are filled, 3×3 and 5×5. "
    "With gates, the other two fill, too.",
    caption="Without gates nothing crosses from the 3×3 half to the 5×5 half.",
)


# %% [markdown]
# Then it must be possible to take the three blocks apart. Two narrow networks, one with 3×3 kernels and one with 5×5, get the two halves of every weight. Side by side they must compute what the three blocks compute, and send back the same gradient to the image. (`gradients: 1` is that one. The weights of the two are copies, so theirs are not compared.)

# %%
def half_network(layers: nn.Sequential, half: int, kernel_size: int) -> nn.Sequential:
    """The blocks' channels of one half, as blocks of their own with one kernel size."""
    narrow = nn.Sequential(*(
        MixConvBlock(20, 20, kernel_size, padding="same", activation="swish",
                     norm_layer=partial(nn.BatchNorm2d, eps=1e-3))
        for _ in layers
    ))  # fmt: skip
    state = layers.state_dict()
    for name, tensor in narrow.state_dict().items():
        split = name.replace("depthwise.conv.", f"depthwise.conv.convs.{half}.")
        whole = state.get(split, state.get(name))
        shared = whole.shape == tensor.shape  # this half's own kernels, or a counter
        tensor.copy_(whole if shared else whole.chunk(2)[half])
    return narrow.double().eval()


# %%
from mixconv.teaching import check_rewrite

left, right = half_network(three, 0, 3), half_network(three, 1, 5)
x = torch.randn(2, 40, 14, 14, dtype=torch.float64)
check_rewrite(
    three,
    lambda x: torch.cat([left(x[:, :20]), right(x[:, 20:])], dim=1),
    x,
    what="three blocks, and a 3×3 network beside a 5×5 network",
)


# %% [markdown]
# Which other blocks fall apart like this? Those whose expansion and projection both have two groups. Their halves, read off the layers: which kernels stand in the first half of the wide channels, and which in the second?

# %%
def kernels_of_halves(block: MixConvBlock) -> tuple[str, str]:
    layer = block.depthwise.conv
    convs = layer.convs if isinstance(layer, MixConv2d) else [layer]
    sizes = [conv.kernel_size[0] for conv in convs for _ in range(conv.out_channels)]
    middle = len(sizes) // 2
    halves = (sorted(set(part)) for part in (sizes[:middle], sizes[middle:]))
    return tuple(", ".join(map(str, half)) for half in halves)


# %%
rows = []
for name, network in networks.items():
    alike: dict[tuple[str, ...], list[str]] = {}
    for index, (block, run) in enumerate(zip(network.blocks, unroll(network.config), strict=True)):
        if run.expand_groups == run.project_groups == 2:
            gate = "yes" if run.squeeze_ratio else "no"
            alike.setdefault((*kernels_of_halves(block), gate), []).append(str(index))
    rows += [[f"MixNet-{name}", ", ".join(blocks), *key] for key, blocks in alike.items()]
table(["network", "blocks", "first half", "second half", "gate"], rows)


# %% [markdown]
# Where four sizes are mixed, one half has 3 and 5, the other 7 and 9. Where three are, the 5×5 kernels lie across the cut, and each half has some. Blocks 1 and 2 have no gate at all: there the halves do not touch.
#
# What brings the halves together again? The blocks with one group on either side: block 3 expands from all channels at once, block 7 too. Between them, the only thing that passes from the 3×3 half to the 5×5 half is the gate's news: one number a channel, the mean over the whole image, and no position.
#
# > ✏️ **Ours.** Neither the paper nor the code says this, nor any text that we found. The authors may have meant it or not: grouped 1×1 convolutions save weights, and the equal split of two sizes happens to cut at the same place.

# %% [markdown]
# **7.3** ★★ *10 minutes, two lines.* Let the halves meet: return MixNet-S with a projection of one group wherever expansion and projection both have two. Nothing else changes.
#
# <details><summary>Hint: the idea</summary>
#
# In a block string `a1.1_p1.1` says that both have two. Change the string, not the network.
#
# </details>

# %%
def meeting() -> MixNet:
    raise NotImplementedError


def test_meeting(answer) -> None:
    model = answer()
    assert isinstance(model, MixNet), f"a MixNet, got {type(model).__name__}"
    for run, old in zip(unroll(model.config), unroll(MIXNET_S), strict=True):
        both = old.expand_groups == old.project_groups == 2
        wanted = replace(old, project_groups=1) if both else old
        assert run == wanted, f"{encode_block(old)} became {encode_block(run)}"
    assert wires(without_gates(model.double().eval().blocks[4:7]), 40).all(), "halves still apart"


attempt(meeting, test_meeting)


# %% tags=["solution"]
# fold: Solution
def meeting_solution() -> MixNet:
    blocks = tuple(text.replace("a1.1_p1.1", "a1.1_p1") for text in MIXNET_S.blocks)
    return MixNet(replace(MIXNET_S, blocks=blocks))


def everywhere() -> MixNet:
    """take the groups off every projection, also where the expansion has one group"""
    blocks = tuple(text.replace("p1.1", "p1") for text in MIXNET_S.blocks)
    return MixNet(replace(MIXNET_S, blocks=blocks))


def first_side() -> MixNet:
    """take the groups off the expansion: the halves meet, but that is another network"""
    blocks = tuple(text.replace("a1.1_p1.1", "a1_p1.1") for text in MIXNET_S.blocks)
    return MixNet(replace(MIXNET_S, blocks=blocks))


attempt(meeting_solution, test_meeting, wrong=[everywhere, first_side])


# %% [markdown]
# ## What goes in
#
# Images as they were in training: RGB with the mean of ImageNet's pixels taken away, divided by their standard deviation. Chapter 18 sends a photograph through, and looks inside.

# %%
#| export mixnet.py
def preprocess(image: Tensor) -> Tensor:
    """Normalise RGB images as MixNet's training did, by ImageNet's mean and standard deviation.

    Shape:
        Input and output `(N, 3, H, W)`; input values 0 to 1.

    Raises:
        TypeError: for integers; divide them by 255 first.
        ValueError: if there are not three channels, or values like 255.

    Source: ImageNet's usual statistics. Chapter 7.
    """
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point, 0 to 1, got {image.dtype}")
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"image must be (N, 3, H, W), got {tuple(image.shape)}")
    if not image.is_meta and image.numel() and float(image.max()) > 2:  # resizing may overshoot 1
        raise ValueError(f"image must be 0 to 1, its largest value is {float(image.max()):.6g}")
    known = image.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (image - known[0]) / known[1]


# %%
from mixconv.teaching import photograph

[f"{value:.1f}" for value in preprocess(photograph(224)).aminmax()]


# %% [markdown]
# ## Exercises
#
# Three stand above, each where what it needs has been told. One more:
#
# **7.4** ★★★ *30 minutes, six lines.* Design under a budget. All depthwise layers of a network have 3×3 kernels; `layers` lists their channels and the side of their output. You may spend `budget` multiply-adds on 9×9 kernels, channel by channel. How many channels of each layer get one, so that they are as many as possible in all? Of layers with equal images fill the last one first.
#
# <details><summary>Hint: the idea</summary>
#
# A channel of any layer counts the same. What does one cost, and where is it cheapest?
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# A 9×9 in place of a 3×3: $72 \cdot h^2$ for each channel. Buy where $h$ is smallest until that layer is full, then in the next.
#
# </details>

# %%
def large_channels(layers: list[tuple[int, int]], budget: int) -> list[int]:
    raise NotImplementedError


def test_large_channels(answer) -> None:
    expect(answer, [(4, 2), (3, 1)], 72 * 2, gives=[0, 2], why="72 for each in the second layer")
    expect(answer, [(4, 2), (3, 1)], 72 * 8, gives=[1, 3], why="216 fill it, 288 buy one more")
    sides = [112, 56, 56, 28, 28, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7, 7]
    widths = [run.in_channels * run.expand_ratio for run in unroll(MIXNET_S)]
    layers = list(zip(widths, sides, strict=True))
    budget = 3 * 9 * sum(c * h * h for c, h in layers)
    gives = [0] * 6 + [175] + [c for c, h in layers if h < 28]
    expect(answer, layers, budget, gives=gives, why="at 28×28 the money ends")


attempt(large_channels, test_large_channels)


# %% tags=["solution"]
# fold: Solution
def large_channels_solution(layers: list[tuple[int, int]], budget: int) -> list[int]:
    bought = [0] * len(layers)
    for i in sorted(range(len(layers)), key=lambda i: (layers[i][1], -i)):
        channels, side = layers[i]
        bought[i] = min(channels, budget // (72 * side**2))
        budget -= bought[i] * 72 * side**2
    return bought


def front_to_back(layers: list[tuple[int, int]], budget: int) -> list[int]:
    """spend from front to back, where the images are large"""
    bought = []
    for channels, side in layers:
        bought.append(min(channels, budget // (72 * side**2)))
        budget -= bought[-1] * 72 * side**2
    return bought


def whole_layers(layers: list[tuple[int, int]], budget: int) -> list[int]:
    """buy whole layers only"""
    bought = [0] * len(layers)
    for i in sorted(range(len(layers)), key=lambda i: (layers[i][1], -i)):
        cost = 72 * layers[i][0] * layers[i][1] ** 2
        if cost <= budget:
            bought[i], budget = layers[i][0], budget - cost
    return bought


attempt(large_channels_solution, test_large_channels, wrong=[front_to_back, whole_layers])

# %% [markdown]
# ## Takeaways
# - A MixNet is a list of strings, a stem and a head. The defaults build the official network.
# - The search takes 3×3 early, with one exception in M, and mixes late: an 11×11 kernel costs 256 times as much at 112×112 pixels as at 7×7. In S, three of the four blocks that halve the image have a wider mix than their neighbours; in M, two of four.
# - Multiply-adds are spread along the depth and weights pile up at its end. The depthwise kernels are 16% of S, 19% of M and 15% of L.
# - The paper's figure leaves things out. The code is what the published numbers came from.
# - Where expansion and projection have two groups and the mix has two or four sizes, small and large kernels are networks side by side. Gates connect them, where there are gates, and nothing else does.
#
# **Further reading**: [the paper](https://arxiv.org/abs/1907.09595), section 4; [`mixnet_builder.py`](https://github.com/tensorflow/tpu/blob/master/models/official/mnasnet/mixnet/mixnet_builder.py). The searches it follows: [MnasNet](https://arxiv.org/abs/1807.11626), [FBNet](https://arxiv.org/abs/1812.03443), [ProxylessNAS](https://arxiv.org/abs/1812.00332).
#
# Previous: [6 · Receptive fields](06_receptive_fields.ipynb) · Next: [8 · The official code](08_official.ipynb)
