# Generated from notebooks/09_any_model.ipynb by `make book`. Edit the notebook, not this file.

"""MixConv in place of the depthwise layers of any model (chapter 9)."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from mixconv._checks import check_kernel_sizes
from mixconv.layer import Conv2dSame, MixConv2d, embed_kernel

__all__ = ["Replacement", "ReplacementReport", "find_padding", "has_hooks", "replace_depthwise"]


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
        other = sum(not layer.exact for layer in self.changed)
        told = f", {other} of them NOT computing the same" if other else ", all computing the same"
        told = told if self.changed else ""
        lines = [f"{len(self.changed)} replaced{told}; {len(self.skipped)} skipped"]
        for layer in self.layers:
            what = layer.after or f"skipped: {layer.reason}"
            note = "" if layer.exact or not layer.after else f" (not the same: {layer.reason})"
            lines.append(f"{layer.name}: {what}{note}")
        return "\n".join(lines)


_PEERS = {"timm.layers.conv2d_same": "Conv2dSame", "geffnet.conv2d_layers": "Conv2dSame"}


def _pads_as_tensorflow(conv: nn.Conv2d) -> bool:
    """Whether a layer is of a class that is known to pad by TensorFlow's rule."""
    peers = [getattr(sys.modules.get(module), name, None) for module, name in _PEERS.items()]
    return type(conv) in (Conv2dSame, *peers)


def find_padding(conv: nn.Conv2d) -> str:
    """The padding of a convolution with an odd kernel in our terms: "symmetric" or "same".

    Exact types only: a subclass of `nn.Conv2d` may compute something else. TensorFlow's rule is
    known of our `Conv2dSame` and of timm's and geffnet's.

    Raises:
        ValueError: saying why it has none.

    Source: ours. Chapter 9.
    """
    if any(k % 2 == 0 for k in conv.kernel_size):
        raise ValueError(f"kernel {conv.kernel_size} is not odd")
    if _pads_as_tensorflow(conv):
        return "same"
    if type(conv) is not nn.Conv2d:
        raise ValueError(f"a {type(conv).__name__}, which may compute something else")
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode {conv.padding_mode!r}")
    sizes = zip(conv.kernel_size, conv.dilation, strict=True)
    wanted = tuple(d * (k // 2) for k, d in sizes)
    if conv.padding not in (wanted, "same"):  # PyTorch's "same" is symmetric for odd kernels
        raise ValueError(f"padding {conv.padding}, not {wanted}")
    return "symmetric"


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether a module does what its class does not show.

    That is: hooks forward or backward, a `forward` of this one module, a parametrisation.
    """
    hooks = any(getattr(module, name) for name in _HOOKS)
    return hooks or "forward" in vars(module) or parametrize.is_parametrized(module)


def _check_plain(layer: nn.Conv2d, shared: set[torch.Tensor]) -> None:
    """Raise ValueError, saying why, for a layer that a new one could not stand in for."""
    if layer.kernel_size[0] != layer.kernel_size[1] or layer.kernel_size[0] % 2 == 0:
        raise ValueError(f"kernel {layer.kernel_size} is not square and odd")
    if has_hooks(layer):
        raise ValueError("it has hooks or is parametrized, which would be lost")
    if type(layer) is not nn.Conv2d and not _pads_as_tensorflow(layer):
        raise ValueError(f"a {type(layer).__name__}, which may compute something else")
    if any(parameter in shared for parameter in layer.parameters()):
        raise ValueError("it shares its weights with another layer")
    if type(layer.weight) is not nn.Parameter:
        raise ValueError(f"its weight is a {type(layer.weight).__name__}")
    axes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    if _pads_as_tensorflow(layer) and any(d * (k - 1) < s - 1 for k, d, s in axes):
        raise ValueError("'SAME' with a stride wider than the kernel centres windows elsewhere")


def _convert(conv: nn.Conv2d, make: partial[MixConv2d], padding: str | None) -> MixConv2d:
    """A MixConv layer in place of a depthwise one, with fresh weights.

    Raises:
        ValueError: saying why it cannot be done.
    """
    mixed = make(
        conv.in_channels, stride=cast("tuple[int, int]", conv.stride),
        padding=find_padding(conv) if padding is None else padding,
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
    kernel_sizes: int | Sequence[int] | Callable[[str, nn.Conv2d], int | Sequence[int] | None],
    *,
    partition: str = "equal",
    dilated: bool = False,
    padding: str | None = None,
    keep_center_weights: bool = True,
    crop: bool = False,
) -> ReplacementReport:
    """Swap every depthwise `nn.Conv2d` of a model for a `MixConv2d`, in place.

    Stride, dilation, bias, device, dtype, memory format, training mode and `requires_grad` are
    kept, and so is the function that the model computes, unless an argument asks for a change. A
    layer used in two places stays one. What cannot be kept is left alone and reported: layers
    with hooks, parametrisations or weights shared with another layer, subclasses, other
    paddings, and kernels that would lose their border. An optimizer that was built before holds
    the old weights, and would never move the new ones: build it afterwards.

    Args:
        model: any module that contains depthwise layers; it is changed.
        kernel_sizes: one odd size for each group; or a function of a layer's name and the layer
            that returns them, or None to leave the layer alone.
        partition: "equal", "exponential" or "logarithmic".
        dilated: see `MixConv2d`; changes what the model computes.
        padding: "symmetric" or "same"; detected for each layer if left out.
        keep_center_weights: put the old kernels in the middle of the new ones. Otherwise the new
            layers start with fresh weights.
        crop: let a larger kernel lose its border where a group has a smaller size; the model
            then computes something else.

    Returns:
        What was changed, what was skipped, and why.

    Raises:
        TypeError: if the model is itself a depthwise layer, which cannot be swapped in place.
        ValueError: for kernel sizes, partition or padding that no layer could have.

    Source: paper, abstract ("drop-in replacement"). Chapter 9.
    """
    read = partial(_read_request, partition=partition, dilated=dilated, padding=padding)
    found = _find_layers(model)
    makes = _read_all(found, kernel_sizes, read)
    report, swapped = ReplacementReport(), dict[nn.Module, MixConv2d | None]()
    crop, shared = crop or not keep_center_weights, _shared(model)
    for name, layer in found:
        if layer not in swapped:
            swapped[layer], line = _replace(
                name, layer, shared=shared, make=makes[layer], padding=padding,
                keep=keep_center_weights, crop=crop,
            )  # fmt: skip
            report.layers.append(line)
        if (mixed := swapped[layer]) is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, mixed)
    return report


def _find_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Depthwise layers and MixConvs by name; a layer used twice has two names.

    Raises:
        TypeError: if the model is no module, or itself a depthwise layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if _is_depthwise(model):
        raise TypeError("model is itself a depthwise layer; wrap it in nn.Sequential first")
    inside = {part for m in model.modules() if isinstance(m, MixConv2d) for part in m.convs}
    return [
        (name, layer)
        for name, layer in model.named_modules(remove_duplicate=False)
        if layer not in inside and (_is_depthwise(layer) or isinstance(layer, MixConv2d))
    ]


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _shared(model: nn.Module) -> set[torch.Tensor]:
    """Parameters that more than one layer of a model holds."""
    held = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    return {p for p, times in Counter(held).items() if times > 1}


def _read_request(
    kernel_sizes: int | Sequence[int], partition: str, dilated: bool, padding: str | None
) -> partial[MixConv2d]:
    """What makes the new layers; raises for arguments that no layer could satisfy."""
    if not isinstance(partition, str):
        raise TypeError("partition must be a method's name, since layers differ in channels")
    sizes = check_kernel_sizes(kernel_sizes)
    make = partial(MixConv2d, kernel_sizes=sizes, partition=partition, dilated=dilated)
    make(10_000, padding=padding or "symmetric", device="meta")  # channels enough for any mix
    return make


def _read_all(
    found: list[tuple[str, nn.Module]], sizes: Any, read: Callable[..., Any]
) -> dict[nn.Module, Any]:
    """What makes the new layer for each old one; raises before anything is changed."""
    if not callable(sizes):
        return dict.fromkeys((layer for _, layer in found), read(sizes))
    read((3,))  # a wrong partition or padding
    chosen = {layer: sizes(name, layer) for name, layer in reversed(found)}  # by its first name
    return {layer: None if own is None else read(own) for layer, own in chosen.items()}


def _other_padding(conv: nn.Conv2d, padding: str) -> bool:
    try:
        return find_padding(conv) != padding and conv.stride != (1, 1)
    except ValueError:
        return True


def _replace(
    name: str, layer: nn.Module, *, shared: set[torch.Tensor], make: partial[MixConv2d] | None,
    padding: str | None, keep: bool, crop: bool,
) -> tuple[MixConv2d | None, Replacement]:  # fmt: skip
    """The new layer, or None where there can be none, and the line for the report."""
    if not isinstance(layer, nn.Conv2d):
        return None, Replacement(name, str(layer), reason="it is a MixConv2d already")
    if make is None:
        return None, Replacement(name, str(layer), reason="no kernel sizes were given for it")
    try:
        _check_plain(layer, shared)
        smallest, k = min(make.keywords["kernel_sizes"]), layer.kernel_size[0]
        if smallest < k and not crop:
            raise ValueError(f"{k}×{k} kernels would be cropped to {smallest}×{smallest}; see crop")
        mixed = _convert(layer, make, padding)
    except ValueError as error:
        return None, Replacement(name, str(layer), reason=str(error))
    reason = _move_weights(layer, mixed) if keep else "fresh weights"
    if padding is not None and not reason and _other_padding(layer, padding):
        reason = "another padding"
    return mixed, Replacement(name, str(layer), str(mixed), not reason, reason)
