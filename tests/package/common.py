"""What the package's tests share: random inputs, the official fixtures, comparisons."""

import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixconv import MixNetConfig

DATA = Path(__file__).parents[1] / "data"
PAPER: dict[str, Any] = json.loads((DATA / "paper.json").read_text())
VARIABLES: dict[str, Any] = json.loads((DATA / "variables.json").read_text())

_RECIPE = runpy.run_path(str(DATA / "recipe.py"))

TINY = MixNetConfig(  # a MixNet with all that one can have, in four blocks
    (
        "r1_k3_a1_p1_s11_e1_i8_o8",
        "r2_k3.5_a1.1_p1.1_s22_e3_i8_o16_se0.5_sw",
        "r1_k3.5.7_a1_p1_s22_e2_i16_o24",
    ),
    8,
    32,
)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every parameter and running statistic a value of its own, mild enough for eval."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                values = 0.5 + values.abs()
            elif name.endswith(("norm.weight", "bias", "running_mean")):
                values = float(name.endswith("norm.weight")) + 0.1 * values
            else:
                values *= (1.5 / max(1, tensor[0].numel())) ** 0.5
            tensor.copy_(values)
    return model


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether a model holds exactly the tensors it held before."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's tensors, for `same_state`."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@cache
def official_variables(name: str) -> dict[str, np.ndarray]:
    """The official variables of "mixnet-s" or "mixnet-m" by TensorFlow name, as created."""
    roles = VARIABLES[name]["variables"]
    arrays = [_RECIPE["value"](i, role, tuple(shape)) for i, (role, shape, _) in enumerate(roles)]
    assert _RECIPE["digest"](arrays) == VARIABLES[name]["weights_sha256"]
    return {tf_name: array for (_, _, tf_name), array in zip(roles, arrays, strict=True)}


def official_images(height: int, width: int) -> Tensor:
    """The images of `official.npz`, channels first."""
    return torch.from_numpy(_RECIPE["make_input"](height, width)).permute(0, 3, 1, 2)
