"""Labels from the gradient of the last layer.

For cross entropy on logits, the gradient of the last layer's bias is the mean of p − y over the batch, with p the
softmax and y the one-hot label: for one example, its only negative entry is the label's (Zhao, Mopuri, Bilen: iDLG,
arXiv 2001.02610). In a batch, class c was there N·(p̄_c − ∂L/∂b_c) times; an untrained or unsure model predicts
about the same p̄ everywhere (Wainakh et al.: Label leakage from gradients, arXiv 2105.09369).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fl_privacy.attacks.layers import mean_gradient, output_layer
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.errors import InvalidInputError


def labelled(problem: AttackProblem) -> AttackProblem:
    """Returns the problem with labels, recovered where the attacker has none.

    Raises:
        InvalidInputError: They cannot be recovered; see `recover_labels`.
    """
    return problem if problem.labels is not None else replace(problem, labels=recover_labels(problem))


def recover_labels(problem: AttackProblem) -> Tensor:
    """Returns the labels `[U, N]` of each unit's batch, in ascending order: an update does not tell the order.

    Raises:
        InvalidInputError: See `recover_label_counts`.
    """
    counts = recover_label_counts(problem)
    classes = torch.arange(counts.shape[-1], device=counts.device)
    return torch.stack([classes.repeat_interleave(count) for count in counts])


def recover_label_counts(problem: AttackProblem) -> Tensor:
    """Returns how often each class occurs in each unit's batch, int64 `[U, C]`, rows adding up to N.

    Exact for one example and an update without noise; an estimate for a batch, whose p̄ is taken at the prior mean.
    The loss must be cross entropy on the outputs of a linear layer.

    Raises:
        InvalidInputError: The last layer is not linear, or the rest of the batch is known but its labels are not.
    """
    return _rounded(expected_label_counts(problem), problem.num_examples)


def expected_label_counts(problem: AttackProblem) -> Tensor:
    """Returns how often each class seems to occur in each unit's batch, before rounding to whole numbers, `[U, C]`.

    How far these are from whole numbers says how far p̄ at the prior mean is from that over the batch.

    Raises:
        InvalidInputError: As `recover_label_counts`.
    """
    if problem.known is not None:
        raise InvalidInputError("expected labels where the rest of the batch is known, got None: pass them all")
    layer = output_layer(problem)
    gradient = mean_gradient(problem)
    if layer.has_bias:
        slope = gradient[f"{layer.name}.bias"]
    else:
        slope = _bias_gradient(gradient[f"{layer.name}.weight"], layer.inputs[0], one=problem.num_examples == 1)
    if problem.num_examples == 1:
        return torch.nn.functional.one_hot(slope.argmin(-1), slope.shape[-1]).to(slope)
    return problem.num_examples * (layer.outputs.softmax(-1) - slope)


def _bias_gradient(weight: Tensor, features: Tensor, *, one: bool) -> Tensor:
    """Returns ∂L/∂b `[U, C]` up to a positive factor from ∂L/∂W `[U, C, F]`, where there is no bias.

    A row of ∂L/∂W is ∂L/∂b_c times the features h that were fed in, here taken to be those at the prior mean. For one
    example of three classes or more they are not needed: entries p − y add up to 0 with one negative, so the label's is
    the largest in size.
    """
    slope: Tensor
    if one and weight.shape[1] > 2:
        slope = -torch.linalg.vector_norm(weight, dim=-1)
    else:
        slope = weight @ features / features.square().sum().clamp(min=torch.finfo(features.dtype).tiny)
    return slope


def _rounded(expected: Tensor, total: int) -> Tensor:
    """Returns whole numbers >= 0 `[U, C]` near the expected ones that add up to `total`, by largest remainder."""
    positive = expected.clamp(min=0)
    positive = positive * (total / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(expected.dtype).tiny))
    counts = positive.floor()
    missing = total - counts.sum(-1)
    rank = (positive - counts).argsort(dim=-1, descending=True).argsort(dim=-1)
    return (counts + (rank < missing[:, None])).long()
