"""What the tests against other packages share: imports, random weights, comparisons."""

import copy
import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixconv import MixNet, mixnet_l, mixnet_m, mixnet_s, to_timm

NAMES = ["tf_mixnet_s", "tf_mixnet_m", "tf_mixnet_l", "mixnet_s", "mixnet_m", "mixnet_l"]

BUILD: dict[str, Callable[..., MixNet]] = {"s": mixnet_s, "m": mixnet_m, "l": mixnet_l}

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_KEPT: list[torch.library.Library] = []  # operators vanish with the library that defines them


def mend_torchvision() -> bool:
    """Let a torchvision that was built for another torch be imported; True if it needed that.

    timm imports torchvision, which looks up two operators that its compiled part defines. Beside
    a CPU torch that part does not load, so they are declared here.
    """
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    _KEPT.append(library)
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    importlib.import_module("torchvision")
    return True


def import_timm() -> Any:
    """Import timm, or skip the module that asks for it."""
    try:
        mend_torchvision()
    except ModuleNotFoundError:
        pytest.skip("could not import 'torchvision'", allow_module_level=True)
    return pytest.importorskip("timm")


def options_of(name: str) -> dict[str, Any]:
    """Padding, epsilon and momentum that a timm name stands for."""
    if name.startswith("tf_"):
        return {"padding": "same", "norm_eps": 1e-3}
    return {"padding": "symmetric", "norm_eps": 1e-5}


def build(name: str, weights: Any = None, **options: Any) -> MixNet:
    """Our MixNet for a timm name, without dropout, in evaluation."""
    chosen: dict[str, Any] = {**options_of(name), "drop_rate": 0.0, **options}
    return BUILD[name[-1]](weights=weights, **chosen).eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0, in_channels: int = 3) -> nn.Module:
    """Random statistics, scales and biases that keep activations at a healthy scale."""
    random = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
        elif parameter.dim() == 2:
            parameter.mul_(2)  # logits near 1, so that tolerances mean something
    model.train()(images(8, in_channels, 64, 64, seed=seed + 1))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        mean.add_(0.1 * var.sqrt() * torch.randn(mean.shape, generator=random))
        var.add_(0.1 * var.mean()).mul_(torch.rand(var.shape, generator=random) + 0.5)
    return model.eval()


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within a tolerance relative to the scale (at least 1), and not trivially so."""
    assert ours.shape == theirs.shape
    scale = float(theirs.abs().max())
    assert scale > 0.01, "too small to tell anything"
    worst = float((ours - theirs).abs().max())
    assert worst <= tolerance * max(1.0, scale), f"differ by {worst:.2e} at scale {scale:.2e}"


def step(model: nn.Module, x: Tensor, training: bool) -> tuple[Tensor, nn.Module]:
    """Output and a copy of the model, in float64, whose `.grad`s and statistics are one step on."""
    model = copy.deepcopy(model).double().train(training)
    output = model(x.double())
    probe = images(*output.shape, seed=9).double()
    (output * probe).sum().backward()
    return output.detach(), model


def gradients_as_timm(model: MixNet) -> dict[str, Tensor]:
    """The gradients under timm's names: `to_timm` of a model whose weights they are."""
    holder = copy.deepcopy(model)
    for mine, theirs in zip(holder.parameters(), model.parameters(), strict=True):
        assert theirs.grad is not None
        mine.data = theirs.grad
    return to_timm(holder)


def assert_same_step(ours: MixNet, peer: nn.Module, x: Tensor, training: bool) -> None:
    """Output, every gradient and every statistic agree, in float64."""
    output, ours_after = step(ours, x, training)
    expected, peer_after = step(peer, x, training)
    assert_near(output, expected, 1e-9)
    assert isinstance(ours_after, MixNet)
    gradients = gradients_as_timm(ours_after)
    parameters = dict(peer_after.named_parameters())
    assert parameters.keys() <= gradients.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        scale = max(1.0, float(parameter.grad.abs().max()))
        error = float((gradients[name] - parameter.grad).abs().max())
        assert error <= 1e-8 * scale, f"gradient of {name} differs by {error:.1e}"
    state = to_timm(ours_after)
    for name, buffer in peer_after.named_buffers():
        torch.testing.assert_close(state[name], buffer, rtol=1e-9, atol=1e-9, msg=name)
    assert any(float(g.abs().max()) > 1e-3 for g in gradients.values())
