"""The paper's experiments as studies, each with its rows, its figure and a summary. Needs the extra `simulation`.

A study is a module of this package that ends with `STUDY = Study(...)` and has a line in `STUDIES`. Run one with
`fl-privacy study NAME`, or from Python:

    from fl_privacy.studies import conduct, load_study

    study = load_study("ridge")
    rows = conduct(study, study.settings(num_images=5), Path("studies/ridge"))
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fl_privacy.errors import InvalidInputError
from fl_privacy.studies.results import Portion
from fl_privacy.studies.settings import Settings, option
from fl_privacy.studies.study import Study, Summary, conduct

__all__ = ["STUDIES", "Portion", "Settings", "Study", "Summary", "conduct", "load_study", "option"]

STUDIES: Mapping[str, str] = MappingProxyType(
    {
        "noise": "How much less shaped input noise changes an update than other defences at the same attack error.",
        "noise-accuracy": "What protection costs in accuracy, at equal leakage over a whole run.",
        "informed-attackers": "What attackers who know mechanism or images' statistics get behind shaped noise.",
        "usual-defences": "What usual defences leave an attacker at equal utility, and how well that is predicted.",
        "architectures": "Predicted error, I²F and its bound against three attacks, across architectures and data.",
        "ridge": "Which ridge predicts an attack's error: the paper's 0.1, 1 and 10, or noise over prior variance.",
        "best-attacker": "The least error that any attacker can reach, by sampling posteriors, beside predictions.",
        "linearity": "Whether updates are as linear as I²F takes them to be, over the distance by which attackers err.",
        "directions": "How far noise along single eigenvectors leads an attack astray: the law of 1/√λ, and its end.",
        "unfairness": "How unevenly one noise level protects, per example and per class.",
        "initialization": "How much gradients leak under different initialisations, at absolute and relative noise.",
        "training": "How leakage changes over the rounds of federated averaging.",
        "batch-size": "How leakage depends on batch size and local steps, of one example and of the whole batch.",
        "proxy": "How well public examples tell the noise that a private one needs, from the norm of its update.",
        "language": "How many words of SST-2 an attacker reads, beside the leakage of their embeddings.",
        "time": "What predictions cost beside the attacks that they spare, in seconds and in gradients.",
    }
)
"""What each study asks, by its name; the module has the same name with underscores."""


def load_study(name: str) -> Study[Any, Any]:
    """Returns a study by name.

    Raises:
        InvalidInputError: There is no such study.
    """
    if name not in STUDIES:
        raise InvalidInputError(f"expected a study among {', '.join(STUDIES)}, got {name!r}")
    study: Study[Any, Any] = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").STUDY
    return study
