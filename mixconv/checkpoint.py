# Generated from notebooks/08_weights.ipynb by `make book`. Edit the notebook, not this file.

"""Tensors by name from a file, a hub name or a state dict, read as data only (chapter 8)."""

import argparse
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Checkpoint", "read_checkpoint", "read_state_dict"]


class Checkpoint(NamedTuple):
    """Tensors by name, and what is known of where they come from."""

    tensors: dict[str, Tensor]
    names: tuple[str, ...]  # of network, file, folders: whatever may tell, the surest first
    settings: Mapping[str, Any] | None  # as `MixNet.settings` wrote them


def read_state_dict(weights: Any) -> dict[str, Tensor]:
    """Tensors by name from a file, a folder, a hub name, or a state dict.

    Arguments and errors are those of `read_checkpoint`.
    """
    return read_checkpoint(weights).tensors


def read_checkpoint(weights: Any) -> Checkpoint:
    """What a file, a folder, a hub name, or a state dict holds.

    Files are read as data only: nothing in them is executed.

    Args:
        weights: a path to a file, or to a folder with one; `"timm/tf_mixnet_s.in1k"` or another
            hub name with "mixnet" in it, or any with `hf-hub:` before it; or a state dict.

    Raises:
        TypeError: for another kind of thing.
        ValueError: if the file is damaged or holds something else.
        FileNotFoundError: if there is no such file.
        ImportError: naming the extra to install, for `.safetensors` files and hub names.
    """
    if isinstance(weights, Mapping):
        return _unwrap(weights, "the state dict", ())
    if not isinstance(weights, str | os.PathLike):
        kind = type(weights).__name__
        raise TypeError(f"weights must be a path, a name or a state dict, got {kind}")
    path = _find_file(weights)
    data = _read_file(path)
    given = (str(weights),) if isinstance(weights, str) and not Path(weights).exists() else ()
    return _unwrap(data, str(path), (*given, path.name, *_names_beside(path)))


_WRAPPINGS = (
    "state_dict_ema", "model_ema", "params_ema", "ema", "state_dict", "model_state_dict", "model",
    "net", "network", "params", "weights",
)  # fmt: skip

_PREFIX = re.compile(r"^(module\.|_orig_mod\.|model\.|net\.|backbone\.)+")

_LEFT_THERE = re.compile(r"(^|\.)(n_averaged|total_ops|total_params)$")  # by averaging, by thop


def _unwrap(data: Any, where: str, names: tuple[str, ...]) -> Checkpoint:
    """The tensors of a checkpoint, out of the wrappings that training scripts put around."""
    told, seen = names, list[Any]()
    while isinstance(data, Mapping) and not any(data is one for one in seen):
        seen.append(data)
        options = data.get("args", data.get("hyper_parameters"))
        held = [data.get("arch"), getattr(options, "model", None)]
        held += [options.get("model")] if isinstance(options, Mapping) else []
        told = (*(name for name in held if isinstance(name, str)), *told)
        inside = [data[k] for k in _WRAPPINGS if isinstance(data.get(k), Mapping)]
        if not inside:
            break
        data = inside[0]
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        keys = ", ".join(map(repr, list(data)[:6])) if isinstance(data, Mapping) else ""
        found = f"its keys: {keys}" if keys else f"but a {type(data).__name__}"
        raise ValueError(f"{where} holds no state dict of tensors, {found}")
    tensors = {_PREFIX.sub("", str(key)): value for key, value in data.items()}
    tensors = {key: value for key, value in tensors.items() if not _LEFT_THERE.search(key)}
    records = dict(getattr(data, "_metadata", None) or {}).values()
    settings = [r["settings"] for r in records if isinstance(r, Mapping) and "settings" in r]
    return Checkpoint(tensors, told, settings[0] if settings else None)


def _read_file(path: Path) -> Any:
    try:
        begins = _begins(path)
        safetensors = path.suffix == ".safetensors" and not begins.startswith(b"PK")
        if safetensors or begins[8:9] == b"{":  # names lie
            from safetensors.torch import load_file

            return load_file(path)
        _refuse_inflation(path)
        allowed = torch.serialization.safe_globals([argparse.Namespace])  # timm's: only values
        with allowed, path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise ImportError(".safetensors needs safetensors: pip install 'mixconv[hub]'") from None
    except Exception as error:  # damaged files fail in many ways; all mean the same
        raise ValueError(f"{path} holds no readable weights: {_why(path, error)}") from error


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _why(path: Path, error: Exception) -> str:
    """One line; torch's own are many, and advise to run what a file asks for."""
    if isinstance(error, OSError):
        return str(error)
    begins = _begins(path)
    if begins.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer to them; `git lfs pull` gets the file"
    if begins.lstrip().startswith(b"<"):
        return "it is a web page; was the download refused?"
    if code := re.search(r"GLOBAL ([\w.]*\w)", str(error)):
        return f"it asks to run {code[1]}, which is refused; save a state_dict()"
    if "weights_only" in str(error):
        return "it is no state_dict() that torch.save wrote"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _refuse_inflation(path: Path) -> None:
    """Raise ValueError for an archive that unpacks to far more than it takes; torch's do not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > 2 * path.stat().st_size + (1 << 20):
            raise ValueError(f"it would unpack to {size >> 20} MB")


_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "model_best.pth.tar")


def _find_file(weights: str | os.PathLike[str]) -> Path:
    """The file that a path, a folder or a hub name means.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(weights)
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"no weights file in {str(path)!r}: none of {', '.join(_FILES)}"
            )
        return found[0]
    hub = _HUB_NAME.match(weights) if isinstance(weights, str) and not path.exists() else None
    if hub and (hub["said"] or _looks_like_a_hub_name(hub["repository"])):
        return _download(hub["repository"])
    if not path.is_file():
        hint = "" if path.suffix else "; a hub name looks like 'timm/tf_mixnet_s.in1k'"
        raise FileNotFoundError(f"no weights file {str(path)!r}{hint}")
    return path


def _looks_like_a_hub_name(name: str) -> bool:
    """Not a file that is missing: asking the hub for that would take half a minute offline."""
    file = name.endswith((".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt"))
    return "mixnet" in name.lower() and not file and not Path(name).parent.is_dir()


def _names_beside(path: Path) -> list[str]:
    """What the folders around a file are called, and what a `config.json` beside it says."""
    names: list[str] = []
    try:
        described = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        names += [str(described[key]) for key in ("architecture", "model") if key in described]
    except (OSError, ValueError, TypeError):
        pass
    return [*names, *(folder.name for folder in path.absolute().parents[:3])]


_HUB_NAME = re.compile(r"^(?P<said>hf[-_]hub:)?(?P<repository>[\w.-]+/[\w.-]+)$")


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        message = "hub names need huggingface_hub: pip install 'mixconv[hub]'"
        raise ImportError(message) from None
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # offline, unknown name, no permission
        message = f"cannot get {repository!r} from the hub or its cache here: {error}"
        raise ValueError(message) from error
