# Generated from notebooks/16_model_pieces.ipynb by `make book`. Edit the notebook, not this file.

"""What goes in the place of a layer or block (chapter 16)."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mixconv.fast.describe import NORMS, Unit, is_one_of, read_block, read_unit
from mixconv.fast.folding import FoldedNorm, merge_pointwise
from mixconv.fast.forms import Call, Forms
from mixconv.fast.fused_block import BlockSpec, FusedBlock, PointwiseSpec, pack_pointwise
from mixconv.fast.fused_layer import FusedMixConv2d, describe_mix
from mixconv.fast.operation import FORMS
from mixconv.fast.spec import ACTIVATIONS, pack_weights
from mixconv.layer import Conv2dSame, make_conv2d, merge_depthwise
from mixconv.surgery import find_padding, has_hooks

__all__ = ["FusedConv", "fuse_block", "fuse_chain", "why_no_form"]


_ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "sigmoid": nn.Sigmoid}

_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.ReLU: torch.relu_,
    nn.ReLU6: functools.partial(F.relu6, inplace=True),
    nn.SiLU: functools.partial(F.silu, inplace=True),
    nn.Sigmoid: torch.sigmoid_,
}


class FusedConv(nn.Sequential):
    """A layer, its norm folded in, and the activation behind it; in place if nobody looks."""

    def forward(self, input: Tensor) -> Tensor:  # nn.Sequential's name for it
        """Convolve, then activate."""
        layer, activation = self
        watched = _has_any_global_hook() or has_hooks(layer) or has_hooks(activation)
        activate = activation if watched else _IN_PLACE.get(type(activation), activation)
        y: Tensor = activate(layer(input))
        return y

    def __prepare_scriptable__(self) -> nn.Sequential:
        return nn.Sequential(*self)  # what torch.jit.script can read


def why_no_form(forms: Forms, spec: Any, channels: int, like: Tensor) -> str:
    """Why no form would compute an operation; empty if one does. May need the compiler."""
    size, threads = (1, channels, 28, 28), torch.get_num_threads()
    reasons = forms.reasons(Call(spec, size, like.dtype, like.device.type, True, threads))
    if not reasons:
        return f"there is no kernel for {like.device.type}"
    named = [f"{name}: {', '.join(why)}" for name, why in reasons.items()]
    return "; ".join(named) if all(reasons.values()) else ""


def _as_ours(conv: nn.Conv2d) -> nn.Conv2d:
    """A peer's `Conv2dSame` as our own."""
    if type(conv) in (nn.Conv2d, Conv2dSame):
        return conv
    stride, dilation = cast("Any", conv.stride), cast("Any", conv.dilation)
    ours = make_conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size[0], stride, dilation=dilation,
        groups=conv.groups, padding=find_padding(conv), device="meta",
    )  # fmt: skip
    ours.weight, ours.bias = conv.weight, conv.bias
    return ours


def _merge(convs: list[nn.Conv2d]) -> nn.Conv2d | None:
    """Convolutions side by side as one, or None where one cannot do, or would be slower."""
    if any(conv.dilation != (1, 1) for conv in convs):
        return None  # a kernel with holes: mostly multiplications by zero
    try:
        return merge_depthwise([_as_ours(conv) for conv in convs]).requires_grad_(False)
    except ValueError:
        return merge_pointwise(convs)


_SMALLEST_PLAIN_KERNEL = 5  # plain 3×3 layers: neither kernel is faster everywhere


def _fuse_unit(unit: Unit, backend: str) -> nn.Module:
    """The fast form of a layer with its norm and activation."""
    convs, mixed = unit.convs, unit.convs != [unit.layer]
    spec = describe_mix(convs, unit.activation) if unit.activation in ACTIVATIONS else None
    if spec is not None and backend != "merged":
        worth = mixed or max(spec.kernel_sizes) >= _SMALLEST_PLAIN_KERNEL
        like, count = convs[0].weight, sum(spec.channels)
        if worth and backend == "auto":  # only where a kernel would run
            worth = not why_no_form(FORMS, spec, count, like)
        if worth:
            return FusedMixConv2d(convs, spec).eval()
    layer = (_merge(convs) if mixed else None) or unit.layer
    if unit.activation == "none":
        return layer
    return FusedConv(layer, _ACTIVATIONS[unit.activation]()).eval()


def fuse_chain(chain: list[nn.Module], backend: str) -> list[nn.Module]:
    """What goes in the places of a layer and of the norm and the activation behind it.

    Raises:
        ValueError: saying what cannot be kept.
    """
    unit = read_unit(chain)
    fused: list[nn.Module] = [_fuse_unit(unit, backend)]
    for step in chain[1:]:
        rest = cast("list[nn.Module]", unit.rest)  # a norm's own activation, if not known
        folded = nn.Sequential(*rest) if rest else FoldedNorm()
        fused.append((folded if is_one_of(step, NORMS) else nn.Identity()).eval())
    return fused


def _read_pointwise(unit: Unit | None) -> tuple[nn.Conv2d, PointwiseSpec] | None:
    if unit is None:
        return None
    conv = unit.convs[0] if len(unit.convs) == 1 else merge_pointwise(unit.convs)
    if conv is None or conv.kernel_size != (1, 1) or conv.stride != (1, 1):
        raise ValueError("it expands, gates or projects by something else than a 1×1 convolution")
    if conv.padding not in (0, (0, 0), "same", "valid"):
        raise ValueError(f"a 1×1 convolution has padding {conv.padding}")
    return conv, PointwiseSpec(conv.in_channels, conv.out_channels, conv.groups, unit.activation)


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def fuse_block(block: nn.Module) -> FusedBlock:
    """A block that `describe_block` knows, as one operation.

    Raises:
        ValueError: saying what about the block is not known or cannot be kept.
    """
    (first, middle, *others), residual = read_block(block)
    if middle is None or (mix := describe_mix(middle.convs, middle.activation)) is None:
        raise ValueError("its depthwise layer is not one that the operation can express")
    points = [_read_pointwise(unit) for unit in (first, *others)]
    expand, squeeze, excite, project = (point and point[1] for point in points)
    if project is None:
        raise ValueError("it does not project")
    spec = BlockSpec(mix, expand, squeeze, excite, project, residual)
    none = middle.convs[0].weight.new_zeros(0)
    weights = [pack_pointwise(p[0].weight, p[1].groups) if p else none for p in points]
    weights.insert(1, pack_weights([conv.weight for conv in middle.convs]))
    biases = [_bias(point[0]) if point else none for point in points]
    biases.insert(1, torch.cat([_bias(conv) for conv in middle.convs]))
    return FusedBlock(spec, weights, biases).eval()
