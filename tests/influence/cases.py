"""The architectures and losses that the engine is tested on, each small enough for a dense float64 Jacobian.

The dense reference shares nothing with the engine: it differentiates a plain implementation of the update, written here
with `torch.func`, by `torch.func.jacrev`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models.resnet import BasicBlock

from fl_privacy import GradientUpdate, LocalTrainingUpdate, UpdateJacobian
from fl_privacy.influence import UpdateMap
from fl_privacy.reference.models import VisionTransformer

CLASSES = 3
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One architecture with a loss, and how a plain implementation runs it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: Loss = field(default_factory=nn.CrossEntropyLoss)
    regression: bool = False
    input_module: str | None = None

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return settle(self.build()).to(dtype)

    def batch(self, units: int, examples: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(units, examples, *self.shape, generator=generator, dtype=torch.float64)
        if self.regression:
            return inputs, torch.randn(units, examples, CLASSES, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(CLASSES, (units, examples), generator=generator)


@dataclass(frozen=True)
class Sgd:
    """Options of `torch.optim.SGD` and the mini-batches of its steps."""

    lr: float
    steps: int | Sequence[Sequence[int]]
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def batches(self, examples: int) -> list[list[int]]:
        if isinstance(self.steps, int):
            return [list(range(examples))] * self.steps
        return [list(batch) for batch in self.steps]

    def update(self, case: Case, model: nn.Module) -> LocalTrainingUpdate:
        return LocalTrainingUpdate(
            model,
            case.loss,
            lr=self.lr,
            steps=self.steps,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            input_module=case.input_module,
        )


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def settle(model: nn.Module) -> nn.Module:
    """Gives batch normalisation running statistics that are not those of its initialisation."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model


class PatchTransformer(nn.Module):
    """A vision transformer of one block around `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.1)
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        logits: Tensor = self.head(tokens.mean(1))
        return logits


class TextClassifier(nn.Module):
    """Token ids to logits by way of an encoder; `encode` is the part behind the embedding."""

    def __init__(self, encoder: nn.Module, *, width: int, states: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.encoder = encoder
        self.head = nn.Linear(states, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encode(self.embedding(ids))

    def encode(self, embeddings: Tensor) -> Tensor:
        encoded = self.encoder(embeddings)
        states = encoded[0] if isinstance(encoded, tuple) else encoded
        logits: Tensor = self.head(states.mean(1))
        return logits


class AtEmbeddings(nn.Module):
    """The plain form of auditing a text classifier at its embeddings: the same model without its first layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeddings: Tensor) -> Tensor:
        assert isinstance(self.model, TextClassifier)
        return self.model.encode(embeddings)


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(2, 2, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(18, CLASSES),
    )


def resnet() -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(2, 3, 1, stride=2, bias=False), nn.BatchNorm2d(3))
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        BasicBlock(2, 2),
        BasicBlock(2, 3, stride=2, downsample=shortcut),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, CLASSES),
    )


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """An own loss: cross entropy that easy examples count less in."""
    log_p = F.log_softmax(logits, -1).gather(-1, labels[:, None]).squeeze(-1)
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def _text_transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, activation="gelu", batch_first=True)
    return TextClassifier(layer, width=4, states=4)


def _text_gru() -> nn.Module:
    return TextClassifier(nn.GRU(3, 2, batch_first=True), width=3, states=2)


def _text_lstm() -> nn.Module:
    return TextClassifier(nn.LSTM(3, 2, batch_first=True), width=3, states=2)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, CLASSES))


CASES = (
    Case("linear", lambda: nn.Linear(5, CLASSES), (5,)),
    Case("mlp", _mlp, (5,)),
    Case("mlp-mse", _mlp, (5,), loss=nn.MSELoss(), regression=True),
    Case("lenet", lenet, (1, 6, 6)),
    Case("lenet-focal", lenet, (1, 6, 6), loss=focal_loss),
    Case("resnet", resnet, (1, 4, 4)),
    Case("vit-mha", PatchTransformer, (1, 4, 4)),
    Case("vit-sdpa", lambda: VisionTransformer((1, 4, 4), CLASSES, width=4, depth=1, num_heads=2), (1, 4, 4)),
    Case("text-transformer", _text_transformer, (3, 4), input_module="embedding"),
    Case("text-gru", _text_gru, (2, 3), input_module="embedding"),
    Case("text-lstm", _text_lstm, (2, 3), input_module="embedding"),
)
BY_NAME = {case.name: case for case in CASES}

LOCAL_TRAINING = Sgd(lr=0.3, steps=((0, 2), (2, 1)), momentum=0.7, weight_decay=0.05, nesterov=True)
"""Three examples in two mini-batches, one example in both."""


def audited(update: UpdateMap, inputs: Tensor, labels: Tensor, private: Tensor | None) -> UpdateJacobian:
    return UpdateJacobian(update, parameters_of(update.model), inputs, labels, private=private)


def gradient_update(case: Case, dtype: torch.dtype = torch.float64) -> GradientUpdate:
    return GradientUpdate(case.model(dtype), case.loss, input_module=case.input_module)


# The plain implementation.


def plain_update(case: Case, model: nn.Module, sgd: Sgd | None, inputs: Tensor, labels: Tensor) -> Tensor:
    """Returns u(x) `[P]` of one client: the mean-loss gradient, or the parameter change of `sgd`."""
    plain = AtEmbeddings(model) if case.input_module else model
    prefix = "model." if case.input_module else ""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    start = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        state = {prefix + name: tensor for name, tensor in {**frozen, **buffers, **params}.items()}
        return case.loss(functional_call(plain, state, (x,)), y)

    gradient = grad(loss)
    if sgd is None:
        return _flat(gradient(start, inputs, labels))
    params, velocity = dict(start), dict[str, Tensor]()
    for batch in sgd.batches(len(inputs)):
        g = gradient(params, inputs[batch], labels[batch])
        for name in start:
            d = g[name] + sgd.weight_decay * params[name]
            if sgd.momentum:
                velocity[name] = sgd.momentum * velocity[name] + (1 - sgd.dampening) * d if name in velocity else d
                d = d + sgd.momentum * velocity[name] if sgd.nesterov else velocity[name]
            params[name] = params[name] - sgd.lr * d
    return _flat({name: params[name] - start[name] for name in start})


def dense_jacobian(case: Case, model: nn.Module, sgd: Sgd | None, inputs: Tensor, labels: Tensor) -> Tensor:
    """Returns J `[P, N·d]` of one client, whose whole batch is private, by `jacrev` of the plain update."""
    model = model.eval()
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    with sdpa_kernel(SDPBackend.MATH):
        # Recurrent kernels cannot be vectorised over the rows of J: one row at a time.
        differentiate = jacrev(lambda x: plain_update(case, model, sgd, x, labels), chunk_size=1 if recurrent else None)
        j: Tensor = differentiate(inputs)
    return j.flatten(1).detach()


@functools.cache
def reference(name: str, sgd: Sgd | None, units: int, examples: int) -> tuple[Tensor, Tensor]:
    """Returns (u `[U, P]`, J `[U, P, N·d]`) of a case's first units, computed once for all tests."""
    case = BY_NAME[name]
    model = case.model().eval()
    inputs, labels = case.batch(units, examples)
    rows = [dense_jacobian(case, model, sgd, x, y) for x, y in zip(inputs, labels, strict=True)]
    updates = [plain_update(case, model, sgd, x, y).detach() for x, y in zip(inputs, labels, strict=True)]
    return torch.stack(updates), torch.stack(rows)


def columns_of(j: Tensor, private: Tensor | None, examples: int) -> Tensor:
    """Returns the columns `[U, P, D]` of J `[U, P, N·d]` that belong to each unit's private example."""
    if private is None:
        return j
    by_example = j.reshape(*j.shape[:2], examples, -1)
    return torch.stack([by_example[unit, :, slot] for unit, slot in enumerate(private.tolist())])


class LinearUpdate(nn.Module):
    """A model whose update is linear in its input: with outputs θᵀA_k x and a loss that picks k, J = A_k exactly.

    So G is any matrix that a test wants, at the price of a model instead of a stand-in for the engine.

    Args:
        matrices: A `[K, P, D]`, which a unit chooses by its label.
    """

    def __init__(self, matrices: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrices", matrices)
        self.theta = nn.Parameter(torch.zeros(matrices.shape[1], dtype=matrices.dtype))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = torch.einsum("p,kpd,nd->nk", self.theta, self.matrices, x)
        return outputs


def picked(outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss that goes with `LinearUpdate`."""
    return outputs.gather(1, labels[:, None]).mean()


def prescribed(matrices: Tensor) -> UpdateJacobian:
    """Returns the Jacobian of K units whose J are the given matrices `[K, P, D]`."""
    model = LinearUpdate(matrices)
    units, _, dim = matrices.shape
    inputs = torch.zeros(units, 1, dim, dtype=matrices.dtype)
    labels = torch.arange(units)[:, None]
    return UpdateJacobian(GradientUpdate(model, picked), parameters_of(model), inputs, labels)


def with_eigenvalues(eigenvalues: Tensor, *, seed: int = 0) -> Tensor:
    """Returns matrices A `[K, D, D]` with the given eigenvalues `[K, D]` of AᵀA and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*eigenvalues.shape, eigenvalues.shape[-1], generator=generator, dtype=torch.float64)
    vectors: Tensor = torch.linalg.qr(noise)[0]
    return torch.diag_embed(eigenvalues.double().sqrt()) @ vectors.mT


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
