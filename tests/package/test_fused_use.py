"""What people do with a fused copy: look at maps, switch modes, export, script."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixconv import MixConv2d, MixConvBlock, fuse_for_inference, mixnet_s, mobilenet_v2
from mixconv.fast.describe import describe_layer
from mixconv.fast.fuse import BACKENDS
from mixconv.fast.report import find_rule
from tests.package.common import noise, randomize


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 0.01
    assert float((actual - expected).abs().max()) <= tolerance * scale


def made(model: nn.Module) -> Any:
    return randomize(model).eval()


# Memory formats

ROWS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.Sequential(MixConv2d(8, (3, 5)), nn.BatchNorm2d(8), nn.ReLU()),
    "plain": lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.SiLU()),
    "pointwise": lambda: nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6()),
    "5×5": lambda: nn.Sequential(nn.Conv2d(8, 8, 5, 2, 2, groups=8), nn.BatchNorm2d(8)),
    "same": lambda: nn.Sequential(MixConv2d(8, (1, 3), 2, padding="same"), nn.BatchNorm2d(8)),
    "grouped": lambda: MixConvBlock(8, 16, (3, 5), expand_groups=2, project_groups=2),
    "block": lambda: nn.Sequential(
        MixConvBlock(8, 16, (3, 5), 2, squeeze_ratio=0.5), MixConvBlock(16, 16, (3,))
    ),
}


def laid_out(x: Tensor) -> str:
    """The one of the two layouts in which a map lies."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    assert last != x.is_contiguous(), "in neither, or both"
    return "channels_last" if last else "contiguous"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(ROWS))
@torch.no_grad()
def test_maps_lie_as_the_image_does_if_asked(name: str, backend: str) -> None:
    model, x = made(ROWS[name]()), noise(2, 8, 9, 12)
    fused: Any = fuse_for_inference(model, backend=backend, memory_format=torch.preserve_format)
    assert fused.fusion_report.fused
    views = x, x.to(memory_format=torch.channels_last), noise(2, 16, 9, 12)[:, 3:11]
    for image in (*views, noise(2, 16, 9, 12).to(memory_format=torch.channels_last)[:, 3:11]):
        y, wanted = fused(image), model(image)
        near(y, wanted)
        assert laid_out(y) == laid_out(wanted)
        if name != "block":  # whose gate wants a batch
            near(fused(image[0]), wanted[0])
    near(fused(x).view(2, -1), model(x).view(2, -1))


@pytest.mark.parametrize("name", ["layer", "block"])
@torch.no_grad()
def test_maps_are_in_channels_last_unless_asked(name: str) -> None:
    fused = fuse_for_inference(made(ROWS[name]()), backend="kernel")
    assert laid_out(fused(noise(2, 8, 9, 12))) == "channels_last"


class Viewing(nn.Module):
    """Views a map in the middle, as detectors' heads and old classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.block, self.mix = MixConvBlock(8, 8, (3, 5)), MixConv2d(8, (3, 5), bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mix(self.block(self.stem(x)))
        return y.view(y.shape[0], -1)


def test_a_model_that_views_its_maps_is_fused_whole_if_asked() -> None:
    model, x = made(Viewing()), noise(1, 3, 20, 20)
    fused = fuse_for_inference(model, backend="kernel", memory_format=torch.preserve_format)
    assert "1 block and 2 layers fused, 0 left" in str(fused.fusion_report)
    left = fuse_for_inference(model, backend="kernel")
    assert "memory_format=torch.preserve_format" in str(left.fusion_report)
    with torch.no_grad():
        for network in (fused, left):
            near(network(x), model(x))


@torch.no_grad()
def test_the_format_survives_copies_files_traces_and_compilers() -> None:
    model = made(nn.Sequential(ROWS["block"](), MixConv2d(16, (3, 5))))
    fused: Any = fuse_for_inference(model, backend="kernel", memory_format=torch.preserve_format)
    file, x = io.BytesIO(), noise(2, 8, 9, 12)
    torch.save(fused, file)
    file.seek(0)
    others = (
        copy.deepcopy(fused), torch.load(file, weights_only=False), torch.fx.symbolic_trace(fused),
        torch.export.export(fused, (x,)).module(), torch.compile(fused, backend="aot_eager"),
    )  # fmt: skip
    for other in others:
        near(other(x), model(x))
        assert laid_out(other(x)) == "contiguous"


@pytest.mark.parametrize("wrong", ["preserve", None, torch.contiguous_format])
def test_other_formats_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"memory_format must be torch.channels_last or .*, got"):
        fuse_for_inference(MixConv2d(8, (3, 5)), memory_format=wrong)


# Training


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("backend", ["kernel", "merged"])
def test_no_part_of_a_fused_model_trains(backend: str) -> None:
    """A part that holds something fused refuses, and is in evaluation afterwards."""
    for model in (mixnet_s(num_classes=3, width_multiplier=0.5), mobilenet_v2((3, 5))):
        fused = fuse_for_inference(made(model), backend=backend)
        holding = [name for name, part in fused.named_children() if name != "classifier"]
        assert holding == ["stem", "blocks", "head"]
        names = [*holding, "blocks.0", "blocks.3"]
        for network in (fused, copy.deepcopy(fused)):
            for name in names:
                with pytest.raises(RuntimeError, match="fused for inference"):
                    network.get_submodule(name).train()
                assert not any(modes(network)), name
            assert not any(modes(network.eval()))


def test_dropout_beside_a_fused_part_is_off_after_the_refusal() -> None:
    part = nn.Sequential(nn.Dropout(), MixConv2d(8, (3, 5)), nn.BatchNorm2d(8), nn.Dropout())
    fused: Any = fuse_for_inference(made(nn.Sequential(part, nn.Dropout())), backend="kernel")
    with pytest.raises(RuntimeError, match="fused for inference"):
        fused[0].train()
    assert not any(modes(fused))
    wrapper = nn.Sequential(nn.Dropout(), fused).eval()
    with pytest.raises(RuntimeError, match=r"call \.eval\(\) on it"):
        wrapper.train()
    assert not any(modes(fused))
    assert not any(modes(wrapper.eval()))


# Scripts and exporters


@pytest.mark.parametrize(
    "model",
    [
        MixConv2d(8, (3, 5)), MixConvBlock(8, 8, (3, 5)), mixnet_s(), mobilenet_v2((3,)),
        nn.Sequential(MixConv2d(8, (3, 5), 2, padding="same").convs[0]),
        fuse_for_inference(MixConv2d(8, (3, 5)).eval(), backend="kernel"),
        fuse_for_inference(MixConvBlock(8, 8, (3, 5)).eval(), backend="kernel"),
    ],
    ids=lambda model: type(model).__name__,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripting_is_refused_in_one_line(model: nn.Module) -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.export\.export") as caught:
        torch.jit.script(nn.Sequential(model.eval()))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_of_the_kernel_says_who_can_run_it() -> None:
    x, model = noise(1, 8, 9, 9), made(MixConv2d(8, (3, 5)))
    for backend in ("kernel", "merged"):
        fused = fuse_for_inference(model, backend=backend)
        if backend == "kernel":
            with pytest.warns(UserWarning, match=r'OpenVINO.*backend="merged"'):
                traced = torch.jit.trace(fused, (x,))
        else:
            traced = torch.jit.trace(fused, (x,))
        near(traced(x), model(x))


# What others write


class Split(nn.Module):
    """MixConv as many ports have it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [4, 6]
        self.branches = nn.ModuleList(
            nn.Conv2d(count, count, k, padding=k // 2, groups=count)
            for count, k in zip(self.sizes, (3, 7), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.sizes, 1)
        return torch.cat([branch(parts[i]) for i, branch in enumerate(self.branches)], 1)


def test_the_report_says_what_to_tell_of_somebodys_own_mixconv() -> None:
    model, x = made(nn.Sequential(Split(), nn.BatchNorm2d(10), nn.ReLU())), noise(2, 10, 9, 9)
    rule = "describe_layer.register(Split, lambda mix: list(mix.branches))"
    line = f"0: Split left: Split is not a class that is known. If it is a MixConv: {rule}"
    assert line in str(fuse_for_inference(model, backend="kernel").fusion_report).splitlines()
    exec(rule, {"describe_layer": describe_layer, "Split": Split})
    fused: Any = fuse_for_inference(model, backend="kernel")
    assert "1 layer fused, 0 left" in str(fused.fusion_report)
    with torch.no_grad():
        near(fused(x), model(x))
    chain = nn.Sequential(*[nn.Conv2d(8, 8, k, 1, k // 2, groups=8) for k in (3, 7)])
    for other in (chain, nn.ModuleList(chain), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()):
        assert find_rule(other) == ""


SHARED = nn.SiLU()


class ByClass(nn.Module):
    """A convolution, a norm, and one activation for all: YOLO's `Conv`."""

    act = SHARED

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class ByName(ByClass):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = SHARED(self.bn(self.conv(x)))
        return y


@pytest.mark.parametrize("backend", ["kernel", "merged"])
@pytest.mark.parametrize("kind", [ByClass, ByName])
def test_an_activation_outside_the_model_keeps_no_norm(kind: type[nn.Module], backend: str) -> None:
    model, x = made(nn.Sequential(kind(), kind())), noise(1, 6, 9, 9)
    fused: Any = fuse_for_inference(model, backend=backend)
    assert "2 layers fused, 0 left" in str(fused.fusion_report)
    with torch.no_grad():
        near(fused(x), model(x))


# Hooks


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU])
@torch.no_grad()
def test_hooks_inside_a_fused_layer_keep_what_they_saw(act: type[nn.Module]) -> None:
    model, x = made(nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), act())), noise(1, 6, 9, 9)
    fused: Any = fuse_for_inference(model)
    conv, activation = fused[0]
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, given: Any, *made: Tensor) -> None:
        seen.extend((tensor, tensor.clone()) for tensor in (*given, *made))

    places: list[tuple[Callable[..., Any], int]] = [
        (conv.register_forward_hook, 2), (activation.register_forward_hook, 2),
        (activation.register_forward_pre_hook, 1),
        (nn.modules.module.register_module_forward_hook, 2),
    ]  # fmt: skip
    for register, count in places:
        seen.clear()
        handle = register(keep)
        near(fused(x), model(x))
        handle.remove()
        assert len(seen) >= count
        assert all(torch.equal(now, then) for now, then in seen)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_merged_copy_of_ordinary_layers_is_scripted() -> None:
    model = made(nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    scripted = torch.jit.script(fuse_for_inference(model, backend="merged"))
    near(scripted(noise(1, 6, 9, 9)), model(noise(1, 6, 9, 9)))
