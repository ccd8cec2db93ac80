"""A picture of one image of a data set behind the usual defences, and behind the noise recommended for a target."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_privacy.attacks import Attack, GaussianPrior, GaussNewton, rmse
from fl_privacy.attacks.mechanisms import (
    AddedNoise,
    HalfPrecision,
    Mechanism,
    NoDefence,
    Pruning,
    UniformQuantization,
)
from fl_privacy.audit.observed import SharedUpdate
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.lanczos import function_of_gram
from fl_privacy.influence.recommendation import NoiseRecommendation, recommend_noise
from fl_privacy.influence.sampling import draw_input_noise
from fl_privacy.influence.spectrum import Spectrum, estimate_spectrum
from fl_privacy.interval import Interval
from fl_privacy.pictures.rebuilding import Panel, Picture, rebuild
from fl_privacy.reference import load_dataset
from fl_privacy.reference.initialization import Initialization
from fl_privacy.studies.results import Progress
from fl_privacy.studies.scene import Scene, SceneSettings
from fl_privacy.studies.settings import Settings, option, relu_width_option

_MAX_STEPS = 1024
"""Lanczos steps for a draw of shaped noise: all there is of images of up to 32×32 grey pixels."""


@dataclass(frozen=True, kw_only=True)
class PictureSettings(Settings):
    """Which image behind which model, and what is done to its gradient."""

    dataset: str = option("digits", "digits, mnist, fashion-mnist, cifar10 or folder.")
    data_root: str = option("data", "Where the data set's files are.")
    model: str = option("lenet", "linear, mlp, lenet, digitsnet, resnet8, resnet18 or vit.")
    initialization: Initialization = option("uniform", "How parameters are drawn.")
    image: int = option(0, "Index of the image in the test set.", minimum=0)
    noise_stds: tuple[float, ...] = option((1e-3, 3e-2), "Gaussian noise, standard deviation per parameter.", above=0)
    laplace_stds: tuple[float, ...] = option((3e-2,), "Laplace noise, likewise.", above=0)
    noise_multipliers: tuple[float, ...] = option((1e-3,), "Noise after clipping, over the norm clipped to.", above=0)
    bits: tuple[float, ...] = option((8.0,), "Bits of an entry, one scale for all.", minimum=2)
    half_precision: bool = option(True, "Show rounding to float16.")
    prune: tuple[float, ...] = option((0.9,), "Shares of the gradient's entries that are pruned away.", above=0)
    target_leakage: float = option(0.5, "Leakage that the recommended noise leaves.", above=0)
    seed: int = option(0, "Of initialization and noise.", minimum=0)
    relu_width: float = relu_width_option()


def defended_picture(
    settings: PictureSettings, *, attack: Attack | None = None, progress: Progress | None = None
) -> Picture:
    """Returns the image, what an attacker rebuilds of its gradient as it is, and what of it behind each defence.

    The attacker knows model, label and mechanism, of shaped noise the covariance too, uses the shape of Laplace's noise
    and of rounding to few bits, and holds a prior from 2,000 images of the training set.

    Args:
        settings: Which image, and what is done to its gradient.
        attack: Who rebuilds. Default: `GaussNewton()`.
        progress: Told (panels done, panels to do).

    Raises:
        InvalidInputError: There is no such image, or the target is not below 1.
        ValueError: The data set or the model is unknown.
    """
    if settings.target_leakage >= 1:
        raise InvalidInputError(f"expected a target leakage below 1, got {settings.target_leakage}")
    data = load_dataset(settings.dataset, root=settings.data_root)
    if settings.image >= len(data.test):
        raise InvalidInputError(f"expected an image in [0, {len(data.test)}), got {settings.image}")
    attack = attack or GaussNewton()
    scene = Scene.of(
        SceneSettings(
            dataset=settings.dataset,
            data_root=settings.data_root,
            model=settings.model,
            initialization=settings.initialization,
            num_images=settings.image + 1,
            seed=settings.seed,
            relu_width=settings.relu_width,
        ),
        data=data,
    )
    jacobian = scene.jacobian([settings.image])
    spectrum = estimate_spectrum(jacobian, max_steps=256)
    law = recommend_noise(spectrum, target_leakage=settings.target_leakage, prior_std=scene.prior.std)
    update = scene.gradients([settings.image])
    norm = float(update.double().norm())
    mechanisms: list[tuple[str, Mechanism]] = [
        ("raw update", NoDefence()),
        *((f"noise {std:g}", AddedNoise(std=std)) for std in settings.noise_stds),
        *((f"Laplace noise {std:g}", AddedNoise(std=std, laplace=True)) for std in settings.laplace_stds),
        # Noise of z·C on an update clipped to C is z·‖u‖ once an attacker has divided the clipping out.
        *((f"clip C, noise {z:g} C", AddedNoise(std=z * norm)) for z in settings.noise_multipliers),
        *((f"{share:.0%} pruned", Pruning(share=share)) for share in settings.prune),
        *((f"{bits:g} bits", UniformQuantization(bits=bits)) for bits in settings.bits),
        *((("float16", HalfPrecision()),) if settings.half_precision else ()),
    ]
    recommended = not bool(law.already_met[0] | law.failed[0])
    if recommended:
        isotropic = float(law.isotropic_std[0])
        mechanisms.append((f"isotropic for {settings.target_leakage:.0%}", AddedNoise(std=isotropic)))
    generator = torch.Generator().manual_seed(settings.seed)
    versions = []
    for name, mechanism in mechanisms:
        shared = mechanism.apply(update, generator)
        versions.append(
            SharedUpdate(
                name,
                shared[0],
                mechanism.noise(shared),
                equivalent=mechanism.equivalent(shared),
                attack=mechanism.attack(shared, attack),
            )
        )
    images, labels = scene.images[settings.image], scene.labels[settings.image]
    total = len(versions) + recommended

    def told(done: int, _versions: int) -> None:
        if progress is not None:
            progress(done, total)

    picture = rebuild(
        scene.update,
        scene.params,
        images,
        labels,
        versions,
        prior=scene.prior,
        relu_width=scene.relu_width,
        progress=told,
    )
    if recommended:
        told(len(versions), total)
        shaped = _shaped(settings, attack, scene, jacobian, spectrum, law)
        picture = replace(picture, panels=(*picture.panels, shaped))
    told(total, total)
    return picture


def _shaped(
    settings: PictureSettings,
    attack: Attack,
    scene: Scene,
    jacobian: UpdateJacobian,
    spectrum: Spectrum,
    law: NoiseRecommendation,
) -> Panel:
    """The panel of u(x + a): the attacker rebuilds x + a, and takes the posterior mean of x given that."""
    tau, truth = scene.prior.std, scene.images[[settings.image]]
    drawn = draw_input_noise(jacobian, law, settings.seed, max_steps=_MAX_STEPS)

    def share(nodes: Tensor) -> Tensor:
        """τ²/(τ² + s²), s² = h(λ) as it was drawn."""
        return tau**2 / (tau**2 + drawn.variance(law, nodes))

    shared = scene.own_jacobian([settings.image]).shifted(drawn.noise).update()
    exact = NoDefence().noise(shared)
    wide = GaussianPrior(scene.prior.mean, (tau**2 + float(drawn.noise.square().mean())) ** 0.5)
    problem = replace(scene.problem([settings.image], shared, 1.0), prior=wide, noise=exact)
    found = attack.run(problem)
    mean = wide.start(1, 1)
    rebuilt = (mean + function_of_gram(jacobian, share, found.inputs.flatten(1) - mean, _MAX_STEPS)).reshape(
        truth.shape
    )
    leakage = Interval(*map(float, spectrum.mean_of_increasing(share)))
    return Panel(
        name=f"shaped for {settings.target_leakage:.0%}",
        rebuilt=rebuilt[0, 0],
        leakage=leakage,
        predicted=Interval(*(tau * max(0.0, 1 - share) ** 0.5 for share in reversed(leakage))),
        reached=float(rmse(rebuilt, truth)),
        explained=bool(found.explained),
    )
