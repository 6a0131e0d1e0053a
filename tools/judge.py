"""Which tests notice a mutant: one process that has imported torch, forked once for each.

The tests run in a copy of the tracked files, in a folder of their own with its own home and
temporary folder. First all of them run once under `coverage`, which notes what lines each test
runs and how long it takes. A mutant is judged by the tests that run its lines, the fastest
first, beginning with the file that is about its module.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.mutate import Mutant
from tools.notebooks import ROOT

TESTS = (
    "tests/package", "tests/widgets", "tests/peers", "tests/fast/test_gpu.py",
    "tests/fast/test_timm.py",
)  # fmt: skip
ALWAYS = ("tests/package/test_promises.py",)  # defaults are read, not run
HEAVY = (
    "torch", "numpy", "pytest", "hypothesis", "matplotlib.pyplot", "IPython.display", "PIL.Image",
    "torch._dynamo", "torch.export", "torch.fx", "safetensors.torch", "triton",
)  # fmt: skip
OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=no", "--no-header")


class Record(NamedTuple):
    """What the run without a mutant has shown."""

    seconds: dict[str, float]  # by test; only those that passed
    runs: dict[str, dict[int, list[str]]]  # by file of the package and line: tests
    alone: list[str]  # tests that pass only in a process of their own


class _Chosen:
    """A pytest plugin: these tests, in this order."""

    def __init__(self, tests: Iterable[str]) -> None:
        self.place = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        chosen = [item for item in items if item.nodeid in self.place]
        items[:] = sorted(chosen, key=lambda item: self.place[item.nodeid])


class _Watch:
    """A pytest plugin: notes which tests pass, their time, and whose lines coverage sees."""

    def __init__(self, coverage: Any) -> None:
        self.coverage, self.seconds, self.failed = coverage, dict[str, float](), set[str]()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)
        self.seconds[nodeid] = -time.monotonic()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] += time.monotonic()
        self.coverage.switch_context("")


def copy_tree(folder: Path) -> None:
    """The tracked and new files of the repository, in another folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.check_output(command, cwd=ROOT, encoding="utf-8").split("\0")
    for name in filter(None, listed):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # removed, but not yet in git
            shutil.copy(ROOT / name, target)


class Judge:
    """Runs tests on a copy of the tree, with a mutant or without.

    Args:
        folder: an empty folder to work in.
        patience: seconds of tests that a mutant gets, as the tests took without it.
    """

    def __init__(self, folder: Path, patience: float) -> None:
        self.tree, self.home, self.patience = folder / "tree", folder / "home", patience
        self.kept, self.output = folder / "kept", folder / "output"
        copy_tree(self.tree)
        self.kept.mkdir()
        for name in ("CI", "PYTHONDONTWRITEBYTECODE"):
            os.environ.pop(name, None)
        os.environ |= {
            "HOME": str(self.home), "XDG_CACHE_HOME": str(self.home), "TMPDIR": str(self.home),
            "PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1",
        }  # fmt: skip
        os.chdir(self.tree)
        sys.dont_write_bytecode = False
        sys.path[:] = [str(self.tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
        for name in HEAVY:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        for name in [name for name in sys.modules if name.split(".")[0] in ("mixconv", "tests")]:
            raise RuntimeError(f"{name} must be imported by the tests, after the mutant is there")
        self.record = self._watch()
        # From here on there is bytecode of all that is not changed, and no more is written.
        os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True

    def _fork(self, work: Callable[[], int], seconds: float) -> int | None:
        """What `work` answers in a child of this process; None if it does not end in time."""
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.kept, self.home)
        child = os.fork()
        if child == 0:
            with self.output.open("wb") as file:
                os.setsid()
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                try:
                    answer = work()
                except BaseException as error:  # whatever it is, no child may go on from here
                    print(repr(error), flush=True)
                    answer = 99
            os._exit(answer)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what the child may have left running
        if done:
            return os.waitstatus_to_exitcode(status)
        os.waitpid(child, 0)
        return None

    def _watch(self) -> Record:
        """Run every test once; a compiled kernel stays in `kept` for all later runs."""
        path = self.tree / ".judge.json"

        def work() -> int:
            import coverage
            import pytest

            seen = coverage.Coverage(source=["mixconv"], data_file=None, config_file=False)
            watch = _Watch(seen)
            seen.start()
            pytest.main([*OPTIONS[:1], *OPTIONS[2:], *TESTS], plugins=[watch])
            seen.stop()
            data, runs = seen.get_data(), {}
            for file in data.measured_files():
                name = Path(file).relative_to(self.tree).as_posix()
                lines = data.contexts_by_lineno(file).items()
                runs[name] = {line: [t for t in tests if t] for line, tests in lines}
            good = {t: s for t, s in watch.seconds.items() if t not in watch.failed}
            path.write_text(json.dumps([good, runs, sorted(watch.failed)]), encoding="utf-8")
            return 0

        if self._fork(work, 3600) != 0:
            raise RuntimeError(
                f"the tests did not run: {self.output.read_text('utf-8', 'replace')[-2000:]}"
            )
        if (self.home / "mixconv").exists():  # something was compiled
            shutil.copytree(self.home / "mixconv", self.kept / "mixconv")
        seconds, runs, failed = json.loads(path.read_text(encoding="utf-8"))
        alone = [test for test in failed if not self._fails_alone([test])]
        lines = {f: {int(k): tests for k, tests in r.items()} for f, r in runs.items()}
        return Record(seconds, lines, alone)

    def _fails_alone(self, tests: Sequence[str]) -> bool:
        """Whether any of these tests fails, in a process that is no fork of this one."""
        command = [sys.executable, "-m", "pytest", *OPTIONS, *tests]
        try:
            run = subprocess.run(command, cwd=self.tree, capture_output=True, timeout=600)
        except subprocess.TimeoutExpired:
            return True
        return run.returncode != 0

    def choose(self, mutant: Mutant) -> list[list[str]]:
        """The tests to ask: those of the nearest file, then the others; fastest first."""
        first, last = mutant.judged
        lines = self.record.runs.get(mutant.path, {})
        found = {test for n in range(first, last + 1) for test in lines.get(n, [])}
        near = f"tests/package/test_{Path(mutant.path).stem.strip('_')}.py"
        files = Counter(test.partition("::")[0] for test in found)
        if not (self.tree / near).exists():
            near = files.most_common(1)[0][0] if files else ""
        seconds = self.record.seconds
        asked: list[list[str]] = [[], []]
        left = self.patience
        for test in sorted(seconds, key=lambda test: (test not in found, seconds[test])):
            file = test.partition("::")[0]
            if (file == near or file in ALWAYS or test in found) and seconds[test] <= left:
                asked[file != near and file not in ALWAYS].append(test)
                left -= seconds[test]
        return [tests for tests in asked if tests]

    def ask(self, asked: Sequence[Sequence[str]]) -> str:
        """The first test that fails, "time" if they do not end; empty if all pass."""
        told = self.tree / ".judge.txt"
        told.unlink(missing_ok=True)

        class Note:
            def pytest_runtest_logreport(self, report: Any) -> None:
                if report.failed:
                    told.write_text(report.nodeid, encoding="utf-8")

        def work() -> int:
            import pytest

            for tests in asked:
                files = sorted({test.partition("::")[0] for test in tests})
                answer = int(pytest.main([*OPTIONS, *files], plugins=[_Chosen(tests), Note()]))
                if answer:
                    return answer
            return 0

        answer = self._fork(work, 120 + 8 * sum(self.record.seconds[t] for ts in asked for t in ts))
        if answer == 0:
            return ""
        if answer is None:
            return "time"
        return told.read_text(encoding="utf-8") if told.exists() else f"exit status {answer}"

    def judge(self, mutant: Mutant) -> str:
        """Who notices the mutant; empty if nobody does."""
        path = self.tree / mutant.path
        source = path.read_bytes()
        path.write_bytes(mutant.apply(source))
        Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
        try:
            if said := self.ask(self.choose(mutant)):
                return said
            alone = self.record.alone
            return "a test in a process of its own" if alone and self._fails_alone(alone) else ""
        finally:
            path.write_bytes(source)
