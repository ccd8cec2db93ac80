"""How a model's parameters are drawn, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from fl_privacy.errors import InvalidInputError
from fl_privacy.reference.models import init_uniform_

Initialization = Literal["default", "uniform", "normal", "xavier", "kaiming"]


@torch.no_grad()
def initialize_(model: nn.Module, name: str) -> nn.Module:
    """Draws a model's parameters anew, in place, and returns the model; seed torch beforehand.

    Args:
        model: Any module.
        name: A key of `INITIALIZATIONS`.

    Raises:
        InvalidInputError: The name is unknown.
    """
    if name not in INITIALIZATIONS:
        raise InvalidInputError(f"expected an initialization among {', '.join(INITIALIZATIONS)}, got {name!r}")
    INITIALIZATIONS[name](model)
    return model


def _normal(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)


def _fan_in(weight_init: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    """Returns what draws matrices and kernels by their fans, and sets biases to zero; norms keep scale and shift."""

    def draw(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    weight_init(parameter)
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)

    return draw


INITIALIZATIONS: Mapping[str, Callable[[nn.Module], object]] = MappingProxyType(
    {
        "default": lambda model: None,
        "uniform": init_uniform_,
        "normal": _normal,
        "xavier": _fan_in(nn.init.xavier_uniform_),
        "kaiming": _fan_in(nn.init.kaiming_uniform_),
    }
)
"""`default`: as the model was built. `uniform`: U(−0.5, 0.5), `normal`: N(0, 0.5²), both of every parameter.
`xavier`, `kaiming`: uniform by the fans of each weight, biases zero."""
