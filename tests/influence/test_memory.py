"""What a graph takes, worked out without building it, against graphs that are built."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from fl_privacy import GradientUpdate, LocalTrainingUpdate, UpdateJacobian
from fl_privacy.influence.memory import graph_bytes, saved_bytes
from fl_privacy.reference import build_model

SHAPE, CLASSES = (3, 16, 16), 4


class ThatLooks(nn.Module):
    """A model that cannot be run where there are no values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 14 * 14, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x if x.abs().max() < 1e6 else x / 1e6)


class ThatRemembers(nn.Module):
    """A model that makes a table in its first pass, on the device of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, CLASSES))
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 16, device=x.device)
        return self.net(x.tanh() + self.table)


class ThatRefuses(nn.Module):
    """A model that asks where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.device.type == "cpu"
        return self.net(x.tanh())


def built(name: str) -> nn.Module:
    awkward = {"that looks": ThatLooks, "that remembers": ThatRemembers, "that refuses": ThatRefuses}
    return awkward[name]() if name in awkward else build_model(name, input_shape=SHAPE, num_classes=CLASSES)


def batch(examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.rand(1, examples, *SHAPE), torch.randint(0, CLASSES, (1, examples))


@pytest.mark.parametrize("name", ["mlp", "lenet", "vit", "that looks", "that remembers", "that refuses"])
def test_it_is_what_a_graph_keeps(name: str) -> None:
    model = built(name)
    update = GradientUpdate(model, nn.CrossEntropyLoss())
    params = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    inputs, labels = batch(12)
    found = graph_bytes(update, params, inputs, labels)
    expected = saved_bytes(update, params, inputs, labels)  # and so the model still runs where it was
    assert found == pytest.approx(expected, rel=0.02)
    assert expected > inputs.nbytes


def test_of_several_steps_the_largest_counts_also_where_it_names_examples_again() -> None:
    model = built("lenet")
    params = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    inputs, labels = batch(4)
    steps = [[0], [0, 1, 2, 3] * 4, [1, 2]]
    training = LocalTrainingUpdate(model, nn.CrossEntropyLoss(), lr=0.1, steps=steps)
    whole = GradientUpdate(model, nn.CrossEntropyLoss())
    expected = saved_bytes(whole, params, inputs.repeat(1, 4, 1, 1, 1), labels.repeat(1, 4))
    assert graph_bytes(training, params, inputs, labels) == pytest.approx(expected, rel=0.02)


def test_a_measured_graph_is_let_go() -> None:
    """A tensor that is kept for a node which made it would keep the node, and with it all of the graph, for good."""
    model = build_model("lenet", input_shape=SHAPE, num_classes=CLASSES)
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, y = torch.rand(2, 1, *SHAPE), torch.zeros(2, 1, dtype=torch.long)
    update = GradientUpdate(model, nn.CrossEntropyLoss())

    def alive() -> int:
        gc.collect()
        return sum(type(item) is torch.Tensor for item in gc.get_objects())

    UpdateJacobian(update, params, x, y).update()  # what a first use sets up stays
    before = alive()
    assert saved_bytes(update, params, x, y) > 0
    UpdateJacobian(update, params, x, y).update()
    assert alive() == before
