"""Random mixed layers for tests of the operation and its forms, and a reference apart from it."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from mixconv import mixed_depthwise2d
from mixconv.fast.spec import ACTIVATIONS, MixSpec, pack_weights

Case = tuple[Tensor, list[Tensor], Tensor | None, MixSpec]


def reference(x: Tensor, weights: list[Tensor], bias: Tensor | None, spec: MixSpec) -> Tensor:
    """Written apart from the package: explicit zeros, one F.conv2d a group, in float64."""
    outputs, start = [], 0
    for weight, dilation in zip(weights, spec.dilations, strict=True):
        c, reach = weight.shape[0], (weight.shape[-1] - 1) * dilation + 1
        part, start = x[:, start : start + c].double(), start + c
        sides = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // spec.stride) - 1) * spec.stride + reach - size, 0)
            same = spec.padding == "same"
            sides += [total // 2, total - total // 2] if same else [reach // 2, reach // 2]
        padded = F.pad(part, sides)
        outputs.append(F.conv2d(padded, weight.double(), None, spec.stride, 0, dilation, c))
    y = torch.cat(outputs, 1)
    y = y if bias is None else y + bias.double().view(-1, 1, 1)
    return {
        "none": lambda: y,
        "relu": lambda: y.clamp(min=0),
        "silu": lambda: y * torch.sigmoid(y),
        "relu6": lambda: y.clamp(0, 6),
    }[spec.activation]()


def make_case(rng: random.Random, dtype: torch.dtype = torch.float32) -> Case:
    """Any groups, kernels, strides, dilations, sizes (empty batches, too) and memory orders."""
    count = rng.randint(1, 5)
    kernels = tuple(rng.choice((1, 3, 3, 5, 7, 9, 11, 13)) for _ in range(count))
    channels = tuple(rng.randint(1, 70 // count) for _ in range(count))
    dilations = tuple(rng.choice((1, 1, 1, 2, 3)) if k == 3 else 1 for k in kernels)
    spec = MixSpec(
        channels, kernels, rng.choice((1, 1, 2, 2, 3)), dilations,
        rng.choice(("symmetric", "same")), rng.choice(ACTIVATIONS),
    )  # fmt: skip
    shape = [rng.choice((rng.randint(1, 6), rng.randint(7, 40))) for _ in range(2)]
    x = torch.randn(rng.choice((0, 1, 1, 2, 3)), sum(channels), *shape, dtype=dtype)
    if rng.random() < 0.8:
        x = x.to(memory_format=torch.channels_last)
    pairs = zip(channels, kernels, strict=True)
    weights = [torch.randn(c, 1, k, k, dtype=dtype) / k for c, k in pairs]
    bias = torch.randn(sum(channels), dtype=dtype) if rng.random() < 0.5 else None
    return x, weights, bias, spec


def compute(x: Tensor, weights: list[Tensor], bias: Tensor | None, spec: MixSpec) -> Tensor:
    """A case by the public function."""
    return mixed_depthwise2d(x, pack_weights(weights), bias, **spec._asdict())


def agrees(case: Case, tolerance: float = 2e-5) -> None:
    """Assert that the operation computes a case, in channels_last."""
    y = compute(*case)
    torch.testing.assert_close(
        y.double(), reference(*case), rtol=tolerance, atol=tolerance,
        msg=lambda text: f"{case[3]}\n{text}",
    )  # fmt: skip
    assert y.is_contiguous(memory_format=torch.channels_last)
