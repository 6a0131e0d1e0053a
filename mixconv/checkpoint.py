# Generated from notebooks/08_weights.ipynb by `make book`. Edit the notebook, not this file.

"""Tensors by name from a file, a hub name or a state dict, read as data only (chapter 8)."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["read_state_dict"]


_HUB_NAME = re.compile(r"^(?:hf[-_]hub:)?(?P<repository>[\w.-]+/[\w.-]+)$")

_FILE_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl", ".npz", ".h5")


def read_state_dict(weights: Any) -> dict[str, Tensor]:
    """Tensors by name from a file, a hub name, or a state dict.

    Files are read as data only: nothing in them is executed.

    Raises:
        ValueError: if the file is damaged or holds something else, or the name is no hub name.
        FileNotFoundError: if there is no such file.
        ImportError: naming the extra to install, for `.safetensors` files and hub names.
    """
    if isinstance(weights, Mapping):
        return _unwrap(weights, "the state dict")
    if not isinstance(weights, str | os.PathLike):
        kind = type(weights).__name__
        raise TypeError(f"weights must be a path, a name or a state dict, got {kind}")
    path = Path(weights)
    if isinstance(weights, str) and not path.exists() and not weights.endswith(_FILE_ENDINGS):
        path = _download(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {str(path)!r}")
    return _unwrap(_read_file(path), str(path))


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise ImportError(".safetensors needs safetensors: pip install 'mixconv[hub]'") from None
    except Exception as error:  # damaged files fail in many ways; all mean the same
        raise ValueError(f"{path} holds no readable weights: {error}") from error


def _unwrap(data: Any, where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, out of the wrappings that training scripts put around."""
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise ValueError(f"{where} holds no state dict of tensors")
    prefix = re.compile(r"^(module\.|_orig_mod\.)+")  # of data-parallel and compiled models
    return {prefix.sub("", str(key)): value for key, value in data.items()}


def _download(name: str) -> Path:
    match = _HUB_NAME.match(name)
    if match is None:
        example = "'timm/tf_mixnet_s.in1k'"
        raise ValueError(f"weights must be a file or a hub name such as {example}, got {name!r}")
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        message = "hub names need huggingface_hub: pip install 'mixconv[hub]'"
        raise ImportError(message) from None
    try:
        return Path(hf_hub_download(match["repository"], "model.safetensors"))
    except Exception as error:  # offline, unknown name, no permission
        message = f"cannot get {match['repository']!r} from the hub or its cache here: {error}"
        raise ValueError(message) from error
