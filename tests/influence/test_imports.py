"""The package's public names, and that one of them is the name of a subpackage, too."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fl_privacy
import fl_privacy.audit
import fl_privacy.influence
import fl_privacy.monitoring

PACKAGES = [fl_privacy, fl_privacy.audit, fl_privacy.influence, fl_privacy.monitoring]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_resolves(package: object) -> None:
    names: list[str] = package.__all__  # type: ignore[attr-defined]
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    for name in names:
        value = getattr(package, name)
        assert name == "__version__" or value.__name__.rpartition(".")[2] == name
    assert set(names) <= set(dir(package))


def test_what_is_not_exported_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'leakage'"):
        fl_privacy.leakage  # noqa: B018


ORDERS = """
import fl_privacy
---
import fl_privacy.audit
import fl_privacy.influence
import fl_privacy.monitoring

PACKAGES = [fl_privacy, fl_privacy.audit, fl_privacy.influence, fl_privacy.monitoring]
---
from fl_privacy.influence.i2f import influence as solver
---
from fl_privacy import estimate_spectrum
---
from fl_privacy import influence; import fl_privacy.influence
"""

PROGRAM = """
import sys
import torch
from torch import nn

for order in sys.argv[1].split("---"):
    for module in [name for name in sys.modules if name.startswith("fl_privacy")]:
        del sys.modules[module]  # as in a new process, without waiting for torch again
    exec(order)
    import fl_privacy
    from fl_privacy import GradientUpdate, UpdateJacobian, influence

    model = nn.Linear(3, 2)
    update = GradientUpdate(model, nn.MSELoss())
    jacobian = UpdateJacobian(update, dict(model.named_parameters()), torch.randn(1, 1, 3), torch.randn(1, 1, 2))
    for call in (influence, fl_privacy.influence):
        assert call(jacobian, torch.randn(1, jacobian.update_dim), ridge=1.0).converged.all(), order
    print("called")
"""


def test_influence_can_be_called_whatever_is_imported_first() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ORDERS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["called"] * 5, done.stderr
