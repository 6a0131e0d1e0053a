"""The kernel under the compiler's own checks, and for processors with shorter vectors."""

import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from mixconv.fast import block_kernel, kernel, native, plan
from mixconv.fast.fused_block import BLOCK_FORMS, BlockSpec, PointwiseSpec, check_block
from mixconv.fast.operation import FORMS
from mixconv.fast.plan import count_parts, cut_strips, plan_layer, ring_size, strip_costs
from mixconv.fast.spec import MixSpec, check_spec, output_size
from tests.package.cases import Block, Layer, needs_kernel
from tests.package.test_fused_block import call_of
from tests.package.test_kernel import call_of as layer_call

# Buffers of the exact size, for plans that Python made; a NaN in y is an output nobody wrote.
PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

struct Case {
  std::vector<int64_t> table;
  int64_t x, y, scratch;
  std::vector<int64_t> parameters;  // weight, bias; or ten of a block; -1: a null pointer
};

using Scratch = std::unique_ptr<float, decltype(&std::free)>;

Scratch aligned(int64_t count) {  // as PyTorch gives it, and ending where it ends
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, count * sizeof(float))) std::abort();
  std::fill_n(static_cast<float*>(memory), count, NAN);
  return {static_cast<float*>(memory), &std::free};
}

int64_t unwritten(const Case& c) {
  std::vector<float> x(c.x, 1.0f), y(c.y, NAN);
  std::vector<std::vector<float>> values;
  for (int64_t count : c.parameters) values.emplace_back(std::max<int64_t>(0, count), 0.01f);
  std::vector<const float*> pointers;
  for (size_t i = 0; i < values.size(); ++i)
    pointers.push_back(c.parameters[i] < 0 ? nullptr : values[i].data());
  const Scratch scratch = aligned(c.scratch);
  if (pointers.size() == 2)
    mixed_depthwise2d(c.table.data(), x.data(), pointers[0], pointers[1], y.data(), scratch.get());
  else
    inverted_residual(c.table.data(), pointers.data(), x.data(), y.data(), scratch.get());
  int64_t count = 0;
  for (float value : y) count += !std::isfinite(value);
  return count;
}

int main() {
  const std::vector<Case> cases = {
CASES
  };
  int64_t bad = 0;
  for (const Case& c : cases) bad += unwritten(c);
  std::printf("%ld outputs not written\n", long(bad));
  return bad ? 1 : 0;
}
"""

MIXES = [
    ((1,), (3,)),
    ((5, 3), (1, 13)),
    ((16, 15), (3, 5)),
    ((20, 17, 17), (3, 5, 7)),
    ((1, 33, 1, 4), (3, 3, 9, 11)),
]
SIZES = [(0, 5, 5), (1, 1, 1), (5, 2, 9), (1, 7, 7), (1, 13, 14), (2, 15, 31), (1, 40, 1)]


def braces(numbers: object) -> str:
    return str([*numbers]).replace("[", "{").replace("]", "}")  # type: ignore[misc]


def layer_case(spec: MixSpec, sizes: tuple[int, int, int], threads: int, lanes: int) -> str:
    """A layer as an entry of the program."""
    (batch, height, width), channels = sizes, sum(spec.channels)
    rows, columns = output_size(height, spec.stride), output_size(width, spec.stride)
    strips = cut_strips(spec, height, width, lanes)
    costs = strip_costs(spec, height, width, strips)
    parts = count_parts(batch * rows * columns * sum(costs), threads)
    table = plan_layer(spec, (batch, channels, height, width), strips, costs, parts)
    numbers = (batch * channels * height * width, batch * channels * rows * columns,
               parts * ring_size(spec, width) * lanes)  # fmt: skip
    bias = channels if spec.activation != "none" else -1
    parameters = check_spec(spec)[1], bias
    return f"{{{braces(table)}, {braces(numbers)[1:-1]}, {braces(parameters)}}},"


def block_case(block: BlockSpec, sizes: tuple[int, int, int], threads: int, lanes: int) -> str:
    """A block as an entry of the program."""
    batch, height, width = sizes
    inputs, weights, biases = check_block(block)
    plain = layer_call(block.mix, batch, inputs, height, width, threads=threads)
    call = plain._replace(spec=block)
    table, scratch, _ = block_kernel.plan_block(call, lanes)
    pixels = block_kernel.output_pixels(call)
    numbers = batch * inputs * height * width, batch * block.project.outputs * pixels, scratch
    parameters = [n for pair in zip(weights, biases, strict=True) for n in pair]
    return f"{{{braces(map(int, table))}, {braces(numbers)[1:-1]}, {braces(parameters)}}},"


def blocks_around(mix: MixSpec) -> list[BlockSpec]:
    """With and without expansion, gate and addition, in one or two groups."""
    c = sum(mix.channels)
    parts = 2 if c % 2 == 0 else 1
    residual = mix.stride == 1
    full = BlockSpec(
        mix, PointwiseSpec(6, c, parts, "silu"), PointwiseSpec(c, 3, 1, "relu"),
        PointwiseSpec(3, c, 1, "sigmoid"),
        PointwiseSpec(c, 6 if residual else 10, parts, "none"), residual,
    )  # fmt: skip
    plain = BlockSpec(mix, None, None, None, PointwiseSpec(c, 10, 1, "relu6"), False)
    return [plain, full]


def cases(lanes: int) -> list[str]:
    """Every mix, size, stride and activation; work is shared out however little it is."""
    found = []
    for index, (channels, kernels) in enumerate(MIXES):
        for number, sizes in enumerate(SIZES):
            for stride in (1, 2):
                activation = ("none", "relu", "silu", "relu6")[(index + number + stride) % 4]
                padding = ("symmetric", "same")[(index + number) % 2]
                spec = MixSpec(channels, kernels, stride, (1,) * len(kernels), padding, activation)
                for threads in (1, 3):
                    found.append(layer_case(spec, sizes, threads, lanes))
                    found += [block_case(b, sizes, threads, lanes) for b in blocks_around(spec)]
    return found


def run(command: list[str], source: str, program: Path) -> subprocess.CompletedProcess[str]:
    """Compile and run; on failure the step that failed."""
    full = [*command, "-x", "c++", "-", "-o", str(program)]
    built = subprocess.run(full, input=source, capture_output=True, text=True, check=False)
    if built.returncode:
        return built
    return subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=300)


def lanes_of(command: list[str]) -> int:
    """Numbers in a vector with these flags."""
    macros = subprocess.run(
        [*command, "-dM", "-E", "-x", "c++", "-"], input="", capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    return 16 if "__AVX512F__" in macros else 8 if "__AVX__" in macros else 4


@needs_kernel
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize("march", ["native", "x86-64"])
def test_no_access_past_a_buffer_no_race(
    sanitizers: str, march: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain threads, not OpenMP's. A trivial program first: not every compiler has the checks."""
    command = [
        *native._compilers()[0], "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all", f"-march={march}", "-pthread", "-Wno-ignored-attributes",
    ]  # fmt: skip
    if run(command, "int main() { return 0; }", tmp_path / "trivial").returncode:
        pytest.skip(f"no -fsanitize={sanitizers} with -march={march} here")
    monkeypatch.setattr(plan, "WORK_OF_A_THREAD", 1)
    torch.set_num_threads(3)
    folder = files("mixconv.fast")
    source = "".join(folder.joinpath(name).read_text() for name in block_kernel.SOURCES)
    program = PROGRAM.replace("CASES", "\n".join(cases(lanes_of(command))))
    done = run(command, source + program, tmp_path / "program")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that has compiled nothing yet, with an empty cache."""
    monkeypatch.setattr(native, "_libraries", native._Libraries())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for forms in (FORMS, BLOCK_FORMS):
        forms.forget()
    yield
    for forms in (FORMS, BLOCK_FORMS):
        forms.forget()


def check_random_cases(count: int) -> None:
    for seed in range(1000, 1000 + count):
        layer, block = Layer(seed), Block(seed)
        call = layer_call(layer.spec, *layer.x.shape)
        assert FORMS.reasons(call) == {"kernel": []}
        assert BLOCK_FORMS.reasons(call_of(block)) == {"kernel": []}
        layer.check()
        block.check()


@needs_kernel
@pytest.mark.parametrize(("march", "lanes"), [("x86-64", 4), ("haswell", 8)])
@pytest.mark.usefixtures("fresh")
def test_shorter_vectors(
    march: str, lanes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a machine without AVX-512, or without AVX, would compile. That failing is no skip."""
    command = [*native._compilers()[0], f"-march={march}"]
    if run(command, "int main() { return 0; }", tmp_path / "trivial").returncode:
        pytest.skip(f"the compiler does not take -march={march}")
    monkeypatch.setattr(native, "_FLAGS", [(f"-march={march}", "-pthread")])
    library = kernel.load_kernel()
    assert library is not None, native.why_no_library(*kernel.SOURCES)
    assert kernel.count_lanes(library) == lanes
    check_random_cases(40)


@needs_kernel
@pytest.mark.usefixtures("fresh")
def test_a_compiler_without_openmp_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FLAGS", [("--no-such-flag",), ("-march=native", "-pthread")])
    assert kernel.load_kernel() is not None
    torch.set_num_threads(3)
    check_random_cases(10)
