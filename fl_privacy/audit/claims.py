"""What a client says of its defence, set against what its update alone shows: noise, zeros, or neither.

Two facts hold for an update that nobody perturbed, whatever the data:

- Under cross entropy the gradients of one example's logits add up to 0 (Σ_c (p − y)_c = 0), so the columns of the last
  linear layer's change do, and its bias, for any number of examples and steps of SGD. With independent noise of
  standard deviation σ each sum has variance C·σ².
- A linear layer's gradient is a sum of one outer product per example. After r of them (examples times steps), the
  singular values beyond the r-th are noise: (m − r)(n − r) σ² of it where the update stands out of the noise, less
  where it does not, and the largest singular values are noise, too. The least is taken: that of noise alone.

What else moves those numbers (weight decay, a loss that is not cross entropy, more steps than a client admits) adds to
them. So an estimate may come out too large, and a client get away; too small, and so a false alarm, only by chance,
which the number of samples bounds. Each layer, and each fact, gives an estimate of its own from above, and the one
counts that leaves least room: noise on some layers only is found at the others.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_privacy.audit.task import Array
from fl_privacy.errors import InvalidInputError

_SLACK = 0.1
"""How much less than it said a client may have done before it counts, beside what chance allows."""
_ERRORS = 4.0
"""Standard errors that chance is allowed."""
_FEWEST_SAMPLES = 32
"""Fewest samples of an estimate: of less, chance is allowed half of it and more, and a check would be none."""
_LARGEST_SIDE, _MOST_ENTRIES = 1024, 2**22
"""Of a linear layer whose singular values are looked at: what a server can do for every client and round."""


@dataclass(frozen=True, kw_only=True)
class Defence:
    """What is done to an update before it is shared.

    Attributes:
        kind: Name to show, such as `local-dp`.
        noise_std: Standard deviation per parameter of independent noise on the shared update; `None`: none is claimed.
        sparsity: Share of the update's entries that are exactly zero; `None`: not claimed.

    Raises:
        InvalidInputError: A number is out of range.
    """

    kind: str
    noise_std: float | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        """Raises InvalidInputError where a number is out of range."""
        if self.noise_std is not None and not 0 <= self.noise_std < math.inf:
            raise InvalidInputError(f"expected a finite noise_std >= 0, got {self.noise_std}")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise InvalidInputError(f"expected sparsity in [0, 1], got {self.sparsity}")


@dataclass(frozen=True, kw_only=True)
class Traces:
    """What an update alone shows of how it was defended.

    Attributes:
        noise_std: Noise per parameter, from above: what is not noise may be in it. Of several estimates, that which
            leaves least room. `None`: no layer tells.
        samples: Number of independent samples behind it.
        sparsity: Share of entries that are exactly zero.
        explained: Whether so many examples are said to be behind the update that no layer's rank tells anything: more
            cannot be told from the update alone.
    """

    noise_std: float | None
    samples: int
    sparsity: float
    explained: bool = False

    @property
    def relative_error(self) -> float:
        """Standard error of `noise_std`, relative to it: 1/√(2·samples)."""
        return math.inf if self.samples == 0 else 1 / math.sqrt(2 * self.samples)

    def shortfall(self, defence: Defence) -> str:
        """Returns in which way an update has less of a defence than it should, in words; empty if it has it."""
        if defence.noise_std and self.noise_std is not None:
            least = defence.noise_std * (1 - _SLACK) * max(0.0, 1 - _ERRORS * self.relative_error)
            if self.noise_std < least:
                return f"noise of {defence.noise_std:.3g} was to be there, and at most {self.noise_std:.3g} is"
        if defence.sparsity is not None and self.sparsity < defence.sparsity - 0.01:
            return f"{defence.sparsity:.0%} of the entries were to be zero, and {self.sparsity:.0%} are"
        return ""


def find_traces(
    model: nn.Module,
    update: Mapping[str, Array],
    *,
    cross_entropy: bool,
    rank: int | None = None,
    logits: str | None = None,
) -> Traces:
    """Returns what an update shows of its own defence.

    Args:
        model: The model that was trained; its linear layers are looked at.
        update: Shared minus global parameters, by name.
        cross_entropy: Whether the model's last linear layer gives the logits of a cross entropy.
        logits: Name of the linear layer that gives the logits (`logits_layer`). Default: the one that is defined last.
            Of any other layer the sums are no noise, and the estimate too large.
        rank: Most outer products behind a linear layer: examples times local steps, times positions if a layer is
            applied at several. If it is more in truth, the estimate is too large, not too small. `None`: not known.
    """
    linear = [
        name for name, module in model.named_modules() if type(module) is nn.Linear and f"{name}.weight" in update
    ]
    found: list[tuple[float, int]] = []  # energy of noise, number of samples
    last = linear[-1] if linear and logits is None else logits
    if last in linear and cross_entropy:
        weight = update[f"{last}.weight"].astype(np.float64)
        sums = [weight.sum(0)]
        if (bias := update.get(f"{last}.bias")) is not None:
            sums.append(bias.astype(np.float64).sum(keepdims=True))
        off = np.concatenate(sums) / math.sqrt(len(weight))
        found.append((float((off**2).sum()), off.size))
    rank = rank or 0
    layers = [update[f"{name}.weight"] for name in linear] if rank > 0 else []
    layers = [layer for layer in layers if min(layer.shape) <= _LARGEST_SIDE and layer.size <= _MOST_ENTRIES]
    for layer in layers:
        if rank < min(layer.shape):
            beyond = np.linalg.svd(layer.astype(np.float64), compute_uv=False)[rank:]
            of_noise = _singular_values_of_noise(layer.shape)[rank:]
            found.append((float((beyond**2).sum()), int((of_noise**2).sum())))
    estimates = [(math.sqrt(energy / n), n) for energy, n in found if n >= _FEWEST_SAMPLES]
    std, samples = min(estimates, key=lambda estimate: estimate[0] / _room(estimate[1]), default=(None, 0))
    size = sum(array.size for array in update.values())
    zeros = sum(int((array == 0).sum()) for array in update.values())
    explained = bool(layers) and all(rank >= min(layer.shape) for layer in layers)
    return Traces(noise_std=std, samples=samples, sparsity=zeros / max(1, size), explained=explained)


def logits_layer(model: nn.Module, inputs: Tensor) -> str:
    """Returns the name of the linear layer whose output for inputs `[N, *shape]` is the model's; empty: there is none.

    The model is run on a copy.
    """
    net = copy.deepcopy(model).eval()
    given: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda _module, _inputs, output: given.update({name: output})

    for name, module in net.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(note(name))
    with torch.no_grad():
        outputs = net(inputs)
    return next((name for name, output in given.items() if torch.equal(output, outputs)), "")


@functools.cache
def _singular_values_of_noise(shape: tuple[int, ...]) -> Array:
    """Returns those of a matrix of standard normal numbers."""
    noise = np.random.default_rng(0).normal(size=shape)
    values: Array = np.linalg.svd(noise, compute_uv=False)
    return values


def _room(samples: int) -> float:
    """Returns to which share of the true noise an estimate of so many samples may fall by chance."""
    return max(1e-3, 1 - _ERRORS / math.sqrt(2 * samples))
