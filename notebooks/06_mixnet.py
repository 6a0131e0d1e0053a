# %% [markdown]
# # 6 · MixNet
#
# The network that an architecture search made of MixConv blocks: MixNet-S, M and L. Built from the official code's block strings, and checked against the official code's numbers.
#
# **You will be able to**
# - read and write the block strings that define a MixNet, and build one of your own;
# - see where the paper's Figure 8 and its code differ;
# - load weights from the official code and from timm, and show that the outputs agree;
# - push a photograph through the network and look inside.
#
# **Know first:** [chapter 4](04_blocks.ipynb) and [chapter 5](05_mobilenets.ipynb).
#
# **Time:** 35 minutes to read. Runs in under 60 seconds on two cores.

# %% [markdown]
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
# With a stride, only the first of the repeated blocks has it. Two more flags: `noskip` leaves the residual out, `dilated` dilates.

# %%
#| export mixnet.py
"""MixNet-S, M and L from the official block strings (paper, section 4; chapter 6)."""

import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypedDict, Unpack

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
        activation: "relu" or "swish".
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
# Decoding is splitting at underscores, and saying clearly what is wrong with a bad string.

# %%
#| export mixnet.py
_WORD = re.compile(r"^(r|k|a|p|s|e|i|o|se)(\d[\d.]*)$")
_FLAGS = {"sw", "noskip", "dilated"}


# %% tags=["plumbing"]
#| export mixnet.py
def _split_words(text: str) -> tuple[dict[str, str], set[str]]:
    """The numbered words of a block string, and its flags.

    Raises:
        ValueError: for a word that means nothing, appears twice, or is missing.
    """
    words: dict[str, str] = {}
    flags: set[str] = set()
    for word in text.split("_"):
        match = _WORD.match(word)
        name = match[1] if match else word
        if name in words or name in flags or not (match or word in _FLAGS):
            raise ValueError(f"block string {text!r}: cannot read {word!r}")
        if match:
            words[name] = match[2]
        else:
            flags.add(word)
    missing = [name for name in ("r", "k", "a", "p", "s", "e", "i", "o") if name not in words]
    if missing:
        raise ValueError(f"block string {text!r}: no {', '.join(missing)}")
    return words, flags


# %%
_split_words("r3_k3.5_a1.1_p1.1_s11_e6_i40_o40_se0.5_sw")


# %%
#| export mixnet.py
def decode_block(text: str) -> BlockConfig:
    """A block configuration from the official notation.

    Args:
        text: such as `r3_k3.5_a1.1_p1.1_s11_e6_i40_o40_se0.5_sw`.

    Raises:
        ValueError: quoting the string and the part that is wrong.

    Source: `_decode_block_string` in the official `mixnet_builder.py`.
    """
    words, flags = _split_words(text)
    try:
        kernels, expand, project = (tuple(map(int, words[n].split("."))) for n in "kap")
        rows, columns = map(int, words["s"])
        if rows != columns or {*expand, *project} != {1} or 0 in (rows, int(words["r"])):
            raise ValueError("strides must be equal, a and p made of 1s, r and s at least 1")
        return BlockConfig(
            in_channels=int(words["i"]), out_channels=int(words["o"]), kernel_sizes=kernels,
            stride=rows, expand_ratio=int(words["e"]), repeats=int(words["r"]),
            expand_groups=len(expand), project_groups=len(project),
            squeeze_ratio=float(words.get("se", 0)),
            activation="swish" if "sw" in flags else "relu",
            skip="noskip" not in flags, dilated="dilated" in flags,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"block string {text!r}: {error}") from None


# %% [markdown]
# Encoding is the way back. Numbers are printed as the official code prints them.

# %%
#| export mixnet.py
def encode_block(config: BlockConfig) -> str:
    """The official notation of a block configuration; `decode_block` reads it back.

    Raises:
        ValueError: for an activation that the notation has no word for.

    Source: `_encode_block_string` in the official `mixnet_builder.py`.
    """
    if config.activation not in ("relu", "swish"):
        raise ValueError(f"no notation for activation {config.activation!r}, only relu and swish")
    kernels = ".".join(map(str, config.kernel_sizes))
    expand, project = (".".join("1" * g) for g in (config.expand_groups, config.project_groups))
    words = [
        f"r{config.repeats}_k{kernels}_a{expand}_p{project}",
        f"s{config.stride}{config.stride}_e{config.expand_ratio}",
        f"i{config.in_channels}_o{config.out_channels}",
    ]
    if config.squeeze_ratio:
        words.append(f"se{config.squeeze_ratio}")
    flags = {
        "noskip": not config.skip,
        "sw": config.activation == "swish",
        "dilated": config.dilated,
    }
    return "_".join(words + [flag for flag, is_set in flags.items() if is_set])


# %%
config = decode_block("r3_k3.5_a1.1_p1.1_s11_e6_i40_o40_se0.5_sw")
print(encode_block(config))
config

# %%
for text in ("r1_k3_s11", "r1_k3_a1_p1_s12_e6_i8_o8", "r1_k3_a1_p1_s11_e6_i8_o8_x2"):
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
    """

    blocks: tuple[str | BlockConfig, ...]
    stem_channels: int
    head_channels: int = 1536
    drop_rate: float = 0.2
    width_multiplier: float = 1.0


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

# %% [markdown]
# MixNet-L is M with every channel count but the head's multiplied by 1.3, and rounded as in chapter 5.

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

# %%
#| export mixnet.py
MIXNET_L = replace(MIXNET_M, width_multiplier=1.3)

# %%
from mixconv.teaching import table

table(
    ["network", "block strings", "blocks", "stem", "dropout", "width"],
    [
        [name, len(c.blocks), sum(decode_block(b).repeats for b in c.blocks), c.stem_channels,
         c.drop_rate, c.width_multiplier]
        for name, c in (("S", MIXNET_S), ("M", MIXNET_M), ("L", MIXNET_L))
    ],
)  # fmt: skip

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
    if not config.blocks:
        raise ValueError("blocks must name at least one block, got none")
    check_multiplier("width_multiplier", config.width_multiplier)
    width = partial(round_channels, multiplier=config.width_multiplier)
    blocks, channels = list[BlockConfig](), config.stem_channels
    for entry in config.blocks:
        run = decode_block(entry) if isinstance(entry, str) else entry
        check_positive("repeats", run.repeats)
        if run.in_channels != channels:
            raise ValueError(f"{run} follows a block of {channels} channels")
        wide_in, wide_out = width(run.in_channels), width(run.out_channels)
        first = replace(run, in_channels=wide_in, out_channels=wide_out, repeats=1)
        later = replace(first, in_channels=wide_out, stride=1)
        blocks += [first] + [later] * (run.repeats - 1)
        channels = run.out_channels
    return blocks


# %%
[f"{b.in_channels}→{b.out_channels}" for b in unroll(MIXNET_L)]

# %% [markdown]
# Then the network: chapter 5's `ConvNet`, filled with chapter 4's blocks.
#
# > ⚙️ **Official code.** Stem and head use ReLU. Padding is TensorFlow's 'SAME' everywhere. Batch normalisation has decay 0.99 and epsilon 0.001; PyTorch calls 1 − 0.99 = 0.01 the *momentum*.

# %%
#| export mixnet.py
from mixconv._checks import check_rate
from mixconv.blocks import ConvNormActivation, MixConvBlock
from mixconv.layer import make_conv2d
from mixconv.network import ConvNet, initialize


def _make_blocks(
    configs: list[BlockConfig], drop_path_rate: float, **options: Any
) -> list[MixConvBlock]:
    """The blocks of a network; stochastic depth grows with depth."""
    check_rate("drop_path_rate", drop_path_rate)
    blocks: list[MixConvBlock] = []
    for config in configs:
        arguments = asdict(config)
        del arguments["repeats"]  # written out by unroll
        rate = drop_path_rate * len(blocks) / len(configs)
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

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`.

    Raises:
        ValueError: naming the argument or the block string.

    Source: paper, section 4.2; `MixnetModel` in the official `mixnet_model.py`. Chapter 6.
    """

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
    ) -> None:
        scaled = replace(config, width_multiplier=config.width_multiplier * width_multiplier)
        norm = partial(nn.BatchNorm2d, eps=norm_eps, momentum=norm_momentum)
        blocks = _make_blocks(unroll(scaled), drop_path_rate, padding=padding, norm_layer=norm)
        width = round_channels(config.stem_channels, scaled.width_multiplier)
        stem = make_conv2d(in_channels, width, 3, stride=2, padding=padding)
        head = make_conv2d(blocks[-1].out_channels, config.head_channels, 1)
        super().__init__(
            ConvNormActivation(stem, norm), blocks, ConvNormActivation(head, norm),
            config.head_channels, num_classes=num_classes,
            drop_rate=config.drop_rate if drop_rate is None else drop_rate,
        )  # fmt: skip
        self.config = scaled
        initialize(self)


# %% [markdown]
# And the three functions that most people call. `weights` comes later in this chapter.

# %%
#| export mixnet.py
class MixNetOptions(TypedDict, total=False):
    """Keyword arguments of `MixNet`, all optional; see there."""

    num_classes: int
    in_channels: int
    width_multiplier: float
    drop_rate: float | None
    drop_path_rate: float
    padding: str
    norm_eps: float
    norm_momentum: float


def _build(config: MixNetConfig, weights: Any, options: MixNetOptions) -> MixNet:
    if weights is None:
        return MixNet(config, **options)
    from mixconv.weights import load_weights, matching_options, read_state_dict  # builds on us

    state = read_state_dict(weights)
    matched: MixNetOptions = {**matching_options(weights, state), **options}
    model = MixNet(config, **matched)
    load_weights(model, state)
    return model


# %%
#| export mixnet.py
def mixnet_s(weights: Any = None, **options: Unpack[MixNetOptions]) -> MixNet:
    """MixNet-S, 4.1 million parameters.

    Args:
        weights: None for untrained; or a path to `.safetensors` or `.pth`, a state dict, or a
            hub name such as `"timm/tf_mixnet_s.in1k"`. See `load_weights`.
        options: as in `MixNet`. With a named timm checkpoint, padding and epsilon follow the name.

    Source: `mixnet_s` in the official `mixnet_builder.py`. Chapter 6.
    """
    return _build(MIXNET_S, weights, options)


def mixnet_m(weights: Any = None, **options: Unpack[MixNetOptions]) -> MixNet:
    """MixNet-M, 5.0 million parameters. Arguments as in `mixnet_s`."""
    return _build(MIXNET_M, weights, options)


def mixnet_l(weights: Any = None, **options: Unpack[MixNetOptions]) -> MixNet:
    """MixNet-L, 7.3 million parameters: M, 1.3 times as wide. Arguments as in `mixnet_s`."""
    return _build(MIXNET_L, weights, options)


# %%
import torch


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


torch.manual_seed(0)
networks = {"S": mixnet_s(), "M": mixnet_m(), "L": mixnet_l()}
assert [parameters(n) for n in networks.values()] == [4_134_606, 5_014_382, 7_329_252]
table(["network", "parameters"], [[f"MixNet-{n}", parameters(m)] for n, m in networks.items()])

# %% [markdown]
# These are the parameter counts of three independent implementations, to the last digit.
#
# ## Every block as it is built
#
# MixNet-S on 224×224 pixels:

# %%
from mixconv.formulation import count_costs

model = networks["S"].eval()
costs = count_costs(model, torch.zeros(1, 3, 224, 224))


def block_row(index: int) -> list[object]:
    run = unroll(model.config)[index]
    parts = [c for c in costs if c.name.startswith(f"blocks.{index}.")]
    side = parts[-1].output_shape[-1]
    return [index, ", ".join(map(str, run.kernel_sizes)), run.stride, run.expand_ratio,
            f"{run.in_channels}→{run.out_channels}", f"{run.expand_groups}/{run.project_groups}",
            run.squeeze_ratio or "–", run.activation, f"{side}×{side}",
            sum(c.parameters for c in parts), sum(c.multiply_adds for c in parts)]  # fmt: skip


table(
    ["block", "kernels", "stride", "expand", "channels", "1×1 groups", "squeeze", "activation",
     "output", "parameters", "multiply-adds"],
    [block_row(index) for index in range(len(model.blocks))],
)  # fmt: skip

# %% [markdown]
# (Parameters of convolutions; batch normalisation adds two for each channel.) Read the kernel column: small kernels while the image is large, mixes up to 11 once it is small. A stride-2 block has a wider mix than the blocks around it.
#
# ## Figure 8, from the code
#
# > 📄 **Paper.** Figure 8 draws S and M as rows of blocks with their kernel sizes.
#
# > ⚙️ **Official code.** What is built differs. For MixNet-S the last two blocks at 14×14 have kernels 3, 5, 7, 9, where the figure has 3, 5, 7. And the figure shows neither the squeeze-and-excitation gates, nor swish, nor the grouped 1×1 convolutions, nor the expansion ratios.

# %% tags=["drawing"]
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style

use_style()
figure, axes = plt.subplots(2, 1, figsize=(8.4, 4.6))
for axis, (name, config) in zip(axes, (("S", MIXNET_S), ("M", MIXNET_M)), strict=True):
    side = 112
    for column, run in enumerate(unroll(config)):
        if run.stride == 2:
            axis.axvline(column - 0.5, color="#bbbbbb", linewidth=1)
        if run.stride == 2 or column == 0:
            side //= run.stride
            axis.text(column - 0.42, 5.55, f"{side}²", fontsize=8, color="#777777")
        for row, k in enumerate(run.kernel_sizes):
            axis.add_patch(plt.Rectangle((column - 0.4, row), 0.8, 0.94, color=kernel_color(k)))
            axis.text(column, row + 0.45, str(k), color="white", ha="center", va="center")
        groups = f"{run.expand_groups}/{run.project_groups}"
        marks = f"{run.expand_ratio}\n{groups}\n{'●' if run.squeeze_ratio else ''}"
        axis.text(column, -0.1, marks, ha="center", va="top", fontsize=7)
    axis.text(-0.7, -0.1, "expand\n1×1 groups\ngate", ha="right", va="top", fontsize=7)
    if name == "S":
        axis.add_patch(plt.Rectangle((10.54, -0.06), 1.92, 4.1, fill=False, linestyle="--"))
        axis.text(11.5, 4.15, "paper: 3, 5, 7", ha="center", fontsize=7)
    axis.set(xlim=(-2.2, 18.7), ylim=(-1.7, 6), xticks=[], yticks=[])
    axis.set_title(f"MixNet-{name}", loc="left")
    axis.spines[:].set_visible(False)
show(
    figure,
    "figure_8_from_code.png",
    "MixNet-S and MixNet-M as rows of 16 and 19 blocks, each a stack of its kernel sizes. Grey "
    "lines mark the stride-2 blocks; sizes go from 112×112 to 7×7. Under each block its expansion "
    "ratio, the groups of its 1×1 convolutions and a dot for a gate. Two blocks of MixNet-S are "
    "framed: the paper's figure has kernels 3, 5, 7 there, the code 3, 5, 7, 9.",
)


# %% [markdown]
# Below each block: its expansion, the groups of its two 1×1 convolutions, and a dot for a squeeze-and-excitation gate. The dashed frame is where figure and code differ in kernel sizes.

# %% [markdown]
# ## What it costs
#
# Multiply-adds by type of layer. The counts were taken from the official TensorFlow graph too, so here they can be compared type by type, not only in sum.

# %%
def by_type(model: nn.Module) -> dict[str, int]:
    sums = {"stem and pointwise": 0, "depthwise": 0, "squeeze-and-excitation": 0, "classifier": 0}
    for cost in count_costs(model, torch.zeros(1, 3, 224, 224)):
        kind = {"depthwise": "depthwise", "linear": "classifier"}.get(
            cost.kind, "stem and pointwise"
        )
        kind = "squeeze-and-excitation" if "squeeze_excite" in cost.name else kind
        sums[kind] += cost.multiply_adds
    return sums


counts = {name: by_type(model) for name, model in networks.items()}
official = {"S": [197_881_600, 38_989_104, 766_656, 1_536_000],
            "M": [271_806_528, 64_758_400, 1_071_744, 1_536_000]}  # fmt: skip
assert all(list(counts[name].values()) == official[name] for name in official)
table(["network", *counts["S"], "sum"],
      [[f"MixNet-{n}", *c.values(), sum(c.values())] for n, c in counts.items()])  # fmt: skip

# %% [markdown]
# > 📄 **Paper.** Table 2 prints 256M for S, 360M for M and 565M for L.
#
# The paper's figures are higher, and no way of counting that we tried explains the difference. The official code's own graph has the sums above. Parameters do agree. Accuracies are cited.

# %%
import json
from pathlib import Path

paper = json.loads(Path("../tests/data/paper.json").read_text())["table_2"]
table(
    ["network", "parameters, ours", "paper", "multiply-adds, ours", "paper", "top-1 (cited)"],
    [
        [f"MixNet-{n}", f"{parameters(m) / 1e6:.1f}M", f"{paper[f'MixNet-{n}'][0]}M",
         f"{sum(counts[n].values()) / 1e6:.1f}M", f"{paper[f'MixNet-{n}'][1]}M",
         f"{paper[f'MixNet-{n}'][2]}%"]
        for n, m in networks.items()
    ],
)  # fmt: skip

# %% [markdown]
# And against PyTorch's own counter:

# %%
from torch.utils.flop_counter import FlopCounterMode

with FlopCounterMode(display=False) as counter, torch.no_grad():
    model(torch.zeros(1, 3, 224, 224))
counter.get_total_flops() == 2 * sum(counts["S"].values())


# %% [markdown]
# ## A photograph goes through
#
# The network expects what it would be trained on: RGB images with the mean of ImageNet's pixels taken away, divided by their standard deviation.

# %%
#| export mixnet.py
def preprocess(image: Tensor) -> Tensor:
    """Normalise RGB images as MixNet's training did, by ImageNet's mean and standard deviation.

    Shape:
        Input and output `(N, 3, H, W)`; input values 0 to 1.

    Raises:
        ValueError: if there are not three channels.
        TypeError: for integers; divide them by 255 first.
    """
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point, 0 to 1, got {image.dtype}")
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"image must be (N, 3, H, W), got {tuple(image.shape)}")
    mean, deviation = image.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    normalised: Tensor = (image - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    return normalised


# %%
from mixconv.teaching import photograph

image = preprocess(photograph(224))
print(tuple(image.shape), [f"{value:.1f}" for value in (image.min(), image.mean(), image.max())])

# %% [markdown]
# Watch block 3, the first with three kernel sizes. A hook keeps what its depthwise layer gives. The weights are random: **this network is untrained**, so the maps show what random kernels of each size respond to, not what MixNet has learned.

# %%
seen = {}
layer = model.blocks[3].depthwise.conv
hook = layer.register_forward_hook(lambda module, inputs, output: seen.update(maps=output))
with torch.no_grad():
    logits = model(image)
hook.remove()
print(layer)
print("feature maps", tuple(seen["maps"].shape), "logits", tuple(logits.shape))

# %% tags=["drawing"]
figure, axes = plt.subplots(3, 6, figsize=(7.6, 4.0))
groups = seen["maps"][0].split(layer.partition)
for row, (k, group) in zip(axes, zip(layer.kernel_sizes, groups, strict=True), strict=True):
    strongest = group.flatten(1).std(dim=1).argsort(descending=True)[:6]
    for axis, channel in zip(row, strongest.sort().values, strict=True):
        axis.imshow(group[channel], cmap="gray")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    row[0].set_ylabel(f"{k}×{k}", color=kernel_color(k), weight="bold")
show(
    figure,
    "feature_maps.png",
    "Six feature maps of each kernel size from block 3 of an untrained MixNet-S on the "
    "photograph, 28×28 pixels each. Head and shoulders can be made out in most of them.",
)

# %% [markdown]
# The five sizes that a detector would take:

# %%
with torch.no_grad():
    pyramid = model.features(image)
table(
    ["stride", "channels", "feature map", "from"],
    [[info["reduction"], info["num_chs"], tuple(f.shape), info["module"]]
     for info, f in zip(model.feature_info, pyramid, strict=True)],
)  # fmt: skip

# %% [markdown]
# ## Weights from the official code
#
# How do we know that this is the official network, and not one that looks like it? By its numbers.
# The repository holds what the *unmodified* official TensorFlow code computed with weights made from a recipe: variable $i$ is drawn by NumPy from seed $1000 + i$. With the same weights our network must give the same numbers.
#
# The weights come in TensorFlow's layout. By hand, for a 3×3 kernel from 16 to 24 channels, and for a depthwise kernel on 16:
#
# | | TensorFlow | PyTorch | order of axes |
# |---|---|---|---|
# | convolution | (3, 3, 16, 24): rows, columns, in, out | (24, 16, 3, 3): out, in, rows, columns | 3, 2, 0, 1 |
# | depthwise | (3, 3, 16, 1): rows, columns, channels, multiplier | (16, 1, 3, 3) | 2, 3, 0, 1 |
# | dense | (1536, 1000): in, out | (1000, 1536): out, in | 1, 0 |
#
# A grouped layer is one tensor here and several there. So a *slot* says where one official variable belongs: a tensor or a part of one, its layout, and the TensorFlow names it goes by.

# %%
#| export weights.py
"""Weights in and out: the official TensorFlow variables, timm, files (chapter 6)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixconv.blocks import ConvNormActivation, SqueezeExcite
from mixconv.layer import MixConv2d
from mixconv.mixnet import MixNet

_AXES = {"conv": (3, 2, 0, 1), "depthwise": (2, 3, 0, 1), "dense": (1, 0), "vector": (0,)}


@dataclass
class _Slot:
    """Where one official variable goes.

    Attributes:
        target: our tensor, or the part of it that holds this variable.
        layout: "conv", "depthwise", "dense" or "vector".
        scope: TensorFlow's name scope, such as "blocks_3".
        kind: the Keras layer, such as "conv2d"; "se/conv2d" inside a gate.
    """

    target: Tensor
    layout: str
    scope: str
    kind: str


# %%
#| export weights.py
def _to_torch(value: Tensor, slot: _Slot) -> Tensor:
    """An official variable in PyTorch's layout.

    Raises:
        ValueError: if its shape does not fit the slot.
    """
    axes = _AXES[slot.layout]
    turned = value.permute(axes) if value.dim() == len(axes) else value
    if slot.layout == "depthwise" and value.dim() == 4:
        turned = turned.reshape(-1, 1, *turned.shape[2:])
    if turned.shape != slot.target.shape:
        wanted = tuple(slot.target.shape)
        raise ValueError(f"{slot.scope}/{slot.kind}: {tuple(value.shape)} does not fit {wanted}")
    return turned


# %%
example = _Slot(torch.empty(16, 1, 3, 3), "depthwise", "blocks_0", "depthwise_conv2d")
tuple(_to_torch(torch.zeros(3, 3, 16, 1), example).shape)


# %% [markdown]
# The slots of a layer: one kernel for each group, then a bias if there is one. And of a normalisation: scale, shift, running mean, running variance.

# %%
#| export weights.py
def _conv_slots(conv: nn.Module, scope: str, prefix: str = "") -> Iterator[_Slot]:
    parts = list(conv.convs) if isinstance(conv, MixConv2d) else [conv]
    for part in cast("list[nn.Conv2d]", parts):
        pointwise = part is conv and part.kernel_size == (1, 1)
        if not pointwise and part.groups == part.in_channels > 1:
            yield _Slot(part.weight.detach(), "depthwise", scope, "depthwise_conv2d")
        else:
            for kernel in part.weight.detach().chunk(part.groups):
                yield _Slot(kernel, "conv", scope, f"{prefix}conv2d")
        if part.bias is not None:
            yield _Slot(part.bias.detach(), "vector", scope, f"{prefix}conv2d")


def _norm_slots(norm: nn.Module, scope: str) -> Iterator[_Slot]:
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = cast("Tensor", getattr(norm, name)).detach()
        yield _Slot(tensor, "vector", scope, "batch_normalization")


# %% [markdown]
# The slots of the network, in the order in which the official code creates its variables: stem; for each block expand, depthwise, gate, project; head, classifier.

# %%
#| export weights.py
def _unit_slots(unit: nn.Module, scope: str) -> Iterator[_Slot]:
    if isinstance(unit, ConvNormActivation):
        yield from _conv_slots(unit.get_submodule("conv"), scope)
        yield from _norm_slots(unit.get_submodule("norm"), scope)
    elif isinstance(unit, SqueezeExcite):
        yield from _conv_slots(unit.squeeze, scope, "se/")
        yield from _conv_slots(unit.excite, scope, "se/")


def _slots(model: MixNet) -> list[_Slot]:
    """Every official variable's place, in the official order of creation."""
    slots = list(_unit_slots(model.stem, "stem"))
    for index, block in enumerate(model.blocks):
        for name in ("expand", "depthwise", "squeeze_excite", "project"):
            slots += _unit_slots(block.get_submodule(name), f"blocks_{index}")
    slots += _unit_slots(model.head, "head")
    if isinstance(model.classifier, nn.Linear):
        slots.append(_Slot(model.classifier.weight.detach(), "dense", "head", "dense"))
        slots.append(_Slot(model.classifier.bias.detach(), "vector", "head", "dense"))
    return slots


# %%
variables = json.loads(Path("../tests/data/variables.json").read_text())["mixnet-s"]["variables"]
print(len(_slots(model)), "slots,", len(variables), "official variables; three of them:")
pairs = list(zip(variables, _slots(model), strict=True))[5:8]
table(
    ["TensorFlow name", "TensorFlow shape", "our shape"],
    [[name, tuple(shape), tuple(slot.target.shape)] for (_, shape, name), slot in pairs],
)


# %% [markdown]
# Loading checks everything before it changes anything.

# %%
#| export weights.py
def load_official(model: MixNet, variables: Sequence[Any] | Mapping[str, Any]) -> None:
    """Load the official TensorFlow variables into a MixNet.

    Args:
        model: a MixNet of the same configuration, with the official padding and epsilon.
        variables: NumPy arrays (or tensors) in TensorFlow's layout, either in order of creation
            or by TensorFlow name: `{n: reader.get_tensor(n) for n in
            reader.get_variable_to_shape_map()}` of a `tf.train.load_checkpoint` reader. Moving
            averages of the weights are preferred; optimiser slots and counters are passed over.

    Raises:
        ValueError: if the number of variables, a name or a shape differs; the model is then
            unchanged.

    Source: order of creation in the official `mixnet_model.py`. Chapter 6.
    """
    slots = _slots(model)
    named = isinstance(variables, Mapping)
    values = _in_creation_order(variables, slots) if named else list(variables)  # type: ignore[arg-type]
    if len(values) != len(slots):
        raise ValueError(f"the model has {len(slots)} official variables, got {len(values)}")
    turned = [_to_torch(torch.as_tensor(v), slot) for v, slot in zip(values, slots, strict=True)]
    for slot, value in zip(slots, turned, strict=True):
        slot.target.copy_(value)


# %% [markdown]
# ## The proof
#
# Recipe weights in, recipe images in, and every endpoint compared with what TensorFlow gave: after the stem, after each block, and at each change of size before the projection. Of each, the mean, the standard deviation, the first 16 and the last 16 values; of the logits, all.

# %%
import runpy

import numpy as np

recipe = runpy.run_path("../tests/data/recipe.py")
truth = np.load("../tests/data/official.npz")
specification = json.loads(Path("../tests/data/variables.json").read_text())


def official_weights(name: str) -> list[np.ndarray]:
    roles = specification[name]["variables"]
    arrays = [recipe["value"](i, role, tuple(shape)) for i, (role, shape, _) in enumerate(roles)]
    assert recipe["digest"](arrays) == specification[name]["weights_sha256"]
    return arrays


# %%
def endpoints(model: MixNet, images: Tensor) -> dict[str, Tensor]:
    found, ends = {}, {str(info["module"]): i for i, info in enumerate(model.feature_info, 1)}
    x = found["stem"] = model.stem(images)
    for index, block in enumerate(model.blocks):
        inside = block.squeeze_excite(block.depthwise(block.expand(x)))
        x = found[f"block_{index}"] = block(x)
        if (number := ends.get(f"blocks.{index}")) is not None:
            found[f"reduction_{number}"] = x
            found[f"reduction_{number}.expansion_output"] = inside
    found["logits"] = model(images)
    return found


# %%
def compare(name: str, model: MixNet, height: int, width: int) -> tuple[int, bool]:
    images = torch.from_numpy(recipe["make_input"](height, width)).permute(0, 3, 1, 2)
    key = f"{name}_{height}x{width}|"
    with torch.no_grad():
        found = endpoints(model, images)
    close = [np.allclose(found["logits"], truth[key + "logits"], atol=1e-5, rtol=1e-5)]
    for i, endpoint in enumerate(truth[key + "names"]):
        values = found[str(endpoint)].permute(0, 2, 3, 1).flatten().numpy()
        summary = [values.mean(), values.std(), *values[:16], *values[-16:]]
        expected = np.concatenate(
            [truth[key + part][i] for part in ("mean_std", "first16", "last16")]
        )
        close.append(np.allclose(summary, expected, atol=1e-5, rtol=1e-5))
    return len(close), all(close)


# %%
results = {}
for name, build in (("mixnet-s", mixnet_s), ("mixnet-m", mixnet_m)):
    parity = build().eval()
    load_official(parity, official_weights(name))
    for height, width in ((224, 224), (131, 170)):
        results[name, height, width] = compare(name, parity, height, width)
assert all(equal for _, equal in results.values())
table(
    ["network", "size", "endpoints compared", "all within 1e-5"],
    [[name, f"{h}×{w}", *result] for (name, h, w), result in results.items()],
)

# %% [markdown]
# The second size is odd and even and not square on its way down. And the comparison can fail. The same with PyTorch's usual epsilon, and with symmetric padding:

# %%
for mistake in ({"norm_eps": 1e-5}, {"padding": "symmetric"}):
    wrong = mixnet_s(**mistake).eval()
    load_official(wrong, official_weights("mixnet-s"))
    print(mistake, "agrees:", compare("mixnet-s", wrong, 224, 224)[1])

# %% [markdown]
# ## Checkpoints by name
#
# A checkpoint knows names, and no order. Names say enough:
#
# | TensorFlow name | scope | kind | number |
# |---|---|---|---|
# | `mixnet-s/mixnet_model/blocks_4/conv2d_13/kernel` | blocks_4 | conv2d | 13 |
# | `mixnet-s/mixnet_model/blocks_4/conv2d_14/kernel` | blocks_4 | conv2d | 14 |
# | `mixnet-s/mixnet_model/blocks_4/se/conv2d_15/bias` | blocks_4 | se/conv2d | 15 |
# | `mixnet-s/blocks_4/batch_normalization_1/gamma` | blocks_4 | batch_normalization | 1 |
#
# Keras numbers the layers of a kind as they are created. So let the variables of each scope and kind stand in line by number, and let each slot take the next one from its line.
#
# Training leaves more in a checkpoint: step counters and optimiser slots, which are passed over, and moving averages of the weights, which are preferred, as in the official evaluation.

# %% tags=["plumbing"]
#| export weights.py
_VARIABLE = re.compile(
    r"(?:^|/)(?P<scope>stem|blocks_\d+|head)/"
    r"(?P<kind>(?:se/)?(?:depthwise_conv2d|conv2d|batch_normalization|dense))(?:_(?P<number>\d+))?/"
    r"(?P<name>kernel|depthwise_kernel|bias|gamma|beta|moving_mean|moving_variance)$"
)
_NAMES = ["kernel", "depthwise_kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"]
_AVERAGE = "/ExponentialMovingAverage"

_Lines = dict[tuple[str, str], list[tuple[tuple[int, int], Any]]]


def _stand_in_line(variables: Mapping[str, Any]) -> _Lines:
    """The variables of each scope and kind, in order of creation, with what they sort by."""
    plain = {name.removesuffix(":0"): value for name, value in variables.items()}
    averages = {n.removesuffix(_AVERAGE): v for n, v in plain.items() if n.endswith(_AVERAGE)}
    lines: _Lines = {}
    for name, value in (plain | averages).items():
        if match := _VARIABLE.search(name):
            place = (int(match["number"] or 0), _NAMES.index(match["name"]))
            lines.setdefault((match["scope"], match["kind"]), []).append((place, value))
    return {key: sorted(line, key=lambda item: item[0]) for key, line in lines.items()}


# %%
shuffled = {name: index for index, (*_, name) in reversed(list(enumerate(variables)))}
_stand_in_line(shuffled)["blocks_4", "depthwise_conv2d"]


# %% [markdown]
# (Here each variable is replaced by its number in the official order: 76 comes before 77.) Each slot takes the next in its line. Too few or too many is an error that says where.

# %%
#| export weights.py
def _in_creation_order(variables: Mapping[str, Any], slots: Sequence[_Slot]) -> list[Any]:
    """The variables of a checkpoint in the order of the slots.

    Raises:
        ValueError: naming the scope and kind where variables are missing or left over.
    """
    lines = _stand_in_line(variables)
    ordered = []
    for slot in slots:
        line = lines.get((slot.scope, slot.kind))
        if not line:
            raise ValueError(f"no variable left for {slot.scope}/{slot.kind}")
        ordered.append(line.pop(0)[1])
    surplus = sorted("/".join(key) for key, line in lines.items() if line)
    if surplus:
        raise ValueError(f"more variables than the model has in {', '.join(surplus)}")
    return ordered


# %%
names = [name for *_, name in specification["mixnet-s"]["variables"]]
checkpoint = dict(zip(names, official_weights("mixnet-s"), strict=True))
checkpoint = {name: checkpoint[name] for name in sorted(checkpoint)}
by_name, by_order = mixnet_s(), mixnet_s()
load_official(by_name, checkpoint)
load_official(by_order, official_weights("mixnet-s"))
pairs = zip(by_name.state_dict().values(), by_order.state_dict().values(), strict=True)
all(torch.equal(*pair) for pair in pairs)

# %% [markdown]
# ## Weights from timm
#
# Trained weights are published for timm. Its network is the same; its names are not. The table of names goes both ways: for each of our tensors, the timm tensors whose concatenation it is.
#
# timm groups blocks into stages, and a stage ends where the number of channels changes in the block strings (before any width multiplier).

# %%
#| export weights.py
from dataclasses import replace
from itertools import groupby

from mixconv.mixnet import unroll


def _block_names(model: MixNet) -> list[str]:
    """The name of each block in timm: stage and position."""
    plain = unroll(replace(model.config, width_multiplier=1.0))
    stages = [list(run) for _, run in groupby(plain, key=lambda block: block.out_channels)]
    return [f"blocks.{stage}.{i}" for stage, run in enumerate(stages) for i in range(len(run))]


# %%
" ".join(_block_names(model))

# %% [markdown]
# Inside a block, timm numbers batch normalisations, and a block without expansion has one fewer:
#
# | ours | timm | timm, no expansion |
# |---|---|---|
# | `expand.conv`, `expand.norm` | `conv_pw`, `bn1` | |
# | `depthwise.conv`, `depthwise.norm` | `conv_dw`, `bn2` | `conv_dw`, `bn1` |
# | `squeeze_excite.squeeze`, `.excite` | `se.conv_reduce`, `se.conv_expand` | the same |
# | `project.conv`, `project.norm` | `conv_pwl`, `bn3` | `conv_pw`, `bn2` |

# %%
#| export weights.py
_WIDE = {"expand.conv": "conv_pw", "expand.norm": "bn1", "depthwise.conv": "conv_dw",
         "depthwise.norm": "bn2", "project.conv": "conv_pwl", "project.norm": "bn3"}  # fmt: skip
_PLAIN = {"depthwise.conv": "conv_dw", "depthwise.norm": "bn1",
          "project.conv": "conv_pw", "project.norm": "bn2"}  # fmt: skip
_GATE = {"squeeze_excite.squeeze": "se.conv_reduce", "squeeze_excite.excite": "se.conv_expand"}
_ENDS = {"stem.conv": "conv_stem", "stem.norm": "bn1", "head.conv": "conv_head",
         "head.norm": "bn2", "classifier": "classifier"}  # fmt: skip


def _layer_names(model: MixNet) -> dict[str, str]:
    """The name in timm of each of our layers that holds tensors."""
    names = dict(_ENDS)
    for index, (block, prefix) in enumerate(zip(model.blocks, _block_names(model), strict=True)):
        inner = _PLAIN if isinstance(block.expand, nn.Identity) else _WIDE
        names |= {f"blocks.{index}.{k}": f"{prefix}.{v}" for k, v in (inner | _GATE).items()}
    return names


# %%
#| export weights.py
def _timm_names(model: MixNet) -> dict[str, list[str]]:
    """For each key of our state dict the timm keys whose concatenation it is."""
    layers = _layer_names(model)
    names: dict[str, list[str]] = {}
    for key in model.state_dict():
        layer, _, tensor = key.rpartition(".")
        base, _, part = layer.partition(".convs.")
        module = model.get_submodule(layer)
        numbers = [part] if part else []
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and not part:
            numbers = [str(group) for group in range(module.groups)] if module.groups > 1 else []
        stems = [f"{layers[base]}.{number}" for number in numbers] or [layers[base]]
        names[key] = [f"{stem}.{tensor}" for stem in stems]
    return names


# %%
#| export weights.py
def _cut(state: Mapping[str, Tensor], names: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """A state dict of ours cut into the tensors that other names stand for; they are views."""
    result: dict[str, Tensor] = {}
    for key, parts in names.items():
        tensors = state[key].chunk(len(parts)) if len(parts) > 1 else (state[key],)
        result |= zip(parts, tensors, strict=True)
    return result


def to_timm(model: MixNet) -> dict[str, Tensor]:
    """The model's weights under timm's names, for `load_state_dict` of timm's MixNets.

    Source: `EfficientNet` of timm 1.0. Chapter 6.
    """
    return {
        name: tensor.clone()
        for name, tensor in _cut(model.state_dict(), _timm_names(model)).items()
    }


# %%
renamed = to_timm(model)
[name for name in renamed if name.startswith("blocks.1.0.conv")]

# %% [markdown]
# ## Files, state dicts, hub names
#
# One function takes whatever holds weights. It recognises timm's names (the old gen-efficientnet names are the same) and our own, checks all of them, and only then changes the model.

# %%
#| export weights.py
import os
from pathlib import Path

_HUB_NAME = re.compile(r"^(?:hf[-_]hub:)?(?P<repository>[\w.-]+/[\w.-]+)$")
_FILE_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl", ".npz", ".h5")


def read_state_dict(weights: Any) -> dict[str, Tensor]:
    """Tensors by name from a file, a hub name, or a state dict.

    Files are read as data only: nothing in them is executed.

    Raises:
        ValueError: if the file is damaged or holds something else, or the name is no hub name.
        FileNotFoundError: if there is no such file.
        ImportError: naming the extra to install, for `.safetensors` files and hub names.
    """
    if isinstance(weights, Mapping):
        return _unwrap(weights, "the state dict")
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(
            f"weights must be a path, a name or a state dict, got {type(weights).__name__}"
        )
    path = Path(weights)
    if isinstance(weights, str) and not path.exists() and not weights.endswith(_FILE_ENDINGS):
        path = _download(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {str(path)!r}")
    return _unwrap(_read_file(path), str(path))


# %% tags=["plumbing"]
#| export weights.py
def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        message = "reading .safetensors needs safetensors: pip install 'mixconv[hub]'"
        raise ImportError(message) from None
    except Exception as error:  # damaged files fail in many ways; all mean the same
        raise ValueError(f"{path} holds no readable weights: {error}") from error


# %% tags=["plumbing"]
#| export weights.py
def _download(name: str) -> Path:
    match = _HUB_NAME.match(name)
    if match is None:
        example = "'timm/tf_mixnet_s.in1k'"
        raise ValueError(f"weights must be a file or a hub name such as {example}, got {name!r}")
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        message = "hub names need huggingface_hub: pip install 'mixconv[hub]'"
        raise ImportError(message) from None
    try:
        return Path(hf_hub_download(match["repository"], "model.safetensors"))
    except Exception as error:  # offline, unknown name, no permission
        message = f"cannot get {match['repository']!r} from the hub or its cache here: {error}"
        raise ValueError(message) from error


# %% tags=["plumbing"]
#| export weights.py
def _unwrap(data: Any, where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, out of the wrappings that training scripts put around."""
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise ValueError(f"{where} holds no state dict of tensors")
    prefix = re.compile(r"^(module\.|_orig_mod\.)+")  # of data-parallel and compiled models
    return {prefix.sub("", str(key)): value for key, value in data.items()}


# %% [markdown]
# timm's two families want different networks. Its `tf_mixnet_*` are the official weights: TensorFlow padding, epsilon 1e-3. Its `mixnet_*` were trained in PyTorch: symmetric padding, epsilon 1e-5. For weights under timm's names, the file or hub name tells which.

# %%
#| export weights.py
from mixconv.mixnet import MixNetOptions


def matching_options(weights: Any, state: Mapping[str, Tensor]) -> MixNetOptions:
    """The MixNet options that timm weights of this name were trained with; empty if unknown.

    `tf_mixnet_*` (the official weights) want TensorFlow's padding and epsilon 1e-3, plain
    `mixnet_*` symmetric padding and 1e-5. Weights under our own names want the defaults.

    Args:
        weights: what the caller gave: a path, a hub name, or a state dict.
        state: the tensors in it.
    """
    if not isinstance(weights, str | os.PathLike) or "conv_stem.weight" not in state:
        return {}
    name = Path(weights).name
    if name.startswith("tf_mixnet"):
        return {"padding": "same", "norm_eps": 1e-3, "norm_momentum": 0.01}
    if name.startswith("mixnet"):
        return {"padding": "symmetric", "norm_eps": 1e-5, "norm_momentum": 0.1}
    return {}


# %%
#| export weights.py
import warnings


def load_weights(model: MixNet, weights: Any) -> None:
    """Load weights into a MixNet; everything is checked before anything changes.

    A classifier of another size is left out, with a warning.

    Args:
        model: a MixNet of the configuration that the weights belong to. Padding and epsilon are
            the model's own; `mixnet_s(weights=...)` picks them by the weights' name.
        weights: a path to `.safetensors` or `.pth`, a hub name, or a state dict, under our names
            or timm's.

    Raises:
        ValueError: listing what is missing, unexpected, or of another shape.
        FileNotFoundError: if there is no such file.
        ImportError: naming the extra that is needed.
    """
    given = read_state_dict(weights)
    own = model.state_dict()
    names = _timm_names(model) if "conv_stem.weight" in given else {key: [key] for key in own}
    expected = _cut(own, names)
    for name in _other_classifier(given, model.num_classes):
        given.pop(name, None)
        expected.pop(name, None)
    _check_fit(given, expected)
    with torch.no_grad():
        for name in given:
            expected[name].copy_(given[name])


# %%
#| export weights.py
def _other_classifier(given: Mapping[str, Tensor], num_classes: int) -> tuple[str, ...]:
    """The classifier's names, if the weights have one for another number of classes."""
    weight = given.get("classifier.weight")
    if weight is None or weight.shape[0] == num_classes:
        return ()
    if num_classes:
        warnings.warn(
            f"the weights are for {weight.shape[0]} classes, the model has {num_classes}: "
            "its classifier keeps its own weights",
            stacklevel=3,
        )
    return ("classifier.weight", "classifier.bias")


# %%
#| export weights.py
def _check_fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError with what is missing, unexpected, or of another shape."""
    shapes = {n: (tuple(given[n].shape), tuple(expected[n].shape)) for n in expected if n in given}
    problems = {
        "missing": [n for n in expected if n not in given and not n.endswith("_batches_tracked")],
        "unexpected": [n for n in given if n not in expected],
        "of another shape": [f"{n} {a} for {b}" for n, (a, b) in shapes.items() if a != b],
    }
    parts = [
        f"{kind}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if names[4:] else "")
        for kind, names in problems.items()
        if names
    ]
    if parts:
        raise ValueError(f"these weights do not fit; {'; '.join(parts)}")


# %% [markdown]
# Out to timm's names and in again, into a network that started with other weights:

# %%
from mixconv.teaching import check

again = mixnet_s().eval()
load_weights(again, to_timm(model))
with torch.no_grad():
    check(again(image), logits, "logits after a round trip through timm's names")

# %% [markdown]
# What a mismatch says:

# %%
try:
    load_weights(mixnet_m(), to_timm(model))
except ValueError as error:
    print(str(error)[:260], "…")

# %% [markdown]
# ## Ours, official, timm
#
# All three side by side. The parameters of each row are counted below and, for timm, in `tests/peers/test_timm.py`, which also holds that timm's own models, given our weights, return our logits and gradients within 1e-5, and the other way round.
#
# | | ours | official code | timm `tf_mixnet_*` | timm `mixnet_*` |
# |---|---|---|---|---|
# | padding | 'SAME', or symmetric | 'SAME' | 'SAME' | symmetric |
# | batch-norm epsilon | 1e-3, or any | 1e-3 | 1e-3 | 1e-5 |
# | agrees with ours | – | logits and endpoints, 1e-5 (above) | logits and gradients, 1e-5 (tested) | the same, with symmetric padding and 1e-5 |
# | two 1×1 groups | one grouped convolution | two convolutions, concatenated | two convolutions, concatenated | the same |
# | unequal partitions | yes | no | no | no |

# %%
official_count = {
    name: sum(int(np.prod(shape)) for role, shape, _ in part["variables"] if "moving" not in role)
    for name, part in specification.items()
}
ours = {"mixnet-s": parameters(networks["S"]), "mixnet-m": parameters(networks["M"])}
assert official_count == ours
table(
    ["network", "parameters, ours", "official"],
    [[name, ours[name], count] for name, count in official_count.items()],
)

# %% [markdown]
# ## Exercises
#
# **6.1** Write the block string of one block with kernels 3, 5, 7, 9, ungrouped, stride 2, expansion 4, from 64 to 96 channels, squeeze ratio 0.25, swish.

# %%
from mixconv.teaching import attempt


def my_block() -> str:
    raise NotImplementedError


def test_block(answer) -> None:
    assert decode_block(answer()) == BlockConfig(
        64, 96, (3, 5, 7, 9), stride=2, expand_ratio=4, squeeze_ratio=0.25, activation="swish"
    )


attempt(my_block, test_block)


# %% tags=["solution"]
def my_block_solution() -> str:
    return "r1_k3.5.7.9_a1_p1_s22_e4_i64_o96_se0.25_sw"


attempt(my_block_solution, test_block)


# %% [markdown]
# **6.2** Make MixNet-S without mixing: every block keeps only its smallest kernel. Return that network. (The test computes how many parameters the larger kernels cost.)

# %%
def without_mixing() -> MixNet:
    raise NotImplementedError


def test_plain(answer) -> None:
    plain = answer()
    large = [c.parameters - 9 * c.output_shape[1] for c in costs if c.kind == "depthwise"]
    assert parameters(plain) == 4_134_606 - sum(large)
    assert all(run.kernel_sizes == (3,) for run in unroll(plain.config))


attempt(without_mixing, test_plain)


# %% tags=["solution"]
def without_mixing_solution() -> MixNet:
    runs = [decode_block(text) for text in MIXNET_S.blocks]
    plain = tuple(replace(run, kernel_sizes=run.kernel_sizes[:1]) for run in runs)
    return MixNet(replace(MIXNET_S, blocks=plain))


attempt(without_mixing_solution, test_plain)

# %% [markdown]
# ## Takeaways
# - A MixNet is a list of strings, a stem and a head.
# - Default construction is the official network; every endpoint agrees with the official code within 1e-5.
# - The paper's figure leaves things out. The code is what the published numbers came from.
# - Weights go in from TensorFlow and timm, and out to timm.
#
# Previous: [5 · MobileNets](05_mobilenets.ipynb) · Next: [8 · Fast: MixConv as one operation](08_fast.ipynb)
