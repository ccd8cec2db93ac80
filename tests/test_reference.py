"""The reference models and data: shapes, smoothness, determinism, and errors that say what to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fl_privacy.extras import require
from fl_privacy.reference import DATASETS, MODELS, ImageSet, build_model, init_uniform_, load_dataset

REAL_DATA = Path(os.environ.get("FL_PRIVACY_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.parametrize("input_shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 48)])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_gives_logits_at_every_size(name, input_shape):
    model = build_model(name, input_shape=input_shape, num_classes=7).eval()
    assert model(torch.rand(2, *input_shape)).shape == (2, 7)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_gradient_of_the_parameters_depends_on_the_input(name):
    torch.manual_seed(0)
    model = build_model(name, input_shape=(1, 8, 8), num_classes=3).double().eval()
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 2]))
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    (mixed,) = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), images)
    assert mixed.isfinite().all()
    assert (mixed.flatten(1).norm(dim=1) > 0).all()


def test_lenet_is_the_one_of_the_literature():
    model = build_model("lenet", input_shape=(3, 32, 32), num_classes=100)
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    assert [layer.stride for layer in convolutions] == [(2, 2), (2, 2), (1, 1), (1, 1)]
    assert all((layer.out_channels, layer.kernel_size, layer.padding) == (12, (5, 5), (2, 2)) for layer in convolutions)
    assert sum(isinstance(layer, nn.Sigmoid) for layer in model) == 4
    assert model[-1].in_features == 768


def test_uniform_initialisation_is_bounded_spread_and_seeded():
    def flat():
        model = build_model("lenet", input_shape=(1, 8, 8), num_classes=10)
        init_uniform_(model, bound=0.5, generator=torch.Generator().manual_seed(3))
        return nn.utils.parameters_to_vector(model.parameters())

    first = flat()
    assert torch.equal(first, flat())
    assert first.abs().max() <= 0.5
    assert first.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.05)


def test_resnet18_keeps_small_images_large():
    model = build_model("resnet18", input_shape=(3, 32, 32), num_classes=10)
    assert model.layer1(model.maxpool(model.conv1(torch.rand(1, 3, 32, 32)))).shape == (1, 64, 32, 32)


def test_resnet8_is_the_small_one_of_its_family():
    model = build_model("resnet8", input_shape=(3, 32, 32), num_classes=10)
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) == 1 + 3 * 2 + 2  # two of them projections
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 9
    assert model[:6](torch.rand(1, 3, 32, 32)).shape == (1, 64, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "lenett"},
            "unknown model 'lenett': expected one of digitsnet, lenet, linear, mlp, resnet18, resnet8, vit",
        ),
        ({"input_shape": (8, 8)}, r"\(C, H, W\), got \(8, 8\)"),
        ({"num_classes": 1}, "at least 2, got 1"),
    ],
)
def test_build_model_refuses_with_what_is_valid(arguments, message):
    valid = {"name": "mlp", "input_shape": (1, 8, 8), "num_classes": 10}
    with pytest.raises(ValueError, match=message):
        build_model(**{**valid, **arguments})


def test_digits_are_split_once_and_for_all():
    data, again = load_dataset("digits"), load_dataset("digits")
    assert data.input_shape == (1, 8, 8)
    assert data.class_names == tuple("0123456789")
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert torch.equal(data.train.pixels, again.train.pixels)
    assert torch.equal(data.test.labels, again.test.labels)
    everything = torch.cat([data.train.pixels, data.test.pixels]).flatten(1)
    assert (everything.min(), everything.max()) == (0, 1)
    # scikit-learn's digits have no two alike: all rows distinct means that no example is in both parts
    assert len(everything.unique(dim=0)) == 1797


def test_digitsnet_learns_digits():
    torch.manual_seed(0)
    data = load_dataset("digits")
    model = build_model("digitsnet", input_shape=data.input_shape, num_classes=data.num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    for batch in torch.randperm(len(data.train)).split(64):
        images, labels = data.train.select(batch)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels = data.test.select(slice(None))
    assert (model(images).argmax(dim=1) == labels).float().mean() > 0.8


def test_bytes_are_handed_out_as_floats_in_the_unit_interval():
    pixels = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).reshape(2, 1, 1, 2)
    images, labels = ImageSet(pixels, torch.tensor([4, 5])).select(torch.tensor([1]))
    torch.testing.assert_close(images, torch.tensor([1.0, 0.4]).reshape(1, 1, 1, 2))
    assert labels.tolist() == [5]


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 8, 8), torch.zeros(2, dtype=torch.int64), r"\[n, C, H, W\], got torch.float32 \[2, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64), r"int64 \[2\], got torch.int64 \[3\]"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), "got torch.float32"),
    ],
)
def test_an_image_set_that_does_not_fit_together_is_refused(pixels, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(pixels, labels)


def write_image(path, *, level, size=(12, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


def test_a_folder_is_resized_and_labelled_by_subfolder(tmp_path):
    for number in range(5):
        write_image(tmp_path / "cat" / f"{number}.png", level=51)
        write_image(tmp_path / "dog" / f"{number}.png", level=255)
    data = load_dataset("folder", root=tmp_path, image_size=16)
    assert data.class_names == ("cat", "dog")
    assert data.input_shape == (3, 16, 16)
    assert (len(data.train), len(data.test)) == (8, 2)
    images, labels = data.train.select(slice(None))
    torch.testing.assert_close(images.amax(dim=(1, 2, 3)), torch.where(labels == 0, 0.2, 1.0))


def test_a_folder_may_bring_its_own_test_part(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for label in ("a", "b"):
            for number in range(count):
                write_image(tmp_path / part / label / f"{number}.png", level=number)
    data = load_dataset("folder", root=tmp_path, image_size=8)
    assert (len(data.train), len(data.test)) == (6, 4)
    shutil.rmtree(tmp_path / "test" / "b")
    with pytest.raises(ValueError, match=r"\('a', 'b'\).*\('a',\)"):
        load_dataset("folder", root=tmp_path)


def test_a_folder_without_images_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match="one folder per class below"):
        load_dataset("folder", root=tmp_path)


def test_unknown_data_set_names_the_valid_ones():
    with pytest.raises(ValueError, match="unknown data set 'digit': expected one of cifar10, digits") as raised:
        load_dataset("digit")
    assert all(name in str(raised.value) for name in DATASETS)


def test_data_that_cannot_be_had_says_where_to_put_it(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [(tmp_path / "nothing").as_uri() + "/"])
    with pytest.raises(FileNotFoundError) as raised:
        load_dataset("mnist", root=tmp_path / "data")
    assert str(tmp_path / "data" / "MNIST" / "raw") in str(raised.value)


def test_real_mnist(tmp_path):
    source = REAL_DATA / "MNIST"
    if not source.is_dir():
        pytest.skip(f"no MNIST in {REAL_DATA}")
    shutil.copytree(source, tmp_path / "MNIST")
    data = load_dataset("mnist", root=tmp_path)
    assert data.input_shape == (1, 28, 28)
    assert (len(data.train), len(data.test), data.num_classes) == (60_000, 10_000, 10)
    assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.train.pixels.dtype == torch.uint8


def test_a_part_of_cifar10_is_read_as_it_is():
    if not (REAL_DATA / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 in {REAL_DATA}")
    data = load_dataset("cifar10", root=REAL_DATA)
    assert data.input_shape == (3, 32, 32)
    assert (len(data.train), len(data.test)) == (10_000, 10_000)
    assert data.class_names[data.train.labels[0]] == "frog"


def test_a_missing_extra_is_named():
    with pytest.raises(ImportError, match=r"pip install '\.\[simulation\]'"):
        require("a_package_that_nobody_has.datasets")
