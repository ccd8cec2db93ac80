"""Imports of packages that only an optional extra of this distribution installs."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, *, extra: str = "simulation") -> Any:
    """Returns the imported module, which belongs to an optional extra.

    Args:
        module: Dotted name of the module.
        extra: The extra of this distribution that installs it.

    Raises:
        ImportError: The module's distribution is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the module is there, and something that it needs itself is not
        raise ImportError(
            f"{module} is not installed; it comes with the extra {extra!r}: pip install '.[{extra}]' in a checkout of "
            "fl_privacy"
        ) from error
