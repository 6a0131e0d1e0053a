"""`make bench`: how fast, against whom, on which machine. Writes `figures/bench.json`.

Contenders of one comparison take turns, round after round: whatever else the machine does hits all
of them. The figure kept is the shortest time, that of the machine least disturbed. A peer that is
not installed is a line in "missing", not an error.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixconv import MixConv2d, mixnet_l, mixnet_m, mixnet_s, mobilenet_v2
from mixconv.efficientnet_lite import efficientnet_lite0, find_weights
from mixconv.fast import fuse
from mixconv.fast.forms import Call
from mixconv.fast.fuse import fuse_for_inference
from mixconv.fast.kernel import load_kernel
from mixconv.fast.native import load_library
from mixconv.fast.operation import FORMS, mixed_depthwise2d
from mixconv.fast.spec import MixSpec, pack_weights

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[[], Any]
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "MixNet-S": mixnet_s,
    "MixNet-M": mixnet_m,
    "MixNet-L": mixnet_l,
    "MobileNetV2-357": lambda **options: mobilenet_v2((3, 5, 7), **options),
}
TIMM_NAMES = {"MixNet-S": "mixnet_s", "MixNet-M": "mixnet_m", "MixNet-L": "mixnet_l"}
PEERS = ("timm", "geffnet", "pytorchcv", "onnxruntime", "openvino")

missing: dict[str, str] = {}


def optional(name: str) -> Any:
    """A peer, or None and a line in the report."""
    try:
        if name == "timm":
            mend_torchvision()
        return importlib.import_module(name)
    except Exception as error:  # a broken peer is as good as a missing one
        missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return None


def mend_torchvision() -> None:
    """Declare what torchvision looks up where its own build does not load; timm imports it."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEEP.append(library)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported


KEEP: list[Any] = []


def progress(done: int, total: int, text: str) -> None:
    if sys.stderr.isatty():
        bar = "#" * (24 * done // total)
        print(f"\r[{bar:24}] {text:60.60}", end="", file=sys.stderr, flush=True)
    else:
        print(f"{done}/{total} {text}", file=sys.stderr, flush=True)


def once(run: Run, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - started) / repeats


def take_turns(
    runs: dict[str, Run], rounds: int, least: float = 0.01, budget: float = 2.5
) -> dict[str, float]:
    """The shortest time of each contender, in seconds.

    A contender runs for at least `least` seconds a round. Rounds end early, after three, when
    `budget` seconds are spent.
    """
    repeats = {name: max(1, min(100, int(least / once(run, 1)))) for name, run in runs.items()}
    times = dict.fromkeys(runs, float("inf"))
    started = time.perf_counter()
    for done in range(rounds):
        for name, run in runs.items():
            run()  # the contender before has left its own data in the caches, its threads awake
            times[name] = min(times[name], once(run, repeats[name]))
        if done >= 2 and time.perf_counter() - started > budget:
            break
    return times


# The machine


def compiler() -> str:
    """The C++ compiler that the kernel is most likely made with."""
    found = (shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"))
    return next((path for path in found if path), "c++")


def peak_multiply_adds(threads: int) -> float:
    """Multiply-adds a second, all threads together, with nothing to load."""
    source = (ROOT / "tools" / "roofline.cpp").read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "roofline.so"
        flags = ("-march=native", "-pthread")
        command = [compiler(), *flags, "-std=c++17", "-O3", "-fPIC", "-shared", "-x", "c++", "-"]
        subprocess.run([*command, "-o", str(target)], input=source, text=True, check=True)
        run = ctypes.CDLL(str(target)).multiply_adds
        run.restype, run.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.c_int]
        best = 0.0
        for _ in range(12):
            started = time.perf_counter()
            best = max(best, run(4_000_000, threads) / (time.perf_counter() - started))
    return best


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy between arrays that no cache holds."""
    source = torch.randn(32 << 20)
    target = torch.empty_like(source)
    best = min(once(lambda: target.copy_(source), 1) for _ in range(12))
    return 2 * 4 * source.numel() / best


def describe_machine(threads: int) -> dict[str, Any]:
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    names = (line for line in told.splitlines() if line.startswith("model name"))
    cpu = next(names, platform.processor()).partition(":")[2].strip() or platform.machine()
    version = subprocess.check_output([compiler(), "--version"], text=True).splitlines()[0]
    return {
        "cpu": cpu,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "compiler": version,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "multiply_adds_per_second": peak_multiply_adds(threads),
        "copy_bytes_per_second": copy_bandwidth(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", *PEERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# Layers

Shape = tuple[int, tuple[int, ...], tuple[int, ...], int]  # size, channels, kernel sizes, stride


def depthwise_shapes() -> list[Shape]:
    """The distinct depthwise layers of the MixNets at 224×224."""
    found: dict[Shape, None] = {}

    def note(layer: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        convs: list[Any] = list(layer.convs) if isinstance(layer, MixConv2d) else [layer]
        if all(conv.groups == conv.in_channels > 1 for conv in convs):
            channels = tuple(conv.in_channels for conv in convs)
            sizes = tuple(conv.kernel_size[0] for conv in convs)
            found[inputs[0].shape[2], channels, sizes, convs[0].stride[0]] = None

    for make in (mixnet_s, mixnet_m, mixnet_l):
        net = make(num_classes=0).eval()
        inner = {c for m in net.modules() if isinstance(m, MixConv2d) for c in m.convs}
        for layer in net.modules():
            if isinstance(layer, MixConv2d | nn.Conv2d) and layer not in inner:
                layer.register_forward_hook(note)
        net(torch.zeros(1, 3, 224, 224))
    return sorted(found, key=lambda shape: (-shape[0], sum(shape[1]), shape[3]))


def peer_layer(peer: str, shape: Shape) -> Any:
    """The split form as a peer writes it, for layers with two or more groups."""
    _, channels, kernels, stride = shape
    total, wanted = sum(channels), list(kernels) if len(kernels) > 1 else kernels[0]
    options: dict[str, Any] = {"stride": stride, "padding": "", "depthwise": True}
    if peer == "timm":
        return importlib.import_module("timm.layers.create_conv2d").create_conv2d(
            total, total, wanted, **options
        )
    if peer == "geffnet":
        return importlib.import_module("geffnet.conv2d_layers").select_conv2d(
            total, total, wanted, **options
        )
    sizes = list(kernels)
    mixconv = importlib.import_module("pytorchcv.models.mixnet").MixConv
    return mixconv(total, total, sizes, stride, [k // 2 for k in sizes], groups=total)


def layer_runs(shape: Shape, batch: int, peers: list[str], grad: bool = False) -> dict[str, Run]:
    """Contenders on one layer, all with the same work to do."""
    size, channels, kernels, stride = shape
    x = torch.randn(batch, sum(channels), size, size, requires_grad=grad)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_(grad)
    mine = MixConv2d(sum(channels), kernels, stride, partition=channels)
    merged = mine.merged().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = [cast_weight(conv) for conv in mine.convs]
    packed = pack_weights([weight.detach() for weight in weights])
    names: dict[str, Any] = {"channels": channels, "kernel_sizes": kernels, "stride": stride}

    def fused() -> Tensor:
        weight = pack_weights(weights) if grad else packed
        return mixed_depthwise2d(last, weight, **names)

    runs: dict[str, Run] = {"split": partial(mine, x)}
    for peer in peers:
        layer = peer_layer(peer, shape)
        runs[peer] = partial(layer, x)
        if peer == "timm":
            runs["timm_channels_last"] = partial(layer, last)
    runs |= {"merged": partial(merged, last), "fused": fused}
    with torch.no_grad():
        torch.testing.assert_close(fused(), mine(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged(last), mine(x), rtol=1e-4, atol=1e-4)
    if grad:
        runs = {name: partial(forward_backward, run) for name, run in runs.items()}
    return runs


def forward_backward(run: Run) -> None:
    run().sum().backward()


def cast_weight(conv: nn.Module) -> Tensor:
    weight = conv.weight
    assert isinstance(weight, Tensor)
    return weight


def bench_layers(options: argparse.Namespace, peers: list[str], peak: float) -> list[Any]:
    shapes, rows = depthwise_shapes(), []
    if options.quick:
        shapes = shapes[::4]
    jobs = list(itertools.product(options.batches, shapes))
    for done, (batch, shape) in enumerate(jobs):
        progress(done, len(jobs), f"layers: batch {batch}, {shape}")
        size, channels, kernels, stride = shape
        out = -(-size // stride)
        numbers = batch * sum(channels) * (size * size + out * out)
        squares = sum(c * k * k for c, k in zip(channels, kernels, strict=True))
        source = torch.randn(numbers // 2)
        target = torch.empty_like(source)
        mixed = peers if len(kernels) > 1 else [p for p in peers if p != "pytorchcv"]
        with torch.no_grad():
            runs = layer_runs(shape, batch, mixed)
            runs["copy"] = partial(target.copy_, source)
            seconds = take_turns(runs, options.rounds)
        row = {
            "batch": batch, "size": size, "channels": channels, "kernel_sizes": kernels,
            "stride": stride, "bytes": 4 * numbers, "multiply_adds": batch * out * out * squares,
            "seconds": seconds,
        }  # fmt: skip
        row["seconds_roofline"] = max(row["multiply_adds"] / peak, seconds["copy"])
        if batch == 8 and len(kernels) > 1:
            training = layer_runs(shape, batch, [p for p in peers if p == "timm"], grad=True)
            row["seconds_training"] = take_turns(training, min(3, options.rounds))
        rows.append(row)
    return rows


def bench_growth(options: argparse.Namespace) -> list[Any]:
    """Time of one layer against batch, channels, resolution and number of groups."""
    base = {"batch": 1, "channels": 240, "size": 28, "groups": 4}
    series = {
        "batch": (1, 2, 4, 8, 16, 32), "channels": (60, 120, 240, 480, 960),
        "size": (7, 14, 28, 56, 112), "groups": (1, 2, 3, 4, 5),
    }  # fmt: skip
    rows: list[Any] = []
    jobs = [(axis, value) for axis, values in series.items() for value in values]
    for done, (axis, value) in enumerate(jobs):
        progress(done, len(jobs), f"growth: {axis} {value}")
        now = base | {axis: value}
        kernels = tuple(2 * i + 3 for i in range(now["groups"]))
        shape = (now["size"], (now["channels"] // len(kernels),) * len(kernels), kernels, 1)
        with torch.no_grad():
            seconds = take_turns(layer_runs(shape, now["batch"], []), min(5, options.rounds))
        rows.append({"axis": axis, "value": value, "seconds": seconds})
    return rows


def bench_steps(rounds: int) -> list[Any]:
    """The chapter's steps towards the kernel, on one thread, and the kernel itself."""
    early = load_library("depthwise_steps.cpp")
    rows: list[Any] = []
    threads = torch.get_num_threads()
    for size, channels, k in ((14, 480, 9), (28, 240, 5), (56, 96, 3)):
        x = torch.randn(1, channels, size, size).to(memory_format=torch.channels_last)
        weight, y = torch.randn(channels * k * k), torch.empty_like(x)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, weight, y)]
        numbers = [ctypes.c_int64(n) for n in (size, size, channels, k)]
        runs: dict[str, Run] = {
            name: partial(getattr(early, f"step{i}_{word}"), *pointers, *numbers)
            for i, (word, name) in enumerate(
                (("loops", "0 loops"), ("lanes", "1 sixteen channels at once"),
                 ("scratch", "2 no question inside"), ("rows", "3 rows in registers"))
            )
        }  # fmt: skip
        spec = MixSpec((channels,), (k,), 1, (1,), "symmetric", "none")
        for count in (1, threads):
            label = "thread" if count == 1 else "threads"
            call = Call(spec, x.shape, x.dtype, "cpu", False, count, (weight.shape,))
            assert FORMS.reasons(call)["kernel"] == []
            runs[f"4 the kernel, {count} {label}"] = partial(FORMS.choose(call), x, weight, None)
        rows.append(
            {"size": size, "channels": channels, "kernel_size": k,
             "seconds": take_turns(runs, rounds)}
        )  # fmt: skip
    return rows


# Networks


def to_onnx(model: nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(2, 3, 224, 224),), str(path), dynamo=False,
            input_names=["x"], dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip
    return str(path)


def runtime_session(runtime: Any, path: str, threads: int, x: Tensor) -> Run:
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def openvino_session(openvino: Any, path: str, threads: int, x: Tensor) -> Run:
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(x.shape))
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    array = x.numpy()
    return lambda: request.infer([array])


def fuse_layers(model: nn.Module) -> nn.Module:
    """`fuse_for_inference` without whole blocks."""
    whole = fuse._Rewriter.fuse_blocks
    fuse._Rewriter.fuse_blocks = lambda self, name: None  # type: ignore[method-assign]
    try:
        return fuse_for_inference(model, backend="kernel")
    finally:
        fuse._Rewriter.fuse_blocks = whole  # type: ignore[method-assign]


def network_runs(
    name: str, batch: int, modules: dict[str, Any], folder: Path, options: argparse.Namespace
) -> dict[str, Run]:
    x = torch.randn(batch, 3, 224, 224)
    last = x.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    ours = NETWORKS[name](padding="symmetric").eval()  # as in timm's networks of these names
    models: dict[str, nn.Module] = {"split": ours}
    runs: dict[str, Run] = {}
    exports = {"ours": fuse_for_inference(ours, backend="merged")}
    same = NETWORKS[name](padding="same").eval()
    if modules["timm"] and name in TIMM_NAMES:
        theirs = modules["timm"].create_model(TIMM_NAMES[name]).eval()
        models["timm, eager"] = exports["timm"] = theirs
        if name == "MixNet-S" and not options.quick:
            models["timm, compiled"] = torch.compile(copy.deepcopy(theirs))  # type: ignore[assignment]
    for label, model in models.items():
        runs[label] = partial(model, x)
    runs["fused, merged"] = partial(exports["ours"], last)
    runs["fused, layers"] = partial(fuse_layers(ours), last)
    runs["fused"] = partial(fuse_for_inference(ours), last)
    runs["fused, same padding"] = partial(fuse_for_inference(same), last)
    if "timm" in exports:
        runs["timm, fused"] = partial(fuse_for_inference(exports["timm"]), last)
    exports["ours, same padding"] = fuse_for_inference(same, backend="merged")
    makers = {"onnxruntime": runtime_session, "openvino": openvino_session}
    for owner, model in exports.items():
        path = folder / f"{name}-{owner}.onnx"
        for peer, make in makers.items():
            if modules[peer]:
                if not path.exists():
                    to_onnx(model, path)
                label = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[peer]
                runs[f"{owner}, {label}"] = make(modules[peer], str(path), options.threads, x)
    return runs


def bench_networks(options: argparse.Namespace, modules: dict[str, Any]) -> list[Any]:
    rows = []
    names = list(NETWORKS)[:1] if options.quick else list(NETWORKS)
    jobs = list(itertools.product(names, (1, 16)))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for done, (name, batch) in enumerate(jobs):
            progress(done, len(jobs), f"networks: {name}, batch {batch}")
            runs = network_runs(name, batch, modules, Path(folder), options)
            seconds = take_turns(runs, max(3, options.rounds), least=0.1, budget=20)
            rows.append({"network": name, "batch": batch, "seconds": seconds})
    return rows


def bench_trained(options: argparse.Namespace, modules: dict[str, Any]) -> list[Any]:
    """EfficientNet-Lite0 with its trained weights (chapter 9), as it is and fused."""
    try:
        ours = efficientnet_lite0(find_weights()).eval()
    except ImportError as error:
        missing["EfficientNet-Lite0"] = str(error)
        return []
    rows = []
    with torch.no_grad():
        for batch in (1, 16):
            x = torch.randn(batch, 3, 224, 224)
            last = x.to(memory_format=torch.channels_last)
            runs: dict[str, Run] = {
                "split": partial(ours, x),
                "fused": partial(fuse_for_inference(ours), last),
                "fused, merged": partial(fuse_for_inference(ours, backend="merged"), last),
            }
            if modules["timm"]:
                theirs = modules["timm"].create_model("tf_efficientnet_lite0").eval()
                runs["timm, eager"] = partial(theirs, x)
            seconds = take_turns(runs, max(3, options.rounds), least=0.1, budget=20)
            rows.append({"network": "EfficientNet-Lite0", "batch": batch, "seconds": seconds})
    return rows


def peak_memory(form: str) -> int:
    """Bytes that a forward adds to this process, workspaces and all; for a process of its own."""
    if form == "timm":
        model = optional("timm").create_model("mixnet_s").eval()
    else:
        model = fuse_for_inference(mixnet_s(padding="symmetric"))
    x = torch.randn(16, 3, 224, 224)
    with torch.inference_mode():
        model(x[:1, :, :32, :32])  # whatever is set up once
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "utf-8")  # the peak starts anew
        before = proc_status("VmRSS")
        model(x)
    return proc_status("VmHWM") - before


def proc_status(field: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def bench_memory(modules: dict[str, Any], threads: int) -> dict[str, int]:
    if not Path("/proc/self/clear_refs").exists():
        missing["memory"] = "only measured on Linux"
        return {}
    forms = ["fused", "timm"] if modules["timm"] else ["fused"]
    command = [sys.executable, "-m", "tools.bench", "--threads", str(threads), "--memory"]
    found = {}
    for form in forms:
        done = subprocess.run(
            [*command, form], cwd=ROOT, capture_output=True, text=True, check=True
        )
        found[form] = int(done.stdout)
    return found


# The report


def mean_ratio(rows: list[Any], batch: int, over: str, under: str = "fused") -> float:
    chosen = [r for r in rows if r["batch"] == batch and len(r["channels"]) > 1]
    return statistics.geometric_mean(r["seconds"][over] / r["seconds"][under] for r in chosen)


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What was wanted before anything was written, and what came of it."""
    result: list[dict[str, Any]] = []

    def add(goal: str, wanted: float, measured: float, at_least: bool = True) -> None:
        met = measured >= wanted if at_least else measured <= wanted
        sign = "at least" if at_least else "at most"
        text = {"wanted": f"{sign} {wanted:g}×", "measured": f"{measured:.2f}×"}
        result.append({"goal": goal, **text, "met": met})

    rows, networks = report["layers"], report["networks"]
    base = "timm" if "timm" in rows[0]["seconds"] else "split"
    for batch, wanted in ((1, 8), (32, 2.5)):
        add(f"mixed layers over {base}, batch {batch}", wanted, mean_ratio(rows, batch, base))
    for batch in sorted({row["batch"] for row in rows}):
        chosen = [r for r in rows if r["batch"] == batch and len(r["channels"]) > 1]
        times = (r["seconds"]["fused"] / r["seconds_roofline"] for r in chosen)
        label = f"mixed layers, time over the roofline's, batch {batch}"
        add(label, 2, statistics.geometric_mean(times), at_least=False)
    seconds = next(r["seconds"] for r in networks if r["batch"] == 1)
    if "timm, eager" in seconds:
        over = seconds["timm, eager"] / seconds["fused"]
        add("MixNet-S over timm eager, batch 1", 3.5, over)
    if "timm" in (memory := report["memory"]):
        label = "memory of a MixNet-S forward over timm's, batch 16"
        add(label, 1, memory["fused"] / memory["timm"], at_least=False)
    if "timm, ONNX Runtime" in seconds:
        runtime = seconds["timm, ONNX Runtime"]
        add("MixNet-S over timm's export in ONNX Runtime, batch 1", 1, runtime / seconds["fused"])
        add("our export over timm's in ONNX Runtime, MixNet-S, batch 1", 1.5,
            runtime / seconds["ours, ONNX Runtime"])  # fmt: skip
    none = {"measured": "no GPU at hand", "met": False}
    return [*result, {"goal": "GPU: over the split path", "wanted": "at least 2×", **none}]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few layers and MixNet-S only")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=0, help="default 9, or 3 with --quick")
    parser.add_argument("--memory", choices=["fused", "timm"], help=argparse.SUPPRESS)
    parser.add_argument("--trained", action="store_true",
                        help="only EfficientNet-Lite0, into the report that is there")  # fmt: skip
    parser.add_argument("--against", type=Path, metavar="CHECKOUT",
                        help="only compare with an older checkout; writes nothing")  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "bench.json")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 9)
    return options


def store(report: dict[str, Any], path: Path) -> int:
    """Write the report in one step; an interrupted run leaves the old one."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    unfinished.replace(path)
    return 0


def main() -> int:
    options = parse()
    if load_kernel() is None:
        print("make bench: no C++ compiler, nothing to measure", file=sys.stderr)
        return 1
    started, load = time.perf_counter(), os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    if options.memory:
        print(peak_memory(options.memory))
        return 0
    torch.manual_seed(0)
    if options.against:
        against = importlib.import_module("tools.against")
        return int(against.compare(options.against, options.batches, options.rounds) > 0)
    modules = {name: optional(name) for name in PEERS}
    peers = [name for name in ("timm", "geffnet", "pytorchcv") if modules[name]]
    machine = describe_machine(options.threads) | {"load_before": round(load, 2)}
    if options.trained:
        stored = json.loads(options.out.read_bytes())
        stored["trained"] = {"machine": machine, "rows": bench_trained(options, modules)}
        return store(stored, options.out)
    report: dict[str, Any] = {"machine": machine, "versions": versions(), "missing": missing}
    report["rounds"] = options.rounds
    report["steps"] = bench_steps(options.rounds)
    report["layers"] = bench_layers(options, peers, machine["multiply_adds_per_second"])
    report["growth"] = bench_growth(options)
    report["networks"] = bench_networks(options, modules)
    report["trained"] = {"machine": machine, "rows": bench_trained(options, modules)}
    report["memory"] = bench_memory(modules, options.threads)
    report["goals"] = goals(report)
    report["minutes"] = round((time.perf_counter() - started) / 60, 1)
    store(report, options.out)
    print(f"\nwrote {options.out} after {report['minutes']} minutes", file=sys.stderr)
    for goal in report["goals"]:
        print(f"{goal['goal']:62} {goal['wanted']:14} {goal['measured']:16}", end="")
        print("met" if goal["met"] else "missed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
