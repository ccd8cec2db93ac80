"""A small run of the study of language, and what it says where the data are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_privacy.cli import app
from fl_privacy.errors import InvalidInputError
from fl_privacy.studies.language import read_sentences

SST2 = Path(os.environ.get("FL_PRIVACY_DATA", Path(__file__).parents[3] / "shared" / "data")) / "text" / "SST2"


@pytest.mark.skipif(not (SST2 / "train.tsv").is_file(), reason="SST-2 is not there")
def test_words_are_read_at_little_noise_and_not_at_much(conducted):
    rows, folder = conducted(
        "language", data_root=str(SST2), num_sentences=1, most_words=5, epochs=1, width=8, relative_stds=(1e-2, 1.0)
    )
    little, much = rows
    assert (little.words, much.words) == (5, 5)
    assert little.accuracy > 0.6
    assert little.leakage > 0.6 > 0.1 > much.leakage
    assert little.anywhere > much.anywhere
    assert much.predicted == pytest.approx(much.prior_std * (1 - much.leakage) ** 0.5, rel=1e-6)
    assert "words recovered" in (folder / "summary.md").read_text()


def test_missing_files_are_named_with_where_they_go(tmp_path):
    outcome = CliRunner().invoke(
        app, ["study", "language", "--data-root", str(tmp_path / "none"), "-o", str(tmp_path / "out")]
    )
    assert outcome.exit_code == 2
    assert "train.tsv is not there: put SST-2's train.tsv and dev.tsv" in outcome.stderr


def test_lines_of_another_kind_are_refused(tmp_path):
    (tmp_path / "train.tsv").write_text("a fine film\t1\nno label here\n")
    with pytest.raises(InvalidInputError, match=r"0 or 1 in line 2 of .*got 'no label here'"):
        read_sentences(tmp_path / "train.tsv")
