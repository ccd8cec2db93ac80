"""The simulation: its options, who holds which data, what the defences do, and that nothing is left running."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from fl_privacy.audit import AuditSettings
from fl_privacy.flower.records import REPORT_KEY, decode_report
from fl_privacy.flower.request import Request
from fl_privacy.reference import load_dataset

SIMULATIONS = Path(__file__).parents[1] / "simulations"
sys.path[:0] = [str(SIMULATIONS / "vision"), str(SIMULATIONS)]

from vision import client_app, defences, task, training  # noqa: E402
from vision.settings import Settings  # noqa: E402

DEFAULTS = tomllib.loads((SIMULATIONS / "vision" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


@pytest.fixture(autouse=True)
def _task_identity(monkeypatch):
    """Lets messages be made outside of a run, as Flower does in the processes that it starts."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def settings_with(**changes):
    return dataclasses.replace(Settings.from_run_config(DEFAULTS), **changes)


def context_of(partition_id, **changes):
    run_config = {**DEFAULTS, **{key.replace("_", "-"): value for key, value in changes.items()}}
    node_config = {"partition-id": partition_id, "num-partitions": run_config["num-clients"]}
    return Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config=run_config)


def train_message(arrays, *, server_round=1):
    content = RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord({"server-round": server_round})})
    return Message(content=content, dst_node_id=7, message_type="train")


def adding(changes):
    """Returns a client app that adds an array to each array it is sent."""

    def client(message, context):
        arrays = {name: array.numpy() + changes[name] for name, array in message.content["arrays"].items()}
        content = RecordDict(
            {
                "arrays": ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        return Message(content=content, reply_to=message)

    return client


def shared_arrays(reply):
    assert not reply.has_error(), reply.error
    return {name: array.numpy() for name, array in reply.content["arrays"].items()}


class TestSettings:
    def test_the_defaults_of_the_app_are_valid_and_complete(self):
        settings = Settings.from_run_config(DEFAULTS)
        assert (settings.dataset, settings.num_clients, settings.num_server_rounds) == ("digits", 8, 3)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dataset": "digit"}, "dataset must be one of cifar10, digits, fashion-mnist, folder, mnist, got 'digit'"),
            (
                {"model": "alexnet"},
                "model must be one of digitsnet, lenet, linear, mlp, resnet18, resnet8, vit, got 'alexnet'",
            ),
            ({"defence": "dp"}, "defence must be one of mixed, none, local-dp, prune, got 'dp'"),
            (
                {"audit-source": "oracle"},
                "audit-source must be one of trusted, client, proxy, reconstructed, got 'oracle'",
            ),
            ({"audit-unit": "client"}, "audit-unit must be one of example, batch"),
            (
                {"audit-noise-family": "public"},
                "audit-noise-family must be one of isotropic, shaped, white, auto, got 'public'",
            ),
            ({"audit-shares": 0}, "audit-shares must be at least 1, got 0"),
            ({"audit-on-failure": "stop"}, "audit-on-failure must be one of continue, exclude"),
            ({"local-steps": 0}, "local-steps must be at least 1, got 0"),
            ({"learning-rate": -0.1}, "learning-rate must be positive, got -0.1"),
            ({"prune-keep": 1.5}, r"prune-keep must be in \(0, 1\], got 1.5"),
            ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
            ({"batch-size": 1.5}, "batch-size must be of type int, got 1.5"),
            ({"num-clients": True}, "num-clients must be of type int, got True"),
            ({"local-stepz": 1}, r"unknown keys \['local-stepz'\]"),
        ],
    )
    def test_what_is_not_valid_is_refused_with_what_is(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Settings.from_run_config({**DEFAULTS, **changes})

    def test_whole_numbers_stand_for_floats(self):
        assert Settings.from_run_config({**DEFAULTS, "learning-rate": 1}).learning_rate == 1.0

    def test_mixed_hands_the_defences_out_in_turn(self):
        names = [settings_with(defence="mixed").defence_of(client) for client in range(6)]
        assert names == ["none", "local-dp", "prune"] * 2
        assert {settings_with(defence="prune").defence_of(client) for client in range(6)} == {"prune"}


class TestPartitions:
    @pytest.mark.parametrize("num_clients", [8, 100])
    def test_every_example_belongs_to_one_client_and_every_client_has_some(self, num_clients):
        settings = settings_with(num_clients=num_clients)
        parts = [task.partition_indices(settings, client) for client in range(num_clients)]
        assert torch.cat(parts).sort().values.tolist() == list(range(1438))
        assert min(map(len, parts)) >= 1

    def test_clients_differ_in_what_they_hold_as_much_as_alpha_says(self):
        labels = load_dataset("digits").train.labels

        def spread(alpha):
            settings = settings_with(dirichlet_alpha=alpha)
            shares = [
                torch.bincount(labels[task.partition_indices(settings, client)], minlength=10).float()
                for client in range(settings.num_clients)
            ]
            return torch.stack([share / share.sum() for share in shares]).std(dim=0).mean()

        assert spread(0.5) > 3 * spread(1000.0)

    def test_another_number_of_clients_than_configured_is_refused(self):
        context = context_of(0)
        context.node_config["num-partitions"] = 2
        with pytest.raises(ValueError, match="has 2 SuperNodes, and num-clients=8"):
            task.partition_id(context, settings_with())


class TestTraining:
    def test_batches_are_seeded_and_see_everything_before_anything_twice(self):
        examples, indices = load_dataset("digits").train, torch.arange(100, 140)
        drawn = [
            list(training.draw_batches(examples, indices, steps=3, batch_size=20, seed=seed)) for seed in (1, 1, 2)
        ]
        assert [tuple(images.shape) for images, _ in drawn[0]] == [(20, 1, 8, 8)] * 3
        assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn[0], drawn[1], strict=True))
        assert not torch.equal(drawn[0][0][0], drawn[2][0][0])
        first_epoch = torch.cat([drawn[0][0][0], drawn[0][1][0]]).flatten(1)
        assert torch.equal(first_epoch.unique(dim=0), examples.select(indices)[0].flatten(1).unique(dim=0))

    def test_a_client_with_few_examples_gives_all_of_them_in_each_step(self):
        examples, indices = load_dataset("digits").train, torch.tensor([3, 4, 5])
        for images, _ in training.draw_batches(examples, indices, steps=2, batch_size=16, seed=0):
            assert len(images) == 3

    def test_training_on_the_default_model_learns(self):
        settings = settings_with()
        data, model = task.load_data(settings), task.new_model(settings, task.load_data(settings))
        before = training.evaluate(model, data.test)
        batches = training.draw_batches(data.train, torch.arange(1438), steps=60, batch_size=16, seed=0)
        training.train(model, batches, learning_rate=0.1, momentum=0.5)
        after = training.evaluate(model, data.test)
        assert before[1] < 0.3 < 0.8 < after[1]
        assert after[0] < before[0]

    def test_the_initial_model_depends_on_the_seed_alone(self):
        data = task.load_data(settings_with())
        torch.manual_seed(5)
        first, second, other = (task.new_model(settings_with(seed=seed), data) for seed in (1, 1, 2))
        assert torch.equal(first[0].weight, second[0].weight)
        assert not torch.equal(first[0].weight, other[0].weight)


class TestDefences:
    def test_pruning_keeps_the_largest_entries_of_the_whole_update(self):
        before = {"a": np.ones((2, 2), np.float32), "b": np.full(6, -1, np.float32)}
        change = {"a": np.array([[5, -4], [0.1, 0.2]], np.float32), "b": np.array([3, -2, 1, 0.3, 0, 0.4], np.float32)}
        message = train_message({name: Array(array) for name, array in before.items()})
        reply = defences.PruneMod(keep=0.4)(message, context_of(0), adding(change))
        update = {name: array - before[name] for name, array in shared_arrays(reply).items()}
        np.testing.assert_array_equal(update["a"], [[5, -4], [0, 0]])
        np.testing.assert_array_equal(update["b"], [3, -2, 0, 0, 0, 0])

    @pytest.mark.parametrize("keep", [0.0, 1.1])
    def test_pruning_refuses_a_share_that_is_none(self, keep):
        with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
            defences.PruneMod(keep=keep)

    def test_local_dp_clips_and_adds_the_noise_that_was_asked_for_and_can_be_repeated(self):
        context = context_of(1, dp_clipping_norm=0.5, dp_noise_multiplier=0.02)
        model = task.new_model(settings_with(), task.load_data(settings_with()))
        before = model.state_dict()
        step = {name: np.full(array.shape, 0.1, np.float32) for name, array in before.items()}

        def run(server_round):
            reply = defences.defend(train_message(before, server_round=server_round), context, adding(step))
            return np.concatenate([(shared_arrays(reply)[name] - before[name].numpy()).ravel() for name in before])

        update = run(1)
        clipped = 0.5 / np.sqrt(update.size)  # every entry of a constant update of norm 0.5
        assert update.mean() == pytest.approx(clipped, rel=0.1)
        assert (update - clipped).std() == pytest.approx(0.02 * 0.5, rel=0.05)
        np.testing.assert_array_equal(update, run(1))
        assert not np.array_equal(update, run(2))

    @pytest.mark.parametrize("partition_id", [1, 2])
    def test_batch_norm_passes_every_defence_with_its_statistics_as_they_are(self, partition_id):
        settings = settings_with(model="resnet18")
        before = task.new_model(settings, task.load_data(settings)).state_dict()
        step = {name: np.ones(array.shape, array.numpy().dtype) for name, array in before.items()}
        context = context_of(partition_id, model="resnet18")
        after = shared_arrays(defences.defend(train_message(before), context, adding(step)))
        assert list(after) == list(before)
        for name in ("bn1.running_var", "bn1.num_batches_tracked"):
            np.testing.assert_array_equal(after[name], before[name].numpy() + 1)
            assert after[name].dtype == before[name].numpy().dtype
        assert not np.array_equal(after["conv1.weight"], before["conv1.weight"].numpy() + 1)

    def test_no_defence_shares_the_update_as_it_is_and_each_says_what_it_does(self):
        before = {"w": np.zeros(3, np.float32)}
        message = train_message({name: Array(array) for name, array in before.items()})
        reply = defences.defend(message, context_of(0), adding({"w": np.float32([1, 2, 3])}))
        np.testing.assert_array_equal(shared_arrays(reply)["w"], [1, 2, 3])
        told = [defences.describe_defence(context_of(client)) for client in range(3)]
        assert told == ["none", "local-dp 0.015", "prune 90%"]


class TestNoiseFamily:
    @pytest.mark.parametrize(
        ("name", "family", "covariance"),
        [
            ("isotropic", "isotropic", "client"),
            ("shaped", "shaped", "client"),
            ("white", "shaped", "white"),
            ("auto", "auto", "client"),
        ],
    )
    def test_a_name_stands_for_a_policy_that_keeps_noise_on_inputs(self, name, family, covariance):
        from vision.server_app import new_policy

        policy = new_policy(settings_with(audit_noise_family=name, audit_shares=3))
        assert (policy.action, policy.family, policy.covariance) == ("advise", family, covariance)
        assert (policy.kept, policy.shares, policy.seed) == (True, 3, 1)

    def test_the_server_does_not_choose_a_family(self):
        from vision.server_app import new_policy

        with pytest.raises(ValueError, match="expected family isotropic or shaped for the action perturb, got auto"):
            new_policy(settings_with(audit_policy="perturb", audit_noise_family="auto"))

    @pytest.mark.parametrize("covariance", ["client", "white"])
    def test_a_client_trains_on_inputs_with_the_noise_that_is_advised_and_keeps_it(self, covariance):
        from fl_privacy.flower.protection import InputAdvice
        from fl_privacy.flower.records import BATCHES, REPORT_KEY, REQUEST_KEY, decode_report
        from vision.client_app import app

        context = context_of(0, local_steps=2, batch_size=64, num_clients=100)  # all of the client's few in every step
        settings = Settings.from_run_config(context.run_config)
        data = task.load_data(settings)
        noises = {}
        for server_round in (1, 2):
            model = task.new_model(settings, data)
            message = train_message(model.state_dict(), server_round=server_round)
            advice = InputAdvice(target_leakage=0.2, covariance=covariance, prior_std=0.38).entries()
            message.content["config"] = ConfigRecord({**message.content["config"], REQUEST_KEY: BATCHES, **advice})
            reply = app(message, context)
            shared = shared_arrays(reply)
            report = decode_report(reply.content[REPORT_KEY], max_bytes=1 << 30)
            shift = report.shift
            assert (shift.covariance, shift.kept) == (covariance, True)
            assert (shift.leakage <= 0.2 * (1 + 1e-6)).all()
            assert shift.rms > 0.5  # at least τ√(1/0.2 − 1), for white noise
            # What is shared is what training on x + a gives, within the pixels' range.
            given = np.clip(report.inputs + shift.noise, 0, 1)
            assert np.abs(given - report.inputs).mean() > 0.1
            batches = [tuple(torch.from_numpy(part[list(batch)]) for part in (given, report.labels))
                       for batch in report.trace.batches]  # fmt: skip
            training.train(model, batches, learning_rate=settings.learning_rate, momentum=settings.momentum)
            for name, array in model.state_dict().items():
                np.testing.assert_allclose(shared[name], array.numpy(), atol=1e-5)
            for example, noise in zip(report.inputs, shift.noise, strict=True):
                np.testing.assert_array_equal(noises.setdefault(example.tobytes(), noise), noise)
        assert len(noises) == len(task.partition_indices(settings, 0))

    def test_without_advice_it_trains_on_what_it_has(self):
        examples = load_dataset("digits").train
        batches = list(training.draw_batches(examples, torch.arange(8), steps=2, batch_size=4, seed=0))
        settings = settings_with()
        model, plain = (task.new_model(settings, task.load_data(settings)) for _ in range(2))
        training.train(model, batches, learning_rate=0.1, momentum=0.5)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.5)
        for images, labels in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(plain(images), labels).backward()
            optimizer.step()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, theirs)


class TestLauncher:
    def run(self, *arguments, timeout=180):
        return subprocess.run(
            [sys.executable, str(SIMULATIONS / "run.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def test_an_unknown_option_is_refused_at_once_with_the_known_ones(self):
        result = self.run("--run-config", "modell='mlp'")
        assert result.returncode != 0
        assert "unknown in --run-config: modell; expected any of dataset" in result.stderr

    def test_two_numbers_of_clients_are_refused(self):
        result = self.run("--num-supernodes", "3", "--run-config", "num-clients=4")
        assert result.returncode != 0
        assert "--num-supernodes 3 contradicts num-clients=4" in result.stderr

    def test_a_run_that_fails_says_so_by_its_exit_code(self):
        result = self.run("--run-config", "model='alexnet'", "--num-supernodes", "2")
        assert "model must be one of digitsnet, lenet" in result.stdout
        assert result.stderr.endswith("Run finished:failed\n")
        assert result.returncode == 1

    def test_orphans_that_ignore_being_asked_are_stopped_too(self):
        stubborn = """
            import signal, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("up", flush=True)
            time.sleep(60)
        """
        parent = f"""
            import subprocess, sys
            command = [sys.executable, "-c", {textwrap.dedent(stubborn)!r}]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
            child.stdout.readline()
            print(child.pid, flush=True)
        """
        launcher = f"""
            import subprocess, sys
            from processes import adopt_orphans, descendants, stop_descendants
            adopt_orphans()
            orphan = int(subprocess.check_output([sys.executable, "-c", {textwrap.dedent(parent)!r}]))
            assert orphan in descendants()
            print(orphan, stop_descendants(grace=0.5))
        """
        if sys.platform != "linux":
            pytest.skip("only Linux lets a process adopt orphans")
        environment = {**os.environ, "PYTHONPATH": str(SIMULATIONS)}
        command = [sys.executable, "-c", textwrap.dedent(launcher)]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
        orphan, left = output.split(maxsplit=1)
        assert left.strip() == "set()"
        assert not Path(f"/proc/{orphan}").exists()


def test_the_picture_is_of_the_client_that_leaked_most_at_first_and_is_drawn_at_the_last_round(tmp_path):
    from fl_privacy.audit import AuditSettings, AuditTask, SerialExecutor, TrainingTrace
    from fl_privacy.audit.auditor import AuditedRound, Auditor
    from vision.pictures import WorstClientPicture

    data = load_dataset("digits")
    images, labels = data.train.select(slice(0, 4))
    model = task.new_model(settings_with(model="mlp"), data)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.train(model, [(images, labels)], learning_rate=0.1, momentum=0.0)
    update = {name: (p.detach() - before[name]).numpy() for name, p in model.named_parameters()}
    trace = TrainingTrace(optimizer="SGD", batches=((0, 1, 2, 3),), lr=(0.1,))
    generator = np.random.default_rng(0)

    def client(name, noise):
        shared = {n: a + noise * generator.standard_normal(a.shape).astype(np.float32) for n, a in update.items()}
        return AuditTask(
            server_round=1, client=name, node_id=int(name), shared=shared, inputs=images.numpy(),
            labels=labels.numpy(), trace=trace, captured=update, defence="none",
        )  # fmt: skip

    auditor = Auditor(
        model, torch.nn.CrossEntropyLoss(), settings=AuditSettings(prior_std=0.3, data_range=1.0, max_examples=1),
        executor=SerialExecutor(),
    )  # fmt: skip
    params = {name: p.numpy() for name, p in before.items()}
    tasks = [client("1", 0.01), client("2", 0.0)]
    rows = auditor.audit_round(params, tasks)
    draw = WorstClientPicture(data.train, last_round=2, folder=tmp_path / "pictures")
    for server_round in (1, 2):
        assert not (tmp_path / "pictures").exists()
        draw(AuditedRound(server_round=server_round, context=auditor.context, params=params, tasks=tasks, rows=rows))
    (picture,) = (tmp_path / "pictures").iterdir()
    assert picture.name == "client-2-round-2.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


ASKED = {"trusted": "batches", "client": "estimate", "proxy": "claim", "reconstructed": "claim"}


class TestSources:
    """One client's answer to the server under each source, through the app and its mods."""

    def answer(self, source, partition=1):
        context = context_of(partition, audit_source=source, local_steps=2, batch_size=8)
        settings = Settings.from_run_config(context.run_config)
        arrays = task.new_model(settings, task.load_data(settings)).state_dict()
        message = train_message(arrays)
        wish = (
            Request.for_estimate(AuditSettings(max_examples=1)) if source == "client" else Request(kind=ASKED[source])
        )
        entries = {**message.content["config"], **wish.entries()}
        message.content = RecordDict({**message.content, "config": ConfigRecord(entries)})
        reply = client_app.app(message, context)
        assert not reply.has_error(), reply.error
        return settings, reply

    def images_of(self, settings, partition=1):
        """The bytes of every image that the client holds."""
        indices = task.partition_indices(settings, partition)
        images, _ = task.load_data(settings).train.select(indices)
        return [image.numpy().tobytes() for image in images]

    @pytest.mark.parametrize("source", ASKED)
    def test_images_leave_a_client_only_where_the_source_is_trusted(self, source):
        settings, reply = self.answer(source)
        sent = message_to_proto(reply).SerializeToString() + b"".join(
            value
            for record in reply.content.config_records.values()
            for value in record.values()
            if type(value) is bytes
        )
        assert any(image in sent for image in self.images_of(settings)) == (source == "trusted")

    def test_a_client_that_audits_itself_tells_scalars_of_what_leaves_it(self):
        _, reply = self.answer("client")
        assert set(reply.content) == {"arrays", "metrics", REPORT_KEY}
        assert set(reply.content[REPORT_KEY]) == {"head"}
        estimate = decode_report(reply.content[REPORT_KEY], max_bytes=2**20).estimate
        assert 0 < estimate.leakage.value < 1, "this client clips and puts noise on its update"
        assert estimate.noise_std > 0

    @pytest.mark.parametrize("source", ASKED)
    def test_audits_that_see_an_update_alone_are_told_how_many_examples_are_behind_it(self, source):
        settings, reply = self.answer(source)
        held = len(task.partition_indices(settings, 1))
        assert held > 16
        assert reply.content["metrics"]["num-examples"] == (16 if source in ("proxy", "reconstructed") else held)
