# Generated from notebooks/11_why_slow.ipynb by `make book`. Edit the notebook, not this file.

"""Algebra that makes a network shorter: norms folded, 1×1 convolutions merged (chapter 11)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["FoldedNorm", "fold_line", "merge_pointwise", "norm_as_line", "refuse_training"]


def norm_as_line(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel that a batch norm in evaluation amounts to.

    Raises:
        ValueError: if the norm keeps no running statistics.

    Shape:
        Outputs `(C,)` each, float64.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


@torch.no_grad()
def fold_line(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Put a scale and a shift of each output channel into a convolution, in place."""
    weight, dtype = conv.weight, conv.weight.dtype
    bias = 0 if conv.bias is None else conv.bias.double()
    conv.weight = nn.Parameter((weight.double() * scale.view(-1, 1, 1, 1)).to(dtype), False)
    conv.bias = nn.Parameter((bias * scale + shift).to(dtype), False)


def refuse_training(mode: bool) -> None:
    """Raise if a module that was fused for inference is put in training mode.

    Raises:
        RuntimeError: saying what to do instead.
    """
    if mode:
        raise RuntimeError(
            "this model was fused for inference and cannot be trained: batch norms and weights "
            "are merged. Train the model you gave to fuse_for_inference, and fuse it again. (A "
            "module of yours that holds this copy may be half in training now: call .eval() on it. "
            "create_feature_extractor asks for training: use torch.fx, or hooks, on this copy.)"
        )


class FoldedNorm(nn.Identity):
    """Where a batch norm was that is part of the convolution before it now."""

    def train(self, mode: bool = True) -> "FoldedNorm":
        """Refuse training mode: there is no norm left to train.

        Raises:
            RuntimeError: if `mode` is true.
        """
        refuse_training(mode)
        return super().train(mode)


def merge_pointwise(convs: Sequence[nn.Conv2d]) -> nn.Conv2d | None:
    """Equal 1×1 convolutions side by side as one grouped convolution; None if they are not that."""
    first = convs[0]
    sizes = {(c.in_channels, c.out_channels, c.bias is None) for c in convs}
    plain = all(type(c) is nn.Conv2d and c.padding in (0, (0, 0)) for c in convs)
    single = all(c.kernel_size == c.stride == (1, 1) and c.groups == 1 for c in convs)
    if len(sizes) > 1 or not plain or not single or first.in_channels == 1:  # 1: depthwise
        return None
    n, like = len(convs), first.weight
    merged = nn.Conv2d(
        n * first.in_channels, n * first.out_channels, 1, groups=n, bias=first.bias is not None,
        device=like.device, dtype=like.dtype,
    )  # fmt: skip
    merged.weight = nn.Parameter(torch.cat([c.weight.detach() for c in convs]), False)
    if merged.bias is not None:
        biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
        merged.bias = nn.Parameter(torch.cat(biases), False)
    return merged.train(first.training)
