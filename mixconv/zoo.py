# Generated from notebooks/08_weights.ipynb by `make book`. Edit the notebook, not this file.

"""`mixnet_s`, `mixnet_m`, `mixnet_l`, `mixnet_xl`: networks by name, with weights (chapter 8)."""

import warnings
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, ParamSpec

from torch import Tensor

from mixconv.checkpoint import read_checkpoint
from mixconv.mixnet import MIXNET_L, MIXNET_M, MIXNET_S, MIXNET_XL, MixNet, MixNetConfig
from mixconv.network import refuse_timm_names
from mixconv.weights import OFFICIAL, fill, settings_of

__all__ = ["mixnet_l", "mixnet_m", "mixnet_s", "mixnet_xl"]


def _build(config: MixNetConfig, weights: Any, **options: Any) -> MixNet:
    """A MixNet, with weights if there are any; they fill in what is None."""
    read = None if weights is None else read_checkpoint(weights)
    usual = OFFICIAL if read is None else settings_of(read)
    if usual is None and None in (options["padding"], options["norm_eps"]):
        warnings.warn(_UNTOLD, stacklevel=4)
    found = {} if read is None else _sizes_of(read.tensors)
    for name, value in {**(usual or OFFICIAL), **_USUAL_SIZES, **found}.items():
        if options[name] is None:
            options[name] = value
    model = MixNet(config, **options)
    if read is not None:
        fill(model, read.tensors, calls=4)
    return model


_USUAL_SIZES = {"num_classes": 1000, "in_channels": 3}

_UNTOLD = (
    "nothing tells which settings these weights want; taken: padding='same', norm_eps=1e-3 "
    "(official, timm's tf_mixnet_*). timm's mixnet_* and others trained in PyTorch want "
    "padding='symmetric', norm_eps=1e-5. Say which"
)


def _sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Classes and image channels of weights, where they can be read off."""
    classifier = tensors.get("classifier.weight")
    stem = tensors.get("conv_stem.weight", tensors.get("stem.conv.weight"))
    found = {"num_classes": classifier.shape[0]} if classifier is not None else {}
    return found | ({"in_channels": stem.shape[1]} if stem is not None and stem.ndim == 4 else {})


@refuse_timm_names
def mixnet_s(
    weights: Any = None, *, num_classes: int | None = None, in_channels: int | None = None,
    width_multiplier: float = 1.0, drop_rate: float | None = None, drop_path_rate: float = 0.0,
    padding: str | None = None, norm_eps: float | None = None, norm_momentum: float | None = None,
    output_stride: int = 32,
) -> MixNet:  # fmt: skip
    """MixNet-S, 4.1 million parameters.

    Args:
        weights: None for untrained; or a path to `.safetensors` or `.pth`, a folder, a state
            dict, or a hub name such as `"timm/tf_mixnet_s.in1k"`. See `load_weights`.
        num_classes: outputs; 0 for features; None for as many as the weights have, else 1000.
        in_channels: channels of the images; None for those of the weights, else 3.
        width_multiplier: scales channels.
        drop_rate: dropout before the classifier; None for the network's own.
        drop_path_rate: stochastic depth; block i of n gets `drop_path_rate * i / n`, i from 0.
        padding: "same" or "symmetric"; None for what the weights want, else "same".
        norm_eps: batch-norm epsilon; None for what the weights want, else 1e-3.
        norm_momentum: share of a new batch in the running statistics; None as for the others.
        output_stride: 8 or 16 for larger maps, with spread kernels after them, as in timm.

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
        MIXNET_S, weights, num_classes=num_classes, in_channels=in_channels, padding=padding,
        width_multiplier=width_multiplier, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
        norm_eps=norm_eps, norm_momentum=norm_momentum, output_stride=output_stride,
    )  # fmt: skip


_P = ParamSpec("_P")


def _like(model: Callable[_P, MixNet]) -> Callable[[Callable[..., MixNet]], Callable[_P, MixNet]]:
    """Decorator: the signature of `model`, and what follows the first line of its docstring."""

    def decorate(function: Callable[..., MixNet]) -> Callable[_P, MixNet]:
        function.__doc__ = f"{function.__doc__}\n{str(model.__doc__).partition(chr(10))[2]}"
        function.__signature__ = signature(model)  # type: ignore[attr-defined]
        return function

    return decorate


_UNSAID = {name: given.default for name, given in signature(mixnet_s).parameters.items()}

del _UNSAID["weights"]


@refuse_timm_names
@_like(mixnet_s)
def mixnet_m(weights: Any = None, **options: Any) -> MixNet:
    """MixNet-M, 5.0 million parameters. Arguments are those of `mixnet_s`."""
    return _build(MIXNET_M, weights, **_UNSAID | options)


@refuse_timm_names
@_like(mixnet_s)
def mixnet_l(weights: Any = None, **options: Any) -> MixNet:
    """MixNet-L, 7.3 million parameters: M, 1.3 times as wide. Arguments are those of `mixnet_s`."""
    return _build(MIXNET_L, weights, **_UNSAID | options)


@refuse_timm_names
@_like(mixnet_s)
def mixnet_xl(weights: Any = None, **options: Any) -> MixNet:
    """MixNet-XL, timm's, 11.9 million parameters. Arguments are those of `mixnet_s`."""
    return _build(MIXNET_XL, weights, **_UNSAID | options)
