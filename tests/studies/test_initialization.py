"""Initialisations, of the reference model and of a user's own."""

import json
import statistics
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fl_privacy.cli import app
from fl_privacy.commands.entry_points import model_factory
from fl_privacy.errors import InvalidInputError
from fl_privacy.reference import build_model
from fl_privacy.reference.initialization import INITIALIZATIONS, initialize_
from fl_privacy.studies.comparison import load_examples

MODEL = """
from torch import nn

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))

def kinked():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 3))

def nothing():
    return 7

def failing():
    raise RuntimeError("out of luck")
"""


def test_uniform_weights_leak_more_than_xavier_and_the_attack_agrees(conducted):
    rows, _ = conducted("initialization", num_images=2, num_draws=1, initializations=("uniform", "xavier"))

    def median(name, quantity):
        return statistics.median(getattr(row, quantity) for row in rows if row.initialization == name)

    assert median("uniform", "leakage") > 0.9 > 0.2 > median("xavier", "leakage")
    assert median("uniform", "error") < 0.5 * median("xavier", "error")
    assert median("uniform", "required_noise_std") > 10 * median("xavier", "required_noise_std")
    for row in rows:
        assert row.required_relative_noise == row.required_noise_std / row.gradient_norm


class TestInitializations:
    @pytest.mark.parametrize(
        ("name", "std"),
        [("uniform", 1 / 12**0.5), ("normal", 0.5), ("xavier", (2 / 1500) ** 0.5), ("kaiming", 0.002**0.5)],
    )
    def test_spread_of_weights(self, name, std):
        torch.manual_seed(0)
        model = initialize_(nn.Linear(1000, 500), name)
        assert model.weight.std().item() == pytest.approx(std, rel=0.01)
        assert (model.bias == 0).all().item() is (name in ("xavier", "kaiming"))

    def test_norms_keep_their_scale_under_fan_rules(self):
        model = initialize_(build_model("resnet18", input_shape=(3, 8, 8), num_classes=2), "kaiming")
        assert (model.bn1.weight == 1).all()
        assert (model.fc.bias == 0).all()

    def test_default_changes_nothing(self):
        model = nn.Linear(3, 2)
        before = model.weight.clone()
        assert torch.equal(initialize_(model, "default").weight, before)

    def test_an_unknown_one_names_the_known(self):
        with pytest.raises(InvalidInputError, match="default, uniform, normal, xavier, kaiming, got 'zeros'"):
            initialize_(nn.Linear(3, 2), "zeros")


class TestCompareInits:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        (tmp_path / "users_model.py").write_text(MODEL)
        generator = np.random.default_rng(0)
        inputs, labels = generator.random((6, 3, 4)).astype("float32"), generator.integers(3, size=6)
        np.savez(tmp_path / "data.npz", inputs=inputs, labels=labels)
        np.savez(tmp_path / "bytes.npz", inputs=(255 * inputs).astype("uint8"), labels=labels)
        np.savez(tmp_path / "half.npz", inputs=inputs)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", list(sys.path))
        yield tmp_path
        sys.modules.pop("users_model", None)

    def test_a_users_model_and_data(self, folder):
        arguments = ["users_model:small", "--data", "data.npz", "--num-examples", "4", "--num-draws", "2"]
        outcome = CliRunner().invoke(app, ["compare-inits", *arguments])
        assert outcome.exit_code == 0, outcome.output
        assert all(name in outcome.output for name in INITIALIZATIONS)
        assert "median [least, most]" in outcome.output
        found = json.loads(CliRunner().invoke(app, ["compare-inits", *arguments, "--json"]).stdout)
        assert found[0]["initialization"] == "normal"
        assert all(entry["required"] == sorted(entry["required"]) for entry in found)

    def test_behind_relus_it_is_the_j_of_an_audit(self, folder):
        """Which knows of the jumps, and asks for more noise; gradients have the length that they have."""
        arguments = ["users_model:kinked", "--data", "data.npz", "--num-examples", "4", "--num-draws", "2", "--json"]
        found = {}
        for width in ("0", "0.15"):
            outcome = CliRunner().invoke(app, ["compare-inits", *arguments, "--relu-width", width])
            assert outcome.exit_code == 0, outcome.output
            found[width] = {entry["initialization"]: entry for entry in json.loads(outcome.stdout)}
        default = json.loads(CliRunner().invoke(app, ["compare-inits", *arguments]).stdout)
        assert {entry["initialization"]: entry for entry in default} == found["0.15"]
        for name in INITIALIZATIONS:
            assert found["0.15"][name]["gradient_norm"] == found["0"][name]["gradient_norm"]
            assert found["0.15"][name]["required"][1] > found["0"][name]["required"][1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["users_model"], "expected an entry point module:function"),
            (["no_such_module:small"], "no_such_module"),
            (["users_model:large"], "has no attribute 'large'"),
            (["users_model:failing"], "users_model:failing cannot be used: RuntimeError: out of luck"),
            (["users_model:nothing", "--data", "data.npz", "--num-examples", "2"], "torch.nn.Module, got int"),
            (["users_model:small", "--data", "emnist"], "or an .npz file, got 'emnist'"),
            (["users_model:small", "--data", "bytes.npz"], "scale pixels"),
            (["users_model:small", "--data", "half.npz"], "arrays inputs and labels"),
            (["users_model:small", "--data", "none.npz"], "none.npz"),
            (["users_model:small", "--data", "data.npz"], "at most 6 examples, got 10"),
            (["users_model:small", "--num-examples", "2"], "inputs and labels that the model"),
            (["users_model:small", "--noise-std", "-1"], "noise_std > 0"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, folder, arguments, message):
        outcome = CliRunner().invoke(app, ["compare-inits", *arguments])
        assert outcome.exit_code == 2
        assert message in outcome.output

    def test_the_same_draw_gives_the_same_number(self, folder):
        from fl_privacy.studies.comparison import ComparisonSettings, compare

        factory, examples = model_factory("users_model:small"), load_examples("data.npz", root=folder)
        settings = ComparisonSettings(num_examples=2, num_draws=1)
        assert compare(factory, examples, settings) == compare(factory, examples, settings)
