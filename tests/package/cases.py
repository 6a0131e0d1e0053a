"""Random layers and blocks for the accelerator, and what they compute, written apart from it."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixconv.fast.fused_block import (
    POINT_ACTIVATIONS,
    BlockSpec,
    PointwiseSpec,
    inverted_residual,
    pack_pointwise,
)
from mixconv.fast.kernel import KERNEL_SIZES, load_kernel
from mixconv.fast.operation import mixed_depthwise2d
from mixconv.fast.spec import ACTIVATIONS, MixSpec, pack_weights
from tests.package.common import noise

needs_kernel = pytest.mark.skipif(load_kernel() is None, reason="no C++ compiler")
ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y, "relu": F.relu, "silu": F.silu, "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
}  # fmt: skip
assert set(ACTIVATE) == set(POINT_ACTIVATIONS)


def reference(x: Tensor, weights: list[Tensor], bias: Tensor | None, spec: MixSpec) -> Tensor:
    """Explicit zeros, one F.conv2d a group, in float64."""
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
    return ACTIVATE[spec.activation](y)


def pick_size(rng: random.Random) -> int:
    return rng.choice((rng.randint(1, 6), rng.randint(7, 40)))


class Layer:
    """A random mixed depthwise layer, its parameters, and an input."""

    def __init__(self, seed: int, *, rare: bool = False, dtype: torch.dtype = torch.float32):
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        count = rng.randint(1, 5)
        kernels = tuple(rng.choice((*KERNEL_SIZES, 3, 3)) for _ in range(count))
        channels = tuple(rng.randint(1, 70 // count) for _ in range(count))
        dilations = tuple(rng.choice((1, 2, 3)) if rare and k == 3 else 1 for k in kernels)
        self.spec = MixSpec(
            channels, kernels, rng.choice((1, 2, 3) if rare else (1, 2)), dilations,
            rng.choice(("symmetric", "same")), rng.choice(ACTIVATIONS),
        )  # fmt: skip

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        batch = rng.choice((0, 1, 1, 2, 3))
        self.x = normal(batch, sum(channels), pick_size(rng), pick_size(rng))
        if rng.random() < 0.8:
            self.x = self.x.to(memory_format=torch.channels_last)
        pairs = zip(channels, kernels, strict=True)
        self.weights = [normal(c, 1, k, k) / k for c, k in pairs]
        self.bias = normal(sum(channels)) if rng.random() < 0.5 else None

    def compute(self) -> Tensor:
        weight = pack_weights(self.weights)
        return mixed_depthwise2d(self.x, weight, self.bias, **self.spec._asdict())

    def check(self, tolerance: float = 2e-5) -> None:
        y = self.compute()
        wanted = reference(self.x, self.weights, self.bias, self.spec)
        torch.testing.assert_close(
            y.double(), wanted, rtol=tolerance, atol=tolerance,
            msg=lambda text: f"{self.spec}\n{text}",
        )  # fmt: skip
        assert y.is_contiguous(memory_format=torch.channels_last)


Point = tuple[Tensor, Tensor, PointwiseSpec]  # plain weight, bias, description


def make_point(rng: random.Random, inputs: int, outputs: int, activation: str) -> Point:
    groups = rng.choice([g for g in (1, 2, 3) if inputs % g == 0 == outputs % g])
    scale = (inputs // groups) ** -0.5
    weight = scale * noise(outputs, inputs // groups, 1, 1, seed=rng.randrange(10**6))
    bias = noise(outputs, seed=rng.randrange(10**6))
    return weight, bias, PointwiseSpec(inputs, outputs, groups, activation)


class Block:
    """A random block, its packed parameters, and an input."""

    def __init__(self, seed: int, *, rare: bool = False) -> None:
        rng = random.Random(seed)
        count = rng.randint(1, 4)
        kernels = tuple(rng.choice((1, 3, 3, 5, 7, 9, 11)) for _ in range(count))
        channels = tuple(rng.randint(1, 80 // count) for _ in range(count))
        stride, padding = rng.choice((1, 1, 2)), rng.choice(("symmetric", "same"))
        wide, activation = sum(channels), rng.choice(ACTIVATIONS)
        dilations = tuple(rng.choice((1, 2)) if rare else 1 for _ in kernels)
        self.mix = MixSpec(channels, kernels, stride, dilations, padding, activation)
        pairs = zip(channels, kernels, strict=True)
        self.depthwise = [noise(c, 1, k, k, seed=seed + k) / k for c, k in pairs]
        self.bias = noise(wide, seed=seed)
        has_expand, has_gate = rng.random() < 0.7, rng.random() < 0.6
        inputs = rng.randint(1, 40) if has_expand else wide
        self.residual = stride == 1 and rng.random() < 0.6
        outputs = inputs if self.residual else rng.randint(1, 50)
        pick = lambda: rng.choice(ACTIVATIONS)  # noqa: E731
        hidden = rng.randint(1, 20)
        self.expand = make_point(rng, inputs, wide, pick()) if has_expand else None
        self.squeeze = make_point(rng, wide, hidden, pick()) if has_gate else None
        self.excite = make_point(rng, hidden, wide, "sigmoid") if has_gate else None
        self.project = make_point(rng, wide, outputs, pick())
        size = [pick_size(rng), pick_size(rng)]
        self.x = noise(rng.choice((0, 1, 2, 3, 5)), inputs, *size, seed=seed)

    def spec(self) -> BlockSpec:
        layers = (self.expand, self.squeeze, self.excite)
        expand, squeeze, excite = (layer and layer[2] for layer in layers)
        return BlockSpec(self.mix, expand, squeeze, excite, self.project[2], self.residual)

    def packed(self) -> tuple[list[Tensor], list[Tensor]]:
        layers = (self.expand, None, self.squeeze, self.excite, self.project)
        weights = [pack_pointwise(p[0], p[2].groups) if p else torch.empty(0) for p in layers]
        biases = [p[1] if p else torch.empty(0) for p in layers]
        weights[1], biases[1] = pack_weights(self.depthwise), self.bias
        return weights, [bias.clone() for bias in biases]

    def compute(self) -> Tensor:
        return inverted_residual(self.x, *self.packed(), self.spec())

    def reference(self) -> Tensor:
        """In float64."""

        def pointwise(y: Tensor, layer: Point) -> Tensor:
            weight, bias, point = layer
            y = F.conv2d(y, weight.double(), bias.double(), groups=point.groups)
            return ACTIVATE[point.activation](y)

        y = self.x.double()
        y = pointwise(y, self.expand) if self.expand else y
        y = reference(y, self.depthwise, self.bias, self.mix)
        if self.squeeze and self.excite:
            gate = y.sum((2, 3), keepdim=True) / (y.shape[2] * y.shape[3])
            y = y * pointwise(pointwise(gate, self.squeeze), self.excite)
        y = pointwise(y, self.project)
        return self.x.double() + y if self.residual else y

    def check(self) -> None:
        y, wanted = self.compute(), self.reference()
        torch.testing.assert_close(
            y.double(), wanted, rtol=5e-5, atol=5e-5, msg=lambda text: f"{self.spec()}\n{text}"
        )
        assert y.is_contiguous(memory_format=torch.channels_last)


def find_block(wanted: Callable[[Block], object]) -> Block:
    """The first random block for which something holds."""
    return next(block for block in map(Block, range(1000)) if wanted(block))
