"""The kernel under the compiler's own checks, and for processors with shorter vectors."""

import random
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import mixconv.fast as fast
from tests.package.test_fast import agrees, fresh, make_case, needs_kernel
from tests.package.test_fast_blocks import Case
from tests.package.test_fast_blocks import agrees as block_agrees

__all__ = ["fresh"]  # a fixture

PROGRAM = r"""
#include <cmath>
#include <cstdio>

struct Weights {
  std::vector<float> weight, bias;
  Pointwise point{};
  Weights(int64_t inputs, int64_t outputs, int64_t groups, int64_t activation) {
    const int64_t panels = groups * ((outputs / groups + kPanel - 1) / kPanel);
    weight.assign(panels * kPanel * (inputs / groups), 0.01f);
    bias.assign(outputs, 0.5f);
    point = {weight.data(), bias.data(), inputs, outputs, groups, activation};
  }
};

// A block around the layer: with and without expansion, gate and addition, in one or two groups.
double whole_block(Sizes sizes, const std::vector<Group>& groups, const std::vector<float>& w,
                   const std::vector<float>& b, int threads) {
  double sum = 0;
  const int64_t batch = sizes.batch, c = sizes.channels;
  sizes.batch = 1;
  for (bool full : {false, true}) {
    const bool residual = full && sizes.stride == 1;
    const int64_t in = full ? 6 : c, out = residual ? in : 10;
    const int64_t parts = full && c % 2 == 0 ? 2 : 1;
    const Weights expand(in, c, parts, kSilu), squeeze(c, 3, 1, kRelu), excite(3, c, 1, kSigmoid);
    const Weights project(c, out, parts, full ? kNone : kRelu6);
    InvertedResidual block{w.data(), b.data(), {}, {}, project.point, residual, batch};
    if (full) block.squeeze = squeeze.point, block.excite = excite.point;
    std::vector<float> x(batch * sizes.height * sizes.width * in, 1.0f);
    std::vector<float> y(batch * sizes.out_height * sizes.out_width * out, NAN);
    const Pointwise* first = full ? &expand.point : nullptr;
    const int64_t count = int64_t(groups.size());
    Plan* alone = new_plan(&sizes, first, groups.data(), count, 1);
    Plan* together = new_plan(&sizes, first, groups.data(), count, threads);
    inverted_residual(&block, alone, together, x.data(), y.data());
    delete_plan(alone);
    delete_plan(together);
    for (float value : y) sum += value;
  }
  return sum;
}

int main() {
  const std::vector<std::vector<Group>> mixes = {
      {{1, 3, 1, 1, 1}},
      {{5, 1, 1, 0, 0}, {3, 13, 1, 6, 6}},
      {{16, 3, 1, 0, 0}, {15, 5, 1, 1, 1}},
      {{20, 3, 1, 1, 1}, {17, 5, 1, 2, 2}, {17, 7, 1, 3, 3}},
      {{1, 3, 3, 3, 3}, {33, 3, 1, 1, 1}, {1, 9, 1, 3, 3}, {4, 11, 1, 5, 5}},
  };
  const std::vector<std::vector<int64_t>> sizes = {
      {0, 5, 5}, {1, 1, 1}, {5, 2, 9}, {1, 7, 7}, {1, 13, 14}, {2, 15, 31}, {1, 40, 1}};
  double sum = 0;
  for (const auto& groups : mixes)
    for (const auto& s : sizes)
      for (int64_t stride = 1; stride <= 3; ++stride)
        for (int64_t activation = 0; activation < 4; ++activation)
          for (int threads : {1, 3}) {
            int64_t channels = 0, weights = 0;
            for (const Group& g : groups)
              channels += g.channels, weights += g.channels * g.kernel * g.kernel;
            const int64_t oh = (s[1] + stride - 1) / stride, ow = (s[2] + stride - 1) / stride;
            std::vector<float> x(s[0] * s[1] * s[2] * channels, 1.0f), w(weights, 0.5f);
            std::vector<float> b(channels, 0.25f), y(s[0] * oh * ow * channels, NAN);
            const Sizes sizes{s[0], s[1], s[2], channels, oh, ow, stride, activation};
            Plan* plan = new_plan(&sizes, nullptr, groups.data(), int64_t(groups.size()), threads);
            mixed_depthwise2d(plan, x.data(), w.data(), activation ? b.data() : nullptr, y.data());
            delete_plan(plan);
            for (float value : y) sum += value;
            if (stride < 3) sum += whole_block(sizes, groups, w, b, threads);
          }
  std::printf("%.1f\n", sum);
  return std::isfinite(sum) ? 0 : 1;  // a NaN: an output that nobody wrote
}
"""


def run(command: list[str], source: str, program: Path) -> subprocess.CompletedProcess[str]:
    """Compile and run; on failure the step that failed."""
    full = [*command, "-x", "c++", "-", "-o", str(program)]
    built = subprocess.run(full, input=source, capture_output=True, text=True, check=False)
    if built.returncode:
        return built
    return subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=300)


@needs_kernel
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize("march", ["native", "x86-64"])
def test_no_access_past_a_buffer_no_race(sanitizers: str, march: str, tmp_path: Path) -> None:
    """Buffers of the exact size. A trivial program first: not every compiler has the checks."""
    command = [
        *fast.compilers()[0], "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all", f"-march={march}", "-pthread", "-Wno-ignored-attributes",
    ]  # fmt: skip
    if run(command, "int main() { return 0; }", tmp_path / "trivial").returncode:
        pytest.skip(f"no -fsanitize={sanitizers} with -march={march} here")
    kernel = files("mixconv").joinpath("mixed_depthwise2d.cpp").read_text()
    done = run(command, kernel + PROGRAM, tmp_path / "program")
    assert done.returncode == 0, done.stderr[-3000:]


@needs_kernel
@pytest.mark.parametrize("flags", [("-march=x86-64",), ("-march=haswell",)])
@pytest.mark.usefixtures("fresh")
def test_shorter_vectors(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine without AVX-512, or without AVX, would compile."""
    monkeypatch.setattr(fast, "FLAGS", [(*flags, "-pthread")])
    if fast.load_kernel() is None:
        pytest.skip(f"the compiler does not take {flags}")
    for i in range(40):
        agrees(make_case(random.Random(1000 + i)))
        block_agrees(Case(1000 + i))


@needs_kernel
@pytest.mark.usefixtures("fresh")
def test_a_compiler_without_openmp_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "FLAGS", [("--no-such-flag",), ("-march=native", "-pthread")])
    assert fast.load_kernel() is not None
    torch.set_num_threads(3)
    for i in range(10):
        agrees(make_case(random.Random(i)))
        block_agrees(Case(i))
