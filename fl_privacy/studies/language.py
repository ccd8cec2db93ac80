"""Whether the leakage of embeddings tells how many words an attacker reads.

A small text classifier learns SST-2 (one sentence, a tab and its label a line). A client shares the gradient of one
sentence, of all parameters but the embedding table, with noise of a share of its norm. Audited are the embeddings of
the words, [T, E]; the attacker rebuilds these by Gauss–Newton and reads each as the nearest word of the vocabulary.

The table stays out because its gradient needs no attack: the rows that are not zero are the sentence's words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fl_privacy.attacks import AttackProblem, GaussianPrior, GaussNewton, IsotropicNoise
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.influence.update import GradientUpdate
from fl_privacy.reference.models import TransformerBlock
from fl_privacy.studies.results import Portion
from fl_privacy.studies.settings import Settings, option
from fl_privacy.studies.study import Study, Summary, spread_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNKNOWN = 0
"""The token of all words that the vocabulary has not."""
_BATCH, _LEARNING_RATE = 32, 3e-3
_LONGEST = 64


@dataclass(frozen=True, kw_only=True)
class LanguageSettings(Settings):
    """A classifier of sentences, and noise on its gradients."""

    data_root: str = option("data/SST2", "Folder of SST-2's train.tsv and dev.tsv.", recorded=False)
    num_sentences: int = option(5, "Sentences, the first short ones of dev.tsv.", minimum=1)
    fewest_words: int = option(5, "Words that a sentence has at least.", minimum=1)
    most_words: int = option(7, "Words that a sentence has at most.", minimum=1)
    width: int = option(16, "Elements of one embedding, an even number.", minimum=2)
    least_count: int = option(2, "Occurrences in train.tsv of a word of the vocabulary.", minimum=1)
    epochs: int = option(3, "Epochs of training before the gradient is shared; 0: none.", minimum=0)
    relative_stds: tuple[float, ...] = option(
        (1e-4, 1e-3, 1e-2, 3e-2, 0.1), "Noise per parameter, in norms of the gradient.", above=0
    )
    num_starts: int = option(1, "Starts of the attack, the prior mean and draws; the most probable is kept.", minimum=1)
    seed: int = option(0, "Of initialization, training and noise.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class LanguageRow:
    """One attack on one noisy gradient; errors are rmse per element of an embedding."""

    sentence: int
    """Line of dev.tsv, from 0."""
    label: int
    words: int
    accuracy: float
    """Of the classifier, on dev.tsv."""
    relative_std: float
    noise_std: float
    prior_std: float
    leakage: float
    predicted: float
    error: float
    recovered: float
    """Share of the words at whose place the attacker reads the same."""
    anywhere: float
    """Share of the words that the attacker reads at any place."""
    explained: bool
    """Whether the attack explains the gradient up to its noise; if not, it failed."""


class SentenceClassifier(nn.Module):
    """Token ids `[N, T]` to two logits: embeddings and positions, one transformer block, the mean over words.

    Args:
        vocabulary: Number of tokens.
        width: E.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(_LONGEST, width))
        self.block = TransformerBlock(width, num_heads=2)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns logits `[N, 2]`; words after the 64th are not read."""
        embedded = self.embedding(ids[:, :_LONGEST])
        states = self.block(embedded + self.positions[: embedded.shape[1]])
        logits: Tensor = self.head(states.mean(dim=1))
        return logits


@dataclass(frozen=True)
class Sentence:
    """A labelled sentence: its words, and where it stood in the file."""

    line: int
    words: tuple[str, ...]
    label: int


def read_sentences(path: Path) -> list[Sentence]:
    """Returns the sentences of a file: words by spaces, a tab, and the label 0 or 1.

    Raises:
        FileNotFoundError: There is no such file; the message says where it goes.
        InvalidInputError: A line is another one.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: put SST-2's train.tsv and dev.tsv (sentence, tab, label) into one folder and name "
            "it with --data-root"
        )
    sentences = []
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines()):
        words, tab, label = text.rpartition("\t")
        if not tab or label.strip() not in ("0", "1") or not words.split():
            raise InvalidInputError(
                f"expected a sentence, a tab and 0 or 1 in line {line + 1} of {path}, got {text[:40]!r}"
            )
        sentences.append(Sentence(line, tuple(words.split()), int(label)))
    return sentences


@dataclass(frozen=True, eq=False)
class _Scene:
    """The trained classifier and what an attacker believes of a word's embedding."""

    update: GradientUpdate
    params: dict[str, Tensor]
    vocabulary: Mapping[str, int]
    mean: Tensor
    std: float
    accuracy: float

    def ids(self, sentence: Sentence) -> Tensor:
        """Token ids `[T]`."""
        return torch.tensor([self.vocabulary.get(word, UNKNOWN) for word in sentence.words])

    @property
    def table(self) -> Tensor:
        """Embeddings of all tokens, `[V, E]`."""
        return self.params["embedding.weight"]


def _portions(settings: LanguageSettings) -> Iterator[Portion[LanguageRow]]:
    if settings.width % 2 or settings.most_words > _LONGEST:
        raise InvalidInputError(
            f"expected an even width and at most {_LONGEST} words, got {settings.width} and {settings.most_words}"
        )
    root = Path(settings.data_root)
    train, dev = read_sentences(root / "train.tsv"), read_sentences(root / "dev.tsv")
    lengths = range(settings.fewest_words, settings.most_words + 1)
    private = [sentence for sentence in dev if len(sentence.words) in lengths][: settings.num_sentences]
    if len(private) < settings.num_sentences:
        raise InvalidInputError(
            f"expected {settings.num_sentences} sentences of {settings.fewest_words} to {settings.most_words} words, "
            f"{root / 'dev.tsv'} has {len(private)}"
        )
    # Trained when the first row is asked for, and not to draw rows that are there.
    scene_of = lru_cache(maxsize=1)(partial(_trained, settings, train, dev))
    for sentence in private:
        keys = [(sentence.line, relative) for relative in settings.relative_stds]
        yield Portion(keys, partial(_rows, settings, scene_of, sentence))


def _trained(settings: LanguageSettings, train: Sequence[Sentence], dev: Sequence[Sentence]) -> _Scene:
    counts = Counter(word for sentence in train for word in sentence.words)
    known = sorted(word for word, count in counts.items() if count >= settings.least_count)
    vocabulary = {word: token for token, word in enumerate(known, UNKNOWN + 1)}
    torch.manual_seed(settings.seed)
    model = SentenceClassifier(len(vocabulary) + 1, settings.width)
    generator = torch.Generator().manual_seed(settings.seed)
    batches = _batches(train, vocabulary, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    loss = nn.CrossEntropyLoss()
    for _ in range(settings.epochs):
        for index in torch.randperm(len(batches), generator=generator).tolist():
            ids, labels = batches[index]
            optimizer.zero_grad()
            loss(model(ids), labels).backward()
            optimizer.step()
    with torch.no_grad():
        right = sum(int((model(ids).argmax(1) == labels).sum()) for ids, labels in _batches(dev, vocabulary, generator))
    model.embedding.weight.requires_grad_(False)  # its gradient is not shared
    params = {name: p.detach().double() for name, p in model.named_parameters()}
    tokens = torch.tensor([vocabulary.get(word, UNKNOWN) for sentence in train for word in sentence.words])
    prior = GaussianPrior.from_examples(params["embedding.weight"][tokens])
    update = GradientUpdate(model, loss, input_module="embedding")
    return _Scene(update, params, vocabulary, prior.mean, prior.std, right / len(dev))


def _batches(
    sentences: Sequence[Sentence], vocabulary: Mapping[str, int], generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Sentences of equal length together, so that nothing needs padding: ids `[n, T]` and labels `[n]`."""
    by_length: dict[int, list[Sentence]] = {}
    for index in torch.randperm(len(sentences), generator=generator).tolist():
        by_length.setdefault(len(sentences[index].words), []).append(sentences[index])
    batches: list[tuple[Tensor, Tensor]] = []
    for alike in by_length.values():
        ids = torch.tensor([[vocabulary.get(word, UNKNOWN) for word in sentence.words] for sentence in alike])
        labels = torch.tensor([sentence.label for sentence in alike])
        batches.extend(zip(torch.split(ids, _BATCH), torch.split(labels, _BATCH), strict=True))
    return batches


def _rows(settings: LanguageSettings, scene_of: Callable[[], _Scene], sentence: Sentence) -> Iterator[LanguageRow]:
    """All noise levels of one sentence, side by side."""
    scene, levels = scene_of(), len(settings.relative_stds)
    ids = scene.ids(sentence)
    embedded = scene.table[ids]
    labels = torch.full((levels, 1), sentence.label)
    inputs = embedded.expand(levels, 1, *embedded.shape)
    jacobian = UpdateJacobian(scene.update, scene.params, inputs, labels)
    update = jacobian.update()
    noise_std = torch.tensor(settings.relative_stds, dtype=torch.float64) * float(update[0].norm())
    generator = torch.Generator().manual_seed(1_009 * settings.seed + sentence.line)
    shared = update + noise_std[:, None] * torch.randn(update.shape, generator=generator, dtype=update.dtype)
    problem = AttackProblem(
        update=scene.update,
        params=scene.params,
        shared=shared,
        prior=GaussianPrior(scene.mean.repeat(len(ids), 1), scene.std),
        noise=IsotropicNoise(noise_std),
        labels=labels,
    )
    found = GaussNewton(num_starts=settings.num_starts, hops=0).run(problem)
    single = jacobian.select(torch.zeros(1, dtype=torch.long))
    spectrum = estimate_spectrum(single, max_steps=jacobian.input_dim)
    for level, relative in enumerate(settings.relative_stds):
        std = float(noise_std[level])
        read = torch.cdist(found.inputs[level, 0], scene.table).argmin(1)
        anywhere = Counter(read.tolist()) & Counter(ids.tolist())
        yield LanguageRow(
            sentence=sentence.line,
            label=sentence.label,
            words=len(ids),
            accuracy=scene.accuracy,
            relative_std=relative,
            noise_std=std,
            prior_std=scene.std,
            leakage=float(spectrum.leakage(std, scene.std).value),
            predicted=float(spectrum.rmse(std, scene.std).value),
            error=float((found.inputs[level, 0] - embedded).square().mean().sqrt()),
            recovered=float((read == ids).double().mean()),
            anywhere=anywhere.total() / len(ids),
            explained=bool(found.explained[level]),
        )


def _summarize(settings: LanguageSettings, rows: Sequence[LanguageRow]) -> Summary:
    lines = []
    for relative in settings.relative_stds:
        alike = [row for row in rows if row.relative_std == relative]
        lines.append(
            (
                f"{relative:g}",
                spread_text([row.leakage for row in alike]),
                spread_text([row.recovered for row in alike]),
                spread_text([row.anywhere for row in alike]),
                spread_text([row.predicted for row in alike]),
                spread_text([row.error for row in alike]),
                str(sum(not row.explained for row in alike)),
            )
        )
    ratios = [row.error / row.predicted for row in rows if row.explained]
    return Summary(
        f"A classifier with {rows[0].accuracy:.1%} accuracy; {len({row.sentence for row in rows})} sentences of "
        f"{min(row.words for row in rows)} to {max(row.words for row in rows)} words. "
        "Noise is relative to the norm of the gradient; cells are medians [least, most]. Attack's over predicted error "
        f"where the attack explains the gradient: {spread_text(ratios) if ratios else 'nowhere'}.",
        (
            "σ/‖g‖",
            "leakage",
            "words recovered",
            "at any place",
            "predicted error",
            "attack's error",
            "attacks that failed",
        ),
        tuple(lines),
    )


def _draw(settings: LanguageSettings, rows: Sequence[LanguageRow], figure: Figure) -> None:
    words, errors = figure.subplots(1, 2)
    for explained in (True, False):  # those that failed on top, or they would hide below
        for place, relative in enumerate(settings.relative_stds):
            alike = [row for row in rows if row.relative_std == relative and row.explained is explained]
            colour = f"C{place}"
            faces, label = (colour, f"{relative:g}") if explained else ("none", None)
            for axis, across, up in ((words, "leakage", "anywhere"), (errors, "predicted", "error")):
                axis.scatter(
                    [getattr(row, across) for row in alike],
                    [getattr(row, up) for row in alike],
                    s=20 + 28 * (len(settings.relative_stds) - 1 - place),  # largest first: of equal ones all are seen
                    alpha=0.8,
                    facecolors=faces,
                    edgecolors=colour,
                    label=label,
                )
    words.set(
        xlabel="predicted leakage of the embeddings", ylabel="share of words read, at any place", ylim=(-0.03, 1.03)
    )
    words.legend(title="σ/‖g‖ (hollow:\nattack failed)", frameon=False, fontsize=8)
    ends = [0.0, 1.05 * max(max(row.predicted, row.error) for row in rows)]
    errors.plot(ends, ends, color="black", linewidth=1)
    errors.set(xlim=ends, ylim=ends, xlabel="predicted error", ylabel="attack's error")


STUDY = Study(
    name="language",
    settings=LanguageSettings,
    row=LanguageRow,
    key=("sentence", "relative_std"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(9.0, 4.2),
)
