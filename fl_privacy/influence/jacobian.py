"""The Jacobian of a client's update with respect to its private inputs, as a linear operator.

J = ∂u/∂x ∈ R^{P×D}, for update u ∈ R^P and private input x ∈ R^D. (The paper's J is our Jᵀ.) J is never formed: only
J·v, Jᵀ·w and G·v with G = JᵀJ ∈ R^{D×D}, for many audit units at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.evaluation import has_batch_norm
from fl_privacy.influence.memory import saved_bytes
from fl_privacy.influence.update import Linearization, UpdateMap

DEFAULT_MEMORY_BUDGET = 2 * 1024**3
"""Bytes of graph that one vectorised pass may keep."""
_CPU_LANES = 64
"""Most units in one pass on a CPU: more of them gain nothing, and cost memory traffic."""


class UpdateJacobian:
    """J = ∂u/∂x of many audit units that share one θ, as products with vectors.

    A unit is a client's batch together with what of it is private: one example, the attacker knowing the rest (unit
    `example`), or all of it (unit `batch`). Flat inputs follow the private inputs' memory order, flat updates the order
    of `model.named_parameters()`.

    Args:
        update: The update map u.
        params: Global parameters θ by name.
        inputs: `[U, N, *shape]`, floating point.
        labels: `[U, N, ...]`.
        private: `[U]`, index of each unit's one private example (D = d, the size of one example). `None`: the whole
            batch is private (D = N·d). Where examples do not interact, only the private one is run, scaled by 1/N.
        memory_budget: Bytes of graph that one pass over units may keep. Units are cut into chunks that
            fit; a unit that does not fit alone is run alone, its graphs rebuilt for every product.
        before_pass: Called before each pass of a product over units; what it raises ends the product, and with it
            whatever asked for it: a time limit's place to stop.

    Raises:
        InvalidInputError: Wrong shapes, dtypes or devices, labels out of range, NaN or infinity, an empty batch.
        NotTwiceDifferentiableError: On the first product, if the loss has no second derivatives.
    """

    def __init__(
        self,
        update: UpdateMap,
        params: Mapping[str, Tensor],
        inputs: Tensor,
        labels: Tensor,
        *,
        private: Tensor | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        before_pass: Callable[[], None] | None = None,
    ) -> None:
        _check_arguments(update, params, inputs, labels, private, memory_budget)
        self._update = update
        self._params = {name: p.detach() for name, p in params.items()}
        self._theta = update.layout.flatten(params)
        self._batch = (inputs.detach(), labels)
        self._memory_budget = memory_budget
        self._before_pass = before_pass
        self._private = private
        self._scale = 1.0
        self._inputs, self._labels = self._batch
        self._slot = private
        if private is not None and not _examples_interact(update, params, inputs, labels, before_pass):
            # u is a mean of one term per example: J has only the private one's, over N.
            rows = torch.arange(len(inputs), device=inputs.device)
            self._inputs, self._labels = inputs[rows, private, None], labels[rows, private, None]
            self._slot, self._scale = None, 1.0 / inputs.shape[1]
        self._weights: Tensor | None = None
        self._lane_bytes: int | None = None
        self._kept: dict[int, Linearization] = {}

    @property
    def num_units(self) -> int:
        """U, the number of audit units."""
        return self._inputs.shape[0]

    @property
    def input_dim(self) -> int:
        """D, the number of private input elements of one unit."""
        per_example = math.prod(self._inputs.shape[2:])
        return per_example if self._slot is not None else per_example * self._inputs.shape[1]

    @property
    def update_dim(self) -> int:
        """P, the number of trained parameters."""
        return self._update.layout.dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of every product."""
        return self._inputs.dtype

    @property
    def device(self) -> torch.device:
        """Device of every product."""
        return self._inputs.device

    @property
    def memory_budget(self) -> int:
        """Bytes of graph that one pass may keep."""
        return self._memory_budget

    @property
    def private_inputs(self) -> Tensor:
        """Private inputs x, flattened, `[U, D]`."""
        inputs, _ = self._batch
        if self._private is None:
            return inputs.reshape(self.num_units, -1)
        return inputs[torch.arange(self.num_units, device=self.device), self._private].reshape(self.num_units, -1)

    def update(self) -> Tensor:
        """Returns u(x) `[U, P]`, the undefended update of the whole batch."""
        inputs, labels = self._batch
        size = 1 if self.num_units == 1 else self.lanes_per_pass  # of one unit there is nothing to measure
        chunks = [slice(i, i + size) for i in range(0, self.num_units, size)]
        update = torch.cat(
            [self._update.update(self._params, self._lanes(inputs[c]), inputs[c], labels[c]) for c in chunks]
        )
        return update if self._weights is None else self._weights * update

    def jvp(self, vectors: Tensor) -> Tensor:
        """Returns J·v `[U, P]` for v `[U, D]`."""
        product = self._apply(
            lambda lin, v, lanes: self._scaled(lin.jvp(self._spread(v, lanes)), 1), vectors, self.input_dim
        )
        return product if self._weights is None else self._weights * product

    def vjp(self, vectors: Tensor) -> Tensor:
        """Returns Jᵀ·w `[U, D]` for w `[U, P]`."""
        if self._weights is not None and vectors.shape == self._weights.shape:
            vectors = self._weights * vectors
        return self._apply(
            lambda lin, w, lanes: self._scaled(self._gathered(lin.vjp(w), lanes), 1), vectors, self.update_dim
        )

    def gram(self, vectors: Tensor) -> Tensor:
        """Returns G·v = JᵀJ·v `[U, D]` for v `[U, D]`."""
        if self._weights is not None:
            return self.vjp(self.jvp(vectors))
        return self._apply(
            lambda lin, v, lanes: self._scaled(self._gathered(lin.gram(self._spread(v, lanes)), lanes), 2),
            vectors,
            self.input_dim,
        )

    def pulled_back_update(self) -> Tensor:
        """Returns Jᵀu `[U, D]`, u being the private inputs' own part of the update.

        It leans to G's largest eigenvalue far more than a random vector does: what an input changes most of its update
        is mostly the update's length. On a ResNet18 Lanczos finds λ_max from it in half the steps.
        """
        parts = [self._gathered(lin.vjp(lin.update()), lanes) for lanes, lin in self._linearizations()]
        return self._scaled(torch.cat(parts), 2)

    def select(self, units: Tensor) -> UpdateJacobian:
        """Returns the Jacobian of the given units `[V]` (indices, repeats allowed)."""
        chosen = object.__new__(UpdateJacobian)
        chosen.__dict__.update(self.__dict__)
        inputs, labels = self._batch
        chosen._batch = (rows_of(inputs, units), rows_of(labels, units))
        chosen._inputs, chosen._labels = rows_of(self._inputs, units), rows_of(self._labels, units)
        chosen._private = None if self._private is None else self._private[units]
        chosen._slot = None if self._slot is None else self._slot[units]
        chosen._weights = None if self._weights is None else self._weights[units]
        chosen._kept = {}
        return chosen

    def shifted(self, shift: Tensor, *, bounds: tuple[float | Tensor, float | Tensor] | None = None) -> UpdateJacobian:
        """Returns the Jacobian at x + a; its `update()` is what a client shares that hides its input behind a.

        Args:
            shift: a `[U, D]`.
            bounds: Lowest and highest valid input, numbers or tensors that broadcast to one example's shape. Where
                x + a leaves them it is moved to the nearest valid value. That is a function of x + a alone, so it tells
                no more of x than x + a does: the leakage that a was made for still holds.

        Raises:
            InvalidInputError: Another shape, dtype or device, NaN or infinity, or a private input that is itself
                outside the bounds.
        """
        _check_shift(self, shift)
        inputs, _ = self._batch
        rows = torch.arange(self.num_units, device=self.device)
        private = inputs if self._private is None else inputs[rows, self._private, None]  # [U, N or 1, *shape]
        moved = private + shift.reshape(private.shape)
        if bounds is not None:
            moved = _within(bounds, private, moved)
        changed = object.__new__(UpdateJacobian)
        changed.__dict__.update(self.__dict__)
        changed._kept = {}
        if self._private is None:
            changed._batch = (moved, self._labels)
            changed._inputs = moved
            return changed
        batch = inputs.clone()
        batch[rows, self._private] = moved[:, 0]
        changed._batch = (batch, self._batch[1])
        changed._inputs = moved if self._slot is None else batch
        return changed

    def weighted(self, weights: Tensor) -> UpdateJacobian:
        """Returns diag(w)J, the Jacobian of an update whose entries are multiplied by weights w `[U, P]`.

        With w = 1/σ entry by entry, updates are measured in units of their noise; w = 0 leaves a row of J out.

        Raises:
            InvalidInputError: Wrong shape, dtype or device, NaN or infinity.
        """
        if (
            weights.shape != (self.num_units, self.update_dim)
            or weights.dtype != self.dtype
            or weights.device != self.device
            or not torch.isfinite(weights).all()
        ):
            raise InvalidInputError(
                f"expected finite weights [{self.num_units}, {self.update_dim}] of {self.dtype} on {self.device}, "
                f"got {list(weights.shape)} of {weights.dtype} on {weights.device}"
            )
        chosen = object.__new__(UpdateJacobian)
        chosen.__dict__.update(self.__dict__)
        chosen._weights = weights if self._weights is None else self._weights * weights
        return chosen

    def to(self, dtype: torch.dtype) -> UpdateJacobian:
        """Returns the same Jacobian in another floating-point type."""
        inputs, labels = self._batch
        converted = UpdateJacobian(
            self._update,
            {name: p.to(dtype) if p.is_floating_point() else p for name, p in self._params.items()},
            inputs.to(dtype),
            labels.to(dtype) if labels.is_floating_point() else labels,
            private=self._private,
            memory_budget=self._memory_budget,
            before_pass=self._before_pass,
        )
        return converted if self._weights is None else converted.weighted(self._weights.to(dtype))

    @property
    def lane_bytes(self) -> int:
        """Bytes that one unit's graphs keep, measured on the first unit or two."""
        if self._lane_bytes is None:
            probe = self.select(torch.arange(min(2, self.num_units), device=self.device))
            # The largest mini-batch's graph stands for all.
            inputs, labels = (self._update.largest_batch(part) for part in (probe._inputs, probe._labels))
            graph = saved_bytes(self._update, self._params, inputs, labels) // probe.num_units
            # Six vectors of a product, and the parameters after each step.
            vectors = (5 + self._update.num_graphs) * self.update_dim * self._inputs.element_size()
            self._lane_bytes = max(1, graph * self._update.num_graphs + vectors)
        return self._lane_bytes

    def chunks(self, bytes_per_lane: int, *, lanes_per_unit: int = 1) -> Iterator[tuple[UpdateJacobian, Tensor]]:
        """Yields units that fit into one pass, and into the budget with vectors of the given size for each lane.

        With the Jacobian of each chunk come the indices of its units; a single chunk is this Jacobian itself.
        """
        units = torch.arange(self.num_units, device=self.device)
        if self.num_units == 1:  # nothing to cut, so nothing to measure
            yield self, units
            return
        fitting = min(self.lanes_per_pass, self._memory_budget // bytes_per_lane) // lanes_per_unit
        if self.num_units <= fitting:
            yield self, units
            return
        for chunk in torch.split(units, max(1, fitting)):
            yield self.select(chunk), chunk

    @property
    def lanes_per_pass(self) -> int:
        """Number of units that one vectorised pass takes within the memory budget, at least one."""
        fitting = max(1, self._memory_budget // self.lane_bytes)
        return min(fitting, _CPU_LANES) if self.device.type == "cpu" else fitting

    def _apply(self, product: Callable[[Linearization, Tensor, slice], Tensor], vectors: Tensor, dim: int) -> Tensor:
        if vectors.shape != (self.num_units, dim):
            raise InvalidInputError(
                f"expected vectors of shape [{self.num_units}, {dim}], units by length, got {list(vectors.shape)}"
            )
        if vectors.dtype != self.dtype or vectors.device != self.device:
            raise InvalidInputError(
                f"expected vectors of {self.dtype} on {self.device}, got {vectors.dtype} on {vectors.device}"
            )
        parts = [product(lin, vectors[lanes], lanes) for lanes, lin in self._linearizations()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)  # of a large model one part is a copy worth sparing

    def _linearizations(self) -> Iterator[tuple[slice, Linearization]]:
        """Yields chunks of units and their linearisation; they are kept for the next product where all fit at once."""
        # One unit's one graph is there during a product in any case: keeping it costs nothing, so it is not measured.
        alone = self.num_units == 1 and self._update.num_graphs == 1
        size = 1 if alone else self.lanes_per_pass
        keep = alone or self.num_units <= size or self.num_units * self.lane_bytes <= self._memory_budget
        for start in range(0, self.num_units, size):
            if self._before_pass is not None:
                self._before_pass()
            lanes = slice(start, min(start + size, self.num_units))
            linearization = self._kept.get(start)
            if linearization is None:
                inputs, labels = self._inputs[lanes], self._labels[lanes]
                retain = alone or self.lane_bytes * len(inputs) <= self._memory_budget
                theta = self._lanes(inputs)
                linearization = self._update.linearize(self._params, theta, inputs, labels, retain=retain)
            if keep:
                self._kept[start] = linearization
            yield lanes, linearization

    def _lanes(self, inputs: Tensor) -> Tensor:
        return self._theta.expand(len(inputs), -1)

    def _spread(self, vectors: Tensor, lanes: slice) -> Tensor:
        """Private vectors `[L, D]` as tangents of whole batches, zero but for the private example."""
        spread = vectors if self._slot is None else self._slot_mask(lanes) * vectors[:, None]  # [L, N, d]
        return spread.reshape(self._inputs[lanes].shape)

    def _gathered(self, inputs_bar: Tensor, lanes: slice) -> Tensor:
        """The private part of adjoints of whole batches, `[L, D]`."""
        flat = inputs_bar.flatten(2)  # [L, N, d]
        return flat.flatten(1) if self._slot is None else (self._slot_mask(lanes) * flat).sum(1)

    def _scaled(self, products: Tensor, times: int) -> Tensor:
        """Products with J for its private example alone, over N once for each J in them."""
        return products if self._scale == 1.0 else self._scale**times * products

    def _slot_mask(self, lanes: slice) -> Tensor:
        """One at each unit's private example, `[L, N, 1]`."""
        assert self._slot is not None
        examples = torch.arange(self._inputs.shape[1], device=self.device)
        return (examples == self._slot[lanes, None])[..., None].to(self.dtype)


def rows_of(tensor: Tensor, units: Tensor) -> Tensor:
    """Returns `tensor[units]`; where all units are one, or share their memory, without a copy for each."""
    shared = len(tensor) == 1 or tensor.stride(0) == 0
    return tensor[:1].expand(len(units), *tensor.shape[1:]) if shared else tensor[units]


def _examples_interact(
    update: UpdateMap,
    params: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    before_pass: Callable[[], None] | None,
) -> bool:
    """Whether the loss of a batch is anything but the mean of its examples' losses, each run alone."""
    if inputs.shape[1] == 1:
        return False
    if update.mixes_examples:
        return True
    if update.batch_norm == "train" and has_batch_norm(update.model):
        return True
    tolerance = 1e-4 if inputs.dtype == torch.float32 else 1e-9
    distinct = 1 if inputs.stride(0) == 0 and labels.stride(0) == 0 else len(inputs)
    for unit in range(distinct):
        together, alone = update.example_losses(
            params, inputs[unit], labels[unit], before_example=before_pass or (lambda: None)
        )
        difference = (together - alone.mean()).abs()
        # NaN is a difference, too: the mean over an example whose only label is ignored.
        if not difference <= tolerance * together.abs().clamp(min=1.0):
            return True
    return False


def _check_shift(jacobian: UpdateJacobian, shift: Tensor) -> None:
    expected = (jacobian.num_units, jacobian.input_dim)
    if shift.shape != expected or shift.dtype != jacobian.dtype or shift.device != jacobian.device:
        raise InvalidInputError(
            f"expected a shift of shape {list(expected)}, units by private input elements, of {jacobian.dtype} on "
            f"{jacobian.device}, got {list(shift.shape)} of {shift.dtype} on {shift.device}"
        )
    if not torch.isfinite(shift).all():
        raise InvalidInputError("expected a finite shift, got NaN or infinity: these units must not be shared")


def _within(bounds: tuple[float | Tensor, float | Tensor], private: Tensor, moved: Tensor) -> Tensor:
    low, high = (torch.as_tensor(bound, dtype=moved.dtype, device=moved.device) for bound in bounds)
    shape = list(moved.shape[2:])
    try:
        low, high = low.expand(shape), high.expand(shape)
    except RuntimeError as error:
        raise InvalidInputError(
            f"expected bounds that broadcast to one example's shape {shape}, got {list(low.shape)} and "
            f"{list(high.shape)}: per-channel bounds need shape [channels, 1, 1]"
        ) from error
    if not (low < high).all():
        raise InvalidInputError("expected every lower bound below its upper bound")
    slack = 1e-5 * (high - low)  # of inputs that were scaled in another floating-point type
    if not ((private >= low - slack) & (private <= high + slack)).all():
        raise InvalidInputError(
            f"expected private inputs within the bounds, got values from {private.min():.4g} to {private.max():.4g}: "
            "give the bounds in the units of the inputs, after any normalisation"
        )
    return torch.minimum(torch.maximum(moved, low), high)


def _check_arguments(
    update: UpdateMap,
    params: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    private: Tensor | None,
    memory_budget: int,
) -> None:
    if inputs.ndim < 3 or 0 in inputs.shape:
        raise InvalidInputError(
            "expected inputs of shape [units, examples, *example shape] with nothing empty, "
            f"got {list(inputs.shape)}: one client's batch becomes one unit with inputs[None]"
        )
    if inputs.dtype not in (torch.float32, torch.float64):
        raise InvalidInputError(
            f"expected float32 or float64 inputs, got {inputs.dtype}: scale pixels to floats, and audit token ids at "
            "the embeddings with input_module="
        )
    if labels.shape[:2] != inputs.shape[:2]:
        raise InvalidInputError(
            f"expected labels that begin with [{inputs.shape[0]}, {inputs.shape[1]}] like the inputs, "
            f"got {list(labels.shape)}"
        )
    if not torch.isfinite(inputs).all():
        raise InvalidInputError("expected finite inputs, got NaN or infinity: check the client's data")
    for name, shape in zip(update.layout.names, update.layout.shapes, strict=True):
        if name not in params:
            raise InvalidInputError(f"expected a tensor for every trained parameter in params, {name} is missing")
        tensor = params[name]
        if tensor.shape != shape:
            raise InvalidInputError(
                f"expected parameter {name} of shape {list(shape)}, got {list(tensor.shape)}: "
                "are these the parameters of this model?"
            )
        if tensor.dtype != inputs.dtype or tensor.device != inputs.device:
            raise InvalidInputError(
                f"expected parameter {name} of {inputs.dtype} on {inputs.device} like the inputs, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        if not torch.isfinite(tensor).all():
            raise InvalidInputError(f"expected finite parameters, got NaN or infinity in {name}: training has diverged")
    if private is not None:
        if private.shape != inputs.shape[:1] or private.dtype != torch.long:
            raise InvalidInputError(
                f"expected private of shape [{inputs.shape[0]}] and torch.int64, got {list(private.shape)} and "
                f"{private.dtype}: it holds one index per unit"
            )
        if not ((private >= 0) & (private < inputs.shape[1])).all():
            raise InvalidInputError(f"expected private indices in [0, {inputs.shape[1]}), got {private.tolist()}")
    if memory_budget <= 0:
        raise InvalidInputError(f"expected memory_budget > 0 bytes, got {memory_budget}")
    update.check_batch_size(inputs.shape[1])
    _check_labels(update, params, inputs[0], labels)


def _check_labels(update: UpdateMap, params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> None:
    if labels.is_floating_point() and not torch.isfinite(labels).all():
        raise InvalidInputError("expected finite labels, got NaN or infinity")
    few = min(8, len(inputs))  # what the model takes and gives: of a whole batch that may be much
    outputs = update.outputs(params, inputs[:few])
    if not labels.is_floating_point() and outputs.ndim == labels.ndim:  # indices [U, N, ...], scores [N, C, ...]
        ignored = getattr(update.loss, "ignore_index", None)
        wrong = (labels < 0) | (labels >= outputs.shape[1])
        wrong &= labels != ignored if ignored is not None else torch.ones_like(wrong)
        if wrong.any():
            raise InvalidInputError(
                f"expected labels in [0, {outputs.shape[1]}), the model's number of classes, "
                f"got {sorted(set(labels[wrong].tolist()))[:5]}"
            )
    update.check_loss(outputs, labels[0, :few])
