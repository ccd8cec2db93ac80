"""Local training and central evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fl_privacy.flower import protected_inputs
from fl_privacy.reference import ImageSet

EVALUATION_BATCH = 512


def draw_batches(
    examples: ImageSet, indices: Tensor, *, steps: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the batches of some steps: images `[b, C, H, W]` and labels `[b]`.

    The examples come in random order, and again in another one when all were seen. A client with fewer examples than a
    batch has room for gives all of them in each step.
    """
    generator = torch.Generator().manual_seed(seed)
    queue = indices[:0]
    size = min(batch_size, len(indices))
    for _ in range(steps):
        if len(queue) < size:
            queue = indices[torch.randperm(len(indices), generator=generator)]
        yield examples.select(queue[:size])
        queue = queue[size:]


def train(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, learning_rate: float, momentum: float
) -> float:
    """Trains the model in place, one SGD step on each batch, and returns the mean loss over them.

    Where the audit advises noise on the inputs, it trains on those.
    """
    device = next(model.parameters()).device
    loss_of = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    model.train()
    losses: list[float] = []
    for batch in batches:
        images, labels = (part.to(device) for part in batch)
        images = protected_inputs(model, images, labels, bounds=(0.0, 1.0))
        optimizer.zero_grad()
        loss = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate(model: nn.Module, examples: ImageSet) -> tuple[float, float]:
    """Returns the mean loss and the accuracy in [0, 1] of the model on the examples."""
    device = next(model.parameters()).device
    model.eval()
    loss_sum, correct = 0.0, 0
    for start in range(0, len(examples), EVALUATION_BATCH):
        images, labels = examples.select(slice(start, start + EVALUATION_BATCH))
        logits = model(images.to(device)).cpu()
        loss_sum += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(dim=1) == labels).sum())
    return loss_sum / len(examples), correct / len(examples)
