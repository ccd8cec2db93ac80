"""Order and shapes of a model's trained parameters inside a flat vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_privacy.errors import InvalidInputError


@dataclass(frozen=True)
class ParameterLayout:
    """Order and shapes of the trained parameters, as `model.named_parameters()` gives them.

    Parameters that do not require a gradient are not part of an update: a client does not change them.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, model: nn.Module) -> ParameterLayout:
        """Returns the layout of a model's trained parameters.

        Raises:
            InvalidInputError: The model has none.
        """
        trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise InvalidInputError(
                f"expected a model with trainable parameters, got {type(model).__name__} with none that requires a "
                "gradient: call requires_grad_() on those that the clients train"
            )
        return cls(tuple(trained), tuple(trained.values()))

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def dim(self) -> int:
        """P, the number of trained parameters."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the named tensors as one flat vector `[P]`.

        Raises:
            InvalidInputError: A parameter is missing, or one has another shape.
        """
        missing = [name for name in self.names if name not in tensors]
        if missing:
            raise InvalidInputError(f"expected a tensor for every trained parameter, missing: {', '.join(missing)}")
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tensors[name].shape != shape:
                raise InvalidInputError(
                    f"expected {name} of shape {tuple(shape)}, got {tuple(tensors[name].shape)}: "
                    "are these the parameters of this model?"
                )
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Returns a vector `[..., P]` as named tensors `[..., *shape]` (views)."""
        lead = vector.shape[:-1]
        parts = torch.split(vector, self.sizes, dim=-1)
        return {
            name: part.reshape(*lead, *shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }
