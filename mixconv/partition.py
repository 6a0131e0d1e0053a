# Generated from notebooks/02_partitioning.ipynb by `make book`. Edit the notebook, not this file.

"""How MixConv splits channels into groups of one kernel size (paper, section 3.2; chapter 2)."""

import math
from collections.abc import Sequence

from mixconv._checks import as_tuple, check_kernel_sizes, check_positive

__all__ = ["default_kernel_sizes", "partition_channels", "resolve_partition"]


def default_kernel_sizes(groups: int) -> tuple[int, ...]:
    """The paper's kernel sizes for a number of groups: 3, 5, 7, and so on.

    Args:
        groups: how many groups, at least 1.

    Raises:
        ValueError: if `groups` is less than 1.

    Source: paper, section 3.2, "Kernel Size Per Group".
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    return tuple(2 * i + 1 for i in range(1, groups + 1))


def _equal(channels: int, kernel_sizes: Sequence[int]) -> list[int]:
    return [channels // len(kernel_sizes)] * len(kernel_sizes)


def _exponential(channels: int, kernel_sizes: Sequence[int]) -> list[int]:
    shares = [channels // 2**i for i in range(1, len(kernel_sizes))]
    return [*shares, shares[-1]] if shares else [channels]


def _logarithmic(channels: int, kernel_sizes: Sequence[int]) -> list[int]:
    total = sum(math.log(k) for k in kernel_sizes)
    tiny = 1e-9  # an exact share must not be rounded down for a rounding error
    return [math.floor(channels * math.log(k) / total + tiny) for k in kernel_sizes]


_METHODS = {"equal": _equal, "exponential": _exponential, "logarithmic": _logarithmic}


def partition_channels(
    channels: int, kernel_sizes: int | Sequence[int], method: str = "equal"
) -> tuple[int, ...]:
    """Split channels into groups, one for each kernel size.

    Args:
        channels: how many channels to split.
        kernel_sizes: one odd size per group, such as `(3, 5, 7)`.
        method: "equal" (`channels // groups` each), "exponential" (half, a quarter, an eighth …,
            the last as much as the one before it) or "logarithmic" (proportional to log k).
            Shares are rounded down; what is left over goes to group 0.

    Returns:
        Channels of each group; they sum to `channels`, and none is 0.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if a number is out of range, the method is unknown, or a group is empty.

    Source: paper, section 3.2; `_split_channels` in the official `custom_layers.py`;
    "logarithmic" is ours.
    """
    check_positive("channels", channels)
    sizes = check_kernel_sizes(kernel_sizes)
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if method == "logarithmic" and 1 in sizes:
        raise ValueError(f"logarithmic gives kernel size 1 no channels (log 1 = 0), got {sizes}")
    shares = _METHODS[method](channels, sizes)
    shares[0] += channels - sum(shares)
    if 0 in shares:
        raise ValueError(
            f"{method} leaves a group empty: {channels} channels over {sizes} gives {shares}; "
            "use more channels or fewer kernel sizes"
        )
    return tuple(shares)


def resolve_partition(
    channels: int, kernel_sizes: int | Sequence[int], partition: str | Sequence[int] = "equal"
) -> tuple[int, ...]:
    """Group sizes from a method's name, or from explicit sizes after checking them.

    Args:
        channels: how many channels to split.
        kernel_sizes: one odd size per group.
        partition: a method of `partition_channels`, or the channels of each group.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if explicit sizes do not fit channels and kernel sizes, and as
            `partition_channels` does.
    """
    if isinstance(partition, str):
        return partition_channels(channels, kernel_sizes, partition)
    check_positive("channels", channels)
    sizes, groups = check_kernel_sizes(kernel_sizes), as_tuple("partition", partition)
    for count in groups:
        check_positive("each of partition", count)
    if len(groups) != len(sizes):
        raise ValueError(f"partition {groups} must have one entry for each kernel size of {sizes}")
    if sum(groups) != channels:
        raise ValueError(f"partition {groups} must sum to {channels} channels, not {sum(groups)}")
    return groups
