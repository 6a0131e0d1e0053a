"""Fused models: the same values, what is left alone and why, and no wrong result."""

import copy
import io
import pickle
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mixconv.fast.describe as describe
import mixconv.fast.fuse as fuse
from mixconv import MixConv2d, MixConvBlock, count_costs, mixnet_s, mobilenet_v1, mobilenet_v2
from mixconv.fast.chains import Chains
from mixconv.fast.describe import BlockParts, describe_block, describe_layer
from mixconv.fast.folding import FoldedNorm
from mixconv.fast.fuse import BACKENDS, fuse_for_inference
from mixconv.fast.fused_block import FusedBlock
from mixconv.fast.fused_layer import FusedMixConv2d
from mixconv.fast.operation import FORMS
from mixconv.fast.report import FusionReport
from tests.package.common import noise, randomize, same_state, snapshot


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 0.01
    assert float((actual - expected).abs().max()) <= tolerance * scale


def report_of(fused: nn.Module) -> FusionReport:
    report = fused.fusion_report
    assert isinstance(report, FusionReport)
    return report


def made(model: nn.Module) -> Any:
    """A random model in evaluation."""
    return randomize(model).eval()


def stays(model: nn.Module, x: Tensor, reason: str, backend: str = "kernel") -> nn.Module:
    """Fused, it computes the same, and the report gives this reason for something."""
    model.eval()
    fused = fuse_for_inference(model, backend=backend)
    with torch.no_grad():
        near(fused(x.clone()), model(x.clone()))
    text = str(report_of(fused))
    assert reason in text, text
    return fused


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


# The same values


MODELS: dict[str, Callable[[], Any]] = {
    "layer": lambda: MixConv2d(20, (3, 5, 7), bias=True),
    "same": lambda: MixConv2d(20, (1, 3, 5, 7), stride=2, padding="same"),
    "dilated": lambda: MixConv2d(20, (3, 5, 7), dilated=True),
    "two strides": lambda: MixConv2d(20, (3, 5), stride=(1, 2)),
    "multiplier": lambda: MixConv2d(20, (3, 5), channel_multiplier=2),
    "block": lambda: MixConvBlock(20, 20, (3, 5), squeeze_ratio=0.5, project_groups=2),
    "swish block": lambda: MixConvBlock(20, 30, (3, 5), 2, activation="swish", padding="same"),
    "mobilenet v1": lambda: mobilenet_v1((3, 5, 7), num_classes=7, width_multiplier=0.25),
    "mobilenet v2": lambda: mobilenet_v2((3, 5, 7), num_classes=7, width_multiplier=0.35),
    "plain 5×5": lambda: mobilenet_v2((5,), num_classes=7, width_multiplier=0.35),
    "mixnet": lambda: mixnet_s(num_classes=7, width_multiplier=0.5),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(MODELS))
def test_fused_model_computes_the_same(name: str, backend: str) -> None:
    model = randomize(MODELS[name]()).train()
    before = snapshot(model)
    fused = fuse_for_inference(model, backend=backend)
    assert model.training
    assert same_state(model, before)
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    model.eval()
    channels = 20 if isinstance(model, MixConv2d | MixConvBlock) else 3
    with torch.no_grad():
        for size in ((64, 64), (33, 47)):
            x = noise(2, channels, *size)
            near(fused(x), model(x))
            near(fused(x.to(memory_format=torch.channels_last)), model(x))


@pytest.mark.parametrize("name", ["mixnet", "mobilenet v1", "mobilenet v2", "plain 5×5"])
def test_norms_are_gone_and_blocks_are_one_operation(name: str) -> None:
    model = made(MODELS[name]())
    for backend in ("kernel", "merged"):
        fused = fuse_for_inference(model, backend=backend)
        found = kinds(fused)
        assert "BatchNorm2d" not in found
        assert "MixConv2d" not in found
        assert found.count("FusedBlock") == (len(model.blocks) if backend == "kernel" else 0)
        assert report_of(fused).left == []
        assert report_of(fused).notes == []


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "all of it": lambda: MixConvBlock(
        20, 20, (3, 5), squeeze_ratio=0.5, expand_groups=2, project_groups=2, activation="swish"
    ),
    "one group, no gate": lambda: MixConvBlock(20, 20, (3,), activation="relu6"),
    "no expansion": lambda: MixConvBlock(20, 24, (3, 5, 7), expand_ratio=1),
    "stride, same padding": lambda: MixConvBlock(20, 24, (3, 5), 2, padding="same"),
    "drop path": lambda: MixConvBlock(20, 20, (3, 5), drop_path_rate=0.3),
    "not added": lambda: MixConvBlock(20, 20, (3, 5), skip=False),
}


@pytest.mark.parametrize("name", list(BLOCKS))
def test_block_becomes_one_operation(name: str) -> None:
    model = made(BLOCKS[name]())
    fused = fuse_for_inference(model, backend="kernel")
    assert isinstance(fused, FusedBlock)
    assert [piece.name for piece in report_of(fused).fused] == [""]
    with torch.no_grad():
        for shape in ((2, 20, 14, 14), (1, 20, 5, 9)):
            near(fused(noise(*shape)), model(noise(*shape)))


def test_a_mixed_layer_outside_a_block_is_one_operation() -> None:
    layers = (MixConv2d(8, (3, 5)), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 3))
    fused: Any = fuse_for_inference(randomize(nn.Sequential(*layers)), backend="kernel")
    assert [type(m).__name__ for m in fused] == [
        "FusedMixConv2d", "FoldedNorm", "Identity", "Conv2d",
    ]  # fmt: skip
    fused = fuse_for_inference(nn.Sequential(*layers), backend="merged")
    assert [type(m).__name__ for m in fused[0]] == ["Conv2d", "SiLU"]


def test_a_dilated_layer_is_not_merged_into_a_kernel_with_holes() -> None:
    layers = (MixConv2d(8, (3, 7), dilated=True), nn.BatchNorm2d(8))
    fused: Any = fuse_for_inference(randomize(nn.Sequential(*layers)), backend="merged")
    assert [type(m).__name__ for m in fused] == ["MixConv2d", "FoldedNorm"]


def test_same_padding_with_a_kernel_smaller_than_the_stride() -> None:
    """Such a layer cannot be one convolution, but it can be one operation."""
    layer = MixConv2d(20, (1, 3, 5, 7), stride=2, padding="same").eval()
    fused = fuse_for_inference(layer, backend="kernel")
    assert isinstance(fused, FusedMixConv2d)
    with torch.no_grad():
        for size in (8, 9):
            near(fused(noise(1, 20, size, size)), layer(noise(1, 20, size, size)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_folding_a_norm_that_scales_much(backend: str) -> None:
    model = made(nn.Sequential(MixConv2d(8, (3, 5)), nn.BatchNorm2d(8), nn.ReLU6()))
    norm: Any = model[1]
    norm.running_var.fill_(1e-3)
    norm.running_mean.fill_(1.0)
    fused, x = fuse_for_inference(model, backend=backend), noise(1, 8, 9, 9)
    assert report_of(fused).left == []
    with torch.no_grad():
        near(fused(x), model(x))


def test_methods_and_attributes_remain() -> None:
    model = made(mixnet_s(num_classes=7, width_multiplier=0.5))
    fused: Any = fuse_for_inference(model, backend="kernel")
    x = noise(1, 3, 64, 64)
    with torch.no_grad():
        for ours, wanted in zip(fused.features(x), model.features(x), strict=True):
            near(ours, wanted)
    strides = [block.stride for block in model.blocks]
    assert [block.stride for block in fused.blocks] == strides
    layer: Any = fuse_for_inference(MixConv2d(8, (3, 5), stride=2), backend="kernel")
    assert (layer.in_channels, layer.out_channels, layer.stride) == (8, 8, (2, 2))


# Refused


@pytest.mark.parametrize("model", [None, {"weight": 1}, MixConv2d], ids=str)
def test_only_modules(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module in Python, got "):
        fuse_for_inference(model)


def test_scripted_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module in Python"):
        fuse_for_inference(torch.jit.trace(nn.Conv2d(3, 4, 3), noise(1, 3, 5, 5)))


def test_what_cannot_be_copied_is_refused() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.images = iter(())
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"one that copy\.deepcopy copies: cannot"):
        fuse_for_inference(model)


def test_an_initialised_process_group_is_not_needed_for_what_ddp_held() -> None:
    inner = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    ddp = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(ddp)
    ddp.module = inner
    fused = fuse_for_inference(ddp)
    with torch.no_grad():
        near(fused(noise(1, 3, 9, 9)), inner(noise(1, 3, 9, 9)))


def test_a_view_of_a_map_keeps_the_layout() -> None:
    """With channels_last weights this would fail."""

    class Viewing(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            result: Tensor = super().forward(input)
            return result.view(input.shape[0], -1)

    model = randomize(Viewing(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    fused = stays(model, noise(2, 3, 9, 9), "weights are not in channels_last: the model, as")
    assert "BatchNorm2d" not in kinds(fused)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"auto, kernel, merged.*'fastest'"):
        fuse_for_inference(MixConv2d(8, (3, 5)), backend="fastest")


@pytest.mark.parametrize("backend", ["kernel", "merged"])
def test_training_is_refused_before_anything_is_changed(backend: str) -> None:
    for model in (MixConvBlock(8, 8, (3, 5)), mixnet_s(num_classes=3, width_multiplier=0.5)):
        fused = fuse_for_inference(model, backend=backend)
        with pytest.raises(RuntimeError, match="Train the model you gave"):
            fused.train()
        assert not any(module.training for module in fused.modules())
        assert fused.eval() is fused
        with pytest.raises(RuntimeError, match="fuse it again"):
            copy.deepcopy(fused).train()


def test_what_was_not_fused_trains() -> None:
    assert fuse_for_inference(nn.Sequential(nn.Linear(2, 2), nn.Tanh())).train().training


# Exact types


class Doubling(MixConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class BatchNorm2d(nn.Module):
    """Called like PyTorch's, with all its attributes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_features, self.eps = channels, 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        values = (self.running_mean, self.running_var, self.weight, self.bias)
        return 2 * F.batch_norm(x, *values)  # type: ignore[arg-type]


class Conv2dSame(nn.Conv2d):
    """Called like timm's, and pads nothing."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, groups=self.groups)


class MyNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_a_subclass_of_the_layer_is_left() -> None:
    model = randomize(nn.Sequential(Doubling(8, (3, 5)), nn.BatchNorm2d(8), nn.ReLU()))
    fused = stays(model, noise(1, 8, 9, 9), "0: Doubling left: Doubling is not a class that is")
    assert "Doubling" in kinds(fused)


@pytest.mark.parametrize("backend", ["kernel", "merged"])
def test_norms_of_other_classes_are_left(backend: str) -> None:
    for norm in (BatchNorm2d(8), MyNorm(8)):
        model = randomize(nn.Sequential(nn.Conv2d(8, 8, 3), norm, nn.ReLU()))
        fused = stays(model, noise(1, 8, 9, 9), "", backend)
        assert type(norm).__name__ in kinds(fused)


def test_a_norm_with_a_forward_of_its_own_is_left() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    norm = model[1]  # type: ignore[index]
    norm.forward = lambda x: F.batch_norm(x, None, None, training=True)
    stays(model, noise(1, 8, 9, 9), "1: BatchNorm2d left: has hooks, or a forward")


def test_a_layer_that_is_called_like_a_peers() -> None:
    layer = Conv2dSame(8, 8, 5, groups=8)
    model = randomize(nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU()))
    stays(model, noise(1, 8, 9, 9), "0: Conv2dSame left: Conv2dSame is not a class that is known")


def test_a_norm_that_stays_in_training_mode() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> "Frozen":
            for part in self:
                part.training = True
            return self

    model = randomize(Frozen(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=0.0)))
    stays(model, noise(1, 8, 9, 9), "0: Conv2d + BatchNorm2d left: the norm is in training mode")


def test_a_norm_without_statistics() -> None:
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    model = randomize(nn.Sequential(MixConv2d(8, (3, 5)), norm, nn.ReLU()))
    stays(model, noise(1, 8, 9, 9), "a batch norm without running statistics")


# Hooks


def add(module: nn.Module, kind: str, calls: list[str]) -> None:
    getattr(module, f"register_{kind}")(lambda *_: calls.append(kind))


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", ["0", "0.depthwise", "0.depthwise.conv", "0.project.norm"])
def test_hooks_still_run(kind: str, place: str) -> None:
    block = randomize(MixConvBlock(8, 8, (3, 5), squeeze_ratio=0.5))
    model, calls = nn.Sequential(block).eval(), list[str]()
    add(model.get_submodule(place), kind, calls)
    fused = fuse_for_inference(model, backend="kernel")
    assert calls == []  # nothing runs while the model is fused
    assert "FusedBlock" not in kinds(fused)
    assert "0: MixConvBlock left: " in str(report_of(fused))
    x = noise(1, 8, 9, 9).requires_grad_()
    fused(x).sum().backward()
    assert calls == [kind]


def test_a_hook_between_a_convolution_and_its_norm_sees_what_it_saw() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(6, 6, 1))
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(self.first(x))
            return result

    model, seen = made(Outer()), list[Tensor]()
    model.first.register_forward_hook(lambda m, i, o: seen.append(o))
    fused, x = fuse_for_inference(model), noise(1, 6, 5, 5)
    with torch.no_grad():
        near(fused(x), model(x))
    near(seen[0], seen[1])


def test_parametrizations_and_weight_norm_stay() -> None:
    model = randomize(nn.Sequential(MixConv2d(8, (3, 5)), nn.BatchNorm2d(8)))
    nn.utils.parametrizations.weight_norm(model[0].convs[0])  # type: ignore[index]
    stays(model, noise(1, 8, 9, 9), "0: MixConv2d left: has hooks, or a forward or weight of its")


# Shared, tied, reached otherwise


class Odd(nn.Module):
    """A shared layer, and a norm whose input two read."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = MixConv2d(6, (3, 5))
        self.norm = nn.BatchNorm2d(6)
        self.shared = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x)
        y = y + self.norm(y)
        result: Tensor = self.shared(self.shared(y))
        return result


def test_shared_layers_are_left() -> None:
    fused = stays(randomize(Odd()), noise(2, 6, 9, 9), "shared.0: Conv2d left: is used more than")
    assert "norm: BatchNorm2d left: no layer that feeds it alone" in str(report_of(fused))
    assert kinds(fused).count("BatchNorm2d") == 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(F.relu(self.norm(self.conv(x))), self.conv.weight)


def test_weights_that_are_read_directly_are_not_folded() -> None:
    stays(randomize(Tied()), noise(2, 6, 5, 5), "conv: Conv2d left: is used more than once")


def test_a_weight_of_two_layers_is_folded_in_each() -> None:
    model = randomize(
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    ).eval()
    model[2].weight = model[0].weight  # type: ignore[index]
    fused, x = fuse_for_inference(model), noise(1, 6, 5, 5)
    assert len(report_of(fused).fused) == 2
    with torch.no_grad():
        near(fused(x), model(x))


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.again = self.first[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first[1](self.again(x))
        return y


class Listed(nn.Module):
    """Calls its layers from a list that PyTorch does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.steps = [self.conv]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        result: Tensor = self.norm(x)
        return result


@pytest.mark.parametrize("kind", [Aliased, Listed])
def test_a_layer_that_is_reached_otherwise_is_left(kind: Any) -> None:
    stays(randomize(kind()), noise(2, 6, 5, 5), "is reached in more than one way")


class Keeping(nn.Module):
    """Shows its inner values to whoever asks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        self.seen.append(self.last)
        result: Tensor = self.norm(self.last)
        return result


def test_values_that_a_model_keeps_are_kept() -> None:
    model = made(Keeping())
    fused: Any = fuse_for_inference(model)
    assert fused.seen == []
    x = noise(1, 6, 5, 5)
    with torch.no_grad():
        near(fused(x), model(x))
    near(fused.last, model.last)


class Indexed(nn.Module):
    """Takes a row of layers apart while it runs."""

    def __init__(self, untraceable: bool) -> None:
        super().__init__()
        self.untraceable = untraceable
        self.row = nn.Sequential(nn.Conv2d(6, 6, 1), MixConv2d(6, (3, 5)), nn.Conv2d(6, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.untraceable and float(x.sum()) > 1e9:
            return x
        y = self.row[0](x)
        for layer in list(self.row)[1:]:
            y = layer(y)
        first: Any = self.row[0]
        result: Tensor = y * first.weight.sum()
        return result


@pytest.mark.parametrize("untraceable", [False, True])
def test_a_row_that_is_indexed_is_there(untraceable: bool) -> None:
    model, x = made(Indexed(untraceable)), noise(2, 6, 9, 9)
    fused: Any = fuse_for_inference(model, backend="kernel")
    assert len(fused.row) == 3
    with torch.no_grad():
        near(fused(x), model(x))


def test_a_block_under_two_names_is_fused_under_both() -> None:
    block = MixConvBlock(6, 6, (3, 5))
    model = made(nn.Sequential(block, nn.Tanh(), block))
    fused: Any = fuse_for_inference(model, backend="kernel")
    assert isinstance(fused[0], FusedBlock)
    assert fused[0] is fused[2]


def test_a_block_inside_a_block_goes_with_it() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MixConvBlock(6, 6, (3, 5), expand_ratio=1, skip=False)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x)
            return result

    describe_block.register(
        Outer, lambda block: BlockParts([block.inner.depthwise], [block.inner.project])
    )
    inner = made(Outer())
    inner.inner.drop_path = nn.Identity()
    fused: Any = fuse_for_inference(nn.Sequential(inner), backend="kernel")
    assert isinstance(fused[0], FusedBlock)
    with torch.no_grad():
        near(fused(noise(1, 6, 9, 9)), inner(noise(1, 6, 9, 9)))


class Shared(nn.Module):
    """One activation for all layers, as YOLO's have it."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.SiLU()
        rows = [nn.Sequential(MixConv2d(6, (3, 5)), nn.BatchNorm2d(6), act) for _ in range(2)]
        self.rows = nn.Sequential(*rows)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.rows(x)
        return result


@pytest.mark.parametrize("backend", ["kernel", "merged"])
def test_a_shared_activation_does_not_keep_norms_from_folding(backend: str) -> None:
    model, x = made(Shared()), noise(1, 6, 9, 9)
    fused = fuse_for_inference(model, backend=backend)
    assert "BatchNorm2d" not in kinds(fused)
    with torch.no_grad():
        near(fused(x), model(x))


def test_inside_data_parallel() -> None:
    model, x = nn.DataParallel(randomize(Shared()).eval()), noise(1, 6, 9, 9)
    fused = fuse_for_inference(model, backend="kernel")
    assert "BatchNorm2d" not in kinds(fused)
    nested = fuse_for_inference(nn.Sequential(model, nn.Tanh()), backend="kernel")
    assert "BatchNorm2d" not in kinds(nested)
    with torch.no_grad():
        near(fused(x), model(x))


# What a trace does not show


class Looping(nn.Module):
    """Not to be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(MixConv2d(6, (3, 5)), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        while float(x.abs().sum()) < 100:
            x = x * 2
        result: Tensor = self.inner(x)
        return result


def test_a_model_that_cannot_be_traced_is_fused_part_by_part() -> None:
    fused = stays(randomize(Looping()), noise(1, 6, 3, 3), "the model is fused part by part")
    assert [piece.name for piece in report_of(fused).fused] == ["inner.0"]
    assert "BatchNorm2d" not in kinds(fused)


class SeesTheTracer(nn.Module):
    """Does more than a trace shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y + 1 if isinstance(x, Tensor) else y
        result: Tensor = self.norm(y)
        return result


def test_the_whole_is_tried_too() -> None:
    fused = stays(randomize(SeesTheTracer()), noise(1, 6, 3, 3), "the model, as a whole, was tried")
    assert "BatchNorm2d" in kinds(fused)


class ReadsWhileUntraceable(nn.Module):
    """Reads a weight that its parts' traces know nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        first: Any = self.row[0]
        result: Tensor = self.row(x) * first.weight.sum()
        return result


def test_a_weight_that_is_read_where_no_trace_goes() -> None:
    stays(randomize(ReadsWhileUntraceable()), noise(1, 6, 3, 3), "as a whole, was tried")


def test_part_of_a_model_is_put_back_and_the_rest_is_fused() -> None:
    good = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
    model = randomize(nn.Sequential(SeesTheTracer(), good))
    fused = stays(model, noise(1, 6, 3, 3), "0, as a whole, was tried")
    assert [piece.name for piece in report_of(fused).fused] == ["1.0"]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.norm(self.conv(x)) + y
        return result


def test_a_model_with_a_forward_of_its_own_is_not_traced_by_its_class() -> None:
    model, x = made(Two()), noise(1, 6, 3, 3)
    model.forward = types.MethodType(lambda self, x, y: self.norm(y) + self.conv(x), model)
    fused = fuse_for_inference(model)
    assert "it has a forward of its own" in str(report_of(fused))
    with torch.no_grad():
        near(fused(x, 2 * x), model(x, 2 * x))


def test_a_model_that_does_not_run_on_an_image_is_said_to_be_untried() -> None:
    model, x = made(Two()), noise(1, 6, 3, 3)
    fused = fuse_for_inference(model)
    assert "each piece was tried, but not the model as a whole" in str(report_of(fused))
    with torch.no_grad():
        near(fused(x, x), model(x, x))


# One check for every rewrite


class OwnBlock(nn.Module):
    """A block that somebody described wrongly, in one of several ways."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.expand = nn.Sequential(nn.Conv2d(6, 12, 1), nn.ReLU(inplace=True))
        self.mix = nn.Sequential(MixConv2d(12, (3, 5)), nn.BatchNorm2d(12), nn.ReLU())
        self.project = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.fault == "in place":
            F.relu_(x)  # which changes what is added below
        if self.fault == "random":
            x = x + 0.1 * torch.randn(x.shape)
        y: Tensor = self.project(self.mix(self.expand(x)))
        if self.fault == "not a number":
            y = y / (y - y)
        if self.fault == "scaled":
            y = 1.01 * y
        if self.fault == "shape":
            return y.flatten(1)
        if self.fault == "changes its input":
            return x.add_(y)
        return x + y


@describe_block.register
def _(block: OwnBlock) -> BlockParts:
    return BlockParts([block.mix], [block.project], [block.expand], residual=True)


FAULTS = {
    "in place": "off by up to",
    "random": "off by up to",
    "not a number": "gives NaN or infinity",
    "scaled": "off by up to",
    "shape": "other shapes",
    "changes its input": "off by up to",
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_block_that_does_not_compute_the_same_is_put_back(fault: str) -> None:
    model, x = nn.Sequential(made(OwnBlock(fault))), noise(2, 6, 9, 9)
    fused = fuse_for_inference(model, backend="kernel")
    assert "FusedBlock" not in kinds(fused)
    (piece,) = [piece for piece in report_of(fused).left if piece.before == "OwnBlock"]
    assert FAULTS[fault] in piece.reason
    if fault not in ("random", "not a number"):
        ours, wanted = x.clone(), x.clone()
        with torch.no_grad():
            near(fused(ours), model(wanted))
        assert torch.equal(ours, wanted) or fault in ("changes its input", "in place")


def test_a_layer_that_does_not_compute_the_same_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers are tried as blocks are: with a fold that is wrong, nothing is folded."""
    wrong = lambda conv, scale, shift: None  # noqa: E731
    monkeypatch.setattr("mixconv.fast.describe.fold_line", wrong)
    model = randomize(nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)))
    fused = stays(model, noise(1, 6, 9, 9), "left: tried, and not the same: off by up to")
    assert "BatchNorm2d" in kinds(fused)


@pytest.mark.parametrize("backend", ["kernel", "merged"])
def test_weights_that_are_not_numbers_are_left(backend: str) -> None:
    model = randomize(nn.Sequential(MixConv2d(6, (3, 5)), nn.BatchNorm2d(6)))
    with torch.no_grad():
        model[0].convs[0].weight[0] = torch.nan  # type: ignore[index]
    fused = fuse_for_inference(model, backend=backend)
    assert "it gives NaN or infinity on a random image" in str(report_of(fused))
    assert "BatchNorm2d" in kinds(fused)


def test_the_users_model_and_hooks_do_not_take_part_in_the_trial() -> None:
    class Counting(nn.Module):
        total: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.calls, self.row = 0, nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
            self.register_buffer("total", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.total.add_(1)
            result: Tensor = self.row(x)
            return result

    model, seen = made(Counting()), list[str]()
    add(model, "forward_hook", seen)
    model.total.zero_()
    state = torch.get_rng_state()
    fused: Any = fuse_for_inference(nn.Sequential(model))
    assert (seen, fused[0].calls, float(fused[0].total.sum())) == ([], 0, 0.0)
    assert len(report_of(fused).fused) == 1
    assert torch.equal(torch.get_rng_state(), state)


class Dropping(nn.Module):
    """Draws random numbers in evaluation, outside the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.row(x), 0.5, training=True)


def test_random_numbers_outside_the_pieces_are_no_obstacle() -> None:
    fused = fuse_for_inference(randomize(Dropping()))
    assert "BatchNorm2d" not in kinds(fused)
    assert report_of(fused).notes == []


# Types, devices, other programs


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """Tried in float32; a block stays a row of layers."""
    model = randomize(MODELS["block"]()).eval().to(dtype)
    fused, x = fuse_for_inference(model, backend="kernel"), noise(2, 20, 9, 9).to(dtype)
    assert "BatchNorm2d" not in kinds(fused)
    assert "FusedBlock" not in kinds(fused)
    assert "in float32 on a CPU only" in str(report_of(fused))
    with torch.no_grad():
        assert fused(x).dtype == dtype
        near(fused(x).float(), model(x).float(), tolerance)


HALF = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("backend", ["kernel", "merged", "auto"])
@pytest.mark.parametrize("dtype", HALF)
def test_rounding_does_not_hide_another_activation(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that takes ReLU for SiLU: in bfloat16 that is less than rounding is allowed."""
    row = nn.Sequential(MixConv2d(24, (3, 5), 2), nn.BatchNorm2d(24), nn.ReLU())
    model = made(row).to(dtype)
    assert report_of(fuse_for_inference(model, backend=backend)).fused
    monkeypatch.setitem(describe.ACTIVATION_NAMES, "torch.nn.ReLU", "silu")
    report = report_of(fuse_for_inference(model, backend=backend))
    assert not report.fused
    assert "tried, and not the same" in str(report)


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_does_not_hide_a_rule_that_is_wrong_by_little(dtype: torch.dtype) -> None:
    class Louder(MixConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 1.05 * super().forward(x)

    describe_layer.register(Louder, lambda layer: list(layer.convs))
    model = made(nn.Sequential(Louder(8, (3, 5)))).to(dtype)
    assert not report_of(fuse_for_inference(model, backend="kernel")).fused


def test_on_the_meta_device_nothing_can_be_tried() -> None:
    with torch.device("meta"):
        model = mobilenet_v2((3, 5), num_classes=7, width_multiplier=0.35)
    fused = fuse_for_inference(model)
    assert "no numbers to try a change with" in str(report_of(fused))
    assert "BatchNorm2d" in kinds(fused)


def test_a_network_without_depthwise_layers_asks_for_no_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or a ResNet would compile it."""

    def ask(self: Any, call: Any) -> Any:
        raise AssertionError(f"{self.operation} was asked for {call}")

    monkeypatch.setattr("mixconv.fast.forms.Forms.reasons", ask)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    layers += [nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.BatchNorm2d(6)]  # too small for the kernel
    report = report_of(fuse_for_inference(randomize(nn.Sequential(*layers))))
    assert (len(report.fused), report.left) == (2, [])
    small = randomize(mobilenet_v2((3,), num_classes=7, width_multiplier=0.35))
    reasons = {piece.reason for piece in report_of(fuse_for_inference(small)).left}
    assert any("inverted_residual was asked" in reason for reason in reasons)


def test_reports_say_what_was_done() -> None:
    model = nn.Sequential(
        MixConvBlock(8, 8, (3, 5)), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    )
    text = str(report_of(fuse_for_inference(randomize(model), backend="kernel")))
    assert text.splitlines() == [
        "1 block and 1 layer fused, 1 left",
        "0: MixConvBlock -> FusedBlock",
        "1: Conv2d + BatchNorm2d -> Conv2d",
        "3: BatchNorm2d left: no layer that feeds it alone comes before it",
    ]
    text = str(report_of(fuse_for_inference(nn.Linear(3, 3))))
    assert text.startswith("0 blocks and 0 layers fused, 0 left\nnothing was fused. Layers and")


def test_single_image_and_autocast() -> None:
    layer = MixConv2d(20, (3, 5), stride=2).eval()
    fused, x = fuse_for_inference(layer, backend="kernel"), noise(20, 9, 9)
    with torch.no_grad():
        near(fused(x), layer(x))
    model = made(mixnet_s(num_classes=7, width_multiplier=0.5))
    for backend in BACKENDS:
        fused, x = fuse_for_inference(model, backend=backend), noise(1, 3, 64, 64)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            ours = fused(x).float()
        with torch.no_grad():
            near(ours, model(x), 0.1)


def test_fused_under_autocast_and_other_defaults() -> None:
    model, x = made(MODELS["block"]()), noise(2, 20, 9, 9)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fused = fuse_for_inference(model, backend="kernel")
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(fused, FusedBlock)
    with torch.no_grad():
        near(fused(x), model(x))


def test_copies_and_saves() -> None:
    model = made(mixnet_s(num_classes=7, width_multiplier=0.5))
    fused, x = fuse_for_inference(model), noise(1, 3, 64, 64)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    with torch.no_grad():
        for again in (
            torch.load(file, weights_only=False),
            copy.deepcopy(fused),
            pickle.loads(pickle.dumps(fused)),
            fuse_for_inference(fused),
        ):
            near(again(x), model(x))
            with pytest.raises(RuntimeError, match="fuse it again"):
                again.train()
            assert not any(module.training for module in again.modules())


def test_gradient_of_the_input() -> None:
    """Saliency maps and attacks differentiate a network that is not trained."""
    model = made(mixnet_s(num_classes=7, width_multiplier=0.5))
    results = []
    for net in (model, *(fuse_for_inference(model, backend=b) for b in ("kernel", "merged"))):
        leaf = noise(1, 3, 64, 64).requires_grad_()
        (1000 * net(leaf)[0, 0]).backward()
        assert leaf.grad is not None
        results.append(leaf.grad)
    near(results[1], results[0])
    near(results[2], results[0])


@pytest.mark.parametrize("backend", ["kernel", "merged"])
def test_export_with_free_sizes(backend: str) -> None:
    model = made(MixConvBlock(20, 20, (3, 5), 2, activation="swish", padding="same"))
    fused = fuse_for_inference(model, backend=backend)
    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(fused, (noise(2, 20, 16, 16),), dynamic_shapes=(free,))
    assert ("inverted_residual" in str(program.graph)) == (backend == "kernel")
    with torch.no_grad():
        for shape in ((2, 20, 16, 16), (3, 20, 11, 22)):
            near(program.module()(noise(*shape)), model(noise(*shape)))


@pytest.mark.parametrize("backend", ["kernel", "merged"])
def test_compile_takes_it_whole(backend: str) -> None:
    layers = (MODELS["block"](), MixConv2d(20, (3, 5)), nn.BatchNorm2d(20), nn.SiLU())
    model, x = made(nn.Sequential(*layers)), noise(2, 20, 15, 16)
    fused = fuse_for_inference(model, backend=backend)
    with torch.no_grad():
        near(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), model(x))


def test_a_tensor_that_a_hook_took_is_not_changed_afterwards() -> None:
    """Activations are done in place where nobody can look between."""
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    fused: Any = fuse_for_inference(randomize(model))
    seen: list[tuple[Tensor, Tensor]] = []
    for part in fused:
        part.register_forward_hook(lambda m, i, o: seen.append((o, o.clone())))
    fused(noise(1, 6, 9, 9))
    assert len(seen) == 3
    assert all(torch.equal(now, then) for now, then in seen)


# Threads


def test_other_threads_go_on_while_a_model_is_fused() -> None:
    reached, gone_on = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        """Is traced until the other thread has called its model."""

        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

        def forward(self, x: Tensor) -> Tensor:
            reached.set()
            gone_on.wait(30)
            result: Tensor = self.row(x)
            return result

    model, x, found = made(MODELS["block"]()), noise(1, 20, 9, 9), list[Any]()

    def call() -> None:
        reached.wait(30)
        try:
            found.append(model(x))
        except BaseException as error:
            found.append(error)
        gone_on.set()

    worker = threading.Thread(target=call)
    worker.start()
    fused = fuse_for_inference(randomize(Waiting()))
    worker.join()
    assert "BatchNorm2d" not in kinds(fused)
    assert torch.equal(found[0], model(x))


def test_three_threads_fuse_at_once() -> None:
    class Slow(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            time.sleep(0.1)  # in which another thread would begin to trace
            result: Tensor = super().forward(input)
            return result

    model = randomize(Slow(MixConvBlock(8, 8, (3, 5)), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    done: list[nn.Module] = []
    work = lambda: done.append(fuse_for_inference(model, backend="kernel"))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["BatchNorm2d" in kinds(fused) for fused in done] == [False] * 3


# Rules of one's own


class Split(nn.Module):
    """MixConv as people write it: a list, split, concatenate."""

    def __init__(self, channels: int, kernel_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.part = channels // len(kernel_sizes)
        c = self.part
        convs = (nn.Conv2d(c, c, k, 1, k // 2, groups=c) for k in kernel_sizes)
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.convs, x.split(self.part, 1), strict=True)
        return torch.cat([conv(part) for conv, part in parts], 1)


def test_a_layer_of_ones_own_is_fused_once_it_has_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(nn.Sequential(Split(8, (3, 5)), nn.BatchNorm2d(8), nn.ReLU()))
    before: Any = fuse_for_inference(model, backend="kernel")
    assert type(before[0]) is Split
    assert "1: BatchNorm2d left: no layer that feeds it alone" in str(report_of(before))
    describe_layer.register(Split, lambda layer: list(layer.convs))
    after: Any = fuse_for_inference(model, backend="kernel")
    assert [type(part) for part in after] == [FusedMixConv2d, FoldedNorm, nn.Identity]
    with torch.no_grad():
        near(after(noise(1, 8, 9, 9)), model(noise(1, 8, 9, 9)))


def test_a_rule_that_is_wrong_changes_nothing() -> None:
    class Backwards(Split):
        pass

    describe_layer.register(Backwards, lambda layer: list(layer.convs)[::-1])
    model = randomize(nn.Sequential(Backwards(8, (3, 5)), nn.BatchNorm2d(8)))
    stays(model, noise(1, 8, 9, 9), "0: Backwards + BatchNorm2d left: tried, and not the same")


def test_chains_of_a_model() -> None:
    chains = Chains(randomize(Odd()).eval())
    assert chains.found == [["mix"]]
    assert set(chains.left) == {"shared.0", "shared.1"}
    assert chains.closed == []
    assert FORMS.operation == "mixed_depthwise2d"
    assert fuse.BACKENDS == ("auto", "kernel", "merged")


@pytest.mark.parametrize("backend", ["auto", "merged"])
def test_what_is_fused_is_counted(backend):
    """By our counter and by PyTorch's; today's convolutions have a bias where norms were."""
    model = mixnet_s().eval()
    fast, x = fuse_for_inference(model, backend=backend), torch.zeros(2, 3, 64, 96)
    wanted = sum(cost.multiply_adds for cost in count_costs(model, x))
    if backend == "merged":  # zeros around kernels are multiplied, too
        assert sum(cost.multiply_adds for cost in count_costs(fast, x)) > wanted
        return
    costs = count_costs(fast, x)
    assert sum(cost.multiply_adds for cost in costs) == wanted
    assert {cost.kind for cost in costs} == {"convolution", "depthwise", "pointwise", "linear"}
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    biases = sum(cost.output_shape[1] for cost in costs)
    assert sum(cost.parameters for cost in costs) == weights + biases
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fast(x)
    assert counter.get_total_flops() == 2 * wanted
