"""The operation and models fused for inference: values, gradients, tracing, threads, bad input."""

import copy
import io
import logging
import os
import random
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixconv.fast as fast
from mixconv import (
    MixConv2d,
    MixConvBlock,
    fuse_for_inference,
    mixed_depthwise2d,
    mixnet_s,
    mobilenet_v1,
    mobilenet_v2,
)
from mixconv.fast import Mix
from tests.package.common import randomize, same_state, snapshot

needs_kernel = pytest.mark.skipif(fast.load_kernel() is None, reason="no C++ compiler")
ACTIVATE = {"none": lambda y: y, "relu": F.relu, "silu": F.silu, "relu6": F.relu6}


def reference(x: Tensor, weights: list[Tensor], bias: Tensor | None, mix: Mix) -> Tensor:
    """Written apart from the package: explicit zeros, one F.conv2d a group, in float64."""
    outputs, start = [], 0
    for weight, dilation in zip(weights, mix.dilations, strict=True):
        c, reach = weight.shape[0], (weight.shape[-1] - 1) * dilation + 1
        part, start = x[:, start : start + c].double(), start + c
        sides = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // mix.stride) - 1) * mix.stride + reach - size, 0)
            same = mix.padding == "same"
            sides += [total // 2, total - total // 2] if same else [reach // 2, reach // 2]
        padded = F.pad(part, sides)
        outputs.append(F.conv2d(padded, weight.double(), None, mix.stride, 0, dilation, c))
    y = torch.cat(outputs, 1)
    y = y if bias is None else y + bias.double().view(-1, 1, 1)
    result: Tensor = ACTIVATE[mix.activation](y)
    return result


Case = tuple[Tensor, list[Tensor], Tensor | None, Mix]


def make_case(rng: random.Random, dtype: torch.dtype = torch.float32) -> Case:
    count = rng.randint(1, 5)
    kernels = tuple(rng.choice((1, 3, 3, 5, 7, 9, 11, 13)) for _ in range(count))
    channels = tuple(rng.randint(1, 70 // count) for _ in range(count))
    dilations = tuple(rng.choice((1, 1, 1, 2, 3)) if k == 3 else 1 for k in kernels)
    mix = Mix(
        channels, kernels, rng.choice((1, 1, 2, 2, 3)), dilations,
        rng.choice(("symmetric", "same")), rng.choice(fast.ACTIVATIONS),
    )  # fmt: skip
    shape = [rng.choice((rng.randint(1, 6), rng.randint(7, 40))) for _ in range(2)]
    x = torch.randn(rng.choice((0, 1, 1, 2, 3)), sum(channels), *shape, dtype=dtype)
    if rng.random() < 0.8:
        x = x.to(memory_format=torch.channels_last)
    pairs = zip(channels, kernels, strict=True)
    weights = [torch.randn(c, 1, k, k, dtype=dtype) / k for c, k in pairs]
    return x, weights, torch.randn(sum(channels), dtype=dtype) if rng.random() < 0.5 else None, mix


def compute(x: Tensor, weights: list[Tensor], bias: Tensor | None, mix: Mix) -> Tensor:
    return mixed_depthwise2d(x, fast.pack_weights(weights), bias, **mix._asdict())


def agrees(case: Case, tolerance: float = 2e-5) -> None:
    y = compute(*case)
    wanted = reference(*case)
    torch.testing.assert_close(
        y.double(), wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case[3]}\n{text}"
    )
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "load_kernel", lambda: None)


# Values


@pytest.mark.parametrize("block", range(4))
def test_random_shapes(block: int) -> None:
    rng = random.Random(block)
    for _ in range(40):
        agrees(make_case(rng))


@pytest.mark.usefixtures("without_kernel")
def test_random_shapes_without_the_kernel() -> None:
    rng = random.Random(9)
    for _ in range(40):
        agrees(make_case(rng))


def test_merged_form_is_right_for_any_padding_and_dilation() -> None:
    rng = random.Random(3)
    for _ in range(60):
        x, weights, bias, mix = make_case(rng, torch.float64)
        y = fast.merged_form(x, fast.pack_weights(weights), bias, mix)
        torch.testing.assert_close(y, reference(x, weights, bias, mix))


def test_every_channel_count() -> None:
    for count in range(1, 50):
        channels = (count,) if count < 3 else (count // 3, count - count // 3)
        kernels = (3, 5)[: len(channels)]
        mix = Mix(channels, kernels, 1 + count % 2, (1,) * len(channels), "same", "none")
        weights = [torch.randn(c, 1, k, k) for c, k in zip(channels, kernels, strict=True)]
        agrees((torch.randn(1, count, 9, 10), weights, torch.randn(count), mix), 1e-4)


def test_input_in_any_layout() -> None:
    mix = Mix((10, 9), (3, 5), 1, (1, 1), "symmetric", "none")
    weights = [torch.randn(10, 1, 3, 3), torch.randn(9, 1, 5, 5)]
    base = torch.randn(2, 40, 24, 26)
    views = (base[:, 3:41:2][:, :19, 2:20, ::2], base.transpose(2, 3)[:, :19], base[:1, :19])
    for x in (*views, views[2].expand(4, -1, -1, -1)):
        agrees((x, weights, None, mix), 1e-4)


@needs_kernel
def test_a_nan_stays_in_its_channel_and_window() -> None:
    x, weight = torch.ones(2, 37, 9, 9), torch.ones(20 * 9 + 17 * 25)
    x[0, 19, 4, 4] = torch.nan
    for activation in fast.ACTIVATIONS:
        y = mixed_depthwise2d(
            x, weight, channels=(20, 17), kernel_sizes=(3, 5), activation=activation
        )
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[0, 19, 3:6, 3:6] = True
        assert torch.equal(y.isnan(), expected)


@needs_kernel
def test_silu_is_accurate() -> None:
    x = torch.linspace(-60, 60, 40001).view(1, 1, 1, -1)
    y = mixed_depthwise2d(x, torch.ones(1), channels=(1,), kernel_sizes=(1,), activation="silu")
    wanted = F.silu(x.double())
    assert ((y - wanted).abs() / wanted.abs().clamp_min(1e-30)).max().item() < 1e-6


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    x, weight = torch.randn(1, 20, 8, 8), torch.randn(20 * 9) / 3
    wanted = mixed_depthwise2d(x, weight, channels=(20,), kernel_sizes=(3,))
    y = mixed_depthwise2d(x.to(dtype), weight.to(dtype), channels=(20,), kernel_sizes=(3,))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.float(), wanted, rtol=tolerance, atol=tolerance)


# Threads and processes


def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, weight = torch.randn(2, 105, 30, 31), torch.randn(105 * 25)
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(mixed_depthwise2d(x, weight, channels=(105,), kernel_sizes=(5,)))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


def test_many_python_threads() -> None:
    rng = random.Random(5)
    cases = [make_case(rng) for _ in range(12)]
    expected, wrong = [compute(*case) for case in cases], []

    def work(offset: int) -> None:
        for i in range(len(cases)):
            at = (i + offset) % len(cases)
            if not torch.equal(compute(*cases[at]), expected[at]):
                wrong.append(at)

    workers = [threading.Thread(target=work, args=(5 * i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_answers() -> None:
    code = """
import os, signal, torch
from mixconv import mixed_depthwise2d
torch.set_num_threads(2)
x = torch.randn(4, 64, 28, 28).to(memory_format=torch.channels_last)
w = torch.randn(64 * 25)
def run():
    y = mixed_depthwise2d(x, w, channels=(64,), kernel_sizes=(5,))
    return y.permute(0, 2, 3, 1).numpy().tobytes()
before = run()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if run() == before else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert run() == before
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


# Gradients and tracers


@pytest.mark.parametrize("activation", fast.ACTIVATIONS)
@pytest.mark.parametrize(("stride", "padding", "size"), [(1, "symmetric", 5), (2, "same", 6)])
def test_gradients(activation: str, stride: int, padding: str, size: int) -> None:
    mix = Mix((3, 2, 2), (3, 5, 1), stride, (2, 1, 1), padding, activation)
    shapes = [(2, 7, size, size + 1), (7,), (3, 1, 3, 3), (2, 1, 5, 5), (2, 1, 1, 1)]
    inputs = [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in shapes]

    def operation(x: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
        return compute(x, list(weights), bias, mix)

    assert torch.autograd.gradcheck(operation, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", fast.ACTIVATIONS)
def test_gradients_of_the_kernel_itself(activation: str) -> None:
    """In float32 the forward is the compiled kernel: its gradients are those of the split form."""
    mix = Mix((20, 17), (3, 7), 2, (1, 1), "same", activation)
    start = [torch.randn(2, 37, 14, 14), torch.randn(20 * 9 + 17 * 49) / 5, torch.randn(37)]
    results = []
    for split in (True, False):
        x, w, b = leaves = [tensor.clone().requires_grad_() for tensor in start]
        y = fast.split_form(x, w, b, mix) if split else mixed_depthwise2d(x, w, b, **mix._asdict())
        ramp = torch.linspace(-1, 1, y.numel()).view(y.shape)
        results.append([y, *torch.autograd.grad(y, leaves, ramp)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    x, w, b = torch.randn(2, 7, 6, 5), torch.randn(4 * 9 + 3 * 25), torch.randn(7)
    inputs = [tensor.requires_grad_() for tensor in (x, w, b)]
    operation = torch.ops.mixconv.mixed_depthwise2d.default
    torch.library.opcheck(operation, (*inputs, [4, 3], [3, 5], 2, [1, 1], "same", "silu"))


def test_function_transforms() -> None:
    w = torch.randn(4 * 9)

    def f(x: Tensor) -> Tensor:
        return mixed_depthwise2d(x, w, channels=(4,), kernel_sizes=(3,)).sum()

    x = torch.randn(1, 4, 5, 5)
    leaf = x.clone().requires_grad_()
    f(leaf).backward()
    torch.testing.assert_close(torch.func.grad(f)(x), leaf.grad)
    batch = torch.randn(3, 1, 4, 5, 5)
    torch.testing.assert_close(torch.vmap(f)(batch), torch.stack([f(one) for one in batch]))


BAD: list[dict[str, Any]] = [
    {"channels": (5,)}, {"kernel_sizes": (5,)}, {"kernel_sizes": (2,)}, {"channels": (2, 2)},
    {"stride": 0}, {"padding": "valid"}, {"activation": "gelu"}, {"dilations": (0,)},
    {"channels": (0, 4), "kernel_sizes": (3, 3)}, {"x": torch.randn(4, 5, 5)},
    {"weight": torch.randn(36).double()}, {"bias": torch.ones(3)}, {"weight": torch.ones(1, 36)},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD, ids=lambda change: "-".join(change))
def test_bad_input_is_refused(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "x": torch.randn(1, 4, 5, 5), "weight": torch.randn(36), "channels": (4,),
        "kernel_sizes": (3,),
    }  # fmt: skip
    mixed_depthwise2d(**good)
    with pytest.raises(ValueError, match=r"must|need"):
        mixed_depthwise2d(**{**good, **change})


# Compiling


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A process that has compiled nothing yet, with an empty cache."""
    monkeypatch.setattr(fast, "_libraries", fast._Libraries())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fast.load_kernel.cache_clear()
    yield tmp_path
    fast.load_kernel.cache_clear()


def test_without_a_compiler_one_line_is_logged_and_results_are_right(
    fresh: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(fresh / "no-such-compiler"))
    with caplog.at_level(logging.INFO, logger="mixconv"):
        for _ in range(2):
            agrees(make_case(random.Random(1)))
        fused = fuse_for_inference(MixConv2d(8, (3, 5)))
    assert isinstance(fused, nn.Conv2d)
    assert ["merged form" in record.message for record in caplog.records] == [True]


STUB = 'extern "C" int answer() { return 42; }\n'


@needs_kernel
def test_cache_is_used_and_a_damaged_file_mended(
    fresh: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = fresh / "source"
    source.mkdir()
    (source / "stub.cpp").write_text(STUB)
    monkeypatch.setattr(fast, "files", lambda _: source)

    def load() -> Any:
        monkeypatch.setattr(fast, "_libraries", fast._Libraries())
        return fast.load_library("stub.cpp")

    with caplog.at_level(logging.INFO, logger="mixconv"):
        first = load()
        assert first is not None
        assert first.answer() == 42
        assert load() is not None
        assert len(caplog.records) == 1  # compiled once, said once
        (built,) = (fresh / "mixconv").iterdir()
        other = fresh / "other" / "mixconv"  # another folder: the loader knows files by path
        other.mkdir(parents=True)
        (other / built.name).write_bytes(b"not a library")
        monkeypatch.setenv("XDG_CACHE_HOME", str(other.parent))
        mended = load()
        assert mended is not None
        assert mended.answer() == 42
        (source / "stub.cpp").write_text(STUB.replace("42", "43"))
        changed = load()
        assert changed is not None
        assert changed.answer() == 43


# Fused models


def near(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    assert scale > 0.01
    assert float((actual - expected).abs().max()) <= 1e-4 * scale


MODELS: dict[str, Any] = {
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


@pytest.mark.parametrize("backend", fast.BACKENDS)
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
            x = torch.randn(2, channels, *size)
            near(fused(x), model(x))
            near(fused(x.to(memory_format=torch.channels_last)), model(x))


@pytest.mark.parametrize("name", ["mixnet", "mobilenet v1", "mobilenet v2", "plain 5×5"])
def test_norms_are_gone_and_blocks_are_one_operation(name: str) -> None:
    model = MODELS[name]()
    blocks = len(model.blocks)
    for backend in ("kernel", "merged"):
        fused = fuse_for_inference(model, backend=backend)
        kinds = [type(m).__name__ for m in fused.modules()]
        assert "BatchNorm2d" not in kinds
        assert "MixConv2d" not in kinds
        assert kinds.count("FusedBlock") == (blocks if backend == "kernel" else 0)


def test_a_mixed_layer_outside_a_block_is_one_operation() -> None:
    layers = (MixConv2d(8, (3, 5)), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 3))
    fused = fuse_for_inference(nn.Sequential(*layers), backend="kernel")
    kinds = [type(m).__name__ for m in fused]  # type: ignore[attr-defined]
    assert kinds == ["FusedMixConv2d", "FoldedNorm", "Identity", "Conv2d"]


def test_methods_of_the_model_still_work() -> None:
    model = randomize(mixnet_s(num_classes=7, width_multiplier=0.5)).eval()
    fused, x = fuse_for_inference(model), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = zip(fused.features(x), model.features(x), strict=True)  # type: ignore[operator]
        for ours, wanted in maps:
            near(ours, wanted)


def test_training_is_refused() -> None:
    for model in (MixConv2d(8, (3, 5)), mixnet_s(num_classes=0, width_multiplier=0.5)):
        fused = fuse_for_inference(model, backend="kernel")
        assert fused.eval() is fused
        with pytest.raises(RuntimeError, match="Train the model you gave"):
            fused.train()
    fused = fuse_for_inference(mixnet_s(num_classes=0, width_multiplier=0.5), backend="merged")
    with pytest.raises(RuntimeError, match="fuse it again"):
        fused.train()


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"auto, kernel, merged.*'fastest'"):
        fuse_for_inference(MixConv2d(8, (3, 5)), backend="fastest")


class Odd(nn.Module):
    """What must be left alone: a shared layer, a norm that two read, a hook, a loop on values."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = MixConv2d(6, (3, 5))
        self.norm = nn.BatchNorm2d(6)
        self.shared = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.seen = nn.Sequential(MixConv2d(6, (3, 5)), nn.BatchNorm2d(6))
        self.seen[0].register_forward_hook(lambda module, inputs, output: output + 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x)
        y = y + self.norm(y)
        result: Tensor = self.seen(self.shared(self.shared(y)))
        return result


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(MixConv2d(6, (3, 5)), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        while float(x.abs().sum()) < 100:
            x = x * 2
        result: Tensor = self.inner(x)
        return result


@pytest.mark.parametrize("kind", [Odd, Looping])
def test_unusual_models(kind: Any) -> None:
    model = randomize(kind()).eval()
    x = torch.randn(2, 6, 9, 9)
    with torch.no_grad():
        fused = fuse_for_inference(model)
        near(fused(x), model(x))
    if kind is Odd:
        assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == 3


def test_single_image_and_autocast() -> None:
    layer = MixConv2d(20, (3, 5), stride=2).eval()
    fused, x = fuse_for_inference(layer), torch.randn(20, 9, 9)
    with torch.no_grad():
        near(fused(x), layer(x))
    model = randomize(mixnet_s(num_classes=7, width_multiplier=0.5)).eval()
    fused, x = fuse_for_inference(model), torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(x).isfinite().all()


def test_copies_and_saves() -> None:
    model = randomize(mixnet_s(num_classes=7, width_multiplier=0.5)).eval()
    fused, x = fuse_for_inference(model), torch.randn(1, 3, 64, 64)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(x), fused(x))
        assert torch.equal(copy.deepcopy(fused)(x), fused(x))
        near(fuse_for_inference(fused)(x), model(x))


def test_gradient_of_the_input() -> None:
    """Saliency maps and attacks differentiate a network that is not trained."""
    model = randomize(mixnet_s(num_classes=7, width_multiplier=0.5)).eval()
    x = torch.randn(1, 3, 64, 64)
    results = []
    for net in (model, fuse_for_inference(model)):
        leaf = x.clone().requires_grad_()
        (1000 * net(leaf)[0, 0]).backward()
        assert leaf.grad is not None
        results.append(leaf.grad)
    near(results[1], results[0])


@pytest.mark.parametrize("backend", ["kernel", "merged"])
def test_export_with_free_sizes(backend: str) -> None:
    model = randomize(MixConvBlock(20, 20, (3, 5), 2, activation="swish", padding="same")).eval()
    fused = fuse_for_inference(model, backend=backend)
    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    example = torch.randn(2, 20, 16, 16)
    program = torch.export.export(fused, (example,), dynamic_shapes=(free,))
    assert ("inverted_residual" in str(program.graph)) == (backend == "kernel")
    with torch.no_grad():
        for shape in ((2, 20, 16, 16), (3, 20, 11, 22)):
            x = torch.randn(*shape)
            near(program.module()(x), model(x))


def test_compile_takes_the_operation() -> None:
    model = randomize(MixConvBlock(20, 20, (3, 5), activation="swish")).eval()
    fused = fuse_for_inference(model, backend="kernel")
    x = torch.randn(2, 20, 15, 16)
    with torch.no_grad():
        near(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), model(x))
