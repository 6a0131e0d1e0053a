# Generated from notebooks/07_mixnet.ipynb by `make book`. Edit the notebook, not this file.

"""MixNet from the official block strings (paper, section 4; chapter 7)."""

import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from mixconv._checks import check_multiplier, check_positive
from mixconv.blocks import ConvNormActivation, MixConvBlock, stop_at
from mixconv.layer import Conv2dSame, make_conv2d, make_pointwise
from mixconv.network import ConvNet, drop_path_rates, initialize, refuse_timm_names, round_channels

__all__ = [
    "MIXNET_L",
    "MIXNET_M",
    "MIXNET_S",
    "MIXNET_XL",
    "BlockConfig",
    "MixNet",
    "MixNetConfig",
    "decode_block",
    "encode_block",
    "preprocess",
    "unroll",
]


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

MIXNET_L = replace(MIXNET_M, width_multiplier=1.3)

_FOURS = tuple(str(block).replace("r3_", "r4_") for block in MIXNET_M.blocks)

MIXNET_XL = replace(MIXNET_M, blocks=_FOURS, width_multiplier=1.6)


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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata") and isinstance(self.stem, ConvNormActivation):
            destination._metadata[prefix[:-1]]["settings"] = self.settings()

    def settings(self) -> dict[str, Any]:
        """Padding, and epsilon and momentum of the normalisation: what weights cannot say."""
        conv, norm = self.stem.conv, cast("nn.BatchNorm2d", self.stem.norm)
        padding = "same" if isinstance(conv, Conv2dSame) else "symmetric"
        return {"padding": padding, "norm_eps": norm.eps, "norm_momentum": norm.momentum}


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
