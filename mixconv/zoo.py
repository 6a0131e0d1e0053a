# Generated from notebooks/08_weights.ipynb by `make book`. Edit the notebook, not this file.

"""`mixnet_s`, `mixnet_m`, `mixnet_l`: the networks by name, with weights (chapter 8)."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from mixconv.checkpoint import read_state_dict
from mixconv.mixnet import MIXNET_L, MIXNET_M, MIXNET_S, MixNet, MixNetConfig
from mixconv.network import refuse_in_chans
from mixconv.weights import load_weights

__all__ = [
    "OFFICIAL",
    "PYTORCH",
    "Builder",
    "Convention",
    "convention_of",
    "mixnet_l",
    "mixnet_m",
    "mixnet_s",
]


class Convention(NamedTuple):
    """What weights were trained with and cannot say themselves; arguments of `MixNet`."""

    padding: str
    norm_eps: float
    norm_momentum: float


OFFICIAL = Convention("same", 1e-3, 0.01)

PYTORCH = Convention("symmetric", 1e-5, 0.1)


def convention_of(weights: Any, state: Mapping[str, Tensor]) -> Convention | None:
    """The convention that weights were trained with, by their name; None if nothing tells.

    Args:
        weights: what the caller gave: a path, a hub name, or a state dict.
        state: the tensors in it; under our own names, the official convention is meant.

    Source: `tf_mixnet_s`, `mixnet_s` in timm's `efficientnet.py`. Chapter 8.
    """
    if "conv_stem.weight" not in state:
        return OFFICIAL
    name = Path(weights).name if isinstance(weights, str | os.PathLike) else ""
    named = {"tf_mixnet": OFFICIAL, "mixnet": PYTORCH}
    return next((named[start] for start in named if name.startswith(start)), None)


def _build(config: MixNetConfig, weights: Any, **options: Any) -> MixNet:
    """A MixNet, with weights if there are any; their convention fills in what is None."""
    state = None if weights is None else read_state_dict(weights)
    usual = OFFICIAL if state is None else convention_of(weights, state)
    if usual is None and None in (options["padding"], options["norm_eps"]):
        warnings.warn(
            "timm weights without timm's file name are taken for tf_mixnet_*; for mixnet_* "
            "say padding='symmetric', norm_eps=1e-5 (or padding='same', norm_eps=1e-3)",
            stacklevel=4,
        )
    for name, value in (usual or OFFICIAL)._asdict().items():
        if options[name] is None:
            options[name] = value
    model = MixNet(config, **options)
    if state is not None:
        load_weights(model, state)
    return model


@refuse_in_chans
def mixnet_s(
    weights: Any = None, *, num_classes: int = 1000, in_channels: int = 3,
    width_multiplier: float = 1.0, drop_rate: float | None = None, drop_path_rate: float = 0.0,
    padding: str | None = None, norm_eps: float | None = None, norm_momentum: float | None = None,
) -> MixNet:  # fmt: skip
    """MixNet-S, 4.1 million parameters.

    Args:
        weights: None for untrained; or a path to `.safetensors` or `.pth`, a state dict, or a
            hub name such as `"timm/tf_mixnet_s.in1k"`. See `load_weights`.
        num_classes: outputs; 0 for features.
        in_channels: channels of the images.
        width_multiplier: scales channels.
        drop_rate: dropout before the classifier; None for the network's own.
        drop_path_rate: stochastic depth; block i of n gets `drop_path_rate * i / n`, i from 0.
        padding: "same" or "symmetric"; None for what the weights' name wants, else "same".
        norm_eps: batch-norm epsilon; None for what the weights' name wants, else 1e-3.
        norm_momentum: share of a new batch in the running statistics; None for what the
            weights' name wants, else 0.01.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`.

    Raises:
        TypeError: for weights of no known kind, or timm's `in_chans`, naming `in_channels`.
        ValueError: naming the argument, or what does not fit in the weights.
        FileNotFoundError: if there is no such weights file.
        ImportError: naming the extra that reading the weights needs.

    Source: paper, section 4.2; `mixnet_s` in the official `mixnet_builder.py`. Chapter 8.
    """
    return _build(
        MIXNET_S, weights, num_classes=num_classes, in_channels=in_channels,
        width_multiplier=width_multiplier, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
        padding=padding, norm_eps=norm_eps, norm_momentum=norm_momentum,
    )  # fmt: skip


Builder = TypeVar("Builder", bound=Callable[..., MixNet])


def _documented_like(model: Builder) -> Callable[[Builder], Builder]:
    """Decorator: put what follows the first line of `model`'s docstring after the function's."""

    def decorate(function: Builder) -> Builder:
        function.__doc__ = f"{function.__doc__}\n{str(model.__doc__).partition(chr(10))[2]}"
        return function

    return decorate


@refuse_in_chans
@_documented_like(mixnet_s)
def mixnet_m(
    weights: Any = None, *, num_classes: int = 1000, in_channels: int = 3,
    width_multiplier: float = 1.0, drop_rate: float | None = None, drop_path_rate: float = 0.0,
    padding: str | None = None, norm_eps: float | None = None, norm_momentum: float | None = None,
) -> MixNet:  # fmt: skip
    """MixNet-M, 5.0 million parameters. Arguments are those of `mixnet_s`."""
    return _build(
        MIXNET_M, weights, num_classes=num_classes, in_channels=in_channels,
        width_multiplier=width_multiplier, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
        padding=padding, norm_eps=norm_eps, norm_momentum=norm_momentum,
    )  # fmt: skip


@refuse_in_chans
@_documented_like(mixnet_s)
def mixnet_l(
    weights: Any = None, *, num_classes: int = 1000, in_channels: int = 3,
    width_multiplier: float = 1.0, drop_rate: float | None = None, drop_path_rate: float = 0.0,
    padding: str | None = None, norm_eps: float | None = None, norm_momentum: float | None = None,
) -> MixNet:  # fmt: skip
    """MixNet-L, 7.3 million parameters: M, 1.3 times as wide. Arguments are those of `mixnet_s`."""
    return _build(
        MIXNET_L, weights, num_classes=num_classes, in_channels=in_channels,
        width_multiplier=width_multiplier, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
        padding=padding, norm_eps=norm_eps, norm_momentum=norm_momentum,
    )  # fmt: skip
