"""Public examples in place of private ones, on digits."""

import pytest

from fl_privacy.errors import InvalidInputError
from fl_privacy.studies import load_study
from fl_privacy.studies.proxy import _agreement


def test_the_noise_that_clients_need_is_told_from_their_update(conducted):
    rows, _ = conducted("proxy", num_images=12, num_public=48, steps=(0, 100), batch_sizes=(1, 4), noise=(0.0,), lr=0.2)
    assert len(rows) == 48

    def agreement(steps, size):
        return _agreement([row for row in rows if (row.steps, row.batch_size) == (steps, size)], "predicted")

    rank, error = agreement(100, 1)
    assert rank > 0.9
    assert error < 0.25
    assert agreement(100, 4)[1] < 0.35
    for size in (1, 4):
        assert agreement(0, size)[1] < 0.1  # at first all need about the same
    assert all(row.labels_recovered for row in rows if row.batch_size == 1 or row.steps == 0)
    assert sum(row.lower <= row.required_noise_std <= row.upper for row in rows) > 36


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": (80,)}, "images of clients"),
        ({"num_public": 1000}, "public ones"),
        ({"batch_sizes": (4,), "local_steps": 3}, "batch sizes that 3 local steps divide"),
    ],
)
def test_what_the_data_cannot_serve(options, message):
    study = load_study("proxy")
    with pytest.raises(InvalidInputError, match=message):
        list(study.portions(study.settings(**options)))
