# Generated from notebooks/16_model_read.ipynb by `make book`. Edit the notebook, not this file.

"""One numeric check for every rewrite (chapter 16)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = [
    "LOUD",
    "ROUNDED",
    "TOLERANCE",
    "CannotTryError",
    "difference",
    "find_tolerance",
    "in_float32",
    "make_image",
    "piece_difference",
    "twin",
]


# Of the largest value. Sums in another order differ by some 1e-6, what is wrong mostly by 0.01 up.
TOLERANCE = 1e-3

ROUNDED = 16  # so many units in the last place, if those of the weights are larger

LOUD = 20  # so many times the usual image: beyond the bend of a ReLU6, or of a clamp


class CannotTryError(Exception):
    """The original gives nothing to compare with."""


def twin(module: nn.Module) -> nn.Module:
    """A copy to try things on: it shares the parameters, and has no hooks."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    copied = copy.deepcopy(module, shared)
    for part in copied.modules():
        for kind in ("forward", "forward_pre", "backward", "backward_pre"):
            getattr(part, f"_{kind}_hooks").clear()
    return copied


def make_image(channels: int, height: int, width: int, batch: int = 1) -> Tensor:
    """A random image, the same every time."""
    size, generator = (batch, channels, height, width), torch.Generator("cpu").manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")


def find_tolerance(module: nn.Module) -> float:
    """How far from its original a rewritten module may be: more, if its weights are rounded."""
    tensors = [*module.parameters(), *module.buffers()]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max([TOLERANCE, *(ROUNDED * torch.finfo(dtype).eps for dtype in dtypes)])


def in_float32(module: nn.Module) -> nn.Module:
    """A copy on the CPU in float32, or the module itself where it is so already."""
    tensors = [*module.parameters(), *module.buffers()]
    exact = [t.dtype == torch.float32 or not t.is_floating_point() for t in tensors]
    there = all(exact) and all(tensor.is_cpu for tensor in tensors)
    return module if there else copy.deepcopy(module).cpu().float()


def _run(module: nn.Module, image: Tensor, seed: int) -> list[Tensor]:
    """All tensors that come out, and the image as it is afterwards."""
    image = image.clone()
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        torch.manual_seed(seed)
        found = [*tree_leaves(module(image)), image]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _compare(wanted: list[Tensor], found: list[Tensor], tolerance: float) -> str:
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in found]:
        return "tried, and gave other shapes"
    pairs = [pair for pair in zip(wanted, found, strict=True) if pair[0].numel()]
    for one, other in pairs:
        largest, worst = float(one.abs().max()), float((one.double() - other).abs().max())
        if not worst <= tolerance * largest:  # NaN is not
            return f"tried, and not the same: off by up to {worst:.2g}, values up to {largest:.2g}"
    return ""


@torch.no_grad()
def difference(before: nn.Module, after: nn.Module, image: Tensor, *, random: bool = False) -> str:
    """What keeps `after` from standing in for `before`, as text; empty if they compute the same.

    Args:
        before: the original. Copies are run, on the CPU in float32, without hooks.
        after: the rewritten one. What is allowed depends on its weights: 1/1000 of the largest
            value in float32, 1/64 in float16, 1/8 in bfloat16.
        image: given to both.
        random: give both the same random numbers, if they draw any.

    Raises:
        CannotTryError: if the original fails, or its values are not finite.
    """
    try:
        wanted = _run(twin(in_float32(before)), image, 0)
    except Exception as error:  # anything may go wrong in a stranger's forward
        raise CannotTryError(f"it does not run on a random image: {error}") from error
    if not all(tensor.isfinite().all() for tensor in wanted):
        raise CannotTryError("it gives NaN or infinity on a random image")
    try:
        found = _run(twin(in_float32(after)), image, 0 if random else 1)
    except Exception as error:
        return f"tried, and failed: {error}"
    return _compare(wanted, found, find_tolerance(after))


def piece_difference(before: nn.Module, after: nn.Module, image: Tensor) -> str:
    """`difference` for a layer or a block, on an image and on the same one `LOUD` times as loud.

    Raises:
        CannotTryError: as `difference`.
    """
    return difference(before, after, image) or difference(before, after, LOUD * image)
