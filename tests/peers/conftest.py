"""Tests against other people's packages; each module is skipped where its peer is missing."""

from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: a minute or more; runs only with `-m slow`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: ask for it with -m slow"))


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Small images on a busy machine: a second thread makes them up to 300 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
