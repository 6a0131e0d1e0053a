# Generated from notebooks/13_kernel_in_steps_compiled.ipynb by `make book`.
# Edit the notebook, not this file.

"""The package's C++ as libraries, compiled at first use (ours; chapter 13).

Whatever goes wrong on the way is an `OSError` with a reason, up to `load_library`, which answers
None and logs the reason. Linux and macOS.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import torch

__all__ = ["kernel_threads", "load_library", "log", "why_no_library"]


log = logging.getLogger("mixconv")


# The first that compiles is taken: not every compiler has OpenMP or knows -march=native.
_FLAGS = [
    ("-march=native", "-fopenmp"), ("-march=native", "-pthread"),
    ("-mcpu=native", "-fopenmp"), ("-mcpu=native", "-pthread"), ("-pthread",),
]  # fmt: skip

_COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-ignored-attributes")

_TIME_LIMIT = 300.0  # seconds for all tries together: a compiler that hangs must not hang us

_PREFIX = "mixconv-build-"  # of folders in which something is being made

_STALE = 3600.0  # seconds after which such a folder was left by a process that was killed


def _join(names: Sequence[str]) -> str:
    """C++ files of the package, one after another, as one translation unit."""
    folder = files("mixconv.fast")
    parts = [f'#line 1 "{name}"\n{folder.joinpath(name).read_text("utf-8")}' for name in names]
    return "\n".join(parts)


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:  # not Linux: tell computers apart, not processors
        return f"{platform.processor()} {platform.node()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _key(source: str) -> str:
    """The first part of a library's name: all that the library is made from, and for."""
    system = (platform.system(), platform.machine(), *platform.libc_ver())
    flags = (*_COMMON_FLAGS, str(_FLAGS), os.environ.get("CXX", ""))
    parts = "\0".join((source, *flags, *system, _processor()))
    return "mixconv-" + hashlib.sha256(parts.encode()).hexdigest()[:16]


def _full_name(key: str, content: bytes) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _find_stored(folder: Path, key: str) -> Path | None:
    """A library of this key that is whole and that nobody else could have written."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        with contextlib.suppress(OSError):
            _check_owner(path)
            if path.name == _full_name(key, path.read_bytes()):
                return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _check_owner(path: Path) -> None:
    """Raise PermissionError if another user could have put this file or folder there."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise PermissionError(f"{path} is a symbolic link")
    if status.st_uid not in (os.geteuid(), 0):  # root could do anything anyway
        raise PermissionError(f"{path} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} may be written by other users")


def _cache_folder() -> Path:
    """`mixconv` in the user's cache folder, made if it is not there; it need not be writable."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise FileNotFoundError("no home folder")
    folder = Path(os.path.realpath(base), "mixconv")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    return folder


def _sweep(parent: Path) -> None:
    """Remove what builds that were killed have left; never another user's."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            _check_owner(path)
            if time.time() - path.lstat().st_mtime > _STALE:
                shutil.rmtree(path)


@contextlib.contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    """A folder that exists for a `with` statement."""
    _sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _complaint(messages: Path, compiler: str, status: int) -> str:
    """The line of a compiler's messages that says what is wrong."""
    lines = messages.read_text("utf-8", "replace").splitlines()
    telling = [line for line in lines if re.search("error|cannot|No space", line)]
    return (telling or lines or [f"{compiler} failed without a word ({status})"])[0]


def _run(command: Sequence[str], folder: Path, seconds: float) -> str:
    """Run a compiler; returns the line that says why it failed, or nothing."""
    messages, own = folder / "messages", {"LC_ALL": "C", "TMPDIR": str(folder)}
    with messages.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env={**os.environ, **own}, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except BaseException as error:  # also Ctrl-C, which does not reach another group
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"{command[0]} did not end in {_TIME_LIMIT:.0f} s") from None
            raise
    return _complaint(messages, command[0], status) if status else ""


def _compilers() -> list[list[str]]:
    """Compiler commands to try: `$CXX` alone where it is set, else the usual names."""
    if chosen := os.environ.get("CXX", "").strip():
        try:
            command = shlex.split(chosen)
        except ValueError as error:
            raise OSError(f"CXX={chosen!r}: {error}") from None
        if not shutil.which(command[0]):
            raise FileNotFoundError(f"CXX={chosen!r}: there is no such program")
        return [command]
    found = [[path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]
    if not found:
        raise FileNotFoundError("no C++ compiler found")
    return found


def _compile(compilers: Sequence[Sequence[str]], source: str, folder: Path) -> Path:
    """Make a library in a folder, by the first compiler and flags that can."""
    text, library, end = (
        folder / "source.cpp",
        folder / "library.so",
        time.monotonic() + _TIME_LIMIT,
    )
    text.write_text(source, "utf-8")
    for compiler in compilers:
        for flags in _FLAGS:
            command = [*compiler, *_COMMON_FLAGS, *flags, str(text), "-o", str(library)]
            complaint = _run(command, folder, end - time.monotonic())
            if not complaint:
                return library
    raise OSError(complaint)


def _store(library: Path, folder: Path, key: str) -> Path:
    """Put a library into the cache, in one step."""
    target = folder / _full_name(key, library.read_bytes())
    with _new_folder(folder) as beside:
        copy = Path(shutil.copyfile(library, beside / target.name))
        copy.chmod(0o700)
        return copy.replace(target)


def _open(path: Path, source: str) -> ctypes.CDLL:
    """Open a library that must hold every function that its source says it does."""
    library = ctypes.CDLL(str(path))
    for name in re.findall(r'^extern "C" [^(\n]*?(\w+)\(', source, re.MULTILINE):
        if not hasattr(library, name):
            raise OSError(f"the library has no {name}")
    return library


def _build(names: Sequence[str], source: str, cache: Path | None, note: str) -> ctypes.CDLL:
    """Compile a library, store it if that can be done, and open it."""
    compilers = _compilers()
    log.warning("compiling %s, %s: some seconds", " + ".join(names), note)
    with _new_folder(Path(tempfile.gettempdir())) as folder:
        made = _compile(compilers, source, folder)
        if cache:
            with contextlib.suppress(OSError):
                return _open(_store(made, cache, _key(source)), source)
        return _open(made, source)  # an open library outlives its file


def _find_or_build(names: Sequence[str]) -> ctypes.CDLL:
    """The library of these C++ files; OSError with the reason where there is none."""
    if os.name != "posix":
        raise OSError(f"{platform.system()} is not supported")
    source, cache, note = _join(names), None, "once on this machine"
    trouble: OSError | None = None
    try:
        cache = _cache_folder()
        if stored := _find_stored(cache, _key(source)):
            return _open(stored, source)
    except OSError as error:
        trouble, note = error, f"for this process only ({error})"
    try:
        return _build(names, source, cache, note)
    except OSError as error:
        raise OSError("; ".join(str(e) for e in (trouble, error) if e)) from None


def _forked_before_import() -> bool:
    """Whether this process is a fork that has started no program of its own since; on Linux."""
    try:
        fields = Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:  # elsewhere OpenMP is LLVM's
        return False
    return bool(int(fields[6]) & 0x40)  # PF_FORKNOEXEC


def _end_idle_threads(libraries: Sequence[ctypes.CDLL]) -> bool:
    """End the idle threads of GNU's OpenMP; whether none can be left."""
    for library in libraries:
        if not hasattr(library, "GOMP_parallel") or hasattr(library, "__kmpc_fork_call"):
            continue  # no OpenMP, or LLVM's
        if not hasattr(library, "omp_pause_resource_all") or library.omp_pause_resource_all(2):
            return False
    return True


class _Libraries:
    """What this process has opened, and whether its OpenMP threads are its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.known: dict[tuple[str, ...], tuple[ctypes.CDLL | None, str]] = {}
        self.threads_are_ours = not _forked_before_import()
        self.ready_to_fork = False

    def before_fork(self) -> None:
        if self.threads_are_ours:
            ours = [library for library, _ in list(self.known.values()) if library]
            torchs = ctypes.CDLL(torch._C.__file__)
            self.ready_to_fork = _end_idle_threads([torchs, *ours])

    def after_fork_in_child(self) -> None:
        self.lock = threading.Lock()  # another thread may have held it
        self.threads_are_ours = self.threads_are_ours and self.ready_to_fork
        self.ready_to_fork = False

    def get(self, names: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
        """The library and an empty string, or None and the reason."""
        if names not in self.known:
            with self.lock:
                if names not in self.known:
                    self.known[names] = self._try(names)
        return self.known[names]

    @staticmethod
    def _try(names: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
        try:
            return _find_or_build(names), ""
        except OSError as error:
            log.warning("%s not compiled: %s", " + ".join(names), error)
            return None, str(error)


_libraries = _Libraries()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _libraries.before_fork(),
        after_in_child=lambda: _libraries.after_fork_in_child(),
    )


def load_library(*names: str) -> ctypes.CDLL | None:
    """C++ files of the package as one library, compiled at first use; any thread may call.

    The library is kept in `$XDG_CACHE_HOME/mixconv` or `~/.cache/mixconv`; `$CXX` chooses the
    compiler. A compiler that takes more than five minutes is ended.

    Args:
        names: files of `mixconv/fast`, such as "simd.cpp"; joined in this order.

    Returns:
        The library, or None where there cannot be one; one log line says why.

    Source: ours (chapter 13).
    """
    return _libraries.get(names)[0]


def why_no_library(*names: str) -> str:
    """The reason why `load_library(*names)` is None; empty if it is not (ours; chapter 13)."""
    return _libraries.get(names)[1]


def kernel_threads() -> int:
    """How many threads a kernel may use: PyTorch's number, or 1 (ours; chapter 13).

    It is 1 in a forked child whose parent's OpenMP threads could not be ended before the fork:
    one that imports this package after the fork, or with GNU's OpenMP from before GCC 9.
    """
    return torch.get_num_threads() if _libraries.threads_are_ours else 1
