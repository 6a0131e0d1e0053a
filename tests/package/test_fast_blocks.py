"""Whole blocks as one operation: values, what is such a block and what is not, bad input."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixconv.fast as fast
from mixconv import (
    DepthwiseSeparableBlock,
    MixConv2d,
    MixConvBlock,
    fuse_for_inference,
)
from mixconv.blocks import SqueezeExcite
from mixconv.fast import BlockSpec, Mix, Point
from tests.package.common import noise, randomize
from tests.package.test_fast import ACTIVATE, MODELS, near, needs_kernel, reference

ROOT = Path(__file__).parents[2]
Layer = tuple[Tensor, Tensor, Point]  # plain weight, bias, description


def make_point(rng: random.Random, inputs: int, outputs: int, activation: str) -> Layer:
    groups = rng.choice([g for g in (1, 2, 3) if inputs % g == 0 == outputs % g])
    scale = (inputs // groups) ** -0.5
    weight = scale * noise(outputs, inputs // groups, 1, 1, seed=rng.randrange(10**6))
    bias = noise(outputs, seed=rng.randrange(10**6))
    return weight, bias, Point(inputs, outputs, groups, activation)


class Case:
    """A random block, its packed parameters, and an input."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        count = rng.randint(1, 4)
        kernels = tuple(rng.choice((3, 3, 5, 7, 9, 11)) for _ in range(count))
        channels = tuple(rng.randint(1, 80 // count) for _ in range(count))
        stride, padding = rng.choice((1, 1, 2)), rng.choice(("symmetric", "same"))
        wide, activation = sum(channels), rng.choice(fast.ACTIVATIONS)
        dilations = tuple(rng.choice((1, 1, 2)) for _ in kernels)
        self.mix = Mix(channels, kernels, stride, dilations, padding, activation)
        pairs = zip(channels, kernels, strict=True)
        self.depthwise = [noise(c, 1, k, k, seed=seed + k) / k for c, k in pairs]
        self.bias = noise(wide, seed=seed)
        has_expand, has_gate = rng.random() < 0.7, rng.random() < 0.6
        inputs = rng.randint(1, 40) if has_expand else wide
        self.residual = stride == 1 and rng.random() < 0.6
        outputs = inputs if self.residual else rng.randint(1, 50)
        pick = lambda: rng.choice(fast.ACTIVATIONS)  # noqa: E731
        hidden = rng.randint(1, 20)
        self.expand = make_point(rng, inputs, wide, pick()) if has_expand else None
        self.squeeze = make_point(rng, wide, hidden, pick()) if has_gate else None
        self.excite = make_point(rng, hidden, wide, "sigmoid") if has_gate else None
        self.project = make_point(rng, wide, outputs, pick())
        size = [rng.choice((rng.randint(1, 6), rng.randint(7, 40))) for _ in range(2)]
        self.x = noise(rng.choice((0, 1, 2, 3, 5)), inputs, *size, seed=seed)

    def spec(self) -> BlockSpec:
        layers = (self.expand, self.squeeze, self.excite)
        expand, squeeze, excite = (layer and layer[2] for layer in layers)
        return BlockSpec(self.mix, expand, squeeze, excite, self.project[2], self.residual)

    def packed(self) -> tuple[list[Tensor], list[Tensor]]:
        layers = (self.expand, None, self.squeeze, self.excite, self.project)
        weights = [fast.pack_pointwise(p[0], p[2].groups) if p else torch.empty(0) for p in layers]
        biases = [p[1] if p else torch.empty(0) for p in layers]
        weights[1], biases[1] = fast.pack_weights(self.depthwise), self.bias
        return weights, biases

    def compute(self) -> Tensor:
        return fast.inverted_residual(self.x, *self.packed(), self.spec())

    def reference(self) -> Tensor:
        """Written apart from the package, in float64."""

        def pointwise(y: Tensor, layer: Layer) -> Tensor:
            weight, bias, point = layer
            y = F.conv2d(y, weight.double(), bias.double(), groups=point.groups)
            act: Callable[[Tensor], Tensor] = {**ACTIVATE, "sigmoid": torch.sigmoid}[
                point.activation
            ]
            return act(y)

        y = self.x.double()
        y = pointwise(y, self.expand) if self.expand else y
        y = reference(y, self.depthwise, self.bias, self.mix)
        if self.squeeze and self.excite:
            gate = y.sum((2, 3), keepdim=True) / (y.shape[2] * y.shape[3])
            y = y * pointwise(pointwise(gate, self.squeeze), self.excite)
        y = pointwise(y, self.project)
        return self.x.double() + y if self.residual else y


def agrees(case: Case) -> None:
    y, wanted = case.compute(), case.reference()
    torch.testing.assert_close(
        y.double(), wanted, rtol=5e-5, atol=5e-5, msg=lambda text: f"{case.spec()}\n{text}"
    )
    assert y.is_contiguous(memory_format=torch.channels_last)


# Values


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("threads", [1, 2])
def test_random_blocks(part: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for seed in range(30 * part, 30 * part + 30):
        agrees(Case(seed))


def test_random_blocks_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "load_kernel", lambda: None)
    for seed in range(30):
        agrees(Case(1000 + seed))


def test_the_gate_sees_every_band_and_large_images_too() -> None:
    """More bands than one, and a wide tensor larger than what a thread keeps."""
    block = MixConvBlock(16, 16, (3, 5), squeeze_ratio=0.5, activation="swish")
    model, x = randomize(block).eval(), noise(2, 16, 230, 231)
    with torch.no_grad():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            near(fuse_for_inference(model)(x), model(x))


def test_packing_is_undone() -> None:
    for outputs, inputs, groups in ((5, 3, 1), (16, 4, 1), (34, 6, 2), (96, 15, 3)):
        weight = noise(outputs, inputs // groups, 1, 1)
        point = Point(inputs, outputs, groups, "none")
        packed = fast.pack_pointwise(weight, groups)
        assert torch.equal(fast.unpack_pointwise(packed, point), weight)


@needs_kernel
def test_a_gate_that_is_shut_is_zero_not_almost() -> None:
    """Denormal numbers would make everything after it many times slower."""
    case = next(c for c in map(Case, range(1000)) if c.squeeze and c.x.numel() and not c.residual)
    assert case.excite is not None
    case.excite[1].fill_(-85.0)
    case.excite[0].zero_()
    weights, biases = case.packed()
    biases[4].zero_()
    y = fast.inverted_residual(case.x, weights, biases, case.spec())
    assert y.abs().max() == 0


def test_many_python_threads() -> None:
    cases = [Case(seed) for seed in range(12)]
    wanted, failures = [case.compute() for case in cases], []

    def work(offset: int) -> None:
        for turn in range(24):
            index = (turn + offset) % len(cases)
            if not torch.equal(cases[index].compute(), wanted[index]):
                failures.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


# What is such a block


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "all of it": lambda: MixConvBlock(
        20, 20, (3, 5), squeeze_ratio=0.5, expand_groups=2, project_groups=2, activation="swish"
    ),
    "one group, no gate": lambda: MixConvBlock(20, 20, (3,), activation="relu6"),
    "no expansion": lambda: MixConvBlock(20, 24, (3, 5, 7), expand_ratio=1),
    "stride, same padding": lambda: MixConvBlock(20, 24, (3, 5), 2, padding="same"),
    "dilated": lambda: MixConvBlock(20, 20, (3, 5), dilated=True),
    "drop path": lambda: MixConvBlock(20, 20, (3, 5), drop_path_rate=0.3),
    "depthwise separable": lambda: DepthwiseSeparableBlock(20, 24, (3, 5)),
    "separable, plain": lambda: DepthwiseSeparableBlock(20, 20, activation="relu6"),
    "5×5": lambda: MixConvBlock(20, 20, (5,), squeeze_ratio=1.0),
}


@needs_kernel
@pytest.mark.parametrize("name", list(BLOCKS))
def test_block_becomes_one_operation(name: str) -> None:
    model = randomize(BLOCKS[name]()).eval()
    fused = fuse_for_inference(model, backend="kernel")
    assert isinstance(fused, fast.FusedBlock)
    with torch.no_grad():
        for shape in ((2, 20, 14, 14), (1, 20, 5, 9)):
            x = noise(*shape)
            near(fused(x), model(x))
        near(fused(x[0]), model(x)[0])


class Lookalike(nn.Module):
    """Almost an inverted residual block."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1), nn.SiLU())
        self.depthwise = MixConv2d(16, (3, 5))
        self.gate = SqueezeExcite(16, 4)
        self.project = nn.Conv2d(16, 8, 1)
        self.second = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.expand(x)
        y = self.depthwise(wide)
        gate = self.gate
        if self.kind == "gate of another tensor":
            y = y * gate.excite(F.relu(gate.squeeze(wide.mean((2, 3), keepdim=True)))).sigmoid()
        elif self.kind == "gate of the maximum":
            y = y * gate.excite(F.relu(gate.squeeze(y.amax((2, 3), keepdim=True)))).sigmoid()
        elif self.kind == "mean of rows only":
            y = y * gate.excite(F.relu(gate.squeeze(y.mean(2, keepdim=True)))).sigmoid()
        elif self.kind == "hard gate":
            y = y * F.hardsigmoid(gate.excite(gate.squeeze(y.mean((2, 3), keepdim=True))))
        elif self.kind == "gate twice":
            y = gate(gate(y))
        elif self.kind == "sigmoid of itself":
            y = y * y.sigmoid()
        z: Tensor = self.project(y)
        if self.kind == "adds twice":
            return torch.add(x, z, alpha=2)
        if self.kind == "doubles":
            return z + z
        if self.kind == "unknown activation":
            return x + F.hardswish(z)
        if self.kind == "subtracts":
            return x - z
        if self.kind == "scales":
            z = z * 2
        if self.kind == "computes in vain":
            self.second(wide)
        other: Tensor = self.second(wide) if self.kind == "adds something else" else x
        return other + z


KINDS = (
    "gate of another tensor", "gate of the maximum", "mean of rows only", "hard gate",
    "gate twice", "sigmoid of itself", "adds something else", "adds twice", "doubles",
    "unknown activation", "subtracts", "scales", "computes in vain",
)  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_such_block_is_left(kind: str) -> None:
    model, x = randomize(Lookalike(kind)).eval(), noise(2, 8, 9, 9)
    fused = fuse_for_inference(model, backend="kernel")
    assert not isinstance(fused, fast.FusedBlock)
    with torch.no_grad():
        near(fused(x), model(x))


@needs_kernel
def test_the_lookalike_without_its_fault_is_one() -> None:
    """Or the test above could pass for a reason of its own."""
    model, x = randomize(Lookalike("")).eval(), noise(2, 8, 9, 9)
    fused = fuse_for_inference(model, backend="kernel")
    assert isinstance(fused, fast.FusedBlock)
    with torch.no_grad():
        near(fused(x), model(x))


def change_hook(block: nn.Module) -> None:
    block.get_submodule("project.conv").register_forward_hook(lambda m, a, y: y + 1)


def change_block_hook(block: nn.Module) -> None:
    block.register_forward_pre_hook(lambda m, a: (a[0] + 1,))


def change_parametrization(block: nn.Module) -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    conv = block.get_submodule("project.conv")
    nn.utils.parametrize.register_parametrization(conv, "weight", Twice())


@pytest.mark.parametrize("change", [change_hook, change_block_hook, change_parametrization])
def test_hooks_and_parametrisations_stay(change: Callable[[nn.Module], None]) -> None:
    block = randomize(MixConvBlock(8, 8, (3, 5))).eval()
    change(block)
    fused, x = fuse_for_inference(nn.Sequential(block), backend="kernel"), noise(2, 8, 9, 9)
    assert not any(isinstance(m, fast.FusedBlock) for m in fused.modules())
    with torch.no_grad():
        near(fused(x), block(x))


# As an operation of PyTorch's


def test_opcheck() -> None:
    for seed in (1, 3, 8, 11):
        case = Case(seed)
        spec = case.spec()
        mix = [list(v) if isinstance(v, tuple) else v for v in spec.mix]
        arguments = (case.x, *case.packed(), fast._as_numbers(spec), *mix, spec.residual)
        torch.library.opcheck(torch.ops.mixconv.inverted_residual.default, arguments)


def test_gradients_of_the_input_and_function_transforms() -> None:
    case = next(c for c in map(Case, range(1000)) if c.squeeze and c.expand and len(c.x) > 1)
    weights, biases = case.packed()
    spec, leaf = case.spec(), case.x.clone().requires_grad_()
    fast.inverted_residual(leaf, weights, biases, spec).square().sum().backward()
    other = case.x.clone().requires_grad_()
    fast.block_form(other, weights, biases, spec).square().sum().backward()
    assert leaf.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(leaf.grad, other.grad)
    each = torch.func.vmap(lambda image: fast.inverted_residual(image[None], weights, biases, spec))
    with torch.no_grad():
        torch.testing.assert_close(each(case.x)[:, 0], case.compute(), rtol=1e-4, atol=1e-4)


def test_compile_with_a_gradient_of_the_input() -> None:
    model = randomize(MODELS["block"]()).eval()
    fused, x = fuse_for_inference(model, backend="kernel"), noise(2, 20, 9, 9)
    grads = []
    for net in (model, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        net(leaf).square().sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    near(grads[1], grads[0])


def test_other_dtypes_and_moved_models() -> None:
    """A fused block follows `.double()` and `.to()`; the separate operations do the work."""
    model = randomize(MODELS["block"]()).eval()
    fused, x = fuse_for_inference(model, backend="kernel").double(), noise(2, 20, 9, 9)
    with torch.no_grad():
        near(fused(x), model.double()(x.double()))
        assert fused(x).dtype == torch.float64


def test_a_gradient_of_a_weight_takes_the_separate_operations() -> None:
    case = next(c for c in map(Case, range(1000)) if c.squeeze and c.expand and len(c.x))
    for index in range(5):
        weights, biases = case.packed()
        weights[index].requires_grad_()
        fast.inverted_residual(case.x, weights, biases, case.spec()).sum().backward()
        assert weights[index].grad is not None


@needs_kernel
def test_fewer_threads_than_asked_for() -> None:
    """OpenMP may give fewer: the work must not be shared out by the number that was wanted."""
    program = """
import torch
from mixconv import fuse_for_inference
from tests.package.common import noise, randomize
from tests.package.test_fast import MODELS, near
torch.set_num_threads(2)
model = randomize(MODELS["block"]()).eval()
with torch.no_grad():
    for batch in (1, 2, 5):
        x = noise(batch, 20, 15, 16)
        near(fuse_for_inference(model, backend="kernel")(x), model(x))
print("equal")
"""
    env = {**os.environ, "OMP_THREAD_LIMIT": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr[-2000:]


GOOD = Case(next(seed for seed in range(1000) if Case(seed).squeeze and Case(seed).expand))


def bad(change: str) -> tuple[Any, ...]:
    (weights, biases), spec, x = GOOD.packed(), GOOD.spec(), GOOD.x
    expand = spec.expand
    assert expand is not None
    changes: dict[str, Callable[[], tuple[Any, ...]]] = {
        "x has channels too many": lambda: (F.pad(x, (0, 0, 0, 0, 0, 1)), weights, biases, spec),
        "x has three axes": lambda: (x[:, 0], weights, biases, spec),
        "x is double": lambda: (x.double(), weights, biases, spec),
        "a weight is missing": lambda: (x, weights[1:], biases, spec),
        "a weight is short": lambda: (x, [weights[0][1:], *weights[1:]], biases, spec),
        "a bias is short": lambda: (x, weights, [*biases[:4], biases[4][1:]], spec),
        "half a gate": lambda: (x, weights, biases, spec._replace(excite=None)),
        "groups do not divide": lambda: (
            x, weights, biases, spec._replace(expand=expand._replace(groups=97)),
        ),
        "expansion too narrow": lambda: (
            x, weights, biases, spec._replace(expand=expand._replace(outputs=1)),
        ),
        "nothing to add to": lambda: (
            x, weights, biases,
            spec._replace(residual=True, mix=spec.mix._replace(stride=2)),
        ),
    }  # fmt: skip
    return changes[change]()


@pytest.mark.parametrize(
    "change",
    ["x has channels too many", "x has three axes", "x is double", "a weight is missing",
     "a weight is short", "a bias is short", "half a gate", "groups do not divide",
     "expansion too narrow", "nothing to add to"],
)  # fmt: skip
def test_bad_input_is_refused(change: str) -> None:
    with pytest.raises(ValueError, match=r"must|fit"):
        fast.inverted_residual(*bad(change))


def test_training_is_refused() -> None:
    fused = fuse_for_inference(MixConvBlock(8, 8, (3, 5)), backend="kernel")
    with pytest.raises(RuntimeError, match="fuse it again"):
        fused.train()


class Odd(nn.Module):
    """Blocks of which a trace does not show everything, or that names describe wrongly."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.expand, self.project = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.act: nn.Module = Swish() if kind == "Swish of its own" else nn.ReLU()
        self.drop: nn.Module = DropPath() if kind == "DropPath of its own" else nn.Identity()
        self.mix = MixConv2d(16, (3, 5))
        self.excite = nn.Conv2d(16, 16, 1)
        if kind == "forward of its own":
            self.act.forward = torch.tanh  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(x)
        if self.kind == "change in place":
            y.add_(1)
        if self.kind == "change of large numbers":
            y.clamp_(max=1e3)
        if self.kind == "sees the tracer":
            y = y + 1 if isinstance(x, Tensor) else y
        y = self.mix(self.act(y))
        if self.kind == "mean over channels":
            y = y * self.excite(y * 0 + y.mean(1, True)).sigmoid()
        z: Tensor = self.drop(self.project(y))
        if self.kind == "changes its input":
            x += z
            return x
        return x + z


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * x)


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


ODD = (
    "change in place", "change of large numbers", "sees the tracer", "mean over channels",
    "changes its input",
    "Swish of its own", "DropPath of its own", "forward of its own",
)  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("kind", ODD)
def test_what_a_trace_does_not_show(kind: str) -> None:
    model, x = randomize(Odd(kind)).eval(), noise(2, 8, 9, 9)
    fused = fuse_for_inference(nn.Sequential(model), backend="kernel")
    assert not any(isinstance(m, fast.FusedBlock) for m in fused.modules())
    ours, wanted = x.clone(), x.clone()
    with torch.no_grad():
        near(fused(ours), model(wanted))
    assert torch.equal(ours, wanted) or kind == "changes its input"


@needs_kernel
def test_what_a_trace_shows_is_fused() -> None:
    model, x = randomize(Odd("")).eval(), noise(2, 8, 9, 9)
    fused = fuse_for_inference(nn.Sequential(model), backend="kernel")
    assert any(isinstance(m, fast.FusedBlock) for m in fused.modules())
    with torch.no_grad():
        near(fused(x), model(x))


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.again = self.first[0]

    def forward(self, x: Tensor) -> Tensor:
        while float(x.abs().sum()) < 1:  # not to be traced as a whole
            x = x * 2
        y: Tensor = self.again(self.first(x))
        return y


def test_a_layer_under_two_names_is_left_alone() -> None:
    model, x = randomize(Aliased()).eval(), noise(2, 6, 5, 5)
    with torch.no_grad():
        near(fuse_for_inference(model)(x), model(x))


def test_attributes_of_a_block_remain() -> None:
    fused = fuse_for_inference(nn.Sequential(MixConvBlock(8, 12, (3, 5), 2)), backend="kernel")
    block: Any = fused[0]  # type: ignore[index]
    assert (block.stride, block.out_channels) == (2, 12)


def test_a_nan_is_not_lost_in_the_gate() -> None:
    model = randomize(MODELS["block"]()).eval()
    x = noise(2, 20, 9, 9)
    x[0, 3, 4, 4] = torch.nan
    with torch.no_grad():
        y = fuse_for_inference(model, backend="kernel")(x)
        assert torch.equal(y.isnan(), model(x).isnan())
    assert y[0].isnan().all()


def test_autocast_with_a_gradient_and_forward_mode() -> None:
    model = randomize(MODELS["block"]()).eval()
    fused, x = fuse_for_inference(model, backend="kernel"), noise(2, 20, 9, 9)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused(leaf).sum().backward()
    assert leaf.grad is not None
    tangents = []
    with torch.autograd.forward_ad.dual_level():
        for net in (model, fused):
            y = net(torch.autograd.forward_ad.make_dual(x, noise(2, 20, 9, 9, seed=1)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    near(tangents[1], tangents[0])


def test_a_negated_view_is_negated() -> None:
    model = randomize(MODELS["block"]()).eval()
    x = torch.complex(noise(2, 20, 9, 9), noise(2, 20, 9, 9, seed=1)).conj().imag
    assert x.is_neg()
    with torch.no_grad():
        near(fuse_for_inference(model, backend="kernel")(x), model(x))


def test_extreme_sizes_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings and wide tensors too large for the kernel's memory: no crash, the same result."""
    monkeypatch.setattr(fast, "_LARGEST_RING", 10)
    monkeypatch.setattr(fast, "_LARGEST_WIDE", 10)
    model = randomize(MODELS["block"]()).eval()
    fused, x = fuse_for_inference(model, backend="kernel"), noise(2, 20, 9, 7)
    with torch.no_grad():
        near(fused(x), model(x))


def test_the_default_type_does_not_matter() -> None:
    """The kernel writes float32 whatever new tensors are by default."""
    model = randomize(MODELS["swish block"]()).eval()
    layer = MixConv2d(20, (3, 5), 2).eval()
    x = noise(2, 20, 9, 9)
    for module in (model, layer):
        fused = fuse_for_inference(module, backend="kernel")
        with torch.no_grad():
            wanted = module(x)
            for dtype in (torch.float64, torch.bfloat16):
                try:
                    torch.set_default_dtype(dtype)
                    y = fused(x)
                finally:
                    torch.set_default_dtype(torch.float32)
                near(y, wanted)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(F.relu(self.norm(self.conv(x))), self.conv.weight)


def test_weights_that_are_read_directly_are_not_folded() -> None:
    model, x = randomize(Tied()).eval(), noise(2, 6, 5, 5)
    with torch.no_grad():
        near(fuse_for_inference(model)(x), model(x))


def test_a_huge_stride() -> None:
    x, weight = noise(1, 8, 9, 9), torch.ones(72)
    for stride in (10**6, 10**9):
        with torch.no_grad():
            y = fast.mixed_depthwise2d(x, weight, channels=[8], kernel_sizes=[3], stride=stride)
        wanted = F.conv2d(x, torch.ones(8, 1, 3, 3), stride=stride, padding=1, groups=8)
        torch.testing.assert_close(y, wanted)
