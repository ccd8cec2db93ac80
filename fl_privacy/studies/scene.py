"""What most studies play on: a model, images of a test set, and what an attacker believes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fl_privacy.attacks import AttackProblem, GaussianPrior, IsotropicNoise
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.update import GradientUpdate
from fl_privacy.reference import ImageData, ImageSet, build_model, load_dataset
from fl_privacy.reference.initialization import Initialization, initialize_
from fl_privacy.studies.settings import Settings, device_option, option, relu_width_option

PUBLIC_IMAGES = 2000
"""Images of the training set that an attacker's prior is made from."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """Which model, which images; how the model is initialised is left open."""

    dataset: str = option("digits", "digits, mnist, fashion-mnist, cifar10 or folder.")
    data_root: str = option("data", "Where the data set's files are.", recorded=False)
    model: str = option("lenet", "linear, mlp, lenet, digitsnet, resnet8, resnet18 or vit.")
    num_images: int = option(10, "Images, the first of the test set.", minimum=1)
    seed: int = option(0, "Of initialization and noise.", minimum=0)
    relu_width: float = relu_width_option()
    device: str = device_option()


@dataclass(frozen=True, kw_only=True)
class SceneSettings(ImageSettings):
    """Which model, which images, which parameters."""

    initialization: Initialization = option(
        "uniform", "How parameters are drawn; uniform is U(-0.5, 0.5), as in the paper, default the model's own."
    )


@dataclass(frozen=True, eq=False)
class Scene:
    """A model and single images whose gradients are shared; float64, in which small noise does not drown.

    Attributes:
        update: The gradient of a single image.
        params: Parameters by name.
        images: `[n, 1, *shape]`.
        labels: `[n, 1]`.
        prior: From images of the training set, white unless asked otherwise.
        seed: Of the noise.
        relu_width: Of the ReLUs in J, as audits have it; what is shared and attacked is of the network as it is.
    """

    update: GradientUpdate
    params: dict[str, Tensor]
    images: Tensor
    labels: Tensor
    prior: GaussianPrior
    seed: int
    relu_width: float

    @classmethod
    def of(
        cls,
        settings: SceneSettings,
        *,
        num_images: int | None = None,
        num_public: int = PUBLIC_IMAGES,
        coloured: bool = False,
        data: ImageData | None = None,
    ) -> Scene:
        """Returns the scene that settings describe.

        Args:
            settings: Which model, which images.
            num_images: Images to load, where they are not `settings.num_images`.
            num_public: Images of the training set that the prior is made from.
            coloured: Whether the prior has their covariance.
            data: The data set of the settings, where it is loaded already.

        Raises:
            InvalidInputError: The data set has too few images, or torch cannot use the device.
        """
        device = find_device(settings.device)
        data = load_dataset(settings.dataset, root=settings.data_root) if data is None else data
        count = settings.num_images if num_images is None else num_images
        if len(data.test) < count:
            raise InvalidInputError(f"expected at most {len(data.test)} images, got {count}")
        torch.manual_seed(settings.seed)
        model = build_model(settings.model, input_shape=data.input_shape, num_classes=data.num_classes)
        initialize_(model, settings.initialization)
        images, labels = data.test.select(slice(0, count))
        public, _ = data.train.select(slice(0, num_public))
        update = GradientUpdate(model.to(device), nn.CrossEntropyLoss())
        params = {name: p.detach().double() for name, p in model.named_parameters()}
        prior = (GaussianPrior.from_images if coloured else GaussianPrior.from_examples)(public.double())
        return cls(
            update=update,
            params=params,
            images=images.to(device).double()[:, None],
            labels=labels.to(device)[:, None],
            prior=prior.to(torch.float64, device),
            seed=settings.seed,
            relu_width=settings.relu_width,
        )

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.images.device

    def to(self, dtype: torch.dtype) -> Scene:
        """Returns the same scene in another floating-point type."""
        params = {name: p.to(dtype) for name, p in self.params.items()}
        return replace(self, params=params, images=self.images.to(dtype), prior=self.prior.to(dtype))

    def select(self, data: ImageSet, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Returns images and labels of a data set as `ImageSet.select` does, on the scene's device."""
        images, labels = data.select(indices)
        return images.to(self.device), labels.to(self.device)

    def jacobian(self, group: Sequence[int]) -> UpdateJacobian:
        """Returns J at some of the images as an audit takes it, with the ReLUs rounded off: for predictions."""
        return self._jacobian(rounded_off(self.update, self.relu_width), group)

    def own_jacobian(self, group: Sequence[int]) -> UpdateJacobian:
        """Returns J at some of the images of the network as it is: for what changes and what is attacked."""
        return self._jacobian(self.update, group)

    def gradients(self, group: Sequence[int]) -> Tensor:
        """Returns what is shared of some of the images but for noise, `[U, P]`."""
        return self.own_jacobian(group).update()

    def _jacobian(self, update: GradientUpdate, group: Sequence[int]) -> UpdateJacobian:
        return UpdateJacobian(update, self.params, self.images[group], self.labels[group])

    def problem(self, group: Sequence[int], shared: Tensor, noise_std: float) -> AttackProblem:
        """Returns what an attacker holds who sees the noisy gradients `[U, P]` of some of the images."""
        return AttackProblem(
            update=self.update,
            params=self.params,
            shared=shared,
            prior=self.prior,
            noise=IsotropicNoise(torch.full((len(group),), noise_std, dtype=torch.float64, device=self.device)),
            labels=self.labels[group],
        )

    def errors(self, group: Sequence[int], rebuilt: Tensor) -> Tensor:
        """Returns the rmse per input element `[U]` of what was rebuilt of some of the images."""
        return (rebuilt - self.images[group]).flatten(1).square().mean(1).sqrt()

    def noise(self, group: Sequence[int], level: int) -> Tensor:
        """Returns standard normal noise `[U, P]` that depends on seed, image and noise level alone."""
        dim = self.update.layout.dim
        drawn = [torch.randn(dim, generator=self.generator(image, level), dtype=torch.float64) for image in group]
        return torch.stack(drawn).to(self.device)

    def generator(self, image: int, purpose: int) -> torch.Generator:
        """Returns a generator that depends on seed, image and purpose alone, such as a noise level."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + 1_009 * image + purpose)


def find_device(name: str) -> torch.device:
    """Returns the device of a name.

    Raises:
        InvalidInputError: torch cannot use it here, or not for float64.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).cpu()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(
            f"expected a device that torch can use here, such as cpu, got {name!r}: {reason}"
        ) from error
    return device


def groups(count: int, size: int) -> Iterator[list[int]]:
    """Yields the numbers from 0 on in groups."""
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))
