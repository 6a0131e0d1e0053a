"""The shim for torchvision does nothing where torchvision is well."""

import sys
from types import ModuleType

import pytest

from tests.peers import common


def test_a_healthy_torchvision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", healthy)
    kept = list(common._KEPT)
    assert common.mend_torchvision() is False
    assert sys.modules["torchvision"] is healthy
    assert kept == common._KEPT


def test_other_failures_of_torchvision_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError(f"{name}: out of memory")

    kept = list(common._KEPT)
    monkeypatch.setattr("tests.peers.common.importlib.import_module", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        common.mend_torchvision()
    assert kept == common._KEPT  # it did not try


def test_a_missing_torchvision_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(pytest.skip.Exception, match="torchvision"):
        common.import_timm()
