"""An older checkout's package and this one, side by side in one process: `bench --against PATH`.

The older package is copied, and called by another name in the copy, so that its operations and
libraries are its own. Each layer of the MixNets and each network is timed in short turns. What is
compared is the shortest time of each.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mixconv
from mixconv.fast.spec import pack_weights
from tools.bench import NETWORKS, Run, Shape, depthwise_shapes, progress, take_turns

BEFORE = "mixconv_before"
SLOWER = 1.05  # times as long as before that counts as slower


def import_before(checkout: Path, folder: Path) -> Any:
    """The package of a checkout, under the name `BEFORE`."""
    copy = folder / BEFORE
    shutil.copytree(checkout / "mixconv", copy)
    for path in copy.rglob("*.py"):
        path.write_text(re.sub(r"\bmixconv\b", BEFORE, path.read_text("utf-8")), "utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module(BEFORE)


def layer_runs(before: Any, shape: Shape, batch: int) -> dict[str, Run]:
    size, channels, kernels, stride = shape
    x = torch.randn(batch, sum(channels), size, size).to(memory_format=torch.channels_last)
    pairs = zip(channels, kernels, strict=True)
    weight = pack_weights([torch.randn(c, 1, k, k) / k for c, k in pairs])
    options: dict[str, Any] = {"channels": channels, "kernel_sizes": kernels, "stride": stride}
    runs: dict[str, Run] = {
        "before": partial(before.mixed_depthwise2d, x, weight, **options),
        "now": partial(mixconv.mixed_depthwise2d, x, weight, **options),
    }
    torch.testing.assert_close(runs["now"](), runs["before"](), rtol=1e-4, atol=1e-4)
    return runs


def network_runs(before: Any, name: str, batch: int) -> dict[str, Run]:
    x = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    old_makers = {
        "MixNet-S": before.mixnet_s, "MixNet-M": before.mixnet_m, "MixNet-L": before.mixnet_l,
        "MobileNetV2-357": partial(before.mobilenet_v2, (3, 5, 7)),
    }  # fmt: skip
    old, new = old_makers[name]().eval(), NETWORKS[name]().eval()
    new.load_state_dict(old.state_dict())
    fused_before, fused_now = before.fuse_for_inference(old), mixconv.fuse_for_inference(new)
    runs: dict[str, Run] = {"before": partial(fused_before, x), "now": partial(fused_now, x)}
    wanted = runs["before"]()
    torch.testing.assert_close(runs["now"](), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max())
    return runs


def describe(shape: Shape) -> str:
    size, channels, kernels, stride = shape
    return f"{size}×{size}, {channels} channels, kernels {kernels}, stride {stride}"


def compare(checkout: Path, batches: list[int], rounds: int) -> int:
    """Time everything, print what came of it; returns how many are slower than before."""
    shapes, found = depthwise_shapes(), []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        before = import_before(checkout.resolve(), Path(folder))
        jobs: list[tuple[str, Any]] = [
            (f"batch {batch}: {describe(shape)}", partial(layer_runs, before, shape, batch))
            for batch in batches
            for shape in shapes
        ]
        jobs += [
            (f"batch {batch}: {name}", partial(network_runs, before, name, batch))
            for name in NETWORKS
            for batch in (1, 16)
        ]
        for done, (label, make) in enumerate(jobs):
            progress(done, len(jobs), label)
            runs = make()
            seconds = take_turns(runs, 5 * rounds, least=0.003, budget=10)
            found.append((seconds["now"] / seconds["before"], label, seconds))
    for ratio, label, seconds in found:
        mark = "slower" if ratio > SLOWER else ""
        times = " ".join(f"{1e6 * seconds[name]:10.1f}" for name in ("before", "now"))
        print(f"{times} µs {ratio:6.3f} {mark:6}  {label}")
    slower = sum(ratio > SLOWER for ratio, *_ in found)
    print(f"{slower} of {len(found)} are more than {SLOWER - 1:.0%} slower than before")
    return slower
