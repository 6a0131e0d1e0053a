# Generated from notebooks/02_partitioning.ipynb by `make book`. Edit the notebook, not this file.

"""Checks of arguments that the whole package shares (chapter 2)."""

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

__all__ = [
    "as_pair",
    "as_stride",
    "as_tuple",
    "check_flags",
    "check_kernel_sizes",
    "check_multiplier",
    "check_number",
    "check_positive",
    "check_rate",
    "refuse_script",
]


def check_positive(name: str, value: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless `value` is an integer ≥ 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_number(name: str, value: float) -> None:
    """Raise TypeError, naming the argument, unless `value` is a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_flags(**flags: bool) -> None:
    """Raise TypeError, naming the argument, unless each is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_rate(name: str, rate: float) -> None:
    """Raise TypeError or ValueError, naming the argument, unless 0 <= rate < 1."""
    check_number(name, rate)
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {rate}")


def check_multiplier(name: str, value: float) -> None:
    """Raise TypeError or ValueError, naming the argument, unless positive and finite."""
    check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """The values as a tuple; TypeError, naming the argument, if they are no sequence."""
    lost = isinstance(values, str | bytes | Set | Mapping)  # of these, order or numbers get lost
    if lost or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
    return tuple(values)


def as_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """One positive integer for both axes, or one for each, as a pair."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an integer or two of them, got {value!r}")
    for number in pair:
        check_positive(name, number)
    return int(pair[0]), int(pair[1])


def as_stride(value: int | Sequence[int]) -> int:
    """One stride for both axes; ValueError if they differ."""
    pair = as_pair("stride", value)
    if pair[0] != pair[1]:
        raise ValueError(f"stride must be the same for both axes, got {value!r}")
    return pair[0]


def check_kernel_sizes(kernel_sizes: int | Sequence[int]) -> tuple[int, ...]:
    """Kernel sizes as a tuple, one per group; a single integer means one group.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if there is no size, or one is not odd and positive.
    """
    single = isinstance(kernel_sizes, Integral)
    sizes = as_tuple("kernel_sizes", (kernel_sizes,) if single else kernel_sizes)
    if not sizes:
        raise ValueError("kernel_sizes must name at least one size, got none")
    for k in sizes:
        check_positive("each of kernel_sizes", k)
        if k % 2 == 0:
            raise ValueError(f"kernel_sizes must be odd, such as 3, 5 or 7, got {k} in {sizes}")
    return tuple(map(int, sizes))


def refuse_script(module: object) -> None:
    """Raise NotImplementedError: `torch.jit.script` asks by the name `__prepare_scriptable__`."""
    raise NotImplementedError(
        f"torch.jit.script cannot take a {type(module).__name__}, whose checks are Python that "
        "TorchScript does not know: use torch.export.export, or torch.jit.trace"
    )
