# Generated from notebooks/02_partitioning.ipynb by `make book`. Edit the notebook, not this file.

"""Checks of arguments that the whole package shares (chapter 2)."""

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "as_pair",
    "as_tuple",
    "check_kernel_sizes",
    "check_multiplier",
    "check_positive",
    "check_rate",
]


def check_positive(name: str, value: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless `value` is an integer ≥ 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_rate(name: str, rate: float) -> None:
    """Raise ValueError, naming the argument, unless 0 <= rate < 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {rate}")


def check_multiplier(name: str, value: float) -> None:
    """Raise ValueError, naming the argument, unless `value` is positive and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """The values as a tuple; TypeError, naming the argument, if they are no sequence."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
    return tuple(values)


def as_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """One positive integer for both axes, or one for each, as a pair."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an integer or two of them, got {value!r}")
    for number in pair:
        check_positive(name, number)
    return pair


def check_kernel_sizes(kernel_sizes: int | Sequence[int]) -> tuple[int, ...]:
    """Kernel sizes as a tuple, one per group; a single integer means one group.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if there is no size, or one is not odd and positive.
    """
    single = isinstance(kernel_sizes, int)
    sizes = as_tuple("kernel_sizes", (kernel_sizes,) if single else kernel_sizes)
    if not sizes:
        raise ValueError("kernel_sizes must name at least one size, got none")
    for k in sizes:
        check_positive("each of kernel_sizes", k)
        if k % 2 == 0:
            raise ValueError(f"kernel_sizes must be odd, such as 3, 5 or 7, got {k} in {sizes}")
    return sizes
