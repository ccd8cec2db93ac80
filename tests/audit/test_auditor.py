"""The auditor: settings and tasks that are refused, chunks, time limits, failures, the scale of the prior."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fl_privacy.audit import Auditor, AuditSettings, SerialExecutor, Status, TrainingTrace
from fl_privacy.audit.perturbation import noise_blocks, observed_perturbation
from fl_privacy.errors import InvalidInputError

from .cases import examples, new_model, new_task, noisy, params_of


def new_auditor(model, *, executor=None, time_limit=60.0, **settings):
    defaults = {"max_examples": 1, "prior_std": 1.0, "data_range": 2.0}
    return Auditor(
        model,
        nn.CrossEntropyLoss(),
        settings=AuditSettings(**{**defaults, **settings}),
        executor=executor,
        time_limit=time_limit,
    )


class Recording(SerialExecutor):
    """Serial, with another number of workers; keeps the chunks it was given and the context."""

    def __init__(self, workers=1):
        super().__init__()
        self.workers, self.chunks, self.contexts = workers, [], []

    @property
    def num_workers(self):
        return self.workers

    def run(self, context, params, chunks, *, deadline):
        self.chunks, self.contexts = chunks, [*self.contexts, context]
        return super().run(context, params, chunks, deadline=deadline)


class TestSettings:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"unit": "client"}, "unit to be one of example, batch, got 'client'"),
            ({"precision": "half"}, "precision to be one of auto, float32, float64"),
            ({"batch_norm": "frozen"}, "batch_norm to be one of auto, eval, train"),
            ({"target_leakage": 1.0}, "target_leakage strictly between 0 and 1"),
            ({"target_leakage": float("nan")}, "target_leakage strictly between 0 and 1"),
            ({"prior_std": 0.0}, "finite prior_std > 0, got 0.0"),
            ({"data_range": float("inf")}, "finite data_range > 0"),
            ({"ridge": -1.0}, "finite ridge >= 0"),
            ({"ridge": float("nan")}, "finite ridge >= 0"),
            ({"rtol": 0.0}, "finite rtol > 0"),
            ({"max_examples": 0}, "max_examples >= 1"),
            ({"memory_budget": 0}, "memory_budget >= 1"),
        ],
    )
    def test_values_out_of_range_are_refused_by_name(self, change, message):
        with pytest.raises(InvalidInputError, match=message):
            AuditSettings(**change)

    def test_they_stand_in_rows_as_plain_values(self):
        assert AuditSettings(prior_std=0.3).to_dict()["prior_std"] == 0.3


class TestTasks:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"inputs": np.zeros((0, 4), np.float32)}, r"nothing empty, got \[0, 4\]"),
            ({"inputs": np.zeros(4, np.float32)}, r"expected inputs \[examples, \*shape\]"),
            ({"labels": np.zeros(3, np.int64)}, r"one label for each of 4 examples, got \[3\]"),
            ({"labels": np.int64(3)}, r"one label for each of 4 examples, got \[\]"),
            ({"trace": TrainingTrace(optimizer="SGD", batches=((0, 4),), lr=(0.1,))}, r"indices in \[0, 4\)"),
            ({"trace": TrainingTrace(optimizer="SGD", batches=((-1,),), lr=(0.1,))}, r"indices in \[0, 4\)"),
        ],
    )
    def test_parts_that_do_not_fit_together_are_refused(self, change, message):
        with pytest.raises(InvalidInputError, match=message):
            replace(new_task(new_model()), **change)


class TestPerturbation:
    def test_it_is_orthogonal_to_the_update_once_the_scale_is_out(self):
        generator = torch.Generator().manual_seed(0)
        update = torch.randn(3, 500, generator=generator, dtype=torch.float64)
        noise = 0.05 * torch.randn(3, 500, generator=generator, dtype=torch.float64)
        factors = torch.tensor([[1.0], [0.3], [7.0]], dtype=torch.float64)
        seen = observed_perturbation(factors * (update + noise), update)
        torch.testing.assert_close((seen.delta * update).sum(-1), torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(seen.noise_std, torch.full((3,), 0.05, dtype=torch.float64), rtol=0.1, atol=0)
        torch.testing.assert_close(seen.scale, factors[:, 0], rtol=0.02, atol=0)
        torch.testing.assert_close(seen.norm, seen.noise_std * 500**0.5)

    def test_without_a_perturbation_the_ratio_to_it_is_infinite(self):
        update = torch.arange(1.0, 5.0, dtype=torch.float64)[None]
        seen = observed_perturbation(2 * update, update)
        assert (float(seen.norm), float(seen.scale), float(seen.snr_db)) == (0.0, 2.0, float("inf"))

    @pytest.mark.parametrize("sign", [0.0, -1.0])
    def test_an_update_that_is_gone_or_turned_around_gives_finite_numbers(self, sign):
        update = torch.ones(1, 4, dtype=torch.float64)
        seen = observed_perturbation(sign * update, update)
        assert torch.isfinite(seen.delta).all()
        assert float(seen.scale) > 0
        assert float(seen.cosine) == sign


class TestRounds:
    def test_rows_come_in_the_order_of_tasks_whatever_the_chunks(self):
        model = new_model()
        tasks = [new_task(model, client=c, count=2 + c % 2) for c in range(6)]
        executor = Recording()
        rows = new_auditor(model, executor=executor).audit_round(params_of(model), tasks)
        assert [row.client for row in rows] == [task.client for task in tasks]
        assert {row.status for row in rows} == {Status.AUDITED}
        assert sorted(len(chunk) for chunk in executor.chunks) == [3, 3]
        assert all(len({task.inputs.shape for task in chunk}) == 1 for chunk in executor.chunks)

    def test_two_clients_of_one_name_keep_their_own_rows(self):
        model = new_model()
        tasks = [replace(new_task(model, client=c), client="same") for c in range(2)]
        rows = new_auditor(model, max_examples=4).audit_round(params_of(model), tasks)
        assert [row.node_id for row in rows] == [task.node_id for task in tasks]
        assert rows[0].update_norm != rows[1].update_norm

    @pytest.mark.parametrize(("clients", "workers", "sizes"), [(20, 1, [6, 7, 7]), (6, 3, [2, 2, 2]), (2, 4, [1, 1])])
    def test_there_is_work_for_every_worker_and_no_chunk_is_large(self, clients, workers, sizes):
        model, executor = new_model(), Recording(workers)
        tasks = [new_task(model, client=c, count=1) for c in range(clients)]
        new_auditor(model, executor=executor).audit_round(params_of(model), tasks)
        assert sorted(len(chunk) for chunk in executor.chunks) == sizes

    def test_progress_ends_with_everyone(self):
        model, seen = new_model(), []
        tasks = [new_task(model, client=c, count=1 + c % 2) for c in range(4)]
        new_auditor(model).audit_round(params_of(model), tasks, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(2, 4), (4, 4)]

    def test_a_round_without_tasks_has_no_rows(self):
        assert new_auditor(new_model()).audit_round({}, []) == []

    def test_what_is_not_begun_in_time_is_late_and_the_next_round_is_not(self):
        model = new_model()

        class SlowFirst(SerialExecutor):
            def run(self, context, params, chunks, *, deadline):
                for rows in super().run(context, params, chunks, deadline=deadline):
                    yield rows
                    if tasks[0].server_round == 1:
                        time.sleep(max(0.0, deadline - time.monotonic()))

        tasks = [new_task(model, client=c, count=1 + c) for c in range(3)]
        auditor = new_auditor(model, executor=SlowFirst(), time_limit=3.0)
        rows = auditor.audit_round(params_of(model), tasks)
        assert [row.status for row in rows] == [Status.AUDITED, Status.LATE, Status.LATE]
        assert rows[1].detail == "not audited within 3 s"
        assert rows[1].settings["unit"] == "example"
        assert rows[1].versions["torch"] == torch.__version__.partition("+")[0]
        tasks = [replace(task, server_round=2) for task in tasks]
        rows = auditor.audit_round(params_of(model), tasks)
        assert {row.status for row in rows} == {Status.AUDITED}

    def test_an_executor_that_fails_half_way_keeps_what_was_done(self):
        model = new_model()

        class Failing(SerialExecutor):
            def run(self, context, params, chunks, *, deadline):
                yield next(super().run(context, params, chunks, deadline=deadline))
                raise OSError("disk full")

        tasks = [new_task(model, client=c, count=1 + c) for c in range(2)]
        rows = new_auditor(model, executor=Failing()).audit_round(params_of(model), tasks)
        assert [row.status for row in rows] == [Status.AUDITED, Status.AUDIT_FAILED]
        assert rows[1].detail == "OSError: disk full"

    @pytest.mark.parametrize("time_limit", [0.0, -1.0, float("nan")])
    def test_a_time_limit_that_is_none_is_refused(self, time_limit):
        with pytest.raises(InvalidInputError, match="expected time_limit > 0 seconds"):
            new_auditor(new_model(), time_limit=time_limit)


class TestPrior:
    def measured(self, *tasks):
        model, executor = new_model(), Recording()
        auditor = new_auditor(model, executor=executor, prior_std=None, data_range=None)
        for task in tasks:
            auditor.audit_round(params_of(model), [task])
        return [(context.settings.prior_std, context.settings.data_range) for context in executor.contexts]

    def test_its_scale_is_that_of_the_first_rounds_inputs_and_stays(self):
        model = new_model()
        first, second = (new_task(model, client=c, count=8) for c in (0, 1))
        (prior, width), later = self.measured(first, second)
        assert prior == pytest.approx(first.inputs.std(), rel=1e-6)
        assert width == pytest.approx(np.ptp(first.inputs), rel=1e-6)
        assert later == (prior, width)

    @pytest.mark.parametrize("value", [0.0, np.nan, 1e308])
    def test_inputs_without_a_scale_do_not_end_the_round(self, value):
        inputs, _ = examples(0, 4, np.float64)
        inputs[:] = value
        inputs[0, 0, 0, 0] = -value
        assert self.measured(replace(new_task(new_model()), inputs=inputs)) == [(1.0, 1.0)]

    def test_what_is_told_is_used(self):
        model, executor = new_model(), Recording()
        row = new_auditor(model, executor=executor, prior_std=0.25, data_range=1.0).audit_round(
            params_of(model), [new_task(model, defend=lambda update: noisy(update, 1e-3))]
        )[0]
        assert row.prior_std == 0.25
        assert row.ridge == pytest.approx((row.noise_std / 0.25) ** 2)


class TestNoiseBlocks:
    SIZES = (2000, 30, 700, 10)

    def honest(self, *, laplace):
        generator = torch.Generator().manual_seed(1)
        update = torch.randn(200, sum(self.SIZES), generator=generator, dtype=torch.float64) ** 3
        noise = torch.randn(update.shape, generator=generator, dtype=torch.float64)
        if laplace:
            noise = noise * torch.empty_like(noise).exponential_(generator=generator).sqrt()
        return update, update + 0.3 * noise

    @pytest.mark.parametrize("laplace", [False, True])
    def test_noise_of_one_strength_is_not_split(self, laplace):
        update, shared = self.honest(laplace=laplace)
        blocks = noise_blocks(0.2 * shared, update, self.SIZES)
        assert not blocks.split.any()
        assert (blocks.weights == 1).all()

    def test_a_noisy_layer_is_told_from_the_others_and_clipping_is_seen_through(self):
        update, shared = self.honest(laplace=False)
        shared[:, :2000] += 30 * torch.randn(200, 2000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        blocks = noise_blocks(0.2 * shared, update, self.SIZES)
        assert blocks.split.all()
        torch.testing.assert_close(blocks.std[:, 2100].median(), torch.tensor(0.3).double(), rtol=0.02, atol=0)
        torch.testing.assert_close(blocks.std[:, 0].median(), torch.tensor(30.0).double(), rtol=0.02, atol=0)
        off = (blocks.scale / 0.2 - 1) / (blocks.scale_error / 0.2)
        assert off.square().mean().sqrt() == pytest.approx(1, rel=0.2)  # the standard error is one

    def test_what_is_left_of_a_pruned_update_is_exact_whatever_the_scale(self):
        update, _ = self.honest(laplace=False)
        shared = torch.where(update.abs() > 1, 0.01 * update, 0.0)
        blocks = noise_blocks(shared, update, self.SIZES)
        assert blocks.split.all()
        torch.testing.assert_close(blocks.scale, torch.full((200,), 0.01, dtype=torch.float64))
        assert torch.equal(blocks.weights, (shared != 0).double())
        torch.testing.assert_close(blocks.zeroed, (shared == 0).double().mean(-1))

    @pytest.mark.parametrize("shared", [0.0, -1.0, 1.0])
    def test_an_update_that_is_gone_turned_around_or_untouched_gives_finite_numbers(self, shared):
        update = torch.ones(1, 100, dtype=torch.float64)
        blocks = noise_blocks(shared * update, update, [90, 10])
        assert not blocks.split.any()
        for part in (blocks.std, blocks.scale, blocks.scale_error, blocks.weights):
            assert torch.isfinite(part).all()
