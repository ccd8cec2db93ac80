"""The study of how linear updates are."""

import statistics

import pytest

from fl_privacy.errors import InvalidInputError


def test_networks_with_relus_jump_and_smooth_ones_do_not(conducted):
    rows, folder = conducted("linearity", models=("digitsnet", "resnet8"), num_images=2, shifts=(1e-3, 1e-2))

    def ratios(model):
        return [row.ratio for row in rows if row.model == model]

    assert {row.model for row in rows} == {"digitsnet", "resnet8", "resnet8 with GELU", "resnet8, J rounded off"}
    assert all(abs(ratio - 1) < 0.05 for ratio in (*ratios("digitsnet"), *ratios("resnet8 with GELU")))
    assert statistics.median(ratios("resnet8")) > 3
    assert all(a < 0.5 * own for a, own in zip(ratios("resnet8, J rounded off"), ratios("resnet8"), strict=True))
    assert "Networks with ReLUs" in (folder / "summary.md").read_text()


def test_an_attackers_error_lies_where_the_jacobian_is_small(conducted):
    options = {"models": ("lenet", "vit"), "num_images": 2, "shifts": (0.1, 0.2)}
    white, _ = conducted("linearity", **options)
    likely, folder = conducted("linearity", **options, direction="likely")
    for before, after in zip(white, likely, strict=True):
        assert (before.model, before.shift) == (after.model, after.shift)
        if after.model == "lenet":
            assert after.ratio == pytest.approx(1, abs=0.05)
        else:
            assert after.ratio > 2 * before.ratio
    assert "as an attacker errs" in (folder / "summary.md").read_text()
    with pytest.raises(InvalidInputError, match="expected shifts below"):
        conducted("linearity", models=("lenet",), num_images=1, shifts=(0.1, 0.5), direction="likely")
