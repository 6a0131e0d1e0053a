# Generated from notebooks/13_kernel_in_steps.ipynb by `make book`.
# Edit the notebook, not this file.

"""The package's C++ as a library, compiled at first use (ours; chapter 13)."""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

__all__ = ["FLAGS", "compilers", "kernel_threads", "load_library", "log", "why_no_library"]


log = logging.getLogger("mixconv")


# The first that compiles is taken: not every compiler has OpenMP or knows -march=native.
FLAGS = [
    ("-march=native", "-fopenmp"), ("-march=native", "-pthread"),
    ("-mcpu=native", "-fopenmp"), ("-mcpu=native", "-pthread"), ("-pthread",),
]  # fmt: skip

_COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-ignored-attributes")


def compilers() -> list[list[str]]:
    """Compiler commands to try: `$CXX` alone where it is set, else the usual names."""
    if chosen := os.environ.get("CXX"):
        return [shlex.split(chosen)]
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    return [[path] for path in found if path]


def _cpu_identity() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder() -> Path:
    """The user's cache folder, or a private temporary one where that cannot be written."""
    default = os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(os.environ.get("XDG_CACHE_HOME") or default) / "mixconv"
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    return Path(tempfile.mkdtemp(prefix="mixconv-"))


def _compile(command: Sequence[str], source: str, target: Path) -> str:
    """Compile to `target` in one step; returns the compiler's complaint, or nothing."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        full = [*command, *_COMMON_FLAGS, "-x", "c++", "-", "-o", name]
        done = subprocess.run(full, input=source, capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip() or f"exit status {done.returncode}"
        os.chmod(name, 0o700)
        os.replace(name, target)
    except OSError as error:
        return str(error)
    finally:
        Path(name).unlink(missing_ok=True)
    return ""


def _version(command: Sequence[str]) -> str:
    """What a compiler says it is; nothing if it does not run."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


def _recipes(source: str) -> list[tuple[list[str], Path]]:
    """Commands to try, each with the file in the cache that it would make."""
    folder, cpu, recipes = _cache_folder(), _cpu_identity(), []
    for command in compilers():
        if not (version := _version(command)):
            continue
        for flags in FLAGS:
            parts = "\0".join((source, *command, version, *_COMMON_FLAGS, *flags, cpu))
            digest = hashlib.sha256(parts.encode()).hexdigest()[:16]
            recipes.append(([*command, *flags], folder / f"mixconv-{digest}.so"))
    return recipes


def _join(names: Sequence[str]) -> str:
    """C++ files of the package, one after another, as one translation unit."""
    folder = files("mixconv.fast")
    parts = [f'#line 1 "{name}"\n{folder.joinpath(name).read_text()}' for name in names]
    return "\n".join(parts)


def _find_or_build(names: Sequence[str]) -> tuple[ctypes.CDLL | None, str]:
    """The library of some C++ files of the package, or the reason why there is none."""
    source, told, reason = _join(names), False, "no C++ compiler found"
    for command, target in _recipes(source):
        if target.exists():
            with contextlib.suppress(OSError):  # a damaged file: make it again
                return ctypes.CDLL(str(target)), ""
        if not told:
            log.warning("compiling %s, once on this machine: some seconds", " + ".join(names))
            told = True
        complaint = _compile(command, source, target)
        if not complaint:
            return ctypes.CDLL(str(target)), ""
        reason = complaint.splitlines()[0]
    log.warning("%s not compiled: %s", " + ".join(names), reason)
    return None, reason


class _Libraries:
    """What this process has loaded. A forked child gets a fresh lock, and stays on one thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded: dict[tuple[str, ...], tuple[ctypes.CDLL | None, str]] = {}
        self.forked = False

    def after_fork(self) -> None:
        # OpenMP's threads do not survive a fork, and GNU's would be waited for without end.
        self.lock, self.forked = threading.Lock(), True

    def get(self, names: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
        if names not in self.loaded:
            with self.lock:
                if names not in self.loaded:
                    self.loaded[names] = _find_or_build(names)
        return self.loaded[names]


_libraries = _Libraries()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _libraries.after_fork())


def load_library(*names: str) -> ctypes.CDLL | None:
    """C++ files of the package as one library, compiled at first use; any thread may call.

    Args:
        names: files of `mixconv/fast`, such as "simd.cpp"; joined in this order.

    Returns:
        The library, or None where there cannot be one; one log line says why.
    """
    return _libraries.get(names)[0]


def why_no_library(*names: str) -> str:
    """The reason why `load_library(*names)` is None; empty if it is not."""
    return _libraries.get(names)[1]


def kernel_threads() -> int:
    """Threads that a kernel may use: torch's number; one in a forked child."""
    return 1 if _libraries.forked else torch.get_num_threads()
