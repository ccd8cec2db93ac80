"""Studies on a GPU: what they find there is what they find on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fl_privacy.errors import InvalidInputError
from fl_privacy.studies import load_study
from fl_privacy.studies.scene import Scene, SceneSettings
from fl_privacy.validation import ValidationSettings, attacks_of, run_validation

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

SMALL: dict[str, dict[str, Any]] = {
    "architectures": {"models": ("linear", "lenet"), "num_images": 2, "noise_stds": (1e-2,), "dgl_steps": 5},
    "batch-size": {"num_images": 2, "batch_sizes": (1, 2), "local_steps": (2,)},
    "directions": {"num_images": 1, "num_directions": 3, "norms": (1e-2,)},
    "initialization": {"num_images": 2, "num_draws": 1, "initializations": ("uniform",)},
    "linearity": {"models": ("digitsnet", "resnet8"), "num_images": 1, "shifts": (0.1,)},
    "noise": {"num_images": 1, "targets": (0.5,)},
    "proxy": {"model": "digitsnet", "num_images": 2, "num_public": 4, "batch_sizes": (2,), "steps": (0,)},
    "ridge": {"num_images": 2, "noise_stds": (1e-2,)},
    "training": {"num_images": 2, "rounds": (0, 1), "num_clients": 2},
    "unfairness": {"num_images": 2},
    "usual-defences": {"num_images": 1, "prune": (0.5,)},
}
CHANGING = {"seconds", "products"}
"""Fields that do not come out the same twice, or not by another order of sums."""


@needs_gpu
@pytest.mark.parametrize("name", SMALL)
def test_a_study_finds_on_a_gpu_what_it_finds_on_the_cpu(name: str) -> None:
    study = load_study(name)
    found = [_rows(study, study.settings(**SMALL[name], device=device)) for device in ("cpu", "cuda")]
    assert found[0]
    assert len(found[0]) == len(found[1])
    for first, second in zip(*found, strict=True):
        _assert_same(first, second)


@needs_gpu
def test_validation_finds_on_a_gpu_what_it_finds_on_the_cpu(tmp_path: Any) -> None:
    found = []
    for device in ("cpu", "cuda"):
        settings = ValidationSettings(num_images=2, noise_stds=(1e-2,), prior="images", hops=0, device=device)
        found.append(run_validation(settings, attacks_of(settings), tmp_path / f"{device}.csv"))
    for first, second in zip(*found, strict=True):
        _assert_same(first, second)


@needs_gpu
def test_a_study_computes_on_the_gpu_that_it_was_asked_for() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    study = load_study("ridge")
    _rows(study, study.settings(num_images=1, noise_stds=(1e-2,), device="cuda"))
    assert torch.cuda.max_memory_allocated() > before


@needs_gpu
def test_float32_products_on_a_gpu_are_not_rounded_to_tf32() -> None:
    settings = SceneSettings(model="resnet8", initialization="default", num_images=1, device="cuda")
    scene = Scene.of(settings)
    vector = torch.randn(1, 64, dtype=torch.float64, device="cuda")
    exact, fast = scene.jacobian([0]).gram(vector), scene.to(torch.float32).jacobian([0]).gram(vector.float())
    assert float((fast - exact).norm() / exact.norm()) < 1e-5


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    study = load_study("ridge")
    for name in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(InvalidInputError, match=f"expected a device that torch can use here, .* got '{name}'"):
            _rows(study, study.settings(num_images=1, device=name))


def _rows(study: Any, settings: Any) -> list[Any]:
    return [row for portion in study.portions(settings) for row in portion.compute()]


def _assert_same(first: Any, second: Any) -> None:
    for field in dataclasses.fields(first):
        if field.name in CHANGING:
            continue
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert b == (pytest.approx(a, rel=1e-3, abs=1e-8, nan_ok=True) if isinstance(a, float) else a), field.name
