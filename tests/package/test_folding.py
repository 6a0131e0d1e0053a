"""Norms as lines, lines into convolutions, equal 1×1 convolutions into one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mixconv.fast.folding import (
    FoldedNorm,
    fold_line,
    merge_pointwise,
    norm_as_line,
    refuse_training,
)
from tests.package.common import noise, randomize


def norm_of(channels: int, **options: bool) -> nn.BatchNorm2d:
    """A norm in evaluation with statistics that are all different, some of them extreme."""
    norm = nn.BatchNorm2d(channels, eps=1e-3, **options)
    randomize(norm)
    if norm.running_var is not None:
        norm.running_var[0], norm.running_var[1] = 0.0, 1e6
    return norm.eval()


# A norm as a line


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_is_its_line(affine: bool) -> None:
    norm, x = norm_of(5, affine=affine).double(), noise(2, 5, 3, 4, dtype=torch.float64)
    scale, shift = norm_as_line(norm)
    assert scale.dtype == shift.dtype == torch.float64
    assert scale.shape == shift.shape == (5,)
    torch.testing.assert_close(norm(x), x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))


def test_a_line_by_hand() -> None:
    norm = nn.BatchNorm2d(1, eps=1.0)
    for value, number in ((norm.weight, 6), (norm.bias, 5), (norm.running_mean, 3)):
        assert value is not None
        nn.init.constant_(value, number)
    assert norm.running_var is not None
    norm.running_var.fill_(3)  # and 1 is four: a deviation of two
    scale, shift = norm_as_line(norm)
    assert (scale.item(), shift.item()) == (3, -4)


def test_a_line_is_computed_in_double_precision() -> None:
    """In float32, the product of mean and scale would be rounded here."""
    norm = nn.BatchNorm2d(1, eps=0.0)
    numbers = ((norm.running_mean, 2.0**24 + 2), (norm.weight, 1.5), (norm.bias, 1.5 * 2.0**24))
    for value, number in numbers:
        assert value is not None
        nn.init.constant_(value, number)
    assert norm_as_line(norm)[1].item() == -3  # float32 has even numbers only, so far out


def test_a_norm_without_statistics_has_no_line() -> None:
    with pytest.raises(ValueError, match="without running statistics"):
        norm_as_line(nn.BatchNorm2d(3, track_running_stats=False))


# A line into a convolution


CONVS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(6, 5, 3),
    "without bias, strided, padded": lambda: nn.Conv2d(6, 5, 3, 2, 1, bias=False),
    "depthwise": lambda: nn.Conv2d(6, 6, 5, groups=6),
    "grouped": lambda: nn.Conv2d(6, 9, 1, groups=3, bias=False),
}


@pytest.mark.parametrize("name", list(CONVS))
def test_a_norm_folded_into_a_convolution(name: str) -> None:
    conv = CONVS[name]().double()
    norm, x = norm_of(conv.out_channels).double(), noise(2, 6, 7, 8, dtype=torch.float64)
    wanted = norm(conv(x)).detach()
    fold_line(conv, *norm_as_line(norm))
    torch.testing.assert_close(conv(x), wanted)
    assert [p.requires_grad for p in (conv.weight, conv.bias)] == [False, False]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_keeps_the_type_and_rounds_once(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(2, 3, 1).to(dtype)
    weight, bias = conv.weight.detach().double(), conv.bias.detach().double()  # type: ignore[union-attr]
    scale, shift = (noise(3, seed=seed, dtype=torch.float64) for seed in (1, 2))
    fold_line(conv, scale, shift)
    assert torch.equal(conv.weight, (weight * scale.view(-1, 1, 1, 1)).to(dtype))
    assert torch.equal(conv.bias, (bias * scale + shift).to(dtype))  # type: ignore[arg-type]


# No training


def test_where_a_norm_was_nothing_is_computed_and_nothing_trained() -> None:
    folded, x = FoldedNorm(), noise(1, 3, 2, 2)
    assert folded(x) is x
    assert folded.eval() is folded
    assert folded.train(False) is folded
    for put in (folded.train, nn.Sequential(nn.ReLU(), FoldedNorm()).train):
        with pytest.raises(RuntimeError, match="Train the model you gave to fuse_for_inference"):
            put()
    refuse_training(False)


# 1×1 convolutions


def side_by_side(convs: list[nn.Conv2d], x: Tensor) -> Tensor:
    parts = x.split([conv.in_channels for conv in convs], 1)
    return torch.cat([conv(part) for conv, part in zip(convs, parts, strict=True)], 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equal_1x1_convolutions_are_one(count: int, bias: bool) -> None:
    convs = [nn.Conv2d(4, 3, 1, bias=bias).double() for _ in range(count)]
    merged = merge_pointwise(convs)
    assert merged is not None
    assert (merged.groups, merged.weight.dtype) == (count, torch.float64)
    x = noise(2, 4 * count, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(merged(x), side_by_side(convs, x))
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_merging_keeps_the_mode() -> None:
    for mode in (True, False):
        merged = merge_pointwise([nn.Conv2d(4, 4, 1).train(mode) for _ in range(2)])
        assert merged is not None
        assert merged.training is mode


class Louder(nn.Conv2d):
    """Computes something else than its class's parent."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


OTHERS: dict[str, Callable[[], nn.Conv2d]] = {
    "more outputs": lambda: nn.Conv2d(4, 6, 1),
    "more inputs": lambda: nn.Conv2d(6, 4, 1),
    "no bias": lambda: nn.Conv2d(4, 4, 1, bias=False),
    "a stride": lambda: nn.Conv2d(4, 4, 1, stride=2),
    "a larger kernel": lambda: nn.Conv2d(4, 4, 3),
    "padding": lambda: nn.Conv2d(4, 4, 1, padding=1),
    "padding by name": lambda: nn.Conv2d(4, 4, 1, padding="same"),
    "groups": lambda: nn.Conv2d(4, 4, 1, groups=2),
    "a subclass": lambda: Louder(4, 4, 1),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_others_are_not_merged(name: str) -> None:
    plain = nn.Conv2d(4, 4, 1)
    assert merge_pointwise([plain, OTHERS[name]()]) is None
    assert merge_pointwise([OTHERS[name](), plain]) is None


def test_depthwise_1x1_layers_are_not_pointwise() -> None:
    assert merge_pointwise([nn.Conv2d(1, 1, 1) for _ in range(2)]) is None
