"""The study of how linear updates are."""

import statistics


def test_networks_with_relus_jump_and_smooth_ones_do_not(conducted):
    rows, folder = conducted("linearity", models=("digitsnet", "resnet8"), num_images=2, shifts=(1e-3, 1e-2))

    def ratios(model):
        return [row.ratio for row in rows if row.model == model]

    assert {row.model for row in rows} == {"digitsnet", "resnet8", "resnet8 with GELU", "resnet8, J rounded off"}
    assert all(abs(ratio - 1) < 0.05 for ratio in (*ratios("digitsnet"), *ratios("resnet8 with GELU")))
    assert statistics.median(ratios("resnet8")) > 3
    assert all(a < 0.5 * own for a, own in zip(ratios("resnet8, J rounded off"), ratios("resnet8"), strict=True))
    assert "Networks with ReLUs" in (folder / "summary.md").read_text()
