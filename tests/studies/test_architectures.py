"""Two architectures on digits."""

import pytest

from fl_privacy.studies.architectures import best_rows


@pytest.fixture(scope="module")
def rows(conducted):
    return conducted("architectures", models=("linear", "mlp"), inverting_steps=30)[0]


def select(rows, attack):
    return [row for row in rows if row.attack == attack]


def test_gauss_newton_reaches_what_is_predicted(rows):
    found = select(rows, "gauss-newton")
    assert len(found) == 2 * 2 * 2
    assert all(row.converged and row.explained for row in found)
    assert all(row.error == pytest.approx(row.predicted, rel=0.3) for row in found)


def test_the_bound_is_below_i2f(rows):
    """‖(G + ε)⁻¹Jᵀδ‖ ≥ ‖Jᵀδ‖/(λ_max + ε), which is the bound where ε is small."""
    for row in rows:
        assert row.influence_residual <= 1e-3
        assert 0 < row.lower_bound <= 1.001 * row.influence * (1 + row.ridge / row.largest)


def test_matching_gradients_finds_the_same_and_cut_short_it_fails(rows):
    assert all(row.error == pytest.approx(row.predicted, rel=0.3) for row in select(rows, "dgl"))
    cut_short = [row for row in select(rows, "inverting-gradients") if row.noise_std == 1e-3]
    assert cut_short
    assert not any(row.explained for row in cut_short)
    assert all(row.error > 2 * row.predicted for row in cut_short)


def test_the_best_attack_of_a_run_is_one_of_its_own(rows):
    best = best_rows(rows)
    assert len(best) == len(select(rows, "gauss-newton"))
    for row in best:
        run = [r for r in rows if (r.model, r.noise_std, r.image) == (row.model, row.noise_std, row.image)]
        assert len(run) == 3
        assert row.error == min(r.error for r in run)
