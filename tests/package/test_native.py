"""C++ made into libraries: what can go wrong with compilers, folders, files and forks."""

import ctypes
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mixconv.fast import native

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")

STUB = 'extern "C" int answer() { return 42; }\n'
OTHER_USER = 65534
LIBRARIES = [
    ("depthwise_steps.cpp",),
    ("simd.cpp",),
    ("simd.cpp", "depthwise.cpp"),
    ("simd.cpp", "depthwise.cpp", "inverted_residual.cpp"),
]


# The package's own


@needs_compiler
@pytest.mark.parametrize("names", LIBRARIES, ids=" + ".join)
def test_every_library_of_the_package_compiles(names: tuple[str, ...]) -> None:
    """Where there is a compiler, a kernel that no longer compiles is an error, not a skip."""
    assert native.load_library(*names) is not None, native.why_no_library(*names)


def test_every_source_is_in_a_library() -> None:
    sources = {path.name for path in Path(native.__file__).parent.glob("*.cpp")}
    assert sources == {name for names in LIBRARIES for name in names}


# A process of its own, as far as libraries go


class Process:
    """What a fresh process would do: a stub as the package, a cache and a temporary folder."""

    def __init__(
        self, root: Path, patch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.root, self.patch, self.caplog = root, patch, caplog
        self.source, self.cache, self.temporary = (root / n for n in ("source", "cache", "tmp"))
        for folder in (self.source, self.cache, self.temporary):
            folder.mkdir()
        (self.source / "stub.cpp").write_text(STUB)
        patch.setattr(native, "files", lambda _: self.source)
        patch.setenv("XDG_CACHE_HOME", str(self.cache))
        patch.setattr(tempfile, "tempdir", str(self.temporary))

    def load(self) -> Any:
        """The stub's library, as a process sees it that has opened nothing yet."""
        self.patch.setattr(native, "_libraries", native._Libraries())
        return native.load_library("stub.cpp")

    def why(self) -> str:
        return native.why_no_library("stub.cpp")

    def stored(self) -> Path:
        """The one library in the cache."""
        (path,) = (self.cache / "mixconv").iterdir()
        return path

    def said(self) -> list[str]:
        """Lines of the log."""
        return [record.message for record in self.caplog.records]

    def without_compiler(self) -> None:
        self.patch.setenv("PATH", str(self.root / "nothing"))

    def compiler(self, script: str) -> None:
        """Let `c++` be this shell script, before the real one."""
        folder = self.root / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "c++").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "c++").chmod(0o755)
        self.patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Process:
    monkeypatch.delenv("CXX", raising=False)
    caplog.set_level(logging.INFO, logger="mixconv")
    return Process(tmp_path, monkeypatch, caplog)


def refuse(code: int) -> Callable[..., Any]:
    """A function of the system that always fails."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def litter(process: Process) -> list[str]:
    """What is left in cache and temporary folder beside libraries."""
    left = [*process.temporary.rglob("*"), *(process.cache / "mixconv").glob("*")]
    return [path.name for path in left if path.suffix != ".so" or "mixconv-build" in str(path)]


# The ordinary way


@needs_compiler
def test_compiled_once_and_found_without_a_compiler(process: Process) -> None:
    assert process.load().answer() == 42
    assert ["compiling stub.cpp, once on this machine" in line for line in process.said()] == [True]
    process.without_compiler()
    assert process.load().answer() == 42
    assert process.why() == ""
    assert len(process.said()) == 1
    assert litter(process) == []


@needs_compiler
def test_another_source_is_another_library(process: Process) -> None:
    process.load()
    (process.source / "stub.cpp").write_text(STUB.replace("42", "43"))
    assert process.load().answer() == 43


@needs_compiler
def test_files_are_joined_in_order(process: Process) -> None:
    (process.source / "more.cpp").write_text('extern "C" int more() { return answer() + 1; }\n')
    library = native.load_library("stub.cpp", "more.cpp")
    assert library is not None
    assert library.more() == 43
    assert native.load_library("more.cpp", "stub.cpp") is None
    assert "more.cpp:1" in native.why_no_library("more.cpp", "stub.cpp")


def test_the_name_depends_on_source_compiler_flags_and_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = [native._key(STUB), native._key(STUB + " ")]
    for target, value in (("_processor", lambda: "another"), ("_FLAGS", [("-O0",)])):
        with monkeypatch.context() as patch:
            patch.setattr(native, target, value)
            keys.append(native._key(STUB))
    monkeypatch.setenv("CXX", "another")
    keys.append(native._key(STUB))
    assert len(set(keys)) == len(keys)


@needs_compiler
def test_threads_of_one_process_share_one_library(process: Process) -> None:
    process.patch.setattr(native, "_libraries", native._Libraries())
    found: list[Any] = []
    workers = [
        threading.Thread(target=lambda: found.append(native.load_library("stub.cpp")))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(set(map(id, found))) == 1
    assert len(process.said()) == 1


# No compiler, no folder, no space


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("no-such-compiler", "there is no such program"),
        ('"', "No closing quotation"),
        ("''", "there is no such program"),
        (None, "no C++ compiler found"),
    ],
)
def test_without_a_compiler_one_line_says_why(
    process: Process, chosen: str | None, reason: str
) -> None:
    if chosen is None:
        process.without_compiler()
    else:
        process.patch.setenv("CXX", chosen)
    assert process.load() is None
    assert native.load_library("stub.cpp") is None
    assert reason in process.why()
    assert [reason in line for line in process.said()] == [True]
    assert litter(process) == []


@needs_compiler
def test_a_blank_cxx_chooses_nothing(process: Process) -> None:
    process.patch.setenv("CXX", " ")
    assert process.load() is not None


@needs_compiler
def test_an_error_in_the_source_is_the_reason(process: Process) -> None:
    (process.source / "stub.cpp").write_text("\n\nint answer() { return nothing; }")
    assert process.load() is None
    assert "stub.cpp:3" in process.why()
    assert "nothing" in process.why()


def test_a_package_without_its_sources(process: Process) -> None:
    (process.source / "stub.cpp").unlink()
    assert process.load() is None
    assert "stub.cpp" in process.why()


@needs_compiler
def test_a_library_that_cannot_be_opened(process: Process) -> None:
    """As on a mount without execution."""
    process.patch.setattr(ctypes, "CDLL", refuse(errno.EPERM))
    assert process.load() is None
    assert "not permitted" in process.why()
    assert ["not compiled" in line for line in process.said()] == [False, True]


@needs_compiler
def test_a_cache_from_which_nothing_can_be_opened(process: Process) -> None:
    real = ctypes.CDLL

    def only_elsewhere(path: str) -> Any:
        return refuse(errno.EPERM)() if path.startswith(str(process.cache)) else real(path)

    process.patch.setattr(ctypes, "CDLL", only_elsewhere)
    for _ in range(2):
        assert process.load().answer() == 42
    process.without_compiler()
    assert process.load() is None
    assert "not permitted" in process.why()  # what has gone wrong first,
    assert "no C++ compiler" in process.why()  # and what then


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_no_folder_to_compile_in(process: Process, code: int) -> None:
    process.compiler("exit 0")
    process.patch.setattr(tempfile, "mkdtemp", refuse(code))
    assert process.load() is None
    assert os.strerror(code) in process.why()


def test_no_temporary_folder_at_all(process: Process) -> None:
    process.compiler("exit 0")
    process.patch.setattr(tempfile, "gettempdir", refuse(errno.ENOENT))
    assert process.load() is None


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small disk of its own at this folder."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@needs_root
@needs_compiler
def test_a_real_mount_without_execution(process: Process) -> None:
    with mounted(process.cache, "noexec,size=4m"):
        assert process.load().answer() == 42
        with mounted(process.temporary, "noexec,size=4m"):
            assert process.load() is None
            assert "failed to map segment" in process.why()


@needs_root
@needs_compiler
@pytest.mark.parametrize("full", ["size=8k,mode=755", "nr_inodes=2,mode=755"])
def test_a_real_disk_that_is_full(process: Process, full: str) -> None:
    """Full of bytes, or of names: first the cache, then the temporary folder as well."""
    with mounted(process.cache, full):
        assert process.load().answer() == 42
        assert litter(process) == []
        with mounted(process.temporary, full):
            assert process.load() is None
            assert process.why()
            assert litter(process) == []


@needs_root
@needs_compiler
def test_a_real_disk_that_cannot_be_written(process: Process) -> None:
    with mounted(process.cache, "size=4m,mode=755"), mounted(process.temporary, "size=4m"):
        process.load()
        for folder in (process.cache, process.temporary):
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with process.patch.context() as patch:
            patch.setenv("PATH", "")
            assert process.load().answer() == 42
        (process.source / "stub.cpp").write_text(STUB.replace("42", "43"))
        assert process.load() is None
        assert "Read-only file system" in process.why()


@needs_compiler
def test_a_cache_that_takes_nothing_leaves_nothing(process: Process) -> None:
    process.patch.setattr(shutil, "copyfile", refuse(errno.ENOSPC))
    assert process.load().answer() == 42
    assert list((process.cache / "mixconv").iterdir()) == []
    assert list(process.temporary.iterdir()) == []


@needs_compiler
def test_a_read_only_cache_is_used(process: Process) -> None:
    process.load()
    process.without_compiler()
    for name in ("mkdtemp",):
        process.patch.setattr(tempfile, name, refuse(errno.EROFS))
    for name in ("unlink", "replace", "chmod"):
        process.patch.setattr(Path, name, refuse(errno.EROFS))
    assert process.load().answer() == 42


@needs_compiler
def test_without_a_cache_it_says_so_and_leaves_nothing(process: Process) -> None:
    process.patch.setenv("XDG_CACHE_HOME", "/dev/null")
    for _ in range(2):
        assert process.load().answer() == 42
    assert all("for this process only" in line for line in process.said())
    assert litter(process) == []


# Other people's files


def test_a_relative_cache_home_is_ignored(process: Process) -> None:
    process.patch.setenv("HOME", str(process.root / "home"))
    process.patch.chdir(process.root)
    for relative in ("cache", ".", ""):
        process.patch.setenv("XDG_CACHE_HOME", relative)
        assert native._cache_folder() == process.root / "home" / ".cache" / "mixconv"


@pytest.mark.parametrize("home", [".", "~"])
def test_no_home_is_no_cache(process: Process, home: str) -> None:
    process.patch.delenv("XDG_CACHE_HOME")
    process.patch.setattr(os.path, "expanduser", lambda path: path.replace("~", home))
    process.patch.chdir(process.root)
    with pytest.raises(OSError, match="no home folder"):
        native._cache_folder()
    assert not (process.root / "~").exists()


@needs_compiler
@pytest.mark.parametrize("target", ["folder", "file"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_what_others_may_write_is_not_opened(process: Process, target: str, mode: int) -> None:
    process.load()
    path = process.stored()
    (path if target == "file" else path.parent).chmod(mode)
    assert not opens(process, path)


@needs_root
@needs_compiler
@pytest.mark.parametrize("target", ["folder", "file"])
def test_what_another_user_owns_is_not_opened(process: Process, target: str) -> None:
    process.load()
    path = process.stored()
    os.chown(path if target == "file" else path.parent, OTHER_USER, OTHER_USER)
    assert not opens(process, path)


@needs_root
@needs_compiler
def test_what_root_built_is_used_by_others(process: Process) -> None:
    """As in an image: built by root, run by somebody."""
    process.load()
    process.without_compiler()
    process.patch.setattr(os, "geteuid", lambda: OTHER_USER)
    assert process.load().answer() == 42


@needs_compiler
@pytest.mark.parametrize("target", ["folder", "file"])
def test_a_symbolic_link_is_not_followed(process: Process, target: str) -> None:
    process.load()
    path = process.stored()
    chosen = path if target == "file" else path.parent
    chosen.rename(process.root / "elsewhere")
    chosen.symlink_to(process.root / "elsewhere")
    with pytest.raises(PermissionError, match="is a symbolic link"):
        native._check_owner(chosen)
    assert not opens(process, path)


def opens(process: Process, path: Path) -> bool:
    """Whether a library is opened from this path, which is not the place of a good one."""
    opened = []
    real = ctypes.CDLL

    def note(name: str) -> Any:
        opened.append(name)
        return real(name)

    before = path.stat().st_ino
    process.patch.setattr(ctypes, "CDLL", note)
    assert process.load().answer() == 42
    return str(path) in opened and path.stat().st_ino == before


@needs_compiler
def test_what_lies_under_a_librarys_name_and_is_none_is_removed(process: Process) -> None:
    folder, key = native._cache_folder(), native._key(native._join(["stub.cpp"]))
    other = folder / f"{key}-{'0' * 16}.so"
    other.write_text("not a library")
    assert process.load().answer() == 42
    assert process.stored() != other  # the only one there


# Damaged files: opened, they would end the process, so another process tries


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "text"])
def test_a_damaged_library_is_made_anew(process: Process, damage: str) -> None:
    process.load()
    path = process.stored()
    content = path.read_bytes()
    broken = {
        "cut": content[: len(content) // 3],
        "zeros": content[:1000] + bytes(len(content) - 1000),
        "empty": b"",
        "text": b"not a library",
    }[damage]
    path.unlink()  # this process has the old one open
    path.write_bytes(broken)
    path.chmod(0o700)
    code = (
        "import sys; from pathlib import Path; from mixconv.fast import native\n"
        "native.files = lambda _: Path(sys.argv[1])\n"
        "assert native.load_library('stub.cpp').answer() == 42"
    )
    subprocess.run([sys.executable, "-c", code, str(process.source)], check=True, timeout=60)
    assert process.stored().read_bytes() == content


@needs_compiler
def test_a_library_without_the_functions(process: Process) -> None:
    """A compiler that made something else."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    process.compiler(f'for last; do :; done; echo "int x;" | {compiler} -shared -x c - -o "$last"')
    assert process.load() is None
    assert "has no answer" in process.why()


def test_a_compiler_that_makes_nothing(process: Process) -> None:
    process.compiler("exit 0")
    assert process.load() is None
    assert process.why()
    assert litter(process) == []


# Time


def test_a_compiler_that_hangs_is_ended_with_all_it_began(process: Process) -> None:
    process.patch.setattr(native, "_TIME_LIMIT", 0.5)
    pids = process.root / "pids"
    process.compiler(f"sleep 60 & echo $! $$ > {pids}; touch $TMPDIR/half; wait")
    assert process.load() is None
    assert "did not end" in process.why()
    assert litter(process) == []
    for pid in pids.read_text().split():
        assert not alive(int(pid))


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked about yet does not."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_an_interrupt_ends_the_compiler(process: Process) -> None:
    pids = process.root / "pids"
    process.compiler(f"sleep 60 & echo $! $$ > {pids}; sleep 0.5; kill -INT {os.getpid()}; wait")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            process.load()
    finally:
        signal.signal(signal.SIGINT, before)
    for pid in pids.read_text().split():
        assert not alive(int(pid))
    assert litter(process) == []


@needs_compiler
def test_all_tries_together_have_one_limit(process: Process) -> None:
    """There are several flags to try: none of them has the whole time for itself."""
    process.patch.setattr(native, "_TIME_LIMIT", 1.0)
    process.compiler("sleep 0.4; exit 1")
    assert process.load() is None
    assert "did not end in" in process.why()


@needs_root
@needs_compiler
def test_what_another_user_left_is_not_swept(process: Process) -> None:
    theirs = process.temporary / "mixconv-build-d"
    theirs.mkdir(mode=0o700)
    os.utime(theirs, (0, 0))
    os.chown(theirs, OTHER_USER, OTHER_USER)
    process.load()
    assert theirs.exists()


@needs_compiler
def test_what_is_stored_is_its_owners_alone_whatever_the_umask(process: Process) -> None:
    before = os.umask(0)
    try:
        assert process.load().answer() == 42
    finally:
        os.umask(before)
    path = process.stored()
    assert [p.stat().st_mode & 0o777 for p in (path, path.parent)] == [0o700, 0o700]
    process.without_compiler()
    assert process.load().answer() == 42


@needs_compiler
def test_a_library_comes_to_its_place_in_one_step(process: Process) -> None:
    """Copied there, another process could open half of it."""
    copied: list[Path] = []
    copy = shutil.copyfile

    def note(source: Path, target: Path) -> Any:
        copied.append(Path(target))
        return copy(source, target)

    process.patch.setattr(shutil, "copyfile", note)
    process.load()
    assert len(copied) == 1
    assert copied[0].parent != process.stored().parent


@needs_compiler
def test_what_a_killed_build_left_is_swept(process: Process) -> None:
    (process.cache / "mixconv").mkdir(mode=0o700)
    left = [process.temporary / "mixconv-build-a", process.cache / "mixconv" / "mixconv-build-b"]
    for folder in left:
        folder.mkdir(mode=0o700)
        (folder / "half.so").write_text("half")
        os.utime(folder, (0, 0))
    young = process.temporary / "mixconv-build-c"  # another process may be at work in it
    young.mkdir(mode=0o700)
    process.load()
    assert [folder.exists() for folder in (*left, young)] == [False, False, True]


@needs_compiler
def test_processes_that_compile_at_once(process: Process, tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mixconv.fast import native\n"
        "native.files = lambda _: Path(sys.argv[1])\n"
        "Path(sys.argv[2], str(os.getpid())).touch()\n"
        "while len(os.listdir(sys.argv[2])) < 2: pass\n"  # until both are there
        "assert native.load_library('stub.cpp').answer() == 42"
    )
    (ready := tmp_path / "ready").mkdir()
    command = [sys.executable, "-c", code, str(process.source), str(ready)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=120)[1] for one in running]
    assert [one.returncode for one in running] == [0, 0], said
    assert ["compiling" in text for text in said] == [True, True]  # neither found the other's
    process.without_compiler()
    assert process.load().answer() == 42
    assert litter(process) == []


# Forks

FORK = """
import os, signal, sys, torch
from contextlib import contextmanager
from pathlib import Path
torch.set_num_threads(2)
x = torch.randn(1000, 1000)
before, late = sys.argv[2].split(), "late" in sys.argv[2]

def load():
    from mixconv.fast import native
    native.files = lambda _: Path(sys.argv[1])
    return native, native.load_library("stub.cpp")

if not late:
    native, library = load()
if "kernel" in before:
    assert library.team(native.kernel_threads()) == 2
if "torch" in before:
    torch.relu(x)
for generation in range(2):
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if generation or code < 0:
            os._exit(abs(code))
        assert late or library.team(native.kernel_threads()) == 2
        sys.exit(code)
    signal.alarm(20)
    native, library = load()
    threads = native.kernel_threads()
    assert library.team(threads) == threads
    if not late:
        torch.relu(x)
os._exit(threads)
"""
TEAM = """
#include <atomic>
extern "C" int team(int threads) {
  std::atomic<int> count{0};
#pragma omp parallel num_threads(threads)
  count += 1;
  return count;
}
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP and /proc")
@pytest.mark.parametrize(
    ("before", "threads"),
    [("", 2), ("kernel", 2), ("torch", 2), ("kernel torch", 2), ("late", 1), ("late torch", 1)],
)
def test_after_a_fork(process: Process, before: str, threads: int) -> None:
    """A child, and its child, answer; on one thread only where the package came late."""
    (process.source / "stub.cpp").write_text(TEAM)
    if process.load().team(2) != 2:
        pytest.skip("no OpenMP")
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(process.source), before]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == threads, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_lock_that_another_thread_holds_does_not_hold_up_a_child(process: Process) -> None:
    process.patch.setattr(native, "_libraries", native._Libraries())
    with native._libraries.lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if native._libraries.lock.acquire(timeout=5) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_old_openmp_means_one_thread_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        GOMP_parallel = None

    class Failing(Old):
        @staticmethod
        def omp_pause_resource_all(_: int) -> int:
            return -1

    class Clang(Old):
        __kmpc_fork_call = None

    setattr(Clang, "__kmpc_fork_call", None)
    assert native._end_idle_threads([]) is True
    for runtime, ends in ((Old, False), (Failing, False), (Clang, True), (object, True)):
        assert native._end_idle_threads([runtime()]) is ends  # type: ignore[list-item]
    libraries = native._Libraries()
    monkeypatch.setattr(native, "_libraries", libraries)
    monkeypatch.setattr(native, "_end_idle_threads", lambda _: False)
    torch.set_num_threads(2)
    libraries.before_fork()
    assert native.kernel_threads() == 2  # in the parent
    libraries.before_fork()
    libraries.after_fork_in_child()
    assert native.kernel_threads() == 1
