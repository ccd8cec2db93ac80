"""Public examples in place of private ones, on digits: good for single examples, not for batches."""

import pytest

from fl_privacy.errors import InvalidInputError
from fl_privacy.studies import load_study
from fl_privacy.studies.proxy import _agreement


def test_single_examples_are_told_from_their_norm_and_members_of_batches_are_not(conducted):
    rows, _ = conducted("proxy", num_images=16, steps=(0, 100), batch_sizes=(1, 4), lr=0.2)
    assert len(rows) == 64

    def agreement(steps, size, name="predicted"):
        return _agreement([row for row in rows if (row.steps, row.batch_size) == (steps, size)], name)

    rank, error = agreement(100, 1)
    assert rank > 0.9
    assert error < 0.25
    assert agreement(0, 1)[1] < 0.1  # at first all need about the same
    assert agreement(100, 4)[1] > 2 * error


def test_more_batches_than_images_can_serve():
    study = load_study("proxy")
    with pytest.raises(InvalidInputError, match="public batches of 50"):
        list(study.portions(study.settings(batch_sizes=(50,))))
