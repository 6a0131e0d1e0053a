# Generated from notebooks/05_mobilenets.ipynb by `make book`. Edit the notebook, not this file.

"""What MobileNets and MixNets share: `ConvNet`, first weights, channel rounding (chapter 5)."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixconv._checks import check_multiplier, check_rate, refuse_script

__all__ = [
    "ConvNet",
    "describe_features",
    "drop_path_rates",
    "initialize",
    "refuse_timm_names",
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
        TypeError: for a number of classes that is not an integer.
        ValueError: for a negative number of classes or a rate outside 0 to 1.

    Source: ours; method names as in timm, but for `features`. Chapter 5.
    """

    __prepare_scriptable__ = refuse_script

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
        self.grad_checkpointing = False
        self.feature_info = describe_features(stem, blocks)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Everything before the mean over pixels: `(N, num_features, H / 32, W / 32)`."""
        x = self.stem(x)
        for block in self.blocks:
            x = self._run_block(block, x)
        y: Tensor = self.head(x)
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From the output of `forward_features` to classes, or with `pre_logits` to features."""
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        logits: Tensor = x if pre_logits else self.classifier(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Images to class scores."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The classifier; `nn.Identity` if there is none."""
        return self.classifier

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
            x = self._run_block(block, x)
            if f"blocks.{index}" in wanted:
                outputs.append(x)
        return outputs

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep each block's input only, and compute the rest again when it is due."""
        self.grad_checkpointing = enable

    def _run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, x, use_reentrant=False)
            return again
        y: Tensor = block(x)
        return y

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, *,
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """The output of `forward_features`, and maps of `features`.

        Args:
            x: images.
            indices: which entries of `feature_info`; a number for the last so many; None for all.
            intermediates_only: leave the output out.
        """
        maps = self.features(x)
        if isinstance(indices, int):
            chosen = maps[len(maps) - indices :]
        else:
            chosen = maps if indices is None else [maps[index] for index in indices]
        return chosen if intermediates_only else (self.head(maps[-1]), chosen)


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
    """Draw the weights of convolutions and linear layers as the official code does.

    Convolutions: normal, mean 0, variance `2 / (k · k · out_channels / groups)`. Linear layers:
    uniform within `1 / sqrt(out_features)` of 0. Their biases: 0. Other layers, normalisations
    among them, are left as they are.

    Source: `conv_kernel_initializer`, `dense_kernel_initializer` in `mixnet_model.py`. Chapter 5.
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

    Source: `round_filters` in the official `mixnet_model.py`. Chapter 5.
    """
    check_multiplier("multiplier", multiplier)
    if multiplier == 1:
        return channels
    exact = channels * multiplier
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * exact else rounded


def drop_path_rates(drop_path_rate: float, blocks: int) -> list[float]:
    """The rate of stochastic depth for each of a row of blocks: `drop_path_rate * i / blocks`.

    Args:
        drop_path_rate: what the rates grow towards; the first block has 0.
        blocks: how many.

    Raises:
        ValueError: if the rate is not at least 0 and less than 1.
    """
    check_rate("drop_path_rate", drop_path_rate)
    return [drop_path_rate * index / blocks for index in range(blocks)]


_P = ParamSpec("_P")

_T = TypeVar("_T")

_TIMMS = {
    "in_chans": "is called in_channels here: write in_channels={value!r}",
    "pretrained": "is not known here: a MixNet takes weights='timm/tf_mixnet_s.in1k', or a path",
    "features_only": "is not known here: model.features(x) gives the maps of every stride",
    "drop_block_rate": "is not known here: there is drop_path_rate",
    "global_pool": "is not known here: model.forward_features(x) gives the maps before the pool",
}


def refuse_timm_names(build: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a maker of networks: an argument of timm's is an error that names ours."""

    @wraps(build)
    def checked(*args: _P.args, **options: _P.kwargs) -> _T:
        for name in _TIMMS.keys() & options.keys():
            raise TypeError(f"{name} {_TIMMS[name].format(value=options[name])}")
        return build(*args, **options)

    return checked
