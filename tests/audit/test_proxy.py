"""Public examples in place of private ones: exact where they are the same, on digits close to what trusted rows say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fl_privacy.audit.proxy import ObservedUpdate, PublicJacobians
from fl_privacy.audit.public import PublicExamples
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.influence.update import GradientUpdate

from .cases import CLASSES, PRIOR, new_model

MODEL = new_model().double()
UPDATE = GradientUpdate(MODEL, nn.CrossEntropyLoss())
THETA = {name: p.detach() for name, p in MODEL.named_parameters()}
TARGET = 0.4


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(count) % CLASSES


PUBLIC = PublicJacobians.of(UPDATE, THETA, *images(12))


def exact(inputs, labels, noise_std=0.0):
    """Leakage and needed noise of a batch's most exposed example, and the batch's update, from its own Jacobian."""
    count = len(inputs)
    every = torch.arange(count)
    jacobian = UpdateJacobian(
        UPDATE, THETA, inputs.expand(count, *inputs.shape), labels.expand(count, -1), private=every
    )
    spectrum = estimate_spectrum(jacobian)
    leakage = float(spectrum.leakage(noise_std, PRIOR).value.max())
    return leakage, float(spectrum.required_noise_std(TARGET, PRIOR).max()), jacobian.update()[0]


def observed(update, size, labels=None, **noise):
    counts = None if labels is None else torch.bincount(labels, minlength=CLASSES)
    return ObservedUpdate.of(update, UPDATE.layout.sizes, size=size, label_counts=counts, **noise)


def predict(seen, public=PUBLIC, **options):
    return public.predict(seen, target_leakage=TARGET, prior_std=PRIOR, **options)


class TestExact:
    def test_a_batch_of_all_public_examples_is_its_own_proxy(self):
        inputs, labels = images(12)
        leakage, needed, update = exact(inputs, labels, noise_std=0.01)
        for scale in (1.0, 0.1):  # a learning rate, or clipping
            says = predict(observed(scale * update, 12, labels))
            assert says.required_noise_std.value == pytest.approx(scale * needed, rel=1e-9)
            assert says.required_noise_std.lower == pytest.approx(says.required_noise_std.upper, rel=1e-9)
        seen = observed(update, 12, labels)
        with_noise = ObservedUpdate(seen.squared_norms, seen.norm, type(seen.norm)(0.01, 0.01, 0.01), 12)
        assert predict(with_noise).leakage.value == pytest.approx(leakage, abs=2e-3)

    def test_an_example_that_is_public_itself_is_known_by_the_layers_of_its_update(self):
        inputs, labels = images(12)
        _, needed, update = exact(inputs[4:5], labels[4:5])
        only = PublicJacobians.of(UPDATE, THETA, inputs[3:6], labels[3:6])  # one of each class
        says = predict(observed(update, 1, labels[4:5]), only)
        assert says.batches == 1
        assert says.required_noise_std.value == pytest.approx(needed, rel=1e-9)

    def test_without_noise_everything_leaks_that_the_update_determines(self):
        inputs, labels = images(1, seed=5)
        leakage, _, update = exact(inputs, labels)
        assert predict(observed(update, 1, labels)).leakage.value == pytest.approx(leakage, abs=1e-3)


class TestInterval:
    def test_it_holds_the_truth_for_most_clients(self):
        public = PublicJacobians.of(UPDATE, THETA, *images(96))
        held, errors = 0, []
        for client in range(20):
            inputs, labels = images(4, seed=100 + client)
            _, needed, update = exact(inputs, labels)
            says = predict(observed(update, 4, labels), public).required_noise_std
            held += says.lower <= needed <= says.upper
            errors.append(abs(says.value / needed - 1))
        assert held >= 16
        assert float(np.median(errors)) < 0.25

    def test_noise_is_taken_out_of_the_norm_and_widens_it(self):
        inputs, labels = images(4, seed=3)
        _, _, update = exact(inputs, labels)
        clean = observed(update, 4, labels)
        noise = torch.randn(len(update), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        std = 0.5 * float(update.norm()) / math.sqrt(len(update))
        seen = observed(update + std * noise, 4, labels, noise_std=std, noise_error=0.05)
        assert seen.norm.lower < clean.norm.value < seen.norm.upper
        assert not seen.drowned
        says, unaware = predict(seen), predict(observed(update + std * noise, 4, labels))
        assert says.leakage.value < unaware.leakage.value
        drowned = observed(update + 50 * std * noise, 4, labels, noise_std=50 * std, noise_error=0.05)
        assert drowned.drowned
        assert predict(drowned).required_noise_std.upper > predict(clean).required_noise_std.upper

    def test_an_update_of_zeros_has_nothing_to_scale_to(self):
        with pytest.raises(InvalidInputError, match="not zero"):
            predict(observed(torch.zeros(UPDATE.layout.dim), 1))


class TestExamples:
    def inputs(self, count=6):
        return np.random.default_rng(0).normal(size=(count, 1, 4, 4)).astype(np.float32)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"inputs": np.zeros((6, 1, 4, 4), int)}, "of floats"),
            ({"inputs": np.full((6, 1), np.nan, np.float32)}, "NaN or infinity"),
            ({"labels": np.zeros(5, int)}, "a label for each, got 6 and labels"),
            ({"labels": np.zeros(6)}, "class indices"),
            ({"lr": 0.0}, "lr > 0"),
            ({"most": 1}, "most >= 2"),
            ({"max_rebuilt": 0}, "max_rebuilt >= 1"),
        ],
    )
    def test_what_is_not_allowed(self, changes, message):
        values = {"inputs": self.inputs(), "labels": np.arange(6) % 3}
        with pytest.raises(InvalidInputError, match=message):
            PublicExamples(**{**values, **changes})

    def test_they_must_be_what_the_model_takes(self):
        fitting = PublicExamples(inputs=self.inputs(), labels=np.arange(6) % 3)
        fitting.check(new_model(), nn.CrossEntropyLoss())
        for wrong in (
            PublicExamples(inputs=self.inputs()[:, :, :3], labels=np.arange(6) % 3),
            PublicExamples(inputs=self.inputs(), labels=np.arange(6)),  # six classes for a model of three
        ):
            with pytest.raises(InvalidInputError, match=r"that the model takes, got inputs \[1, [34], 4\] with labels"):
                wrong.check(new_model(), nn.CrossEntropyLoss())

    def test_a_choice_is_even_over_classes_and_the_same_every_time(self):
        labels = np.array([0] * 20 + [1] * 3 + [2] * 7)
        public = PublicExamples(inputs=self.inputs(30), labels=labels, most=9)
        inputs, chosen = public.chosen(seed=1)
        assert np.bincount(chosen).tolist() == [3, 3, 3]
        np.testing.assert_array_equal(inputs, public.chosen(seed=1)[0])
        assert len(PublicExamples(inputs=self.inputs(30), labels=labels).chosen(0)[1]) == 30
