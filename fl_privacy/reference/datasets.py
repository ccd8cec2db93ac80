"""Image classification data by name, for simulations, studies and tests.

`digits` ships with scikit-learn and is always there. The others are read, and downloaded where that is possible, by
torchvision's own loaders below a data root.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fl_privacy.extras import require
from fl_privacy.reference.models import InputShape

TEST_SHARE = 0.2
"""Share of the examples kept for testing where the data set itself has no test part."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, kept as bytes where the source has bytes, handed out as float32 in [0, 1].

    Attributes:
        pixels: `[n, C, H, W]`, uint8 in 0 to 255 or float32 in [0, 1].
        labels: `[n]`, int64 class indices.

    Raises:
        ValueError: The two disagree in length, or a dtype or shape is another one.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.pixels.dim() != 4 or self.pixels.dtype not in (torch.uint8, torch.float32):
            raise ValueError(
                f"pixels must be uint8 or float32 [n, C, H, W], got {self.pixels.dtype} {list(self.pixels.shape)}"
            )
        if self.labels.shape != self.pixels.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 [{len(self.pixels)}], got {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Returns the images, float32 `[k, C, H, W]` in [0, 1], and labels, int64 `[k]`, at the indices."""
        chosen = self.pixels[indices]
        images = chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen
        return images, self.labels[indices]


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: what there is to train on, what to test on, and the names of the classes."""

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> InputShape:
        """Channels, height and width of one image."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width


def load_dataset(name: str, *, root: str | Path = "data", image_size: int = 32) -> ImageData:
    """Returns a data set with its train and test parts; the same ones on every call.

    Args:
        name: A key of `DATASETS`.
        root: Folder of the data. torchvision's data sets look for their files below it and are downloaded into it when
            they are not there; `folder` takes it for the folder of images itself. Not used by `digits`.
        image_size: Side in pixels to which `folder` resizes its images.

    Raises:
        ValueError: The name is unknown, or the folder holds no images by class.
        FileNotFoundError: The files are not below the root and could not be downloaded; the message says where they go.
        ImportError: The extra `simulation` is not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(sorted(DATASETS))}")
    if image_size < 1:
        raise ValueError(f"image_size must be a positive number of pixels, got {image_size}")
    return DATASETS[name](Path(root), image_size)


def _load_digits(root: Path, image_size: int) -> ImageData:
    """Reads scikit-learn's 1,797 handwritten digits, 8×8 in 17 grey levels."""
    digits = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    return _split(ImageSet(images, labels), tuple(str(name) for name in digits.target_names))


def _load_torchvision(class_name: str, files: str) -> Callable[[Path, int], ImageData]:
    """Returns the loader of one of torchvision's data sets, whose files belong at `files` below the root."""

    def load(root: Path, image_size: int) -> ImageData:
        source = getattr(require("torchvision.datasets"), class_name)
        if class_name == "CIFAR10":
            source = _batches_present(source, root)
        try:
            train, test = (source(root=str(root), train=part, download=True) for part in (True, False))
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{class_name} is not below {root.resolve()} and could not be downloaded ({error}); "
                f"put its files at {root.resolve() / files}, or name the folder that has them as the data root"
            ) from error
        names = tuple(str(name) for name in train.classes)
        return ImageData(_from_torchvision(train), _from_torchvision(test), names)

    return load


def _batches_present(cifar10: Any, root: Path) -> Any:
    """Returns torchvision's class for the CIFAR-10 below a root, restricted to its batches where not all are there.

    A part of the training set is as good for an audit as all of it, and there are no checksums of a part.
    """
    folder = root / cifar10.base_folder
    train = [[name, None] for name, _ in cifar10.train_list if (folder / name).is_file()]
    rest = [name for name, _ in cifar10.test_list] + [cifar10.meta["filename"]]
    if not 0 < len(train) < len(cifar10.train_list) or not all((folder / name).is_file() for name in rest):
        return cifar10
    parts = {
        "train_list": train,
        "test_list": [[name, None] for name, _ in cifar10.test_list],
        "meta": {**cifar10.meta, "md5": None},
    }
    return type("PartOfCIFAR10", (cifar10,), parts)


def _from_torchvision(source: Any) -> ImageSet:
    """Returns the arrays of a torchvision data set: `[n, H, W]` grey or `[n, H, W, 3]` colour, as bytes."""
    pixels = torch.as_tensor(source.data)
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return ImageSet(pixels, torch.as_tensor(source.targets, dtype=torch.int64))


def _load_folder(root: Path, image_size: int) -> ImageData:
    """Reads images from `root/CLASS`, or from `root/train/CLASS` and `root/test/CLASS` where both are there."""
    parts = [root / "train", root / "test"]
    if all(part.is_dir() for part in parts):
        (train, names), (test, test_names) = (_read_folder(part, image_size) for part in parts)
        if names != test_names:
            raise ValueError(f"{parts[0]} has the classes {names}, and {parts[1]} has {test_names}")
        return ImageData(train, test, names)
    return _split(*_read_folder(root, image_size))


def _read_folder(folder: Path, image_size: int) -> tuple[ImageSet, tuple[str, ...]]:
    torchvision = require("torchvision")
    resize = torchvision.transforms.Compose(
        [torchvision.transforms.Resize((image_size, image_size)), torchvision.transforms.PILToTensor()]
    )
    try:
        source = torchvision.datasets.ImageFolder(str(folder), transform=resize)
    except FileNotFoundError as error:
        raise ValueError(
            f"expected images in one folder per class below {folder.resolve()}, found none ({error}); "
            "name the folder that holds the class folders as the data root"
        ) from error
    images, labels = zip(*source, strict=True)
    return ImageSet(torch.stack(images), torch.tensor(labels)), tuple(source.classes)


def _split(examples: ImageSet, class_names: tuple[str, ...]) -> ImageData:
    """Returns the examples in a train and a test part, drawn once and for all."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    held_out = round(TEST_SHARE * len(examples))
    test, train = (ImageSet(examples.pixels[part], examples.labels[part]) for part in order.tensor_split((held_out,)))
    return ImageData(train, test, class_names)


DATASETS: Mapping[str, Callable[[Path, int], ImageData]] = MappingProxyType(
    {
        "digits": _load_digits,
        "mnist": _load_torchvision("MNIST", "MNIST/raw"),
        "fashion-mnist": _load_torchvision("FashionMNIST", "FashionMNIST/raw"),
        "cifar10": _load_torchvision("CIFAR10", "cifar-10-batches-py"),
        "folder": _load_folder,
    }
)
"""The data sets that `load_dataset` knows, each read from a data root and an image size."""
