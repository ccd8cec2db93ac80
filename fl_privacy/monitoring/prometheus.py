"""The last round's leakage at an HTTP endpoint that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fl_privacy.audit.estimate import LeakageEstimate
from fl_privacy.extras import require
from fl_privacy.monitoring.callback import client_name, client_numbers, most_exposed, summarize

_CLIENT_GAUGES = {
    "leakage": "Share of the private input's variance that the best linear attacker recovers",
    "leakage_lower": "Lower bound of the leakage",
    "leakage_upper": "Upper bound of the leakage",
    "rmse": "Predicted error of the best attack per input element",
    "noise_std": "Noise per parameter that was observed on the update",
    "required_noise_std": "Noise per parameter that would bring the leakage to the target",
}
_ROUND_GAUGES = {
    "leakage_max": "Largest leakage of any client, the middle of its interval",
    "leakage_mean": "Mean leakage over the clients with an estimate",
    "clients": "Clients that were asked",
    "above_target": "Clients whose leakage may be above their target: its upper bound is",
    "not_known": "Clients of which nothing is known",
}


class PrometheusCallback:
    """Serves `fl_privacy_leakage{client="3"}` and the like of the last round at `http://HOST:PORT/metrics`.

    A client that was not part of the last round is not shown; one of which nothing is known has no leakage, and a
    `fl_privacy_client_status` that says why. Client names are client data: whoever can reach the port reads them.

    Args:
        port: TCP port; 0: a free one, see `port`.
        host: Address to listen at. By default only this machine can reach it.
        max_clients: Most clients to show, the most exposed first: every one is a time series.

    Raises:
        ImportError: prometheus-client is not installed; it comes with the extra `prometheus`.
        OSError: The port cannot be listened at.
    """

    def __init__(self, port: int = 9464, *, host: str = "127.0.0.1", max_clients: int = 1000) -> None:
        client: Any = require("prometheus_client", extra="prometheus")
        registry = client.CollectorRegistry()  # of its own: nothing of the process but what is meant to be seen
        self._round = client.Gauge("fl_privacy_round", "Last audited round", registry=registry)
        self._of_round = {
            name: client.Gauge(f"fl_privacy_round_{name}", text, registry=registry)
            for name, text in _ROUND_GAUGES.items()
        }
        self._of_client = {
            name: client.Gauge(f"fl_privacy_{name}", text, ["client"], registry=registry)
            for name, text in _CLIENT_GAUGES.items()
        }
        self._status = client.Gauge(
            "fl_privacy_client_status",
            "1 for what became of the client's audit",
            ["client", "status"],
            registry=registry,
        )
        self._max_clients = max_clients
        self._server, self._thread = client.start_http_server(port, addr=host, registry=registry)
        self.port: int = self._server.server_port

    def on_round(self, server_round: int, rows: Sequence[LeakageEstimate]) -> None:
        """Replaces what is shown by a round."""
        summary = summarize(rows)
        for name, gauge in self._of_round.items():
            value = getattr(summary, name)
            gauge.set(float("nan") if value is None else value)
        for gauge in (*self._of_client.values(), self._status):
            gauge.clear()
        for row in most_exposed(rows, self._max_clients):
            name = client_name(row.client)
            self._status.labels(client=name, status=str(row.status)).set(1)
            for number, value in client_numbers(row).items():
                self._of_client[number].labels(client=name).set(value)
        self._round.set(server_round)

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
