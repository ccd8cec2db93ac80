"""How attacks by gradient descent compare updates, and what they ask of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError

Distance = Callable[[Tensor, Tensor], Tensor]
"""(u(x) `[U, P]`, shared `[U, P]`) -> `[U]`, smallest where they agree."""


def relative_squared_distance(update: Tensor, shared: Tensor) -> Tensor:
    """Returns ‖u − s‖²/‖s‖² `[U]`: the matching loss of DGL, in units that do not depend on the model's scale."""
    scale = shared.square().sum(-1).clamp(min=torch.finfo(shared.dtype).tiny)
    return (update - shared).square().sum(-1) / scale


def cosine_distance(update: Tensor, shared: Tensor) -> Tensor:
    """Returns 1 − ⟨u, s⟩/(‖u‖‖s‖) `[U]`: blind to a common factor, such as a client's clipping."""
    return 1 - torch.nn.functional.cosine_similarity(update, shared, dim=-1)


def total_variation(images: Tensor) -> Tensor:
    """Returns the mean absolute difference of neighbouring pixels `[U]` of images `[U, M, C, H, W]`.

    Raises:
        InvalidInputError: The inputs are not images.
    """
    if images.ndim != 5:
        raise InvalidInputError(
            "expected images [units, examples, channels, height, width] for the total variation, got "
            f"{list(images.shape)}: set its weight to 0 for inputs of another kind"
        )
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).sum(-1)
    right = (images[..., 1:] - images[..., :-1]).abs().flatten(1).sum(-1)
    return (down + right) / images[0].numel()
