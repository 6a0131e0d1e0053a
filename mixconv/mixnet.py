# Generated from notebooks/06_mixnet.ipynb by `make book`. Edit the notebook, not this file.

"""MixNet-S, M and L from the official block strings (paper, section 4; chapter 6)."""

import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypedDict, Unpack

from torch import Tensor, nn

from mixconv._checks import check_multiplier, check_positive, check_rate
from mixconv.blocks import ConvNormActivation, MixConvBlock
from mixconv.layer import make_conv2d
from mixconv.network import ConvNet, initialize, round_channels

__all__ = [
    "MIXNET_L",
    "MIXNET_M",
    "MIXNET_S",
    "BlockConfig",
    "MixNet",
    "MixNetConfig",
    "MixNetOptions",
    "decode_block",
    "encode_block",
    "mixnet_l",
    "mixnet_m",
    "mixnet_s",
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


_WORD = re.compile(r"^(r|k|a|p|s|e|i|o|se)(\d[\d.]*)$")

_FLAGS = {"sw", "noskip", "dilated"}


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
