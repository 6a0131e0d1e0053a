# %% [markdown]
# # 13 · A kernel in steps
#
# How fast can these loops get, and why?
#
# **You will be able to**
# - read a vectorised C++ kernel, built here in four steps;
# - say what each step bought, and why.
#
# **Know first:** [chapter 11](11_why_slow.ipynb).
#
# **Time:** 30 minutes to read. Runs in under 30 seconds on two cores, after the kernel has been compiled once.

# %% [markdown]
# ## The kernel, step by step
#
# Now the loops themselves, in C++, on channels last. First one group, stride 1, one image, channels a multiple of 16. Every step is checked against the one before, and timed by `make bench` on one thread.
#
# **Step 0: loops.** Chapter 1's loops, in another language. `x` and `y` are (height, width, channels).
#
# ```c++
# //| export fast/depthwise_steps.cpp
# // Steps towards depthwise.cpp: one group, stride 1, channels a multiple of 16.
# #include <cstdint>
# #include <vector>
#
# using Int = int64_t;
#
# extern "C" void step0_loops(const float* x, const float* w, float* y, Int height, Int width,
#                             Int channels, Int k) {
#   for (Int c = 0; c < channels; ++c)
#     for (Int oy = 0; oy < height; ++oy)
#       for (Int ox = 0; ox < width; ++ox) {
#         float sum = 0;
#         for (Int ky = 0; ky < k; ++ky)
#           for (Int kx = 0; kx < k; ++kx) {
#             const Int iy = oy + ky - k / 2, ix = ox + kx - k / 2;
#             if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
#             sum += w[(ky * k + kx) * channels + c] * x[(iy * width + ix) * channels + c];
#           }
#         y[(oy * width + ox) * channels + c] = sum;
#       }
# }
# ```
#
# **Step 1: sixteen channels at once.** A vector type holds 16 neighbouring channels. The compiler turns each `+` and `*` on it into one instruction (or a few, where vectors are shorter). The program stays the same; its numbers got wider.
#
# ```c++
# //| export fast/depthwise_steps.cpp
# constexpr int kLanes = 16;
# typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
#
# static Vec at(const float* p) { return *(const Vec*)p; }
#
# extern "C" void step1_lanes(const float* x, const float* w, float* y, Int height, Int width,
#                             Int channels, Int k) {
#   for (Int c = 0; c < channels; c += kLanes)
#     for (Int oy = 0; oy < height; ++oy)
#       for (Int ox = 0; ox < width; ++ox) {
#         Vec sum{};
#         for (Int ky = 0; ky < k; ++ky)
#           for (Int kx = 0; kx < k; ++kx) {
#             const Int iy = oy + ky - k / 2, ix = ox + kx - k / 2;
#             if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
#             sum += at(w + (ky * k + kx) * channels + c) * at(x + (iy * width + ix) * channels + c);
#           }
#         *(Vec*)(y + (oy * width + ox) * channels + c) = sum;
#       }
# }
# ```
#
# **Step 2: no question in the inner loop.** Copy the plane of these 16 channels into a scratch with zeros around it. Then the border test goes.
#
# ```c++
# //| export fast/depthwise_steps.cpp
# static void copy_plane(const float* x, Int height, Int width, Int channels, Int c, Int pad,
#                        Vec* plane) {
#   const Int pitch = width + 2 * pad;
#   for (Int i = 0; i < (height + 2 * pad) * pitch; ++i) plane[i] = Vec{};
#   for (Int iy = 0; iy < height; ++iy)
#     for (Int ix = 0; ix < width; ++ix)
#       plane[(iy + pad) * pitch + ix + pad] = at(x + (iy * width + ix) * channels + c);
# }
#
# extern "C" void step2_scratch(const float* x, const float* w, float* y, Int height, Int width,
#                               Int channels, Int k) {
#   const Int pitch = width + k - 1;
#   std::vector<float> memory((height + k - 1) * pitch * kLanes);
#   Vec* plane = (Vec*)memory.data();
#   for (Int c = 0; c < channels; c += kLanes) {
#     copy_plane(x, height, width, channels, c, k / 2, plane);
#     for (Int oy = 0; oy < height; ++oy)
#       for (Int ox = 0; ox < width; ++ox) {
#         Vec sum{};
#         for (Int ky = 0; ky < k; ++ky)
#           for (Int kx = 0; kx < k; ++kx)
#             sum += at(w + (ky * k + kx) * channels + c) * plane[(oy + ky) * pitch + ox + kx];
#         *(Vec*)(y + (oy * width + ox) * channels + c) = sum;
#       }
#   }
# }
# ```
#
# **Step 3: rows in registers.** A multiply-add takes about four clock ticks, and a core can start two in every tick. But `sum += …` must wait for the sum before it. So compute 14 outputs of a row side by side: 14 sums that do not wait for one another, all in registers. Each weight is loaded once for all 14. The kernel size becomes a template parameter, so that the compiler writes the taps out.
#
# ```c++
# //| export fast/depthwise_steps.cpp
# template <int K>
# static void rows(const Vec* plane, const float* w, float* y, Int height, Int width,
#                  Int channels, Int c) {
#   constexpr int kTile = 14;  // the width must be a multiple of 14 in this step
#   const Int pitch = width + K - 1;
#   for (Int oy = 0; oy < height; ++oy)
#     for (Int ox = 0; ox < width; ox += kTile) {
#       Vec sums[kTile] = {};
#       for (int ky = 0; ky < K; ++ky)
# #pragma GCC unroll 16
#         for (int kx = 0; kx < K; ++kx) {
#           const Vec tap = at(w + (ky * K + kx) * channels + c);
# #pragma GCC unroll 16
#           for (int t = 0; t < kTile; ++t) sums[t] += tap * plane[(oy + ky) * pitch + ox + kx + t];
#         }
# #pragma GCC unroll 16
#       for (int t = 0; t < kTile; ++t) *(Vec*)(y + (oy * width + ox + t) * channels + c) = sums[t];
#     }
# }
#
# extern "C" void step3_rows(const float* x, const float* w, float* y, Int height, Int width,
#                            Int channels, Int k) {
#   std::vector<float> memory((height + k - 1) * (width + k - 1) * kLanes);
#   Vec* plane = (Vec*)memory.data();
#   for (Int c = 0; c < channels; c += kLanes) {
#     copy_plane(x, height, width, channels, c, k / 2, plane);
#     if (k == 3) rows<3>(plane, w, y, height, width, channels, c);
#     if (k == 5) rows<5>(plane, w, y, height, width, channels, c);
#     if (k == 7) rows<7>(plane, w, y, height, width, channels, c);
#     if (k == 9) rows<9>(plane, w, y, height, width, channels, c);
#   }
# }
# ```

# %% [markdown]
# The vector is as wide as the machine's:
#
# ```c++
# //| export fast/simd.cpp
# // Vectors of float32 as wide as the machine's: load, store, activations.
# #include <cstdint>
# #include <cstring>
# #include <initializer_list>
#
# namespace {
#
# #if defined(__AVX512F__)
# constexpr int kLanes = 16, kTile = 14;  // 32 registers: 14 sums, a weight, room for inputs
# #elif defined(__AVX__)
# constexpr int kLanes = 8, kTile = 7;  // 16 registers
# #elif defined(__aarch64__)
# constexpr int kLanes = 4, kTile = 14;
# #else
# constexpr int kLanes = 4, kTile = 7;
# #endif
# constexpr int kShortTile = 7;            // MixNet's last layers are 7 pixels wide
#
# typedef float Vec __attribute__((vector_size(kLanes * 4)));
# typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
# typedef float LooseVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
# ```
#
# Loading and storing. `lanes` is less than a vector where there are fewer channels than that.
#
# ```c++
# //| export fast/simd.cpp
# template <int Size = kLanes>
# inline void copy_lanes(float* to, const float* from, int lanes) {  // kLanes, kLanes / 2, ..., 1
#   if (lanes & Size) std::memcpy(to, from, Size * sizeof(float));
#   if constexpr (Size > 1)
#     copy_lanes<Size / 2>(to + (lanes & Size), from + (lanes & Size), lanes);
# }
#
# inline Vec load(const float* from, int lanes) {
#   if (lanes == kLanes) return *reinterpret_cast<const LooseVec*>(from);
#   Vec v{};
#   copy_lanes(reinterpret_cast<float*>(&v), from, lanes);
#   return v;
# }
#
# // By value: taking an address would drive the sums out of their registers.
# inline void store(float* to, Vec v, int skip, int lanes) {
#   if (lanes == kLanes) *reinterpret_cast<LooseVec*>(to) = v;
#   else copy_lanes(to, reinterpret_cast<const float*>(&v) + skip, lanes);
# }
# ```
#
# SiLU is $x / (1 + e^{-x})$, and C++ has no exponential of a vector. Write $e^x = 2^n e^r$ with a small rest $r$. The power of two goes straight into the exponent bits of a float; $e^r$ is a short polynomial. Below $x = -80$ the result counts as zero. Left as it is, less than $10^{-32}$, it would soon be multiplied into *denormal* numbers, which take a processor many times as long as others.
#
# ```c++
# //| export fast/simd.cpp
# enum Activation { kNone = 0, kRelu = 1, kSilu = 2, kRelu6 = 3, kSigmoid = 4 };
# constexpr float kLowest = -80;  // below, a sigmoid counts as zero
#
# // n is the nearest integer to x / ln 2, so |r| <= ln 2 / 2.
# inline Vec exp_vec(Vec x) {
#   x = x < 87.0f ? x : Vec{} + 87.0f;  // a NaN becomes 87
#   x = x > -87.0f ? x : Vec{} - 87.0f;
#   const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the last bits
#   Vec shifted = x * 1.44269504f + kRound;
#   Vec n = shifted - kRound;
#   Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact
#   Vec p = Vec{} + 1.0f / 5040;
#   for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
#     p = p * r + term;
#   IntVec power = (reinterpret_cast<IntVec>(shifted) - 0x4B400000 + 127) << 23;
#   return p * reinterpret_cast<Vec>(power);
# }
#
# template <int T>
# inline __attribute__((always_inline)) void activate(Vec (&sums)[T], int64_t activation) {
# #pragma GCC unroll 16
#   for (int t = 0; t < T; ++t) {
#     if (activation == kRelu || activation == kRelu6)
#       sums[t] = sums[t] < 0.0f ? Vec{} : sums[t];  // written so that a NaN stays
#     if (activation == kRelu6) sums[t] = sums[t] > 6.0f ? Vec{} + 6.0f : sums[t];
#     if (activation == kSilu || activation == kSigmoid) {
#       const Vec above = activation == kSilu ? sums[t] : Vec{} + 1.0f;
#       const Vec value = above / (1.0f + exp_vec(-sums[t]));
#       const Vec kept = sums[t] == sums[t] ? value : sums[t];  // a NaN stays
#       sums[t] = sums[t] < kLowest ? Vec{} : kept;
#     }
#   }
# }
#
# }  // namespace
#
# extern "C" int simd_lanes() { return kLanes; }
#
# // y = activation of x, for whole vectors: what the chapter and the tests look at.
# extern "C" void simd_activate(const float* x, float* y, int64_t count, int64_t activation) {
#   for (int64_t i = 0; i < count; i += kLanes) {
#     const int lanes = count - i < kLanes ? int(count - i) : kLanes;
#     Vec sums[1] = {load(x + i, lanes)};
#     activate(sums, activation);
#     store(y + i, sums[0], 0, lanes);
#   }
# }
# ```

# %% [markdown]
# ## Finding a compiler
#
# How did `load_library` get from C++ to a function that Python calls? The C++ files lie in the package as text, beside the Python files. At first use the system's compiler makes a library of them. The library is kept in the user's cache folder, `~/.cache/mixconv`, so the wait of some seconds comes once on a machine. `ctypes` opens it.
#
# That sounds like ten lines. It is more, because a program that runs files from a folder has to be careful with them. The rule: whatever goes wrong, `load_library` answers `None`, one line of the log says why, and a form of the operation without a compiler does the work. (The cells are folded: they are manners, and no more loops are in them.)

# %% tags=["plumbing"]
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
#| export fast/native.py
def _join(names: Sequence[str]) -> str:
    """C++ files of the package, one after another, as one translation unit."""
    folder = files("mixconv.fast")
    parts = [f'#line 1 "{name}"\n{folder.joinpath(name).read_text()}' for name in names]
    return "\n".join(parts)


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
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
# **Nobody else's code.** A library that another user could have put there must not run. So the folder and the file must belong to this user, and nobody else may be allowed to write to them. A relative `XDG_CACHE_HOME` is ignored, as its standard demands: it would mean another folder in every working directory. Without a home there is no cache.

# %% tags=["plumbing"]
#| export fast/native.py
def _check_owner(path: Path) -> None:
    """Raise PermissionError if another user could have put this file or folder there."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise PermissionError(f"{path} is a symbolic link")
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} may be written by other users")


# %% tags=["plumbing"]
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
# **No endless wait.** The compiler runs as a process group of its own, with a limit on its time. When that is over, the whole group ends, and with it the programs that the compiler had called.

# %% tags=["plumbing"]
#| export fast/native.py
def _complaint(messages: Path, compiler: str, status: int) -> str:
    """The line of a compiler's messages that says what is wrong."""
    lines = messages.read_text(errors="replace").splitlines()
    telling = [line for line in lines if re.search("error|cannot|No space", line)]
    return (telling or lines or [f"{compiler} failed without a word ({status})"])[0]


# %% tags=["plumbing"]
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
#| export fast/native.py
def _compile(compilers: Sequence[Sequence[str]], source: str, folder: Path) -> Path:
    """Make a library in a folder, by the first compiler and flags that can."""
    text, library, end = (
        folder / "source.cpp",
        folder / "library.so",
        time.monotonic() + _TIME_LIMIT,
    )
    text.write_text(source)
    for compiler in compilers:
        for flags in _FLAGS:
            command = [*compiler, *_COMMON_FLAGS, *flags, str(text), "-o", str(library)]
            complaint = _run(command, folder, end - time.monotonic())
            if not complaint:
                return library
    raise OSError(complaint)


# %% [markdown]
# **In one step.** A finished library is copied beside its place and then renamed. Another process sees all of it or nothing. Two processes that compile at the same time both end with a good one. And where the cache cannot take it (a full disk, a home that is read-only), the library is opened where it was made.

# %% tags=["plumbing"]
#| export fast/native.py
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


# %% tags=["plumbing"]
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
        raise trouble or error from None


# %% [markdown]
# **Threads and forks.** The kernel of the next chapter runs on several threads by OpenMP, which keeps its threads from one call to the next. A process that forks copies only the thread that forked. GNU's OpenMP does not notice: in the child, the next parallel loop waits without end for threads that are not there. It does not matter who started them. Where our library and PyTorch use the same OpenMP (they do on the machine this was written on: `ldd` names one `libgomp.so.1` for both), it is enough that PyTorch had used two threads before the fork.
#
# OpenMP has a call that ends its idle threads, `omp_pause_resource_all`. Called just before a fork, it leaves nothing to wait for. Parent and child both start new threads when they need them. One thread only is used where this could not be done: in a child that imports this package after the fork, or with an OpenMP too old to know the call. (Clang's OpenMP looks after forks by itself.)

# %% tags=["plumbing"]
#| export fast/native.py
def _forked_before_import() -> bool:
    """Whether this process is a fork that has started no program of its own since; on Linux."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
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

    def after_fork_in_parent(self) -> None:
        self.ready_to_fork = False

    def after_fork_in_child(self) -> None:
        self.lock = threading.Lock()  # another thread may have held it
        self.threads_are_ours = self.threads_are_ours and self.ready_to_fork
        self.ready_to_fork = False


# %% tags=["plumbing"]
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
#| export fast/native.py
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _libraries.before_fork(),
        after_in_parent=lambda: _libraries.after_fork_in_parent(),
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
# ## Takeaways
# - Lanes first, then sums that do not wait: each step is compared with the one before it.
# - A fast kernel is a layout, a vector, some sums that do not wait, and a cache that fits.
#
# Previous: [12 · The operation](12_operation.ipynb) · Next: [14 · The whole kernel](14_whole_kernel.ipynb)
