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


# Where CI runs, nothing may be left out in silence: a compiler that is missing, a peer that can no
# longer be imported. These are the reasons that count, by how they begin.
MAY_SKIP = (
    "slow: ask for it with -m slow",
    "mixconv is not installed beside this Python",  # no console script to try
    "mounting is not allowed here",  # nor can a disk be filled
    "only root can give files away",
    "no -fsanitize=",  # for this instruction set, with this compiler
    "the compiler does not take -march=",
    "not a git checkout",
    "node is not on the path",  # it runs the widgets' arithmetic
)
_skipped: list[tuple[str, str]] = []


def reason_of(longrepr: object) -> str:
    """Why a test was skipped."""
    reason = str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
    return reason.removeprefix("Skipped: ")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append((report.nodeid, reason_of(report.longrepr)))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skipped.append((report.nodeid, reason_of(report.longrepr)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    left_out = [f"{test}: {why}" for test, why in _skipped if not why.startswith(MAY_SKIP)]
    if left_out and os.environ.get("CI") and not hasattr(session.config, "workerinput"):
        print("\n\nleft out, though CI must run them:", *sorted(set(left_out)), sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
