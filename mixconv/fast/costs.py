# Generated from notebooks/15_block_bytes.ipynb by `make book`. Edit the notebook, not this file.

"""What a whole block costs, layer by layer, for those who count (ours; chapter 15)."""

from collections.abc import Sequence
from typing import Any

from mixconv.fast.spec import output_size
from mixconv.formulation import LayerCost

__all__ = ["block_costs", "block_flops"]


def block_costs(
    spec: Any, name: str, before: Sequence[int], after: Sequence[int]
) -> list[LayerCost]:
    """The costs of a block's layers, as `count_costs` gives them.

    Args:
        spec: a `BlockSpec`.
        name: of the block.
        before: shape of its input, `(N, C, H, W)`.
        after: shape of its output.
    """
    wide, costs = sum(spec.mix.channels), []
    weights = sum(c * k * k for c, k in zip(spec.mix.channels, spec.mix.kernel_sizes, strict=True))
    pixels = {"expand": before[2:], "squeeze": (1, 1), "excite": (1, 1), "project": after[2:]}
    for part in ("expand", "depthwise", "squeeze", "excite", "project"):
        point = getattr(spec, part, None)
        if part == "depthwise":
            shape = (after[0], wide, *after[2:])
            costs.append(LayerCost(f"{name}.depthwise", part, shape, weights + wide,
                                   after[0] * after[2] * after[3] * weights))  # fmt: skip
        elif point is not None:
            shape, size = (before[0], point.outputs, *pixels[part]), point.inputs * point.outputs
            count = size // point.groups
            work = before[0] * pixels[part][0] * pixels[part][1] * count
            costs.append(
                LayerCost(f"{name}.{part}", "pointwise", shape, count + point.outputs, work)
            )
    return costs


def block_flops(spec: Any, before: Sequence[int]) -> int:
    """Twice the multiply-adds of a block for an input of shape `before`, as PyTorch counts."""
    sides = [output_size(size, spec.mix.stride) for size in before[2:]]
    costs = block_costs(spec, "", before, (before[0], spec.project.outputs, *sides))
    return 2 * sum(cost.multiply_adds for cost in costs)
