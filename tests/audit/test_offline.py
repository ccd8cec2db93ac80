"""`fl-privacy audit`: gradients from files, against the engine, and what it refuses."""

from __future__ import annotations

import json
import pickle
import textwrap

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fl_privacy import GradientUpdate, LeakageEstimate, Status, UpdateJacobian, estimate_spectrum
from fl_privacy.audit.files import load_arrays
from fl_privacy.audit.offline import audit_gradient
from fl_privacy.cli import app
from fl_privacy.errors import InvalidInputError

from .cases import PRIOR, examples, new_model

MODULE = """
    import torch
    from torch import nn

    def model():
        torch.manual_seed(5)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))

    def with_loss():
        return model(), nn.CrossEntropyLoss()

    def broken():
        raise RuntimeError("no such weights")

    def leaves():
        raise SystemExit(1)

    nothing = lambda: 3
"""


def gradient_of(model, inputs, labels):
    loss = nn.functional.cross_entropy(model(torch.from_numpy(inputs)), torch.from_numpy(labels))
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder with a module, weights, a batch, its gradient, and the same with noise of standard deviation 0.02."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved_models.py").write_text(textwrap.dedent(MODULE))
    model, (inputs, labels) = new_model(), examples(0, 4)
    gradient = gradient_of(model, inputs, labels)
    generator = torch.Generator().manual_seed(1)
    noisy = {name: g + 0.02 * torch.randn(g.shape, generator=generator) for name, g in gradient.items()}
    torch.save(model.state_dict(), "weights.pt")
    torch.save({"inputs": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}, "batch.pt")
    np.savez("batch.npz", inputs=inputs, labels=labels)
    torch.save(list(gradient.values()), "gradient.pt")  # as torch.autograd.grad returns it
    np.savez("noisy.npz", **{name: g.numpy() for name, g in noisy.items()})
    return tmp_path


def audit(*arguments):
    fixed = ["audit", "saved_models:with_loss", "--weights", "weights.pt", "--prior-std", str(PRIOR)]
    return CliRunner().invoke(app, [*fixed, *arguments])


def row_of(*arguments):
    result = audit(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return LeakageEstimate.from_dict(json.loads(result.stdout))


class TestNumbers:
    def test_a_noisy_gradient_leaks_what_the_engine_says(self, saved):
        row = row_of(
            "--batch", "batch.pt", "--gradient", "noisy.npz", "--clean", "gradient.pt", "--precision", "float64"
        )
        model, (inputs, labels) = new_model(), examples(0, 4)
        theta = {name: p.detach().double() for name, p in model.named_parameters()}
        batch = torch.from_numpy(inputs).double().expand(4, -1, -1, -1, -1)
        jacobian = UpdateJacobian(
            GradientUpdate(model, nn.CrossEntropyLoss()),
            theta,
            batch,
            torch.from_numpy(labels).expand(4, -1),
            private=torch.arange(4),
        )
        expected = estimate_spectrum(jacobian).leakage(row.noise_std, PRIOR).value
        assert row.status == Status.AUDITED
        assert row.noise_std == pytest.approx(0.02, rel=0.15)  # 315 draws
        assert row.leakage.value == pytest.approx(float(expected.max()), rel=1e-5)
        assert row.worst_example == int(expected.argmax())

    def test_an_undefended_gradient_leaks_everything_and_either_file_format_will_do(self, saved):
        rows = [row_of("--batch", batch) for batch in ("batch.pt", "batch.npz")]
        rows.append(row_of("--batch", "batch.pt", "--gradient", "gradient.pt"))
        for row in rows:
            assert row.status == Status.AUDITED
            assert row.leakage.value > 0.999
            assert row.required_noise_std == pytest.approx(rows[0].required_noise_std, rel=1e-6)

    def test_a_difference_is_credited_only_if_it_is_explained(self, saved):
        claimed = row_of("--batch", "batch.pt", "--gradient", "noisy.npz", "--defended")
        unexplained = row_of("--batch", "batch.pt", "--gradient", "noisy.npz")
        assert (claimed.status, unexplained.status) == (Status.AUDITED, Status.UNVERIFIED)
        assert claimed.leakage.upper < 0.99 < 0.999 < unexplained.leakage.value
        assert "not the batch's gradient" in unexplained.detail

    def test_what_is_not_credited_in_leakage_is_not_credited_in_any_other_number(self, saved):
        unexplained = row_of("--batch", "batch.pt", "--gradient", "noisy.npz")
        assert unexplained.rmse == pytest.approx(PRIOR * (1 - unexplained.leakage.value) ** 0.5, abs=1e-3 * PRIOR)
        assert (unexplained.i2f, unexplained.lower_bound, unexplained.noise_std) == (None, None, 0.0)
        claimed = row_of("--batch", "batch.pt", "--gradient", "noisy.npz", "--defended")
        assert claimed.rmse > 10 * unexplained.rmse
        assert claimed.i2f > claimed.lower_bound > 0

    def test_a_common_factor_changes_nothing(self):
        model, (inputs, labels) = new_model(), examples(0, 4)
        gradient = {name: g.numpy() for name, g in gradient_of(model, inputs, labels).items()}
        scaled = {name: 0.1 * g for name, g in gradient.items()}
        for clean in (gradient, None):
            row = audit_gradient(model, nn.CrossEntropyLoss(), inputs, labels, shared=scaled, clean=clean)
            assert row.status == Status.AUDITED
            assert row.scale == pytest.approx(0.1)
            assert row.leakage.value > 0.999

    @pytest.mark.parametrize(("value", "words"), [(0.0, "got zeros alone"), (float("nan"), "got NaN or infinity")])
    def test_what_is_no_gradient_is_refused(self, value, words):
        model, (inputs, labels) = new_model(), examples(0, 4)
        shared = {name: np.full(p.shape, value, np.float32) for name, p in model.named_parameters()}
        with pytest.raises(InvalidInputError, match=words):
            audit_gradient(model, nn.CrossEntropyLoss(), inputs, labels, shared=shared, defended=True)

    def test_the_whole_batch(self, saved):
        row = row_of("--batch", "batch.pt", "--unit", "batch")
        assert (row.unit, row.input_dim, row.worst_example) == ("batch", 64, None)


class TestCommand:
    def test_for_people(self, saved):
        result = audit("--batch", "batch.pt")
        assert result.exit_code == 0
        for words in ("share of the most exposed of 4 examples", "noise needed", "audited", "With isotropic noise"):
            assert words in result.stdout

    def test_a_limit_for_scripts(self, saved):
        assert audit("--batch", "batch.pt", "--fail-above", "0.5").exit_code == 1
        noisy = ["--batch", "batch.pt", "--gradient", "noisy.npz", "--defended"]
        assert audit(*noisy, "--fail-above", "0.999").exit_code == 0

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--batch", "none.pt"], "expected a file at none.pt"),
            (["--batch", "gradient.pt"], "expected gradient.pt to hold inputs and labels"),
            (["--batch", "batch.pt", "--gradient", "batch.npz"], "0.weight, 0.bias"),
            (["--batch", "batch.pt", "--weights", "batch.npz"], "does not hold the weights of this model"),
            (["--batch", "batch.pt", "--clean", "gradient.pt"], "along with a clean one"),
            (["--batch", "batch.pt", "--target", "2"], "target_leakage strictly between 0 and 1"),
            (["--batch", "cut.npz"], "cut.npz cannot be read as .npz"),
            (["--batch", "batch.pt", "--fail-above", "7"], "7.0 is not in the range 0.0<=x<=1.0"),
            (["--batch", "batch.pt", "--fail-above", "nan"], "expected --fail-above in [0, 1], got nan"),
            (["--batch", "saved_models.py"], "expected a .pt, .pth or .npz file"),
        ],
    )
    def test_what_cannot_be_audited_is_named(self, saved, arguments, words):
        (saved / "cut.npz").write_bytes((saved / "batch.npz").read_bytes()[:-40])
        result = audit(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in " ".join(result.stderr.split())

    @pytest.mark.parametrize(
        ("entry", "words"),
        [
            ("saved_models", "expected an entry point module:function"),
            ("saved_models:none", "AttributeError"),
            ("no_such_module:model", "No module named"),
            ("saved_models:broken", "RuntimeError: no such weights"),
            ("saved_models:leaves", "SystemExit: 1"),
            ("saved_models:nothing", "got int"),
        ],
    )
    def test_an_entry_point_that_is_none_is_named(self, saved, entry, words):
        result = CliRunner().invoke(app, ["audit", entry, "--batch", "batch.pt"])
        assert result.exit_code == 2
        assert words in result.stderr

    def test_files_run_no_code(self, saved):
        class Payload:
            def __reduce__(self):
                return (open, (str(saved / "owned"), "w"))

        torch.save({"inputs": Payload(), "labels": torch.zeros(1)}, "evil.pt")
        np.savez("evil.npz", inputs=np.array([Payload()], dtype=object), labels=np.zeros(1))
        (saved / "raw.pt").write_bytes(pickle.dumps(Payload()))
        for name in ("evil.pt", "evil.npz", "raw.pt"):
            (saved / "owned").unlink(missing_ok=True)
            with pytest.raises(InvalidInputError, match="cannot be read"):
                load_arrays(saved / name)
            assert not (saved / "owned").exists()
