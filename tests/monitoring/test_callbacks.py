"""Callbacks for real: event files read back, an endpoint asked over HTTP, and one that fails in every round."""

from __future__ import annotations

import math
import socket
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
from fl_privacy.interval import Interval
from fl_privacy.monitoring import PrometheusCallback, RoundCallback, RoundSummary, TensorBoardCallback, summarize
from fl_privacy.monitoring.callback import close_all, notify, notify_pictures

HOSTILE = 'evil"} 1\nfl_privacy_round 99\n'


def row(client: str, leakage: float | None = None, **changes) -> LeakageEstimate:
    fields = {"server_round": 1, "status": Status.NO_REPLY}
    if leakage is not None:
        fields |= {
            "status": Status.AUDITED,
            "source": Source.TRUSTED,
            "leakage": Interval(leakage - 0.1, leakage, leakage + 0.1),
            "rmse": 0.25,
            "noise_std": 0.0,
            "required_noise_std": 0.01,
            "target_leakage": 0.5,
        }
    return LeakageEstimate(client=client, **{**fields, **changes})


ROUNDS = [[row("a", 0.9), row("b", 0.3), row("c")], [row("a", 0.6), row("c", 0.2)]]


class TestProtocol:
    def test_a_round_in_a_few_numbers(self):
        assert summarize(ROUNDS[0]) == RoundSummary(
            leakage_max=0.9, leakage_mean=pytest.approx(0.6), clients=3, above_target=1, not_known=1
        )
        doubtful = replace(row("e", 0.4), leakage=Interval(0.3, 0.4, 0.6))
        assert summarize([doubtful]).above_target == 1  # as the alert on leakage_upper has it
        diverged = replace(row("d", 0.5), leakage=Interval(math.nan, math.nan, math.nan))
        assert summarize([diverged]) == RoundSummary(
            leakage_max=None, leakage_mean=None, clients=1, above_target=0, not_known=1
        )

    def test_one_that_fails_stops_nobody(self, caplog):
        seen = []

        class Failing:
            def on_round(self, server_round, rows):
                raise OSError("no space left")

            def close(self):
                raise OSError("still none")

        class Plain:
            def on_round(self, server_round, rows):
                seen.append((server_round, [r.client for r in rows]))

        callbacks = [Failing(), Plain()]
        assert all(isinstance(callback, RoundCallback) for callback in callbacks)
        notify(callbacks, 1, ROUNDS[0])
        notify_pictures(callbacks, 1, {"a": Path("none.png")})  # nobody takes any
        close_all(callbacks)
        assert seen == [(1, ["a", "b", "c"])]
        assert "the callback Failing failed in round 1" in caplog.text
        assert "no space left" in caplog.text


class TestTensorBoard:
    pytest.importorskip("tensorboard")

    def test_event_files_hold_every_client(self, tmp_path):
        from PIL import Image
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        pictures = tmp_path / "run.pictures"
        pictures.mkdir()
        callback = TensorBoardCallback(tmp_path / "events", pictures=pictures, max_clients=2)
        for server_round, rows in enumerate(ROUNDS, start=1):
            Image.new("RGB", (8, 8), (0, 0, 40 * server_round)).save(pictures / f"client-{server_round}-before.png")
            callback.on_round(server_round, rows)
        drawn = (
            pictures / "client-2-before.png"
        )  # drawn by the run, and in the folder, too: shown once more under its client
        notify_pictures([callback], 2, {HOSTILE: drawn})
        callback.close()
        events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0})
        events.Reload()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert scalars["leakage/a"] == [(1, pytest.approx(0.9)), (2, pytest.approx(0.6))]
        assert scalars["leakage_upper/a"][0] == (1, pytest.approx(1.0))
        assert "leakage/b" not in scalars  # the two that count: a, and c of which nothing was known
        assert scalars["round/not_known"] == [(1, 1.0), (2, 0.0)]
        assert scalars["round/above_target"] == [(1, 1.0), (2, 1.0)]
        images = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
        assert images == {
            "pictures/client-1-before": [1],
            "pictures/client-2-before": [2],
            'pictures/evil"} 1 fl_privacy_round 99': [2],
        }


class TestPrometheus:
    pytest.importorskip("prometheus_client")

    @pytest.fixture
    def callback(self):
        callback = PrometheusCallback(0)
        yield callback
        callback.close()

    def scraped(self, callback) -> dict[str, float]:
        from prometheus_client.parser import text_string_to_metric_families

        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{callback.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {"/".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}

    def test_the_endpoint_shows_the_last_round(self, callback):
        callback.on_round(1, ROUNDS[0])
        first = self.scraped(callback)
        assert (first["fl_privacy_leakage/a"], first["fl_privacy_leakage/b"]) == (0.9, 0.3)
        assert first["fl_privacy_client_status/c/no-reply"] == 1
        assert "fl_privacy_leakage/c" not in first
        callback.on_round(2, ROUNDS[1])
        second = self.scraped(callback)
        assert (second["fl_privacy_round"], second["fl_privacy_leakage/c"]) == (2, 0.2)
        assert "fl_privacy_leakage/b" not in second
        assert (second["fl_privacy_round_above_target"], second["fl_privacy_round_not_known"]) == (1, 0)

    def test_a_clients_name_is_a_label_and_nothing_else(self, callback):
        callback.on_round(1, [row(HOSTILE, 0.5)])
        found = self.scraped(callback)
        assert found["fl_privacy_round"] == 1
        assert found['fl_privacy_leakage/evil"} 1 fl_privacy_round 99'] == 0.5

    def test_the_port_is_free_again_after_the_run(self):
        callback = PrometheusCallback(0)
        port = callback.port
        with pytest.raises(OSError, match="in use"):
            PrometheusCallback(port)
        callback.close()
        with pytest.raises(urllib.error.URLError):
            self.scraped(callback)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
