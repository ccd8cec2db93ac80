"""Claims against what an update alone shows: estimates of noise and zeros, false alarms, and misses."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from fl_privacy.audit.claims import Defence, Traces, find_traces, logits_layer
from fl_privacy.audit.estimate import Source
from fl_privacy.audit.public import UpdateTask
from fl_privacy.errors import InvalidInputError

LOSS = nn.CrossEntropyLoss()


def net(features=64, hidden=40, classes=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes))


MODEL = net()


@functools.cache
def trained(client, *, steps=1, batch=4, momentum=0.0, model=MODEL):
    """What a client's SGD changes."""
    generator = torch.Generator().manual_seed(client)
    local = copy.deepcopy(model)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1, momentum=momentum)
    for _ in range(steps):
        x = torch.randn(batch, 64, generator=generator)
        y = torch.randint(0, 5, (batch,), generator=generator)
        optimizer.zero_grad()
        LOSS(local(x), y).backward()
        optimizer.step()
    before = dict(model.named_parameters())
    return {name: (p - before[name]).detach().numpy() for name, p in local.named_parameters()}


def noisy(update, std, seed):
    rng = np.random.default_rng(seed)
    return {name: (a + std * rng.normal(size=a.shape)).astype(a.dtype) for name, a in update.items()}


def pruned(update, keep):
    flat = np.abs(np.concatenate([a.ravel() for a in update.values()]))
    least = np.quantile(flat, 1 - keep)
    return {name: np.where(np.abs(a) >= least, a, 0) for name, a in update.items()}


class TestNoise:
    @pytest.mark.parametrize("options", [{}, {"steps": 5, "momentum": 0.9}, {"batch": 64, "steps": 3}])
    def test_the_last_layer_tells_for_any_training(self, options):
        update = trained(0, **options)
        size = math.sqrt(sum(float((a**2).sum()) for a in update.values()))
        assert find_traces(MODEL, update, cross_entropy=True).noise_std < 1e-6 * size
        found = [find_traces(MODEL, noisy(update, 0.01, seed), cross_entropy=True) for seed in range(40)]
        assert found[0].samples == 41  # a column of each feature, and the bias
        assert np.mean([trace.noise_std**2 for trace in found]) == pytest.approx(0.01**2, rel=0.1)
        spread = np.std([trace.noise_std for trace in found]) / 0.01
        assert spread == pytest.approx(found[0].relative_error, rel=0.4)

    def test_the_rank_of_a_layer_tells_where_examples_are_few(self):
        update = trained(0, batch=4)
        assert find_traces(MODEL, update, cross_entropy=False).noise_std is None
        assert find_traces(MODEL, update, cross_entropy=False, rank=4).noise_std < 1e-8
        for std in (1e-4, 1e-2, 10.0):  # below, about and far above the update's own entries
            found = find_traces(MODEL, noisy(update, std, 1), cross_entropy=False, rank=4)
            assert found.noise_std == pytest.approx(std, rel=0.15)
            assert found.samples > 1000

    def test_it_is_known_whether_so_many_examples_explain_any_rank(self):
        update = trained(0, batch=4)
        found = [
            find_traces(MODEL, update, cross_entropy=True, rank=rank).explained for rank in (None, 4, 39, 40, 10**9)
        ]
        assert found == [False, False, False, True, True]

    def test_a_rank_that_leaves_nothing_tells_nothing(self):
        assert find_traces(MODEL, trained(0), cross_entropy=False, rank=64).noise_std is None

    def test_noise_on_some_layers_only_is_found_at_the_others(self):
        update = trained(0, batch=4)
        last = {n: noisy({n: a}, 0.01, 1)[n] if n.startswith("2.") else a for n, a in update.items()}
        assert find_traces(MODEL, last, cross_entropy=True).noise_std == pytest.approx(0.01, rel=0.3)
        assert find_traces(MODEL, last, cross_entropy=True, rank=4).noise_std < 1e-6

    def test_a_client_that_admits_fewer_examples_than_it_used_hides_no_lack_of_noise(self):
        update = trained(0, batch=16)
        honest = find_traces(MODEL, noisy(update, 0.01, 1), cross_entropy=True, rank=16)
        for rank in (1, 2, 1000, 0):  # and nobody is accused who admits more, or nothing
            found = find_traces(MODEL, noisy(update, 0.01, 1), cross_entropy=True, rank=rank)
            assert 0.7 * honest.noise_std < found.noise_std < 1.3 * honest.noise_std
            assert find_traces(MODEL, update, cross_entropy=True, rank=rank).noise_std < 1e-6

    def test_weight_decay_can_hide_a_lie_but_never_accuse(self):
        update = {
            n: a - 0.01 * p.detach().numpy()
            for (n, p), a in zip(MODEL.named_parameters(), trained(0).values(), strict=True)
        }
        assert find_traces(MODEL, noisy(update, 1e-3, 0), cross_entropy=True).noise_std > 0.9e-3


class TestZeros:
    @pytest.mark.parametrize("keep", [0.01, 0.1, 0.5])
    def test_pruning_is_seen_exactly(self, keep):
        assert find_traces(MODEL, pruned(trained(0), keep), cross_entropy=True).sparsity == pytest.approx(
            1 - keep, abs=0.01
        )

    def test_a_raw_update_has_none(self):
        assert find_traces(MODEL, trained(0), cross_entropy=True).sparsity == 0


class TestWhatIsCredited:
    """A claim is no noise: what is seen limits what counts for protection."""

    @staticmethod
    def credited(traces, claim):
        task = UpdateTask(
            server_round=1,
            client="a",
            node_id=1,
            shared={},
            source=Source.PROXY,
            traces=traces,
            claimed_noise_std=claim,
        )
        return task.noise_std, task.noise_error

    @pytest.mark.parametrize("samples", [32, 41, 1000])
    def test_no_claim_is_credited_beyond_a_third_more_than_is_seen(self, samples):
        traces = Traces(noise_std=0.01, samples=samples, sparsity=0.0)
        for claim in np.geomspace(1e-3, 1e3, 60):
            std, error = self.credited(traces, float(claim))
            assert std <= min(float(claim), 0.01 / 0.75)
            assert error == (0.0 if abs(0.01 / claim - 1) <= min(0.25, 4 / math.sqrt(2 * samples)) else error)
        assert self.credited(traces, None) == (0.01, traces.relative_error)

    def test_of_few_samples_nothing_is_said_and_nothing_credited(self):
        small = net(features=64, hidden=6)
        update = trained(0, batch=64, model=small)
        for seed in range(5):
            traces = find_traces(small, noisy(update, 1e-9, seed), cross_entropy=True, rank=64)
            assert traces.noise_std is None
            assert self.credited(traces, 0.01) == (0.0, 0.0)

    def test_the_layer_that_gives_the_logits_is_found_wherever_it_is_defined(self):
        class Backwards(nn.Module):
            def __init__(self):
                super().__init__()
                self.out, self.hidden = nn.Linear(40, 5), nn.Linear(64, 40)

            def forward(self, x):
                return self.out(torch.tanh(self.hidden(x)))

        torch.manual_seed(0)
        model = Backwards()
        assert logits_layer(model, torch.randn(2, 64)) == "out"
        assert logits_layer(nn.Sequential(model, nn.Softmax(-1)), torch.randn(2, 64)) == ""
        update = trained(0, batch=16, model=model)
        assert find_traces(model, update, cross_entropy=True).noise_std > 1e-4  # of the last that is defined
        assert find_traces(model, update, cross_entropy=True, logits="out").noise_std < 1e-8
        assert find_traces(model, update, cross_entropy=True, logits="").noise_std is None


class TestErrors:
    """Of 300 clients each; the least favourable layer, 41 samples, is the one that tells."""

    CLIENTS = range(300)
    CLAIM = Defence(kind="local-dp", noise_std=0.01)

    def flagged(self, share, **options):
        options = {"cross_entropy": True, **options}
        traces = [find_traces(MODEL, noisy(trained(c % 10), share * 0.01, c), **options) for c in self.CLIENTS]
        return sum(bool(trace.shortfall(self.CLAIM)) for trace in traces) / len(traces)

    def test_honest_clients_are_not_accused(self):
        assert self.flagged(1.0) == 0
        assert self.flagged(1.5) == 0

    def test_a_client_that_shares_its_raw_update_is_always_found(self):
        assert self.flagged(0.0) == 1

    def test_a_quarter_of_the_noise_is_found_and_half_of_it_every_other_time(self):
        assert self.flagged(0.25) == 1
        assert 0.35 < self.flagged(0.5) < 0.65
        assert self.flagged(0.75) < 0.05

    def test_the_rank_sharpens_what_the_sums_leave_open_and_accuses_nobody(self):
        assert self.flagged(1.0, rank=4) == 0
        assert self.flagged(0.75, rank=4) > 0.9
        assert self.flagged(1.0, cross_entropy=False, rank=4) == 0  # where only the rank tells
        assert self.flagged(0.5, cross_entropy=False, rank=4) == 1

    def test_noise_that_was_pruned_away_is_missed_by_rank_where_little_is_kept(self):
        """Known, and in docs/deploy.md: what an honest client pruned of its noise is not there to be seen."""

        def accused(keep, **options):
            claim = Defence(kind="noise, pruned", noise_std=0.01, sparsity=1 - keep)
            shared = [pruned(noisy(trained(c % 10), 0.01, c), keep) for c in range(20)]
            traces = [find_traces(MODEL, update, cross_entropy=True, **options) for update in shared]
            return sum(bool(trace.shortfall(claim)) for trace in traces)

        assert accused(0.1) == accused(0.5) == accused(0.5, rank=4) == 0
        assert accused(0.1, rank=4) == 20

    def test_pruning_that_was_not_done_is_found(self):
        claim = Defence(kind="prune", sparsity=0.9)
        assert find_traces(MODEL, pruned(trained(0), 0.1), cross_entropy=True).shortfall(claim) == ""
        assert "90% of the entries" in find_traces(MODEL, pruned(trained(0), 0.5), cross_entropy=True).shortfall(claim)
        assert "and 0% are" in find_traces(MODEL, trained(0), cross_entropy=True).shortfall(claim)

    def test_without_a_layer_that_tells_nobody_is_accused(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
        update = {name: np.zeros(tuple(p.shape), np.float32) + 1 for name, p in model.named_parameters()}
        traces = find_traces(model, update, cross_entropy=True)
        assert (traces.noise_std, traces.shortfall(self.CLAIM)) == (None, "")

    @pytest.mark.parametrize("values", [{"noise_std": -1.0}, {"noise_std": math.nan}, {"sparsity": 1.5}])
    def test_defences_out_of_range(self, values):
        with pytest.raises(InvalidInputError):
            Defence(kind="x", **values)
