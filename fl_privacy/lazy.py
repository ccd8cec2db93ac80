"""Packages whose names are imported on first use, so that what needs no torch starts without it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns a package's `__getattr__` and `__dir__`.

    Args:
        package: `__name__` of the package.
        homes: Name of the submodule, relative to the package, that each exported name is defined in.
    """
    module = sys.modules[package]

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        # A name may be there by now: importing `fl_privacy.influence` binds the package, which is callable like it.
        return vars(module).setdefault(name, value)

    def names() -> list[str]:
        return sorted(module.__all__)

    return find, names
