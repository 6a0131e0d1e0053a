"""What goes in the place of a layer or block: what is refused, before any trial."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mixconv import MixConv2d
from mixconv.fast.describe import BlockParts, describe_block, read_unit
from mixconv.fast.fused_block import FusedBlock
from mixconv.fast.fused_layer import FusedMixConv2d
from mixconv.fast.operation import FORMS
from mixconv.fast.rewrite import FusedConv, fuse_block, fuse_chain, why_no_form
from mixconv.fast.spec import MixSpec
from tests.package.common import noise, randomize


class Block(nn.Module):
    """A depthwise layer, and what follows it."""

    def __init__(self, middle: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.middle, self.last = middle, last

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.middle(x))
        return y


@describe_block.register
def _(block: Block) -> BlockParts:
    return BlockParts([block.middle], [block.last])


def test_a_block_is_one_operation() -> None:
    block = Block(MixConv2d(8, (3, 5)), nn.Conv2d(8, 6, 1)).eval()
    fused = fuse_block(block)
    assert isinstance(fused, FusedBlock)
    with torch.no_grad():
        x = noise(2, 8, 7, 9)
        torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "a 3×3 projection": (
        lambda: MixConv2d(8, (3, 5)), lambda: nn.Conv2d(8, 6, 3, padding=1),
        "something else than a 1×1 convolution",
    ),
    "a projection with a stride": (
        lambda: MixConv2d(8, (3, 5)), lambda: nn.Conv2d(8, 6, 1, stride=2),
        "something else than a 1×1 convolution",
    ),
    "a projection with padding": (
        lambda: MixConv2d(8, (3, 5)), lambda: nn.Conv2d(8, 6, 1, padding=1), "has padding",
    ),
    "nothing that projects": (
        lambda: MixConv2d(8, (3, 5)), nn.Identity, "does not project",
    ),
    "a layer that is not depthwise": (
        lambda: nn.Conv2d(8, 8, 3, padding=1), lambda: nn.Conv2d(8, 6, 1),
        "not one that the operation can express",
    ),
    "no depthwise layer": (
        nn.Identity, lambda: nn.Conv2d(8, 6, 1), "not one that the operation can express",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(REFUSED))
def test_a_block_that_the_operation_cannot_express(what: str) -> None:
    middle, last, reason = REFUSED[what]
    with pytest.raises(ValueError, match=reason):
        fuse_block(Block(middle(), last()).eval())


CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], str, type[nn.Module]]] = {
    "a mixed layer": (lambda: [MixConv2d(8, (3, 5)), nn.ReLU()], "kernel", FusedMixConv2d),
    "merged": (lambda: [MixConv2d(8, (3, 5)), nn.ReLU()], "merged", FusedConv),
    "with an activation that the operation does not know": (
        lambda: [MixConv2d(8, (3, 5)), nn.Sigmoid()], "kernel", FusedConv,
    ),
    "a plain 3×3 layer": (lambda: [nn.Conv2d(8, 8, 3, 1, 1, groups=8)], "kernel", nn.Conv2d),
    "a plain 5×5 layer": (lambda: [nn.Conv2d(8, 8, 5, 1, 2, groups=8)], "kernel", FusedMixConv2d),
}  # fmt: skip


@pytest.mark.parametrize("what", list(CHAINS))
def test_a_chain_keeps_its_length_and_its_values(what: str) -> None:
    make, backend, kind = CHAINS[what]
    row = nn.Sequential(*make())
    row.insert(1, nn.BatchNorm2d(8))
    randomize(row).eval()
    new = fuse_chain(list(row), backend)
    assert len(new) == len(row)
    assert type(new[0]) is kind
    assert not any(module.training for module in new)
    with torch.no_grad():
        x = noise(2, 8, 7, 9)
        torch.testing.assert_close(nn.Sequential(*new)(x), row(x), rtol=1e-4, atol=1e-4)


def test_the_original_is_not_changed() -> None:
    conv, norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    row = nn.Sequential(conv, norm, nn.ReLU())
    randomize(row).eval()
    before = {name: value.clone() for name, value in row.state_dict().items()}
    fuse_chain(list(row), "merged")
    assert all(torch.equal(value, before[name]) for name, value in row.state_dict().items())
    assert read_unit(list(row)).layer is not conv


def test_why_there_is_no_form() -> None:
    spec, like = MixSpec((8,), (3,), 3, (1,), "same", "none"), torch.zeros(1)
    assert "kernel: only strides 1 and 2, not 3" in why_no_form(FORMS, spec, 8, like)
    assert why_no_form(FORMS, spec, 8, like.to("meta")) == "there is no kernel for meta"
