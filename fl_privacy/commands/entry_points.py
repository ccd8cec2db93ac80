"""A user's own model, named as `module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fl_privacy.errors import FLPrivacyError, InvalidInputError

if TYPE_CHECKING:
    from torch import nn

    from fl_privacy.influence.update import Loss


def load_entry(entry: str) -> tuple[nn.Module, Loss]:
    """Returns model and loss from `module:function`; modules of the current folder are found, too.

    Raises:
        InvalidInputError: There is no such function, it fails, or it returns something else.
    """
    from torch import nn

    made = _called(entry)
    model, loss = made if isinstance(made, tuple) and len(made) == 2 else (made, nn.CrossEntropyLoss())
    if not isinstance(model, nn.Module) or not callable(loss):
        raise InvalidInputError(
            f"expected {entry} to return a torch module, or (module, loss), got {type(made).__name__}"
        )
    return model, loss


def model_factory(entry: str) -> Callable[[], nn.Module]:
    """Returns what builds a new model by `module:function`; modules of the current folder are found, too.

    Raises:
        InvalidInputError: From each call: there is no such function, it fails, or it returns something else.
    """
    from torch import nn

    def build() -> nn.Module:
        model = _called(entry)
        if not isinstance(model, nn.Module):
            raise InvalidInputError(f"expected {entry} to return a torch.nn.Module, got {type(model).__name__}")
        return model

    return build


def _called(entry: str) -> Any:
    module_name, _, function_name = entry.partition(":")
    if not module_name or not function_name:
        raise InvalidInputError(f"expected an entry point module:function, got {entry!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
        for name in function_name.split("."):
            found = getattr(found, name)
        return found()
    except FLPrivacyError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise InvalidInputError(f"{entry} cannot be used: {type(error).__name__}: {error}") from error
