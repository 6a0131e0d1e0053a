"""Weights of gen-efficientnet (geffnet), timm's predecessor, in and out."""

from functools import cache

import pytest
import torch
from torch import nn

from mixconv import to_timm
from tests.peers.common import NAMES, assert_near, assert_same_step, build, images, randomize

geffnet = pytest.importorskip("geffnet")


@cache
def peer(name: str) -> nn.Module:
    torch.manual_seed(NAMES.index(name))
    return randomize(geffnet.create_model(name), NAMES.index(name))


@pytest.mark.parametrize("name", NAMES)
def test_as_many_parameters(name: str) -> None:
    counts = [sum(p.numel() for p in model.parameters()) for model in (build(name), peer(name))]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_logits_at_even_and_odd_sizes(name: str) -> None:
    model = build(name, peer(name).state_dict())
    for shape in [(2, 3, 64, 64), (1, 3, 65, 98)]:
        x = images(*shape)
        with torch.no_grad():
            assert_near(model(x), peer(name)(x))


@pytest.mark.parametrize(
    ("name", "training"), [("tf_mixnet_s", False), ("mixnet_m", True), ("tf_mixnet_l", True)]
)
def test_the_same_gradients_and_statistics(name: str, training: bool) -> None:
    # geffnet sets TensorFlow's momentum only when asked for.
    model = build(name, peer(name).state_dict(), norm_momentum=0.1)
    assert_same_step(model, peer(name), images(2, 3, 49, 64), training)


@pytest.mark.parametrize("name", NAMES)
def test_back_into_geffnet(name: str) -> None:
    ours, theirs = build(name), geffnet.create_model(name).eval()
    randomize(ours, seed=5)
    theirs.load_state_dict(to_timm(ours), strict=True)
    x = images(2, 3, 63, 64)
    with torch.no_grad():
        assert_near(theirs(x), ours(x))


def test_old_files_without_batch_counts_load() -> None:
    state = peer("tf_mixnet_s").state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert_near(build("tf_mixnet_s", old)(x), peer("tf_mixnet_s")(x))
