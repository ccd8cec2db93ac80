"""The flags by which CUDA rounds float32, inside and after products; they can be read without a GPU."""

from __future__ import annotations

import pytest
import torch

from fl_privacy.influence.precision import full_precision

CUDA = torch.device("cuda")


def allowed() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(params=[(True, False), (False, True), (True, True)])
def before(request):
    kept = allowed()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept


def test_cuda_rounds_nothing_within_and_is_as_before_afterwards(before):
    with full_precision(CUDA):
        assert allowed() == (False, False)
        with full_precision(CUDA):
            assert allowed() == (False, False)
        assert allowed() == (False, False)
    assert allowed() == before


def test_flags_come_back_when_a_product_fails(before):
    with pytest.raises(KeyError), full_precision(CUDA):
        raise KeyError
    assert allowed() == before


def test_other_devices_leave_the_flags_alone(before):
    with full_precision(torch.device("cpu")):
        assert allowed() == before
