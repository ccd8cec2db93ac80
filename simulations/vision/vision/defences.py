"""What clients do to an update before they share it: Flower mods, and the one that picks among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.clientapp.mod import LocalDpMod
from flwr.clientapp.typing import ClientAppCallable, Mod

from vision.settings import Settings
from vision.task import client_seed, load_data, new_model, partition_id

ARRAYS = "arrays"
"""Key of the record with the model's parameters, in Flower's messages both ways."""


def defend(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Applies the defence of the client that the context belongs to (a Flower mod)."""
    if message.metadata.message_type != MessageType.TRAIN:
        return call_next(message, context)
    settings = Settings.from_run_config(context.run_config)
    client = partition_id(context, settings)
    # LocalDpMod draws from NumPy's global generator; seeded per client and round, a run can be repeated.
    np.random.seed(client_seed(settings, message, client))
    return MODS[settings.defence_of(client)](settings)(message, context, call_next)


def describe_defence(context: Context) -> str:
    """Returns what the client of this context does to its update, in a few words for the audit's table."""
    settings = Settings.from_run_config(context.run_config)
    return DESCRIPTIONS[settings.defence_of(partition_id(context, settings))](settings)


def noise_seed(message: Message, context: Context) -> int:
    """Returns the seed of the noise that the audit advises, so that a run can be repeated: only a simulation may."""
    settings = Settings.from_run_config(context.run_config)
    return client_seed(settings, message, partition_id(context, settings)) + 1


def no_defence(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Shares the update as it is."""
    return call_next(message, context)


class PruneMod:
    """Shares only the largest entries of the update; the others are shared as no change.

    Args:
        keep: Share of the entries that are shared, in (0, 1]; of the whole update, not of each array.

    Raises:
        ValueError: `keep` is not in (0, 1].
    """

    def __init__(self, *, keep: float) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        self.keep = keep

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Returns the inner app's reply with the update pruned."""
        before = {name: array.numpy() for name, array in message.content.array_records[ARRAYS].items()}
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        after = {name: array.numpy() for name, array in reply.content.array_records[ARRAYS].items()}
        magnitudes = {name: np.abs(after[name] - before[name]) for name in after}
        flat = np.concatenate([magnitude.ravel() for magnitude in magnitudes.values()])
        kept = math.ceil(self.keep * flat.size)
        threshold = np.partition(flat, -kept)[-kept]
        reply.content[ARRAYS] = ArrayRecord(
            {name: Array(np.where(magnitudes[name] >= threshold, after[name], before[name])) for name in after}
        )
        return reply


class ParametersOnly:
    """Lets a mod see a model's parameters and passes its buffers by.

    Noise on BatchNorm's statistics can make a variance negative, and its counters are integers, which mods that compute
    with arrays reject.

    Args:
        mod: The mod that transforms the parameters.
        parameters: Names of the arrays that it gets to see.
    """

    def __init__(self, mod: Mod, parameters: frozenset[str]) -> None:
        self.mod = mod
        self.parameters = parameters

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Returns the reply of the mod around the inner app, with the buffers that the inner app returned."""
        received = message.content.array_records[ARRAYS]
        returned: list[ArrayRecord] = []

        def inner(message: Message, context: Context) -> Message:
            message.content[ARRAYS] = received
            reply = call_next(message, context)
            if not reply.has_error():
                returned.append(reply.content.array_records[ARRAYS])
                reply.content[ARRAYS] = self._narrowed(returned[0])
            message.content[ARRAYS] = self._narrowed(received)
            return reply

        message.content[ARRAYS] = self._narrowed(received)
        reply = self.mod(message, context, inner)
        message.content[ARRAYS] = received
        if not reply.has_error():
            reply.content[ARRAYS] = ArrayRecord({**returned[0], **reply.content.array_records[ARRAYS]})
        return reply

    def _narrowed(self, arrays: ArrayRecord) -> ArrayRecord:
        return ArrayRecord({name: array for name, array in arrays.items() if name in self.parameters})


def _on_parameters(mod: Mod, settings: Settings) -> Mod:
    model = new_model(settings, load_data(settings))
    return ParametersOnly(mod, frozenset(name for name, _ in model.named_parameters()))


def _local_dp(settings: Settings) -> Mod:
    # LocalDpMod takes ε and noises with standard deviation sensitivity·√(2 ln(1.25/δ))/ε; this ε gives the multiplier.
    epsilon = math.sqrt(2 * math.log(1.25 / settings.dp_delta)) / settings.dp_noise_multiplier
    clipping_norm = settings.dp_clipping_norm
    return _on_parameters(LocalDpMod(clipping_norm, clipping_norm, epsilon, settings.dp_delta), settings)


def _prune(settings: Settings) -> Mod:
    return _on_parameters(PruneMod(keep=settings.prune_keep), settings)


MODS: Mapping[str, Callable[[Settings], Mod]] = {
    "none": lambda settings: no_defence,
    "local-dp": _local_dp,
    "prune": _prune,
}

DESCRIPTIONS: Mapping[str, Callable[[Settings], str]] = {
    "none": lambda settings: "none",
    "local-dp": lambda settings: f"local-dp {settings.dp_noise_multiplier:g}",
    "prune": lambda settings: f"prune {1 - settings.prune_keep:.0%}",
}
