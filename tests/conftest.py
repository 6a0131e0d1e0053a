"""What all tests share: a seed, one thread, and Triton's interpreter where there is no GPU."""

import os

# Triton reads this when it is imported, and torch or timm may import it at any time: so, first.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidia0") else "1")

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> Iterator[None]:
    """Tests are tiny: on a busy machine a second thread only makes them wait."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
