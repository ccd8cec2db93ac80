"""Convolutions as patches and a matrix product: what they give, and what their first and second derivatives are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.func import vmap

from fl_privacy.influence.convolution import LaneConvolution

LANES, EXAMPLES = 3, 2
CASES = {
    "few places": {"image": (7, 5), "kernel": (3, 3), "stride": 1, "padding": 1, "dilation": 1},
    "many places": {"image": (18, 17), "kernel": (3, 2), "stride": 1, "padding": (1, 0), "dilation": 1},
    "few, strided and dilated": {
        "image": (11, 9),
        "kernel": (2, 3),
        "stride": (3, 2),
        "padding": 2,
        "dilation": (2, 1),
    },
    "many, strided and dilated": {"image": (40, 37), "kernel": (3, 3), "stride": 2, "padding": 1, "dilation": (1, 2)},
    "a kernel of one": {"image": (4, 4), "kernel": (1, 1), "stride": 2, "padding": 0, "dilation": 1},
}
BY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def tensors(case: dict[str, object]) -> tuple[Tensor, Tensor, Tensor, dict[str, object]]:
    options = dict(case)
    image, kernel = options.pop("image"), options.pop("kernel")
    generator = torch.Generator().manual_seed(0)
    shapes = ((LANES, EXAMPLES, 2, *image), (LANES, 4, 2, *kernel), (LANES, 4))  # type: ignore[misc]
    images, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    )
    return images, weight, bias, options


def one_pass(images: Tensor, weight: Tensor, bias: Tensor, options: dict[str, object]) -> Tensor:
    with LaneConvolution():
        return vmap(lambda x, w, b: F.conv2d(x, w, b, **options))(images, weight, bias)  # type: ignore[arg-type]


def lane_by_lane(images: Tensor, weight: Tensor, bias: Tensor, options: dict[str, object]) -> Tensor:
    lanes = zip(images, weight, bias, strict=True)
    return torch.stack([F.conv2d(x, w, b, **options) for x, w, b in lanes])  # type: ignore[arg-type]


def derivatives(output: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """First derivatives of ‖sin(output)‖²/2 in the inputs, then those of the firsts' squares."""
    firsts = torch.autograd.grad(output.sin().square().sum() / 2, inputs, create_graph=True)
    seconds = torch.autograd.grad(sum((first.square().sum() for first in firsts), torch.zeros(())), inputs)
    return [*firsts, *seconds]


@BY_CASE
def test_values_and_derivatives_are_those_of_the_convolution(case: dict[str, object]) -> None:
    *inputs, options = tensors(case)
    images, weight, bias = inputs
    found = one_pass(images, weight, bias, options)
    exact = lane_by_lane(images, weight, bias, options)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        derivatives(found, (images, weight, bias)), derivatives(exact, (images, weight, bias)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_products_over_many_lanes_keep_the_graph() -> None:
    """A second backward pass over a kept graph gives the first one's numbers: nothing is written in place."""
    images, weight, bias, options = tensors(CASES["few places"])
    (gradient,) = torch.autograd.grad(one_pass(images, weight, bias, options).sin().sum(), images, create_graph=True)
    first, second = (torch.autograd.grad(gradient, weight, torch.ones_like(gradient), retain_graph=True) for _ in "ab")
    assert first[0].abs().sum() > 0
    assert torch.equal(first[0], second[0])


def test_lanes_may_share_their_images_or_their_weights() -> None:
    images, weight, bias, options = tensors(CASES["few places"])
    exact = lane_by_lane(images, weight[:1].expand_as(weight), bias, options)
    with LaneConvolution():
        shared = vmap(lambda x, b: F.conv2d(x, weight[0], b, **options))(images, bias)  # type: ignore[arg-type]
        one_image = vmap(lambda w, b: F.conv2d(images[0], w, b, **options))(weight, bias)  # type: ignore[arg-type]
    torch.testing.assert_close(shared, exact, rtol=1e-12, atol=1e-12)
    exact = lane_by_lane(images[:1].expand_as(images), weight, bias, options)
    torch.testing.assert_close(one_image, exact, rtol=1e-12, atol=1e-12)
