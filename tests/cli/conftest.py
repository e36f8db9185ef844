"""A library that only writes down how it was called, so that a verb is tested in process and without a model."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from shoal.cli.main import main

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def _apart(monkeypatch, tmp_path):
    """Every command runs in an empty folder, and not under a launcher."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def library(monkeypatch) -> Callable[..., None]:
    """``library("shoal.train.api", train=function)`` puts the functions in the module's place for one test."""

    def put(name: str, **functions: Function) -> None:
        package, _, leaf = name.rpartition(".")
        module = ModuleType(name)
        for attribute, function in functions.items():
            setattr(module, attribute, function)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(importlib.import_module(package), leaf, module, raising=False)

    return put


@pytest.fixture
def shoal(capfd) -> Callable[..., tuple[int, str, str]]:
    """``shoal("train", "--steps", "5")`` -> (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return call
