# Generated from notebooks/05_mobilenets.ipynb by `make book`. Edit the notebook, not this file.

"""MobileNetV1 and V2 with any kernel mix, and MixConv for any model (paper, 4; chapter 5)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv.blocks import ConvNormActivation, DepthwiseSeparableBlock, MixConvBlock, check_rate
from mixconv.layer import MixConv2d, embed_kernel, make_conv2d
from mixconv.partition import check_kernel_sizes

__all__ = [
    "ConvNet",
    "Replacement",
    "ReplacementReport",
    "describe_features",
    "initialize",
    "mobilenet_v1",
    "mobilenet_v2",
    "replace_depthwise",
    "round_channels",
]


class ConvNet(nn.Module):
    """A stem, a row of blocks, a head and a classifier: MobileNets and MixNets alike.

    Args:
        stem: the first convolution, of stride 2.
        blocks: modules with `stride` and `out_channels`.
        head: what follows the blocks and keeps the pixels apart.
        num_features: channels after the head.
        num_classes: outputs of the classifier; 0 leaves it out.
        drop_rate: dropout before the classifier.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`, or `(N, num_features)`
        without classes.

    Raises:
        ValueError: for a negative number of classes or a rate outside 0 to 1.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        num_features: int,
        *,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_rate("drop_rate", drop_rate)
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.head = head
        self.num_features, self.drop_rate = num_features, drop_rate
        self.feature_info = describe_features(stem, blocks)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Everything before the mean over pixels: `(N, num_features, H / 32, W / 32)`."""
        y: Tensor = self.head(self.blocks(self.stem(x)))
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From the output of `forward_features` to classes, or with `pre_logits` to features."""
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        logits: Tensor = x if pre_logits else self.classifier(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Images to class scores."""
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Put in a new, untrained classifier; 0 classes leaves features."""
        if isinstance(num_classes, bool) or not isinstance(num_classes, int):
            raise TypeError(f"num_classes must be an integer, got {num_classes!r}")
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        self.num_classes = num_classes
        self.classifier: nn.Module = nn.Identity()
        if num_classes:
            like, size = next(self.stem.parameters()), (self.num_features, num_classes)
            self.classifier = nn.Linear(*size, device=like.device, dtype=like.dtype)
            initialize(self.classifier)

    def features(self, x: Tensor) -> list[Tensor]:
        """The last output at each stride, largest first; `feature_info` describes them."""
        wanted = {str(info["module"]) for info in self.feature_info}
        x = self.stem(x)
        outputs = [x] if "stem" in wanted else []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if f"blocks.{index}" in wanted:
                outputs.append(x)
        return outputs


def describe_features(stem: nn.Module, blocks: Sequence[nn.Module]) -> list[dict[str, int | str]]:
    """Where each stride ends: channels (`num_chs`), stride (`reduction`) and `module` name.

    The entries follow timm's `feature_info`.
    """
    reduction, module = 2, "stem"
    channels = int(next(stem.parameters()).shape[0])
    info: list[dict[str, int | str]] = []
    for index, block in enumerate(blocks):
        if block.stride != 1:
            info.append({"num_chs": channels, "reduction": reduction, "module": module})
            reduction *= cast("int", block.stride)
        channels, module = cast("int", block.out_channels), f"blocks.{index}"
    return [*info, {"num_chs": channels, "reduction": reduction, "module": module}]


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Draw all weights as the official code does.

    Convolutions: normal, mean 0, variance `2 / (k · k · out_channels / groups)`. Linear layers:
    uniform within `1 / sqrt(out_features)` of 0. Biases 0. Normalisations: scale 1, shift 0.

    Source: `conv_kernel_initializer`, `dense_kernel_initializer` in `mixnet_model.py`.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.weight[0, 0].numel() * layer.out_channels // layer.groups
            layer.weight.normal_(0, (2 / fan_out) ** 0.5)
        elif isinstance(layer, nn.Linear):
            reach = layer.out_features**-0.5
            layer.weight.uniform_(-reach, reach)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            layer.bias.zero_()


def round_channels(channels: int, multiplier: float = 1.0, divisor: int = 8) -> int:
    """Scale a number of channels and round it to a multiple, losing at most a tenth.

    Args:
        channels: before scaling.
        multiplier: positive; 1 returns `channels` as they are.
        divisor: the multiple.

    Raises:
        ValueError: if the multiplier is not positive and finite.

    Source: `round_filters` in the official `mixnet_model.py`.
    """
    if not 0 < multiplier < float("inf"):
        raise ValueError(f"width_multiplier must be positive and finite, got {multiplier}")
    if multiplier == 1:
        return channels
    exact = channels * multiplier
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * exact else rounded


_V1_BLOCKS = [
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
]  # fmt: skip


def mobilenet_v1(
    kernel_sizes: int | Sequence[int] = (3,),
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_multiplier: float = 1.0,
    partition: str = "equal",
    dilated: bool = False,
    padding: str = "symmetric",
    drop_rate: float = 0.0,
) -> ConvNet:
    """MobileNetV1 with MixConv in place of every depthwise layer.

    Args:
        kernel_sizes: `(3,)` is the plain network; `(3, 5, 7)` is the paper's "MixConv 357".
        num_classes: outputs; 0 for features.
        in_channels: channels of the images.
        width_multiplier: scales every channel count.
        partition: "equal", "exponential" or "logarithmic".
        dilated: see `MixConv2d`.
        padding: "symmetric" or "same".
        drop_rate: dropout before the classifier.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`.

    Raises:
        ValueError: naming the argument.

    Source: Howard et al., 2017, Table 1; paper, section 4.1. Chapter 5.
    """
    block = partial(
        DepthwiseSeparableBlock,
        kernel_sizes=kernel_sizes, partition=partition, dilated=dilated, padding=padding,
    )  # fmt: skip
    channels = round_channels(32, width_multiplier)
    stem = ConvNormActivation(make_conv2d(in_channels, channels, 3, 2, padding=padding))
    blocks: list[nn.Module] = []
    for out_channels, stride in _V1_BLOCKS:
        wider = round_channels(out_channels, width_multiplier)
        blocks.append(block(channels, wider, stride=stride))
        channels = wider
    model = ConvNet(
        stem, blocks, nn.Identity(), channels, num_classes=num_classes, drop_rate=drop_rate
    )
    initialize(model)
    return model


_V2_BLOCKS = [
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
    (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
]  # fmt: skip


def _v2_arguments(width_multiplier: float) -> list[dict[str, Any]]:
    """What each of the 17 blocks is made with."""
    blocks, channels = [], round_channels(32, width_multiplier)
    for expand_ratio, out_channels, repeats, first_stride in _V2_BLOCKS:
        wider = round_channels(out_channels, width_multiplier)
        for stride in [first_stride] + [1] * (repeats - 1):
            blocks.append({"in_channels": channels, "out_channels": wider, "stride": stride,
                           "expand_ratio": expand_ratio})  # fmt: skip
            channels = wider
    return blocks


def mobilenet_v2(
    kernel_sizes: int | Sequence[int] = (3,),
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_multiplier: float = 1.0,
    partition: str = "equal",
    dilated: bool = False,
    padding: str = "symmetric",
    drop_rate: float = 0.2,
    drop_path_rate: float = 0.0,
) -> ConvNet:
    """MobileNetV2 with MixConv in place of every depthwise layer.

    Args:
        kernel_sizes: `(3,)` is the plain network; `(3, 5, 7)` is the paper's "MixConv 357".
        num_classes: outputs; 0 for features.
        in_channels: channels of the images.
        width_multiplier: scales every channel count; the head never gets narrower than 1280.
        partition: "equal", "exponential" or "logarithmic".
        dilated: see `MixConv2d`.
        padding: "symmetric" or "same".
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth; block i of n gets `drop_path_rate * i / n`, i from 0.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`.

    Raises:
        ValueError: naming the argument.

    Source: Sandler et al., 2018, Table 2; paper, section 4.1. Chapter 5.
    """
    block = partial(
        MixConvBlock, kernel_sizes=kernel_sizes, activation="relu6",
        partition=partition, dilated=dilated, padding=padding,
    )  # fmt: skip
    check_rate("drop_path_rate", drop_path_rate)
    rows = _v2_arguments(width_multiplier)
    first, last = rows[0]["in_channels"], rows[-1]["out_channels"]
    stem_conv = make_conv2d(in_channels, first, 3, 2, padding=padding)
    stem = ConvNormActivation(stem_conv, activation="relu6")
    rates = [drop_path_rate * index / len(rows) for index in range(len(rows))]
    blocks = [block(**row, drop_path_rate=p) for row, p in zip(rows, rates, strict=True)]
    width = round_channels(1280, max(1.0, width_multiplier))
    head = ConvNormActivation(make_conv2d(last, width, 1), activation="relu6")
    model = ConvNet(stem, blocks, head, width, num_classes=num_classes, drop_rate=drop_rate)
    initialize(model)
    return model


@dataclass(frozen=True)
class Replacement:
    """What happened to one depthwise layer.

    Attributes:
        name: of the layer in the model.
        before: the old layer, as text.
        after: the new layer, as text; empty if it was skipped.
        exact: whether the layer computes what it did before.
        reason: why it was skipped, or why it is not exact.
    """

    name: str
    before: str
    after: str = ""
    exact: bool = False
    reason: str = ""


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_depthwise` did; `str` gives a line for each layer."""

    layers: list[Replacement] = field(default_factory=list)

    @property
    def changed(self) -> list[Replacement]:
        """Layers that are MixConv now."""
        return [layer for layer in self.layers if layer.after]

    @property
    def skipped(self) -> list[Replacement]:
        """Depthwise layers that were left as they were."""
        return [layer for layer in self.layers if not layer.after]

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} replaced, {len(self.skipped)} skipped"]
        for layer in self.layers:
            what = layer.after or f"skipped: {layer.reason}"
            note = "" if layer.exact or not layer.after else f" (not the same: {layer.reason})"
            lines.append(f"{layer.name}: {what}{note}")
        return "\n".join(lines)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _find_padding(conv: nn.Conv2d) -> str:
    """The padding of a depthwise layer in our terms.

    Raises:
        ValueError: saying why it has none.
    """
    if type(conv).__name__.startswith("Conv2dSame"):
        parts = zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)
        if any(d * (k - 1) < s - 1 for k, d, s in parts):
            raise ValueError("'SAME' with a stride wider than the kernel centres windows elsewhere")
        return "same"
    if type(conv) is not nn.Conv2d:
        raise ValueError(f"a {type(conv).__name__}, which may compute something else")
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode {conv.padding_mode!r}")
    sizes = zip(conv.kernel_size, conv.dilation, strict=True)
    wanted = tuple(d * (k // 2) for k, d in sizes)
    if conv.padding not in (wanted, "same"):
        raise ValueError(f"padding {conv.padding}, not {wanted}")
    return "symmetric"


def _convert(conv: nn.Conv2d, make: partial[MixConv2d], padding: str | None) -> MixConv2d:
    """A MixConv layer in place of a depthwise one, with fresh weights.

    Raises:
        ValueError: saying why it cannot be done.
    """
    mixed = make(
        conv.in_channels, stride=cast("tuple[int, int]", conv.stride),
        padding=_find_padding(conv) if padding is None else padding,
        channel_multiplier=conv.out_channels // conv.in_channels, bias=conv.bias is not None,
        dilation=cast("tuple[int, int]", conv.dilation),
        device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    for key, parameter in mixed.named_parameters():
        old = conv.bias if key.endswith("bias") else conv.weight
        parameter.requires_grad_(old is not None and old.requires_grad)
    if conv.weight.stride(1) == 1 and conv.kernel_size != (1, 1):  # channels last
        mixed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return mixed.train(conv.training)


@torch.no_grad()
def _move_weights(conv: nn.Conv2d, mixed: MixConv2d) -> str:
    """Copy the weights of `conv` into `mixed`; returns why that is not exact, or nothing."""
    reason, start, size = "", 0, conv.kernel_size[0]
    for part in cast("list[nn.Conv2d]", list(mixed.convs)):
        stop = start + part.out_channels
        weight, k = conv.weight[start:stop], part.kernel_size[0]
        cut = max(0, (size - k) // 2)
        part.weight.copy_(embed_kernel(weight[:, :, cut : size - cut, cut : size - cut], k))
        if cut:
            reason = f"{size}×{size} kernels cropped to {k}×{k}"
        elif part.dilation != conv.dilation:
            reason = "dilated"
        if part.bias is not None and conv.bias is not None:
            part.bias.copy_(conv.bias[start:stop])
        start = stop
    return reason


def replace_depthwise(
    model: nn.Module,
    kernel_sizes: int | Sequence[int],
    *,
    partition: str = "equal",
    dilated: bool = False,
    padding: str | None = None,
    keep_center_weights: bool = True,
) -> ReplacementReport:
    """Swap every depthwise `nn.Conv2d` of a model for a `MixConv2d`, in place.

    Stride, dilation, bias, device, dtype, memory format, training mode and `requires_grad` are
    kept. Where every kernel grows or stays, so is the function that the model computes. Weights
    that two layers share are no longer shared afterwards; a layer used in two places stays one.

    Args:
        model: any module that contains depthwise layers; it is changed.
        kernel_sizes: one odd size for each group.
        partition: "equal", "exponential" or "logarithmic".
        dilated: see `MixConv2d`; changes what the model computes.
        padding: "symmetric" or "same"; detected for each layer if left out.
        keep_center_weights: put the old kernels in the middle of the new ones. Otherwise the new
            layers start with fresh weights.

    Returns:
        What was changed, what was skipped, and why.

    Raises:
        TypeError: if the model is itself a depthwise layer, which cannot be swapped in place.
        ValueError: for kernel sizes, partition or padding that no layer could have.

    Source: paper, section 3 ("drop-in replacement"). Chapter 5.
    """
    sizes = check_kernel_sizes(kernel_sizes)
    make = partial(MixConv2d, kernel_sizes=sizes, partition=partition, dilated=dilated)
    _check_request(model, make, padding)
    report, swapped = ReplacementReport(), dict[nn.Module, MixConv2d | None]()
    inside = {part for m in model.modules() if isinstance(m, MixConv2d) for part in m.convs}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in inside or not (_is_depthwise(layer) or isinstance(layer, MixConv2d)):
            continue
        if layer not in swapped:
            swapped[layer], line = _replace(name, layer, make, padding, keep_center_weights)
            report.layers.append(line)
        if (mixed := swapped[layer]) is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, mixed)
    return report


def _check_request(model: nn.Module, make: partial[MixConv2d], padding: str | None) -> None:
    """Raise for arguments that no layer could satisfy, before anything is changed."""
    if not isinstance(make.keywords["partition"], str):
        raise TypeError("partition must be a method's name, since layers differ in channels")
    make(10_000, padding=padding or "symmetric", device="meta")  # channels enough for any mix
    if _is_depthwise(model):
        raise TypeError("model is itself a depthwise layer; wrap it in nn.Sequential first")


def _other_padding(conv: nn.Conv2d, padding: str) -> bool:
    try:
        return _find_padding(conv) != padding and conv.stride != (1, 1)
    except ValueError:
        return True


def _replace(
    name: str, layer: nn.Module, make: partial[MixConv2d], padding: str | None, keep: bool
) -> tuple[MixConv2d | None, Replacement]:
    """The new layer, or None where there can be none, and the line for the report."""
    try:
        conv = _checked(layer)
        mixed = _convert(conv, make, padding)
    except ValueError as error:
        return None, Replacement(name, str(layer), reason=str(error))
    reason = _move_weights(conv, mixed) if keep else "fresh weights"
    if padding is not None and not reason and _other_padding(conv, padding):
        reason = "another padding"
    return mixed, Replacement(name, str(conv), str(mixed), not reason, reason)


def _checked(layer: nn.Module) -> nn.Conv2d:
    """The layer, if it is one that can be replaced; ValueError says why it is not."""
    if not isinstance(layer, nn.Conv2d):
        raise ValueError("it is a MixConv2d already")
    if layer.kernel_size[0] != layer.kernel_size[1] or layer.kernel_size[0] % 2 == 0:
        raise ValueError(f"kernel {layer.kernel_size} is not square and odd")
    if torch.nn.utils.parametrize.is_parametrized(layer):
        raise ValueError("its weight is parametrized")
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        raise ValueError("it has hooks, which would be lost")
    return layer
