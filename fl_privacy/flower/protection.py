"""Noise that a client puts on its private inputs before it trains on them, as the server advises and it allows."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from logging import WARNING
from typing import Any, NamedTuple, cast, get_args

import numpy as np
import torch
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore import log
from torch import Tensor, nn

from fl_privacy.audit.input_noise import draw_for_examples, leakage_under, topped_up
from fl_privacy.audit.settings import RELU_WIDTH, Covariance
from fl_privacy.audit.task import InputShift, Numbers, example_key
from fl_privacy.errors import FLPrivacyError, InvalidInputError, RecordError
from fl_privacy.flower.advice import taken
from fl_privacy.flower.capture import TrainingCapture
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.update import GradientUpdate, Loss

INPUT_ADVICE_KEY = "fl-privacy-input-advice"
"""Entry of a training message's config that carries the advice; the app never sees it."""
_KEPT_KEY, _KEPT_ARRAYS_KEY = "fl_privacy.kept_noise", "fl_privacy.kept_noise.arrays"
"""Records of a client's own state, which stays with it from round to round."""
_SLACK = 1e-6
"""How much more than its target noise may leak before more is put on it: no more than rounding."""
_FEW = 8
"""Examples of a first batch below which its standard deviation is a poor guess at that of all."""

_ACTIVE: ContextVar[InputProtection | None] = ContextVar("fl_privacy_protection", default=None)

Bounds = tuple[float | Tensor, float | Tensor]


def protected_inputs(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    loss: Loss = nn.functional.cross_entropy,
    public: tuple[Tensor, Tensor] | None = None,
    bounds: Bounds | None = None,
) -> Tensor:
    """Returns the inputs to train on: with noise on them where the server advises it, as they are otherwise.

    One call in the training loop, before the model is given the batch:

        for images, labels in record_batches(loader):
            images = protected_inputs(model, images, labels, bounds=(0.0, 1.0))

    What is then shared depends on each example x through x + a alone. By default a is drawn once for an example, kept
    in the client's own state, and used in every later round, so that rounds together tell no more than one. An example
    is known by its content: call this before random augmentation, as a changed example is another one with noise of its
    own, and two of them tell more than one. The first call with an example computes a spectrum of its own and a draw,
    up to some hundred products each, in what the client's `time_limit` leaves; where that is over, the noise is white.

    Args:
        model: What is trained, at its current parameters, which only shape the noise. It is not changed.
        inputs: x `[N, *shape]`, floating point.
        labels: `[N, ...]`.
        loss: (outputs, labels) -> scalar mean loss, the one that it is trained with.
        public: A few public inputs and labels of the same kind, 8 or so, whose covariance shapes the noise where the
            server advises that. Without them the noise is white then: it costs more, and hides as much.
        bounds: Lowest and highest valid input, numbers or one per channel `[C, 1, 1]`: x + a is moved to the nearest
            valid value. That is a function of x + a alone, so that it protects no less.

    Raises:
        InvalidInputError: The inputs are not floating-point numbers, all the same, or outside the bounds.
    """
    protection = _ACTIVE.get()
    if protection is None:
        return inputs
    return protection.protect(model, inputs, labels, loss=loss, public=public, bounds=bounds)


@dataclass(frozen=True, kw_only=True)
class InputAdvice:
    """Noise on the client's inputs that brings each example to its target, whatever is trained on it.

    Attributes:
        target_leakage: What x + a may tell of x, over all shares of it.
        covariance: What shapes the noise.
        kept: Whether each example keeps its noise; otherwise it is drawn in every round.
        prior_std: τ; `None`: that of the first batch that the client trains on.
        shares: For noise that is not kept, the number of rounds that must meet the target together.
        relu_width: Of the ReLUs in the J that shapes the noise, as the audit has it.
        num_probes: Of the spectrum that shapes it, as the audit has them.
        max_steps: Of a probe, likewise.
    """

    target_leakage: float
    covariance: Covariance = "client"
    kept: bool = True
    prior_std: float | None = None
    shares: int = 1
    relu_width: float = RELU_WIDTH
    num_probes: int = 4
    max_steps: int = 64

    @classmethod
    def take(cls, config: MutableMapping[str, Any]) -> InputAdvice | None:
        """Removes the advice from a config and returns it; `None` if there is none.

        Raises:
            RecordError: It cannot be read. It is removed all the same.
        """
        advice = taken(config, INPUT_ADVICE_KEY, cls._read)
        if advice is None:
            return None
        known = advice.prior_std is None or (math.isfinite(advice.prior_std) and advice.prior_std > 0)
        width = math.isfinite(advice.relu_width) and advice.relu_width >= 0
        counts = min(advice.shares, advice.num_probes, advice.max_steps) >= 1
        sound = 0 < advice.target_leakage < 1 and known and counts and width
        if not sound or advice.covariance not in get_args(Covariance):
            raise RecordError(f"expected advice of noise on the inputs, got {asdict(advice)!r:.200}")
        return advice

    @classmethod
    def _read(cls, entries: Mapping[str, Any]) -> InputAdvice:
        prior_std = entries["prior_std"]
        return cls(
            target_leakage=float(entries["target_leakage"]),
            covariance=entries["covariance"],
            kept=bool(entries["kept"]),
            prior_std=None if prior_std is None else float(prior_std),
            shares=int(entries["shares"]),
            relu_width=float(entries.get("relu_width", RELU_WIDTH)),
            **{name: int(entries[name]) for name in ("num_probes", "max_steps") if name in entries},
        )

    def entries(self) -> dict[str, str]:
        """Returns the entry that carries the advice in a config."""
        return {INPUT_ADVICE_KEY: json.dumps(asdict(self))}


class InputProtection:
    """Puts the advised noise on what a client trains on, in one round.

    Args:
        advice: What to do.
        state: The client's own, which keeps the noise.
        capture: Records the training for the audit, which is told of the noise; `None` where none is asked for.
        generator: Of the noise.
        memory_budget: Bytes of graph.
        time_limit: Seconds that shaping the noise of this round may take; what is left is white.
        before_pass: Called before each pass of a product with J; what it raises ends the call of `protect`.
    """

    def __init__(
        self,
        advice: InputAdvice,
        state: RecordDict,
        capture: TrainingCapture | None,
        generator: np.random.Generator,
        *,
        memory_budget: int,
        time_limit: float = math.inf,
        before_pass: Callable[[], None] | None = None,
    ) -> None:
        self._time_left = time_limit
        self._before_pass = before_pass
        self._advice = advice
        self._capture = capture
        self._generator = generator
        self._memory_budget = memory_budget
        self._state = state
        self._kept = KeptNoise() if not advice.kept else KeptNoise.read(state)
        self._notes: dict[str, None] = {}
        self._leakage: list[float] = []
        self._shaped = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Lets `protected_inputs` act inside the block, and keeps what is to be kept after it."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)
            if self._advice.kept:
                self._kept.write(self._state)

    def protect(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        loss: Loss,
        public: tuple[Tensor, Tensor] | None,
        bounds: Bounds | None,
    ) -> Tensor:
        """Returns x + a, within the bounds."""
        if not inputs.is_floating_point():
            raise InvalidInputError(f"expected floating-point inputs to put noise on, got {inputs.dtype}")
        x: Numbers = inputs.detach().cpu().numpy()
        self._kept.prior_std = self._prior_std(x)
        keys = [example_key(row) for row in x]
        self._draw_missing(keys, model, inputs.detach(), labels, loss, public)
        noise, leakage, shaped = (np.stack(part) for part in zip(*(self._kept.draws[key] for key in keys), strict=True))
        self._shaped |= bool(shaped.any())
        shift = InputShift(
            noise=noise,
            leakage=leakage,
            prior_std=self._kept.prior_std,
            covariance=self.covariance,
            kept=self._advice.kept,
            bounds=None if bounds is None else (_bound(bounds[0], x), _bound(bounds[1], x)),
            note=self.note,
        )
        moved = torch.from_numpy(shift.on(x)).to(inputs.device)
        self._leakage.extend(leakage.tolist())
        if self._capture is not None:
            self._capture.add_shift(inputs, labels, moved, shift)
        return moved

    @property
    def leakage(self) -> float:
        """The most that x + a tells of any example of this round; 1 where one got no noise, as none was needed."""
        return max(self._leakage, default=1.0)

    @property
    def covariance(self) -> Covariance:
        """What shaped the noise of this round; `white` where all of it is."""
        return self._advice.covariance if self._shaped else "white"

    @property
    def note(self) -> str:
        """What was not as advised in this round."""
        return "; ".join(self._notes)

    def _draw_missing(
        self,
        keys: list[bytes],
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        loss: Loss,
        public: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Draws noise for examples that have none, and puts more on what was drawn for a higher target."""
        advice, kept = self._advice, self._kept
        for key in dict.fromkeys(keys):
            if key in kept.draws and kept.draws[key][1] > advice.target_leakage * (1 + _SLACK):
                noise, leakage, shaped = kept.draws[key]
                more = topped_up(
                    noise,
                    float(leakage),
                    target_leakage=advice.target_leakage,
                    prior_std=kept.prior_std,
                    generator=self._generator,
                )
                kept.draws[key] = ExampleNoise(more[0], np.float64(more[1]), shaped)
        first: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            if key not in kept.draws:
                first.setdefault(key, index)
        if not first:
            return
        at = list(first.values())
        began = time.monotonic()
        draw = draw_for_examples(
            rounded_off(GradientUpdate(model, loss), advice.relu_width),
            {name: p.detach() for name, p in model.named_parameters()},
            inputs[at],
            labels[at],
            target_leakage=advice.target_leakage,
            prior_std=kept.prior_std,
            covariance=advice.covariance,
            public=public,
            generator=self._generator,
            once=not advice.kept and advice.shares == 1,
            num_probes=advice.num_probes,
            max_steps=advice.max_steps,
            memory_budget=self._memory_budget,
            before_pass=self._pass_until(began + self._time_left),
        )
        self._time_left -= time.monotonic() - began
        # T draws of T times the variance tell together what one of the variance itself does.
        scale = 1.0 if advice.kept else math.sqrt(advice.shares)
        if draw.note:
            self._notes[draw.note] = None
        drawn = (part.cpu().numpy() for part in (draw.noise, draw.leakage, draw.shaped))
        for key, noise, leakage, shaped in zip(first, *drawn, strict=True):
            kept.draws[key] = ExampleNoise((scale * noise).astype(noise.dtype), np.float64(leakage), np.bool_(shaped))

    def _pass_until(self, deadline: float) -> Callable[[], None]:
        def before_pass() -> None:
            if self._before_pass is not None:
                self._before_pass()
            if time.monotonic() >= deadline:
                raise FLPrivacyError("the client's time limit is over")

        return before_pass

    def _prior_std(self, x: Numbers) -> float:
        """Returns τ, and takes what was kept under another one for what it leaks under this one."""
        before = self._kept.prior_std
        now = self._advice.prior_std or before
        if not now:
            now = float(x.std(dtype=np.float64))
            if len(x) < _FEW:
                note = f"the prior's width is that of a first batch of {len(x)}: give the audit's settings a prior_std"
                log(WARNING, "fl_privacy: %s", note)
                self._notes[note] = None
        if before and now != before:
            self._kept.draws = {
                key: draw._replace(leakage=np.float64(leakage_under(np.asarray(draw.leakage), before, now)))
                for key, draw in self._kept.draws.items()
            }
        return now


class ExampleNoise(NamedTuple):
    """What was drawn for an example: a `[*shape]`, what x + a leaks, and whether the advised covariance shaped it."""

    noise: Numbers
    leakage: np.float64
    shaped: np.bool_


class KeptNoise:
    """Noise by example; where there is none on it, an example is drawn for again in the next round."""

    def __init__(self) -> None:
        self.draws: dict[bytes, ExampleNoise] = {}
        self.prior_std = 0.0

    @classmethod
    def read(cls, state: RecordDict) -> KeptNoise:
        """Returns what a client's state keeps."""
        kept = cls()
        head, arrays = state.config_records.get(_KEPT_KEY), state.array_records.get(_KEPT_ARRAYS_KEY)
        if head is not None and arrays is not None:
            keys = iter(cast(list[bytes], head["keys"]))
            for index in range(sum(name.startswith("noise.") for name in arrays)):
                for draw in zip(*(arrays[f"{name}.{index}"].numpy() for name in ExampleNoise._fields), strict=True):
                    kept.draws[next(keys)] = ExampleNoise(*draw)
            kept.prior_std = float(cast(float, head["prior_std"]))
        return kept

    def write(self, state: RecordDict) -> None:
        """Puts what is to be kept into a client's state."""
        by_shape: dict[tuple[Any, ...], list[bytes]] = {}
        for key, draw in self.draws.items():
            if draw.leakage < 1:
                by_shape.setdefault((draw.noise.shape, draw.noise.dtype), []).append(key)
        if not by_shape:
            return
        arrays: dict[str, FlowerArray] = {}
        for index, keys in enumerate(by_shape.values()):
            parts = zip(*(self.draws[key] for key in keys), strict=True)
            named = zip(ExampleNoise._fields, parts, strict=True)
            arrays |= {f"{name}.{index}": FlowerArray(np.stack(part)) for name, part in named}
        state[_KEPT_KEY] = ConfigRecord({"keys": [*itertools.chain(*by_shape.values())], "prior_std": self.prior_std})
        state[_KEPT_ARRAYS_KEY] = ArrayRecord(arrays)


def _bound(bound: float | Tensor, inputs: Numbers) -> Numbers:
    array: Numbers = np.asarray(
        bound.detach().cpu().numpy() if isinstance(bound, Tensor) else bound, dtype=inputs.dtype
    )
    return array
