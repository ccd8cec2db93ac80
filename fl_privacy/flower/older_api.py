"""Flower's older API (`NumPyClient`, `Client`, `flwr.server.strategy`): the same reports, carried where they fit there.

A `FitIns` has a config and unnamed arrays, a `FitRes` has metrics and no records of one's own. So the server's request,
its advice and the arrays' names travel in the config, and the report's entries in the metrics, each under a prefix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.client import Client, NumPyClient
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Parameters,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.compat.client.client import (
    maybe_call_evaluate,
    maybe_call_fit,
    maybe_call_get_parameters,
    maybe_call_get_properties,
)

from fl_privacy.audit.task import Array
from fl_privacy.errors import RecordError
from fl_privacy.flower.advice import Advice, readable
from fl_privacy.flower.protection import InputAdvice
from fl_privacy.flower.records import REPORT_KEY
from fl_privacy.flower.reporter import Describe, NewModel, Reporter, Watch
from fl_privacy.flower.request import Request
from fl_privacy.influence.update import Loss

NAMES_KEY = "fl-privacy-names"
"""Entry of a config by which the server says how the arrays are called, in order."""
_PREFIX = f"{REPORT_KEY}/"


def put_report(record: ConfigRecord, metrics: MutableMapping[str, Any]) -> None:
    """Adds a report's entries to the metrics that travel."""
    metrics.update({f"{_PREFIX}{key}": value for key, value in record.items()})


def take_report(metrics: MutableMapping[str, Any]) -> ConfigRecord | None:
    """Removes the entries of a report from metrics that arrived and returns them as its record; `None` without one."""
    keys = [key for key in metrics if key.startswith(_PREFIX)]
    entries = {key.removeprefix(_PREFIX): metrics.pop(key) for key in keys}
    return ConfigRecord(entries) if entries else None


class AuditedClient(Client):
    """Wraps a client of the older API: follows advice and adds a report to what it shares, as `InversionAuditMod` does.

    In `client_fn`: `return AuditedClient(FlowerClient(...), context, model=Net, loss=torch.nn.CrossEntropyLoss())`.
    It is the innermost of everything: mods that protect the update are outside of it, and an audit on the client does
    not credit them. Under SecAgg+ it still audits the client's own update, which nobody else gets to see.

    Noise that the server advises is put on the parameters that the client's `fit` returns; noise on inputs, where
    `fit` calls `protected_inputs`, is kept in the context's state. `follow_advice=False` goes without either.

    Args:
        client: The client to wrap.
        context: What `client_fn` was given: the node's and the run's configuration, and the client's state.
        options: As those of `InversionAuditMod`.
        model: As there.
        loss: As there.
        defence: As there.
        noise_seed: As there, but of (instructions, context).

    Raises:
        InvalidInputError: Only one of model and loss is given, or an option is unknown.
    """

    def __init__(
        self,
        client: Client | NumPyClient,
        context: Context,
        *,
        model: NewModel | None = None,
        loss: Loss | None = None,
        defence: Describe = "",
        noise_seed: Callable[[FitIns, Context], int] | None = None,
        **options: Any,
    ) -> None:
        self.client = client.to_client()
        self._context = context
        self._noise_seed = noise_seed
        self._reporter = Reporter(model=model, loss=loss, defence=defence, arguments=options)

    def fit(self, ins: FitIns) -> FitRes:
        """Runs the client's own `fit`, follows advice, and adds a report to its metrics if the server asked for one."""
        config = dict(ins.config)
        request, names = Request.take(config), config.pop(NAMES_KEY, None)
        advice, input_advice = readable(Advice.take, config), readable(InputAdvice.take, config)
        if request is None:
            return maybe_call_fit(self.client, FitIns(ins.parameters, config))
        sent = _named(ins.parameters, names)
        watch = self._reporter.watch(request, self._context, sent)
        seed = None if self._noise_seed is None else self._noise_seed(ins, self._context)
        generator = np.random.default_rng(seed)
        with watch.active(), watch.protecting(input_advice, generator):
            result = maybe_call_fit(self.client, FitIns(ins.parameters, config))
        parameters = result.parameters
        if advice is not None:
            parameters = _followed(watch, advice, parameters, list(sent), generator)

        def shared(trained: Sequence[str]) -> Mapping[str, Array]:
            after = dict(zip(sent, parameters_to_ndarrays(parameters), strict=True))
            return {name: np.subtract(after[name], sent[name], dtype=sent[name].dtype) for name in trained}

        metrics = dict(result.metrics or {})
        put_report(watch.record(shared), metrics)
        return FitRes(result.status, parameters, result.num_examples, metrics)

    def evaluate(self, ins: EvaluateIns) -> EvaluateRes:
        """Returns the client's own evaluation."""
        return maybe_call_evaluate(self.client, ins)

    def get_parameters(self, ins: GetParametersIns) -> GetParametersRes:
        """Returns the client's own parameters."""
        return maybe_call_get_parameters(self.client, ins)

    def get_properties(self, ins: GetPropertiesIns) -> GetPropertiesRes:
        """Returns the client's own properties."""
        return maybe_call_get_properties(self.client, ins)


def _followed(
    watch: Watch, advice: Advice, parameters: Parameters, names: Sequence[str], generator: np.random.Generator
) -> Parameters:
    """Returns parameters with the advised noise on them; as they are where they are not the arrays that were sent."""
    try:
        arrays = dict(zip(names, parameters_to_ndarrays(parameters), strict=True))
    except ValueError as error:
        watch.cannot_follow(advice, error)
        return parameters
    record = ArrayRecord({name: FlowerArray(array) for name, array in arrays.items()})
    followed = watch.follow(advice, record, generator)
    return parameters if followed is record else ndarrays_to_parameters([a.numpy() for a in followed.values()])


def _named(parameters: Parameters, names: Any) -> dict[str, Array]:
    """Returns the arrays that were sent by the names that the server gives them; by number where none fit."""
    arrays = parameters_to_ndarrays(parameters)
    try:
        given = json.loads(names) if names is not None else None
    except (ValueError, TypeError, RecursionError) as error:
        raise RecordError(f"expected the arrays' names in JSON, got {names!r:.80}") from error
    if not isinstance(given, list) or len(given) != len(arrays) or not all(isinstance(name, str) for name in given):
        given = [str(index) for index in range(len(arrays))]
    return dict(zip(given, arrays, strict=True))
