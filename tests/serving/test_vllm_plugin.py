"""The entry point by which vLLM finds the backend: declared, called again without harm, and without vLLM too."""

import sys
import tomllib
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType, SimpleNamespace

from dpp_lightning.serving.vllm import register

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


def test_the_entry_point_is_the_function():
    assert resolve_name(PROJECT["project"]["entry-points"]["vllm.general_plugins"]["dpp"]) is register


def test_a_vllm_without_weight_transfer_starts_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    register()


def test_the_backend_is_registered_once(monkeypatch):
    calls = []

    known: dict = {}

    def register_engine(name, module, class_name):
        known[name] = calls.append((module, class_name))

    factory = ModuleType("factory")
    factory.WeightTransferEngineFactory = SimpleNamespace(_registry=known, register_engine=register_engine)
    for part in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.factory", factory)
    register()
    register()
    assert calls == [("dpp_lightning.serving.vllm.engine", "DppEngine")]
