"""Capture of local training on a client: which batches it saw, which steps its optimiser took, what came out.

Batches are recorded where the training loop draws them. The optimiser is watched through torch's own step hook, so that
its settings, and the parameters before and after, are those that were really used.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fl_privacy.audit.task import Array, InputShift, TrainingTrace
from fl_privacy.errors import InvalidInputError

T = TypeVar("T")

_ACTIVE: ContextVar[TrainingCapture | None] = ContextVar("fl_privacy_capture", default=None)


def record_batches(batches: Iterable[T]) -> RecordedBatches[T]:
    """Returns the same batches, each recorded for the audit as it is drawn.

    Does nothing but pass them on where no audit is asked for. A batch is a pair (inputs, labels), or a mapping of two
    tensors, the inputs floating-point and the labels integer. Record what the model is given: where the training loop
    still changes the inputs, call `record_batch` there instead.
    """
    return RecordedBatches(batches)


def record_batch(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (inputs, labels) unchanged, recorded for the audit as the batch of the next optimiser step."""
    capture = _ACTIVE.get()
    if capture is not None:
        capture.add_batch(inputs, labels)
    return inputs, labels


class RecordedBatches(Generic[T]):
    """An iterable of batches that records what is drawn from it; every other attribute is the wrapped loader's."""

    def __init__(self, batches: Iterable[T]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[T]:
        for batch in self._batches:
            capture = _ACTIVE.get()
            if capture is not None:
                capture.add_drawn(batch)
            yield batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def _inputs_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    parts = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == 2 and isinstance(batch, Mapping):
        tensors.sort(key=lambda t: not t.is_floating_point())
    if len(tensors) != 2:
        raise InvalidInputError(
            f"expected batches of two tensors, inputs and labels, got {type(batch).__name__} with {len(tensors)}: "
            "call record_batch(inputs, labels) in the training loop instead"
        )
    return tensors[0], tensors[1]


class TrainingCapture:
    """What is recorded of one local training.

    Args:
        initial: Global parameters by name, as they arrived.
        max_bytes: Most bytes of examples to keep; beyond, the batches are dropped and the trace says so.
    """

    def __init__(self, initial: Mapping[str, Array], *, max_bytes: int) -> None:
        self._initial = initial
        self._max_bytes = max_bytes
        self._bytes = 0
        self._inputs: list[Array] = []
        self._labels: list[Array] = []
        self._known: dict[bytes, int] = {}
        self._shifts: dict[int, tuple[Array, Any]] = {}
        self._shift: InputShift | None = None
        self._batches: list[tuple[int, ...]] = []
        self._groups: list[dict[str, Any]] = []
        self._optimizers: set[str] = set()
        self._parameters: dict[str, Tensor] = {}
        self._problem = ""

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Records what this thread does inside the block."""
        thread = threading.get_ident()

        def watch(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            if threading.get_ident() == thread:
                with self._harmless():
                    self._add_step(optimizer)

        token = _ACTIVE.set(self)
        handle = register_optimizer_step_pre_hook(watch)
        try:
            yield
        finally:
            handle.remove()
            _ACTIVE.reset(token)

    def add_batch(self, inputs: Tensor, labels: Tensor) -> None:
        """Records a batch; examples that were seen before are kept once."""
        with self._harmless():
            self._add_batch(inputs, labels)

    def add_drawn(self, batch: object) -> None:
        """Records a batch as a loader gives it: a pair or a mapping of two tensors."""
        with self._harmless():
            self._add_batch(*_inputs_and_labels(batch))

    def add_shift(self, inputs: Tensor, labels: Tensor, given: Tensor, shift: InputShift) -> None:
        """Records noise on a batch's inputs: examples are kept as they were, and known by what the model is given."""
        with self._harmless():
            indices = self._index(_to_numpy(inputs), _to_numpy(labels))
            if self._problem:
                return
            same = self._shift is None or _same_bounds(self._shift, shift)
            if not same:
                self._fail("inputs with noise on them were bounded differently from call to call")
            self._shift = shift
            for key, index in zip(_keys(_to_numpy(given), _to_numpy(labels)), indices, strict=True):
                self._known.setdefault(key, index)
            self._shifts.update(zip(indices, zip(shift.noise, shift.leakage, strict=True), strict=True))

    @property
    def shift(self) -> InputShift | None:
        """The noise on the recorded examples, in their order; `None` if there is none."""
        if self._shift is None:
            return None
        noise, leakage = np.zeros_like(np.stack(self._inputs)), np.ones(len(self._inputs))
        for index, (row, share) in self._shifts.items():
            noise[index], leakage[index] = row, share
        return replace(self._shift, noise=noise, leakage=leakage)

    @property
    def has_examples(self) -> bool:
        """Whether any batch was recorded."""
        return bool(self._inputs)

    def examples(self) -> tuple[Array, Array]:
        """Returns the recorded examples `[N, *shape]` and labels `[N, ...]`, each once, in the order first seen."""
        return np.stack(self._inputs), np.stack(self._labels)

    def trace(self) -> TrainingTrace:
        """Returns the optimiser's steps, or in `problem` why they cannot be replayed."""
        first = self._groups[0] if self._groups else {}
        problem = self._problem or self._why_not_replayable()
        return TrainingTrace(
            optimizer=", ".join(sorted(self._optimizers)),
            batches=() if problem else tuple(self._batches),
            lr=() if problem else tuple(float(group["lr"]) for group in self._groups),
            momentum=float(first.get("momentum") or 0.0),
            dampening=float(first.get("dampening") or 0.0),
            weight_decay=float(first.get("weight_decay") or 0.0),
            nesterov=bool(first.get("nesterov")),
            problem=problem,
        )

    def update(self) -> dict[str, Array] | None:
        """Returns the parameter change by name, or `None` where the optimiser's parameters could not be told apart."""
        if not self._parameters:
            return None
        changes = {}
        for name, parameter in self._parameters.items():
            value = _to_numpy(parameter)
            changes[name] = np.subtract(value, self._initial[name].astype(value.dtype))
        return changes

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Makes an error in recording the trace's problem: it must not cost the client its training."""
        try:
            yield
        except Exception as error:
            self._fail(f"training could not be recorded: {error}")

    def _add_batch(self, inputs: Tensor, labels: Tensor) -> None:
        indices = self._index(_to_numpy(inputs), _to_numpy(labels))
        if not self._problem:
            self._batches.append(indices)

    def _index(self, x: Array, y: Array) -> tuple[int, ...]:
        """Returns the places of examples among those recorded, to which new ones are added; none where that fails."""
        if len(x) != len(y):
            self._fail(f"a batch holds {len(x)} inputs and {len(y)} labels")
        if self._inputs and (x.shape[1:], y.shape[1:]) != (self._inputs[0].shape, self._labels[0].shape):
            self._fail(f"examples differ in shape: {list(self._inputs[0].shape)} and {list(x.shape[1:])}")
        if self._problem:
            return ()
        keys = _keys(x, y)
        new = {key: (row, label) for key, row, label in zip(keys, x, y, strict=True) if key not in self._known}
        self._bytes += sum(map(len, new))
        if self._bytes > self._max_bytes:
            self._fail(f"the examples exceed {self._max_bytes} bytes, the most that is handed over")
            return ()
        for key, (row, label) in new.items():
            self._known[key] = len(self._inputs)
            self._inputs.append(row)
            self._labels.append(label)
        return tuple(self._known[key] for key in keys)

    def _add_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizers.add(type(optimizer).__name__)
        if not self._groups:
            self._parameters = self._named(optimizer)
        settings = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        groups = [{key: group.get(key) for key in settings} for group in optimizer.param_groups]
        if any(group != groups[0] for group in groups):
            self._fail("the optimiser treats parameter groups differently")
        self._groups.append(groups[0])

    def _named(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Names the optimiser's parameters by their values, which are still those that arrived, in their order."""
        names = iter(self._initial)
        found: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                value = _to_numpy(parameter)
                name = next((n for n in names if _same(self._initial[n], value)), None)
                if name is None:
                    return {}
                found[name] = parameter
        return found

    def _why_not_replayable(self) -> str:
        if not self._groups:
            return "no torch optimiser took a step"
        if self._optimizers != {"SGD"}:
            return f"only torch.optim.SGD is replayed, the client used {', '.join(sorted(self._optimizers))}"
        if not self._batches:
            return "no batch was recorded: draw them from record_batches(loader)"
        if len(self._batches) != len(self._groups):
            return f"{len(self._batches)} batches were recorded for {len(self._groups)} optimiser steps"
        constant = [{k: v for k, v in group.items() if k != "lr"} for group in self._groups]
        if any(group != constant[0] for group in constant):
            return "the optimiser's settings other than the learning rate changed between steps"
        if constant[0]["maximize"]:
            return "the optimiser maximises"
        return ""

    def _fail(self, problem: str) -> None:
        self._problem = self._problem or problem
        self._batches.clear()


def _keys(inputs: Array, labels: Array) -> list[bytes]:
    return [row.tobytes() + label.tobytes() for row, label in zip(inputs, labels, strict=True)]


def _same_bounds(one: InputShift, other: InputShift) -> bool:
    if one.bounds is None or other.bounds is None:
        return one.bounds is other.bounds
    return all(np.array_equal(a, b) for a, b in zip(one.bounds, other.bounds, strict=True))


def _same(known: Array, value: Array) -> bool:
    """Whether a parameter was loaded from an array, which may have arrived as float64, as under SecAgg+."""
    return known.shape == value.shape and bool(np.array_equal(known.astype(value.dtype), value))


def _to_numpy(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array.copy()
