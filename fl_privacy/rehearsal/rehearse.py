"""Which noise costs a model least, found by training it on public examples as the federation would.

The rule of `fl_privacy.audit.family` knows nothing of the size of steps, and between its two sides either noise may be
far ahead. A rehearsal asks the question itself: the same model, rounds, learning rate and number of clients, and public
examples in place of private ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fl_privacy.attacks import GaussianPrior
from fl_privacy.audit.policy import Policy
from fl_privacy.audit.settings import RELU_WIDTH
from fl_privacy.checks import check_count, check_positive, check_share, is_number
from fl_privacy.errors import InvalidInputError
from fl_privacy.extras import require
from fl_privacy.rehearsal.federation import Federation
from fl_privacy.rehearsal.outcome import MET, Outcome, input_law, isotropic_outcome, kept_outcome

RehearsedFamily = Literal["isotropic", "shaped", "white"]

_MOST_DRAWS = 8
"""Draws of noise on each public example, at most, where clients have more examples than there are public ones."""
_LARGEST_INPUT = 4096
"""Elements of the largest input: G is formed to shape noise by it."""
_FEWEST = 32
"""Examples to train on, and to tell accuracy on, at least."""


@dataclass(frozen=True, kw_only=True)
class RehearsalSettings:
    """The federation that is rehearsed.

    Attributes:
        target_leakage: L, of an example over the whole run, strictly between 0 and 1.
        num_clients: C, of a round.
        batch_size: N, examples of a client, all of which it shares the gradient of in every round.
        num_rounds: T.
        lr: The server's learning rate.
        momentum: The server's momentum.
        num_public: Examples that shape noise on inputs.
        num_audited: Examples that are followed over the run, to measure what isotropic noise leaks.
        checkpoints: Rounds at which they are; those between are interpolated.
        held_out: Share of the other examples on which accuracy is told.
        num_seeds: Repetitions, each with a split of the examples, an initialization and noise of its own.
        relu_width: Of rounded ReLUs in J, as audits have it; 0: the network's own J.

    Raises:
        InvalidInputError: An attribute is out of range.
    """

    target_leakage: float
    num_clients: int
    batch_size: int
    num_rounds: int
    lr: float
    momentum: float = 0.0
    num_public: int = 8
    num_audited: int = 4
    checkpoints: int = 10
    held_out: float = 0.25
    num_seeds: int = 3
    relu_width: float = RELU_WIDTH

    def __post_init__(self) -> None:
        check_share(self.target_leakage, "target_leakage")
        check_share(self.held_out, "held_out")
        check_positive(self.lr, "lr")
        for name in ("num_clients", "batch_size", "num_rounds", "num_public", "num_audited", "num_seeds"):
            check_count(getattr(self, name), name)
        check_count(self.checkpoints, "checkpoints")
        if self.checkpoints < 2:
            raise InvalidInputError(f"expected at least 2 checkpoints, got {self.checkpoints}")
        if not (is_number(self.momentum) and 0 <= self.momentum < 1):
            raise InvalidInputError(f"expected a momentum in [0, 1), got {self.momentum!r}")
        if not (is_number(self.relu_width) and self.relu_width >= 0):
            raise InvalidInputError(f"expected a relu_width >= 0, got {self.relu_width!r}")


@dataclass(frozen=True, kw_only=True)
class Lead:
    """By how much more accurate one family is than another.

    Attributes:
        mean: Of all seeds, as a share of the tested examples.
        standard_error: Of the mean, likewise; `None` of one seed.
        is_clear: Whether it is more than chance; never of one seed.
    """

    mean: float
    standard_error: float | None
    is_clear: bool


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was found.

    Attributes:
        settings: Of the federation.
        unprotected: Accuracy without noise, of each seed.
        outcomes: By family, of each seed. `white`: noise on inputs, too, of one size in every direction.
        num_test: Examples on which accuracy was told.
    """

    settings: RehearsalSettings
    unprotected: tuple[float, ...]
    outcomes: dict[RehearsedFamily, tuple[Outcome, ...]]
    num_test: int

    def seeds_met(self, family: RehearsedFamily) -> int:
        """Returns in how many seeds a family's leakage is the target, to 2 %."""
        return sum(outcome.leakage <= MET * self.settings.target_leakage for outcome in self.outcomes[family])

    def meets(self, family: RehearsedFamily) -> bool:
        """Returns whether it is in all of them."""
        return self.seeds_met(family) == len(self.outcomes[family])

    def accuracy(self, family: RehearsedFamily) -> float:
        """Returns a family's mean accuracy."""
        return statistics.fmean(outcome.accuracy for outcome in self.outcomes[family])

    @property
    def standard_error(self) -> float:
        """Of the recommended family's accuracy in one seed, for the number of test examples alone."""
        mean = self.accuracy(self.family)
        return math.sqrt(mean * (1 - mean) / self.num_test)

    @property
    def family(self) -> RehearsedFamily:
        """The most accurate family of those that meet the target; noise on inputs where two are the same."""
        return max(filter(self.meets, self.outcomes), key=lambda family: (self.accuracy(family), family != "isotropic"))

    @property
    def leads(self) -> dict[RehearsedFamily, Lead]:
        """By how much the recommended family is ahead of each other one that meets the target.

        Leads are taken seed by seed. Repetitions split the same examples, so that they know less than as many sets of
        examples would: their variance is corrected for it (Nadeau and Bengio, Machine Learning 52, 2003), and a lead is
        clear where Student's test at 5 % says so. No difference is known better than to one tested example.

        Raises:
            ImportError: The extra `simulation` is not installed, which has SciPy; of one seed it is not needed.
        """
        return {family: self._lead(family) for family in self.outcomes if family != self.family and self.meets(family)}

    def _lead(self, other: RehearsedFamily) -> Lead:
        pairs = zip(self.outcomes[self.family], self.outcomes[other], strict=True)
        leads = [mine.accuracy - theirs.accuracy for mine, theirs in pairs]
        mean, count = max(0.0, statistics.fmean(leads)), len(leads)
        if count == 1:
            return Lead(mean=mean, standard_error=None, is_clear=False)
        spread = max(statistics.stdev(leads), 1 / self.num_test)
        held_out = self.settings.held_out
        error = spread * math.sqrt(1 / count + held_out / (1 - held_out))
        quantile = float(require("scipy.stats", extra="simulation").t.ppf(0.975, count - 1))
        return Lead(mean=mean, standard_error=error, is_clear=mean >= quantile * error)

    @property
    def is_clear(self) -> bool:
        """Whether the recommended family is clearly ahead of every other one that meets the target, if any does."""
        return all(lead.is_clear for lead in self.leads.values())

    def policy(self) -> Policy:
        """Returns the policy by which a server advises what is recommended.

        Isotropic noise is advised for as many shares as the rehearsal needed it for, which is not the number of rounds:
        what a share tells changes along a run.
        """
        if self.family == "isotropic":
            factors = [outcome.factor for outcome in self.outcomes["isotropic"] if outcome.factor is not None]
            return Policy(action="advise", family="isotropic", shares=max(1, math.ceil(max(factors) ** 2)))
        return Policy(action="advise", family="shaped", covariance="white" if self.family == "white" else "public")


def rehearse(
    build: Callable[[], nn.Module],
    inputs: Tensor,
    labels: Tensor,
    settings: RehearsalSettings,
    *,
    prior: GaussianPrior | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rehearsal:
    """Returns how accurate a federation ends without noise and with each family at its target.

    Clients share gradients, and every client takes part in every round: of several local steps, and of clients that are
    sampled, it says nothing. Noise on the average is that of C clients however few the public examples are; where they
    are fewer than C·N, each stands for several with noise of their own. Examples are split at random: near duplicates,
    such as frames of one film, would be trained and tested on.

    Args:
        build: Returns a new classifier, float32, that is trained by cross-entropy.
        inputs: Public examples `[n, *shape]`.
        labels: `[n]`.
        settings: Of the federation.
        prior: What an attacker believes of inputs. `None`: their mean and standard deviation.
        progress: Told (runs done, runs to do).

    Raises:
        InvalidInputError: There are too few examples, inputs are too large, or the model cannot be rehearsed.
        ImportError: There are several seeds, and the extra `simulation` is not installed, which `leads` takes.
        NotTwiceDifferentiableError: From the model.
    """
    if settings.num_seeds > 1:
        require("scipy.stats", extra="simulation")  # before the work whose result it judges
    if inputs[0].numel() > _LARGEST_INPUT:
        raise InvalidInputError(
            f"expected inputs of at most {_LARGEST_INPUT} elements, got {inputs[0].numel()}: rehearse on smaller ones"
        )
    others = len(inputs) - settings.num_public
    held = int(settings.held_out * max(0, others))
    if min(held, others - held) < max(_FEWEST, settings.num_audited):
        raise InvalidInputError(
            f"expected examples enough for {settings.num_public} that shape noise and at least "
            f"{max(_FEWEST, settings.num_audited)} each to train and to test on, got {len(inputs)}"
        )
    prior = GaussianPrior.from_examples(inputs.double()) if prior is None else prior
    split = [settings.num_public, others - held, held]
    done, total = 0, 4 * settings.num_seeds
    unprotected: list[float] = []
    outcomes: dict[RehearsedFamily, list[Outcome]] = {"shaped": [], "white": [], "isotropic": []}
    for seed in range(settings.num_seeds):
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        parts = [(inputs[part].float(), labels[part]) for part in torch.split(order, split)]
        torch.manual_seed(seed)
        federation = Federation(
            model=_checked(build()),
            public=parts[0],
            private=parts[1],
            test=parts[2],
            prior=prior,
            num_rounds=settings.num_rounds,
            lr=settings.lr,
            momentum=settings.momentum,
            num_audited=settings.num_audited,
            checkpoints=settings.checkpoints,
            relu_width=settings.relu_width,
        )
        unprotected.append(federation.accuracy(federation.train()))
        done += 1
        if progress is not None:
            progress(done, total)
        found = rehearsed_outcomes(
            federation,
            settings.target_leakage,
            num_clients=settings.num_clients,
            batch=settings.batch_size,
            seed=seed,
        )
        for family, outcome in found:
            outcomes[family].append(outcome)
            done += 1
            if progress is not None:
                progress(done, total)
    told = {family: tuple(found) for family, found in outcomes.items()}
    return Rehearsal(settings=settings, unprotected=tuple(unprotected), outcomes=told, num_test=held)


def rehearsed_outcomes(
    federation: Federation, target: float, *, num_clients: int, batch: int, seed: int
) -> Iterator[tuple[RehearsedFamily, Outcome]]:
    """Yields each family and what becomes of a federation under it; kept noise first, which takes one run."""
    x, y = federation.private
    draws = min(_MOST_DRAWS, max(1, round(num_clients * batch / len(x))))
    several = replace(federation, private=(x.repeat(draws, *[1] * (x.dim() - 1)), y.repeat(draws)))
    law = input_law(federation, target)
    z = torch.randn(draws * len(x), len(law.root), generator=torch.Generator().manual_seed(seed))
    yield "shaped", kept_outcome(several, z @ law.root, law.shaped_leakage)
    yield "white", kept_outcome(several, law.white_std * z, target)
    yield "isotropic", isotropic_outcome(federation, target, num_clients=num_clients, batch=batch, seed=seed)


def _checked(model: nn.Module) -> nn.Module:
    """Returns the model in evaluation mode, without the randomness of dropout."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise InvalidInputError(
                f"expected a model without batch normalisation, got {name}: its running statistics are not rehearsed; "
                "replace it by group normalisation"
            )
    kinds = {p.dtype for p in model.parameters()}
    if kinds != {torch.float32}:
        raise InvalidInputError(f"expected a model with parameters in float32, got {kinds or 'none'}")
    return model.eval()
