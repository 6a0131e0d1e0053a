"""The compiled kernel: values, plans, what it declines, memory, threads and processes."""

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv import MixConv2d
from mixconv.fast import block_kernel, kernel
from mixconv.fast import plan as planning
from mixconv.fast.forms import Call
from mixconv.fast.fused_block import BLOCK_FORMS, describe_block_call
from mixconv.fast.kernel import scratch
from mixconv.fast.operation import FORMS, describe_call, mixed_depthwise2d
from mixconv.fast.plan import Strip, cut_strips, plan_layer, strip_costs
from mixconv.fast.spec import ACTIVATIONS, MixSpec, check_spec, pack_weights, split_form
from tests.package.cases import Block, Layer, needs_kernel

ROOT = Path(__file__).parents[2]
PLAIN = MixSpec((12, 8), (3, 5), 1, (1, 1), "symmetric", "none")


def call_of(spec: MixSpec, *sizes: int, threads: int = 1) -> Call:
    """A call that could be, without its tensors."""
    weight = (check_spec(spec)[1],)
    return Call(spec, sizes, torch.float32, "cpu", False, threads, (weight,))


def reasons(call: Call) -> list[str]:
    return FORMS.reasons(call)["kernel"]


# Values


@needs_kernel
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("threads", [1, 3])
def test_random_layers(part: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for seed in range(40 * part, 40 * part + 40):
        layer = Layer(seed)
        call = describe_call(layer.x, pack_weights(layer.weights), layer.bias, layer.spec)
        assert reasons(call) == []
        layer.check()


def test_random_layers_and_rare_ones_whoever_computes() -> None:
    for seed in range(60):
        Layer(seed, rare=True).check()


def test_every_channel_count() -> None:
    for count in range(1, 50):
        layer = Layer(0)
        channels = (count,) if count < 3 else (count // 3, count - count // 3)
        kernels = (3, 5)[: len(channels)]
        layer.spec = MixSpec(channels, kernels, 1 + count % 2, (1,) * len(channels), "same", "none")
        layer.weights = [torch.randn(c, 1, k, k) for c, k in zip(channels, kernels, strict=True)]
        layer.x, layer.bias = torch.randn(1, count, 9, 10), torch.randn(count)
        layer.check(1e-4)


@needs_kernel
def test_a_1x1_group_at_stride_2_with_same_padding() -> None:
    """Its window is one pixel, and needs no zeros: the other groups' padding is not its own."""
    layer = MixConv2d(20, (1, 3, 5, 7), stride=2, padding="same", bias=True).eval()
    convs = [conv for conv in layer.convs if isinstance(conv, nn.Conv2d)]
    channels = tuple(conv.in_channels for conv in convs)
    spec = MixSpec(channels, (1, 3, 5, 7), 2, (1,) * 4, "same", "none")
    weight = pack_weights([conv.weight for conv in convs])
    bias = torch.cat([conv.bias for conv in convs if conv.bias is not None])
    for size in ((1, 1), (2, 2), (7, 8), (9, 30)):
        x = torch.randn(2, 20, *size)
        with torch.no_grad():
            assert reasons(describe_call(x, weight, bias, spec)) == []
            y = mixed_depthwise2d(x, weight, bias, **spec._asdict())
            torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


def test_input_in_any_layout() -> None:
    layer = Layer(0)
    layer.spec = PLAIN._replace(channels=(10, 9))
    layer.weights, layer.bias = [torch.randn(10, 1, 3, 3), torch.randn(9, 1, 5, 5)], None
    base = torch.randn(2, 40, 24, 26)
    views = (base[:, 3:41:2][:, :19, 2:20, ::2], base.transpose(2, 3)[:, :19], base[:1, :19])
    for x in (*views, views[2].expand(4, -1, -1, -1)):
        layer.x = x
        layer.check(1e-4)


def test_parameters_in_any_layout() -> None:
    x, weight, bias = torch.randn(1, 20, 9, 9), torch.randn(308 * 2), torch.randn(20 * 3)
    assert check_spec(PLAIN)[1] == 308
    y = mixed_depthwise2d(x, weight[::2], bias[::3], **PLAIN._asdict())
    torch.testing.assert_close(
        y, split_form(x, weight[::2], bias[::3], PLAIN), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("sizes", [(0, 20, 5, 5), (2, 20, 0, 5), (2, 20, 5, 0), (0, 20, 0, 0)])
def test_nothing_to_do(sizes: tuple[int, ...]) -> None:
    for stride in (1, 2):
        spec = PLAIN._replace(stride=stride)
        y = mixed_depthwise2d(torch.zeros(sizes), torch.zeros(308), **spec._asdict())
        assert y.shape == (*sizes[:2], *(-(-size // stride) for size in sizes[2:]))


@needs_kernel
def test_a_nan_stays_in_its_channel_and_window() -> None:
    x, weight = torch.ones(2, 37, 9, 9), torch.ones(20 * 9 + 17 * 25)
    x[0, 19, 4, 4] = torch.nan
    for activation in ACTIVATIONS:
        y = mixed_depthwise2d(
            x, weight, channels=(20, 17), kernel_sizes=(3, 5), activation=activation
        )
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[0, 19, 3:6, 3:6] = True
        assert torch.equal(y.isnan(), expected)


@needs_kernel
def test_silu_is_accurate() -> None:
    x = torch.linspace(-60, 60, 40001).view(1, 1, 1, -1)
    y = mixed_depthwise2d(x, torch.ones(1), channels=(1,), kernel_sizes=(1,), activation="silu")
    wanted = F.silu(x.double())
    assert ((y - wanted).abs() / wanted.abs().clamp_min(1e-30)).max().item() < 1e-6


def test_the_default_type_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(1, 20, 9, 9), torch.randn(308)
    wanted = split_form(x, weight, None, PLAIN._replace(stride=2))
    for dtype in (torch.float64, torch.bfloat16):
        try:
            torch.set_default_dtype(dtype)
            FORMS.forget()
            monkeypatch.setattr(kernel, "_memory", kernel._Memory())  # half of it would not do
            assert scratch(10, 1).dtype == torch.float32
            y = mixed_depthwise2d(x, weight, **PLAIN._replace(stride=2)._asdict())
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


# Plans


def covered(ranges: list[int], layer: planning.Layer) -> list[tuple[int, ...]]:
    """Every (image, strip, row) that the parts compute, as `for_each_task` in C++ finds them."""
    done: list[tuple[int, ...]] = []
    for begin, end in itertools.pairwise(ranges):
        for place in range(begin, end):
            task, row = divmod(place, layer.band)
            row += task // layer.strips % layer.bands * layer.band
            if row < min(layer.out_height, (task // layer.strips % layer.bands + 1) * layer.band):
                done.append((task // layer.strips // layer.bands, task % layer.strips, row))
    return done


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 64])
def test_parts_cover_everything_once_and_cost_the_same(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "BAND_BYTES", 40_000)
    for seed in range(12):
        layer = Layer(seed)
        sizes = (2, *layer.x.shape[1:3], 17)
        strips = cut_strips(layer.spec, sizes[2], 17, 16)
        costs = strip_costs(layer.spec, sizes[2], 17, strips)
        table = plan_layer(layer.spec, sizes, strips, costs, parts)
        fields = len(planning.Layer._fields)
        plan, ranges = planning.Layer(*table[:fields]), table[fields : fields + parts + 1]
        assert len(table) == fields + parts + 1 + len(strips) * len(Strip._fields)
        done = covered(ranges, plan)
        every = (range(2), range(len(strips)), range(plan.out_height))
        assert len(done) == len(set(done)) == 2 * len(strips) * plan.out_height
        assert all(n in r for place in done for n, r in zip(place, every, strict=True))
        shares = [
            sum(costs[s] for _, s, _ in covered(ranges[i : i + 2], plan)) for i in range(parts)
        ]
        reach = max(strip.kernel for strip in strips) + 1  # rows by which a cut may move
        fair = 2 * plan.out_height * sum(costs) / parts
        assert max(abs(share - fair) for share in shares) <= 2 * reach * max(costs)


def test_strips_cover_all_channels_once_and_stay_inside() -> None:
    for seed in range(100):
        layer = Layer(seed)
        total = sum(layer.spec.channels)
        for lanes in (4, 8, 16):
            strips = cut_strips(layer.spec, 9, 9, lanes)
            written = [s.window + s.skip + i for s in strips for i in range(s.lanes)]
            assert written == list(range(total))
            for s in strips:
                assert 0 <= s.skip <= s.skip + s.lanes <= lanes
                assert 0 <= s.window <= s.window + s.read <= total
                assert (s.window + s.skip) // lanes == (s.window + s.skip + s.lanes - 1) // lanes


@needs_kernel
def test_tables_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field added on one side only would shift all that follows it."""

    class Longer(NamedTuple):
        kernel: int
        more: int

    for name in ("Strip", "Layer"):
        with monkeypatch.context() as patch:
            patch.setattr(kernel, name, Longer)
            with pytest.raises(RuntimeError, match="disagree"):
                kernel.count_lanes(kernel.load_kernel())


# What it declines


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": 3}, "strides 1 and 2"),
        ({"stride": 10**9}, "strides 1 and 2"),
        ({"dilations": (1, 2)}, "no dilation"),
        ({"kernel_sizes": (3, 15)}, "kernel sizes"),
    ],
)
def test_what_has_no_compiled_version_is_declined(change: dict[str, Any], reason: str) -> None:
    spec = PLAIN._replace(**change)
    x, weight = torch.randn(2, 20, 9, 8), torch.randn(check_spec(spec)[1]) / 5
    assert reason in reasons(describe_call(x, weight, None, spec))[0]
    y = mixed_depthwise2d(x, weight, **spec._asdict())
    torch.testing.assert_close(y, split_form(x, weight, None, spec))


def test_other_types_are_declined() -> None:
    call = call_of(PLAIN, 1, 20, 9, 9)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        (text,) = reasons(call._replace(dtype=dtype))
        assert "float32" in text


def test_nothing_is_compiled_for_what_is_declined_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise AssertionError("asked for the library")

    monkeypatch.setattr(kernel, "load_kernel", load)
    assert len(reasons(call_of(PLAIN._replace(stride=3), 1, 20, 9, 9))) == 1
    with pytest.raises(AssertionError, match="asked"):
        reasons(call_of(PLAIN, 1, 20, 9, 9))


def test_without_a_library_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "load_kernel", lambda: None)
    monkeypatch.setattr(kernel, "why_no_library", lambda *names: "the disk is full")
    (text,) = reasons(call_of(PLAIN, 1, 20, 9, 9))
    assert "the disk is full" in text
    FORMS.forget()
    for seed in range(20):
        Layer(seed).check()
    FORMS.forget()


def forget_plans(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Choose anew, and note what the kernel is asked to plan."""
    planned: list[Call] = []
    prepare = kernel.KernelForm.prepare

    def note(self: kernel.KernelForm, call: Call) -> Any:
        planned.append(call)
        return prepare(self, call)

    monkeypatch.setattr(kernel.KernelForm, "prepare", note)
    FORMS.forget()
    return planned


@needs_kernel
def test_extreme_sizes_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring too large for the kernel's memory: it is not asked, and the result is right."""
    huge = call_of(PLAIN, 1, 20, 1, 30_000_000)
    assert "MB of scratch" in reasons(huge)[0]
    assert "MB of scratch" in reasons(call_of(PLAIN, 1, 20, 1, 300_000, threads=512))[0]
    assert reasons(call_of(PLAIN, 10**6, 20, 10**6, 3000)) == []  # many rows need no more memory
    planned, layer = forget_plans(monkeypatch), Layer(next(s for s in range(99) if len(Layer(s).x)))
    layer.check()
    assert len(planned) == 1
    monkeypatch.setattr(kernel, "MOST_NUMBERS", 10)
    FORMS.forget()
    layer.check()
    assert len(planned) == 1
    FORMS.forget()


# Memory


def test_scratch_is_kept_unless_it_is_large_and_is_a_threads_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "_memory", kernel._Memory())  # whatever other tests have kept
    first = scratch(1000, 1)
    assert scratch(900, 1).data_ptr() == first.data_ptr()
    large = scratch(kernel.KEPT_NUMBERS + 1, 1)
    assert large.numel() > kernel.KEPT_NUMBERS
    assert scratch(900, 1).data_ptr() != large.data_ptr()
    others: list[Tensor] = []
    worker = threading.Thread(target=lambda: others.append(scratch(900, 1)))
    worker.start()
    worker.join()
    assert others[0].data_ptr() != scratch(900, 1).data_ptr()


@needs_kernel
def test_the_plan_says_how_much_memory_the_kernel_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers behind what was asked for stay as they are."""
    margin, given = 64, []

    def watched(count: int, parts: int) -> Tensor:
        given.append(torch.full((count + margin,), 7.0))
        return given[-1]

    monkeypatch.setattr(kernel, "scratch", watched)
    for seed in range(40):
        torch.set_num_threads(1 + seed % 3)
        FORMS.forget()
        Layer(seed).check()
    assert len(given) > 20
    assert all(bool((memory[-margin:] == 7).all()) for memory in given)
    FORMS.forget()


def test_large_outputs_ask_for_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only large ones, and only on Linux; the hint reaches no further than the tensor."""
    asked: list[int] = []
    advise = kernel._ask_for_large_pages

    def note(y: Tensor) -> None:
        advise(y)
        asked.append(y.numel())

    monkeypatch.setattr(kernel, "_ask_for_large_pages", note)
    for size in ((1, 3, 5, 7), (1, 16, 800, 700), (2, 3, 0, 0)):
        y = kernel.output_maker(size)(torch.zeros(1))
        assert y.shape == size
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.fill_(1)
    assert asked == ([16 * 800 * 700] if sys.platform == "linux" else [])


def test_rings_lie_apart() -> None:
    """Side by side, what a core fetches ahead of its own ring is the next core's."""
    rows = 7 * (2 * 111 + 7) + 49  # of a 7×7 kernel at stride 2, 112 outputs in a row
    spec = MixSpec((16,), (7,), 2, (1,), "symmetric", "none")
    assert planning.ring_size(spec, 224) >= rows + 8 * (2 * 111 + 7)


@pytest.mark.parametrize(
    ("kernels", "stride", "width", "largest"),
    [
        ((3,), 1, 14, 3 * 16 + 9),  # k rows that 14 outputs see, and k × k weights
        ((3,), 1, 15, 3 * 30 + 9),  # outputs are computed fourteen at a time: 28
        ((7, 3), 2, 28, 7 * 33 + 49),  # the largest kernel's, wherever it stands
        ((3, 7), 2, 29, 7 * 61 + 49),
    ],
)
def test_a_ring_holds_the_rows_and_weights_of_the_largest_kernel(
    kernels: tuple[int, ...], stride: int, width: int, largest: int
) -> None:
    ones = (1,) * len(kernels)
    spec = MixSpec(tuple(8 * n for n in ones), kernels, stride, ones, "symmetric", "none")
    assert planning.ring_size(spec, width) == largest + planning.APART


# Threads and processes


def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, weight = torch.randn(2, 105, 30, 31), torch.randn(105 * 25)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(mixed_depthwise2d(x, weight, channels=(105,), kernel_sizes=(5,)))
    assert all(torch.equal(results[0], result) for result in results)


@needs_kernel
def test_more_threads_than_strips_and_rows() -> None:
    torch.set_num_threads(16)
    x, weight = torch.randn(1, 5, 9, 4000), torch.randn(45)
    spec = MixSpec((5,), (3,), 1, (1,), "symmetric", "none")
    y = mixed_depthwise2d(x, weight, **spec._asdict())
    torch.testing.assert_close(y, split_form(x, weight, None, spec), rtol=1e-4, atol=1e-4)


def test_many_python_threads() -> None:
    cases = [Layer(seed) for seed in range(12)]
    expected, wrong = [case.compute() for case in cases], []

    def work(offset: int) -> None:
        for i in range(len(cases)):
            at = (i + offset) % len(cases)
            if not torch.equal(cases[at].compute(), expected[at]):
                wrong.append(at)

    workers = [threading.Thread(target=work, args=(5 * i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_kernel
def test_fewer_threads_than_asked_for() -> None:
    """OpenMP may give fewer: the work must not be shared out by the number that was wanted."""
    program = """
import torch
from tests.package.cases import Block, Layer
torch.set_num_threads(4)
for seed in range(40):
    Layer(seed).check()
    Block(seed).check()
print("equal")
"""
    env = {**os.environ, "OMP_THREAD_LIMIT": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr[-2000:]


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_answers() -> None:
    code = """
import os, signal, torch
from mixconv.fast.operation import mixed_depthwise2d
torch.set_num_threads(2)
x = torch.randn(4, 64, 28, 28).to(memory_format=torch.channels_last)
w = torch.randn(64 * 25)
def run():
    y = mixed_depthwise2d(x, w, channels=(64,), kernel_sizes=(5,))
    return y.permute(0, 2, 3, 1).numpy().tobytes()
before = run()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if run() == before else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert run() == before
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_plans_anew() -> None:
    """The parent's plans are for threads that a child may not have."""
    Layer(1).compute()
    Block(1).compute()
    assert all(forms.choose.cache_info().currsize for forms in (FORMS, BLOCK_FORMS))
    child = os.fork()
    if child == 0:
        os._exit(sum(forms.choose.cache_info().currsize for forms in (FORMS, BLOCK_FORMS)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert FORMS.choose.cache_info().currsize


@needs_kernel
def test_where_threads_are_not_ours_plans_have_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, block = call_of(PLAIN, 8, 20, 90, 90, threads=4), Block(1)
    block.x = torch.randn(8, block.x.shape[1], 90, 90)
    torch.set_num_threads(4)
    whole = describe_block_call(block.x, *block.packed(), block.spec())
    for allowed in (4, 1):
        cuts: list[int] = []

        def note(*arguments: Any, cuts: list[int] = cuts) -> list[int]:
            cuts.append(arguments[-1])
            return plan_layer(*arguments)

        monkeypatch.setattr(kernel, "plan_layer", note)
        for module in (kernel, block_kernel):
            monkeypatch.setattr(module, "kernel_threads", lambda allowed=allowed: allowed)
        kernel.KernelForm().prepare(layer)
        assert cuts == [allowed]
        assert block_kernel.plan_block(whole, 16)[2] == allowed
