# %% [markdown]
# # 13 · A kernel, compiled
#
# The kernel is text in a package. How does it become a function that Python calls, on a machine that nobody has seen, without running a file that another user has put there? The picture shows the way from a request to a library, or to the reason why there is none.
#
# **You will be able to**
# - call C++ from Python with a compiler, `ctypes` and nothing else;
# - name a file so that it cannot be taken for another, or for a damaged one;
# - write a file so that no other process sees half of it;
# - say what a fork does to threads.
#
# **Know first:** [chapter 12](12_operation.ipynb), and the page before this one.
#
# **Time:** 15 minutes to read. Runs in under 20 seconds on two cores. It is the second of two pages, after [A kernel in steps](13_kernel_in_steps.ipynb). Who wants the kernel rather than its packing may go on to [chapter 14](14_whole_kernel.ipynb).

# %% tags=["drawing"]
# fold: The code that draws this
QUESTIONS = [
    "in a cache folder\nof my own, made\nfrom this source,\nfor this processor?",
    "nobody else's,\nand whole?",
    "a compiler, and\nspace to work?",
    "compiled within\nfive minutes?",
]
ENDS = {3.15: "open it", 5.45: "None, and\nthe reason", 7.75: "store it if you\ncan, and open it"}
ARROWS = [  # from, to, the word and its place
    ((1.7, 1.85), (2.3, 1.85), "yes", (1.85, 1.95)),
    ((4, 1.85), (4.6, 1.85), "no: try\nto delete", (4.03, 1.95)),
    ((6.3, 1.85), (6.9, 1.85), "yes", (6.45, 1.95)),
    ((0.85, 2.5), (5.45, 2.5), "no", (3.05, 3.22)),
    ((3.15, 1.2), (3.15, 0.3), "yes", (3.2, 0.75)),
    ((5.45, 1.2), (5.45, 0.4), "no", (5.5, 0.75)),
    ((7.75, 1.2), (7.75, 0.3), "yes", (7.8, 0.75)),
    ((7.4, 1.2), (6.1, 0.15), "no", (6.85, 0.5)),
]

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import show, use_style

use_style()
figure, axis = plt.subplots(figsize=(8, 2.9))
for number, question in enumerate(QUESTIONS):
    corner = (2.3 * number, 1.2)
    axis.add_patch(plt.Rectangle(corner, 1.7, 1.3, facecolor="#e4e4e4", edgecolor="#999999"))
    axis.text(corner[0] + 0.85, 1.85, question, ha="center", va="center", fontsize=8.5)
for x, text in ENDS.items():
    color = "#a34600" if "None" in text else "#0072B2"
    axis.text(x, 0.1, text, ha="center", va="center", color=color, weight="bold", fontsize=9)
for start, end, word, place in ARROWS:
    bend = -0.25 if start[1] > 2 else 0
    arrow = {"arrowstyle": "->", "connectionstyle": f"arc3,rad={bend}"}
    axis.annotate("", end, start, arrowprops=arrow)
    axis.text(*place, word, fontsize=8)
axis.set(xlim=(-0.1, 8.8), ylim=(-0.2, 3.4))
axis.axis("off")
show(
    figure,
    "way_to_a_library.png",
    "The way from a request to a library. One that is in this user's own cache folder, belongs to "
    "this user and is whole is opened. Otherwise it is compiled, stored if possible and opened, if "
    "there is a compiler, space and an end within five minutes. If not, the answer is None and the "
    "reason.",
    caption="Every way ends in a library that is whole and this user's own, or in None with a "
    "reason; none ends in an error.",
)

# %% [markdown]
# ## Twenty lines, and why they are not enough
#
# The C++ files lie in the package as text, beside the Python files. At first use the system's compiler makes a library of them, and `ctypes` opens it. Without any care:

# %%
import ctypes
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

ANSWER = 'extern "C" int answer() { return 42; }'


def compile_and_open(source: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder, "source.cpp"), Path(folder, "library.so")
        text.write_text(source, "utf-8")
        subprocess.run(["c++", "-O3", "-fPIC", "-shared", text, "-o", library], check=True)
        return ctypes.CDLL(str(library))


found = compile_and_open(ANSWER).answer() if shutil.which("c++") else "no compiler here"
assert found in (42, "no compiler here")
found

# %% [markdown]
# C++ has answered. But the wait for the compiler should come once, not in every process, so the library has to be kept, and a program that runs files from a folder must be careful with them. There may be no compiler, no space, no home; or a file that somebody else has put there.
#
# The rule: whatever goes wrong, `load_library` answers `None`, one line of the log says why, and a form of the operation without a compiler does the work. Most cells below are folded, and each fold says what is in it. They are manners, and no loops are in them; read the paragraphs between them first.

# %% tags=["plumbing"]
# fold: What all of it needs: flags, limits
#| export fast/native.py
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


# %% [markdown]
# **The name says what is inside.** A library's file name has two parts. The first is a digest of all that it was made from: source, flags, `$CXX`, and the processor, since `-march=native` makes code for this one alone. A changed source has a new name; machines that share a home do not share a library. The compiler's version is not part of it, so that a library made in a build image is found in a slim image without a compiler. (A newer compiler is therefore not noticed. Delete the folder to make the libraries anew.)

# %% tags=["plumbing"]
# fold: A digest of all that a library is made from
#| export fast/native.py
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


# %% [markdown]
# The second part is a digest of the library itself. A disk that was full, a copy that was cut, a block of zeros: opening such a file would end the process, this one and every later one. Its content no longer fits its name, so it is thrown away and made anew.

# %% tags=["plumbing"]
# fold: A name from the content, and how a stored library is found
#| export fast/native.py
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


# %% [markdown]
# **Nobody else's code.** A library that another user could have put there must not run. So the folder and the file must belong to this user or to root, who can do anything anyway and who often builds the image that others run in; and nobody else may be allowed to write to them. A relative `XDG_CACHE_HOME` is ignored, as its standard demands: it would mean another folder in every working directory. Without a home there is no cache.

# %%
#| export fast/native.py
def _check_owner(path: Path) -> None:
    """Raise PermissionError if another user could have put this file or folder there."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise PermissionError(f"{path} is a symbolic link")
    if status.st_uid not in (os.geteuid(), 0):  # root could do anything anyway
        raise PermissionError(f"{path} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} may be written by other users")


# %% tags=["plumbing"]
# fold: Where the cache is
#| export fast/native.py
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


# %% [markdown]
# **No litter.** Compiling happens in a new temporary folder that only this user can enter, and that goes away at the end. If the process is killed before, the next build sweeps.

# %% tags=["plumbing"]
# fold: A folder that goes away by itself
#| export fast/native.py
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


# %% [markdown]
# **No endless wait.** The compiler calls other programs, an assembler and a linker. A *process group* is a set of processes that a signal reaches together, and theirs is a group of its own. It has a limit on its time; when that is over, the whole group is ended. Ctrl-C reaches only the group that Python is in, so after it, too, the compiler's group is ended from here.

# %% tags=["plumbing"]
# fold: The line that says what is wrong
#| export fast/native.py
def _complaint(messages: Path, compiler: str, status: int) -> str:
    """The line of a compiler's messages that says what is wrong."""
    lines = messages.read_text("utf-8", "replace").splitlines()
    telling = [line for line in lines if re.search("error|cannot|No space", line)]
    return (telling or lines or [f"{compiler} failed without a word ({status})"])[0]


# %% tags=["plumbing"]
# fold: A compiler with a limit on its time
#| export fast/native.py
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


# %% tags=["plumbing"]
# fold: Which compilers are tried
#| export fast/native.py
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


# %% tags=["plumbing"]
# fold: The first compiler and flags that can
#| export fast/native.py
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


# %% [markdown]
# **In one step.** A finished library is copied beside its place and then renamed. Another process sees all of it or nothing. Two processes that compile at the same time both end with a good one. And where the cache cannot take it (a full disk, a home that is read-only), the library is opened where it was made.

# %%
#| export fast/native.py
def _store(library: Path, folder: Path, key: str) -> Path:
    """Put a library into the cache, in one step."""
    target = folder / _full_name(key, library.read_bytes())
    with _new_folder(folder) as beside:
        copy = Path(shutil.copyfile(library, beside / target.name))
        copy.chmod(0o700)
        return copy.replace(target)


# %% tags=["plumbing"]
# fold: Opened, and complete
#| export fast/native.py
def _open(path: Path, source: str) -> ctypes.CDLL:
    """Open a library that must hold every function that its source says it does."""
    library = ctypes.CDLL(str(path))
    for name in re.findall(r'^extern "C" [^(\n]*?(\w+)\(', source, re.MULTILINE):
        if not hasattr(library, name):
            raise OSError(f"the library has no {name}")
    return library


# %% tags=["plumbing"]
# fold: Compile, store, open
#| export fast/native.py
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


# %% tags=["plumbing"]
# fold: Find it, or build it, or say why not
#| export fast/native.py
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


# %% [markdown]
# **Threads and forks.** The kernel of the next chapter runs on several threads by *OpenMP*: the part of a C++ compiler that runs the turns of a loop on several threads (how it looks in the code, is in that chapter). GCC and Clang each have their own. OpenMP keeps its threads from one call to the next. A process that forks copies only the thread that forked. GNU's OpenMP does not notice: in the child, the next parallel loop waits without end for threads that are not there. It does not matter who started them. Where our library and PyTorch use the same copy of OpenMP (`ldd` tells; some builds of PyTorch bring one of their own), the child hangs even if only PyTorch had used two threads before the fork.
#
# OpenMP has a call that ends its idle threads, `omp_pause_resource_all`. Called just before a fork, it leaves nothing to wait for. Parent and child both start new threads when they need them. One thread only is used where this could not be done: in a child that imports this package after the fork, or with an OpenMP too old to know the call. (Clang's OpenMP looks after forks by itself.)

# %% tags=["plumbing"]
# fold: Was this process forked? And how idle threads are ended
#| export fast/native.py
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


# %% tags=["plumbing"]
# fold: What is open, and what happens at a fork
#| export fast/native.py
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


# %% tags=["plumbing"]
# fold: Each library is opened once
#| export fast/native.py
class _Libraries(_Libraries):
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

# %% tags=["plumbing"]
# fold: Asked for at every fork
#| export fast/native.py
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _libraries.before_fork(),
        after_in_child=lambda: _libraries.after_fork_in_child(),
    )


# %% [markdown]
# What the other chapters use of all this are three functions.

# %%
#| export fast/native.py
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


# %% [markdown]
# For example, with a compiler whose name has a quotation mark that is never closed:

# %%
from unittest import mock

with mock.patch.dict(os.environ, CXX='"'):
    log.setLevel(logging.ERROR)  # the line of the log would stand here
    print(load_library("simd.cpp"), "since", why_no_library("simd.cpp"))


# %% [markdown]
# `tests/package/test_native.py` plays the rest: disks that are full or read-only, other users, links, cut files, a compiler that hangs, an interrupt, two processes at once, forks.
#
# ## Exercises
#
# A file is written in pieces, and between them somebody looks at it:

# %%
def three_pieces(path: Path, fail: bool) -> Iterator[bytes]:
    """What is to be written; in between, somebody else looks at the file."""
    for _ in range(3):
        yield b"new "
        assert path.read_text() == "old", "another process saw a part of the new file"
    if fail:
        raise OSError("the disk is full")


# %% [markdown]
# **13.4** ★★ *15 minutes, five lines.* Write the pieces of a file to `path` so that whoever opens it sees the old file or all of the new one, even if the pieces end in the middle with an error. Nothing else may stay in the folder.
#
# <details><summary>Hint: the idea</summary>
#
# Whoever has opened a file goes on reading that file, even if its name is given to another. And a rename is one step, if both names are on the same disk. So write it all to another name first; and what if that fails?
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `with tempfile.TemporaryDirectory(dir=path.parent) as folder:` goes away by itself, error or not.
#
# </details>

# %%
from mixconv.teaching import attempt


def write_in_one_step(path: Path, pieces: Iterator[bytes]) -> None:
    raise NotImplementedError


def test_one_step(answer) -> None:
    for fail, expected in ((True, "old"), (False, "new new new ")):
        with tempfile.TemporaryDirectory() as folder:
            (path := Path(folder, "file")).write_text("old")
            with path.open() as reader:  # another process, that has opened the old file
                with contextlib.suppress(OSError):
                    answer(path, three_pieces(path, fail))
                read = reader.read()
            assert read == "old", f"who had opened the old file reads {read!r}"
            found = {entry.name: entry.read_text() for entry in Path(folder).iterdir()}
            when = "an error" if fail else "success"
            assert found == {"file": expected}, f"after {when} the folder holds {found}"


attempt(write_in_one_step, test_one_step)


# %% tags=["solution"]
# fold: Solution
def write_in_one_step_solution(path: Path, pieces: Iterator[bytes]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # the same disk
        beside = Path(folder, path.name)
        with beside.open("wb") as file:
            file.writelines(pieces)
        beside.replace(path)


def in_its_place(path: Path, pieces: Iterator[bytes]) -> None:
    """open the file itself for writing"""
    with path.open("wb") as file:
        file.writelines(pieces)


def gathered_first(path: Path, pieces: Iterator[bytes]) -> None:
    """gather all pieces, and then write them in one call: into the file itself"""
    path.write_bytes(b"".join(pieces))


def without_a_broom(path: Path, pieces: Iterator[bytes]) -> None:
    """write beside it, and sweep only where all goes well"""
    beside = path.with_suffix(".new")
    with beside.open("wb") as file:
        file.writelines(pieces)
    beside.replace(path)


attempt(
    write_in_one_step_solution,
    test_one_step,
    wrong=[in_its_place, gathered_first, without_a_broom],
)

# %% [markdown]
# ## Takeaways
# - A compiler and `ctypes` are enough to call C++ from Python.
# - A library found on disk is code: nobody else may have written it, and it must be whole.
# - A name that holds a digest of what a file is made from, and one of what is in it, answers most questions before they come up.
# - What is optional must never raise: it answers None, with a reason.
# - End the threads before a fork; the child cannot.
#
# Previous: [13 · A kernel in steps](13_kernel_in_steps.ipynb) · Next: [14 · The whole kernel](14_whole_kernel.ipynb)
