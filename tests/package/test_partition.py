import math
import re
from itertools import product
from typing import Any

import pytest

from mixconv import default_kernel_sizes, partition_channels
from mixconv._checks import check_kernel_sizes
from mixconv.partition import resolve_partition

METHODS = ("equal", "exponential", "logarithmic")


@pytest.mark.parametrize(
    ("channels", "kernel_sizes", "method", "expected"),
    [
        (528, (3, 5, 7, 9, 11), "equal", (108, 105, 105, 105, 105)),
        (528, (3, 5, 7, 9, 11), "exponential", (264, 132, 66, 33, 33)),
        (32, (3, 5, 7), "logarithmic", (8, 11, 13)),
        (32, (3, 5, 7, 9), "equal", (8, 8, 8, 8)),
        (32, (3, 5, 7, 9), "exponential", (16, 8, 4, 4)),
        (7, (3, 5), "equal", (4, 3)),
        (11, (3, 5, 7, 9), "exponential", (7, 2, 1, 1)),
        (12, (3, 9), "logarithmic", (4, 8)),  # log 9 = 2 log 3: exact shares stay exact
        (3, (3, 27), "logarithmic", (1, 2)),
        (30, (3, 9, 27, 81), "logarithmic", (3, 6, 9, 12)),
        (10, (7, 3), "logarithmic", (7, 3)),  # sizes need not grow
        (9, 5, "equal", (9,)),
        (9, (5,), "exponential", (9,)),
        (9, (5,), "logarithmic", (9,)),
        (9, (1, 3), "equal", (5, 4)),
    ],
)
def test_exact_values(channels, kernel_sizes, method, expected):
    assert partition_channels(channels, kernel_sizes, method) == expected


def test_equal_is_the_default():
    assert partition_channels(10, (3, 5, 7)) == (4, 3, 3)


def expected_shares(channels: int, sizes: tuple[int, ...], method: str) -> list[int]:
    """The issue's rules in integers; a share of c·log k / Σ log k is found by trying powers."""
    if method == "equal":
        shares = [channels // len(sizes)] * len(sizes)
    elif method == "exponential":
        shares = [channels >> i for i in range(1, len(sizes))]
        shares = [*shares, shares[-1]] if shares else [channels]
    else:
        total = math.prod(sizes)
        shares = []
        for k in sizes:
            share = int(channels * math.log(k) / math.log(total))
            share += total ** (share + 1) <= k**channels  # Σ log k · share ≤ c · log k
            shares.append(share)
    shares[0] += channels - sum(shares)
    return shares


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", range(1, 7))
def test_every_number_of_channels(method, groups):
    sizes = default_kernel_sizes(groups)
    for channels in range(1, 601):
        expected = expected_shares(channels, sizes, method)
        if min(expected) < 1:
            with pytest.raises(ValueError, match=f"{method} leaves a group empty: {channels} ch"):
                partition_channels(channels, sizes, method)
        else:
            result = partition_channels(channels, sizes, method)
            assert result == tuple(expected), (channels, sizes)
            assert sum(result) == channels


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_the_arguments_matters(method):
    results = {partition_channels(97, kernels, method) for kernels in ((3, 5, 7), [3, 5, 7])}
    assert len(results) == 1
    assert all(type(count) is int for result in results for count in result)


@pytest.mark.parametrize(
    ("channels", "kernel_sizes", "method", "error", "words"),
    [
        (0, (3, 5), "equal", ValueError, ["channels", "0"]),
        (-4, (3, 5), "equal", ValueError, ["channels", "-4"]),
        (8.0, (3, 5), "equal", TypeError, ["channels", "8.0"]),
        ("8", (3, 5), "equal", TypeError, ["channels", "'8'"]),
        (True, (3,), "equal", TypeError, ["channels", "True"]),
        (None, (3,), "equal", TypeError, ["channels", "None"]),
        (8, (), "equal", ValueError, ["kernel_sizes", "none"]),
        (8, (3, 4), "equal", ValueError, ["kernel_sizes", "4"]),
        (8, (3, 0), "equal", ValueError, ["kernel_sizes", "0"]),
        (8, (3, -5), "equal", ValueError, ["kernel_sizes", "-5"]),
        (8, (3, 5.0), "equal", TypeError, ["kernel_sizes", "5.0"]),
        (8, (3, True), "equal", TypeError, ["kernel_sizes", "True"]),
        (8, True, "equal", TypeError, ["kernel_sizes", "True"]),
        (8, "35", "equal", TypeError, ["kernel_sizes", "'35'"]),
        (8, (3, 5), "Equal", ValueError, ["method", "'Equal'", "equal", "logarithmic"]),
        (8, (3, 5), "", ValueError, ["method", "''"]),
        (8, (3, 5), None, ValueError, ["method", "None"]),
        (8, (1, 3), "logarithmic", ValueError, ["logarithmic", "1", "(1, 3)"]),
        (2, (3, 5, 7), "equal", ValueError, ["equal", "2 channels", "(3, 5, 7)"]),
        (3, (3, 5, 7), "exponential", ValueError, ["exponential", "3 channels", "(3, 5, 7)"]),
    ],
)
def test_errors_name_the_argument_and_the_value(channels, kernel_sizes, method, error, words):
    with pytest.raises(error) as caught:
        partition_channels(channels, kernel_sizes, method)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)


@pytest.mark.parametrize(
    ("partition", "error", "words"),
    [
        ((4, 5), ValueError, ["(4, 5)", "8 channels", "9"]),
        ((8,), ValueError, ["(8,)", "(3, 5)"]),
        ((2, 2, 4), ValueError, ["(2, 2, 4)", "(3, 5)"]),
        ((0, 8), ValueError, ["partition", "0"]),
        ((-1, 9), ValueError, ["partition", "-1"]),
        ((4.0, 4.0), TypeError, ["partition", "4.0"]),
        ((True, 7), TypeError, ["partition", "True"]),
        ("half", ValueError, ["'half'", "exponential"]),
    ],
)
def test_bad_explicit_partitions(partition, error, words):
    with pytest.raises(error) as caught:
        resolve_partition(8, (3, 5), partition)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)


UNCLEAR: list[tuple[dict[str, Any], str]] = [
    ({"kernel_sizes": None}, "kernel_sizes"),
    ({"kernel_sizes": 3.5}, "kernel_sizes"),
    ({"partition": None}, "partition"),
    ({"partition": 4}, "partition"),
    ({"partition": 4.5}, "partition"),
]


@pytest.mark.parametrize(("wrong", "name"), UNCLEAR)
def test_a_number_or_none_in_place_of_a_list_is_named(wrong, name):
    value = next(iter(wrong.values()))
    with pytest.raises(TypeError, match=f"{name}.*{re.escape(repr(value))}"):
        resolve_partition(**({"channels": 8, "kernel_sizes": (3, 5), "partition": "equal"} | wrong))


def test_an_unhashable_method_is_named():
    with pytest.raises((TypeError, ValueError), match="method"):
        partition_channels(8, (3, 5), ["equal"])  # type: ignore[arg-type]


def test_explicit_partitions_and_methods_resolve():
    assert resolve_partition(8, (3, 5), (1, 7)) == (1, 7)
    assert resolve_partition(8, (3, 5), [1, 7]) == (1, 7)
    assert resolve_partition(8, 3, (8,)) == (8,)
    for method, sizes in product(METHODS, ((3,), (3, 5), (3, 5, 7))):
        assert resolve_partition(40, sizes, method) == partition_channels(40, sizes, method)


def test_kernel_sizes():
    assert default_kernel_sizes(5) == (3, 5, 7, 9, 11)
    assert check_kernel_sizes(7) == (7,)
    assert check_kernel_sizes([3, 1]) == (3, 1)
    with pytest.raises(ValueError, match=r"groups.*0"):
        default_kernel_sizes(0)
