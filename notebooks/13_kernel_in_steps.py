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

# %%
#| export fast/native.py
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

log = logging.getLogger("mixconv")

# The first that compiles is taken: not every compiler has OpenMP or knows -march=native.
FLAGS = [
    ("-march=native", "-fopenmp"), ("-march=native", "-pthread"),
    ("-mcpu=native", "-fopenmp"), ("-mcpu=native", "-pthread"), ("-pthread",),
]  # fmt: skip
_COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-ignored-attributes")


# %%
#| export fast/native.py
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


# %%
#| export fast/native.py
def _cache_folder() -> Path:
    """The user's cache folder, or a private temporary one where that cannot be written."""
    default = os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(os.environ.get("XDG_CACHE_HOME") or default) / "mixconv"
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    return Path(tempfile.mkdtemp(prefix="mixconv-"))


# %%
#| export fast/native.py
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


# %%
#| export fast/native.py
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


# %%
#| export fast/native.py
def _join(names: Sequence[str]) -> str:
    """C++ files of the package, one after another, as one translation unit."""
    folder = files("mixconv.fast")
    parts = [f'#line 1 "{name}"\n{folder.joinpath(name).read_text()}' for name in names]
    return "\n".join(parts)


# %%
#| export fast/native.py
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


# %%
#| export fast/native.py
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


# %%
#| export fast/native.py
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
# ## Takeaways
# - Lanes first, then sums that do not wait: each step is compared with the one before it.
# - A fast kernel is a layout, a vector, some sums that do not wait, and a cache that fits.
#
# Previous: [12 · The operation](12_operation.ipynb) · Next: [14 · The whole kernel](14_whole_kernel.ipynb)
